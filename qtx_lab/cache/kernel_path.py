"""Attending to a cache by the kernel that decodes from a sketch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..estimates import AttentionEstimate, Draws, EstimateInfo, KernelUse
from ..kernels.choice import choose
from ..kernels.inputs import MAX_DECODE_ROWS, Inputs
from ..kernels.memory import out_of_memory_explained
from ..kernels.sketch_decode.reference import GrowingSketch
from ..streams import Stream, make_seed


def attend_sketched(
    q: Tensor,
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    sketch: GrowingSketch,
    layout: tuple[int, ...],
    num_samples: int,
    replicates: int,
    scale: float,
    defensive: float,
    generator: torch.Generator | None,
) -> tuple[AttentionEstimate | None, dict[str, Any]]:
    """Draws from a cache's sketch by the kernel `sketch_decode`, or None; and what to tell of it in `diagnostics`.

    q (..., H, L, E) is `rows` (N, M, E); k (N, n, E) and v (N, n, Ev) lie as `layout` says, order (N, n) has
    which tokens they are.
    """
    heads, m, _ = rows.shape
    if m > MAX_DECODE_ROWS:
        reason = f"the kernel takes up to {MAX_DECODE_ROWS} rows a key head, not {m}"
        return None, {"kernel": KernelUse("torch", reason)}
    choice = choose((rows, k, v))
    if choice.path == "reference" or 0 in (heads, m):
        return None, {"kernel": KernelUse("torch", choice.reason), "fallbacks": choice.fallbacks}
    from ..kernels.sketch_decode.launch import sketch_decode

    with out_of_memory_explained(), torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        held = sketch.of(k, layout)
        x = Inputs(rows.contiguous(), k[None], v[None], None, q.shape[-2], scale)
        groups = k.shape[0] // max(1, q.shape[:-3].numel())
        stream = Stream.of(make_seed(generator, q.device), q.shape[:-3].numel(), groups, q.shape[-2])
        found = sketch_decode(x, held, num_samples, replicates, stream, defensive=defensive)
    row_shape = q.shape[:-1]
    indices = order[:, None].expand(-1, m, -1).gather(-1, found.indices)
    draws = Draws(indices, found.weights(), None, replicates).view(row_shape)
    return AttentionEstimate(
        output=found.output.view(*row_shape, -1),
        num_keys=k.shape[1],
        degrees_of_freedom=math.inf,
        make_draws=lambda: draws,
        make_std_error=lambda: found.std_error.view(*row_shape, -1),
        group=m // q.shape[-2],
        info=EstimateInfo(
            sampler=f"cache, {held.kind}",
            unbiased=False,
            num_samples=num_samples,
            replicates=replicates,
            draws_per_row=num_samples * replicates,
            effective_sample_size=draws.effective_sample_size(),
            kernel=KernelUse(choice.path, choice.reason, "sketch_decode"),
            fallbacks=choice.fallbacks,
        ),
    ), {}
