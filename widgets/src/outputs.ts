// OutputsView: how far estimates of attention outputs are from the exact ones, with their intervals.
import { axes, legendMark, line, makePanel, resize } from "./charts";
import { Frame, h, onFrame, s, type Model } from "./dom";
import { label, scale, withError, type Scale } from "./scale";

interface Method {
  name: string;
  value: number[];
  lower: number[];
  upper: number[];
}

interface Estimates {
  queries: number[];
  exact: number[];
  methods: Method[];
  title: string;
  note: string;
}

const HEIGHT = 260;
const BOTTOM = 34;
const TOP = 8;
const GAP = 14;

export function render(model: Model, el: HTMLElement): () => void {
  let shown: Estimates | null = null;
  const frame = new Frame(model, el, "outputs", "Estimated outputs", () => paint());
  const heading = h("h2", {}, "Estimated outputs");
  const panel = makePanel("", "qtx-wide");
  const panels = h("div", { class: "qtx-panels" }, panel.box);
  frame.root.append(h("header", {}, heading, frame.exports()), panels, frame.error);

  const paint = onFrame(() => {
    frame.root.hidden = shown === null;
    if (shown === null || !frame.hasRoom()) return;
    const { queries, exact, methods } = shown;
    heading.textContent = shown.title;
    panel.title.textContent = methods.map((x) => `${x.name} ± ${label(meanHalfWidth(x))}`).join(" · ");
    const width = resize(panel, HEIGHT);
    const xs = scale(-0.5, queries.length - 0.5, 62, width - 10);
    const ys = errorScale(shown);
    const step = Math.min(GAP, (xs(1) - xs(0)) / (methods.length + 1));
    const every = Math.ceil((36 * queries.length) / (xs.to - xs.from)); // names have room
    const named = queries
      .map((query, i): [number, string] => [i, String(query)])
      .filter((_, i) => i % every === 0);
    const nodes = axes(HEIGHT, xs, ys, "query", "estimate − exact output", named);
    nodes.push(line(xs.from, ys(0), xs.to, ys(0), { stroke: "var(--qtx-exact)", "stroke-width": 1.5 }));
    methods.forEach((method, j) => {
      const shift = step * (j - (methods.length - 1) / 2);
      queries.forEach((query, i) => nodes.push(pointOf(method, i, query, exact[i], xs(i) + shift, ys)));
    });
    panel.svg.replaceChildren(...nodes);
    panel.caption.replaceChildren(
      ...methods.map((x) => legendMark(isFilled(x) ? "filled" : "hollow", x.name, colourOf(x))),
      shown.note,
    );
    const spoken = methods.map(
      (x) => `${x.name}: ${queries.map((query, i) => `query ${query} ${said(x, i)}`).join(", ")}`,
    );
    panel.svg.setAttribute("aria-label", `estimated outputs; ${spoken.join("; ")}`);
  });

  frame.onMessage((message) => {
    if (message.kind !== "estimates") return;
    shown = message;
    frame.fail(null);
    frame.root.hidden = false;
    paint();
  });
  frame.send({ kind: "ready" });
  paint();
  return () => frame.end();
}

const isFilled = (method: Method) => method.name === "amplitude estimation";

const colourOf = (method: Method) =>
  method.name === "classical draws" ? "var(--qtx-baseline)" : "var(--qtx-accent)";

const halfWidth = (method: Method, i: number) => (method.upper[i] - method.lower[i]) / 2;

const said = (method: Method, i: number) => withError(method.value[i], halfWidth(method, i));

/** Half of the interval in the mean over rows, with two digits. */
function meanHalfWidth(method: Method): number {
  const sum = method.value.reduce((total, _, i) => total + halfWidth(method, i), 0);
  return Number((sum / method.value.length).toPrecision(2));
}

/** The axis of errors: it holds all intervals and 0. */
function errorScale({ exact, methods }: Estimates): Scale {
  const ends = methods.flatMap((x) => [...x.lower, ...x.upper].map((y, i) => y - exact[i % exact.length]));
  const [low, high] = [Math.min(0, ...ends), Math.max(0, ...ends)];
  const margin = 0.05 * (high - low);
  return scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP);
}

/** An estimate's error with its interval; what it is stands in its title. */
function pointOf(method: Method, i: number, query: number, exact: number, x: number, ys: Scale): SVGElement {
  const colour = colourOf(method);
  const [low, high] = [ys(method.lower[i] - exact), ys(method.upper[i] - exact)];
  return s(
    "g",
    { stroke: colour, "stroke-width": 1.6 },
    s("path", { d: `M${x} ${low}V${high}M${x - 3} ${low}H${x + 3}M${x - 3} ${high}H${x + 3}` }),
    s("circle", {
      cx: x,
      cy: ys(method.value[i] - exact),
      r: 4,
      fill: isFilled(method) ? colour : "var(--qtx-paper)",
    }),
    s("title", {}, `query ${query}, ${method.name}: ${said(method, i)}; exact ${label(exact)}`),
  );
}
