// Details of an image: caption, parameters, and latency by stage.

import { NEEDS_IMAGE } from "./build_request.js";
import { describe } from "./gallery.js";
import { render } from "./timings.js";

/** entry: of the history. repeatable: whether its request can be sent again. */
export function showDetails({ box, caption, facts, again, animate, reuse, timings }, entry, repeatable) {
  box.hidden = false;
  caption.textContent = describe(entry);
  facts.replaceChildren(...rows(entry).map(row));
  for (const text of [caption, ...facts.querySelectorAll("dd")]) makeScrollable(text);
  reuse.hidden = !entry.parameters;
  again.hidden = !repeatable;
  animate.hidden = !repeatable || entry.operation !== "interpolate";
  render(timings, entry.timings, entry.seconds);
}

/** Says that the encoders cut a prompt, in a sentence after another one; empty if they did not. */
export function cutNote({ truncated }) {
  return truncated?.length ? " A prompt was too long: its end was cut." : "";
}

/** Says how to get an image again that the history has lost. */
export function remedy({ operation, parameters }) {
  if (!parameters) return "Open its file again.";
  if (NEEDS_IMAGE.includes(operation) || parameters.keyframes?.some(({ prompt }) => prompt === undefined)) {
    return "It was made from another image: open that image again. “Use its settings” restores the other settings.";
  }
  return "“Use its settings” and generate it again: with the same weights, its seed gives the same image.";
}

function rows({ parameters, width, height, original, model }) {
  const size = ["Size", `${width} × ${height}`];
  if (!parameters) return original ? [size, ["Size of the file", original.join(" × ")]] : [size];
  const scale = parameters.hires?.scale ?? parameters.scale;
  return [
    size,
    ...(scale ? [["Enlarged", `${scale} times`]] : []),
    ["Seed", parameters.seed],
    ...((parameters.preset ?? "quality") === "quality" ? [] : [["Preset", parameters.preset]]),
    ["Steps", parameters.num_inference_steps],
    ["Guidance", [...new Set(parameters.guidance_scale)].join(" → ")],
    ["Sampler", parameters.sampler],
    ["Weights", model],
    ...(parameters.prompt_read ? [["Read as", parameters.prompt_read, "Words that the weights do not know are left out."]] : []),
    ...(parameters.truncated?.length ? [["Prompt", `end cut (${parameters.truncated.join(", ")})`]] : []),
  ];
}

function row([name, value, note]) {
  const item = document.createElement("div");
  item.append(element("dt", name), element("dd", value), ...(note ? [element("dd", note, "hint")] : []));
  return item;
}

function element(tag, text, className = "") {
  return Object.assign(document.createElement(tag), { textContent: String(text), className });
}

/** Lets the keyboard scroll a text that is longer than its box. */
function makeScrollable(text) {
  if (text.scrollHeight > text.clientHeight) text.tabIndex = 0;
  else text.removeAttribute("tabindex");
}
