"""Caches in blocks of tokens, of which a table says where those of each sequence are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError


def check_per_sequence(batch: int, lengths: Tensor | None, block_table: Tensor | None) -> None:
    """Refuse lengths and block tables that are not whole numbers for each of B sequences.

    Raises
    ------
    ShapeError
    """
    columns = 0 if block_table is None else block_table.shape[-1]
    for name, x, shape in (("lengths", lengths, (batch,)), ("block_table", block_table, (batch, columns))):
        if x is not None and (x.shape != shape or x.dtype not in (torch.int32, torch.int64)):
            raise ShapeError(f"{name} is {x.dtype} {tuple(x.shape)}; it must be int32 or int64, {shape}.")


def side_by_side(x: Tensor, block_table: Tensor) -> Tensor:
    """The tokens of blocks x (blocks, Hkv, T, d) in the order of a table (B, C), copied: (B, Hkv, C T, d).

    Raises
    ------
    ArgumentError
        If the table names a block that is not there.
    """
    if bool(((block_table < 0) | (block_table >= len(x))).any()):
        raise ArgumentError(f"block_table names blocks that are not there: it must hold 0 to {len(x) - 1}.")
    return x[block_table.long()].transpose(1, 2).flatten(2, 3)


def tokens_at(x: Tensor, block_table: Tensor | None, head: int, tokens: Tensor) -> Tensor:
    """Keys or values x of one key head, side by side or in blocks, at tokens (...): (..., d).

    Parameters
    ----------
    x : Tensor, (B, Hkv, n, d), or with a table (blocks, Hkv, T, d)
    block_table : Tensor, (B, C), or None
    head : int
        From 0 to B Hkv - 1.
    tokens : Tensor, int64, (...)
    """
    sequence, kv_head = divmod(head, x.shape[1])
    if block_table is None:
        return x[sequence, kv_head][tokens]
    size = x.shape[2]
    return x[block_table[sequence].long()[tokens // size], kv_head, tokens % size]


def block_table_of(
    indptr: Tensor, indices: Tensor, last_page_len: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """The block table and the lengths of B sequences, from FlashInfer's description of their pages.

    Parameters
    ----------
    indptr : Tensor, int, (B + 1,)
        Where the pages of each sequence begin and end in `indices`.
    indices : Tensor, int, (pages,)
        The pages of all sequences, one sequence after another.
    last_page_len : Tensor, int, (B,)
        The tokens in the last page of each sequence, from 1 to `block_size`.
    block_size : int
        T, the tokens of a page.

    Returns
    -------
    block_table : Tensor, (B, C)
        Filled up with 0 behind a sequence's last page.
    lengths : Tensor, int, (B,)

    Examples
    --------
    >>> pages = torch.tensor([4, 1, 7])
    >>> block_table_of(torch.tensor([0, 2, 3]), pages, torch.tensor([5, 16]), 16)
    (tensor([[4, 1],
            [7, 0]]), tensor([21, 16]))
    """
    counts = indptr.diff()
    column = torch.arange(int(counts.max()), device=indices.device)
    at = (indptr[:-1, None] + column).clamp_max(max(0, len(indices) - 1))
    table = torch.where(column < counts[:, None], indices[at], 0)
    return table, (counts - 1) * block_size + last_page_len
