"""Decoding by draws from a sketch of the keys: scan the sketch, draw, and read the drawn keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...streams import Stream
from ..inputs import Inputs
from ..launches import (
    InputArguments,
    MassBuffers,
    StreamArguments,
    dot_dtype,
    launch,
    power_of_two,
    search_levels,
    size_class,
)
from ..masses import PAGE, group_dtype, group_units
from ..philox import INTERPRETED
from .reference import (
    NEWTON_STEPS,
    SEARCHED_PAGES,
    SketchDecodeResult,
    SketchTable,
    inverse_page_share,
    sampled_places,
)
from .triton import locate_sketch_kernel, plan_kernel, prepare_kernel, scan_sketch_kernel, weigh_kernel

PREPARED_KEYS = 64
"""Keys whose own logits one program computes."""
LOCATED_POINTS = 128
"""Points whose keys a program locates, one for each thread."""
MAX_CHUNK = 256
"""Draws that one program gathers, at most."""


@dataclass(frozen=True)
class Group:
    """The G query heads that share a key head, as kernels name them."""

    GROUP: int
    """G."""
    BG: int
    """G, or the power of two above it; matrix products take 4 or more."""
    UNITS: float
    """The largest mass that a key has by one of the rows."""

    @classmethod
    def of(cls, x: Inputs, dtype: torch.dtype) -> Group:
        """The group of these inputs, whose masses have this dtype."""
        size = x.q.shape[1] // max(1, x.length)
        return cls(size, max(4, power_of_two(size)), group_units(size, dtype))


@dataclass(frozen=True)
class Order:
    """The key at each place."""

    order: Tensor
    order_stride_h: int
    order_stride_n: int
    HAS_ORDER: bool

    @classmethod
    def of(cls, sketch: SketchTable) -> Order:
        """The order of this sketch."""
        if sketch.order is None:  # nothing reads it
            return cls(sketch.table, 0, 0, False)
        return cls(sketch.order, sketch.order.stride(0), sketch.order.stride(1), True)


@dataclass(frozen=True)
class Plan:
    """How the keys of N L groups are drawn: see `reference.Proposal`."""

    page_floor: Tensor
    """(N, L), int64: the mass that every page gets at least."""
    certain_mass: Tensor
    """(N, L), int64: the mass from which a key is drawn with certainty."""
    row_mass: Tensor
    """(N, L), int64: the capped masses of all keys."""
    finished: Tensor
    """(N, L), int32: how many programs have weighed draws of a group; 0 between calls."""


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

    The G query heads of a key head read the same keys, so they share their draws: the proposal is about
    (1 - epsilon) q + epsilon / n, where q is the mean over the group of softmax(l~) for guessed logits l~, in
    whole numbers (`reference.Proposal`). Equally spaced points draw key j with probability pi_j = min(1, c
    q_j), where c is such that the sum of all pi_j is about S and not more: the heaviest keys with certainty,
    and none twice. With S = G S' a key of guessed probability p_j in any of the rows has pi_j of about
    min(1, S' p_j) or more, as if that row had S' draws of its own. The exact logits of the drawn keys give
    their weights in each row, w_j proportional to exp(l_j) / pi_j, which sum to 1 (Hajek 1971). The variance
    is estimated by sum_j (1 - pi_j) w_j^2 (v_j - o)^2, that of independent draws; points along keys in random
    order have less. All of the sketch is read, and of K and V only the drawn rows.

    Parameters
    ----------
    x : Inputs
        As for `decode`, without mask, window and lengths. Keys are drawn by guesses of their logits without a
        softcap, which their weights then know.
    sketch : SketchTable
    num_samples, replicates : int
        S draws of each group in each of R independent repetitions, which are averaged.
    stream : Stream
        Of N heads and L positions, on the same device.
    defensive : float
        epsilon, 0 < epsilon < 1.

    Raises
    ------
    ShapeError
        If the stream does not fit.
    ArgumentError
        If there are a mask, a window or lengths.
    """
    x.refuse("mask", "window", "lengths")
    inputs, numbers = InputArguments.of(x), StreamArguments.of(stream, x)
    dtype = group_dtype(num_samples, x.shape[2])
    buffers = MassBuffers.of(x, x.length, dtype, num_samples, replicates)
    group, order = Group.of(x, dtype), Order.of(sketch)
    scan_sketch(x, inputs, sketch, buffers, group, order)
    plan = plan_draws(inputs, buffers, group, defensive)
    return draw_and_weigh(x, inputs, numbers, buffers, plan, group, order)


