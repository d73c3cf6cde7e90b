// Charts: probability bars, confidence against eps, and accuracy against scored images. Colors come
// from the style sheet.

import { el, epsText, percent, svg } from "./dom.js";

const MOST_CLASSES = 12;
const MARGIN = { top: 8, right: 14, bottom: 34, left: 42 };

/** Draws bars in `table`: the probability of each class before and, if given, after the attack. */
export function bars(table, classes, before, after = null) {
  const shown = rows(classes, before, after);
  const body = table.tBodies[0];
  const key = shown.map((k) => `${k}:${classes[k]}`).join(" ") + (after ? "+" : "");
  if (body.dataset.key !== key) {
    body.dataset.key = key;
    body.replaceChildren(...shown.map((k) => row(classes[k], after !== null)));
  }
  const top = { before: largest(before), after: after && largest(after) };
  shown.forEach((k, place) => {
    const cells = body.rows[place].cells;
    set(cells[1], ".before", before[k]);
    cells[2].textContent = percent(before[k]);
    cells[2].classList.toggle("top", k === top.before);
    if (!after) return;
    set(cells[1], ".after", after[k]);
    cells[3].textContent = after[k] === undefined ? "…" : percent(after[k]);
    cells[3].classList.toggle("top", k === top.after);
  });
}

function row(name, two) {
  const track = el("div", { class: "track", "aria-hidden": "true" }, el("i", { class: "before" }));
  if (two) track.append(el("i", { class: "after" }));
  const cells = [el("td", {}, track), el("td", { class: "number" })];
  if (two) cells.push(el("td", { class: "number" }));
  return el("tr", {}, el("th", { scope: "row", title: name }, name), ...cells);
}

function set(cell, name, value) {
  cell.querySelector(name).style.setProperty("--p", value ?? 0);
}

function rows(classes, before, after) {
  const all = [...classes.keys()];
  if (classes.length <= MOST_CLASSES) return all;
  const weight = (k) => Math.max(before[k] ?? 0, after?.[k] ?? 0);
  return all.sort((a, b) => weight(b) - weight(a)).slice(0, 10);
}

/** The index of the largest value; undefined ones count as the smallest. */
export const largest = (values) =>
  values.reduce((best, value, k) => ((value ?? -1) > (values[best] ?? -1) ? k : best), 0);

/** The axes of a plot as wide as `box`, and functions `x` and `y` from values to pixels. */
function frame(box, { height, most, ticks, label, x: axis }) {
  const width = Math.max(box.clientWidth, 240);
  const right = width - MARGIN.right;
  const bottom = height - MARGIN.bottom;
  const x = (value) => MARGIN.left + (value / most) * (right - MARGIN.left);
  const y = (value) => bottom - value * (bottom - MARGIN.top);
  const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  root.setAttribute("aria-label", label);
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    root.append(svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y(value), y2: y(value) }));
    const text = svg("text", { class: "tick end", x: MARGIN.left - 6, y: y(value) + 4 });
    text.textContent = `${100 * value}%`;
    root.append(text);
  }
  for (const { value, text } of ticks) {
    root.append(svg("line", { class: "axis", x1: x(value), x2: x(value), y1: bottom, y2: bottom + 4 }));
    root.append(svg("text", { class: "tick middle", x: x(value), y: bottom + 16 }, text));
  }
  root.append(svg("text", { class: "tick end", x: right, y: height - 3 }, axis));
  return { root, x, y, right, bottom };
}

/** About five round tick values up to `most`. */
function round(most) {
  const rough = most / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max([1, 2, 5, 10].find((m) => m * power >= rough) * power, 1);
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step);
}

/** Draws the confidence in the true class against eps, in 255ths. */
export function curve(box, { points, most, norm, current, broken, label }) {
  const sorted = points.filter((point) => point.k <= most).sort((a, b) => a.k - b.k);
  if (sorted.length < 2) return box.replaceChildren(); // one point is no curve
  const ticks =
    norm === "l2"
      ? Array.from({ length: 5 }, (_, i) => ({
          value: (i * most) / 4,
          text: ((i * most) / 4 / 255).toFixed(2),
        }))
      : round(most).map((value) => ({ value, text: String(value) }));
  const { root, x, y, bottom } = frame(box, {
    height: 220,
    most,
    ticks,
    label,
    x: norm === "l2" ? "eps" : "eps in 1/255",
  });
  if (broken !== null && broken <= most) {
    const place = x(broken);
    root.append(svg("rect", { class: "lost", x: place, y: MARGIN.top, width: x(most) - place, height: bottom - MARGIN.top }));
    root.append(svg("line", { class: "breaks", x1: place, x2: place, y1: MARGIN.top, y2: bottom }));
  }
  if (current && current.k <= most) {
    const place = x(current.k);
    root.append(svg("line", { class: "cursor", x1: place, x2: place, y1: MARGIN.top, y2: bottom }));
  }
  root.append(svg("polyline", { class: "line", points: sorted.map(({ k, p }) => `${x(k)},${y(p)}`).join(" ") }));
  for (const { k, p, success } of sorted) {
    const dot = svg("circle", { class: success ? "dot gone" : "dot", cx: x(k), cy: y(p), r: 3.5 });
    dot.append(svg("title", {}, `${epsText(k, norm)}: ${percent(p)}${success ? ", broken" : ""}`));
    root.append(dot);
  }
  if (current?.p !== undefined && current.k <= most) {
    const ring = svg("circle", { class: "ring", cx: x(current.k), cy: y(current.p), r: 6 });
    ring.append(svg("title", {}, `the attack above: ${percent(current.p)}`));
    root.append(ring);
  }
  box.replaceChildren(root);
}

/** Draws each attack's accuracy with its interval against the number of images scored so far;
 * `lines` has a list of points per attack. */
export function settling(box, lines, total) {
  box.hidden = lines.every((line) => line.length < 2); // one point is no curve
  if (box.hidden) return;
  const { root, x, y } = frame(box, {
    height: 220,
    most: Math.max(total, 1),
    ticks: round(Math.max(total, 1)).map((value) => ({ value, text: String(value) })),
    label: "Accuracy of each attack with its 95% interval against the images scored so far",
    x: "images",
  });
  lines.forEach((line, place) => {
    if (line.length < 2) return;
    const upper = line.map(({ n, interval }) => `${x(n)},${y(interval[1])}`);
    const lower = line.map(({ n, interval }) => `${x(n)},${y(interval[0])}`).reverse();
    const middle = line.map(({ n, accuracy }) => `${x(n)},${y(accuracy)}`);
    const { n, accuracy, interval } = line.at(-1);
    const group = svg(
      "g",
      { class: `series s${place % 8}` },
      svg("polygon", { points: [...upper, ...lower].join(" ") }),
      svg("polyline", { points: middle.join(" ") }),
      svg("line", { x1: x(n), x2: x(n), y1: y(interval[0]), y2: y(interval[1]) }),
      svg("circle", { cx: x(n), cy: y(accuracy), r: 3.5 }),
    );
    root.append(group);
  });
  box.replaceChildren(root);
}

/** A swatch in the color of a line of `settling`, for the table's legend. */
export function swatch(place) {
  return el("span", { class: `swatch s${place % 8}`, "aria-hidden": "true" });
}
