// The heaviest keys exactly, the others by systematic draws, as in qtx_lab/samplers/head_tail.py, to the bit.
import {
  addUp,
  BLOCK,
  BLOCK_BITS,
  carry,
  DOUBLES,
  emptyRow,
  invert,
  largest,
  levelPower,
  like,
  rounding,
  SINGLES,
  sum,
  tiny,
  type Floats,
} from "./inversion";

/** What `head-tail` knows of a row, whose places are its keys in some order. */
export interface HeadTailRow {
  /** The probability at each place, padded by zeros to whole blocks. */
  p: Floats;
  /** The key at each place; null where they stand as they come. */
  order: Uint16Array | null;
  /** The sum of the probabilities, in their precision and in double precision. */
  total: number;
  exactTotal: number;
  /** The probabilities that are `least` or more, largest first, and the sum of those before each. */
  sorted: Floats;
  before: Float64Array;
  least: number;
  /** The places that have mass. */
  seen: Seen;
}

/** The places of a row that have mass, one after the other. */
interface Seen {
  count: number;
  p: Floats;
  keys: Uint16Array;
  /** How many of them lie before the end of each block. */
  ends: Int32Array;
}

/** What a row takes for sure, and what the other probabilities are multiplied by for their counts. */
interface Head {
  /** The least of them. */
  least: number;
  /** How many they are. */
  size: number;
  scale: number;
}

/** What `head-tail` draws of a row start from; `order` tells which key stands at each place. */
export function prepareHeadTail(mass: Floats, order: Uint16Array | null = null): HeadTailRow {
  const round = rounding(mass);
  const whole = Math.max(1, round(sum(Float64Array.from(mass))));
  const p = like(mass, mass.length);
  let exactTotal = 0;
  for (let i = 0; i < mass.length; i++) {
    p[i] = mass[i] / whole;
    exactTotal += p[i];
  }
  const none = { sorted: like(mass, 0), before: new Float64Array(1), least: Infinity };
  return { p, order, total: sum(p), exactTotal, ...none, seen: seenOf(p, order) };
}

function seenOf(p: Floats, order: Uint16Array | null): Seen {
  const seen = {
    p: like(p, p.length),
    keys: new Uint16Array(p.length),
    ends: new Int32Array(p.length / BLOCK),
  };
  let count = 0;
  for (let i = 0; i < p.length; i++) {
    if (p[i] > 0) {
      seen.p[count] = p[i];
      seen.keys[count++] = order === null ? i : order[i];
    }
    seen.ends[i >> BLOCK_BITS] = count;
  }
  return { count, p: seen.p.slice(0, count), keys: seen.keys.slice(0, count), ends: seen.ends };
}

/** Sorts the probabilities of a row that are `least` or more. */
function sortDownTo(row: HeadTailRow, least: number): void {
  if (least >= row.least) return;
  const { p } = row;
  const found = like(p, p.length);
  let count = 0;
  for (let i = 0; i < p.length; i++) if (p[i] >= least) found[count++] = p[i];
  row.sorted = found.slice(0, count).sort().reverse() as Floats;
  row.before = new Float64Array(count + 1);
  for (let h = 0; h < count; h++) row.before[h + 1] = row.before[h] + row.sorted[h];
  row.least = least;
}

/** How far roundings may put the condition that ends the head from what it is without them, where it is in
 * doubt. */
const HEAD_MARGIN = 2 ** -20;

/** How many of the sorted probabilities are taken for sure, without those that tie with the last one; -1 where
 * more have to be sorted. */
function headSize(row: HeadTailRow, numSamples: number): number {
  const { sorted, before, total } = row;
  const round = rounding(row.p);
  const end = Math.min(numSamples, sorted.length);
  // Without rounding, p_h (S - h) less the rest of the mass falls with h: the head does not end where it is
  // clearly above 0.
  let [low, high] = [0, end];
  while (low < high) {
    const h = (low + high) >> 1;
    if (sorted[h] * (numSamples - h) - (total - before[h]) >= HEAD_MARGIN) low = h + 1;
    else high = h;
  }
  for (let h = low; h < end; h++) {
    const tail = round(round(total - round(before[h + 1])) + sorted[h]);
    if (round(sorted[h] * (numSamples - h)) < tail) return Math.min(h, numSamples - 1);
  }
  return end < numSamples && row.least > 0 ? -1 : numSamples - 1;
}

