// The three maps of a lens side by side, each with its title and colour bar, and what is said of a cell.
import { h } from "./dom";
import * as maps from "./maps";
import { digits, label, whole } from "./scale";

export const NAMES = ["exact", "sampled", "difference"] as const;
export type MapName = (typeof NAMES)[number];

/** What is known of the rows of a head. */
export interface RowFacts {
  effectiveKeys: Float32Array;
  distinctKeys: Float32Array;
  error: Float32Array;
  /** NaN where it is unknown. */
  stdError: Float32Array;
}

export interface MapPanel {
  name: MapName;
  holder: HTMLElement;
  picture: HTMLCanvasElement;
  over: HTMLCanvasElement;
  title: HTMLElement;
  box: HTMLElement;
  /** Shows the colour scale: `top` is the largest weight, `limit` the largest difference. */
  showScale(log: boolean, top: number, limit: number): void;
}

type Listeners = Record<string, (event: any) => void>;

/** `helpId` is the id of the text that says which keys do what. */
export function mapPanel(name: MapName, helpId: string, listeners: Listeners): MapPanel {
  const picture = h("canvas", { "aria-hidden": "true" });
  const over = h("canvas", { class: "qtx-over", "aria-hidden": "true" });
  const title = h("h3", {});
  const attributes = {
    class: "qtx-map",
    tabindex: 0,
    role: "application",
    "aria-roledescription": "attention map",
    "aria-describedby": helpId,
  };
  const holder = h("div", { ...attributes, ...listeners }, picture, over);
  const [low, high] = [h("span", {}), h("span", {})];
  const bar = h("div", { class: "qtx-bar", "aria-hidden": "true" });
  const unit = h("span", { class: "qtx-unit" });
  const box = h("figure", {}, title, holder, h("div", { class: "qtx-bar-row" }, low, bar, high), unit);

  function showScale(log: boolean, top: number, limit: number): void {
    const signed = name === "difference";
    bar.style.backgroundImage = maps.gradient(signed ? maps.diverging : maps.sequential);
    low.textContent = signed ? `−${digits(limit, 2)}` : log ? `≤ ${label(maps.FLOOR)}` : "0";
    high.textContent = signed ? `+${digits(limit, 2)}` : log ? "1" : digits(top, 2);
    unit.textContent = signed ? "difference of weights" : `attention weight${log ? ", log scale" : ""}`;
  }
  return { name, holder, picture, over, title, box, showScale };
}

/** Titles of the three maps; `draws` null where they are those of an estimate that was given. */
export function panelTitles(sampler: string, draws: number | null): Record<MapName, string> {
  const count = draws === null ? "" : draws === 1 ? ", 1 draw" : `, ${whole(draws)} draws`;
  return { exact: "exact", sampled: sampler + count, difference: `${sampler} − exact` };
}

/** A share of 1 as a percentage in two significant digits; as `percent_text` in lens_heads.py. */
export function percentText(share: number): string {
  if (share === 0) return "0 %";
  if (share < 1e-4) return "less than 0.01 %";
  return share >= 0.1 ? `${Math.round(100 * share)} %` : `${Number((100 * share).toPrecision(2))} %`;
}

/** How far an output is off, in words; as `HeadFinding` in lens_heads.py. */
export function findingText(error: number, stdError: number | null): string {
  const predicted = stdError === null ? "" : ` (standard error ± ${percentText(stdError)})`;
  return `off by ${percentText(error)} of the output's norm${predicted}`;
}

/** The weights of a cell in words; `side` is how many positions a cell has on each side. */
export function cellText(weights: [number, number], side: number): string {
  const [exact, sampled] = weights;
  const mean = side > 1 ? ` (mean of ${side} × ${side} cells)` : "";
  const difference = digits(sampled - exact, 2);
  return `exact ${digits(exact, 3)}, sampled ${digits(sampled, 3)}, difference ${difference}${mean}`;
}

/** What is known of a row, in words. */
export function rowText(facts: RowFacts, row: number): string {
  const stdError = facts.stdError[row];
  const predicted = Number.isFinite(stdError) ? `, predicted ${digits(stdError, 2)}` : "";
  const [effective, distinct] = [digits(facts.effectiveKeys[row], 3), whole(facts.distinctKeys[row])];
  const error = `error ${digits(facts.error[row], 2)} of the output${predicted}`;
  return `row: ${effective} effective keys, ${distinct} distinct drawn, ${error}`;
}

/** The row facts of a message, four numbers a row. */
export function readFacts(buffer: DataView, rows: number): RowFacts {
  const { buffer: bytes, byteOffset, byteLength } = buffer;
  const table = new Float32Array(bytes.slice(byteOffset, byteOffset + byteLength) as ArrayBuffer);
  const [effectiveKeys, distinctKeys, error, stdError] = [0, 1, 2, 3].map((i) =>
    table.subarray(i * rows, (i + 1) * rows),
  );
  return { effectiveKeys, distinctKeys, error, stdError };
}
