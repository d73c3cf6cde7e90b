// Measures how long attacks take on this model, and shows the progress bar.

import { $, attackText, seconds, sleep } from "./dom.js";

const SHOW_PROGRESS = 150; // ms; for a shorter attack the bar would only flicker

export class Pace {
  #paces = new Map(); // seconds per forward pass, by attack

  /** Forgets the measurements: the model may be another one. */
  clear() {
    this.#paces.clear();
  }

  /** Stores the slowest pace of each attack: one that succeeds usually ends early. */
  measured({ name, cost, steps: usual }, steps, took) {
    const pace = took / costOf({ cost, steps: usual }, steps);
    this.#paces.set(name, Math.max(pace, this.#paces.get(name) ?? 0));
  }

  /** Shows the elapsed time, and the expected time if this attack was measured before. */
  tick(choice, steps, signal) {
    const stopper = new AbortController();
    const begin = performance.now();
    const pace = this.#paces.get(choice.name);
    const expected = pace ? pace * costOf(choice, steps) : null;
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
}

const costOf = ({ cost, steps: usual }, steps) => (cost * Number(steps || usual)) / usual;
