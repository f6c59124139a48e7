// What the lens paints on its canvases: the cells of a map, its axes, and the selection above them.
import { ticks } from "d3-array";
import { sharp } from "./dom";
import * as maps from "./maps";
import { label } from "./scale";
import type { COLOURS } from "./theme";

/** Pixels beside a map for the axis of its queries, and below it for that of its keys. */
const LEFT = 44;
const BOTTOM = 33;
export const TOP = 2;
/** Pixels of width below which a map beside a larger one does without axes, which are those of the larger one. */
const MIN_AXES_WIDTH = 260;

type Colours = (typeof COLOURS)[keyof typeof COLOURS];
export type Cell = [row: number, column: number];

/** The part of a map that is shown, and its size in pixels without the axes. */
export interface Geometry {
  view: maps.Viewport;
  width: number;
  height: number;
  rows: number;
  columns: number;
  /** Pixels on the left and below for the axes. */
  left: number;
  bottom: number;
}

/** What a map needs beside it and below it: nothing where it is small, and beside a larger one. */
export function roomForAxes(width: number, isMain: boolean): { left: number; bottom: number } {
  return isMain || width >= MIN_AXES_WIDTH ? { left: LEFT, bottom: BOTTOM } : { left: 2, bottom: 2 };
}

const perRow = ({ view, height }: Geometry) => height / (view.r1 - view.r0);
const perColumn = ({ view, width }: Geometry) => width / (view.c1 - view.c0);
const rowY = (g: Geometry, row: number) => TOP + (row - g.view.r0) * perRow(g);
const columnX = (g: Geometry, column: number) => g.left + (column - g.view.c0) * perColumn(g);

function cleared(canvas: HTMLCanvasElement, g: Geometry): CanvasRenderingContext2D {
  const [width, height] = [g.width + g.left + 2, g.height + TOP + g.bottom];
  const context = sharp(canvas, width, height);
  context.clearRect(0, 0, width, height);
  return context;
}

// --- cells ----------------------------------------------------------------------------------------

/** The cells of the exact and the sampled map at a level that a view touches, as half-precision codes. */
export interface Cells {
  exact: Uint16Array;
  sampled: Uint16Array;
  /** First row and column, of the level. */
  row: number;
  column: number;
  rows: number;
  columns: number;
  level: maps.Level;
}

/** The largest weight, and the largest difference, at least `floor`, among cells that are known. */
export function extremes({ exact, sampled }: Cells, floor: number): { top: number; limit: number } {
  let top = 0;
  let limit = floor;
  for (let i = 0; i < exact.length; i++) {
    if ((exact[i] | sampled[i]) === 0 || exact[i] === maps.UNKNOWN || sampled[i] === maps.UNKNOWN) continue;
    const x = maps.HALF[exact[i]];
    const y = maps.HALF[sampled[i]];
    if (x > top) top = x;
    if (Math.abs(y - x) > limit) limit = Math.abs(y - x);
  }
  return { top, limit };
}

/** The cells of a canvas before they are scaled, and what they are drawn on: to make them takes as long as to paint. */
interface Unscaled {
  image: ImageData;
  picture: OffscreenCanvas;
}

const unscaled = new WeakMap<HTMLCanvasElement, Unscaled>();

/** The unscaled cells of a canvas, all of them transparent. */
function unscaledOf(canvas: HTMLCanvasElement, { rows, columns }: Cells): Unscaled {
  const known = unscaled.get(canvas);
  if (known?.image.width === columns && known.image.height === rows) {
    known.image.data.fill(0);
    return known;
  }
  const made = { image: new ImageData(columns, rows), picture: new OffscreenCanvas(columns, rows) };
  unscaled.set(canvas, made);
  return made;
}

/** How the cells of a map are coloured. */
export interface Colouring {
  name: "exact" | "sampled" | "difference";
  palette: Uint32Array;
  /** The largest difference. */
  limit: number;
  causal: boolean;
}

