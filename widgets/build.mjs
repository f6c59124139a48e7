// Builds the bundles into ../qtx_lab/widgets/static, or into the folder that is named.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = process.argv[2] ?? join(here, "..", "qtx_lab", "widgets", "static");

/** A digest of what the bundle is made of, by which a machine without node can see whether it is current. */
function sources() {
  const names = readdirSync(join(here, "src")).filter((name) => !name.includes(".test."));
  const digest = createHash("sha256");
  for (const name of ["build.mjs", "package-lock.json", ...names.map((name) => `src/${name}`).sort()]) {
    digest.update(`${name}\n`).update(readFileSync(join(here, name)));
  }
  return digest.digest("hex");
}

const banner = `/* qtx_lab: made from widgets/src by \`npm run build\`; sources ${sources()} */`;
// The licence of d3 asks for its notice in every copy.
const licence = readFileSync(join(here, "node_modules", "d3-scale", "LICENSE"), "utf8").trim();
const notice = `/* Contains d3-scale, d3-array and the modules of d3 that they need.\n${licence} */`;

const bundles = [
  { name: "widgets", source: "src/index.ts", js: `${banner}\n${notice}` },
  // Of its own, because every tab of a workbench has one, and anywidget loads the script of each anew.
  { name: "status", source: "src/status.ts", js: banner },
  { name: "form", source: "src/form.ts", js: banner },
  { name: "page", source: "src/page.ts", js: `${banner}\n${notice}` },
];
for (const { name, source, js } of bundles) {
  await build({
    absWorkingDir: here,
    entryPoints: { [name]: source },
    outdir: out,
    bundle: true,
    minify: true,
    format: "esm",
    target: "es2022",
    charset: "utf8",
    legalComments: "none",
    define: { "define.amd": "false" },
    banner: { js, css: banner },
  });
}
