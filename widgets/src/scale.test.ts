import { describe, expect, it } from "vitest";
import { digits, label, scale, ticks, whole, withError } from "./scale";

describe("scale", () => {
  it("goes to pixels and back", () => {
    for (const log of [false, true]) {
      const s = scale(0.5, 200, 40, 600, log);
      for (const x of [0.5, 3, 77, 200]) expect(s.invert(s(x))).toBeCloseTo(x, 9);
      expect([s(0.5), s(200)]).toEqual([40, 600]);
    }
  });

  it("is made valid where the range is not", () => {
    for (const [low, high] of [
      [Infinity, -Infinity],
      [NaN, 1],
      [3, 3],
      [0, 0],
      [-5, -1],
      [-1, 10],
    ]) {
      for (const log of [false, true]) {
        const s = scale(low, high, 0, 1, log);
        expect(s.high).toBeGreaterThan(s.low);
        if (log) expect(s.low).toBeGreaterThan(0);
        for (const tick of ticks(s)) expect(Number.isFinite(s(tick))).toBe(true);
      }
    }
  });
});

describe("ticks", () => {
  it("are round, inside, and not many more than asked for", () => {
    for (const log of [false, true]) {
      for (const [low, high] of [
        [1e-9, 1],
        [16, 4096],
        [0.2, 0.9],
        [1, 1e6],
        [3, 70],
      ]) {
        for (const count of [2, 4, 8]) {
          const s = scale(low, high, 0, 1, log);
          const actual = ticks(s, count);
          expect(actual.length).toBeGreaterThan(0);
          expect(actual.length).toBeLessThanOrEqual(2 * count + 1);
          for (const x of actual) {
            expect(x).toBeGreaterThanOrEqual(low * (1 - 1e-6));
            expect(x).toBeLessThanOrEqual(high * (1 + 1e-6));
          }
          expect(new Set(actual.map(label)).size).toBe(actual.length);
        }
      }
    }
  });
});

describe("numbers", () => {
  it("carry the digits that their error allows", () => {
    expect(withError(0.08312, 0.0041)).toBe("0.083 ± 0.004");
    expect(withError(0.9985, 0.0014)).toBe("0.9985 ± 0.0014");
    expect(withError(12.34, 3.3)).toBe("12 ± 3");
    expect(withError(0.5, null)).toBe("0.5");
    expect(withError(NaN, 1)).toBe("–");
    expect(withError(-0.00012, 0.004)).toBe("0.000 ± 0.004");
    expect(withError(0.5, 1e-12)).toBe("0.50000000 ± <0.00000001");
  });

  it("are short", () => {
    expect([0, 12, 12000, 1e6, 2.5e9, 0.0001].map(label)).toEqual(["0", "12", "12k", "1M", "2.5G", "10⁻⁴"]);
    expect(whole(1000000)).toBe("1\u2009000\u2009000");
    expect(digits(0.012345, 3)).toBe("0.0123");
    expect([1.44e-7, -1234.5, 999999.9, 0].map((x) => digits(x, 3))).toEqual([
      "1.44×10⁻⁷",
      "−1230",
      "10⁶",
      "0",
    ]);
    expect([-0.5, -2e-5, -12000].map(label)).toEqual(["−0.5", "−2×10⁻⁵", "−12k"]);
  });
});
