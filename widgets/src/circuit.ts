// CircuitView: a row's circuit, the device's region, what was measured, and the zero-noise fit.
import { makePanel, Z95 } from "./charts";
import {
  paintDistribution,
  paintFidelity,
  paintFit,
  reweighted,
  type Counts,
  type Fit,
} from "./circuit_charts";
import { gateFacts, paintGates, type Drawing, type GateErrors, type Needs, type Role } from "./circuit_gates";
import { levelControls, MAX_LEVEL, movedLevel } from "./circuit_levels";
import { paintQubits, type Region } from "./circuit_qubits";
import { Frame, h, onFrame, type Model } from "./dom";
import { label, whole, withError } from "./scale";
import { SAMPLER_COLOURS } from "./theme";

/** Numbers of shots that are offered. */
const SHOTS = [128, 256, 512, 1024, 4096, 16384, 65536];

/** The circuit and the row that it loads. */
type Circuit = Drawing & {
  loader: string;
  device: string;
  /** Whether its noise can be scaled. */
  noisy: boolean;
  /** Whether a changed row or noise is measured at once. */
  live: boolean;
  exact: number[];
  angles: number[];
  roles: Role[];
};

/** The largest noise level of the slider. */
const MAX_NOISE = 5;

export function render(model: Model, el: HTMLElement): () => void {
  const get = (name: string) => model.get(name);
  let circuit: Circuit | null = null;
  let device: (Needs & { region: Region | null; errors: GateErrors | null }) | null = null;
  let counts: Counts | null = null;
  let fit: Fit | null = null;
  let levels: number[] = [...get("noise_levels")];
  let key: number | null = null;
  let measuring = false;
  let allGates = false;
  let original: number[] = [];
  let gate: number | null = null;
  let activeKey = 0;
  let frozenTop: number | null = null;

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

  const noise = h("input", {
    type: "range",
    min: 0,
    max: MAX_NOISE,
    step: 0.05,
    "aria-label": "noise level of the device",
    input: () => {
      noiseValue.textContent = `× ${label(Number(noise.value))}`;
      sendNoise();
    },
  });
  const noiseValue = h("output", {}, "");
  const sendNoise = onFrame(() => frame.set({ noise_scale: Number(noise.value) }));
  const noiseRow = h("label", { class: "qtx-row qtx-noise" }, "noise", noise, noiseValue);
  const resetButton = h(
    "button",
    { type: "button", hidden: true, click: () => frame.send({ kind: "reset" }) },
    "Reset the row",
  );

  // An edited row is drawn at once, and sent with the next frame.
  const sendWeights = onFrame(() => {
    if (circuit) frame.send({ kind: "edit", weights: circuit.exact });
  });
  const setWeight = (changed: number, weight: number, dropped: boolean) => {
    if (!circuit) return;
    frozenTop = dropped ? null : (frozenTop ?? Math.max(...circuit.exact) * 1.3);
    circuit.exact = reweighted(circuit.exact, changed, weight);
    activeKey = changed;
    [fit, counts] = [null, counts && { ...counts, shots: 0, counts: [], classical: [], curve: [] }];
    sendWeights();
    paint();
  };
  const setActive = (chosen: number) => {
    activeKey = chosen;
    distribution.svg.querySelector<SVGElement>(`[data-key="${chosen}"]`)?.focus();
    paint();
  };

  // --- layout -----------------------------------------------------------------------------------

  const gates = makePanel("", "qtx-wide");
  const qubits = makePanel("Qubits in use", "qtx-qubits");
  const distribution = makePanel("Distribution", "qtx-two");
  const fidelity = makePanel("Hellinger fidelity as shots arrive", "qtx-shots-strip");
  const extrapolation = makePanel("Extrapolation to no noise", "qtx-two");
  const toggleGates = () => {
    allGates = !allGates;
    paint();
  };
  const moreGates = h("button", { type: "button", hidden: true, click: toggleGates });
  const facts = h("ul", { class: "qtx-gate-facts" });
  gates.box.append(moreGates, h("div", { role: "status" }, facts));
  const summary = h("summary", {}, "Circuit");
  const folded = h("details", { class: "qtx-wide", open: true, toggle: () => paint() }, summary, gates.box);
  const fitBox = h("div", { class: "qtx-fit" }, fitControls.element);
  const heading = h("h2", {}, "Circuit of a row");
  const detail = h("p", { class: "qtx-detail" });
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
    noiseRow,
    resetButton,
  );
  const boxes = [distribution.box, qubits.box, fidelity.box, folded, extrapolation.box, fitBox];
  const body = h("div", { class: "qtx-stacked" }, controls, h("div", { class: "qtx-panels" }, ...boxes));
  frame.root.append(
    h("header", {}, heading, frame.exports()),
    detail,
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
    noiseRow.hidden = !circuit?.noisy;
    resetButton.hidden = !get("edited");
    if (document.activeElement !== noise) noise.value = String(get("noise_scale"));
    noiseValue.textContent = `× ${label(Number(noise.value))}`;
    body.hidden = circuit === null;
    detail.hidden = circuit === null;
    empty.hidden = circuit !== null;
  }

  /** The one finding: the fidelity with its interval, and beside it that of as many classical draws. */
  function showHeadline({ device, noisy }: Circuit): void {
    const name: string = (get("names")[get("row")] ?? "").replace(/^./, (x: string) => x.toUpperCase());
    const where = `${name}${get("edited") ? ", edited," : ""} on ${device}`;
    const scaled = noisy && get("noise_scale") !== 1 ? `, noise × ${label(get("noise_scale"))}` : "";
    const last = counts?.shots ? counts.curve.at(-1) : undefined;
    const of = (x: number, error: number | null) => withError(x, error === null ? null : Z95 * error);
    heading.textContent = last
      ? `${where}${scaled}: fidelity ${of(last.fidelity, last.error)}`
      : `${where}${scaled}`;
    const parts = last
      ? [`as many classical draws: ${of(last.classical, last.classical_error)}`]
      : ["nothing is measured yet"];
    if (counts?.distance && counts.classical_distance && last)
      parts.push(
        `total variation ${of(...counts.distance)}, of classical draws ${of(...counts.classical_distance)}`,
        "±: 95 %",
      );
    detail.textContent = parts.join(" · ");
  }

  function showGate(shown: Circuit): void {
    const needs = device ? `, depth ${device.depth}, ${device.two_qubit_gates} two-qubit gates` : "";
    summary.textContent = `Circuit: ${shown.loader} loader, ${shown.qubits} qubits${needs}`;
    const chosen = gate === null ? undefined : shown.gates[gate];
    const lines = chosen
      ? gateFacts(chosen, shown.angles, shown.roles, shown.exact, device?.errors ?? null, shown.device)
      : ["Click a gate to see what it is for, its angle, and its error on the device."];
    facts.replaceChildren(...lines.map((line) => h("li", {}, line)));
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
    showHeadline(circuit);
    showGate(circuit);
    const onGate = (index: number) => {
      if (!circuit?.gates[index]) return;
      gate = gate === index ? null : index;
      paint();
    };
    const gateFocused = gates.svg.contains(document.activeElement);
    paintGates(gates, moreGates, circuit, device, allGates, gate, onGate);
    if (gateFocused) gates.svg.querySelector<SVGElement>(`[data-gate="${gate ?? 0}"]`)?.focus();
    const focused = distribution.svg.contains(document.activeElement);
    paintDistribution(distribution, circuit.exact, counts?.shots ? counts : null, fit, colour(), {
      original,
      top: frozenTop,
      active: original[activeKey] > 0 ? activeKey : original.findIndex((p) => p > 0),
      onKey: circuit.noisy ? chooseKey : null,
      onWeight: setWeight,
      onActive: setActive,
    });
    if (focused) distribution.svg.querySelector<SVGElement>(`[data-key="${activeKey}"]`)?.focus();
    paintFidelity(fidelity, counts?.curve ?? [], get("shots"), colour());
    extrapolation.box.hidden = fitBox.hidden = !circuit.noisy;
    if (circuit.noisy) paintFit(extrapolation, fit, levels, colour(), dragLevel);
    paintQubits(qubits, device?.region ?? null, circuit.device);
    showStatus();
  });

  // --- messages ---------------------------------------------------------------------------------

  function showCircuit(message: any): void {
    const anotherRow = JSON.stringify(original) !== JSON.stringify(message.exact);
    circuit = { ...message.drawing, ...message };
    if (!get("edited")) original = message.exact;
    if (anotherRow) {
      [device, fit, key, gate] = [null, null, null, null];
      requestFit();
    }
    frame.fail(null);
  }

  /** An edited row comes back; while it is still dragged, what is drawn is newer. */
  function showExact(message: any): void {
    if (!circuit) return;
    circuit.angles = message.angles;
    if (frozenTop !== null) return;
    circuit.exact = message.exact;
    fit = null;
    requestFit();
  }

  frame.onMessage((message) => {
    if (message.kind === "circuit") showCircuit(message);
    else if (message.kind === "device") device = message;
    else if (message.kind === "exact") showExact(message);
    else if (message.kind === "counts") counts = message;
    else if (message.kind === "zne") {
      fit = message;
      frame.fail(null);
    } else if (message.kind === "running") measuring = true;
    else if (message.kind === "ended") measuring = false;
    else return;
    paint();
  });
  frame.onChange(["row", "names", "shots", "method", "edited", "noise_scale"], paint);
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
