// AttentionLens: the exact, sampled and difference maps of a head, and thumbnails of all heads.
import { ticks } from "d3-array";
import { Frame, h, onFrame, sharp, unique, type Model } from "./dom";
import * as maps from "./maps";
import { digits, label, whole } from "./scale";

const NAMES = ["exact", "sampled", "difference"] as const;
type Name = (typeof NAMES)[number];

const VISIBLE: Record<string, string> = { " ": "·", "\n": "¶", "\t": "→" };
const LEFT = 44;
const BOTTOM = 33;
const TOP = 2;

interface Facts {
  keys: Float32Array;
  distinct: Float32Array;
  error: Float32Array;
  told: Float32Array;
}

export function render(model: Model, el: HTMLElement): () => void {
  const get = (name: string) => model.get(name);
  const rows: number = get("num_queries");
  const columns: number = get("num_keys");
  const tokens: string[] = (get("tokens") as string[]).map((token) => VISIBLE[token] ?? token);
  const counts: number[] = get("draw_counts");
  const causal: boolean = get("is_causal");
  const most = Math.max(0, Math.ceil(Math.log2(Math.max(rows, columns) / maps.TILE)));
  const me = unique("lens");

  let view: maps.Viewport = { r0: 0, r1: rows, c0: 0, c1: columns };
  let cursor: [number, number] | null = null;
  let brush: { name: Name; from: [number, number]; to: [number, number] } | null = null;
  let dragging: "rows" | "zoom" = "rows";
  let anchor: number | null = null;
  let draws: number = get("num_samples");
  let seq = 0;
  let shown: { layer: number; head: number; draws: number; level: number; seq: number } | null = null;
  let facts: Facts | null = null;
  let error = NaN;
  const exact = new maps.Tiles(96);
  let sampled = new maps.Tiles(96);
  const asked = new Map<number, number>();
  const latencies: number[] = [];

  const frame = new Frame(model, el, "lens", "Attention lens", () => {
    ask();
    paint();
  });

  // --- controls ---------------------------------------------------------------------------------

  const slider = h("input", {
    type: "range",
    min: 0,
    max: counts.length - 1,
    step: 1,
    "aria-label": "draws per row",
    input: () => {
      draws = counts[Number(slider.value)];
      tellDraws();
      ask(performance.now());
    },
    change: () => {
      frame.set({ num_samples: draws });
      askThumbnails();
    },
  });
  const drawsText = h("output", { class: "qtx-value" });
  const logBox = h("input", {
    type: "checkbox",
    change: () => frame.set({ log_scale: logBox.checked }),
  });
  const modeName = unique("mode");
  const mode = (value: "rows" | "zoom", name: string) =>
    h(
      "label",
      {},
      h("input", {
        type: "radio",
        name: modeName,
        value,
        checked: value === dragging,
        change: () => (dragging = value),
      }),
      name,
    );
  const reset = h(
    "button",
    {
      type: "button",
      click: () => {
        view = { r0: 0, r1: rows, c0: 0, c1: columns };
        ask();
        paint();
      },
    },
    "Whole map",
  );
  const clear = h("button", { type: "button", click: () => select([]) }, "Clear rows");
  const heads = h("div", { class: "qtx-heads", role: "radiogroup", "aria-label": "layer and head" });
  const scaleNote = h("div", { class: "qtx-heads-scale" });

  // --- maps -------------------------------------------------------------------------------------

  const help =
    "Arrows move the cross; Shift with up and down selects rows; plus and minus zoom, 0 shows the whole map, Escape clears the rows.";
  const helpId = unique("help");
  const panels = NAMES.map((name) => {
    const picture = h("canvas", { "aria-hidden": "true" });
    const over = h("canvas", { class: "qtx-over", "aria-hidden": "true" });
    const title = h("h3", {});
    const holder = h("div", {
      class: "qtx-map",
      tabindex: 0,
      role: "application",
      "aria-roledescription": "attention map",
      "aria-describedby": helpId,
      pointermove: (event: PointerEvent) => point(name, event),
      pointerleave: () => {
        if (!brush) cursor = null;
        paintOver();
      },
      pointerdown: (event: PointerEvent) => {
        if (event.button !== 0) return;
        const at = cellAt(name, event);
        if (!at) return;
        brush = { name, from: at, to: at };
        holder.setPointerCapture(event.pointerId);
        holder.focus({ preventScroll: true });
        event.preventDefault();
        paintOver();
      },
      pointerup: () => release(),
      pointercancel: () => {
        brush = null;
        paintOver();
      },
      dblclick: () => reset.click(),
      wheel: (event: WheelEvent) => {
        if (document.activeElement !== holder && !event.ctrlKey) return;
        const at = cellAt(name, event);
        if (!at) return;
        event.preventDefault();
        zoom(at, event.deltaY > 0 ? 1.25 : 0.8);
      },
      keydown: (event: KeyboardEvent) => key(event),
    });
    holder.append(picture, over);
    const low = h("span", {});
    const high = h("span", {});
    const bar = h("div", { class: "qtx-bar", "aria-hidden": "true" });
    const unit = h("span", { class: "qtx-unit" });
    const box = h("figure", {}, title, holder, h("div", { class: "qtx-bar-row" }, low, bar, high), unit);
    return { name, holder, picture, over, title, low, high, bar, unit, box };
  });

  const readout = h("p", { class: "qtx-readout" });
  const spoken = h("p", { class: "qtx-hidden", "aria-live": "polite" });
  const status = h("p", { class: "qtx-status", role: "status" });
  const heading = h("h2", {});

  frame.root.append(
    h("header", {}, heading, frame.exports()),
    h(
      "div",
      { class: "qtx-columns" },
      h(
        "div",
        { class: "qtx-controls" },
        h("div", { class: "qtx-field" }, h("span", {}, "Draws per row, S"), drawsText, slider),
        h("div", { class: "qtx-field" }, h("span", {}, "Layers down, heads across"), heads, scaleNote),
        h("label", { class: "qtx-check" }, logBox, "logarithmic colours"),
        h(
          "div",
          { class: "qtx-modes", role: "radiogroup", "aria-label": "what dragging does" },
          h("span", {}, "Drag to"),
          mode("rows", "select rows"),
          mode("zoom", "zoom"),
        ),
        h("div", { class: "qtx-buttons" }, reset, clear),
      ),
      h(
        "div",
        { class: "qtx-picture" },
        h("div", { class: "qtx-maps" }, ...panels.map((p) => p.box)),
        readout,
      ),
    ),
    frame.error,
    status,
    spoken,
    h("p", { class: "qtx-hidden", id: helpId }, help),
  );

  // --- what is asked of the kernel --------------------------------------------------------------

  function size(): [number, number] {
    const width = Math.max(80, panels[0].holder.clientWidth - LEFT - 2);
    return [width, Math.round(Math.min(width, Math.max(width * 0.6, (width * rows) / columns)))];
  }

  const tileName = (layer: number, head: number, level: number, i: number, j: number) =>
    `${layer}/${head}/${level}/${i}/${j}`;

  function ask(since: number | null = null): void {
    const [layer, head] = [get("layer"), get("head")];
    const [width, height] = size();
    const ratio = window.devicePixelRatio || 1;
    const level = maps.levelFor(view, width * ratio, height * ratio, most);
    const wanted = maps.tilesOf(view, level);
    const fresh = !shown || shown.layer !== layer || shown.head !== head || shown.draws !== draws;
    const missing = wanted.filter(([i, j]) => !exact.get(tileName(layer, head, level, i, j)));
    const undrawn = fresh
      ? wanted
      : wanted.filter(([i, j]) => !sampled.get(tileName(layer, head, level, i, j)));
    if (missing.length + undrawn.length === 0) {
      if (shown) shown.level = level;
      return;
    }
    seq += 1;
    if (since !== null) asked.set(seq, since);
    if (
      frame.send({ kind: "maps", view: me, seq, layer, head, draws, level, exact: missing, sampled: undrawn })
    )
      frame.root.toggleAttribute("data-waiting", true);
  }

  let later = 0;
  /** Once the slider rests: they take the kernel longer than a picture. */
  function askThumbnails(wait = 600): void {
    heads.toggleAttribute("data-stale", true);
    clearTimeout(later);
    later = window.setTimeout(() => frame.send({ kind: "thumbnails", draws }), wait);
  }
  frame.atEnd(() => clearTimeout(later));

  frame.onMessage((message, buffers) => {
    if (message.kind === "thumbnails") thumbnails(message, buffers);
    if (message.kind !== "maps" || message.view !== me) return;
    if (shown && message.seq < shown.seq) return;
    const fresh =
      !shown || shown.layer !== message.layer || shown.head !== message.head || shown.draws !== message.draws;
    if (fresh) sampled = new maps.Tiles(96);
    message.tiles.forEach((tile: any, i: number) => {
      const codes = new Uint16Array(
        buffers[i].buffer.slice(buffers[i].byteOffset, buffers[i].byteOffset + buffers[i].byteLength),
      );
      const store = tile.map === "exact" ? exact : sampled;
      store.put(tileName(message.layer, message.head, message.level, tile.i, tile.j), {
        rows: tile.rows,
        columns: tile.columns,
        codes,
      });
    });
    const last = buffers[message.tiles.length];
    const table = new Float32Array(last.buffer.slice(last.byteOffset, last.byteOffset + last.byteLength));
    facts = {
      keys: table.subarray(0, rows),
      distinct: table.subarray(rows, 2 * rows),
      error: table.subarray(2 * rows, 3 * rows),
      told: table.subarray(3 * rows),
    };
    error = message.error;
    shown = {
      layer: message.layer,
      head: message.head,
      draws: message.draws,
      level: message.level,
      seq: message.seq,
    };
    frame.fail(message.fallbacks.length ? message.fallbacks.join(" ") : null);
    if (message.seq === seq) frame.root.toggleAttribute("data-waiting", false);
    paint();
  });

  // --- painting ---------------------------------------------------------------------------------

  let palette: { log: boolean; top: number; colours: Uint32Array } | null = null;
  function paletteFor(log: boolean, top: number): Uint32Array {
    if (!palette || palette.log !== log || (!log && palette.top !== top)) {
      palette = { log, top, colours: maps.paletteOf(log, top) };
    }
    return palette.colours;
  }

  const paint = onFrame(() => {
    if (!frame.hasRoom()) return;
    const [width, height] = size();
    const log: boolean = get("log_scale");
    logBox.checked = log;
    tellDraws();
    if (shown) {
      const level = shown.level;
      const side = 1 << level;
      const row = Math.floor(view.r0 / side);
      const column = Math.floor(view.c0 / side);
      const count = Math.min(Math.ceil(rows / side), Math.ceil(view.r1 / side)) - row;
      const across = Math.min(Math.ceil(columns / side), Math.ceil(view.c1 / side)) - column;
      const { layer, head } = shown;
      const of = (tiles: maps.Tiles) =>
        maps.region((i, j) => tiles.get(tileName(layer, head, level, i, j)), row, column, count, across);
      const [a, b] = [of(exact), of(sampled)];
      let top = 0;
      let limit = maps.FLOOR;
      for (let i = 0; i < a.length; i++) {
        if (a[i] === 0xffff || b[i] === 0xffff) continue;
        const [x, y] = [maps.HALF[a[i]], maps.HALF[b[i]]];
        if (x > top) top = x;
        if (Math.abs(y - x) > limit) limit = Math.abs(y - x);
      }
      const palette = paletteFor(log, top || 1);
      const blank = 0;
      const image = new ImageData(across, count);
      const pixels = new Uint32Array(image.data.buffer);
      for (const panel of panels) {
        for (let r = 0; r < count; r++) {
          const lastRow = Math.min(rows, (row + r + 1) * side) - 1;
          for (let c = 0; c < across; c++) {
            const i = r * across + c;
            if (causal && (column + c) * side > lastRow) pixels[i] = blank;
            else if (a[i] === 0xffff || (panel.name !== "exact" && b[i] === 0xffff)) pixels[i] = blank;
            else if (panel.name === "exact") pixels[i] = palette[a[i]];
            else if (panel.name === "sampled") pixels[i] = palette[b[i]];
            else
              pixels[i] =
                maps.diverging[Math.round(127.5 + (127.5 * (maps.HALF[b[i]] - maps.HALF[a[i]])) / limit)];
          }
        }
        drawMap(panel, image, width, height, row * side, column * side, side);
        const signed = panel.name === "difference";
        panel.bar.style.backgroundImage = maps.gradient(signed ? maps.diverging : maps.sequential);
        panel.low.textContent = signed ? `−${digits(limit, 2)}` : log ? `≤ ${label(maps.FLOOR)}` : "0";
        panel.high.textContent = signed ? `+${digits(limit, 2)}` : log ? "1" : digits(top, 2);
        panel.unit.textContent = signed
          ? "difference of weights"
          : `attention weight${log ? ", log scale" : ""}`;
      }
      for (const [number, time] of asked) {
        if (number > shown.seq) continue;
        asked.delete(number);
        latencies.push(performance.now() - time);
      }
      if (latencies.length > 1000) latencies.splice(0, 500);
      frame.root.dataset.latencies = JSON.stringify(latencies.slice(-200).map((x) => Math.round(x)));
      frame.root.dataset.draws = String(shown.draws);
      frame.root.dataset.level = String(shown.level);
    }
    paintOver();
    titles();
  });

  function drawMap(
    panel: (typeof panels)[number],
    image: ImageData,
    width: number,
    height: number,
    row: number,
    column: number,
    side: number,
  ): void {
    const context = sharp(panel.picture, width + LEFT + 2, height + TOP + BOTTOM);
    context.clearRect(0, 0, width + LEFT + 2, height + TOP + BOTTOM);
    const off = new OffscreenCanvas(image.width, image.height);
    off.getContext("2d")!.putImageData(image, 0, 0);
    const perRow = height / (view.r1 - view.r0);
    const perColumn = width / (view.c1 - view.c0);
    context.save();
    context.beginPath();
    context.rect(LEFT, TOP, width, height);
    context.clip();
    context.fillStyle = frame.colours.panel;
    context.fillRect(LEFT, TOP, width, height);
    context.imageSmoothingEnabled = false;
    const [x, y] = [LEFT + (column - view.c0) * perColumn, TOP + (row - view.r0) * perRow];
    context.drawImage(off, x, y, image.width * side * perColumn, image.height * side * perRow);
    context.restore();
    context.strokeStyle = frame.colours.muted;
    context.lineWidth = 1;
    context.strokeRect(LEFT - 0.5, TOP - 0.5, width + 1, height + 1);
    context.fillStyle = frame.colours.text;
    axis(context, width, height, perRow, perColumn);
  }

  function axis(
    context: CanvasRenderingContext2D,
    width: number,
    height: number,
    perRow: number,
    perColumn: number,
  ): void {
    const letters = tokens.length === columns;
    const longest = letters ? Math.max(...tokens.map((token) => Math.min(6, token.length))) : 0;
    const small = "10px system-ui, sans-serif";
    const mono = "10px ui-monospace, monospace";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const each = (
      low: number,
      high: number,
      per: number,
      write: (i: number, text: string, at: number) => void,
      named: boolean,
    ) => {
      context.font = named ? mono : small;
      if (named) {
        for (let i = Math.ceil(low); i < high; i++) write(i, tokens[i] ?? "", (i + 0.5 - low) * per);
      } else {
        for (const i of ticks(low, high - 1, Math.max(2, (per * (high - low)) / 48))) {
          if (Number.isInteger(i)) write(i, label(i), (i + 0.5 - low) * per);
        }
      }
    };
    const square = rows === columns;
    each(
      view.r0,
      view.r1,
      perRow,
      (_, text, at) => context.fillText(text.slice(0, 5), LEFT - 4, Math.max(TOP + 5, TOP + at)),
      letters && square && perRow >= 10,
    );
    context.textAlign = "center";
    context.textBaseline = "top";
    each(
      view.c0,
      view.c1,
      perColumn,
      (_, text, at) => {
        const x = LEFT + at;
        const half = context.measureText(text).width / 2;
        context.fillText(text.slice(0, 6), Math.min(x, LEFT + width - half + 2), TOP + height + 5);
      },
      letters && perColumn >= 6.5 * longest + 3,
    );
    context.font = small;
    context.fillText("key", LEFT + width / 2, TOP + height + 19);
    context.save();
    context.translate(2, TOP + height / 2);
    context.rotate(-Math.PI / 2);
    context.fillText("query", 0, 0);
    context.restore();
  }

  const paintOver = onFrame(() => {
    if (!frame.hasRoom()) return;
    const [width, height] = size();
    const perRow = height / (view.r1 - view.r0);
    const perColumn = width / (view.c1 - view.c0);
    const selected: number[] = get("selected_rows");
    const live = brush && dragging === "rows" ? maps.brushed(brush.from[0], brush.to[0], rows) : selected;
    for (const panel of panels) {
      const context = sharp(panel.over, width + LEFT + 2, height + TOP + BOTTOM);
      context.clearRect(0, 0, width + LEFT + 2, height + TOP + BOTTOM);
      context.save();
      context.beginPath();
      context.rect(0, TOP, LEFT + width, height);
      context.clip();
      for (const [first, last] of maps.runs(live)) {
        const y = TOP + (first - view.r0) * perRow;
        const tall = Math.max(2, (last - first + 1) * perRow);
        context.fillStyle = frame.colours.accent;
        context.fillRect(LEFT - 4, y, 4, tall);
        context.globalAlpha = 0.2;
        context.fillRect(LEFT, y, width, tall);
        context.globalAlpha = 1;
        context.strokeStyle = frame.colours.accent;
        context.strokeRect(LEFT + 0.5, y, width - 1, tall);
      }
      if (brush && dragging === "zoom") {
        const [r, c] = [Math.min(brush.from[0], brush.to[0]), Math.min(brush.from[1], brush.to[1])];
        const [r2, c2] = [Math.max(brush.from[0], brush.to[0]) + 1, Math.max(brush.from[1], brush.to[1]) + 1];
        context.strokeStyle = frame.colours.accent;
        context.lineWidth = 2;
        context.strokeRect(
          LEFT + (c - view.c0) * perColumn,
          TOP + (r - view.r0) * perRow,
          (c2 - c) * perColumn,
          (r2 - r) * perRow,
        );
      }
      if (cursor) {
        const [x, y] = [
          LEFT + (cursor[1] + 0.5 - view.c0) * perColumn,
          TOP + (cursor[0] + 0.5 - view.r0) * perRow,
        ];
        for (const [colour, thick] of [
          [frame.colours.background, 3],
          [frame.colours.exact, 1],
        ] as const) {
          context.strokeStyle = colour;
          context.lineWidth = thick;
          context.globalAlpha = thick === 3 ? 0.6 : 1;
          context.beginPath();
          context.moveTo(LEFT, y);
          context.lineTo(x - 6, y);
          context.moveTo(x + 6, y);
          context.lineTo(LEFT + width, y);
          context.moveTo(x, TOP);
          context.lineTo(x, y - 6);
          context.moveTo(x, y + 6);
          context.lineTo(x, TOP + height);
          context.stroke();
        }
      }
      context.restore();
    }
    tell(live);
  });

  // --- words ------------------------------------------------------------------------------------

  function tellDraws(): void {
    const index = counts.findIndex((count) => count >= draws);
    if (document.activeElement !== slider || counts[Number(slider.value)] !== draws)
      slider.value = String(index);
    drawsText.textContent = whole(draws);
    slider.setAttribute("aria-valuetext", `${draws} draws`);
  }

  function titles(): void {
    const percent = error < 1e-4 ? "less than 0.01" : digits(100 * error, 2);
    const off = Number.isFinite(error) ? `: the output is off by ${percent} %` : "";
    heading.textContent = `Layer ${get("layer")}, head ${get("head")}${off}`;
    const sampler = get("sampler");
    const names = {
      exact: "exact",
      sampled: `${sampler}, ${!shown ? "…" : shown.draws === 1 ? "1 draw" : `${whole(shown.draws)} draws`}`,
      difference: `${sampler} − exact`,
    };
    for (const panel of panels) {
      panel.title.textContent = names[panel.name];
      panel.holder.setAttribute("aria-label", `${names[panel.name]}, ${rows} queries by ${columns} keys`);
    }
  }

  function named(position: number, square: boolean): string {
    const token = square ? tokens[position] : undefined;
    return token === undefined ? String(position) : `${position} “${token}”`;
  }

  function weights(row: number, column: number): [number, number] | null {
    if (!shown) return null;
    const { layer, head, level } = shown;
    const [r, c] = [row >> level, column >> level];
    const name = tileName(layer, head, level, Math.floor(r / maps.TILE), Math.floor(c / maps.TILE));
    const [a, b] = [exact.get(name), sampled.get(name)];
    if (!a || !b) return null;
    const index = (r % maps.TILE) * a.columns + (c % maps.TILE);
    return [maps.HALF[a.codes[index]], maps.HALF[b.codes[index]]];
  }

  function tell(live: number[]): void {
    const size = live.length === 1 ? "1 row selected" : `${live.length} rows selected`;
    status.textContent = `${live.length ? size : "no rows selected"} · n = ${whole(columns)} keys, ${whole(rows)} queries · ${get("sampler")}`;
    clear.disabled = live.length === 0;
    readout.replaceChildren();
    if (!cursor || !facts) {
      readout.append("Point at a cell for its numbers.");
      return;
    }
    const [row, column] = cursor;
    const found = weights(row, column);
    const cell = h("span", {}, `query ${named(row, rows === columns)} → key ${named(column, true)}: `);
    if (causal && column > row) cell.append("masked");
    else if (found) {
      const [p, q] = found;
      const mean = shown!.level ? ` (mean of ${1 << shown!.level} × ${1 << shown!.level} cells)` : "";
      cell.append(`exact ${digits(p, 3)}, sampled ${digits(q, 3)}, difference ${digits(q - p, 2)}${mean}`);
    }
    const told = facts.told[row];
    const predicted = Number.isFinite(told) ? `, predicted ${digits(told, 2)}` : "";
    const of = `row: ${digits(facts.keys[row], 3)} effective keys, ${whole(facts.distinct[row])} distinct drawn, error ${digits(facts.error[row], 2)} of the output${predicted}`;
    readout.append(cell, h("span", {}, of));
  }

  // --- hands ------------------------------------------------------------------------------------

  function cellAt(name: Name, event: MouseEvent): [number, number] | null {
    const panel = panels.find((p) => p.name === name)!;
    const box = panel.holder.getBoundingClientRect();
    const [width, height] = size();
    const row = view.r0 + ((event.clientY - box.top - TOP) / height) * (view.r1 - view.r0);
    const column = view.c0 + ((event.clientX - box.left - LEFT) / width) * (view.c1 - view.c0);
    if (!brush && (row < view.r0 || row >= view.r1 || column >= view.c1)) return null;
    return [
      Math.min(rows - 1, Math.max(0, Math.floor(row))),
      Math.min(columns - 1, Math.max(0, Math.floor(column))),
    ];
  }

  function point(name: Name, event: PointerEvent): void {
    const at = cellAt(name, event);
    if (brush && at) brush.to = at;
    cursor = at;
    paintOver();
  }

  function release(): void {
    if (!brush) return;
    const { from, to } = brush;
    brush = null;
    if (dragging === "rows") select(maps.brushed(from[0], to[0], rows));
    else if (Math.abs(from[0] - to[0]) + Math.abs(from[1] - to[1]) > 1) {
      view = {
        r0: Math.min(from[0], to[0]),
        r1: Math.max(from[0], to[0]) + 1,
        c0: Math.min(from[1], to[1]),
        c1: Math.max(from[1], to[1]) + 1,
      };
      ask();
      paint();
    }
    paintOver();
  }

  function select(chosen: number[]): void {
    anchor = null;
    frame.set({ selected_rows: chosen });
    paintOver();
  }

  function zoom(at: [number, number], factor: number): void {
    view = maps.zoomed(view, at[0] + 0.5, at[1] + 0.5, factor, rows, columns);
    ask();
    paint();
  }

  function key(event: KeyboardEvent): void {
    const at: [number, number] = cursor ?? [
      Math.floor((view.r0 + view.r1) / 2),
      Math.floor((view.c0 + view.c1) / 2),
    ];
    const step = event.altKey ? 16 : 1;
    const move: Record<string, [number, number]> = {
      ArrowUp: [-step, 0],
      ArrowDown: [step, 0],
      ArrowLeft: [0, -step],
      ArrowRight: [0, step],
    };
    if (event.key in move) {
      const [dr, dc] = move[event.key];
      cursor = [
        Math.min(rows - 1, Math.max(0, at[0] + (cursor ? dr : 0))),
        Math.min(columns - 1, Math.max(0, at[1] + (cursor ? dc : 0))),
      ];
      if (event.shiftKey && dr) {
        const from: number = anchor ?? at[0];
        select(maps.brushed(from, cursor[0], rows));
        anchor = from;
      } else anchor = null;
      follow(cursor);
      setTimeout(() => (spoken.textContent = readout.textContent), 200);
    } else if (event.key === "+" || event.key === "=") zoom(at, 0.5);
    else if (event.key === "-") zoom(at, 2);
    else if (event.key === "0") reset.click();
    else if (event.key === "Escape") select([]);
    else return;
    event.preventDefault();
    event.stopPropagation();
    paintOver();
  }

  /** Shift the viewport so that the cursor is in it. */
  function follow([row, column]: [number, number]): void {
    const shift = (low: number, high: number, at: number) =>
      at < low ? at - low : at + 1 > high ? at + 1 - high : 0;
    const [dr, dc] = [shift(view.r0, view.r1, row), shift(view.c0, view.c1, column)];
    if (!dr && !dc) return;
    view = { r0: view.r0 + dr, r1: view.r1 + dr, c0: view.c0 + dc, c1: view.c1 + dc };
    ask();
    paint();
  }

  // --- thumbnails -------------------------------------------------------------------------------

  const [layers, across]: [number, number] = [get("layers"), get("heads")];
  heads.style.setProperty("--qtx-across", String(across));
  const variance: (number | null)[] = Array(layers * across).fill(null);
  const thumbs = Array.from({ length: layers * across }, (_, index) => {
    const [layer, head] = [Math.floor(index / across), index % across];
    const canvas = h("canvas", { width: 1, height: 1, "aria-hidden": "true" });
    return h(
      "button",
      {
        type: "button",
        role: "radio",
        click: () => choose(layer, head),
        keydown: (event: KeyboardEvent) => {
          const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[event.key];
          if (step === undefined) return;
          event.preventDefault();
          event.stopPropagation();
          const next = index + step;
          if (next < 0 || next >= thumbs.length) return;
          choose(Math.floor(next / across), next % across);
          thumbs[next].focus();
        },
      },
      canvas,
    );
  });
  heads.append(...thumbs);

  function choose(layer: number, head: number): void {
    frame.set({ layer, head });
  }

  function markHeads(): void {
    const current = get("layer") * across + get("head");
    const known = variance.filter((x): x is number => x !== null && x > 0);
    const [low, high] = [Math.min(...known), Math.max(...known)];
    thumbs.forEach((thumb, index) => {
      const x = variance[index];
      thumb.setAttribute("aria-checked", String(index === current));
      thumb.tabIndex = index === current ? 0 : -1;
      const name = `layer ${Math.floor(index / across)}, head ${index % across}`;
      const text = x === null ? name : `${name}, relative variance ${digits(x, 2)}`;
      thumb.setAttribute("aria-label", text);
      thumb.title = text;
      if (x !== null) {
        const place = high > low ? Math.log(Math.max(x, low) / low) / Math.log(high / low) : 0.5;
        thumb.style.setProperty("--qtx-variance", maps.css(maps.sequential, place));
      }
    });
    scaleNote.replaceChildren();
    if (known.length) {
      const bar = h("div", { class: "qtx-bar", "aria-hidden": "true" });
      bar.style.backgroundImage = maps.gradient(maps.sequential);
      scaleNote.append(
        h(
          "div",
          { class: "qtx-bar-row" },
          h("span", {}, digits(low, 2)),
          bar,
          h("span", {}, digits(high, 2)),
        ),
        h("span", { class: "qtx-unit" }, "border: relative variance, log"),
      );
    }
  }

  function thumbnails(message: any, buffers: DataView[]): void {
    const spread = new Float32Array(
      buffers[0].buffer.slice(buffers[0].byteOffset, buffers[0].byteOffset + 4 * across),
    );
    const { layer, rows: tall, columns: wide } = message;
    const codes = buffers[1];
    for (let head = 0; head < across; head++) {
      variance[layer * across + head] = spread[head];
      const image = new ImageData(wide, tall);
      const pixels = new Uint32Array(image.data.buffer);
      for (let i = 0; i < pixels.length; i++) {
        const p = maps.HALF[codes.getUint16(2 * (head * pixels.length + i), true)];
        pixels[i] = maps.sequential[Math.round(255 * maps.share(p, true, 1))];
      }
      const canvas = thumbs[layer * across + head].firstElementChild as HTMLCanvasElement;
      [canvas.width, canvas.height] = [wide, tall];
      canvas.getContext("2d")!.putImageData(image, 0, 0);
    }
    if (layer === layers - 1 && message.draws === draws) heads.toggleAttribute("data-stale", false);
    markHeads();
  }

  // --- beginning --------------------------------------------------------------------------------

  frame.onChange(["layer", "head"], () => {
    markHeads();
    ask();
    paint();
  });
  frame.onChange(["num_samples"], () => {
    if (get("num_samples") === draws) return;
    draws = get("num_samples");
    tellDraws();
    ask();
    askThumbnails();
  });
  frame.onChange(["log_scale"], paint);
  frame.onChange(["selected_rows"], paintOver);
  markHeads();
  tellDraws();
  titles();
  requestAnimationFrame(() => {
    ask();
    askThumbnails(0);
    paint();
  });
  return () => frame.end();
}
