// MitigationView: the expected error of ways to measure rows against shots, with what was measured.
import { axes, errorPoint, legendMark, line, makePanel, path, resize, spread, text, Z95 } from "./charts";
import { Frame, h, onFrame, s, type Model } from "./dom";
import { scale, whole, withError, type Scale } from "./scale";

interface Way {
  name: string;
  kind: "classical" | "raw" | "chosen" | "other";
  shots: number[];
  error: number[];
  std_error: number[];
}

interface Errors {
  ways: Way[];
  points: { name: string; error: number; std_error: number }[];
  shots: number;
  device: string;
  note: string;
}

/** Multiples of the shots that the axis reaches: SHOTS_FACTORS in tasks/circuits.py. It is the same before the
 * ways to measure are there. */
const SHOTS_FACTORS = [1 / 16, 64];
const HEIGHT = 250;
const BOTTOM = 34;
const TOP = 8;
const LABEL_WIDTH = 190;
const LABEL_HEIGHT = 13;

export function render(model: Model, el: HTMLElement): () => void {
  let errors: Errors | null = null;
  const frame = new Frame(model, el, "mitigation", "Error against shots", () => paint());
  const heading = h("h2", {}, "Error against shots");
  const panel = makePanel("", "qtx-wide");
  const panels = h("div", { class: "qtx-panels" }, panel.box);
  frame.root.append(h("header", {}, heading, frame.exports()), panels, frame.error);

  const paint = onFrame(() => {
    frame.root.hidden = errors === null;
    if (errors === null || !frame.hasRoom()) return;
    const best = chosenWay(errors);
    heading.textContent = `Error against total shots on ${errors.device}`;
    panel.title.textContent = best ? `Chosen with ${whole(errors.shots)} shots: ${best.name}` : "";
    const width = resize(panel, HEIGHT);
    const [xs, ys] = scales(errors, width);
    const nodes = axes(HEIGHT, xs, ys, "total shots of a row", "total variation, mean");
    for (const way of errors.ways) nodes.push(...wayNodes(way, xs, ys));
    if (width > 500) nodes.push(...labelNodes(errors.ways, xs, ys));
    if (best) nodes.push(...markNodes(best, errors.shots, xs, ys));
    for (const [i, point] of errors.points.entries()) {
      const style = { colour: colourOf(point.name), filled: point.name === "mitigated", radius: 5 };
      const x = xs(errors.shots) + 7 * (i - (errors.points.length - 1) / 2); // side by side
      const node = errorPoint(x, ys, point.error, point.std_error, style);
      node.append(s("title", {}, `${point.name}: ${withError(point.error, Z95 * point.std_error)}`));
      nodes.push(node);
    }
    panel.svg.replaceChildren(...nodes);
    panel.caption.replaceChildren(
      legendMark("filled", "mitigated", "var(--qtx-accent)"),
      legendMark("hollow", "raw counts", "var(--qtx-accent)"),
      legendMark("dashed", "classical draws", "var(--qtx-accent)"),
      errors.note,
    );
    const spoken = errors.points.map((x) => `${x.name} ${withError(x.error, Z95 * x.std_error)}`);
    panel.svg.setAttribute("aria-label", `error with ${whole(errors.shots)} shots: ${spoken.join(", ")}`);
  });

  frame.onMessage((message) => {
    if (message.kind !== "errors") return;
    errors = message;
    frame.fail(null);
    frame.root.hidden = false;
    paint();
  });
  frame.send({ kind: "ready" });
  paint();
  return () => frame.end();
}

const colourOf = (name: string) => (name === "classical" ? "var(--qtx-baseline)" : "var(--qtx-accent)");

/** The way that was chosen, on which the mark stands; where nothing is mitigated, the raw counts. */
function chosenWay(errors: Errors): Way | null {
  const at = (way: Way) => way.error[way.shots.indexOf(errors.shots)] ?? Infinity;
  const ways = errors.ways.filter((way) => way.kind !== "classical");
  const chosen = ways.find((way) => way.kind === "chosen") ?? ways.find((way) => way.kind === "raw");
  return chosen && Number.isFinite(at(chosen)) ? chosen : null;
}

function scales(errors: Errors, width: number): [Scale, Scale] {
  const rehearsed = errors.ways.flatMap((way) => way.shots);
  const shots = rehearsed.length ? rehearsed : SHOTS_FACTORS.map((factor) => factor * errors.shots);
  const values = [
    ...errors.ways.flatMap((way) => way.error),
    ...errors.points.flatMap((x) => [x.error, x.error + Z95 * x.std_error]),
  ].filter((x) => x > 0);
  const room = width > 500 ? LABEL_WIDTH : 12;
  return [
    scale(Math.min(...shots) / 1.1, Math.max(...shots), 56, width - room, true),
    scale(Math.min(...values) / 1.2, Math.max(...values) * 1.2, HEIGHT - BOTTOM, TOP, true),
  ];
}

/** The line of a way with the band of its 95 % interval. */
function wayNodes(way: Way, xs: Scale, ys: Scale): Node[] {
  const clamped = (y: number) => ys(Math.min(ys.high, Math.max(ys.low, y)));
  const points = way.shots.map((n, i): [number, number] => [xs(n), ys(way.error[i])]);
  const bound = (sign: number) =>
    way.shots.map((n, i): [number, number] => [xs(n), clamped(way.error[i] + sign * Z95 * way.std_error[i])]);
  const colour =
    way.kind === "other"
      ? "var(--qtx-muted)"
      : way.kind === "classical"
        ? "var(--qtx-baseline)"
        : "var(--qtx-accent)";
  const dashes = way.kind === "classical" ? "6 4" : way.kind === "raw" ? "2 3" : null;
  const width = way.kind === "chosen" ? 2.5 : way.kind === "other" ? 1 : 1.5;
  const band = `${path(bound(1))}${path(bound(-1).reverse()).replace("M", "L")}Z`;
  const said = way.shots.map((n, i) => `${whole(n)}: ${withError(way.error[i], Z95 * way.std_error[i])}`);
  return [
    s("path", { d: band, fill: colour, "fill-opacity": 0.12 }),
    s(
      "path",
      { d: path(points), fill: "none", stroke: colour, "stroke-width": width, "stroke-dasharray": dashes },
      s("title", {}, `${way.name}, expected with\n${said.join("\n")}`),
    ),
  ];
}

/** The names of the lines at their ends, apart from each other. */
function labelNodes(ways: Way[], xs: Scale, ys: Scale): Node[] {
  const ends = ways.map((way) => ys(way.error.at(-1)!));
  const places = spread(ends, LABEL_HEIGHT, ys.to, ys.from);
  return ways.map((way, i) => {
    const bold = way.kind === "chosen" ? { "font-weight": 600 } : {};
    const name = way.kind === "classical" ? "classical draws, slope −½" : way.name;
    return text(xs.to + 6, places[i] + 4, name.length > 33 ? `${name.slice(0, 32)}…` : name, "start", bold);
  });
}

/** The ring on the line that was chosen, at the shots that were measured. */
function markNodes(way: Way, shots: number, xs: Scale, ys: Scale): Node[] {
  const [x, y] = [xs(shots), ys(way.error[way.shots.indexOf(shots)])];
  return [
    line(x, ys.from, x, ys.to, { stroke: "var(--qtx-muted)", "stroke-dasharray": "1 4" }),
    s("circle", { cx: x, cy: y, r: 10, fill: "none", stroke: "var(--qtx-text)", "stroke-width": 1.5 }),
    text(x + 14, ys.from - 6, `this choice: ${whole(shots)} shots`, "start", { class: "qtx-halo" }),
  ];
}
