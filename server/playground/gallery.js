// The history as thumbnails: one tab stop, arrow keys within, Delete removes.

const MOVES = { ArrowRight: 1, ArrowLeft: -1 };

export class Gallery {
  /** select: called with an entry. remove: called with an entry's id. */
  constructor(list, { select, remove }) {
    this.list = list;
    this.select = select;
    this.remove = remove;
    list.addEventListener("keydown", (event) => this.#key(event));
  }

  /** images: returns an entry's data URLs or null. */
  render(entries, images) {
    const index = this.buttons.indexOf(document.activeElement);
    const id = this.buttons[index]?.dataset.id;
    this.list.replaceChildren(...entries.map((entry) => this.#item(entry, images(entry)?.[0])));
    this.#tabStop();
    this.mark(this.marked);
    if (index < 0) return;
    const same = this.buttons.findIndex((button) => button.dataset.id === id);
    this.#focus(same < 0 ? Math.min(index, this.buttons.length - 1) : same);
  }

  prepend(entry, image) {
    this.list.prepend(this.#item(entry, image));
    this.#tabStop();
  }

  /** Marks the shown entry. */
  mark(id) {
    this.marked = id;
    for (const button of this.buttons) button.setAttribute("aria-current", String(button.dataset.id === id));
  }

  /** Removes an entry and moves the focus to its neighbour. */
  drop(id) {
    const index = this.buttons.findIndex((button) => button.dataset.id === id);
    const focused = this.list.contains(document.activeElement);
    this.buttons[index]?.parentElement.remove();
    this.#tabStop();
    if (focused) this.#focus(Math.min(index, this.buttons.length - 1));
  }

  get buttons() {
    return [...this.list.querySelectorAll("button")];
  }

  #item(entry, image) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.id = entry.id;
    button.tabIndex = -1;
    button.title = entry.prompt;
    button.append(image ? thumbnail(entry, image) : placeholder(entry));
    button.addEventListener("click", () => this.select(entry));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }

  #tabStop() {
    const buttons = this.buttons;
    if (!buttons.some((button) => button.tabIndex === 0) && buttons.length) buttons[0].tabIndex = 0;
  }

  #focus(index) {
    const buttons = this.buttons;
    if (!buttons[index]) return;
    for (const button of buttons) button.tabIndex = -1;
    buttons[index].tabIndex = 0;
    buttons[index].focus();
  }

  #key(event) {
    const buttons = this.buttons;
    const index = buttons.indexOf(document.activeElement);
    if (index < 0) return;
    const rows = { ArrowDown: 1, ArrowUp: -1 }[event.key] * this.#columns(buttons);
    const target = { Home: 0, End: buttons.length - 1 }[event.key] ?? index + (MOVES[event.key] ?? rows);
    if (event.key === "Delete") this.remove(buttons[index].dataset.id);
    else if (buttons[target]) this.#focus(target);
    else return;
    event.preventDefault();
  }

  #columns(buttons) {
    return buttons.filter((button) => button.offsetTop === buttons[0].offsetTop).length;
  }
}

function thumbnail(entry, url) {
  const image = document.createElement("img");
  image.src = url;
  image.alt = describe(entry);
  return image;
}

function placeholder(entry) {
  const text = document.createElement("span");
  Object.assign(text, { className: "evicted", dir: "auto" });
  text.textContent = describe(entry);
  return text;
}

const DONE = { inpaint: "Inpainted", outpaint: "Outpainted", variations: "Varied", edit: "Edited", upscale: "Upscaled", interpolate: "Between" };

/** Describes an image. */
export function describe({ operation, prompt }) {
  const done = DONE[operation];
  if (!done) return prompt;
  if (!prompt) return done;
  return operation === "interpolate" ? `${done} ${prompt}` : `${done}: ${prompt}`;
}
