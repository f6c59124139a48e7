// The circuit of a row: columns of gates on the wires of its qubits, folded to the width of the page.
import { line, resize, text, type Panel } from "./charts";
import { s } from "./dom";
import { digits, fixed } from "./scale";

export interface Gate {
  name: string;
  qubits: number[];
  column: number;
  /** How many conditional gates stand in this place. */
  count: number;
  conditional: boolean;
  /** The numbers of the angles that it rotates by, each with its factor. */
  angles: [number, number][];
}

/** What an angle is for; where it splits a range of keys: its first key, that of the second half, its end. */
export interface Role {
  text: string;
  split: [number, number, number] | null;
}

/** The errors of a device where the qubits of the circuit are placed. */
export interface GateErrors {
  wires: { physical: number; one_qubit: number | null; readout: number | null }[];
  pairs: { a: number; b: number; error: number }[];
}

export interface Drawing {
  qubits: number;
  /** Columns of the whole circuit, of which perhaps not all are in `gates`. */
  columns: number;
  gates: Gate[];
}

/** What a device needs for the circuit. */
export interface Needs {
  depth: number;
  two_qubit_gates: number;
  qubits: number;
}

const COLUMN_WIDTH = 30;
const WIRE_HEIGHT = 26;
const MARGIN = 40;
const FOLDED_LINES = 2;

/** How many columns of gates stand in a line, and the number of lines. */
export function folded(columns: number, width: number): { each: number; lines: number } {
  const each = Math.max(4, Math.floor((width - MARGIN - 4) / COLUMN_WIDTH));
  return { each, lines: Math.max(1, Math.ceil(columns / each)) };
}

/** Draws the circuit; `all` or only its beginning, with a button that switches between them. */
export function paintGates(
  panel: Panel,
  button: HTMLElement,
  drawing: Drawing & { loader: string; device: string },
  needs: Needs | null,
  all: boolean,
  chosen: number | null,
  onGate: (index: number) => void,
): void {
  const { qubits, columns, gates } = drawing;
  const width = Math.max(180, panel.box.clientWidth);
  const known = Math.min(columns, 1 + Math.max(0, ...gates.map((gate) => gate.column)));
  const { each, lines: allLines } = folded(known, width);
  const lines = all ? allLines : Math.min(allLines, FOLDED_LINES);
  const shown = Math.min(known, lines * each);
  button.hidden = allLines <= FOLDED_LINES;
  const count = known < columns ? `${known} of ${columns}` : `all ${columns}`;
  button.textContent = all ? "Show the beginning only" : `Show ${count} columns`;

  const lineHeight = qubits * WIRE_HEIGHT + 10;
  resize(panel, lines * lineHeight + 4);
  const wireY = (line: number, qubit: number) => line * lineHeight + qubit * WIRE_HEIGHT + 16;
  const nodes: Node[] = [];
  for (let i = 0; i < lines; i++) {
    const end = MARGIN + Math.min(each, shown - i * each) * COLUMN_WIDTH;
    for (let q = 0; q < qubits; q++) {
      nodes.push(line(34, wireY(i, q), end, wireY(i, q), { stroke: "var(--qtx-muted)" }));
      nodes.push(text(30, wireY(i, q) + 4, `q${q}`, "end"));
    }
  }
  for (const [index, gate] of gates.entries()) {
    if (gate.column >= shown) continue;
    const x = MARGIN + (gate.column % each) * COLUMN_WIDTH + COLUMN_WIDTH / 2;
    const place = (qubit: number) => wireY(Math.floor(gate.column / each), qubit);
    nodes.push(gateNode(gate, x, place, index, chosen, onGate));
  }
  panel.svg.replaceChildren(...nodes);
  panel.caption.textContent = caption(drawing, needs, shown);
  panel.svg.setAttribute("role", "group"); // its gates are buttons
  panel.svg.setAttribute("aria-label", `circuit of ${qubits} qubits`);
}

function caption(
  drawing: Drawing & { loader: string; device: string },
  needs: Needs | null,
  shown: number,
): string {
  const { loader, device, columns, gates } = drawing;
  const rest = shown < columns ? ` The first ${shown} of ${columns} columns are drawn.` : "";
  const conditional = gates.some((gate) => gate.conditional)
    ? " Dashed: fed forward from measured bits; ×k: one of k angles is used."
    : "";
  const cost = needs
    ? `on ${device}: depth ${needs.depth}, ${needs.two_qubit_gates} two-qubit gates, ${needs.qubits} qubits.`
    : `for ${device} it is being transpiled …`;
  return `${loader} loader; ${cost}${conditional}${rest}`;
}

