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
  /** The sum of the probabilities. */
  total: number;
  /** The probabilities that are `least` or more, largest first. */
  sorted: Floats;
  least: number;
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

/** Writes the running sums of a row's blocks into `cdf`. */
function blockSums(mass: Floats, cdf: Float64Array): Float64Array {
  let total = 0;
  for (let b = 0; b < cdf.length; b++) cdf[b] = total += blockSum(mass, b * BLOCK);
  return cdf;
}

/** What draws of a row start from; `mass` as `masses` gives it. */
export const prepare = (mass: Floats): Row => ({
  mass,
  cdf: blockSums(mass, new Float64Array(mass.length / BLOCK)),
});

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
  return { p, total: sum(p), sorted: like(mass, 0), least: Infinity, seen };
}

/** The probabilities of a row that are `least` or more, and perhaps some below, largest first. */
function largestOf(row: HeadTailRow, least: number): Floats {
  if (least < row.least) {
    const { p } = row;
    const found = like(p, p.length);
    let count = 0;
    for (let i = 0; i < p.length; i++) if (p[i] >= least) found[count++] = p[i];
    row.sorted = found.slice(0, count).sort().reverse() as Floats;
    row.least = least;
  }
  return row.sorted;
}

/** Writes the keys at some points of the running sums of masses into `out`, from its place `start` on; a point
 * of 1 stands for `scale`. */
function invert(
  mass: Floats,
  cdf: Float64Array,
  points: Float64Array,
  scale: number,
  out: Int32Array,
  start: number,
): void {
  const total = cdf[cdf.length - 1];
  if (total === 0) return void out.fill(0, start, start + points.length);
  const isSingle = mass instanceof Float32Array;
  const last = below(total, DOUBLES);
  let block = -1;
  let index = 0;
  let before = 0; // the block's running sum up to the key
  let rest = 0;
  for (let t = 0; t < points.length; t++) {
    const target = Math.min(points[t] * scale, last);
    const next = blockOf(cdf, target, block < 0 ? 0 : block);
    const exact = target - (next > 0 ? cdf[next - 1] : 0);
    const left = isSingle ? Math.fround(exact) : exact;
    if (next !== block || left < rest) {
      block = next;
      index = next * BLOCK;
      before = 0;
    }
    rest = left;
    const end = (block + 1) * BLOCK;
    for (; index < end; index++) {
      const after = before + mass[index];
      if ((isSingle ? Math.fround(after) : after) > rest) break;
      before = after;
    }
    if (index === end) {
      // By rounding the block ends before: the last key with mass is meant.
      const whole = below(isSingle ? Math.fround(before) : before, mass);
      before = 0;
      for (index = block * BLOCK; ; index++) {
        const after = before + mass[index];
        if ((isSingle ? Math.fround(after) : after) > whole) break;
        before = after;
      }
    }
    out[start + t] = index;
  }
}

