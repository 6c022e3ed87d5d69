// A mask painted over an image, by pointer or keyboard, with undo; sent as a PNG, white where to repaint.

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const MAX_UNDO = 30;

export class Mask {
  /** change: called when the mask has changed. */
  constructor(elements, change) {
    Object.assign(this, elements, { change, undoable: [], last: null, pointer: null, cursor: null, down: false });
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.paint = stripes(this.context);
    this.canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    this.canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, ({ pointerId }) => pointerId === this.pointer && this.#end());
    this.canvas.addEventListener("pointerleave", () => (this.ring.hidden = document.activeElement !== this.canvas));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.canvas.addEventListener("focus", () => this.canvas.matches(":focus-visible") && this.#aim(this.cursor ?? this.#middle));
    this.canvas.addEventListener("blur", () => (this.ring.hidden = true));
  }

  /** Starts an empty mask of this size. */
  reset({ width, height }) {
    Object.assign(this.canvas, { width, height });
    this.#scaleBrush(Math.max(width, height));
    Object.assign(this, { undoable: [], cursor: null, down: false });
    this.ring.hidden = true;
    this.change();
  }

  clear() {
    this.#remember();
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.change();
  }

  invert() {
    this.#remember();
    this.context.globalCompositeOperation = "xor";
    this.context.fillStyle = this.paint;
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.change();
  }

  undo() {
    if (this.undoable.length) this.context.putImageData(this.undoable.pop(), 0, 0);
    this.change();
  }

  get empty() {
    return !this.#alpha.some((value) => value > 127);
  }

  /** Returns a data URL of a PNG, white on black. */
  png() {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: this.canvas.width, height: this.canvas.height });
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    this.#alpha.forEach((value, i) => image.data.set(value > 127 ? [255, 255, 255, 255] : [0, 0, 0, 255], 4 * i));
    context.putImageData(image, 0, 0);
    return canvas.toDataURL("image/png");
  }

  get #alpha() {
    const { data } = this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
    return Uint8Array.from({ length: data.length / 4 }, (_, i) => data[4 * i + 3]);
  }

  get #middle() {
    return { x: this.canvas.width / 2, y: this.canvas.height / 2 };
  }

  /** Keeps the brush's share of its range, which is up to half the image's longer side. */
  #scaleBrush(side) {
    const share = Number(this.brush.value) / Number(this.brush.max);
    this.brush.max = String(Math.max(Number(this.brush.min), Math.round(side / 2)));
    this.brush.value = String(share * Number(this.brush.max));
  }

  /** Pixels that an arrow key moves the brush. */
  #stride(far) {
    const side = Math.max(this.canvas.width, this.canvas.height);
    return Math.max(1, Math.round(side / (far ? 8 : 32)));
  }

  #remember() {
    this.undoable.push(this.context.getImageData(0, 0, this.canvas.width, this.canvas.height));
    this.undoable.splice(0, this.undoable.length - MAX_UNDO);
  }

  /** Returns the mask's pixel under a pointer. */
  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * this.canvas.width,
      y: ((event.clientY - box.top) / box.height) * this.canvas.height,
    };
  }

  #begin(event) {
    if (event.button !== 0 || !event.isPrimary) return;
    this.pointer = event.pointerId;
    this.canvas.setPointerCapture(event.pointerId);
    this.#remember();
    this.last = this.#place(event);
    this.#stroke(this.last);
  }

  #move(event) {
    // A second finger does not paint.
    if (event.pointerId !== (this.pointer ?? event.pointerId)) return;
    this.#aim(this.#place(event));
    if (!this.last) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of events.length ? events : [event]) this.#stroke(this.#place(each));
  }

  #end() {
    if (this.last) this.change();
    Object.assign(this, { last: null, pointer: null });
  }

  #stroke(to) {
    const from = this.last ?? to;
    this.context.globalCompositeOperation = this.erase.checked ? "destination-out" : "source-over";
    Object.assign(this.context, { lineCap: "round", lineWidth: Number(this.brush.value), strokeStyle: this.paint });
    this.context.beginPath();
    this.context.moveTo(from.x, from.y);
    // Some browsers draw no cap for a line of length 0.
    this.context.lineTo(to.x + 0.01, to.y);
    this.context.stroke();
    if (this.last) this.last = to;
  }

  /** Shows the brush at a pixel of the mask. */
  #aim(place) {
    const { width, height } = this.canvas;
    this.cursor = { x: clamp(place.x, 0, width), y: clamp(place.y, 0, height) };
    const box = this.canvas.getBoundingClientRect();
    const scale = box.width / width;
    const diameter = Number(this.brush.value) * scale;
    this.ring.hidden = false;
    Object.assign(this.ring.style, {
      width: `${diameter}px`,
      height: `${diameter}px`,
      left: `${this.canvas.offsetLeft + this.cursor.x * scale - diameter / 2}px`,
      top: `${this.canvas.offsetTop + this.cursor.y * scale - diameter / 2}px`,
    });
  }

  #key(event) {
    const act = this.#action(event);
    if (!act) return;
    event.preventDefault();
    act();
  }

  #action(event) {
    if (event.key in MOVES) return () => this.#step(MOVES[event.key], this.#stride(event.shiftKey));
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z") return () => this.undo();
    if (event.ctrlKey || event.metaKey || event.altKey) return null;
    return {
      " ": () => this.#spot(),
      d: () => this.#toggleDown(),
      e: () => (this.erase.checked = !this.erase.checked),
      "[": () => this.#resize(-1),
      "]": () => this.#resize(1),
    }[event.key.toLowerCase()];
  }

  #step([x, y], pixels) {
    const from = this.cursor ?? this.#middle;
    this.#aim({ x: from.x + x * pixels, y: from.y + y * pixels });
    if (!this.down) return;
    this.last = from;
    this.#stroke(this.cursor);
    this.#end();
  }

  #spot() {
    this.#remember();
    this.#aim(this.cursor ?? this.#middle);
    this.#stroke(this.cursor);
    this.change();
  }

  #toggleDown() {
    this.down = !this.down;
    if (this.down) this.#spot();
  }

  #resize(by) {
    if (by > 0) this.brush.stepUp();
    else this.brush.stepDown();
    this.#aim(this.cursor ?? this.#middle);
  }
}

/** Visible on images of any colour. */
function stripes(context) {
  const tile = Object.assign(document.createElement("canvas"), { width: 4, height: 4 });
  const ink = tile.getContext("2d");
  ink.fillStyle = "#fff";
  ink.fillRect(0, 0, 4, 4);
  ink.fillStyle = "#d6006c";
  for (let i = 0; i < 4; i++) for (const j of [i, (i + 1) % 4, (i + 2) % 4]) ink.fillRect(i, 3 - j, 1, 1);
  return context.createPattern(tile, "repeat");
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}
