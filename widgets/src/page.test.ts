import { describe, expect, it } from "vitest";
import type { MapsRequest } from "./lens_requests";
import { errorOf, LocalHead, mapsOf, spreadRows, type HeadInputs } from "./local_head";
import { HALF, half } from "./maps";
import { SAMPLERS, type SamplerName } from "./samplers";

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

it("measures rows in an order that begins with evenly spaced ones", () => {
  expect([...spreadRows(1)]).toEqual([0]);
  expect([...spreadRows(7)]).toEqual([0, 4, 2, 6, 1, 3, 5]);
  expect([...spreadRows(1500).slice(0, 6)].sort((a, b) => a - b)).toEqual([0, 256, 512, 768, 1024, 1280]);
  expect(new Set(spreadRows(1500)).size).toBe(1500);
});

it("shows the error on some rows first, and then on all", () => {
  const head = new LocalHead(inputs(700, 700, true));
  const request = { kind: "maps", view: "a", seq: 1, layer: 0, head: 0, draws: 1000, given: null } as const;
  const maps: MapsRequest = { ...request, drawing: "", level: 1, row_level: 1, exact: [], sampled: [[0, 1]] };
  const [first] = mapsOf(head, maps, "stratified", "0");
  expect(first.measured_rows).toBe(175);
  expect(first.tiles).toEqual([{ map: "sampled", i: 0, j: 1, rows: 256, columns: 94 }]);
  const parts = Array.from({ length: 3 }, () => errorOf(head, maps, "stratified", "0"));
  const whole = parts[2];
  expect(parts.slice(0, 2)).toEqual([null, null]);
  expect(whole![0]).toMatchObject({ tiles: [], measured_rows: 700, seq: 1 });
  expect(whole![0].error).toBeCloseTo(first.error, 2);
  expect(whole![1].map((part) => part.byteLength)).toEqual([4 * 700, 4 * 4 * 700]);
});

describe.each([true, false])("a head, causal: %s", (causal) => {
  const head = new LocalHead(inputs(90, 90, causal));
  const errorOfAll = (sampler: SamplerName, numSamples: number) => {
    const draws = head.draw(sampler, numSamples);
    head.measureRows(draws, 90);
    return head.measured(draws).error;
  };

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
      if (sampler === "head-tail" && numSamples === 200) expect(errorOfAll(sampler, 200)).toBeLessThan(1e-6);
    }
    const rows = Array.from({ length: 90 }, (_, i) => i);
    const [error, variance] = head.measure(sampler, 16, rows, 32);
    expect(error ** 2).toBeCloseTo(variance, 1); // the rest is bias
    expect(errorOfAll(sampler, 200)).toBeLessThan(errorOfAll(sampler, 1));
  });
});
