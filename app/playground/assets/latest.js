// One request at a time, and always the newest: an older answer never replaces a newer one.

import { isStopped } from "./api.js";

export class Latest {
  #run;
  #show;
  #fail;
  #idle;
  #current = null;
  #running = null;
  #next = null;

  /** `run(request, signal)` answers, `show(answer, request, more)` or `fail(error)` is told of it,
   * and `idle()` when nothing is left to do. */
  constructor({ run, show, fail, idle = () => {} }) {
    this.#run = run;
    this.#show = show;
    this.#fail = fail;
    this.#idle = idle;
  }

  /** Runs `request` next. One on its way is stopped, or, where `patient` of it, shown first. */
  ask(request, { patient = () => false } = {}) {
    this.#next = request;
    if (!this.#current) this.#drain();
    else if (!patient(this.#running)) this.#current.abort();
  }

  /** Forgets what is on its way. */
  stop() {
    this.#next = null;
    this.#current?.abort();
  }

  /** Whether a request is on its way. */
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
