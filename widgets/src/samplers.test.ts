import { describe, expect, it } from "vitest";
import { masses, sum, type Floats } from "./inversion";
import { philox, uniforms } from "./philox";
import { draw, type SamplerName } from "./samplers";
import golden from "./samplers.test.json";

const bytes = (base64: string) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer;
const floats = (base64: string, dtype: string): Floats =>
  dtype === "float32" ? new Float32Array(bytes(base64)) : new Float64Array(bytes(base64));

describe("philox", () => {
  // Known answers of its authors: kat_vectors of Random123.
  it.each([
    [[0, 0], [0, 0, 0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"],
    [
      [0xffffffff, 0xffffffff],
      [0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff],
      "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ],
    [
      [0xa4093822, 0x299f31d0],
      [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
      "d16cfe09 94fdcceb 5001e420 24126ea1",
    ],
  ] as [[number, number], [number, number, number, number], string][])("of %j, %j", (key, counter, words) => {
    const hex = [...philox(key, counter)].map((word) => word.toString(16).padStart(8, "0"));
    expect(hex.join(" ")).toBe(words);
  });
});

describe("the draws of Python", () => {
  for (const row of golden.rows) {
    const logits = floats(row.logits, row.dtype);
    const key: [number, number] = [parseInt(row.key.slice(8), 16), parseInt(row.key.slice(0, 8), 16)];
    const stream = { key, group: row.group, position: row.position };
    it(`come again from ${logits.length} ${row.dtype} logits`, () => {
      const expected = new Float64Array(bytes(row.uniform));
      const numbers = [...uniforms(stream, 0, 5), ...uniforms(stream, 1, 5)];
      expect(numbers).toEqual([...expected]);
      const mass = floats(row.mass, row.dtype);
      // The language leaves the last bit of Math.exp open: it is seen in float64 only.
      const made = masses(logits);
      if (row.dtype === "float32") expect(made).toEqual(mass);
      else made.forEach((x, i) => expect(Math.abs(x - mass[i])).toBeLessThanOrEqual(2 ** -51 * mass[i]));
      for (const { sampler, num_samples, replicates, indices, weights } of row.draws) {
        const drawn = draw(sampler as SamplerName, mass, stream, num_samples, replicates);
        const name = `${sampler}, ${num_samples} × ${replicates}`;
        expect([...drawn.indices], name).toEqual([...new Int16Array(bytes(indices))]);
        const expectedWeights = floats(weights, row.dtype); // all are the same where there is one
        for (const [i, weight] of drawn.weights.entries())
          if (weight !== expectedWeights[expectedWeights.length > 1 ? i : 0])
            expect(weight, name).toBe(expectedWeights[i]);
      }
    });
  }
});

it("adds up in the order of torch's sum, which is not that of the numbers", () => {
  const x = Float32Array.from({ length: 5000 }, (_, i) => ((i * 7919) % 5003) / 5003);
  let inOrder = 0;
  for (const value of x) inOrder = Math.fround(inOrder + value);
  // (torch.arange(5000, dtype=torch.float64) * 7919 % 5003 / 5003).float().sum().item()
  expect(sum(x)).toBe(2499.4970703125);
  expect(sum(x)).not.toBe(inOrder);
});
