// The heads that a lens draws in the browser, so that a picture does not wait for the kernel.
import type { MapsRequest, RowRequest } from "./lens_requests";
import { LocalHead, mapsOf, rowOf, type Answer } from "./local_head";
import { SAMPLERS, type SamplerName } from "./samplers";

/** Heads that stay in memory; the largest takes some 20 MB. */
const MAX_HEADS = 3;

interface HeldHead {
  head: LocalHead;
  /** The samplers by which the browser draws as the kernel does. */
  samplers: string[];
  seed: string;
}

/** Heads that were sent by the kernel, and what can be answered by them. */
export class LocalHeads {
  /** By layer and head; null until it is there. */
  private readonly heads = new Map<string, HeldHead | null>();
  /** Whether the kernel has said that it sends none, because the maps are too large. */
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
    const { layer, head, scale, group, samplers, seed } = message;
    this.refused = buffers.length === 0;
    if (this.refused || !this.heads.has(`${layer}/${head}`)) return;
    const bytes = ({ buffer, byteOffset, byteLength }: DataView) =>
      buffer.slice(byteOffset, byteOffset + byteLength) as ArrayBuffer;
    const [queries, keys, values] = buffers.slice(0, 3).map((part) => new Float32Array(bytes(part)));
    const order = new Uint16Array(bytes(buffers[3]));
    const key: [number, number] = [parseInt(message.key.slice(8), 16), parseInt(message.key.slice(0, 8), 16)];
    const { numQueries, numKeys, causal } = this;
    const [shape, stream] = [
      { numQueries, numKeys, scale, causal },
      { key, group },
    ];
    const held = new LocalHead({ queries, keys, values, order, ...shape, stream });
    this.heads.set(`${layer}/${head}`, { head: held, samplers, seed });
  }

  /** The answer to a request, if the browser can give it. */
  answer(request: MapsRequest | RowRequest, sampler: string): Answer | null {
    const held = this.heads.get(`${request.layer}/${request.head}`);
    if (!held || request.draws === null || !held.samplers.includes(sampler)) return null;
    const name = SAMPLERS.find((known) => known === sampler) as SamplerName;
    return request.kind === "maps"
      ? mapsOf(held.head, request, name, held.seed)
      : rowOf(held.head, request, name);
  }
}
