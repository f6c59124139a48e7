// Points as they come from the kernel: stored in typed arrays, in order, and thinned to curves for drawing.
import type { Scale } from "./scale";

const FIRST_CHUNK_POINTS = 256;
const MAX_CHUNK_POINTS = 16384;

interface Chunk {
  count: number;
  x: Float64Array;
  y: Float64Array;
  low: Float32Array | null;
  high: Float32Array | null;
}

/** A curve's points, in chunks that grow. */
export class Series {
  chunks: Chunk[] = [];
  count = 0;
  dropped = 0;
  sorted = true;
  low = Infinity;
  high = -Infinity;
  bands = false;

  private open(): Chunk {
    const last = this.chunks.at(-1);
    if (last && last.count < last.x.length) return last;
    const size = last ? Math.min(MAX_CHUNK_POINTS, 2 * last.x.length) : FIRST_CHUNK_POINTS;
    const chunk = { count: 0, x: new Float64Array(size), y: new Float64Array(size), low: null, high: null };
    this.chunks.push(chunk);
    return chunk;
  }

  push(x: number, y: number, low: number, high: number): void {
    const chunk = this.open();
    const i = chunk.count++;
    if (this.count > 0 && x < this.high) this.sorted = false;
    chunk.x[i] = x;
    chunk.y[i] = y;
    if (low === low) {
      if (!chunk.low) {
        chunk.low = new Float32Array(chunk.x.length).fill(NaN);
        chunk.high = new Float32Array(chunk.x.length).fill(NaN);
        this.bands = true;
      }
      chunk.low[i] = low;
      chunk.high![i] = high;
    }
    if (x < this.low) this.low = x;
    if (x > this.high) this.high = x;
    this.count += 1;
  }

  /** Drops the oldest chunk; returns the number of its points. */
  shorten(): number {
    const gone = this.chunks.shift();
    if (!gone) return 0;
    this.count -= gone.count;
    this.dropped += gone.count;
    this.low = this.sorted ? (this.chunks[0]?.x[0] ?? Infinity) : this.low;
    return gone.count;
  }

  get last(): number {
    const chunk = this.chunks.at(-1);
    return chunk ? chunk.y[chunk.count - 1] : NaN;
  }

  /** All x, then all y, as bytes: what a test compares with the run's file. */
  bytes(): ArrayBuffer {
    const out = new Float64Array(2 * this.count);
    let at = 0;
    for (const chunk of this.chunks) {
      out.set(chunk.x.subarray(0, chunk.count), at);
      out.set(chunk.y.subarray(0, chunk.count), this.count + at);
      at += chunk.count;
    }
    return out.buffer;
  }

  /** The point nearest to an x, for a series in order of x. */
  nearest(x: number): { x: number; y: number; low: number; high: number } | null {
    let best: { x: number; y: number; low: number; high: number } | null = null;
    for (const chunk of this.chunks) {
      if (this.sorted && best && chunk.x[0] > x + (x - best.x)) break;
      let [a, b] = [0, chunk.count];
      if (this.sorted) {
        while (a < b) {
          const middle = (a + b) >> 1;
          if (chunk.x[middle] < x) a = middle + 1;
          else b = middle;
        }
        [a, b] = [Math.max(0, a - 1), Math.min(chunk.count, a + 1)];
      }
      for (let i = a; i < b; i++) {
        if (!best || Math.abs(chunk.x[i] - x) < Math.abs(best.x - x)) {
          best = { x: chunk.x[i], y: chunk.y[i], low: chunk.low?.[i] ?? NaN, high: chunk.high?.[i] ?? NaN };
        }
      }
    }
    return best;
  }
}

/** The points of a message; the order of the buffers is that of `COLUMNS` in stream.py. */
export interface Batch {
  first: number;
  count: number;
  oldest: number;
  total: number;
  names: string[];
}

/** All curves, and the number of the point that is expected next. */
export class Store {
  series = new Map<string, Series>();
  next = 0;
  total = 0;
  lost = 0;
  repaired = 0;
  points = 0;

  constructor(private capacity = 1 << 21) {}

