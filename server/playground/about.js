// What a picture is: its caption, its parameters, and where its milliseconds went.

import { describe } from "./gallery.js";
import { render } from "./timings.js";

/** entry: of the history. repeatable: whether the request that made it can be repeated. */
export function about({ box, caption, facts, again, reuse, timings }, entry, repeatable) {
  box.hidden = false;
  caption.textContent = describe(entry);
  facts.replaceChildren(...listed(entry).map(fact));
  reuse.hidden = !entry.parameters;
  again.hidden = !repeatable;
  render(timings, entry.timings, entry.seconds);
}

function listed({ parameters, width, height, model }) {
  const size = ["Size", `${width} × ${height}`];
  if (!parameters) return [size];
  return [
    size,
    ["Seed", parameters.seed],
    ["Steps", parameters.num_inference_steps],
    ["Guidance", [...new Set(parameters.guidance_scale)].join(" → ")],
    ["Sampler", parameters.sampler],
    ["Weights", model],
  ];
}

function fact([name, value]) {
  const item = document.createElement("div");
  const term = Object.assign(document.createElement("dt"), { textContent: name });
  item.append(term, Object.assign(document.createElement("dd"), { textContent: String(value) }));
  return item;
}
