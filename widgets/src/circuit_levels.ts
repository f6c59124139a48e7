// The controls of the zero-noise fit: its method, and a slider for each noise level.
import { h } from "./dom";
import { label } from "./scale";

export const MAX_LEVEL = 5;
const MIN_LEVEL = 0.1;
const LEVEL_STEP = 0.05;

/** The level nearest to a requested one that no other level has, in steps of 0.05. */
export function freeLevel(requested: number, others: number[], step = LEVEL_STEP): number {
  let level = Math.max(MIN_LEVEL, Math.round(requested / LEVEL_STEP) * LEVEL_STEP);
  level = Math.round(level * 100) / 100;
  while (others.some((other) => Math.abs(other - level) < step / 2))
    level = Math.round((level + step) * 100) / 100;
  return level;
}

/** `levels` with one of them moved to where no other is. */
export function movedLevel(levels: number[], index: number, to: number): number[] {
  const others = levels.filter((_, i) => i !== index);
  return levels.map((level, i) => (i === index ? freeLevel(to, others) : level));
}

export interface LevelControls {
  element: HTMLFieldSetElement;
  method: HTMLSelectElement;
  /** Shows other levels. */
  list(levels: number[]): void;
}

/** `onMove` is called while a level is moved and when it is dropped, and returns the level that it gets. */
export function levelControls(
  methods: string[],
  onMethod: (method: string) => void,
  onMove: (index: number, to: number, dropped: boolean) => number,
  onLevels: (change: (levels: number[]) => number[]) => void,
): LevelControls {
  const options = methods.map((name) => h("option", { value: name }, name));
  const method = h("select", { change: () => onMethod(method.value) }, ...options);
  const list = h("div", { class: "qtx-levels", role: "group", "aria-label": "noise levels" });
  const add = () => onLevels((levels) => [...levels, freeLevel(Math.max(...levels) + 1, levels)]);

  function row(level: number, index: number, count: number): HTMLElement {
    const value = h("output", {}, label(level));
    const move = (dropped: boolean) => {
      const moved = onMove(index, Number(slider.value), dropped);
      if (dropped) slider.value = String(moved);
      value.textContent = label(moved);
    };
    const slider = h("input", {
      type: "range",
      min: MIN_LEVEL,
      max: MAX_LEVEL,
      step: LEVEL_STEP,
      value: level,
      "aria-label": `noise level ${index + 1}`,
      input: () => move(false),
      change: () => move(true),
    });
    const remove = h(
      "button",
      {
        type: "button",
        "aria-label": `remove noise level ${label(level)}`,
        title: "Remove this level",
        disabled: count <= 2,
        click: () => onLevels((levels) => levels.filter((_, i) => i !== index)),
      },
      "×",
    );
    return h("div", { class: "qtx-level" }, slider, value, remove);
  }

  const element = h(
    "fieldset",
    {},
    h("legend", {}, "Zero-noise extrapolation"),
    h("label", { class: "qtx-row" }, "method", method),
    list,
    h("button", { type: "button", click: add }, "Add a level"),
  );
  return {
    element,
    method,
    list: (levels) => list.replaceChildren(...levels.map((level, i) => row(level, i, levels.length))),
  };
}
