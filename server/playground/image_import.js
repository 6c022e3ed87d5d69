// Images dropped, pasted or opened, converted to PNGs no larger than the weights support.

/** onImage: called with {url, width, height, name}. onError: called with a message. side: maximum pixels a side. */
export function listenForImages({ input, onImage, onError, side }) {
  const load = async (file) => {
    try {
      onImage({ ...(await readImage(file, side())), name: file.name || "a pasted image" });
    } catch {
      onError(`${file.name || "The pasted file"} is not a readable image.`);
    }
  };
  input.addEventListener("change", () => {
    if (input.files[0]) load(input.files[0]);
    input.value = "";
  });
  document.addEventListener("paste", (event) => {
    const file = imageFile(event.clipboardData);
    if (!file) return;
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

/** Returns the image of a file, upright, on white, scaled down to at most `side` pixels a side. */
export async function readImage(file, side) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const size = { width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale)) };
  const canvas = Object.assign(document.createElement("canvas"), size);
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, size.width, size.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, size.width, size.height);
  bitmap.close();
  return { url: canvas.toDataURL("image/png"), ...size };
}
