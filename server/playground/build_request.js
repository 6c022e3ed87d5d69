// Form, canvas, mask, margins and regions to the request for the server.

export const NEEDS_IMAGE = ["inpaint", "outpaint", "variations", "edit", "upscale"];
export const PROMPT_OPTIONAL = ["outpaint", "variations", "interpolate", "upscale"];
export const HAS_REGIONS = ["generate", "inpaint", "outpaint"];

/** A request without a required part. element: the field at fault, or null. */
export class IncompleteRequest extends Error {
  constructor(message, element = null) {
    super(message);
    this.element = element;
  }
}

/**
 * Returns {operation, fields, images, count, title}: the endpoint, its fields, its image fields (data URLs by name, `image` and `mask`, or
 * none), the number of expected images, and the title in the history. Throws IncompleteRequest.
 */
export function buildRequest({ settings, canvas, mask, margins, regions, keyframes, prompt }) {
  if (!settings.model) throw new IncompleteRequest("The server has not answered yet.");
  const operation = settings.operation;
  const text = prompt.value.trim();
  const fields = { ...settings.request(), ...(text && { prompt: text }) };
  const request = { operation, fields, images: {}, count: fields.n ?? 1, title: text };
  if (!text && !PROMPT_OPTIONAL.includes(operation)) throw new IncompleteRequest("A prompt is required.", prompt);
  if (operation === "interpolate") return interpolation(request, keyframes, prompt);
  if (HAS_REGIONS.includes(operation) && settings.supports("regions")) divide(request, regions);
  if (!NEEDS_IMAGE.includes(operation)) return request;
  if (canvas.tiled) throw new IncompleteRequest("Choose one of the images first.");
  if (!canvas.current) throw new IncompleteRequest("An image is required: generate, select, drop, paste or open one.");
  request.images.image = canvas.current;
  if (operation === "inpaint") return masked(request, mask);
  if (operation === "outpaint") return extended(request, margins);
  return request;
}

function divide({ fields }, regions) {
  if (regions.fault) throw new IncompleteRequest(regions.fault.message, regions.fault.element);
  if (regions.values.length) fields.regions = regions.values;
}

function masked(request, mask) {
  if (mask.empty) throw new IncompleteRequest("Paint over the part of the image to repaint.", mask.canvas);
  request.images.mask = mask.png();
  return { ...request, fields: { ...request.fields, mask_mode: "luminance" } };
}

function extended(request, margins) {
  if (margins.empty) throw new IncompleteRequest("Drag at least one border of the image outwards.", margins.handles[1]);
  return { ...request, fields: { ...request.fields, ...margins.values } };
}

function interpolation(request, keyframes, prompt) {
  if (!keyframes.complete) throw new IncompleteRequest("At least two keyframes are required, each a prompt or an image.", keyframes.list.querySelector("input") ?? prompt);
  return { ...request, fields: { ...request.fields, keyframes: keyframes.values }, title: keyframes.title };
}

/** Returns the request's JSON body, streamed, with this many previews. */
export function requestBody({ operation, fields, images }, previews) {
  // Frames arrive one by one and are many: WebP keeps them small.
  const streamed = operation === "interpolate" ? { response_format: "webp" } : { response_format: "png", partial_images: previews };
  return { ...fields, ...images, stream: true, ...streamed };
}

/** Returns the request with files in place of images, for `snippets.js`; `contents`: data URLs by file name. */
export function withFiles({ operation, fields, images }) {
  const { n, ...one } = fields;
  const shown = n > 1 ? fields : one;
  if (operation !== "interpolate") {
    const files = Object.fromEntries(Object.keys(images).map((name) => [name, `${name}.png`]));
    return { operation, fields: shown, files, contents: Object.fromEntries(Object.entries(images).map(([name, url]) => [files[name], url])) };
  }
  const files = {};
  const contents = {};
  const entries = fields.keyframes.map(({ image, prompt }, i) => {
    if (!image) return { prompt };
    const extension = /^data:image\/(\w+)/.exec(image)[1];
    files[`keyframes.${i}.image`] = `keyframe-${i + 1}.${extension}`;
    contents[`keyframe-${i + 1}.${extension}`] = image;
    return {};
  });
  return { operation, fields: { ...shown, keyframes: entries, response_format: "gif" }, files, contents };
}
