// For the programs on Node.js: addresses, small images, and one line of JSON per call.
import { deflateSync, crc32 } from "node:zlib";

export const ADDRESS = process.env.CLIENT_TEST_URL;
export const MODEL = process.env.CLIENT_TEST_MODEL;
export const BASE = `${ADDRESS}/v1`;
const SIDE = 64;

function chunk(name, data) {
  const body = Buffer.concat([Buffer.from(name, "latin1"), data]);
  const result = Buffer.alloc(body.length + 8);
  result.writeUInt32BE(data.length, 0);
  body.copy(result, 4);
  result.writeUInt32BE(crc32(body), body.length + 4);
  return result;
}

function png(hole) {
  const rows = Buffer.alloc(SIDE * (1 + 4 * SIDE));
  const inside = (v) => hole && v >= SIDE / 4 && v < (3 * SIDE) / 4;
  for (let y = 0; y < SIDE; y++) {
    for (let x = 0; x < SIDE; x++) {
      rows.set([220, 40, 30, inside(x) && inside(y) ? 0 : 255], y * (1 + 4 * SIDE) + 1 + 4 * x);
    }
  }
  const header = Buffer.alloc(13);
  header.writeUInt32BE(SIDE, 0);
  header.writeUInt32BE(SIDE, 4);
  header.set([8, 6, 0, 0, 0], 8);
  const chunks = [chunk("IHDR", header), chunk("IDAT", deflateSync(rows)), chunk("IEND", Buffer.alloc(0))];
  return Buffer.concat([Buffer.from([0x89, 0x50, 0x4e, 0x47, 13, 10, 26, 10]), ...chunks]);
}

export const IMAGE = png(false);
export const MASK = png(true);

export function check(condition, what) {
  if (!condition) throw new Error(`check failed: ${what}`);
}

export function checkPng(content) {
  const buffer = Buffer.from(content);
  check(buffer.subarray(1, 4).toString("latin1") === "PNG", buffer.subarray(0, 16).toString("hex"));
  return `${buffer.readUInt32BE(16)}x${buffer.readUInt32BE(20)}`;
}

export async function run(calls) {
  for (const [call, make] of Object.entries(calls)) {
    try {
      console.log(JSON.stringify({ call, ok: true, note: String((await make()) ?? "") }));
    } catch (error) {
      console.log(JSON.stringify({ call, ok: false, note: `${error.name}: ${error.message}`.slice(0, 300) }));
    }
  }
}
