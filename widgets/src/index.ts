// The entry of the bundle: it chooses the view that shows a model.
import type { AnyWidget } from "@anywidget/types";
import { render as circuit } from "./circuit";
import { render as jobs } from "./jobs";
import { render as lens } from "./lens";
import { render as mitigation } from "./mitigation";
import { render as outputs } from "./outputs";
import * as stream from "./stream";
import "./style.css";

// Called once for each model, so that what it keeps is the model's.
const widget: AnyWidget = () => {
  let points: ReturnType<typeof stream.listen> | null = null;
  return {
    initialize({ model }) {
      if (model.get("kind") === "stream") points = stream.listen(model);
      return () => points?.end();
    },
    render({ model, el }) {
      switch (model.get("kind")) {
        case "circuit":
          return circuit(model, el);
        case "jobs":
          return jobs(model, el);
        case "lens":
          return lens(model, el);
        case "mitigation":
          return mitigation(model, el);
        case "outputs":
          return outputs(model, el);
        case "stream":
          return stream.render(model, el, (points ??= stream.listen(model)));
        default:
          throw new Error(`There is no view ${model.get("kind")}.`);
      }
    },
  };
};
export default widget;
