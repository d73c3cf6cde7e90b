// Where images come from: a file, a drop, the clipboard, or one of the examples.

import { $ } from "./dom.js";
import { Failure, open } from "./api.js";

/** Calls `take(blob, name, label)` for each image someone brings, and `fail(error)` otherwise. */
export function bringImages(take, fail) {
  const file = $("file");
  file.addEventListener("change", () => {
    if (file.files[0]) take(file.files[0], file.files[0].name);
    file.value = ""; // so that the same file can be chosen again
  });

  for (const button of $("examples").querySelectorAll("button")) {
    button.addEventListener("click", () => example(button.dataset.example, take, fail));
  }

  document.addEventListener("paste", (event) => {
    const pasted = [...(event.clipboardData?.files ?? [])];
    if (!pasted.length) return;
    event.preventDefault();
    first(pasted, take, fail);
  });

  let depth = 0; // dragenter and dragleave come for every element passed
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
    if (event.target.id === "set-file") return; // the browser puts it there
    event.preventDefault();
    first([...event.dataTransfer.files], take, fail);
  });
}

export async function example(name, take, fail) {
  try {
    const response = await open(`playground/examples/${name}.jpg`, { cache: "default" });
    take(await response.blob(), `examples/${name}.jpg`, name);
  } catch (error) {
    fail(error);
  }
}

function first(files, take, fail) {
  const image = files.find((file) => file.type.startsWith("image/")) ?? files[0];
  if (image) take(image, image.name);
  else fail(new Failure("There was no image in that."));
}