/** The head of a row with more keys than draws. */
export function headOf(row: HeadTailRow, numSamples: number): Head {
  const { p } = row;
  const round = rounding(p);
  // Half of an even share is mostly small enough; where it is not, all of them are sorted. It is rounded down
  // to a power of 1/4, so that most steps of a slider find sorted what they need.
  sortDownTo(row, 4 ** -Math.ceil(Math.log2(2 * numSamples) / 2));
  let size = headSize(row, numSamples);
  if (size < 0) {
    sortDownTo(row, 0);
    size = headSize(row, numSamples);
  }
  const { sorted } = row;
  size = Math.min(size, sorted.length);
  const least = size === 0 ? Infinity : sorted[size - 1];
  while (size < sorted.length && sorted[size] >= least) size += 1;
  const left = Math.max(0, numSamples - size);
  const scale = Math.min(largest(p), round(left / Math.max(tiny(p), round(tailMass(row, size, least)))));
  return { least, size, scale };
}

/** By how much two sums of the probabilities of a row differ at most, for each of its keys, whatever their order. */
const SUM_MARGIN = 2 ** -52;

/** The sum of the probabilities below `least`, of which `size` are not; once rounded, it is what the sum in the
 * order of torch is rounded to. */
function tailMass(row: HeadTailRow, size: number, least: number): number {
  const { p, exactTotal, before } = row;
  const rest = exactTotal - before[size];
  const margin = SUM_MARGIN * p.length;
  const isSettled = Math.fround(rest - margin) === Math.fround(rest + margin);
  return p instanceof Float32Array && isSettled ? rest : sumBelow(p, least);
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

/** Writes the keys of a row at some points, and their weights, into arrays from a place on. */
export function placeHeadTailInto(
  row: HeadTailRow,
  at: Float64Array,
  numSamples: number,
  indices: Int32Array,
  weights: Floats,
  start: number,
): void {
  const takesAll = row.seen.count <= numSamples;
  const head = takesAll ? null : headOf(row, numSamples);
  if (at.length === numSamples && row.p instanceof Float32Array) {
    const isDone = head
      ? walk(row, head, at, indices, weights, start)
      : takeAll(row, at, indices, weights, start);
    if (isDone) return;
  }
  search(row, head, at, numSamples, indices, weights, start);
}

// --- by a search for each point -----------------------------------------------------------------------

/** How often each key is drawn on average, with running sums; the next row takes its place. */
let countsOfRow = emptyRow(SINGLES, 0);

/** Draws as `expected_counts` and `place` of qtx_lab/samplers/head_tail.py do, step by step. */
export function search(
  { p, order }: HeadTailRow,
  head: Head | null,
  at: Float64Array,
  numSamples: number,
  indices: Int32Array,
  weights: Floats,
  start: number,
): void {
  const n = p.length;
  if (countsOfRow.mass.length !== n || countsOfRow.mass.constructor !== p.constructor)
    countsOfRow = emptyRow(p, n);
  const counts = countsOfRow.mass;
  if (head === null) for (let i = 0; i < n; i++) counts[i] = p[i] > 0 ? 1 : 0;
  else for (let i = 0; i < n; i++) counts[i] = p[i] >= head.least ? (p[i] > 0 ? 1 : 0) : p[i] * head.scale;
  addUp(countsOfRow);
  const total = countsOfRow.cdf[countsOfRow.cdf.length - 1];
  invert(countsOfRow, at, numSamples, indices, start);
  const round = rounding(p);
  const [replicates, least] = [at.length / numSamples, tiny(p)];
  for (let t = 0; t < at.length; t++) {
    const place = indices[start + t];
    const count = Math.max(least, counts[place]);
    weights[start + t] = at[t] * numSamples >= total ? 0 : round(p[place] / count) / replicates;
    if (order !== null) indices[start + t] = order[place];
  }
}

// --- by a walk over the keys --------------------------------------------------------------------------

/** The largest share of a block's count by which roundings of single precision move the end of a key in it, and the
 * most by which those of double precision move any, in draws. */
const SINGLE_MARGIN = 2 ** -19;
const DOUBLE_MARGIN = 2 ** -36;

/** The sum of counts up to the end of each block of a row, and which of the seen places each draw is, with room for
 * the places after the last draw. */
let ends = new Float64Array(0);
let drawn = new Int32Array(0);

/** Draws as `search` does, to the bit, but without a branch that depends on the keys, which is several times as
 * fast: because points have a distance of 1 draw and no key has a count above 1, how many points lie before the end
 * of a key follows from that end, and tells which draw the next key may be. False where a rounding may matter. */
export function walk(
  row: HeadTailRow,
  head: Head,
  at: Float64Array,
  indices: Int32Array,
  weights: Floats,
  start: number,
): boolean {
  if (!isCapped(row, head)) return false;
  const { p, keys, ends: lastSeen } = row.seen;
  const { scale } = head;
  const numSamples = at.length;
  if (drawn.length <= row.p.length) drawn = new Int32Array(row.p.length + 1);
  const place = drawn;
  addBlocks(row.p, scale);
  const first = 1 - at[0] * numSamples;
  let [doubt, t, before, i] = [0, 0, 0, 0];
  for (let b = 0; b < lastSeen.length; b++) {
    const margin = SINGLE_MARGIN * (ends[b] - before) + DOUBLE_MARGIN;
    let low = before + first - margin;
    for (const last = lastSeen[b]; i < last; i++) {
      low += atMostOne(p[i] * scale);
      place[t] = i;
      t = low | 0;
      doubt |= t ^ ((low + 2 * margin) | 0);
    }
    before = ends[b];
    low = before + first - margin;
    doubt |= (t ^ (low | 0)) | (t ^ ((low + 2 * margin) | 0));
  }
  if (doubt !== 0 || t !== numSamples) return false;
  for (let s = 0; s < numSamples; s++) {
    const i = place[s];
    indices[start + s] = keys[i];
    weights[start + s] = p[i] / Math.fround(atMostOne(p[i] * scale));
  }
  return true;
}

/** Whether the count of each key is min(1, p scale) with all roundings. */
function isCapped({ sorted, least }: HeadTailRow, { size, scale }: Head): boolean {
  const largestOfTail = size < sorted.length ? sorted[size] : least;
  return (size === 0 || sorted[size - 1] * scale >= 1) && largestOfTail * scale <= 1;
}

/** min(1, x) without a branch, exactly where x is a product of two numbers of single precision. */
function atMostOne(x: number): number {
  const above = x - 1;
  return x - 0.5 * (above + Math.abs(above));
}

/** Writes the sum of counts up to the end of each block, as `addUp` does. */
function addBlocks(p: Floats, scale: number): void {
  if (ends.length < p.length / BLOCK) ends = new Float64Array(p.length / BLOCK);
  let total = 0;
  for (let from = 0, b = 0; from < p.length; from += BLOCK, b++) {
    let inside = 0;
    for (let i = from; i < from + BLOCK / 2; i++) {
      const x = Math.fround(atMostOne(p[i] * scale));
      const y = Math.fround(atMostOne(p[i + BLOCK / 2] * scale));
      inside = Math.fround(inside + Math.fround(x + y));
    }
    ends[b] = total += inside;
  }
}

/** Draws every key once; false where a rounding may put a point before or after its key. */
function takeAll(
  { seen }: HeadTailRow,
  at: Float64Array,
  indices: Int32Array,
  weights: Floats,
  start: number,
): boolean {
  const u = at[0] * at.length;
  if (seen.count === 0 || u < DOUBLE_MARGIN || u > 1 - DOUBLE_MARGIN) return false;
  const end = start + seen.count;
  indices.set(seen.keys, start);
  weights.set(seen.p, start);
  indices.fill(seen.keys[seen.count - 1], end, start + at.length);
  weights.fill(0, end, start + at.length);
  return true;
}
