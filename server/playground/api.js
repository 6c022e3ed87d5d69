// HTTP client: JSON, server-sent events, errors, and the bearer key if one is required.

const KEY = "paellera.key";
// Visible ASCII, as the server's keys are; headers cannot hold much more.
const KEY_CHARACTERS = /^[!-~]+$/;
// What copying adds: spaces, invisible characters, and quotes around the key.
const INVISIBLE = /[\s\p{Cf}]/gu;
const QUOTES = /^[“”„‘’‚«»]+|[“”„‘’‚«»]+$/gu;

/** An error answer. param: the field at fault; code: for programs; retryAfter: seconds, or null. */
export class ServerError extends Error {
  constructor(status, { message, param = null, code = "" }, retryAfter = null) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/** No answer at all, or a connection that broke. */
export class NoAnswer extends Error {
  constructor() {
    super("The server does not answer");
  }
}

/** Kept until the tab is closed, or until the page is left where storage is forbidden. */
export const bearerKey = {
  key: "",
  get() {
    try {
      return sendable(sessionStorage.getItem(KEY) ?? this.key);
    } catch {
      return this.key;
    }
  },
  /** Returns false, and keeps the former key, if no server can have this one. */
  set(typed) {
    const key = typed.replace(INVISIBLE, "").replace(QUOTES, "");
    if (!sendable(key)) return false;
    this.key = key;
    try {
      sessionStorage.setItem(KEY, key);
    } catch {
      // The variable above has it.
    }
    return true;
  },
};

function sendable(key) {
  return KEY_CHARACTERS.test(key) ? key : "";
}

export function address(path) {
  return new URL(path, document.baseURI);
}

/** Throws ServerError for an error answer and for a web page in place of an answer, NoAnswer without an answer. */
export async function send(path, options = {}) {
  const headers = new Headers(options.headers);
  if (bearerKey.get()) headers.set("Authorization", `Bearer ${bearerKey.get()}`);
  const response = await received(fetch(address(path), { ...options, headers }));
  if (!response.ok || isPage(response)) throw await errorOf(response);
  return response;
}

/** Awaits a part of an answer. Throws NoAnswer for what the browser reports as TypeError. */
async function received(part) {
  try {
    return await part;
  } catch (error) {
    throw error instanceof TypeError ? new NoAnswer() : error;
  }
}

/** Whether an answer is a web page, which this server's interface never sends. */
function isPage(response) {
  return /html/.test(response.headers.get("Content-Type"));
}

async function errorOf(response) {
  const text = await received(response.text());
  const retryAfter = response.headers.get("Retry-After");
  try {
    return new ServerError(response.status, JSON.parse(text).error, retryAfter);
  } catch {
    const message = isPage(response) ? pageMessage(response, text) : text.slice(0, 200) || response.statusText;
    return new ServerError(response.status, { message }, retryAfter);
  }
}

function pageMessage({ ok, status, statusText }, text) {
  if (ok) return "A web page came in place of an answer. A proxy may ask for a login";
  // HTTP/2 has no status text; error pages have it in their title.
  const title = new DOMParser().parseFromString(text, "text/html").title.replace(String(status), "").trim().slice(0, 100);
  return `A proxy answered in place of the server: ${status} ${statusText || title}`.trim();
}

/** Sends JSON. Throws as `send` does. */
export function post(path, body, signal) {
  return send(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
}

/** Resolves to a request's file, a Blob. Throws as `send` does. */
export async function file(path, body, signal) {
  const response = await post(path, body, signal);
  return received(response.blob());
}

/** Yields the events of a streamed request, {name, data}. Throws ServerError also for the event `error`. */
export async function* stream(path, body, signal) {
  const response = await post(path, body, signal);
  for await (const event of events(response.body)) {
    if (event.name === "error") throw new ServerError(response.status, event.data.error);
    yield event;
  }
}

/** Yields server-sent events of a body, without comments such as heartbeats. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await received(reader.read());
    if (done) return;
    const blocks = (pending + value).split(/\r?\n\r?\n/);
    pending = blocks.pop();
    for (const block of blocks) {
      const event = parse(block);
      if (event.data !== undefined) yield event;
    }
  }
}

function parse(block) {
  const event = { name: "message", data: undefined };
  for (const line of block.split(/\r?\n/)) {
    const [, field, value] = /^(\w*): ?(.*)$/.exec(line) ?? [];
    if (field === "event") event.name = value;
    if (field === "data") event.data = JSON.parse(value);
  }
  return event;
}
