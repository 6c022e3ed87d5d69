// Vercel's AI SDK with its OpenAI provider and its provider for compatible servers.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import * as ai from "ai";
import { BASE, IMAGE, MODEL, check, checkPng, run } from "./calls.mjs";

const generateImage = ai.generateImage ?? ai.experimental_generateImage;
const openai = createOpenAI({ baseURL: BASE, apiKey: "none needed" });
const compatible = createOpenAICompatible({ name: "paellera", baseURL: BASE, apiKey: "none needed" });
const prompt = "a red ball";

await run({
  generate: async () => checkPng((await generateImage({ model: openai.image("dall-e-3"), prompt })).image.uint8Array),
  async several() {
    const { images } = await generateImage({ model: compatible.imageModel(MODEL), prompt, n: 2 });
    check(images.length === 2, images.length);
    return "openai-compatible";
  },
  async size() {
    const model = openai.image("gpt-image-1");
    return checkPng((await generateImage({ model, prompt, size: "1024x1024" })).image.uint8Array);
  },
  async edit() {
    const model = openai.image("gpt-image-1");
    const { image } = await generateImage({ model, prompt: { text: "a blue ball", images: [IMAGE] } });
    return checkPng(image.uint8Array);
  },
});
