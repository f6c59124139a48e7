import { expect, it } from "vitest";
import { LocalHeads, overviewCodes } from "./lens_local";
import { HALF } from "./maps";
import { SAMPLERS } from "./samplers";

const view = (x: { buffer: ArrayBufferLike }) => new DataView(x.buffer as ArrayBuffer);

it("answers requests for heads that have come, by the samplers that the kernel names", () => {
  const heads = new LocalHeads(3, 5, false);
  const numbers = (count: number) => Float32Array.from({ length: count }, (_, i) => Math.sin(i));
  const buffers = [numbers(6), numbers(10), numbers(10), Uint16Array.from([4, 3, 2, 1, 0])].map(view);
  const known = { scale: 1, group: 0, key: "0000000200000001", seed: "7", samplers: ["systematic"] };
  const place = { view: "a", seq: 1, layer: 2, head: 1, draws: 4, given: null, drawing: "systematic 4" };
  const tiles = { level: 0, row_level: 0, exact: [[0, 0]], sampled: [[0, 0]] } as any;
  const maps = { kind: "maps", ...place, ...tiles } as const;
  expect(heads.lacks(2, 1)).toBe(true);
  heads.expect(2, 1);
  expect(heads.lacks(2, 1)).toBe(false);
  expect(heads.answer(maps, "systematic")).toBeNull();
  heads.take({ layer: 2, head: 1, ...known }, buffers);
  const [message, parts] = heads.answer(maps, "systematic")!;
  expect(message).toMatchObject({ seq: 1, seed: "7", effort: "systematic, 4 draws a row", std_error: null });
  expect(parts.map((part) => part.byteLength)).toEqual([2 * 15, 2 * 15, 4 * 3, 4 * 12]);
  const row = { kind: "row", ...place, row: 1, first: 1, end: 4 } as const;
  expect(heads.answer(row, "systematic")![1].map((part) => part.byteLength)).toEqual([12, 12, 12]);
  expect(heads.answer(maps, "sobol")).toBeNull();
  expect(heads.answer({ ...maps, draws: null }, "systematic")).toBeNull(); // an estimate that was given
  expect(heads.answer({ ...maps, head: 0 }, "systematic")).toBeNull();
  heads.take({ layer: 0, head: 0 }, []);
  expect(heads.lacks(0, 0)).toBe(false); // the maps are too large: it does not ask again
});

it("counts the draws of a row in the cells of an overview", () => {
  const ends = Float32Array.from([0.5, 0.5, 1, 0, 0.25, 1]);
  const stream = { key: [1, 2] as [number, number], group: 0 };
  const overview = { rows: Int32Array.from([3, 900]), cumulative: ends, level: 4, numKeys: 40, stream };
  for (const sampler of SAMPLERS.filter((name) => name !== "head-tail")) {
    const weights = [...overviewCodes(overview, sampler, 64)].map((code) => HALF[code]);
    const keys = [16, 16, 8]; // the last cell has fewer
    const shares = weights.map((x, i) => x * keys[i % 3]);
    expect(shares[0] + shares[2]).toBeCloseTo(1, 2);
    expect(shares[1]).toBe(0); // without weight
    expect(shares[3]).toBe(0);
    expect(Math.abs(shares[4] - 0.25)).toBeLessThan(0.2);
    if (sampler === "systematic") expect(shares[0]).toBeCloseTo(0.5, 2);
  }
});
