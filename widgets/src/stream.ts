// MetricStream: live curves with bands.
import { Frame, h, onFrame, post, sharp, unique, type Model } from "./dom";
import { digits, scale, whole, type Scale } from "./scale";
import { Store, thin, type Batch } from "./series";
import {
  BOTTOM,
  HEIGHT,
  LEFT,
  paintAxes,
  paintCurves,
  paintNames,
  RIGHT,
  TOP,
  type Curve,
} from "./stream_canvas";
import { SAMPLER_COLOURS } from "./theme";

const CYCLE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const MIN_WIDTH = 220;
const MIN_WIDTH_WITH_NAMES = 480;
/** Curves, at most, whose names stand at their ends. */
const MAX_NAMES = 10;
const MAX_READOUT_CURVES = 6;

/** The points of a model, which stay when its views are closed. */
export function listen(model: Model): { store: Store; onPoints: Set<() => void>; end: () => void } {
  const store = new Store();
  const onPoints = new Set<() => void>();
  const hear = (message: any, buffers: DataView[]) => {
    if (message.kind !== "points") return;
    const kind = store.take(message as Batch, buffers) ? "got" : "want";
    post(model, { kind, next: store.next });
    for (const follow of onPoints) follow();
  };
  model.on("msg:custom", hear);
  post(model, { kind: "want", next: 0 });
  return { store, onPoints, end: () => model.off("msg:custom", hear) };
}

