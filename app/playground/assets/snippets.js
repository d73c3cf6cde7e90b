// The same request as a command: for the shell, for Python, and with PyTorch instead of the service.

import { keyed } from "./api.js";
import { $ } from "./dom.js";

/** A block of code with a button for each form it is to be had in. */
export class Snippets {
  #code;
  #forms;
  #chosen;
  #texts = {};

  /** `id` is that of the code; buttons with `data-form` choose among `forms`. */
  constructor(id, forms) {
    this.#code = $(id);
    this.#forms = this.#code.closest(".snippet").querySelectorAll("[data-form]");
    this.#chosen = forms[0];
    for (const button of this.#forms) {
      button.addEventListener("click", () => {
        this.#chosen = button.dataset.form;
        this.#show();
      });
    }
    copies($(`${id}-copy`), this.#code);
  }

  /** The commands for an attack with these fields of the form. */
  attack(fields, { file, source, name, size }) {
    this.#texts = {
      curl: line("attack", fields, { file, source }),
      python: attackWithClient(fields, { file, source }),
      torch: attackWithTorch(fields, { file, source, name, size }),
    };
    this.#show();
  }

  /** The commands for an evaluation. */
  evaluate(fields, { file, source }) {
    const headers = { Prefer: "wait=60" };
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

/** A line of curl for `path` with the fields of a form. A file is given by its name; one that the
 * service has is fetched from `source` first, so that the line works in any folder. */
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
      // --form-string takes a value as it is; -F reads @, < and ; in it.
      if (item === "" || item == null) continue;
      parts.push(`${/^[@<]|;/.test(item) ? "--form-string" : "-F"} ${quoted(`${name}=${item}`)}`);
    }
  }
  parts.push(quoted(address(path)));
  return parts.join(" ");
}

const address = (path) => new URL(path, document.baseURI).href;

/** curl reads commas and semicolons in a file's name, unless it stands in double quotes. */
const escaped = (name) =>
  /[,;"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name;

/** `text` as one word of a POSIX shell. */
const quoted = (text) =>
  /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;

// Python

/** A string of Python: JSON's escapes are Python's too. */
const py = (value) => JSON.stringify(value);

const service = () => address(".").replace(/\/$/, "");

function client() {
  return `with Client(${py(service())}${keyed() ? ', key="KEY"' : ""}) as client:`;
}

/** Lines that read the image or set into `name`; what is no example is a file of that name. */
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
  const parameters = [py(attack), `norm=${py(norm)}`, `eps=${py(eps)}`];
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

/** Plain PyTorch for FGSM and PGD; the other attacks are those of the library. */
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

/** FGSM, which is one step without a random start, or PGD. */
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

/** Lets `button` copy the text of `code`, and say so. */
function copies(button, code) {
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      // No clipboard without https: leave the line selected, to be copied by hand.
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}
