// CircuitView: a row's circuit, the device's region, what was measured, and the zero-noise fit.
import { Frame, h, onFrame, s, type Model } from "./dom";
import { css, sequential } from "./maps";
import { digits, label, scale, ticks, whole, withError, type Scale } from "./scale";
import { SAMPLER_COLOURS } from "./theme";

export interface Gate {
  name: string;
  qubits: number[];
  column: number;
  count: number;
  conditional: boolean;
}
interface Drawing {
  qubits: number;
  columns: number;
  gates: Gate[];
}
interface Region {
  nodes: { qubit: number; readout: number | null; x: number; y: number }[];
  edges: { a: number; b: number; error: number }[];
}
interface Point {
  shots: number;
  fidelity: number;
  error: number;
  classical: number;
}
interface Fit {
  levels: number[];
  values: number[];
  errors: number[];
  fit: [number, number][];
  answer: number;
  answer_error: number;
  exact: number;
  key: number;
  method: string;
  p: number[];
  p_error: number[];
  shots: number;
  fallbacks: string[];
}

const COLUMN = 30;
const WIRE = 26;
const FIRST_LINES = 2;
const Z95 = 1.96;

/** How many columns of gates stand in a line, and the lines that a drawing takes. */
export function folded(columns: number, width: number): { each: number; lines: number } {
  const each = Math.max(4, Math.floor((width - 44) / COLUMN));
  return { each, lines: Math.max(1, Math.ceil(columns / each)) };
}

/** A level between others that none of them has: rounded to hundredths, shifted where it is taken. */
export function freeLevel(wanted: number, others: number[], step = 0.05): number {
  let level = Math.max(0.1, Math.round(wanted * 20) / 20);
  while (others.some((other) => Math.abs(other - level) < step / 2))
    level = Math.round((level + step) * 100) / 100;
  return level;
}

