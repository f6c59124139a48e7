// A form made from the description of a spec's fields. What is typed goes to Python, which checks it.
import type { AnyModel } from "@anywidget/types";
import { post } from "./dom";
import "./form.css";

export interface Field {
  name: string;
  label: string;
  help: string;
  unit: string;
  group: string;
  kind: Kind;
  optional: boolean;
  choices?: string[];
  /** Values that a text field offers; others can be typed, too. */
  suggestions?: string[];
  item?: Item;
  low?: number | null;
  high?: number | null;
  arrows?: boolean;
  max_items?: number | null;
  min_items?: number;
  /** What the field holds at its default, as the form shows it. */
  default?: Typed;
  /** The field that this one excludes: a switch chooses between the two. */
  instead_of?: string;
  /** What is entered when the switch turns to this field. */
  start?: string;
}
type Kind = "choice" | "switch" | "whole" | "number" | "text" | "list" | "pairs";
type Item = Pick<Field, "kind" | "choices" | "low" | "high" | "arrows">;
type Pair = [string, string];
export type Typed = string | boolean | string[] | Pair[];
interface Shown {
  values: Record<string, Typed>;
  problems: Record<string, string>;
  yaml: string;
  /** How many edits of each field were known when this was written. */
  known_edits?: Record<string, number>;
}
interface Model {
  _title: string;
  _fields: Field[];
  _edits: Record<string, [number, Typed]>;
  _shown: Shown;
  _arrangement: { kind: "page" | "column" | "bar"; accordion: string; open: string };
  enabled: boolean;
}
/** One field on the page. */
interface Control {
  element: HTMLElement;
  /** What has to stand beside the element. */
  beside?: HTMLElement;
  /** Shows a value that came from Python. */
  show(value: Typed): void;
  /** Shows what is wrong; "" stands for nothing. */
  showProblem(problem: string): void;
}

/** Groups of a form that are open at first where there are many. */
const OPEN_GROUPS = 2;

/** A list with one item moved from one place to another. */
export function moved<T>(items: readonly T[], from: number, to: number): T[] {
  const rest = items.filter((_, i) => i !== from);
  const end = Math.max(0, Math.min(to, rest.length));
  return [...rest.slice(0, end), items[from] as T, ...rest.slice(end)];
}

/** A new item of a list: a choice that is not in it yet, or the number after the last. */
export function fresh(item: Item, items: readonly string[]): string {
  if (item.kind === "choice") {
    return (item.choices ?? []).find((choice) => !items.includes(choice)) ?? item.choices?.[0] ?? "";
  }
  const numbers = items.map(Number).filter(Number.isFinite);
  if (item.kind === "text") return "";
  const next = numbers.length
    ? Math.max(...numbers) + (numbers.length > 1 ? gap(numbers) : 1)
    : (item.low ?? 1);
  return String(Math.min(next, item.high ?? Infinity));
}

function gap(numbers: number[]): number {
  const sorted = [...numbers].sort((a, b) => a - b);
  const step = (sorted.at(-1) as number) - (sorted.at(-2) as number);
  return step > 0 ? step : 1;
}

function make<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Record<string, string> = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The element in which one value is typed or chosen. */
function input(item: Item, optional: boolean, id: string): HTMLInputElement | HTMLSelectElement {
  if (item.kind === "choice") {
    const select = make("select", { id });
    if (optional) select.append(make("option", { value: "" }, "none"));
    for (const choice of item.choices ?? []) select.append(make("option", { value: choice }, choice));
    return select;
  }
  const element = make("input", { id, autocomplete: "off", spellcheck: "false" });
  if (item.kind === "switch") {
    element.type = "checkbox";
  } else if (item.arrows) {
    element.type = "number";
    element.step = item.kind === "whole" ? "1" : "any";
    if (item.low != null) element.min = String(item.low);
    if (item.high != null) element.max = String(item.high);
  } else {
    element.type = "text";
    if (item.kind === "whole") element.inputMode = "numeric";
  }
  if (optional) element.placeholder = "none";
  return element;
}

