// The heads of all layers as thumbnails, by layer and head or sorted by their variance, coloured by it.
import { h, unique } from "./dom";
import * as maps from "./maps";
import { digits } from "./scale";

/** Orders of magnitude of weights that a thumbnail tells apart, below its largest. */
const DECADES = 4;
/** Pixels of a thumbnail's side, at most, for each step of the zoom; at first the grid fits the width. */
const ZOOMS = [40, 64, 104];
/** Columns up to which each has its number. */
const MAX_NUMBERED = 48;

/** A layer and a head. */
export type HeadPlace = [layer: number, head: number];

export interface ThumbnailGrid {
  element: HTMLElement;
  /** Shows which heads are to be drawn: all where null. */
  showDrawn(drawn: HeadPlace[] | null): void;
  /** Marks the head that is shown. */
  mark(layer: number, head: number): void;
  /** Marks thumbnails of other draws than those that are shown. */
  markStale(stale: boolean): void;
  /** Takes in a layer's thumbnails. */
  take(message: any, buffers: DataView[]): void;
}

/** The ends of the scale of some variances; the low end leaves out the lowest twentieth, which may be far off. */
export function varianceRange(known: number[]): [number, number] {
  const sorted = [...known].sort((a, b) => a - b);
  return [sorted[Math.floor(sorted.length / 20)], sorted[sorted.length - 1]];
}

/** Heads after one was clicked at; null stands for all of them, in the order of layers and heads. */
export function toggled(
  drawn: HeadPlace[] | null,
  all: HeadPlace[],
  [layer, head]: HeadPlace,
): HeadPlace[] | null {
  const held = new Set((drawn ?? all).map(String));
  const name = String([layer, head]);
  if (!held.delete(name)) held.add(name);
  return held.size === all.length ? null : all.filter((place) => held.has(String(place)));
}

/** Indices of heads by falling variance; those that are not known yet come last, in their own order. */
export function byVariance(variances: (number | null)[]): number[] {
  const known = (i: number) => variances[i] ?? -1;
  return variances.map((_, i) => i).sort((a, b) => known(b) - known(a) || a - b);
}

/** The colours of a thumbnail's codes: logarithmic below its largest weight; where masked, transparent. */
export function thumbnailPixels(codes: Uint16Array): Uint32Array {
  let top = 0;
  for (const code of codes) if (maps.HALF[code] > top) top = maps.HALF[code];
  const floor = 10 ** -DECADES;
  return Uint32Array.from(codes, (code) => {
    const p = maps.HALF[code];
    if (p !== p) return 0;
    return maps.sequential[Math.round(255 * (top > 0 ? maps.share(p / top, true, 1, floor) : 0))];
  });
}

