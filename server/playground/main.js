// The playground: wires the form, the easel, the history and the server to each other.

import { about } from "./about.js";
import { ServerError, send } from "./api.js";
import { Complaints } from "./complaints.js";
import { FROM_PICTURE, WORDS_OPTIONAL, Lacking, compose } from "./composing.js";
import { Connection } from "./connection.js";
import { draw } from "./drawing.js";
import { Gallery, describe } from "./gallery.js";
import { History } from "./history.js";
import { listen } from "./intake.js";
import { Keyframes } from "./keyframes.js";
import { Latency } from "./latency.js";
import { Margins } from "./margins.js";
import { Mask } from "./mask.js";
import { Settings } from "./settings.js";
import { Stage } from "./stage.js";
import { Terminal } from "./terminal.js";
import { milliseconds } from "./timings.js";

const EXAMPLES = [
  "a red mushroom on a black background",
  "a strawberry on a cyan background",
  "a dog on a yellow background",
  "a big yellow star on a purple background",
];
const OPERATIONS = {
  generate: ["Generate", "Text becomes a picture."],
  inpaint: ["Inpaint", "Paint over the part that is to be drawn anew, and say what should be there."],
  outpaint: ["Outpaint", "Drag the borders outwards, or move them with the arrow keys. Without words the picture is continued."],
  variations: ["Vary", "Other pictures that show the same. Words may be added."],
  edit: ["Edit", "The picture is drawn anew over its own structure."],
  interpolate: ["Interpolate", "Pictures on the way between prompts or pictures, all from the same noise."],
};
const FORM = "paellera.form";

const $ = (id) => document.getElementById(id);

const history = new History();
const settings = new Settings($("form"));
const stage = new Stage({
  easel: $("easel"),
  frame: $("frame"),
  picture: $("picture"),
  mask: $("mask"),
  tiles: $("tiles"),
  empty: $("empty"),
  player: $("player"),
  play: $("play"),
  frameNumber: $("frame-number"),
  roomy: () => settings.operation === "outpaint",
});
const complaints = new Complaints($("error"), $("form"));
const terminal = new Terminal({ details: $("code"), snippet: $("snippet"), files: $("snippet-files") }, asked);
const mask = new Mask({ canvas: $("mask"), ring: $("ring"), brush: $("brush"), erase: $("erase") }, () => terminal.show());
const margins = new Margins(document.querySelectorAll(".handle"), showMargins);
const keyframes = new Keyframes($("keyframes"), () => terminal.show());
const gallery = new Gallery($("gallery"), { select: show, remove: forget });
const connection = new Connection({ readiness: $("readiness"), keyForm: $("key-form"), key: $("key") }, useModels);

const panel = {
  box: $("shown"),
  caption: $("caption"),
  facts: $("facts"),
  again: $("again"),
  reuse: $("reuse"),
  timings: { section: $("timings"), strip: $("strip"), list: $("stages") },
};

/** Of the pictures drawn since the page was opened, what was asked for. */
const requests = new Map();
let models = [];
let shown = null;
let running = null;
let recalled = false;

// ── drawing ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

function asked() {
  return compose({ settings, stage, mask, margins, keyframes, prompt: $("prompt") });
}

async function run(make) {
  if (running) return;
  complaints.clear();
  const began = performance.now();
  const drawn = [];
  try {
    const request = make();
    begin();
    const options = { stage, report, signal: running.signal, began, previews: settings.previews, choose: (i) => drawn[i] && show(drawn[i]) };
    const result = await draw(request, options);
    drawn.push(...keep(request, result));
    finish(drawn, result);
  } catch (error) {
    fail(error);
  } finally {
    end();
  }
}

function begin() {
  running = new AbortController();
  stage.busy(true);
  $("run").ariaDisabled = "true";
  $("cancel").ariaDisabled = "false";
  report("Drawing…", 0);
  $("easel").scrollIntoView({ block: "nearest" });
}

function end() {
  running = null;
  stage.busy(false);
  $("run").ariaDisabled = "false";
  $("cancel").ariaDisabled = "true";
  $("progress").value = 0;
}

function report(sentence, share) {
  if (sentence !== null) $("status").textContent = sentence;
  $("progress").value = share;
}

