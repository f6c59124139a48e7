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

const HEIGHT = 210;
const BAR_ROOM = 44;
const BAR_STEPS = 32;
/** Pixels between two qubits from which on the error of the pair stands there. */
const MIN_LABEL_ROOM = 40;
const MARGIN = 50;
const MAX_RADIUS = 19;
/** From this radius on a qubit's error stands below its number. */
const MIN_TWO_LINES_RADIUS = 15;

const percent = (error: number | null) => (error === null ? "–" : `${digits(100 * error, 2)} %`);

/** Draws the coupling map of the region; colours are errors, and the bar below says which. */
export function paintQubits(panel: Panel, region: Region | null, device: string): void {
  panel.box.hidden = !region;
  if (!region) return;
  const depth = Math.max(...region.nodes.map((node) => node.y));
  const full = panel.box.clientWidth || 640;
  // A chain of qubits needs a line of the picture only, and no band of empty room above and below it.
  const height = Math.min(HEIGHT, BAR_ROOM + MARGIN + depth * (full - MARGIN));
  const width = resize(panel, height);
  const room = height - BAR_ROOM;
  const unit = Math.min(width - MARGIN, depth > 0.05 ? (room - MARGIN) / depth : Infinity);
  const [left, top] = [(width - unit) / 2, (room - depth * unit) / 2];
  const spots = region.nodes.map((node): [number, number] => [left + node.x * unit, top + node.y * unit]);
  const distances = spots.flatMap(([x, y], i) => spots.slice(0, i).map(([u, v]) => Math.hypot(x - u, y - v)));
  const radius = Math.min(MAX_RADIUS, 0.46 * Math.min(...distances, MARGIN));
  const readouts = region.nodes.map((node) => node.readout ?? 0);
  const [worst, worstPair] = [readouts, region.edges.map((edge) => edge.error)].map((x) =>
    Math.max(...x, 1e-9),
  );
  const bars = [bar(8, width, "readout", worst)];
  if (region.edges.length) bars.push(bar(26, width, "two-qubit", worstPair));
  panel.svg.replaceChildren(
    ...region.edges.flatMap((edge) => pairNodes(spots[edge.a], spots[edge.b], edge.error, worstPair, radius)),
    ...region.nodes.map((node, i) => qubitNode(node, spots[i], radius, worst)),
    s("g", { transform: `translate(0 ${room})` }, ...bars),
  );
  const pairs = region.edges.length
    ? "lines are coupled pairs"
    : "no pair of them is coupled, and none is needed";
  panel.caption.textContent = `Qubits of ${device} that the row runs on; ${pairs}.`;
  const spoken = region.nodes.map(
    (n) => `${n.qubit}, readout error ${n.readout === null ? "unknown" : percent(n.readout)}`,
  );
  const pairsSpoken = region.edges.map(
    (e) => `${region.nodes[e.a].qubit}–${region.nodes[e.b].qubit}, error ${percent(e.error)}`,
  );
  panel.svg.setAttribute("aria-label", `qubits ${[...spoken, ...pairsSpoken].join("; ")}`);
}

/** A colour bar from 0 to the largest error, at a height. */
function bar(y: number, width: number, name: string, worst: number): SVGElement {
  const [from, to] = [72, width - 58];
  const each = (to - from) / BAR_STEPS;
  const steps = Array.from({ length: BAR_STEPS }, (_, i) =>
    s("rect", {
      x: from + i * each,
      y,
      width: each + 0.5,
      height: 8,
      fill: css(sequential, i / (BAR_STEPS - 1)),
    }),
  );
  return s(
    "g",
    {},
    text(from - 14, y + 8, name, "end"),
    text(from - 4, y + 8, "0", "end"),
    ...steps,
    text(to + 4, y + 8, percent(worst), "start"),
  );
}

function pairNodes(
  [x1, y1]: [number, number],
  [x2, y2]: [number, number],
  error: number,
  worst: number,
  radius: number,
): Node[] {
  const room = Math.hypot(x1 - x2, y1 - y2) - 2 * radius; // between the two circles
  const colour = css(sequential, error / worst);
  return [
    line(x1, y1, x2, y2, { stroke: "var(--qtx-text)", "stroke-width": 7 }),
    s(
      "line",
      { x1, y1, x2, y2, stroke: colour, "stroke-width": 5 },
      s("title", {}, `two-qubit error ${percent(error)}`),
    ),
    ...(room > MIN_LABEL_ROOM
      ? [
          text((x1 + x2) / 2, (y1 + y2) / 2 + 4, percent(error), "middle", {
            class: "qtx-halo",
            "font-size": 10,
          }),
        ]
      : []),
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
