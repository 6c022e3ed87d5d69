// Generated images, newest first, in the browser's storage: all parameters, and images while there is room.

const INDEX = "paellera.history";
const IMAGES = "paellera.pictures.";
const MAX_ENTRIES = 300;

const TYPES = { operation: "string", model: "string", prompt: "string", width: "number", height: "number", parameters: "object", timings: "object" };

/**
 * An entry is {id, at, operation, model, prompt, width, height, original, parameters, timings, seconds, preview}. original: [width, height]
 * of an opened file whose image is a smaller copy. The last two are seconds from the button to the image and to its first preview. Its
 * images, data URLs, are stored separately: one, or an interpolation's frames. Without storage, the history lasts as long as the page. A
 * history that cannot be read is deleted, which `damaged` tells.
 */
export class History {
  constructor(storage = available()) {
    this.storage = storage;
    this.memory = new Map();
    this.damaged = false;
  }

  /** Whether the history outlasts the page. */
  get lasting() {
    return this.storage !== null;
  }

  get entries() {
    const entries = this.#read(INDEX) ?? [];
    if (Array.isArray(entries) && entries.every(isEntry)) return entries;
    this.damaged = true;
    this.#eraseAll();
    return [];
  }

  /** Whether the history consists of this storage key; null: all keys. */
  static owns(name) {
    return name === null || name === INDEX || name.startsWith(IMAGES);
  }

  /** Drops the oldest images until these fit, and the oldest entries beyond the maximum. */
  add(entry, images) {
    const entries = [entry, ...this.entries];
    for (const dropped of entries.splice(MAX_ENTRIES)) this.#erase(IMAGES + dropped.id);
    this.#write(INDEX, entries, entries);
    this.#write(IMAGES + entry.id, images, entries);
  }

  remove(id) {
    const entries = this.entries.filter((entry) => entry.id !== id);
    this.#write(INDEX, entries, entries);
    this.#erase(IMAGES + id);
  }

  clear() {
    for (const { id } of this.entries) this.#erase(IMAGES + id);
    this.#erase(INDEX);
  }

  /** Returns the data URLs, or null if they were dropped. */
  images(id) {
    const images = this.#read(IMAGES + id);
    return Array.isArray(images) && images.length && images.every((url) => typeof url === "string") ? images : null;
  }

  #read(name) {
    const text = this.memory.get(name) ?? this.storage?.getItem(name);
    try {
      return text ? JSON.parse(text) : null;
    } catch {
      return text;
    }
  }

  #eraseAll() {
    const stored = this.storage ? Object.keys(this.storage) : [];
    for (const name of [...this.memory.keys(), ...stored]) if (History.owns(name)) this.#erase(name);
  }

  #erase(name) {
    this.memory.delete(name);
    this.storage?.removeItem(name);
  }

  #write(name, value, entries) {
    const text = JSON.stringify(value);
    const dispensable = entries.map(({ id }) => IMAGES + id).filter((other) => other !== name);
    while (!this.#stored(name, text)) {
      const oldest = dispensable.pop();
      // Larger than the storage: it lasts as long as the page.
      if (oldest === undefined) return this.memory.set(name, text);
      this.storage?.removeItem(oldest);
    }
    this.memory.delete(name);
  }

  #stored(name, text) {
    try {
      this.storage?.setItem(name, text);
      return this.lasting;
    } catch {
      return false;
    }
  }
}

function isEntry(entry) {
  if (Object(entry) !== entry || typeof entry.id !== "string") return false;
  return Object.entries(TYPES).every(([name, type]) => entry[name] === undefined || (entry[name] !== null && typeof entry[name] === type));
}

function available() {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}
