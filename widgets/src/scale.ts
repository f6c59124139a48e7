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
  const [sign, size] = [x < 0 ? "−" : "", Math.abs(x)];
  if (size >= 1e4 && size < 1e15) {
    const prefix = Math.floor(Math.log10(size) / 3 + 1e-9);
    return `${sign}${Number((size / 1000 ** prefix).toPrecision(4))}${PREFIXES[prefix]}`;
  }
  if (size < 1e-3 || size >= 1e15) return sign + power(size, 2);
  return sign + String(Number(size.toPrecision(4)));
}

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";

/** A positive number with a power of ten: 2×10⁻⁵. */
function power(x: number, count: number): string {
  const [mantissa = "", exponent = ""] = x.toExponential(count - 1).split("e");
  const raised = [...exponent].map((c) => (c === "-" ? "⁻" : (SUPERSCRIPTS[Number(c)] ?? ""))).join("");
  return Number(mantissa) === 1 ? `10${raised}` : `${Number(mantissa)}×10${raised}`;
}

/** A number with as many digits as its error bar allows: 0.083 ± 0.004. */
export function withError(x: number, error: number | null | undefined): string {
  if (!Number.isFinite(x)) return "–";
  if (error === null || error === undefined || !Number.isFinite(error) || error <= 0) return digits(x, 3);
  if (error < 0.5e-8) return `${fixed(x, 8)} ± <0.00000001`; // a bar of zero would mean that x is exact
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
  const size = Number(Math.abs(x).toPrecision(count));
  const plain = size === 0 || (size >= 1e-4 && size < 1e6);
  return `${x < 0 ? "−" : ""}${plain ? size : power(size, count)}`;
}

/** A whole number with thin spaces between thousands. */
export function whole(x: number): string {
  return Math.round(x)
    .toString()
    .replace(/\B(?=(\d{3})+(?!\d))/g, "\u2009");
}
