// Image sources: a file, drag and drop, the clipboard, or one of the examples.

import { $ } from "./dom.js";
import { Failure, open } from "./api.js";

/** Calls `take(blob, name)` for an image of the user, `choose(name)` for an example, and
 * `fail(error)` for anything else. */
export function bringImages(take, choose, fail) {
  const own = (blob, name) => {
    newest = null; // ignore an example that is still loading
    take(blob, name);
  };
  const file = $("file");
  file.addEventListener("change", () => {
    if (file.files[0]) own(file.files[0], file.files[0].name);
    file.value = ""; // so that the same file can be chosen again
  });

  for (const button of $("examples").querySelectorAll("button")) {
    button.addEventListener("click", () => choose(button.dataset.example));
  }

  document.addEventListener("paste", (event) => {
    const pasted = [...(event.clipboardData?.files ?? [])];
    if (!pasted.length) return;
    event.preventDefault();
    first(pasted, own, fail);
  });

  let depth = 0; // dragenter and dragleave also fire for every nested element
  const mark = (change) => {
    depth = change === 0 ? 0 : Math.max(depth + change, 0);
    $("drop").classList.toggle("over", depth > 0);
  };
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragenter", (event) => carriesFiles(event) && mark(1));
  document.addEventListener("dragleave", (event) => carriesFiles(event) && mark(-1));
  document.addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    mark(0);
    if (event.target.id === "set-file") return; // the browser handles the drop
    event.preventDefault();
    first([...event.dataTransfer.files], own, fail);
  });
}

let newest = null; // the example that was requested last

export async function example(name, take, fail) {
  newest = name;
  try {
    const response = await open(`playground/examples/${name}.jpg`, { cache: "default" });
    const blob = await response.blob();
    if (newest === name) take(blob, `examples/${name}.jpg`, name);
  } catch (error) {
    fail(error);
  }
}

function first(files, take, fail) {
  const image = files.find((file) => file.type.startsWith("image/")) ?? files[0];
  if (image) take(image, image.name);
  else fail(new Failure("This is not an image."));
}
