// The strip under the maps: error and variance against draws, of all samplers, for the head in view.
import { axes, line, makePanel, path, resize, text, type Panel } from "./charts";
import { h, onFrame, s, unique, type Frame } from "./dom";
import type { StripRequest } from "./lens_requests";
import { scale, whole, type Scale } from "./scale";
import { SAMPLER_COLOURS } from "./theme";

/** Heights of wide pictures, and of those that are narrower than `MIN_WIDE`. */
const [WIDE_HEIGHT, NARROW_HEIGHT] = [150, 172];
const MIN_WIDE = 560;
const MARGIN = { left: 52, right: 86, top: 8, bottom: 32 };
/** Pixels between the names at the ends of the curves, at least. */
const NAME_HEIGHT = 12;

/** Orders of magnitude that are drawn; what is smaller, as where all keys are drawn, lies on the axis. */
const MAX_DECADES = 4;

/** What was measured of a sampler at a number of draws. */
export interface StripPoint {
  sampler: string;
  draws: number;
  /** Root mean square of ‖ô − o‖ / ‖o‖ over repetitions. */
  error: number;
  /** Σ Var(ô) / ‖o‖². */
  variance: number;
}

type Measure = "error" | "variance";

/** Positions near those that are wanted, in the same order, at least `gap` apart and from `low` to `high`. */
export function spread(wanted: number[], gap: number, low: number, high: number): number[] {
  const order = wanted.map((_, i) => i).sort((a, b) => wanted[a] - wanted[b]);
  const at = order.map((i) => Math.min(high, Math.max(low, wanted[i])));
  for (let i = 1; i < at.length; i++) at[i] = Math.max(at[i], at[i - 1] + gap);
  for (let i = at.length - 1, most = high; i >= 0; i--, most -= gap) at[i] = Math.min(at[i], most);
  const out = Array<number>(wanted.length);
  order.forEach((index, i) => (out[index] = at[i]));
  return out;
}

/** The colour of a sampler in every figure. */
export const samplerColour = (name: string): string =>
  (SAMPLER_COLOURS as Record<string, string>)[name] ??
  (name === "monte-carlo" ? "var(--qtx-baseline)" : "var(--qtx-accent)");

/** What the maps show, `draws` of `sampler`, and how far the strip is: points that are left, and a note. */
interface StripState {
  draws: number | null;
  sampler: string;
  left: number;
  note: string;
}

interface Strip {
  element: HTMLElement;
  /** Begins anew, for another head. */
  clear(): void;
  add(points: StripPoint[]): void;
  /** Says how far it is, and paints. */
  paint(state: StripState): void;
}

