// Runs in the report's iframe: shows the page that the playground fetched, as that may need a key.
addEventListener("message", ({ origin, data }) => {
  if (origin !== location.origin || typeof data !== "string") return;
  const page = new DOMParser().parseFromString(data, "text/html");
  document.title = page.title;
  document.documentElement.lang = page.documentElement.lang;
  document.head.append(...page.querySelectorAll("style"));
  document.body.replaceWith(page.body);
});
parent.postMessage("ready", location.origin);
