// What was measured of a row: its distribution, its fidelity as shots arrive, and the zero-noise fit.
import { axes, errorPoint, legendMark, line, path, resize, text, Z95, type Panel } from "./charts";
import { s } from "./dom";
import { digits, scale, whole, withError, type Scale } from "./scale";

export interface FidelityPoint {
  shots: number;
  fidelity: number;
  error: number;
  classical: number;
}

export interface Counts {
  shots: number;
  discarded: number;
  counts: number[];
  /** Of the same number of classical draws. */
  classical: number[];
  curve: FidelityPoint[];
  not_modelled: string[];
  fallbacks: string[];
}

/** A `ZeroNoiseFit` of Python. */
export interface Fit {
  levels: number[];
  values: number[];
  errors: number[];
  fit: [number, number][];
  answer: number;
  answer_error: number;
  exact: number;
  key: number;
  method: string;
  p: number[];
  p_error: number[];
  shots: number;
  fallbacks: string[];
}

const HEIGHT = 190;
const BOTTOM = 34;
const TOP = 8;

/** Draws exact, measured and extrapolated probabilities; `onKey` is called with a key that is clicked. */
export function paintDistribution(
  panel: Panel,
  exact: number[],
  counts: Counts | null,
  fit: Fit | null,
  colour: string,
  onKey: ((key: number) => void) | null,
): void {
  const width = resize(panel, HEIGHT);
  const total = counts?.counts.reduce((a, b) => a + b, 0) ?? 0;
  const shares = counts && total ? counts.counts.map((x) => x / total) : null;
  const baseline = counts?.shots ? counts.classical.map((x) => x / counts.shots) : null;
  const keys = exact.map((p, j) => (p > 0 || (shares?.[j] ?? 0) > 0 ? j : -1)).filter((j) => j >= 0);
  const [first, last] = [keys[0] ?? 0, keys.at(-1) ?? 0];
  const xs = scale(first - 0.6, last + 0.6, 46, width - 8);
  const highest = Math.max(...exact, ...(shares ?? []), ...(fit?.p ?? []), 1e-9);
  const ys = scale(0, highest * 1.08, HEIGHT - BOTTOM, TOP);
  const each = (xs.to - xs.from) / (last - first + 1.2);
  const radius = Math.min(4, Math.max(1.5, each / 5));
  const aside = fit ? each / 6 : 0;
  const nodes: Node[] = axes(HEIGHT, xs, ys, "key", "probability");
  for (const j of keys) {
    const x = xs(j);
    const bar = { stroke: "var(--qtx-exact)", "stroke-width": Math.min(3, Math.max(1, each / 6)) };
    nodes.push(line(x, ys(0), x, ys(exact[j]), bar));
    if (baseline) {
      const reach = Math.min(9, Math.max(1, each / 3));
      const dash = { stroke: "var(--qtx-baseline)", "stroke-width": 2 };
      nodes.push(line(x - reach, ys(baseline[j]), x + reach, ys(baseline[j]), dash));
    }
    if (shares) {
      const stdError = Math.sqrt((shares[j] * (1 - shares[j])) / total);
      nodes.push(errorPoint(x - aside, ys, shares[j], stdError, { colour, filled: false, radius }));
    }
    if (fit)
      nodes.push(errorPoint(x + aside, ys, fit.p[j], fit.p_error[j], { colour, filled: true, radius }));
    if (onKey) nodes.push(clickArea(x, each, ys, j, onKey));
  }
  panel.svg.replaceChildren(...nodes);
  const discarded = counts?.discarded ? `, ${whole(counts.discarded)} discarded` : "";
  panel.title.textContent = counts?.shots
    ? `${whole(counts.shots)} shots against the exact row`
    : "The exact row; nothing is measured yet";
  panel.caption.replaceChildren(
    legendMark("bar", "exact", colour),
    legendMark("dash", "classical draws", colour),
    legendMark("hollow", `measured${discarded}`, colour),
    ...(fit ? [legendMark("filled", "extrapolated", colour)] : []),
    "bars: 95 %",
  );
  panel.svg.setAttribute("aria-label", `distribution over ${keys.length} keys; ${panel.title.textContent}`);
}

function clickArea(
  x: number,
  width: number,
  ys: Scale,
  key: number,
  onKey: (key: number) => void,
): SVGElement {
  return s(
    "rect",
    {
      x: x - width / 2,
      y: ys.to,
      width: Math.max(1, width),
      height: ys.from - ys.to,
      fill: "transparent",
      class: "qtx-hit",
      click: () => onKey(key),
    },
    s("title", {}, `key ${key}: extrapolate its probability`),
  );
}

