// The playground: connects form, canvas, history and server.

import { NoAnswer, ServerError, file, send } from "./api.js";
import { HAS_REGIONS, NEEDS_IMAGE, PROMPT_OPTIONAL, buildRequest } from "./build_request.js";
import { Canvas } from "./canvas.js";
import { Connection } from "./connection.js";
import { cutNote, remedy, showDetails } from "./details.js";
import { Download, save } from "./download.js";
import { generatedEntries, openedEntry } from "./entries.js";
import { FormErrors } from "./form_errors.js";
import { Gallery, describe } from "./gallery.js";
import { History } from "./history.js";
import { listenForImages } from "./image_import.js";
import { Keyframes } from "./keyframes.js";
import { Latency } from "./latency.js";
import { Live } from "./live.js";
import { Margins } from "./margins.js";
import { Mask } from "./mask.js";
import { Regions } from "./regions.js";
import { runRequest } from "./run_request.js";
import { Settings } from "./settings.js";
import { SnippetPanel } from "./snippet_panel.js";
import { milliseconds } from "./timings.js";

const EXAMPLES = [
  "a red mushroom on a black background",
  "a strawberry on a cyan background",
  "a cat on a blue background",
  "a big yellow star on a purple background",
];
const OPERATIONS = {
  generate: ["Generate", "Text to image."],
  inpaint: ["Inpaint", "Paint over the part to repaint, and describe its new content."],
  outpaint: ["Outpaint", "Drag the borders outwards, or move them with the arrow keys. Without a prompt, the image is continued."],
  variations: ["Vary", "Other images with the same content. The prompt is optional."],
  edit: ["Edit", "Redraw the image, keeping its structure."],
  interpolate: ["Interpolate", "Images between prompts or images, all from the same noise."],
  upscale: ["Upscale", "Enlarge the image, drawing its details. The prompt is optional."],
};
const LOST_KEYFRAMES = "The history does not keep the images of keyframes. Remove the empty keyframes, and add the images again.";
const FORM = "paellera.form";
// Whose Enter key draws: touch keyboards have no Control key.
const touch = matchMedia("(pointer: coarse)");

const $ = (id) => document.getElementById(id);

const history = new History();
const settings = new Settings($("form"));
const canvas = new Canvas({
  area: $("canvas"),
  frame: $("frame"),
  picture: $("picture"),
  mask: $("mask"),
  tiles: $("tiles"),
  empty: $("empty"),
  player: $("player"),
  play: $("play"),
  frameNumber: $("frame-number"),
  hasMargins: () => settings.operation === "outpaint",
});
const errors = new FormErrors($("error"), $("form"));
const snippets = new SnippetPanel({ details: $("code"), snippet: $("snippet"), files: $("snippet-files") }, currentRequest);
const mask = new Mask({ canvas: $("mask"), ring: $("ring"), brush: $("brush"), erase: $("erase") }, () => snippets.show());
const margins = new Margins(document.querySelectorAll(".handle"), showMargins);
const regions = new Regions({ list: $("regions"), layer: $("layer"), toggle: $("draw-regions"), button: $("add-region") }, () => {
  settings.divide(regions.values.length > 0);
  showRegions();
  snippets.show();
});
const live = new Live({ request: liveRequest, shown: showLive, rested: describeLive, failed: failLive });
const keyframes = new Keyframes($("keyframes"), () => snippets.show());
const download = new Download($("download"));
const gallery = new Gallery($("gallery"), { select: choose, remove: forget });
const connection = new Connection(
  { readiness: $("readiness"), keyForm: $("key-form"), key: $("key"), keyError: $("key-error"), reference: $("reference"), prompt: $("prompt") },
  { connected: useModels, recovered: () => errors.clearOutage() },
);

const panel = {
  box: $("shown"),
  caption: $("caption"),
  facts: $("facts"),
  again: $("again"),
  animate: $("animate"),
  reuse: $("reuse"),
  timings: { section: $("timings"), strip: $("strip"), list: $("stages") },
};

