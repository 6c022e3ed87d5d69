// Regions: boxes of the result with a prompt each, drawn on the canvas or written as numbers.

const MAX_REGIONS = 8;
const EDGES = ["left", "top", "right", "bottom"];
const FIRST = [25, 25, 75, 75];
// Percent of a side; a smaller new box is a click.
const SMALLEST = 3;
// A pointer within so many pixels of an edge moves the edge, elsewhere the whole box.
const GRIP = 12;

export class Regions {
  /**
   * list: of the prompts and numbers. layer: covers the result on the canvas. toggle: the checkbox that shows the boxes. button: adds one.
   * change: called when the boxes or their visibility have changed.
   */
  constructor({ list, layer, toggle, button }, change) {
    Object.assign(this, { list, layer, toggle, button, change, regions: [], drag: null });
    toggle.addEventListener("change", change);
    button.addEventListener("click", () => this.add()?.prompt.focus());
    layer.addEventListener("pointerdown", (event) => this.#begin(event));
    const dragging = ({ pointerId }) => this.drag?.pointerId === pointerId;
    layer.addEventListener("pointermove", (event) => dragging(event) && this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) layer.addEventListener(name, (event) => dragging(event) && this.#end());
  }

  get shown() {
    return this.toggle.checked;
  }

  /** The request's regions. */
  get values() {
    return this.regions.map(({ prompt, box }) => ({ prompt: prompt.value.trim(), box: box.map((percent) => percent / 100) }));
  }

  /** The first missing or wrong part, {message, element}, or null. */
  get fault() {
    for (const [i, { prompt, edges }] of this.regions.entries()) {
      if (!prompt.value.trim()) return { message: `Region ${i + 1} needs a prompt.`, element: prompt };
      const wrong = edges.find(({ validity }) => !validity.valid);
      if (wrong) return { message: `Region ${i + 1}: the edges are from 0 to 100 percent, left before right and top above bottom.`, element: wrong };
    }
    return null;
  }

  /** Adds a region and shows the boxes; returns it, or null beyond the maximum. box: [left, top, right, bottom] in percent. */
  add(box = FIRST, text = "") {
    if (this.regions.length >= MAX_REGIONS) return null;
    const region = parts(text);
    region.item.addEventListener("input", () => this.#read(region));
    region.remove.addEventListener("click", () => this.#remove(region));
    this.regions.push(region);
    this.list.append(region.item);
    this.layer.append(region.mark);
    this.toggle.checked = true;
    place(region, box);
    this.#number();
    return region;
  }

  /** Replaces all regions by those of a request; those with masks are left out. */
  fill(entries) {
    for (const region of [...this.regions]) this.#drop(region);
    for (const { prompt, box } of entries) if (box) this.add(box.map((share) => Math.round(1000 * share) / 10), prompt);
    this.#number();
  }

  #drop(region) {
    this.regions.splice(this.regions.indexOf(region), 1);
    region.item.remove();
    region.mark.remove();
  }

  #remove(region) {
    const next = this.regions[this.regions.indexOf(region) + 1] ?? this.regions[this.regions.indexOf(region) - 1];
    this.#drop(region);
    this.#number();
    (next?.remove ?? this.button).focus();
  }

  #number() {
    this.regions.forEach(({ prompt, remove, edges, mark }, i) => {
      prompt.ariaLabel = `Region ${i + 1}, a prompt`;
      remove.ariaLabel = `Remove region ${i + 1}`;
      edges.forEach((edge, side) => (edge.ariaLabel = `Region ${i + 1}, ${EDGES[side]} edge in percent`));
      mark.dataset.label = `${i + 1} ${prompt.value}`;
    });
    this.button.disabled = this.regions.length >= MAX_REGIONS;
    this.change();
  }

  /** Takes over what is written in the list. */
  #read(region) {
    const [left, top, right, bottom] = region.edges.map(({ value }) => Number(value));
    const ordered = left < right && top < bottom;
    for (const edge of region.edges) edge.setCustomValidity(ordered ? "" : "left before right and top above bottom");
    if (region.edges.every(({ validity }) => validity.valid)) draw(region, [left, top, right, bottom]);
    region.mark.dataset.label = `${this.regions.indexOf(region) + 1} ${region.prompt.value}`;
  }

