// One head that the browser draws itself, without a kernel: its exact attention, and what is drawn of it.
import type { MapsRequest, RowRequest } from "./lens_requests";
import { placeHeadTailInto, prepareHeadTail, type HeadTailRow } from "./head_tail";
import { masses, prepare, type Row } from "./inversion";
import { half, TILE, type Level } from "./maps";
import { uniformsInto, type RowStream } from "./philox";
import { numUniforms, placeInto, placePoints, type SamplerName } from "./samplers";

/** Queries that see fewer keys take them as they come: `FIRST_VALUES` in qtx_lab/samplers/value_order.py. */
const FIRST_VALUES = 64;

/** Random numbers of all rows that are kept, so that the next step of the slider need not make them again. */
const MAX_KNOWN_UNIFORMS = 1 << 21;
/** Products of weights and values by which the error of new draws is measured before they are shown; for the
 * rest of the rows there is time afterwards. */
const FIRST_PRODUCTS = 1 << 20;
/** Numbers that a sum of single precision adds up in one step; see `sum` in samplers.ts. */
const SUM_STEP = 32;

/** A head as the browser holds it; matrices row by row. */
export interface HeadInputs {
  queries: Float32Array;
  keys: Float32Array;
  values: Float32Array;
  /** The keys in the order of their values, which `head-tail` lays them out in. */
  order: Uint16Array;
  numQueries: number;
  numKeys: number;
  scale: number;
  causal: boolean;
  stream: Omit<RowStream, "position">;
}

/** What was drawn of a head: `numSamples` keys of each row. The next draws take its place in memory. */
export interface HeadDraws {
  sampler: SamplerName;
  numSamples: number;
  indices: Int32Array;
  weights: Float32Array;
  /** Distinct keys of each row that was measured. */
  distinct: Float32Array;
  /** ‖ô − o‖² of each row that was measured. */
  squares: Float64Array;
  /** How many rows were measured, in the order of `spreadRows`. */
  measured: number;
}

/** The inner product of a query and the key at a place. */
function product(query: Float64Array, keys: Float32Array, at: number): number {
  const whole = query.length & ~3;
  let [a, b, c, d] = [0, 0, 0, 0]; // apart, so that no addition waits for the one before
  for (let i = 0; i < whole; i += 4) {
    a += query[i] * keys[at + i];
    b += query[i + 1] * keys[at + i + 1];
    c += query[i + 2] * keys[at + i + 2];
    d += query[i + 3] * keys[at + i + 3];
  }
  for (let i = whole; i < query.length; i++) a += query[i] * keys[at + i];
  return a + b + (c + d);
}

/** Rows in an order in which those that come first are spread evenly: first the multiples of a power of 2, then
 * those of the next smaller one. */
export function spreadRows(count: number): Int32Array {
  const order = new Int32Array(count);
  let at = 1; // row 0 is the first
  for (let step = 2 ** Math.ceil(Math.log2(count)) / 2; step >= 1; step /= 2)
    for (let i = step; i < count; i += 2 * step) order[at++] = i;
  return order;
}

export class LocalHead {
  private readonly mass: Float32Array[] = [];
  /** 1 / the mass of each row. */
  private readonly share: Float64Array;
  private readonly output: Float32Array;
  private readonly effectiveKeys: Float32Array;
  private plain: Row[] | null = null;
  private inOrder: HeadTailRow[] | null = null;
  private last: HeadDraws | null = null;
  /** The memory of the draws. */
  private indices = new Int32Array(0);
  private weights = new Float32Array(0);
  private readonly measuringOrder: Int32Array;
  /** The first random numbers of each row, row by row, and how many of them are made. */
  private known: Float64Array | null = null;
  private readonly numKnown: Int32Array;
  /** Features of a value. */
  private readonly width: number;
  /** Of `average`: the weight of each key, 0 between calls, and the keys that were drawn. */
  private readonly weightOf: Float64Array;
  private readonly distinct: Int32Array;
  /** The squared length of each row's output. */
  private readonly norms: Float64Array;

