// Runs before the first paint, so that the page never flashes in another theme.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("robust-theme");
  } catch {
    // Storage may be blocked; the system's theme then applies.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
