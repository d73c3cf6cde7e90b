// The current request as code to copy: for curl, for Python, and for PyTorch without the service.

import { keyed } from "./api.js";
import { $ } from "./dom.js";

const NO_ATTACK = "# Choose at least one attack."; // a comment in both languages

/** A code block with a button for each language. */
export class Snippets {
  #code;
  #forms;
  #chosen = "curl";
  #texts = {};

  /** `id` is the code element's; buttons with `data-form` choose the language. */
  constructor(id) {
    this.#code = $(id);
    this.#forms = this.#code.closest(".snippet").querySelectorAll("[data-form]");
    for (const button of this.#forms) {
      button.addEventListener("click", () => {
        this.#chosen = button.dataset.form;
        this.#show();
      });
    }
    copies($(`${id}-copy`), this.#code);
  }

  /** Shows the code for an attack with these form fields. */
  attack(fields, { file, source, name, size }) {
    this.#texts = {
      curl: line("attack", fields, { file, source }),
      python: attackWithClient(fields, { file, source }),
      torch: attackWithTorch(fields, { file, source, name, size }),
    };
    this.#show();
  }

  /** Shows the code for an evaluation. `wait` is how long the service may hold the response, in
   * seconds. */
  evaluate(fields, { file, source, wait }) {
    const headers = { Prefer: `wait=${wait}` };
    if (!fields.attack.length) {
      // Without an attack in the request, the service would run its default ones.
      this.#texts = { curl: NO_ATTACK, python: NO_ATTACK };
      return this.#show();
    }
    this.#texts = {
      curl: line("evaluate", fields, { file, source, headers }),
      python: evaluateWithClient(fields, { file, source }),
    };
    this.#show();
  }

  #show() {
    this.#code.textContent = this.#texts[this.#chosen];
    for (const button of this.#forms) {
      button.setAttribute("aria-pressed", String(button.dataset.form === this.#chosen));
    }
  }
}

// curl

/** A curl command that posts form fields to `path`. A file is given by its name; an example file of
 * the service is fetched from `source` first, so that the command works in any folder. */
function line(path, fields, { file, source, headers = {} } = {}) {
  const parts = source ? [`curl -sS ${quoted(address(source))} |`, "curl -sS"] : ["curl -sS"];
  if (keyed()) parts.push("-H 'Authorization: Bearer KEY'");
  for (const [name, value] of Object.entries(headers)) parts.push(`-H ${quoted(`${name}: ${value}`)}`);
  if (file) {
    const form = source ? `file=@-;filename=${file.split("/").at(-1)}` : `file=@${escaped(file)}`;
    parts.push(`-F ${quoted(form)}`);
  }
  for (const [name, value] of Object.entries(fields)) {
    for (const item of Array.isArray(value) ? value : [value]) {
      // --form-string sends a value as it is; -F interprets @, < and ; in it.
      if (item === "" || item == null) continue;
      parts.push(`${/^[@<]|;/.test(item) ? "--form-string" : "-F"} ${quoted(`${name}=${item}`)}`);
    }
  }
  parts.push(quoted(address(path)));
  return parts.join(" ");
}

const address = (path) => new URL(path, document.baseURI).href;

