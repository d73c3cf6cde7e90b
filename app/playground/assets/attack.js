// The attack panel: its controls, and the requests that they send.

import { blobOf, completed, maxEps, named, NO_GRADIENTS } from "./answers.js";
import { postAttack } from "./api.js";
import { bars, largest } from "./charts.js";
import { $, attackText, capital, epsText, normText, options, say } from "./dom.js";
import { Latest } from "./latest.js";
import { Pace } from "./pace.js";
import { save, settingsText, showOriginal, showResult } from "./result.js";
import { Snippets } from "./snippets.js";

const PREDICTED = "predicted"; // stands in the URL for the true class "As predicted"
const SETTLE = 120; // ms; changes in faster succession start a multi-step attack only once
const QUERIES = 500; // usual of a model without gradients, as thousands could exceed the time limit

export class Attack {
  /** `busy()` is called when an attack starts, `idle()` when the last one has ended, `changed()`
   * when the curve must be computed again, `asked()` when settings may have changed, and `marked()`
   * when the result may have become stale. `comparing()` returns whether two models are shown. */
  constructor({ idle, busy, changed, asked, marked, comparing }) {
    this.asked = asked;
    this.idle = idle;
    this.busy = busy;
    this.changed = changed;
    this.marked = marked;
    this.comparing = comparing;
    this.picture = null; // {input: Blob, name, before: probabilities, predicted}
    this.pending = false; // whether a new image was chosen and the service has not read it yet
    this.given = null; // the true class in the URL, for an image that is pending
    this.result = null;
    this.shown = null; // {key, picture, words} of the result on the screen
    this.pace = new Pace();
    this.code = new Snippets("curl");
    this.timer = null;
    this.last = -Infinity; // time of the last request
    this.held = false; // true while several settings change together
    this.known = null; // {key, answer, at} of an attack that the search for eps has run
    this.rest = null; // aborts the request for all probabilities
    this.latest = new Latest({
      run: (request, signal) => this.#run(request, signal),
      show: (answer, request, more) => this.#show(answer, request, more),
      fail: (error) => say($("attack-error"), error.message),
      idle: () => {
        this.#mark();
        if (this.timer === null) this.idle();
      },
    });
    this.#wire();
  }

