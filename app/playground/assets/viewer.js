// The original laid over the adversarial images: flickered between, or wiped over.

import { $ } from "./dom.js";

const TURN = 500; // ms for each of the two: far from what may harm

/** Wires the controls; the images come by `overlay`. */
export function viewer() {
  let timer = null;
  const flicker = $("flicker");
  const show = (original) => $("result").toggleAttribute("data-original", original);
  const stop = () => {
    clearInterval(timer);
    timer = null;
    flicker.setAttribute("aria-pressed", "false");
    show(false);
  };
  flicker.addEventListener("click", () => {
    if (timer !== null) return stop();
    flicker.setAttribute("aria-pressed", "true");
    show(true);
    timer = setInterval(() => show(!$("result").hasAttribute("data-original")), TURN);
  });
  $("wipe").addEventListener("input", () => {
    stop();
    $("result").style.setProperty("--wipe", `${$("wipe").value}%`);
    $("wipe").setAttribute("aria-valuetext", `${$("wipe").value}% original`);
  });
}

/** Lays the original over the adversarial image of that id. */
export function overlay(id, url) {
  const image = $(`${id}-original`);
  image.src = url;
  image.hidden = false;
}
