// The heads that a lens draws in the browser, so that a picture does not wait for the kernel.
import type { MapsRequest, RowRequest } from "./lens_requests";
import { LocalHead, mapsOf, rowOf, type Answer } from "./local_head";
import { half } from "./maps";
import type { RowStream } from "./philox";
import { points, SAMPLERS, type SamplerName } from "./samplers";

/** Heads that stay in memory; the largest takes some 20 MB. */
const MAX_HEADS = 3;

type Request = MapsRequest | RowRequest;

/** A head that was sent by the kernel. */
interface HeldHead {
  /** The samplers by which the browser draws as the kernel does. */
  samplers: string[];
  answer(request: Request, sampler: SamplerName): Answer | null;
}

/** Some rows of a large map, of which the browser knows how much weight lies before the end of each cell. */
export interface Overview {
  /** Which queries they are, one for each row of cells. */
  rows: Int32Array;
  /** Of each row, the share of its weight up to the end of each cell. */
  cumulative: Float32Array;
  /** Keys in a cell are 2^level; the last cell may have fewer. */
  level: number;
  numKeys: number;
  stream: Omit<RowStream, "position">;
}

/** The drawn weights of the cells of an overview, as half-precision codes: each is the mean over its keys. */
export function overviewCodes(overview: Overview, sampler: SamplerName, numSamples: number): Uint16Array {
  const { rows, cumulative, level, numKeys, stream } = overview;
  const width = cumulative.length / rows.length;
  const codes = new Uint16Array(cumulative.length);
  const counts = new Float64Array(width);
  for (let r = 0; r < rows.length; r++) {
    const ends = cumulative.subarray(r * width, (r + 1) * width);
    counts.fill(0);
    for (const point of points(sampler, { ...stream, position: rows[r] }, numSamples)) {
      let [low, high] = [0, width - 1]; // the first cell that ends after the point
      while (low < high) {
        const middle = (low + high) >> 1;
        if (ends[middle] > point) high = middle;
        else low = middle + 1;
      }
      counts[low] += 1;
    }
    for (let c = 0; c < width; c++) {
      const keys = Math.min(1 << level, numKeys - (c << level));
      if (counts[c] > 0) codes[r * width + c] = half(counts[c] / numSamples / keys);
    }
  }
  return codes;
}

/** The overview that was asked for. How far the output is off takes the values, which the kernel alone has. */
function overviewOf(overview: Overview, request: MapsRequest, sampler: SamplerName, seed: string): Answer {
  const codes = overviewCodes(overview, sampler, request.draws!);
  const [rows, columns] = [overview.rows.length, codes.length / overview.rows.length];
  const tiles = request.sampled.map(([i, j]) => ({ map: "sampled", i, j, rows, columns }));
  const effort = `${sampler}, ${request.draws} draw${request.draws === 1 ? "" : "s"} a row`;
  const known = { sampler, effort, seed, corrected: false, fallbacks: [], measured_rows: rows };
  const buffers = [codes, new Int32Array(0), new Float32Array(0)].map((x) => new DataView(x.buffer));
  return [{ ...request, tiles, error: null, std_error: null, ...known }, buffers];
}

const bytes = ({ buffer, byteOffset, byteLength }: DataView) =>
  buffer.slice(byteOffset, byteOffset + byteLength) as ArrayBuffer;

/** Heads that were sent by the kernel, and what can be answered by them. */
export class LocalHeads {
  /** By layer and head; null until it is there. */
  private readonly heads = new Map<string, HeldHead | null>();
  /** Whether the kernel has said that it sends none. */
  private refused = false;

  constructor(
    private readonly numQueries: number,
    private readonly numKeys: number,
    private readonly causal: boolean,
  ) {}

  /** Whether a head is to be asked for: it is not there, was not asked for, and may come. */
  lacks(layer: number, head: number): boolean {
    return !this.refused && !this.heads.has(`${layer}/${head}`);
  }

  /** Notes that a head was asked for. */
  expect(layer: number, head: number): void {
    this.heads.set(`${layer}/${head}`, null);
    for (const old of this.heads.keys()) {
      if (this.heads.size <= MAX_HEADS) break;
      this.heads.delete(old);
    }
  }

  /** Takes in a head that was asked for. */
  take(message: any, buffers: DataView[]): void {
    const name = `${message.layer}/${message.head}`;
    this.refused = buffers.length === 0;
    if (this.refused || !this.heads.has(name)) return;
    this.heads.set(name, message.overview ? this.overview(message, buffers) : this.whole(message, buffers));
  }

  /** The answer to a request, if the browser can give it. */
  answer(request: Request, sampler: string): Answer | null {
    const held = this.heads.get(`${request.layer}/${request.head}`);
    const name = SAMPLERS.find((known) => known === sampler);
    if (!held || !name || request.draws === null || !held.samplers.includes(name)) return null;
    return held.answer(request, name);
  }

  private whole(message: any, buffers: DataView[]): HeldHead {
    const { scale, group, samplers, seed } = message;
    const [queries, keys, values] = buffers.slice(0, 3).map((part) => new Float32Array(bytes(part)));
    const order = new Uint16Array(bytes(buffers[3]));
    const { numQueries, numKeys, causal } = this;
    const [shape, stream] = [
      { numQueries, numKeys, scale, causal },
      { key: streamKey(message), group },
    ];
    const head = new LocalHead({ queries, keys, values, order, ...shape, stream });
    const answer = (request: Request, sampler: SamplerName) =>
      request.kind === "maps" ? mapsOf(head, request, sampler, seed) : rowOf(head, request, sampler);
    return { samplers, answer };
  }

  private overview(message: any, buffers: DataView[]): HeldHead {
    const { group, samplers, seed, level, row_level: rowLevel } = message;
    const rows = new Int32Array(bytes(buffers[0]));
    const cumulative = new Float32Array(bytes(buffers[1]));
    const { numKeys } = this;
    const held = { rows, cumulative, level, numKeys, stream: { key: streamKey(message), group } };
    const answer = (request: Request, sampler: SamplerName) => {
      const known = request.kind === "maps" && request.level === level && request.row_level === rowLevel;
      return known && request.exact.length === 0 ? overviewOf(held, request, sampler, seed) : null;
    };
    return { samplers, answer };
  }
}

/** The Philox key of a message: its lower and its upper word. */
const streamKey = ({ key }: { key: string }): [number, number] => [
  parseInt(key.slice(8), 16),
  parseInt(key.slice(0, 8), 16),
];
