"""What the kernels attend to: queries, keys, values and a mask, with the query heads of a group together."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..checks import check_softcap, check_window
from ..errors import ArgumentError, ShapeError
from .block_tables import check_per_sequence, side_by_side, tokens_at

LOG2_E = 1.4426950408889634
"""log2(e). Kernels compute logits in base 2, since GPUs have an instruction for 2^x."""

MAX_DECODE_ROWS = 64
"""The most rows of a key head for which decoding holds the masses of all keys between two passes."""


@dataclass(frozen=True)
class Inputs:
    """The tensors of an attention call as the kernels read them.

    Parameters
    ----------
    q : Tensor, (N, M, E)
        Each of the N = B * Hkv key heads has M = G * L rows: the L queries of the first query head of its
        group, then those of the second, and so on.
    k, v : Tensor, (B, Hkv, n, E) and (B, Hkv, n, Ev), or with a table (blocks, Hkv, T, E) and (..., Ev)
        Any strides. `decode` and `sketch_decode` take caches of 8 bits (`choice.CACHE_DTYPES`), too.
    mask : Tensor, (B, Hkv * G, L, n), optional
        Boolean (True: attend) or a number that is added to the logit.
    length : int
        L, the number of queries of a head.
    scale : float
        The factor of q · k.
    first_position : int
        Where the first query stands among the keys: a causal query i attends to keys 0 … first_position + i.
    softcap : float, optional
        Logits become softcap · tanh(logit / softcap), before the mask.
    window : (int or None, int or None), optional
        (left, right): query i attends to keys first_position + i - left … first_position + i + right only;
        None: no limit on that side.
    lengths : Tensor, int32 or int64, (B,), optional
        The keys of each sequence, the first ones of n. Its last query is that of its last key, and none
        attends to keys after its own; a row that stands before the first key attends to none. They take
        the place of `first_position`. Kernels do not compare them with n, for which the host would wait: rows
        of a sequence of more keys are NaN.
    block_table : Tensor, int32 or int64, (B, C), optional
        The block that holds each T tokens of a sequence, in their order, as vLLM and FlashInfer keep them:
        n is then C T. `block_tables.block_table_of` makes one of FlashInfer's description.
    sinks : Tensor, float32, (N, M), optional
        A logit beside those of the keys, without a value.
    k_scale, v_scale : float
        What keys and values are multiplied by, as caches of 8 bits have it.

    Raises
    ------
    ArgumentError
        If softcap or window is none of these, or if there is a `first_position` beside lengths.
    ShapeError
        If lengths, block_table or sinks is no such tensor.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    length: int
    scale: float
    first_position: int = 0
    softcap: float | None = None
    window: tuple[int | None, int | None] | None = None
    lengths: Tensor | None = None
    block_table: Tensor | None = None
    sinks: Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0

    def __post_init__(self) -> None:
        check_softcap(self.softcap)
        check_window(self.window)
        check_per_sequence(self.batch, self.lengths, self.block_table)
        if self.lengths is not None and self.first_position:
            raise ArgumentError(
                f"first_position={self.first_position} is not allowed beside lengths, which say where "
                "queries stand: it must be 0."
            )
        if self.sinks is not None and self.sinks.shape != self.q.shape[:2]:
            raise ShapeError(
                f"sinks has shape {tuple(self.sinks.shape)}; it must be {tuple(self.q.shape[:2])}."
            )

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        first_position: int = 0,
        *,
        softcap: float | None = None,
        window: tuple[int | None, int | None] | None = None,
        lengths: Tensor | None = None,
    ) -> Inputs:
        """Arrange the tensors of an attention call.

        Parameters
        ----------
        q : Tensor, (..., H, L, E)
        k : Tensor, (..., Hkv, n, E)
        v : Tensor, (..., Hkv, n, Ev)
        mask : Tensor, broadcastable to (..., H, L, n), optional
        scale : float, optional
            1 / sqrt(E) where None.
        first_position, softcap, window, lengths
            See the class.
        """
        *_, length, features = q.shape
        heads, kv_heads = (x.shape[-3] if x.ndim > 2 else 1 for x in (q, k))
        batch = q.shape[:-3].numel() if q.ndim > 2 else 1
        if mask is not None:
            mask = mask.expand(*q.shape[:-1], k.shape[-2]).reshape(batch, heads, length, k.shape[-2])
        return cls(
            q.reshape(batch * kv_heads, heads // max(1, kv_heads) * length, features).contiguous(),
            k.reshape(batch, kv_heads, *k.shape[-2:]),
            v.reshape(batch, kv_heads, *v.shape[-2:]),
            mask,
            length,
            1 / math.sqrt(features) if scale is None else float(scale),
            first_position,
            softcap,
            window,
            lengths,
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N key heads, M rows of each, n keys, Ev features of a value."""
        columns = 1 if self.block_table is None else self.block_table.shape[1]
        return (*self.q.shape[:2], self.k.shape[2] * columns, self.v.shape[-1])

    @property
    def batch(self) -> int:
        """B."""
        return self.q.shape[0] // max(1, self.k.shape[1])

    @property
    def logit_scale(self) -> float:
        """The factor of q · k for logits in base 2, of keys as the cache holds them."""
        return self.scale * self.k_scale * LOG2_E

    @property
    def output_dtype(self) -> torch.dtype:
        """That of the values, or of the queries where values have 8 bits."""
        return self.q.dtype if self.v.dtype.itemsize == 1 else self.v.dtype

    @property
    def is_banded(self) -> bool:
        """Whether the window or lengths hide keys."""
        return self.window is not None or self.lengths is not None

    @property
    def band(self) -> tuple[int, int]:
        """The first and the last key that the first query sees by the window; query i sees those i further.

        They may lie outside the keys, by no more than L. Of sequences with lengths they are counted from the
        first query's own place.
        """
        n, (left, right) = self.shape[2], self.window or (None, None)
        if self.lengths is not None:
            return -n if left is None else -min(left, n), 0
        first = -self.length if left is None else self.first_position - left
        last = n if right is None else self.first_position + right
        return max(-self.length, min(first, n)), max(-self.length, min(last, n))

    @property
    def most_visible(self) -> int:
        """The most keys that a query sees, or a little more."""
        first, last = self.band
        return min(self.shape[2], last - first + 1) if self.is_banded else self.shape[2]

    def visible_range(self) -> tuple[Tensor, Tensor]:
        """The first key that each query sees, and the one behind the last: int64, (N, L).

        Both are 0 where it sees none.
        """
        (heads, _, n, _), device = self.shape, self.q.device
        query = torch.arange(self.length, device=device).expand(heads, -1)
        if not self.is_banded:
            return torch.zeros_like(query), torch.full_like(query, n)
        if self.lengths is not None:
            self.check_lengths()
            query = query + (self.lengths.long() - self.length).repeat_interleave(self.k.shape[1])[:, None]
        first, last = self.band
        start, end = (query + first).clamp_min(0), (query + last + 1).clamp_max(n)
        some = start < end
        return torch.where(some, start, 0), torch.where(some, end, 0)

    def check_lengths(self) -> None:
        """Refuse lengths of more keys than there are, for which the host waits.

        Raises
        ------
        ArgumentError
        """
        n = self.shape[2]
        if self.lengths is not None and bool((self.lengths > n).any()):
            raise ArgumentError(f"lengths={self.lengths.tolist()} is not allowed: there are {n} keys.")

    def side_by_side(self) -> Inputs:
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

    def values_at(self, head: int, keys: Tensor) -> Tensor:
        """The values of a key head at keys (...), times `v_scale`: float32, (..., Ev)."""
        return tokens_at(self.v, self.block_table, head, keys).float() * self.v_scale

    def refuse(self, *names: str) -> None:
        """Refuse those of the optional fields that the caller does not know.

        Raises
        ------
        ArgumentError
        """
        defaults = {field.name: field.default for field in fields(self)} | {"mask": None}
        for name in names:
            given, default = vars(self)[name], defaults[name]
            if isinstance(given, Tensor) or given != default:
                shown = tuple(given.shape) if isinstance(given, Tensor) else given
                raise ArgumentError(f"{name}={shown} is not in this kernel: it must be {default}.")

    def capped(self, logits: Tensor) -> Tensor:
        """Base-2 logits (...) under the softcap."""
        if self.softcap is None:
            return logits
        cap = self.softcap * LOG2_E
        return cap * torch.tanh(logits / cap)

    def logits(self) -> Tensor:
        """The logits in base 2, -inf where masked: (N, M, n), float32. This is what kernels avoid to hold."""
        k = self.side_by_side().k.flatten(0, 1).float()
        logits = torch.bmm(self.q.float(), k.mT) * self.logit_scale
        logits = self.capped(logits)
        if self.is_banded:
            first, last = self.band
            query = torch.arange(logits.shape[1], device=logits.device)[:, None] % self.length  # [M, 1]
            if self.lengths is not None:
                self.check_lengths()
                own = self.lengths.repeat_interleave(self.k.shape[1]) - self.length
                query = query + own[:, None, None]  # [N, M, 1]
            key = torch.arange(logits.shape[2], device=logits.device)
            logits.masked_fill_((key < first + query) | (key > last + query), -torch.inf)
        if self.mask is None:
            return logits
        mask = self.mask.reshape(logits.shape)
        if mask.dtype == torch.bool:
            return logits.masked_fill_(~mask, -torch.inf)
        return logits + mask.float() * LOG2_E
