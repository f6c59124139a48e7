// The heads of all layers as thumbnails, layers down and heads across, coloured by their variance.
import { h } from "./dom";
import * as maps from "./maps";
import { digits } from "./scale";

export interface ThumbnailGrid {
  element: HTMLElement;
  /** The scale of the variances. */
  note: HTMLElement;
  /** Marks the head that is shown. */
  mark(layer: number, head: number): void;
  /** Takes in a layer's thumbnails. */
  take(message: any, buffers: DataView[]): void;
}

export function thumbnailGrid(
  layers: number,
  heads: number,
  choose: (layer: number, head: number) => void,
): ThumbnailGrid {
  const element = h("div", { class: "qtx-heads", role: "radiogroup", "aria-label": "layer and head" });
  const note = h("div", { class: "qtx-heads-scale" });
  const variances: (number | null)[] = Array(layers * heads).fill(null);
  element.style.setProperty("--qtx-across", String(heads));
  const places = Array.from({ length: layers * heads }, (_, i): [number, number] => [
    Math.floor(i / heads),
    i % heads,
  ]);

  function move(event: KeyboardEvent, index: number): void {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -heads, ArrowDown: heads }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const next = index + step;
    if (next < 0 || next >= buttons.length) return;
    choose(...places[next]);
    buttons[next].focus();
  }

  const buttons = places.map((place, index) =>
    h(
      "button",
      {
        type: "button",
        role: "radio",
        click: () => choose(...place),
        keydown: (event: KeyboardEvent) => move(event, index),
      },
      h("canvas", { width: 1, height: 1, "aria-hidden": "true" }),
    ),
  );
  element.append(...buttons);

  function mark(layer: number, head: number): void {
    const known = variances.filter((x): x is number => x !== null && x > 0);
    const [low, high] = [Math.min(...known), Math.max(...known)];
    buttons.forEach((button, index) => {
      const variance = variances[index];
      const [ofLayer, ofHead] = places[index];
      const shown = ofLayer === layer && ofHead === head;
      button.setAttribute("aria-checked", String(shown));
      button.tabIndex = shown ? 0 : -1;
      const name = `layer ${ofLayer}, head ${ofHead}`;
      button.title = variance === null ? name : `${name}, relative variance ${digits(variance, 2)}`;
      button.setAttribute("aria-label", button.title);
      if (variance === null) return;
      const share = high > low ? Math.log(Math.max(variance, low) / low) / Math.log(high / low) : 0.5;
      button.style.setProperty("--qtx-variance", maps.css(maps.sequential, share));
    });
    note.replaceChildren(...(known.length ? varianceScale(low, high) : []));
  }

  function take(message: any, buffers: DataView[]): void {
    const { layer, rows, columns } = message;
    const [ofHeads, codes] = buffers;
    for (let head = 0; head < heads; head++) {
      const index = layer * heads + head;
      variances[index] = ofHeads.getFloat32(4 * head, true);
      const image = new ImageData(columns, rows);
      const pixels = new Uint32Array(image.data.buffer);
      for (let i = 0; i < pixels.length; i++) {
        const p = maps.HALF[codes.getUint16(2 * (head * pixels.length + i), true)];
        pixels[i] = maps.sequential[Math.round(255 * maps.share(p, true, 1))];
      }
      const canvas = buttons[index].firstElementChild as HTMLCanvasElement;
      [canvas.width, canvas.height] = [columns, rows];
      canvas.getContext("2d")!.putImageData(image, 0, 0);
    }
  }

  return { element, note, mark, take };
}

function varianceScale(low: number, high: number): HTMLElement[] {
  const bar = h("div", { class: "qtx-bar", "aria-hidden": "true" });
  bar.style.backgroundImage = maps.gradient(maps.sequential);
  const ends = [h("span", {}, digits(low, 2)), bar, h("span", {}, digits(high, 2))];
  return [
    h("div", { class: "qtx-bar-row" }, ...ends),
    h("span", { class: "qtx-unit" }, "border: relative variance, log"),
  ];
}
