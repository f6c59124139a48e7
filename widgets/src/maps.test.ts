import { describe, expect, it } from "vitest";
import { byVariance, thumbnailPixels, toggled, varianceRange, type HeadPlace } from "./lens_thumbnails";
import * as maps from "./maps";

describe("half precision", () => {
  it("reads what numpy writes", () => {
    // np.float16([0, 1, -2, 0.1, 6e-8, 65504]).view(np.uint16)
    const known: [number, number][] = [
      [0x0000, 0],
      [0x3c00, 1],
      [0xc000, -2],
      [0x2e66, 0.0999755859375],
      [0x0001, 5.960464477539063e-8],
      [0x7bff, 65504],
    ];
    for (const [code, x] of known) expect(maps.HALF[code]).toBe(x);
    expect(maps.HALF[0x7c01]).toBeNaN();
  });
});

describe("colours", () => {
  it("rise with the probability, linearly and by logarithm", () => {
    for (const log of [false, true]) {
      expect(maps.share(0, log, 0.5)).toBe(0);
      expect(maps.share(1, log, 1)).toBe(1);
      let last = -1;
      for (const p of [1e-4, 1e-3, 0.1, 0.5]) {
        const x = maps.share(p, log, 0.5);
        expect(x).toBeGreaterThan(last);
        last = x;
      }
    }
    expect(maps.paletteOf(true, 1)[0x3c00]).toBe(maps.sequential[255]);
    expect([512, 4096, 65536].map(maps.floorFor)).toEqual([1e-4, 1e-5, 1e-6]);
  });

  it("of differences are centred on zero", () => {
    const at = (i: number) => [0, 8, 16].map((shift) => (maps.diverging[i] >> shift) & 255);
    expect(Math.min(...at(127), ...at(128))).toBeGreaterThan(230);
    expect(at(0)[2]).toBeGreaterThan(at(0)[0]); // blue is less
    expect(at(255)[0]).toBeGreaterThan(at(255)[2]); // red is more
  });
});

describe("the part that is looked at", () => {
  const whole = { r0: 0, r1: 4096, c0: 0, c1: 4096 };

  it("has the coarsest level that still fills the pixels", () => {
    const coarsest = { rows: 4, columns: 4 };
    expect(maps.levelFor(whole, 300, 300, coarsest)).toEqual({ rows: 3, columns: 3 });
    expect(maps.levelFor({ r0: 0, r1: 100, c0: 0, c1: 100 }, 300, 300, coarsest)).toEqual({
      rows: 0,
      columns: 0,
    });
    expect(maps.levelFor(whole, 100, 100, coarsest)).toEqual({ rows: 4, columns: 4 });
    const few = { r0: 0, r1: 16, c0: 0, c1: 65536 };
    expect(maps.levelFor(few, 400, 240, { rows: 0, columns: 8 })).toEqual({ rows: 0, columns: 7 });
    expect(maps.overviewLevel(65536, 16, 64)).toEqual({ rows: 10, columns: 0 });
  });

  it("touches few tiles at its level, and covers itself", () => {
    expect(maps.tilesOf(whole, { rows: 4, columns: 4 })).toEqual([[0, 0]]);
    expect(maps.tilesOf({ r0: 0, r1: 16, c0: 0, c1: 65536 }, { rows: 0, columns: 8 })).toEqual([[0, 0]]);
    expect(maps.tilesOf({ r0: 200, r1: 300, c0: 0, c1: 10 }, { rows: 0, columns: 0 })).toEqual([
      [0, 0],
      [1, 0],
    ]);
  });

  it("stays inside when zoomed, and comes back", () => {
    let view = whole as maps.Viewport;
    for (const factor of [0.5, 0.5, 0.1, 0.01, 2, 4, 1000]) {
      view = maps.zoomed(view, 4000, 10, factor, 4096, 4096);
      expect(view.r0).toBeGreaterThanOrEqual(0);
      expect(view.c0).toBeGreaterThanOrEqual(0);
      expect(view.r1).toBeLessThanOrEqual(4096);
      expect(view.r1 - view.r0).toBeGreaterThanOrEqual(4);
    }
    expect(view).toEqual(whole);
    expect(maps.zoomed({ r0: 0, r1: 2, c0: 0, c1: 3 }, 1, 1, 0.5, 2, 3)).toEqual({
      r0: 0,
      r1: 2,
      c0: 0,
      c1: 3,
    });
  });
});