export function thumbnailGrid(
  layers: number,
  heads: number,
  causal: boolean,
  choose: (layer: number, head: number) => void,
  draw: (drawn: HeadPlace[] | null) => void,
): ThumbnailGrid {
  const count = layers * heads;
  const variances: (number | null)[] = Array(count).fill(null);
  const across = layers > heads ? layers : heads; // the longer side lies across
  const transposed = layers > heads;
  let order = variances.map((_, i) => i);
  let sorted = false;
  let zoom = 0;
  let shown = 0;

  const box = h("div", { class: "qtx-heads", role: "radiogroup", "aria-label": "layer and head" });
  const scale = h("div", { class: "qtx-heads-scale" });
  const place = (index: number): HeadPlace => [Math.floor(index / heads), index % heads];
  const all = variances.map((_, index) => place(index));
  let drawn: HeadPlace[] | null = null;
  const isDrawn = (index: number) => drawn === null || drawn.some((x) => String(x) === String(all[index]));
  const buttons = variances.map((_, index) => {
    const canvas = h("canvas", { width: 1, height: 1, "aria-hidden": "true" });
    const [layer, head] = place(index);
    const name = h("span", { class: "qtx-head-name", "aria-hidden": "true" }, `${layer}·${head}`);
    paintPlaceholder(canvas, causal);
    return h(
      "button",
      {
        type: "button",
        role: "radio",
        click: () => (picking.checked ? draw(toggled(drawn, all, [layer, head])) : choose(layer, head)),
        keydown: (event: KeyboardEvent) => move(event, index),
      },
      canvas,
      name,
    );
  });

  // --- order and size ---------------------------------------------------------------------------

  const sortId = unique("sort");
  const sort = h(
    "select",
    {
      id: sortId,
      change: () => {
        sorted = sort.value === "variance";
        arrange();
      },
    },
    h("option", { value: "layer" }, "by layer"),
    h("option", { value: "variance" }, "by variance"),
  );
  const zoomBy = (step: number) => {
    zoom = Math.min(ZOOMS.length - 1, Math.max(0, zoom + step));
    arrange();
  };
  const smaller = h("button", { type: "button", title: "Smaller heads", click: () => zoomBy(-1) }, "−");
  const larger = h("button", { type: "button", title: "Larger heads", click: () => zoomBy(1) }, "+");
  smaller.setAttribute("aria-label", smaller.title);
  larger.setAttribute("aria-label", larger.title);
  const counted = h("span", {});
  const picking = h("input", { type: "checkbox", change: () => showDrawn(drawn) });
  const everyHead = h("button", { type: "button", click: () => draw(null) }, "All");
  const noHead = h("button", { type: "button", click: () => draw([]) }, "None");
  const element = h(
    "div",
    { class: "qtx-heads-part" },
    h(
      "div",
      { class: "qtx-heads-bar" },
      counted,
      h("label", { class: "qtx-check qtx-heads-pick" }, picking, "pick those to draw"),
      everyHead,
      noHead,
      h("label", { for: sortId }, "sorted", sort),
      h("div", { class: "qtx-buttons", role: "group", "aria-label": "size of the heads" }, smaller, larger),
      scale,
    ),
    box,
  );

  /** Row and column of a head in the grid, from 0. */
  const gridPlace = (index: number): [number, number] => {
    const [layer, head] = place(index);
    return transposed ? [head, layer] : [layer, head];
  };

  function arrange(): void {
    smaller.disabled = zoom === 0;
    larger.disabled = zoom === ZOOMS.length - 1;
    box.style.setProperty("--qtx-across", String(across));
    box.style.setProperty("--qtx-cell", `${ZOOMS[zoom]}px`);
    box.toggleAttribute("data-sorted", sorted);
    box.toggleAttribute("data-zoomed", zoom > 0);
    order = sorted ? byVariance(variances) : variances.map((_, i) => i);
    if (sorted) {
      for (const button of buttons) button.style.gridArea = "";
      box.replaceChildren(...order.map((index) => buttons[index]));
      return;
    }
    buttons.forEach((button, index) => {
      const [row, column] = gridPlace(index);
      button.style.gridArea = `${row + 2} / ${column + 2}`;
    });
    box.replaceChildren(...axisNumbers(), ...buttons);
  }

  function axisNumbers(): HTMLElement[] {
    const [ofRows, ofColumns] = transposed ? ["head", "layer"] : ["layer", "head"];
    const step = across > MAX_NUMBERED ? 5 : 1;
    const number = (text: string, row: number, column: number) => {
      const cell = h("span", { class: "qtx-heads-number", "aria-hidden": "true" }, text);
      cell.style.gridArea = `${row} / ${column}`;
      return cell;
    };
    const columns = Array.from({ length: across }, (_, i) => number(i % step ? "" : String(i), 1, i + 2));
    const rows = Array.from({ length: count / across }, (_, i) => number(String(i), i + 2, 1));
    return [number(`${ofRows} ↓ ${ofColumns} →`, 1, 1), ...columns, ...rows];
  }

  function move(event: KeyboardEvent, index: number): void {
    const next = neighbour(event.key, index);
    if (next === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    if (next === null) return;
    choose(...place(next));
    buttons[next].focus();
  }

  /** The head in the direction of a key: null at the edge, undefined for another key. */
  function neighbour(key: string, index: number): number | null | undefined {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[key];
    if (!step) return undefined;
    if (sorted) return order[order.indexOf(index) + step[0] + step[1]] ?? null;
    const [row, column] = gridPlace(index);
    const [r, c] = [row + step[0], column + step[1]];
    if (c < 0 || c >= across || r < 0 || r >= count / across) return null;
    return transposed ? c * heads + r : r * heads + c;
  }

  // --- what is known of them --------------------------------------------------------------------

  function showDrawn(heads: HeadPlace[] | null): void {
    drawn = heads;
    counted.textContent = drawn
      ? `${drawn.length} of ${count} heads drawn, the others exact`
      : count === 1
        ? "1 head"
        : `${count} heads`;
    everyHead.hidden = noHead.hidden = !picking.checked;
    box.toggleAttribute("data-picking", picking.checked);
    buttons.forEach((button, index) => button.toggleAttribute("data-exact", !isDrawn(index)));
    mark(...place(shown));
  }

  function mark(layer: number, head: number): void {
    shown = layer * heads + head;
    const known = variances.filter((x): x is number => x !== null && x > 0);
    const [low, high] = varianceRange(known);
    buttons.forEach((button, index) => {
      const variance = variances[index];
      const [ofLayer, ofHead] = place(index);
      button.setAttribute("aria-checked", String(index === shown));
      button.tabIndex = index === shown ? 0 : -1;
      const name = `layer ${ofLayer}, head ${ofHead}${isDrawn(index) ? "" : ", not drawn"}`;
      button.title = variance === null ? name : `${name}, relative variance ${digits(variance, 2)}`;
      button.setAttribute("aria-label", button.title);
      if (variance === null) return;
      const share = high > low ? Math.log(Math.max(variance, low) / low) / Math.log(high / low) : 0.5;
      button.style.setProperty("--qtx-variance", maps.css(maps.sequential, share));
    });
    scale.replaceChildren(...(known.length ? varianceScale(low, high) : []));
  }

  function take(message: any, buffers: DataView[]): void {
    const { layer, rows, columns } = message;
    const [ofHeads, bytes] = buffers;
    for (let head = 0; head < heads; head++) {
      const index = layer * heads + head;
      variances[index] = ofHeads.getFloat32(4 * head, true);
      const size = rows * columns;
      const codes = Uint16Array.from({ length: size }, (_, i) =>
        bytes.getUint16(2 * (head * size + i), true),
      );
      const image = new ImageData(columns, rows);
      new Uint32Array(image.data.buffer).set(thumbnailPixels(codes));
      const canvas = buttons[index].firstElementChild as HTMLCanvasElement;
      [canvas.width, canvas.height] = [columns, rows];
      canvas.getContext("2d")!.putImageData(image, 0, 0);
    }
    if (sorted && layer === layers - 1) arrange();
  }

  arrange();
  showDrawn(null);
  return { element, showDrawn, mark, take, markStale: (stale) => box.toggleAttribute("data-stale", stale) };
}

/** Stands for a head that is not computed yet: hatching over the cells that its map will have. */
function paintPlaceholder(canvas: HTMLCanvasElement, causal: boolean): void {
  const size = 16;
  const image = new ImageData(size, size);
  const pixels = new Uint32Array(image.data.buffer);
  for (let r = 0; r < size; r++) {
    for (let c = 0; c < size; c++) {
      if (causal && c > r) continue;
      pixels[r * size + c] = (r + c) % 4 < 2 ? 0x59808080 : 0x26808080;
    }
  }
  [canvas.width, canvas.height] = [size, size];
  canvas.getContext("2d")!.putImageData(image, 0, 0);
}

function varianceScale(low: number, high: number): HTMLElement[] {
  const bar = h("div", { class: "qtx-bar", "aria-hidden": "true" });
  bar.style.backgroundImage = maps.gradient(maps.sequential);
  const ends = [h("span", {}, `≤ ${digits(low, 2)}`), bar, h("span", {}, digits(high, 2))];
  return [
    h("span", { class: "qtx-unit" }, "border: relative variance (log)"),
    h("div", { class: "qtx-bar-row" }, ...ends),
  ];
}