function gateNode(
  gate: Gate,
  x: number,
  wireY: (qubit: number) => number,
  index: number,
  chosenIndex: number | null,
  onGate: (index: number) => void,
): SVGElement {
  const chosen = index === chosenIndex;
  const [first, last] = [Math.min(...gate.qubits), Math.max(...gate.qubits)];
  const parts: Node[] = [];
  if (first !== last) {
    parts.push(line(x, wireY(first), x, wireY(last), { stroke: "var(--qtx-text)", "stroke-width": 1.5 }));
  }
  const controlled = gate.qubits.length === 2 && /^c[xz]$/.test(gate.name);
  gate.qubits.forEach((qubit, i) => {
    if (!controlled) parts.push(...boxNodes(gate, x, wireY(qubit)));
    else if (gate.name === "cz" || i === 0)
      parts.push(s("circle", { cx: x, cy: wireY(qubit), r: 4, fill: "var(--qtx-text)" }));
    else parts.push(...targetNodes(x, wireY(qubit)));
  });
  const title = gateTitle(gate);
  const around = {
    x: x - 14,
    y: wireY(first) - 12,
    width: 28,
    height: wireY(last) - wireY(first) + 24,
    rx: 3,
  };
  return s(
    "g",
    {
      class: "qtx-gate",
      role: "button",
      tabindex: index === (chosenIndex ?? 0) ? 0 : -1,
      "data-gate": index,
      "aria-pressed": String(chosen),
      "aria-label": title,
      click: () => onGate(index),
      keydown: (event: KeyboardEvent) => {
        const step = { Enter: 0, " ": 0, ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (step === undefined) return;
        event.preventDefault();
        onGate(index + step);
      },
    },
    s("title", {}, title),
    s("rect", {
      ...around,
      fill: "transparent",
      stroke: chosen ? "var(--qtx-accent)" : "none",
      "stroke-width": 2,
    }),
    ...parts,
  );
}

function gateTitle(gate: Gate): string {
  if (gate.name === "measure") return `readout of q${gate.qubits[0]}`;
  return gate.conditional
    ? `${gate.count} × ${gate.name} on q${gate.qubits}, each for one value of the bits read before`
    : `${gate.name} on q${gate.qubits.join(", q")}`;
}

const MAX_ANGLES = 16;
const percent = (x: number | null, count = 2) => (x === null ? "unknown" : `${digits(100 * x, count)} %`);

/** What a gate is for, its angles, and its error on the device: lines of text. */
export function gateFacts(
  gate: Gate,
  angles: number[],
  roles: Role[],
  exact: number[],
  errors: GateErrors | null,
  device: string,
): string[] {
  const lines = [gateTitle(gate)];
  const mass = (first: number, end: number) => exact.slice(first, end).reduce((a, b) => a + b, 0);
  for (const [index, factor] of gate.angles.slice(0, MAX_ANGLES)) {
    const { text, split } = roles[index];
    const shares = split
      ? `: ${percent(mass(split[0], split[1]), 3)} against ${percent(mass(split[1], split[2]), 3)}`
      : "";
    lines.push(`angle ${fixed(factor * angles[index], 3)} rad; ${text}${shares}`);
  }
  if (gate.angles.length > MAX_ANGLES) lines.push(`and ${gate.angles.length - MAX_ANGLES} more angles`);
  if (gate.qubits.length === 2)
    lines.push("entangles the two: what one rotation does depends on the other bit");
  lines.push(errorText(gate, errors, device));
  return lines;
}

function errorText(gate: Gate, errors: GateErrors | null, device: string): string {
  if (!errors) return `no gate of ${device} has an error of a device`;
  const wires = gate.qubits.map((qubit) => errors.wires[qubit]);
  if (gate.name === "measure")
    return `on ${device}: readout error ${percent(wires[0].readout)}, qubit q${gate.qubits[0]}`;
  if (gate.qubits.length === 2) {
    const [a, b] = gate.qubits;
    const pair = errors.pairs.find((x) => (x.a === a && x.b === b) || (x.a === b && x.b === a));
    const places = wires.map((wire) => wire.physical).join("–");
    return pair
      ? `on ${device}: error ${percent(pair.error)} on the pair ${places}`
      : `on ${device}: qubits ${places} are not coupled; the gate is routed over others`;
  }
  const { physical, one_qubit } = wires[0];
  return `on ${device}: qubit ${physical}, error ${percent(one_qubit)} of each of its at most two sx gates`;
}

/** The target of a controlled X. */
function targetNodes(x: number, y: number): Node[] {
  return [
    s("circle", { cx: x, cy: y, r: 7, fill: "var(--qtx-paper)", stroke: "var(--qtx-text)" }),
    s("path", { d: `M${x - 7} ${y}h14M${x} ${y - 7}v14`, stroke: "var(--qtx-text)" }),
  ];
}

function boxNodes(gate: Gate, x: number, y: number): Node[] {
  const measures = gate.name === "measure";
  const name = measures ? "M" : gate.name.replace(/^r([xyz])$/, (_, axis) => `R${axis}`);
  const box = s("rect", {
    x: x - 12,
    y: y - 10,
    width: 24,
    height: 20,
    rx: 2,
    fill: measures ? "var(--qtx-panel)" : "var(--qtx-paper)",
    stroke: gate.conditional ? "var(--qtx-accent)" : "var(--qtx-text)",
    "stroke-dasharray": gate.conditional ? "3 2" : null,
  });
  if (gate.count === 1) return [box, text(x, y + 4, name)];
  return [
    box,
    text(x, y - 1, name, "middle", { "font-size": 9.5 }),
    text(x, y + 8, `×${gate.count}`, "middle", { "font-size": 8.5 }),
  ];
}
