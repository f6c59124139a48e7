// The physical qubits of a device that a row runs on, with their errors.
import { line, resize, text, type Panel } from "./charts";
import { s } from "./dom";
import { css, sequential } from "./maps";
import { digits } from "./scale";

export interface Region {
  /** Qubits with their readout error, at places from 0 to 1. */
  nodes: { qubit: number; readout: number | null; x: number; y: number }[];
  /** Pairs of nodes with their two-qubit error. */
  edges: { a: number; b: number; error: number }[];
}

const HEIGHT = 180;
const MARGIN = 50;
const MAX_RADIUS = 19;
/** From this radius on a qubit's error stands below its number. */
const MIN_TWO_LINES_RADIUS = 15;

const percent = (error: number | null) => (error === null ? "–" : `${digits(100 * error, 2)} %`);

export function paintQubits(panel: Panel, region: Region | null, device: string): void {
  panel.box.hidden = !region;
  if (!region) return;
  const width = resize(panel, HEIGHT);
  const depth = Math.max(...region.nodes.map((node) => node.y));
  const unit = Math.min(width - MARGIN, depth > 0.05 ? (HEIGHT - MARGIN) / depth : Infinity);
  const [left, top] = [(width - unit) / 2, (HEIGHT - depth * unit) / 2];
  const spots = region.nodes.map((node): [number, number] => [left + node.x * unit, top + node.y * unit]);
  const distances = spots.flatMap(([x, y], i) => spots.slice(0, i).map(([u, v]) => Math.hypot(x - u, y - v)));
  const radius = Math.min(MAX_RADIUS, 0.46 * Math.min(...distances, MARGIN));
  const worst = Math.max(...region.nodes.map((node) => node.readout ?? 0), 1e-9);
  panel.svg.replaceChildren(
    ...region.edges.flatMap((edge) => pairNodes(spots[edge.a], spots[edge.b], edge.error)),
    ...region.nodes.map((node, i) => qubitNode(node, spots[i], radius, worst)),
  );
  const pairs = region.edges.length ? ", on each pair its two-qubit error" : "; no pair is needed";
  const readout = `the brighter, the larger the readout error, ${percent(worst)} at most`;
  panel.caption.textContent = `Physical qubits of ${device}; ${readout}${pairs}.`;
  const spoken = region.nodes.map(
    (n) => `${n.qubit}, readout error ${n.readout === null ? "unknown" : digits(n.readout, 2)}`,
  );
  panel.svg.setAttribute("aria-label", `qubits ${spoken.join("; ")}`);
}

function pairNodes([x1, y1]: [number, number], [x2, y2]: [number, number], error: number): Node[] {
  return [
    line(x1, y1, x2, y2, { stroke: "var(--qtx-muted)", "stroke-width": 3 }),
    text((x1 + x2) / 2, (y1 + y2) / 2 + 4, percent(error), "middle", { class: "qtx-halo", "font-size": 10 }),
  ];
}

function qubitNode(
  node: Region["nodes"][number],
  [cx, cy]: [number, number],
  radius: number,
  worst: number,
): Node {
  const share = (node.readout ?? 0) / worst;
  const on = { class: share > 0.6 ? "qtx-on-light" : "qtx-on-dark" };
  const large = radius > MIN_TWO_LINES_RADIUS;
  return s(
    "g",
    {},
    s("title", {}, `qubit ${node.qubit}: readout error ${percent(node.readout)}`),
    s("circle", { cx, cy, r: radius, fill: css(sequential, share), stroke: "var(--qtx-text)" }),
    text(cx, cy + (large ? -1 : 4), String(node.qubit), "middle", on),
    large ? text(cx, cy + 10, percent(node.readout), "middle", { ...on, "font-size": 8.5 }) : null,
  );
}