/** The first block whose running sum is above the target; it is searched for next to `near` first. */
function blockOf(cdf: Float64Array, target: number, near: number): number {
  let low = 0;
  let high = cdf.length;
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

/** Whether a sampler puts its points at equal distances, from one random number. */
const isComb = (sampler: SamplerName) => sampler === "systematic" || sampler === "head-tail";

/** How many random numbers a replicate of a sampler takes. */
export const numUniforms = (sampler: SamplerName, numSamples: number): number =>
  isComb(sampler) ? 1 : numSamples;

/** Writes where a sampler puts the points of a replicate into `out`, given its random numbers. */
export function placePoints(
  sampler: SamplerName,
  u: Float64Array,
  numSamples: number,
  out: Float64Array,
  start = 0,
): void {
  const comb = isComb(sampler);
  for (let s = 0; s < numSamples; s++)
    out[start + s] = sampler === "monte-carlo" ? u[s] : (s + u[comb ? 0 : s]) / numSamples;
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
  for (let r = 0; r < replicates; r++) {
    const u = uniforms(stream, first + r, numUniforms(sampler, numSamples));
    placePoints(sampler, u, numSamples, out, r * numSamples);
  }
  return out;
}

/** The sum of the numbers below `least` in a row of whole blocks, as `sum` gives it in double precision. */
function sumBelow(x: Floats, least: number): number {
  if (scratch.length !== x.length) scratch = new Float64Array(x.length);
  const tail = scratch;
  for (let i = 0; i < x.length; i++) tail[i] = x[i] >= least ? 0 : x[i];
  return sum(tail);
}

let scratch = new Float64Array(0);
/** How often `head-tail` draws each key on average, and their running sums; the next row takes their place. */
let countsOfRow: { counts: Floats; cdf: Float64Array } = {
  counts: new Float32Array(0),
  cdf: new Float64Array(0),
};

/** How many of the largest probabilities `head-tail` takes for sure, and the least of them. */
function headOf(row: HeadTailRow, numSamples: number): { least: number } {
  const round = rounding(row.p);
  // Half of an even share is mostly small enough; where it is not, all of them are sorted. It is rounded down
  // to a power of 1/4, so that most steps of a slider find sorted what they need.
  const share = 4 ** -Math.ceil(Math.log2(2 * numSamples) / 2);
  for (const least of [share, 0]) {
    const sorted = largestOf(row, least);
    const end = Math.min(numSamples, sorted.length);
    let [size, running] = [-1, 0];
    for (let h = 0; h < end; h++) {
      running += sorted[h];
      const tail = round(round(row.total - round(running)) + sorted[h]);
      if (round(sorted[h] * (numSamples - h)) < tail) {
        size = h;
        break;
      }
    }
    if (size < 0 && end < numSamples && least > 0) continue;
    size = size < 0 ? numSamples - 1 : Math.min(size, numSamples - 1);
    return { least: size === 0 ? Infinity : sorted[Math.min(size, sorted.length) - 1] };
  }
  throw new Error("unreachable");
}

/** How often `head-tail` draws each key on average: `expected_counts` in qtx_lab/samplers/head_tail.py. */
function expectedCounts(row: HeadTailRow, numSamples: number): typeof countsOfRow {
  const { p } = row;
  const n = p.length;
  if (countsOfRow.counts.length !== n || countsOfRow.counts.constructor !== p.constructor)
    countsOfRow = { counts: like(p, n), cdf: new Float64Array(n / BLOCK) };
  const { counts, cdf } = countsOfRow;
  if (row.seen <= numSamples) {
    for (let i = 0; i < n; i++) counts[i] = p[i] > 0 ? 1 : 0;
  } else {
    const round = rounding(p);
    const { least } = headOf(row, numSamples);
    const known = row.sorted; // down to `least` at least
    let head = 0;
    while (head < known.length && known[head] >= least) head += 1;
    const left = Math.max(0, numSamples - head);
    const scale = Math.min(largest(p), round(left / Math.max(tiny(p), round(sumBelow(p, least)))));
    for (let i = 0; i < n; i++) counts[i] = p[i] >= least ? (p[i] > 0 ? 1 : 0) : p[i] * scale;
  }
  blockSums(counts, cdf);
  return countsOfRow;
}

/** Writes the keys of a row at some points, and their weights, into arrays from a place on.
 *
 * `headTail` is what `prepareHeadTail` gives for that sampler. */
export function placeInto(
  row: Row,
  at: Float64Array,
  numSamples: number,
  headTail: HeadTailRow | null,
  indices: Int32Array,
  weights: Floats,
  start: number,
): void {
  if (headTail === null) {
    const total = row.cdf[row.cdf.length - 1];
    weights.fill(total === 0 ? 0 : 1 / at.length, start, start + at.length);
    invert(row.mass, row.cdf, at, total, indices, start);
    return;
  }
  const { p } = headTail;
  const round = rounding(p);
  const [replicates, least] = [at.length / numSamples, tiny(p)];
  const { counts, cdf } = expectedCounts(headTail, numSamples);
  invert(counts, cdf, at, numSamples, indices, start);
  const total = cdf[cdf.length - 1];
  for (let t = 0; t < at.length; t++) {
    const index = indices[start + t];
    const count = Math.max(least, counts[index]);
    weights[start + t] = at[t] * numSamples >= total ? 0 : round(p[index] / count) / replicates;
  }
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
  const drawn = { indices: new Int32Array(at.length), weights: like(row.mass, at.length) };
  const headTail = sampler === "head-tail" ? prepareHeadTail(row) : null;
  placeInto(row, at, numSamples, headTail, drawn.indices, drawn.weights, 0);
  return drawn;
}
