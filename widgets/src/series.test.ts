import { describe, expect, it } from "vitest";
import { scale } from "./scale";
import { Series, spread, Store, thin, type Batch } from "./series";

/** A message as stream.py makes it. */
function batch(
  first: number,
  points: [number, number, number][],
  oldest = 0,
  bands = false,
): [Batch, DataView[]] {
  const names = ["a", "b", "c"];
  const columns = [
    Uint16Array.from(points, ([which]) => which),
    Float64Array.from(points, ([, x]) => x),
    Float64Array.from(points, ([, , y]) => y),
    bands ? Float32Array.from(points, ([, , y]) => y - 1) : new Float32Array(0),
    bands ? Float32Array.from(points, ([, , y]) => y + 1) : new Float32Array(0),
  ];
  const total = first + points.length;
  return [{ first, count: points.length, oldest, total, names }, columns.map((x) => new DataView(x.buffer))];
}

const points = (from: number, to: number): [number, number, number][] =>
  Array.from({ length: to - from }, (_, i) => [(from + i) % 3, from + i, Math.sin(from + i)]);

describe("store", () => {
  it("holds every point once and in order, whatever is sent again", () => {
    const store = new Store();
    expect(store.take(...batch(0, points(0, 100)))).toBe(true);
    expect(store.take(...batch(150, points(150, 200)))).toBe(false); // 100 to 149 are missing
    expect(store.take(...batch(50, points(50, 150)))).toBe(true); // half of it is known
    expect(store.take(...batch(20, points(20, 40)))).toBe(true); // all of it is known
    expect(store.take(...batch(150, points(150, 900)))).toBe(true);
    expect([store.next, store.points, store.repaired, store.lost]).toEqual([900, 900, 1, 0]);
    for (const [which, name] of ["a", "b", "c"].entries()) {
      const expected = points(0, 900).filter(([w]) => w === which);
      const actual = new Float64Array(store.series.get(name)!.bytes());
      expect([...actual]).toEqual([...expected.map(([, x]) => x), ...expected.map(([, , y]) => y)]);
    }
  });

  it("says what the kernel itself has forgotten", () => {
    const store = new Store();
    expect(store.take(...batch(40, points(40, 50), 40))).toBe(true);
    expect([store.lost, store.points, store.next]).toEqual([40, 10, 50]);
  });

  it("is bounded", () => {
    const store = new Store(2000);
    for (let first = 0; first < 6000; first += 500) store.take(...batch(first, points(first, first + 500)));
    expect(store.points).toBeLessThanOrEqual(2000);
    expect(store.next).toBe(6000);
    expect(store.series.get("a")!.last).toBeCloseTo(Math.sin(5997));
  });
});

describe("thinning", () => {
  function filled(count: number, y: (i: number) => number, bands = false): Series {
    const series = new Series();
    for (let i = 0; i < count; i++) series.push(i, y(i), bands ? y(i) - 1 : NaN, bands ? y(i) + 1 : NaN);
    return series;
  }

  it("keeps the extremes of every column and at most four points of it", () => {
    const wild = (i: number) => Math.sin(i * 12.9898) * 43758.5453;
    const y = (i: number) => wild(i) - Math.floor(wild(i));
    const series = filled(100_000, y);
    const xs = scale(0, 100_000, 0, 200);
    const curve = thin(series, xs);
    expect(curve.x.length).toBeLessThanOrEqual(4 * 201);
    const all = Array.from({ length: 100_000 }, (_, i) => y(i));
    expect(curve.low).toBe(Math.min(...all.slice(0, 50_000), ...all.slice(50_000)));
    for (const column of [0, 77, 199]) {
      const inside = all.filter((_, i) => Math.floor(xs(i)) === column);
      const drawn = curve.y.filter((_, i) => Math.floor(curve.x[i]) === column);
      expect(Math.max(...drawn)).toBe(Math.max(...inside));
      expect(Math.min(...drawn)).toBe(Math.min(...inside));
    }
  });

  it("leaves gaps where there is no number, and draws bands", () => {
    const series = filled(10, (i) => (i === 5 ? NaN : i), true);
    const curve = thin(series, scale(0, 9, 0, 900));
    expect(curve.y.filter((y) => y !== y).length).toBe(1);
    expect(curve.band.every(([, low, high]) => high - low === 2)).toBe(true);
  });

  it("goes on to the neighbours outside when zoomed in", () => {
    const curve = thin(
      filled(1000, (i) => i),
      scale(500.2, 500.8, 0, 100),
    );
    expect(Math.min(...curve.x)).toBeLessThan(0);
    expect(Math.max(...curve.x)).toBeGreaterThan(100);
  });

  it("takes x in any order", () => {
    const series = new Series();
    for (const x of [3, 1, 2]) series.push(x, 10 * x, NaN, NaN);
    expect(series.sorted).toBe(false);
    expect(thin(series, scale(1, 3, 0, 100)).y).toEqual([30, 10, 20]);
    expect(series.nearest(1.9)?.y).toBe(20);
  });

  it("finds the nearest point across chunks", () => {
    const series = filled(50_000, (i) => i);
    for (const x of [0, 255.6, 256.4, 31_000.2, 49_999, 1e9]) {
      expect(series.nearest(x)?.x).toBe(Math.min(49_999, Math.round(x)));
    }
  });
});

describe("labels", () => {
  it("are pushed apart and stay inside", () => {
    const actual = spread([50, 51, 10, 99], 12, 0, 100);
    const sorted = [...actual].sort((a, b) => a - b);
    for (let i = 1; i < sorted.length; i++)
      expect(sorted[i] - sorted[i - 1]).toBeGreaterThanOrEqual(12 - 1e-9);
    expect(Math.max(...actual)).toBeLessThanOrEqual(100);
  });
});