export function render(model: Model, el: HTMLElement): () => void {
  const get = (name: string) => model.get(name);
  let drawing: (Drawing & { loader: string; device: string; noisy: boolean; exact: number[] }) | null = null;
  let device: { depth: number; two_qubit_gates: number; qubits: number; region: Region | null } | null = null;
  let counts: {
    shots: number;
    discarded: number;
    counts: number[];
    classical: number[];
    curve: Point[];
    not_modelled: string[];
    fallbacks: string[];
  } | null = null;
  let fit: Fit | null = null;
  let levels: number[] = [...get("noise_levels")];
  let key: number | null = null;
  let running: number | null = null;
  let all = false;

  const frame = new Frame(model, el, "circuit", "Circuit of a row", () => paint());
  const measured = () => (frame.theme === "light" ? SAMPLER_COLOURS.systematic : frame.colours.accent);

  // --- controls ---------------------------------------------------------------------------------

  const row = h("select", { change: () => frame.set({ row: Number(row.value) }) });
  let named = "";
  const shots = h("select", { change: () => frame.set({ shots: Number(shots.value) }) });
  const go = h(
    "button",
    {
      type: "button",
      class: "qtx-primary",
      click: () => {
        if (running === null) frame.send({ kind: "run", shots: get("shots") });
        else frame.send({ kind: "cancel" });
      },
    },
    "Measure",
  );
  const method = h(
    "select",
    {
      change: () => {
        frame.set({ method: method.value });
        askFit();
      },
    },
    ...(get("methods") as string[]).map((name) => h("option", { value: name }, name)),
  );
  const list = h("div", { class: "qtx-levels", role: "group", "aria-label": "noise levels" });
  const add = h(
    "button",
    {
      type: "button",
      click: () => {
        levels = [...levels, freeLevel(Math.max(...levels) + 1, levels)];
        keepLevels();
      },
    },
    "Add a level",
  );
  const fitControls = h(
    "fieldset",
    {},
    h("legend", {}, "Zero-noise extrapolation"),
    h("label", { class: "qtx-row" }, "method", method),
    list,
    add,
  );

  function keepLevels(): void {
    frame.set({ noise_levels: levels });
    listLevels();
    askFit();
  }

  function move(index: number, to: number, kept: boolean): void {
    levels = levels.map((level, i) =>
      i === index
        ? freeLevel(
            to,
            levels.filter((_, j) => j !== index),
          )
        : level,
    );
    if (kept) frame.set({ noise_levels: levels });
    askFit();
    paint();
  }

  function listLevels(): void {
    list.replaceChildren(
      ...levels.map((level, index) => {
        const value = h("output", {}, label(level));
        const slider = h("input", {
          type: "range",
          min: 0.1,
          max: 5,
          step: 0.05,
          value: level,
          "aria-label": `noise level ${index + 1}`,
          input: () => {
            move(index, Number(slider.value), false);
            value.textContent = label(levels[index]);
          },
          change: () => {
            move(index, Number(slider.value), true);
            slider.value = String(levels[index]);
            value.textContent = label(levels[index]);
          },
        });
        const remove = h(
          "button",
          {
            type: "button",
            "aria-label": `remove noise level ${label(level)}`,
            title: "Remove this level",
            disabled: levels.length <= 2,
            click: () => {
              levels = levels.filter((_, i) => i !== index);
              keepLevels();
            },
          },
          "×",
        );
        return h("div", { class: "qtx-level" }, slider, value, remove);
      }),
    );
  }

  const askFit = onFrame(() => {
    if (drawing?.noisy) frame.send({ kind: "zne", levels, method: get("method"), key });
  });

  // --- panels -----------------------------------------------------------------------------------

  const panel = (name: string, className: string) => {
    const title = h("h3", {}, name);
    const svg = s("svg", { role: "img" });
    const caption = h("p", { class: "qtx-note" });
    return { title, svg, caption, box: h("figure", { class: className }, title, svg, caption) };
  };
  const wires = panel("Circuit", "qtx-wide");
  const place = panel("Qubits in use", "");
  const keys = panel("Distribution", "qtx-two");
  const fidelity = panel("Fidelity as shots arrive", "");
  const zne = panel("Extrapolation to no noise", "qtx-two");
  const more = h("button", {
    type: "button",
    hidden: true,
    click: () => {
      all = !all;
      paint();
    },
  });
  wires.box.append(more);
  const heading = h("h2", {}, "Circuit of a row");
  const status = h("p", { class: "qtx-status", role: "status" });
  const empty = h("p", { class: "qtx-note" }, "No row is shown: brush rows in a lens, or call show_rows(p).");
  const body = h(
    "div",
    { class: "qtx-columns" },
    h(
      "div",
      { class: "qtx-controls" },
      h("label", { class: "qtx-row" }, "row", row),
      h("label", { class: "qtx-row qtx-shots" }, "shots", shots),
      go,
      fitControls,
    ),
    h("div", { class: "qtx-panels" }, wires.box, keys.box, fidelity.box, zne.box, place.box),
  );
  frame.root.append(
    h("header", {}, heading, frame.exports()),
    empty,
    body,
    frame.error,
    h("p", { class: "qtx-honest" }, get("note")),
    status,
  );

  // --- painting ---------------------------------------------------------------------------------

  function size(p: { svg: SVGSVGElement; box: HTMLElement }, height: number): [number, number] {
    const width = Math.max(180, p.box.clientWidth);
    p.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    p.svg.setAttribute("width", String(width));
    p.svg.setAttribute("height", String(height));
    return [width, height];
  }

  function text(x: number, y: number, content: string, anchor = "middle", attributes = {}): SVGTextElement {
    return s("text", { x, y, "text-anchor": anchor, ...attributes }, content);
  }

  function axes(height: number, xs: Scale, ys: Scale, xName: string, yName: string): Node[] {
    const out: Node[] = [];
    for (const x of ticks(xs, Math.max(2, (xs.to - xs.from) / 70))) {
      const at = xs(x);
      out.push(s("line", { x1: at, x2: at, y1: ys.from, y2: ys.to, class: "qtx-grid" }));
      out.push(text(at, ys.from + 13, label(x)));
    }
    for (const y of ticks(ys, 4)) {
      const at = ys(y);
      out.push(s("line", { x1: xs.from, x2: xs.to, y1: at, y2: at, class: "qtx-grid" }));
      out.push(text(xs.from - 4, at + 4, label(y), "end"));
    }
    out.push(text((xs.from + xs.to) / 2, height - 3, xName));
    out.push(
      text(0, 0, yName, "middle", { transform: `translate(11 ${(ys.from + ys.to) / 2}) rotate(-90)` }),
    );
    out.push(
      s("path", { d: `M${xs.from} ${ys.to}V${ys.from}H${xs.to}`, fill: "none", stroke: "var(--qtx-muted)" }),
    );
    return out;
  }

  function point(x: number, y: Scale, value: number, error: number, full: boolean, radius = 4): Node {
    const colour = measured();
    const clamp = (v: number) => y(Math.min(y.high, Math.max(y.low, v)));
    return s(
      "g",
      { stroke: colour, "stroke-width": 1.4 },
      error > 0
        ? s("path", { d: `M${x} ${clamp(value - Z95 * error)}V${clamp(value + Z95 * error)}` })
        : null,
      s("circle", { cx: x, cy: clamp(value), r: radius, fill: full ? colour : "var(--qtx-paper)" }),
    );
  }

  function paintWires(): void {
    const { qubits, columns, gates } = drawing!;
    const width = Math.max(180, wires.box.clientWidth);
    const known = Math.min(columns, 1 + Math.max(0, ...gates.map((gate) => gate.column)));
    const { each, lines: needed } = folded(known, width);
    const lines = all ? needed : Math.min(needed, FIRST_LINES);
    const shown = Math.min(known, lines * each);
    more.hidden = needed <= FIRST_LINES;
    more.textContent = all
      ? "Show the beginning only"
      : `Show ${known < columns ? `${known} of ` : "all "}${columns} columns`;
    const tall = qubits * WIRE + 10;
    size(wires, lines * tall + 4);
    const nodes: Node[] = [];
    for (let line = 0; line < lines; line++) {
      const used = Math.min(each, shown - line * each);
      for (let q = 0; q < qubits; q++) {
        const y = line * tall + q * WIRE + 16;
        nodes.push(s("line", { x1: 34, x2: 40 + used * COLUMN, y1: y, y2: y, stroke: "var(--qtx-muted)" }));
        nodes.push(text(30, y + 4, `q${q}`, "end"));
      }
    }
    for (const gate of gates.filter((gate) => gate.column < shown)) {
      const line = Math.floor(gate.column / each);
      const x = 40 + (gate.column % each) * COLUMN + COLUMN / 2;
      const at = (q: number) => line * tall + q * WIRE + 16;
      const [first, last] = [Math.min(...gate.qubits), Math.max(...gate.qubits)];
      const parts: Node[] = [];
      if (first !== last) {
        parts.push(
          s("line", {
            x1: x,
            x2: x,
            y1: at(first),
            y2: at(last),
            stroke: "var(--qtx-text)",
            "stroke-width": 1.5,
          }),
        );
      }
      const two = gate.qubits.length === 2 && /^c[xz]$/.test(gate.name);
      gate.qubits.forEach((q, i) => {
        if (two && (gate.name === "cz" || i === 0)) {
          parts.push(s("circle", { cx: x, cy: at(q), r: 4, fill: "var(--qtx-text)" }));
        } else if (two) {
          parts.push(
            s("circle", { cx: x, cy: at(q), r: 7, fill: "var(--qtx-paper)", stroke: "var(--qtx-text)" }),
            s("path", { d: `M${x - 7} ${at(q)}h14M${x} ${at(q) - 7}v14`, stroke: "var(--qtx-text)" }),
          );
        } else {
          const name =
            gate.name === "measure" ? "M" : gate.name.replace(/^r([xyz])$/, (_, axis) => `R${axis}`);
          parts.push(
            s("rect", {
              x: x - 12,
              y: at(q) - 10,
              width: 24,
              height: 20,
              rx: 2,
              fill: gate.name === "measure" ? "var(--qtx-panel)" : "var(--qtx-paper)",
              stroke: gate.conditional ? "var(--qtx-accent)" : "var(--qtx-text)",
              "stroke-dasharray": gate.conditional ? "3 2" : null,
            }),
            ...(gate.count > 1
              ? [
                  text(x, at(q) - 1, name, "middle", { "font-size": 9.5 }),
                  text(x, at(q) + 8, `×${gate.count}`, "middle", { "font-size": 8.5 }),
                ]
              : [text(x, at(q) + 4, name)]),
          );
        }
      });
      const told = gate.conditional
        ? `${gate.count} × ${gate.name} on q${gate.qubits}, each for one value of the measured bits`
        : `${gate.name} on q${gate.qubits.join(", q")}`;
      nodes.push(s("g", {}, s("title", {}, told), ...parts));
    }
    wires.svg.replaceChildren(...nodes);
    const rest = shown < columns ? ` The first ${shown} of ${columns} columns are drawn.` : "";
    const conditional = gates.some((gate) => gate.conditional)
      ? " Dashed: fed forward from measured bits; ×k: one of k angles is used."
      : "";
    const cost = device
      ? `on ${drawing!.device}: depth ${device.depth}, ${device.two_qubit_gates} two-qubit gates, ${device.qubits} qubits.`
      : `for ${drawing!.device} it is being transpiled …`;
    wires.caption.textContent = `${drawing!.loader} loader; ${cost}${conditional}${rest}`;
    wires.svg.setAttribute("aria-label", `circuit of ${qubits} qubits; ${wires.caption.textContent}`);
  }

  function paintPlace(): void {
    const region = device?.region;
    place.box.hidden = !region;
    if (!region) return;
    const [width, height] = size(place, 180);
    const deep = Math.max(...region.nodes.map((node) => node.y));
    const unit = Math.min(width - 50, deep > 0.05 ? (height - 50) / deep : Infinity);
    const [left, top] = [(width - unit) / 2, (height - deep * unit) / 2];
    const spots = region.nodes.map((node) => [left + node.x * unit, top + node.y * unit]);
    const apart = spots.flatMap(([x, y], i) => spots.slice(0, i).map(([u, v]) => Math.hypot(x - u, y - v)));
    const radius = Math.min(19, 0.46 * Math.min(...apart, 50));
    const errors = region.nodes.map((node) => node.readout ?? 0);
    const worst = Math.max(...errors, 1e-9);
    const percent = (error: number | null) => (error === null ? "–" : `${digits(100 * error, 2)} %`);
    const nodes: Node[] = [];
    for (const edge of region.edges) {
      const [[x1, y1], [x2, y2]] = [spots[edge.a], spots[edge.b]];
      const [x, y] = [(x1 + x2) / 2, (y1 + y2) / 2];
      nodes.push(
        s("line", { x1, x2, y1, y2, stroke: "var(--qtx-muted)", "stroke-width": 3 }),
        text(x, y + 4, percent(edge.error), "middle", { class: "qtx-halo", "font-size": 10 }),
      );
    }
    region.nodes.forEach((node, i) => {
      const [cx, cy] = spots[i];
      const on = { class: errors[i] / worst > 0.6 ? "qtx-on-light" : "qtx-on-dark" };
      nodes.push(
        s(
          "g",
          {},
          s("title", {}, `qubit ${node.qubit}: readout error ${percent(node.readout)}`),
          s("circle", {
            cx,
            cy,
            r: radius,
            fill: css(sequential, errors[i] / worst),
            stroke: "var(--qtx-text)",
          }),
          text(cx, cy + (radius > 15 ? -1 : 4), String(node.qubit), "middle", on),
          radius > 15
            ? text(cx, cy + 10, percent(node.readout), "middle", { ...on, "font-size": 8.5 })
            : null,
        ),
      );
    });
    place.svg.replaceChildren(...nodes);
    place.caption.textContent = `Physical qubits of ${drawing?.device}; the brighter, the larger the readout error, ${percent(worst)} at most${region.edges.length ? ", on each pair its two-qubit error" : "; no pair is needed"}.`;
    place.svg.setAttribute(
      "aria-label",
      `qubits ${region.nodes.map((n) => `${n.qubit}, readout error ${n.readout === null ? "unknown" : digits(n.readout, 2)}`).join("; ")}`,
    );
  }

  function paintKeys(): void {
    const exact = drawing!.exact;
    const [width, height] = size(keys, 190);
    const total = counts?.counts.reduce((a, b) => a + b, 0) ?? 0;
    const shares = counts && total ? counts.counts.map((x) => x / total) : null;
    const baseline = counts?.shots ? counts.classical.map((x) => x / counts!.shots) : null;
    const known = exact.map((p, j) => (p > 0 || (shares?.[j] ?? 0) > 0 ? j : -1)).filter((j) => j >= 0);
    const [first, last] = [known[0] ?? 0, known.at(-1) ?? 0];
    const xs = scale(first - 0.6, last + 0.6, 46, width - 8);
    const top = Math.max(...exact, ...(shares ?? []), ...(fit?.p ?? []), 1e-9);
    const ys = scale(0, top * 1.08, height - 34, 8);
    const each = (xs.to - xs.from) / (last - first + 1.2);
    const nodes: Node[] = axes(height, xs, ys, "key", "probability");
    for (const j of known) {
      const x = xs(j);
      const reach = Math.min(9, Math.max(1, each / 3));
      nodes.push(
        s("line", {
          x1: x,
          x2: x,
          y1: ys(0),
          y2: ys(exact[j]),
          stroke: "var(--qtx-exact)",
          "stroke-width": Math.min(3, Math.max(1, each / 6)),
        }),
      );
      if (baseline) {
        const y = ys(baseline[j]);
        nodes.push(
          s("line", {
            x1: x - reach,
            x2: x + reach,
            y1: y,
            y2: y,
            stroke: "var(--qtx-baseline)",
            "stroke-width": 2,
          }),
        );
      }
      const radius = Math.min(4, Math.max(1.5, each / 5));
      const aside = fit ? each / 6 : 0;
      if (shares && total)
        nodes.push(
          point(x - aside, ys, shares[j], Math.sqrt((shares[j] * (1 - shares[j])) / total), false, radius),
        );
      if (fit) nodes.push(point(x + aside, ys, fit.p[j], fit.p_error[j], true, radius));
      if (drawing!.noisy) {
        const hit = s(
          "rect",
          {
            x: x - each / 2,
            y: ys.to,
            width: Math.max(1, each),
            height: ys.from - ys.to,
            fill: "transparent",
            class: "qtx-hit",
          },
          s("title", {}, `key ${j}: extrapolate its probability`),
        );
        hit.addEventListener("click", () => {
          key = j;
          askFit();
        });
        nodes.push(hit);
      }
    }
    keys.svg.replaceChildren(...nodes);
    const lost = counts?.discarded ? `, ${whole(counts.discarded)} discarded` : "";
    keys.title.textContent = counts?.shots
      ? `${whole(counts.shots)} shots against the exact row`
      : "The exact row; nothing is measured yet";
    keys.caption.replaceChildren(
      mark("line", "exact"),
      mark("dash", "classical draws"),
      mark("hollow", `measured${lost}`),
      ...(fit ? [mark("full", "extrapolated")] : []),
      "bars: 95 %",
    );
    keys.svg.setAttribute("aria-label", `distribution over ${known.length} keys; ${keys.title.textContent}`);
  }

  function mark(kind: "line" | "dash" | "dashed" | "hollow" | "full", name: string): HTMLElement {
    const colour = {
      line: "var(--qtx-exact)",
      dash: "var(--qtx-baseline)",
      dashed: "var(--qtx-baseline)",
      hollow: measured(),
      full: measured(),
    }[kind];
    const shape =
      kind === "line"
        ? s("path", { d: "M7 1V11", stroke: colour, "stroke-width": 2 })
        : kind === "dash" || kind === "dashed"
          ? s("path", {
              d: "M1 6H13",
              stroke: colour,
              "stroke-width": 2,
              "stroke-dasharray": kind === "dashed" ? "5 2" : null,
            })
          : s("circle", {
              cx: 7,
              cy: 6,
              r: 4,
              stroke: colour,
              "stroke-width": 1.5,
              fill: kind === "full" ? colour : "none",
            });
    return h(
      "span",
      { class: "qtx-mark" },
      s("svg", { width: 14, height: 12, "aria-hidden": "true" }, shape),
      name,
    );
  }

  function paintFidelity(): void {
    const curve = counts?.curve ?? [];
    const [width, height] = size(fidelity, 190);
    const most = Math.max(get("shots"), curve.at(-1)?.shots ?? 0);
    const xs = scale(Math.min(16, curve[0]?.shots ?? 16), Math.max(most, 32), 50, width - 16, true);
    const least = Math.min(0.9, ...curve.map((x) => Math.min(x.fidelity - Z95 * x.error, x.classical)));
    const ys = scale(Math.max(0, least), 1, height - 34, 8);
    const nodes = axes(height, xs, ys, "shots", "Hellinger fidelity");
    const path = curve.map((x, i) => `${i ? "L" : "M"}${xs(x.shots)} ${ys(x.classical)}`).join("");
    nodes.push(
      s("path", {
        d: path,
        fill: "none",
        stroke: "var(--qtx-baseline)",
        "stroke-width": 2,
        "stroke-dasharray": "6 4",
      }),
    );
    for (const x of curve) nodes.push(point(xs(x.shots), ys, x.fidelity, x.error, false));
    fidelity.svg.replaceChildren(...nodes);
    const last = curve.at(-1);
    fidelity.title.textContent = last
      ? `Fidelity ${withError(last.fidelity, Z95 * last.error)}`
      : "Fidelity as shots arrive";
    fidelity.caption.replaceChildren(
      mark("hollow", "measured, bars: 95 %"),
      mark("dashed", "as many classical draws"),
    );
    fidelity.svg.setAttribute(
      "aria-label",
      last ? `${fidelity.title.textContent}, classical draws ${digits(last.classical, 4)}` : "no shots yet",
    );
  }

  function paintFit(): void {
    zne.box.hidden = fitControls.hidden = !drawing!.noisy;
    if (!drawing!.noisy) return;
    const [width, height] = size(zne, 190);
    const high = Math.max(...levels, 1) * 1.08;
    const xs = scale(0, high, 52, width - 10);
    if (!fit) {
      zne.svg.replaceChildren(text(width / 2, height / 2, "measuring the levels …"));
      return;
    }
    const all = [
      ...fit.values.flatMap((y, i) => [y - Z95 * fit!.errors[i], y + Z95 * fit!.errors[i]]),
      ...fit.fit.map(([, y]) => y),
      fit.answer - Z95 * fit.answer_error,
      fit.answer + Z95 * fit.answer_error,
      fit.exact,
    ];
    const room = 0.05 * (Math.max(...all) - Math.min(...all) || 1);
    const ys = scale(Math.min(...all) - room, Math.max(...all) + room, height - 34, 8);
    const nodes = axes(height, xs, ys, "noise level (1: the device's own)", `probability of key ${fit.key}`);
    const exact = ys(fit.exact);
    nodes.push(
      s("line", {
        x1: xs.from,
        x2: xs.to,
        y1: exact,
        y2: exact,
        stroke: "var(--qtx-exact)",
        "stroke-width": 1.5,
      }),
      text(xs.to - 2, exact - 4, "exact", "end", { class: "qtx-halo" }),
      s("path", {
        d: fit.fit
          .filter(([x]) => x <= high)
          .map(([x, y], i) => `${i ? "L" : "M"}${xs(x)} ${ys(y)}`)
          .join(""),
        fill: "none",
        stroke: measured(),
        "stroke-width": 1.5,
      }),
      point(xs(0), ys, fit.answer, fit.answer_error, true, 5),
    );
    fit.levels.forEach((level, i) => {
      const index = levels.indexOf(level);
      const handle = point(xs(level), ys, fit!.values[i], fit!.errors[i], false, 6) as SVGGElement;
      handle.classList.add("qtx-handle");
      handle.append(s("title", {}, "Drag to another noise level"));
      if (index >= 0) {
        handle.addEventListener("pointerdown", (event) => {
          event.preventDefault();
          const box = zne.svg.getBoundingClientRect();
          const to = (e: PointerEvent) => xs.invert(e.clientX - box.left);
          const drag = (e: PointerEvent) => move(index, Math.min(5, to(e)), false);
          const drop = (e: PointerEvent) => {
            window.removeEventListener("pointermove", drag);
            move(index, Math.min(5, to(e)), true);
            listLevels();
          };
          window.addEventListener("pointermove", drag);
          window.addEventListener("pointerup", drop, { once: true });
        });
      }
      nodes.push(handle);
    });
    zne.svg.replaceChildren(...nodes);
    zne.title.textContent = `Key ${fit.key} without noise: ${withError(fit.answer, Z95 * fit.answer_error)}, exact ${digits(fit.exact, 3)}`;
    zne.caption.textContent = `${fit.method} fit through ${fit.levels.length} levels, ${whole(fit.shots)} shots; bars: 95 %, without what the model misses. ${fit.fallbacks.join(" ")}`;
    zne.svg.setAttribute("aria-label", zne.title.textContent);
    frame.root.dataset.levels = fit.levels.join(" ");
  }

  const paint = onFrame(() => {
    if (!frame.hasRoom()) return;
    const names: string[] = get("names");
    if (named !== names.join("\n")) {
      named = names.join("\n");
      row.replaceChildren(...names.map((name, i) => h("option", { value: i }, name)));
    }
    row.value = String(get("row"));
    const options = [...new Set([128, 256, 512, 1024, 4096, 16384, 65536, get("shots")])].sort(
      (a, b) => a - b,
    );
    if (shots.options.length !== options.length)
      shots.replaceChildren(...options.map((x) => h("option", { value: x }, whole(x))));
    shots.value = String(get("shots"));
    method.value = get("method");
    go.textContent = running === null ? "Measure" : "Cancel";
    body.hidden = drawing === null;
    empty.hidden = drawing !== null;
    if (!drawing) return;
    heading.textContent = `${(names[get("row")] ?? "").replace(/^./, (x) => x.toUpperCase())} on ${drawing.device}`;
    paintWires();
    paintKeys();
    paintFidelity();
    paintFit();
    paintPlace();
    const parts = [counts?.shots ? `${whole(counts.shots)} shots` : "no shots yet"];
    if (running !== null) parts.unshift("measuring");
    if (counts?.not_modelled.length) parts.push(counts.not_modelled.join("; "));
    if (counts?.fallbacks.length) parts.push(counts.fallbacks.join(" "));
    status.textContent = parts.join(" · ");
    frame.root.dataset.shots = String(counts?.shots ?? 0);
  });

  frame.onMessage((message) => {
    if (message.kind === "circuit") {
      const other = JSON.stringify(drawing?.exact) !== JSON.stringify(message.exact);
      drawing = { ...message.drawing, ...message };
      if (other) {
        [device, fit, key] = [null, null, null];
        askFit();
      }
      frame.fail(null);
    } else if (message.kind === "device") device = message;
    else if (message.kind === "counts") counts = message;
    else if (message.kind === "zne") {
      fit = message;
      frame.fail(null);
    } else if (message.kind === "running") running = message.shots;
    else if (message.kind === "ended") running = null;
    else return;
    paint();
  });
  frame.onChange(["row", "names", "shots", "method"], paint);
  frame.onChange(["noise_levels"], () => {
    if (JSON.stringify(get("noise_levels")) === JSON.stringify(levels)) return;
    levels = [...get("noise_levels")];
    listLevels();
    askFit();
  });
  listLevels();
  frame.send({ kind: "ready" });
  paint();
  return () => frame.end();
}
