// The report of an evaluation: opened in the page, or downloaded as a page or PDF.

import { open } from "./api.js";
import { $, el } from "./dom.js";

export class Report {
  #job = null;
  #page = null; // the text of the report that is shown

  /** `fail(error)` is called for any error. */
  constructor({ fail }) {
    const safely = (act) => () => act().catch(fail);
    $("report-show").addEventListener("click", safely(() => this.#toggle()));
    $("report-html").addEventListener("click", safely(() => this.#save("text/html", "report.html")));
    $("report-pdf").addEventListener("click", safely(() => this.#save("application/pdf", "report.pdf")));
    addEventListener("message", ({ source, origin, data }) => {
      const frame = $("report-frame").contentWindow;
      if (source === frame && origin === location.origin && data === "ready") this.#fill();
    });
  }

  /** Sets the evaluation whose report is offered; null for none. */
  of(job) {
    $("reports").hidden = job === null;
    if (job?.id === this.#job?.id) return;
    this.#job = job;
    this.#close();
  }

  /** Fetches the report. A plain link would not send the API key. */
  async #get(kind) {
    return open(`evaluate/${this.#job.id}/report`, { headers: { Accept: kind } });
  }

  async #toggle() {
    if (!$("report-frame").hidden) return this.#close();
    const job = this.#job;
    const page = await (await this.#get("text/html")).text();
    if (job !== this.#job) return; // another evaluation was started meanwhile
    this.#page = page;
    $("report-frame").hidden = false;
    $("report-frame").src = "playground/report.html"; // says when it is ready
    $("report-show").textContent = "Close";
    $("report-show").setAttribute("aria-expanded", "true");
  }

  #fill() {
    $("report-frame").contentWindow.postMessage(this.#page, location.origin);
  }

  #close() {
    $("report-frame").hidden = true;
    $("report-frame").removeAttribute("src");
    $("report-show").textContent = "Open";
    $("report-show").setAttribute("aria-expanded", "false");
  }

  async #save(kind, name) {
    const response = await this.#get(kind);
    const address = URL.createObjectURL(await response.blob());
    el("a", { href: address, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  }
}
