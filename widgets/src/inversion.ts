// The inversion of a row's running sums at given points, as in qtx_lab/samplers/inversion.py, to the bit.
//
// Python works in the precision of the logits, but sums up blocks in float64 and adds long rows in the order
// of torch's vectorised sum. Each step here rounds where that one does: a number that is stored in an array of
// masses' type is rounded by the array, others by `rounding`.

export type Floats = Float32Array | Float64Array;

/** Keys that are searched at a time: `INVERSION_BLOCK` in qtx_lab/samplers/inversion.py. */
export const BLOCK_BITS = 4;
export const BLOCK = 1 << BLOCK_BITS;

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

export const like = <F extends Floats>(x: F, length: number) =>
  (x instanceof Float32Array ? new Float32Array(length) : new Float64Array(length)) as F;

/** Rounds a number as an array of this type does. */
export const rounding = (x: Floats): ((value: number) => number) =>
  x instanceof Float32Array ? Math.fround : (value) => value;

/** The smallest positive number without lost digits. */
export const tiny = (x: Floats) => (x instanceof Float32Array ? 2 ** -126 : 2 ** -1022);

export const largest = (x: Floats) => (x instanceof Float32Array ? 3.4028234663852886e38 : Number.MAX_VALUE);

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
export const SINGLES = new Float32Array(4 * 32);
export const DOUBLES = new Float64Array(4 * 16);

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
export const levelPower = (steps: number): number =>
  Math.max(4, Math.floor((steps > 1 ? 32 - Math.clz32(steps - 1) : 0) / 4));

/** After `i` steps: adds the levels that are complete to the next ones. */
export function carry(levels: Floats, i: number, power: number): void {
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

export const emptyRow = (kind: Floats, length: number): Row => ({
  mass: like(kind, length),
  within: like(kind, length),
  cdf: new Float64Array(length / BLOCK),
  guide: new Int32Array(0),
});

/** Writes the running sums of a row's masses. */
export function addUp({ mass, within, cdf }: Row): void {
  let total = 0;
  for (let b = 0; b < cdf.length; b++) {
    let inside = 0;
    for (let i = b * BLOCK; i < (b + 1) * BLOCK; i++) within[i] = inside += mass[i]; // stored rounded
    cdf[b] = total += blockSum(mass, b * BLOCK);
  }
}

/** Writes the keys at some points of a row's running sums into `out`, from its place `start` on; a point of 1
 * stands for `scale`. It is fast where each point is above the one before; see `invertInAnyOrder`. */
export function invert(
  { within, cdf }: Row,
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
    if (target < before) block = key = 0; // of the next replicate
    before = target;
    if (cdf[block] <= target) {
      do block++;
      while (cdf[block] <= target);
      key = block << BLOCK_BITS;
    }
    const exact = block > 0 ? target - cdf[block - 1] : target;
    out[start + t] = key = keyIn(within, block, key, isSingle ? Math.fround(exact) : exact);
  }
}

/** As `invert` for points in any order, each of which is searched for from the row's guide on. */
export function invertInAnyOrder(row: Row, points: Float64Array, out: Int32Array, start: number): void {
  const { within, cdf } = row;
  const total = cdf[cdf.length - 1];
  if (total === 0) return void out.fill(0, start, start + points.length);
  if (row.guide.length === 0) makeGuide(row);
  const { guide } = row;
  const isSingle = within instanceof Float32Array;
  const last = below(total, DOUBLES);
  for (let t = 0; t < points.length; t++) {
    const target = Math.min(points[t] * total, last);
    let key = guide[(points[t] * guide.length) | 0];
    let block = key >> BLOCK_BITS;
    while (cdf[block] <= target) key = ++block << BLOCK_BITS;
    const exact = block > 0 ? target - cdf[block - 1] : target;
    out[start + t] = keyIn(within, block, key, isSingle ? Math.fround(exact) : exact);
  }
}

/** The first key of a block, from `key` on, that ends after a part of the block's mass. */
function keyIn(within: Floats, block: number, key: number, part: number): number {
  const end = (block + 1) << BLOCK_BITS;
  while (key < end && within[key] <= part) key++;
  if (key < end) return key;
  // By rounding the block ends before: the last key with mass is meant.
  for (key = block << BLOCK_BITS; within[key] < within[end - 1];) key++;
  return key;
}

/** By how much roundings of single precision move the end of a key at most, as a share of its block's mass, and
 * those of double precision the end of any key, in draws. */
const SINGLE_MARGIN = 2 ** -23;
const DOUBLE_MARGIN = 2 ** -36;

/** Where each point lies in its part of the row, with a place for a point that is never reached. */
let offsets = new Float64Array(1);
/** The last key, but for those without a point, that begins at or before each point. */
let firstKeys = new Int32Array(1);

/** As `invert` for one point in each of as many equal parts of the row, in one walk over the keys without a branch
 * that depends on them, which is several times as fast: how many points lie before the end of a key follows from
 * that end. False, and nothing is written, where a rounding may matter. */
export function invertEven(
  { within, cdf }: Row,
  points: Float64Array,
  out: Int32Array,
  start: number,
): boolean {
  const total = cdf[cdf.length - 1];
  if (total === 0 || !(within instanceof Float32Array)) return false;
  const count = points.length;
  if (offsets.length <= count)
    [offsets, firstKeys] = [new Float64Array(count + 1), new Int32Array(count + 1)];
  const [offset, firstKey] = [offsets, firstKeys];
  for (let t = 0; t < count; t++) offset[t] = points[t] * count - t - 1; // -1, so that it is counted by rounding
  offset[count] = 1;
  firstKey.fill(0, 0, count + 1);
  const scale = count / total;
  let [t, doubt, before] = [0, 0, 0];
  for (let b = 0; b < cdf.length; b++) {
    const margin = SINGLE_MARGIN * (cdf[b] - before) * scale + DOUBLE_MARGIN;
    const first = before * scale - margin;
    const end = (b + 1) << BLOCK_BITS;
    for (let key = b << BLOCK_BITS; key < end; key++) {
      firstKey[t] = key;
      const low = first + within[key] * scale;
      const high = low + 2 * margin;
      t = low | 0;
      t += (low - t - offset[t]) | 0;
      const other = high | 0;
      doubt |= t ^ (other + ((high - other - offset[other]) | 0));
    }
    before = cdf[b];
    doubt |=
      (t ^ pointsBefore(before * scale - margin, offset)) |
      (t ^ pointsBefore(before * scale + margin, offset));
  }
  if (doubt !== 0 || t !== count) return false;
  let key = 0;
  for (let t = 0; t < count; t++) {
    const above = firstKey[t] - key;
    out[start + t] = key += above & ~(above >> 31); // the larger one
  }
  return true;
}

/** How many points lie before a place of the row. */
function pointsBefore(place: number, offset: Float64Array): number {
  const whole = place | 0;
  return whole + ((place - whole - offset[whole]) | 0);
}

/** Notes the keys at evenly spaced points: a power of 2 of them, so that no rounding is between them, and more than
 * keys, so that few keys lie between two. */
function makeGuide(row: Row): void {
  const at = new Float64Array(2 << (31 - Math.clz32(row.mass.length)));
  for (let g = 0; g < at.length; g++) at[g] = g / at.length;
  row.guide = new Int32Array(at.length);
  invert(row, at, row.cdf[row.cdf.length - 1], row.guide, 0);
}
