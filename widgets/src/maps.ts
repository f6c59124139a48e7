// Attention maps: half-precision tiles, colours, and the part of a map that is shown.
import { DIVERGING, SEQUENTIAL } from "./theme";

export const TILE = 256;
/** Cells of a side, at most, of the overview by which a large map is shown first. */
export const OVERVIEW = 64;
/** Cells up to which a map is computed whole; as `MAX_WHOLE_CELLS` in lens_heads.py. */
export const MAX_WHOLE_CELLS = 1 << 24;
/** The least weight that a logarithmic scale tells from 0, for up to 1,000 keys. */
export const FLOOR = 1e-4;

/** The least weight that a logarithmic scale tells from 0: a tenth of a uniform row's weights, if that is less. */
export const floorFor = (keys: number): number =>
  Math.min(FLOOR, Number(`1e${Math.floor(Math.log10(0.1 / keys))}`));
/** Stands for a cell that is not there yet; no map has this code, which is one of half precision's NaNs. */
export const UNKNOWN = 0xffff;

/** The number that each of the 65,536 half-precision codes stands for. */
export const HALF = (() => {
  const table = new Float32Array(65536);
  for (let code = 0; code < 65536; code++) {
    const sign = code & 0x8000 ? -1 : 1;
    const exponent = (code >> 10) & 31;
    const fraction = code & 1023;
    table[code] =
      exponent === 0
        ? sign * fraction * 2 ** -24
        : exponent === 31
          ? fraction
            ? NaN
            : sign * Infinity
          : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }
  return table;
})();

const single = new Float32Array(1);
const bits = new Uint32Array(single.buffer);

/** The half-precision code of a number in [0, 1], rounded to the nearest, ties to even. */
export function half(x: number): number {
  single[0] = x;
  const exponent = (bits[0] >>> 23) - 112;
  const digits = bits[0] & 0x7fffff;
  if (exponent < -10) return 0;
  const shift = exponent > 0 ? 13 : 14 - exponent;
  const kept = exponent > 0 ? (exponent << 23) | digits : digits | 0x800000;
  const [code, rest, middle] = [kept >>> shift, kept & ((1 << shift) - 1), 1 << (shift - 1)];
  return code + Number(rest > middle || (rest === middle && (code & 1) === 1));
}

function unpack(base64: string): Uint32Array {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const colours = new Uint32Array(256);
  for (let i = 0; i < 256; i++) {
    colours[i] = (255 << 24) | (bytes[3 * i + 2] << 16) | (bytes[3 * i + 1] << 8) | bytes[3 * i];
  }
  return colours;
}

export const sequential = unpack(SEQUENTIAL);
export const diverging = unpack(DIVERGING);

/** CSS of a colour of a map: 0 the low end, 1 the high one. */
export function css(colours: Uint32Array, share: number): string {
  const c = colours[Math.round(255 * Math.min(1, Math.max(0, share)))];
  return `rgb(${c & 255} ${(c >> 8) & 255} ${(c >> 16) & 255})`;
}

/** A CSS gradient of a whole map. */
export const gradient = (colours: Uint32Array): string =>
  `linear-gradient(to right, ${Array.from({ length: 17 }, (_, i) => css(colours, i / 16)).join(", ")})`;

/** Where a probability lies on the colour map, 0 to 1. */
export function share(p: number, log: boolean, top: number, floor = FLOOR): number {
  if (!log) return Math.min(1, Math.max(0, p / top));
  return p <= floor ? 0 : Math.min(1, 1 + Math.log(p) / -Math.log(floor));
}

/** The colour of every half-precision code, so that painting a cell is one look-up. */
export function paletteOf(log: boolean, top: number, floor = FLOOR): Uint32Array {
  const palette = new Uint32Array(65536);
  for (let code = 0; code < 65536; code++) {
    palette[code] = sequential[Math.round(255 * (share(HALF[code], log, top, floor) || 0))];
  }
  return palette;
}

/** The part of a map that is shown, in cells of level 0; fractions are parts of a cell. */
export interface Viewport {
  r0: number;
  r1: number;
  c0: number;
  c1: number;
}

/** How coarse a map is: a cell is the mean of 2^rows × 2^columns cells of level 0. */
export interface Level {
  rows: number;
  columns: number;
}

/** The finest level at which a map has at most `cells` cells a side. */
export function overviewLevel(rows: number, columns: number, cells: number): Level {
  const needed = (size: number) => Math.max(0, Math.ceil(Math.log2(size / cells)));
  return { rows: needed(rows), columns: needed(columns) };
}

