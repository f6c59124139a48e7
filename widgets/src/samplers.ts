// Samplers as they are in qtx_lab/samplers: from the same masses and stream, the same draws to the bit.
//
// Python works in the precision of the logits, but sums up blocks in float64 and adds long rows in the order
// of torch's vectorised sum. Each step here rounds where that one does: a number that is stored in an array of
// masses' type is rounded by the array, others by `rounding`.
import { uniforms, type RowStream } from "./philox";

export type Floats = Float32Array | Float64Array;

/** Keys that are searched at a time: `INVERSION_BLOCK` in qtx_lab/samplers/base.py. */
const BLOCK_BITS = 4;
const BLOCK = 1 << BLOCK_BITS;

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
  /** The mass of each key and all before it in its block. */
  within: Floats;
  /** The mass of each block and all before it. */
  cdf: Float64Array;
  /** Keys at evenly spaced points of the running sums, from which points in no order are searched for; empty
   * until there are such points. */
  guide: Int32Array;
}

/** What `head-tail` knows of a row. */
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
  const power = levelPower(steps);
  levels.fill(0);
  let at = from;
  for (let i = 0; i < steps;) {
    const end = Math.min(steps, (i | ((1 << power) - 1)) + 1);
    for (; i < end; i++, at += step) for (let m = 0; m < step; m++) levels[m] += x[at + m];
    carry(levels, i, power);
  }
  for (let j = 1; j < 4; j++) for (let m = 0; m < step; m++) levels[m] += levels[j * step + m];
  for (; at + width <= to; at += width) for (let m = 0; m < width; m++) levels[m] += x[at + m];
  for (let k = 1; k < 4; k++) for (let m = 0; m < width; m++) levels[m] += levels[k * width + m];
  levels[width] = 0; // the total
  for (; at < to; at++) levels[width] += x[at];
  for (let m = 0; m < width; m++) levels[width] += levels[m];
  return levels[width];
}

/** log2 of the steps that a level adds up. */
const levelPower = (steps: number): number =>
  Math.max(4, Math.floor((steps > 1 ? 32 - Math.clz32(steps - 1) : 0) / 4));

/** After `i` steps: adds the levels that are complete to the next ones. */
function carry(levels: Floats, i: number, power: number): void {
  const step = levels.length / 4;
  for (let j = 1; j < 4 && i % (1 << power) === 0; j++) {
    for (let m = 0; m < step; m++) {
      levels[j * step + m] += levels[(j - 1) * step + m];
      levels[(j - 1) * step + m] = 0;
    }
    if ((i & (((1 << power) - 1) << (j * power))) !== 0) break;
  }
}

/** The sum of a block, as `sum` gives it. */
function blockSum(x: Floats, from: number): number {
  if (!(x instanceof Float32Array)) return sum(x, from, from + BLOCK);
  let total = 0;
  for (let i = from; i < from + 8; i++) total = Math.fround(total + Math.fround(x[i] + x[i + 8]));
  return total;
}

/** What draws of a row start from; `mass` as `masses` gives it. */
export function prepare(mass: Floats): Row {
  const row = emptyRow(mass, mass.length);
  row.mass.set(mass);
  addUp(row);
  return row;
}

const emptyRow = (kind: Floats, length: number): Row => ({
  mass: like(kind, length),
  within: like(kind, length),
  cdf: new Float64Array(length / BLOCK),
  guide: NO_GUIDE,
});

/** Writes the running sums of a row's masses. */
function addUp({ mass, within, cdf }: Row): void {
  let total = 0;
  for (let b = 0; b < cdf.length; b++) {
    let inside = 0;
    for (let i = b * BLOCK; i < (b + 1) * BLOCK; i++) within[i] = inside += mass[i]; // stored rounded
    cdf[b] = total += blockSum(mass, b * BLOCK);
  }
}