/** Draws the fidelity after each part, on an axis up to `shots`. */
export function paintFidelity(panel: Panel, curve: FidelityPoint[], shots: number, colour: string): void {
  const width = resize(panel, HEIGHT);
  const [first, last] = [curve[0], curve.at(-1)];
  const high = Math.max(shots, last?.shots ?? 0, 32);
  const xs = scale(Math.min(16, first?.shots ?? 16), high, 50, width - 16, true);
  const lowest = Math.min(0.9, ...curve.map((x) => Math.min(x.fidelity - Z95 * x.error, x.classical)));
  const ys = scale(Math.max(0, lowest), 1, HEIGHT - BOTTOM, TOP);
  const nodes = axes(HEIGHT, xs, ys, "shots", "Hellinger fidelity");
  nodes.push(
    s("path", {
      d: path(curve.map((x) => [xs(x.shots), ys(x.classical)])),
      fill: "none",
      stroke: "var(--qtx-baseline)",
      "stroke-width": 2,
      "stroke-dasharray": "6 4",
    }),
  );
  for (const x of curve)
    nodes.push(errorPoint(xs(x.shots), ys, x.fidelity, x.error, { colour, filled: false }));
  panel.svg.replaceChildren(...nodes);
  panel.title.textContent = last
    ? `Fidelity ${withError(last.fidelity, Z95 * last.error)}`
    : "Fidelity as shots arrive";
  panel.caption.replaceChildren(
    legendMark("hollow", "measured, bars: 95 %", colour),
    legendMark("dashed", "as many classical draws", colour),
  );
  panel.svg.setAttribute(
    "aria-label",
    last ? `${panel.title.textContent}, classical draws ${digits(last.classical, 4)}` : "no shots yet",
  );
}

/** Draws the zero-noise fit; a level is dragged by its point: `onMove(level, to, dropped)`. */
export function paintFit(
  panel: Panel,
  fit: Fit | null,
  levels: number[],
  colour: string,
  onMove: (index: number, to: number, dropped: boolean) => void,
): void {
  const width = resize(panel, HEIGHT);
  const highest = Math.max(...levels, 1) * 1.08;
  const xs = scale(0, highest, 52, width - 10);
  if (!fit) {
    panel.svg.replaceChildren(text(width / 2, HEIGHT / 2, "measuring the levels …"));
    return;
  }
  const ys = fitScale(fit);
  const nodes = axes(HEIGHT, xs, ys, "noise level (1: the device's own)", `probability of key ${fit.key}`);
  const exact = ys(fit.exact);
  const curve = fit.fit.filter(([x]) => x <= highest).map(([x, y]): [number, number] => [xs(x), ys(y)]);
  nodes.push(
    line(xs.from, exact, xs.to, exact, { stroke: "var(--qtx-exact)", "stroke-width": 1.5 }),
    text(xs.to - 2, exact - 4, "exact", "end", { class: "qtx-halo" }),
    s("path", { d: path(curve), fill: "none", stroke: colour, "stroke-width": 1.5 }),
    errorPoint(xs(0), ys, fit.answer, fit.answer_error, { colour, filled: true, radius: 5 }),
  );
  fit.levels.forEach((level, i) => {
    const style = { colour, filled: false, radius: 6 };
    const handle = errorPoint(xs(level), ys, fit.values[i], fit.errors[i], style);
    handle.classList.add("qtx-handle");
    handle.append(s("title", {}, "Drag to another noise level"));
    const index = levels.indexOf(level);
    if (index >= 0) draggable(handle, panel.svg, xs, (to, dropped) => onMove(index, to, dropped));
    nodes.push(handle);
  });
  panel.svg.replaceChildren(...nodes);
  const answer = withError(fit.answer, Z95 * fit.answer_error);
  panel.title.textContent = `Key ${fit.key} without noise: ${answer}, exact ${digits(fit.exact, 3)}`;
  panel.caption.textContent =
    `${fit.method} fit through ${fit.levels.length} levels, ${whole(fit.shots)} shots; ` +
    `bars: 95 %, without what the model misses. ${fit.fallbacks.join(" ")}`;
  panel.svg.setAttribute("aria-label", panel.title.textContent);
}

/** The vertical scale that shows all of a fit. */
function fitScale(fit: Fit): Scale {
  const values = [
    ...fit.values.flatMap((y, i) => [y - Z95 * fit.errors[i], y + Z95 * fit.errors[i]]),
    ...fit.fit.map(([, y]) => y),
    fit.answer - Z95 * fit.answer_error,
    fit.answer + Z95 * fit.answer_error,
    fit.exact,
  ];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const margin = 0.05 * (high - low || 1);
  return scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP);
}

function draggable(
  handle: SVGElement,
  svg: SVGElement,
  xs: Scale,
  onMove: (to: number, dropped: boolean) => void,
): void {
  handle.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    const left = svg.getBoundingClientRect().left;
    const drag = (e: PointerEvent) => onMove(xs.invert(e.clientX - left), false);
    const drop = (e: PointerEvent) => {
      window.removeEventListener("pointermove", drag);
      onMove(xs.invert(e.clientX - left), true);
    };
    window.addEventListener("pointermove", drag);
    window.addEventListener("pointerup", drop, { once: true });
  });
}
