// What pointer, wheel and keys do in a lens's maps: they move a cross, select rows, zoom, and enlarge a map.
import { TOP, type Cell, type Geometry } from "./lens_canvas";
import type { MapName } from "./lens_panels";
import * as maps from "./maps";

export const HELP =
  "Arrows move the cross; Shift with up and down selects rows; plus and minus zoom, 0 shows the whole map, " +
  "Enter shows this map alone, Escape all three again, or clears the rows.";

export const KEYS_HINT =
  "Keys in a map: arrows move a cross, Shift selects rows, + and − zoom, Enter enlarges.";

/** Milliseconds after a key until the numbers of the cell are read out. */
const SPEAK_DELAY_MS = 200;

/** The maps that gestures act on. */
export interface GestureTarget {
  rows: number;
  columns: number;
  /** The part of the maps that is in view. */
  view(): maps.Viewport;
  show(part: maps.Viewport): void;
  showWhole(): void;
  holder(name: MapName): HTMLElement;
  geometry(name: MapName): Geometry;
  select(rows: number[]): void;
  /** Shows a map alone, or all three again. */
  enlarge(name: MapName): void;
  isAlone(): boolean;
  /** Paints the cross, the selected rows and what is dragged. */
  paintOver(): void;
  /** Reads out the numbers of the cell. */
  speak(): void;
}

/** What gestures have led to, and what they listen to. */
export interface Gestures {
  cursor: Cell | null;
  /** What is dragged over. */
  brush: { from: Cell; to: Cell } | null;
  /** What dragging does. */
  dragging: "rows" | "zoom";
  select(rows: number[]): void;
  /** The listeners of a map. */
  listeners(name: MapName): Record<string, (event: any) => void>;
}

const MOVES: Record<string, Cell | undefined> = {
  ArrowUp: [-1, 0],
  ArrowDown: [1, 0],
  ArrowLeft: [0, -1],
  ArrowRight: [0, 1],
};
/** Cells that an arrow with Alt moves the cross by. */
const LARGE_STEP = 16;

const inside = (index: number, size: number) => Math.min(size - 1, Math.max(0, Math.floor(index)));

export function gesturesOn(target: GestureTarget): Gestures {
  const { rows, columns } = target;
  let anchor: number | null = null; // the row from which Shift with an arrow selects

  function cellAt(name: MapName, event: MouseEvent): Cell | null {
    const box = target.holder(name).getBoundingClientRect();
    const [{ width, height, left }, view] = [target.geometry(name), target.view()];
    const row = view.r0 + ((event.clientY - box.top - TOP) / height) * (view.r1 - view.r0);
    const column = view.c0 + ((event.clientX - box.left - left) / width) * (view.c1 - view.c0);
    if (!state.brush && (row < view.r0 || row >= view.r1 || column >= view.c1)) return null;
    return [inside(row, rows), inside(column, columns)];
  }

  function point(name: MapName, event: PointerEvent): void {
    const cell = cellAt(name, event);
    if (state.brush && cell) state.brush.to = cell;
    state.cursor = cell;
    target.paintOver();
  }

  function leave(): void {
    if (!state.brush) state.cursor = null;
    target.paintOver();
  }

  function press(name: MapName, event: PointerEvent): void {
    const cell = event.button === 0 ? cellAt(name, event) : null;
    if (!cell) return;
    state.brush = { from: cell, to: cell };
    target.holder(name).setPointerCapture(event.pointerId);
    target.holder(name).focus({ preventScroll: true });
    event.preventDefault();
    target.paintOver();
  }

  function release(): void {
    if (!state.brush) return;
    const { from, to } = state.brush;
    state.brush = null;
    if (state.dragging === "rows") select(maps.brushed(from[0], to[0], rows));
    else if (Math.abs(from[0] - to[0]) + Math.abs(from[1] - to[1]) > 1) target.show(maps.between(from, to));
    target.paintOver();
  }

  function cancel(): void {
    state.brush = null;
    target.paintOver();
  }

  function turnWheel(name: MapName, event: WheelEvent): void {
    if (document.activeElement !== target.holder(name) && !event.ctrlKey) return;
    const cell = cellAt(name, event);
    if (!cell) return;
    event.preventDefault();
    zoom(cell, event.deltaY > 0 ? 1.25 : 0.8);
  }

  function select(chosen: number[]): void {
    anchor = null;
    target.select(chosen);
  }

  function zoom([row, column]: Cell, factor: number): void {
    target.show(maps.zoomed(target.view(), row + 0.5, column + 0.5, factor, rows, columns));
  }

  function pressKey(name: MapName, event: KeyboardEvent): void {
    const view = target.view();
    const middle: Cell = [Math.floor((view.r0 + view.r1) / 2), Math.floor((view.c0 + view.c1) / 2)];
    const cell = state.cursor ?? middle;
    const step = event.altKey ? LARGE_STEP : 1;
    const move = MOVES[event.key];
    if (move) moveCursor(cell, [step * move[0], step * move[1]], event.shiftKey);
    else if (event.key === "+" || event.key === "=") zoom(cell, 0.5);
    else if (event.key === "-") zoom(cell, 2);
    else if (event.key === "0") target.showWhole();
    else if (event.key === "Enter") target.enlarge(name);
    else if (event.key === "Escape" && target.isAlone()) target.enlarge(name);
    else if (event.key === "Escape") select([]);
    else return;
    event.preventDefault();
    event.stopPropagation();
    target.paintOver();
  }

  /** Moves the cross from `cell`, or shows it there at first; `selecting` selects the rows on its way. */
  function moveCursor(cell: Cell, [down, right]: Cell, selecting: boolean): void {
    const moved: Cell = [
      inside(cell[0] + (state.cursor ? down : 0), rows),
      inside(cell[1] + (state.cursor ? right : 0), columns),
    ];
    state.cursor = moved;
    if (selecting && down) {
      const from = anchor ?? cell[0];
      select(maps.brushed(from, moved[0], rows));
      anchor = from;
    } else anchor = null;
    follow(moved);
    setTimeout(target.speak, SPEAK_DELAY_MS);
  }

  /** Shifts the view so that the cross is in it. */
  function follow([row, column]: Cell): void {
    const view = target.view();
    const shift = (low: number, high: number, at: number) =>
      at < low ? at - low : at + 1 > high ? at + 1 - high : 0;
    const [down, right] = [shift(view.r0, view.r1, row), shift(view.c0, view.c1, column)];
    if (!down && !right) return;
    target.show({ r0: view.r0 + down, r1: view.r1 + down, c0: view.c0 + right, c1: view.c1 + right });
  }

  const state: Gestures = {
    cursor: null,
    brush: null,
    dragging: "rows",
    select,
    listeners: (name) => ({
      pointermove: (event: PointerEvent) => point(name, event),
      pointerleave: leave,
      pointerdown: (event: PointerEvent) => press(name, event),
      pointerup: release,
      pointercancel: cancel,
      dblclick: target.showWhole,
      wheel: (event: WheelEvent) => turnWheel(name, event),
      keydown: (event: KeyboardEvent) => pressKey(name, event),
    }),
  };
  return state;
}
