// How confidence falls with eps, and the smallest eps that breaks the image: PGD-10, point by point.

import { isStopped, post } from "./api.js";
import { blobOf, known, outcomeText, probabilities } from "./answers.js";
import { curve } from "./charts.js";
import { $, el, epsText, normText, percent, say } from "./dom.js";

const STEPS = 10;
const FARTHER = 4; // times the largest eps withstood: the most that is tried next
const GUESSES = 2; // in a row that may leave more than half of what is to be searched
const QUIET = 500; // ms without an attack before the curve takes the device

export class Breaking {
  constructor(attack) {
    this.attack = attack;
    this.points = new Map();
    this.guesses = 0; // in a row that left more than half
    this.stopper = null;
    this.timer = null;
    new ResizeObserver(() => this.draw()).observe($("curve"));
    this.finding = false; // whether eps is to be set to the smallest one once that is found
    $("eps-find").addEventListener("click", () => {
      this.finding = true;
      $("eps-find").textContent = "Looking…";
      if (!this.#found()) this.#go();
    });
    for (const id of ["eps", "eps-number"]) $(id).addEventListener("input", () => this.#lookElsewhere());
  }

  /** The smallest eps found to break it, in 255ths, or null. */
  get broken() {
    const gone = [...this.points.values()].filter(({ success }) => success).map(({ k }) => k);
    return gone.length ? Math.min(...gone) : null;
  }

  /** The largest eps below that, in 255ths, which was withstood, or -1. */
  get standing() {
    const { broken } = this;
    return Math.max(-1, ...[...this.points.keys()].filter((k) => broken === null || k < broken));
  }

  /** Begins anew: another image, label, target or norm. */
  restart() {
    this.#lookElsewhere();
    this.stopper?.abort();
    this.stopper = null;
    this.points = new Map();
    this.guesses = 0;
    this.failure = null;
    this.draw();
  }

  /** Leaves the device to the attack. */
  pause() {
    clearTimeout(this.timer);
    this.stopper?.abort();
    this.stopper = null;
    this.draw(); // the mark of the eps set now
  }

  /** Goes on where it was, unless another attack comes soon. */
  resume() {
    this.draw();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#go(), QUIET);
  }

  async #go() {
    if (this.stopper || !this.attack.picture || this.attack.pending) return;
    const stopper = (this.stopper = new AbortController());
    const { points } = this;
    if (!points.has(0)) points.set(0, this.#original());
    try {
      for (let k = this.#next(); k !== null; k = this.#next()) {
        const point = await this.#measure(k, stopper.signal);
        if (points !== this.points) return;
        const left = this.#left;
        points.set(k, point);
        this.guesses = this.#left > left / 2 ? this.guesses + 1 : 0;
        this.failure = null;
        this.draw();
        if (this.#found()) return;
      }
    } catch (error) {
      if (isStopped(error)) return;
      this.failure = error;
      if (this.finding) say($("settings-note"), `The search for the smallest eps ended: ${error.message}`);
      this.#lookElsewhere();
    } finally {
      if (this.stopper === stopper) this.stopper = null;
    }
    this.draw();
  }

  /** Shows the smallest eps that breaks it, if that is looked for and known. */
  #found() {
    if (!this.finding || !this.#settled) return false;
    this.#lookElsewhere();
    const { attack, broken } = this;
    const words = this.#words($("label").value || attack.picture.predicted);
    if (!broken) return say($("settings-note"), words);
    attack.set({ name: "pgd", steps: STEPS, k: broken, ...this.points.get(broken) }, `${words} The attack now uses it.`);
    return true;
  }

  #lookElsewhere() {
    this.finding = false;
    $("eps-find").textContent = "Find the smallest eps that breaks it";
  }

  /** First the usual eps, then larger ones until one breaks it, then those where the margin should
   * be zero, or the middle where that hardly helps, and last a smooth line. */
  #next() {
    const has = (k) => this.points.has(k);
    const { most, norm, limits } = this.attack;
    const { broken, standing } = this;
    if (broken === null) {
      if (standing === most) return null;
      const usual = Math.max(Math.round(255 * limits.default_eps[norm]), 1);
      if (standing === 0) return Math.min(usual, most);
      const guess = Math.max(this.#zero(0, standing), standing + 1);
      return Math.min(guess, FARTHER * standing, most);
    }
    if (broken - standing > 1) {
      if (this.guesses >= GUESSES) return Math.floor((standing + broken) / 2);
      const guess = this.#zero(standing, broken);
      return Math.min(Math.max(guess, standing + 1), broken - 1);
    }
    const range = this.#range();
    const wanted = Array.from({ length: 9 }, (_, i) => Math.round((i * range) / 8));
    return wanted.find((k) => !has(k)) ?? null;
  }

  /** How many eps may be the smallest one. */
  get #left() {
    return (this.broken ?? this.attack.most) - this.standing;
  }

  /** The eps from which on the line through the margins at two others is below zero. */
  #zero(low, high) {
    const [a, b] = [low, high].map((k) => this.points.get(k).margin);
    return a > b ? Math.ceil(low + ((high - low) * a) / (a - b)) : Infinity;
  }

