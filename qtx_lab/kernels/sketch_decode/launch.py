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
    launch,
    power_of_two,
    search_levels,
    size_class,
)
from ..masses import PAGE, group_dtype, group_units
from ..philox import INTERPRETED
from .reference import (
    NEWTON_STEPS,
    SAMPLED_PLACES,
    SEARCHED_PAGES,
    SketchDecodeResult,
    SketchTable,
    inverse_page_share,
    most_pages,
)
from .triton_plan import locate_sketch_kernel, plan_kernel
from .triton_scan import prepare_kernel, scan_sketch_kernel
from .triton_weigh import weigh_kernel

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
    GROUP_UNITS: int
    """The largest mass that it has by all of them."""

    @classmethod
    def of(cls, x: Inputs, dtype: torch.dtype) -> Group:
        """The group of these inputs, whose masses have this dtype."""
        size = x.q.shape[1] // max(1, x.length)
        units = group_units(size, dtype)
        return cls(size, max(4, power_of_two(size)), units, size * int(units))


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
class SketchCall:
    """What the launches of one call share."""

    x: Inputs
    inputs: InputArguments
    numbers: StreamArguments
    buffers: MassBuffers
    group: Group
    order: Order

    @classmethod
    def of(
        cls, x: Inputs, sketch: SketchTable, num_samples: int, replicates: int, stream: Stream
    ) -> SketchCall:
        """The arguments and empty buffers of a call."""
        dtype = group_dtype(num_samples, x.most_visible)
        return cls(
            x,
            InputArguments.of(x),
            StreamArguments.of(stream, x),
            MassBuffers.of(x, x.length, most_pages(x), dtype, num_samples, replicates),
            Group.of(x, dtype),
            Order.of(sketch),
        )


