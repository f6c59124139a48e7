"""The attention rows of a call: what may be attended to, and how it is walked block by block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check_finite, check_scale, check_tensors
from .errors import ArgumentError, DtypeError, ShapeError


def blocks(shape: tuple[int, int], step: int) -> Iterator[tuple[slice, slice]]:
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


def in_units(x: Tensor, unit: Tensor | None) -> Tensor:
    """What was computed from `Rows.v`, (N, M, d), in the units of the caller's values."""
    return x if unit is None else x * unit


class Rows:
    """The attention rows of a call, flattened to (N, M): N key heads, M = G * L rows that share each.

    Walked block by block, in memory order, so that the random numbers a row gets do not depend on how
    the rows are cut into blocks.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
        group: int,
    ):
        self.args = (q, k, v, attn_mask, is_causal, scale, group > 1)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.scale = scale
        self.is_causal = is_causal
        *_, self.length, _ = q.shape
        *_, self.num_keys, _ = k.shape
        self.row_shape = q.shape[:-1]  # (..., H, L)
        self.count = q.shape[:-2].numel() // group  # N
        self.rows = group * self.length  # M
        self.k = k.to(self.dtype).reshape(self.count, self.num_keys, k.shape[-1])
        self.v = v.to(self.dtype).reshape(self.count, self.num_keys, v.shape[-1])
        self.unit: Tensor | None = None
        """(N, 1, 1): what `v` is measured in where its squares would leave the range of float32; see `in_units`."""
        size = self.v.abs().amax((1, 2), keepdim=True) if self.v.numel() else self.v.new_ones(())
        if bool(((size > 0) & ((size < 2.0**-30) | (size > 2.0**30))).any()):
            self.unit = torch.exp2(size.clamp_min(torch.finfo(self.dtype).tiny).log2().floor())
            self.v = self.v / self.unit
        self.q = q.to(self.dtype).reshape(self.count, self.rows, q.shape[-1])
        self.group = group
        self.order: Tensor | None = None
        self.mask = None
        if attn_mask is not None:
            if attn_mask.dtype.itemsize > self.dtype.itemsize:
                attn_mask = in_dtype(attn_mask, self.dtype)
            # A view, of stride 0 where broadcast.
            self.mask = attn_mask.expand(*self.row_shape, self.num_keys)

    def reorder(self, order: Tensor) -> None:
        """Lay the keys and values of each head out in an order (N, n); `logits` then are in this order too."""
        self.order = order
        self.k, self.v = (x.gather(1, order[..., None].expand_as(x)) for x in (self.k, self.v))

    def logits(self, heads: slice, rows: slice) -> Tensor:
        """The masked logits of a block, (heads, rows, n); of a causal one, up to the last key it sees."""
        position, keys = self.positions(rows), self.num_keys
        if self.is_causal and self.order is None and position.numel():
            keys = min(keys, int(position.max()) + 1)
        logits = torch.bmm(self.q[heads, rows] * self.scale, self.k[heads, :keys].mT)
        if self.is_causal:
            key = torch.arange(keys, device=logits.device) if self.order is None else self.order[heads, None]
            logits.masked_fill_(key > position[:, None], -torch.inf)
        if self.mask is not None:
            mask = self._mask_block(heads, rows)
            if self.order is not None:
                mask = mask.gather(-1, self.order[heads, None].expand_as(mask))
            if mask.dtype == torch.bool:
                logits.masked_fill_(~mask, -torch.inf)
            else:
                logits += mask
        return logits

    def _mask_block(self, heads: slice, rows: slice) -> Tensor:
        """The mask of a block, (heads, rows, n); copies no more than the block."""
        assert self.mask is not None
        head = torch.arange(heads.start, heads.stop)[:, None]
        row = torch.arange(rows.start, rows.stop)
        query_head = head * self.group + row // self.length  # [heads, rows]
        index = (row % self.length).expand_as(query_head)
        leading = self.row_shape[:-1]
        return self.mask[(*torch.unravel_index(query_head, leading), index) if leading else (index,)]

    def visible_keys(self) -> Tensor | None:
        """The keys, in the caller's order, that some row of each key head sees by the mask: (N, n), bool."""
        mask = self.args[3]
        if mask is None:
            return None
        seen = mask if mask.dtype == torch.bool else mask > -torch.inf
        seen = seen.any(-2) if seen.ndim > 1 else seen  # before it is broadcast to all heads
        seen = seen.expand(*self.row_shape[:-1], self.num_keys)
        return seen.reshape(self.count, self.group, self.num_keys).any(1)

    def positions(self, rows: slice) -> Tensor:
        """The query position of each row of a block, (rows,)."""
        return torch.arange(rows.start, rows.stop, device=self.q.device) % self.length


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> int:
    """Refuse what cannot be attended to (see `sampled_attention`); the number of query heads a key head."""
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise DtypeError(f"{name}={flag!r} is not allowed: it must be True or False.")
    check_scale(scale)
    check_tensors(q=q, k=k, v=v)
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
    if enable_gqa and q.ndim >= 3 and k.ndim >= 3 and k.shape[-3] and q.shape[-3] % k.shape[-3] == 0:
        group = q.shape[-3] // k.shape[-3]
    grouped = (*k.shape[:-3], k.shape[-3] * group) if group > 1 else k.shape[:-2]
    if q.shape[:-2] != torch.Size(grouped):
        hint = "q's heads a multiple of k's" if enable_gqa else "the same (or enable_gqa=True)"
        raise ShapeError(
            f"the leading dimensions of q and k do not fit, they must be {hint}; given {shapes}."
        )
    if attn_mask is not None:
        _check_mask(attn_mask, (*q.shape[:-1], k.shape[-2]), q, is_causal)
    largest = 1.0 if scale is None else abs(float(scale)) * q.shape[-1]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(
                f"{name} requires a gradient, which a sampler's own estimate does not have: use sampled_attention, "
                "call it under torch.no_grad(), or pass detached tensors."
            )
        size = check_finite(name, x)
        if name != "v":
            largest *= size
    if largest > 1e38:
        raise ArgumentError(
            f"the logits of q, k and scale={scale} could overflow float32 (up to {largest:.0e}): make them smaller."
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
