// How confidence falls with eps, and the smallest eps that breaks the image: PGD-10, point by point.

import { isStopped, post } from "./api.js";
import { blobOf, probabilities } from "./attack.js";
import { curve } from "./charts.js";
import { $, el, epsText, normText, percent } from "./dom.js";

const STEPS = 10;
const QUIET = 500; // ms without an attack before the curve takes the device

export class Breaking {
  constructor(attack) {
    this.attack = attack;
    this.points = new Map();
    this.stopper = null;
    this.timer = null;
    new ResizeObserver(() => this.draw()).observe($("curve"));
    $("curve-show").addEventListener("click", () => {
      $("eps").value = this.broken;
      $("eps").dispatchEvent(new Event("input"));
      $("eps").focus();
    });
  }

  /** The smallest eps found to break it, in 255ths, or null. */
  get broken() {
    const gone = [...this.points.values()].filter(({ success }) => success).map(({ k }) => k);
    return gone.length ? Math.min(...gone) : null;
  }

  /** Begins anew: another image, label, target or norm. */
  restart() {
    this.stopper?.abort();
    this.stopper = null;
    this.points = new Map();
    this.failure = null;
    this.draw();
  }

  /** Leaves the device to the attack. */
  pause() {
    clearTimeout(this.timer);
    this.stopper?.abort();
    this.stopper = null;
  }

  /** Goes on where it was, unless another attack comes soon. */
  resume() {
    this.draw();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#go(), QUIET);
  }

  async #go() {
    if (this.stopper || !this.attack.picture) return;
    const stopper = (this.stopper = new AbortController());
    const { points } = this;
    try {
      for (let k = this.#next(); k !== null; k = this.#next()) {
        const point = await this.#measure(k, stopper.signal);
        if (points !== this.points) return;
        points.set(k, point);
        this.failure = null;
        this.draw();
      }
    } catch (error) {
      if (isStopped(error)) return;
      this.failure = error;
    } finally {
      if (this.stopper === stopper) this.stopper = null;
    }
    this.draw();
  }

  /** First ever larger until it breaks, then the bisection, then what makes the line smooth. */
  #next() {
    const has = (k) => this.points.has(k);
    const { most, norm } = this.attack;
    const unit = norm === "l2" ? 16 : 1;
    const broken = this.broken;
    if (!has(0)) return 0;
    if (broken === null) {
      for (let k = unit; k < most; k *= 2) if (!has(k)) return k;
      return has(most) ? null : most;
    }
    const held = Math.max(-1, ...[...this.points.keys()].filter((k) => k < broken));
    if (broken - held > 1 && broken > 0) return Math.floor((held + broken) / 2);
    const range = this.#range();
    const wanted = Array.from({ length: 9 }, (_, i) => Math.round((i * range) / 8));
    return wanted.find((k) => !has(k)) ?? null;
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
    const answer = await post("attack", request, { signal });
    const [{ after, success, adversarial_png: png }] = answer.results;
    const label = answer.label.index;
    let p = after.top.find(({ index }) => index === label)?.probability;
    if (p === undefined) p = (await probabilities(blobOf(png), classes.length, signal))[label];
    return { k, p, success, taken: after.label };
  }

  draw() {
    const { attack, broken } = this;
    if (!attack.limits) return;
    const sorted = [...this.points.values()].sort((a, b) => a.k - b.k);
    const { norm, result } = attack;
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
    $("curve-show").hidden = !this.#settled || broken === null;
    $("curve-table").tBodies[0].replaceChildren(
      ...sorted.map(({ k, p: value, taken, success }) =>
        el(
          "tr",
          {},
          el("th", { scope: "row" }, epsText(k, norm)),
          el("td", {}, percent(value)),
          el("td", {}, taken),
          el("td", {}, success ? "yes" : "no"),
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
    if (this.failure) return `The curve is not complete: ${this.failure.message}`;
    if (!this.#settled) return `Looking for the smallest eps that breaks it (${what})…`;
    if (broken === null) return `${what} does not ${target ? `lead it to ${target}` : "break it"} up to ${epsText(most, norm)}.`;
    if (broken === 0) return target ? `It is ${target} already.` : `It is not taken for ${label} even at eps 0.`;
    return `Smallest eps that ${target ? `leads it to ${target}` : "breaks this image"}: ${epsText(broken, norm)} (${what}).`;
  }
}
