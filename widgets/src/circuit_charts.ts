// What was measured of a row: its distribution, its fidelity as shots arrive, and the zero-noise fit.
import { axes, errorPoint, legendMark, line, path, resize, text, Z95, type Panel } from "./charts";
import { s } from "./dom";
import { digits, scale, ticks, whole, withError, type Scale } from "./scale";

export interface FidelityPoint {
  shots: number;
  fidelity: number;
  error: number;
  classical: number;
  classical_error: number | null;
}

export interface Counts {
  shots: number;
  discarded: number;
  counts: number[];
  /** Of the same number of classical draws. */
  classical: number[];
  curve: FidelityPoint[];
  /** Total variation from the row and its standard error, of these counts and of the classical draws. */
  distance: [number, number] | null;
  classical_distance: [number, number] | null;
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

const HEIGHT = 210;
/** The distribution and the strip are in sight together where the window is as low as a laptop's. */
const [LOW_HEIGHT, LOW_STRIP_HEIGHT, LOW_WINDOW] = [176, 130, 900];
const STRIP_HEIGHT = 150;
const BOTTOM = 34;
const TOP = 8;

/** Draws exact, measured and extrapolated probabilities of the likeliest keys, and of the rest. */
export function paintDistribution(
  panel: Panel,
  exact: number[],
  counts: Counts | null,
  fit: Fit | null,
  colour: string,
  edit: Editing,
): void {
  const height = window.innerHeight < LOW_WINDOW ? LOW_HEIGHT : HEIGHT;
  const width = resize(panel, height);
  const total = counts?.counts.reduce((a, b) => a + b, 0) ?? 0;
  const shares = counts && total ? counts.counts.map((x) => x / total) : null;
  const baseline = counts?.shots ? counts.classical.map((x) => x / counts.shots) : null;
  const slots = keySlots(edit.original, shares, width - 54);
  const rest = slots.at(-1)!.keys.length > 1;
  const sum = (of: number[], keys: number[]) => keys.reduce((all, j) => all + of[j], 0);
  const low = slots[0].at;
  const high = slots.at(-1)!.at;
  const xs = scale(low - 0.6, high + 0.6, 46, width - 8);
  const top = Math.max(
    ...slots.flatMap(({ keys }) => [exact, shares, fit?.p].map((of) => (of ? sum(of, keys) : 0))),
  );
  const ys = scale(0, edit.top ?? Math.max(top, 1e-9) * 1.08, height - BOTTOM, TOP);
  const each = (xs.to - xs.from) / (high - low + 1.2);
  const radius = Math.min(4, Math.max(1.5, each / 5));
  const aside = fit ? each / 6 : 0;
  const nodes: Node[] = axes(
    height,
    xs,
    ys,
    rest ? "key: the most likely ones, and the rest" : "key",
    "probability",
    keyTicks(slots, xs),
  );
  for (const { at, keys } of slots) {
    const [x, p] = [xs(at), Math.min(ys.high, sum(exact, keys))];
    const bar = { stroke: "var(--qtx-exact)", "stroke-width": Math.min(3, Math.max(1, each / 6)) };
    nodes.push(line(x, ys(0), x, ys(p), bar));
    if (baseline) {
      const reach = Math.min(9, Math.max(1, each / 3));
      const dash = { stroke: "var(--qtx-baseline)", "stroke-width": 2 };
      const y = ys(Math.min(ys.high, sum(baseline, keys)));
      nodes.push(line(x - reach, y, x + reach, y, dash));
    }
    if (shares) {
      const share = sum(shares, keys);
      const stdError = Math.sqrt((share * (1 - share)) / total);
      nodes.push(errorPoint(x - aside, ys, share, stdError, { colour, filled: false, radius }));
    }
    if (fit) {
      const error = Math.hypot(...keys.map((j) => fit.p_error[j]));
      nodes.push(errorPoint(x + aside, ys, sum(fit.p, keys), error, { colour, filled: true, radius }));
    }
    if (keys.length === 1) nodes.push(keyHandle(keys[0], exact[keys[0]], x, each, ys, panel.svg, edit));
  }
  panel.svg.replaceChildren(...nodes);
  panel.svg.setAttribute("role", edit.onWeight ? "group" : "img"); // its bars are sliders
  const discarded = counts?.discarded ? `, ${whole(counts.discarded)} discarded` : "";
  panel.title.textContent = counts?.shots
    ? `${whole(counts.shots)} shots against the exact row; bars: 95 %`
    : "The exact row; nothing is measured yet";
  const exactMark = legendMark("bar", edit.onWeight ? "exact: drag" : "exact", colour);
  if (edit.onWeight) exactMark.title = "Drag a bar, or change the focused one by arrow keys";
  panel.caption.replaceChildren(
    exactMark,
    legendMark("dash", "classical draws", colour),
    legendMark("hollow", `measured${discarded}`, colour),
    ...(fit ? [legendMark("filled", "extrapolated", colour)] : []),
  );
  const shown = slots.reduce((all, { keys }) => all + keys.length, 0);
  panel.svg.setAttribute("aria-label", `distribution over ${shown} keys; ${panel.title.textContent}`);
}

/** Keys that are drawn together: one, or all that are the rest. */
export interface Slot {
  at: number;
  name: string;
  keys: number[];
}

/** Pixels of a key at least, where all from the first to the last are drawn, and where only some are. */
const MIN_KEY_WIDTH = 7;
const NAMED_KEY_WIDTH = 30;

/** The keys to draw in a width: all in their order, or the most likely ones and the sum of the rest. */
export function keySlots(exact: number[], shares: number[] | null, width: number): Slot[] {
  const seen = (j: number) => exact[j] > 0 || (shares?.[j] ?? 0) > 0;
  const keys = exact.map((_, j) => j).filter(seen);
  if (!keys.length) return [{ at: 0, name: "0", keys: [0] }];
  const span = keys.at(-1)! - keys[0] + 1;
  if (span * MIN_KEY_WIDTH <= width) return keys.map((j) => ({ at: j, name: String(j), keys: [j] }));
  const room = Math.max(4, Math.floor(width / NAMED_KEY_WIDTH) - 4);
  if (keys.length <= room) return keys.map((j, at) => ({ at, name: String(j), keys: [j] }));
  const order = [...keys].sort((a, b) => exact[b] - exact[a] || a - b);
  const [first, rest] = [order.slice(0, room).sort((a, b) => a - b), order.slice(room)];
  const slots: Slot[] = first.map((j, at) => ({ at, name: String(j), keys: [j] }));
  return [...slots, { at: first.length + 2, name: `rest (${rest.length} keys)`, keys: rest }];
}

/** The ticks of the axis of keys: round numbers where all keys stand in their places, else each slot's name. */
export function keyTicks(slots: Slot[], xs: Scale): [number, string][] {
  if (!slots.every(({ at, keys }) => keys.length === 1 && at === keys[0]))
    return slots.map(({ at, name }) => [at, name]);
  const round = ticks(xs, Math.max(2, (xs.to - xs.from) / 70));
  return round.filter(Number.isInteger).map((key) => [key, String(key)]);
}

/** What can be done with a key in the picture of the distribution. */
export interface Editing {
  /** The row before it was edited: it says which keys are drawn. */
  original: number[];
  /** The end of the vertical axis while a bar is dragged, so that nothing moves under the pointer. */
  top: number | null;
  /** The key that the keyboard changes. */
  active: number;
  onKey: ((key: number) => void) | null;
  onWeight: ((key: number, weight: number, dropped: boolean) => void) | null;
  onActive: (key: number) => void;
}

/** Weights with one of them at another share; the others keep their ratios. */
export function reweighted(weights: number[], key: number, share: number): number[] {
  const others = weights.reduce((all, w, j) => (j === key ? all : all + w), 0);
  if (others <= 0) return weights;
  return weights.map((w, j) => (j === key ? share : (w / others) * (1 - share)));
}

const MIN_SHARE = 0.0005;
const MAX_SHARE = 0.9995;
const DRAG_PIXELS = 3;

/** The place of a key that is clicked, dragged and moved by the arrow keys. */
function keyHandle(
  key: number,
  share: number,
  x: number,
  width: number,
  ys: Scale,
  svg: SVGSVGElement,
  edit: Editing,
): SVGElement {
  const says = `key ${key}: ${digits(100 * share, 3)} %`;
  const area = s(
    "rect",
    {
      x: x - width / 2,
      y: ys.to,
      width: Math.max(1, width),
      height: ys.from - ys.to,
      fill: "transparent",
      class: edit.onWeight ? "qtx-hit qtx-weight" : "qtx-hit",
      "data-key": key,
    },
    s("title", {}, edit.onKey ? `${says}; click: extrapolate its probability` : says),
  );
  const { onWeight } = edit;
  if (!onWeight) {
    area.addEventListener("click", () => edit.onKey?.(key));
    return area;
  }
  const clamped = (p: number) => Math.min(MAX_SHARE, Math.max(MIN_SHARE, p));
  for (const [name, value] of Object.entries({
    role: "slider",
    tabindex: key === edit.active ? 0 : -1,
    "aria-label": `weight of key ${key}`,
    "aria-orientation": "vertical",
    "aria-valuemin": 0,
    "aria-valuemax": 100,
    "aria-valuenow": Number((100 * share).toFixed(2)),
    "aria-valuetext": `${digits(100 * share, 3)} %`,
  }))
    area.setAttribute(name, String(value));
  area.addEventListener("keydown", (event) => {
    const step = { ArrowUp: 0.01, ArrowDown: -0.01, PageUp: 0.05, PageDown: -0.05 }[event.key];
    const side = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step === undefined && side === undefined) return;
    event.preventDefault();
    if (step !== undefined) onWeight(key, clamped(share + step), true);
    else {
      const all = [...svg.querySelectorAll<SVGElement>(".qtx-weight")];
      const next = all[all.indexOf(area as SVGElement) + side!];
      if (next) edit.onActive(Number(next.dataset.key));
    }
  });
  area.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    const top = svg.getBoundingClientRect().top;
    let dragged = false;
    const to = (e: PointerEvent) => clamped(ys.invert(e.clientY - top));
    const drag = (e: PointerEvent) => {
      dragged ||= Math.abs(e.clientY - event.clientY) > DRAG_PIXELS;
      if (dragged) onWeight(key, to(e), false);
    };
    const drop = (e: PointerEvent) => {
      window.removeEventListener("pointermove", drag);
      if (dragged) onWeight(key, to(e), true);
      else {
        edit.onActive(key);
        edit.onKey?.(key);
      }
    };
    window.addEventListener("pointermove", drag);
    window.addEventListener("pointerup", drop, { once: true });
  });
  return area;
}

