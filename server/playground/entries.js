// Entries of the history: of a finished request's images, and of an opened file.

/** Returns [entry, data URLs] for each image of a result; the frames of an interpolation are one entry. */
export function generatedEntries(request, { answer, urls, seconds, preview }) {
  const { parameters, timings, model } = answer;
  const common = { at: Date.now(), operation: request.operation, model, prompt: request.title, timings, seconds, preview };
  // Images know their own size, which may be larger than the request's; frames have the request's.
  const images = answer.images ?? [parameters];
  return images.map(({ seed, width, height }, i) => [
    { ...common, id: newId(), width, height, parameters: { ...parameters, seed, n: 1 } },
    images.length > 1 ? [urls[i]] : urls,
  ]);
}

/** original: [width, height] of the file if the image is a smaller copy. */
export function openedEntry({ width, height, original, name }) {
  return { id: newId(), at: Date.now(), operation: "opened", prompt: name, width, height, original };
}

function newId() {
  return crypto.getRandomValues(new Uint32Array(2)).join("-");
}
