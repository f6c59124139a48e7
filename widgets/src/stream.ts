// MetricStream: live curves with bands.
import { Frame, h, onFrame, post, sharp, unique, type Model } from "./dom";
import { digits, label, scale, ticks, whole, type Scale } from "./scale";
import { spread, Store, thin, type Batch, type Thinned } from "./series";
import { SAMPLER_COLOURS } from "./theme";

const CYCLE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
const HEIGHT = 300;
const LEFT = 62;
const RIGHT = 118;
const TOP = 8;
const BOTTOM = 40;

/** The model's points, which outlive its views. */
export function listen(model: Model): { store: Store; onNews: Set<() => void>; end: () => void } {
  const store = new Store();
  const onNews = new Set<() => void>();
  const hear = (message: any, buffers: DataView[]) => {
    if (message.kind !== "points") return;
    const kind = store.take(message as Batch, buffers) ? "got" : "want";
    post(model, { kind, next: store.next });
    for (const tell of onNews) tell();
  };
  model.on("msg:custom", hear);
  post(model, { kind: "want", next: 0 });
  return { store, onNews, end: () => model.off("msg:custom", hear) };
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
  let drawn = new Map<string, Thinned>();

  const frame = new Frame(model, el, "stream", "Live curves", () => redraw());

  const pause = h(
    "button",
    { type: "button", "aria-pressed": "false", click: () => setPaused(!paused) },
    "Pause",
  );
  const whole_ = h("button", { type: "button", click: () => setZoom(null) }, "Show all");
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
        h("div", { class: "qtx-buttons" }, pause, whole_),
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
    if (name === "exact") return frame.colours.exact;
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

  /** Draws even while paused: the person has asked for another part. */
  const redraw = onFrame(draw);
  const paint = onFrame(() => {
    if (!paused) draw();
    tell();
  });

  function draw(): void {
    if (!frame.hasRoom()) return;
    for (const b of boxes) b.input.checked = get(b.trait);
    heading.textContent = get("title");
    heading.hidden = !get("title");
    const width = Math.max(220, plot.clientWidth);
    plot.setAttribute(
      "aria-label",
      `${get("y_label")} against ${get("x_label")}, ${store.series.size} curves`,
    );
    const context = sharp(canvas, width, HEIGHT);
    context.clearRect(0, 0, width, HEIGHT);
    empty.hidden = store.points > 0;
    const [low, high] = zoom ?? extent();
    const right = width > 480 ? RIGHT : 12;
    xs = scale(low, high, LEFT, width - right, get("log_x"));
    drawn = new Map();
    let [bottom, top] = [Infinity, -Infinity];
    const log: boolean = get("log_y");
    for (const [name, series] of store.series) {
      if (hidden.has(name)) continue;
      const curve = thin(series, xs);
      drawn.set(name, curve);
      const values = log ? curve.y.filter((y) => y > 0) : [];
      bottom = Math.min(bottom, log ? values.reduce((a, b) => Math.min(a, b), Infinity) : curve.low);
      top = Math.max(top, curve.high);
      for (const [, a, b] of curve.band) {
        if (!log || a > 0) bottom = Math.min(bottom, a);
        top = Math.max(top, b);
      }
    }
    const room = log ? 0 : 0.04 * (top - bottom || 0);
    const ys = scale(bottom - room, top + room, HEIGHT - BOTTOM, TOP, log);
    axes(context, xs, ys, width, right);
    context.save();
    context.beginPath();
    context.rect(LEFT, TOP - 2, xs.to - LEFT, HEIGHT - TOP - BOTTOM + 4);
    context.clip();
    for (const [name, curve] of drawn) {
      const clamp = (y: number) => ys(log && !(y > 0) ? ys.low : y);
      const colour = colourOf(name);
      if (curve.band.length) {
        context.fillStyle = colour;
        context.globalAlpha = 0.2;
        context.beginPath();
        curve.band.forEach(([x, , b], i) => (i ? context.lineTo(x, clamp(b)) : context.moveTo(x, clamp(b))));
        for (let i = curve.band.length - 1; i >= 0; i--)
          context.lineTo(curve.band[i][0], clamp(curve.band[i][1]));
        context.fill();
        context.globalAlpha = 1;
      }
      context.strokeStyle = colour;
      context.lineWidth = 1.6;
      context.lineJoin = "round";
      context.setLineDash(name === "monte-carlo" ? [6, 4] : []);
      context.beginPath();
      let pen = false;
      curve.x.forEach((x, i) => {
        const y = curve.y[i];
        if (y !== y || (log && !(y > 0))) pen = false;
        else if (pen) context.lineTo(x, ys(y));
        else {
          context.moveTo(x, ys(y));
          pen = true;
        }
      });
      context.stroke();
      if (curve.y.filter((y) => y === y).length === 1) {
        const i = curve.y.findIndex((y) => y === y);
        context.fillStyle = colour;
        context.beginPath();
        context.arc(curve.x[i], ys(curve.y[i]), 3, 0, 7);
        context.fill();
      }
    }
    context.setLineDash([]);
    context.restore();
    if (right === RIGHT && drawn.size <= 10) {
      const ends = [...drawn].filter(([, curve]) => curve.y.some((y) => y === y && (!log || y > 0)));
      const wishes = ends.map(([, curve]) => {
        const y = curve.y.findLast((y) => y === y && (!log || y > 0))!;
        return Math.min(HEIGHT - BOTTOM, Math.max(TOP, ys(y)));
      });
      const places = spread(wishes, 14, TOP + 4, HEIGHT - BOTTOM);
      context.font = "12px system-ui, sans-serif";
      context.textAlign = "left";
      context.textBaseline = "middle";
      ends.forEach(([name], i) => {
        context.fillStyle = colourOf(name);
        context.fillRect(xs.to + 5, places[i] - 1.5, 8, 3);
        context.fillStyle = frame.colours.text;
        context.fillText(name, xs.to + 16, places[i], right - 18);
      });
    }
    legends();
    paintOver();
    tell();
  }

  function axes(context: CanvasRenderingContext2D, xs: Scale, ys: Scale, width: number, right: number): void {
    context.font = "11px system-ui, sans-serif";
    context.lineWidth = 1;
    context.strokeStyle = frame.colours.line;
    context.fillStyle = frame.colours.text;
    context.textAlign = "center";
    context.textBaseline = "top";
    for (const x of ticks(xs, (xs.to - xs.from) / 90)) {
      const at = Math.round(xs(x)) + 0.5;
      context.beginPath();
      context.moveTo(at, TOP);
      context.lineTo(at, HEIGHT - BOTTOM);
      context.stroke();
      context.fillText(label(x), at, HEIGHT - BOTTOM + 5);
    }
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const y of ticks(ys, 5)) {
      const at = Math.round(ys(y)) + 0.5;
      context.beginPath();
      context.moveTo(LEFT, at);
      context.lineTo(xs.to, at);
      context.stroke();
      context.fillText(label(y), LEFT - 6, at);
    }
    context.strokeStyle = frame.colours.muted;
    context.beginPath();
    context.moveTo(LEFT + 0.5, TOP);
    context.lineTo(LEFT + 0.5, HEIGHT - BOTTOM + 0.5);
    context.lineTo(xs.to, HEIGHT - BOTTOM + 0.5);
    context.stroke();
    context.textAlign = "center";
    context.textBaseline = "bottom";
    context.font = "12px system-ui, sans-serif";
    context.fillText(get("x_label"), (LEFT + width - right) / 2, HEIGHT - 3);
    context.save();
    context.translate(2, (TOP + HEIGHT - BOTTOM) / 2);
    context.rotate(-Math.PI / 2);
    context.textBaseline = "top";
    context.fillText(get("y_label"), 0, 0);
    context.restore();
  }

  const paintOver = onFrame(() => {
    if (!frame.hasRoom()) return;
    const width = Math.max(220, plot.clientWidth);
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
    const parts = [...drawn.keys()].slice(0, 6).map((name) => {
      const point = store.series.get(name)!.nearest(x);
      if (!point) return null;
      const band = point.low === point.low ? ` [${digits(point.low, 3)}, ${digits(point.high, 3)}]` : "";
      return h("span", {}, `${name}: ${digits(point.y, 4)}${band} at ${digits(point.x, 5)}`);
    });
    readout.replaceChildren(...parts.filter((part) => part !== null));
  });

  function legends(): void {
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

  function tell(): void {
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
  source.onNews.add(paint);
  frame.atEnd(() => source.onNews.delete(paint));
  frame.onChange(["log_x", "log_y", "title", "x_label", "y_label"], redraw);
  redraw();
  return () => frame.end();
}