  constructor(readonly inputs: HeadInputs) {
    const { numQueries, numKeys, queries, keys, values, scale, causal } = inputs;
    const [features, width] = [queries.length / numQueries, values.length / numKeys];
    this.width = width;
    this.weightOf = new Float64Array(numKeys);
    this.distinct = new Int32Array(numKeys);
    this.share = new Float64Array(numQueries);
    this.output = new Float32Array(numQueries * width);
    this.effectiveKeys = new Float32Array(numQueries);
    this.norms = new Float64Array(numQueries);
    this.measuringOrder = spreadRows(numQueries);
    this.numKnown = new Int32Array(numQueries);
    const query = new Float64Array(features);
    const logits = new Float32Array(numKeys);
    const sums = new Float64Array(width);
    for (let i = 0; i < numQueries; i++) {
      for (let c = 0; c < features; c++) query[c] = Math.fround(queries[i * features + c] * scale);
      const seen = causal ? Math.min(i + 1, numKeys) : numKeys;
      logits.fill(-Infinity, seen);
      for (let j = 0; j < seen; j++) {
        logits[j] = product(query, keys, j * features);
      }
      const mass = masses(logits);
      let [total, entropy] = [0, 0];
      sums.fill(0);
      for (let j = 0; j < seen; j++) {
        const m = mass[j];
        if (m === 0) continue;
        total += m;
        entropy -= m * Math.log(m);
        for (let c = 0, at = j * width; c < width; c++, at++) sums[c] += m * values[at];
      }
      this.mass.push(mass);
      this.share[i] = 1 / total;
      this.effectiveKeys[i] = Math.exp(entropy / total + Math.log(total));
      for (let c = 0, at = i * width; c < width; c++, at++) {
        this.output[at] = sums[c] / total;
        this.norms[i] += this.output[at] ** 2;
      }
    }
  }

  /** Draws of every row; the same arguments give the same draws. */
  draw(sampler: SamplerName, numSamples: number): HeadDraws {
    if (this.last?.sampler !== sampler || this.last.numSamples !== numSamples)
      this.last = this.drawAnew(sampler, numSamples);
    return this.last;
  }

  private drawAnew(sampler: SamplerName, numSamples: number): HeadDraws {
    const { numQueries } = this.inputs;
    const size = numQueries * numSamples;
    if (this.indices.length < size)
      [this.indices, this.weights] = [new Int32Array(size), new Float32Array(size)];
    const [indices, weights] = [this.indices.subarray(0, size), this.weights.subarray(0, size)];
    const at = new Float64Array(numSamples);
    for (let i = 0; i < numQueries; i++) this.drawRow(sampler, i, 0, at, indices, weights, i * numSamples);
    const [distinct, squares] = [new Float32Array(numQueries), new Float64Array(numQueries)];
    return { sampler, numSamples, indices, weights, distinct, squares, measured: 0 };
  }

  /** Measures the error of the next rows of draws, until `end` of them are measured. */
  measureRows(draws: HeadDraws, end: number): void {
    const { numSamples, indices, weights, distinct, squares } = draws;
    const output = new Float64Array(this.width);
    for (; draws.measured < end; draws.measured++) {
      const i = this.measuringOrder[draws.measured];
      distinct[i] = this.average(indices, weights, i * numSamples, (i + 1) * numSamples, output);
      let off = 0;
      for (let c = 0, from = i * this.width; c < this.width; c++, from++)
        off += (output[c] - this.output[from]) ** 2;
      squares[i] = off;
    }
  }

  /** Rows by which draws are measured at first: evenly spaced, and as many as take no time. */
  firstRows({ numSamples }: HeadDraws): number {
    const { numQueries } = this.inputs;
    let step = 1;
    while ((numQueries / step) * numSamples * this.width > FIRST_PRODUCTS && step < numQueries) step *= 2;
    return Math.ceil(numQueries / step);
  }

  /** What is known of the rows of draws that were measured: which they are, four numbers of each (effective
   * keys, distinct keys, relative error, and its standard error, which is unknown here), and the relative error
   * of them all. */
  measured(draws: HeadDraws): { rows: Int32Array; facts: Float32Array; error: number } {
    const count = draws.measured;
    const rows = this.measuringOrder.slice(0, count);
    const facts = new Float32Array(4 * count).fill(NaN);
    let [squares, norm] = [0, 0];
    rows.forEach((i, at) => {
      facts[at] = this.effectiveKeys[i];
      facts[count + at] = draws.distinct[i];
      facts[2 * count + at] = Math.sqrt(draws.squares[i] / Math.max(this.norms[i], 2 ** -126));
      squares += draws.squares[i];
      norm += this.norms[i];
    });
    return { rows, facts, error: Math.sqrt(squares / Math.max(norm, 2 ** -126)) };
  }

