"""Decoding by draws from exact logits: one pass over K, systematic draws by page and then within, V only at the draws."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import LOG2_E, Inputs
from ..launches import (
    LOCATED,
    Space,
    dot_dtype,
    draw_options,
    mask_pointer,
    pages_at_once,
    scan_grid,
    scan_options,
    word,
)
from ..masses import PAGE
from .reference import Decoded
from .triton import locate_kernel, mean_kernel, prefix_kernel, scan_kernel


def decode(x: Inputs, num_samples: int, replicates: int, seed: Tensor) -> Decoded:
    """Averages of the values at systematic draws from exact logits: unbiased.

    K is read once and V only at the draws. Between the two passes stay the masses of the keys and sums of eight, about
    three bytes a key and row. Points lie equally far apart along them, so that a page of keys gets its share of the draws
    rounded up or down at random, and a key within it likewise. Each replicate has an offset of its own, which the heads
    of a group share.

    Parameters
    ----------
    x : Inputs
        On CUDA, or on the CPU in Triton's interpreter; float32, float16 or bfloat16, up to 256 features.
    num_samples : int
        S, the draws of a row and replicate.
    replicates : int
        R.
    seed : Tensor, int64, (), on the same device
    """
    heads, rows, _, width = x.shape
    space = Space.of(x, num_samples, replicates)
    pages = space.sums.shape[-1]
    scan_kernel[scan_grid(x, pages)](
        x.q,
        x.k,
        mask_pointer(x),
        space.mass,
        space.part,
        space.sums,
        space.top,
        seed,
        x.scale * LOG2_E,
        x.k.shape[1],
        rows,
        x.length,
        x.shape[2],
        pages,
        x.q.shape[2],
        *x.k.stride(),
        *((0, 0, 0, 0) if x.mask is None else x.mask.stride()),
        HAS_MASK=0 if x.mask is None else 1 if x.mask.dtype == torch.bool else 2,
        DOT=dot_dtype(x.q),
        **scan_options(x, space),
    )
    prefix_kernel[(heads * rows,)](
        space.sums,
        space.top,
        space.start,
        space.total,
        space.highest,
        space.page,
        seed,
        rows,
        x.length,
        pages,
        space.fine,
        num_samples,
        replicates,
        BP=pages_at_once(space),
        num_warps=8,
    )
    indices = x.q.new_empty(heads, rows, replicates * num_samples, dtype=torch.int64)
    locate_kernel[(heads * rows, replicates, -(-num_samples // LOCATED))](
        space.mass,
        space.part,
        space.top,
        space.start,
        space.total,
        space.highest,
        space.page,
        seed,
        indices,
        rows,
        x.length,
        pages,
        num_samples,
        replicates,
        space.fine,
        PAGE=PAGE,
        WORD=word(space),
        BS=LOCATED,
    )
    options = draw_options(x, space, num_samples)
    chunks = -(-num_samples // options["CHUNK"])
    sums = x.q.new_empty(heads, rows, replicates, chunks, width, dtype=torch.float32)
    mean_kernel[(heads * rows, replicates, chunks)](
        x.v,
        indices,
        space.total,
        sums,
        x.k.shape[1],
        rows,
        width,
        num_samples,
        replicates,
        *x.v.stride(),
        **options,
    )
    parts = sums.sum(3) if chunks > 1 else sums[:, :, :, 0]
    return Decoded(parts, indices, space.total > 0)
