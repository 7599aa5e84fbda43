// npm test: the page in headless Chromium against Keras.
//
// CHROMIUM and PYTHON name the programs; SCREENSHOT=page.png also takes a picture.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { copyFile, mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { request } from "node:http";
import { tmpdir } from "node:os";
import { basename, join, resolve } from "node:path";
import { after, before, test } from "node:test";
import { promisify } from "node:util";

import { chromium } from "playwright-core";
import { serve } from "./serve.js";

const here = import.meta.dirname;
const signs = resolve(here, "../../saved_models/signs");
const hand = resolve(here, "../hand.jpg");
const FLAGS = [
  "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
];

let folder, browser, reference;
const servers = [];

/** The address of a server on `models`. */
async function address(models) {
  const server = await serve(models);
  servers.push(server);
  return `http://127.0.0.1:${server.address().port}/`;
}

/** A new page that has left the state "loading"; a problem of any script fails the test. */
async function open(models, query = "") {
  const page = await browser.newPage({ viewport: { width: 720, height: 900 } });
  page.on("pageerror", (error) => assert.fail(`the page: ${error}`));
  await page.goto((await address(models)) + query);
  await page.waitForSelector("body:not([data-state=loading])");
  return page;
}

/** Choose `photo` by the file input; what the page then shows. */
async function choose(page, photo) {
  await page.setInputFiles("#file", photo);
  await page.waitForSelector("body[data-state=done], body[data-state=error]");
  return page.evaluate(async () => ({
    ...(await import("/classify.js")).shown,
    state: document.body.dataset.state,
    status: document.getElementById("status").textContent,
    rows: [...document.querySelectorAll("#classes li")].map((row) => row.innerText.split(/\s+/)),
  }));
}

const argmax = (values) => values.indexOf(Math.max(...values));

/** The largest difference of a logit from Keras over all photos; asserts the same top-1. */
async function compare(page) {
  let largest = 0;
  for (const [photo, logits] of Object.entries(reference)) {
    const found = await choose(page, photo);
    const difference = Math.max(...logits.map((logit, i) => Math.abs(logit - found.logits[i])));
    console.log(`${basename(photo).padEnd(20)} ${difference.toExponential(1)}  ${found.status}`);
    assert.equal(found.state, "done");
    assert.equal(argmax(found.logits), argmax(logits), photo);
    assert.equal(found.best[0].name, found.names[argmax(logits)]);
    largest = Math.max(largest, difference);
  }
  return largest;
}

before(async () => {
  folder = await mkdtemp(join(tmpdir(), "browser-"));
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: FLAGS, // the profile is a new, empty one at every launch
  });
  const command = [join(here, "reference.py"), signs, folder, hand];
  const { stdout } = await promisify(execFile)(process.env.PYTHON ?? "python", command);
  reference = JSON.parse(stdout);
});

after(async () => {
  await browser?.close();
  for (const server of servers) server.close();
  await rm(folder, { recursive: true });
});

test("model.tflite gives Keras' logits", async () => {
  const page = await open(signs);
  assert.ok((await compare(page)) < 1e-3);
  const { rows } = await choose(page, hand);
  assert.equal(rows.length, 5);
  const parts = reference[hand].map(Math.exp);
  const percent = (100 * Math.max(...parts)) / parts.reduce((sum, part) => sum + part);
  assert.deepEqual(rows[0], ["5", percent.toFixed(1), "%"]);
  if (process.env.SCREENSHOT) await page.screenshot({ path: process.env.SCREENSHOT });
});

test("model_int8.tflite gives Keras' classes", async () => {
  const page = await open(signs, "?model=model_int8.tflite");
  assert.ok((await compare(page)) < 0.5);
});

test("a file that takes pixels gives Keras' logits", async () => {
  const page = await open(join(folder, "uint8"));
  assert.ok((await compare(page)) < 1e-3);
});

test("a file that is no image gives one line, and no stale result", async () => {
  const page = await open(signs);
  assert.equal((await choose(page, hand)).state, "done");
  const text = join(folder, "photo.jpg");
  await writeFile(text, "not a photo");
  const found = await choose(page, text);
  assert.equal(found.state, "error");
  assert.equal(found.status, "photo.jpg is not an image that this browser can read.");
  assert.deepEqual([found.rows, found.logits], [[], undefined]);
  assert.equal(await page.locator("#photo").isVisible(), false);
  assert.equal((await choose(page, hand)).state, "done"); // and the page still works
});

test("a missing or damaged model gives one line", async () => {
  const models = join(folder, "models");
  await mkdir(models);
  const status = async (query) => (await open(models, query)).locator("#status").textContent();
  assert.equal(await status(), "There is no model.tflite in the model folder.");
  await writeFile(join(models, "model.tflite"), "no model");
  assert.match(await status(), /^There is neither model.tflite.json nor metrics.json/);
  await copyFile(join(signs, "metrics.json"), join(models, "metrics.json"));
  assert.equal(await status(), "model.tflite is not a model that LiteRT can load.");
});

test("a converted model's own record comes first", async () => {
  const models = join(folder, "converted");
  await mkdir(models);
  await copyFile(join(signs, "model.tflite"), join(models, "model.tflite"));
  const { preprocessing } = JSON.parse(await readFile(join(signs, "metrics.json")));
  const names = [..."0123456789"].map((digit) => `a hand that signs ${digit}`);
  const record = (found) => writeFile(join(models, "model.tflite.json"), JSON.stringify(found));
  await record({ preprocessing, names });
  const { best } = await choose(await open(models), hand);
  assert.equal(best[0].name, "a hand that signs 5");
  await record({ preprocessing: { ...preprocessing, size: [48, 64] }, names });
  const status = await (await open(models)).locator("#status").textContent();
  assert.match(status, /takes float32 \(1, 32, 32, 3\); its record says \(1, 48, 64, 3\)/);
});

test("the server stays inside its folders", async () => {
  const url = new URL(await address(signs));
  const outside = ["/serve.js", "/model/../serve.js", "/litert/..%2f..%2fserve.js"];
  outside.push("/model/..%2f..%2fREADME.md", "/model/%2fetc%2fpasswd"); // both exist
  for (const path of [...outside, "/model/", "/model/a%00b", "/%"]) {
    const response = await new Promise((done) => {
      request({ port: url.port, host: url.hostname, path }, done).end();
    });
    response.resume();
    assert.equal(response.statusCode, 404, path);
  }
});
