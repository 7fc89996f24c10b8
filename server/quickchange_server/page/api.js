// Calls of the server's API with the key, and its refusals in words.

import { eventsOf } from "./sse.js";

const KEY = "quickchange-api-key";

/** The API key of this tab, or null. */
export const storedKey = () => sessionStorage.getItem(KEY);

/** Keep a key for this tab alone; null forgets it. */
export function storeKey(key) {
  if (key === null) sessionStorage.removeItem(KEY);
  else sessionStorage.setItem(KEY, key);
}

/** A refusal, or no answer at all (status 0). `message` is what to show. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Called with the words of every 401; set by the key's dialog. */
let onUnauthenticated = () => {};
export function whenUnauthenticated(call) {
  onUnauthenticated = call;
}

/** A name as a route's path holds it: the "/" between its segments stays. */
export const nameInPath = (name) => name.split("/").map(encodeURIComponent).join("/");

/** GET of JSON. */
export async function get(path) {
  return (await send("GET", path)).json();
}

/** GET of text. */
export async function getText(path) {
  return (await send("GET", path)).text();
}

/** POST of JSON, answered by JSON. */
export async function post(path, body = null, signal = null) {
  return (await send("POST", path, body, signal)).json();
}

/** PUT of JSON, answered by JSON. */
export async function put(path, body, signal = null) {
  return (await send("PUT", path, body, signal)).json();
}

/** DELETE, answered by JSON. */
export async function remove(path, signal = null) {
  return (await send("DELETE", path, null, signal)).json();
}

/** POST of a FormData, answered by JSON. */
export async function upload(path, form, signal = null) {
  return (await send("POST", path, form, signal)).json();
}

/** POST that is answered by events; yields each one's JSON, and ends at [DONE]. */
export async function* stream(path, body, signal) {
  const response = await send("POST", path, body, signal);
  try {
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(500, inWords(500, event.error.message));
      yield event;
    }
  } catch (error) {
    throw error instanceof TypeError ? new ApiError(0, "The connection broke off.") : error;
  }
  throw new ApiError(0, "The answer broke off before its end.");
}

async function send(method, path, body = null, signal = null) {
  const headers = {};
  const key = storedKey();
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  const asJson = body !== null && !(body instanceof FormData); // which names its own type
  if (asJson) headers["Content-Type"] = "application/json";
  const options = { method, headers, signal, body: asJson ? JSON.stringify(body) : body };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer. Is it running?");
  }
  if (response.ok) return response;
  const words = inWords(response.status, await told(response), response.headers.get("retry-after"));
  if (response.status === 401) onUnauthenticated(words);
  throw new ApiError(response.status, words);
}

async function told(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return response.statusText;
  }
}

const REFUSALS = {
  403: "This is not allowed",
  429: "The server has no room for this now",
  503: "The server takes no requests now",
};

function inWords(status, message, retryAfter = null) {
  const again = retryAfter === null ? "" : ` Try again in ${retryAfter} s.`;
  if (status === 401) {
    const why =
      storedKey() === null ? "This server asks for an API key" : "This API key is not valid";
    return `${why}: ${message}`;
  }
  const what = REFUSALS[status];
  return what === undefined ? message : `${what}: ${message}.${again}`.replace("..", ".");
}
