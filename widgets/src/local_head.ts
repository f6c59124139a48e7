// One head that the browser draws itself, without a kernel: its exact attention, and what is drawn of it.
import type { MapsRequest, RowRequest } from "./lens_requests";
import { half, TILE, type Level } from "./maps";
import { moreUniforms, uniforms, type RowStream } from "./philox";
import {
  masses,
  numUniforms,
  placeInto,
  placePoints,
  prepare,
  prepareHeadTail,
  type HeadTailRow,
  type Row,
  type SamplerName,
} from "./samplers";

/** Queries that see fewer keys take them as they come: `FIRST_VALUES` in qtx_lab/samplers/value_order.py. */
const FIRST_VALUES = 64;

/** Random numbers of a row that are kept, so that the next step of the slider need not make them again. */
const MAX_KNOWN_UNIFORMS = 512;
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

/** What was drawn of a head: `numSamples` keys of each row. */
export interface HeadDraws {
  sampler: SamplerName;
  numSamples: number;
  indices: Int32Array;
  weights: Float32Array;
  /** ‖ô − o‖ / ‖o‖ over all rows. */
  error: number;
  /** Effective keys, distinct keys, relative error and its standard error, unknown here: (4, L). */
  facts: Float32Array;
}

interface DrawnRow {
  row: Row;
  headTail: HeadTailRow | null;
  /** The key at each place; null where they stand as they come. */
  order: Uint16Array | null;
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

export class LocalHead {
  private readonly mass: Float32Array[] = [];
  /** 1 / the mass of each row. */
  private readonly share: Float64Array;
  private readonly output: Float32Array;
  private readonly effectiveKeys: Float32Array;
  private plain: Row[] | null = null;
  private inOrder: DrawnRow[] | null = null;
  private last: HeadDraws | null = null;
  /** The first random numbers of each row. */
  private readonly known: Float64Array[] = [];
  /** Features of a value. */
  private readonly width: number;
  /** Of `average`: the weight of each key, 0 between calls, and the keys that were drawn. */
  private readonly weightOf: Float64Array;
  private readonly distinct: Int32Array;

  constructor(readonly inputs: HeadInputs) {
    const { numQueries, numKeys, queries, keys, values, scale, causal } = inputs;
    const [features, width] = [queries.length / numQueries, values.length / numKeys];
    this.width = width;
    this.weightOf = new Float64Array(numKeys);
    this.distinct = new Int32Array(numKeys);
    this.share = new Float64Array(numQueries);
    this.output = new Float32Array(numQueries * width);
    this.effectiveKeys = new Float32Array(numQueries);
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
      for (let c = 0; c < width; c++) this.output[i * width + c] = sums[c] / total;
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
    const width = this.width;
    const indices = new Int32Array(numQueries * numSamples);
    const weights = new Float32Array(numQueries * numSamples);
    const facts = new Float32Array(4 * numQueries).fill(NaN);
    const output = new Float64Array(width);
    let [squares, norm] = [0, 0];
    const at = new Float64Array(numSamples);
    for (let i = 0; i < numQueries; i++) {
      const start = i * numSamples;
      this.drawRow(sampler, i, 0, at, indices, weights, start);
      const count = this.average(indices, weights, start, start + numSamples, output);
      let [off, size] = [0, 0];
      for (let c = 0, from = i * width; c < width; c++, from++) {
        off += (output[c] - this.output[from]) ** 2;
        size += this.output[from] ** 2;
      }
      facts[i] = this.effectiveKeys[i];
      facts[numQueries + i] = count;
      facts[2 * numQueries + i] = Math.sqrt(off / Math.max(size, 2 ** -126));
      squares += off;
      norm += size;
    }
    const error = Math.sqrt(squares / Math.max(norm, 2 ** -126));
    return { sampler, numSamples, indices, weights, error, facts };
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
    const { row, headTail, order } = this.rowFor(sampler, i);
    const numSamples = at.length;
    placePoints(sampler, this.uniformsOf(i, repetition, numUniforms(sampler, numSamples)), numSamples, at);
    placeInto(row, at, numSamples, headTail, indices, weights, start);
    if (order !== null) for (let s = start; s < start + numSamples; s++) indices[s] = order[indices[s]];
  }

