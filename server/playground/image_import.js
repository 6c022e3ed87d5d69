// Images dropped, pasted or opened: upright copies as PNGs, no larger than the weights draw.

// Until the server has told its own limit.
const DEFAULT_SIDE = 512;
const WRITABLE = 'textarea, input:not([type="range"], [type="checkbox"], [type="radio"], [type="file"])';
const HEIC_BRANDS = ["heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1"];

/**
 * onImage: called with {url, width, height, original, name}; original: the file's [width, height] if the copy is smaller, else undefined.
 * onError: called with a message. side: returns the maximum pixels a side, 0 if unknown.
 */
export function listenForImages({ input, onImage, onError, side }) {
  const load = async (file) => {
    const name = file.name || "a pasted image";
    try {
      onImage({ ...(await readImage(file, side() || DEFAULT_SIDE)), name });
    } catch {
      onError(await complaint(file));
    }
  };
  input.addEventListener("change", () => {
    if (input.files[0]) load(input.files[0]);
    input.value = "";
  });
  document.addEventListener("paste", (event) => {
    const file = imageFile(event.clipboardData);
    // Spreadsheets and word processors copy a picture of the text along with it.
    const isText = event.target.closest?.(WRITABLE) && event.clipboardData?.types.includes("text/plain");
    if (!file || isText) return;
    event.preventDefault();
    load(file);
  });
  const mark = (dragging) => document.body.classList.toggle("dragging", dragging);
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    mark(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && mark(false));
  document.addEventListener("drop", (event) => {
    mark(false);
    const file = event.dataTransfer?.files[0];
    if (!file) return;
    event.preventDefault();
    load(file);
  });
}

function imageFile(data) {
  return [...(data?.files ?? [])].find((file) => file.type.startsWith("image/"));
}

/**
 * Returns {url, width, height, original}: the image of a file, upright, on white, scaled down to at most `side` pixels a side. The server
 * would scale a larger one down as far, so a photo's 12 megapixels are not uploaded, and masks are painted at the size that is sent.
 */
export async function readImage(file, side) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const size = { width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale)) };
  const original = scale < 1 ? [bitmap.width, bitmap.height] : undefined;
  const canvas = Object.assign(document.createElement("canvas"), size);
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, size.width, size.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, size.width, size.height);
  bitmap.close();
  return { url: canvas.toDataURL("image/png"), ...size, original };
}

async function complaint(file) {
  const name = file.name || "The pasted file";
  if (await isHeic(file)) return `${name} is a HEIC photo, which this browser cannot open. Save it as JPEG, then open that.`;
  return `${name} is not a readable image.`;
}

async function isHeic(file) {
  try {
    const text = new TextDecoder("latin1").decode(await file.slice(4, 12).arrayBuffer());
    return text.startsWith("ftyp") && HEIC_BRANDS.includes(text.slice(4));
  } catch {
    return false;
  }
}
