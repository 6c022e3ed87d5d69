// Live mode: draws the form's request again and again while one types; the newest text wins.

import { post } from "./api.js";
import { dataUrl } from "./run_request.js";

// From the last key to the next request while another one is in flight, which it supersedes; otherwise requests are sent at once.
const PAUSE_MS = 60;
// No younger request is superseded: otherwise keys that come faster than images would keep every image from appearing.
const GRACE_MS = 300;
// The same with reduced motion, for every request: images change only when typing pauses.
const CALM_MS = 500;
const REST_MS = 1000;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class Live {
  /**
   * request: returns the request to draw, or null for none; may throw. shown: called with (request, {answer, urls, seconds}) once the image
   * is decoded; seconds: since the last key that it contains. rested: called a second after the last image. failed: called with an error
   * and the seconds until the form is drawn again; 0: by the next key.
   */
  constructor({ request, shown, rested, failed }) {
    Object.assign(this, { request, shown, rested, failed, asked: "", flight: null, timer: 0, rest: 0, typedAt: 0, sentAt: 0, earliest: 0 });
  }

  /** Draws the form as it is now. */
  typed() {
    this.typedAt = performance.now();
    if (this.#wanted() === "") this.#abort();
    else this.#schedule();
  }

  /** Draws the form even if it is what was drawn last. */
  restart() {
    this.asked = "";
    this.typed();
  }

  /** Draws nothing more until the form changes. */
  halt() {
    clearTimeout(this.rest);
    this.#abort();
    this.asked = this.#wanted() ?? "";
  }

  /** Returns the request as text, empty for none, or null for an incomplete form. */
  #wanted() {
    try {
      return serialize(this.request());
    } catch {
      return null;
    }
  }

  #schedule() {
    clearTimeout(this.timer);
    const pause = calm.matches ? CALM_MS : this.flight ? PAUSE_MS : 0;
    const allowed = this.flight ? this.sentAt + GRACE_MS : this.earliest;
    const wait = Math.max(this.typedAt + pause, allowed) - performance.now();
    if (wait > 0) this.timer = setTimeout(() => this.#draw(), wait);
    else this.#draw();
  }

  #abort() {
    clearTimeout(this.timer);
    this.flight?.abort();
    Object.assign(this, { asked: "", flight: null, timer: 0 });
  }

  #draw() {
    this.timer = 0;
    try {
      const request = this.request();
      const asked = serialize(request);
      if (asked === this.asked) return;
      this.#abort();
      if (request) this.#send(request, asked);
    } catch (error) {
      this.#abort();
      this.failed(error, 0);
    }
  }

  async #send(request, asked) {
    const flight = new AbortController();
    const began = this.typedAt;
    let wait = 0;
    Object.assign(this, { asked, flight, sentAt: performance.now() });
    try {
      const result = await draw(request, flight.signal);
      if (this.flight !== flight) return;
      this.shown(request, { ...result, seconds: (performance.now() - began) / 1000 });
      clearTimeout(this.rest);
      this.rest = setTimeout(this.rested, REST_MS);
    } catch (error) {
      if (this.flight !== flight) return;
      clearTimeout(this.rest);
      wait = Number(error.retryAfter) || 0;
      Object.assign(this, { asked: "", earliest: performance.now() + 1000 * wait });
      this.failed(error, wait);
    }
    this.flight = null;
    if (this.timer || wait) this.#schedule();
  }
}

function serialize(request) {
  return request ? JSON.stringify(request) : "";
}

/** Returns {answer, urls} when the image is ready to be painted. Throws as `send` does, and DOMException for an unreadable image. */
async function draw({ operation, fields }, signal) {
  const response = await post(operation, { ...fields, response_format: "json" }, signal);
  const answer = await response.json();
  const urls = answer.images.map(dataUrl);
  await Object.assign(new Image(), { src: urls[0] }).decode();
  return { answer, urls };
}