function showIn(element: HTMLInputElement | HTMLSelectElement, value: Typed): void {
  if (element instanceof HTMLInputElement && element.type === "checkbox") {
    element.checked = value === true;
    return;
  }
  const text = String(value);
  if (element instanceof HTMLSelectElement && ![...element.options].some((option) => option.value === text)) {
    element.append(make("option", { value: text }, text)); // Python refuses it, and the reason is shown
  }
  if (element.value !== text) element.value = text;
}

function single(field: Field, id: string, type: (value: Typed) => void): Control {
  const element = input(field, field.optional, id);
  element.setAttribute("aria-describedby", `${id}-help ${id}-problem`);
  let beside: HTMLElement | undefined;
  if (field.suggestions?.length) {
    const offered = field.suggestions.map((value) => make("option", { value }));
    beside = make("datalist", { id: `${id}-suggestions` }, ...offered);
    element.setAttribute("list", beside.id);
  }
  let dirty = false;
  const commit = () => {
    dirty = false;
    type(
      element instanceof HTMLInputElement && element.type === "checkbox" ? element.checked : element.value,
    );
  };
  element.addEventListener("input", () => (dirty = true));
  element.addEventListener("change", commit);
  element.addEventListener("keydown", (event) => {
    const key = (event as KeyboardEvent).key;
    // Browsers differ on whether Enter is a change.
    if (key === "Enter" && dirty) commit();
    if (key === "Escape" && dirty) {
      dirty = false;
      element.value = element.dataset["shown"] ?? element.value;
    }
    if (key !== "Tab") event.stopPropagation(); // not for JupyterLab's shortcuts
  });
  return {
    element,
    beside,
    show: (value) => {
      if (dirty && element.matches(":focus")) return; // not while somebody is typing
      element.dataset["shown"] = String(value);
      showIn(element, value);
    },
    showProblem: (problem) => element.setAttribute("aria-invalid", String(problem !== "")),
  };
}

