// Samplers as they are in qtx_lab/samplers: from the same masses and stream, the same draws to the bit.
//
// Python works in the precision of the logits, but sums up blocks in float64 and adds long rows in the order
// of torch's vectorised sum. Each step here rounds where that one does: a number that is stored in an array of
// masses' type is rounded by the array, others by `rounding`.
import { uniforms, type RowStream } from "./philox";

export type Floats = Float32Array | Float64Array;

/** Keys that are searched at a time: `INVERSION_BLOCK` in qtx_lab/samplers/base.py. */
const BLOCK = 16;

export const SAMPLERS = ["monte-carlo", "stratified", "systematic", "head-tail"] as const;
export type SamplerName = (typeof SAMPLERS)[number];

/** The draws of a row, those of each replicate together. */
export interface Draws {
  indices: Int32Array;
  weights: Floats;
}

/** A row's masses with what does not depend on the number of draws. */
export interface Row {
  /** exp(logit - largest logit), padded by zeros to whole blocks. */
  mass: Floats;
  /** The mass of each block and all before it. */
  cdf: Float64Array;
}

/** What `head-tail` knows of a row besides. */
export interface HeadTailRow {
  p: Floats;
  /** The sum of the probabilities, and they themselves, largest first. */
  total: number;
  sorted: Floats;
  /** Keys that have mass. */
  seen: number;
}

const like = <F extends Floats>(x: F, length: number) =>
  (x instanceof Float32Array ? new Float32Array(length) : new Float64Array(length)) as F;

/** Rounds a number as an array of this type does. */
const rounding = (x: Floats): ((value: number) => number) =>
  x instanceof Float32Array ? Math.fround : (value) => value;

/** The smallest positive number without lost digits. */
const tiny = (x: Floats) => (x instanceof Float32Array ? 2 ** -126 : 2 ** -1022);

const largest = (x: Floats) => (x instanceof Float32Array ? 3.4028234663852886e38 : Number.MAX_VALUE);

const single = new Float32Array(1);
const singleBits = new Int32Array(single.buffer);
const double = new Float64Array(1);
const doubleBits = new BigInt64Array(double.buffer);

/** The number just below a positive one, and 0 below 0. */
function below(x: number, kind: Floats): number {
  if (x <= 0) return 0;
  if (kind instanceof Float32Array) {
    single[0] = x;
    singleBits[0] -= 1;
    return single[0];
  }
  double[0] = x;
  doubleBits[0] -= 1n;
  return double[0];
}

/** Masses of logits, all zero where every key is masked by -Infinity. They are rounded to the nearest number,
 * torch's `exp` may be one off. */
export function masses<F extends Floats>(logits: F): F {
  const mass = like(logits, Math.ceil(logits.length / BLOCK) * BLOCK);
  let top = -Infinity;
  for (const x of logits) if (x > top) top = x;
  if (top === -Infinity) top = 0;
  for (let i = 0; i < logits.length; i++) mass[i] = logits[i] - top; // rounded
  for (let i = 0; i < logits.length; i++) mass[i] = Math.exp(mass[i]);
  return mass;
}

/** Four levels of partial sums, each of up to 32 numbers. */
const SINGLES = new Float32Array(4 * 32);
const DOUBLES = new Float64Array(4 * 16);

/** The sum of x[from … to) in the order of torch's vectorised sum, rounded as x at every step.
 *
 * torch adds up vectors of 32 bytes in four chains, each in pieces that are added up in levels; the chains'
 * vectors stand side by side, so that all of them together are `step` neighbours.
 * Source: ATen/native/cpu/SumKernel.cpp, `cascade_sum`. */
