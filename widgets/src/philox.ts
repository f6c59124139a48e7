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
  const [aHigh, aLow, bHigh, bLow] = [a >>> 16, a & 0xffff, b >>> 16, b & 0xffff];
  const middle = aHigh * bLow + Math.floor((aLow * bLow) / 0x10000); // below 2^33
  const cross = aLow * bHigh + (middle % 0x10000);
  return (aHigh * bHigh + Math.floor(middle / 0x10000) + Math.floor(cross / 0x10000)) >>> 0;
}

/** Four words for a key and a counter of words: Philox 4×32 with 10 rounds. */
export function philox(
  key: readonly [number, number],
  counter: readonly [number, number, number, number],
): [number, number, number, number] {
  let [k0, k1] = key;
  let [c0, c1, c2, c3] = counter;
  for (let round = 0; round < 10; round++) {
    const [high0, low0] = [upper(0xd2511f53, c0), Math.imul(0xd2511f53, c0)];
    const [high1, low1] = [upper(0xcd9e8d57, c2), Math.imul(0xcd9e8d57, c2)];
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c1 = low1 >>> 0;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c3 = low0 >>> 0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1, c2, c3];
}

/** A number in [0, 1) of 53 bits from two words. */
const uniform = (high: number, low: number) => ((high >>> 5) * 2 ** 26 + (low >>> 6)) * 2 ** -53;

/** The first `count` uniform numbers of a row's replicate. */
export function uniforms(stream: RowStream, replicate: number, count: number): Float64Array {
  const out = new Float64Array(count);
  const last = ((replicate << 8) | POINTS) >>> 0;
  for (let i = 0; i < count; i += 2) {
    const words = philox(stream.key, [i / 2, stream.position % WORD, stream.group, last]);
    out[i] = uniform(words[0], words[1]);
    if (i + 1 < count) out[i + 1] = uniform(words[2], words[3]);
  }
  return out;
}
