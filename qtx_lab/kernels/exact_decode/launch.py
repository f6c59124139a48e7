"""Exact attention of few queries: all keys and values of a cache are read once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..choice import check_readable
from ..inputs import LOG2_E
from ..launches import dot_dtype, launch, power_of_two, strides
from ..philox import INTERPRETED
from .reference import CachedInputs, ExactResult
from .triton import merge_kernel, split_kernel

MAX_ROWS = 64
"""Rows of a key head that read each key and value together: for more they are read again."""

PROGRAMS = 512
"""Programs that keep every multiprocessor of a large GPU busy."""

FEWEST_KEYS = 256
"""Keys of a program, at least, so that what it writes is little beside what it reads."""


@dataclass(frozen=True)
class CacheArguments:
    """Tensors, sizes and strides of `CachedInputs`, as kernels name them."""

    q: Tensor
    k: Tensor
    v: Tensor
    block_table: Tensor
    lengths: Tensor
    sinks: Tensor
    logit_scale: float
    """The factor of q · k for logits in base 2."""
    v_scale: float
    softcap: float
    """Of base-2 logits; 0 where there is none."""
    window: int
    kv_heads: int
    rows: int
    """M, the rows of a key head."""
    length: int
    """L, the queries of a query head."""
    n: int
    features: int
    width: int
    """The features of a value."""
    blocks: int
    block_size: int
    """T, the tokens of a block."""
    columns: int
    """C, the blocks of a sequence."""
    k_stride_b: int
    k_stride_h: int
    k_stride_n: int
    k_stride_d: int
    v_stride_b: int
    v_stride_h: int
    v_stride_n: int
    v_stride_d: int
    PAGED: bool
    HAS_LENGTHS: bool
    HAS_WINDOW: bool
    HAS_SOFTCAP: bool
    HAS_SINKS: bool
    DOT: Any
    """The dtype of the factors of products."""

    @classmethod
    def of(cls, x: CachedInputs) -> CacheArguments:
        """The arguments of these inputs. What they do not have nothing reads.

        Raises
        ------
        DtypeError
            If this GPU cannot read keys or values of this dtype.
        """
        check_readable(k=x.k, v=x.v)
        _, rows, features = x.q.shape
        return cls(
            x.q.contiguous(),
            x.k,
            x.v,
            x.q if x.block_table is None else x.block_table.contiguous(),
            x.q if x.lengths is None else x.lengths.contiguous(),
            x.q if x.sinks is None else x.sinks.float().contiguous(),
            x.scale * x.k_scale * LOG2_E,
            x.v_scale,
            0.0 if x.softcap is None else x.softcap * LOG2_E,
            0 if x.window is None else min(x.window, 1 << 30),
            x.k.shape[1],
            rows,
            x.length,
            x.num_keys,
            features,
            x.v.shape[-1],
            x.k.shape[0],
            x.k.shape[2],
            1 if x.block_table is None else x.block_table.shape[1],
            *strides(x.k),
            *strides(x.v),
            PAGED=x.block_table is not None,
            HAS_LENGTHS=x.lengths is not None,
            HAS_WINDOW=x.window is not None,
            HAS_SOFTCAP=x.softcap is not None,
            HAS_SINKS=x.sinks is not None,
            DOT=dot_dtype(x.q),
        )


@dataclass(frozen=True)
class SplitSums:
    """What programs leave of their keys for each row."""

    largest: Tensor
    """(N, M, splits), float32: the largest base-2 logit."""
    total: Tensor
    """(N, M, splits), float32: sum of 2^(logit - largest)."""
    vector: Tensor
    """(N, M, splits, Ev), float32: sum of that times the value."""


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
    arguments, options = CacheArguments.of(x), block_sizes(x)
    heads, rows, _ = x.q.shape
    splits, new = -(-arguments.n // options["SPLIT"]), x.q.new_empty
    parts = SplitSums(
        new(heads, rows, splits, dtype=torch.float32),
        new(heads, rows, splits, dtype=torch.float32),
        new(heads, rows, splits, arguments.width, dtype=torch.float32),
    )
    tiles = -(-rows // options["BM"])
    launch(split_kernel, (heads * tiles, splits), arguments, parts, **options)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    output = new(heads, rows, arguments.width, dtype=torch.float32 if INTERPRETED else x.q.dtype)
    log_sum_exp = new(heads, rows, dtype=torch.float32)
    launch(
        merge_kernel,
        (heads * rows,),
        arguments,
        parts,
        output=output,
        log_sum_exp=log_sum_exp,
        splits=splits,
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