  #begin(event) {
    if (event.button !== 0 || !event.isPrimary) return;
    const at = this.#at(event);
    const held = this.regions.find(({ mark }) => mark === event.target);
    const region = held ?? this.add([at[0], at[1], at[0], at[1]]);
    if (!region) return;
    this.layer.setPointerCapture(event.pointerId);
    this.drag = { pointerId: event.pointerId, region, at, box: region.box, isNew: !held, moved: held ? edgesAt(event, held.mark) : [0, 0, 1, 1] };
    event.preventDefault();
  }

  #move(event) {
    const { region, at, box, moved } = this.drag;
    const by = this.#at(event).map((percent, axis) => percent - at[axis]);
    if (moved.every(Boolean)) {
      const inside = by.map((percent, axis) => clamp(percent, -box[axis], 100 - box[axis + 2]));
      return place(region, box.map((edge, side) => edge + inside[side % 2]));
    }
    place(region, upright(box.map((edge, side) => clamp(edge + moved[side] * by[side % 2], 0, 100))));
  }

  #end() {
    const { region, isNew } = this.drag;
    this.drag = null;
    const [left, top, right, bottom] = region.box;
    if (isNew && (right - left < SMALLEST || bottom - top < SMALLEST)) this.#drop(region);
    else if (isNew) region.prompt.focus();
    this.#number();
  }

  /** Returns [x, y] under a pointer, whole percents of the result. */
  #at({ clientX, clientY }) {
    const { left, top, width, height } = this.layer.getBoundingClientRect();
    return [(clientX - left) / width, (clientY - top) / height].map((share) => clamp(Math.round(100 * share), 0, 100));
  }
}

/** Returns a region's elements: its entry of the list with prompt, numbers and button, and its mark on the canvas. */
function parts(text) {
  const element = (name, properties = {}) => Object.assign(document.createElement(name), properties);
  const prompt = element("input", { value: text, maxLength: 32000, placeholder: "a prompt", dir: "auto" });
  const remove = element("button", { type: "button", textContent: "Remove" });
  const edges = EDGES.map(() => element("input", { type: "number", min: "0", max: "100", step: "any", required: true }));
  const item = element("li");
  const numbers = element("div", { className: "edges" });
  EDGES.forEach((name, side) => {
    const label = element("label", { textContent: name });
    label.append(edges[side]);
    numbers.append(label);
  });
  item.append(prompt, remove, numbers);
  return { item, prompt, remove, edges, mark: element("div"), box: FIRST };
}

/** Writes a box, on the canvas and in the list. */
function place(region, box) {
  draw(region, box);
  region.edges.forEach((edge, side) => {
    edge.value = String(box[side]);
    edge.setCustomValidity("");
  });
}

function draw(region, [left, top, right, bottom]) {
  region.box = [left, top, right, bottom];
  Object.assign(region.mark.style, { left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%` });
}

/** Returns which edges a pointer moves, 1 or 0 for each: those close to it, or all. */
function edgesAt({ clientX, clientY }, mark) {
  const { left, top, right, bottom } = mark.getBoundingClientRect();
  const close = [clientX - left, clientY - top, clientX - right, clientY - bottom].map((pixels) => Number(Math.abs(pixels) < GRIP));
  return close.some(Boolean) ? close : [1, 1, 1, 1];
}

/** Returns the box with its edges in order, at least one percent apart. */
function upright([left, top, right, bottom]) {
  const [x, y] = [Math.min(left, right, 99), Math.min(top, bottom, 99)];
  return [x, y, Math.max(left, right, x + 1), Math.max(top, bottom, y + 1)];
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}
