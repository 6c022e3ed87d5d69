// One request, from the button to the picture: what the server streams, as it arrives on the easel.

import { stream } from "./api.js";
import { body } from "./composing.js";

/**
 * {answer, urls, seconds, preview}: the event `completed`, the pictures as data URLs, and how long all of it and the first preview took from
 * `began`, seconds; preview is undefined if there was none. report: called with (sentence, share done). Throws ServerError, and AbortError once
 * the signal says so.
 */
export async function draw(request, { stage, previews, report, signal, choose, began }) {
  const urls = [];
  const fill = request.count > 1 ? stage.tile(request.count, choose) : (_, url, size) => stage.preview(url, size);
  const frames = request.fields.frames ?? 0;
  let preview;
  let answer;
  const put = (data) => {
    preview ??= since(began);
    fill(data.index, dataUrl(data), data);
  };
  const handlers = {
    queued: ({ position = 0 }) => report(position ? `Waiting, ${position} before it.` : "Drawing…", 0),
    started: () => report("Drawing…", 0),
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
  for await (const { name, data } of stream(request.operation, body(request, previews), signal)) handlers[name]?.(data);
  if (!answer) throw new Error("The answer ended before the picture was done.");
  return { answer, urls: answer.images?.map(dataUrl) ?? urls, seconds: since(began), preview };
}

function dataUrl({ format, b64_json }) {
  return `data:image/${format};base64,${b64_json}`;
}

function since(began) {
  return (performance.now() - began) / 1000;
}
