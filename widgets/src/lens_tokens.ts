// The text itself: the tokens that a query attends to, shaded by exact and by sampled weight side by side.
import { h } from "./dom";
import { digits, whole } from "./scale";

/** Tokens, at most, that are shown about the query. */
const MAX_TOKENS = 1024;
/** The strongest shade of a token, in percent, so that its text stays readable. */
const MAX_SHADE = 55;

/** A row of a head, over the keys from `first` on. */
export interface TokenRow {
  row: number;
  first: number;
  exact: Float32Array;
  sampled: Float32Array;
  /** The lengths of the keys' value vectors. */
  norms: Float32Array;
}

export interface TokensPart {
  element: HTMLElement;
  /** Shows a row; `sampler` and its colour name the second text. */
  show(row: TokenRow, sampler: string, colour: string): void;
  /** The keys that are shown for a query: first, and the one after the last. */
  window(row: number): [number, number];
}

/** How strongly a token is shaded, 0 to 1: by the root of its weight, so that small weights are seen. */
export const shade = (weight: number, top: number): number =>
  top > 0 ? Math.sqrt(Math.min(1, Math.max(0, weight) / top)) : 0;

/** The part of `count` tokens that is shown about one: the last ones up to a causal query. */
export function tokenWindow(
  row: number,
  count: number,
  causal: boolean,
  size = MAX_TOKENS,
): [number, number] {
  if (count <= size) return [0, count];
  const ahead = causal ? Math.floor(size / 8) : Math.floor(size / 2);
  const end = Math.min(count, Math.max(size, row + ahead));
  return [end - size, end];
}

/** What a token looks like in running text: a line's end is visible, and breaks the line. */
export const tokenText = (token: string): string =>
  token === "" ? "∅" : token.replaceAll("\n", "⏎\n").replaceAll("\t", "→");

/** `choose` is called with the query that is pointed at; without it the tokens are keys only. */
export function tokensPart(
  tokens: string[],
  causal: boolean,
  choose: ((row: number) => void) | null,
): TokensPart {
  let drawn: [number, number] | null = null;
  let last: TokenRow | null = null;
  const title = h("span", {});
  const names = [h("h3", {}, "exact"), h("h3", {}, "sampled")];
  const texts = names.map((_, i) =>
    h("div", {
      class: "qtx-text",
      tabindex: 0,
      role: "group",
      "aria-label": i ? "text shaded by sampled weight" : "text shaded by exact weight",
      pointerover: (event: PointerEvent) => point(event),
      keydown: (event: KeyboardEvent) => press(event),
      scroll: () => {
        const other = texts[1 - i];
        if (other.scrollTop !== texts[i].scrollTop) other.scrollTop = texts[i].scrollTop;
      },
    }),
  );
  const columns = names.map((name, i) => h("div", {}, name, texts[i]));
  const hint = choose
    ? "Point at a token, or use the arrows, to see what it attends to."
    : "Point at a row of a map to see what it attends to.";
  const note = h(
    "p",
    { class: "qtx-note" },
    `${hint} The bar under a key is the length of its value vector.`,
  );
  const element = h("div", { class: "qtx-tokens" }, h("p", {}, title), h("div", {}, ...columns), note);

  function point(event: PointerEvent): void {
    const index = (event.target as HTMLElement).dataset.index;
    if (choose && index !== undefined && Number(index) !== last?.row) choose(Number(index));
  }

  function press(event: KeyboardEvent): void {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !choose || !last) return;
    event.preventDefault();
    event.stopPropagation();
    choose(Math.min(tokens.length - 1, Math.max(0, last.row + step)));
  }

  function fill(first: number, end: number): void {
    if (drawn && drawn[0] === first && drawn[1] === end) return;
    drawn = [first, end];
    for (const text of texts) {
      const spans = tokens
        .slice(first, end)
        .map((token, i) => h("span", { "data-index": first + i }, tokenText(token)));
      text.replaceChildren(...spans);
    }
  }

  /** Brings the query into sight where it is not, with what stands before it, to which it mostly attends. */
  function scrollTo(index: number): void {
    for (const text of texts) {
      const [box, token] = [text, text.children[index]].map((x) => x.getBoundingClientRect());
      if (token.top >= box.top && token.bottom <= box.bottom) continue;
      text.scrollTop += token.bottom - box.bottom + 0.1 * box.height;
    }
  }

  function show(row: TokenRow, sampler: string, colour: string): void {
    const isOther = last?.row !== row.row;
    last = row;
    const { first, exact, sampled, norms } = row;
    fill(first, first + exact.length);
    names[1].textContent = sampler;
    const top = Math.max(...exact, ...sampled);
    const longest = Math.max(...norms);
    texts.forEach((text, which) => {
      const weights = which ? sampled : exact;
      const ink = which ? colour : "var(--qtx-exact)";
      const most = which ? MAX_SHADE : 0.6 * MAX_SHADE;
      for (let i = 0; i < weights.length; i++) {
        const span = text.children[i] as HTMLElement;
        const key = first + i;
        const masked = causal && key > row.row;
        const share = masked ? 0 : shade(weights[i], top);
        span.style.setProperty("--qtx-shade", `color-mix(in srgb, ${ink} ${most * share}%, transparent)`);
        span.style.setProperty("--qtx-norm", `${longest > 0 && !masked ? (100 * norms[i]) / longest : 0}%`);
        span.toggleAttribute("data-masked", masked);
        span.toggleAttribute("data-query", choose !== null && key === row.row);
        const value = masked ? "masked" : `weight ${digits(weights[i], 2)}`;
        span.title = `${whole(key)}: ${value}, ‖v‖ = ${digits(norms[i], 2)}`;
      }
    });
    if (isOther && choose !== null && row.row >= first) scrollTo(row.row - first);
    const name = choose ? ` “${tokenText(tokens[row.row]).trim()}”` : "";
    const part =
      exact.length < tokens.length ? ` (keys ${whole(first)} to ${whole(first + exact.length - 1)})` : "";
    title.textContent = `What query ${whole(row.row)}${name} attends to${part}`;
  }

  return { element, show, window: (row) => tokenWindow(row, tokens.length, causal) };
}
