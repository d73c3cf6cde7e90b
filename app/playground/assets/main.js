// Puts the parts of the page together.

import { ask, isStopped, on, post, useKey, watch } from "./api.js";
import { Attack, blobOf, known, probabilities, tooLarge } from "./attack.js";
import { Breaking } from "./breaking.js";
import { showCard } from "./card.js";
import { bars } from "./charts.js";
import { $, say, sleep } from "./dom.js";
import { Evaluate } from "./evaluate.js";
import { Latest } from "./latest.js";
import { bringImages, example } from "./picture.js";

const THEMES = ["system", "light", "dark"];
const root = document.documentElement;

const attack = new Attack({
  busy: () => breaking.pause(),
  idle: () => breaking.resume(),
  changed: () => breaking.restart(),
});
const breaking = new Breaking(attack);
const evaluate = new Evaluate();
let model = null;
let limits = null;
let brought = null; // the image last brought, to be sent again when the model has changed

// What the model sees of an image comes with an attack of no size.
const looking = new Latest({
  run: async ({ blob, name, label }, signal) => {
    const answer = await post("attack", { attack: "fgsm", eps: "0", file: blob }, { signal });
    const input = blobOf(answer.input_png);
    const before =
      answer.before.top.length < model.classes.length
        ? await probabilities(input, model.classes.length, signal)
        : known(model.classes, answer.before.top);
    const url = `data:image/png;base64,${answer.input_png}`;
    const stem = name.replace(/^.*\//, "").replace(/\.[^.]*$/, "") || "image";
    return { input, url, before, predicted: answer.before.label, name, label, stem };
  },
  show: (picture) => {
    const size = model.input_size;
    $("seen").src = picture.url;
    $("seen").alt = `${picture.name}, the ${size} × ${size} pixels that the model sees`;
    $("seen").hidden = false;
    $("seen-text").textContent = `${picture.name}: the ${size} × ${size} pixels that the model sees`;
    $("seen-bars").hidden = false;
    bars($("seen-bars"), model.classes, picture.before);
    say($("picture-error"));
    attack.take(picture);
  },
  fail: (error) => {
    say($("picture-error"), error.message);
    if (attack.picture) attack.idle();
  },
});

function bring(blob, name, label) {
  const fault = tooLarge(blob, limits);
  if (fault) return say($("picture-error"), fault.message);
  brought = { blob, name: name || "image.png", label };
  for (const button of $("examples").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.example === label));
  }
  breaking.pause();
  looking.ask(brought);
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

/** Asks what the service is and takes; again when it has another model. */
async function configure() {
  for (;;) {
    try {
      [model, limits] = await Promise.all([ask("model"), ask("limits")]);
      break;
    } catch (error) {
      say($("model-error"), error.message);
      if (error.status === 401) await keyGiven();
      else await sleep(2000);
    }
  }
  say($("model-error"));
  showCard($("card"), model);
  attack.configure(limits, model.classes);
  evaluate.configure(limits);
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
      // Storage may be forbidden; the choice then ends with the page.
    }
    show();
  });
  show();
}

on("key", () => {
  $("key-form").hidden = false;
  $("key").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
});

function keyGiven() {
  return new Promise((resolve) =>
    $("key-form").addEventListener("submit", resolve, { once: true }),
  );
}

on("lost", () => status("down", "The service does not answer; trying again…"));
on("back", async () => {
  await configure();
  for (const id of ["picture-error", "attack-error"]) say($(id));
  if (brought) looking.ask(brought);
});
on("model", async () => {
  await configure();
  if (brought) looking.ask(brought);
});

themes();
await configure();
bringImages(bring, failed);
root.dataset.ready = "true";
watch();
await example("horse", bring, failed);
