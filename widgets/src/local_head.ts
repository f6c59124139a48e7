// One head that the browser draws itself, without a kernel: its exact attention, and what is drawn of it.
import type { MapsRequest, RowRequest } from "./lens_requests";
import { half, TILE, type Level } from "./maps";
import type { RowStream } from "./philox";
import {
  masses,
  place,
  points,
  prepare,
  prepareHeadTail,
  type Draws,
  type HeadTailRow,
  type Row,
  type SamplerName,
} from "./samplers";

/** Queries that see fewer keys take them as they come: `FIRST_VALUES` in qtx_lab/samplers/value_order.py. */
const FIRST_VALUES = 64;

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
    for (let i = 0; i < numQueries; i++) {
      const drawn = this.drawRow(sampler, i, numSamples, 0);
      indices.set(drawn.indices, i * numSamples);
      weights.set(drawn.weights, i * numSamples);
      const count = this.average(drawn, output);
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

  /** The draws of a row, which name keys. */
  private drawRow(sampler: SamplerName, i: number, numSamples: number, repetition: number): Draws {
    const { row, headTail, order } = this.rowFor(sampler, i);
    const at = points(sampler, { ...this.inputs.stream, position: i }, numSamples, 1, repetition);
    const drawn = place(row, at, numSamples, headTail);
    if (order !== null) drawn.indices.forEach((place, s) => (drawn.indices[s] = order[place]));
    return drawn;
  }

  /** Writes the average of the values at some draws into `output`, and gives the number of distinct keys. */
  private average({ indices, weights }: Draws, output: Float64Array): number {
    const { values } = this.inputs;
    const [weightOf, distinct, width] = [this.weightOf, this.distinct, this.width];
    let count = 0;
    for (let s = 0; s < indices.length; s++) {
      if (weights[s] === 0) continue;
      if (weightOf[indices[s]] === 0) distinct[count++] = indices[s];
      weightOf[indices[s]] += weights[s];
    }
    output.fill(0);
    for (let k = 0; k < count; k++) {
      const weight = weightOf[distinct[k]];
      weightOf[distinct[k]] = 0;
      for (let c = 0, from = distinct[k] * width; c < width; c++, from++) output[c] += weight * values[from];
    }
    return count;
  }

  /** Error and variance of some rows over repetitions: see `StripPoint` in lens_strip.ts. */
  measure(sampler: SamplerName, numSamples: number, rows: number[], repetitions: number): [number, number] {
    const output = new Float64Array(this.width);
    let [norm, squares, spread] = [0, 0, 0];
    for (const i of rows) {
      const [sums, sumsOfSquares] = [new Float64Array(this.width), new Float64Array(this.width)];
      for (let repetition = 0; repetition < repetitions; repetition++) {
        this.average(this.drawRow(sampler, i, numSamples, repetition), output);
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
      this.plain ??= this.mass.map(prepare);
      return { row: this.plain[i], headTail: null, order: null };
    }
    this.inOrder ??= this.mass.map((mass, row) => this.layOut(mass, row));
    return this.inOrder[i];
  }

  private layOut(mass: Float32Array, row: number): DrawnRow {
    const { order, causal, numKeys } = this.inputs;
    const seen = causal ? Math.min(row + 1, numKeys) : numKeys;
    const laidOut = seen < FIRST_VALUES ? mass : mass.map((x, j) => (j < order.length ? mass[order[j]] : x));
    const prepared = prepare(laidOut);
    return {
      row: prepared,
      headTail: prepareHeadTail(prepared),
      order: seen < FIRST_VALUES ? null : order,
    };
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
