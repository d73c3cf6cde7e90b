// The evaluation panel: starts an evaluation, shows its progress, cancels it, and finds it again
// after a reload.

import { ask, Failure, isStopped, open, post } from "./api.js";
import { maxEps, NO_GRADIENTS, tooLarge } from "./answers.js";
import { settling, swatch } from "./charts.js";
import { $, attackText, capital, el, normText, options, percent, say, seconds, sleep } from "./dom.js";
import { Report } from "./report.js";
import { Snippets } from "./snippets.js";
import { attackTerm, nameOf, term } from "./terms.js";

const UPLOAD = "\u0000upload"; // names of sets begin with a letter or a digit
const EXAMPLES = "\u0000examples";
const REMEMBERED = "robust-evaluation";
const LONGEST_WAIT = 30; // s, in the command to copy; the service waits no longer than its deadline
const ENDED = ["done", "failed", "cancelled"];

export class Evaluate {
  constructor() {
    this.lines = []; // the points of the plot so far, for each row of the table
    this.total = 0;
    this.job = null;
    this.asked = null; // the form's fields, as JSON, for the evaluation shown
    this.stopper = null;
    this.cancelling = false; // whether to cancel the evaluation once its id is known
    this.awaiting = null; // what to do once the connection is back
    this.began = null; // when the evaluation was first seen running
    this.report = new Report({ fail: (error) => this.#failed(error) });
    $("evaluate-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#start(this.#wanted);
    });
    $("evaluate-form").addEventListener("input", () => this.#changed());
    $("set-norm").addEventListener("change", () => {
      $("set-eps").value = Math.round(255 * this.limits.default_eps[$("set-norm").value]);
      this.#changed();
    });
    $("cancel").addEventListener("click", () => this.#cancel());
    this.code = new Snippets("evaluate-curl");
    $("evaluate-again").addEventListener("click", () => this.#start(this.#wanted));
    setInterval(() => this.#elapsed(), 1000);
    new ResizeObserver(() => this.#draw()).observe($("settling"));
  }

  configure(limits, { sha256, differentiable }) {
    const first = !this.limits;
    this.limits = limits;
    this.model = sha256;
    options($("set"), [
      ...limits.datasets.map((name) => [name, name]),
      [EXAMPLES, "Five example photographs (demo)"],
      [UPLOAD, "Upload a file…"],
    ]);
    options($("set-norm"), limits.norms.map((norm) => [norm, normText(norm)]));
    if (first) {
      $("set-attacks").replaceChildren(...limits.attacks.map(choice));
      $("set-eps").value = Math.round(255 * limits.default_eps[$("set-norm").value]);
    }
    this.#allow(differentiable, { first });
    if (first) this.#remembered();
    this.#changed();
  }

  /** Disables the attacks that need gradients if the model has none; at first, also chooses some. */
  #allow(differentiable, { first }) {
    const { attacks, default_attacks: usual } = this.limits;
    const usable = attacks.filter(({ uses_gradient: uses }) => differentiable || !uses).map(({ name }) => name);
    const chosen = usable.some((name) => usual.includes(name)) ? usual : usable;
    for (const box of $("set-attacks").querySelectorAll("input")) {
      box.disabled = !usable.includes(box.value);
      box.checked = !box.disabled && (first ? chosen.includes(box.value) : box.checked);
    }
    say($("set-attacks-note"), differentiable ? "" : NO_GRADIENTS);
  }

  get #fields() {
    const set = $("set").value;
    const eps = $("set-eps").value;
    return {
      dataset: set === UPLOAD || set === EXAMPLES ? "" : set,
      attack: [...$("set-attacks").querySelectorAll(":checked")].map(({ value }) => value),
      norm: $("set-norm").value,
      eps: eps === "" ? "" : `${eps}/255`,
      limit: $("set-limit").value,
    };
  }

  /** The form's fields, the chosen set, and which file it is if it is uploaded. */
  get #wanted() {
    const set = $("set").value;
    const file = set === UPLOAD ? $("set-file").files[0] : null;
    const upload = file ? [file.name, file.size, file.lastModified].join() : null;
    return { set, upload, ...this.#fields };
  }

  #changed() {
    const set = $("set").value;
    $("set-file-field").hidden = set !== UPLOAD;
    $("set-note").hidden = set !== EXAMPLES;
    $("set-eps").max = maxEps(this.limits, $("set-norm").value);
    const uploaded = $("set-file").files[0]?.name ?? "set.npz";
    const file = { [EXAMPLES]: "examples/photos.npz", [UPLOAD]: uploaded }[set];
    const source = set === EXAMPLES ? "playground/examples/photos.npz" : null;
    const wait = Math.ceil(Math.min(this.limits.deadline_seconds, LONGEST_WAIT));
    this.code.evaluate(this.#fields, { file, source, wait });
    this.#mark();
  }

  /** Dims a result for other settings than the form's or for another model, and says so. */
  #mark() {
    const { job } = this;
    const shown = job !== null && !$("evaluate-result").hidden;
    const earlier = shown && job.model_sha256 !== this.model;
    const stale = earlier || (shown && this.asked !== this.#comparable);
    $("evaluate-result").toggleAttribute("data-stale", stale);
    if (!stale) return say($("evaluate-stale"));
    if (earlier) return say($("evaluate-stale"), "The dimmed result is for an earlier model.");
    const [{ norm, eps_text: eps }] = job.attacks;
    const ball = `${normText(norm)}, eps ${eps}`;
    say($("evaluate-stale"), `The dimmed result is for ${this.#set}, ${ball}, not for the settings above.`);
  }

  /** The form as JSON, with the evaluated file if none is chosen: a reload clears the choice. */
  get #comparable() {
    const wanted = this.#wanted;
    return JSON.stringify({ ...wanted, upload: wanted.upload ?? JSON.parse(this.asked).upload });
  }

  /** Sets the form to the settings of an evaluation. */
  #adopt({ set, upload, attack, norm, eps, limit }) {
    if ([...$("set").options].some(({ value }) => value === set)) $("set").value = set;
    $("set-norm").value = norm;
    $("set-eps").value = eps.split("/")[0];
    $("set-limit").value = limit;
    for (const box of $("set-attacks").querySelectorAll("input")) {
      box.checked = !box.disabled && attack.includes(box.value);
    }
    this.asked = JSON.stringify({ ...this.#wanted, upload });
    this.#changed();
  }

  async #start(fields) {
    this.stopper?.abort();
    const stopper = (this.stopper = new AbortController());
    this.#begin("Sending…");
    try {
      this.asked = JSON.stringify(fields);
      this.#mark();
      this.#check(fields);
      const file = await this.#file(fields.set, stopper.signal);
      if (this.cancelling) return this.#tell("Canceled before it started.");
      const wait = { Prefer: "respond-async" };
      const { set, upload, ...sent } = fields;
      const job = await post("evaluate", { ...sent, file }, { signal: stopper.signal, headers: wait });
      remember({ id: job.id, fields });
      await this.#watch(job, stopper.signal);
      if (!ENDED.includes(job.state)) return;
      const text = $("evaluate-text").textContent;
      this.#tell(`${text} This is the result of an earlier evaluation with the same settings.`);
    } catch (error) {
      if (this.stopper !== stopper) return;
      this.#failed(error);
      if (error.away && !this.cancelling) this.awaiting = () => this.#start(fields);
    } finally {
      if (this.stopper === stopper) this.#end();
    }
  }

  /** Throws Failure for settings that the service would refuse. */
  #check({ attack, norm, eps }) {
    if (!attack.length) throw new Failure("Choose at least one attack.");
    const max = maxEps(this.limits, norm);
    if (Number(eps.split("/")[0]) > max) {
      throw new Failure(`Choose an eps of at most ${max}/255 under ${normText(norm)}, not ${eps}.`);
    }
  }

  /** The connection is back: does what the user clicked without one. */
  back() {
    const { awaiting } = this;
    this.awaiting = null;
    awaiting?.();
  }

  async #file(set, signal) {
    if (set === EXAMPLES) {
      const response = await open("playground/examples/photos.npz", { signal });
      return response.blob();
    }
    if (set !== UPLOAD) return "";
    const file = $("set-file").files[0];
    if (!file) throw new Failure("Choose a file first: npz or pt, with images and labels.");
    const fault = tooLarge(file, this.limits);
    if (fault) throw fault;
    return file;
  }

  /** Shows the evaluation that was started before the page was reloaded, if any. */
  async #remembered() {
    const found = remember();
    if (!found) return;
    const stopper = (this.stopper = new AbortController());
    this.#begin("Looking for the previous evaluation…");
    this.#adopt(found.fields);
    try {
      await this.#watch(await this.#again(found.id, stopper.signal), stopper.signal);
    } catch (error) {
      if (this.stopper === stopper) this.#failed(error);
    } finally {
      if (this.stopper === stopper) this.#end();
    }
  }

