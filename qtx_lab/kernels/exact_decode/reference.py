"""Exact attention of the newest tokens of a cache, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import ArgumentError, ShapeError
from ..block_tables import check_per_sequence, side_by_side


@dataclass(frozen=True)
class CachedInputs:
    """Queries of the newest tokens of B sequences, and the keys and values that a cache holds for them.

    Keys and values lie side by side for each sequence, or in blocks of T tokens of which a table says where
    they are, as vLLM and FlashInfer keep them.

    Parameters
    ----------
    q : Tensor, (N, M, E)
        Each of the N = B Hkv key heads has M = G L rows: the L queries of the first query head of its group,
        then those of the second, and so on, as in `qtx_lab.kernels.inputs.Inputs`.
    k, v : Tensor, (B, Hkv, n, E) and (B, Hkv, n, Ev), or with a table (blocks, Hkv, T, E) and (..., Ev)
        Any strides, so that pages of the layout "NHD" are given as `pages.transpose(1, 2)`. Any of the
        dtypes of `choice.CACHE_DTYPES`, of 8 bits too: q has 16 bits or more.
    length : int
        L. The last query of a sequence is that of its last token, and none sees the tokens after it.
    scale : float
        The factor of q · k.
    lengths : Tensor, int32 or int64, (B,), optional
        The tokens of each sequence, its queries' own among them; n, or all of the table's, where None. Rows
        of tokens that a sequence does not have see no key, and their output is 0.
    block_table : Tensor, int32 or int64, (B, C), optional
        The block that holds each T tokens of a sequence, in their order: see `block_tables`.
    window : int, optional
        A query sees the tokens at most this far before its own.
    softcap : float, optional
        Logits become softcap · tanh(logit / softcap).
    sinks : Tensor, float32, (N, M), optional
        A logit beside those of the keys, without a value.
    k_scale, v_scale : float
        What keys and values are multiplied by, as caches of 8 bits have it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    length: int
    scale: float
    lengths: Tensor | None = None
    block_table: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0

    def __post_init__(self) -> None:
        heads, rows, features = self.q.shape
        blocks, kv_heads, block_size, _ = self.v.shape
        if self.k.shape != (blocks, kv_heads, block_size, features):
            raise ShapeError(
                f"k {tuple(self.k.shape)}, v {tuple(self.v.shape)} and q {tuple(self.q.shape)} do not belong "
                "together: k must be (B or blocks, Hkv, tokens, E) and v (B or blocks, Hkv, tokens, Ev)."
            )
        batch = heads // max(1, kv_heads)
        table = self.block_table
        if batch * kv_heads != heads or (table is None and batch != blocks) or rows % max(1, self.length):
            sequences = blocks if table is None else batch
            raise ShapeError(
                f"q has {heads} key heads of {rows} rows; it must have those of {sequences} sequences of "
                f"{kv_heads} key heads, and a multiple of length={self.length} rows of each."
            )
        check_per_sequence(batch, self.lengths, table)
        if self.sinks is not None and self.sinks.shape != (heads, rows):
            raise ShapeError(f"sinks has shape {tuple(self.sinks.shape)}; it must be {(heads, rows)}.")
        if self.window is not None and self.window < 0:
            raise ArgumentError(f"window={self.window} is not allowed: it must be 0 or more.")

    @property
    def batch(self) -> int:
        """B."""
        return self.q.shape[0] // max(1, self.k.shape[1])

    @property
    def num_keys(self) -> int:
        """The most tokens that a sequence can have: n, or C T."""
        return self.k.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])

    def visible(self) -> Tensor:
        """Whether each row sees each key: bool, (N, M, num_keys)."""
        rows, device = self.q.shape[1], self.q.device
        lengths = torch.full((self.batch,), self.num_keys) if self.lengths is None else self.lengths
        last = lengths.to(device).repeat_interleave(self.k.shape[1])[:, None]  # [N, 1]
        position = last - self.length + torch.arange(rows, device=device) % self.length  # [N, M]
        key = torch.arange(self.num_keys, device=device)
        seen = key <= position[..., None]
        return seen if self.window is None else seen & (key >= position[..., None] - self.window)

    def side_by_side(self) -> CachedInputs:
        """The same with keys and values without a table: a copy of what its blocks hold.

        Raises
        ------
        ArgumentError
            If the table names a block that is not there.
        """
        if self.block_table is None:
            return self
        k, v = (side_by_side(x, self.block_table) for x in (self.k, self.v))
        return replace(self, k=k, v=v, block_table=None)


@dataclass(frozen=True)
class ExactResult:
    """What exact attention gives.

    Parameters
    ----------
    output : Tensor, (N, M, Ev)
        In the dtype of the queries; 0 where a row sees no key.
    log_sum_exp : Tensor, float32, (N, M)
        Of the natural logits of a row, its sink among them; -inf where it sees nothing.
    """

    output: Tensor
    log_sum_exp: Tensor


def exact_decode(x: CachedInputs) -> ExactResult:
    """Exact attention of the newest tokens: see `qtx_lab.kernels.exact_decode.launch.exact_decode`."""
    visible, x = x.visible(), x.side_by_side()
    dtype = torch.promote_types(x.q.dtype, torch.float32)
    k, v = (y.flatten(0, 1).to(dtype) for y in (x.k, x.v))
    logits = torch.bmm(x.q.to(dtype), k.mT) * (x.scale * x.k_scale)
    if x.softcap is not None:
        logits = x.softcap * torch.tanh(logits / x.softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    lse = logits.logsumexp(-1)
    if x.sinks is not None:
        lse = torch.logaddexp(lse, x.sinks.to(dtype))
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    # Values that no row sees may be anything, as behind the end of a sequence.
    v = torch.where(visible.any(1)[..., None], v, 0)
    output = torch.bmm(weights, v) * x.v_scale
    return ExactResult(output.to(x.q.dtype), lse.float())
