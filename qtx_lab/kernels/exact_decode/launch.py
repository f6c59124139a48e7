"""Exact attention of few queries: all keys and values of a cache are read once."""

from __future__ import annotations

from typing import Any

import torch

from ..choice import check_readable
from ..inputs import LOG2_E
from ..launches import dot_dtype, launch, power_of_two
from ..philox import INTERPRETED
from .reference import CachedInputs, ExactResult
from .triton import merge_kernel, split_kernel

MAX_ROWS = 64
"""Rows of a key head that read each key and value together: for more they are read again."""

PROGRAMS = 512
"""Programs that keep every multiprocessor of a large GPU busy."""

FEWEST_KEYS = 256
"""Keys of a program, at least, so that what it writes is little beside what it reads."""


def exact_decode(x: CachedInputs) -> ExactResult:
    """Exact attention of the newest tokens of a cache, and its log-sum-exp.

    All rows of a key head, the query heads of its group at all positions, are one tile up to `MAX_ROWS`, so
    that each key and value is read once for all of them: it takes the time of a decoded token to verify
    several. The keys of a head are split among programs, whose results a second kernel merges, so that a
    single sequence keeps a GPU busy (Dao and others, Flash-Decoding, 2023). Nothing waits for the host, and
    it can be captured in a CUDA graph, whose replays read the lengths and the table that are there then.

    Parameters
    ----------
    x : CachedInputs
        On CUDA, or on the CPU in Triton's interpreter; up to 256 features. A token that the block table does
        not have makes the rows that see it NaN; it is not checked before, for which the host would wait.

    Raises
    ------
    DtypeError
        If this GPU cannot read keys or values of this dtype.

    Examples
    --------
    >>> q, k = torch.randn(2, 12, 64), torch.randn(1, 2, 1000, 64)  # 4 query heads at 3 positions
    >>> exact_decode(CachedInputs(q.cuda(), k.cuda(), k.cuda(), 3, 0.125)).output.shape  # doctest: +SKIP
    torch.Size([2, 12, 64])
    """
    check_readable(k=x.k, v=x.v)
    heads, rows, features = x.q.shape
    width, n, new = x.v.shape[-1], x.num_keys, x.q.new_empty
    options = block_sizes(x)
    splits = -(-n // options["SPLIT"])
    parts = {
        "largest": new(heads, rows, splits, dtype=torch.float32),
        "total": new(heads, rows, splits, dtype=torch.float32),
        "vector": new(heads, rows, splits, width, dtype=torch.float32),
        "width": width,
    }
    scale, softcap = x.scale * x.k_scale, 0.0 if x.softcap is None else x.softcap
    tiles = -(-rows // options["BM"])
    launch(
        split_kernel,
        (heads * tiles, splits),
        **parts,
        q=x.q.contiguous(),
        k=x.k,
        v=x.v,
        block_table=x.q if x.block_table is None else x.block_table.contiguous(),
        lengths=x.q if x.lengths is None else x.lengths.contiguous(),
        logit_scale=scale * LOG2_E,
        softcap=softcap * LOG2_E,
        window=0 if x.window is None else min(x.window, 1 << 30),
        kv_heads=x.k.shape[1],
        rows=rows,
        length=x.length,
        n=n,
        features=features,
        blocks=x.k.shape[0],
        block_size=x.k.shape[2],
        columns=1 if x.block_table is None else x.block_table.shape[1],
        **dict(zip(("k_stride_b", "k_stride_h", "k_stride_n", "k_stride_d"), x.k.stride(), strict=True)),
        **dict(zip(("v_stride_b", "v_stride_h", "v_stride_n", "v_stride_d"), x.v.stride(), strict=True)),
        PAGED=x.block_table is not None,
        HAS_LENGTHS=x.lengths is not None,
        HAS_WINDOW=x.window is not None,
        HAS_SOFTCAP=x.softcap is not None,
        DOT=dot_dtype(x.q),
        **options,
    )
    # The interpreter cuts bfloat16 off where a GPU rounds.
    output = new(heads, rows, width, dtype=torch.float32 if INTERPRETED else x.q.dtype)
    log_sum_exp = new(heads, rows, dtype=torch.float32)
    launch(
        merge_kernel,
        (heads * rows,),
        **parts,
        sinks=x.q if x.sinks is None else x.sinks.float().contiguous(),
        output=output,
        log_sum_exp=log_sum_exp,
        v_scale=x.v_scale,
        splits=splits,
        HAS_SINKS=x.sinks is not None,
        BC=min(32, power_of_two(splits)),
        BV=options["BV"],
        num_warps=4,
    )
    return ExactResult(output.to(x.q.dtype), log_sum_exp)


def block_sizes(x: CachedInputs) -> dict[str, Any]:
    """Rows, features and keys of a block, and the keys of a program."""
    heads, rows, features = x.q.shape
    wide = max(features, x.v.shape[-1]) * x.q.element_size() > 256
    block_rows = max(8, min(MAX_ROWS, power_of_two(rows)))
    programs = max(1, heads * -(-rows // block_rows))
    keys = -(-x.num_keys // max(1, -(-PROGRAMS // programs)))
    return {
        "BM": block_rows,
        "BD": max(16, power_of_two(features)),
        "BV": max(16, power_of_two(x.v.shape[-1])),
        "BN": 32 if wide or x.block_table is not None else 64,
        "SPLIT": max(FEWEST_KEYS, power_of_two(keys)),
    }
