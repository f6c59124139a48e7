// JobTable: jobs on devices and runs, to refresh, cancel and open.
import { Frame, h, unique, type Model } from "./dom";

export interface Job {
  tag: string;
  run: string;
  device: string;
  state: string;
  ended: boolean;
  reason: string;
  rows: number;
  shots: number;
  recorded: string;
}
export interface RunRow {
  run: string;
  name: string;
  status: string;
  started: string;
  seconds: string;
}

/** The rows that hold every one of some words, and have a state; "" stands for any state. */
export function matching<T extends object>(
  rows: T[],
  words: string,
  state: string,
  of: (row: T) => string,
): T[] {
  const parts = words.toLowerCase().split(/\s+/).filter(Boolean);
  return rows.filter((row) => {
    const text = Object.values(row).join(" ").toLowerCase();
    return (state === "" || of(row) === state) && parts.every((word) => text.includes(word));
  });
}

export function render(model: Model, el: HTMLElement): () => void {
  let jobs: Job[] | null = null;
  let runs: RunRow[] = [];
  let shown: "jobs" | "runs" = "jobs";
  let chosen = false; // until then the list that is not empty is shown
  let confirming: string | null = null; // the tag of a job that is about to be cancelled
  let busy = false;

  const frame = new Frame(model, el, "jobs", "Jobs and runs", () => undefined);
  const refresh = h("button", { type: "button", class: "qtx-primary", click: () => list(true) }, "Refresh");
  const words = h("input", {
    type: "text",
    placeholder: "filter",
    "aria-label": "filter",
    input: () => paint(),
  });
  const state = h("select", { "aria-label": "state", change: () => paint() });
  const name = unique("what");
  const tab = (value: "jobs" | "runs", text: string) => {
    const count = h("span", {}, text);
    const input = h("input", {
      type: "radio",
      name,
      value,
      checked: value === shown,
      change: () => {
        [shown, chosen] = [value, true];
        state.value = "";
        paint();
      },
    });
    return { count, input, element: h("label", {}, input, count) };
  };
  const tabs = { jobs: tab("jobs", "Jobs"), runs: tab("runs", "Runs") };
  const table = h("div", { class: "qtx-table", tabindex: 0, role: "region", "aria-label": "list" });
  const details = h("details", { hidden: true });
  const notes = h("ul", { class: "qtx-note" });
  const status = h("p", { class: "qtx-status", role: "status" }, "reading the folder …");
  frame.root.append(
    h("header", {}, h("h2", {}, "Jobs and runs"), frame.exports()),
    h(
      "div",
      { class: "qtx-buttons" },
      refresh,
      h(
        "span",
        { class: "qtx-modes", role: "radiogroup", "aria-label": "what is listed" },
        tabs.jobs.element,
        tabs.runs.element,
      ),
      state,
      words,
    ),
    frame.error,
    table,
    details,
    notes,
    status,
  );

  function list(ask: boolean): void {
    frame.fail(null);
    if (!frame.send({ kind: "list", ask })) return;
    busy = true;
    frame.root.toggleAttribute("data-waiting", true);
    refresh.disabled = true;
    if (ask) status.textContent = "asking where the jobs are …";
  }

  function button(text: string, label: string, click: () => void, disabled = false): HTMLElement {
    return h("button", { type: "button", "aria-label": label, disabled, click }, text);
  }

  function cancelButton(job: Job): HTMLElement {
    if (job.ended) return h("span", {});
    const second = confirming === job.tag;
    const act = () => {
      if (!second) {
        confirming = job.tag;
        paint();
        table.querySelector<HTMLElement>("[data-sure]")?.focus();
        return;
      }
      confirming = null;
      busy = frame.send({ kind: "cancel", tag: job.tag });
      if (busy) status.textContent = `cancelling ${job.tag} …`;
      paint();
    };
    const cancel = button(
      second ? "Cancel it?" : "Cancel",
      `${second ? "really " : ""}cancel ${job.tag}`,
      act,
      busy,
    );
    if (second) {
      cancel.dataset.sure = "";
      cancel.addEventListener("blur", () => {
        confirming = null;
        paint();
      });
    }
    return cancel;
  }

  const mark = (text: string, reason = "") =>
    h("span", { class: `qtx-state qtx-state-${text}`, title: reason }, text);

  function paint(): void {
    if (jobs === null) return;
    tabs.jobs.count.textContent = `Jobs (${jobs.length})`;
    tabs.runs.count.textContent = `Runs (${runs.length})`;
    const of: string[] = shown === "jobs" ? jobs.map((job) => job.state) : runs.map((run) => run.status);
    const states = ["", ...new Set([...of, state.value].filter(Boolean))];
    const shownState = state.value;
    state.replaceChildren(...states.map((x) => h("option", { value: x }, x || "any state")));
    state.value = shownState;
    const rows: HTMLElement[] =
      shown === "jobs"
        ? matching(jobs, words.value, shownState, (job) => job.state).map((job) =>
            h(
              "tr",
              {},
              h("th", { scope: "row" }, job.tag),
              h("td", {}, job.run),
              h("td", { class: "qtx-device" }, job.device),
              h("td", {}, mark(job.state, job.reason)),
              h("td", {}, `${job.rows} × ${job.shots}`),
              h("td", { class: "qtx-time" }, job.recorded),
              h(
                "td",
                { class: "qtx-acts" },
                button("Open", `open ${job.tag}`, () => frame.send({ kind: "open", tag: job.tag })),
                cancelButton(job),
              ),
            ),
          )
        : matching(runs, words.value, shownState, (run) => run.status).map((run) =>
            h(
              "tr",
              {},
              h("th", { scope: "row" }, run.run),
              h("td", {}, run.name),
              h("td", {}, mark(run.status)),
              h("td", { class: "qtx-time" }, run.started),
              h("td", {}, run.seconds),
              h(
                "td",
                { class: "qtx-acts" },
                button("Open", `open ${run.run}`, () => frame.send({ kind: "open", run: run.run })),
              ),
            ),
          );
    const heads =
      shown === "jobs"
        ? ["tag", "run", "device", "state", "rows × shots", "recorded (UTC)"]
        : ["run", "name", "status", "started (UTC)", "seconds"];
    const none =
      shown === "jobs"
        ? 'No jobs on devices yet: QiskitQuantumBackend("ibm", …).submit_rows(p) records one. Twins need none.'
        : "No runs yet: `qtx-lab demo` makes one.";
    const top = table.scrollTop;
    if (rows.length) {
      const acts = h("th", { scope: "col" }, h("span", { class: "qtx-hidden" }, "what can be done"));
      const head = h("thead", {}, h("tr", {}, ...heads.map((x) => h("th", { scope: "col" }, x)), acts));
      table.replaceChildren(h("table", {}, head, h("tbody", {}, ...rows)));
      table.scrollTop = top;
    } else {
      const all = shown === "jobs" ? jobs.length : runs.length;
      table.replaceChildren(h("p", { class: "qtx-note" }, all ? "None matches the filter." : none));
    }
  }

  frame.onMessage((message) => {
    if (message.kind === "table") {
      [jobs, runs, busy, confirming] = [message.jobs, message.runs, false, null];
      if (!chosen) shown = message.jobs.length || !message.runs.length ? "jobs" : "runs";
      tabs[shown].input.checked = true;
      refresh.disabled = false;
      frame.root.toggleAttribute("data-waiting", false);
      notes.replaceChildren(...message.problems.map((text: string) => h("li", {}, text)));
      const source = message.from_servers ? "as the servers say now" : "as last known";
      status.textContent = `${model.get("home")} · states ${source}`;
      paint();
    } else if (message.kind === "details") {
      details.hidden = false;
      details.open = true;
      details.replaceChildren(
        h("summary", {}, message.name),
        h("p", { class: "qtx-note" }, message.path),
        h("pre", { tabindex: 0 }, message.text),
      );
    } else if (message.kind === "error") {
      busy = false;
      refresh.disabled = false;
      paint();
    }
  });
  list(false);
  return () => frame.end();
}