/** A list. Each item has a handle, which is dragged or moved by arrow keys, and a button that removes it. */
function list(field: Field, id: string, type: (value: Typed) => void): Control {
  const item = field.item ?? { kind: "text" };
  const rows = make("ol", { class: "qtx-form-list", "aria-labelledby": `${id}-label` });
  const add = make("button", { type: "button", class: "qtx-form-add" }, "+ add");
  add.setAttribute("aria-label", `Add to ${field.label}`);
  const element = make("div", { id, role: "group", "aria-labelledby": `${id}-label` }, rows, add);
  element.setAttribute("aria-describedby", `${id}-help ${id}-problem`);
  let items: string[] = [];
  let dragged = -1;

  const change = (next: string[], focus?: () => HTMLElement | null | undefined) => {
    draw(next);
    focus?.()?.focus();
    type(next);
  };
  const handles = () => [...rows.querySelectorAll<HTMLElement>(".qtx-form-handle")];
  const fields = () => [...rows.querySelectorAll<HTMLElement>("input, select")];

  function draw(next: string[]): void {
    items = next;
    rows.replaceChildren(...items.map(row));
    const full = field.max_items != null && items.length >= field.max_items;
    add.disabled = full || (item.kind === "choice" && items.length >= (item.choices?.length ?? 0));
  }

  function row(value: string, at: number): HTMLLIElement {
    const name = `${field.label} ${at + 1}`;
    const handle = make(
      "button",
      { type: "button", class: "qtx-form-handle", title: "Drag, or move with the arrow keys" },
      "⠿",
    );
    handle.setAttribute("aria-label", `Move ${name}: arrow up, arrow down`);
    const typed = input(item, false, `${id}-${at}`);
    typed.setAttribute("aria-label", name);
    showIn(typed, value);
    const commit = () => {
      if (items[at] === typed.value) return;
      // The rows are not drawn anew, because another one may be about to be clicked.
      items = items.map((old, i) => (i === at ? typed.value : old));
      type(items);
    };
    typed.addEventListener("change", commit);
    typed.addEventListener("keydown", (event) => {
      if ((event as KeyboardEvent).key === "Enter") commit();
      if ((event as KeyboardEvent).key !== "Tab") event.stopPropagation();
    });
    const remove = make("button", { type: "button", class: "qtx-form-remove", title: "Remove" }, "×");
    remove.setAttribute("aria-label", `Remove ${name}`);
    const without = () =>
      change(
        items.filter((_, i) => i !== at),
        () => handles()[Math.min(at, items.length - 1)] ?? add,
      );
    remove.addEventListener("click", without);
    handle.addEventListener("keydown", (event) => {
      const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (step !== undefined && at + step >= 0 && at + step < items.length) {
        change(moved(items, at, at + step), () => handles()[at + step]);
      } else if (event.key === "Delete" || event.key === "Backspace") {
        without();
      } else {
        return;
      }
      event.preventDefault();
      event.stopPropagation();
    });
    const line = make("li", {}, handle, typed, remove);
    handle.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      dragged = at;
      handle.setPointerCapture(event.pointerId);
      line.classList.add("qtx-form-dragged");
    });
    handle.addEventListener("pointermove", (event) => {
      if (dragged !== at) return;
      const to = place(event.clientY);
      [...rows.children].forEach((other, i) =>
        other.classList.toggle("qtx-form-target", i === to && i !== at),
      );
    });
    handle.addEventListener("pointerup", (event) => {
      if (dragged !== at) return;
      dragged = -1;
      const to = place(event.clientY);
      if (to !== at) change(moved(items, at, to), () => handles()[to]);
      else draw(items);
    });
    handle.addEventListener("pointercancel", () => {
      dragged = -1;
      draw(items);
    });
    return line;
  }

  function place(y: number): number {
    const middles = [...rows.children].map((child) => {
      const box = child.getBoundingClientRect();
      return box.top + box.height / 2;
    });
    const above = middles.filter((middle) => middle < y).length;
    return Math.max(0, Math.min(above > dragged ? above - 1 : above, middles.length - 1));
  }

  add.addEventListener("click", () => change([...items, fresh(item, items)], () => fields().at(-1)));
  return {
    element,
    show: (value) => {
      const next = Array.isArray(value) ? (value as string[]) : [];
      if (dragged >= 0 || JSON.stringify(next) === JSON.stringify(items)) return;
      const active = element.contains(document.activeElement) ? document.activeElement : null;
      const at = active
        ? [handles().indexOf(active as HTMLElement), fields().indexOf(active as HTMLElement)]
        : [-1, -1];
      draw(next);
      (handles()[at[0] as number] ?? fields()[at[1] as number])?.focus();
    },
    showProblem: (problem) => element.setAttribute("aria-invalid", String(problem !== "")),
  };
}