/** Requests of the images generated since the page was opened, by entry id. */
const requests = new Map();
let models = [];
let shown = null;
let running = null;
let recalled = false;
/** Shows what the canvas had before the running request. */
let restore = null;
/** The newest image of live mode, {request, entry, urls}, until it is kept in the history. */
let latest = null;
/** Whether the form was changed while a request of the button ran. */
let missed = false;

// ── requests ──

function currentRequest() {
  return buildRequest({ settings, canvas, mask, margins, regions, keyframes, prompt: $("prompt") });
}

async function run(make) {
  if (running) return;
  settle();
  remember();
  errors.clear();
  const began = performance.now();
  const generated = [];
  try {
    const request = make();
    begin();
    const options = { canvas, report, signal: running.signal, began, previews: settings.previews, choose: (i) => generated[i] && show(generated[i]) };
    const result = await runRequest(request, options);
    generated.push(...keep(request, result));
    finish(generated, result);
  } catch (error) {
    fail(error);
  } finally {
    end();
  }
}

function begin() {
  running = new AbortController();
  restore = canvas.snapshot();
  canvas.busy(true);
  $("run").ariaDisabled = "true";
  $("cancel").ariaDisabled = "false";
  report("Generating…", 0);
  $("canvas").scrollIntoView({ block: "nearest" });
}

function end() {
  running = null;
  canvas.busy(false);
  $("run").ariaDisabled = "false";
  $("cancel").ariaDisabled = "true";
  $("progress").value = 0;
  showRegions();
  showHint();
  if (missed) drawLive();
}

function report(message, fraction) {
  if (message !== null) $("status").textContent = message;
  $("progress").value = fraction;
}

/** Adds the images to the history; returns its new entries, the first image first. */
function keep(request, result) {
  const entries = generatedEntries(request, result);
  for (const [entry, urls] of entries) {
    requests.set(entry.id, request);
    add(entry, urls);
  }
  return entries.map(([entry]) => entry);
}

function add(entry, urls) {
  history.add(entry, urls);
  gallery.prepend(entry, urls[0]);
  showHistory();
}

function finish(generated, { seconds, preview }) {
  if (generated.length === 1) show(generated[0]);
  else select(generated[0]);
  const first = preview === undefined ? "" : `, first preview after ${milliseconds(preview)}`;
  const what = generated.length > 1 ? `${generated.length} images` : shown.operation === "interpolate" ? "All frames" : "Generated";
  $("status").textContent = `${what} in ${milliseconds(seconds)}${first}. Seed ${generated[0].parameters.seed}.${cutNote(generated[0].parameters)}`;
}

function fail(error) {
  if (running) {
    restore();
    layoutMargins();
  }
  if (error.name === "AbortError") return void ($("status").textContent = "Cancelled.");
  $("status").textContent = "";
  const outage = error instanceof NoAnswer;
  if (error instanceof ServerError) errors.showServerError(error);
  else errors.show(outage ? `${error.message}.` : error.message, { element: error.element, outage });
  connection.failed(error);
}

/** Saves the shown frames as an animation, which the server draws again from their seed. */
async function animate() {
  if (running) return;
  const { operation, fields } = requests.get(shown.id);
  const { seed } = shown.parameters;
  errors.clear();
  begin();
  try {
    save(await file(operation, { ...fields, seed, response_format: "gif" }, running.signal), `paellera-${seed}.gif`);
    $("status").textContent = "Saved as a GIF.";
  } catch (error) {
    fail(error);
  } finally {
    end();
  }
}

function cancel() {
  running?.abort();
}

// ── live mode ──

/** Draws the changed form in live mode, after the button's request if one runs. */
function drawLive() {
  missed = Boolean(running);
  if ($("live").checked && !running) live.typed();
}

function switchLive() {
  $("live-latency").textContent = "";
  if (!$("live").checked) return settle();
  fixSeed();
  if (running) missed = true;
  else live.restart();
}