  /** The right end of the plot: where it breaks lies in the left half. */
  #range() {
    const { most, norm } = this.attack;
    const { broken } = this;
    const least = norm === "l2" ? 128 : 16;
    const reached = Math.max(...this.points.keys(), 0);
    return Math.min(most, Math.max(least, broken === null ? reached : 2 * broken));
  }

  async #measure(k, signal) {
    const { picture, fields, classes } = this.attack;
    const request = { attack: "pgd", steps: STEPS, eps: `${k}/255`, file: picture.input, ...fields };
    const begin = performance.now();
    const answer = await post("attack", request, { signal });
    const [{ after, outcome, seconds, adversarial_png: png }] = answer.results;
    const choice = this.attack.limits.attacks.find(({ name }) => name === "pgd");
    this.attack.pace.measured(choice, STEPS, seconds);
    const label = answer.label.index;
    const took = performance.now() - begin;
    let all = known(classes, after.top);
    if (all[label] === undefined) all = await probabilities(blobOf(png), classes.length, signal);
    return { ...this.#point(k, all, outcome), answer, took };
  }

  /** The point of the original image, which has been classified already. */
  #original() {
    const { before, predicted } = this.attack.picture;
    const { label, target } = this.attack.fields;
    const gone = target ? predicted === target : predicted !== (label || predicted);
    return this.#point(0, before, gone ? "already_wrong" : "withstood");
  }

  /** What an image with these probabilities says of eps k/255. `margin` is how far the prediction is
   * from another, or from the target: below zero it is broken. */
  #point(k, all, outcome) {
    const { classes, picture, fields } = this.attack;
    const label = classes.indexOf(fields.label || picture.predicted);
    const subject = fields.target ? classes.indexOf(fields.target) : label;
    const told = all.filter((p) => p !== undefined);
    const own = all[subject] ?? Math.min(...told);
    const margin = Math.log(own) - Math.log(Math.max(...all.map((p, index) => (index === subject ? 0 : p ?? 0))));
    const taken = classes[all.indexOf(Math.max(...told))];
    const success = outcome !== "withstood";
    return { k, p: all[label], margin: fields.target ? -margin : margin, success, outcome, taken };
  }

  draw() {
    const { attack, broken } = this;
    if (!attack.limits) return;
    const sorted = [...this.points.values()].sort((a, b) => a.k - b.k);
    const { norm } = attack;
    const result = attack.stale ? null : attack.result;
    const label = $("label").value || attack.picture?.predicted || "the true class";
    const p = result?.norm === norm ? this.#confidence(result, label) : undefined;
    curve($("curve"), {
      points: sorted,
      most: Math.max(this.#range(), 1),
      norm,
      current: { k: attack.k, p: result?.k === attack.k ? p : undefined },
      broken,
      label: `Confidence in ${label} against eps. ${this.#words(label)}`,
    });
    $("curve-text").textContent = this.#words(label);
    $("curve-table").tBodies[0].replaceChildren(
      ...sorted.map(({ k, p: value, taken, outcome }) =>
        el(
          "tr",
          {},
          el("th", { scope: "row" }, epsText(k, norm)),
          el("td", {}, percent(value)),
          el("td", {}, taken),
          el("td", {}, outcomeText(outcome)),
        ),
      ),
    );
  }

  #confidence({ after }, label) {
    return after.top.find((item) => item.label === label)?.probability;
  }

  get #settled() {
    const { broken } = this;
    if (broken === null) return this.points.has(this.attack.most);
    return broken === 0 || this.points.has(broken - 1);
  }

  #words(label) {
    const { broken } = this;
    const { norm, most } = this.attack;
    const target = $("target").value;
    const what = `PGD-${STEPS}, ${normText(norm)}`;
    if (!this.attack.picture) return "";
    if (this.failure) return `The curve is incomplete: ${this.failure.message}`;
    if (!this.#settled) return `Looking for the smallest eps that breaks it (${what})…`;
    if (broken === null) return `PGD-${STEPS} under ${normText(norm)} does not ${target ? `change the prediction to ${target}` : "break this image"} up to eps ${epsText(most, norm)}.`;
    if (broken === 0) {
      const { taken } = this.points.get(0);
      if (target) return `The model already predicts ${target} without an attack.`;
      return `The model is wrong without an attack: it predicts ${taken}, not ${label}.`;
    }
    return `Smallest eps that ${target ? `changes the prediction to ${target}` : "breaks this image"}: ${epsText(broken, norm)} (${what}).`;
  }
}