/** Names with their values: a line each, of which the name can be chosen from those that are suggested. */
function pairs(field: Field, id: string, type: (value: Typed) => void): Control {
  const rows = make("ol", { class: "qtx-form-list qtx-form-pairs", "aria-labelledby": `${id}-label` });
  const add = make("button", { type: "button", class: "qtx-form-add" }, "+ add");
  add.setAttribute("aria-label", `Add to ${field.label}`);
  const names = (field.suggestions ?? []).map((value) => make("option", { value }));
  const offered = make("datalist", { id: `${id}-suggestions` }, ...names);
  const element = make("div", { id, role: "group", "aria-labelledby": `${id}-label` }, rows, add, offered);
  element.setAttribute("aria-describedby", `${id}-help ${id}-problem`);
  let items: Pair[] = [];

  const inputs = () => [...rows.querySelectorAll("input")];
  function draw(next: Pair[]): void {
    items = next;
    rows.replaceChildren(...items.map(row));
  }
  function row(pair: Pair, at: number): HTMLLIElement {
    const cell = (part: 0 | 1, label: string, placeholder: string) => {
      const typed = make("input", { type: "text", autocomplete: "off", spellcheck: "false", placeholder });
      typed.setAttribute("aria-label", `${field.label} ${at + 1}: ${label}`);
      if (part === 0) typed.setAttribute("list", offered.id);
      typed.value = pair[part];
      const commit = () => {
        if (items[at]?.[part] === typed.value) return;
        items = items.map((old, i) =>
          i !== at ? old : part === 0 ? [typed.value, old[1]] : [old[0], typed.value],
        );
        type(items);
      };
      typed.addEventListener("change", commit);
      typed.addEventListener("keydown", (event) => {
        if (event.key === "Enter") commit();
        if (event.key !== "Tab") event.stopPropagation();
      });
      return typed;
    };
    const values = field.unit || "values";
    const remove = make("button", { type: "button", class: "qtx-form-remove", title: "Remove" }, "×");
    remove.setAttribute("aria-label", `Remove ${field.label} ${at + 1}`);
    remove.addEventListener("click", () => {
      draw(items.filter((_, i) => i !== at));
      (inputs()[2 * Math.min(at, items.length - 1)] ?? add).focus();
      type(items);
    });
    return make("li", {}, cell(0, "name", "name"), cell(1, values, "a, b, c"), remove);
  }
  add.addEventListener("click", () => {
    draw([...items, ["", ""]]);
    inputs().at(-2)?.focus();
  });
  return {
    element,
    show: (value) => {
      const next = Array.isArray(value) ? (value as Pair[]) : [];
      const complete = items.filter(([name, text]) => name !== "" || text !== "");
      if (JSON.stringify(next) === JSON.stringify(complete)) return;
      const at = inputs().indexOf(document.activeElement as HTMLInputElement);
      draw(next);
      if (at >= 0) inputs()[at]?.focus();
    },
    showProblem: (problem) => element.setAttribute("aria-invalid", String(problem !== "")),
  };
}

/** A switch between two fields that exclude each other; only the chosen one is on the page. */
function either(
  fields: [Field, Field],
  lines: [HTMLElement, HTMLElement],
  id: string,
  type: (values: Record<string, Typed>) => void,
): { element: HTMLElement; show(values: Record<string, Typed>): void } {
  let chosen = 0;
  const radios = fields.map((field, i) => {
    const radio = make("input", { type: "radio", name: id, value: field.name });
    radio.addEventListener("change", () => {
      if (chosen === i) return;
      choose(i);
      const start = field.start || (typeof field.default === "string" ? field.default : "");
      type({ [fields[1 - i]!.name]: "", [field.name]: start });
      lines[i]?.querySelector<HTMLElement>("input, select")?.focus();
    });
    return radio;
  });
  const choose = (i: number) => {
    chosen = i;
    radios.forEach((radio, j) => (radio.checked = j === i));
    lines.forEach((line, j) => (line.hidden = j !== i));
  };
  const labels = fields.map((field, i) => make("label", {}, radios[i]!, make("span", {}, field.label)));
  const text = `${fields[0].label} or ${fields[1].label}`;
  const element = make(
    "div",
    { class: "qtx-form-either", role: "radiogroup", "aria-label": text },
    ...labels,
  );
  choose(0);
  return {
    element,
    show: (values) => {
      const given = fields.findIndex((field) => (values[field.name] ?? "") !== "");
      if (given >= 0) choose(given);
    },
  };
}

/** Units that do not say what a number is of, so that a line of values names the field instead. */
const BARE_UNITS = ["factor", "probability", "degree"];