/** Draws one of the three maps; cells that are masked or unknown stay transparent. */
function colourCells(
  image: ImageData,
  cells: Cells,
  { name, palette, limit, causal }: Colouring,
  numRows: number,
) {
  const { exact, sampled, rows, columns } = cells;
  const [tall, wide] = [1 << cells.level.rows, 1 << cells.level.columns];
  const pixels = new Uint32Array(image.data.buffer);
  const codes = name === "exact" ? exact : sampled;
  const scale = 127.5 / limit;
  for (let r = 0; r < rows; r++) {
    const lastRow = Math.min(numRows, (cells.row + r + 1) * tall) - 1;
    const visible = causal ? Math.min(columns, Math.floor(lastRow / wide) + 1 - cells.column) : columns;
    for (let i = r * columns; i < r * columns + visible; i++) {
      if (exact[i] === maps.UNKNOWN || codes[i] === maps.UNKNOWN) continue;
      if (name !== "difference") pixels[i] = palette[codes[i]];
      else
        pixels[i] = maps.diverging[Math.round(127.5 + scale * (maps.HALF[sampled[i]] - maps.HALF[exact[i]]))];
    }
  }
}

/** Paints a map with its axes; `tokens` stand at the keys, and at the queries of a square map. */
export function paintMap(
  canvas: HTMLCanvasElement,
  cells: Cells,
  colouring: Colouring,
  g: Geometry,
  tokens: string[],
  colours: Colours,
): void {
  const context = cleared(canvas, g);
  const { image, picture } = unscaledOf(canvas, cells);
  colourCells(image, cells, colouring, g.rows);
  picture.getContext("2d")!.putImageData(image, 0, 0);
  const [tall, wide] = [(1 << cells.level.rows) * perRow(g), (1 << cells.level.columns) * perColumn(g)];
  const [x, y] = [columnX(g, cells.column << cells.level.columns), rowY(g, cells.row << cells.level.rows)];
  context.save();
  context.beginPath();
  context.rect(g.left, TOP, g.width, g.height);
  context.clip();
  context.fillStyle = colours.panel;
  context.fillRect(g.left, TOP, g.width, g.height);
  // Cells smaller than a pixel are averaged, so that single bright ones are not lost.
  context.imageSmoothingEnabled = Math.min(wide, tall) * (window.devicePixelRatio || 1) < 0.99;
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, x, y, image.width * wide, image.height * tall);
  context.restore();
  context.strokeStyle = colours.muted;
  context.lineWidth = 1;
  context.strokeRect(g.left - 0.5, TOP - 0.5, g.width + 1, g.height + 1);
  context.fillStyle = colours.text;
  if (g.left >= LEFT) paintAxes(context, g, tokens);
}

// --- axes -----------------------------------------------------------------------------------------

const NUMBERS = "10px system-ui, sans-serif";
const LETTERS = "10px ui-monospace, monospace";
const MIN_TOKEN_HEIGHT = 10;
const LETTER_WIDTH = 6.5;
const MAX_LETTERS = 6;

function paintAxes(context: CanvasRenderingContext2D, g: Geometry, tokens: string[]): void {
  const { view, width, height } = g;
  const named = tokens.length === g.columns;
  const longest = named ? Math.max(...tokens.map((token) => Math.min(MAX_LETTERS, token.length))) : 0;
  const keysNamed = named && perColumn(g) >= LETTER_WIDTH * longest + 3;
  const queriesNamed = named && g.rows === g.columns && perRow(g) >= MIN_TOKEN_HEIGHT;

  context.textBaseline = "middle";
  context.textAlign = "right";
  context.font = queriesNamed ? LETTERS : NUMBERS;
  for (const [text, at] of axisLabels(view.r0, view.r1, perRow(g), queriesNamed ? tokens : null))
    context.fillText(text.slice(0, 5), LEFT - 4, Math.max(TOP + 5, TOP + at));
  context.textAlign = "center";
  context.textBaseline = "top";
  context.font = keysNamed ? LETTERS : NUMBERS;
  for (const [text, at] of axisLabels(view.c0, view.c1, perColumn(g), keysNamed ? tokens : null)) {
    const half = context.measureText(text).width / 2;
    const x = Math.min(LEFT + at, LEFT + width - half + 2);
    context.fillText(text.slice(0, MAX_LETTERS), x, TOP + height + 5);
  }
  context.font = NUMBERS;
  context.fillText("key", LEFT + width / 2, TOP + height + 19);
  context.save();
  context.translate(2, TOP + height / 2);
  context.rotate(-Math.PI / 2);
  context.fillText("query", 0, 0);
  context.restore();
}

