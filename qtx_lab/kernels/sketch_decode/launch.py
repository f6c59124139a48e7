"""Decoding by draws from a sketch of the keys: scan the sketch, draw, exact logits and values at the draws alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..inputs import LOG2_E, Inputs
from ..launches import (
    LOCATED,
    Space,
    draw_options,
    pages_at_once,
    power_of_two,
    scan_grid,
    scan_options,
    size_class,
    word,
)
from ..masses import PAGE, UNITS, least_bits
from ..philox import INTERPRETED
from .reference import NEWTON_STEPS, SEARCHED_PAGES, Sketch, SketchDecoded, defensive_inverse
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

KINDS = {torch.float16: 0, torch.int8: 1, torch.uint8: 2}


@dataclass(frozen=True)
class Plan:
    """What is known of each of N M rows before keys are drawn, and how to draw them; see `Proposal`."""

    least: Tensor
    """(N, M), int64: the mass that a page is given at the least."""
    sure: Tensor
    """(N, M), int64: the mass from which a key is sure."""
    step: Tensor
    """(N, M), int64: how far apart points lie."""

    @classmethod
    def of(
        cls, x: Inputs, space: Space, num_samples: int, replicates: int, defensive: float, seed: Tensor
    ) -> Plan:
        """From the masses that a scan has left in `space`, where pages start then too."""
        n, pages = x.shape[2], space.sums.shape[-1]
        programs, every = space.total.numel(), n <= num_samples
        least, sure, step = (torch.empty_like(space.total) for _ in range(3))
        rows_of, sizes = (space.sums, space.top), (n, pages, space.fine)
        searched = min(SEARCHED_PAGES, power_of_two(pages))
        plan_kernel[(programs,)](
            space.mass,
            *rows_of,
            space.highest,
            least,
            sure,
            x.q.new_empty(programs, searched, dtype=torch.int32),
            *sizes,
            defensive_inverse(pages, defensive),
            num_samples,
            -(-pages // SEARCHED_PAGES),
            BP=pages_at_once(space),
            BS=searched,
            PAGE=PAGE,
            WORD=word(space),
            LEAST_BITS=least_bits(space.mass.dtype),
            STEPS=NEWTON_STEPS,
            ALL=every,
        )
        cap_kernel[lambda meta: (programs, -(-pages // meta["BP"]))](
            space.mass,
            space.part,
            *rows_of,
            space.start,
            space.highest,
            least,
            sure,
            *sizes,
            SIZE=size_class(n),
            PAGE=PAGE,
            UNITS=int(UNITS[space.mass.dtype]),
            WORD=word(space),
            ALL=every,
        )
        step_kernel[(programs,)](
            space.start,
            space.total,
            sure,
            step,
            space.page,
            seed,
            x.q.shape[1],
            x.length,
            pages,
            num_samples,
            replicates,
            BP=pages_at_once(space),
            num_warps=8,
        )
        return cls(least, sure, step)


def scan_sketch(x: Inputs, sketch: Sketch, space: Space, seed: Tensor) -> None:
    """Leave the masses of the guessed logits in `space`."""
    heads, rows, n, _ = x.shape
    kind = KINDS[sketch.table.dtype]
    half, parts = sketch.table.shape[2], 1 + (kind == 2)
    width = max(32 if kind else 16, power_of_two(half))
    digits = x.q.new_empty(heads, rows, 2, parts * width, dtype=torch.int8 if kind else torch.float16)
    unit = x.q.new_empty(heads, rows, dtype=torch.float32)
    options = scan_options(x, space)
    digits_kernel[(heads * rows,)](
        x.q,
        sketch.weight,
        digits,
        unit,
        x.scale * LOG2_E,
        rows,
        x.q.shape[2],
        sketch.weight.shape[2],
        half,
        BD=options.pop("BD"),
        BR=width,
        HALVES=parts,
    )
    pages = space.sums.shape[-1]
    scan_sketch_kernel[scan_grid(x, pages)](
        digits,
        unit,
        sketch.table,
        space.mass,
        space.part,
        space.sums,
        space.top,
        seed,
        rows,
        n,
        pages,
        half,
        *sketch.table.stride()[:2],
        BR=width,
        KIND=kind,
        **options,
    )


def sketch_decode(
    x: Inputs, sketch: Sketch, num_samples: int, replicates: int, seed: Tensor, *, defensive: float = 0.02
) -> SketchDecoded:
    """Self-normalised averages of the values at draws from a sketch, with their standard errors: biased by O(1 / S).

    The proposal is near (1 - epsilon) softmax(l~) + epsilon / n for guessed logits l~, in whole numbers (`Proposal`). Points
    equally far apart draw key j with probability pi_j = min(1, c q_j), c such that sum_j pi_j is about S and not more: the
    heaviest surely, none twice, as by `SampledKVCache` on the CPU. The exact logits of the keys drawn weigh them, w_j
    proportional to exp(l_j) / pi_j, sum_j w_j = 1 (Hajek 1971). Their variance is estimated by
    sum_j (1 - pi_j) w_j^2 (v_j - o)^2, that of independent inclusion, which a comb along keys in random order does not reach.
    Reads all of the sketch, of K and V the drawn rows alone.

    Parameters
    ----------
    x : Inputs
        As of `decode`; no mask.
    sketch : Sketch
    num_samples, replicates : int
        S draws in each of R independent repetitions, averaged.
    seed : Tensor, int64, (), on the same device
    defensive : float
        epsilon, 0 < epsilon < 1.
    """
    heads, rows, n, width = x.shape
    draws = num_samples * replicates
    space = Space.of(x, num_samples, replicates)
    scan_sketch(x, sketch, space, seed)
    plan = Plan.of(x, space, num_samples, replicates, defensive, seed)
    indices = x.q.new_empty(heads, rows, draws, dtype=torch.int64)
    chances, log_weights = (x.q.new_empty(heads, rows, draws, dtype=torch.float32) for _ in range(2))
    locate_sketch_kernel[(heads * rows, replicates, -(-num_samples // LOCATED))](
        space.mass,
        space.part,
        space.sums,
        space.top,
        space.start,
        space.total,
        space.highest,
        plan.least,
        plan.sure,
        plan.step,
        space.page,
        seed,
        indices,
        chances,
        rows,
        x.length,
        n,
        space.sums.shape[-1],
        num_samples,
        replicates,
        space.fine,
        PAGE=PAGE,
        UNITS=int(UNITS[space.mass.dtype]),
        WORD=word(space),
        ALL=n <= num_samples,
        BS=LOCATED,
    )
    options: dict[str, Any] = draw_options(x, space, num_samples)
    chunks = -(-num_samples // options["CHUNK"])
    parts = (heads, rows, replicates, chunks, 3)
    scalars = x.q.new_empty(parts, dtype=torch.float32)
    vectors = x.q.new_empty(*parts, width, dtype=torch.float32)
    weigh_kernel[(heads * rows, replicates, chunks)](
        x.q,
        x.k,
        x.v,
        indices,
        chances,
        log_weights,
        scalars,
        vectors,
        x.scale * LOG2_E,
        x.k.shape[1],
        rows,
        x.q.shape[2],
        width,
        num_samples,
        replicates,
        *x.k.stride(),
        *x.v.stride(),
        BD=max(16, power_of_two(x.q.shape[2])),
        **options,
    )
    # The interpreter cuts bfloat16 off where a GPU rounds.
    output = x.q.new_empty(heads, rows, width, dtype=torch.float32 if INTERPRETED else x.v.dtype)
    std_error = x.q.new_empty(heads, rows, width, dtype=torch.float32)
    normaliser = x.q.new_empty(heads, rows, replicates, dtype=torch.float32)
    combine_kernel[(heads * rows,)](
        scalars,
        vectors,
        output,
        std_error,
        normaliser,
        replicates,
        chunks,
        width,
        BC=power_of_two(chunks),
        BV=options["BV"],
    )
    return SketchDecoded(output.to(x.v.dtype), std_error, indices, log_weights, normaliser)
