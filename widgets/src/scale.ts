// Axes: from numbers to pixels (by d3-scale), the ticks between them, and numbers as text.
import { ticks as linearTicks } from "d3-array";
import { scaleLinear, scaleLog, type ScaleContinuousNumeric } from "d3-scale";

/** A scale of d3, from `low` and `high` to the pixels `from` and `to`, which can be read off it. */
export type Scale = ScaleContinuousNumeric<number, number> & {
  log: boolean;
  low: number;
  high: number;
  from: number;
  to: number;
};

/** A scale over a range that is made valid: not empty, and positive where the scale is logarithmic. */
export function scale(low: number, high: number, from: number, to: number, log = false): Scale {
  [low, high] = validRange(low, high, log);
  const mapping = (log ? scaleLog() : scaleLinear()).domain([low, high]).range([from, to]);
  return Object.assign(mapping, { log, low, high, from, to });
}

function validRange(low: number, high: number, log: boolean): [number, number] {
  if (!(Number.isFinite(low) && Number.isFinite(high))) return log ? [0.1, 1] : [0, 1];
  if (log) {
    if (!(high > 0)) return [0.1, 1];
    if (!(low > 0)) return [high / 1e6, high];
    return low === high ? [low / 2, high * 2] : [low, high];
  }
  const margin = Math.abs(low) / 2 || 0.5;
  return low === high ? [low - margin, high + margin] : [low, high];
}

/** About `count` round numbers in the range of a scale. */
export function ticks(s: Scale, count = 6): number[] {
  if (!s.log || s.high / s.low < 10) return linearTicks(s.low, s.high, count);
  const text = s.tickFormat(count, "g"); // empty for those ticks that would stand too close
  return s.ticks(count).filter((x) => text(x) !== "");
}

const PREFIXES = ["", "k", "M", "G", "T"];

/** A tick's label: SI prefixes above ten thousand, powers of ten below a thousandth. */
export function label(x: number): string {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e4 && size < 1e15) {
    const power = Math.floor(Math.log10(size) / 3 + 1e-9);
    return `${Number((x / 1000 ** power).toPrecision(4))}${PREFIXES[power]}`;
  }
  if (size < 1e-3 || size >= 1e15)
    return x.toExponential(0) === x.toExponential(2).replace(".00", "")
      ? x.toExponential(0)
      : x.toExponential(1);
  return String(Number(x.toPrecision(4)));
}

/** A number with as many digits as its error bar allows: 0.083 ± 0.004. */
export function withError(x: number, error: number | null | undefined): string {
  if (!Number.isFinite(x)) return "–";
  if (error === null || error === undefined || !Number.isFinite(error) || error <= 0) return digits(x, 3);
  const places = Math.min(
    8,
    Math.max(
      0,
      1 - Math.floor(Math.log10(error) + 1e-9) - (error / 10 ** Math.floor(Math.log10(error)) >= 3 ? 1 : 0),
    ),
  );
  return `${fixed(x, places)} ± ${error.toFixed(places)}`;
}

/** A number with some decimal places; what is rounded to zero has no sign. */
export function fixed(x: number, places: number): string {
  const size = Math.abs(x).toFixed(places);
  return x < 0 && Number(size) > 0 ? `−${size}` : size;
}

/** A number in `count` significant digits. */
export function digits(x: number, count: number): string {
  if (!Number.isFinite(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size < 1e-4 || size >= 1e6 ? x.toExponential(count - 1) : String(Number(x.toPrecision(count)));
  return text.replace(/^-/, "−");
}

/** A whole number with thin spaces between thousands. */
export function whole(x: number): string {
  return Math.round(x)
    .toString()
    .replace(/\B(?=(\d{3})+(?!\d))/g, "\u2009");
}
