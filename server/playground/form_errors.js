// Error messages, in the server's words, and the field at fault marked.

export class FormErrors {
  constructor(box, form) {
    Object.assign(this, { box, form });
  }

  clear() {
    this.box.replaceChildren();
    for (const field of this.form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  }

  /** code: shown below the message. */
  show(message, code = "") {
    const text = Object.assign(document.createElement("p"), { textContent: message });
    const note = Object.assign(document.createElement("p"), { textContent: code, className: "code" });
    this.box.replaceChildren(text, ...(code ? [note] : []));
  }

  /** error: a ServerError. */
  showServerError({ message, status, code, param, retryAfter }) {
    this.show(message, [status, code, retryAfter && `retry in ${retryAfter} s`].filter(Boolean).join(" "));
    const [name] = String(param).split(".");
    const field = this.#field(name) ?? this.#field(`${name}_start`);
    if (!field) return;
    field.ariaInvalid = "true";
    field.closest("details")?.setAttribute("open", "");
    field.focus();
  }

  /** Returns the field that sends a parameter of the chosen operation. */
  #field(param) {
    return [...this.form.elements].find((field) => (field.dataset.param ?? field.name) === param && field.id && !field.closest("[hidden]"));
  }
}
