"""Exact attention of the newest tokens of a cache, by which drafts are verified: all is read once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .store import TokenStore

TILE_ROWS = 32
"""Queries of a key head that torch's attention on CPUs takes at once: for more it reads the keys again."""


def attend_exactly(store: TokenStore, rows: Tensor, positions: int, scale: float) -> Tensor:
    """Exact causal attention of the newest tokens of a store.

    All rows of a key head, the query heads of its group at all positions, are one tile of queries, so that
    each key and value is read once for all of them, up to `TILE_ROWS`.

    Parameters
    ----------
    store : TokenStore
        n tokens of N key heads.
    rows : Tensor, (N, G L, E)
        Queries, those of a query head at its L positions side by side.
    positions : int
        L <= n: row m is of token n - L + m % L.
    scale : float

    Returns
    -------
    Tensor, (N, G L, Ev), in the dtype of the store.
    """
    n, dtype = store.length, store.table.dtype
    keys, values, x = store.keys(), store.values(), rows.to(dtype)
    bias = None
    if positions > 1:
        position = torch.arange(positions, device=rows.device)
        hidden = position > position.repeat(rows.shape[1] // positions)[:, None]  # [G L, L]
        bias = torch.zeros(rows.shape[1], n, dtype=dtype, device=rows.device)
        bias[:, n - positions :].masked_fill_(hidden, -torch.inf)
    return F.scaled_dot_product_attention(x[None], keys[None], values[None], bias, scale=scale)[0]
