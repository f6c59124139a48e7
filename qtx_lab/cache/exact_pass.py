"""Exact attention of the newest tokens of a cache, by which drafts are verified: all is read once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.choice import choose, triton_considered
from ..kernels.exact_decode.reference import CachedInputs, ExactResult
from ..kernels.exact_decode.reference import exact_decode as exact_in_torch
from ..kernels.memory import out_of_memory_explained
from .store import TokenStore

TILE_ROWS = 32
"""Queries of a key head that torch's attention on CPUs takes at once: for more it reads the keys again."""


def attend_exactly(
    store: TokenStore,
    rows: Tensor,
    positions: int,
    scale: float,
    *,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    with_log_sum_exp: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Exact causal attention of the newest tokens of a store.

    All rows of a key head, the query heads of its group at all positions, are one tile of queries, so that
    each key and value is read once for all of them, up to `TILE_ROWS`: on CUDA by the kernel of
    `qtx_lab.kernels.exact_decode`, elsewhere by torch's attention, or by two products of matrices where that
    does not give what is asked for.

    Parameters
    ----------
    store : TokenStore
        n tokens of N key heads.
    rows : Tensor, (N, G L, E)
        Queries, those of a query head at its L positions side by side.
    positions : int
        L <= n: row m is of token n - L + m % L.
    scale : float
    sinks : Tensor, (N, G L), optional
    softcap : float, optional
    with_log_sum_exp : bool

    Returns
    -------
    output : Tensor, (N, G L, Ev)
        In the dtype of the store.
    log_sum_exp : Tensor, float32, (N, G L), or None
        Of the logits of each row and its sink; None where it is not asked for, and torch does not give it.
    """
    n, dtype = store.length, store.table.dtype
    keys, values, x = store.keys(), store.values(), rows.to(dtype)
    inputs = CachedInputs(x, keys[None], values[None], positions, scale, softcap=softcap, sinks=sinks)
    if triton_considered(x) and choose((x, keys, values)).path == "triton":
        result = _by_triton(inputs)
        return result.output, result.log_sum_exp
    if with_log_sum_exp or sinks is not None or softcap is not None:
        result = exact_in_torch(inputs)
        return result.output, result.log_sum_exp
    bias = None
    if positions > 1:
        position = torch.arange(positions, device=rows.device)
        hidden = position > position.repeat(rows.shape[1] // positions)[:, None]  # [G L, L]
        bias = torch.zeros(rows.shape[1], n, dtype=dtype, device=rows.device)
        bias[:, n - positions :].masked_fill_(hidden, -torch.inf)
    return F.scaled_dot_product_attention(x[None], keys[None], values[None], bias, scale=scale)[0], None


def _by_triton(inputs: CachedInputs) -> ExactResult:
    """The result of the kernel; triton is loaded here."""
    from ..kernels.exact_decode.launch import exact_decode

    with out_of_memory_explained():
        return exact_decode(inputs)