/** The values of a group in a line: the first two fields, and whatever is not at its default. */
export function summary(fields: readonly Field[], values: Record<string, Typed>): string {
  const parts = fields.map((field, i) => {
    const value = values[field.name] ?? "";
    const bare = BARE_UNITS.includes(field.unit);
    if (i > (bare ? 0 : 1) && JSON.stringify(value) === JSON.stringify(field.default)) return "";
    if (Array.isArray(value))
      return value.map((item) => (Array.isArray(item) ? `${item[0]}: ${item[1]}` : item)).join(", ");
    if (typeof value === "boolean") return value ? field.label : "";
    if (value === "" || field.kind === "choice" || field.kind === "text") return value;
    return field.unit && !bare ? `${value} ${field.unit}` : `${field.label} ${value}`;
  });
  return parts.filter((part) => part !== "").join(" · ");
}

/** Everything of one field: label, control, unit, help, and what is wrong. */
function line(field: Field, id: string, type: (value: Typed) => void): Control {
  const many = field.kind === "list" || field.kind === "pairs";
  const kinds = { list, pairs } as Partial<Record<Kind, typeof single>>;
  const control = (kinds[field.kind] ?? single)(field, id, type);
  const label = make(many ? "span" : "label", { id: `${id}-label`, class: "qtx-form-label" }, field.label);
  if (label instanceof HTMLLabelElement) label.htmlFor = id;
  const help = make("div", { id: `${id}-help`, class: "qtx-form-help", role: "tooltip" }, field.help);
  const problem = make("div", { id: `${id}-problem`, class: "qtx-form-problem", role: "alert" });
  const said = field.label.split(" ").includes(field.unit); // "draws per row" needs no unit "draws"
  const unit = make("span", { class: "qtx-form-unit" }, said ? "" : field.unit);
  const element = make("div", {
    class: `qtx-form-field qtx-form-kind-${field.kind}`,
    "data-field": field.name,
  });
  element.append(label, control.element, unit, help, problem);
  if (control.beside) element.append(control.beside);
  return {
    element,
    show: control.show,
    showProblem: (text) => {
      if (problem.textContent !== text) problem.textContent = text;
      element.classList.toggle("qtx-form-wrong", text !== "");
      control.showProblem(text);
    },
  };
}

function render({ model, el }: { model: AnyModel<Model>; el: HTMLElement }): () => void {
  let end = draw(model, el);
  const drawAnew = () => {
    end();
    end = draw(model, el);
  };
  model.on("change:_fields", drawAnew);
  model.on("change:_arrangement", drawAnew);
  return () => {
    model.off("change:_fields", drawAnew);
    model.off("change:_arrangement", drawAnew);
    end();
  };
}

