// Runs before the page is painted, so that a chosen theme does not flash in.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("robust-theme");
  } catch {
    // Storage may be forbidden; the system's theme then holds.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