/** What `head-tail` draws of a row start from. */
export function prepareHeadTail(mass: Floats): HeadTailRow {
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

/** Writes the keys at some points of a row's running sums into `out`, from its place `start` on; a point of 1
 * stands for `scale`. Without a guide it is fast where each point is above the one before. */
function invert(
  { within, cdf }: Row,
  guide: Int32Array,
  points: Float64Array,
  scale: number,
  out: Int32Array,
  start: number,
): void {
  const total = cdf[cdf.length - 1];
  if (total === 0) return void out.fill(0, start, start + points.length);
  const isSingle = within instanceof Float32Array;
  const last = below(total, DOUBLES);
  let [block, key, before] = [0, 0, 0];
  for (let t = 0; t < points.length; t++) {
    const target = Math.min(points[t] * scale, last);
    if (guide.length > 0) {
      key = guide[Math.floor(points[t] * guide.length)];
      block = key >> BLOCK_BITS;
    } else if (target < before) block = key = 0; // of the next replicate
    before = target;
    if (cdf[block] <= target) {
      do block++;
      while (cdf[block] <= target);
      key = block << BLOCK_BITS;
    }
    const exact = block > 0 ? target - cdf[block - 1] : target;
    const rest = isSingle ? Math.fround(exact) : exact;
    const end = (block + 1) << BLOCK_BITS;
    while (key < end && within[key] <= rest) key++;
    if (key === end) {
      // By rounding the block ends before: the last key with mass is meant.
      for (key = block << BLOCK_BITS; within[key] < within[end - 1];) key++;
    }
    out[start + t] = key;
  }
}

const NO_GUIDE = new Int32Array(0);

/** Notes the keys at evenly spaced points, as many as a power of 2, so that no rounding is between them. */
function makeGuide(row: Row): void {
  const at = new Float64Array(1 << (31 - Math.clz32(row.mass.length)));
  for (let g = 0; g < at.length; g++) at[g] = g / at.length;
  const guide = new Int32Array(at.length);
  invert(row, NO_GUIDE, at, row.cdf[row.cdf.length - 1], guide, 0);
  row.guide = guide;
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
  const levels = DOUBLES.fill(0);
  const steps = x.length / BLOCK; // a step of `sum` is as long as a block
  const power = levelPower(steps);
  for (let i = 0; i < steps;) {
    const [first, end] = [i * BLOCK, Math.min(steps, (i | ((1 << power) - 1)) + 1)];
    // Four lanes at a time, whose sums stay in registers.
    for (let m = 0; m < BLOCK; m += 4) {
      let [a, b, c, d] = [0, 0, 0, 0];
      for (let at = first + m; at < end * BLOCK; at += BLOCK) {
        if (x[at] < least) a += x[at];
        if (x[at + 1] < least) b += x[at + 1];
        if (x[at + 2] < least) c += x[at + 2];
        if (x[at + 3] < least) d += x[at + 3];
      }
      [levels[m], levels[m + 1], levels[m + 2], levels[m + 3]] = [a, b, c, d];
    }
    carry(levels, (i = end), power);
  }
  for (let j = 1; j < 4; j++) for (let m = 0; m < BLOCK; m++) levels[m] += levels[j * BLOCK + m];
  for (let k = 1; k < 4; k++) for (let m = 0; m < 4; m++) levels[m] += levels[k * 4 + m];
  return levels[0] + levels[1] + levels[2] + levels[3];
}

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

/** How often `head-tail` draws each key on average, with running sums; the next row takes its place. */
let countsOfRow = emptyRow(SINGLES, 0);

/** How often `head-tail` draws each key on average: `expected_counts` in qtx_lab/samplers/head_tail.py. */
function expectedCounts(row: HeadTailRow, numSamples: number): Row {
  const { p } = row;
  const n = p.length;
  if (countsOfRow.mass.length !== n || countsOfRow.mass.constructor !== p.constructor)
    countsOfRow = emptyRow(p, n);
  const counts = countsOfRow.mass;
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
  addUp(countsOfRow);
  return countsOfRow;
}

/** Writes the keys of a row at some points, and their weights, into arrays from a place on. */
export function placeInto(
  row: Row,
  at: Float64Array,
  sampler: SamplerName,
  indices: Int32Array,
  weights: Floats,
  start: number,
): void {
  const total = row.cdf[row.cdf.length - 1];
  if (sampler === "monte-carlo" && row.guide.length === 0) makeGuide(row);
  weights.fill(total === 0 ? 0 : 1 / at.length, start, start + at.length);
  invert(row, sampler === "monte-carlo" ? row.guide : NO_GUIDE, at, total, indices, start);
}

/** As `placeInto`, by `head-tail`. */
export function placeHeadTailInto(
  row: HeadTailRow,
  at: Float64Array,
  numSamples: number,
  indices: Int32Array,
  weights: Floats,
  start: number,
): void {
  const { p } = row;
  const round = rounding(p);
  const [replicates, least] = [at.length / numSamples, tiny(p)];
  const expected = expectedCounts(row, numSamples);
  const counts = expected.mass;
  const total = expected.cdf[expected.cdf.length - 1];
  invert(expected, NO_GUIDE, at, numSamples, indices, start);
  for (let t = 0; t < at.length; t++) {
    const index = indices[start + t];
    const count = Math.max(least, counts[index]);
    weights[start + t] = at[t] * numSamples >= total ? 0 : round(p[index] / count) / replicates;
  }
}

/** The draws of a row, whose keys stand as the masses do. */
export function draw(
  sampler: SamplerName,
  mass: Floats,
  stream: RowStream,
  numSamples: number,
  replicates = 1,
): Draws {
  const at = points(sampler, stream, numSamples, replicates);
  const drawn = { indices: new Int32Array(at.length), weights: like(mass, at.length) };
  const { indices, weights } = drawn;
  if (sampler === "head-tail") placeHeadTailInto(prepareHeadTail(mass), at, numSamples, indices, weights, 0);
  else placeInto(prepare(mass), at, sampler, indices, weights, 0);
  return drawn;
}
