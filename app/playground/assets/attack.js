// The attack: its controls, the request they make, and what came of it.

import { ask, Failure, post } from "./api.js";
import { bars } from "./charts.js";
import { copies, line } from "./curl.js";
import { $, attackText, epsText, normText, options, percent, say, seconds, sleep } from "./dom.js";
import { Latest } from "./latest.js";

const SETTLE = 120; // ms without a change before a longer attack begins
const SHOW_PROGRESS = 150; // ms, below which a bar would only flicker

export class Attack {
  /** `busy()` is called when an attack begins, `idle()` when the last has ended, `changed()` when
   * the curve is another one. */
  constructor({ idle, busy, changed }) {
    this.idle = idle;
    this.busy = busy;
    this.changed = changed;
    this.picture = null; // {input: Blob, name, before: probabilities, predicted}
    this.result = null;
    this.pace = new Map(); // seconds a forward pass, by attack
    this.timer = null;
    this.rest = null; // stops the question for the probabilities of all classes
    this.latest = new Latest({
      run: (request, signal) => this.#run(request, signal),
      show: (answer, request, more) => this.#show(answer, request, more),
      fail: (error) => say($("attack-error"), error.message),
      idle: () => this.timer === null && this.idle(),
    });
    this.#wire();
  }

  #wire() {
    $("eps").addEventListener("input", () => this.#eps(Number($("eps").value)));
    $("eps-number").addEventListener("input", () => {
      const { value, validity } = $("eps-number");
      if (value !== "" && validity.valid) this.#eps(Number(value));
    });
    $("eps-number").addEventListener("change", () => ($("eps-number").value = $("eps").value));
    $("name").addEventListener("change", () => this.#named());
    $("norm").addEventListener("change", () => this.#normed());
    $("steps").addEventListener("input", () => $("steps").validity.valid && this.ask());
    $("steps").addEventListener("change", () => this.#steps());
    $("target").addEventListener("change", () => this.ask({ curve: true }));
    $("label").addEventListener("change", () => this.#labelled());
    $("stop").addEventListener("click", () => this.#stop());
    copies($("curl-copy"), $("curl"));
  }

  /** Takes over what the service allows and the classes of its model. */
  configure(limits, classes) {
    this.limits = limits;
    this.classes = classes;
    const names = limits.attacks.map(({ name }) => [name, attackText(name)]);
    options($("name"), names, $("name").value || "fgsm");
    for (const { name, cost } of limits.attacks) {
      if (cost + 3 <= limits.max_cost) continue;
      const option = $("name").querySelector(`[value="${CSS.escape(name)}"]`);
      option.disabled = true;
      option.textContent += " (only to evaluate)";
    }
    options($("norm"), limits.norms.map((norm) => [norm, normText(norm)]));
    const same = classes.map((name) => [name, name]);
    options($("label"), [["", "As predicted"], ...same]);
    options($("target"), [["", "Any other"], ...same]);
    this.#named({ quietly: true });
  }

  get choice() {
    return this.limits.attacks.find(({ name }) => name === $("name").value);
  }

  get norm() {
    return $("norm").value;
  }

  get k() {
    return Number($("eps").value);
  }

  /** The largest eps, in 255ths. */
  get most() {
    return Math.floor(255 * this.limits.max_eps[this.norm] + 1e-6);
  }

  /** What both the attack and the curve ask for, beside the image. */
  get fields() {
    return { norm: this.norm, label: $("label").value, target: $("target").value };
  }

  /** The fields of the request now on the screen. */
  get request() {
    return {
      attack: this.choice.name,
      eps: `${this.k}/255`,
      steps: this.choice.takes_steps ? $("steps").value : "",
      ...this.fields,
    };
  }

  /** A new picture: show it and attack it. */
  take(picture) {
    this.picture = picture;
    this.result = null;
    $("attack").dataset.stale = "true"; // what is shown is of the picture before
    const known = picture.label && this.classes.includes(picture.label);
    $("label").value = known ? picture.label : "";
    if ($("target").value === ($("label").value || picture.predicted)) $("target").value = "";
    $("original").src = picture.url;
    $("original").alt = `${picture.name} as the model takes it`;
    $("original").hidden = false;
    save("original", picture.url, `${picture.stem}-input.png`);
    this.#unavailable();
    this.ask({ curve: true });
  }

  /** Attack with what is set now. */
  ask({ curve = false } = {}) {
    if (!this.limits) return;
    const file = this.picture?.name ?? "image.png";
    $("curl").textContent = line("attack", this.request, { file });
    if (!this.picture) return;
    if (curve) this.changed();
    this.#unset();
    const request = { ...this.request, at: performance.now(), choice: this.choice, k: this.k };
    request.file = this.picture.input;
    request.picture = this.picture;
    const quick = this.choice.steps === 1 && !this.choice.takes_steps;
    this.busy();
    if (quick) {
      this.rest?.abort(); // 300 ms are short
      this.latest.ask(request, { patient: true });
    } else {
      this.latest.stop();
      this.timer = setTimeout(() => {
        this.timer = null;
        this.latest.ask(request);
      }, SETTLE);
    }
  }

  #eps(k) {
    $("eps").value = k;
    if (document.activeElement !== $("eps-number")) $("eps-number").value = $("eps").value;
    const text = epsText(this.k, this.norm);
    $("eps-text").textContent = text;
    $("eps").setAttribute("aria-valuetext", text);
    this.ask();
  }

  #named({ quietly = false } = {}) {
    const { steps, takes_steps: takes, takes_target: leads } = this.choice;
    $("target").disabled = !leads;
    const freed = !leads && $("target").value !== "";
    if (freed) $("target").value = "";
    $("steps").disabled = !takes;
    $("steps").max = this.limits.max_steps;
    if (!takes) $("steps").value = "";
    else if (!quietly || !$("steps").value) $("steps").value = this.#affordable(this.choice);
    $("steps").placeholder = takes ? "" : steps === 1 ? "one" : "fixed";
    if (quietly) this.#normed({ keep: this.picture !== null });
    else this.ask({ curve: freed });
  }

  #normed({ keep = false } = {}) {
    const k = keep ? this.k : Math.round(255 * this.limits.default_eps[this.norm]);
    for (const id of ["eps", "eps-number"]) $(id).max = this.most;
    if (this.picture) this.changed();
    this.#eps(Math.min(k, this.most));
    $("eps-number").value = $("eps").value;
  }

  #steps() {
    const { min, max, value } = $("steps");
    const steps = Math.round(Number(value)) || this.choice.steps;
    const clamped = Math.min(Math.max(steps, min), max);
    if (String(clamped) === value) return;
    $("steps").value = clamped;
    this.ask();
  }

  #labelled() {
    const label = $("label").value || this.picture?.predicted;
    if ($("target").value === label) $("target").value = "";
    this.#unavailable();
    this.ask({ curve: true });
  }

