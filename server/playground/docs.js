// The API reference: Swagger UI with the server's OpenAPI document. All addresses are relative to the page's, for servers behind a sub-path.

import { address, bearerKey, send } from "./api.js";

const reference = document.getElementById("reference");

try {
  const description = await (await send(reference.dataset.document)).json();
  const url = address(".").href.replace(/\/$/, "");
  globalThis.SwaggerUIBundle({
    domNode: reference,
    spec: { ...description, servers: [{ url }] },
    requestInterceptor: authorized,
    validatorUrl: null,
  });
} catch (error) {
  reference.textContent = `The API reference cannot be shown: ${error.message}`;
}

/** Adds the playground's API key to a request without one. */
function authorized(request) {
  if (bearerKey.get()) request.headers.Authorization ??= `Bearer ${bearerKey.get()}`;
  return request;
}
