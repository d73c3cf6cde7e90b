// Shows a summary of the model card.

import { capital, el, epsText, normText, percent } from "./dom.js";
import { hardened } from "./answers.js";
import { interval } from "./evaluate.js";
import { attackTerm, nameOf } from "./terms.js";

export function showCard(box, { sha256, device, loaded, classes, input_size: size, differentiable, card, guessed, compare }) {
  const { arch, stem, activation } = card.architecture ?? {};
  const { threat_model: threat, recipe, data, duration_seconds: took, seed } = card;
  const built = stem === "own" ? [] : [stem && `${stem} stem`, activation]; // "own" of a whole model
  const facts = [
    ["Architecture", [arch, ...built, !differentiable && "no gradients"].filter(Boolean).join(", ")],
    ["Input", `${size} × ${size} pixels`],
    ["Classes", `${classes.length}: ${classes.slice(0, 12).join(", ")}${classes.length > 12 ? "…" : ""}`],
    ...assumptions(guessed, { ...card.architecture, classes }),
    ["Trained to resist", threat && hardened(card) && `${normText(threat.norm)} attacks up to eps ${epsText(Math.round(255 * threat.eps), threat.norm)}`],
    ["Recipe", recipe?.name && recipeText(recipe)],
    ["Trained on", data && `${data.name}, ${data.count?.toLocaleString("en")} images`],
    ["Training time (without setup)", took && `${duration(took)} on ${card.device ?? "an unknown device"}, seed ${seed}`],
    ["Compared with", compare && `${compare.name}: ${other(compare.card)}`],
    ["Running on", device],
    ["Loaded", new Date(loaded).toLocaleString("en-US", { dateStyle: "medium", timeStyle: "short" })],
    ["SHA-256", el("code", { title: sha256 }, `${sha256.slice(0, 12)}…`)],
  ];
  const list = el("dl", { class: "card" });
  for (const [name, value] of facts) {
    if (value) list.append(el("div", {}, el("dt", {}, name), el("dd", {}, value)));
  }
  box.replaceChildren(list, el("div", {}, ...measured(card.evaluation ?? [])));
}

/** What the file does not record, one row for each way in which it was guessed. */
function assumptions(guessed, found) {
  const rows = new Map();
  for (const [name, how] of Object.entries(guessed)) {
    const value = found[name];
    if (value) rows.set(how, [...(rows.get(how) ?? []), `${name.replaceAll("_", " ")} ${assumed(name, value)}`]);
  }
  return [...rows].map(([how, parts]) => [capital(how), parts.join("; ")]);
}

function assumed(name, value) {
  if (name === "classes") return `${value[0]} to ${value.at(-1)}`;
  return [value].flat().map((one) => (typeof one === "number" ? Number(one.toPrecision(4)) : one)).join(", ");
}

/** A one-line summary of the comparison model. */
function other({ architecture, evaluation = [] }) {
  const known = evaluation.filter(({ accuracy }) => accuracy != null);
  const rows = known.filter(({ data }) => data === known.at(-1).data); // measured last, as below
  const figures = rows.map(({ attack, accuracy }) => `${nameOf(attack)} ${percent(accuracy)}`);
  return [architecture?.arch, ...figures.slice(0, 3)].filter(Boolean).join(", ");
}

function recipeText({ name, phases = [] }) {
  const parts = phases.map(({ name: phase, epochs }) => `${epochs} ${phase}`);
  return `${name}${parts.length ? ` (${parts.join(" + ")} epochs)` : ""}`;
}

function duration(s) {
  const minutes = Math.round(s / 60);
  if (minutes < 1) return `${Math.round(s)} s`;
  return minutes < 120 ? `${minutes} min` : `${(minutes / 60).toFixed(1)} h`;
}

function measured(rows) {
  const tables = [];
  for (const data of new Set(rows.map((row) => row.data ?? ""))) {
    const own = rows.filter((row) => (row.data ?? "") === data && row.accuracy != null);
    if (!own.length) continue;
    const body = el("tbody");
    for (const row of own) {
      const ball = row.eps_text ? `${normText(row.norm)} ${row.eps_text}` : "";
      body.append(
        el(
          "tr",
          {},
          el("th", { scope: "row" }, attackTerm(row.attack), ball && el("small", {}, ` ${ball}`)),
          el("td", {}, percent(row.accuracy)),
          el("td", {}, row.n?.toLocaleString("en") ?? "–"),
          el("td", { class: "span" }, row.interval && interval(row)),
        ),
      );
    }
    const head = el(
      "thead",
      {},
      el("tr", {}, ...["Attack", "Accuracy", "Images"].map((text) => el("th", { scope: "col" }, text)), el("td")),
    );
    const caption = `Accuracy on ${data || "its test set"}`;
    tables.push(el("table", { class: "numbers measured" }, el("caption", {}, caption), head, body));
  }
  return tables.reverse();
}
