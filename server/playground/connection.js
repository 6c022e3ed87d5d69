// The server's state: loaded weights, readiness, and the API key if one is required.

import { bearerKey, send } from "./api.js";

const RETRY_MS = 1500;

export class Connection {
  /**
   * connected: called with the entries of GET /v1/models after each read. reference: the link to the API reference, hidden where a key is
   * required: following a link sends none.
   */
  constructor({ readiness, keyForm, key, reference }, connected) {
    Object.assign(this, { readiness, keyForm, key, reference, connected });
    keyForm.addEventListener("submit", (event) => {
      event.preventDefault();
      bearerKey.set(key.value.trim());
      this.connect();
    });
  }

  /** Retries until the server answers. */
  async connect() {
    try {
      const { data } = await (await send("v1/models")).json();
      this.keyForm.hidden = true;
      this.reference.hidden = Boolean(bearerKey.get());
      this.connected(data);
      await this.#ready();
    } catch (error) {
      if (error.status === 401) this.askForKey(error);
      else this.#later(error);
    }
  }

  /** quietly: leaves the focus where it is. */
  askForKey(error, { quietly = false } = {}) {
    this.keyForm.hidden = false;
    this.reference.hidden = true;
    this.#say(error.message, "waiting");
    if (!quietly) this.key.focus();
  }

  async #ready() {
    try {
      const { device, dtype } = await (await send("readyz")).json();
      this.#say(`Ready on ${device}, ${dtype}`, "ready");
    } catch (error) {
      // Probes may be on another port; then requests show whether the server is ready.
      if (error.status === 404) this.#say("Connected", "ready");
      else throw error;
    }
  }

  #later(error) {
    this.#say(error.status ? error.message : "The server does not answer", "waiting");
    setTimeout(() => this.connect(), RETRY_MS);
  }

  #say(sentence, state) {
    if (this.readiness.textContent !== sentence) this.readiness.textContent = sentence;
    this.readiness.dataset.state = state;
  }
}
