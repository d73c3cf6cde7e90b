// The same attack on an ordinary model, beside the one that is served.

import { hardened, named, pngUrl, showVerdict } from "./answers.js";
import { post } from "./api.js";
import { $, attackText, percent, say } from "./dom.js";
import { Latest } from "./latest.js";
import { save } from "./result.js";
import { overlay } from "./viewer.js";

/** Asks for the compared model alone, once the served model's result is on the screen: that comes
 * no later for it. */
export class Compare {
  /** `idle()` is called when there is nothing more to compare. */
  constructor(attack, { idle }) {
    this.attack = attack;
    this.model = null; // as /model tells of it
    this.shown = null; // {fields, picture} of what is on the screen
    this.failed = null; // the fields of what the service refused
    this.latest = new Latest({
      run: (request, signal) => post("attack", { ...request.fields, file: request.picture.input, compare: "only" }, { signal }),
      show: (answer, request) => this.#show(answer, request),
      fail: (error, request) => {
        this.failed = JSON.stringify(request.fields);
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

  /** Takes over the model to compare with, if there is one. */
  configure({ card, compare }) {
    const { arch } = compare?.card.architecture ?? {};
    const trained = hardened(card) ? ", trained to withstand attacks" : "";
    $("served-title").textContent = `This model: ${card.architecture?.arch ?? "network"}${trained}`;
    if (compare?.sha256 !== this.model?.sha256) this.shown = null;
    this.model = compare ?? null;
    $("compare-field").hidden = !compare;
    if (compare) $("intro-point").textContent = "whether it fools a robust model and an ordinary one";
    const ordinary = compare && !hardened(compare.card);
    this.name = ordinary ? "ordinary model" : "other model";
    $("compared-name").textContent = `${capital(this.name)}, attacked`;
    const how = ordinary ? ", trained without attacks" : "";
    $("compared-title").textContent = compare ? `${capital(this.name)}: ${arch ?? compare.name}${how}` : "";
    this.#layout();
  }

  /** Takes over whether an address has both models. */
  restore(query) {
    $("compare").checked = query.get("compare") !== "no";
    this.#layout();
  }

  /** Whether both models are shown. */
  get on() {
    return this.model !== null && $("compare").checked;
  }

  /** Whether what is shown was computed for other settings than those on the page. */
  get stale() {
    const { shown, attack } = this;
    if (!shown || !attack.limits) return true;
    const same = shown.picture === attack.picture && shown.fields === JSON.stringify(attack.request);
    return attack.pending || !same;
  }

  #layout() {
    $("attack").toggleAttribute("data-compare", this.on);
    for (const id of ["compared-figure", "compared-result", "compared-transfer", "served-title"]) $(id).hidden = !this.on;
    $("adversarial-name").textContent = this.on ? "This model, attacked" : "Adversarial";
    this.mark();
  }

  /** Dims what is not of the settings on the page. */
  mark() {
    if (!this.on) return;
    const { stale } = this;
    $("attack").toggleAttribute("data-compare-stale", stale);
    $("compared-result").setAttribute("aria-busy", String(stale && this.failed === null));
  }

  /** Leaves the device to the attack. */
  pause() {
    this.latest.stop();
    this.failed = null;
    say($("compare-error"));
    this.mark();
  }

  /** Goes on once the attack is shown. */
  resume() {
    const { attack } = this;
    const fields = attack.limits && JSON.stringify(attack.request);
    const wanted = this.on && attack.shown && !attack.stale && this.stale && this.failed !== fields;
    if (!wanted) return this.idle();
    if (!this.latest.running) this.latest.ask({ fields: attack.request, k: attack.k, picture: attack.picture });
  }

  #show({ before: served, target, compare }, { fields, k, picture }) {
    if (picture !== this.attack.picture) return;
    const [result] = compare.results;
    this.shown = { fields: JSON.stringify(fields), picture };
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

const capital = (text) => text[0].toUpperCase() + text.slice(1);
