// The settings in the page's address: a reload, back, forward and a shared link show the same.

const WAIT = 250; // ms; browsers limit how often an address may change
const SLIDES = ["eps", "steps"]; // change in small steps, which are not each worth a way back
let timer = null;

export const given = () => new URLSearchParams(location.search);

/** Writes these settings, without the empty ones, into the address a little later. */
export function note(settings) {
  clearTimeout(timer);
  timer = setTimeout(() => {
    const query = new URLSearchParams(Object.entries(settings).filter(([, value]) => value));
    const address = `?${query}`.replaceAll("%2F", "/");
    if (address === location.search) return;
    const kept = rough(given()) === rough(query) || location.search === "";
    history[kept ? "replaceState" : "pushState"](null, "", address + location.hash);
  }, WAIT);
}

/** Calls back after back and forward. */
export function followed(callback) {
  addEventListener("popstate", () => {
    clearTimeout(timer);
    if (location.search) callback(given());
  });
}

function rough(query) {
  const copy = new URLSearchParams(query);
  SLIDES.forEach((name) => copy.delete(name));
  return String(copy);
}
