// Terms with an explanation in a tooltip, on hover and focus.

import { attackText, el } from "./dom.js";

const TERMS = {
  wilson: "The Wilson interval: a range that contains the true accuracy for 95 of 100 such sets of images",
};
const summaries = new Map();
let count = 0;

/** Stores the summaries of the attacks from /limits. */
export const explainAttacks = (attacks) => attacks.forEach(({ name, summary }) => summaries.set(name, summary));

/** `content` with a tooltip; it is focusable unless it is a control itself. */
export function term(content, about, { id = `term-${(count += 1)}`, control = false } = {}) {
  const tip = el("span", { role: "tooltip", id, class: "about" }, `${about}.`);
  const given = control ? { class: "term" } : { class: "term dotted", tabindex: 0, "aria-describedby": id };
  const node = el("span", given, content, tip);
  node.addEventListener("pointerenter", () => place(node, tip));
  node.addEventListener("focusin", () => place(node, tip));
  node.addEventListener("pointerleave", () => node.classList.remove("dismissed"));
  node.addEventListener("focusout", () => node.classList.remove("dismissed"));
  return node;
}

const attackOf = (row) => /^([a-z-]*[a-z])(-\d.*)?$/.exec(row)?.[1];

/** The display name of a result row: an attack with its budget, or another row such as clean. */
export function nameOf(row) {
  const attack = attackOf(row);
  if (row === "clean") return "Clean";
  return attack ? attackText(attack) + row.slice(attack.length) : row;
}

/** The display name of a result row, with a tooltip if it is an attack. */
export function attackTerm(row) {
  const summary = summaries.get(attackOf(row));
  return summary ? term(nameOf(row), summary) : nameOf(row);
}

/** Adds tooltips to the elements with `data-term`. */
export function explainTerms() {
  for (const node of document.querySelectorAll("[data-term]")) {
    const text = node.textContent;
    node.replaceChildren(term(text, TERMS[node.dataset.term]));
  }
  addEventListener("keydown", ({ key }) => {
    if (key !== "Escape") return;
    for (const node of document.querySelectorAll(".term:is(:hover, :focus-within)")) node.classList.add("dismissed");
  });
}

/** Places a tooltip below or above its term, within the window. It is positioned in the window
 * because a scrolling box would cut it off. */
function place(node, tip) {
  const { left, bottom, top } = node.getBoundingClientRect();
  const width = Math.min(260, innerWidth - 16);
  tip.style.setProperty("--width", `${width}px`);
  tip.style.setProperty("--left", `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`);
  const above = bottom + 90 > innerHeight && top > 120;
  tip.style.setProperty("--top", above ? "auto" : `${bottom}px`);
  tip.style.setProperty("--bottom", above ? `${innerHeight - top}px` : "auto");
}
