// node serve.js [MODEL_FOLDER]: the page, LiteRT.js and the model folder, to this machine only.

import { readFile, realpath, stat } from "node:fs/promises";
import { createServer } from "node:http";
import { dirname, extname, resolve, sep } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const PAGE = {
  "/": "index.html",
  "/style.css": "style.css",
  "/classify.js": "classify.js",
  "/images.js": "images.js",
};

const BYTES = "application/octet-stream";
const TYPES = {
  ".css": "text/css",
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".json": "application/json",
  ".txt": "text/plain",
  ".wasm": "application/wasm", // the browser compiles only this type while it loads
};

/** A URL's path -> a file's path, or null for what is not served. */
function locate(path, folders) {
  if (Object.hasOwn(PAGE, path)) return resolve(here, PAGE[path]);
  for (const [prefix, folder] of Object.entries(folders)) {
    if (!path.startsWith(prefix)) continue;
    const file = resolve(folder, path.slice(prefix.length));
    if (file.startsWith(folder + sep)) return file; // not ../, nor an absolute path
  }
  return null;
}

// The photo cannot leave: the page may talk to this server only, which takes nothing.
const POLICY =
  "default-src 'self' 'unsafe-inline' 'wasm-unsafe-eval'; img-src 'self' blob: data:";

/** Serve on 127.0.0.1 (port 0: any free one); resolves to the server. */
export async function serve(modelFolder, port = 0) {
  const folders = {
    "/model/": resolve(modelFolder),
    "/litert/": resolve(here, "node_modules/@litertjs"),
  };
  const server = createServer(async (request, response) => {
    try {
      const path = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
      const body = await readFile(locate(path, folders));
      response.writeHead(200, {
        "Content-Type": TYPES[extname(path)] ?? (path === "/" ? TYPES[".html"] : BYTES),
        "Content-Security-Policy": POLICY,
        "Cache-Control": "no-cache",
      });
      response.end(body);
    } catch {
      // not ours, not there, a folder, or no path at all
      response.writeHead(404, { "Content-Type": TYPES[".txt"] }).end("Not found\n");
    }
  });
  await new Promise((done, failed) => {
    server.once("error", failed).listen(port, "127.0.0.1", done);
  });
  return server;
}

if (process.argv[1] && (await realpath(process.argv[1])) === fileURLToPath(import.meta.url)) {
  const folder = process.argv[2] ?? resolve(here, "../../saved_models/signs");
  const port = Number(process.env.PORT ?? 8000);
  try {
    const found = await stat(folder).catch(() => null);
    if (!found?.isDirectory()) throw new Error(`There is no folder ${folder}.`);
    await serve(folder, port);
    console.log(`http://127.0.0.1:${port} shows ${folder}; Ctrl-C ends it.`);
  } catch (error) {
    console.error(error.code === "EADDRINUSE" ? `Port ${port} is taken; set PORT.` : error.message);
    process.exitCode = 1;
  }
}
