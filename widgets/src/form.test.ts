import { describe, expect, it } from "vitest";
import { fresh, moved, summary, type Field } from "./form";

describe("a list's items", () => {
  it("move to any place, and no further than the ends", () => {
    const items = ["a", "b", "c", "d"];
    expect(moved(items, 0, 2)).toEqual(["b", "c", "a", "d"]);
    expect(moved(items, 3, 0)).toEqual(["d", "a", "b", "c"]);
    expect(moved(items, 1, 9)).toEqual(["a", "c", "d", "b"]);
    expect(moved(items, 1, -9)).toEqual(["b", "a", "c", "d"]);
    for (let from = 0; from < 4; from++)
      for (let to = 0; to < 4; to++) {
        const after = moved(items, from, to);
        expect([...after].sort()).toEqual(items);
        expect(after[to]).toBe(items[from]);
      }
  });

  it("begin as a choice that is not there yet, or as the next number", () => {
    const choice = { kind: "choice" as const, choices: ["x", "y", "z"] };
    expect(fresh(choice, ["x"])).toBe("y");
    expect(fresh(choice, ["x", "y", "z"])).toBe("x");
    const number = { kind: "number" as const, low: 0, high: 8 };
    expect(fresh(number, ["1", "3"])).toBe("5");
    expect(fresh(number, ["7"])).toBe("8");
    expect(fresh(number, ["5", "8"])).toBe("8");
    expect(fresh(number, [])).toBe("0");
    expect(fresh({ kind: "whole" }, ["12", "14", "x"])).toBe("16");
    expect(fresh({ kind: "text" }, ["a"])).toBe("");
  });
});

describe("a group that is folded", () => {
  const field = (name: string, kind: Field["kind"], more: Partial<Field> = {}): Field => ({
    name, label: name, help: "", unit: "", group: "g", kind, optional: false, ...more,
  }); // prettier-ignore
  it("shows its first two values, and those that are not at their defaults", () => {
    const fields = [
      field("sampler", "choice", { default: "systematic" }),
      field("draws", "whole", { default: "64", unit: "draws" }),
      field("tolerance", "number", { default: "" }),
      field("replicates", "whole", { default: "1" }),
      field("twirl", "switch", { default: false }),
      field("names", "list", { default: [] }),
      field("grid", "pairs", { default: [] }),
    ];
    const values = { sampler: "systematic", draws: "64", tolerance: "", replicates: "1", twirl: false };
    expect(summary(fields, values)).toBe("systematic · 64 draws");
    const changed = { ...values, replicates: "4", twirl: true, names: ["a", "b"], grid: [["x", "1, 2"]] };
    expect(summary(fields, changed as never)).toBe(
      "systematic · 64 draws · replicates 4 · twirl · a, b · x: 1, 2",
    );
  });
  it("names a number whose unit does not say what it is of", () => {
    const fields = [
      field("noise scale", "number", { default: "1", unit: "factor" }),
      field("readout", "number", { default: "0", unit: "probability" }),
    ];
    expect(summary(fields, { "noise scale": "1", readout: "0" })).toBe("noise scale 1");
    expect(summary(fields, { "noise scale": "1", readout: "0.1" })).toBe("noise scale 1 · readout 0.1");
  });
});
