// Builds the page: `node build.mjs [FOLDER]`, by default the folder that ships with the package.
// The digest of the sources stands at the top of app.js, so that a test without node sees a build that is out of date.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { build } from "esbuild";

const here = import.meta.dirname;
const outdir = process.argv[2] ?? join(here, "../page");

const sources = readdirSync(join(here, "src")).map((name) => `src/${name}`);
const digest = createHash("sha256");
for (const name of [...sources, "build.mjs", "package-lock.json"].sort()) {
  digest.update(`${name}\0`).update(readFileSync(join(here, name))).update("\0");
}

await build({
  absWorkingDir: here,
  entryPoints: ["src/app.tsx", "src/app.css", "src/index.html", "src/icon.svg"],
  outdir,
  bundle: true,
  minify: true,
  target: "es2022",
  charset: "utf8",
  loader: { ".html": "copy", ".svg": "copy" },
  banner: { js: `/* sources sha256:${digest.digest("hex")} */` },
  legalComments: "none",
  logLevel: "warning",
});