  /** Writes the draws of a row, which name keys, from a place on; `at` takes the points. */
  private drawRow(
    sampler: SamplerName,
    i: number,
    repetition: number,
    at: Float64Array,
    indices: Int32Array,
    weights: Float32Array,
    start: number,
  ): void {
    const numSamples = at.length;
    placePoints(sampler, this.uniformsOf(i, repetition, numUniforms(sampler, numSamples)), numSamples, at);
    if (sampler !== "head-tail")
      return placeInto(this.plainRow(i), at, numSamples, sampler, indices, weights, start);
    placeHeadTailInto(this.orderedRow(i), at, numSamples, indices, weights, start);
  }

  /** The first random numbers of a row's repetition, `count` or more. */
  private uniformsOf(i: number, repetition: number, count: number): Float64Array {
    const stream = { ...this.inputs.stream, position: i };
    const capacity = Math.floor(MAX_KNOWN_UNIFORMS / this.inputs.numQueries) & ~1;
    if (repetition > 0 || count > capacity) return uniformsInto(new Float64Array(count), stream, repetition);
    this.known ??= new Float64Array(capacity * this.inputs.numQueries);
    const known = this.known.subarray(i * capacity, (i + 1) * capacity);
    const end = (count + 1) & ~1;
    if (end > this.numKnown[i]) uniformsInto(known.subarray(0, end), stream, 0, this.numKnown[i]);
    this.numKnown[i] = Math.max(end, this.numKnown[i]);
    return known;
  }

  /** Writes the average of the values at some draws into `output`, and gives the number of distinct keys. */
  private average(
    indices: Int32Array,
    weights: Float32Array,
    start: number,
    end: number,
    output: Float64Array,
  ): number {
    const { values } = this.inputs;
    const { weightOf, distinct, width } = this;
    let count = 0;
    for (let s = start; s < end; s++) {
      const index = indices[s];
      if (weights[s] === 0) continue;
      if (weightOf[index] === 0) distinct[count++] = index;
      weightOf[index] += weights[s];
    }
    output.fill(0);
    // Four keys at a time, so that each entry of the output is read and written once for them.
    const fours = count & ~3;
    for (let k = 0; k < fours; k += 4) {
      const [a, b, c, d] = [distinct[k], distinct[k + 1], distinct[k + 2], distinct[k + 3]];
      const [wa, wb, wc, wd] = [weightOf[a], weightOf[b], weightOf[c], weightOf[d]];
      const [fa, fb, fc, fd] = [a * width, b * width, c * width, d * width];
      for (let i = 0; i < width; i++)
        output[i] += wa * values[fa + i] + wb * values[fb + i] + (wc * values[fc + i] + wd * values[fd + i]);
    }
    for (let k = fours; k < count; k++) {
      const [weight, from] = [weightOf[distinct[k]], distinct[k] * width];
      for (let i = 0; i < width; i++) output[i] += weight * values[from + i];
    }
    for (let k = 0; k < count; k++) weightOf[distinct[k]] = 0;
    return count;
  }

  /** Error and variance of some rows over repetitions: see `StripPoint` in lens_strip.ts. */
  measure(sampler: SamplerName, numSamples: number, rows: number[], repetitions: number): [number, number] {
    const output = new Float64Array(this.width);
    const [at, indices] = [new Float64Array(numSamples), new Int32Array(numSamples)];
    const weights = new Float32Array(numSamples);
    let [norm, squares, spread] = [0, 0, 0];
    for (const i of rows) {
      const [sums, sumsOfSquares] = [new Float64Array(this.width), new Float64Array(this.width)];
      for (let repetition = 0; repetition < repetitions; repetition++) {
        this.drawRow(sampler, i, repetition, at, indices, weights, 0);
        this.average(indices, weights, 0, numSamples, output);
        for (let c = 0; c < this.width; c++) {
          const off = output[c] - this.output[i * this.width + c];
          sums[c] += off;
          sumsOfSquares[c] += off * off;
        }
      }
      for (let c = 0; c < this.width; c++) {
        norm += this.output[i * this.width + c] ** 2;
        squares += sumsOfSquares[c] / repetitions;
        spread += (sumsOfSquares[c] - sums[c] ** 2 / repetitions) / (repetitions - 1);
      }
    }
    norm = Math.max(norm, 2 ** -126);
    return [Math.sqrt(squares / norm), Math.max(0, spread / norm)];
  }

  private plainRow(i: number): Row {
    this.plain ??= this.mass.map((mass, row) => prepare(mass.subarray(0, this.seenEnd(row))));
    return this.plain[i];
  }

  private orderedRow(i: number): HeadTailRow {
    this.inOrder ??= this.mass.map((mass, row) => this.layOut(mass, row));
    return this.inOrder[i];
  }

