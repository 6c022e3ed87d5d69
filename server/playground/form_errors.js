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
    const field = this.form.elements[param] ?? this.form.elements[`${param}_start`];
    if (!field?.id) return;
    field.ariaInvalid = "true";
    field.closest("details")?.setAttribute("open", "");
    field.focus();
  }
}
