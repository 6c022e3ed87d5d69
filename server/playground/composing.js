// The form, the easel and what is painted on it → the request that the server is sent.

export const FROM_PICTURE = ["inpaint", "outpaint", "variations", "edit"];
export const WORDS_OPTIONAL = ["outpaint", "variations", "interpolate"];

/** What a request still lacks; element: where it is to be had. */
export class Lacking extends Error {
  constructor(message, element) {
    super(message);
    this.element = element;
  }
}

/**
 * {operation, fields, pictures, size, count, title}: the endpoint, its fields, of these the ones that are pictures (data URLs by name, `image` and
 * `mask`, or none), the pixels and the number of what will come, and what it is called. Throws Lacking.
 */
export function compose({ settings, stage, mask, margins, keyframes, prompt }) {
  if (!settings.model) throw new Lacking("The server has not answered yet.", prompt);
  const operation = settings.operation;
  const words = prompt.value.trim();
  const fields = { ...settings.request(), ...(words && { prompt: words }) };
  const request = { operation, fields, pictures: {}, size: settings.size, count: fields.n ?? 1, title: words };
  if (!words && !WORDS_OPTIONAL.includes(operation)) throw new Lacking("A prompt is needed: what should be drawn?", prompt);
  if (operation === "interpolate") return between(request, keyframes, prompt);
  if (!FROM_PICTURE.includes(operation)) return request;
  if (!stage.current) throw new Lacking("A picture is needed first: draw, choose, drop, paste or open one.", prompt);
  request.pictures.image = stage.current;
  if (operation !== "variations") request.size = stage.size;
  if (operation === "inpaint") return masked(request, mask);
  if (operation === "outpaint") return extended(request, margins);
  return request;
}

function masked(request, mask) {
  if (mask.empty) throw new Lacking("Paint over the part of the picture that is to be drawn anew.", mask.canvas);
  request.pictures.mask = mask.png();
  return { ...request, fields: { ...request.fields, mask_mode: "luminance" } };
}

function extended(request, margins) {
  if (margins.empty) throw new Lacking("Drag at least one border of the picture outwards.", margins.handles[1]);
  return { ...request, fields: { ...request.fields, ...margins.values }, size: margins.size };
}

function between(request, keyframes, prompt) {
  if (!keyframes.complete) throw new Lacking("Two keyframes at least are needed, each a prompt or a picture.", keyframes.list.querySelector("input") ?? prompt);
  return { ...request, fields: { ...request.fields, keyframes: keyframes.values }, title: keyframes.title };
}

/** The request as JSON, streamed, with this many previews. */
export function body({ operation, fields, pictures }, previews) {
  // Frames arrive one by one, and there are many of them: WebP keeps them small.
  const streamed = operation === "interpolate" ? { response_format: "webp" } : { response_format: "png", partial_images: previews };
  return { ...fields, ...pictures, stream: true, ...streamed };
}

/** The request with files in place of pictures, as `snippets.js` takes it; `contents`: the files by name, data URLs. */
export function named({ operation, fields, pictures }) {
  const { n, ...one } = fields;
  const shown = n > 1 ? fields : one;
  if (operation !== "interpolate") {
    const files = Object.fromEntries(Object.keys(pictures).map((name) => [name, `${name}.png`]));
    return { operation, fields: shown, files, contents: Object.fromEntries(Object.entries(pictures).map(([name, url]) => [files[name], url])) };
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