/** A file name for curl's -F: in double quotes if it has commas or semicolons. */
const escaped = (name) =>
  /[,;"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name;

/** `text` quoted as one word for a POSIX shell. */
const quoted = (text) =>
  /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;

// Python

/** `value` as a Python literal: JSON's string escapes are valid in Python. */
const py = (value) => JSON.stringify(value);

const service = () => address(".").replace(/\/$/, "");

function client() {
  return `with Client(${py(service())}${keyed() ? ', key="KEY"' : ""}) as client:`;
}

/** Lines of Python that read the image or dataset into `name`, from `source` or the local file. */
function reading(name, { file, source }, path = "") {
  if (source) return [`${name} = urlopen(${py(address(source))}).read()`];
  return [`${name} = ${path}${path ? `(${py(file)}).read_bytes()` : py(file)}`];
}

const imports = (source, ...more) => [...(source ? ["from urllib.request import urlopen", ""] : []), ...more];

function attackWithClient({ attack, compare, ...fields }, given) {
  const numbers = ["steps"];
  const parameters = Object.entries(fields)
    .filter(([, value]) => value !== "")
    .map(([name, value]) => `${name}=${numbers.includes(name) ? value : py(value)}`);
  if (compare) parameters.push("compare=True");
  return [
    ...imports(given.source, "from robust.client import Client", ""),
    ...reading("image", given),
    client(),
    `    (attack,) = client.attack(image, ${[py(attack), ...parameters].join(", ")})`,
    "print(attack.before.label, \"->\", attack.after.label, attack.outcome)",
    ...(compare
      ? ["other = attack.compare", "print(other.before.label, \"->\", other.after.label, other.outcome)"]
      : []),
    "with open(\"adversarial.png\", \"wb\") as file:",
    "    file.write(attack.image)",
  ].join("\n");
}

function evaluateWithClient({ dataset, attack, norm, eps, limit }, given) {
  const parameters = [py(attack), `norm=${py(norm)}`];
  if (eps) parameters.push(`eps=${py(eps)}`);
  if (dataset) parameters.push(`dataset=${py(dataset)}`);
  if (limit) parameters.push(`limit=${limit}`);
  return [
    ...imports(given.source, "from robust.client import Client", ""),
    ...(given.file ? reading("data", given) : []),
    client(),
    `    job = client.evaluate(${[given.file ? "data" : "None", ...parameters].join(", ")})`,
    "    for job in client.watch(job.id):",
    "        print(job.state)",
    "for row in job.evaluation[\"results\"]:",
    "    print(row[\"attack\"], row[\"accuracy\"], row[\"interval\"])",
  ].join("\n");
}

/** Plain PyTorch for FGSM and PGD; other attacks use this project's library. */
function attackWithTorch({ attack, norm, eps, steps, label, target }, { file, source, name, size }) {
  const plain = ["fgsm", "pgd"].includes(attack);
  const y = label ? `torch.tensor([model.classes.index(${py(label)})])` : "model(x).argmax(1)";
  const goal = target ? [`goal = torch.tensor([model.classes.index(${py(target)})])`] : [];
  return [
    ...(source ? ["from urllib.request import urlopen"] : ["from pathlib import Path"]),
    "",
    "import torch",
    "import robust",
    "from robust.images import read_image",
    "",
    `model = robust.load_model(${py(name)})  # path of the file that is served`,
    ...reading("data", { file, source }, "Path"),
    `x = read_image(data, ${size})[None] / 255`,
    `y = ${y}`,
    ...goal,
    ...(plain ? descent({ norm, eps, steps: attack === "fgsm" ? null : steps, target }) : library({ attack, norm, eps, steps, target })),
    "for image in (x, x_adv):",
    "    p, k = model(image).softmax(1).max(1)",
    "    print(model.classes[k], f\"{p.item():.3f}\")",
  ].join("\n");
}

function library({ attack, norm, eps, steps, target }) {
  const parameters = [py(attack), `norm=${py(norm)}`, `eps=${py(eps)}`];
  if (steps) parameters.push(`steps=${steps}`);
  if (target) parameters.push("target=goal");
  return [`x_adv = robust.attack(model, x, y, ${parameters.join(", ")}).x_adv`];
}

/** PyTorch code for PGD, or for FGSM: one step without a random start. */
function descent({ norm, eps, steps, target }) {
  const [numerator, denominator] = eps.split("/");
  const [loss, sign] = target ? ["goal", "-"] : ["y", "+"];
  const l2 = norm === "l2";
  const start = l2
    ? ["delta = torch.randn_like(x)", "delta *= eps * torch.rand(1) / delta.norm()"]
    : ["delta = torch.empty_like(x).uniform_(-eps, eps)"];
  return [
    "",
    `eps, steps = ${numerator} / ${denominator}, ${steps ?? 1}`,
    steps === null ? "alpha = eps" : "alpha = min(eps, max(eps / 4, 2.5 * eps / steps))",
    ...(steps === null ? ["delta = torch.zeros_like(x)"] : start),
    "for _ in range(steps):",
    "    delta.requires_grad_()",
    `    loss = torch.nn.functional.cross_entropy(model(x + delta), ${loss})`,
    "    (gradient,) = torch.autograd.grad(loss, delta)",
    ...(l2
      ? [
          `    delta = delta.detach() ${sign} alpha * gradient / gradient.norm()`,
          "    delta = delta * (eps / delta.norm()).clamp(max=1)",
        ]
      : [`    delta = (delta.detach() ${sign} alpha * gradient.sign()).clamp(-eps, eps)`]),
    "    delta = (x + delta).clamp(0, 1) - x",
    "x_adv = x + delta",
    "",
  ];
}

/** Makes `button` copy the text of `code`, and confirm it. */
function copies(button, code) {
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      // There is no clipboard without https: select the text, so that the user can copy it.
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}
