// The server's HTTP contract: JSON, server-sent events, errors in their one shape, and a bearer key if it wants one.

const KEY = "paellera.key";

/** What the server said was wrong. param: the field that is to blame; code: for programs; retryAfter: seconds, or null. */
export class ServerError extends Error {
  constructor(status, { message, param = null, code = "" }, retryAfter = null) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

export const bearerKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => sessionStorage.setItem(KEY, key),
};

export function address(path) {
  return new URL(path, document.baseURI);
}

/** Throws ServerError for an answer that is one, TypeError if there is no answer. */
export async function send(path, options = {}) {
  const headers = new Headers(options.headers);
  if (bearerKey.get()) headers.set("Authorization", `Bearer ${bearerKey.get()}`);
  const response = await fetch(address(path), { ...options, headers });
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const text = await response.text();
  try {
    return new ServerError(response.status, JSON.parse(text).error, response.headers.get("Retry-After"));
  } catch {
    return new ServerError(response.status, { message: text.slice(0, 200) || response.statusText });
  }
}

/** The events of a streamed request, {name, data} each. Throws ServerError for the event `error` too. */
export async function* stream(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await send(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  for await (const event of events(response.body)) {
    if (event.name === "error") throw new ServerError(response.status, event.data.error);
    yield event;
  }
}

/** A body of server-sent events, one by one; heartbeats are comments and are left out. */
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