/** Puts what was drawn into the history; returns its entries, first drawn first. */
function keep(request, { answer, urls, seconds, preview }) {
  const { parameters, timings, model } = answer;
  const common = { at: Date.now(), operation: request.operation, model, prompt: request.title, timings, seconds, preview };
  const seeds = answer.images?.map(({ seed }) => seed) ?? [parameters.seed];
  const entries = seeds.map((seed) => ({
    ...common,
    id: crypto.getRandomValues(new Uint32Array(2)).join("-"),
    width: parameters.width,
    height: parameters.height,
    parameters: { ...parameters, seed, n: 1 },
  }));
  entries.forEach((entry, i) => {
    const pictures = seeds.length > 1 ? [urls[i]] : urls;
    requests.set(entry.id, request);
    history.add(entry, pictures);
    gallery.prepend(entry, pictures[0]);
  });
  showHistory();
  return entries;
}

function finish(drawn, { seconds, preview }) {
  if (drawn.length === 1) show(drawn[0]);
  else select(drawn[0]);
  const first = preview === undefined ? "" : `, first seen after ${milliseconds(preview)}`;
  const what = drawn.length > 1 ? `${drawn.length} pictures` : shown.operation === "interpolate" ? "All frames" : "Drawn";
  $("status").textContent = `${what} in ${milliseconds(seconds)}${first}. Seed ${drawn[0].parameters.seed}.`;
}

function fail(error) {
  if (running) restore();
  if (error.name === "AbortError") return void ($("status").textContent = "Cancelled.");
  $("status").textContent = "";
  if (error.status === 401) connection.askForKey(error);
  if (error instanceof ServerError) return complaints.refuse(error);
  // A browser says TypeError when nobody answers.
  complaints.say(error instanceof TypeError && running ? "The server does not answer." : error.message);
  if (error instanceof Lacking) error.element.focus();
}

function cancel() {
  running?.abort();
}

// ── what is shown ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Puts an entry of the history on the easel, a picture to go on from. */
function show(entry) {
  const pictures = history.pictures(entry.id);
  select(entry);
  if (!pictures) {
    complaints.say("This picture had to make room for newer ones. “Use its settings” and draw it again: its seed gives the same picture.");
    return;
  }
  stage.show(pictures, { width: entry.width, height: entry.height }, describe(entry));
  mask.reset(entry);
  margins.reset(entry, longestSide());
  showHint();
}

/** Says what an entry is, beside the easel. */
function select(entry) {
  complaints.clear();
  shown = entry;
  gallery.mark(entry.id);
  about(panel, entry, requests.has(entry.id));
}

/** What was on the easel before a request failed, with its mask and its borders. */
function restore() {
  const pictures = shown && history.pictures(shown.id);
  if (!pictures) return stage.clear();
  stage.show(pictures, { width: shown.width, height: shown.height }, describe(shown));
  stage.layout({ margins: margins.values });
}

function forget(id) {
  history.remove(id);
  gallery.drop(id);
  showHistory();
  if (shown?.id === id) blank();
}

function blank() {
  shown = null;
  stage.clear();
  $("shown").hidden = true;
  $("timings").hidden = true;
}

function showHistory() {
  const { length } = history.entries;
  $("forget-all").hidden = !length;
  $("history-note").hidden = !length;
}

function showMargins(dragging) {
  const { left, right, up, down } = margins.values;
  const { width, height } = margins.size;
  const grown = `${width} × ${height}: ${left} left, ${right} right, ${up} up, ${down} down`;
  $("margins").value = margins.empty ? "Drag a border outwards." : grown;
  stage.layout({ margins: margins.values, frozen: dragging });
  margins.scale = stage.scale;
  if (!dragging) terminal.show();
}

async function copy(language) {
  await terminal.copy(language);
  $("status").textContent = "Copied.";
}

// ── the form ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

