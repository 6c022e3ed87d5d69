// The API reference: Swagger UI with the server's OpenAPI document. All addresses are relative to the page's, for servers behind a sub-path.

import { address, bearerKey, send } from "./api.js";

const reference = document.getElementById("reference");

try {
  const description = await (await send(reference.dataset.document)).json();
  fillForms(description);
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

/** Shows every form's example in its fields, and leaves the others blank: Swagger UI makes up values for fields without one. */
function fillForms({ paths, components }) {
  const operations = Object.values(paths).flatMap(Object.values);
  const forms = operations.map((operation) => operation.requestBody?.content["multipart/form-data"]);
  for (const { schema, example } of forms.filter(Boolean)) {
    const { properties } = components.schemas[schema.$ref.split("/").pop()];
    for (const [name, field] of Object.entries(properties)) fillField(field, example[name]);
  }
}

/** Shows a value as Swagger UI edits it: lists entry by entry, others as text. Only people choose files. */
function fillField(field, value) {
  const list = field.anyOf?.find(({ type }) => type === "array");
  if (list) {
    // One entry is a number as well.
    Object.assign(field, list);
    delete field.anyOf;
  }
  if (field.type === "array") field.example = value === undefined || field.items.format === "binary" ? [] : [value].flat();
  else field.example = typeof value === "object" ? JSON.stringify(value) : (value ?? "");
}

/** Adds the playground's API key to a request without one. */
function authorized(request) {
  if (bearerKey.get()) request.headers.Authorization ??= `Bearer ${bearerKey.get()}`;
  return request;
}
