// What the live curves paint on their canvas: axes, curves with bands, and names at the ends of the lines.
import { label, ticks, type Scale } from "./scale";
import { spread, type Thinned } from "./series";
import type { COLOURS } from "./theme";

export const HEIGHT = 300;
export const LEFT = 62;
/** Room for the names of the curves, where there is room for them. */
export const RIGHT = 156;
export const TOP = 8;
export const BOTTOM = 40;

const NAME_HEIGHT = 14;

type Colours = (typeof COLOURS)[keyof typeof COLOURS];

/** A curve with its colour. */
export interface Curve {
  name: string;
  points: Thinned;
  colour: string;
}

/** Whether a value can be drawn on a scale. */
const drawable = (y: number, ys: Scale): boolean => y === y && (!ys.log || y > 0);

export function paintAxes(
  context: CanvasRenderingContext2D,
  xs: Scale,
  ys: Scale,
  names: { x: string; y: string },
  colours: Colours,
): void {
  const bottom = HEIGHT - BOTTOM;
  context.font = "11px system-ui, sans-serif";
  context.lineWidth = 1;
  context.strokeStyle = colours.line;
  context.fillStyle = colours.text;
  context.textAlign = "center";
  context.textBaseline = "top";
  for (const x of ticks(xs, (xs.to - xs.from) / 90)) {
    const at = Math.round(xs(x)) + 0.5;
    strokeLine(context, [at, TOP], [at, bottom]);
    context.fillText(label(x), at, bottom + 5);
  }
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const y of ticks(ys, 5)) {
    const at = Math.round(ys(y)) + 0.5;
    strokeLine(context, [LEFT, at], [xs.to, at]);
    context.fillText(label(y), LEFT - 6, at);
  }
  context.strokeStyle = colours.muted;
  strokeLine(context, [LEFT + 0.5, TOP], [LEFT + 0.5, bottom + 0.5], [xs.to, bottom + 0.5]);
  context.textAlign = "center";
  context.textBaseline = "bottom";
  context.font = "12px system-ui, sans-serif";
  context.fillText(names.x, (LEFT + xs.to) / 2, HEIGHT - 3);
  context.save();
  context.translate(2, (TOP + bottom) / 2);
  context.rotate(-Math.PI / 2);
  context.textBaseline = "top";
  context.fillText(names.y, 0, 0);
  context.restore();
}

function strokeLine(context: CanvasRenderingContext2D, ...points: [number, number][]): void {
  context.beginPath();
  points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.stroke();
}

/** Paints the curves inside the axes. */
export function paintCurves(context: CanvasRenderingContext2D, curves: Curve[], xs: Scale, ys: Scale): void {
  context.save();
  context.beginPath();
  context.rect(LEFT, TOP - 2, xs.to - LEFT, HEIGHT - TOP - BOTTOM + 4);
  context.clip();
  for (const { name, points, colour } of curves) {
    paintBand(context, points.band, ys, colour);
    context.strokeStyle = colour;
    context.lineWidth = 1.6;
    context.lineJoin = "round";
    context.setLineDash(name === "monte-carlo" ? [6, 4] : []);
    paintLine(context, points, ys);
    paintSinglePoint(context, points, ys, colour);
  }
  context.restore();
}

function paintBand(
  context: CanvasRenderingContext2D,
  band: Thinned["band"],
  ys: Scale,
  colour: string,
): void {
  if (!band.length) return;
  const at = (y: number) => ys(drawable(y, ys) ? y : ys.low);
  context.fillStyle = colour;
  context.globalAlpha = 0.2;
  context.beginPath();
  band.forEach(([x, , high], i) => (i ? context.lineTo(x, at(high)) : context.moveTo(x, at(high))));
  for (const [x, low] of [...band].reverse()) context.lineTo(x, at(low));
  context.fill();
  context.globalAlpha = 1;
}

function paintLine(context: CanvasRenderingContext2D, points: Thinned, ys: Scale): void {
  context.beginPath();
  let connected = false;
  points.x.forEach((x, i) => {
    const y = points.y[i];
    if (!drawable(y, ys)) connected = false;
    else if (connected) context.lineTo(x, ys(y));
    else {
      context.moveTo(x, ys(y));
      connected = true;
    }
  });
  context.stroke();
}

/** A curve of one point has no line: it is a dot. */
function paintSinglePoint(
  context: CanvasRenderingContext2D,
  points: Thinned,
  ys: Scale,
  colour: string,
): void {
  if (points.y.filter((y) => y === y).length !== 1) return;
  const i = points.y.findIndex((y) => y === y);
  context.fillStyle = colour;
  context.beginPath();
  context.arc(points.x[i], ys(points.y[i]), 3, 0, 7);
  context.fill();
}

/** Names behind the ends of the lines, apart from each other. */
export function paintNames(
  context: CanvasRenderingContext2D,
  curves: Curve[],
  xs: Scale,
  ys: Scale,
  colours: Colours,
): void {
  const ends = curves.flatMap(({ points, ...curve }) => {
    const y = points.y.findLast((y) => drawable(y, ys));
    return y === undefined ? [] : [{ ...curve, y: Math.min(HEIGHT - BOTTOM, Math.max(TOP, ys(y))) }];
  });
  const places = spread(
    ends.map((end) => end.y),
    NAME_HEIGHT,
    TOP + 4,
    HEIGHT - BOTTOM,
  );
  context.font = "12px system-ui, sans-serif";
  context.textAlign = "left";
  context.textBaseline = "middle";
  ends.forEach(({ name, colour }, i) => {
    context.fillStyle = colour;
    context.fillRect(xs.to + 5, places[i] - 1.5, 8, 3);
    context.fillStyle = colours.text;
    context.fillText(name, xs.to + 16, places[i], RIGHT - 18);
  });
}
