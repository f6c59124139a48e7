// Random numbers of a counter-based stream: the twin of qtx_lab/streams.py, to the bit.

/** The random numbers of one row: see `Stream` in qtx_lab/streams.py. */
export interface RowStream {
  /** The Philox key of the row's sequence: its lower and its upper word. */
  key: readonly [number, number];
  /** The head group. */
  group: number;
  /** The position of the query. */
  position: number;
}

/** `Purpose.POINTS`: where the draws of a row lie in its distribution. */
const POINTS = 0;
const WORD = 2 ** 32;

/** The upper 32 bits of the product of two words; the lower ones are `Math.imul`'s. */
function upper(a: number, b: number): number {
  const aHigh = a >>> 16;
  const aLow = a & 0xffff;
  const bHigh = b >>> 16;
  const bLow = b & 0xffff;
  const middle = (Math.imul(aHigh, bLow) >>> 0) + (Math.imul(aLow, bLow) >>> 16); // fits into a word
  const cross = (Math.imul(aLow, bHigh) >>> 0) + (middle & 0xffff); // and so does this
  return (Math.imul(aHigh, bHigh) + (middle >>> 16) + (cross >>> 16)) >>> 0;
}

/** Writes four words for a key and a counter of words into `out`: Philox 4×32 with 10 rounds. */
function rounds(
  k0: number,
  k1: number,
  c0: number,
  c1: number,
  c2: number,
  c3: number,
  out: Uint32Array,
): void {
  for (let round = 0; round < 10; round++) {
    const high0 = upper(0xd2511f53, c0);
    const low0 = Math.imul(0xd2511f53, c0);
    const high1 = upper(0xcd9e8d57, c2);
    const low1 = Math.imul(0xcd9e8d57, c2);
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c1 = low1 >>> 0;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c3 = low0 >>> 0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

/** Four words for a key and a counter of words. */
export function philox(
  key: readonly [number, number],
  counter: readonly [number, number, number, number],
): Uint32Array {
  const words = new Uint32Array(4);
  rounds(...key, ...counter, words);
  return words;
}

/** A number in [0, 1) of 53 bits from two words. */
const uniform = (high: number, low: number) => ((high >>> 5) * 2 ** 26 + (low >>> 6)) * 2 ** -53;

/** The first `count` uniform numbers of a row's replicate. */
export const uniforms = (stream: RowStream, replicate: number, count: number): Float64Array =>
  uniformsInto(new Float64Array(count), stream, replicate);

/** Fills an array with the first uniform numbers of a row's replicate, from an even place on. */
export function uniformsInto(
  out: Float64Array,
  stream: RowStream,
  replicate: number,
  first = 0,
): Float64Array {
  const last = ((replicate << 8) | POINTS) >>> 0;
  const [position, words] = [stream.position % WORD, new Uint32Array(4)];
  for (let i = first; i < out.length; i += 2) {
    rounds(stream.key[0], stream.key[1], i / 2, position, stream.group, last, words);
    out[i] = uniform(words[0], words[1]);
    if (i + 1 < out.length) out[i + 1] = uniform(words[2], words[3]);
  }
  return out;
}