/** The coarsest level, at most `coarsest`, that still has a cell for every pixel. */
export function levelFor(view: Viewport, width: number, height: number, coarsest: Level): Level {
  const needed = (cells: number, most: number) =>
    Math.max(0, Math.min(most, Math.floor(Math.log2(Math.max(1, cells)))));
  return {
    rows: needed((view.r1 - view.r0) / height, coarsest.rows),
    columns: needed((view.c1 - view.c0) / width, coarsest.columns),
  };
}

/** A viewport about a point, `factor` times as large, inside the map and with at least 4 cells a side. */
export function zoomed(
  view: Viewport,
  row: number,
  column: number,
  factor: number,
  rows: number,
  columns: number,
) {
  const span = (low: number, high: number, at: number, count: number): [number, number] => {
    const size = Math.min(count, Math.max(Math.min(4, count), (high - low) * factor));
    const start = at - ((at - low) / (high - low)) * size;
    const clipped = Math.min(count - size, Math.max(0, start));
    return [clipped, clipped + size];
  };
  const [r0, r1] = span(view.r0, view.r1, row, rows);
  const [c0, c1] = span(view.c0, view.c1, column, columns);
  return { r0, r1, c0, c1 };
}

/** Tiles [i, j] that a viewport touches at a level. */
export function tilesOf(view: Viewport, level: Level): [number, number][] {
  const [tall, wide] = [TILE << level.rows, TILE << level.columns];
  const out: [number, number][] = [];
  for (let i = Math.floor(view.r0 / tall); i < Math.ceil(view.r1 / tall); i++) {
    for (let j = Math.floor(view.c0 / wide); j < Math.ceil(view.c1 / wide); j++) out.push([i, j]);
  }
  return out;
}

export interface Tile {
  rows: number;
  columns: number;
  codes: Uint16Array;
}

/** Tiles by name, of which the least recently used are forgotten. */
export class Tiles {
  private tiles = new Map<string, Tile>();
  constructor(private capacity: number) {}

  get(name: string): Tile | undefined {
    const tile = this.tiles.get(name);
    if (tile) {
      this.tiles.delete(name);
      this.tiles.set(name, tile);
    }
    return tile;
  }

  put(name: string, tile: Tile): void {
    this.tiles.delete(name);
    this.tiles.set(name, tile);
    for (const old of this.tiles.keys()) {
      if (this.tiles.size <= this.capacity) break;
      this.tiles.delete(old);
    }
  }

  clear(): void {
    this.tiles.clear();
  }
}

/** Codes of the cells [row, row + rows) × [column, column + columns) of a level; `UNKNOWN` without a tile. */
export function region(
  tile: (i: number, j: number) => Tile | undefined,
  row: number,
  column: number,
  rows: number,
  columns: number,
): Uint16Array {
  const out = new Uint16Array(rows * columns).fill(UNKNOWN);
  for (let i = Math.floor(row / TILE); i * TILE < row + rows; i++) {
    for (let j = Math.floor(column / TILE); j * TILE < column + columns; j++) {
      const part = tile(i, j);
      if (!part) continue;
      const [top, left] = [i * TILE, j * TILE];
      const first = Math.max(left, column);
      const last = Math.min(left + part.columns, column + columns);
      for (let r = Math.max(top, row); r < Math.min(top + part.rows, row + rows); r++) {
        const start = (r - top) * part.columns + first - left;
        out.set(part.codes.subarray(start, start + last - first), (r - row) * columns + first - column);
      }
    }
  }
  return out;
}

/** Fills the cells of a region that are unknown from a coarser level, of which `code` gives cells by row and
 * column; `up` is how much coarser it is. */
export function fillFrom(
  codes: Uint16Array,
  row: number,
  column: number,
  columns: number,
  up: Level,
  code: (row: number, column: number) => number,
): void {
  for (let at = 0; at < codes.length; at++) {
    if (codes[at] !== UNKNOWN) continue;
    const r = Math.floor(at / columns);
    codes[at] = code((row + r) >> up.rows, (column + at - r * columns) >> up.columns);
  }
}

/** The part of a map between two of its cells, both included. */
export function between([r, c]: [number, number], [r2, c2]: [number, number]): Viewport {
  return {
    r0: Math.min(r, r2),
    r1: Math.max(r, r2) + 1,
    c0: Math.min(c, c2),
    c1: Math.max(c, c2) + 1,
  };
}

/** The queries between two positions, in rising order. */
export function brushed(from: number, to: number, rows: number): number[] {
  const low = Math.max(0, Math.min(from, to));
  const high = Math.min(rows - 1, Math.max(from, to));
  return Array.from({ length: Math.max(0, high - low + 1) }, (_, i) => low + i);
}

/** Runs of neighbouring rows, as [first, last]. */
export function runs(rows: readonly number[]): [number, number][] {
  const out: [number, number][] = [];
  for (const row of rows) {
    const last = out.at(-1);
    if (last && last[1] === row - 1) last[1] = row;
    else out.push([row, row]);
  }
  return out;
}
