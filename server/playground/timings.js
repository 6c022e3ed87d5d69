// Latency of an answer by stage: the server's stages, then network and browser.

const STAGES = {
  queue: "waiting",
  encode: "encoding the prompt",
  prior: "prior",
  denoise: "denoising",
  decode: "tokens to pixels",
  image: "pixels to PNG",
};

/** timings: the server's, seconds by stage. seconds: from the button to the image. */
export function render({ section, strip, list }, timings, seconds) {
  section.hidden = !timings;
  if (!timings) return;
  const stages = Object.entries(STAGES).map(([name, meaning]) => ({ name, meaning, seconds: timings[name] ?? 0 }));
  const rest = seconds - stages.reduce((sum, stage) => sum + stage.seconds, 0);
  if (rest > 0) stages.push({ name: "rest", meaning: "previews, network, browser", seconds: rest });
  strip.replaceChildren(...stages.map(bar));
  list.replaceChildren(...stages.map(entry));
}

function bar({ name, seconds }) {
  const element = document.createElement("span");
  element.className = `stage-${name}`;
  element.style.flexGrow = String(1000 * seconds);
  return element;
}

function entry({ name, meaning, seconds }) {
  const item = document.createElement("div");
  const term = Object.assign(document.createElement("dt"), { textContent: meaning, className: `stage-${name}` });
  const figure = Object.assign(document.createElement("dd"), { textContent: milliseconds(seconds) });
  item.append(term, figure);
  return item;
}

export function milliseconds(seconds) {
  const value = seconds * 1000;
  return `${value < 9.95 ? value.toFixed(1) : Math.round(value)} ms`;
}
