// HTTP client: JSON, server-sent events, errors, and the bearer key if one is required.

const KEY = "paellera.key";

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

/** Kept until the tab is closed, or until the page is left where storage is forbidden. */
export const bearerKey = {
  key: "",
  get() {
    try {
      return sessionStorage.getItem(KEY) ?? this.key;
    } catch {
      return this.key;
    }
  },
  set(key) {
    this.key = key;
    try {
      sessionStorage.setItem(KEY, key);
    } catch {
      // The variable above has it.
    }
  },
};

export function address(path) {
  return new URL(path, document.baseURI);
}

/** Throws ServerError for an error answer, TypeError without an answer. */
export async function send(path, options = {}) {
  const headers = new Headers(options.headers);
  if (bearerKey.get()) headers.set("Authorization", `Bearer ${bearerKey.get()}`);
  const response = await fetch(address(path), { ...options, headers });
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const text = await response.text();
  try {
    return new ServerError(response.status, JSON.parse(text).error, response.headers.get("Retry-After"));
  } catch {
    return new ServerError(response.status, { message: text.slice(0, 200) || response.statusText });
  }
}

/** Yields the events of a streamed request, {name, data}. Throws ServerError also for the event `error`. */
export async function* stream(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await send(path, { method: "POST", headers, body: JSON.stringify(body), signal });
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
    const { value, done } = await reader.read();
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