export function render(model: Model, el: HTMLElement, source: ReturnType<typeof listen>): () => void {
  const { store } = source;
  const get = (name: string) => model.get(name);
  let zoom: [number, number] | null = null;
  let paused = false;
  let frozen = 0;
  let cursor: number | null = null;
  let drag: [number, number] | null = null;
  const hidden = new Set<string>();
  let xs: Scale = scale(0, 1, LEFT, LEFT + 100);
  let curves: Curve[] = [];

  const frame = new Frame(model, el, "stream", "Live curves", () => redraw());

  const pause = h(
    "button",
    { type: "button", "aria-pressed": "false", click: () => setPaused(!paused) },
    "Pause",
  );
  const showAll = h("button", { type: "button", click: () => setZoom(null) }, "Show all");
  const box = (trait: "log_x" | "log_y", name: string) => {
    const input = h("input", { type: "checkbox", change: () => frame.set({ [trait]: input.checked }) });
    return { trait, input, element: h("label", { class: "qtx-check" }, input, name) };
  };
  const boxes = [box("log_x", "logarithmic x"), box("log_y", "logarithmic y")];
  const legend = h("div", { class: "qtx-legend", role: "group", "aria-label": "curves" });
  const canvas = h("canvas", { "aria-hidden": "true" });
  const over = h("canvas", { class: "qtx-over", "aria-hidden": "true" });
  const helpId = unique("help");
  const plot = h(
    "div",
    {
      class: "qtx-plot",
      tabindex: 0,
      role: "application",
      "aria-roledescription": "chart",
      "aria-describedby": helpId,
      pointermove: (event: PointerEvent) => {
        cursor = event.offsetX;
        if (drag) drag[1] = event.offsetX;
        paintOver();
      },
      pointerleave: () => {
        cursor = null;
        paintOver();
      },
      pointerdown: (event: PointerEvent) => {
        if (event.button !== 0) return;
        drag = [event.offsetX, event.offsetX];
        plot.setPointerCapture(event.pointerId);
      },
      pointerup: () => {
        if (drag && Math.abs(drag[1] - drag[0]) > 5) {
          const ends = drag.map((x) => xs.invert(Math.min(xs.to, Math.max(xs.from, x))));
          setZoom([Math.min(...ends), Math.max(...ends)]);
        }
        drag = null;
        paintOver();
      },
      pointercancel: () => {
        drag = null;
        paintOver();
      },
      dblclick: () => setZoom(null),
      wheel: (event: WheelEvent) => {
        if (document.activeElement !== plot && !event.ctrlKey) return;
        event.preventDefault();
        zoomBy(event.offsetX, event.deltaY > 0 ? 1.25 : 0.8);
      },
      keydown: (event: KeyboardEvent) => {
        const act: Record<string, () => void> = {
          ArrowLeft: () => shift(-0.1),
          ArrowRight: () => shift(0.1),
          "+": () => zoomBy((xs.from + xs.to) / 2, 0.5),
          "=": () => zoomBy((xs.from + xs.to) / 2, 0.5),
          "-": () => zoomBy((xs.from + xs.to) / 2, 2),
          "0": () => setZoom(null),
          " ": () => setPaused(!paused),
        };
        if (!(event.key in act)) return;
        act[event.key]();
        event.preventDefault();
      },
    },
    canvas,
    over,
  );
  const heading = h("h2", {});
  const empty = h("p", { class: "qtx-note" }, "No points yet: call push(series, x, y) to begin.");
  const readout = h("p", { class: "qtx-readout" });
  const status = h("p", { class: "qtx-status", role: "status" });
  frame.root.append(
    h("header", {}, heading, frame.exports()),
    h(
      "div",
      { class: "qtx-columns" },
      h(
        "div",
        { class: "qtx-controls" },
        h("div", { class: "qtx-buttons" }, pause, showAll),
        ...boxes.map((b) => b.element),
        legend,
      ),
      h("div", { class: "qtx-picture" }, empty, plot, readout),
    ),
    frame.error,
    status,
    h(
      "p",
      { class: "qtx-hidden", id: helpId },
      "Left and right move, plus and minus zoom, 0 shows all, Space pauses.",
    ),
  );

  function colourOf(name: string): string {
    if (name === "exact" || name.endsWith("exact attention")) return frame.colours.exact;
    if (name === "monte-carlo") return frame.colours.baseline;
    if (name in SAMPLER_COLOURS) return SAMPLER_COLOURS[name as keyof typeof SAMPLER_COLOURS];
    return CYCLE[[...store.series.keys()].indexOf(name) % CYCLE.length];
  }

  function setPaused(on: boolean): void {
    paused = on;
    frozen = store.points;
    pause.textContent = on ? "Go on" : "Pause";
    pause.setAttribute("aria-pressed", String(on));
    frame.root.toggleAttribute("data-paused", on);
    paint();
  }

  function extent(): [number, number] {
    let [low, high] = [Infinity, -Infinity];
    for (const [name, series] of store.series) {
      if (hidden.has(name) || series.count === 0) continue;
      low = Math.min(low, series.low);
      high = Math.max(high, series.high);
    }
    return [low, high];
  }

  function setZoom(to: [number, number] | null): void {
    zoom = to && to[1] > to[0] ? to : null;
    redraw();
  }

  function zoomBy(pixel: number, factor: number): void {
    const ends = [xs.from, xs.to].map((end) => xs.invert(pixel + (end - pixel) * factor)) as [number, number];
    const [low, high] = extent();
    setZoom(factor > 1 && ends[0] <= low && ends[1] >= high ? null : ends);
  }

  function shift(share: number): void {
    const by = share * (xs.to - xs.from);
    setZoom([xs.invert(xs.from + by), xs.invert(xs.to + by)]);
  }

  /** Draws even while paused, because another part was asked for. */
  const redraw = onFrame(draw);
  const paint = onFrame(() => {
    if (!paused) draw();
    showStatus();
  });

  function draw(): void {
    if (!frame.hasRoom()) return;
    for (const b of boxes) b.input.checked = get(b.trait);
    heading.textContent = get("title");
    heading.hidden = !get("title");
    const names = { x: get("x_label"), y: get("y_label") };
    plot.setAttribute("aria-label", `${names.y} against ${names.x}, ${store.series.size} curves`);
    const width = Math.max(MIN_WIDTH, plot.clientWidth);
    const context = sharp(canvas, width, HEIGHT);
    context.clearRect(0, 0, width, HEIGHT);
    empty.hidden = store.points > 0;
    const right = width > MIN_WIDTH_WITH_NAMES ? RIGHT : 12;
    xs = scale(...(zoom ?? extent()), LEFT, width - right, get("log_x"));
    curves = [...store.series]
      .filter(([name]) => !hidden.has(name))
      .map(([name, series]) => ({ name, points: thin(series, xs), colour: colourOf(name) }));
    const ys = verticalScale(curves, get("log_y"));
    paintAxes(context, xs, ys, names, frame.colours);
    paintCurves(context, curves, xs, ys);
    if (right === RIGHT && curves.length <= MAX_NAMES) paintNames(context, curves, xs, ys, frame.colours);
    showLegend();
    paintOver();
    showStatus();
  }

  const paintOver = onFrame(() => {
    if (!frame.hasRoom()) return;
    const width = Math.max(MIN_WIDTH, plot.clientWidth);
    const context = sharp(over, width, HEIGHT);
    context.clearRect(0, 0, width, HEIGHT);
    if (drag) {
      context.fillStyle = frame.colours.accent;
      context.globalAlpha = 0.2;
      context.fillRect(drag[0], TOP, drag[1] - drag[0], HEIGHT - TOP - BOTTOM);
      context.globalAlpha = 1;
    }
    const inside = cursor !== null && cursor >= xs.from && cursor <= xs.to && store.points > 0;
    if (!inside) {
      readout.textContent = "Drag over a part to zoom in; point at it for its numbers.";
      return;
    }
    context.strokeStyle = frame.colours.muted;
    context.beginPath();
    context.moveTo(cursor! + 0.5, TOP);
    context.lineTo(cursor! + 0.5, HEIGHT - BOTTOM);
    context.stroke();
    const x = xs.invert(cursor!);
    const parts = curves.slice(0, MAX_READOUT_CURVES).map(({ name }) => {
      const point = store.series.get(name)!.nearest(x);
      if (!point) return null;
      const band = point.low === point.low ? ` [${digits(point.low, 3)}, ${digits(point.high, 3)}]` : "";
      return h("span", {}, `${name}: ${digits(point.y, 4)}${band} at ${digits(point.x, 5)}`);
    });
    readout.replaceChildren(...parts.filter((part) => part !== null));
  });

  function showLegend(): void {
    const names = [...store.series.keys()];
    if (legend.children.length !== names.length) {
      legend.replaceChildren(
        ...names.map((name) => {
          const input = h("input", {
            type: "checkbox",
            checked: !hidden.has(name),
            change: () => {
              if (input.checked) hidden.delete(name);
              else hidden.add(name);
              redraw();
            },
          });
          const swatch = h("i", { class: "qtx-swatch" });
          return h("label", { class: "qtx-check" }, input, swatch, h("span", {}, name), h("output", {}));
        }),
      );
    }
    [...legend.children].forEach((row, i) => {
      (row.querySelector("i") as HTMLElement).style.background = colourOf(names[i]);
      row.querySelector("output")!.textContent = digits(store.series.get(names[i])!.last, 4);
    });
  }

  function showStatus(): void {
    const bands = [...store.series.values()].some((series) => series.bands);
    const parts = [`${whole(store.points)} points`];
    if (paused) parts.push(`paused, ${whole(store.points - frozen)} came since`);
    if (store.next < store.total) parts.push(`${whole(store.total - store.next)} on their way`);
    if (store.lost) parts.push(`the first ${whole(store.lost)} are only in the run's files`);
    if (store.repaired) parts.push(`${store.repaired} gaps repaired`);
    if (bands) parts.push("bands are 95 % intervals");
    status.textContent = parts.join(" · ");
    frame.root.dataset.points = String(store.points);
  }

  (frame.root as any).qtxStore = store;
  source.onPoints.add(paint);
  frame.atEnd(() => source.onPoints.delete(paint));
  frame.onChange(["log_x", "log_y", "title", "x_label", "y_label"], redraw);
  redraw();
  return () => frame.end();
}

/** The vertical scale that shows all of some curves. */
function verticalScale(curves: Curve[], log: boolean): Scale {
  let [bottom, top] = [Infinity, -Infinity];
  for (const { points } of curves) {
    const positive = log ? points.y.filter((y) => y > 0) : [];
    bottom = Math.min(bottom, log ? positive.reduce((a, b) => Math.min(a, b), Infinity) : points.low);
    top = Math.max(top, points.high);
    for (const [, low, high] of points.band) {
      if (!log || low > 0) bottom = Math.min(bottom, low);
      top = Math.max(top, high);
    }
  }
  const margin = log ? 0 : 0.04 * (top - bottom || 0);
  return scale(bottom - margin, top + margin, HEIGHT - BOTTOM, TOP, log);
}