describe("tiles", () => {
  it("are put together, with holes where none is known", () => {
    const tile = (i: number, j: number) =>
      i === 1 && j === 1
        ? undefined
        : {
            rows: 256,
            columns: 256,
            codes: Uint16Array.from(
              { length: 65536 },
              (_, at) => (i * 256 + (at >> 8)) * 100 + ((j * 256 + (at & 255)) % 100),
            ),
          };
    const cells = maps.region(tile, 250, 254, 12, 4);
    for (let r = 0; r < 12; r++) {
      for (let c = 0; c < 4; c++) {
        const [row, column] = [250 + r, 254 + c];
        const hole = row >= 256 && column >= 256;
        expect(cells[r * 4 + c]).toBe(hole ? 0xffff : row * 100 + (column % 100));
      }
    }
  });

  it("that are missing are filled from a coarser level", () => {
    const codes = Uint16Array.from([7, maps.UNKNOWN, maps.UNKNOWN, maps.UNKNOWN]);
    maps.fillFrom(codes, 2, 3, 2, { rows: 1, columns: 2 }, (row, column) => 10 * row + column);
    expect([...codes]).toEqual([7, 11, 10, 11]);
  });

  it("are forgotten when there are too many, the least used first", () => {
    const tiles = new maps.Tiles(2);
    const tile = { rows: 1, columns: 1, codes: new Uint16Array(1) };
    tiles.put("a", tile);
    tiles.put("b", tile);
    tiles.get("a");
    tiles.put("c", tile);
    expect(["a", "b", "c"].map((name) => tiles.get(name) !== undefined)).toEqual([true, false, true]);
  });
});

describe("rows", () => {
  it("are brushed in either direction, inside the map", () => {
    expect(maps.brushed(5, 3, 10)).toEqual([3, 4, 5]);
    expect(maps.brushed(-4, 1, 10)).toEqual([0, 1]);
    expect(maps.brushed(8, 99, 10)).toEqual([8, 9]);
    expect(maps.runs([1, 2, 3, 7, 9, 10])).toEqual([
      [1, 3],
      [7, 7],
      [9, 10],
    ]);
  });
});

describe("thumbnails", () => {
  it("are sorted by falling variance, the unknown ones last", () => {
    expect(byVariance([0.1, null, 0.3, 0.3, null, 0])).toEqual([2, 3, 0, 5, 1, 4]);
  });

  it("are picked one by one, and all of them are null", () => {
    const all: HeadPlace[] = [
      [0, 0],
      [0, 1],
      [1, 0],
    ];
    expect(toggled(null, all, [0, 1])).toEqual([all[0], all[2]]);
    expect(toggled([], all, [1, 0])).toEqual([all[2]]);
    expect(toggled([all[2]], all, [0, 0])).toEqual([all[0], all[2]]);
    expect(toggled([all[0], all[2]], all, [0, 1])).toBeNull();
  });

  it("are coloured by a scale without the lowest ones", () => {
    expect(varianceRange([...Array(39).keys(), 1e9].map((x) => x + 1))).toEqual([3, 1e9 + 1]);
    expect(varianceRange([5])).toEqual([5, 5]);
  });

  it("look like maps however small their weights are", () => {
    // NaN (masked), 0, the smallest half-precision number, a hundred of it
    const [masked, zero, small, top] = thumbnailPixels(Uint16Array.from([0x7e00, 0, 1, 100]));
    expect(masked).toBe(0);
    expect(zero).toBe(maps.sequential[0]);
    expect(top).toBe(maps.sequential[255]);
    expect(maps.sequential.indexOf(small)).toBeGreaterThan(64);
    expect(thumbnailPixels(new Uint16Array(2))[0]).toBe(maps.sequential[0]);
  });
});
