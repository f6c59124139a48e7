import { describe, expect, it } from "vitest";
import { spread } from "./charts";
import { keySlots, keyTicks, reweighted } from "./circuit_charts";
import { fixed, scale, withError } from "./scale";

describe("keys of a distribution", () => {
  it("are all drawn where there is room", () => {
    const slots = keySlots([0.5, 0, 0.5], null, 600);
    expect(slots.map((slot) => [slot.at, slot.keys])).toEqual([
      [0, [0]],
      [2, [2]],
    ]);
  });

  it("are the likeliest and the rest where there are many", () => {
    const exact = Array.from({ length: 1000 }, (_, j) => (j + 1) / 500500);
    const slots = keySlots(exact, null, 600);
    const rest = slots.at(-1)!;
    expect(slots.slice(0, -1).every((slot) => slot.keys.length === 1)).toBe(true);
    expect(slots.flatMap((slot) => slot.keys).sort((a, b) => a - b)).toEqual(exact.map((_, j) => j));
    expect(Math.min(...slots.slice(0, -1).map((slot) => slot.keys[0]))).toBeGreaterThan(
      Math.max(...rest.keys),
    );
    expect(rest.name).toBe(`rest (${rest.keys.length} keys)`);
  });
});

describe("ticks of the keys", () => {
  const names = (exact: number[], width: number) => {
    const slots = keySlots(exact, null, width);
    const xs = scale(slots[0].at - 0.6, slots.at(-1)!.at + 0.6, 0, width);
    return keyTicks(slots, xs).map(([at, name]) => [slots.find((slot) => slot.at === at)?.keys, name]);
  };

  it("are whole numbers, however few keys there are", () => {
    for (const count of [1, 2, 4, 8, 64])
      for (const [, name] of names(Array(count).fill(1 / count), 600)) expect(name).toMatch(/^\d+$/);
  });

  it("name the keys that stand beside each other, far apart as they are in the row", () => {
    const exact = Array(1000).fill(0);
    for (const key of [3, 500, 999]) exact[key] = 1 / 3;
    expect(names(exact, 600)).toEqual([
      [[3], "3"],
      [[500], "500"],
      [[999], "999"],
    ]);
  });
});

describe("an edited weight", () => {
  it("gets its share, and the others keep their ratios", () => {
    const row = reweighted([0.5, 0.3, 0.2], 0, 0.1);
    expect(row[0]).toBeCloseTo(0.1);
    expect(row.reduce((a, b) => a + b, 0)).toBeCloseTo(1);
    expect(row[1] / row[2]).toBeCloseTo(1.5);
    expect(reweighted([1, 0], 0, 0.3)).toEqual([1, 0]); // there is no other key to take the rest
  });
});

describe("labels", () => {
  it("stand apart and inside", () => {
    const places = spread([50, 50, 51, 99], 10, 0, 100);
    const sorted = [...places].sort((a, b) => a - b);
    for (let i = 1; i < sorted.length; i++) expect(sorted[i] - sorted[i - 1]).toBeGreaterThanOrEqual(10);
    expect(Math.max(...places)).toBeLessThanOrEqual(100);
  });

  it("have no negative zero", () => {
    expect(fixed(-0.0004, 3)).toBe("0.000");
    expect(withError(-0.0004, 0.03)).toBe("0.00 ± 0.03");
  });
});
