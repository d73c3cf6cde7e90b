// Connects the parts of the page.

import { ask, isStopped, keyed, on, open, post, useKey, watch } from "./api.js";
import { followed, given, note } from "./address.js";
import { blobOf, completed, pngUrl, tooLarge } from "./answers.js";
import { Attack } from "./attack.js";
import { Breaking } from "./breaking.js";
import { showCard } from "./card.js";
import { bars } from "./charts.js";
import { Compare } from "./compare.js";
import { $, nameAttacks, say, sleep } from "./dom.js";
import { Evaluate } from "./evaluate.js";
import { Latest } from "./latest.js";
import { bringImages, example } from "./picture.js";
import { explainAttacks, explainTerms } from "./terms.js";
import { viewer } from "./viewer.js";

const THEMES = ["system", "light", "dark"];
const root = document.documentElement;

const attack = new Attack({
  busy: () => {
    compare.pause();
    breaking.pause();
  },
  idle: () => compare.resume(),
  changed: () => breaking.restart(),
  asked: () => {
    if (!configured) return;
    const { label } = attack;
    const { attack: name, eps, norm, steps, target } = attack.request;
    const without = $("compare").checked ? "" : "no";
    const shown = wanted ?? brought?.label;
    note({ example: shown, attack: name, eps, norm, steps, target, label, compare: without });
  },
  marked: () => compare?.mark(),
  comparing: () => compare?.on,
});
const compare = new Compare(attack, { idle: () => attack.working || breaking.resume() });
const breaking = new Breaking(attack);
const evaluate = new Evaluate();
let configured = false; // whether the settings in the URL were restored
let model = null;
let limits = null;
let seen = null; // the picture that the model last read
let wanted = null; // the example that was clicked, until its file is loaded
let previewed = null; // the image being shown before the model has read it
let brought = null; // the last image of the user or example, sent again when the model changes

// An attack with eps 0 returns the image as the model sees it.
const looking = new Latest({
  run: async ({ blob, name, label }, signal) => {
    const answer = await post("attack", { ...attack.reading, file: blob }, { signal });
    const input = blobOf(answer.input_png);
    const before = await completed(model.classes, answer.before.top, input, signal);
    const url = pngUrl(answer.input_png);
    const stem = name.replace(/^.*\//, "").replace(/\.[^.]*$/, "") || "image";
    const source = label && `playground/${name}`; // where a copied command finds an example
    return { input, url, before, predicted: answer.before.label, name, label, stem, source };
  },
  show: (picture) => {
    previewed = null;
    const size = model.input_size;
    $("seen").src = picture.url;
    $("seen").alt = `${picture.name}, the ${size} × ${size} pixels that the model sees`;
    $("seen").hidden = false;
    $("seen-caption").textContent = `The model’s prediction for ${picture.name}`;
    $("seen-bars").setAttribute("aria-busy", "false");
    seen = picture;
    $("seen-text").textContent = `${picture.name}: the ${size} × ${size} pixels that the model sees`;
    $("seen-bars").hidden = false;
    bars($("seen-bars"), model.classes, picture.before);
    say($("picture-error"));
    attack.take(picture);
  },
  fail: (error, request) => {
    say($("picture-error"), error.message);
    if (error.away) return; // `resume` sends it again
    if (error.status === 429) return again(request, error.retryAfter || 5);
    if (seen) forget();
  },
});

/** Sends an image again when the service may be less busy, unless another one was chosen. */
async function again(request, seconds) {
  await sleep(1000 * seconds);
  if (brought === request) looking.ask(request);
}

/** Shows the chosen image immediately, before the service has read it. */
async function preview({ blob, url, name }) {
  const mine = (previewed = {});
  $("seen-text").textContent = `${name}: waiting for the model…`;
  $("seen-bars").setAttribute("aria-busy", "true");
  say($("picture-error"));
  attack.expect({ name });
  breaking.restart();
  const local = url ?? URL.createObjectURL(blob);
  // An example is already decoded; another file may not be an image.
  if (!url && !(await decodes(local))) return; // the service's error says what is wrong
  if (previewed !== mine) return;
  $("seen").src = local;
  $("seen").alt = `${name}, not read by the model yet`;
  $("seen").hidden = false;
  attack.expect({ url: local, name });
}

async function decodes(url) {
  const image = new Image();
  image.src = url;
  return image.decode().then(
    () => true,
    () => false,
  );
}

/** The chosen image can't be used: shows the previous one again. */
function forget() {
  previewed = null;
  $("seen-bars").setAttribute("aria-busy", "false");
  $("seen-text").textContent = seen.name;
  $("seen").src = seen.url;
  attack.forget();
}

function bring(blob, name, label) {
  const fault = limits && tooLarge(blob, limits);
  if (fault) return say($("picture-error"), fault.message);
  brought = { blob, name: name || "image.png", label };
  if (!label) preview(brought); // an example was shown when it was clicked
  wanted = null;
  press(label);
  compare.pause();
  breaking.pause();
  if (model) looking.ask(brought); // else once the model is known
}

/** Notes which examples the model misclassifies without an attack, and which have none of its
 * classes. */
async function judgeExamples() {
  const buttons = [...$("examples").querySelectorAll("button")];
  if (buttons.length > limits.max_images) return;
  const body = new FormData();
  for (const { dataset } of buttons) {
    const response = await open(`playground/examples/${dataset.example}.jpg`, { cache: "default" });
    body.append("file", await response.blob());
  }
  const { results } = await ask("predict?top_k=1", { method: "POST", body });
  const wrong = [];
  const foreign = [];
  buttons.forEach((button, place) => {
    const name = button.dataset.example;
    const none = !model.classes.includes(name);
    const missed = !none && results[place].label !== name;
    if (none) foreign.push(name);
    if (missed) wrong.push(name);
    button.classList.toggle("missed", missed);
    const more = none ? ", not one of the classes" : missed ? ", which the model misclassifies" : "";
    button.setAttribute("aria-label", `Example: ${name}${more}`);
  });
  const sentences = [];
  if (wrong.length) sentences.push(`Misclassified without an attack: ${wrong.join(", ")}.`);
  if (foreign.length) sentences.push(`Not among the model’s classes: ${foreign.join(", ")}.`);
  say($("examples-note"), sentences.join(" "));
}

const failed = (error) => isStopped(error) || say($("picture-error"), error.message);

function status(state, text) {
  $("status").dataset.state = state;
  $("status-text").textContent = text;
}

function ready() {
  const { arch } = model.card.architecture ?? {};
  status("up", `${arch ?? "model"} ${model.sha256.slice(0, 8)} on ${model.device}`);
}

function press(name) {
  for (const button of $("examples").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.example === name));
  }
}

