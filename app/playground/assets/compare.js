// Runs the same attack on a comparison model, next to the served model.

import { hardened, named, pngUrl, showVerdict } from "./answers.js";
import { postAttack } from "./api.js";
import { $, attackText, capital, percent, say } from "./dom.js";
import { Latest } from "./latest.js";
import { save } from "./result.js";
import { overlay } from "./viewer.js";

/** Attacks the comparison model in a request of its own, after the served model's result is shown,
 * so that it does not delay that. */
export class Compare {
  /** `idle()` is called when no comparison is left to run. */
  constructor(attack, { idle }) {
    this.attack = attack;
    this.model = null; // `compare` of /model
    this.shown = null; // {key, picture} of the result on the screen
    this.failed = null; // the key of a request that failed
    this.latest = new Latest({
      run: ({ fields, picture }, signal) => postAttack({ ...fields, file: picture.input, compare: "only" }, signal),
      show: (answer, request) => this.#show(answer, request),
      fail: (error, request) => {
        this.failed = request.key;
        say($("compare-error"), error.message);
      },
      idle: () => {
        this.mark();
        idle();
      },
    });
    this.idle = idle;
    $("compare").addEventListener("change", () => {
      this.#layout();
      this.attack.asked();
      this.attack.snippets();
      if (!this.on) this.latest.stop();
      else if (!this.attack.working) this.resume();
    });
  }

  /** Sets the comparison model from the response of /model. */
  configure({ card, compare }) {
    const { arch } = compare?.card.architecture ?? {};
    const trained = hardened(card) ? ", trained to withstand attacks" : "";
    $("served-title").textContent = `This model: ${card.architecture?.arch ?? "network"}${trained}`;
    if (compare?.sha256 !== this.model?.sha256) this.shown = null;
    this.model = compare ?? null;
    $("compare-field").hidden = !compare;
    if (compare) $("intro-point").textContent = "whether it fools a robust model and a standard one";
    const standard = compare && !hardened(compare.card);
    this.name = standard ? "standard model" : "comparison model";
    $("compare-kind").textContent = this.name;
    $("compared-name").textContent = `${capital(this.name)}, attacked`;
    const how = standard ? ", trained without attacks" : "";
    $("compared-title").textContent = compare ? `${capital(this.name)}: ${arch ?? compare.name}${how}` : "";
    this.#layout();
  }

  /** Restores from the URL whether the models are compared. */
  restore(query) {
    $("compare").checked = query.get("compare") !== "no";
    this.#layout();
  }

  /** Whether both models are shown. */
  get on() {
    return this.model !== null && $("compare").checked;
  }

  /** Whether the result on the screen is for other settings than the current ones. */
  get stale() {
    return this.shown === null || this.attack.isStale(this.shown);
  }

  #layout() {
    $("attack").toggleAttribute("data-compare", this.on);
    for (const id of ["compared-figure", "compared-result", "compared-transfer", "served-title"]) $(id).hidden = !this.on;
    $("adversarial-name").textContent = this.on ? "This model, attacked" : "Adversarial";
    this.mark();
  }

  /** Dims the result if it is stale. */
  mark() {
    if (!this.on) return;
    const { stale } = this;
    $("attack").toggleAttribute("data-compare-stale", stale);
    $("compared-result").setAttribute("aria-busy", String(stale && this.failed === null));
  }

  /** Stops, so that the device is free for the attack. */
  pause() {
    this.latest.stop();
    this.failed = null;
    say($("compare-error"));
    this.mark();
  }

  /** Runs the comparison, if the attack's result is shown and the comparison is stale. */
  resume() {
    const { attack } = this;
    const wanted = this.on && attack.shown && !attack.stale && this.stale && this.failed !== attack.key;
    if (!wanted) return this.idle();
    if (!this.latest.running) this.latest.ask({ fields: attack.request, key: attack.key, k: attack.k, picture: attack.picture });
  }

  #show({ before: served, target, compare }, { fields, key, k, picture }) {
    if (picture !== this.attack.picture) return;
    const [result] = compare.results;
    this.shown = { key, picture };
    const url = pngUrl(result.adversarial_png);
    $("compared").src = url;
    $("compared").hidden = false;
    $("compared").alt = `The image after ${attackText(fields.attack)} on the ${this.name}, predicted as ${result.after.label}`;
    overlay("compared", picture.url);
    save("compared", url, `${picture.stem}-${fields.attack}-${fields.norm}-${k}of255-${this.name.replace(" ", "-")}.png`);
    $("compared-text").textContent = named(result.after);
    showVerdict($("compared-verdict"), { ...compare, target }, result);
    const { after, outcome } = result.transfer;
    $("compared-transfer").textContent =
      `The ${this.name} ${changeText(compare.before, result.after)} ` +
      `Shown the same adversarial image, this model ${transferText(served, after, outcome)}`;
    this.mark();
    document.documentElement.dataset.compared = `${fields.attack} ${k}`;
  }
}

const changeText = (before, after) =>
  before.label === after.label
    ? `predicts ${before.label} before (${percent(before.probability)}) and after the attack (${percent(after.probability)}).`
    : `changes from ${named(before)} to ${named(after)}.`;

function transferText(before, after, outcome) {
  const seen = named(after);
  if (outcome === "broken") return `is fooled too: it predicts ${seen}.`;
  if (outcome === "already_wrong") return `predicts ${seen}.`;
  return after.label === before.label ? `still predicts ${seen}.` : `predicts ${seen}.`;
}
