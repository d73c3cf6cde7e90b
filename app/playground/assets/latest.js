// Runs one request at a time, always the newest: an older response never replaces a newer one.

import { isStopped } from "./api.js";

export class Latest {
  #run;
  #show;
  #fail;
  #idle;
  #current = null;
  #running = null;
  #next = null;

  /** `run(request, signal)` returns an answer. Then `show(answer, request, more)` or
   * `fail(error, request)` is called, and `idle()` when no request is left. */
  constructor({ run, show, fail, idle = () => {} }) {
    this.#run = run;
    this.#show = show;
    this.#fail = fail;
    this.#idle = idle;
  }

  /** Runs `request` next. A running request is aborted, unless `patient(running)` is true. */
  ask(request, { patient = () => false } = {}) {
    this.#next = request;
    if (!this.#current) this.#drain();
    else if (!patient(this.#running)) this.#current.abort();
  }

  /** Aborts the running request and forgets the next one. */
  stop() {
    this.#next = null;
    this.#current?.abort();
  }

  /** Whether a request is running. */
  get running() {
    return this.#current !== null;
  }

  async #drain() {
    while (this.#next) {
      const request = this.#next;
      const stopper = new AbortController();
      this.#next = null;
      this.#running = request;
      this.#current = stopper;
      try {
        const answer = await this.#run(request, stopper.signal);
        if (!stopper.signal.aborted) this.#show(answer, request, this.#next !== null);
      } catch (error) {
        if (!stopper.signal.aborted && !isStopped(error)) this.#fail(error, request);
      }
    }
    this.#current = null;
    this.#idle();
  }
}
