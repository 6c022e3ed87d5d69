// The form's settings, with bounds and defaults of the selected weights; only changed ones are sent.

const RANGES = ["num_inference_steps", "guidance_scale", "strength", "feather", "scale", "upscale_strength", "hires_strength"];
const SIZED = ["generate", "variations", "interpolate"];
const FITTED = ["edit", "variations"];
const FEATHERED = ["inpaint", "outpaint"];
// Fields that a preset's recipe sets.
const RECIPE = ["num_inference_steps", "guidance_scale", "sampler", "temperature_start", "temperature_end"];
const FAST = "fast";
const QUALITY = "quality";
const FEW_STEPS = 4;
// Fields that no reset changes.
const KEPT = ["operation", "prompt", "live"];
// Fields that a request may lack; an image's parameters set them, or their defaults do.
const OPTIONAL = ["feather", "fit", "resize", "hires_scale", "hires_strength", "hires_steps"];

/** A value that cannot be sent. element: its field. */
class InvalidField extends Error {
  constructor(element, message) {
    super(message);
    this.element = element;
  }
}

export class Settings {
  constructor(form) {
    this.form = form;
    this.fields = form.elements;
    this.model = null;
    this.changed = new Set();
    this.divided = false;
    form.addEventListener("input", ({ target }) => {
      this.changed.add(target.name);
      if (target.name === "preset") this.#followPreset();
      else this.#followRequest();
      this.#show();
    });
  }

  get operation() {
    return this.fields.operation.value;
  }

  set operation(name) {
    this.fields.operation.value = name;
    this.#followRequest();
    this.#show();
  }

  /** Whether the selected weights support an operation. */
  supports(operation) {
    return this.model?.capabilities.operations.includes(operation) ?? false;
  }

  /** model: an entry of GET /v1/models. Changed settings stay if these weights support them. */
  use(model) {
    const kept = this.#values();
    this.model = model;
    const { size_step: step, min_side: low, max_side: high } = model.limits;
    const sides = Array.from({ length: Math.floor(high / step) }, (_, i) => (i + 1) * step).filter((side) => side >= low);
    for (const name of ["width", "height"]) options(this.fields[name], sides);
    options(this.fields.sampler, model.capabilities.samplers);
    this.fields.preset.replaceChildren(...Object.keys(model.presets).map((name) => new Option(name[0].toUpperCase() + name.slice(1), name)));
    this.form.querySelector("#preset-field").hidden = this.fields.preset.options.length < 2;
    for (const radio of this.fields.operation) radio.disabled = !this.supports(radio.value);
    if (!this.supports(this.operation)) [...this.fields.operation].find((radio) => !radio.disabled)?.click();
    this.#choosePreset(kept.preset);
    this.#write(kept);
    this.#followRequest();
  }

  reset() {
    this.changed.clear();
    for (const field of this.fields) if (field.name && !KEPT.includes(field.name)) restore(field);
    this.#choosePreset();
    this.#show();
  }