/** The form itself, as its fields and their arrangement are now. */
function draw(model: AnyModel<Model>, el: HTMLElement): () => void {
  // Each widget loads this file anew, so that a counter would give the same id to two forms.
  const form = `qtx-form-${Math.random().toString(36).slice(2)}`;
  const fields = model.get("_fields");
  const title = model.get("_title");
  const arrangement = model.get("_arrangement");
  const look = `qtx-form qtx-form-as-${arrangement.kind}`;
  const root = make("form", { class: look, "aria-label": title, novalidate: "" });
  root.addEventListener("submit", (event) => event.preventDefault());
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape") root.classList.add("qtx-form-quiet"); // takes a tooltip away
  });
  for (const kind of ["pointermove", "focusin"])
    root.addEventListener(kind, () => root.classList.remove("qtx-form-quiet"));

  const typeAll = (values: Record<string, Typed>) => {
    const edits = { ...model.get("_edits") };
    for (const [name, value] of Object.entries(values)) edits[name] = [(edits[name]?.[0] ?? 0) + 1, value];
    model.set("_edits", edits);
    // In a message, because ipywidgets would keep a trait back until the last edit is answered, and send the click
    // of a button at once: the work would start with the value from before.
    post(model, { edits });
  };
  const type = (name: string, value: Typed) => typeAll({ [name]: value });
  const controls = new Map<string, Control>();
  const switches: ReturnType<typeof either>[] = [];
  const groups = new Map<string, { box: HTMLElement; values: HTMLElement; fields: Field[] }>();
  const names = [...new Set(fields.map((field) => field.group))];
  for (const group of names) {
    const inside = fields.filter((field) => field.group === group);
    const values = make("span", { class: "qtx-form-values" });
    const heading = make("summary", {}, make("span", { class: "qtx-form-group" }, group), values);
    const box = group && arrangement.kind !== "bar" ? make("details", {}, heading) : make("div");
    if (box instanceof HTMLDetailsElement) {
      if (arrangement.kind === "column") {
        box.name = arrangement.accordion;
        box.open = arrangement.open === group;
      } else box.open = names.length <= OPEN_GROUPS + 1 || names.indexOf(group) < OPEN_GROUPS;
    }
    for (const field of inside) {
      const control = line(field, `${form}-${field.name}`, (value) => type(field.name, value));
      controls.set(field.name, control);
      box.append(control.element);
    }
    for (const field of inside) {
      const other = inside.find(({ name }) => name === field.instead_of);
      if (other === undefined) continue;
      const [first, second] = [controls.get(other.name)!.element, controls.get(field.name)!.element];
      const change = either([other, field], [first, second], `${form}-${field.name}-switch`, typeAll);
      first.before(change.element);
      first.after(second);
      for (const element of [first, second]) element.classList.add("qtx-form-switched");
      switches.push(change);
    }
    groups.set(group, { box, values, fields: inside });
    root.append(box);
  }

  const whole = make("div", { class: "qtx-form-problem", role: "alert" });
  const file = make("input", { type: "file", accept: ".yaml,.yml", hidden: "", "aria-label": "YAML file" });
  const open = make(
    "button",
    { type: "button", "aria-label": `Load ${title} from a YAML file` },
    "Load YAML…",
  );
  const save = make("button", { type: "button", "aria-label": `Save ${title} as a YAML file` }, "Save YAML");
  open.addEventListener("click", () => file.click());
  file.addEventListener("change", async () => {
    const chosen = file.files?.[0];
    if (chosen) type("yaml", await chosen.text());
    file.value = "";
  });
  save.addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([model.get("_shown").yaml], { type: "application/yaml" }));
    make("a", {
      href: url,
      download: `${title.toLowerCase().replace(/\W+/g, "-")}.yaml`,
    }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });
  root.append(whole, make("div", { class: "qtx-form-files" }, open, file, save));

  const show = () => {
    const shown = model.get("_shown");
    if (!shown.values) return;
    const elsewhere = Object.entries(shown.problems).filter(([name]) => !controls.has(name));
    const edits = model.get("_edits");
    for (const [name, control] of controls) {
      const [typed, known] = [edits[name]?.[0] ?? 0, shown.known_edits?.[name] ?? 0];
      if (typed > known) continue; // this answers an earlier edit
      const value = shown.values[name];
      if (value !== undefined) control.show(value);
      control.showProblem(shown.problems[name] ?? "");
    }
    const answered = ({ name }: Field) => (edits[name]?.[0] ?? 0) <= (shown.known_edits?.[name] ?? 0);
    if (fields.every(answered)) for (const change of switches) change.show(shown.values);
    for (const { box, values, fields } of groups.values()) {
      if (box instanceof HTMLDetailsElement && fields.some(({ name }) => shown.problems[name]))
        box.open = true;
      values.textContent = summary(fields, shown.values);
    }
    const text = elsewhere.map(([, problem]) => problem).join(" ");
    if (whole.textContent !== text) whole.textContent = text;
  };
  const enable = () => {
    for (const element of root.querySelectorAll<HTMLButtonElement>("input, select, textarea, button")) {
      element.disabled = !model.get("enabled");
    }
  };
  model.on("change:_shown", show);
  model.on("change:enabled", enable);
  show();
  if (!model.get("enabled")) enable();
  el.append(root);
  return () => {
    model.off("change:_shown", show);
    model.off("change:enabled", enable);
    root.remove();
  };
}

export default { render };