function strip(): Strip {
  let points: StripPoint[] = [];
  let state: StripState = { draws: null, sampler: "", left: 0, note: "" };
  const error = makePanel("Error of the output against draws", "qtx-strip-error");
  const variance = makePanel("Variance of the output against draws", "qtx-strip-variance");
  const caption = h("p", { class: "qtx-note" });
  const dotted = () => line(0, 0, 0, 0, { stroke: "var(--qtx-muted)", "stroke-dasharray": "2 3" });
  const marks = { error: dotted(), variance: dotted() };
  const scales: Partial<Record<Measure, Scale>> = {};
  /** What was painted last: while the slider moves, only the lines at the number of draws change. */
  let painted = "";
  const element = h("div", { class: "qtx-strip" });
  element.append(choice(), h("div", {}, error.box, variance.box), caption);

  /** A switch between the two pictures, which is there where there is room for one of them only. */
  function choice(): HTMLElement {
    const name = unique("strip");
    const show = (measure: string) => () => {
      element.dataset.shown = measure;
      paint(state);
    };
    const radio = (value: Measure) => {
      const checked = value === "error";
      return h("label", {}, h("input", { type: "radio", name, value, checked, change: show(value) }), value);
    };
    element.dataset.shown = "error";
    const label = h("span", {}, "Against draws");
    const group = { class: "qtx-modes", role: "radiogroup", "aria-label": "what is shown against draws" };
    return h("div", group, label, radio("error"), radio("variance"));
  }

  function paintPanel(
    panel: Panel,
    measure: Measure,
    name: string,
    slope: { power: number; label: string },
    sampler: string,
  ): void {
    if (panel.box.clientWidth === 0) return; // the other one is shown
    const height = panel.box.clientWidth < MIN_WIDE ? NARROW_HEIGHT : WIDE_HEIGHT;
    const width = resize(panel, height);
    const known = points.filter((point) => point[measure] > 0);
    const values = known.map((point) => point[measure]);
    const counts = points.map((point) => point.draws);
    const xs = scale(Math.min(...counts), Math.max(...counts), MARGIN.left, width - MARGIN.right, true);
    const high = 1.3 * Math.max(...values);
    const low = Math.max(Math.min(...values) / 1.3, high / 10 ** MAX_DECADES);
    const ys = scale(low, high, height - MARGIN.bottom, MARGIN.top, true);
    panel.svg.replaceChildren(
      ...axes(height, xs, ys, "draws per row", name),
      ...reference(xs, ys, slope),
      marks[measure],
      ...curves(known, measure, xs, ys, sampler),
    );
    scales[measure] = xs;
    for (const [name, y] of Object.entries({ y1: ys.from, y2: ys.to }))
      marks[measure].setAttribute(name, String(y));
    panel.svg.setAttribute("aria-label", spoken(known, measure, name));
  }

  /** Moves the line at the number of draws that the maps show. */
  function mark(measure: Measure, draws: number | null): void {
    const [xs, at] = [scales[measure], marks[measure]];
    const isThere = xs !== undefined && draws !== null && draws >= xs.low && draws <= xs.high;
    at.toggleAttribute("hidden", !isThere);
    if (isThere) for (const name of ["x1", "x2"]) at.setAttribute(name, String(xs(draws)));
  }

  function curves(known: StripPoint[], measure: Measure, xs: Scale, ys: Scale, shown: string): SVGElement[] {
    const names = [...new Set(known.map((point) => point.sampler))];
    const series = names.map((name) =>
      known
        .filter((point) => point.sampler === name)
        .sort((a, b) => a.draws - b.draws)
        .map((point): [number, number] => [xs(point.draws), ys(Math.max(ys.low, point[measure]))]),
    );
    const ends = series.map((curve) => curve[curve.length - 1]);
    const places = spread(
      ends.map(([, y]) => y),
      NAME_HEIGHT,
      ys.to + 4,
      ys.from - 2,
    );
    return names.flatMap((name, i) => {
      const stroke = samplerColour(name);
      const dash = name === "monte-carlo" ? { "stroke-dasharray": "5 3" } : {};
      const bold = name === shown ? { "font-weight": 700 } : {};
      return [
        s("path", { d: path(series[i]), stroke, "stroke-width": name === shown ? 2.6 : 1.6, ...dash }),
        ...series[i].map(([x, y]) => s("circle", { cx: x, cy: y, r: 2, fill: stroke })),
        s("path", {
          d: `M${ends[i][0] + 3} ${ends[i][1]}L${xs.to + 12} ${places[i]}`,
          stroke,
          "stroke-width": 0.7,
        }),
        text(xs.to + 14, places[i] + 4, name, "start", bold),
      ];
    });
  }

  function paint(now: StripState): void {
    state = now;
    const { draws, sampler, left, note } = state;
    element.hidden = points.length === 0;
    if (element.hidden) return;
    const look = JSON.stringify([points.length, sampler, error.box.clientWidth, variance.box.clientWidth]);
    if (painted !== look) {
      painted = look;
      paintPanel(error, "error", "‖ô − o‖ / ‖o‖", { power: -0.5, label: "∝ 1/√S" }, sampler);
      paintPanel(variance, "variance", "Var ô / ‖o‖²", { power: -1, label: "∝ 1/S" }, sampler);
    }
    mark("error", draws);
    mark("variance", draws);
    caption.textContent = `${note}${left ? ` Still to come: ${whole(left)} points.` : ""}`;
  }

  return {
    element,
    clear: () => {
      points = [];
      painted = "";
    },
    add: (more) => {
      const same = (a: StripPoint, b: StripPoint) => a.sampler === b.sampler && a.draws === b.draws;
      points = [...points.filter((old) => !more.some((point) => same(point, old))), ...more];
      painted = "";
    },
    paint,
  };
}

