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
    gather_options,
    launch,
    scan_grid,
    scan_options,
    search_levels,
)
from ..masses import PAGE, UNITS, mass_dtype
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
        Caches may be in blocks and have 8 bits. A row that sees a token which neither n nor the block table
        has is NaN; this is not checked before, for which the host would wait.
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
    DtypeError
        If this GPU cannot read keys or values of this dtype.

    Examples
    --------
    >>> k = torch.randn(9, 2, 16, 64).bfloat16().cuda()  # doctest: +SKIP
    >>> table, lengths = torch.tensor([[4, 1, 7], [8, 0, 3]]).cuda(), torch.tensor([40, 33]).cuda()
    ... # doctest: +SKIP
    >>> q = torch.randn(4, 4, 64).bfloat16().cuda()  # doctest: +SKIP
    >>> x = Inputs(q, k, k, None, 1, 0.125, lengths=lengths, block_table=table)  # doctest: +SKIP
    >>> decode(x, 64, 1, Stream.of(0, 2, 2, 1)).output.shape  # doctest: +SKIP
    torch.Size([4, 4, 64])
    """
    heads, rows, _, width = x.shape
    inputs, numbers = InputArguments.of(x), StreamArguments.of(stream, x)
    dtype, pages = mass_dtype(num_samples * replicates), -(-x.shape[2] // PAGE)
    buffers = MassBuffers.of(x, rows, pages, dtype, num_samples, replicates)
    mass_bits = buffers.fraction_bits + math.log2(UNITS[dtype])
    row_mass = x.q.new_empty(heads, rows, dtype=torch.int64)
    launch(scan_kernel, scan_grid(x), inputs, numbers, buffers, **scan_options(x, buffers))
    prefix = {"BP": buffers.pages_at_once, "num_warps": 8}
    launch(prefix_kernel, buffers.row_programs, inputs, buffers, row_mass=row_mass, **prefix)

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
        value_weight=x.v_scale / num_samples,
        mass_bits=mass_bits,
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
        mass_bits,
        x.sinks,
    )
