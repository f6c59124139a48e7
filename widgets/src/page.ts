// The entry of the script in exported pages: it puts a lens that redraws in the place of each picture of one.
import { h } from "./dom";
import { render } from "./lens";
import { PageModel, SAMPLERS, type PageData } from "./page_model";
import "./style.css";
import "./page.css";

/** The menu of samplers, which a lens with a kernel has outside. */
function samplerField(page: PageModel): HTMLElement {
  const change = (event: Event) => page.set("sampler", (event.target as HTMLSelectElement).value);
  const options = SAMPLERS.map((name) =>
    h("option", { value: name, selected: name === page.get("sampler") }, name),
  );
  return h("label", { class: "qtx-row" }, "Sampler", h("select", { change }, ...options));
}

/** The element of a lens, with what it draws for whoever wants the numbers. */
type PageElement = HTMLElement & { page?: PageModel };

/** Shows the lens of one element, and hides the picture that stands for it. */
function show(element: PageElement): void {
  const data: PageData = JSON.parse(element.querySelector("script")!.textContent!);
  const page = new PageModel(data);
  page.head(page.get("layer"), page.get("head"));
  const place = h("div", {});
  element.append(place);
  render(page.model, place);
  place.querySelector(".qtx-toolbar")!.prepend(samplerField(page));
  const picture = element.parentElement!.querySelector("picture");
  if (picture) picture.hidden = true;
  element.page = page;
}

for (const element of document.querySelectorAll<PageElement>(".qtx-page:not([data-shown])")) {
  element.dataset.shown = "";
  show(element);
}
