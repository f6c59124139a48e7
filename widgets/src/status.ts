// The line at the bottom of a tab of the workbench: state, progress, cost, where it is saved, and its code.
import type { AnyWidget } from "@anywidget/types";
import { download, h, post, unique, type Model } from "./dom";

/** What the line says; see `StatusLine` in Python. */
interface Line {
  state: string;
  fraction: number | null;
  label: string;
  cost: string;
  saved: string;
  /** The name of the run that holds what is shown; "" where there is none. */
  run: string;
  place: string;
  problem: boolean;
  /** Whether there is something to report. */
  report: boolean;
}
interface Message {
  kind: string;
  as: string;
  name: string;
  type: string;
  text: string;
}
/** The path of the dashboard under JupyterLab's address; see `NAME` of proxy.py. */
const DASHBOARD = "qtx-lab";

/** The page of a run in the dashboard that JupyterLab offers; null elsewhere. */
function runPage(run: string): string | null {
  const config = document.getElementById("jupyter-config-data")?.textContent;
  const base = config ? (JSON.parse(config) as { baseUrl?: string }).baseUrl : undefined;
  return base === undefined ? null : `${base}${DASHBOARD}/?view=Run&run=${encodeURIComponent(run)}`;
}
const NAMES: Record<string, string> = { python: "Copy as Python", command: "Copy as command" };
/** Milliseconds for which a button says that the code was copied. */
const SAID_MS = 2000;
/** Lines of the copied text that are shown at once, so that it does not cover the picture. */
const MAX_CODE_LINES = 9;

function render(model: Model, el: HTMLElement): () => void {
  const state = h("span", { class: "qtx-wb-state", role: "status" });
  const meter = h("progress", { max: 1 });
  const cost = h("span", { class: "qtx-wb-cost" });
  const saved = h("span", { class: "qtx-wb-run" });
  const report = h(
    "button",
    { type: "button", title: "A page that needs no kernel and no network" },
    "Report",
  );
  const buttons = h("span", { class: "qtx-wb-copy" });
  const codeId = unique("code");
  const title = h("span", { class: "qtx-wb-code-title" });
  const close = h("button", { type: "button", click: () => (panel.hidden = true) }, "Close");
  const code = h("textarea", { id: codeId, readonly: true, rows: 6, spellcheck: "false" });
  const panel = h(
    "div",
    { class: "qtx-wb-code", hidden: true },
    h("label", { for: codeId }, title),
    close,
    code,
  );
  const bar = h("div", { class: "qtx-wb-bar" }, state, meter, cost, saved, buttons);
  el.append(bar, panel);

  let asked: HTMLButtonElement | null = null;
  function draw(): void {
    const line = model.get("line") as Line;
    if (state.textContent !== line.state) state.textContent = line.state;
    meter.hidden = line.fraction === null;
    meter.value = line.fraction ?? 0;
    meter.setAttribute("aria-label", line.label);
    cost.textContent = line.cost;
    const page = line.run ? runPage(line.run) : null;
    const run = page ? h("a", { href: page, target: "_blank", rel: "noopener" }, line.run) : line.run;
    if (saved.dataset.shown !== `${line.saved} ${line.run}`) saved.replaceChildren(`${line.saved} `, run);
    saved.dataset.shown = `${line.saved} ${line.run}`;
    report.disabled = !line.report;
    saved.title = line.place;
    saved.classList.toggle("qtx-wb-trouble", line.problem);
  }
  function drawButtons(): void {
    const kinds = model.get("codes") as string[];
    const made = kinds.map((kind) => {
      const button = h("button", { type: "button" }, NAMES[kind] ?? kind);
      button.addEventListener("click", () => {
        asked = button;
        post(model, { kind: "code", as: kind });
      });
      return button;
    });
    buttons.replaceChildren(...(model.get("reports") ? [report] : []), ...made);
  }
  let waiting = false;
  report.addEventListener("click", () => {
    waiting = true;
    report.textContent = "Writing…";
    post(model, { kind: "report" });
  });
  function takeReport(message: Message, buffers: DataView[]): void {
    if (!waiting) return; // another view of this line has asked
    waiting = false;
    report.textContent = "Report";
    if (message.kind === "file") download(message.name, message.type, buffers[0]!);
    title.textContent = message.kind === "file" ? "Downloaded, and saved at" : "There is no report:";
    code.value = message.text;
    code.rows = 2;
    panel.hidden = false;
  }
  async function take(message: Message, buffers: DataView[]): Promise<void> {
    if (message.kind === "file" || message.kind === "problem") takeReport(message, buffers);
    if (message.kind !== "code" || asked === null) return; // another view of this line has asked
    const button = asked;
    asked = null;
    code.value = message.text;
    code.rows = Math.min(MAX_CODE_LINES, message.text.split("\n").length + 1);
    panel.hidden = false;
    let copied = true;
    try {
      await navigator.clipboard.writeText(message.text);
    } catch {
      // Pages that were not served securely have no clipboard: then the text is selected.
      code.focus({ preventScroll: true });
      code.select();
      copied = document.execCommand("copy");
    }
    title.textContent = copied ? "Copied. It gives the numbers of the picture above:" : "Copy this text:";
    button.textContent = copied ? "Copied" : (NAMES[message.as] ?? message.as);
    setTimeout(() => (button.textContent = NAMES[message.as] ?? message.as), SAID_MS);
  }
  model.on("change:line", draw);
  model.on("change:codes", drawButtons);
  model.on("msg:custom", take);
  draw();
  drawButtons();
  return () => {
    model.off("change:line", draw);
    model.off("change:codes", drawButtons);
    model.off("msg:custom", take);
  };
}

const widget: AnyWidget = { render: ({ model, el }) => render(model, el) };
export default widget;
