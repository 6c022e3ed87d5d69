// The request that the form stands for, as a command line or as Python, with the files that it names.

import { address, bearerKey } from "./api.js";
import { named } from "./composing.js";
import { curl, python } from "./snippets.js";

const LANGUAGES = { curl, python };

export class Terminal {
  /** compose: → a request, or throws what it lacks. */
  constructor({ details, snippet, files }, compose) {
    Object.assign(this, { details, snippet, files, compose, language: "curl" });
  }

  show() {
    try {
      const request = named(this.compose());
      this.snippet.textContent = LANGUAGES[this.language](request, address(request.operation), Boolean(bearerKey.get()));
      this.files.replaceChildren(...Object.entries(request.contents).map(fileLink));
    } catch (error) {
      this.snippet.textContent = error.message;
      this.files.replaceChildren();
    }
  }

  async copy(language) {
    this.language = language;
    this.show();
    this.details.open = true;
    try {
      await navigator.clipboard.writeText(this.snippet.textContent);
    } catch {
      // Over plain HTTP from another machine there is no clipboard to write to.
      getSelection().selectAllChildren(this.snippet);
      document.execCommand("copy");
    }
  }
}

function fileLink([name, url]) {
  return Object.assign(document.createElement("a"), { href: url, download: name, textContent: name });
}
