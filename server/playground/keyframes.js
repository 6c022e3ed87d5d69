// The keyframes of an interpolation: a list of prompts and images.

const MIN_KEYFRAMES = 2;
const MAX_KEYFRAMES = 8;

export class Keyframes {
  /** change: called when the list has changed. */
  constructor(list, change) {
    this.list = list;
    this.change = change;
    list.addEventListener("input", change);
  }

  get full() {
    return this.list.children.length >= MAX_KEYFRAMES;
  }

  /** The request's keyframes; images are data URLs. */
  get values() {
    return [...this.list.children].map((item) => {
      const image = item.querySelector("img");
      return image ? { image: image.src } : { prompt: item.querySelector("input").value.trim() };
    });
  }

  get complete() {
    const values = this.values;
    return values.length >= MIN_KEYFRAMES && values.every(({ image, prompt }) => image || prompt);
  }

  get title() {
    return this.values.map(({ prompt }) => prompt ?? "an image").join(" and ");
  }

  addPrompt(text = "") {
    const input = Object.assign(document.createElement("input"), { value: text, maxLength: 32000, placeholder: "a prompt", dir: "auto" });
    this.#add(input);
    return input;
  }

  addImage(url, alt) {
    this.#add(Object.assign(document.createElement("img"), { src: url, alt }));
  }

  /** Replaces all keyframes by prompts. */
  fill(prompts) {
    this.list.replaceChildren();
    for (const prompt of prompts) this.addPrompt(prompt);
  }

  #add(content) {
    if (this.full) return;
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "Remove" });
    const item = document.createElement("li");
    item.append(content, remove);
    remove.addEventListener("click", () => {
      const next = item.nextElementSibling ?? item.previousElementSibling;
      item.remove();
      next?.querySelector("button").focus();
      this.#number();
    });
    this.list.append(item);
    this.#number();
  }

  #number() {
    [...this.list.children].forEach((item, i) => {
      item.querySelector("button").ariaLabel = `Remove keyframe ${i + 1}`;
      const input = item.querySelector("input");
      if (input) input.ariaLabel = `Keyframe ${i + 1}, a prompt`;
    });
    this.change();
  }
}