@dataclass(frozen=True)
class PreparedQueries:
    """What the scan needs of N L groups' queries, in which P = `chunks` programs take part."""

    digit: Tensor
    """(N L, G, 2, HALVES * BR), int8: upper and lower digits."""
    unit: Tensor
    """(N L, G), float32."""
    exact_logit: Tensor
    """(N L, G, num_exact), float32."""
    largest: Tensor
    """(N L, G, P), float32: the largest logit of a program's keys."""
    total: Tensor
    """(N L, G, P), float32: the sum of 2^(logit - largest) times the keys for which each stands."""
    num_exact: int
    chunks: int
    line_bytes: int
    """Bytes of a key in the table: r, or half of it."""
    BR: int
    HALVES: int
    """1 where a component is a byte, 2 where it is a nibble."""

    @classmethod
    def of(cls, call: SketchCall, sketch: SketchTable) -> PreparedQueries:
        """Empty buffers for this call."""
        (programs,), new, group = call.buffers.row_programs, call.x.q.new_empty, call.group.GROUP
        line_bytes, halves = sketch.table.shape[2], 2 if sketch.table.dtype == torch.uint8 else 1
        block = max(32, power_of_two(line_bytes))
        chunks = -(-most_prepared(call.x, sketch.num_exact) // PREPARED_KEYS)
        return cls(
            new(programs, group, 2, halves * block, dtype=torch.int8),
            new(programs, group, dtype=torch.float32),
            new(programs, group, sketch.num_exact, dtype=torch.float32),
            new(programs, group, chunks, dtype=torch.float32),
            new(programs, group, chunks, dtype=torch.float32),
            sketch.num_exact,
            chunks,
            line_bytes,
            block,
            halves,
        )


def most_prepared(x: Inputs, num_exact: int) -> int:
    """The most keys of a group from whose logits `prepare_kernel` estimates normalisers."""
    if x.is_banded:  # how many of the others fit into equal steps is known on the device only
        return min(num_exact, x.most_visible) + min(x.most_visible, SAMPLED_PLACES)
    others = x.most_visible - num_exact
    return num_exact + -(-others // max(1, -(-others // SAMPLED_PLACES)))


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


@dataclass(frozen=True)
class ChunkSums:
    """What programs leave of their draws for the last one of a group."""

    largest: Tensor
    """(N, M, R, chunks), float32: the largest log w."""
    total: Tensor
    """(N, M, R, chunks), float32: sum of w."""
    vector: Tensor
    """(N, M, R, chunks, Ev), float32: sum of w v."""


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
        As for `decode`, without a mask. Keys are drawn by guesses of their logits without a softcap, which
        their weights then know; sinks are in the sum by which each replicate's weights are divided. A token
        that the block table does not have makes the rows that draw it NaN.
    sketch : SketchTable
        Of n places for each of the N key heads, side by side, in blocks or not. With an order, by which the
        keys of a window would lie anywhere, there can be no window, and lengths for L = 1 only:
        `SketchTable.in_order_of_keys` has none.
    num_samples, replicates : int
        S draws of each group in each of R independent repetitions, which are averaged.
    stream : Stream
        Of N heads and L positions, on the same device.
    defensive : float
        epsilon, 0 < epsilon < 1.

    Raises
    ------
    ShapeError
        If the stream or the sketch does not fit.
    ArgumentError
        If there is a mask, or what an order of the keys does not allow.
    DtypeError
        If this GPU cannot read keys or values of this dtype.
    """
    sketch.check(x)
    call = SketchCall.of(x, sketch, num_samples, replicates, stream)
    scan_sketch(call, sketch)
    return draw_and_weigh(call, plan_draws(call, defensive))


def scan_sketch(call: SketchCall, sketch: SketchTable) -> None:
    """Guess all logits and leave the masses of the keys in the buffers."""
    inputs, buffers, queries = call.inputs, call.buffers, PreparedQueries.of(call, sketch)
    (programs,) = buffers.row_programs
    launch(
        prepare_kernel,
        (programs, call.group.GROUP + queries.chunks),
        inputs,
        call.group,
        call.order,
        queries,
        weight=sketch.weight,
        centre=sketch.centre,
        rank=sketch.weight.shape[2],
        BD=max(16, power_of_two(inputs.features)),
        BP=PREPARED_KEYS,
    )
    launch(
        scan_sketch_kernel,
        lambda meta: (programs, -(-buffers.pages // (meta["NP"] * meta["LOOP"]))),
        inputs,
        buffers,
        call.group,
        queries,
        table=sketch.table,
        table_stride_h=sketch.table.stride(0),
        table_stride_n=sketch.table.stride(1),
        BC=power_of_two(queries.chunks),
        PAGE=PAGE,
        SIZE=size_class(inputs.n),
    )


def plan_draws(call: SketchCall, defensive: float) -> Plan:
    """Plan the draws from the masses that a scan has left; the buffers then also say where pages start."""
    buffers, (programs,) = call.buffers, call.buffers.row_programs
    rows, new = buffers.row_exponent.shape, buffers.page_start.new_empty
    plan = Plan(new(rows), new(rows), new(rows), new(rows, dtype=torch.int32))
    searched = min(SEARCHED_PAGES, power_of_two(buffers.pages))
    launch(
        plan_kernel,
        buffers.row_programs,
        call.inputs,
        buffers,
        call.group,
        plan,
        searched=new(programs, searched, dtype=torch.int32),
        inverse_share=inverse_page_share(defensive),
        BP=buffers.pages_at_once,
        BS=searched,
        PAGE=PAGE,
        MASS_MASK=buffers.mass_mask,
        MIN_BITS=int(call.group.UNITS / 2).bit_length(),
        STEPS=NEWTON_STEPS,
    )
    return plan


def draw_and_weigh(call: SketchCall, plan: Plan) -> SketchDecodeResult:
    """Draw keys, weigh them by their exact logits, and average their values."""
    x, buffers = call.x, call.buffers
    heads, rows, n, width = x.shape
    (programs,), replicates, num_samples = buffers.row_programs, buffers.replicates, buffers.num_samples
    # Every multiprocessor gets many programs at a time.
    least_chunks = max(1, -(-2048 // (programs * replicates)))
    chunk = min(MAX_CHUNK, max(64, power_of_two(-(-num_samples // least_chunks))))
    chunks = -(-num_samples // chunk)
    parts, new = (heads, rows, replicates, chunks), x.q.new_empty
    sums = ChunkSums(
        new(parts, dtype=torch.float32),
        new(parts, dtype=torch.float32),
        new(*parts, width, dtype=torch.float32),
    )
    index = new(heads, x.length, replicates * num_samples, dtype=torch.int64)
    log_weight = new(heads, rows, replicates * num_samples, dtype=torch.float32)
    inclusion = new(index.shape, dtype=torch.float32)
    launch(
        locate_sketch_kernel,
        (programs, replicates, -(-num_samples // LOCATED_POINTS)),
        call.inputs,
        call.numbers,
        buffers,
        call.group,
        plan,
        call.order,
        index=index,
        inclusion=inclusion,
        PAGE=PAGE,
        LEVELS=search_levels(buffers.pages),
        MASS_MASK=buffers.mass_mask,
        BS=LOCATED_POINTS,
    )
    # The interpreter cuts bfloat16 off where a GPU rounds.
    output = new(heads, rows, width, dtype=torch.float32 if INTERPRETED else x.output_dtype)
    log_normaliser = new(heads, rows, replicates, dtype=torch.float32)
    launch(
        weigh_kernel,
        (programs, replicates, chunks),
        call.inputs,
        buffers,
        call.group,
        plan,
        sums,
        index=index,
        inclusion=inclusion,
        log_weight=log_weight,
        output=output,
        log_normaliser=log_normaliser,
        BD=max(16, power_of_two(call.inputs.features)),
        BV=max(16, power_of_two(width)),
        BC=min(32, power_of_two(chunks)),
        SIZE=size_class(n),
        CHUNK=chunk,
    )
    return SketchDecodeResult(output.to(x.output_dtype), index, inclusion, log_weight, log_normaliser)
