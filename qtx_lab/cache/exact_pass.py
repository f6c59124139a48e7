"""Exact attention of the newest tokens of a cache, by which drafts are verified: all is read once."""

from __future__ import annotations

import math

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

FEWEST_KEYS_APART = 512
"""The least number of keys of a part: to start more parts would take longer than is gained."""


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
    `qtx_lab.kernels.exact_decode`, elsewhere by torch's attention, which CPUs do for equal parts of the keys
    where there are fewer heads than would keep all threads busy to the end, or by two products of matrices
    where that does not give what is asked for.

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
    parts = _parts(store, torch.get_num_threads())
    if parts == 1:
        bias = None if positions == 1 else _causal_bias(x, n, positions)
        return F.scaled_dot_product_attention(x[None], keys[None], values[None], bias, scale=scale)[0], None
    return _by_parts(x, keys, values, positions, scale, parts), None


def _causal_bias(x: Tensor, n: int, positions: int) -> Tensor:
    """What is added to the logits of rows x (N, G L, E) at the last n keys: (G L, n)."""
    position = torch.arange(positions, device=x.device)
    hidden = position > position.repeat(x.shape[1] // positions)[:, None]  # [G L, L]
    bias = x.new_zeros(x.shape[1], n)
    bias[:, n - positions :].masked_fill_(hidden, -torch.inf)
    return bias


def _parts(store: TokenStore, threads: int) -> int:
    """Into how many parts the keys of each head are cut: so few that all threads do as many of them.

    torch gives a head to one thread, which would leave one of two threads idle while the third of three heads
    is attended to.
    """
    parts = threads // math.gcd(store.heads, threads)
    by_torch = store.table.device.type == "cpu" and store.features == store.width and store.heads > 0
    return parts if by_torch and store.length >= (parts + 1) * FEWEST_KEYS_APART else 1


def _by_parts(x: Tensor, keys: Tensor, values: Tensor, positions: int, scale: float, parts: int) -> Tensor:
    """Attention of rows x (N, G L, E), the mean over parts of the keys by their sums of exponentials.

    All rows see the keys of the equal parts; those that remain, the rows' own tokens among them, are one more
    part, the only one with a bias.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    n = keys.shape[1]
    rest = positions + (n - positions) % parts
    equal = n - rest

    def cut(y: Tensor) -> Tensor:
        return y[:, :equal].unflatten(1, (parts, equal // parts))  # [N, C, n / C, E]

    rows = x[:, None].expand(-1, parts, -1, -1)
    output, log_sum_exp = attention(rows, cut(keys), cut(values), scale=scale)
    bias = _causal_bias(x, rest, positions)
    last, log_sum_exp_last = attention(
        x[:, None], keys[:, None, equal:], values[:, None, equal:], attn_mask=bias, scale=scale
    )
    shares = torch.cat((log_sum_exp, log_sum_exp_last), 1).softmax(1)[..., None]  # [N, C + 1, G L, 1]
    return (torch.cat((output, last), 1) * shares).sum(1).to(x.dtype)


def _by_triton(inputs: CachedInputs) -> ExactResult:
    """The result of the kernel; triton is loaded here."""
    from ..kernels.exact_decode.launch import exact_decode

    with out_of_memory_explained():
        return exact_decode(inputs)
