// The four margins of an outpainted image: borders dragged, or moved with the arrow keys as sliders.

const PIXELS = 8;
const OUTWARDS = { left: [-1, 0], right: [1, 0], up: [0, -1], down: [0, 1] };
const OPPOSITE = { left: "right", right: "left", up: "down", down: "up" };

export class Margins {
  /** change: called when a margin has changed, with whether a drag is going on. */
  constructor(handles, change) {
    this.handles = handles;
    this.change = change;
    this.values = { left: 0, right: 0, up: 0, down: 0 };
    this.limits = { width: 0, height: 0, side: 0 };
    this.scale = 1;
    for (const handle of handles) this.#listen(handle, handle.dataset.side);
  }

  /** Sets the image's size and the maximum pixels a side that the weights draw. */
  reset({ width, height }, side) {
    this.limits = { width, height, side };
    this.clear();
  }

  clear() {
    this.values = { left: 0, right: 0, up: 0, down: 0 };
    this.#changed(false);
  }

  get empty() {
    return !Object.values(this.values).some(Boolean);
  }

  /** The result's size in pixels. */
  get size() {
    const { left, right, up, down } = this.values;
    return { width: left + this.limits.width + right, height: up + this.limits.height + down };
  }

  #set(side, pixels, dragging) {
    const value = Math.round(Math.min(Math.max(pixels, 0), this.#room(side)) / PIXELS) * PIXELS;
    this.values[side] = Math.min(value, this.#room(side));
    this.#changed(dragging);
  }

  /** Pixels a side: at least twice the image, which the server scales down to fit. */
  get #longest() {
    const { width, height, side } = this.limits;
    return Math.max(side, 2 * Math.max(width, height));
  }

  #room(side) {
    const length = side === "left" || side === "right" ? this.limits.width : this.limits.height;
    return Math.max(0, this.#longest - length - this.values[OPPOSITE[side]]);
  }

  #changed(dragging) {
    for (const handle of this.handles) {
      const side = handle.dataset.side;
      handle.ariaValueMin = "0";
      handle.ariaValueMax = String(this.#room(side));
      handle.ariaValueNow = String(this.values[side]);
      handle.ariaValueText = `${this.values[side]} pixels`;
    }
    this.change(dragging);
  }

  #listen(handle, side) {
    let start = null;
    const [x, y] = OUTWARDS[side];
    handle.addEventListener("pointerdown", (event) => {
      if (!event.isPrimary) return;
      handle.setPointerCapture(event.pointerId);
      handle.focus();
      start = { pointerId: event.pointerId, at: event.clientX * x + event.clientY * y, value: this.values[side] };
      event.preventDefault();
    });
    handle.addEventListener("pointermove", (event) => {
      if (start?.pointerId === event.pointerId) this.#set(side, start.value + (event.clientX * x + event.clientY * y - start.at) / this.scale, true);
    });
    for (const name of ["pointerup", "pointercancel"]) {
      handle.addEventListener(name, ({ pointerId }) => {
        if (start?.pointerId !== pointerId) return;
        start = null;
        this.#changed(false);
      });
    }
    handle.addEventListener("keydown", (event) => this.#key(event, side));
  }

  #key(event, side) {
    const [x, y] = OUTWARDS[side];
    // Outwards increases; across the border's direction, up and right do, as on any slider.
    const along = { ArrowLeft: -(x || 1), ArrowRight: x || 1, ArrowUp: -(y || -1), ArrowDown: y || -1 };
    const pages = { PageUp: 4, PageDown: -4 };
    const ends = { Home: 0, End: this.#room(side) };
    const moved = (along[event.key] ?? pages[event.key] ?? 0) * PIXELS;
    if (!moved && !(event.key in ends)) return;
    event.preventDefault();
    this.#set(side, ends[event.key] ?? this.values[side] + moved, false);
  }
}
