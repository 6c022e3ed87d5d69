// A request as a command line and as Python. Images become files, named like the page's downloads.

const RESULTS = { json: "answer.json", gif: "frames.gif", png: "result.png" };

/** request: {operation, fields, files}; files: file names by image field. address: of the endpoint. */
export function curl({ operation, fields, files }, address, keyed) {
  const key = keyed ? [`-H "Authorization: Bearer $PAELLERA_CLIENT_KEY"`] : [];
  const parts = Object.keys(files).length ? formParts(fields, files) : [`-H 'Content-Type: application/json'`, `-d ${quoted(JSON.stringify(fields))}`];
  return [`curl -sS --fail-with-body ${address}`, ...key, ...parts, `-o ${output(operation, fields)}`].join(" \\\n  ");
}

function formParts(fields, files) {
  const texts = Object.entries(fields).map(([name, value]) => `--form-string ${quoted(`${name}=${plain(value)}`)}`);
  const images = Object.entries(files).map(([name, file]) => `-F ${quoted(`${name}=@${file}`)}`);
  return [...images, ...texts];
}

/** Quotes for a POSIX shell. */
function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

function plain(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

export function python({ operation, fields, files }, address, keyed) {
  const named = Object.keys(files).length > 0;
  const sent = named ? Object.fromEntries(Object.entries(fields).map(([name, value]) => [name, plain(value)])) : fields;
  const opened = Object.entries(files).map(([name, file]) => `    ${literal(name)}: Path(${literal(file)}).open("rb"),`);
  return [
    ...(keyed ? ["import os"] : []),
    "from pathlib import Path",
    "",
    "import httpx",
    "",
    `fields = ${dictionary(sent)}`,
    ...(named ? ["files = {", ...opened, "}"] : []),
    ...(keyed ? [`headers = {"Authorization": f"Bearer {os.environ['PAELLERA_CLIENT_KEY']}"}`] : []),
    `answer = httpx.post(${[literal(String(address)), named ? "data=fields, files=files" : "json=fields", ...(keyed ? ["headers=headers"] : []), "timeout=60"].join(", ")})`,
    "answer.raise_for_status()",
    `Path(${literal(output(operation, fields))}).write_bytes(answer.content)`,
  ].join("\n");
}

function output(operation, { n = 1, response_format }) {
  return RESULTS[response_format ?? (n > 1 ? "json" : "png")];
}

function dictionary(fields) {
  return ["{", ...Object.entries(fields).map(([name, value]) => `    ${literal(name)}: ${literal(value)},`), "}"].join("\n");
}

/** Returns a JSON value as a Python literal. */
function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "object") return `{${Object.entries(value).map(([name, inner]) => `${literal(name)}: ${literal(inner)}`).join(", ")}}`;
  return JSON.stringify(value);
}
