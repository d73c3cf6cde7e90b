// The curve of confidence against eps, and the search for the smallest eps that breaks the image:
// PGD-10, one eps at a time.

import { isStopped, postAttack } from "./api.js";
import { blobOf, known, outcomeText, probabilities } from "./answers.js";
import { curve } from "./charts.js";
import { $, el, epsText, normText, percent, say } from "./dom.js";

const STEPS = 10;
const FARTHER = 4; // the next eps is at most this many times the largest one withstood
const GUESSES = 2; // interpolations in a row that may leave over half of the range; then bisection
const QUIET = 500; // ms without an attack before the curve uses the device

export class Breaking {
  constructor(attack) {
    this.attack = attack;
    this.points = new Map();
    this.guesses = 0; // interpolations in a row that left over half of the range
    this.stopper = null;
    this.timer = null;
    new ResizeObserver(() => this.draw()).observe($("curve"));
    this.finding = false; // whether to set eps to the smallest one once it is found
    $("eps-find").addEventListener("click", () => {
      this.finding = true;
      $("eps-find").textContent = "Searching…";
      if (!this.#found()) this.#go();
    });
    for (const id of ["eps", "eps-number"]) $(id).addEventListener("input", () => this.#stopFinding());
  }

  /** The smallest eps found to break it, in 255ths, or null. */
  get broken() {
    const gone = [...this.points.values()].filter(({ success }) => success).map(({ k }) => k);
    return gone.length ? Math.min(...gone) : null;
  }

  /** The largest eps below it that was withstood, in 255ths, or -1. */
  get standing() {
    const { broken } = this;
    return Math.max(-1, ...[...this.points.keys()].filter((k) => broken === null || k < broken));
  }

  /** Starts over, for another image, label, target or norm. */
  restart() {
    this.#stopFinding();
    this.stopper?.abort();
    this.stopper = null;
    this.points = new Map();
    this.guesses = 0;
    this.failure = null;
    this.draw();
  }

  /** Stops, so that the device is free for the attack. */
  pause() {
    clearTimeout(this.timer);
    this.stopper?.abort();
    this.stopper = null;
    this.draw(); // moves the mark of the current eps
  }

  /** Continues after a while without an attack. */
  resume() {
    this.draw();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#go(), QUIET);
  }

  async #go() {
    const { differentiable, picture, pending } = this.attack;
    if (this.stopper || !differentiable || !picture || pending) return;
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
      this.#stopFinding();
    } finally {
      if (this.stopper === stopper) this.stopper = null;
    }
    this.draw();
  }

  /** Switches to the smallest eps that breaks the image, if the user wants it and it is known. */
  #found() {
    if (!this.finding || !this.#settled) return false;
    this.#stopFinding();
    const { attack, broken } = this;
    const words = this.#words($("label").value || attack.picture.predicted);
    if (!broken) return say($("settings-note"), words);
    attack.set({ name: "pgd", steps: STEPS, k: broken, ...this.points.get(broken) }, `${words} The attack now uses it.`);
    return true;
  }

  #stopFinding() {
    this.finding = false;
    $("eps-find").textContent = "Find the smallest eps that breaks it";
  }

  /** The next eps to try, in 255ths, or null. First the default eps, then larger ones until one
   * breaks the image, then between the two where the margin should be zero, or the middle where
   * that hardly helps, and last the points of a smooth curve. */
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
      const guess = this.#zero(standing, broken);
      const middle = this.guesses >= GUESSES || guess === Infinity;
      if (middle) return Math.floor((standing + broken) / 2);
      return Math.min(Math.max(guess, standing + 1), broken - 1);
    }
    const range = this.#range();
    const wanted = Array.from({ length: 9 }, (_, i) => Math.round((i * range) / 8));
    return wanted.find((k) => !has(k)) ?? null;
  }

  /** The number of eps that may still be the smallest one. */
  get #left() {
    return (this.broken ?? this.attack.most) - this.standing;
  }

  /** The eps where a line through the margins at two others falls below zero; Infinity if it does
   * not, or if a margin is infinite, as of a prediction with a probability of exactly 1. */
  #zero(low, high) {
    const [a, b] = [low, high].map((k) => this.points.get(k).margin);
    return a > b && Number.isFinite(a - b) ? Math.ceil(low + ((high - low) * a) / (a - b)) : Infinity;
  }

  /** The right end of the plot, so that the smallest eps is in its left half. */
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
    const answer = await postAttack(request, signal);
    const [{ after, outcome, seconds, adversarial_png: png }] = answer.results;
    const choice = this.attack.limits.attacks.find(({ name }) => name === "pgd");
    this.attack.pace.measured(choice, STEPS, seconds);
    const label = answer.label.index;
    const took = performance.now() - begin;
    let all = known(classes, after.top);
    if (all[label] === undefined) all = await probabilities(blobOf(png), classes.length, signal);
    return { ...this.#point(k, all, outcome), answer, took };
  }

  /** The point of the original image, which is already classified. */
  #original() {
    const { before, predicted } = this.attack.picture;
    const { label, target } = this.attack.fields;
    const gone = target ? predicted === target : predicted !== (label || predicted);
    return this.#point(0, before, gone ? "already_wrong" : "withstood");
  }

  /** The point at eps k/255 for an image with these probabilities. `margin` is the log ratio of the
   * true class to the likeliest other one, or of the likeliest other class to the target: below
   * zero, the image is broken. */
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
    for (const id of ["curve", "curve-numbers"]) $(id).hidden = !attack.differentiable;
    $("eps-find").disabled = !attack.differentiable;
    const sorted = [...this.points.values()].sort((a, b) => a.k - b.k);
    const { norm } = attack;
    const result = attack.stale ? null : attack.result;
    const label = $("label").value || attack.picture?.predicted || "the true class";
    $("curve-class").textContent = $("label").value ? "true class" : "predicted class";
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
    const { norm, most, differentiable } = this.attack;
    const target = $("target").value;
    const what = `PGD-${STEPS}, ${normText(norm)}`;
    if (!differentiable) return "The curve and the smallest eps need PGD, which uses gradients; this model has none.";
    if (!this.attack.picture) return "";
    if (this.failure) return `The curve is incomplete: ${this.failure.message}`;
    if (!this.#settled) return `Searching for the smallest eps that breaks it (${what})…`;
    if (broken === null) return `PGD-${STEPS} under ${normText(norm)} does not ${target ? `change the prediction to ${target}` : "break this image"} at any eps up to ${epsText(most, norm)}.`;
    if (broken === 0) {
      const { taken } = this.points.get(0);
      if (target) return `The model already predicts ${target} without an attack.`;
      return `The model misclassifies this image without an attack: it predicts ${taken}, not ${label}.`;
    }
    return `Smallest eps that ${target ? `changes the prediction to ${target}` : "breaks this image"}: ${epsText(broken, norm)} (${what}).`;
  }
}