  /** The place after the last mass of a row, after which sums add nothing more. */
  private seenEnd(row: number): number {
    const { causal } = this.inputs;
    const padded = this.mass[row].length;
    return causal ? Math.min(padded, Math.ceil((row + 1) / SUM_STEP) * SUM_STEP) : padded;
  }

  private layOut(mass: Float32Array, row: number): HeadTailRow {
    const { order, causal, numKeys } = this.inputs;
    const seen = causal ? Math.min(row + 1, numKeys) : numKeys;
    const inOrder = seen >= FIRST_VALUES;
    let laidOut = mass;
    if (inOrder) {
      laidOut = mass.slice();
      for (let j = 0; j < order.length; j++) laidOut[j] = mass[order[j]];
    }
    return prepareHeadTail(laidOut, inOrder ? order : null);
  }

  /** The exact weights of a part of a level's cells, each the mean of those under it; see `poolDraws`. */
  poolExact(level: Level, rows: [number, number], columns: [number, number]): Float32Array {
    const cells = new Float32Array((rows[1] - rows[0]) * (columns[1] - columns[0]));
    const [last, width] = [Math.min(rows[1] << level.rows, this.inputs.numQueries), columns[1] - columns[0]];
    const end = Math.min(columns[1] << level.columns, this.inputs.numKeys);
    for (let i = rows[0] << level.rows; i < last; i++) {
      const [mass, share] = [this.mass[i], this.share[i]];
      const start = ((i >> level.rows) - rows[0]) * width - columns[0];
      for (let j = columns[0] << level.columns; j < end; j++)
        cells[start + (j >> level.columns)] += mass[j] * share;
    }
    return this.means(cells, level, rows, columns);
  }

  /** The drawn weights of the cells [rows) × [columns) of a level. */
  poolDraws(draws: HeadDraws, level: Level, rows: [number, number], columns: [number, number]): Float32Array {
    const { indices, weights, numSamples } = draws;
    const cells = new Float32Array((rows[1] - rows[0]) * (columns[1] - columns[0]));
    const [last, width] = [Math.min(rows[1] << level.rows, this.inputs.numQueries), columns[1] - columns[0]];
    for (let i = rows[0] << level.rows; i < last; i++) {
      const start = ((i >> level.rows) - rows[0]) * width;
      for (let s = i * numSamples; s < (i + 1) * numSamples; s++) {
        const column = (indices[s] >> level.columns) - columns[0];
        if (column >= 0 && column < width) cells[start + column] += weights[s];
      }
    }
    return this.means(cells, level, rows, columns);
  }

  /** The exact and the drawn weights of a row at the keys from `first` to before `end`, and the lengths of their
   * values. */
  row(
    draws: HeadDraws,
    row: number,
    first: number,
    end: number,
  ): { exact: Float32Array; sampled: Float32Array; norms: Float32Array } {
    const { numKeys, values } = this.inputs;
    const width = values.length / numKeys;
    const sampled = new Float32Array(numKeys);
    for (let s = row * draws.numSamples; s < (row + 1) * draws.numSamples; s++)
      sampled[draws.indices[s]] += draws.weights[s];
    const norm = (key: number) => Math.hypot(...values.subarray(key * width, (key + 1) * width));
    return {
      exact: this.mass[row].slice(first, end).map((mass) => mass * this.share[row]),
      sampled: sampled.slice(first, end),
      norms: Float32Array.from({ length: end - first }, (_, i) => norm(first + i)),
    };
  }

  /** Divides the sums of cells by how many positions lie under each. */
  private means(
    cells: Float32Array,
    level: Level,
    rows: [number, number],
    columns: [number, number],
  ): Float32Array {
    if (level.rows === 0 && level.columns === 0) return cells;
    const width = columns[1] - columns[0];
    const under = (cell: number, by: number, count: number) => Math.min(1 << by, count - (cell << by));
    for (let r = 0; r < rows[1] - rows[0]; r++) {
      const height = under(rows[0] + r, level.rows, this.inputs.numQueries);
      for (let c = 0; c < width; c++)
        cells[r * width + c] /= height * under(columns[0] + c, level.columns, this.inputs.numKeys);
    }
    return cells;
  }
}

/** An answer to a request of a lens, as the kernel would send it. */
export type Answer = [message: any, buffers: DataView[]];

