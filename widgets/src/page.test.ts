import { describe, expect, it } from "vitest";
import { LocalHead, type HeadInputs } from "./local_head";
import { HALF, half } from "./maps";
import { SAMPLERS } from "./samplers";

/** Numbers that look random and are the same everywhere. */
const numbers = (count: number, seed: number) =>
  Float32Array.from({ length: count }, (_, i) => ((((i + seed) * 7919) % 10007) / 10007 - 0.5) * 4);

function inputs(numQueries: number, numKeys: number, causal: boolean): HeadInputs {
  return {
    queries: numbers(numQueries * 8, 1),
    keys: numbers(numKeys * 8, 2),
    values: numbers(numKeys * 4, 3),
    order: Uint16Array.from({ length: numKeys }, (_, i) => numKeys - 1 - i),
    numQueries,
    numKeys,
    scale: 8 ** -0.5,
    causal,
    stream: { key: [1, 2], group: 0 },
  };
}

it("writes half precision as it is read", () => {
  for (let code = 0; code <= 0x3c00; code++) expect(half(HALF[code])).toBe(code);
  expect(half((HALF[0x2e66] + HALF[0x2e67]) / 2)).toBe(0x2e66); // ties go to the even code
  expect(half((HALF[0x2e67] + HALF[0x2e68]) / 2)).toBe(0x2e68);
});

describe.each([true, false])("a head, causal: %s", (causal) => {
  const head = new LocalHead(inputs(90, 90, causal));

  it("has exact rows that sum to one, at every level", () => {
    for (const level of [0, 3]) {
      const cells = Math.ceil(90 / 2 ** level);
      const map = head.poolExact({ rows: level, columns: level }, [0, cells], [0, cells]);
      const total = map.reduce((sum, mean, at) => {
        const under = (cell: number) => Math.min(2 ** level, 90 - cell * 2 ** level);
        return sum + mean * under(Math.floor(at / cells)) * under(at % cells);
      }, 0);
      expect(total).toBeCloseTo(90, 3);
    }
  });

  it.each(SAMPLERS)("is drawn by %s without bias, and each row sums to about one", (sampler) => {
    for (const numSamples of [1, 16, 200]) {
      const draws = head.draw(sampler, numSamples);
      expect(head.draw(sampler, numSamples)).toBe(draws);
      const map = head.poolDraws(draws, { rows: 0, columns: 0 }, [0, 90], [0, 90]);
      for (let i = 0; i < 90; i++) {
        const row = map.subarray(i * 90, (i + 1) * 90);
        expect(head.row(draws, i, 20, 50).sampled).toEqual(row.slice(20, 50));
        expect(row.reduce((sum, x) => sum + x, 0)).toBeGreaterThan(0.5);
        if (causal) expect(row.subarray(i + 1).every((x) => x === 0)).toBe(true);
      }
      if (sampler === "head-tail" && numSamples === 200) expect(draws.error).toBeLessThan(1e-6);
    }
    const rows = Array.from({ length: 90 }, (_, i) => i);
    const [error, variance] = head.measure(sampler, 16, rows, 32);
    expect(error ** 2).toBeCloseTo(variance, 1); // the rest is bias
    expect(head.draw(sampler, 200).error).toBeLessThan(head.draw(sampler, 1).error);
  });
});
