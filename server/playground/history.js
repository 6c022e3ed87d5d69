// What was drawn, newest first, in the browser's own storage: parameters always, pictures as far as there is room.

const INDEX = "paellera.history";
const PICTURES = "paellera.pictures.";
const LONGEST = 300;

/**
 * An entry is {id, at, operation, model, prompt, width, height, parameters, timings, seconds, preview}, the last two seconds from the button to
 * the picture and to its first preview; its pictures, data URLs, are kept under a name of their own, one of them or an interpolation's frames.
 * Where storage is forbidden, all of it lasts as long as the page.
 */
export class History {
  constructor(storage = available()) {
    this.storage = storage;
    this.memory = new Map();
  }

  get entries() {
    return this.#read(INDEX) ?? [];
  }

  /** Drops the oldest pictures until these fit, and the oldest entries beyond the longest history. */
  add(entry, pictures) {
    const entries = [entry, ...this.entries];
    for (const dropped of entries.splice(LONGEST)) this.#erase(PICTURES + dropped.id);
    this.#write(INDEX, entries, entries);
    this.#write(PICTURES + entry.id, pictures, entries);
  }

  remove(id) {
    const entries = this.entries.filter((entry) => entry.id !== id);
    this.#write(INDEX, entries, entries);
    this.#erase(PICTURES + id);
  }

  clear() {
    for (const { id } of this.entries) this.#erase(PICTURES + id);
    this.#erase(INDEX);
  }

  /** The data URLs, or null for what had to make room. */
  pictures(id) {
    return this.#read(PICTURES + id);
  }

  #read(name) {
    const text = this.memory.get(name) ?? this.storage?.getItem(name);
    return text ? JSON.parse(text) : null;
  }

  #erase(name) {
    this.memory.delete(name);
    this.storage?.removeItem(name);
  }

  #write(name, value, entries) {
    const text = JSON.stringify(value);
    const dispensable = entries.map(({ id }) => PICTURES + id).filter((other) => other !== name);
    while (!this.#stored(name, text)) {
      const oldest = dispensable.pop();
      // Larger than all there is: it lasts as long as the page.
      if (oldest === undefined) return this.memory.set(name, text);
      this.storage?.removeItem(oldest);
    }
    this.memory.delete(name);
  }

  #stored(name, text) {
    try {
      this.storage?.setItem(name, text);
      return this.storage !== null;
    } catch {
      return false;
    }
  }
}

function available() {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}
