// Sends one request and shows its events on the canvas as they arrive.

import { stream } from "./api.js";
import { requestBody } from "./build_request.js";

/**
 * Returns {answer, urls, seconds, preview}: the event `completed`, the images as data URLs, and the seconds from `began` to the end and to
 * the first preview, undefined without previews. report: called with (message, fraction done). Throws ServerError, and AbortError when
 * the signal aborts.
 */
export async function runRequest(request, { canvas, previews, report, signal, choose, began }) {
  const urls = [];
  const fill = request.count > 1 ? canvas.tile(request.count, choose) : (_, url, size) => canvas.preview(url, size);
  const frames = request.fields.frames ?? 0;
  let preview;
  let answer;
  const put = (data) => {
    preview ??= since(began);
    fill(data.index, dataUrl(data), data);
  };
  const handlers = {
    queued: ({ position = 0 }) => report(position ? `Queued, ${position} ahead.` : "Generating…", 0),
    started: () => report("Generating…", 0),
    preview: (data) => {
      put(data);
      report(null, data.step / data.of);
    },
    image: (data) => {
      put(data);
      urls[data.index] = dataUrl(data);
      report(null, urls.filter(Boolean).length / frames);
    },
    completed: (data) => (answer = data),
  };
  for await (const { name, data } of stream(request.operation, requestBody(request, previews), signal)) handlers[name]?.(data);
  if (!answer) throw new Error("The answer ended before the image was complete.");
  const finished = answer.images?.map(dataUrl) ?? urls;
  if (request.count > 1) finished.forEach((url, i) => fill(i, url));
  return { answer, urls: finished, seconds: since(began), preview };
}

export function dataUrl({ format, b64_json }) {
  return `data:image/${format};base64,${b64_json}`;
}

function since(began) {
  return (performance.now() - began) / 1000;
}
