// AttentionLens: the exact, sampled and difference maps of a head, and thumbnails of all heads.
import { Frame, h, onFrame, unique, type Model } from "./dom";
import { extremes, paintMap, paintOverlay, roomForAxes, type Cell, type Geometry } from "./lens_canvas";
import { gesturesOn, HELP, KEYS_HINT } from "./lens_gestures";
import { cellText, findingText, mapPanel, NAMES, panelTitles, readFacts, rowText } from "./lens_panels";
import { LocalHeads } from "./lens_local";
import type { MapName, MapPanel, RowFacts } from "./lens_panels";
import { connect, type MapsRequest, type RowRequest } from "./lens_requests";
import { measuredStrip, samplerColour } from "./lens_strip";
import { thumbnailGrid } from "./lens_thumbnails";
import { tokensPart } from "./lens_tokens";
import * as maps from "./maps";
import { whole } from "./scale";

const VISIBLE_SPACE: Record<string, string> = { " ": "·", "\n": "⏎", "\t": "→" };
/** Tiles that stay in memory, of each of the two maps. */
const MAX_TILES = 96;
/** Milliseconds without a gesture after which a large map is computed sharply. */
const REFINE_DELAY_MS = 120;
/** Milliseconds without a gesture after which the kernel draws anew what the browser has drawn. */
const CONFIRM_DELAY_MS = 250;
/** Milliseconds after which a lens says that it waits for the kernel. */
const WAIT_NOTE_DELAY_MS = 500;
/** Share of the window's height that a map alone fills at most. */
const MAX_HEIGHT_SHARE = 0.85;
/** Milliseconds without a change of the slider after which the thumbnails are drawn anew. */
const THUMBNAIL_DELAY_MS = 600;
/** Repaints whose duration is remembered, for the tests. */
const MAX_LATENCIES = 200;

/** What is on the screen. */
interface Shown {
  layer: number;
  head: number;
  drawing: string;
  draws: number | null;
  level: maps.Level;
  seq: number;
  /** Rows on which the error is measured. */
  measuredRows: number;
  /** ‖ô − o‖ / ‖o‖; null until the kernel has measured it. */
  error: number | null;
  stdError: number | null;
  sampler: string;
  effort: string;
  /** Whether control variates correct the output, which maps of weights cannot show. */
  corrected: boolean;
  seed: string;
}

const floats = ({ buffer, byteOffset, byteLength }: DataView): Float32Array =>
  new Float32Array(buffer.slice(byteOffset, byteOffset + byteLength) as ArrayBuffer);

/** Buttons that bring into sight what lies below the maps, and so often below the window's edge. */
function jumps(places: [string, HTMLElement | undefined][]): HTMLElement {
  const buttons = places.map(([name, element]) => {
    const jump = () => element?.scrollIntoView({ block: "start", behavior: "smooth" });
    return element ? h("button", { type: "button", click: jump }, name) : "";
  });
  return h("span", { class: "qtx-jumps", role: "group", "aria-label": "Further down" }, ...buttons);
}