export function sum(x: Floats, from = 0, to = x.length): number {
  const levels = x instanceof Float32Array ? SINGLES : DOUBLES; // which round as x
  const [step, width] = [levels.length / 4, levels.length / 16];
  const steps = Math.floor((to - from) / step);
  const power = Math.max(4, Math.floor((steps > 1 ? 32 - Math.clz32(steps - 1) : 0) / 4));
  levels.fill(0);
  let at = from;
  for (let i = 0; i < steps;) {
    const end = Math.min(steps, (i | ((1 << power) - 1)) + 1);
    for (; i < end; i++, at += step) for (let m = 0; m < step; m++) levels[m] += x[at + m];
    for (let j = 1; j < 4 && i % (1 << power) === 0; j++) {
      for (let m = 0; m < step; m++) {
        levels[j * step + m] += levels[(j - 1) * step + m];
        levels[(j - 1) * step + m] = 0;
      }
      if ((i & (((1 << power) - 1) << (j * power))) !== 0) break;
    }
  }
  for (let j = 1; j < 4; j++) for (let m = 0; m < step; m++) levels[m] += levels[j * step + m];
  for (; at + width <= to; at += width) for (let m = 0; m < width; m++) levels[m] += x[at + m];
  for (let k = 1; k < 4; k++) for (let m = 0; m < width; m++) levels[m] += levels[k * width + m];
  levels[width] = 0; // the total
  for (; at < to; at++) levels[width] += x[at];
  for (let m = 0; m < width; m++) levels[width] += levels[m];
  return levels[width];
}

/** The sum of a block, as `sum` gives it. */
function blockSum(x: Floats, from: number): number {
  if (!(x instanceof Float32Array)) return sum(x, from, from + BLOCK);
  let total = 0;
  for (let i = from; i < from + 8; i++) total = Math.fround(total + Math.fround(x[i] + x[i + 8]));
  return total;
}

/** The running sums of a row's blocks. */
function blockSums(mass: Floats): Float64Array {
  const cdf = new Float64Array(mass.length / BLOCK);
  let total = 0;
  for (let b = 0; b < cdf.length; b++) cdf[b] = total += blockSum(mass, b * BLOCK);
  return cdf;
}

/** What draws of a row start from; `mass` as `masses` gives it. */
export const prepare = (mass: Floats): Row => ({ mass, cdf: blockSums(mass) });

/** What `head-tail` draws of a row start from besides. */
export function prepareHeadTail({ mass }: Row): HeadTailRow {
  const round = rounding(mass);
  const total = Math.max(1, round(sum(Float64Array.from(mass))));
  const p = like(mass, mass.length);
  let seen = 0;
  for (let i = 0; i < mass.length; i++) {
    p[i] = mass[i] / total;
    if (p[i] > 0) seen += 1;
  }
  return { p, total: sum(p), sorted: p.slice().sort().reverse() as Floats, seen };
}

/** The keys at some points of the running sums of masses; a point of 1 stands for `scale`. */
function invert({ mass, cdf }: Row, points: Float64Array, scale: number): Int32Array {
  const indices = new Int32Array(points.length);
  const total = cdf[cdf.length - 1];
  if (total === 0) return indices;
  const round = rounding(mass);
  const last = below(total, DOUBLES);
  let [block, index, before, rest] = [-1, 0, 0, 0]; // `before` is the block's running sum up to the key
  for (let t = 0; t < points.length; t++) {
    const target = Math.min(points[t] * scale, last);
    const next = blockOf(cdf, target, Math.max(0, block));
    const left = round(target - (next > 0 ? cdf[next - 1] : 0));
    if (next !== block || left < rest) [block, index, before] = [next, next * BLOCK, 0];
    rest = left;
    const end = (block + 1) * BLOCK;
    while (index < end && round(before + mass[index]) <= rest) before += mass[index++];
    if (index === end) {
      // By rounding the block ends before: the last key with mass is meant.
      const whole = below(round(before), mass);
      [index, before] = [block * BLOCK, 0];
      while (round(before + mass[index]) <= whole) before += mass[index++];
    }
    indices[t] = index;
  }
  return indices;
}

