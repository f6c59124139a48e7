// Elements, the theme of the page, and the frame of every view with its exports and its place for errors.
import type { AnyModel } from "@anywidget/types";
import { COLOURS } from "./theme";

export type Theme = keyof typeof COLOURS;
export type Model = AnyModel<any>;

type Attributes = Record<string, string | number | boolean | null | undefined | ((event: any) => void)>;
type Child = Node | string | null;

const SVG = "http://www.w3.org/2000/svg";

function fill<E extends Element>(element: E, attributes: Attributes, children: Child[]): E {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined)
      element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child): child is Node | string => child !== null));
  return element;
}

/** An HTML element; an attribute that is a function listens to the event of its name. */
export function h<K extends keyof HTMLElementTagNameMap>(
  name: K,
  attributes: Attributes = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  return fill(document.createElement(name), attributes, children);
}

/** An SVG element. */
export function s<K extends keyof SVGElementTagNameMap>(
  name: K,
  attributes: Attributes = {},
  ...children: Child[]
): SVGElementTagNameMap[K] {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

let serial = 0;
/** An id that no other element of the page has. */
export const unique = (name: string): string => `qtx-${name}-${++serial}-${Math.floor(performance.now())}`;

/** The theme of the page around: JupyterLab's and Notebook's, VS Code's, Colab's, else the system's. */
export function pageTheme(): Theme {
  const { body, documentElement: root } = document;
  const light = body.dataset.jpThemeLight;
  if (light !== undefined) return light === "false" ? "dark" : "light";
  if (body.dataset.vscodeThemeKind)
    return /dark|high-contrast$/.test(body.dataset.vscodeThemeKind) ? "dark" : "light";
  if (root.hasAttribute("theme")) return root.getAttribute("theme") === "dark" ? "dark" : "light";
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

/** Sends a message; false if there is no kernel any more, because a restart closes the channel of a view. */
export function post(model: Model, message: object): boolean {
  try {
    model.send(message);
    return true;
  } catch {
    return false;
  }
}

const GONE = "The kernel behind this view is gone: run its cell again. The picture is the last one.";
const CLOSED = "This view was closed. Run its cell again to see it.";

/** Hides the picture that a saved notebook shows in place of a view; returns what shows it again. */
function hideSavedPicture(model: Model, el: HTMLElement): () => void {
  const hide = () => {
    if (!model.get("has_picture")) return;
    const output = el.closest(".jp-OutputArea-child");
    const before = output?.previousElementSibling;
    // Only of a view that is an output itself: one inside another widget has no picture of its own.
    const own = output && el.parentElement?.closest(".jupyter-widgets") === null;
    if (own && before instanceof HTMLElement && before.querySelector(".jp-RenderedImage")) picture = before;
    if (picture) picture.style.display = "none";
  };
  let picture: HTMLElement | null = null;
  const frame = requestAnimationFrame(hide); // JupyterLab puts the view into its place after it is rendered
  const later = setTimeout(hide, 500);
  model.on("change:has_picture", hide);
  return () => {
    cancelAnimationFrame(frame);
    clearTimeout(later);
    model.off("change:has_picture", hide);
    if (picture) picture.style.display = "";
  };
}

/** The frame of a view: its root element, the theme, and what has to be undone at its end. */
export class Frame {
  readonly root: HTMLElement;
  readonly error: HTMLElement;
  theme: Theme;
  private undo: (() => void)[] = [];
  private waits = 0;

  constructor(
    readonly model: Model,
    el: HTMLElement,
    kind: string,
    label: string,
    private repaint: () => void,
  ) {
    this.error = h("p", { class: "qtx-error", role: "alert", hidden: true });
    this.root = h("section", { class: `qtx qtx-${kind}`, "aria-label": label });
    // JupyterLab takes arrows and letters for its own shortcuts before we see them; it keeps those with Ctrl.
    const keep = (event: KeyboardEvent) => {
      const target = event.target as Element;
      if (this.root.contains(target))
        target.toggleAttribute("data-lm-suppress-shortcuts", !event.ctrlKey && !event.metaKey);
    };
    window.addEventListener("keydown", keep, true);
    this.undo.push(() => window.removeEventListener("keydown", keep, true));
    this.theme = pageTheme();
    this.paintTheme();
    el.append(this.root);
    const watch = new MutationObserver(() => this.follow());
    watch.observe(document.body, { attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind"] });
    watch.observe(document.documentElement, { attributeFilter: ["theme"] });
    const system = matchMedia("(prefers-color-scheme: dark)");
    const follow = () => this.follow();
    system.addEventListener("change", follow);
    const size = new ResizeObserver(() => this.repaint());
    size.observe(this.root);
    this.undo.push(
      () => watch.disconnect(),
      () => system.removeEventListener("change", follow),
      () => size.disconnect(),
    );
    this.undo.push(hideSavedPicture(model, el), this.sayWhenGone(el));
    this.onMessage((message, buffers) => {
      if (message.kind === "file") download(message.name, message.type, buffers[0]);
      if (message.kind === "error") this.fail(message.text);
    });
  }

  /** Says in the view when its kernel is gone, and in its place when it is closed; returns how to stop. */
  private sayWhenGone(el: HTMLElement): () => void {
    const lost = () => {
      if (el.closest(".jupyter-widgets-disconnected")) this.fail(GONE);
    };
    const closed = () => {
      const note = h("p", { class: "qtx-closed", role: "status" }, CLOSED);
      // JupyterLab hides the output itself.
      (el.closest(".jp-OutputArea-child") ?? el.parentElement)?.append(note);
    };
    this.model.on("comm_live_update", lost);
    this.model.on("destroy", closed);
    return () => {
      this.model.off("comm_live_update", lost);
      // A closed model removes its views a moment after it has said so.
      this.model.off("destroy", closed);
    };
  }

  get colours(): (typeof COLOURS)[Theme] {
    return COLOURS[this.theme];
  }

  /** Whether there is room to draw in; where there is none, the view is drawn again soon.
   *
   * While JupyterLab changes its theme all widths are 0 for a moment, and no ResizeObserver sees them come back.
   * A view that stays hidden is drawn by the observer when it is shown.
   */
  hasRoom(): boolean {
    if (this.root.clientWidth > 0) this.waits = 0;
    else if (this.root.isConnected && this.waits++ < 20) setTimeout(() => this.repaint(), 50);
    return this.root.clientWidth > 0;
  }

  private follow(): void {
    if (pageTheme() === this.theme) return;
    this.theme = pageTheme();
    this.paintTheme();
    this.repaint();
  }

  private paintTheme(): void {
    this.root.dataset.theme = this.theme;
    for (const [name, colour] of Object.entries(this.colours))
      this.root.style.setProperty(`--qtx-${name}`, colour);
  }

  /** Shows what went wrong inside the view; null removes it. */
  fail(text: string | null): void {
    this.error.hidden = text === null;
    this.error.textContent = text ?? "";
  }

  /** Follows traits until the end of the view. */
  onChange(traits: string[], listen: () => void): void {
    for (const trait of traits) this.model.on(`change:${trait}`, listen);
    this.undo.push(() => traits.forEach((trait) => this.model.off(`change:${trait}`, listen)));
  }

  /** Follows messages of the kernel until the end of the view. */
  onMessage(listen: (message: any, buffers: DataView[]) => void): void {
    this.model.on("msg:custom", listen);
    this.undo.push(() => this.model.off("msg:custom", listen));
  }

  /** Sends a message to the kernel. If there is none any more, the view says so and keeps its picture. */
  send(message: object): boolean {
    const sent = post(this.model, message);
    if (!sent) this.fail(GONE);
    return sent;
  }

  /** Changes traits here and in the kernel. */
  set(values: Record<string, unknown>): void {
    for (const [name, value] of Object.entries(values)) this.model.set(name, value);
    this.model.save_changes();
  }

  /** Does something at the end of the view. */
  atEnd(act: () => void): void {
    this.undo.push(act);
  }

  end(): void {
    for (const act of this.undo) act();
    this.root.remove();
  }

  /** Buttons that request the figure or the data as a file, and other buttons after them. */
  exports(...more: HTMLElement[]): HTMLElement {
    const request = (as: string) => () => this.send({ kind: "export", as });
    const button = (as: string, name: string, title: string) =>
      h("button", { type: "button", title, click: request(as) }, name);
    return h(
      "div",
      { class: "qtx-exports", role: "group", "aria-label": "Save" },
      button("png", "PNG", "Save the figure as PNG"),
      button("svg", "SVG", "Save the figure as SVG"),
      button("parquet", "Data", "Save the data as Parquet"),
      button("csv", "CSV", "Save the data as CSV"),
      ...more,
    );
  }
}

/** Saves a file, as a browser does with what it downloads. */
export function download(name: string, type: string, content: DataView): void {
  const bytes = new Uint8Array(content.buffer, content.byteOffset, content.byteLength);
  const url = URL.createObjectURL(new Blob([bytes.slice()], { type }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Sizes a canvas for the resolution of the screen, and returns a context in CSS pixels. */
export function sharp(canvas: HTMLCanvasElement, width: number, height: number): CanvasRenderingContext2D {
  const ratio = window.devicePixelRatio || 1;
  const [w, t] = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
  if (canvas.width !== w || canvas.height !== t) [canvas.width, canvas.height] = [w, t];
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d")!;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

/** A function that runs `act` once at the next frame, however often it is called before. */
export function onFrame(act: () => void): () => void {
  let requested = false;
  return () => {
    if (requested) return;
    requested = true;
    requestAnimationFrame(() => {
      requested = false;
      act();
    });
  };
}