  #wire() {
    $("eps").addEventListener("input", () => this.#eps(Number($("eps").value)));
    $("eps-number").addEventListener("input", () => {
      if (isWhole($("eps-number"))) this.#eps(Number($("eps-number").value));
      else say($("eps-note"), capital(`${this.#range}.`));
    });
    $("eps-number").addEventListener("change", () => {
      const valid = isWhole($("eps-number"));
      $("eps-number").value = $("eps").value;
      if (valid) return;
      say($("eps-note"), `eps stays at ${epsText(this.k, this.norm)}: ${this.#range}.`);
    });
    $("name").addEventListener("change", () => this.#named());
    $("norm").addEventListener("change", () => this.#normed());
    $("steps").addEventListener("input", () => {
      const { min, max, validity } = $("steps");
      if (validity.valid) this.ask();
      else say($("steps-note"), `${this.#budget}: choose a whole number from ${min} to ${max}.`);
    });
    $("steps").addEventListener("change", () => this.#steps());
    $("target").addEventListener("change", () => this.ask({ curve: true }));
    $("label").addEventListener("change", () => this.#labeled());
    $("stop").addEventListener("click", () => this.#stop());
  }

  /** Sets the controls from /limits and /model. */
  configure(limits, { name, classes, input_size: size, compare, differentiable }) {
    this.limits = differentiable ? limits : { ...limits, attacks: limits.attacks.map(withFewerQueries) };
    this.differentiable = differentiable;
    this.simplest = limits.attacks.find(({ uses_gradient: uses }) => differentiable || !uses);
    // For a comparison PGD, as FGSM often fools neither model.
    this.usual = compare && differentiable ? "pgd" : this.simplest.name;
    this.classes = classes;
    this.model = { name, size };
    this.pace.clear();
    const names = limits.attacks.map(({ name }) => [name, attackText(name)]);
    options($("name"), names, $("name").value || this.usual);
    for (const choice of this.limits.attacks) {
      const fault = this.#fault(choice);
      if (!fault) continue;
      const option = $("name").querySelector(`[value="${CSS.escape(choice.name)}"]`);
      option.disabled = true;
      option.textContent += ` (${fault})`;
    }
    if ($("name").selectedOptions[0].disabled) {
      $("name").value = this.simplest.name;
      $("steps").value = "";
    }
    options($("norm"), limits.norms.map((norm) => [norm, normText(norm)]));
    const same = classes.map((name) => [name, name]);
    options($("label"), [["", "As predicted"], ...same]);
    options($("target"), [["", "Any other"], ...same]);
    this.#named({ quietly: true });
  }

  /** Why an attack can't run on this model, or an empty text. */
  #fault({ cost, steps, unit, takes_steps: takes, uses_gradient: uses }) {
    if (uses && !this.differentiable) return "needs gradients";
    const { limits } = this;
    const most = unit === "queries" ? limits.max_queries : limits.max_steps;
    return cost + 3 <= limits.max_cost && (takes || steps <= most) ? "" : "evaluation only";
  }

  /** The form fields of an attack with eps 0, which returns the image as the model sees it. */
  get reading() {
    const { name, takes_steps: takes } = this.simplest;
    return { attack: name, eps: "0", steps: takes ? 1 : "" };
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
    return maxEps(this.limits, this.norm);
  }

  /** What the chosen attack's steps are called. */
  get #budget() {
    return capital(this.choice.unit);
  }

  /** What the field of eps accepts. */
  get #range() {
    return `choose a whole number of 255ths from 0 to ${this.most} under ${normText(this.norm)}`;
  }

  /** The form fields that the attack and the curve share. */
  get fields() {
    return { norm: this.norm, label: $("label").value, target: $("target").value };
  }

  /** The form fields of the current settings. */
  get request() {
    return {
      attack: this.choice.name,
      eps: `${this.k}/255`,
      steps: this.choice.takes_steps ? $("steps").value : "",
      ...this.fields,
    };
  }

  /** The form fields as text, to compare them. */
  get key() {
    return JSON.stringify(this.request);
  }

  /** A new image was chosen: shows it at once, and dims the previous result. */
  expect({ url, name }) {
    this.pending = true;
    this.given = null;
    this.#unset();
    this.latest.stop();
    if (url) showOriginal(url, `${name}, not read by the model yet`);
    $("original-text").textContent = "";
    $("original-save").hidden = true;
    this.#mark();
  }

  /** The chosen image can't be used: returns to the previous one. */
  forget() {
    this.pending = false;
    if (!this.picture) return this.#mark();
    this.#originalOf(this.picture);
    this.ask();
  }

  /** The service has read the new image: shows and attacks it. */
  take(picture) {
    this.picture = picture;
    this.pending = false;
    this.result = null;
    this.#label(this.given);
    this.given = null;
    if ($("target").value === ($("label").value || picture.predicted)) $("target").value = "";
    this.#originalOf(picture);
    this.#unavailable();
    this.ask({ curve: true });
  }

  #originalOf({ url, name, stem, before }) {
    showOriginal(url, `${name} as the model sees it`);
    save("original", url, `${stem}-input.png`);
    const index = largest(before);
    $("original-text").textContent = named({ label: this.classes[index], probability: before[index] });
  }

  /** Whether a result is for another image or other settings than the current ones. */
  isStale({ picture, key }) {
    return this.pending || picture !== this.picture || key !== this.key;
  }

  /** Whether the result on the screen is. */
  get stale() {
    return this.shown !== null && this.isStale(this.shown);
  }

  /** Dims a stale result, and says which settings the result is for. */
  #mark() {
    const { stale, shown } = this;
    const under = this.pending || this.working;
    $("attack").toggleAttribute("data-stale", stale);
    for (const id of ["result", "result-more"]) $(id).setAttribute("aria-busy", String(under && (stale || !shown)));
    const what = !stale ? "Result" : under ? "Updating; the dimmed result is" : "The dimmed result is";
    $("result-settings").textContent = shown ? `${what} for ${shown.words}.` : "";
    this.marked();
  }

  /** Whether an attack is running or about to start. */
  get working() {
    return this.timer !== null || this.latest.running;
  }