function fixSeed() {
  if (!settings.chooseSeed()) return;
  remember();
  snippets.show();
}

/** Returns the form's request as live mode draws it, or null if there is nothing to draw. */
function liveRequest() {
  if (!$("live").checked || !$("prompt").value.trim() || !settings.model || settings.operation !== "generate") return null;
  // A seed that is being replaced.
  if (!$("seed").value.trim() && document.activeElement === $("seed")) return null;
  fixSeed();
  const request = currentRequest();
  return { ...request, count: 1, fields: settings.quick(request.fields) };
}

function showLive(request, result) {
  const [[entry, urls]] = generatedEntries(request, result);
  latest = { request, entry, urls };
  errors.clear();
  canvas.show(urls, { width: entry.width, height: entry.height }, describe(entry));
  showRegions();
  $("status").textContent = "";
  $("live-latency").textContent = milliseconds(result.seconds);
}

/** Tells about the image once typing rests; screen readers announce the status. */
function describeLive() {
  const { request, entry } = latest;
  requests.set(entry.id, request);
  select(entry);
  $("status").textContent = `Drawn in ${milliseconds(entry.seconds)}. Seed ${entry.parameters.seed}.${cutNote(entry.parameters)}`;
}

function failLive(error, wait) {
  connection.failed(error, { quietly: true });
  const next = wait ? `Live mode waits for ${wait} s.` : "The next key tries again.";
  const text = error instanceof NoAnswer || error instanceof ServerError ? `${error.message}. ${next}` : error.message;
  // The same text written again would be announced again.
  if ($("status").textContent !== text) $("status").textContent = text;
}

/** Ends live drawing until the form changes, and keeps its last image in the history. */
function settle() {
  live.halt();
  if (!latest) return;
  const { request, entry, urls } = latest;
  latest = null;
  requests.set(entry.id, request);
  add(entry, urls);
  show(entry);
}

/** Keeps the last image when the page is left, which must load no images any more. */
function leave() {
  live.halt();
  if (latest) history.add(latest.entry, latest.urls);
  latest = null;
}

// ── shown image ──

/** Shows an entry of the history on the canvas, as input of further requests. */
function show(entry) {
  const images = history.images(entry.id);
  if (images) canvas.show(images, { width: entry.width, height: entry.height }, describe(entry));
  else canvas.clear();
  select(entry);
  mask.reset(entry);
  margins.reset(entry, longestSide());
  showRegions();
  showHint();
  if (images) return;
  const reason = history.entries.some(({ id }) => id === entry.id) ? "removed for newer ones" : "deleted in another tab";
  $("empty-title").textContent = `This image was ${reason}`;
  errors.show(`This image was ${reason}. ${remedy(entry)}`);
}

function choose(entry) {
  settle();
  show(entry);
}

/** Shows an entry's details. */
function select(entry) {
  errors.clear();
  shown = entry;
  gallery.mark(entry.id);
  showDetails(panel, entry, requests.has(entry.id) && models.some(({ id }) => id === entry.model));
  offerImage();
}

/** Offers what needs the shown image only while there is one. */
function offerImage() {
  const url = canvas.current ?? (shown && history.images(shown.id)?.[0]);
  $("upscale").hidden = !url || !settings.supports("upscale");
  download.offer(url, shown?.parameters?.seed ?? "opened");
}

function forget(id) {
  history.remove(id);
  gallery.drop(id);
  showHistory();
  if (shown?.id === id) blank();
}

function blank() {
  shown = null;
  canvas.clear();
  showRegions();
  $("shown").hidden = true;
  $("timings").hidden = true;
}

function showGallery() {
  gallery.render(history.entries, ({ id }) => history.images(id));
  showHistory();
}

function showHistory() {
  const { length } = history.entries;
  $("forget-all").hidden = !length;
  $("history-note").hidden = !length;
  $("empty-title").textContent = length ? "No image chosen" : "No images yet";
}

