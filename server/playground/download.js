// Saves images as files: a link to the shown one, and what is made on demand.

export class Download {
  constructor(link) {
    Object.assign(this, { link, source: "" });
  }

  /** Points the link at an image, a data URL; without one, there is no link. name: the end of the file's name. */
  offer(source, name) {
    this.link.hidden = !source;
    if (!source) return;
    if (source !== this.source) this.#point(source);
    this.link.download = `paellera-${name}.${/^data:image\/(\w+)/.exec(source)[1]}`;
  }

  #point(source) {
    URL.revokeObjectURL(this.link.href);
    this.link.href = URL.createObjectURL(fileOf(source));
    this.source = source;
  }
}

/** Saves a file, a Blob, under this name. */
export function save(file, name) {
  const href = URL.createObjectURL(file);
  Object.assign(document.createElement("a"), { href, download: name }).click();
  // Browsers have begun to read it by then.
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}

function fileOf(url) {
  const [, type, content] = /^data:([^;,]+);base64,(.*)$/.exec(url);
  return new Blob([Uint8Array.from(atob(content), (character) => character.charCodeAt(0))], { type });
}
