// The same request as a line for the shell.

import { keyed } from "./api.js";

/** A line of curl for `path` with the fields of a form; a file is given by its name. */
export function line(path, fields, { file, headers = {} } = {}) {
  const parts = ["curl -s"];
  if (keyed()) parts.push("-H 'Authorization: Bearer KEY'");
  for (const [name, value] of Object.entries(headers)) parts.push(`-H ${quoted(`${name}: ${value}`)}`);
  if (file) parts.push(`-F ${quoted(`file=@${escaped(file)}`)}`);
  for (const [name, value] of Object.entries(fields)) {
    for (const item of Array.isArray(value) ? value : [value]) {
      // --form-string takes a value as it is; -F reads @, < and ; in it.
      if (item === "" || item == null) continue;
      parts.push(`${/^[@<]|;/.test(item) ? "--form-string" : "-F"} ${quoted(`${name}=${item}`)}`);
    }
  }
  parts.push(quoted(new URL(path, document.baseURI).href));
  return parts.join(" ");
}

/** curl reads commas and semicolons in a file's name, unless it stands in double quotes. */
const escaped = (name) =>
  /[,;"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name;

/** `text` as one word of a POSIX shell. */
const quoted = (text) =>
  /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;

/** Lets `button` copy the text of `code`, and say so. */
export function copies(button, code) {
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
