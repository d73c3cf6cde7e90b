// Requests to the service: errors as sentences, and events when it goes down or changes its model.

import { capital, sleep } from "./dom.js";

const HEARTBEAT = 10_000;
// Attempts of a request that fails although the service is ready, and ms between them if it does
// not say how long to wait.
const RETRY = { attempts: 3, wait: 2000 };
// An aborted attack holds its place in the queue until the service notices, so "busy" may pass soon.
const BUSY = { wait: 500, limit: 10_000 }; // ms between attempts and in all
const events = new EventTarget();
let up = true;
let sha256 = null;
let key = null; // kept in this page only

/** An error whose message is a sentence for the user. `status` is 0 without a response; `away` says
 * that the service is not ready, so that "back" will follow. */
export class Failure extends Error {
  constructor(message, { status = 0, retryAfter = 0, away = false } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
    this.away = away;
  }
}

/** Listens for "lost" and "back" (the connection), "model" (a new one is served) and "key" (one is
 * required). */
export const on = (name, callback) => events.addEventListener(name, callback);

export const isStopped = (error) => error.name === "AbortError";

/** Sends this key with all later requests. */
export const useKey = (text) => (key = text);

/** Whether requests are sent with a key. */
export const keyed = () => key !== null;

/** Fetches a path, given without a leading slash, and returns the response. Throws Failure. */
export async function open(path, init = {}) {
  const used = key;
  let response;
  try {
    const headers = { ...init.headers, ...(key === null ? {} : { "X-API-Key": key }) };
    response = await fetch(new URL(path, document.baseURI), { cache: "no-store", ...init, headers });
  } catch (error) {
    if (isStopped(error)) throw error;
    throw await dropped();
  }
  if (response.status === 401 && used !== key) return open(path, init); // the user entered a key since
  if (!response.ok) throw await failure(response);
  notice(response);
  return response;
}

/** Fetches a path and returns the JSON of the response. Throws Failure. */
export async function ask(path, init) {
  const response = await open(path, init);
  try {
    return await response.json();
  } catch (error) {
    if (isStopped(error)) throw error;
    throw await dropped();
  }
}

/** Posts a form and returns the JSON of the response. Lists repeat their field; empty values are
 * omitted. Tries again if the service is ready but can't answer now. */
export async function post(path, fields, { signal, headers } = {}) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item !== "" && item != null) body.append(name, item);
    }
  }
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await ask(path, { method: "POST", body, signal, headers });
    } catch (error) {
      const transient = (error.status === 503 || error.status === 0) && !error.away;
      if (!transient || attempt === RETRY.attempts) throw error;
      await sleep(1000 * error.retryAfter || RETRY.wait, signal);
    }
  }
}

/** Posts an attack; while the service is busy, tries again for a while. */
export async function postAttack(fields, signal) {
  const latest = performance.now() + BUSY.limit;
  for (;;) {
    try {
      return await post("attack", fields, { signal });
    } catch (error) {
      if (error.status !== 429 || performance.now() > latest) throw error;
      await sleep(BUSY.wait, signal);
    }
  }
}

/** The Failure for a request without a complete response. */
async function dropped() {
  const away = await isAway();
  if (!away) return new Failure("The connection was lost before the response was complete.");
  lost();
  const message = "The service does not respond. This page keeps trying and continues by itself.";
  return new Failure(message, { away });
}

async function failure(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  let problem = {};
  try {
    problem = await response.json();
  } catch {
    // Not a problem document but a proxy's page: the status is enough.
  }
  const { status } = response;
  // A service that is ready may still refuse some requests, such as evaluations without a database.
  const away = status === 503 && (await isAway());
  if (away) lost(sentence(problem.detail ?? "The service is not ready"));
  if (status === 401) events.dispatchEvent(new Event("key"));
  return new Failure(words(status, problem, { retryAfter, away }), { status, retryAfter, away });
}

function words(status, problem, { retryAfter, away }) {
  const faults = (problem.errors ?? []).map(({ field, expected, got }) => {
    const what = field === "file" ? "" : `${field}: `;
    return sentence(`${what}expected ${expected}, but got ${got}`);
  });
  if (faults.length) return faults.join(" ");
  const detail = sentence(problem.detail ?? `The service responded with status ${status}`);
  if (status === 401) {
    return keyed()
      ? "The service refused this key. Enter another one at the top of the page."
      : "This service requires an API key. Enter yours at the top of the page.";
  }
  if (status === 429) return `The service is busy. ${detail} Try again in ${retryAfter || 5} s.`;
  if (away) return `${detail} This page continues by itself when the service is ready.`;
  if (status === 503) return `${detail} Try again in ${retryAfter || 5} s.`;
  if (status === 504) return `${detail} Try fewer steps or a faster attack.`;
  return detail;
}

function sentence(text) {
  const trimmed = text.trim();
  return capital(trimmed) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

function notice(response) {
  const named = response.headers.get("X-Model-SHA256"); // of an evaluation, its own model's
  const path = /[^/]*$/.exec(new URL(response.url).pathname)[0];
  if (!named || !["model", "readyz"].includes(path)) return;
  // The page shows what /model answers, so only a probe can find another model.
  const changed = path === "readyz" && sha256 !== null && named !== sha256;
  sha256 = named;
  if (changed) events.dispatchEvent(new Event("model"));
}

async function lost(why = "The service does not respond; retrying…") {
  if (!up) return;
  up = false;
  events.dispatchEvent(new CustomEvent("lost", { detail: why }));
  let wait = 500;
  do {
    await sleep(wait);
    wait = Math.min(2 * wait, 5000);
  } while (!(await ready()));
  up = true;
  events.dispatchEvent(new Event("back"));
}

/** Whether the service is not ready; asks it unless this is known. */
const isAway = async () => !up || !(await ready());

async function ready() {
  try {
    const signal = AbortSignal.timeout(HEARTBEAT);
    const response = await fetch(new URL("readyz", document.baseURI), { cache: "no-store", signal });
    if (response.ok) notice(response);
    return response.ok;
  } catch {
    return false;
  }
}

/** Checks regularly whether the service is up, while the page is visible. */
export async function watch() {
  for (;;) {
    if (up && !document.hidden && !(await ready())) lost();
    await sleep(HEARTBEAT);
  }
}
