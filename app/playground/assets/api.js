// Requests to the service: errors as sentences, and events when it goes down or changes its model.

import { capital, sleep } from "./dom.js";

const HEARTBEAT = 10_000;
const events = new EventTarget();
let up = true;
let sha256 = null;
let key = null; // kept in this page only

/** An error whose message is a sentence for the user; `status` is 0 without a response. */
export class Failure extends Error {
  constructor(message, { status = 0, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** Listens for "lost" and "back" (the connection), "model" (a new one is served) and "key" (one is
 * required). */
export const on = (name, callback) => events.addEventListener(name, callback);

export const isStopped = (error) => error.name === "AbortError";

/** Whether the service did not respond or is not ready, so that the page will try again. */
export const isAway = ({ status }) => status === 0 || status === 503;

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
    lost();
    throw new Failure("The service does not respond. This page keeps trying and continues by itself.");
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
    lost();
    throw new Failure("The connection was lost before the response was complete.");
  }
}

/** Posts a form and returns the JSON of the response. Lists repeat their field; empty values are
 * omitted. */
export function post(path, fields, { signal, headers } = {}) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    for (const item of Array.isArray(value) ? value : [value]) {
      if (item !== "" && item != null) body.append(name, item);
    }
  }
  return ask(path, { method: "POST", body, signal, headers });
}

async function failure(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  let problem = {};
  try {
    problem = await response.json();
  } catch {
    // Not a problem document but a proxy's page: the status is enough.
  }
  if (response.status === 503) lost(sentence(problem.detail ?? "The service is not ready"));
  if (response.status === 401) events.dispatchEvent(new Event("key"));
  return new Failure(words(response.status, problem, retryAfter), {
    status: response.status,
    retryAfter,
  });
}

function words(status, problem, retryAfter) {
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
  if (status === 503) return `${detail} This page continues by itself when the service is ready.`;
  if (status === 504) return `${detail} Try fewer steps or a faster attack.`;
  return detail;
}

function sentence(text) {
  const trimmed = text.trim();
  return capital(trimmed) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

function notice(response) {
  const named = response.headers.get("X-Model-SHA256");
  if (!named || !new URL(response.url).pathname.endsWith("/readyz")) return;
  const changed = sha256 !== null && named !== sha256;
  sha256 = named;
  if (changed) events.dispatchEvent(new Event("model"));
}

async function lost(why = "The service does not respond; retrying…") {
  if (!up) return;
  up = false;
  events.dispatchEvent(new CustomEvent("lost", { detail: why }));
  for (let wait = 500; !(await ready()); wait = Math.min(2 * wait, 5000)) await sleep(wait);
  up = true;
  events.dispatchEvent(new Event("back"));
}

async function ready() {
  try {
    const response = await fetch(new URL("readyz", document.baseURI), { cache: "no-store" });
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