  /** Shows an evaluation until it ends; cancels it first if that was clicked before its id was known. */
  async #watch(job, signal) {
    this.#show(job);
    if (this.cancelling && !ENDED.includes(job.state)) await this.#cancel();
    if (!ENDED.includes(this.job.state)) await this.#follow(job.id, signal);
  }

  /** Fetches the evaluation with that id; retries while the service is down. */
  async #again(id, signal) {
    for (;;) {
      try {
        return await ask(`evaluate/${id}`, { signal });
      } catch (error) {
        if (error.status === 404) throw this.#gone();
        if (![0, 401, 429, 503].includes(error.status)) throw error;
        await sleep(2000, signal);
      }
    }
  }

  /** The Failure for an evaluation that the service no longer has; offers to run it again. */
  #gone() {
    const found = remember();
    remember(null);
    if (found) this.#adopt(found.fields);
    $("evaluate-again").hidden = false;
    const last = this.job ? " The numbers below are the last ones it sent." : "";
    return new Failure(
      `The service no longer has this evaluation: the service restarted, or the result expired.${last}`,
      { status: 404 }, // no retry: the user decides whether to run it again
    );
  }

  /** Shows each event as it comes; reconnects after a lost connection. */
  async #follow(id, signal) {
    for (let wait = 500; ; wait = Math.min(2 * wait, 5000)) {
      try {
        const response = await open(`evaluate/${id}/events`, { signal });
        for await (const { data } of events(response.body)) {
          const job = JSON.parse(data);
          wait = 500;
          this.lost = false;
          say($("evaluate-error"));
          this.#show(job);
          if (ENDED.includes(job.state)) return;
        }
      } catch (error) {
        if (isStopped(error)) throw error;
        if (error.status === 404) throw this.#gone();
        if (error.status && error.status < 500 && error.status !== 429) throw error;
        this.lost = true;
        this.#elapsed();
        say($("evaluate-error"), "The connection was lost. Trying again…");
      }
      await sleep(wait, signal);
    }
  }

  async #cancel() {
    $("cancel").disabled = true;
    if (!this.job) {
      this.cancelling = true; // the service may have accepted it already
      return this.#tell("Canceling…");
    }
    if (ENDED.includes(this.job.state)) return;
    try {
      this.#show(await ask(`evaluate/${this.job.id}`, { method: "DELETE" }));
    } catch (error) {
      say($("evaluate-error"), error.message);
      $("cancel").disabled = false;
      if (error.away) this.awaiting = () => this.#cancel();
    }
  }

  #begin(text) {
    this.lines = [];
    this.job = null;
    this.cancelling = false;
    this.awaiting = null;
    this.began = null;
    this.lost = false; // whether the connection is lost
    this.moved = { at: 0, digits: 1 }; // the last share shown
    this.report.of(null);
    $("evaluate-again").hidden = true;
    say($("evaluate-error"));
    this.#tell(text);
    $("evaluate-result").hidden = true;
    $("evaluate-bar").hidden = false;
    $("evaluate-bar").removeAttribute("value");
    $("start").disabled = true;
    $("cancel").disabled = false;
  }

  #end() {
    $("start").disabled = false;
    $("cancel").disabled = true;
    $("evaluate-bar").hidden = true;
  }

  #failed(error) {
    if (!isStopped(error)) say($("evaluate-error"), error.message);
    if (!this.job) this.#tell("");
    say($("evaluate-time"));
  }

  /** Shows `text`; screen readers announce `state`, when it changes. */
  #tell(text, state = text) {
    say($("evaluate-text"), text);
    if ($("evaluate-state").textContent !== state) $("evaluate-state").textContent = state;
  }

  /** The display name of the set of the evaluation shown. */
  get #set() {
    const { dataset } = this.job;
    if (dataset !== "upload") return dataset;
    const { set } = JSON.parse(this.asked);
    return set === EXAMPLES ? "the five photographs" : "the uploaded set";
  }

  #show(job) {
    this.job = job;
    const { evaluation, state } = job;
    const dataset = this.#set;
    const total = evaluation?.total ?? job.images;
    if (evaluation) $("evaluate-bar").value = evaluation.done ?? evaluation.n / total;
    const of = `${total} images of ${dataset}`;
    const text = {
      queued: `Queued: ${of}.`,
      running: `${underWay(evaluation)} of ${of}.`,
      done: `Done: ${of}.`,
      cancelled: `Canceled at ${underWay(evaluation)} of ${of}.`,
      failed: "",
    }[state];
    this.#tell(text, state === "running" ? `Running: ${of}.` : text);
    this.report.of(state === "done" ? job : null);
    if (state === "running") this.began ??= performance.now();
    else this.began = null;
    this.#elapsed();
    if (state === "failed") say($("evaluate-error"), job.error ?? "The evaluation failed.");
    if (evaluation?.results[0].n) this.#result(evaluation);
  }

  #result(evaluation) {
    const { results, total, worst_case: worst } = evaluation;
    results.forEach((row, place) => {
      const line = (this.lines[place] ??= []);
      if (row.n && line.at(-1)?.n !== row.n) line.push(row);
    });
    this.total = total;
    const rows = results.map((row, place) => accuracyRow(row, place));
    if (results.length > 2) rows.push(accuracyRow({ ...worst, attack: "Worst case" }, null));
    $("evaluate-result").hidden = false;
    $("accuracy-title").textContent = this.job.state === "done" ? "Accuracy" : "Accuracy so far";
    this.#mark();
    update($("accuracies").tBodies[0], rows);
    const found = flags(evaluation.flags, evaluation.notes);
    $("flags").replaceChildren(...found);
    this.#draw();
  }

  /** Shows the elapsed time and the share of the work done. */
  #elapsed() {
    const { began } = this;
    if (began === null || this.lost) return say($("evaluate-time"));
    const whole = Math.floor((performance.now() - began) / 1000);
    say($("evaluate-time"), `${whole} s, ${this.#share($("evaluate-bar").value)} of the work done.`);
  }

  /** A share in percent, with enough digits to see it change. */
  #share(done) {
    const { at, digits } = this.moved;
    const same = (places) => (100 * at).toFixed(places) === (100 * done).toFixed(places);
    let places = digits;
    while (done !== at && same(places) && places < 6) places += 1;
    this.moved = { at: done, digits: places };
    return `${(100 * done).toFixed(places)}%`;
  }

  #draw() {
    if (this.lines.length) settling($("settling"), this.lines, this.total);
  }
}

