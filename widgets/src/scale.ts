// Axes: from numbers to pixels, and the ticks between them.

export interface Scale {
  log: boolean;
  low: number;
  high: number;
  /** Pixel of `low` and of `high`. */
  from: number;
  to: number;
}

/** A scale over a range that is made valid: not empty, and positive if logarithmic. */
export function scale(low: number, high: number, from: number, to: number, log = false): Scale {
  if (!(Number.isFinite(low) && Number.isFinite(high))) [low, high] = log ? [0.1, 1] : [0, 1];
  if (log) {
    if (!(high > 0)) [low, high] = [0.1, 1];
    if (!(low > 0)) low = high / 1e6;
    if (low === high) [low, high] = [low / 2, high * 2];
  } else if (low === high) {
    const room = Math.abs(low) / 2 || 0.5;
    [low, high] = [low - room, high + room];
  }
  return { log, low, high, from, to };
}

const at = (s: Scale, x: number): number => (s.log ? Math.log(x) : x);

export function toPixel(s: Scale, x: number): number {
  const share = (at(s, x) - at(s, s.low)) / (at(s, s.high) - at(s, s.low));
  return s.from + share * (s.to - s.from);
}

export function fromPixel(s: Scale, pixel: number): number {
  const share = (pixel - s.from) / (s.to - s.from);
  const x = at(s, s.low) + share * (at(s, s.high) - at(s, s.low));
  return s.log ? Math.exp(x) : x;
}

/** About `count` round numbers in the range of a scale. */
export function ticks(s: Scale, count = 6): number[] {
  if (s.log) {
    const from = Math.floor(Math.log10(s.low));
    const to = Math.floor(Math.log10(s.high));
    if (s.high / s.low >= 10) {
      const skip = Math.max(1, Math.ceil((to - from) / Math.max(1, count)));
      const of = (steps: number[]) => {
        const out: number[] = [];
        for (let e = Math.ceil(from / skip) * skip; e <= to; e += skip)
          out.push(...steps.map((m) => Number(`${m}e${e}`)));
        if (steps.length > 1 && from % skip) out.unshift(...steps.map((m) => Number(`${m}e${from}`)));
        return out.filter((x) => x >= s.low * (1 - 1e-9) && x <= s.high * (1 + 1e-9));
      };
      const choices = (skip > 1 ? [[1]] : [[1, 2, 5], [1, 3], [1]]).map(of);
      return choices.find((ticks) => ticks.length <= 1.5 * count) ?? choices.at(-1)!;
    }
  }
  const raw = (s.high - s.low) / Math.max(1, count);
  const size = 10 ** Math.floor(Math.log10(raw));
  const steps = [10, 5, 2, 1, 0.5].map((m) => m * size);
  let out: number[] = [];
  for (const step of steps.slice(
    Math.max(
      0,
      steps.findLastIndex((x) => x >= raw * 0.999),
    ),
  )) {
    out = [];
    for (let i = Math.ceil(s.low / step - 1e-9); i * step <= s.high + step * 1e-9; i++) {
      out.push(Number((i * step).toPrecision(12)));
    }
    if (out.length > Math.min(2, count - 1)) break;
  }
  return out;
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
  return `${x.toFixed(places)} ± ${error.toFixed(places)}`;
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
