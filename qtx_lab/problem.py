"""`AttentionProblem`: one attention call as an immutable value, checked once and walked in blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .checks import check_finite, check_scale, check_tensors
from .errors import ArgumentError, DtypeError, ShapeError
from .streams import Stream

BLOCK_ELEMENTS = 1 << 20
"""Size of a block of rows: the numbers that a row needs (its keys, 16 for each draw, 4 for each feature of v,
whichever is most) times its rows. A block's workspace is at most about 32 bytes for each, 32 MiB at the
default whatever L and n are,
unless one row alone is longer. Smaller blocks cost more time in starting threads than they save in caches."""

FIRST_KNOWN = 64
"""The fewest keys that anything is fitted to for a causal row; see `AttentionProblem.runs`."""

Block = tuple[slice, slice]
"""Some rows: which key heads, and which rows of each."""


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
    """What is asked for: softmax(q k^T scale + mask) v. Made and checked by `of`; nothing changes it
    afterwards.

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
    ) -> AttentionProblem:
        """The problem of an attention call, checked.

        Parameters
        ----------
        q, k, v, attn_mask, is_causal, scale, enable_gqa
            As in `torch.nn.functional.scaled_dot_product_attention`, but leading dimensions must be equal.
        first_position, sequences
            See the class.

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
        for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
            if not isinstance(flag, bool):
                raise DtypeError(f"{name}={flag!r} is not allowed: it must be True or False.")
        check_scale(scale)
        check_tensors(q=q, k=k, v=v)
        group = _group(q, k, v, enable_gqa)
        if attn_mask is not None:
            _check_mask(attn_mask, (*q.shape[:-1], k.shape[-2]), q, is_causal)
        with torch.no_grad():
            sizes = [check_finite(name, x) for name, x in (("q", q), ("k", k), ("v", v))]
        largest = (1.0 if scale is None else abs(float(scale)) * q.shape[-1]) * sizes[0] * sizes[1]
        if largest > 1e38:
            raise ArgumentError(
                f"the logits of q, k and scale={scale} could overflow float32 (up to {largest:.0e}): "
                "make them smaller."
            )
        if sequences is not None:
            sequences = _check_sequences(sequences, q)
        factor = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        return cls(q, k, v, attn_mask, is_causal, factor, group, first_position, sequences)

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
        inputs = (self.q, self.k, self.v) if self.mask is None else (self.q, self.k, self.v, self.mask)
        return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)

    def detached(self) -> AttentionProblem:
        """The same problem, its tensors without gradients."""
        return replace(self, q=self.q.detach(), k=self.k.detach(), v=self.v.detach())

    def copied(self) -> AttentionProblem:
        """The same problem with copies of its tensors: what the caller does to them later does not matter."""
        mask = None if self.mask is None else self.mask.detach().clone()
        q, k, v = (x.detach().clone() for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, mask=mask)

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
        """v as (N, n, Ev), in `dtype`, divided by `unit`."""
        values = self.v.to(self.dtype).reshape(self.shape[0], self.num_keys, self.width)
        return values if self.unit is None else values / self.unit

    @cached_property
    def unit(self) -> Tensor | None:
        """What `values` are measured in where their squares would leave the range of float32: (N, 1, 1)."""
        if not self.v.numel():
            return None
        v = self.v.detach().to(self.dtype).reshape(self.shape[0], -1, 1)
        size = v.abs().amax(1, keepdim=True)
        if not bool(((size > 0) & ((size < 2.0**-30) | (size > 2.0**30))).any()):
            return None
        return torch.exp2(size.clamp_min(torch.finfo(self.dtype).tiny).log2().floor())

    def in_units(self, x: Tensor) -> Tensor:
        """What was computed from `values`, (N, M, ...), in the units of the caller's values."""
        return x if self.unit is None else x * self.unit

    @cached_property
    def _mask(self) -> Tensor | None:
        """The mask, broadcast to the rows without a copy, in a dtype that logits can be added to."""
        if self.mask is None:
            return None
        return in_dtype(self.mask, self.dtype).expand(*self.row_shape, self.num_keys)

    def blocks(self, numbers: int) -> Iterator[Block]:
        """The rows in blocks, in memory order, `numbers` being the numbers that a row needs besides its
        keys.
        """
        return blocks(self.shape, BLOCK_ELEMENTS // max(self.num_keys, numbers, 4 * self.width))

    def positions(self, rows: slice) -> Tensor:
        """The query position of each row of a block, int64, (rows,)."""
        return self.first_position + self.queries_of(rows)

    def queries_of(self, rows: slice) -> Tensor:
        """Which of its head's L queries each row of a block is: int64, (rows,)."""
        return torch.arange(rows.start, rows.stop, device=self.q.device) % self.length

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
        logits = torch.bmm(self.queries[heads, rows] * self.scale, keys[heads, :num_keys].mT)
        return self.masked(logits, heads, rows, layout)

    def keys_seen(self, heads: slice, rows: slice) -> Tensor | int:
        """How many keys each row of a block sees: int64, broadcastable to (heads, rows)."""
        if self.is_causal:
            return (self.positions(rows) + 1).clamp_max(self.num_keys)
        if self.mask is None:
            return self.num_keys
        mask = self.mask_block(heads, rows)
        return (mask if mask.dtype == torch.bool else mask > -torch.inf).sum(-1)

    def reach(self, rows: slice) -> int:
        """How many of the first keys some row of a block may see by causality."""
        if not self.is_causal or rows.start >= rows.stop:
            return self.num_keys
        return min(self.num_keys, int(self.positions(rows).max()) + 1)

    def masked(self, logits: Tensor, heads: slice, rows: slice, layout: KeyLayout | None = None) -> Tensor:
        """The logits of a block, (heads, rows, keys), with -inf where a row does not see a key: changed in
        place.
        """
        if self.is_causal:
            key = torch.arange(logits.shape[-1], device=logits.device)
            key = key if layout is None else layout.order[heads, None]
            logits.masked_fill_(key > self.positions(rows)[:, None], -torch.inf)
        if self.mask is not None:
            mask = self.mask_block(heads, rows)
            if layout is not None:
                mask = mask.gather(-1, layout.order[heads, None].expand_as(mask))
            if mask.dtype == torch.bool:
                logits.masked_fill_(~mask, -torch.inf)
            else:
                logits += mask
        return logits

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
        """The keys that some row of each key head sees by the mask: bool, (N, n); None without a mask."""
        if self.mask is None:
            return None
        seen = self.mask if self.mask.dtype == torch.bool else self.mask > -torch.inf
        seen = seen.any(-2) if seen.ndim > 1 else seen  # before it is broadcast to all heads
        seen = seen.expand(*self.row_shape[:-1], self.num_keys)
        return seen.reshape(self.shape[0], self.group, self.num_keys).any(1)


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


def in_dtype(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as it is; a float one in `dtype`, in which a finite number does not become -inf."""
    if mask.dtype in (torch.bool, dtype):
        return mask
    limits = torch.finfo(dtype)
    return torch.where(mask == -torch.inf, mask, mask.clamp(limits.min, limits.max)).to(dtype)


def _group(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> int:
    """The query heads that share a key head, of shapes that fit."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ShapeError(f"q and k must have the same number E >= 1 of features; given {shapes}.")
    if k.shape[:-1] != v.shape[:-1]:
        raise ShapeError(f"k and v must agree in all but their last dimension; given {shapes}.")
    if k.shape[-2] == 0:
        raise ShapeError(f"there must be at least one key (n >= 1); given {shapes}.")
    if v.shape[-1] == 0:
        raise ShapeError(f"v must have at least one feature; given {shapes}.")
    if enable_gqa and min(q.ndim, k.ndim) < 3:
        raise ShapeError(f"enable_gqa=True needs a dimension of heads; given {shapes}.")
    group = 1
    if enable_gqa and k.shape[-3] and q.shape[-3] % k.shape[-3] == 0:
        group = q.shape[-3] // k.shape[-3]
    grouped = (*k.shape[:-3], k.shape[-3] * group) if group > 1 else k.shape[:-2]
    if q.shape[:-2] != torch.Size(grouped):
        hint = "q's heads a multiple of k's" if enable_gqa else "the same (or enable_gqa=True)"
        raise ShapeError(
            f"the leading dimensions of q and k do not fit, they must be {hint}; given {shapes}."
        )
    return group


def _check_mask(mask: Tensor, shape: tuple[int, ...], q: Tensor, is_causal: bool) -> None:
    if is_causal:
        raise ArgumentError(
            "attn_mask and is_causal=True exclude each other, as in SDPA: put both in attn_mask."
        )
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise DtypeError(f"attn_mask is {given}; it must be a boolean or floating-point tensor.")
    if mask.device != q.device:
        raise DtypeError(f"attn_mask is on {mask.device}, q on {q.device}; they must agree.")
    try:
        mask.expand(shape)
    except RuntimeError:
        raise ShapeError(f"attn_mask has shape {tuple(mask.shape)}; it must broadcast to {shape}.") from None
    if mask.is_floating_point() and not bool((mask < 1e38).all()):
        raise ArgumentError(
            "attn_mask holds NaN, +inf or a number above 1e38; only smaller ones and -inf are allowed."
        )


def _check_sequences(sequences: Tensor, q: Tensor) -> Tensor:
    count = q.shape[:-3].numel() if q.ndim > 3 else 1
    if not isinstance(sequences, Tensor) or sequences.dtype != torch.int64:
        given = sequences.dtype if isinstance(sequences, Tensor) else type(sequences).__name__
        raise DtypeError(f"sequences is {given}; it must be an int64 tensor of names, one for each sequence.")
    if sequences.shape != (count,):
        raise ShapeError(
            f"sequences has shape {tuple(sequences.shape)}; it must be ({count},), one name for each "
            "sequence."
        )
    return sequences.cpu()
