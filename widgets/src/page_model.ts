// The model of a lens in a page without a kernel: it answers the lens's requests itself.
import type { Model } from "./dom";
import type { MapsRequest } from "./lens_requests";
import { errorOf, LocalHead, mapsOf, rowOf } from "./local_head";
import { HALF } from "./maps";
import { SAMPLERS } from "./samplers";

/** What a page holds of a lens; arrays are base64 of little-endian numbers. */
export interface PageData {
  /** The view's traits. */
  state: Record<string, any>;
  scale: number;
  seed: string;
  /** The Philox key of the sequence, 16 hexadecimal digits. */
  key: string;
  /** The heads that the page can draw. */
  heads: { layer: number; head: number; group: number; q: string; kv: number }[];
  /** Keys, values (half precision, in `unit`s) and their order of each key head. */
  kv: { k: string; v: string; unit: string; order: string }[];
  /** Each layer's thumbnails at `state.num_samples` draws. */
  thumbnails: { rows: number; columns: number; variances: string; maps: string }[];
}

/** On what the strip is measured: as in qtx_lab/widgets/views/lens_strip.py. */
const STRIP_REPETITIONS = 8;
const MAX_STRIP_ROWS = 64;
const MAX_STRIP_CELLS = 1 << 18;
const MAX_STRIP_DRAWS = 1 << 10;
/** Milliseconds after a request for maps for which the strip waits, so that the slider moves freely. */
const STRIP_PAUSE_MS = 300;

function decoded(base64: string): ArrayBuffer {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer;
}

/** A model as anywidget gives it to a view, for a page in which no kernel stands behind it. */
export class PageModel {
  private readonly state: Record<string, any>;
  private readonly listeners = new Map<string, Set<(...values: any[]) => void>>();
  private readonly heads = new Map<string, LocalHead>();
  private readonly pending = new Map<string, any>();
  private lastMaps = -Infinity;
  /** The strip that is being measured. */
  private strip: any = null;
  /** The request for maps whose error is being measured on all rows. */
  private measuring: MapsRequest | null = null;

  constructor(private readonly data: PageData) {
    this.state = { ...data.state, without_kernel: true };
  }

  /** As the views' type. */
  get model(): Model {
    return this as unknown as Model;
  }

  get(name: string): any {
    return this.state[name];
  }

  set(name: string, value: any): void {
    if (JSON.stringify(this.state[name]) === JSON.stringify(value)) return;
    this.state[name] = value;
    this.tell(`change:${name}`);
  }

  save_changes(): void {
    // Nobody else holds these values.
  }

  on(event: string, listener: (...values: any[]) => void): void {
    if (!this.listeners.has(event)) this.listeners.set(event, new Set());
    this.listeners.get(event)!.add(listener);
  }

  off(event: string, listener: (...values: any[]) => void): void {
    this.listeners.get(event)?.delete(listener);
  }

  /** Answers a request after the caller has returned, and of several of a kind only the last. */
  send(request: any): void {
    if (request.kind === "maps") {
      this.lastMaps = performance.now();
      this.measuring = null;
    }
    const name = `${request.kind} ${request.view ?? ""}`;
    if (!this.pending.has(name)) setTimeout(() => this.answer(name), 0);
    this.pending.set(name, request);
  }

  /** Whether the page can draw a head. */
  holds(layer: number, head: number): boolean {
    return this.data.heads.some((x) => x.layer === layer && x.head === head);
  }

  /** A head, which is computed when it is first asked for. */
  head(layer: number, head: number): LocalHead {
    const name = `${layer}/${head}`;
    if (!this.heads.has(name)) {
      const { state, scale, key, kv } = this.data;
      const held = this.data.heads.find((x) => x.layer === layer && x.head === head)!;
      const unit = Number(kv[held.kv].unit);
      const computed = new LocalHead({
        queries: new Float32Array(decoded(held.q)),
        keys: new Float32Array(decoded(kv[held.kv].k)),
        values: Float32Array.from(new Uint16Array(decoded(kv[held.kv].v)), (code) => HALF[code] * unit),
        order: new Uint16Array(decoded(kv[held.kv].order)),
        numQueries: state.num_queries,
        numKeys: state.num_keys,
        scale,
        causal: state.is_causal,
        stream: { key: [parseInt(key.slice(8), 16), parseInt(key.slice(0, 8), 16)], group: held.group },
      });
      this.heads.set(name, computed);
    }
    return this.heads.get(name)!;
  }

