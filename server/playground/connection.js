// Who answers: the weights that are loaded, whether a worker is ready, and the key if one is wanted.

import { bearerKey, send } from "./api.js";

const PATIENCE = 1500;

export class Connection {
  /** connected: called with the entries of GET /v1/models whenever they have been read. */
  constructor({ readiness, keyForm, key }, connected) {
    Object.assign(this, { readiness, keyForm, key, connected });
    keyForm.addEventListener("submit", (event) => {
      event.preventDefault();
      bearerKey.set(key.value.trim());
      this.connect();
    });
  }

  /** Again and again until there is an answer. */
  async connect() {
    try {
      const { data } = await (await send("v1/models")).json();
      this.keyForm.hidden = true;
      this.connected(data);
      await this.#ready();
    } catch (error) {
      if (error.status === 401) this.askForKey(error);
      else this.#later(error);
    }
  }

  askForKey(error) {
    this.keyForm.hidden = false;
    this.#say(error.message, "waiting");
    this.key.focus();
  }

  async #ready() {
    try {
      const { device, dtype } = await (await send("readyz")).json();
      this.#say(`Ready on ${device}, ${dtype}`, "ready");
    } catch (error) {
      // Health may be asked on another port; then requests themselves will tell.
      if (error.status === 404) this.#say("Connected", "ready");
      else throw error;
    }
  }

  #later(error) {
    this.#say(error.status ? error.message : "The server does not answer", "waiting");
    setTimeout(() => this.connect(), PATIENCE);
  }

  #say(sentence, state) {
    if (this.readiness.textContent !== sentence) this.readiness.textContent = sentence;
    this.readiness.dataset.state = state;
  }
}
