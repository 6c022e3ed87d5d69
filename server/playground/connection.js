// The server's state: loaded weights, readiness, and the API key if one is required.

import { NoAnswer, bearerKey, send } from "./api.js";

const RETRY_MS = 1500;

export class Connection {
  /**
   * connected: called with the entries of GET /v1/models after each read. recovered: called when the server is ready again. reference: the
   * link to the API reference, hidden where a key is required: following a link sends none.
   */
  constructor({ readiness, keyForm, key, keyError, reference, prompt }, { connected, recovered }) {
    Object.assign(this, { readiness, keyForm, key, keyError, reference, prompt, connected, recovered, attempt: null, timer: 0 });
    key.addEventListener("input", () => this.#blameKey(""));
    keyForm.addEventListener("submit", (event) => {
      event.preventDefault();
      if (bearerKey.set(key.value)) this.connect();
      else this.#refuseKey(key.value.trim() ? "Keys have only the letters, digits and signs of ASCII." : "Enter a key.");
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

  /** Takes note of a failed request: asks for a key, or looks whether the server is still there, with the same weights. quietly: as above. */
  failed(error, { quietly = false } = {}) {
    if (error.status === 401) this.#askForKey(error, quietly);
    else if (error instanceof NoAnswer || error.status >= 500 || error.code === "model_not_found") this.connect({ quietly: true });
  }

  #acceptKey() {
    const typed = this.keyForm.contains(document.activeElement);
    this.keyForm.hidden = true;
    this.#blameKey("");
    this.reference.hidden = Boolean(bearerKey.get());
    if (typed) this.prompt.focus();
  }

  #askForKey(error, quietly = false) {
    this.keyForm.hidden = false;
    this.reference.hidden = true;
    this.#say(error.message, "waiting");
    const message = bearerKey.get() ? "The server does not know this key." : "";
    if (quietly) this.#blameKey(message);
    else this.#refuseKey(message);
  }

  /** Marks the key as invalid, and selects it to be replaced. */
  #refuseKey(message) {
    this.#blameKey(message);
    this.key.focus();
    this.key.select();
  }

  #blameKey(message) {
    this.keyError.textContent = message;
    this.key.ariaInvalid = String(Boolean(message));
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
    if (state === "ready" && this.readiness.dataset.state === "waiting") this.recovered();
    this.readiness.dataset.state = state;
  }
}
