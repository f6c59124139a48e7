// CircuitView: a row's circuit, the device's region, what was measured, and the zero-noise fit.
import { makePanel } from "./charts";
import { paintDistribution, paintFidelity, paintFit, type Counts, type Fit } from "./circuit_charts";
import { paintGates, type Drawing, type Needs } from "./circuit_gates";
import { levelControls, MAX_LEVEL, movedLevel } from "./circuit_levels";
import { paintQubits, type Region } from "./circuit_qubits";
import { Frame, h, onFrame, type Model } from "./dom";
import { whole } from "./scale";
import { SAMPLER_COLOURS } from "./theme";

/** Numbers of shots that are offered. */
const SHOTS = [128, 256, 512, 1024, 4096, 16384, 65536];

/** The circuit and the row that it loads. */
type Circuit = Drawing & { loader: string; device: string; noisy: boolean; exact: number[] };

export function render(model: Model, el: HTMLElement): () => void {
  const get = (name: string) => model.get(name);
  let circuit: Circuit | null = null;
  let device: (Needs & { region: Region | null }) | null = null;
  let counts: Counts | null = null;
  let fit: Fit | null = null;
  let levels: number[] = [...get("noise_levels")];
  let key: number | null = null;
  let measuring = false;
  let allGates = false;

  const frame = new Frame(model, el, "circuit", "Circuit of a row", () => paint());
  const colour = () => (frame.theme === "light" ? SAMPLER_COLOURS.systematic : frame.colours.accent);

  // --- controls ---------------------------------------------------------------------------------

  const row = h("select", { change: () => frame.set({ row: Number(row.value) }) });
  let listedNames = "";
  const shots = h("select", { change: () => frame.set({ shots: Number(shots.value) }) });
  const measure = () => frame.send(measuring ? { kind: "cancel" } : { kind: "run", shots: get("shots") });
  const measureButton = h("button", { type: "button", class: "qtx-primary", click: measure }, "Measure");
  const requestFit = onFrame(() => {
    if (circuit?.noisy) frame.send({ kind: "zne", levels, method: get("method"), key });
  });
  const setMethod = (method: string) => {
    frame.set({ method });
    requestFit();
  };
  const setLevels = (change: (levels: number[]) => number[]) => {
    levels = change(levels);
    frame.set({ noise_levels: levels });
    fitControls.list(levels);
    requestFit();
  };
  const moveLevel = (index: number, to: number, dropped: boolean) => {
    levels = movedLevel(levels, index, Math.min(MAX_LEVEL, to));
    if (dropped) frame.set({ noise_levels: levels });
    requestFit();
    paint();
    return levels[index];
  };
  const dragLevel = (index: number, to: number, dropped: boolean) => {
    moveLevel(index, to, dropped);
    if (dropped) fitControls.list(levels);
  };
  const fitControls = levelControls(get("methods"), setMethod, moveLevel, setLevels);

  // --- layout -----------------------------------------------------------------------------------

  const gates = makePanel("Circuit", "qtx-wide");
  const qubits = makePanel("Qubits in use", "");
  const distribution = makePanel("Distribution", "qtx-two");
  const fidelity = makePanel("Fidelity as shots arrive", "");
  const extrapolation = makePanel("Extrapolation to no noise", "qtx-two");
  const toggleGates = () => {
    allGates = !allGates;
    paint();
  };
  const moreGates = h("button", { type: "button", hidden: true, click: toggleGates });
  gates.box.append(moreGates);
  const heading = h("h2", {}, "Circuit of a row");
  const status = h("p", { class: "qtx-status", role: "status" });
  const empty = h(
    "p",
    { class: "qtx-note" },
    "No row is shown: select rows in a lens, or call show_rows(p).",
  );
  const controls = h(
    "div",
    { class: "qtx-controls" },
    h("label", { class: "qtx-row" }, "row", row),
    h("label", { class: "qtx-row qtx-shots" }, "shots", shots),
    measureButton,
    fitControls.element,
  );
  const boxes = [gates, distribution, fidelity, extrapolation, qubits].map((panel) => panel.box);
  const body = h("div", { class: "qtx-columns" }, controls, h("div", { class: "qtx-panels" }, ...boxes));
  frame.root.append(
    h("header", {}, heading, frame.exports()),
    empty,
    body,
    frame.error,
    h("p", { class: "qtx-honest" }, get("note")),
    status,
  );

  // --- painting ---------------------------------------------------------------------------------

  function showControls(): void {
    const names: string[] = get("names");
    if (listedNames !== names.join("\n")) {
      listedNames = names.join("\n");
      row.replaceChildren(...names.map((name, i) => h("option", { value: i }, name)));
    }
    row.value = String(get("row"));
    const options = [...new Set([...SHOTS, get("shots")])].sort((a, b) => a - b);
    if (shots.options.length !== options.length)
      shots.replaceChildren(...options.map((x) => h("option", { value: x }, whole(x))));
    shots.value = String(get("shots"));
    fitControls.method.value = get("method");
    measureButton.textContent = measuring ? "Cancel" : "Measure";
    body.hidden = circuit === null;
    empty.hidden = circuit !== null;
  }

  function showStatus(): void {
    const parts = [counts?.shots ? `${whole(counts.shots)} shots` : "no shots yet"];
    if (measuring) parts.unshift("measuring");
    if (counts?.not_modelled.length) parts.push(counts.not_modelled.join("; "));
    if (counts?.fallbacks.length) parts.push(counts.fallbacks.join(" "));
    status.textContent = parts.join(" · ");
    frame.root.dataset.shots = String(counts?.shots ?? 0);
    if (fit) frame.root.dataset.levels = fit.levels.join(" ");
  }

  const chooseKey = (chosen: number) => {
    key = chosen;
    requestFit();
  };

  const paint = onFrame(() => {
    if (!frame.hasRoom()) return;
    showControls();
    if (!circuit) return;
    const name: string = get("names")[get("row")] ?? "";
    heading.textContent = `${name.replace(/^./, (x) => x.toUpperCase())} on ${circuit.device}`;
    paintGates(gates, moreGates, circuit, device, allGates);
    const onKey = circuit.noisy ? chooseKey : null;
    paintDistribution(distribution, circuit.exact, counts, fit, colour(), onKey);
    paintFidelity(fidelity, counts?.curve ?? [], get("shots"), colour());
    extrapolation.box.hidden = fitControls.element.hidden = !circuit.noisy;
    if (circuit.noisy) paintFit(extrapolation, fit, levels, colour(), dragLevel);
    paintQubits(qubits, device?.region ?? null, circuit.device);
    showStatus();
  });

  // --- messages ---------------------------------------------------------------------------------

  function showCircuit(message: any): void {
    const anotherRow = JSON.stringify(circuit?.exact) !== JSON.stringify(message.exact);
    circuit = { ...message.drawing, ...message };
    if (anotherRow) {
      [device, fit, key] = [null, null, null];
      requestFit();
    }
    frame.fail(null);
  }

  frame.onMessage((message) => {
    if (message.kind === "circuit") showCircuit(message);
    else if (message.kind === "device") device = message;
    else if (message.kind === "counts") counts = message;
    else if (message.kind === "zne") {
      fit = message;
      frame.fail(null);
    } else if (message.kind === "running") measuring = true;
    else if (message.kind === "ended") measuring = false;
    else return;
    paint();
  });
  frame.onChange(["row", "names", "shots", "method"], paint);
  frame.onChange(["noise_levels"], () => {
    if (JSON.stringify(get("noise_levels")) === JSON.stringify(levels)) return;
    levels = [...get("noise_levels")];
    fitControls.list(levels);
    requestFit();
  });
  fitControls.list(levels);
  frame.send({ kind: "ready" });
  paint();
  return () => frame.end();
}
