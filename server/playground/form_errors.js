// Error messages, in the server's words, and the field at fault marked.

export class FormErrors {
  constructor(box, form) {
    Object.assign(this, { box, form, outage: false });
    form.addEventListener("input", ({ target }) => target.removeAttribute("aria-invalid"));
    form.addEventListener("beforeinput", (event) => this.#tellCut(event));
  }

  clear() {
    this.box.replaceChildren();
    for (const field of this.form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  }

  /** Clears a message that the server could not be asked, now that it can. */
  clearOutage() {
    if (this.outage) this.clear();
  }

  /** code: shown below the message. element: the one at fault, which gets the focus. outage: whether the server could not be asked. */
  show(message, { code = "", element = null, outage = false } = {}) {
    this.outage = outage;
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
    // Errors without a code are those of proxies.
    const outage = status === 401 || (status >= 500 && !code);
    this.show(message, { code: [status, code, retryAfter && `retry in ${retryAfter} s`].filter(Boolean).join(" "), element, outage });
  }

  /** Says that a text is too long for its field: browsers cut what is pasted without a word. */
  #tellCut({ target, data }) {
    const { maxLength, value, selectionStart, selectionEnd } = target;
    const inserted = data?.replaceAll("\r\n", "\n").length ?? 0;
    if (maxLength < 0 || value.length - (selectionEnd - selectionStart) + inserted <= maxLength) return;
    this.show(`Only ${maxLength} characters fit into this field: the end of the text was cut.`);
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
