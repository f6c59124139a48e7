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

/** Connects a lens to the kernel; `answer` takes in what comes back. */
export function connect(frame: Frame, answer: (message: any, buffers: DataView[]) => void): Ask {
  frame.onMessage(answer);
  return (request) => frame.send(request);
}