  /** The first random numbers of a row's repetition, `count` or more. */
  private uniformsOf(i: number, repetition: number, count: number): Float64Array {
    const stream = { ...this.inputs.stream, position: i };
    if (repetition > 0) return uniforms(stream, repetition, count);
    const known = this.known[i] ?? new Float64Array(0);
    if (known.length >= count) return known;
    const more = moreUniforms(stream, 0, count, known);
    if (count <= MAX_KNOWN_UNIFORMS) this.known[i] = more;
    return more;
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

  private rowFor(sampler: SamplerName, i: number): DrawnRow {
    if (sampler !== "head-tail") {
      this.plain ??= this.mass.map((mass, row) => prepare(mass.subarray(0, this.seenEnd(row))));
      return { row: this.plain[i], headTail: null, order: null };
    }
    this.inOrder ??= this.mass.map((mass, row) => this.layOut(mass, row));
    return this.inOrder[i];
  }

  /** The place after the last mass of a row, after which sums add nothing more. */
  private seenEnd(row: number): number {
    const { causal } = this.inputs;
    const padded = this.mass[row].length;
    return causal ? Math.min(padded, Math.ceil((row + 1) / SUM_STEP) * SUM_STEP) : padded;
  }

  private layOut(mass: Float32Array, row: number): DrawnRow {
    const { order, causal, numKeys } = this.inputs;
    const seen = causal ? Math.min(row + 1, numKeys) : numKeys;
    const inOrder = seen >= FIRST_VALUES;
    let laidOut = mass;
    if (inOrder) {
      laidOut = mass.slice();
      for (let j = 0; j < order.length; j++) laidOut[j] = mass[order[j]];
    }
    const prepared = prepare(laidOut);
    return { row: prepared, headTail: prepareHeadTail(prepared), order: inOrder ? order : null };
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

/** The maps that were asked for. Standard errors are the kernel's alone. */
export function mapsOf(head: LocalHead, request: MapsRequest, sampler: SamplerName, seed: string): Answer {
  const { numQueries, numKeys } = head.inputs;
  const level: Level = { rows: request.row_level, columns: request.level };
  const draws = head.draw(sampler, request.draws!);
  const tiles: { map: "exact" | "sampled"; i: number; j: number; rows: number; columns: number }[] = [];
  const buffers: DataView[] = [];
  for (const map of ["exact", "sampled"] as const) {
    for (const [i, j] of request[map]) {
      const rows = tileCells(i, numQueries, level.rows);
      const columns = tileCells(j, numKeys, level.columns);
      const cells =
        map === "exact" ? head.poolExact(level, rows, columns) : head.poolDraws(draws, level, rows, columns);
      const codes = new Uint16Array(cells.length);
      for (let at = 0; at < cells.length; at++) codes[at] = cells[at] === 0 ? 0 : half(cells[at]);
      tiles.push({ map, i, j, rows: rows[1] - rows[0], columns: columns[1] - columns[0] });
      buffers.push(new DataView(codes.buffer));
    }
  }
  const everyRow = Int32Array.from({ length: numQueries }, (_, i) => i);
  buffers.push(new DataView(everyRow.buffer), new DataView(draws.facts.buffer));
  const effort = `${sampler}, ${request.draws} draw${request.draws === 1 ? "" : "s"} a row`;
  const measured = { error: draws.error, std_error: null, measured_rows: numQueries };
  const known = { sampler, effort, seed, corrected: false, fallbacks: [] };
  return [{ ...request, tiles, ...measured, ...known }, buffers];
}

/** The weights of the query that was asked for, and the lengths of the values. */
export function rowOf(head: LocalHead, request: RowRequest, sampler: SamplerName): Answer {
  const { row, first, end } = request;
  const found = head.row(head.draw(sampler, request.draws!), row, first, end);
  const buffers = [found.exact, found.sampled, found.norms].map((x) => new DataView(x.buffer));
  return [{ ...request, sampler }, buffers];
}

/** The cells of a tile along one side of a level: the first, and the one after the last. */
const tileCells = (tile: number, positions: number, level: number): [number, number] => [
  tile * TILE,
  Math.min((tile + 1) * TILE, Math.ceil(positions / (1 << level))),
];
