// Error messages, in the server's words, and the field at fault marked.

export class FormErrors {
  constructor(box, form) {
    Object.assign(this, { box, form });
    form.addEventListener("input", ({ target }) => target.removeAttribute("aria-invalid"));
  }

  clear() {
    this.box.replaceChildren();
    for (const field of this.form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  }

  /** code: shown below the message. element: the one at fault, which gets the focus. */
  show(message, { code = "", element = null } = {}) {
    const text = Object.assign(document.createElement("p"), { textContent: message });
    const note = Object.assign(document.createElement("p"), { textContent: code, className: "code" });
    this.box.replaceChildren(text, ...(code ? [note] : []));
    if (element) this.#blame(element);
    this.box.scrollIntoView({ block: "nearest" });
  }

  /** error: a ServerError. */
  showServerError({ message, status, code, param, retryAfter }) {
    const [name] = String(param).split(".");
    const element = this.#field(name) ?? this.#field(`${name}_start`);
    this.show(message, { code: [status, code, retryAfter && `retry in ${retryAfter} s`].filter(Boolean).join(" "), element });
  }

  #blame(element) {
    const isField = this.form.contains(element);
    if (isField) element.ariaInvalid = "true";
    element.closest("details")?.setAttribute("open", "");
    // The message stays beside the form's fields, and not beside the canvas.
    element.focus({ preventScroll: !isField });
  }

  /** Returns the field that sends a parameter of the chosen operation. */
  #field(param) {
    return [...this.form.elements].find((field) => (field.dataset.param ?? field.name) === param && field.id && !field.closest("[hidden]"));
  }
}