  /** Returns the request's fields except prompts and images. Throws InvalidField for an invalid number. */
  request() {
    const { fields, changed } = this;
    const operation = this.operation;
    const asked = { model: this.model.id };
    const number = (name) => bounded(fields[name]);
    if (SIZED.includes(operation) || this.#resized) Object.assign(asked, { width: number("width"), height: number("height") });
    if (changed.has("preset")) asked.preset = fields.preset.value;
    for (const name of ["num_inference_steps", "guidance_scale"]) if (changed.has(name)) asked[name] = number(name);
    if (changed.has("sampler")) asked.sampler = fields.sampler.value;
    if (changed.has("temperature_start") || changed.has("temperature_end")) {
      asked.temperature = [number("temperature_start"), number("temperature_end")];
    }
    if (fields.seed.value.trim()) asked.seed = whole(fields.seed);
    if (fields.negative_prompt.value.trim()) asked.negative_prompt = fields.negative_prompt.value.trim();
    if (fields.deterministic.checked) asked.deterministic = true;
    if (changed.has("feather") && FEATHERED.includes(operation)) asked.feather = number("feather");
    if (changed.has("fit") && FITTED.includes(operation) && !fields.fit.disabled) asked.fit = fields.fit.value;
    if (operation === "generate" && fields.hires_scale.value) asked.hires = this.#hires(number);
    if (operation === "edit") asked.strength = number("strength");
    if (operation === "interpolate") return { ...asked, frames: number("frames"), mode: fields.mode.value };
    if (operation === "upscale") return { ...asked, scale: number("scale"), strength: number("upscale_strength") };
    return { ...asked, n: number("n") };
  }

  /** Returns a request's fields for one image while one types: by the preset `fast`, or else in few steps. */
  quick({ n, hires, deterministic, num_inference_steps: steps, ...fields }) {
    const { presets } = this.model;
    if (presets[FAST]) {
      const { guidance_scale, sampler, temperature, negative_prompt, ...others } = fields;
      return { ...others, preset: FAST };
    }
    const preset = presets[this.fields.preset.value];
    const few = Math.max(FEW_STEPS, preset.steps[0]);
    return { ...fields, num_inference_steps: Math.min(few, steps ?? preset.recipe.num_inference_steps) };
  }

  /** Chooses a seed if the form says random, and returns whether it did. */
  chooseSeed() {
    const { seed } = this.fields;
    if (seed.value.trim()) return false;
    seed.value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
    this.changed.add("seed");
    return true;
  }

  #hires(number) {
    const steps = this.fields.hires_steps.value && { steps: number("hires_steps") };
    return { scale: Number(this.fields.hires_scale.value), strength: number("hires_strength"), ...steps };
  }

