// Keeps the settings in the page's URL, so that reload, back, forward and shared links restore them.

const WAIT = 250; // ms; browsers limit how often the URL may change
const SLIDES = ["eps", "steps"]; // change often, so their changes get no history entry
let timer = null;
let current = location.search; // the last query that was written or followed

export const given = () => new URLSearchParams(location.search);

/** Writes these settings, without empty ones, into the URL after a short wait. */
export function note(settings) {
  clearTimeout(timer);
  timer = setTimeout(() => {
    const query = new URLSearchParams(Object.entries(settings).filter(([, value]) => value));
    const address = `?${query}`.replaceAll("%2F", "/");
    if (address === location.search) return;
    const kept = rough(given()) === rough(query) || location.search === "";
    history[kept ? "replaceState" : "pushState"](null, "", address + location.hash);
    current = location.search;
  }, WAIT);
}

/** Calls `callback` with the settings after the user goes back or forward. */
export function followed(callback) {
  addEventListener("popstate", () => {
    if (location.search === current) return; // only the fragment changed, as by a link to a section
    current = location.search;
    clearTimeout(timer);
    if (current) callback(given());
  });
}

function rough(query) {
  const copy = new URLSearchParams(query);
  SLIDES.forEach((name) => copy.delete(name));
  return String(copy);
}