  private tell(event: string, ...values: any[]): void {
    for (const listener of [...(this.listeners.get(event) ?? [])]) listener(...values);
  }

  private answer(name: string): void {
    const request = this.pending.get(name);
    this.pending.delete(name);
    if (request.kind === "maps") this.answerMaps(request);
    else if (request.kind === "thumbnails") this.answerThumbnails();
    else if (request.kind === "row") this.answerRow(request);
    else if (request.kind === "strip") this.answerStrip(request);
  }

  private answerMaps(request: MapsRequest): void {
    const { layer, head } = request;
    if (!this.holds(layer, head)) {
      const text = `This page does not hold layer ${layer}, head ${head}. It holds ${this.contents()}.`;
      this.tell("msg:custom", { kind: "error", text }, []);
      return;
    }
    const about = [this.head(layer, head), request, this.state.sampler, this.data.seed] as const;
    this.tell("msg:custom", ...mapsOf(...about));
    const step = () => {
      if (this.measuring !== request) return;
      const whole = errorOf(...about);
      if (whole) this.tell("msg:custom", ...whole);
      else setTimeout(step, 0);
    };
    this.measuring = request;
    requestAnimationFrame(() => setTimeout(step, 0)); // once the maps are painted
  }

  private answerRow(request: any): void {
    const { layer, head } = request;
    if (this.holds(layer, head))
      this.tell("msg:custom", ...rowOf(this.head(layer, head), request, this.state.sampler));
  }

  /** The heads that the page holds, in words. */
  private contents(): string {
    const layers = new Map<number, number[]>();
    for (const { layer, head } of this.data.heads) layers.set(layer, [...(layers.get(layer) ?? []), head]);
    return [...layers]
      .map(
        ([layer, heads]) => `head${heads.length > 1 ? "s" : ""} ${heads.sort().join(", ")} of layer ${layer}`,
      )
      .join("; ");
  }

  /** Sends error and variance against draws point by point, until another head is asked for. */
  private answerStrip(request: any): void {
    const { layer, head, view, seq } = request;
    if (!this.holds(layer, head)) return;
    const { num_queries: numQueries, num_keys: numKeys } = this.state;
    const count = Math.min(numQueries, MAX_STRIP_ROWS, Math.max(4, Math.floor(MAX_STRIP_CELLS / numKeys)));
    const rows = Array.from({ length: count }, (_, i) => Math.floor(((i + 0.5) * numQueries) / count));
    const counts = [4];
    while (2 * counts[counts.length - 1] <= Math.min(numKeys, MAX_STRIP_DRAWS))
      counts.push(2 * counts[counts.length - 1]);
    const plan = counts.flatMap((draws) => SAMPLERS.map((sampler) => ({ sampler, draws })));
    const computed = this.head(layer, head);
    const step = () => {
      if (this.strip !== request) return;
      if (performance.now() - this.lastMaps < STRIP_PAUSE_MS) return void setTimeout(step, STRIP_PAUSE_MS);
      const next = plan.shift();
      if (next === undefined) return;
      const [error, variance] = computed.measure(next.sampler, next.draws, rows, STRIP_REPETITIONS);
      const known = { rows: count, repetitions: STRIP_REPETITIONS, left: plan.length };
      const points = [{ ...next, error, variance }];
      this.tell("msg:custom", { kind: "strip", view, seq, layer, head, ...known, points }, []);
      setTimeout(step, 0);
    };
    this.strip = request;
    setTimeout(step, 0);
  }

  private answerThumbnails(): void {
    const draws = this.data.state.num_samples;
    this.data.thumbnails.forEach(({ rows, columns, variances, maps }, layer) =>
      this.tell("msg:custom", { kind: "thumbnails", layer, draws, rows, columns }, [
        new DataView(decoded(variances)),
        new DataView(decoded(maps)),
      ]),
    );
  }
}

export { SAMPLERS };
