"""Decoding by draws from a sketch of the keys: scan the sketch, draw, and read the drawn keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...streams import Stream
from ..inputs import Inputs
from ..launches import (
    LOCATED_POINTS,
    InputArguments,
    MassBuffers,
    StreamArguments,
    gather_options,
    launch,
    power_of_two,
    scan_grid,
    scan_options,
    size_class,
)
from ..masses import PAGE, UNITS, min_mass_bits
from ..philox import INTERPRETED
from .reference import NEWTON_STEPS, SEARCHED_PAGES, SketchDecodeResult, SketchTable, inverse_page_share
from .triton import (
    cap_kernel,
    combine_kernel,
    digits_kernel,
    locate_sketch_kernel,
    plan_kernel,
    scan_sketch_kernel,
    step_kernel,
    weigh_kernel,
)


@dataclass(frozen=True)
class Plan:
    """How the keys of N M rows are drawn: see `reference.Proposal`."""

    page_floor: Tensor
    """(N, M), int64: the mass that every page gets at least."""
    certain_mass: Tensor
    """(N, M), int64: the mass from which a key is drawn with certainty."""
    step: Tensor
    """(N, M), int64: the distance of the points."""


@dataclass(frozen=True)
class LocatedDraws:
    """The drawn keys, before their exact logits are known."""

    index: Tensor
    """(N, M, R * S), int64."""
    inclusion: Tensor
    """(N, M, R * S), float32: the probability of drawing this key; 0 for a point past the last key."""


def sketch_decode(
    x: Inputs,
    sketch: SketchTable,
    num_samples: int,
    replicates: int,
    stream: Stream,
    *,
    defensive: float = 0.02,
) -> SketchDecodeResult:
    """Average the values at draws from a sketch, weighted by their exact logits: biased by O(1 / S).

    The proposal is about (1 - epsilon) softmax(l~) + epsilon / n for guessed logits l~, in whole numbers
    (`reference.Proposal`). Equally spaced points draw key j with probability pi_j = min(1, c q_j), where c is
    such that the sum of all pi_j is about S and not more: the heaviest keys with certainty, and none twice,
    as `SampledKVCache` does on the CPU. The exact logits of the drawn keys give their weights, w_j
    proportional to exp(l_j) / pi_j, which sum to 1 (Hajek 1971). The variance is estimated by sum_j (1 -
    pi_j) w_j^2 (v_j - o)^2, that of independent draws; points along keys in random order have less. All of
    the sketch is read, and of K and V only the drawn rows.

    Parameters
    ----------
    x : Inputs
        As for `decode`, without a mask.
    sketch : SketchTable
    num_samples, replicates : int
        S draws in each of R independent repetitions, which are averaged.
    stream : Stream
        Of N heads and L positions, on the same device.
    defensive : float
        epsilon, 0 < epsilon < 1.

    Raises
    ------
    ShapeError
        If the stream does not fit.
    """
    inputs, numbers = InputArguments.of(x), StreamArguments.of(stream, x)
    buffers = MassBuffers.of(x, num_samples, replicates)
    scan_sketch(x, inputs, sketch, numbers, buffers)
    plan = plan_draws(inputs, numbers, buffers, defensive)
    drawn = locate_draws(inputs, numbers, buffers, plan, sketch.order)
    return weigh_draws(x, inputs, buffers, drawn)


def scan_sketch(
    x: Inputs, inputs: InputArguments, sketch: SketchTable, numbers: StreamArguments, buffers: MassBuffers
) -> None:
    """Guess all logits and leave the masses of the keys in the buffers."""
    heads, rows, _, _ = x.shape
    columns, halves = sketch.table.shape[2], 2 if sketch.table.dtype == torch.uint8 else 1
    block = max(32, power_of_two(columns))
    digit = x.q.new_empty(heads, rows, 2, halves * block, dtype=torch.int8)
    unit = x.q.new_empty(heads, rows, dtype=torch.float32)
    options = scan_options(x, buffers)
    features = options.pop("BD")
    exact_logits = sketch.exact_logits(x)
    launch(
        digits_kernel,
        buffers.row_programs,
        inputs,
        digit=digit,
        unit=unit,
        weight=sketch.weight,
        rank=sketch.weight.shape[2],
        columns=columns,
        BD=features,
        BR=block,
        HALVES=halves,
    )
    launch(
        scan_sketch_kernel,
        scan_grid(x),
        inputs,
        numbers,
        buffers,
        digit=digit,
        unit=unit,
        table=sketch.table,
        columns=columns,
        table_stride_h=sketch.table.stride(0),
        table_stride_n=sketch.table.stride(1),
        exact_logit=exact_logits,
        exact_keys=exact_logits.shape[-1],
        BR=block,
        HALVES=halves,
        **options,
    )


def plan_draws(
    inputs: InputArguments, numbers: StreamArguments, buffers: MassBuffers, defensive: float
) -> Plan:
    """Plan the draws from the masses that a scan has left; the buffers then also say where pages start."""
    pages, (programs,) = buffers.pages, buffers.row_programs
    row_mass = buffers.row_mass
    plan = Plan(*(row_mass.new_empty(row_mass.shape) for _ in range(3)))
    searched = min(SEARCHED_PAGES, power_of_two(pages))
    every = inputs.n <= buffers.num_samples
    shared = {"PAGE": PAGE, "MASS_MASK": buffers.mass_mask, "ALL": every}
    launch(
        plan_kernel,
        buffers.row_programs,
        inputs,
        buffers,
        plan,
        searched=buffers.mass.new_empty(programs, searched, dtype=torch.int32),
        inverse_share=inverse_page_share(pages, defensive),
        stride=-(-pages // SEARCHED_PAGES),
        BP=buffers.pages_at_once,
        BS=searched,
        MIN_BITS=min_mass_bits(buffers.mass.dtype),
        STEPS=NEWTON_STEPS,
        **shared,
    )
    launch(
        cap_kernel,
        lambda meta: (programs, -(-pages // meta["BP"])),
        inputs,
        buffers,
        plan,
        SIZE=size_class(inputs.n),
        UNITS=int(UNITS[buffers.mass.dtype]),
        **shared,
    )
    step = {"BP": buffers.pages_at_once, "num_warps": 8}
    launch(step_kernel, buffers.row_programs, inputs, numbers, buffers, plan, **step)
    return plan


def locate_draws(
    inputs: InputArguments,
    numbers: StreamArguments,
    buffers: MassBuffers,
    plan: Plan,
    order: Tensor | None,
) -> LocatedDraws:
    """Find the keys at the points of each row; `order` (N, n) has the key at each place."""
    draws = (*buffers.row_mass.shape, buffers.replicates * buffers.num_samples)
    drawn = LocatedDraws(
        inputs.q.new_empty(draws, dtype=torch.int64), inputs.q.new_empty(draws, dtype=torch.float32)
    )
    launch(
        locate_sketch_kernel,
        buffers.point_programs,
        inputs,
        numbers,
        buffers,
        plan,
        drawn,
        order=buffers.page_start if order is None else order,  # without an order nothing reads it
        order_stride_h=0 if order is None else order.stride(0),
        order_stride_n=0 if order is None else order.stride(1),
        HAS_ORDER=order is not None,
        PAGE=PAGE,
        UNITS=int(UNITS[buffers.mass.dtype]),
        MASS_MASK=buffers.mass_mask,
        ALL=inputs.n <= buffers.num_samples,
        BS=LOCATED_POINTS,
    )
    return drawn


def weigh_draws(
    x: Inputs, inputs: InputArguments, buffers: MassBuffers, drawn: LocatedDraws
) -> SketchDecodeResult:
    """Weigh the draws by their exact logits, and average their values."""
    heads, rows, _, width = x.shape
    replicates = buffers.replicates
    gather = gather_options(x, buffers)
    chunks = -(-buffers.num_samples // gather["CHUNK"])
    parts = (heads, rows, replicates, chunks, 3)
    sums = {
        "scalar": x.q.new_empty(parts, dtype=torch.float32),
        "vector": x.q.new_empty(*parts, width, dtype=torch.float32),
    }
    log_weight = x.q.new_empty(drawn.inclusion.shape, dtype=torch.float32)
    features = max(16, power_of_two(x.q.shape[2]))
    grid = (heads * rows, replicates, chunks)
    launch(weigh_kernel, grid, inputs, buffers, drawn, log_weight=log_weight, **sums, BD=features, **gather)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    output = x.q.new_empty(heads, rows, width, dtype=torch.float32 if INTERPRETED else x.v.dtype)
    std_error = x.q.new_empty(heads, rows, width, dtype=torch.float32)
    log_normaliser = x.q.new_empty(heads, rows, replicates, dtype=torch.float32)
    launch(
        combine_kernel,
        buffers.row_programs,
        inputs,
        buffers,
        **sums,
        output=output,
        std_error=std_error,
        log_normaliser=log_normaliser,
        chunks=chunks,
        BC=power_of_two(chunks),
        BV=gather["BV"],
    )
    return SketchDecodeResult(output.to(x.v.dtype), std_error, drawn.index, log_weight, log_normaliser)