/** The first block whose running sum is above the target; it is searched for next to `near` first. */
function blockOf(cdf: Float64Array, target: number, near: number): number {
  let [low, high] = [0, cdf.length];
  if (near > 0 && cdf[near - 1] > target) high = near;
  else {
    low = near;
    for (let step = 1; low < high; step *= 2) {
      const next = Math.min(high, low + step) - 1;
      if (cdf[next] > target) high = next;
      else low = next + 1;
    }
    return low;
  }
  while (low < high) {
    const middle = (low + high) >> 1;
    if (cdf[middle] > target) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** Where a sampler puts its points for each replicate, from the first one on. */
export function points(
  sampler: SamplerName,
  stream: RowStream,
  numSamples: number,
  replicates = 1,
  first = 0,
): Float64Array {
  const out = new Float64Array(replicates * numSamples);
  const comb = sampler === "systematic" || sampler === "head-tail";
  for (let r = 0; r < replicates; r++) {
    const u = uniforms(stream, first + r, comb ? 1 : numSamples);
    for (let s = 0; s < numSamples; s++) {
      const at = r * numSamples + s;
      if (sampler === "monte-carlo") out[at] = u[s];
      else out[at] = (s + u[comb ? 0 : s]) / numSamples;
    }
  }
  return out;
}

let scratch = new Float64Array(0);

/** How often `head-tail` draws each key on average: `expected_counts` in qtx_lab/samplers/head_tail.py. */
function expectedCounts(row: HeadTailRow, numSamples: number): Floats {
  const { p, sorted } = row;
  const round = rounding(p);
  const counts = like(p, p.length);
  if (row.seen <= numSamples) {
    for (let i = 0; i < p.length; i++) counts[i] = p[i] > 0 ? 1 : 0;
    return counts;
  }
  let [size, running] = [numSamples - 1, 0];
  for (let h = 0; h < Math.min(numSamples, sorted.length); h++) {
    running += sorted[h];
    const tail = round(round(row.total - round(running)) + sorted[h]);
    if (round(sorted[h] * (numSamples - h)) < tail) {
      size = Math.min(h, numSamples - 1);
      break;
    }
  }
  const least = size === 0 ? Infinity : sorted[Math.min(size, sorted.length) - 1];
  if (scratch.length !== p.length) scratch = new Float64Array(p.length);
  const tail = scratch;
  let head = 0;
  for (let i = 0; i < p.length; i++) {
    const inHead = p[i] >= least;
    tail[i] = inHead ? 0 : p[i];
    if (inHead) head += 1;
  }
  const left = Math.max(0, numSamples - head);
  const scale = Math.min(largest(p), round(left / Math.max(tiny(p), round(sum(tail)))));
  for (let i = 0; i < p.length; i++) counts[i] = p[i] >= least ? (p[i] > 0 ? 1 : 0) : p[i] * scale;
  return counts;
}

/** Draws of a row at some points; `headTail` is what `prepareHeadTail` gives for that sampler. */
export function place(
  row: Row,
  at: Float64Array,
  numSamples: number,
  headTail: HeadTailRow | null = null,
): Draws {
  const { mass } = row;
  const round = rounding(mass);
  const weights = like(mass, at.length);
  if (headTail === null) {
    const total = row.cdf[row.cdf.length - 1];
    weights.fill(total === 0 ? 0 : 1 / at.length);
    return { indices: invert(row, at, total), weights };
  }
  const replicates = at.length / numSamples;
  const counts = expectedCounts(headTail, numSamples);
  const cdf = blockSums(counts);
  const indices = invert({ mass: counts, cdf }, at, numSamples);
  const total = cdf[cdf.length - 1];
  for (let t = 0; t < at.length; t++) {
    const count = Math.max(tiny(mass), counts[indices[t]]);
    weights[t] = at[t] * numSamples >= total ? 0 : round(headTail.p[indices[t]] / count) / replicates;
  }
  return { indices, weights };
}

/** The draws of a row, whose keys stand as the masses do. */
export function draw(
  sampler: SamplerName,
  row: Row,
  stream: RowStream,
  numSamples: number,
  replicates = 1,
): Draws {
  const at = points(sampler, stream, numSamples, replicates);
  return place(row, at, numSamples, sampler === "head-tail" ? prepareHeadTail(row) : null);
}
