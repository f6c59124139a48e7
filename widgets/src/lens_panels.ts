// The three maps of a lens side by side, each with its title and colour bar, and what is said of a cell.
import { h } from "./dom";
import * as maps from "./maps";
import { digits, label, whole } from "./scale";

export const NAMES = ["exact", "sampled", "difference"] as const;
export type MapName = (typeof NAMES)[number];

/** What is known of the rows of a head. */
export interface RowFacts {
  effectiveKeys: number;
  distinctKeys: number;
  error: number;
  /** NaN where it is unknown. */
  stdError: number;
}

export interface MapPanel {
  name: MapName;
  holder: HTMLElement;
  picture: HTMLCanvasElement;
  over: HTMLCanvasElement;
  title: HTMLElement;
  box: HTMLElement;
  showEnlarged(alone: boolean): void;
  /** Shows the colour scale: `top` is the largest weight, `limit` the largest difference. */
  showScale(log: boolean, floor: number, top: number, limit: number): void;
}

type Listeners = Record<string, (event: any) => void>;

/** `helpId` is the id of the text that says which keys do what; `enlarge` is called to show it alone, or not. */
export function mapPanel(name: MapName, helpId: string, listeners: Listeners, enlarge: () => void): MapPanel {
  const picture = h("canvas", { "aria-hidden": "true" });
  const over = h("canvas", { class: "qtx-over", "aria-hidden": "true" });
  const title = h("span", {});
  const button = h("button", { type: "button", class: "qtx-enlarge", click: enlarge }, title);
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
  const heading = h("h3", {}, button);
  const box = h(
    "figure",
    { "data-map": name },
    heading,
    holder,
    h("div", { class: "qtx-bar-row" }, low, bar, high, unit),
  );

  function showScale(log: boolean, floor: number, top: number, limit: number): void {
    const signed = name === "difference";
    bar.style.backgroundImage = maps.gradient(signed ? maps.diverging : maps.sequential);
    low.textContent = signed ? `−${digits(limit, 2)}` : log ? `≤ ${label(floor)}` : "0";
    high.textContent = signed ? `+${digits(limit, 2)}` : log ? "1" : digits(top, 2);
    unit.textContent = signed ? "difference of weights" : `attention weight${log ? ", log scale" : ""}`;
  }
  /** Says what the button in the title does. */
  function showEnlarged(alone: boolean): void {
    button.title = alone ? "Show the three maps again (Escape)" : "Show this map alone (Enter)";
    button.setAttribute("aria-pressed", String(alone));
  }
  showEnlarged(false);
  return { name, holder, picture, over, title, box, showScale, showEnlarged };
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

/** The weights of a cell in words; `cell` says what it is a mean of, if it is. */
export function cellText(weights: [number, number], cell: string): string {
  const [exact, sampled] = weights;
  const mean = cell ? ` (${cell})` : "";
  const difference = digits(sampled - exact, 2);
  return `exact ${digits(exact, 3)}, sampled ${digits(sampled, 3)}, difference ${difference}${mean}`;
}

/** What is known of a row, in words. */
export function rowText(facts: RowFacts): string {
  const predicted = Number.isFinite(facts.stdError)
    ? ` (standard error ± ${percentText(facts.stdError)})`
    : "";
  const [effective, distinct] = [digits(facts.effectiveKeys, 3), whole(facts.distinctKeys)];
  const error = `off by ${percentText(facts.error)} of its norm${predicted}`;
  return `row: ${effective} effective keys, ${distinct} distinct drawn, ${error}`;
}

/** The facts of the rows of a message, by row: four numbers for each. */
export function readFacts(rowBuffer: DataView, factBuffer: DataView): Map<number, RowFacts> {
  const count = rowBuffer.byteLength / 4;
  const fact = (which: number, i: number) => factBuffer.getFloat32(4 * (which * count + i), true);
  const facts = new Map<number, RowFacts>();
  for (let i = 0; i < count; i++) {
    facts.set(rowBuffer.getInt32(4 * i, true), {
      effectiveKeys: fact(0, i),
      distinctKeys: fact(1, i),
      error: fact(2, i),
      stdError: fact(3, i),
    });
  }
  return facts;
}
