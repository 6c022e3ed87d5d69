// The server's state: loaded weights, readiness, and the API key if one is required.

import { NoAnswer, bearerKey, send } from "./api.js";

const RETRY_MS = 1500;

export class Connection {
  /**
   * connected: called with the entries of GET /v1/models after each read. reference: the link to the API reference, hidden where a key is
   * required: following a link sends none.
   */
  constructor({ readiness, keyForm, key, reference, prompt }, connected) {
    Object.assign(this, { readiness, keyForm, key, reference, prompt, connected, attempt: null, timer: 0 });
    keyForm.addEventListener("submit", (event) => {
      event.preventDefault();
      if (bearerKey.set(key.value)) this.connect();
      else this.#askForKey({ message: "unknown API key: keys have only the letters, digits and signs of ASCII" });
    });
  }

  /** Retries until the server answers. quietly: leaves the focus where it is. */
  async connect({ quietly = false } = {}) {
    clearTimeout(this.timer);
    this.attempt?.abort();
    this.attempt = new AbortController();
    const { signal } = this.attempt;
    try {
      const { data } = await (await send("v1/models", { signal })).json();
      this.#acceptKey();
      this.connected(data);
      await this.#ready(signal);
    } catch (error) {
      if (signal.aborted) return;
      if (error.status === 401) this.#askForKey(error, quietly);
      else this.#later(error, quietly);
    }
  }

  /** Takes note of a failed request: asks for a key, or looks whether the server is still there. quietly: as above. */
  failed(error, { quietly = false } = {}) {
    if (error.status === 401) this.#askForKey(error, quietly);
    else if (error instanceof NoAnswer || error.status >= 500) this.connect({ quietly: true });
  }

  #acceptKey() {
    const typed = this.keyForm.contains(document.activeElement);
    this.keyForm.hidden = true;
    this.reference.hidden = Boolean(bearerKey.get());
    if (typed) this.prompt.focus();
  }

  #askForKey(error, quietly = false) {
    this.keyForm.hidden = false;
    this.reference.hidden = true;
    this.#say(error.message, "waiting");
    if (!quietly) this.key.focus();
  }

  async #ready(signal) {
    try {
      const { device, dtype } = await (await send("readyz", { signal })).json();
      this.#say(`Ready on ${device}, ${dtype}`, "ready");
    } catch (error) {
      // Probes may be on another port; then requests show whether the server is ready.
      if (error.status === 404) this.#say("Connected", "ready");
      else throw error;
    }
  }

  #later(error, quietly) {
    this.#say(error.message, "waiting");
    this.timer = setTimeout(() => this.connect({ quietly }), RETRY_MS);
  }

  #say(sentence, state) {
    if (this.readiness.textContent !== sentence) this.readiness.textContent = sentence;
    this.readiness.dataset.state = state;
  }
}