export function render(model: Model, el: HTMLElement): () => void {
  const get = (name: string) => model.get(name);
  const rows: number = get("num_queries");
  const columns: number = get("num_keys");
  const tokens = (get("tokens") as string[]).map((token) => VISIBLE_SPACE[token] ?? token);
  const counts: number[] = get("draw_counts");
  const causal: boolean = get("is_causal");
  const coarsest = maps.overviewLevel(rows, columns, maps.TILE);
  const large = rows * columns > maps.MAX_WHOLE_CELLS;
  const overview = maps.overviewLevel(rows, columns, maps.OVERVIEW);
  const floor = maps.floorFor(columns);
  const viewId = unique("lens");
  const wholeMap = (): maps.Viewport => ({ r0: 0, r1: rows, c0: 0, c1: columns });

  let view = wholeMap();
  let draws: number = get("num_samples");
  let shown: Shown | null = null;
  let facts = new Map<number, RowFacts>();
  let main: MapName = "sampled"; // the largest of the three where there is no room for three as large
  let alone = false; // whether only that one is shown
  const exact = new maps.Tiles(MAX_TILES);
  let sampled = new maps.Tiles(MAX_TILES);

  const frame = new Frame(model, el, "lens", "Attention lens", () => {
    if (!frame.hasRoom()) return; // a level would be chosen for a map of no size
    requestMaps();
    paint();
  });

  const gestures = gesturesOn({
    rows,
    columns,
    view: () => view,
    show: (part) => show(part),
    showWhole: () => showWhole(),
    holder: (name) => panelOf(name).holder,
    geometry: (name) => geometry(panelOf(name)),
    select: (chosen) => {
      frame.set({ selected_rows: chosen });
      paintOver();
    },
    enlarge: (name) => enlarge(name),
    isAlone: () => alone,
    paintOver: () => paintOver(),
    speak: () => (spoken.textContent = readout.textContent),
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
      if (!get("own_draws")) frame.set({ own_draws: true });
      showDraws();
      requestMaps(performance.now());
    },
    change: () => {
      frame.set({ num_samples: draws, own_draws: true });
      requestThumbnails();
    },
  });
  const drawsText = h("output", { class: "qtx-value" });
  const setLog = () => frame.set({ log_scale: logBox.checked });
  const logBox = h("input", { type: "checkbox", change: setLog });
  const modeName = unique("mode");
  const mode = (value: "rows" | "zoom", name: string) => {
    const change = () => (gestures.dragging = value);
    const checked = value === gestures.dragging;
    return h("label", {}, h("input", { type: "radio", name: modeName, value, checked, change }), name);
  };
  const show = (part: maps.Viewport) => {
    view = part;
    requestMaps();
    paint();
  };
  const showWhole = () => show(wholeMap());
  const reset = h("button", { type: "button", click: showWhole }, "Whole map");
  const clear = h("button", { type: "button", click: () => gestures.select([]) }, "Clear rows");
  const choose = (layer: number, head: number) => frame.set({ layer, head });
  const thumbnails = thumbnailGrid(get("layers"), get("heads"), causal, choose, (drawn) =>
    frame.set({ drawn_heads: drawn }),
  );
  const showDrawn = () => thumbnails.showDrawn(get("drawn_heads") ?? null);

  /** The estimate that was given, where it is what is shown of this head. */
  function given(): { number: number; draws: number | null } | null {
    const stated = get("given");
    if (get("own_draws") || stated.layer !== get("layer")) return null;
    return stated.head === null || stated.head === get("head") ? stated : null;
  }
  const drawing = () => (given() ? `given ${given()!.number}` : `${get("sampler")} ${draws}`);

  function showDraws(): void {
    const index = counts.findIndex((count) => count >= draws);
    if (document.activeElement !== slider || counts[Number(slider.value)] !== draws)
      slider.value = String(index);
    const byTolerance = given()?.draws === null;
    drawsText.textContent = byTolerance ? "by tolerance" : whole(draws);
    slider.setAttribute("aria-valuetext", byTolerance ? "by tolerance" : `${draws} draws`);
  }

  const text: string[] = get("tokens");
  const square = rows === columns;
  const tokenView = text.length === columns ? tokensPart(text, causal, square ? pointAtToken : null) : null;
  const strip = measuredStrip({
    frame,
    view: viewId,
    rows,
    shown: () => shown,
    ask: (request) => void ask(request),
  });

  function pointAtToken(row: number): void {
    gestures.cursor = [row, gestures.cursor?.[1] ?? row];
    paintOver();
  }

  // --- layout -----------------------------------------------------------------------------------

  const helpId = unique("help");
  const panels = NAMES.map((name) => mapPanel(name, helpId, gestures.listeners(name), () => enlarge(name)));
  const panelOf = (name: MapName) => panels.find((panel) => panel.name === name)!;
  const readout = h("p", { class: "qtx-readout" });
  const spoken = h("p", { class: "qtx-hidden", "aria-live": "polite" });
  const status = h("p", { class: "qtx-status", role: "status" });
  const heading = h("h2", {});
  const effort = h("span", {});
  const back = h(
    "button",
    { type: "button", click: () => frame.set({ own_draws: false }) },
    "Back to the estimate",
  );
  const places: [string, HTMLElement | undefined][] = [
    ["Error against draws", strip.element],
    ["All heads", thumbnails.element],
    ["Text", tokenView?.element],
  ];
  const caption = h("p", { class: "qtx-caption" }, effort, back, jumps(places));
  const controls = h(
    "div",
    { class: "qtx-toolbar" },
    h("div", { class: "qtx-draws" }, h("span", {}, "Draws per row, S"), slider, drawsText),
    h("label", { class: "qtx-check", title: "Logarithmic colours" }, logBox, "log colours"),
    h(
      "div",
      { class: "qtx-modes", role: "radiogroup", "aria-label": "what dragging does" },
      h("span", {}, "Drag to"),
      mode("rows", "select rows"),
      mode("zoom", "zoom"),
    ),
  );
  const boxes = h("div", { class: "qtx-maps" }, ...panels.map((panel) => panel.box));
  const savePage = h(
    "button",
    {
      type: "button",
      title: "Save a page that draws anew without a kernel",
      click: () => frame.send({ kind: "page" }),
    },
    "Page",
  );
  const below = h("div", { class: "qtx-below" }, readout, frame.error, status, clear, reset);
  frame.root.append(
    h("header", {}, heading, frame.exports(savePage)),
    caption,
    controls,
    h("div", { class: "qtx-picture" }, boxes, below, strip.element),
    thumbnails.element,
    tokenView?.element ?? "",
    spoken,
    h("p", { class: "qtx-hidden", id: helpId }, HELP),
  );

  function geometry(panel: MapPanel): Geometry {
    const axes = roomForAxes(panel.holder.clientWidth, panel.name === main);
    const width = Math.max(80, panel.holder.clientWidth - axes.left - 2);
    const square = Math.min(width, Math.max(width * 0.6, (width * rows) / columns));
    const most = alone ? Math.max(380, MAX_HEIGHT_SHARE * window.innerHeight) : Infinity;
    return { view, width, height: Math.round(Math.min(square, most)), rows, columns, ...axes };
  }
  const visiblePanels = () => panels.filter((panel) => panel.holder.clientWidth > 0);
  const largest = () => geometry(panelOf(main));

  /** Shows a map alone, over the whole width, or all three again. */
  function enlarge(name: MapName): void {
    const focused = document.activeElement === panelOf(main).holder;
    alone = !(alone && main === name);
    main = name;
    showLayout();
    if (focused) panelOf(main).holder.focus({ preventScroll: true });
    requestMaps();
    paint();
  }

  function showLayout(): void {
    boxes.toggleAttribute("data-alone", alone);
    boxes.dataset.main = main;
    for (const panel of panels) {
      panel.box.toggleAttribute("data-main", panel.name === main);
      panel.showEnlarged(alone);
    }
  }
  showLayout();

  // --- requests to the kernel -------------------------------------------------------------------

  let seq = 0;
  const startTimes = new Map<number, number>();
  const latencies: number[] = [];

  const tileName = (layer: number, head: number, level: maps.Level, i: number, j: number) =>
    `${layer}/${head}/${level.rows}/${level.columns}/${i}/${j}`;

  let waits = ""; // what is said while the kernel has not answered
  let waitTimer = 0;
  frame.atEnd(() => clearTimeout(waitTimer));

  /** Dims the maps while the kernel draws, and says so where that takes longer than a moment. */
  function markWaiting(waiting: boolean): void {
    frame.root.toggleAttribute("data-waiting", waiting);
    clearTimeout(waitTimer);
    if (waiting)
      waitTimer = window.setTimeout(() => sayWaiting("The kernel is drawing …"), WAIT_NOTE_DELAY_MS);
    else sayWaiting("");
  }

  function sayWaiting(note: string): void {
    if (waits === note) return;
    waits = note;
    showCaption();
  }

  /** The last request, until it is answered. */
  let unanswered = "";
  let refineTimer = 0;
  frame.atEnd(() => clearTimeout(refineTimer));

  /** Asks for the tiles that are missing; `since` is the time of the movement that this follows.
   *
   * Of a large map the overview comes first, and what is in view becomes sharp when the gesture rests.
   */
  function requestMaps(since: number | null = null): void {
    if (!large) return requestTiles(sharpLevel(), view, since);
    clearTimeout(refineTimer);
    requestTiles(overview, wholeMap(), since);
    const refine = () => requestTiles(sharpLevel(), view, null, !frame.root.hasAttribute("data-confirmed"));
    refineTimer = window.setTimeout(refine, REFINE_DELAY_MS);
  }

  function sharpLevel(): maps.Level {
    const { width, height } = largest();
    // A cell of a large map, which takes long to compute, may have up to two pixels a side.
    const ratio = large ? 0.5 : window.devicePixelRatio || 1;
    return maps.levelFor(view, width * ratio, height * ratio, coarsest);
  }

  /** `confirming`: asks the kernel for what the browser has drawn, because only that knows standard errors. */
  function requestTiles(
    level: maps.Level,
    part: maps.Viewport,
    since: number | null,
    confirming = false,
  ): void {
    const [layer, head]: [number, number] = [get("layer"), get("head")];
    const visible = maps.tilesOf(part, level);
    const unknown = (tiles: maps.Tiles) =>
      visible.filter(([i, j]) => !tiles.get(tileName(layer, head, level, i, j)));
    const name = drawing();
    const drawnAnew = !shown || shown.layer !== layer || shown.head !== head || shown.drawing !== name;
    const missing = { exact: unknown(exact), sampled: drawnAnew || confirming ? visible : unknown(sampled) };
    if (missing.exact.length + missing.sampled.length === 0) {
      if (shown && shown.level !== level) {
        shown.level = level;
        paint();
      }
      return;
    }
    const stated = given();
    const drawn = { draws: stated ? null : draws, given: stated?.number ?? null, drawing: name };
    const place = { layer, head, level: level.columns, row_level: level.rows };
    const requestKey = JSON.stringify([place, drawn, missing]);
    if (requestKey === unanswered) return;
    unanswered = requestKey;
    seq += 1;
    if (since !== null) startTimes.set(seq, since);
    const request: MapsRequest = { kind: "maps", view: viewId, seq, ...place, ...drawn, ...missing };
    if (confirming) ask(request);
    else if (answerHere(request)) {
      if (!large) confirmSoon(); // a large map becomes sharp by the kernel
    } else if (ask(request)) markWaiting(true);
  }

  /** Heads of small maps, and overviews of large ones, which the browser draws itself. */
  const locals = new LocalHeads(rows, columns, causal);
  let confirmTimer = 0;
  frame.atEnd(() => clearTimeout(confirmTimer));

  /** Answers a request in the browser, if that has the head and its sampler; whether it has. */
  function answerHere(request: MapsRequest | RowRequest): boolean {
    const answer = locals.answer(request, get("sampler"));
    if (answer === null) return false;
    if (request.kind === "maps") takeMaps(...answer, false);
    else takeRow(...answer);
    return true;
  }

  function confirmSoon(): void {
    clearTimeout(confirmTimer);
    const confirm = () => requestTiles(sharpLevel(), view, null, true);
    confirmTimer = window.setTimeout(confirm, CONFIRM_DELAY_MS);
  }

  /** Asks for what the browser needs to draw the shown head itself. */
  function requestInputs(layer: number, head: number): void {
    if (!locals.lacks(layer, head)) return;
    locals.expect(layer, head);
    ask({ kind: "inputs", view: viewId, layer, head });
  }

  /** The query whose row is shown as text, and a name of what was asked for last. */
  let textRow = rows - 1;
  let askedRow = "";
  function requestRow(): void {
    if (!tokenView || !shown) return;
    if (gestures.cursor) textRow = gestures.cursor[0];
    const [layer, head]: [number, number] = [get("layer"), get("head")];
    const name = `${layer} ${head} ${drawing()} ${textRow}`;
    if (name === askedRow) return;
    askedRow = name;
    const [first, end] = tokenView.window(textRow);
    const stated = given();
    const drawn = { draws: stated ? null : draws, given: stated?.number ?? null, drawing: drawing() };
    const row = { kind: "row", view: viewId, layer, head, ...drawn, row: textRow, first, end } as const;
    if (!answerHere(row)) ask(row);
  }

  function takeRow(message: any, buffers: DataView[]): void {
    if (message.view !== viewId || !tokenView) return;
    const [exact, sampled, norms] = buffers.map(floats);
    const { row, first, sampler } = message;
    tokenView.show({ row, first, exact, sampled, norms }, sampler, samplerColour(sampler));
  }

  let thumbnailTimer = 0;
  /** Asks for thumbnails once the slider rests, because they take the kernel longer than a picture. */
  function requestThumbnails(delay = THUMBNAIL_DELAY_MS): void {
    thumbnails.markStale(true);
    clearTimeout(thumbnailTimer);
    const request = () => ask({ kind: "thumbnails", draws, given: !get("own_draws") });
    thumbnailTimer = window.setTimeout(request, delay);
  }
  frame.atEnd(() => clearTimeout(thumbnailTimer));

  function takeThumbnails(message: any, buffers: DataView[]): void {
    thumbnails.take(message, buffers);
    if (message.layer === get("layers") - 1 && message.draws === draws) thumbnails.markStale(false);
    thumbnails.mark(get("layer"), get("head"));
  }

  /** `confirmed`: whether the maps are the kernel's. */
  function takeMaps(message: any, buffers: DataView[], confirmed = true): void {
    if (message.view !== viewId || (shown && message.seq < shown.seq)) return;
    const { layer, head } = message;
    const level: maps.Level = { rows: message.row_level, columns: message.level };
    if (!shown || shown.layer !== layer || shown.head !== head || shown.drawing !== message.drawing) {
      sampled = new maps.Tiles(MAX_TILES);
      facts = new Map();
    }
    message.tiles.forEach((tile: any, i: number) => {
      const { buffer, byteOffset, byteLength } = buffers[i];
      const codes = new Uint16Array(buffer.slice(byteOffset, byteOffset + byteLength) as ArrayBuffer);
      const tiles = tile.map === "exact" ? exact : sampled;
      if (tile.map === "exact") exactTiles += 1;
      const name = tileName(layer, head, level, tile.i, tile.j);
      tiles.put(name, { rows: tile.rows, columns: tile.columns, codes });
    });
    const [rowBuffer, factBuffer] = buffers.slice(message.tiles.length);
    for (const [row, fact] of readFacts(rowBuffer, factBuffer)) facts.set(row, fact);
    const { seq: number, draws, drawing, error, sampler, effort, corrected, seed } = message;
    const [stdError, measuredRows] = [message.std_error, message.measured_rows];
    const known = { error, stdError, measuredRows, sampler, effort, corrected, seed };
    shown = { layer, head, level, draws, drawing, seq: number, ...known };
    frame.fail(message.fallbacks.length ? message.fallbacks.join(" ") : null);
    if (message.seq === seq) {
      unanswered = "";
      markWaiting(false);
    }
    frame.root.toggleAttribute("data-confirmed", confirmed);
    if (confirmed) requestInputs(layer, head);
    const sharp = sharpLevel();
    // The view may have changed since these were asked for, to one whose tiles were there already.
    if (!large && (sharp.rows !== level.rows || sharp.columns !== level.columns)) requestMaps();
    if (message.tiles.length > 0) paint();
    else paintFinding();
  }

  const take = (message: any, buffers: DataView[]) => {
    if (message.kind === "error") {
      unanswered = "";
      markWaiting(false);
    } else if (message.kind === "thumbnails") takeThumbnails(message, buffers);
    else if (message.kind === "maps") takeMaps(message, buffers);
    else if (message.kind === "row") takeRow(message, buffers);
    else if (message.kind === "strip") strip.take(message);
    else if (message.kind === "inputs" && message.view === viewId) locals.take(message, buffers);
  };
  const ask = connect(frame, get("layers"), take, (request) => {
    if (request.kind === "maps" && frame.root.hasAttribute("data-waiting"))
      sayWaiting("The kernel has not answered yet, and was asked again …");
  });

  // --- painting ---------------------------------------------------------------------------------

  /** How many tiles of exact maps have come, and of what the exact map was painted last: it stays while the slider
   * moves. */
  let exactTiles = 0;
  let paintedExact = "";

  let palette: { log: boolean; top: number; colours: Uint32Array } | null = null;
  function paletteFor(log: boolean, top: number): Uint32Array {
    if (!palette || palette.log !== log || (!log && palette.top !== top))
      palette = { log, top, colours: maps.paletteOf(log, top, floor) };
    return palette.colours;
  }

  const paint = onFrame(() => {
    if (!frame.hasRoom()) return;
    logBox.checked = get("log_scale");
    showDraws();
    if (shown) {
      paintMaps(shown);
      noteLatencies(shown);
      strip.request();
    }
    strip.paint();
    paintOver();
    showTitles();
  });

  /** Shows numbers that have come without maps. */
  const paintFinding = onFrame(() => {
    if (shown) noteLatencies(shown);
    paintOver();
    showTitles();
  });

  function paintMaps({ layer, head }: Shown): void {
    const level = large ? sharpLevel() : shown!.level;
    const [row, column] = [Math.floor(view.r0) >> level.rows, Math.floor(view.c0) >> level.columns];
    const size = {
      rows: Math.ceil(Math.min(rows, view.r1) / (1 << level.rows)) - row,
      columns: Math.ceil(Math.min(columns, view.c1) / (1 << level.columns)) - column,
    };
    const up = { rows: overview.rows - level.rows, columns: overview.columns - level.columns };
    const codes = (tiles: maps.Tiles) => {
      const at = (i: number, j: number) => tiles.get(tileName(layer, head, level, i, j));
      const known = maps.region(at, row, column, size.rows, size.columns);
      const coarse = large ? tiles.get(tileName(layer, head, overview, 0, 0)) : undefined;
      if (coarse)
        maps.fillFrom(known, row, column, size.columns, up, (r, c) => coarse.codes[r * coarse.columns + c]);
      return known;
    };
    const cells = { exact: codes(exact), sampled: codes(sampled), row, column, level, ...size };
    const { top, limit } = extremes(cells, floor);
    const log: boolean = get("log_scale");
    const colours = paletteFor(log, top || 1);
    const places = visiblePanels().map((panel) => ({ panel, g: geometry(panel) })); // before anything changes
    for (const { panel, g } of places) {
      if (panel.name === "exact") {
        const ratio = window.devicePixelRatio;
        const look = JSON.stringify([
          layer,
          head,
          exactTiles,
          level,
          size,
          g,
          log,
          log || top,
          frame.theme,
          ratio,
        ]);
        if (look === paintedExact) continue;
        paintedExact = look;
      }
      const colouring = { name: panel.name, palette: colours, limit, causal };
      paintMap(panel.picture, cells, colouring, g, tokens, frame.colours);
      panel.showScale(log, floor, top, limit);
    }
  }

  /** Writes down for the tests how long repaints took, and what is shown. */
  function noteLatencies(shown: Shown): void {
    for (const [number, time] of startTimes) {
      if (number > shown.seq) continue;
      startTimes.delete(number);
      latencies.push(performance.now() - time);
    }
    latencies.splice(0, latencies.length - MAX_LATENCIES);
    frame.root.dataset.latencies = JSON.stringify(latencies.map((x) => Math.round(x)));
    frame.root.dataset.draws = String(shown.draws ?? "given");
    frame.root.dataset.level = `${shown.level.rows} ${shown.level.columns}`;
    frame.root.dataset.measured = String(shown.measuredRows);
  }

  const paintOver = onFrame(() => {
    if (!frame.hasRoom()) return;
    const selected: number[] = get("selected_rows");
    const { brush, cursor, dragging } = gestures;
    const live = brush && dragging === "rows" ? maps.brushed(brush.from[0], brush.to[0], rows) : selected;
    const zoom: [Cell, Cell] | null = brush && dragging === "zoom" ? [brush.from, brush.to] : null;
    for (const panel of visiblePanels())
      paintOverlay(panel.over, geometry(panel), { rows: live, zoom, cursor }, frame.colours);
    showSelection(live);
    showReadout();
    requestRow();
  });

  // --- words ------------------------------------------------------------------------------------

  function showTitles(): void {
    const place = `Layer ${get("layer")}, head ${get("head")}`;
    if (!shown) heading.textContent = place;
    else if (shown.error === null) heading.textContent = `${place}: …`;
    else heading.textContent = `${place}: ${findingText(shown.error, shown.stdError)}`;
    showCaption();
    const titles = panelTitles(shown?.sampler ?? get("sampler"), shown?.draws ?? null);
    for (const panel of panels) {
      panel.title.textContent = titles[panel.name];
      const label = `${titles[panel.name]}, ${rows} queries by ${columns} keys`;
      panel.holder.setAttribute("aria-label", label);
    }
  }

  function showCaption(): void {
    const stated = get("given");
    const own = get("own_draws");
    const exists = stated.number !== undefined;
    const ofOthers = exists && !own && !given();
    back.hidden = !exists || !own;
    if (waits) effort.textContent = waits;
    if (!shown || waits) return;
    const some = `Measured on ${whole(shown.measuredRows)} of ${whole(rows)} queries, evenly spaced.`;
    const measured = shown.measuredRows < rows ? ` ${some}` : "";
    const drawnHere = `Drawn by the lens: ${shown.effort}, seed ${shown.seed}.${measured}`;
    const others = ofOthers
      ? ` The estimate is of layer ${stated.layer}${stated.head === null ? "" : `, head ${stated.head}`}.`
      : "";
    const uncorrected = shown.corrected ? " The maps show the weights of the draws, uncorrected." : "";
    effort.textContent =
      shown.draws === null ? `The estimate: ${shown.effort}.${uncorrected}${measured}` : drawnHere + others;
  }

  function showSelection(live: number[]): void {
    const count = live.length === 1 ? "1 row selected" : `${live.length} rows selected`;
    const size = `n = ${whole(columns)} keys, ${whole(rows)} queries`;
    status.textContent = `${live.length ? count : "no rows selected"} · ${size}`;
    clear.disabled = live.length === 0;
  }

  const positionText = (position: number, named: boolean) => {
    const token = named ? tokens[position] : undefined;
    return token === undefined ? String(position) : `${position} “${token}”`;
  };

  /** The exact and the sampled weight of a cell, and what that is a mean of. */
  function weightsAt(row: number, column: number): { weights: [number, number]; cell: string } | null {
    if (!shown) return null;
    const { layer, head } = shown;
    for (const level of large ? [sharpLevel(), overview] : [shown.level]) {
      const [r, c] = [row >> level.rows, column >> level.columns];
      const name = tileName(layer, head, level, Math.floor(r / maps.TILE), Math.floor(c / maps.TILE));
      const [a, b] = [exact.get(name), sampled.get(name)];
      if (!a || !b) continue;
      const index = (r % maps.TILE) * a.columns + (c % maps.TILE);
      const [tall, wide] = [1 << level.rows, 1 << level.columns];
      const mean = large ? `mean of ${whole(wide)} keys` : `mean of ${tall} × ${wide} cells`;
      const cell = (large ? wide : tall * wide) > 1 ? mean : "";
      return { weights: [maps.HALF[a.codes[index]], maps.HALF[b.codes[index]]], cell };
    }
    return null;
  }

  /** The query that stands for those about a row: of a large map, the one that was computed. */
  function standIn(row: number): number {
    if (!large || facts.has(row)) return row;
    const level = sharpLevel().rows;
    return Math.min(rows - 1, ((row >> level) << level) + ((1 << level) >> 1));
  }

  function showReadout(): void {
    const { cursor } = gestures;
    if (!cursor || !shown) {
      const keys = h("span", { class: "qtx-note" }, KEYS_HINT);
      readout.replaceChildren(h("span", {}, "Point at a cell for its numbers."), keys);
      return;
    }
    const [row, column] = [standIn(cursor[0]), cursor[1]];
    const at = weightsAt(row, column);
    const place = `query ${positionText(row, rows === columns)} → key ${positionText(column, true)}: `;
    const masked = causal && column > row;
    const values = masked ? "masked" : at ? cellText(at.weights, at.cell) : "";
    const known = facts.get(row);
    readout.replaceChildren(h("span", {}, place, values), h("span", {}, known ? rowText(known) : ""));
  }

  // --- beginning --------------------------------------------------------------------------------

  frame.onChange(["layer", "head"], () => {
    thumbnails.mark(get("layer"), get("head"));
    requestMaps();
    paint();
  });
  frame.onChange(["num_samples"], () => {
    if (get("num_samples") === draws) return;
    draws = get("num_samples");
    showDraws();
    requestMaps();
    requestThumbnails();
  });
  frame.onChange(["own_draws", "given", "sampler"], () => {
    showDraws();
    requestMaps();
    requestThumbnails();
    paint();
  });
  frame.onChange(["log_scale"], paint);
  frame.onChange(["drawn_heads"], showDrawn);
  frame.onChange(["selected_rows"], paintOver);
  thumbnails.mark(get("layer"), get("head"));
  showDrawn();
  showDraws();
  showTitles();
  requestAnimationFrame(() => {
    requestMaps();
    requestThumbnails(0);
    paint();
  });
  return () => frame.end();
}
