// Reads the service's responses, and puts outcomes into words.

import { ask, Failure } from "./api.js";
import { percent } from "./dom.js";

/** The probabilities of all classes of an image. */
export async function probabilities(image, count, signal) {
  const body = new FormData();
  body.append("file", image);
  const { results } = await ask(`predict?top_k=${Math.min(count, 1000)}`, { method: "POST", body, signal });
  return known(Array(count).fill(), results[0].top);
}

/** Probabilities by class index; undefined for classes that `top` does not list. */
export function known(classes, top) {
  const values = Array(classes.length).fill(undefined);
  for (const { index, probability } of top) values[index] = probability;
  return values;
}

/** The probabilities of all classes: those that /attack answered, and /predict's for the rest. */
export async function completed(classes, top, image, signal) {
  const values = known(classes, top);
  if (top.length >= classes.length) return values;
  const rest = await probabilities(image, classes.length, signal);
  // /predict may compute in bfloat16, /attack always answers in float32.
  return values.map((value, k) => value ?? rest[k]);
}

export const NO_GRADIENTS = "Attacks that need gradients can’t be used, because this model has none.";

export const pngUrl = (base64) => `data:image/png;base64,${base64}`;

export function blobOf(base64) {
  return new Blob([Uint8Array.from(atob(base64), (char) => char.charCodeAt(0))], { type: "image/png" });
}

export function tooLarge(blob, limits) {
  if (blob.size <= limits.max_body_bytes - 2048) return null;
  const most = Math.floor(limits.max_body_bytes / 2 ** 20);
  return new Failure(`This file is too large: the service takes at most ${most} MiB.`, { status: 413 });
}

/** The largest eps that the service accepts, in 255ths. */
export const maxEps = (limits, norm) => Math.floor(255 * limits.max_eps[norm] + 1e-6);

export const named = ({ label, probability }) => `${label} ${percent(probability)}`;

/** Whether a model was trained on adversarial images, according to its card. */
export function hardened({ threat_model: threat, recipe }) {
  const parts = (recipe?.phases ?? []).flatMap((phase) => phase.parts ?? []);
  return parts.length ? parts.some(({ kind }) => kind !== "clean") : Boolean(threat);
}

/** The text for an attack's outcome. */
export const outcomeText = (outcome) =>
  ({ broken: "broken", withstood: "withstood", already_wrong: "misclassified without an attack" })[outcome];

/** Shows in the paragraph `node` what an attack did to a model's prediction. */
export function showVerdict(node, { before, label, target = null }, { after, outcome }) {
  node.dataset.state = { already_wrong: "wrong", broken: "lost", withstood: "held" }[outcome];
  node.textContent = verdict({ before, label, target }, { after, outcome });
}

function verdict({ before, label, target }, { after, outcome }) {
  if (target && before.index === target.index) return `The model already predicts ${target.label} without an attack.`;
  if (outcome === "already_wrong") {
    const more = after.label === before.label ? "." : `; after the attack, ${after.label}.`;
    return `Misclassified without an attack: the model predicts ${before.label}, not ${label.label}${more}`;
  }
  if (outcome === "broken") return `Broken: ${before.label} became ${after.label}.`;
  if (target && after.label !== label.label) return `Changed to ${after.label}, but not to ${target.label}.`;
  return `Withstood: still ${after.label}.`;
}
