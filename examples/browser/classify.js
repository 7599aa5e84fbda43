// The page: a photo -> a LiteRT model in this browser -> the most probable classes.

import { loadAndCompile, loadLiteRt, Tensor } from "@litertjs/core";
import { decode, fit, toInput } from "./images.js";

const TOP = 5;
const name = new URLSearchParams(location.search).get("model") ?? "model.tflite";
const $ = (id) => document.getElementById(id);

/** What the page shows now, for the test and the console: {logits, names, best}, or null. */
export let shown = null;

/** A file of the model folder: a Response, or null if there is none. */
async function fetchFile(file) {
  const response = await fetch(`model/${encodeURIComponent(file)}`);
  return response.ok ? response : null;
}

/** {preprocessing, names} from what lies beside the model, as `keras-vitnt predict` finds it. */
async function fetchRecord() {
  const own = await fetchFile(`${name}.json`);
  if (own) return own.json();
  const metrics = await fetchFile("metrics.json");
  if (!metrics) throw new Error(`There is neither ${name}.json nor metrics.json beside ${name}.`);
  const labels = await fetchFile("labels.txt");
  const names = labels && (await labels.text()).trimEnd().split(/\r?\n/);
  return { preprocessing: (await metrics.json()).preprocessing, names };
}

/** Everything that a photo needs: {model, input, preprocessing, names}; the model has run once. */
async function load() {
  const file = await fetchFile(name);
  if (!file) throw new Error(`There is no ${name} in the model folder.`);
  const { preprocessing, names } = await fetchRecord();
  await loadLiteRt("litert/core/wasm/");
  const bytes = new Uint8Array(await file.arrayBuffer());
  const model = await loadAndCompile(bytes, { accelerator: "wasm" }).catch(() => {
    throw new Error(`${name} is not a model that LiteRT can load.`);
  });
  const [input] = model.getInputDetails();
  const expected = [1, ...preprocessing.size, 3];
  if (`${input.shape}` !== `${expected}` || !["float32", "uint8"].includes(input.dtype)) {
    throw new Error(
      `${name} takes ${input.dtype} (${[...input.shape].join(", ")}); ` +
        `its record says (${expected.join(", ")}), float32 or uint8.`,
    );
  }
  const loaded = { model, input, preprocessing, names };
  const [height, width] = preprocessing.size;
  // In the first run XNNPACK packs the weights, which takes long; a photo shall not wait for it.
  const blank = new ImageData(width, height);
  const logits = await run(loaded, toInput(blank, preprocessing, input.dtype));
  $("model").textContent = `${name}: ${width} × ${height} pixels, ${logits.length} classes`;
  return loaded;
}

/** Run the model. Tensors live in WebAssembly's memory, which JavaScript does not clean up. */
async function run({ model, input }, values) {
  const tensor = new Tensor(values, input.shape);
  const outputs = await model.run([tensor]);
  const logits = outputs[0].toTypedArray().slice();
  for (const used of [tensor, ...outputs]) used.delete();
  return logits;
}

/** The most probable classes of `logits`: [{name, probability}]. */
function decodePredictions(logits, names) {
  const largest = Math.max(...logits);
  const shares = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = shares.reduce((a, b) => a + b);
  return shares
    .map((share, i) => ({ name: names?.[i] ?? `class ${i}`, probability: share / sum }))
    .sort((a, b) => b.probability - a.probability)
    .slice(0, TOP);
}

/** One line about how things stand; `state` tells the style sheet and the test. */
function say(state, line) {
  document.body.dataset.state = state;
  $("status").textContent = line;
}

function clear() {
  shown = null;
  $("classes").replaceChildren();
  URL.revokeObjectURL($("photo").src);
  $("photo").removeAttribute("src");
}

function show(file, image, best) {
  $("photo").src = URL.createObjectURL(file);
  $("photo").alt = file.name;
  Object.assign($("input"), { width: image.width, height: image.height });
  $("input").getContext("2d").putImageData(image, 0, 0);
  const rows = best.map(({ name, probability }) => {
    const row = $("class").content.cloneNode(true);
    row.querySelector(".name").textContent = name;
    row.querySelector(".bar").style.setProperty("--share", probability);
    row.querySelector(".percent").textContent = `${(100 * probability).toFixed(1)} %`;
    return row;
  });
  $("classes").replaceChildren(...rows);
}

let turn = 0; // of two photos in quick succession, only the later may be shown

async function classify(file) {
  const mine = ++turn;
  clear();
  say("busy", `Reading ${file.name} …`);
  try {
    const loaded = await loading;
    const decoded = await decode(file);
    const start = performance.now();
    const image = fit(decoded, loaded.preprocessing);
    const values = toInput(image, loaded.preprocessing, loaded.input.dtype);
    const middle = performance.now();
    const logits = await run(loaded, values);
    const end = performance.now();
    if (mine !== turn) return;
    const best = decodePredictions(logits, loaded.names);
    shown = { logits: [...logits], names: loaded.names, best };
    show(file, image, best);
    const times = [end - middle, middle - start].map((time) => time.toFixed(1));
    say("done", `${times[0]} ms for the model, ${times[1]} ms to resize the photo`);
  } catch (error) {
    if (mine === turn) say("error", error.message ?? `${error}`);
  }
}

const loading = load();
loading.then(
  () => turn === 0 && say("ready", "The model is ready."),
  (error) => say("error", error.message ?? `${error}`),
);

$("file").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  if (file) classify(file);
  target.value = ""; // so that the same photo can be chosen again
});
addEventListener("dragover", (event) => {
  event.preventDefault(); // or the browser would open the file
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const [file] = event.dataTransfer.files;
  if (file) classify(file);
});
