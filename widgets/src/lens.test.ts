import { describe, expect, it } from "vitest";
import { findingText, percentText } from "./lens_panels";
import { spread } from "./lens_strip";
import { shade, tokenText, tokenWindow } from "./lens_tokens";

describe("what a lens says", () => {
  it("is a percentage in two digits, as in Python", () => {
    // as the docstring of percent_text in lens_estimates.py
    expect([0.02834, 1.234, 3e-6, 0].map(percentText)).toEqual(["2.8 %", "123 %", "less than 0.01 %", "0 %"]);
    expect(findingText(0.0283, 0.0291)).toBe("off by 2.8 % of the output's norm (standard error ± 2.9 %)");
    expect(findingText(0.0283, null)).toBe("off by 2.8 % of the output's norm");
  });
});

describe("names at the ends of curves", () => {
  it("keep their order and do not overlap, inside the picture", () => {
    const places = spread([50, 49, 51, 99, 0], 10, 0, 100);
    const order = [4, 1, 0, 2, 3].map((i) => places[i]);
    for (let i = 1; i < order.length; i++) expect(order[i] - order[i - 1]).toBeGreaterThanOrEqual(10);
    expect(Math.min(...places)).toBeGreaterThanOrEqual(0);
    expect(Math.max(...places)).toBeLessThanOrEqual(100);
    expect(spread([], 10, 0, 100)).toEqual([]);
  });
});

describe("tokens", () => {
  it("are shaded by the root of their weight", () => {
    expect([0, 0.1, 0.4, 0.5].map((p) => shade(p, 0.4))).toEqual([0, 0.5, 1, 1]);
    expect(shade(0, 0)).toBe(0);
  });

  it("of long texts are those about the query", () => {
    expect(tokenWindow(10, 500, true)).toEqual([0, 500]);
    expect(tokenWindow(60000, 65536, true, 1024)).toEqual([60128 - 1024, 60128]);
    expect(tokenWindow(0, 65536, true, 1024)).toEqual([0, 1024]);
    expect(tokenWindow(65535, 65536, false, 1024)).toEqual([65536 - 1024, 65536]);
  });

  it("show the ends of lines", () => {
    expect(["a", "\n", "\t", ""].map(tokenText)).toEqual(["a", "⏎\n", "→", "∅"]);
  });
});