  /** Whether an edit has another size than its image. */
  get #resized() {
    return this.operation === "edit" && this.fields.resize.checked;
  }

  get previews() {
    return bounded(this.fields.partial_images);
  }

  /** Sets the form to an image's parameters. */
  fill(parameters) {
    const { guidance_scale: guidance, temperature, hires, strength, ...same } = parameters;
    this.changed.clear();
    for (const name of OPTIONAL) restore(this.fields[name]);
    this.#choosePreset(parameters.preset);
    this.#write({
      ...same,
      guidance_scale: guidance?.[0],
      temperature_start: temperature?.[0],
      temperature_end: temperature?.[1],
      [this.operation === "upscale" ? "upscale_strength" : "strength"]: strength,
      hires_scale: hires?.scale,
      hires_strength: hires?.strength,
      hires_steps: hires?.steps,
    });
    if (this.fields.preset.value !== this.#usual) this.changed.add("preset");
  }

  /** The requested size in pixels. */
  get size() {
    return { width: Number(this.fields.width.value), height: Number(this.fields.height.value) };
  }

  /** Returns the values to restore when the page is opened again. */
  remember() {
    return { ...this.#values(), prompt: this.fields.prompt.value, live: this.fields.live.checked };
  }

  /** What has been typed already stays. */
  recall(values) {
    const typed = this.#values();
    if (values.preset) this.#choosePreset(values.preset);
    this.#write({ ...values, ...typed });
    this.#followRequest();
  }

  #values() {
    return Object.fromEntries([...this.changed].filter((name) => this.fields[name]?.value !== undefined).map((name) => [name, valueOf(this.fields[name])]));
  }

  /** has: whether there are regions, which only some weights draw. */
  divide(has) {
    this.divided = has;
    this.#followRequest();
  }

  /** The preset of a request that names none: `quality` with regions and where a share of an image is kept, otherwise the default one. */
  get #usual() {
    const { operation, fields } = this;
    const divided = this.divided && this.supports("regions");
    const needsSteps = {
      generate: divided || Boolean(fields.hires_scale.value),
      inpaint: divided,
      outpaint: divided,
      edit: Number(fields.strength.value) < 1,
      upscale: true,
    };
    return needsSteps[operation] ? QUALITY : this.model.default_preset;
  }

  /** Chooses a preset if the weights have it, otherwise the usual one, and sets the form to its recipe. */
  #choosePreset(name) {
    const chosen = this.model.presets[name] ? name : this.#usual;
    this.fields.preset.value = chosen;
    this.changed.delete("preset");
    if (chosen !== this.#usual) this.changed.add("preset");
    this.#defaults();
  }

  /** Sets the preset to the request's usual one unless it was chosen by hand; what else was changed stays. */
  #followRequest() {
    if (!this.model || this.changed.has("preset") || this.fields.preset.value === this.#usual) return;
    const kept = RECIPE.filter((name) => this.changed.has(name)).map((name) => [name, this.fields[name].value]);
    this.fields.preset.value = this.#usual;
    this.#applyRecipe();
    this.#set(Object.fromEntries(kept));
  }

  /** Sets the fields of a recipe to that of the preset that was chosen by hand. */
  #followPreset() {
    for (const name of RECIPE) this.changed.delete(name);
    this.#applyRecipe();
  }

  #defaults() {
    const [width, height] = this.model.native_size;
    this.#set({ width, height });
    this.#applyRecipe();
  }

  #applyRecipe() {
    const { recipe } = this.model.presets[this.fields.preset.value];
    this.#set({
      num_inference_steps: recipe.num_inference_steps,
      guidance_scale: recipe.guidance_scale[0],
      sampler: recipe.sampler,
      temperature_start: recipe.temperature[0],
      temperature_end: recipe.temperature[1],
    });
  }

  /** Writes known fields; those that differ from the defaults count as changed. */
  #write(values) {
    for (const [name, value] of Object.entries(values)) {
      const field = this.fields[name];
      if (name === "operation" || name === "model" || name === "preset" || value === undefined || value === null || !field) continue;
      const before = valueOf(field);
      this.#set({ [name]: value });
      if (valueOf(field) !== before) this.changed.add(name);
    }
    this.#show();
  }

  #set(values) {
    for (const [name, value] of Object.entries(values)) {
      const field = this.fields[name];
      if (field.type === "checkbox") field.checked = Boolean(value);
      else if (field.tagName !== "SELECT" || [...field.options].some((option) => option.value === String(value))) field.value = String(value);
    }
    this.#show();
  }

  #show() {
    for (const name of RANGES) this.form.querySelector(`output[for="${name}"]`).value = this.fields[name].value;
    for (const name of ["width", "height", "fit"]) this.fields[name].disabled = this.operation === "edit" && !this.#resized;
  }
}

/** Sets a field to the value of the page's HTML. */
function restore(field) {
  if (field.type === "checkbox") field.checked = field.defaultChecked;
  else if (field.tagName === "SELECT") field.selectedIndex = 0;
  else field.value = field.defaultValue;
}

function valueOf(field) {
  return field.type === "checkbox" ? field.checked : field.value;
}

function options(select, values) {
  select.replaceChildren(...values.map((value) => new Option(value, value)));
}

function labelOf(field) {
  return [...field.labels[0].childNodes].find((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()).data.trim();
}

/** Returns the field's number; a fraction may lie between the steps of its arrows. Throws InvalidField if it is out of bounds. */
function bounded(field) {
  const { valid, stepMismatch, rangeUnderflow, rangeOverflow } = field.validity;
  const between = stepMismatch && !Number.isInteger(Number(field.step || 1)) && !rangeUnderflow && !rangeOverflow;
  if (field.value === "" || !(valid || between)) throw new InvalidField(field, `${labelOf(field)}: must be a number from ${field.min} to ${field.max}`);
  return Number(field.value);
}

/** Returns the field's integer. Throws InvalidField beyond the integers that JavaScript represents exactly. */
function whole(field) {
  const value = Number(field.value);
  if (!Number.isSafeInteger(value)) throw new InvalidField(field, `${labelOf(field)}: must be an integer between −2⁵³ and 2⁵³`);
  return value;
}
