// Evaluations: start one, watch it settle, cancel it, and find it again after a reload.

import { ask, Failure, isStopped, open, post } from "./api.js";
import { tooLarge } from "./attack.js";
import { nameOf, settling, swatch } from "./charts.js";
import { copies, line } from "./curl.js";
import { $, attackText, el, normText, options, percent, say, seconds, sleep } from "./dom.js";

const UPLOAD = "\u0000upload"; // names of sets begin with a letter or a digit
const EXAMPLES = "\u0000examples";
const REMEMBERED = "robust-evaluation";
const ENDED = ["done", "failed", "cancelled"];

export class Evaluate {
  constructor() {
    this.lines = []; // for each row of the table its points, as they came
    this.total = 0;
    this.job = null;
    this.stopper = null;
    $("evaluate-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#start();
    });
    $("evaluate-form").addEventListener("input", () => this.#changed());
    $("set-norm").addEventListener("change", () => {
      $("set-eps").value = Math.round(255 * this.limits.default_eps[$("set-norm").value]);
      this.#changed();
    });
    $("cancel").addEventListener("click", () => this.#cancel());
    copies($("evaluate-copy"), $("evaluate-curl"));
    $("report-html").addEventListener("click", () => this.#report("text/html", "report.html"));
    $("report-pdf").addEventListener("click", () => this.#report("application/pdf", "report.pdf"));
    new ResizeObserver(() => this.#draw()).observe($("settling"));
  }

  configure(limits) {
    const first = !this.limits;
    this.limits = limits;
    options($("set"), [
      ...limits.datasets.map((name) => [name, name]),
      [EXAMPLES, "Five example photographs"],
      [UPLOAD, "Upload a file…"],
    ]);
    options($("set-norm"), limits.norms.map((norm) => [norm, normText(norm)]));
    if (first) {
      $("set-attacks").replaceChildren(
        ...limits.attacks.map(({ name }) =>
          el(
            "label",
            {},
            el("input", {
              type: "checkbox",
              name: "attack",
              value: name,
              checked: limits.default_attacks.includes(name),
            }),
            ` ${attackText(name)}`,
          ),
        ),
      );
      $("set-eps").value = Math.round(255 * limits.default_eps[$("set-norm").value]);
      this.#remembered();
    }
    this.#changed();
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

  #changed() {
    const set = $("set").value;
    $("set-file-field").hidden = set !== UPLOAD;
    $("set-eps").max = Math.floor(255 * this.limits.max_eps[$("set-norm").value] + 1e-6);
    const uploaded = $("set-file").files[0]?.name ?? "set.npz";
    const file = { [EXAMPLES]: "examples/photos.npz", [UPLOAD]: uploaded }[set];
    const headers = { Prefer: "wait=60" };
    $("evaluate-curl").textContent = line("evaluate", this.#fields, { file, headers });
  }

  async #start() {
    this.stopper?.abort();
    const stopper = (this.stopper = new AbortController());
    this.#begin("Sending…");
    try {
      const fields = this.#fields;
      if (!fields.attack.length) throw new Failure("Choose at least one attack.");
      fields.file = await this.#file(stopper.signal);
      const wait = { Prefer: "respond-async" };
      const job = await post("evaluate", fields, { signal: stopper.signal, headers: wait });
      remember(job.id);
      this.#show(job);
      if (!ENDED.includes(job.state)) await this.#follow(job.id, stopper.signal);
      else $("evaluate-text").textContent += " Evaluated before, with the same settings.";
    } catch (error) {
      if (this.stopper === stopper) this.#failed(error);
    } finally {
      if (this.stopper === stopper) this.#end();
    }
  }

  async #file(signal) {
    const set = $("set").value;
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

  /** An evaluation begun before the page was loaded anew. */
  async #remembered() {
    const id = remember();
    if (!id) return;
    const stopper = (this.stopper = new AbortController());
    try {
      const job = await ask(`evaluate/${id}`, { signal: stopper.signal });
      this.#begin("");
      this.#show(job);
      if (!ENDED.includes(job.state)) await this.#follow(id, stopper.signal);
    } catch {
      if (this.stopper === stopper) remember(null);
    } finally {
      if (this.stopper === stopper) this.#end();
    }
  }

  /** Takes each event as it comes; goes on after a broken connection. */
  async #follow(id, signal) {
    for (let wait = 500; ; wait = Math.min(2 * wait, 5000)) {
      try {
        const response = await open(`evaluate/${id}/events`, { signal });
        for await (const { data } of events(response.body)) {
          const job = JSON.parse(data);
          wait = 500;
          say($("evaluate-error"));
          this.#show(job);
          if (ENDED.includes(job.state)) return;
        }
      } catch (error) {
        if (isStopped(error)) throw error;
        if (error.status === 404) {
          remember(null);
          throw new Failure(
            "The service no longer knows this evaluation: it was started anew, or the result has expired. What is shown is the last that came.",
          );
        }
        if (error.status && error.status < 500 && error.status !== 429) throw error;
        say($("evaluate-error"), "The connection was lost. Trying again…");
      }
      await sleep(wait, signal);
    }
  }

  async #cancel() {
    $("cancel").disabled = true;
    if (!this.job || ENDED.includes(this.job.state)) {
      this.stopper?.abort();
      this.stopper = null;
      say($("evaluate-text"), "Cancelled before it began.");
      this.#end();
      return;
    }
    try {
      this.#show(await ask(`evaluate/${this.job.id}`, { method: "DELETE" }));
    } catch (error) {
      say($("evaluate-error"), error.message);
      $("cancel").disabled = false;
    }
  }

  #begin(text) {
    this.lines = [];
    this.job = null;
    say($("evaluate-error"));
    say($("evaluate-text"), text);
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
    if (!this.job) say($("evaluate-text"));
  }