function showMargins(dragging) {
  const { left, right, up, down } = margins.values;
  const { width, height } = margins.size;
  const grown = `${width} × ${height}: ${left} left, ${right} right, ${up} up, ${down} down`;
  const large = Math.max(width, height) > longestSide() ? ". The server scales it to fit" : "";
  $("margins").value = margins.empty ? "Drag a border outwards." : `${grown}${large}.`;
  canvas.layout({ margins: margins.values, frozen: dragging });
  margins.scale = canvas.scale;
  if (!dragging) snippets.show();
}

function layoutMargins() {
  canvas.layout({ margins: settings.operation === "outpaint" ? margins.values : { left: 0, right: 0, up: 0, down: 0 } });
  margins.scale = canvas.scale;
}

/** Shows the regions' boxes, on an empty sheet if the shown image has another shape than the one to be generated. */
function showRegions() {
  const { operation, size } = settings;
  const drawn = regions.shown && HAS_REGIONS.includes(operation) && settings.supports("regions");
  $("layer").hidden = !drawn;
  if (running) return;
  const unlike = canvas.current ? canvas.size.width * size.height !== canvas.size.height * size.width : canvas.blank;
  canvas.sheet(drawn && operation === "generate" && unlike ? size : null);
}

async function copy(language) {
  await snippets.copy(language);
  $("status").textContent = "Copied.";
}

// ── the form ──

