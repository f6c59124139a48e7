"""`AttentionProblem`: one attention call as an immutable value, checked once and walked in blocks of rows."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_count,
    check_finite,
    check_flags,
    check_groups,
    check_mask,
    check_scale,
    check_sequences,
    check_sinks,
    check_softcap,
    check_tensors,
    check_window,
    has_tangent,
)
from .errors import ArgumentError, ShapeError
from .streams import Stream

BLOCK_ELEMENTS = 1 << 20
"""Size of a block of rows: the numbers that a row needs (its keys, 16 for each draw, 4 for each feature of v,
whichever is most) times its rows.

A block's workspace is at most about 32 bytes for each number: 32 MiB, whatever L and n are, unless one row
alone is longer. Smaller blocks cost more time in starting threads than they save in caches."""

FIRST_KNOWN = 64
"""The fewest keys that anything is fitted to for a causal row; see `AttentionProblem.runs`."""

Block = tuple[slice, slice]
"""Some rows: which key heads, and which rows of each."""

Window = tuple[int | None, int | None]
"""How many keys before and after its own position a query sees; all of them where None."""


@dataclass(frozen=True)
class KeyLayout:
    """The keys of a problem in an order of their own.

    Parameters
    ----------
    order : Tensor, int64, (N, n)
        The key at each place.
    keys : Tensor, (N, n, E)
        The keys, in this order.
    """

    order: Tensor
    keys: Tensor


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """One call of attention: softmax(q k^T scale + mask) v.

    It is made and checked by `of`, and nothing changes it afterwards.

    The logits of a row are

        l_j = cap(scale q . k_j) + bias_j,        cap(x) = c tanh(x / c) with softcap c,

    and -inf where the mask, causality or the window hide key j. A sink s is one more logit, which takes
    probability and has no value: key j has the probability exp(l_j) / (exp(s) + sum_i exp(l_i)).

    Its rows are flattened to (N, M): N key heads of all sequences, M = G * L rows that attend to each, those
    of a query head together.

    Parameters
    ----------
    q : Tensor, (..., H, L, E)
    k : Tensor, (..., Hkv, n, E)
    v : Tensor, (..., Hkv, n, Ev)
    mask : Tensor, broadcastable to (..., H, L, n), or None
        Boolean (True: attend) or float (added to the logits, -inf: masked).
    is_causal : bool
        Whether the query at position i sees keys 0 … i only.
    scale : float
    group : int
        G = H / Hkv, the query heads that share a key head.
    first_position : int
        The position of the first query; the others follow.
    sequences : Tensor, int64, (B,), or None
        Names of the sequences, whole numbers; 0 … B - 1 where None.
    sinks : Tensor, broadcastable to (..., H), or None
        A logit for each query head, neither scaled, capped nor masked.
    softcap : float or None
    window : (int or None, int or None), or None
        (left, right): the query at position i sees keys i - left … i + right only; None: no limit.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float
    group: int
    first_position: int = 0
    sequences: Tensor | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    window: Window | None = None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        first_position: int = 0,
        sequences: Tensor | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
        window: int | Window | None = None,
    ) -> AttentionProblem:
        """The problem of an attention call, checked.

        Parameters
        ----------
        q, k, v, attn_mask, is_causal, scale, enable_gqa
            As in `torch.nn.functional.scaled_dot_product_attention`, but leading dimensions must be equal.
            `attn_mask` may be a `torch.nn.attention.bias.CausalBias`, too. A float mask is added after the
            capping.
        first_position, sequences
            See the class.
        sinks : Tensor, (H,) or broadcastable to (..., H), optional
            See the class; -inf is a head without a sink.
        softcap : float, optional
            c > 0, as in Gemma 2.
        window : int or (int or None, int or None), optional
            (left, right), or one number for both.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If shapes or types do not fit, or if a number is NaN, infinite or so large that logits overflow.

        Examples
        --------
        >>> q, k, v = torch.randn(6, 10, 4), torch.randn(2, 10, 4), torch.randn(2, 10, 8)
        >>> problem = AttentionProblem.of(q, k, v, enable_gqa=True)
        >>> problem.shape, problem.num_keys, problem.group
        ((2, 30), 10, 3)
        """
        check_flags(is_causal=is_causal, enable_gqa=enable_gqa)
        scale, softcap = check_scale(scale), check_softcap(softcap)
        check_tensors(q=q, k=k, v=v)
        first_position = check_count("first_position", first_position, 0)
        group = check_groups(q, k, v, enable_gqa)
        window = check_window(window)
        if _is_causal_bias(attn_mask):
            attn_mask, is_causal, first_position = _of_causal_bias(
                attn_mask, q.shape[-2], k.shape[-2], is_causal, first_position
            )
            if attn_mask is not None and window is not None:
                # The first queries stand before the first key, but positions are counted from 0.
                before, left = q.shape[-2] - k.shape[-2], window[0]
                window = None if left is None else (left + before, None)
        if attn_mask is not None:
            check_mask(attn_mask, (*q.shape[:-1], k.shape[-2]), q, is_causal)
        with torch.no_grad():
            sizes = [check_finite(name, x) for name, x in (("q", q), ("k", k), ("v", v))]
        largest = (1.0 if scale is None else abs(float(scale)) * q.shape[-1]) * sizes[0] * sizes[1]
        if largest > 1e38:
            raise ArgumentError(
                f"the logits of q, k and scale={scale} could overflow float32 (up to {largest:.0e}): "
                "make them smaller."
            )
        if sequences is not None:
            sequences = check_sequences(sequences, q)
        if sinks is not None:
            check_sinks(sinks, q)
        return cls(
            q,
            k,
            v,
            attn_mask,
            is_causal,
            1 / math.sqrt(q.shape[-1]) if scale is None else scale,
            group,
            first_position,
            sequences,
            sinks,
            softcap,
            window,
        )

    # --- Its shape ----------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """L, the queries of a head."""
        return self.q.shape[-2]

    @property
    def num_keys(self) -> int:
        """n, the keys of a head."""
        return self.k.shape[-2]

    @property
    def row_shape(self) -> torch.Size:
        """(..., H, L): the rows as the caller has them."""
        return self.q.shape[:-1]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M): the rows as they are walked."""
        return self.k.shape[:-2].numel(), self.group * self.length

    @property
    def width(self) -> int:
        """Ev, the features of a value."""
        return self.v.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """What logits and weights are computed in: float32, or float64 for such input."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def requires_grad(self) -> bool:
        """Whether the output needs a gradient."""
        inputs = (self.q, self.k, self.v, self.mask, self.sinks)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)

    @property
    def has_tangents(self) -> bool:
        """Whether an input carries a tangent of forward-mode differentiation."""
        inputs = (self.q, self.k, self.v, self.mask, self.sinks)
        return any(x is not None and has_tangent(x) for x in inputs)

    def detached(self) -> AttentionProblem:
        """The same problem, its tensors without gradients."""
        return self._with_tensors(Tensor.detach)

    def copied(self) -> AttentionProblem:
        """The same problem with copies of its tensors: what the caller does to them later does not matter.

        Gradients go through the copies.
        """
        return self._with_tensors(Tensor.clone)

    def for_later(self) -> Callable[[], AttentionProblem]:
        """Gives the same problem without gradients to what is computed after the call, as error bars are.

        Nothing is copied but inference tensors, of which torch does not count the changes. Like autograd it
        does not see changes that torch does not count: those through `.data` or through memory that is shared
        with NumPy.

        Returns
        -------
        callable
            Gives the problem; raises ArgumentError if a tensor has been changed in place by then.
        """
        problem = self.detached()  # its tensors count changes together with the caller's
        named = {
            "q": problem.q,
            "k": problem.k,
            "v": problem.v,
            "attn_mask": problem.mask,
            "sinks": problem.sinks,
        }
        inputs = {name: x for name, x in named.items() if x is not None}
        if any(x.is_inference() for x in inputs.values()):
            copies = problem.copied()
            return lambda: copies
        versions = {name: x._version for name, x in inputs.items()}

        def unchanged() -> AttentionProblem:
            for name, x in inputs.items():
                if x._version != versions[name]:
                    raise ArgumentError(
                        f"{name} has been changed in place since the call, and error bars are made of it "
                        f"when first read: read them before the change, or call with {name}.clone()."
                    )
            return problem

        return unchanged

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> AttentionProblem:
        mask, sinks = (None if x is None else change(x) for x in (self.mask, self.sinks))
        return replace(self, q=change(self.q), k=change(self.k), v=change(self.v), mask=mask, sinks=sinks)

    def without_sinks(self) -> AttentionProblem:
        """The same problem over its keys alone."""
        return self if self.sinks is None else replace(self, sinks=None)

    def stream(self, seed: Tensor | int) -> Stream:
        """The random numbers of its N key heads and L positions."""
        groups = self.k.shape[-3] if self.k.ndim > 2 else 1
        sequences = self.k.shape[:-3].numel() if self.k.ndim > 3 else 1
        names = sequences if self.sequences is None else self.sequences
        return Stream.of(seed, names, groups, self.length, self.first_position, self.q.device)

    # --- Its rows -----------------------------------------------------------------------------

    @cached_property
    def queries(self) -> Tensor:
        """q as (N, M, E), in `dtype`."""
        return self.q.to(self.dtype).reshape(*self.shape, self.q.shape[-1])

    @cached_property
    def keys(self) -> Tensor:
        """k as (N, n, E), in `dtype`."""
        return self.k.to(self.dtype).reshape(self.shape[0], self.num_keys, self.k.shape[-1])

    @cached_property
    def values(self) -> Tensor:
        """v as (N, n, Ev), in `dtype`, divided by `unit`; 0 where there is one and no row sees the key."""
        values = self.v.to(self.dtype).reshape(self.shape[0], self.num_keys, self.width)
        return values if self.unit is None else self._without_hidden(values) / self.unit

    @cached_property
    def unit(self) -> Tensor | None:
        """What `values` are measured in where their squares would leave the range of float32: (N, 1, 1)."""
        if not self.v.numel():
            return None
        v = self.v.detach().to(self.dtype).reshape(self.shape[0], self.num_keys, self.width)
        size = v.abs().amax((1, 2), keepdim=True)
        if not bool(((size > 0) & ((size < 2.0**-30) | (size > 2.0**30))).any()):
            return None
        size = self._without_hidden(v).abs().amax((1, 2), keepdim=True)
        exponent = torch.frexp(size.clamp_min(torch.finfo(self.dtype).tiny)).exponent
        return torch.exp2((exponent - 1).to(self.dtype))  # by log2 it would be 2^128 for the largest float32

    def _without_hidden(self, values: Tensor) -> Tensor:
        """Values (N, n, Ev), 0 where no row sees the key: what a cache holds there may be of any size."""
        visible = self.visible_keys()
        return values if visible is None else torch.where(visible[..., None], values, 0)

    def in_units(self, x: Tensor) -> Tensor:
        """What was computed from `values`, (N, M, ...), in the units of the caller's values.

        What only its rounding would make infinite, as averages of the largest numbers, is the largest number.
        """
        if self.unit is None:
            return x
        scaled = x * self.unit
        largest = torch.finfo(self.v.dtype).max
        if not bool((scaled.detach().abs() > largest).any()):
            return scaled
        rounded = x.detach().abs() <= 2 * (1 + 1e-5)  # the caller's values are below 2 units
        return torch.where(rounded, scaled.clamp(-largest, largest), scaled)

    @property
    def row_sinks(self) -> Tensor | None:
        """The sink of each row as the caller has them, in `dtype`: broadcastable to (..., H, L)."""
        if self.sinks is None:
            return None
        return self.sinks.to(self.dtype).expand(self.row_shape[:-1])[..., None]

    @cached_property
    def _mask(self) -> Tensor | None:
        """The mask, broadcast to the rows without a copy, in a dtype that logits can be added to."""
        if self.mask is None:
            return None
        return in_dtype(self.mask, self.dtype).expand(*self.row_shape, self.num_keys)

    def blocks(self, numbers: int) -> Iterator[Block]:
        """The rows in blocks, in memory order.

        `numbers` is how many numbers a row needs besides its keys.
        """
        return blocks(self.shape, BLOCK_ELEMENTS // max(self.num_keys, numbers, 4 * self.width))

    def positions(self, rows: slice) -> Tensor:
        """The query position of each row of a block, int64, (rows,)."""
        return self.first_position + self.queries_of(rows)

    def queries_of(self, rows: slice) -> Tensor:
        """Which of its head's L queries each row of a block is: int64, (rows,)."""
        return torch.arange(rows.start, rows.stop, device=self.q.device) % self.length

    def row_numbers(self, heads: slice, rows: slice) -> Tensor:
        """Which of the N * M rows those of a block are: int64, (heads * rows,)."""
        n, m = (torch.arange(size, device=self.q.device) for size in self.shape)
        return (n[heads, None] * self.shape[1] + m[rows]).flatten()

    def runs(self, rows: slice, growth: float = 2.0) -> Iterator[tuple[int, slice]]:
        """Consecutive rows of a block for which the same first keys are known: (how many, rows).

        What is fitted to keys for a causal row may look at the first 64, 64 growth, 64 growth^2, … of those
        that it sees, so that nothing later changes it, and at none where it sees fewer. Without causality
        that is all of them.
        """
        if not self.is_causal:
            yield self.num_keys, rows
            return
        row = rows.start
        while row < rows.stop:
            seen = self.first_position + row % self.length + 1
            known, then = 0, FIRST_KNOWN
            while then <= seen:
                known, then = then, max(then + 1, int(then * growth))
            end = min(rows.stop, row - row % self.length + self.length, row + then - seen)
            yield min(known, self.num_keys), slice(row, end)
            row = end

    def lay_out(self, order: Tensor) -> KeyLayout:
        """The keys of each head in an order (N, n)."""
        return KeyLayout(order, self.keys.gather(1, order[..., None].expand_as(self.keys)))

    def logits(self, heads: slice, rows: slice, layout: KeyLayout | None = None) -> Tensor:
        """The masked logits of a block, (heads, rows, n), in `dtype`.

        Those of a causal block reach to the last key that it sees only. With a layout, keys stand in its
        order.
        """
        num_keys = self.reach(rows) if layout is None else self.num_keys
        keys = self.keys if layout is None else layout.keys
        products = torch.bmm(self.queries[heads, rows] * self.scale, keys[heads, :num_keys].mT)
        return self.logits_of(products, heads, rows, layout)

    def logits_at(self, row: Tensor, indices: Tensor) -> Tensor:
        """The logits of rows (B,) of the N * M at keys (B, T) that they see, for O(T E) each."""
        if indices.shape[-1] > self.num_keys:  # each key's logit once is cheaper
            every = torch.arange(self.num_keys, device=indices.device).expand(len(row), self.num_keys)
            return self.logits_at(row, every).gather(-1, indices)
        first = (row // self.shape[1] * self.num_keys)[:, None]
        k = F.embedding(indices + first, self.keys.flatten(0, 1))  # [B, T, E]
        q = self.queries.flatten(0, 1)[row] * self.scale
        logits = self._capped(torch.bmm(k, q[..., None]).squeeze(-1))
        if self._mask is None or self._mask.dtype == torch.bool:
            return logits
        query_head = row // self.shape[1] * self.group + row % self.shape[1] // self.length
        leading = self.row_shape[:-1]
        index = torch.unravel_index(query_head, leading) if leading else ()
        return logits + self._mask[(*(x[:, None] for x in (*index, row % self.length)), indices)]

    def log_sum_exp(self) -> Tensor:
        """log sum_j exp(l_j) of each row over its keys, without the sink: (N, M); -inf where it sees none.

        It reads all keys, for n E multiply-adds a row.
        """
        parts = [log_sum_exp(self.logits(*block)).flatten() for block in self.blocks(0)]
        return torch.cat(parts).view(self.shape) if parts else self.queries.new_empty(self.shape)

    def keys_seen(self, heads: slice, rows: slice) -> Tensor | int:
        """How many keys each row of a block sees: int64, broadcastable to (heads, rows)."""
        if self.mask is not None:
            mask = self.mask_block(heads, rows)
            seen = mask if mask.dtype == torch.bool else mask > -torch.inf
            if self.window is not None:
                seen = seen & ~self._outside(rows, torch.arange(self.num_keys, device=seen.device))
            return seen.sum(-1)
        if not self.is_causal and self.window is None:
            return self.num_keys
        first, last = self._band(rows)
        return (last.clamp_max(self.num_keys - 1) + 1 - first.clamp_min(0)).clamp_min(0)

    def first_whole_blocks(self, blocks_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The first block of neighbouring keys that each row sees whole: int64, (N, M).

        What a row sees is decided by the mask and causality. It is -1 where there is no such block.

        Parameters
        ----------
        blocks_of : callable
            Gives them of rows (..., n), bool: `samplers.value_order.first_whole_blocks`.
        """
        assert self.mask is not None
        seen = self.mask if self.mask.dtype == torch.bool else self.mask > -torch.inf
        seen = seen.expand(*seen.shape[:-1], self.num_keys)
        if self.is_causal:
            key = torch.arange(self.num_keys, device=seen.device)
            seen = seen & (key <= self.positions(slice(0, self.length))[:, None])
        return blocks_of(seen).expand(self.row_shape).reshape(self.shape)

    def reach(self, rows: slice) -> int:
        """How many of the first keys some row of a block may see by causality."""
        if not self.is_causal or rows.start >= rows.stop:
            return self.num_keys
        return min(self.num_keys, int(self.positions(rows).max()) + 1)

    def logits_of(
        self, products: Tensor, heads: slice, rows: slice, layout: KeyLayout | None = None
    ) -> Tensor:
        """The logits of a block from the products scale q . k, (heads, rows, keys).

        They are capped, the bias is added, and they are -inf where a row does not see a key. The products are
        changed in place.
        """
        logits = self._capped(products)
        if self.is_causal or self.window is not None:
            key = torch.arange(logits.shape[-1], device=logits.device)
            key = key if layout is None else layout.order[heads, None]
            logits.masked_fill_(self._outside(rows, key), -torch.inf)
        if self.mask is not None:
            mask = self.mask_block(heads, rows)
            if layout is not None:
                mask = mask.gather(-1, layout.order[heads, None].expand_as(mask))
            if mask.dtype == torch.bool:
                logits.masked_fill_(~mask, -torch.inf)
            else:
                logits += mask
        return logits

    def _capped(self, products: Tensor) -> Tensor:
        return products if self.softcap is None else self.softcap * torch.tanh(products / self.softcap)

    def _band(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The first and the last position that each row sees by causality and the window: (rows,) each.

        They may lie outside the keys.
        """
        position = self.positions(rows)
        left, right = (None, None) if self.window is None else self.window
        first = torch.zeros_like(position) if left is None else position - left
        if self.is_causal:
            return first, position
        return first, torch.full_like(position, self.num_keys) if right is None else position + right

    def _outside(self, rows: slice, key: Tensor) -> Tensor:
        """Where causality and the window hide keys (..., n): bool, (..., rows, n)."""
        first, last = (x[:, None] for x in self._band(rows))
        if self.window is None:
            return key > last
        return (key > last) | (key < first)

    def mask_block(self, heads: slice, rows: slice) -> Tensor:
        """The mask of a block, (heads, rows, n); copies no more than the block."""
        assert self._mask is not None
        head = torch.arange(heads.start, heads.stop, device="cpu")[:, None]
        row = torch.arange(rows.start, rows.stop, device="cpu")
        query_head = head * self.group + row // self.length  # [heads, rows]
        index = (row % self.length).expand_as(query_head)
        leading = self.row_shape[:-1]
        return self._mask[(*torch.unravel_index(query_head, leading), index) if leading else (index,)]

    def visible_keys(self) -> Tensor | None:
        """The keys that some row of each key head sees by the mask and the window: bool, (N, n).

        None where those are all keys.
        """
        seen = None
        if self.mask is not None:
            seen = self.mask if self.mask.dtype == torch.bool else self.mask > -torch.inf
            seen = seen.any(-2) if seen.ndim > 1 else seen  # before it is broadcast to all heads
            seen = seen.expand(*self.row_shape[:-1], self.num_keys)
            seen = seen.reshape(self.shape[0], self.group, self.num_keys).any(1)
        if self.window is None or not self.length:
            return seen
        first, last = self._band(slice(0, self.length))
        key = torch.arange(self.num_keys, device=first.device)
        within = (key >= first[0]) & (key <= last[-1])
        if seen is None:
            return None if bool(within.all()) else within.expand(self.shape[0], -1)
        return seen & within


def blocks(shape: tuple[int, int], step: int) -> Iterator[Block]:
    """(heads, rows) of each block of up to `step` of (N, M) rows: some whole heads, or part of one."""
    count, rows = shape
    step = max(1, step)
    if step >= rows:
        heads = max(1, step // max(1, rows))
        for start in range(0, count, heads):
            yield slice(start, min(start + heads, count)), slice(0, rows)
    else:
        for head in range(count):
            for start in range(0, rows, step):
                yield slice(head, head + 1), slice(start, min(start + step, rows))


def log_sum_exp(logits: Tensor) -> Tensor:
    """log sum_j exp(l_j) of rows (..., n); -inf, with a gradient of 0, in a row of nothing but -inf."""
    empty = (logits == -torch.inf).all(-1)
    return logits.masked_fill(empty[..., None], 0).logsumexp(-1).masked_fill(empty, -torch.inf)


def in_dtype(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as it is; a float one in `dtype`, in which a finite number does not become -inf."""
    if mask.dtype in (torch.bool, dtype):
        return mask
    limits = torch.finfo(dtype)
    if torch.finfo(mask.dtype).max <= limits.max:
        return mask.to(dtype)
    return torch.where(mask == -torch.inf, mask, mask.clamp(limits.min, limits.max)).to(dtype)


def _is_causal_bias(mask: object) -> bool:
    """Whether a mask is a `CausalBias`, whose module takes a second to load: not if nobody loaded it."""
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(mask, module.CausalBias)


def _of_causal_bias(
    mask: Any, length: int, num_keys: int, is_causal: bool, first_position: int
) -> tuple[Tensor | None, bool, int]:
    """(attn_mask, is_causal, first_position) that say the same as a `CausalBias`."""
    if is_causal:
        raise ArgumentError("attn_mask is a CausalBias: it excludes is_causal=True, as in SDPA.")
    if (mask.seq_len_q, mask.seq_len_kv) != (length, num_keys):
        raise ShapeError(
            f"attn_mask is a CausalBias for {mask.seq_len_q} queries and {mask.seq_len_kv} keys; there are "
            f"{length} and {num_keys}."
        )
    start = num_keys - length if mask.variant.name == "LOWER_RIGHT" else 0
    if first_position not in (0, start):
        raise ArgumentError(
            f"attn_mask is a CausalBias whose first query stands at position {start}; first_position="
            f"{first_position} says otherwise."
        )
    if start >= 0:
        return None, True, start
    # More queries than keys: the first ones see nothing, which no position can say.
    return torch.ones(length, num_keys, dtype=torch.bool, device=mask.device).tril(start), False, 0