/** A checkbox with the attack's name, which has a tooltip. */
function choice({ name, summary }) {
  const id = `about-${name}`;
  const box = el("input", { type: "checkbox", name: "attack", value: name, "aria-describedby": id });
  return term(el("label", {}, box, ` ${attackText(name)}`), summary, { id, control: true });
}


/** The text for what is being scored: the first attack that has not finished. */
function underWay(evaluation) {
  if (!evaluation) return "0";
  const { results, total } = evaluation;
  const row = results.find(({ n }) => n < total) ?? results.at(-1);
  return `${nameOf(row.attack)}: ${row.n}`;
}

/** Shows `rows`. A name that stays keeps its element, which may have focus or an open tooltip. */
function update(body, rows) {
  const same = body.rows.length === rows.length && rows.every((row, k) => row.cells[0].textContent === body.rows[k].cells[0].textContent);
  if (!same) return body.replaceChildren(...rows);
  rows.forEach((row, k) => {
    const old = [...body.rows[k].cells];
    [...row.cells].forEach((cell, place) => place && old[place].replaceWith(cell));
  });
}

function accuracyRow(row, place) {
  const [low, high] = row.interval.map((value) => (100 * value).toFixed(1));
  const scored = row.n > 0;
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, place === null ? null : swatch(place), attackTerm(row.attack)),
    el("td", {}, row.eps_text ? `${normText(row.norm)} ${row.eps_text}` : ""),
    el("td", {}, scored ? percent(row.accuracy) : "–"),
    el("td", {}, scored ? `${low} to ${high}` : ""),
    el("td", { class: "span" }, scored ? interval(row) : null),
    el("td", {}, scored ? `${row.correct} of ${row.n}` : ""),
    el("td", {}, row.seconds >= 0.001 ? seconds(row.seconds) : ""),
  );
}

