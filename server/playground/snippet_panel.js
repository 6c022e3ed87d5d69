// The form's request as a command line or as Python, with links to its files.

import { address, bearerKey } from "./api.js";
import { withFiles } from "./build_request.js";
import { curl, python } from "./snippets.js";

const LANGUAGES = { curl, python };

export class SnippetPanel {
  /** buildRequest: returns a request, or throws IncompleteRequest. */
  constructor({ details, snippet, files }, buildRequest) {
    Object.assign(this, { details, snippet, files, buildRequest, language: "curl" });
  }

  show() {
    try {
      const request = withFiles(this.buildRequest());
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
      // Browsers offer no clipboard over plain HTTP from another machine.
      getSelection().selectAllChildren(this.snippet);
      document.execCommand("copy");
    }
  }
}

function fileLink([name, url]) {
  return Object.assign(document.createElement("a"), { href: url, download: name, textContent: name });
}