/** Shows an example at once, then loads its file. */
function choose(name) {
  wanted = name;
  press(name);
  const { src: url } = $("examples").querySelector(`[data-example="${name}"] img`);
  preview({ url, name: `examples/${name}.jpg` });
  return example(name, bring, failed);
}

/** The example named in the URL, or the first one. */
function exampleOf(query) {
  const names = [...$("examples").querySelectorAll("button")].map(({ dataset }) => dataset.example);
  return names.find((name) => name === query.get("example")) ?? names[0];
}

/** Fetches /model and /limits, until the service responds, and sets up the page. */
async function configure() {
  for (;;) {
    try {
      [model, limits] = await Promise.all([ask("model"), ask("limits")]);
      break;
    } catch (error) {
      say($("model-error"), error.message);
      status("down", error.message);
      if (error.status === 401) await keyGiven();
      else await sleep(2000);
    }
  }
  say($("model-error"));
  nameAttacks(limits.attacks);
  explainAttacks(limits.attacks);
  showCard($("card"), model);
  compare.configure(model);
  attack.configure(limits, model);
  evaluate.configure(limits, model);
  ready();
}

function themes() {
  const button = $("theme");
  const show = () => {
    button.textContent = `Theme: ${root.dataset.theme ?? "system"}`;
  };
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "system") + 1) % THEMES.length];
    if (next === "system") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      localStorage.setItem("robust-theme", next);
    } catch {
      // Storage may be blocked; the choice then ends with the page.
    }
    show();
  });
  show();
}

on("key", () => {
  say($("key-text"), keyed() ? "The service refused this key. Check it and enter it again." : "");
  $("key-form").hidden = false;
  $("key").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  if (configured) resume(); // send again what was refused
});

function keyGiven() {
  return new Promise((resolve) =>
    $("key-form").addEventListener("submit", resolve, { once: true }),
  );
}

on("lost", ({ detail }) => status("down", detail));
on("back", resume);

/** Continues after the service was down: does what the user clicked meanwhile. */
async function resume() {
  await configure();
  for (const id of ["picture-error", "attack-error"]) say($(id));
  if (wanted) choose(wanted);
  else if (brought && (previewed || !seen)) looking.ask(brought);
  else attack.ask({ curve: true });
  evaluate.back();
}

on("model", async () => {
  if (brought && !wanted) preview(brought); // the result on the screen is the previous model's
  await configure();
  if (brought && !wanted) looking.ask(brought);
  judgeExamples().catch(() => {}); // the examples work without it
});

themes();
viewer();
explainTerms();
bringImages(bring, choose, failed);
const opened = choose(exampleOf(given()));
await configure();
compare.restore(given());
attack.restore(given());
configured = true;
followed((query) => {
  const name = exampleOf(query);
  if (query.get("example") && name !== (wanted ?? brought?.label)) choose(name);
  compare.restore(query);
  attack.restore(query);
});
root.dataset.ready = "true";
performance.mark("usable");
watch();
await opened;
if (brought && !looking.running) looking.ask(brought);
judgeExamples().catch(() => {}); // the examples work without it