/** The maps that were asked for, with the error on some of the rows. */
export function mapsOf(head: LocalHead, request: MapsRequest, sampler: SamplerName, seed: string): Answer {
  const level: Level = { rows: request.row_level, columns: request.level };
  const draws = head.draw(sampler, request.draws!);
  head.measureRows(draws, head.firstRows(draws));
  const tiles: CodedTile[] = [];
  for (const [i, j] of request.exact) {
    const [rows, columns] = cellsOf(head, level, [i, j], [i, j]);
    tiles.push(...cut(head.poolExact(level, rows, columns), "exact", [[i, j]], [i, j], rows, columns));
  }
  if (request.sampled.length > 0) {
    const corner = (pick: (...x: number[]) => number): [number, number] => [
      pick(...request.sampled.map(([i]) => i)),
      pick(...request.sampled.map(([, j]) => j)),
    ];
    const first = corner(Math.min);
    const [rows, columns] = cellsOf(head, level, first, corner(Math.max));
    const cells = head.poolDraws(draws, level, rows, columns);
    tiles.push(...cut(cells, "sampled", request.sampled, first, rows, columns));
  }
  return answerOf(head, request, draws, seed, tiles);
}

/** The answer that completes one of `mapsOf`: the error on all rows, and no maps; null until it is measured. Each
 * call measures some rows more. */
export function errorOf(
  head: LocalHead,
  request: MapsRequest,
  sampler: SamplerName,
  seed: string,
): Answer | null {
  const draws = head.draw(sampler, request.draws!);
  const { numQueries } = head.inputs;
  head.measureRows(draws, Math.min(numQueries, draws.measured + head.firstRows(draws)));
  return draws.measured < numQueries ? null : answerOf(head, request, draws, seed, []);
}

/** Standard errors are the kernel's alone. */
function answerOf(
  head: LocalHead,
  request: MapsRequest,
  draws: HeadDraws,
  seed: string,
  coded: CodedTile[],
): Answer {
  const { sampler, numSamples } = draws;
  const { rows, facts, error } = head.measured(draws);
  const effort = `${sampler}, ${numSamples} draw${numSamples === 1 ? "" : "s"} a row`;
  const measured = { error, std_error: null, measured_rows: rows.length };
  const known = { sampler, effort, seed, corrected: false, fallbacks: [] };
  const tiles = coded.map(({ codes, ...tile }) => tile);
  const buffers = [...coded.map(({ codes }) => codes), rows, facts].map((x) => new DataView(x.buffer));
  return [{ ...request, tiles, ...measured, ...known }, buffers];
}

/** A tile of half-precision codes. */
interface CodedTile {
  map: "exact" | "sampled";
  i: number;
  j: number;
  rows: number;
  columns: number;
  codes: Uint16Array<ArrayBuffer>;
}

/** Tiles of the cells [rows) × [columns), of which the first tile is `first`. */
function cut(
  cells: Float32Array,
  map: "exact" | "sampled",
  tiles: [number, number][],
  first: [number, number],
  rows: [number, number],
  columns: [number, number],
): CodedTile[] {
  const width = columns[1] - columns[0];
  return tiles.map(([i, j]) => {
    const [top, left] = [(i - first[0]) * TILE, (j - first[1]) * TILE];
    const tall = Math.min(TILE, rows[1] - rows[0] - top);
    const wide = Math.min(TILE, width - left);
    const codes = new Uint16Array(tall * wide);
    for (let r = 0; r < tall; r++)
      for (let c = 0, from = (top + r) * width + left; c < wide; c++, from++)
        codes[r * wide + c] = cells[from] === 0 ? 0 : half(cells[from]);
    return { map, i, j, rows: tall, columns: wide, codes };
  });
}

/** The cells from one tile to another: the rows from the first to before the last, and the columns. */
function cellsOf(
  head: LocalHead,
  level: Level,
  first: [number, number],
  last: [number, number],
): [rows: [number, number], columns: [number, number]] {
  const { numQueries, numKeys } = head.inputs;
  const end = (tile: number, positions: number, by: number) =>
    Math.min((tile + 1) * TILE, Math.ceil(positions / (1 << by)));
  return [
    [first[0] * TILE, end(last[0], numQueries, level.rows)],
    [first[1] * TILE, end(last[1], numKeys, level.columns)],
  ];
}

/** The weights of the query that was asked for, and the lengths of the values. */
export function rowOf(head: LocalHead, request: RowRequest, sampler: SamplerName): Answer {
  const { row, first, end } = request;
  const found = head.row(head.draw(sampler, request.draws!), row, first, end);
  const buffers = [found.exact, found.sampled, found.norms].map((x) => new DataView(x.buffer));
  return [{ ...request, sampler }, buffers];
}
