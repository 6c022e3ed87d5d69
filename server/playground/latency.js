// Latency chart: p50 and p95 of the last minute, over five minutes, from the server's histogram every two seconds.

const SAMPLE = /^paella_request_duration_seconds_bucket\{([^}]*)\} (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const GENERATING = /^\/(generate|inpaint|outpaint|variations|edit|interpolate|upscale|v1\/images\/.*|sdapi\/v1\/(txt2img|img2img|extra-.*))$/;
const PERIOD = 2000;
const SHOWN = 300_000;
const WINDOW = 60_000;
const TARGET = 0.5;
const MIN_SECONDS = 0.02;
const MARKS = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30];

/** Returns a Map of cumulative counts of generating requests by upper edge in seconds, ascending, +Infinity last. */
export function histogram(text) {
  const counts = new Map();
  for (const line of text.split("\n")) {
    const [, labels, value] = SAMPLE.exec(line) ?? [];
    if (!labels) continue;
    const { le, endpoint, status } = Object.fromEntries([...labels.matchAll(LABEL)].map(([, name, label]) => [name, label]));
    if (status !== "200" || !GENERATING.test(endpoint)) continue;
    const edge = le === "+Inf" ? Infinity : Number(le);
    counts.set(edge, (counts.get(edge) ?? 0) + Number(value));
  }
  return new Map([...counts].sort(([a], [b]) => a - b));
}

/** Returns the counts between two histograms. A restarted server counts from 0. */
export function difference(later, earlier) {
  const restarted = (later.get(Infinity) ?? 0) < (earlier.get(Infinity) ?? 0);
  return new Map([...later].map(([edge, count]) => [edge, count - (restarted ? 0 : (earlier.get(edge) ?? 0))]));
}

/** Returns a quantile as Prometheus does: linear within a bucket, the last finite edge beyond it, NaN without counts. */
export function quantile(share, counts) {
  const total = counts.get(Infinity) ?? 0;
  if (!total) return NaN;
  let [low, below] = [0, 0];
  for (const [edge, count] of counts) {
    if (count >= share * total) return edge === Infinity ? low : low + ((edge - low) * (share * total - below)) / (count - below);
    [low, below] = [edge, count];
  }
  return low;
}

export class Latency {
  /** read: resolves to the metrics' text. failed: called with the error of a failed read. */
  constructor({ chart, summary, read, failed }) {
    Object.assign(this, { chart, summary, read, failed, polls: [] });
    this.#poll();
    setInterval(() => document.hidden || this.#poll(), PERIOD);
    new ResizeObserver(() => this.#draw()).observe(chart);
  }

  async #poll() {
    try {
      this.#take(histogram(await this.read()), Date.now());
    } catch (error) {
      this.failed(error);
      this.summary.textContent = error.status ? `Metrics unavailable: ${error.message}` : "The server does not answer.";
    }
  }

  #take(counts, at) {
    const since = this.polls.findLast((poll) => poll.at <= at - WINDOW) ?? this.polls[0] ?? { counts };
    const recent = difference(counts, since.counts);
    this.polls.push({ at, counts, p50: quantile(0.5, recent), p95: quantile(0.95, recent) });
    while (this.polls[0].at < at - SHOWN - WINDOW) this.polls.shift();
    this.summary.textContent = sentence(recent);
    this.#draw();
  }

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.chart;
    if (!width || !this.polls.length) return;
    const now = this.polls.at(-1).at;
    const shown = this.polls.filter((poll) => poll.at >= now - SHOWN);
    const top = Math.max(1, ...shown.map(({ p95 }) => (p95 || 0) * 1.2));
    const x = (at) => 40 + (width - 48) * (1 - (now - at) / SHOWN);
    // Logarithmic: equal ratios have equal heights.
    const y = (seconds) => 8 + (height - 30) * (1 - Math.log(Math.max(seconds, MIN_SECONDS) / MIN_SECONDS) / Math.log(top / MIN_SECONDS));
    this.chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.chart.ariaLabel = `Latency over the last five minutes. ${this.summary.textContent}`;
    this.chart.replaceChildren(
      ...axis({ width, top, y }),
      ...minutes({ now, x, height }),
      ...["p95", "p50"].flatMap((name) => lines(shown, name, x, y)),
    );
  }
}

function sentence(recent) {
  const count = recent.get(Infinity) ?? 0;
  if (!count) return "No request has been answered in the last minute.";
  const [p50, p95] = [0.5, 0.95].map((share) => `${Math.round(quantile(share, recent) * 1000)} ms`);
  const kept = Math.floor((100 * (recent.get(TARGET) ?? 0)) / count);
  return `Last minute: ${count} answered, p50 ${p50}, p95 ${p95}, ${kept} % within 500 ms.`;
}

function axis({ width, top, y }) {
  const marks = MARKS.filter((seconds) => seconds <= top && seconds !== TARGET);
  const grid = marks.flatMap((seconds) => [
    svg("line", { class: "grid", x1: 40, x2: width - 8, y1: y(seconds), y2: y(seconds) }),
    svg("text", { x: 34, y: y(seconds) + 4, "text-anchor": "end" }, String(Math.round(seconds * 1000))),
  ]);
  const promise = svg("line", { class: "promise", x1: 40, x2: width - 8, y1: y(TARGET), y2: y(TARGET) });
  return [...grid, promise, svg("text", { class: "promise-text", x: 34, y: y(TARGET) + 4, "text-anchor": "end" }, "500")];
}

function minutes({ now, x, height }) {
  return [0, 1, 2, 3, 4, 5].map((ago) => {
    return svg("text", { x: x(now - ago * 60_000), y: height - 6, "text-anchor": ago ? "middle" : "end" }, ago ? `−${ago} min` : "now");
  });
}

/** Returns one polyline per stretch with answers. */
function lines(polls, name, x, y) {
  const stretches = [[]];
  for (const poll of polls) {
    if (Number.isNaN(poll[name])) stretches.push([]);
    else stretches.at(-1).push(`${x(poll.at)},${y(poll[name])}`);
  }
  return stretches.filter((points) => points.length).flatMap((points) => [
    svg("polyline", { class: name, points: points.join(" ") }),
    svg("circle", { class: name, r: 2.5, cx: points.at(-1).split(",")[0], cy: points.at(-1).split(",")[1] }),
  ]);
}

function svg(name, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  element.textContent = text;
  return element;
}
