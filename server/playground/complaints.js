// What went wrong, in the server's own words, at the field that it blames.

export class Complaints {
  constructor(box, form) {
    Object.assign(this, { box, form });
  }

  clear() {
    this.box.replaceChildren();
    for (const field of this.form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  }

  /** code: for those who look it up. */
  say(sentence, code = "") {
    const message = Object.assign(document.createElement("p"), { textContent: sentence });
    const note = Object.assign(document.createElement("p"), { textContent: code, className: "code" });
    this.box.replaceChildren(message, ...(code ? [note] : []));
  }

  /** error: a ServerError. */
  refuse({ message, status, code, param, retryAfter }) {
    this.say(message, [status, code, retryAfter && `again in ${retryAfter} s`].filter(Boolean).join(" "));
    const field = this.form.elements[param] ?? this.form.elements[`${param}_start`];
    if (!field?.id) return;
    field.ariaInvalid = "true";
    field.closest("details")?.setAttribute("open", "");
    field.focus();
  }
}
