// Pieces of the charts in SVG: panels, axes, points with error bars, and the marks of a legend.
import { h, s } from "./dom";
import { label, ticks, type Scale } from "./scale";

/** Standard errors of half a 95 % interval. */
export const Z95 = 1.96;

const MIN_WIDTH = 180;

/** A figure with its title and caption. */
export interface Panel {
  title: HTMLElement;
  svg: SVGSVGElement;
  caption: HTMLElement;
  box: HTMLElement;
}

export function makePanel(name: string, className: string): Panel {
  const title = h("h3", {}, name);
  const svg = s("svg", { role: "img" });
  const caption = h("p", { class: "qtx-note" });
  return { title, svg, caption, box: h("figure", { class: className }, title, svg, caption) };
}

/** Gives a panel's picture its size: the width that there is, and a height; returns the width. */
export function resize(panel: Panel, height: number): number {
  const width = Math.max(MIN_WIDTH, panel.box.clientWidth);
  panel.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  panel.svg.setAttribute("width", String(width));
  panel.svg.setAttribute("height", String(height));
  return width;
}

export function text(x: number, y: number, content: string, anchor = "middle", attributes = {}): SVGElement {
  return s("text", { x, y, "text-anchor": anchor, ...attributes }, content);
}

export function line(x1: number, y1: number, x2: number, y2: number, attributes = {}): SVGElement {
  return s("line", { x1, y1, x2, y2, ...attributes });
}

/** The path through some points. */
export function path(points: [number, number][]): string {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x} ${y}`).join("");
}

/** Places of labels near those that they point at, at least `room` apart, between `top` and `bottom`. */
export function spread(targets: number[], room: number, top: number, bottom: number): number[] {
  const order = targets.map((_, i) => i).sort((a, b) => targets[a] - targets[b]);
  const places = [...targets];
  let last = top - room;
  for (const i of order) last = places[i] = Math.max(targets[i], last + room);
  let next = bottom + room;
  for (const i of order.reverse()) next = places[i] = Math.min(places[i], next - room);
  return places;
}

/** Grid, ticks and names of two axes; `named` are other ticks of the first one. */
export function axes(
  height: number,
  xs: Scale,
  ys: Scale,
  xName: string,
  yName: string,
  named: [number, string][] | null = null,
): Node[] {
  const nodes: Node[] = [];
  const round = (): [number, string][] =>
    ticks(xs, Math.max(2, (xs.to - xs.from) / 70)).map((x) => [x, label(x)]);
  for (const [x, name] of named ?? round()) {
    nodes.push(line(xs(x), ys.from, xs(x), ys.to, { class: "qtx-grid" }));
    const last = named !== null && name.length > 5; // a long name ends where the axis does
    nodes.push(text(last ? xs.to : xs(x), ys.from + 13, name, last ? "end" : "middle"));
  }
  for (const y of ticks(ys, 4)) {
    nodes.push(line(xs.from, ys(y), xs.to, ys(y), { class: "qtx-grid" }));
    nodes.push(text(xs.from - 4, ys(y) + 4, label(y), "end"));
  }
  const middle = (ys.from + ys.to) / 2;
  nodes.push(
    text((xs.from + xs.to) / 2, height - 3, xName),
    text(0, 0, yName, "middle", { transform: `translate(11 ${middle}) rotate(-90)` }),
    s("path", { d: `M${xs.from} ${ys.to}V${ys.from}H${xs.to}`, fill: "none", stroke: "var(--qtx-muted)" }),
  );
  return nodes;
}

/** A point with the bar of its 95 % interval, cut at the ends of the axis; filled or hollow. */
export function errorPoint(
  x: number,
  ys: Scale,
  value: number,
  stdError: number,
  style: { colour: string; filled: boolean; radius?: number },
): SVGGElement {
  const { colour, filled, radius = 4 } = style;
  const clamped = (y: number) => ys(Math.min(ys.high, Math.max(ys.low, y)));
  const [low, high] = [clamped(value - Z95 * stdError), clamped(value + Z95 * stdError)];
  const fill = filled ? colour : "var(--qtx-paper)";
  return s(
    "g",
    { stroke: colour, "stroke-width": 1.4 },
    stdError > 0 ? s("path", { d: `M${x} ${low}V${high}` }) : null,
    s("circle", { cx: x, cy: clamped(value), r: radius, fill }),
  );
}

/** A mark of the legend and its name; `measured` is the colour of what was measured. */
export function legendMark(
  kind: "bar" | "dash" | "dashed" | "hollow" | "filled",
  name: string,
  measured: string,
): HTMLElement {
  const baseline = { stroke: "var(--qtx-baseline)", "stroke-width": 2 };
  const circle = { cx: 7, cy: 6, r: 4, stroke: measured, "stroke-width": 1.5 };
  const shape = {
    bar: () => s("path", { d: "M7 1V11", stroke: "var(--qtx-exact)", "stroke-width": 2 }),
    dash: () => s("path", { d: "M1 6H13", ...baseline }),
    dashed: () => s("path", { d: "M1 6H13", ...baseline, "stroke-dasharray": "5 2" }),
    hollow: () => s("circle", { ...circle, fill: "none" }),
    filled: () => s("circle", { ...circle, fill: measured }),
  }[kind]();
  const icon = s("svg", { width: 14, height: 12, "aria-hidden": "true" }, shape);
  return h("span", { class: "qtx-mark" }, icon, name);
}
