// The walks over a row give what a search for each point gives, to the bit, or say that they do not.
import { describe, expect, it } from "vitest";
import { headOf, placeHeadTailInto, prepareHeadTail, search, walk } from "./head_tail";
import { invert, invertEven, invertInAnyOrder, masses, prepare } from "./inversion";

/** Numbers in [0, 1) that look random and are the same everywhere. */
function randomNumbers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

/** Masses of rows of many kinds: flat ones, peaked ones, with many keys masked, with ties, with masses that vanish. */
function rows(count: number): Float32Array[] {
  const random = randomNumbers(1);
  return Array.from({ length: count }, (_, number) => {
    const [keys, spread, masked] = [1 + Math.floor(700 * random()), 12 * random() ** 3, random() ** 2];
    const levels = number % 5 === 0 ? 4 : Infinity; // ties
    const logit = () =>
      levels < Infinity ? Math.floor(levels * random()) / levels : random() + random() - 1;
    const logits = Float32Array.from({ length: keys }, () =>
      random() < masked ? -Infinity : number % 7 === 0 && random() < 0.1 ? -95 : 3 * spread * logit(),
    );
    return masses(logits);
  });
}

const comb = (u: number, count: number) => Float64Array.from({ length: count }, (_, t) => (t + u) / count);

/** The first place at which two arrays differ; -1 where they are the same. */
const firstOther = (a: Int32Array | Float32Array, b: Int32Array | Float32Array): number =>
  (a as Float32Array).findIndex((x, i) => x !== b[i]);

const BUDGETS = [1, 2, 7, 32, 100, 256, 512];

/** Offsets of a comb: anywhere, at the very ends, and so that a point lies at the end of a key, or next to it. */
function offsetsOf(ends: (key: number) => number, keys: number, random: () => number): number[] {
  const places = Array.from({ length: 4 }, () => ends(Math.floor(keys * random())) % 1);
  const near = places.flatMap((x) => [x, x + 2 ** -30, x - 2 ** -30, x + 2 ** -22, x - 2 ** -22]);
  return [random(), random(), 0, 2 ** -53, 1 - 2 ** -53, ...near.filter((u) => u >= 0 && u < 1)];
}

describe("a walk over a row", { timeout: 60_000 }, () => {
  it("draws by head-tail what a search for each point draws", () => {
    const random = randomNumbers(2);
    let [walked, rest] = [0, 0];
    for (const mass of rows(40)) {
      const n = mass.length;
      const order = Uint16Array.from({ length: n }, (_, i) => (i * 7 + 3) % n);
      const row = prepareHeadTail(mass, n % 7 === 0 ? null : order);
      for (const numSamples of BUDGETS) {
        const head = row.seen.count > numSamples ? headOf(row, numSamples) : null;
        const counts = Float32Array.from(row.p, (p) =>
          head === null ? Number(p > 0) : p >= head.least ? 1 : p * head.scale,
        );
        const { within, cdf } = prepare(counts);
        const end = (key: number) => within[key] + (key < 16 ? 0 : cdf[(key >> 4) - 1]);
        for (const [i, u] of offsetsOf(end, n, random).entries()) {
          const at = comb(u, numSamples);
          const make = () => [new Int32Array(numSamples), new Float32Array(numSamples)] as const;
          const [expected, drawn, again] = [make(), make(), make()];
          search(row, head, at, numSamples, ...expected, 0);
          placeHeadTailInto(row, at, numSamples, ...drawn, 0);
          for (const part of [0, 1] as const) expect(firstOther(drawn[part], expected[part])).toBe(-1);
          if (head === null || i >= 2) continue; // where points are anywhere, the walk does it nearly always
          if (walk(row, head, at, ...again, 0)) walked += 1;
          else rest += 1;
        }
      }
    }
    expect(rest / (walked + rest)).toBeLessThan(0.1);
    expect(walked).toBeGreaterThan(300);
  });

  it("finds the keys at even points that a search finds", () => {
    const random = randomNumbers(3);
    let [walked, rest] = [0, 0];
    for (const mass of rows(40)) {
      const row = prepare(mass);
      const total = row.cdf[row.cdf.length - 1];
      for (const count of BUDGETS) {
        const end = (key: number) =>
          ((row.within[key] + (key < 16 ? 0 : row.cdf[(key >> 4) - 1])) * count) / total;
        const combs = offsetsOf(end, mass.length, random).map((u) => comb(u, count));
        const scattered = Float64Array.from({ length: count }, (_, t) => (t + random()) / count);
        for (const [i, points] of [scattered, ...combs].entries()) {
          const [expected, found] = [new Int32Array(count), new Int32Array(count)];
          invert(row, points, total, expected, 0);
          invertInAnyOrder(row, points.toReversed(), found, 0);
          expect(firstOther(found.toReversed(), expected)).toBe(-1);
          const isDone = invertEven(row, points, found, 0);
          if (isDone) expect(firstOther(found, expected)).toBe(-1);
          if (i >= 2 || total === 0) continue;
          if (isDone) walked += 1;
          else rest += 1;
        }
      }
    }
    expect(rest / (walked + rest)).toBeLessThan(0.1);
    expect(walked).toBeGreaterThan(300);
  });
});
