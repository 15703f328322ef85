// An exported model in transformers.js, in Node.
//
//     npm install --ignore-scripts --prefix examples/onnx
//     node examples/onnx/transformers_js.mjs exports/quickstart "If the argument is" "The file"
//
// DTYPE=q8 takes the graph in 8 bits, DTYPE=fp16 that in half precision, where there are such.

import path from "node:path";
import { env, pipeline } from "@huggingface/transformers";

const [folder, ...prompts] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder));

const generator = await pipeline("text-generation", path.basename(path.resolve(folder)), {
  dtype: process.env.DTYPE ?? "fp32",
  device: "cpu",
});
for (const prompt of prompts.length ? prompts : ["Once upon a time"]) {
  const [{ generated_text: text }] = await generator(prompt, { max_new_tokens: 40, do_sample: false });
  console.log(JSON.stringify(text));
}