function useModels(data) {
  models = data;
  $("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
  useModel();
  if (!recalled) recall();
  recalled = true;
}

function useModel() {
  const model = models.find(({ id }) => id === $("model").value);
  settings.use(model);
  const names = Object.entries(OPERATIONS).filter(([operation]) => !model.capabilities.operations.includes(operation));
  $("incapable").hidden = !names.length;
  $("incapable").textContent = `${model.id} was not made for: ${names.map(([, [label]]) => label.toLowerCase()).join(", ")}.`;
  $("add-picture").disabled = !model.capabilities.operations.includes("variations");
  if (shown) margins.reset(shown, longestSide());
  useOperation();
}

function longestSide() {
  return models.find(({ id }) => id === $("model").value)?.limits.max_side ?? 0;
}

function useOperation() {
  const operation = settings.operation;
  const [label] = OPERATIONS[operation];
  document.body.dataset.operation = operation;
  for (const element of document.querySelectorAll("[data-for]")) element.hidden = !element.dataset.for.split(" ").includes(operation);
  for (const element of document.querySelectorAll("[data-not-for]")) element.hidden = element.dataset.notFor.split(" ").includes(operation);
  $("run-label").textContent = label;
  showHint();
  $("prompt-label").textContent = WORDS_OPTIONAL.includes(operation) ? "Prompt, if any" : "Prompt";
  if (operation === "interpolate" && !keyframes.values.length) keyframes.fill([$("prompt").value, ""]);
  if (!running) stage.layout({ margins: operation === "outpaint" ? margins.values : { left: 0, right: 0, up: 0, down: 0 } });
  margins.scale = stage.scale;
  terminal.show();
}

function showHint() {
  const [, hint] = OPERATIONS[settings.operation];
  const lacking = FROM_PICTURE.includes(settings.operation) && !stage.current;
  $("operation-hint").textContent = lacking ? `${hint} Draw, drop or open a picture first.` : hint;
}

function reuse({ operation, prompt, model, parameters }) {
  if (models.some(({ id }) => id === model)) $("model").value = model;
  $("form").elements.operation.value = operation;
  useModel();
  settings.fill(parameters);
  $("prompt").value = parameters.prompt ?? "";
  if (operation === "interpolate") keyframes.fill(parameters.keyframes.map((keyframe) => keyframe.prompt ?? ""));
  remember();
  useOperation();
  $("prompt").focus();
}

function remember() {
  try {
    localStorage.setItem(FORM, JSON.stringify(settings.remember()));
  } catch {
    // Storage may be full or forbidden; the form lasts as long as the page.
  }
}

function recall() {
  try {
    settings.recall(JSON.parse(localStorage.getItem(FORM)) ?? {});
  } catch {
    // As above.
  }
}

function take({ url, width, height, name }) {
  const entry = { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), at: Date.now(), operation: "opened", prompt: name, width, height };
  history.add(entry, [url]);
  gallery.prepend(entry, url);
  showHistory();
  show(entry);
}

// ── wiring ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

function example(prompt) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: prompt });
  button.addEventListener("click", () => {
    $("prompt").value = prompt;
    $("form").requestSubmit();
  });
  const item = document.createElement("li");
  item.append(button);
  return item;
}

function shortcut(event) {
  const writing = event.target.closest?.("input, textarea, select, [role=application]");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  else if (event.key === "Escape" && running) cancel();
  else if (event.key === "/" && !writing) $("prompt").focus();
  else return;
  event.preventDefault();
}

const pressed = {
  cancel,
  again: () => {
    const { fields, ...request } = requests.get(shown.id);
    const { seed: _, ...others } = fields;
    run(() => ({ ...request, fields: others }));
  },
  reuse: () => reuse(shown),
  forget: () => forget(shown.id),
  reset: () => settings.reset(),
  download: () => {
    const url = stage.current ?? history.pictures(shown.id)[0];
    const extension = /^data:image\/(\w+)/.exec(url)[1];
    Object.assign($("download"), { href: url, download: `paellera-${shown.parameters?.seed ?? "opened"}.${extension}` });
  },
  "forget-all": () => {
    if (!confirm("Delete all pictures of the history?")) return;
    history.clear();
    gallery.render([], () => null);
    showHistory();
    blank();
  },
  "mask-undo": () => mask.undo(),
  "mask-invert": () => mask.invert(),
  "mask-clear": () => mask.clear(),
  "margins-clear": () => margins.clear(),
  "add-prompt": () => keyframes.addPrompt().focus(),
  "add-picture": () => (stage.current ? keyframes.addPicture(stage.current, describe(shown)) : complaints.say("There is no picture to add yet.")),
  "copy-curl": () => copy("curl"),
  "copy-python": () => copy("python"),
};
for (const [id, act] of Object.entries(pressed)) $(id).addEventListener("click", act);

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run(asked);
});
$("form").addEventListener("input", ({ target }) => {
  remember();
  if (target.name === "operation") useOperation();
  else terminal.show();
});
$("model").addEventListener("change", useModel);
$("theme").value = document.documentElement.dataset.theme;
$("theme").addEventListener("change", ({ target }) => {
  document.documentElement.dataset.theme = target.value;
  localStorage.setItem("paellera.theme", target.value);
});
document.addEventListener("keydown", shortcut);
window.addEventListener("storage", () => gallery.render(history.entries, ({ id }) => history.pictures(id)));
listen({ input: $("open"), take, refuse: (sentence) => complaints.say(sentence), side: longestSide });

$("examples").append(...EXAMPLES.map(example));
$("settings").open = matchMedia("(min-width: 60rem)").matches;
gallery.render(history.entries, ({ id }) => history.pictures(id));
showHistory();
const metrics = async () => (await send("metrics")).text();
new Latency({ chart: $("chart"), summary: $("latency-summary"), read: metrics });
connection.connect();