/** A line of a slope, through the upper left of the picture. */
function reference(xs: Scale, ys: Scale, slope: { power: number; label: string }): SVGElement[] {
  const y = (x: number) => (ys.high / 1.15) * (x / xs.low) ** slope.power;
  const end = Math.min(xs.high, xs.low * (ys.low / (ys.high / 1.15)) ** (1 / slope.power));
  const stroke = { stroke: "var(--qtx-muted)", "stroke-width": 1, "stroke-dasharray": "1 3" };
  const middle = Math.sqrt(xs.low * end);
  return [
    line(xs(xs.low), ys(y(xs.low)), xs(end), ys(y(end)), stroke),
    text(xs(middle) + 6, ys(y(middle)) - 4, slope.label, "start", { class: "qtx-halo" }),
  ];
}

/** The ends of the curves in words, for those who do not see them. */
function spoken(known: StripPoint[], measure: Measure, name: string): string {
  const last = new Map<string, StripPoint>();
  for (const point of known)
    if (point.draws >= (last.get(point.sampler)?.draws ?? 0)) last.set(point.sampler, point);
  const ends = [...last.values()].map(
    (point) => `${point.sampler} ${point[measure].toPrecision(2)} at ${point.draws} draws`,
  );
  return `${name} against the number of draws: ${ends.join(", ")}`;
}

/** The lens that a strip belongs to. */
interface StripHost {
  frame: Frame;
  /** Names the lens in requests. */
  view: string;
  /** Queries of a head. */
  rows: number;
  /** What the maps show; null before there are any. */
  shown(): { draws: number | null; sampler: string } | null;
  ask(request: StripRequest): void;
}

/** The strip of a lens, which asks for what it shows.
 *
 * That is asked for once the strip is in sight, and when the head changes. A page without a kernel measures it
 * anyway, in time that nobody else needs, so that who scrolls to it finds it filled. */
export interface MeasuredStrip {
  element: HTMLElement;
  /** Asks for the head that is shown, unless that is measured already. */
  request(): void;
  /** Takes in points that were measured. */
  take(message: any): void;
  paint(): void;
}

export function measuredStrip({ frame, view, rows, shown, ask }: StripHost): MeasuredStrip {
  const get = (name: string) => frame.model.get(name);
  const curves = strip();
  const element = h("div", { class: "qtx-strip-place" }, curves.element);
  const measuresUnseen = get("without_kernel") === true;
  let inSight = false;
  let seq = 0;
  let drawnSeq = 0; // of the points that are shown
  let measuredHead = "";
  let state = { left: 0, note: "" };
  const sight = new IntersectionObserver((entries) => {
    inSight = entries.some((entry) => entry.isIntersecting);
    request();
  });
  sight.observe(element);
  frame.atEnd(() => sight.disconnect());

  function request(): void {
    const [layer, head]: [number, number] = [get("layer"), get("head")];
    const [maps, name] = [shown(), `${layer} ${head}`];
    if ((!inSight && !measuresUnseen) || !maps || name === measuredHead) return;
    measuredHead = name;
    seq += 1;
    ask({ kind: "strip", view, seq, layer, head, sampler: maps.sampler });
  }

  function take(message: any): void {
    if (message.view !== view || message.seq !== seq) return;
    if (drawnSeq !== message.seq) curves.clear();
    drawnSeq = message.seq;
    curves.add(message.points);
    const on = message.rows < rows ? `${whole(message.rows)} of ${whole(rows)} queries` : "all queries";
    const note = `Layer ${message.layer}, head ${message.head}: ${message.repetitions} repetitions on ${on}.`;
    state = { left: message.left, note };
    paint();
  }

  const paint = onFrame(() => {
    const maps = shown();
    if (frame.hasRoom() && maps) curves.paint({ draws: maps.draws, sampler: maps.sampler, ...state });
  });

  return { element, request, take, paint };
}