function useModels(data) {
  const { value: chosen } = $("model");
  const lost = chosen && !data.some(({ id }) => id === chosen);
  models = data;
  $("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
  if (chosen && !lost) $("model").value = chosen;
  useModel();
  if (!recalled) begun();
  if (!lost) return;
  if (shown) select(shown);
  errors.show(`The server does not have the weights “${chosen}” any more. “${$("model").value}” is chosen now: generate again.`);
}

/** Continues the start that needs the server, and its key if one is required. */
function begun() {
  recall();
  const metrics = async () => (await send("metrics")).text();
  // Metrics may need another key than the page's.
  const failed = (error) => error.status !== 401 && connection.failed(error);
  new Latency({ chart: $("chart"), summary: $("latency-summary"), read: metrics, failed });
}

function useModel() {
  const model = models.find(({ id }) => id === $("model").value);
  settings.use(model);
  const names = Object.entries(OPERATIONS).filter(([operation]) => !settings.supports(operation));
  $("incapable").hidden = !names.length;
  $("incapable").textContent = `${model.id} does not support: ${names.map(([, [label]]) => label.toLowerCase()).join(", ")}.`;
  $("add-picture").disabled = !settings.supports("variations");
  offerImage();
  if (shown && margins.limits.side !== longestSide()) margins.reset(shown, longestSide());
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
  for (const element of document.querySelectorAll("[data-needs]")) element.hidden ||= !settings.supports(element.dataset.needs);
  $("run-label").textContent = label;
  showHint();
  $("prompt-label").textContent = PROMPT_OPTIONAL.includes(operation) ? "Prompt (optional)" : "Prompt";
  if (operation === "interpolate" && !keyframes.values.length) keyframes.fill([$("prompt").value, ""]);
  if (!running) layoutMargins();
  showRegions();
  snippets.show();
}

function showHint() {
  const [, hint] = OPERATIONS[settings.operation];
  const incomplete = NEEDS_IMAGE.includes(settings.operation) && !canvas.current;
  const first = canvas.tiled ? "Choose one of the images first." : "Generate, drop or open an image first.";
  $("operation-hint").textContent = incomplete ? `${hint} ${first}` : hint;
}

function reuse({ operation, prompt, model, parameters }) {
  if (models.some(({ id }) => id === model)) $("model").value = model;
  settings.operation = operation;
  useModel();
  regions.fill(parameters.regions ?? []);
  settings.fill(parameters);
  $("prompt").value = parameters.prompt ?? "";
  if (operation === "interpolate") keyframes.fill(parameters.keyframes.map((keyframe) => keyframe.prompt ?? ""));
  remember();
  useOperation();
  $("prompt").focus();
  if (parameters.keyframes?.some(({ prompt }) => prompt === undefined)) errors.show(LOST_KEYFRAMES);
}

/** Enlarges the shown image as the form says, described by its own prompt. */
function upscale() {
  if (running) return;
  if (!canvas.current) show(shown);
  if (!canvas.current) return;
  settings.operation = "upscale";
  $("prompt").value = shown.parameters?.prompt ?? "";
  useOperation();
  run(currentRequest);
}

function remember() {
  // Until then, the storage knows more than the form.
  if (!recalled) return;
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
  recalled = true;
  remember();
}

function importImage({ url, ...file }) {
  settle();
  const entry = openedEntry(file);
  add(entry, [url]);
  show(entry);
  const { width, height, original } = entry;
  $("status").textContent = original ? `Opened at ${width} × ${height}; the file has ${original.join(" × ")}.` : "";
}

// ── wiring ──

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
  if (event.isComposing) return;
  const go = event.ctrlKey || event.metaKey || (touch.matches && event.target.id === "prompt" && !event.shiftKey);
  if (event.key === "Enter" && go) $("form").requestSubmit();
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
  upscale,
  forget: () => forget(shown.id),
  reset: () => {
    settings.reset();
    remember();
    useOperation();
    drawLive();
  },
  download: offerImage,
  animate,
  "forget-all": () => {
    if (!confirm("Delete all images of the history?")) return;
    history.clear();
    showGallery();
    blank();
  },
  "mask-undo": () => mask.undo(),
  "mask-invert": () => mask.invert(),
  "mask-clear": () => mask.clear(),
  "margins-clear": () => margins.clear(),
  "add-prompt": () => keyframes.addPrompt().focus(),
  "add-picture": () => (canvas.current ? keyframes.addImage(canvas.current, describe(shown)) : errors.show("There is no image to add yet.")),
  "copy-curl": () => copy("curl"),
  "copy-python": () => copy("python"),
};
// They act on the shown image, which the history must have.
for (const id of ["again", "reuse", "upscale", "forget", "download", "forget-all"]) $(id).addEventListener("click", settle);
for (const [id, act] of Object.entries(pressed)) $(id).addEventListener("click", act);

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run(currentRequest);
});
$("form").addEventListener("input", ({ target }) => {
  remember();
  if (target.id === "live") return switchLive();
  if (target.name === "operation") {
    settle();
    return useOperation();
  }
  showRegions();
  snippets.show();
  drawLive();
});
$("seed").addEventListener("change", drawLive);
$("frame-number").addEventListener("input", offerImage);
$("layer").addEventListener("pointerup", drawLive);
$("regions").addEventListener("click", drawLive);
$("model").addEventListener("change", () => {
  useModel();
  drawLive();
});
window.addEventListener("pagehide", leave);
window.addEventListener("pageshow", ({ persisted }) => persisted && showGallery());
$("theme").value = document.documentElement.dataset.theme;
$("theme").addEventListener("change", ({ target }) => {
  document.documentElement.dataset.theme = target.value;
  try {
    localStorage.setItem("paellera.theme", target.value);
  } catch {
    // As above.
  }
});
document.addEventListener("keydown", shortcut);
window.addEventListener("storage", ({ key }) => History.owns(key) && showGallery());
listenForImages({ input: $("open"), onImage: importImage, onError: (message) => errors.show(message), side: longestSide });

$("examples").append(...EXAMPLES.map(example));
$("settings").open = matchMedia("(min-width: 60rem)").matches;
useOperation();
showGallery();
if (!history.lasting) {
  $("history-place").textContent = "Kept until this page is closed.";
  $("gallery").dataset.empty = "Generated images stay here until this page is closed.";
}
if (history.damaged) errors.show("The saved history cannot be read. It was deleted, and a new one begins.");
connection.connect();