  #show(job) {
    this.job = job;
    const { evaluation, dataset, state } = job;
    const total = evaluation?.total ?? job.images;
    if (evaluation) $("evaluate-bar").value = evaluation.done ?? evaluation.n / total;
    say(
      $("evaluate-text"),
      {
        queued: `${total} images of ${dataset}: waiting for the evaluations before it.`,
        running: `${underWay(evaluation)} of ${total} images of ${dataset}.`,
        done: `Done: ${total} images of ${dataset}.`,
        cancelled: `Cancelled at ${underWay(evaluation)} of ${total} images of ${dataset}.`,
        failed: "",
      }[state],
    );
    $("reports").hidden = state !== "done";
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
    $("accuracies").tBodies[0].replaceChildren(...rows);
    const found = flags(evaluation.flags, evaluation.notes);
    $("flags").replaceChildren(...found);
    this.#draw();
  }

  /** Saves the report; a link would not send the key along. */
  async #report(kind, name) {
    say($("evaluate-error"));
    try {
      const headers = { Accept: kind };
      const response = await open(`evaluate/${this.job.id}/report`, { headers });
      const address = URL.createObjectURL(await response.blob());
      el("a", { href: address, download: name }).click();
      setTimeout(() => URL.revokeObjectURL(address), 60_000);
    } catch (error) {
      this.#failed(error);
    }
  }

  #draw() {
    if (this.lines.length) settling($("settling"), this.lines, this.total);
  }
}

/** What is being scored: the first that is not through with all images. */
function underWay(evaluation) {
  if (!evaluation) return "0";
  const { results, total } = evaluation;
  const row = results.find(({ n }) => n < total) ?? results.at(-1);
  return `${nameOf(row.attack)}: ${row.n}`;
}

function accuracyRow(row, place) {
  const [low, high] = row.interval.map((value) => (100 * value).toFixed(1));
  const scored = row.n > 0;
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, place === null ? null : swatch(place), nameOf(row.attack)),
    el("td", {}, row.eps_text ? `${normText(row.norm)} ${row.eps_text}` : ""),
    el("td", {}, scored ? percent(row.accuracy) : "–"),
    el("td", {}, scored ? `${low} to ${high}` : ""),
    el("td", { class: "span" }, scored ? interval(row) : null),
    el("td", {}, scored ? `${row.correct} of ${row.n}` : ""),
    el("td", {}, row.seconds ? seconds(row.seconds) : ""),
  );
}

/** An accuracy and its interval as a mark on a line from 0 to 1. */
export function interval({ accuracy, interval: [low, high] }) {
  const mark = el("span", { class: "interval", "aria-hidden": "true" }, el("i"), el("b"));
  mark.style.setProperty("--low", low);
  mark.style.setProperty("--high", high);
  mark.style.setProperty("--at", accuracy ?? 0);
  return mark;
}

/** Reasons not to trust the numbers, as sentences or as objects with advice; and notes. */
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

const capital = (text) => text[0].toUpperCase() + text.slice(1);

/** Server-sent events out of the body of a response. */
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

/** The id of the last evaluation of this tab: read, kept, or, with null, forgotten. */
function remember(id) {
  try {
    if (id === undefined) return sessionStorage.getItem(REMEMBERED);
    if (id === null) sessionStorage.removeItem(REMEMBERED);
    else sessionStorage.setItem(REMEMBERED, id);
  } catch {
    // Storage may be forbidden; a reload then begins anew.
  }
  return null;
}
