"""Sampled attention of many queries and its unbiased gradients, block by block: no map of queries by keys in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..inputs import LOG2_E, Inputs
from ..launches import dot_dtype, mask_pointer, power_of_two, size_class
from ..masses import PAGE
from .triton import backward_kv_kernel, backward_q_kernel, forward_kernel


def _launch(
    x: Inputs, num_samples: int, replicate: int, is_causal: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What all three kernels are given: numbers, then what they are specialised for."""
    _, rows, n, width = x.shape
    numbers = (
        num_samples,
        replicate,
        x.k.shape[1],
        rows,
        x.length,
        n,
        x.q.shape[2],
        width,
        *x.k.stride(),
        *x.v.stride(),
        *((0, 0, 0, 0) if x.mask is None else x.mask.stride()),
    )
    options = {
        "BD": max(16, power_of_two(x.q.shape[2])),
        "BV": max(16, power_of_two(width)),
        "PAGE": PAGE,
        "HAS_MASK": 0 if x.mask is None else 1 if x.mask.dtype == torch.bool else 2,
        "CAUSAL": is_causal,
        "DOT": dot_dtype(x.q),
        "SIZE": size_class(n),
    }
    return numbers, options


def prefill(
    x: Inputs, num_samples: int, seed: Tensor, *, is_causal: bool = False, replicate: int = 0
) -> tuple[Tensor, Tensor]:
    """The sampled output (N, M, Ev), float32, and the rows' base-2 normalisers (N, M): unbiased.

    Each page of keys has systematic draws of its own: S times its probability, rounded up or down at random, so that
    any page can be drawn again without the others, as the gradients need. What a page's draws miss of its probability is
    spread evenly over its keys, a control variate: only how values differ within a page makes noise. All of K is read
    twice and all of V once, S or not: this is for training with the noise of draws, not for speed over exact attention.

    Parameters
    ----------
    x : Inputs
        As of `decode`.
    num_samples : int
        S, the draws of a row, on average.
    seed : Tensor, int64, (), on the same device
    is_causal : bool
        Query i attends to keys 0..i.
    replicate : int
        Which of the independent repetitions of a seed.
    """
    heads, rows, _, width = x.shape
    output = x.q.new_empty(heads, rows, width, dtype=torch.float32)
    normaliser = x.q.new_empty(heads, rows, dtype=torch.float32)
    numbers, options = _launch(x, num_samples, replicate, is_causal)
    forward_kernel[lambda meta: (-(-rows // meta["BM"]) * heads,)](
        x.q, x.k, x.v, mask_pointer(x), output, normaliser, seed, x.scale * LOG2_E, *numbers, **options
    )
    return output, normaliser


def gradients(
    x: Inputs,
    num_samples: int,
    seed: Tensor,
    g: Tensor,
    output: Tensor,
    normaliser: Tensor,
    *,
    is_causal: bool = False,
    replicate: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unbiased estimates of q's (N, M, E), k's (N, n, E) and v's (N, n, Ev) gradients for g (N, M, Ev), float32.

    From what `prefill` gave; see `prefill_reference.gradients`.
    """
    heads, rows, n, width = x.shape
    delta = (g.float() * output).sum(-1)
    g = g.to(x.q.dtype).contiguous()
    numbers, options = _launch(x, num_samples, replicate, is_causal)
    dq, dk, dv = (
        x.q.new_empty(heads, *shape, dtype=torch.float32)
        for shape in ((rows, x.q.shape[2]), (n, x.q.shape[2]), (n, width))
    )
    inputs = (x.q, x.k, x.v, mask_pointer(x), g, delta, normaliser)
    both = (seed, x.scale, x.scale * LOG2_E, *numbers)
    backward_q_kernel[lambda meta: (-(-rows // meta["BM"]) * heads,)](*inputs, dq, *both, **options)
    backward_kv_kernel[(-(-n // PAGE) * heads,)](*inputs, dk, dv, *both, **options)
    return dq, dk, dv
