import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { Frame } from "./dom";
import { findingText, percentText } from "./lens_panels";
import { connect, type StripRequest } from "./lens_requests";
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

describe("requests of a lens", () => {
  const strip: StripRequest = { kind: "strip", view: "a", seq: 1, layer: 0, head: 0, sampler: "sobol" };
  let sent: any[] = [];
  let late = 0;
  let answer: (message: any) => void = () => {};
  let ends: (() => void)[] = [];

  function ask() {
    const frame = {
      send: (message: any) => sent.push(message) > 0,
      onMessage: (listen: any) => (answer = (message) => listen(message, [])),
      atEnd: (act: () => void) => ends.push(act),
    };
    return connect(
      frame as unknown as Frame,
      2,
      () => {},
      () => (late += 1),
    );
  }

  beforeEach(() => {
    vi.useFakeTimers();
    [sent, late, ends] = [[], 0, []];
    vi.stubGlobal("window", globalThis);
  });
  afterEach(() => {
    vi.useRealTimers();
    vi.unstubAllGlobals();
  });

  it("are sent again until all of the answer is there, less and less often", () => {
    const send = ask();
    send(strip);
    vi.advanceTimersByTime(1999);
    expect([sent.length, late]).toEqual([1, 0]);
    vi.advanceTimersByTime(1);
    expect([sent.length, late]).toEqual([2, 1]);
    vi.advanceTimersByTime(4000 + 8000 + 8000);
    expect(sent).toEqual(Array(5).fill(strip));
    answer({ kind: "strip", view: "b", seq: 1, left: 0 }); // of another view
    answer({ kind: "strip", view: "a", seq: 1, left: 3 }); // a part
    vi.advanceTimersByTime(1999);
    expect(sent.length).toBe(5);
    answer({ kind: "strip", view: "a", seq: 1, left: 0 });
    vi.advanceTimersByTime(60_000);
    expect(sent.length).toBe(5);
  });

  it("of the same kind are superseded by the newest, and none is sent after an error or the end", () => {
    const send = ask();
    send(strip);
    send({ ...strip, seq: 2 });
    vi.advanceTimersByTime(2000);
    expect(sent.map((message) => message.seq)).toEqual([1, 2, 2]);
    answer({ kind: "error" });
    vi.advanceTimersByTime(60_000);
    send({ kind: "thumbnails", draws: 4, given: false });
    answer({ kind: "thumbnails", layer: 1 });
    send({ kind: "inputs", view: "a", layer: 0, head: 0 });
    ends.forEach((act) => act());
    vi.advanceTimersByTime(60_000);
    expect(sent.length).toBe(5);
  });
});
