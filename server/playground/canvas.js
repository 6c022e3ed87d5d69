// The canvas: the shown or running image, or an empty sheet, scaled to fit, with space around it for margins.

const NO_MARGINS = { left: 0, right: 0, up: 0, down: 0 };
const LARGEST_SCALE = 6;

export class Canvas {
  constructor(elements) {
    Object.assign(this, elements);
    this.size = { width: 1, height: 1 };
    this.sheetSize = null;
    this.view = this.empty;
    this.margins = NO_MARGINS;
    this.frames = [];
    this.scale = 1;
    new ResizeObserver(() => this.layout()).observe(this.area);
    this.frameNumber.addEventListener("input", () => this.#turn(Number(this.frameNumber.value)));
    this.play.addEventListener("click", () => this.#toggle());
  }

  /** Shows an image, or the frames of an interpolation. urls: data URLs, of this size. */
  show(urls, size, alt) {
    this.#pause();
    this.frames = urls;
    this.size = size;
    this.picture.alt = alt;
    this.#only(this.frame);
    this.player.hidden = urls.length < 2;
    this.frameNumber.max = String(urls.length - 1);
    this.#turn(0);
    this.layout();
  }

  /** Shows the empty state. */
  clear() {
    this.#pause();
    this.frames = [];
    this.#only(this.empty);
    this.player.hidden = true;
  }

  /** Shows several images side by side; returns a function (index, url) that fills one in. choose: called with the index of one. */
  tile(count, choose) {
    const items = Array.from({ length: count }, (_, i) => tile(i, choose));
    this.#arrange(items);
    this.player.hidden = true;
    this.frames = [];
    this.#only(this.tiles);
    return (index, url) => {
      items[index].querySelector("img").src = url;
    };
  }

  /** Shows a preview in place of the image. */
  preview(url, size) {
    this.#only(this.frame);
    Object.assign(this, { size, margins: NO_MARGINS });
    this.picture.src = url;
    this.layout();
  }

  /** Returns a function that shows again what is shown now. */
  snapshot() {
    const { view, frames, size, picture, tiles, frameNumber } = this;
    const { src, alt } = picture;
    const { value } = frameNumber;
    const items = [...tiles.children];
    return () => {
      Object.assign(this, { frames, size });
      Object.assign(picture, { src, alt });
      this.#arrange(items);
      frameNumber.value = value;
      this.player.hidden = frames.length < 2;
      this.#only(view);
    };
  }

  busy(is) {
    if (is) this.#pause();
    this.area.classList.toggle("busy", is);
    this.area.ariaBusy = String(is);
  }

  /** Shows an empty sheet of this size in place of the image, to draw regions on; null: what was there before. */
  sheet(size) {
    if (!size && !this.sheetSize) return;
    this.sheetSize = size;
    this.#refresh();
    this.layout();
  }

  /** Whether nothing has been shown yet. */
  get blank() {
    return this.view === this.empty;
  }

  /** Whether several images are shown side by side. */
  get tiled() {
    return this.view === this.tiles;
  }

  get current() {
    return this.frames[Number(this.frameNumber.value)] ?? null;
  }

  /** frozen: keeps the scale, so that a border stays under the pointer. */
  layout({ margins = this.margins, frozen = false } = {}) {
    this.margins = margins;
    const { left, right, up, down } = margins;
    const size = this.sheetSize ?? this.size;
    const total = { width: left + size.width + right, height: up + size.height + down };
    if (!frozen) this.scale = this.#fitting(total);
    place(this.frame, { width: total.width * this.scale, height: total.height * this.scale });
    const box = { left: left * this.scale, top: up * this.scale, width: size.width * this.scale, height: size.height * this.scale };
    place(this.picture, box);
    place(this.mask, box);
  }

  #fitting(total) {
    const room = this.hasMargins() ? 0.68 : 1;
    const { clientWidth, clientHeight } = this.area;
    const padding = 32;
    return Math.min(LARGEST_SCALE, (room * (clientWidth - padding)) / total.width, (room * (clientHeight - padding)) / total.height);
  }

  #arrange(tiles) {
    this.tiles.replaceChildren(...tiles);
    this.tiles.dataset.columns = String(Math.ceil(Math.sqrt(tiles.length)));
  }

  #only(shown) {
    Object.assign(this, { view: shown, sheetSize: null });
    this.#refresh();
  }

  #refresh() {
    const shown = this.sheetSize ? this.frame : this.view;
    for (const element of [this.frame, this.tiles, this.empty]) element.hidden = element !== shown;
    this.picture.hidden = Boolean(this.sheetSize);
  }

  #turn(index) {
    this.frameNumber.value = String(index);
    this.frameNumber.ariaValueText = `${index + 1} of ${this.frames.length}`;
    if (this.frames[index]) this.picture.src = this.frames[index];
  }

  #toggle() {
    if (this.timer) return this.#pause();
    this.play.ariaPressed = "true";
    this.timer = setInterval(() => this.#turn((Number(this.frameNumber.value) + 1) % this.frames.length), 120);
  }

  #pause() {
    clearInterval(this.timer);
    this.timer = 0;
    this.play.ariaPressed = "false";
  }
}

function tile(index, choose) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(Object.assign(document.createElement("img"), { alt: `Image ${index + 1}` }));
  button.addEventListener("click", () => choose(index));
  const item = document.createElement("li");
  item.append(button);
  return item;
}

function place(element, box) {
  for (const [property, pixels] of Object.entries(box)) element.style[property] = `${pixels}px`;
}