/** Draws the fidelity after each part, on an axis up to `shots`. */
export function paintFidelity(panel: Panel, curve: FidelityPoint[], shots: number, colour: string): void {
  const height = window.innerHeight < LOW_WINDOW ? LOW_STRIP_HEIGHT : STRIP_HEIGHT;
  const width = resize(panel, height);
  const [first, last] = [curve[0], curve.at(-1)];
  const high = Math.max(shots, last?.shots ?? 0, 32);
  const xs = scale(Math.min(16, first?.shots ?? 16), high, 50, width - 16, true);
  const lowest = Math.min(0.9, ...curve.map((x) => Math.min(x.fidelity - Z95 * x.error, x.classical)));
  const ys = scale(Math.max(0, lowest), 1, height - BOTTOM, TOP);
  const nodes = axes(height, xs, ys, "shots", "fidelity");
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
  panel.title.textContent = "Hellinger fidelity as shots arrive";
  panel.caption.replaceChildren(
    legendMark("hollow", "measured, bars: 95 %", colour),
    legendMark("dashed", "as many classical draws", colour),
  );
  panel.svg.setAttribute(
    "aria-label",
    last
      ? `fidelity ${withError(last.fidelity, Z95 * last.error)}, classical draws ${digits(last.classical, 4)}`
      : "no shots yet",
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
  const [last, before] = [...new Set([0, ...fit.levels])].sort((a, b) => b - a);
  const beside = (last + (before ?? last)) / 2; // where no point covers the name
  const curve = fit.fit.filter(([x]) => x <= highest).map(([x, y]): [number, number] => [xs(x), ys(y)]);
  nodes.push(
    line(xs.from, exact, xs.to, exact, { stroke: "var(--qtx-exact)", "stroke-width": 1.5 }),
    text(xs(beside), exact - 4, "exact", "middle", { class: "qtx-halo" }),
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
