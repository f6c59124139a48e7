// What a lens asks of the kernel, and the one place where its questions leave and the answers come in.
import type { Frame } from "./dom";

/** Asks for tiles of the maps of a head at a level; `exact` and `sampled` name those that are missing. */
export interface MapsRequest {
  kind: "maps";
  view: string;
  seq: number;
  layer: number;
  head: number;
  /** Draws of a row; null for the estimate that was given, whose number is `given`. */
  draws: number | null;
  given: number | null;
  /** A name of these draws, which the answer repeats. */
  drawing: string;
  /** log2 of how many keys, and queries, a cell has. */
  level: number;
  row_level: number;
  exact: [number, number][];
  sampled: [number, number][];
}

/** Asks for the thumbnails of all layers, which come layer by layer. */
export interface ThumbnailsRequest {
  kind: "thumbnails";
  draws: number;
  /** Whether heads of which an estimate was given are shown by that. */
  given: boolean;
}

/** Asks for the weights of a query over the keys from `first` to before `end`, and for the lengths of their
 * value vectors. */
export interface RowRequest {
  kind: "row";
  view: string;
  layer: number;
  head: number;
  draws: number | null;
  given: number | null;
  drawing: string;
  row: number;
  first: number;
  end: number;
}

/** Asks for error and variance against draws of all samplers; points come until another head is asked for. */
export interface StripRequest {
  kind: "strip";
  view: string;
  seq: number;
  layer: number;
  head: number;
  /** The sampler that is measured first. */
  sampler: string;
}

/** Asks for what the browser needs to draw a head itself, while the slider moves. */
export interface InputsRequest {
  kind: "inputs";
  view: string;
  layer: number;
  head: number;
}

export type LensRequest = MapsRequest | ThumbnailsRequest | RowRequest | StripRequest | InputsRequest;

/** Sends a request; false where nothing can answer. */
export type Ask = (request: LensRequest) => boolean;

/** Milliseconds without an answer after which a request is sent once more, and then again and again.
 *
 * Jupyter's server drops messages of a kernel that sends more than 1,000 a second, answers among them, and says
 * so in its log only. A request that the kernel still works on is answered twice.
 */
const RETRY_DELAYS_MS = [2_000, 4_000, 8_000];

/** Whether a message is all, or the last part, of the answer to a request. */
export function completes(request: LensRequest, message: any, layers: number): boolean {
  if (request.kind === "maps") return message.seq === request.seq;
  if (request.kind === "strip") return message.seq === request.seq && message.left === 0;
  if (request.kind === "thumbnails") return message.layer === layers - 1;
  return true;
}

/** Connects a lens to the kernel; `answer` takes in what comes back, and `late` is called when it does not come.
 *
 * Of each kind of request the newest is sent again until it is answered.
 */
export function connect(
  frame: Frame,
  layers: number,
  answer: (message: any, buffers: DataView[]) => void,
  late: (request: LensRequest) => void,
): Ask {
  const waiting = new Map<string, { request: LensRequest; timer: number }>();

  function forget(kind: string): void {
    clearTimeout(waiting.get(kind)?.timer);
    waiting.delete(kind);
  }

  function expect(request: LensRequest, tries: number): void {
    forget(request.kind);
    const again = () => {
      late(request);
      if (frame.send(request)) expect(request, tries + 1);
    };
    const delay = RETRY_DELAYS_MS[Math.min(tries, RETRY_DELAYS_MS.length - 1)];
    waiting.set(request.kind, { request, timer: window.setTimeout(again, delay) });
  }

  frame.atEnd(() => [...waiting.keys()].forEach(forget));
  frame.onMessage((message, buffers) => {
    if (message.kind === "error") [...waiting.keys()].forEach(forget);
    const request = waiting.get(message.kind)?.request;
    if (request && (!("view" in request) || message.view === request.view)) {
      if (completes(request, message, layers)) forget(message.kind);
      else expect(request, 0); // the other parts are to come
    }
    answer(message, buffers);
  });
  return (request) => {
    const sent = frame.send(request);
    if (sent) expect(request, 0);
    return sent;
  };
}
