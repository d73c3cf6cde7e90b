// Lays the original over the adversarial images, to flicker between them or wipe across.

import { $ } from "./dom.js";

const TURN = 500; // ms per image: far slower than flashes that can trigger seizures

/** Connects the controls; `overlay` sets the images. */
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

/** Sets the original that lies over the adversarial image with that id. */
export function overlay(id, url) {
  const image = $(`${id}-original`);
  image.src = url;
  image.hidden = false;
}
