"""Decoding by systematic draws from exact logits: one pass over K, and V only at the draws."""

from __future__ import annotations

import math

import torch

from ...streams import Stream
from ..inputs import Inputs
from ..launches import (
    InputArguments,
    MassBuffers,
    StreamArguments,
    dot_dtype,
    gather_options,
    launch,
    mask_kind,
    scan_grid,
    scan_options,
    search_levels,
)
from ..masses import PAGE, mass_dtype
from .reference import DecodeResult
from .triton import mean_kernel, prefix_kernel, scan_kernel


def decode(x: Inputs, num_samples: int, replicates: int, stream: Stream) -> DecodeResult:
    """Average the values at systematic draws from exact logits: unbiased.

    K is read once, where some row sees it by window and lengths, and V only at the draws. Between the two
    passes the masses of the keys and sums of eight are kept, about three bytes for each key and row. The
    points of a row are equally spaced along its masses, so the number of draws in a page of keys is the
    expected one, rounded up or down at random, and likewise that of a key. Each replicate has an offset of
    its own, which the query heads of a group share.

    Parameters
    ----------
    x : Inputs
        On CUDA, or on the CPU in Triton's interpreter; float32, float16 or bfloat16, up to 256 features.
    num_samples : int
        S, the draws of a row and replicate.
    replicates : int
        R.
    stream : Stream
        Of N heads and L positions, on the same device.

    Raises
    ------
    ShapeError
        If the stream does not fit.
    """
    heads, rows, _, width = x.shape
    inputs, numbers = InputArguments.of(x), StreamArguments.of(stream, x)
    buffers = MassBuffers.of(x, rows, mass_dtype(num_samples * replicates), num_samples, replicates)
    row_mass = x.q.new_empty(heads, rows, dtype=torch.int64)
    scan = {
        "HAS_MASK": mask_kind(x),
        "HAS_SOFTCAP": x.softcap is not None,
        "HAS_WINDOW": x.is_banded,
        "HAS_LENGTHS": x.lengths is not None,
        "DOT": dot_dtype(x.q),
        **scan_options(x, buffers),
    }
    launch(scan_kernel, scan_grid(x), inputs, numbers, buffers, **scan)
    prefix = {"BP": buffers.pages_at_once, "num_warps": 8}
    launch(prefix_kernel, buffers.row_programs, buffers, row_mass=row_mass, **prefix)

    index = x.q.new_empty(heads, rows, replicates * num_samples, dtype=torch.int64)
    gather = gather_options(x, buffers)
    chunks = -(-num_samples // gather["CHUNK"])
    part = x.q.new_empty(heads, rows, replicates, chunks, width, dtype=torch.float32)
    grid = (heads * rows, replicates, chunks)
    launch(
        mean_kernel,
        grid,
        inputs,
        numbers,
        buffers,
        index=index,
        part=part,
        row_mass=row_mass,
        PAGE=PAGE,
        MASS_MASK=buffers.mass_mask,
        LEVELS=search_levels(buffers.pages),
        **gather,
    )
    return DecodeResult(
        part.sum(3) if chunks > 1 else part[:, :, :, 0],
        index,
        row_mass,
        buffers.row_exponent,
        buffers.fraction_bits + math.log2(scan["UNITS"]),
    )