  /** Updates the code that does the same. */
  snippets() {
    const { picture, choice, request } = this;
    const file = picture?.name ?? "image.png";
    const compare = this.comparing() ? { compare: "true" } : {};
    this.code.attack({ ...request, ...compare }, { file, source: picture?.source, ...this.model });
  }

  /** Starts an attack with the current settings. */
  ask({ curve = false } = {}) {
    if (!this.limits || this.held) return;
    for (const id of ["settings-note", "eps-note", "steps-note"]) say($(id));
    this.asked();
    this.snippets();
    if (!this.picture || this.pending) return;
    if (curve) this.changed();
    this.#unset();
    const request = { ...this.request, key: this.key, at: performance.now(), choice: this.choice, k: this.k };
    request.file = this.picture.input;
    request.picture = this.picture;
    if (this.known?.key === request.key) {
      Object.assign(request, { answer: this.known.answer, at: this.known.at });
    }
    const often = performance.now() - this.last < SETTLE;
    this.last = performance.now();
    this.busy();
    this.rest?.abort();
    if (isQuick(this.choice)) {
      // While the slider moves, each result is shown; a multi-step attack is aborted instead.
      this.latest.ask(request, { patient: (running) => isQuick(running.choice) && running.picture === request.picture });
    } else {
      this.latest.stop();
      this.timer = setTimeout(
        () => {
          this.timer = null;
          this.latest.ask(request);
        },
        often ? SETTLE : 0,
      );
    }
    this.#mark();
  }

  /** Switches to an attack whose answer is already known, and explains why in `words`. */
  set({ name, steps, k, answer, took }, words) {
    this.held = true;
    $("name").value = name;
    this.#named();
    $("steps").value = steps;
    this.#eps(k);
    $("eps-number").value = k;
    this.held = false;
    this.known = { key: this.key, answer, at: performance.now() - took };
    this.last = -Infinity;
    this.ask();
    this.known = null;
    say($("settings-note"), words);
  }