  /** Takes in a message. False if points before it are missing; then nothing of it is taken in. */
  take(batch: Batch, buffers: DataView[]): boolean {
    this.total = Math.max(this.total, batch.total);
    if (batch.first > this.next) {
      if (batch.first > batch.oldest) {
        this.repaired += 1;
        return false;
      }
      this.lost += batch.first - this.next; // the kernel has dropped them, too
      this.next = batch.first;
    }
    const skip = this.next - batch.first;
    if (batch.count <= skip) return true;
    const [which, x, y, low, high] = buffers;
    const names = batch.names;
    const banded = low.byteLength > 0;
    const of = names.map((name) => {
      if (!this.series.has(name)) this.series.set(name, new Series());
      return this.series.get(name)!;
    });
    for (let i = skip; i < batch.count; i++) {
      of[which.getUint16(2 * i, true)].push(
        x.getFloat64(8 * i, true),
        y.getFloat64(8 * i, true),
        banded ? low.getFloat32(4 * i, true) : NaN,
        banded ? high.getFloat32(4 * i, true) : NaN,
      );
    }
    this.points += batch.count - skip;
    this.next = batch.first + batch.count;
    while (this.points > this.capacity) {
      const longest = [...this.series.values()].reduce((a, b) => (b.count > a.count ? b : a));
      this.points -= longest.shorten();
    }
    return true;
  }
}

/** A curve thinned to the pixels: of every column of pixels its first, least, greatest and last value. */
export interface Thinned {
  x: number[];
  y: number[];
  /** Per column: pixel, lowest low, highest high. */
  band: [number, number, number][];
  low: number;
  high: number;
}

export function thin(series: Series, xs: Scale): Thinned {
  const out: Thinned = { x: [], y: [], band: [], low: Infinity, high: -Infinity };
  let column = -Infinity;
  let edge = -Infinity;
  let [first, least, most, last, bottom, top] = [NaN, Infinity, -Infinity, NaN, Infinity, -Infinity];
  let gap = false;
  const close = () => {
    if (least <= most) {
      for (const y of first === last && least === most ? [first] : [first, least, most, last]) {
        out.x.push(column + 0.5);
        out.y.push(y);
      }
      out.low = Math.min(out.low, least);
      out.high = Math.max(out.high, most);
    }
    if (bottom <= top) out.band.push([column + 0.5, bottom, top]);
    if (gap) {
      out.x.push(NaN);
      out.y.push(NaN);
    }
    [first, least, most, last, bottom, top, gap] = [
      NaN,
      Infinity,
      -Infinity,
      NaN,
      Infinity,
      -Infinity,
      false,
    ];
  };
  const margin = series.sorted ? 1 : 0; // the curve goes on to the neighbour outside
  let before: [number, number] | null = null;
  let past = 0;
  for (const chunk of series.chunks) {
    if (series.sorted && chunk.x[chunk.count - 1] < xs.low) {
      before = [chunk.x[chunk.count - 1], chunk.y[chunk.count - 1]];
      continue;
    }
    if (past > margin) break;
    for (let i = 0; i < chunk.count; i++) {
      const x = chunk.x[i];
      if (!(x > 0) && xs.log) continue;
      if (x < xs.low) {
        if (series.sorted) before = [x, chunk.y[i]];
        continue;
      }
      if (before) {
        out.x.push(xs(before[0] > 0 || !xs.log ? before[0] : xs.low));
        out.y.push(before[1]);
        before = null;
      }
      if (x > xs.high) {
        if (!series.sorted) continue;
        if (++past > margin) break;
      }
      if (!series.sorted || x >= edge) {
        const at = Math.floor(xs(x));
        if (at !== column) {
          close();
          column = at;
          edge = xs.invert(at + 1);
        }
      }
      const y = chunk.y[i];
      if (y !== y) {
        gap = true;
        continue;
      }
      if (first !== first) first = y;
      if (y < least) least = y;
      if (y > most) most = y;
      last = y;
      if (chunk.low && chunk.low[i] === chunk.low[i]) {
        if (chunk.low[i] < bottom) bottom = chunk.low[i];
        if (chunk.high![i] > top) top = chunk.high![i];
      }
    }
  }
  close();
  return out;
}

/** Labels' places, pushed apart to at least `room`, in the order of their wishes. */
export function spread(wishes: number[], room: number, low: number, high: number): number[] {
  const order = wishes.map((_, i) => i).sort((a, b) => wishes[a] - wishes[b]);
  const out = [...wishes];
  let at = low;
  for (const i of order) {
    out[i] = Math.max(wishes[i], at);
    at = out[i] + room;
  }
  at = high;
  for (const i of order.reverse()) {
    out[i] = Math.min(out[i], at);
    at = out[i] - room;
  }
  return out;
}
