// Helpers to make elements and to format numbers.

export const $ = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

export const capital = (text) => text[0].toUpperCase() + text.slice(1);

/** Shows `text` in `node`, or hides the node if the text is empty. */
export function say(node, text = "") {
  node.textContent = text;
  node.hidden = !text;
}

export function options(select, pairs, chosen = select.value) {
  select.replaceChildren(...pairs.map(([value, text]) => el("option", { value }, text)));
  if (pairs.some(([value]) => value === chosen)) select.value = chosen;
}

export const percent = (p) => {
  const value = 100 * p;
  if (value > 0 && value < 0.05) return "<0.1%";
  if (value < 100 && value >= 99.95) return ">99.9%";
  return `${value.toFixed(1)}%`;
};

export const seconds = (s) => (s < 1 ? `${Math.round(1000 * s)} ms` : `${s.toFixed(1)} s`);

/** The text of an eps of k/255; under L2 with its decimal value, which is usual there. */
export const epsText = (k, norm) =>
  norm === "l2" ? `${(k / 255).toFixed(3)} (${k}/255)` : `${k}/255`;

export const normText = (norm) => ({ linf: "L∞", l2: "L2" })[norm] ?? norm;

const titles = new Map();
/** Stores the titles of the attacks from /limits. */
export const nameAttacks = (attacks) => attacks.forEach(({ name, title }) => titles.set(name, title));
export const attackText = (name) => titles.get(name) ?? name.toUpperCase();

/** Resolves after `ms` milliseconds; rejects when `signal` aborts. */
export function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, ms);
    if (signal?.aborted) stop();
    else signal?.addEventListener("abort", stop, { once: true });
  });
}