/** A mark for an accuracy and its interval, on a line from 0 to 1. */
export function interval({ accuracy, interval: [low, high] }) {
  const mark = el("span", { class: "interval", "aria-hidden": "true" }, el("i"), el("b"));
  mark.style.setProperty("--low", low);
  mark.style.setProperty("--high", high);
  mark.style.setProperty("--at", accuracy ?? 0);
  return mark;
}

/** Lists of the flags, which are reasons not to trust the numbers, and of the notes. */
function flags(found, notes) {
  const items = found.map(({ name, text, advice }) =>
    el("li", {}, el("b", {}, `${capital(name)}: `), text, el("em", {}, ` – ${advice}`)),
  );
  const lists = [];
  if (items.length) lists.push(el("h3", {}, "Flags"), el("ul", { class: "flags" }, ...items));
  if (notes.length) {
    lists.push(el("h3", { class: "calm" }, "Notes"));
    lists.push(el("ul", { class: "flags" }, ...notes.map((note) => el("li", {}, note))));
  }
  return lists;
}

/** Yields the server-sent events of a response body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value.replaceAll("\r", "")).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield { data: lines.map((line) => line.slice(5).trimStart()).join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Without an argument, returns this tab's last evaluation, {id, fields}; else stores it, or removes
 * it for null. */
function remember(found) {
  try {
    if (found === undefined) return JSON.parse(sessionStorage.getItem(REMEMBERED));
    if (found === null) sessionStorage.removeItem(REMEMBERED);
    else sessionStorage.setItem(REMEMBERED, JSON.stringify(found));
  } catch {
    // Storage may be blocked; a reload then forgets the evaluation.
  }
  return null;
}
