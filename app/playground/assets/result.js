// Shows the result of an attack: images, verdict and numbers.

import { known, named, outcomeText, pngUrl, showVerdict } from "./answers.js";
import { bars } from "./charts.js";
import { $, attackText, epsText, normText, seconds } from "./dom.js";
import { overlay } from "./viewer.js";

/** Shows the response to an attack request. */
export function showResult(answer, request, { picture, classes }) {
  const [result] = answer.results;
  pictures(answer, result, request, picture);
  showVerdict($("verdict"), answer, result);
  $("facts").hidden = false;
  $("fact-outcome").textContent = outcomeText(result.outcome);
  $("fact-linf").textContent = `${Math.round(255 * result.linf)}/255`;
  $("fact-l2").textContent = result.l2.toFixed(3);
  $("fact-seconds").textContent = seconds(result.seconds);
  $("fact-shown").textContent = seconds((performance.now() - request.at) / 1000);
  bars($("both-bars"), classes, picture.before, known(classes, result.after.top));
}

function pictures(answer, result, { attack, norm, k }, picture) {
  const stem = `${picture.stem}-${attack}-${norm}-${k}of255`;
  for (const kind of ["perturbation", "adversarial"]) {
    const url = pngUrl(result[`${kind}_png`]);
    $(kind).src = url;
    $(kind).hidden = false;
    save(kind, url, `${stem}-${kind}.png`);
  }
  overlay("adversarial", picture.url);
  $("view").hidden = false;
  $("perturbation").alt = "The change made by the attack, amplified; gray is no change";
  $("adversarial").alt = `The image after ${attackText(attack)}, predicted as ${result.after.label}`;
  const levels = Math.round(255 * result.linf);
  $("perturbation-text").textContent = levels ? `amplified ×${(127 / levels).toFixed(0)}` : "none";
  $("original-text").textContent = named(answer.before);
  $("adversarial-text").textContent = named(result.after);
}

/** Shows the original image. */
export function showOriginal(url, alt) {
  $("original").src = url;
  $("original").alt = alt;
  $("original").hidden = false;
}

/** The settings of a result as text. */
export function settingsText({ attack, choice, k, norm, target, label, picture }, { steps, restarts }) {
  const parts = [attackText(attack), normText(norm), `eps ${epsText(k, norm)}`];
  if (steps > 1) parts.push(`${steps} ${choice.unit}`);
  if (restarts > 1) parts.push(`${restarts} restarts`);
  if (label) parts.push(`true class ${label}`);
  if (target) parts.push(`target ${target}`);
  return [...parts, picture.name].join(", ");
}

/** Sets the download link of an image. */
export function save(kind, url, name) {
  const link = $(`${kind}-save`);
  link.href = url;
  link.download = name;
  link.hidden = false;
  link.setAttribute("aria-label", `Download the ${kind} image as PNG`);
}
