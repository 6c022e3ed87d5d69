// axios with form-data, and the requests that LibreChat and SillyTavern make with it and with fetch.
import axios from "axios";
import FormData from "form-data";
import fetch from "node-fetch";
import { Readable } from "node:stream";
import { ADDRESS, BASE, IMAGE, MODEL, check, checkPng, run } from "./calls.mjs";

const prompt = "a red ball";
const decoded = ({ data }, index = 0) => checkPng(Buffer.from(data.data[index].b64_json, "base64"));
const generations = (fields) => axios.post(`${BASE}/images/generations`, { prompt, ...fields });

await run({
  async models() {
    const { data } = await axios.get(`${BASE}/models`);
    check(data.data.some(({ id }) => id === MODEL), data);
  },
  generate: async () => decoded(await generations({})),
  several: async () => decoded(await generations({ n: 2 }), 1),
  size: async () => decoded(await generations({ model: "gpt-image-1", size: "1536x1024", quality: "auto" })),
  async url() {
    // LibreChat's DALL·E 3 tool asks for no format and reads a URL.
    const fields = { model: "dall-e-3", quality: "standard", style: "vivid", size: "1024x1024", n: 1 };
    const { url } = (await generations(fields)).data.data[0];
    return checkPng((await axios.get(url, { responseType: "arraybuffer" })).data);
  },
  async edit() {
    // LibreChat's tool sends streams, whose length nobody knows.
    const form = new FormData();
    for (const [name, value] of Object.entries({ model: "gpt-image-1", prompt, quality: "auto", size: "auto" })) {
      form.append(name, value);
    }
    const stream = Readable.from([IMAGE.subarray(0, 20), IMAGE.subarray(20)]);
    form.append("image[]", stream, { filename: "image.png", contentType: "image/png" });
    const headers = { ...form.getHeaders(), Authorization: "Bearer none" };
    return decoded(await axios.post("/images/edits", form, { headers, baseURL: BASE }));
  },
  async sdapi() {
    const fields = { prompt, negative_prompt: "blur", cfg_scale: 4.5, steps: 22, width: 1024, height: 1024 };
    const { data } = await axios.post(`${ADDRESS}/sdapi/v1/txt2img`, fields);
    check(JSON.parse(data.info).infotexts[0].includes("Steps: "), data.info);
    // SillyTavern's server sends the scheme alone if there is no password.
    const options = { method: "POST", body: JSON.stringify({ ...fields, url: ADDRESS, auth: "" }) };
    const headers = { "Content-Type": "application/json", Authorization: "Basic " };
    const answer = await fetch(`${ADDRESS}/sdapi/v1/txt2img`, { ...options, headers });
    check(answer.ok, answer.status);
    return checkPng(Buffer.from((await answer.json()).images[0], "base64"));
  },
  async error() {
    const error = await generations({ n: 99 }).catch((error) => error);
    check(error.response?.status === 400 && error.response.data.error.param === "n", error);
  },
});