def scan_sketch(
    x: Inputs, inputs: InputArguments, sketch: SketchTable, buffers: MassBuffers, group: Group, order: Order
) -> None:
    """Guess all logits and leave the masses of the keys in the buffers."""
    columns, halves = sketch.table.shape[2], 2 if sketch.table.dtype == torch.uint8 else 1
    block = max(32, power_of_two(columns))
    num_sampled = len(sampled_places(sketch.num_exact, inputs.n))
    chunks = -(-(sketch.num_exact + num_sampled) // PREPARED_KEYS)
    (programs,), new = buffers.row_programs, x.q.new_empty
    queries = {
        "digit": new(programs, group.GROUP, 2, halves * block, dtype=torch.int8),
        "unit": new(programs, group.GROUP, dtype=torch.float32),
        "exact_logit": new(programs, group.GROUP, sketch.num_exact, dtype=torch.float32),
        "largest": new(programs, group.GROUP, chunks, dtype=torch.float32),
        "total": new(programs, group.GROUP, chunks, dtype=torch.float32),
        "num_exact": sketch.num_exact,
        "columns": columns,
        "BR": block,
        "HALVES": halves,
    }
    launch(
        prepare_kernel,
        (programs, group.GROUP + chunks),
        inputs,
        group,
        order,
        **queries,
        weight=sketch.weight,
        centre=sketch.centre,
        rank=sketch.weight.shape[2],
        num_sampled=num_sampled,
        sample_step=max(1, -(-(inputs.n - sketch.num_exact) // max(1, num_sampled))),
        sample_weight=(inputs.n - sketch.num_exact) / max(1, num_sampled),
        DOT=dot_dtype(x.q),
        BD=max(16, power_of_two(inputs.features)),
        BP=PREPARED_KEYS,
    )
    launch(
        scan_sketch_kernel,
        lambda meta: (programs, -(-buffers.pages // (meta["NP"] * meta["LOOP"]))),
        inputs,
        buffers,
        group,
        **queries,
        table=sketch.table,
        table_stride_h=sketch.table.stride(0),
        table_stride_n=sketch.table.stride(1),
        chunks=chunks,
        BC=power_of_two(chunks),
        PAGE=PAGE,
        SIZE=size_class(inputs.n),
    )


def plan_draws(inputs: InputArguments, buffers: MassBuffers, group: Group, defensive: float) -> Plan:
    """Plan the draws from the masses that a scan has left; the buffers then also say where pages start."""
    pages, (programs,) = buffers.pages, buffers.row_programs
    rows, new = buffers.row_exponent.shape, buffers.page_start.new_empty
    plan = Plan(new(rows), new(rows), new(rows), new(rows, dtype=torch.int32))
    searched = min(SEARCHED_PAGES, power_of_two(pages))
    launch(
        plan_kernel,
        buffers.row_programs,
        inputs,
        buffers,
        plan,
        searched=new(programs, searched, dtype=torch.int32),
        inverse_share=inverse_page_share(pages, defensive),
        stride=-(-pages // SEARCHED_PAGES),
        BP=buffers.pages_at_once,
        BS=searched,
        PAGE=PAGE,
        MASS_MASK=buffers.mass_mask,
        MIN_BITS=int(group.UNITS / 2).bit_length(),
        STEPS=NEWTON_STEPS,
        ALL=inputs.n <= buffers.num_samples,
        **group_mass(group),
    )
    return plan


def group_mass(group: Group) -> dict[str, int]:
    """The largest mass of a key by all rows of a group, as an argument."""
    return {"UNITS": group.GROUP * int(group.UNITS)}


def draw_and_weigh(
    x: Inputs,
    inputs: InputArguments,
    numbers: StreamArguments,
    buffers: MassBuffers,
    plan: Plan,
    group: Group,
    order: Order,
) -> SketchDecodeResult:
    """Draw keys, weigh them by their exact logits, and average their values."""
    heads, rows, n, width = x.shape
    (programs,), replicates, num_samples = buffers.row_programs, buffers.replicates, buffers.num_samples
    # Every multiprocessor gets many programs at a time.
    least_chunks = max(1, -(-2048 // (programs * replicates)))
    chunk = min(MAX_CHUNK, max(64, power_of_two(-(-num_samples // least_chunks))))
    chunks = -(-num_samples // chunk)
    parts, new = (heads, rows, replicates, chunks), x.q.new_empty
    sums = {
        "largest": new(parts, dtype=torch.float32),
        "total": new(parts, dtype=torch.float32),
        "vector": new(*parts, width, dtype=torch.float32),
    }
    index = new(heads, x.length, replicates * num_samples, dtype=torch.int64)
    log_weight = new(heads, rows, replicates * num_samples, dtype=torch.float32)
    inclusion = new(index.shape, dtype=torch.float32)
    launch(
        locate_sketch_kernel,
        (programs, replicates, -(-num_samples // LOCATED_POINTS)),
        inputs,
        numbers,
        buffers,
        plan,
        order,
        **group_mass(group),
        index=index,
        inclusion=inclusion,
        PAGE=PAGE,
        LEVELS=search_levels(buffers.pages),
        MASS_MASK=buffers.mass_mask,
        ALL=n <= num_samples,
        BS=LOCATED_POINTS,
    )
    # The interpreter cuts bfloat16 off where a GPU rounds.
    output = new(heads, rows, width, dtype=torch.float32 if INTERPRETED else x.v.dtype)
    log_normaliser = new(heads, rows, replicates, dtype=torch.float32)
    launch(
        weigh_kernel,
        (programs, replicates, chunks),
        inputs,
        buffers,
        group,
        plan,
        **sums,
        index=index,
        inclusion=inclusion,
        log_weight=log_weight,
        output=output,
        log_normaliser=log_normaliser,
        BD=max(16, power_of_two(inputs.features)),
        BV=max(16, power_of_two(width)),
        BC=min(32, power_of_two(chunks)),
        HAS_SOFTCAP=x.softcap is not None,
        DOT=dot_dtype(x.q),
        SIZE=size_class(n),
        CHUNK=chunk,
    )
    return SketchDecodeResult(output.to(x.v.dtype), index, inclusion, log_weight, log_normaliser)