  /** The class that an example shows, if the model has it. */
  get #shows() {
    const label = this.picture?.label;
    return this.classes.includes(label) ? label : "";
  }

  /** Sets the true class to that of the URL, or else of the example. */
  #label(given) {
    if (given === PREDICTED) $("label").value = "";
    else $("label").value = this.classes.includes(given) ? given : this.#shows;
  }

  /** The true class for the URL: none for the example's own, or for an image of the user, which the
   * URL does not have. */
  get label() {
    if (this.pending) return this.given;
    const { value } = $("label");
    return this.picture?.label && value !== this.#shows ? value || PREDICTED : null;
  }

  /** Restores settings from the URL; missing or invalid ones get their defaults. */
  restore(query) {
    const take = (id, value, usual) => {
      const open = [...$(id).options].filter(({ disabled }) => !disabled);
      $(id).value = open.some((option) => option.value === value) ? value : usual;
    };
    this.held = true;
    take("name", query.get("attack"), this.usual);
    if (!this.choice || $("name").selectedOptions[0].disabled) $("name").value = this.simplest.name;
    take("norm", query.get("norm"), this.limits.norms[0]);
    if (this.pending) this.given = query.get("label");
    else if (this.picture?.label) this.#label(query.get("label"));
    this.#unavailable();
    take("target", query.get("target"), "");
    $("steps").value = "";
    this.#named({ quietly: true });
    const usual = Math.round(255 * this.limits.default_eps[this.norm]);
    const k = /^(\d{1,5})\/255$/.exec(query.get("eps") ?? "")?.[1] ?? usual;
    const steps = Number(query.get("steps"));
    const fits = Number.isInteger(steps) && steps >= 1 && steps <= Number($("steps").max);
    if (this.choice.takes_steps && fits) $("steps").value = steps;
    this.changed();
    this.#eps(Math.min(Number(k), this.most));
    $("eps-number").value = $("eps").value;
    this.held = false;
    this.ask();
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
    const { steps, takes_steps: takes, takes_target: leads, summary } = this.choice;
    const note = this.differentiable ? "" : ` ${NO_GRADIENTS}`;
    $("name-summary").textContent = `${attackText($("name").value)}: ${summary}.${note}`;
    $("target").disabled = !leads;
    const freed = !leads && $("target").value !== "";
    if (freed) $("target").value = "";
    $("steps").disabled = !takes;
    $("steps-name").textContent = this.#budget;
    const { max_queries: queries, max_steps: most } = this.limits;
    $("steps").max = this.choice.unit === "queries" ? queries : most;
    if (!takes) $("steps").value = "";
    else if (!quietly || !$("steps").value) $("steps").value = steps;
    $("steps").placeholder = takes ? "" : steps === 1 ? "one" : "fixed";
    if (quietly) this.#normed({ keep: this.picture !== null });
    else this.ask({ curve: freed });
  }

  #normed({ keep = false } = {}) {
    const k = keep ? this.k : Math.round(255 * this.limits.default_eps[this.norm]);
    for (const id of ["eps", "eps-number"]) $(id).max = this.most;
    for (const node of document.querySelectorAll("[data-norm]")) node.hidden = node.dataset.norm !== this.norm;
    if (this.picture && !keep) this.changed();
    const allowed = Math.min(k, this.most);
    this.#eps(allowed);
    if (keep ? allowed !== k : this.picture) {
      const text = epsText(allowed, this.norm);
      const why = keep ? "this service's maximum" : `the default under ${ballText(this.norm)}`;
      say($("settings-note"), `eps was set to ${text}, ${why}.`);
    }
    $("eps-number").value = $("eps").value;
  }

  #steps() {
    const { min, max, value } = $("steps");
    const steps = Math.round(Number(value)) || this.choice.steps;
    const clamped = Math.min(Math.max(steps, min), max);
    if (String(clamped) === value) return;
    $("steps").value = clamped;
    this.ask();
    say($("steps-note"), `${this.#budget} were set to ${clamped}: choose from ${min} to ${max}.`);
  }

  #labeled() {
    const label = $("label").value || this.picture?.predicted;
    if ($("target").value === label) $("target").value = "";
    this.#unavailable();
    this.ask({ curve: true });
  }

  /** Disables the true class as a target; of an image that is pending it is not known. */
  #unavailable() {
    const label = this.pending ? null : $("label").value || this.picture?.predicted;
    for (const option of $("target").options) option.disabled = option.value === label;
  }

  #stop() {
    this.#unset();
    this.latest.stop();
    this.#mark();
    say($("attack-error"), "Stopped. The result shown is from an earlier attack.");
  }

  #unset() {
    clearTimeout(this.timer);
    this.timer = null;
  }

  async #run({ key, at, choice, k, picture, answer, ...fields }, signal) {
    if (answer) return answer;
    const ticking = this.pace.tick(choice, fields.steps, signal);
    try {
      return await postAttack(fields, signal);
    } finally {
      ticking.abort();
    }
  }

  #show(answer, request, more) {
    if (request.picture !== this.picture) return;
    const [result] = answer.results;
    this.pace.measured(request.choice, request.steps, result.seconds);
    this.rest?.abort();
    this.result = { ...result, k: request.k, norm: request.norm, answer };
    say($("attack-error"));
    this.shown = {
      picture: request.picture,
      key: request.key,
      words: settingsText(request, result.parameters),
    };
    this.#mark();
    showResult(answer, request, this);
    document.documentElement.dataset.shown = `${request.attack} ${request.k}`;
    performance.measure("attack shown", { start: request.at, end: performance.now() });
    if (!more && result.after.top.length < this.classes.length) this.#complete(result);
  }

  /** Shows all probabilities: /attack returns only the likeliest classes; /predict returns all. */
  async #complete(result) {
    const { signal } = (this.rest = new AbortController());
    try {
      const image = blobOf(result.adversarial_png);
      const after = await completed(this.classes, result.after.top, image, signal);
      bars($("both-bars"), this.classes, this.shown.picture.before, after);
    } catch {
      // The likeliest stay; an unreachable service is reported elsewhere.
    }
  }
}

function withFewerQueries({ steps, cost, ...choice }) {
  const fewer = Math.min(steps, QUERIES);
  return { ...choice, steps: fewer, cost: (cost * fewer) / steps };
}

/** Whether an attack has a single step, so that it can run at every move of the slider. */
const isQuick = ({ steps, takes_steps: takes }) => steps === 1 && !takes;

const isWhole = ({ value, validity }) => value !== "" && validity.valid;

const ballText = (norm) =>
  norm === "l2"
    ? "L2, where eps limits the length of the whole change"
    : "L∞, where eps limits the change of each pixel";