/** Texts along an axis and their pixels: every token, or round numbers of positions. */
function axisLabels(low: number, high: number, per: number, tokens: string[] | null): [string, number][] {
  const at = (i: number) => (i + 0.5 - low) * per;
  if (tokens === null) {
    const round = ticks(low, high - 1, Math.max(2, (per * (high - low)) / 48));
    return round.filter(Number.isInteger).map((i) => [label(i), at(i)]);
  }
  const first = Math.ceil(low);
  return tokens.slice(first, Math.ceil(high)).map((token, i) => [token, at(first + i)]);
}

// --- selection ------------------------------------------------------------------------------------

/** What lies above a map. */
export interface Overlay {
  rows: number[];
  /** Two corners of the part that is about to be shown. */
  zoom: [Cell, Cell] | null;
  cursor: Cell | null;
}

/** What was painted on each canvas above a map: most pictures of a map leave it as it is. */
const overlays = new WeakMap<HTMLCanvasElement, string>();

export function paintOverlay(
  canvas: HTMLCanvasElement,
  g: Geometry,
  overlay: Overlay,
  colours: Colours,
): void {
  const look = JSON.stringify([g, overlay, colours, window.devicePixelRatio]);
  if (overlays.get(canvas) === look) return;
  overlays.set(canvas, look);
  const context = cleared(canvas, g);
  context.beginPath();
  context.rect(0, TOP, g.left + g.width, g.height);
  context.clip();
  for (const [first, last] of maps.runs(overlay.rows)) {
    const y = rowY(g, first);
    const tall = Math.max(2, (last - first + 1) * perRow(g));
    context.fillStyle = colours.accent;
    context.fillRect(Math.max(0, g.left - 4), y, 4, tall);
    context.globalAlpha = 0.2;
    context.fillRect(g.left, y, g.width, tall);
    context.globalAlpha = 1;
    context.strokeStyle = colours.accent;
    context.strokeRect(g.left + 0.5, y, g.width - 1, tall);
  }
  if (overlay.zoom) {
    const part = maps.between(...overlay.zoom);
    context.strokeStyle = colours.accent;
    context.lineWidth = 2;
    const [wide, tall] = [(part.c1 - part.c0) * perColumn(g), (part.r1 - part.r0) * perRow(g)];
    context.strokeRect(columnX(g, part.c0), rowY(g, part.r0), wide, tall);
  }
  if (overlay.cursor) paintCross(context, g, overlay.cursor, colours);
}

/** A cross that leaves its cell free; a light line lies below a dark one, so that it is visible anywhere. */
function paintCross(context: CanvasRenderingContext2D, g: Geometry, [row, column]: Cell, colours: Colours) {
  const [x, y] = [columnX(g, column + 0.5), rowY(g, row + 0.5)];
  for (const [colour, width, alpha] of [
    [colours.background, 3, 0.6],
    [colours.exact, 1, 1],
  ] as const) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.globalAlpha = alpha;
    context.beginPath();
    context.moveTo(g.left, y);
    context.lineTo(x - 6, y);
    context.moveTo(x + 6, y);
    context.lineTo(g.left + g.width, y);
    context.moveTo(x, TOP);
    context.lineTo(x, y - 6);
    context.moveTo(x, y + 6);
    context.lineTo(x, TOP + g.height);
    context.stroke();
  }
}
