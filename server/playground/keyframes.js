// What an interpolation comes by: a list of prompts and pictures.

const AT_LEAST = 2;
const AT_MOST = 8;

export class Keyframes {
  /** change: called when the list has changed. */
  constructor(list, change) {
    this.list = list;
    this.change = change;
    list.addEventListener("input", change);
  }

  get full() {
    return this.list.children.length >= AT_MOST;
  }

  /** As the server takes them; pictures are data URLs. */
  get values() {
    return [...this.list.children].map((item) => {
      const image = item.querySelector("img");
      return image ? { image: image.src } : { prompt: item.querySelector("input").value.trim() };
    });
  }

  get complete() {
    const values = this.values;
    return values.length >= AT_LEAST && values.every(({ image, prompt }) => image || prompt);
  }

  get title() {
    return this.values.map(({ prompt }) => prompt ?? "a picture").join(" and ");
  }

  addPrompt(text = "") {
    const input = Object.assign(document.createElement("input"), { value: text, maxLength: 4000, placeholder: "a prompt" });
    this.#add(input);
    return input;
  }

  addPicture(url, alt) {
    this.#add(Object.assign(document.createElement("img"), { src: url, alt }));
  }

  /** Replaces all of them by prompts. */
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
