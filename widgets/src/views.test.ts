import { describe, expect, it } from "vitest";
import { folded } from "./circuit_gates";
import { freeLevel } from "./circuit_levels";
import { matching } from "./jobs";

describe("circuit", () => {
  it("is folded to the width", () => {
    expect(folded(24, 800)).toEqual({ each: 25, lines: 1 });
    expect(folded(24, 400).lines).toBe(3);
    expect(folded(0, 100).lines).toBe(1);
  });

  it("has no noise level twice", () => {
    expect(freeLevel(2.02, [1, 3])).toBe(2);
    expect(freeLevel(1, [1, 1.05])).toBe(1.1);
    expect(freeLevel(-4, [])).toBe(0.1);
  });
});

describe("jobs", () => {
  const rows = [
    { tag: "qtx-1", state: "done", device: "ibm_fez" },
    { tag: "qtx-2", state: "queued", device: "ibm_fez" },
  ];
  const tags = (words: string, state: string) =>
    matching(rows, words, state, (row) => row.state).map((row) => row.tag);

  it("are filtered by words and state", () => {
    expect(tags("", "")).toEqual(["qtx-1", "qtx-2"]);
    expect(tags("FEZ 2", "")).toEqual(["qtx-2"]);
    expect(tags("fez", "done")).toEqual(["qtx-1"]);
    expect(tags("nothing", "")).toEqual([]);
  });
});