  /** No attack leads to where it leads away from. */
  #unavailable() {
    const label = $("label").value || this.picture?.predicted;
    for (const option of $("target").options) option.disabled = option.value === label;
  }

  #stop() {
    this.#unset();
    this.latest.stop();
    say($("attack-error"), "Stopped. What is shown is from before.");
  }

  #unset() {
    clearTimeout(this.timer);
    this.timer = null;
  }

  async #run({ at, choice, k, picture, ...fields }, signal) {
    const ticking = this.#tick(choice, fields, signal);
    try {
      return await post("attack", fields, { signal });
    } finally {
      ticking.abort();
    }
  }

  /** The usual steps, or as many as should be through in a third of the service's deadline. */
  #affordable({ cost, steps }) {
    const most = this.limits.deadline_seconds / 3;
    const expected = cost * (this.pace.get("any") ?? 0);
    if (expected <= most) return steps;
    return Math.max(1, Math.floor((steps * most) / expected));
  }

  #cost({ cost, steps: usual }, steps) {
    return (cost * Number(steps || usual)) / usual;
  }

  /** Shows how long it has taken, and of how much where earlier attacks tell. */
  #tick(choice, { steps }, signal) {
    const stopper = new AbortController();
    const begin = performance.now();
    const pace = this.pace.get(choice.name) ?? this.pace.get("any");
    const expected = pace ? pace * this.#cost(choice, steps) : null;
    const tick = async () => {
      await sleep(SHOW_PROGRESS, stopper.signal);
      $("progress").dataset.busy = "true";
      $("stop").disabled = false;
      for (;;) {
        const gone = (performance.now() - begin) / 1000;
        if (expected) $("progress-bar").value = 1 - Math.exp((-2 * gone) / expected);
        else $("progress-bar").removeAttribute("value");
        const whole = expected ? ` of about ${seconds(expected)}` : "";
        $("progress-text").textContent = `${attackText(choice.name)}: ${gone.toFixed(1)} s${whole}`;
        await sleep(50, stopper.signal);
      }
    };
    const end = () => {
      $("progress").dataset.busy = "false";
      $("progress-text").textContent = "";
      $("progress-bar").value = 0;
      $("stop").disabled = true;
    };
    signal.addEventListener("abort", () => stopper.abort(), { once: true });
    tick().catch(end);
    return stopper;
  }

  #show(answer, request, more) {
    if (request.picture !== this.picture) return;
    const [result] = answer.results;
    const pace = result.seconds / this.#cost(request.choice, request.steps);
    this.pace.set(request.choice.name, pace);
    // Some leave long before their cost is spent, which says nothing of the others.
    if (pace > (this.pace.get("any") ?? 0) / 3) this.pace.set("any", pace);
    this.result = { ...result, k: request.k, norm: request.norm, answer };
    say($("attack-error"));
    delete $("attack").dataset.stale;
    this.#pictures(result, request);
    this.#words(answer, result, request);
    const after = known(this.classes, result.after.top);
    bars($("both-bars"), this.classes, this.picture.before, after);
    document.documentElement.dataset.shown = `${request.attack} ${request.k}`;
    performance.measure("attack shown", { start: request.at, end: performance.now() });
    if (!more && result.after.top.length < this.classes.length) this.#complete(result);
  }

  /** /attack names the likeliest classes; /predict tells all of what came out. */
  async #complete(result) {
    const { signal } = (this.rest = new AbortController());
    try {
      const image = blobOf(result.adversarial_png);
      const after = await probabilities(image, this.classes.length, signal);
      bars($("both-bars"), this.classes, this.picture.before, after);
    } catch {
      // The likeliest stay; a service that went away is told of elsewhere.
    }
  }

  #pictures(result, { attack, k }) {
    const stem = `${this.picture.stem}-${attack}-${this.norm}-${k}of255`;
    for (const kind of ["perturbation", "adversarial"]) {
      const url = `data:image/png;base64,${result[`${kind}_png`]}`;
      $(kind).src = url;
      $(kind).hidden = false;
      save(kind, url, `${stem}-${kind}.png`);
    }
    $("perturbation").alt = "What the attack added, amplified; grey is nothing";
    $("adversarial").alt = `The image after ${attackText(attack)}, taken for ${result.after.label}`;
    const levels = Math.round(255 * result.linf);
    $("perturbation-text").textContent = levels ? `amplified ×${(127 / levels).toFixed(0)}` : "none";
    $("original-text").textContent = named(this.result.answer.before);
    $("adversarial-text").textContent = named(result.after);
  }

  #words({ before, label, target, already_wrong: wrong }, { after, success, ...result }, request) {
    const verdict = $("verdict");
    verdict.dataset.state = wrong ? "wrong" : success ? "lost" : "held";
    verdict.textContent = wrong
      ? `Wrong before any attack: the model takes this ${label.label} for ${before.label}${
          after.label === before.label ? "." : `, and now for ${after.label}.`
        }`
      : success
        ? `Fooled: ${before.label} became ${after.label}.`
        : target && after.label !== label.label
          ? `Led to ${after.label}, but not to ${target.label}.`
          : `Withstood: still ${after.label}.`;
    $("facts").hidden = false;
    $("fact-success").textContent = success ? "yes" : "no";
    $("fact-linf").textContent = `${Math.round(255 * result.linf)}/255`;
    $("fact-l2").textContent = result.l2.toFixed(3);
    $("fact-seconds").textContent = seconds(result.seconds);
    $("fact-shown").textContent = seconds((performance.now() - request.at) / 1000);
  }
}

/** The probabilities of all classes of an image. */
export async function probabilities(image, count, signal) {
  const body = new FormData();
  body.append("file", image);
  const { results } = await ask(`predict?top_k=${Math.min(count, 1000)}`, { method: "POST", body, signal });
  return known(Array(count).fill(), results[0].top);
}

/** A list by class of the probabilities told of, undefined for the others. */
export function known(classes, top) {
  const values = Array(classes.length).fill(undefined);
  for (const { index, probability } of top) values[index] = probability;
  return values;
}

export function blobOf(base64) {
  return new Blob([Uint8Array.from(atob(base64), (char) => char.charCodeAt(0))], { type: "image/png" });
}

export function tooLarge(blob, limits) {
  if (blob.size <= limits.max_body_bytes - 2048) return null;
  const most = Math.floor(limits.max_body_bytes / 2 ** 20);
  return new Failure(`This file is too large: the service takes at most ${most} MiB.`, { status: 413 });
}

const named = ({ label, probability }) => `${label} ${percent(probability)}`;

function save(kind, url, name) {
  const link = $(`${kind}-save`);
  link.href = url;
  link.download = name;
  link.hidden = false;
  link.setAttribute("aria-label", `Download the ${kind} image as PNG`);
}
