// OpenAI's client for Node.js.
import OpenAI, { BadRequestError, toFile } from "openai";
import { BASE, IMAGE, MASK, MODEL, check, checkPng, run } from "./calls.mjs";

const client = new OpenAI({ baseURL: BASE, apiKey: "none needed", maxRetries: 0 });
const decoded = (answer, index = 0) => checkPng(Buffer.from(answer.data[index].b64_json, "base64"));
const file = (content, name) => toFile(content, name, { type: "image/png" });

await run({
  async models() {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    check(names.includes(MODEL), names);
  },
  generate: async () => decoded(await client.images.generate({ prompt: "a red ball" })),
  several: async () => decoded(await client.images.generate({ prompt: "a red ball", n: 2 }), 1),
  async size() {
    const answer = await client.images.generate({ model: "dall-e-3", prompt: "a red ball", size: "1024x1024" });
    return `1024x1024 → ${answer.size}`;
  },
  async url() {
    const answer = await client.images.generate({ prompt: "a red ball", response_format: "url" });
    return checkPng(await (await fetch(answer.data[0].url)).arrayBuffer());
  },
  edit: async () =>
    decoded(await client.images.edit({ image: await file(IMAGE, "image.png"), prompt: "a blue ball" })),
  mask: async () =>
    decoded(
      await client.images.edit({
        image: [await file(IMAGE, "image.png"), await file(IMAGE, "other.png")],
        mask: await file(MASK, "mask.png"),
        prompt: "a blue ball",
      }),
    ),
  async variation() {
    return decoded(await client.images.createVariation({ image: await file(IMAGE, "image.png") }));
  },
  async stream() {
    const events = await client.images.generate({ prompt: "show a red ball", stream: true, partial_images: 2 });
    const types = [];
    for await (const event of events) types.push(event.type);
    check(types.at(-1) === "image_generation.completed", types);
    return `${types.length - 1} previews`;
  },
  async error() {
    const refused = await client.images.generate({ prompt: "a red ball", n: 99 }).then(
      () => null,
      (error) => error,
    );
    check(refused instanceof BadRequestError && refused.param === "n", refused);
    return "BadRequestError";
  },
});
