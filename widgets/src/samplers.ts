// Samplers as they are in qtx_lab/samplers: from the same masses and stream, the same draws to the bit.
import { placeHeadTailInto, prepareHeadTail } from "./head_tail";
import { invert, invertEven, invertInAnyOrder, like, prepare, type Floats, type Row } from "./inversion";
import { uniforms, type RowStream } from "./philox";

export const SAMPLERS = ["monte-carlo", "stratified", "systematic", "head-tail"] as const;
export type SamplerName = (typeof SAMPLERS)[number];

/** The draws of a row, those of each replicate together. */
export interface Draws {
  indices: Int32Array;
  weights: Floats;
}

/** Whether a sampler puts its points at equal distances, from one random number. */
const isComb = (sampler: SamplerName) => sampler === "systematic" || sampler === "head-tail";

/** How many random numbers a replicate of a sampler takes. */
export const numUniforms = (sampler: SamplerName, numSamples: number): number =>
  isComb(sampler) ? 1 : numSamples;

/** Writes where a sampler puts the points of a replicate into `out`, given its random numbers. */
export function placePoints(
  sampler: SamplerName,
  u: Float64Array,
  numSamples: number,
  out: Float64Array,
  start = 0,
): void {
  const comb = isComb(sampler);
  for (let s = 0; s < numSamples; s++)
    out[start + s] = sampler === "monte-carlo" ? u[s] : (s + u[comb ? 0 : s]) / numSamples;
}

/** Where a sampler puts its points for each replicate, from the first one on. */
export function points(
  sampler: SamplerName,
  stream: RowStream,
  numSamples: number,
  replicates = 1,
  first = 0,
): Float64Array {
  const out = new Float64Array(replicates * numSamples);
  for (let r = 0; r < replicates; r++) {
    const u = uniforms(stream, first + r, numUniforms(sampler, numSamples));
    placePoints(sampler, u, numSamples, out, r * numSamples);
  }
  return out;
}

/** Keys that a walk over a row passes in the time of the search for one point. */
const KEYS_WALKED_PER_SEARCH = 2.5;

/** Writes the keys of a row at some points, and their weights, into arrays from a place on. */
export function placeInto(
  row: Row,
  at: Float64Array,
  numSamples: number,
  sampler: SamplerName,
  indices: Int32Array,
  weights: Floats,
  start: number,
): void {
  const total = row.cdf[row.cdf.length - 1];
  weights.fill(total === 0 ? 0 : 1 / at.length, start, start + at.length);
  if (sampler === "monte-carlo") return invertInAnyOrder(row, at, indices, start);
  const isDense = row.mass.length < KEYS_WALKED_PER_SEARCH * numSamples;
  if (at.length === numSamples && isDense && invertEven(row, at, indices, start)) return;
  invert(row, at, total, indices, start);
}

/** The draws of a row, whose keys stand as the masses do. */
export function draw(
  sampler: SamplerName,
  mass: Floats,
  stream: RowStream,
  numSamples: number,
  replicates = 1,
): Draws {
  const at = points(sampler, stream, numSamples, replicates);
  const drawn = { indices: new Int32Array(at.length), weights: like(mass, at.length) };
  const { indices, weights } = drawn;
  if (sampler === "head-tail") placeHeadTailInto(prepareHeadTail(mass), at, numSamples, indices, weights, 0);
  else placeInto(prepare(mass), at, numSamples, sampler, indices, weights, 0);
  return drawn;
}
