"""`sampled_attention`: scaled dot-product attention from draws, with error bars."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, DtypeError, ShapeError
from ..estimates import AttentionEstimate, Draws
from ..samplers import ExactSampler, InversionSampler, Sampler, make_sampler, value_order
from ..samplers.base import Uniform, check_count
from .error_bars import ErrorBars, degrees_of_freedom

BLOCK_ELEMENTS = 1 << 20
"""Size of a block of rows: keys, 16 for each draw or 4 for each feature of v, whichever is most, over its rows.
A block's workspace is at most about 32 bytes for each, 32 MiB at the default whatever L and n are, unless one
row alone is longer. Smaller blocks cost more time in starting threads than they save in caches."""


def sampled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sampler: str | Sampler = "systematic",
    num_samples: int = 64,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    replicates: int = 1,
    generator: torch.Generator | None = None,
) -> AttentionEstimate:
    """Estimate softmax(q k^T scale + mask) v from `num_samples` drawn keys a row.

    Shapes, masks, `scale` and grouped-query heads are those of
    `torch.nn.functional.scaled_dot_product_attention`, but for broadcasting: leading dimensions must be equal. Logits and draws are computed in float32 (float64
    for float64 input), cumulative probabilities in float64, in blocks of queries whose workspace does not
    grow with L or n (`BLOCK_ELEMENTS`). No gradients.

    Parameters
    ----------
    q : Tensor, (..., H, L, E)
        Queries; with `enable_gqa=False` the leading dimensions are free and may be absent.
    k : Tensor, (..., Hkv, n, E)
    v : Tensor, (..., Hkv, n, Ev)
        float32, float64, float16 or bfloat16, as k and q.
    sampler : str or Sampler
        A name in `qtx_lab.samplers.SAMPLERS` or an object with its `draw`.
    num_samples : int
        S, the draws of a row and replicate.
    attn_mask : Tensor, broadcastable to (..., H, L, n), optional
        Boolean (True: attend) or float (added to the logits, -inf: masked). A row in which everything is
        masked has output 0 and standard error 0.
    is_causal : bool
        Query i attends to keys 0..i, as in SDPA (upper left corner); not together with `attn_mask`.
    scale : float, optional
        1 / sqrt(E) where None.
    enable_gqa : bool
        H is a multiple of Hkv; query head h uses key head h // (H / Hkv).
    replicates : int
        R independent repetitions, averaged; R >= 2 gives every sampler error bars.
    generator : torch.Generator, optional
        The only source of randomness; torch's default generator of the device where None.

    Returns
    -------
    AttentionEstimate
        `output` (..., H, L, Ev) in v's dtype.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        Before any work: shapes that do not fit, mixed or unsupported dtypes, NaN or infinities, counts below
        1, an unknown sampler, an input that requires a gradient.

    Examples
    --------
    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> q, k, v = (torch.randn(2, 8, 16, generator=g) for _ in range(3))
    >>> est = sampled_attention(q, k, v, sampler="systematic", num_samples=32, replicates=4, generator=g)
    >>> exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    >>> low, high = est.confidence_interval(0.999)
    >>> bool(((low < exact) & (exact < high)).float().mean() > 0.99)
    True
    """
    sampler = make_sampler(sampler)
    check_count("num_samples", num_samples)
    check_count("replicates", replicates)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise DtypeError(f"generator is a {type(generator).__name__}; it must be a torch.Generator.")
    group = check_inputs(q, k, v, attn_mask, is_causal, scale, enable_gqa)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    with torch.no_grad():
        rows = Rows(q, k, v, attn_mask, is_causal, scale, group)
        settings = {"num_samples": num_samples, "generator": generator, "replicates": replicates}
        if type(sampler) is ExactSampler:
            return _exact(rows, sampler, settings)
        return _sampled(rows, sampler, settings)


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
        self.q = q.to(self.dtype).reshape(self.count, self.rows, q.shape[-1])
        self.group = group
        self.order: Tensor | None = None
        self.mask = None
        if attn_mask is not None:  # broadcast dimensions are views of stride 0
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


def _exact(rows: Rows, sampler: ExactSampler, settings: dict) -> AttentionEstimate:
    """SDPA itself; the draws, all L * n of them, are made only when asked for."""
    q, k, v, mask, is_causal, scale, enable_gqa = rows.args
    if mask is not None:  # SDPA takes masks of two dimensions or more, in q's dtype
        mask = mask.expand(*torch.broadcast_shapes(mask.shape, (1, 1)))
        if mask.dtype not in (torch.bool, q.dtype):
            limits = torch.finfo(q.dtype)
            mask = torch.where(mask == -torch.inf, mask, mask.clamp(limits.min, limits.max)).to(q.dtype)
    # Its kernels that hold no map want four dimensions and as many features in v as in q: zeros change nothing.
    width, wanted = v.shape[-1], max(v.shape[-1], q.shape[-1])
    lift = (None,) * max(0, 4 - q.ndim)
    q4, k4, v4 = (F.pad(x, (0, wanted - x.shape[-1]))[lift] for x in (q, k, v))
    output = F.scaled_dot_product_attention(
        q4, k4, v4, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    output = output[..., :width].reshape(*q.shape[:-1], width)
    kept = Rows(q.clone(), k.clone(), v, rows.args[3], is_causal, scale, rows.group)

    def make_draws() -> Draws:
        with torch.no_grad():
            logits = kept.logits(slice(0, kept.count), slice(0, kept.rows))
            return sampler.draw(logits.view(*kept.row_shape, logits.shape[-1]), **settings)

    full = torch.full(rows.row_shape, math.inf, device=q.device)
    return AttentionEstimate(
        output=output,
        num_keys=rows.num_keys,
        degrees_of_freedom=math.inf,
        make_draws=make_draws,
        make_std_error=lambda: torch.zeros_like(output, dtype=rows.dtype),
        diagnostics=_diagnostics(sampler, settings, rows.num_keys, full),
    )


def _sampled(rows: Rows, sampler: Sampler, settings: dict) -> AttentionEstimate:
    """Draw and average, block by block."""
    replicates, total = settings["replicates"], settings["replicates"] * settings["num_samples"]
    shape, width = (rows.count, rows.rows), rows.v.shape[-1]
    step = BLOCK_ELEMENTS // max(rows.num_keys, 16 * total, 4 * width)
    output = rows.v.new_empty(*shape, width)
    indices = torch.empty(*shape, total, dtype=torch.int64, device=rows.q.device)
    weights = rows.q.new_empty(*shape, total)
    probabilities: Tensor | None = rows.q.new_empty(*shape, total)
    visible = rows.visible_keys()
    points = None
    if isinstance(sampler, InversionSampler):
        uniform = Uniform(settings["generator"], rows.q.device)
        points = sampler.points(shape, settings["num_samples"], replicates, uniform)
        if sampler.ordered:
            # What is masked for all would only spread the order.
            rows.reorder(value_order(rows.v if visible is None else rows.v * visible[..., None]))
    for heads, part in blocks(shape, step):
        logits, values = rows.logits(heads, part), rows.v[heads]
        if points is not None and isinstance(sampler, InversionSampler):
            draws = sampler.place(logits, points[heads, part])
        else:
            draws = sampler.draw(logits, values=values[:, : logits.shape[-1]], **settings)
            check_draws(sampler, draws, logits, replicates, total)
        output[heads, part] = draws.average(values)
        indices[heads, part], weights[heads, part] = draws.indices, draws.weights
        if probabilities is None or draws.probabilities is None:
            probabilities = None
        else:
            probabilities[heads, part] = draws.probabilities
    del points
    values = rows.v.clone()
    if rows.order is not None:  # back to the caller's keys
        indices = rows.order[:, None].expand(*shape, rows.num_keys).gather(-1, indices)
        values = torch.empty_like(values).scatter_(1, rows.order[..., None].expand_as(values), values)
    flat = Draws(indices, weights, probabilities, replicates)

    make_std_error, degrees = None, math.inf
    if sampler.independent or replicates > 1:
        causal_length = rows.length if rows.is_causal else None
        degrees = degrees_of_freedom(sampler, flat)
        row_shape, dtype = rows.row_shape, rows.args[2].dtype  # and not rows, which would keep q and k alive

        def make_std_error() -> Tensor:
            std_error = torch.empty_like(output)
            with torch.no_grad():
                bars = ErrorBars(values, visible, causal_length, sampler, dtype)
                for block in blocks(shape, step):
                    std_error[block] = bars(flat, output, block)
            return std_error.view(*row_shape, width)

    draws = flat.view(rows.row_shape)
    return AttentionEstimate(
        output=output.view(*rows.row_shape, width).to(rows.args[2].dtype),
        num_keys=rows.num_keys,
        degrees_of_freedom=degrees,
        make_draws=lambda: draws,
        make_std_error=make_std_error,
        diagnostics=_diagnostics(sampler, settings, total, draws.effective_sample_size()),
    )


def check_draws(sampler: Sampler, draws: object, logits: Tensor, replicates: int, total: int) -> None:
    """Refuse what a sampler of the user's own must not give."""
    who = f"sampler={sampler.name!r} gave"
    if not isinstance(draws, Draws):
        raise DtypeError(f"{who} a {type(draws).__name__}; draw must give Draws.")
    shape, n = (*logits.shape[:-1], total), logits.shape[-1]
    parts = {"indices": draws.indices, "weights": draws.weights, "probabilities": draws.probabilities}
    for name, x in parts.items():
        if x is not None and x.shape != shape:
            raise ShapeError(f"{who} {name} {tuple(x.shape)} from logits {tuple(logits.shape)}, not {shape}.")
    if draws.replicates != replicates:
        raise ArgumentError(f"{who} Draws(replicates={draws.replicates}) where {replicates} were asked for.")
    if draws.indices.dtype != torch.int64 or not draws.weights.is_floating_point():
        raise DtypeError(f"{who} {draws.indices.dtype} indices and {draws.weights.dtype} weights.")
    if draws.indices.numel() and not (int(draws.indices.min()) >= 0 and int(draws.indices.max()) < n):
        raise ArgumentError(f"{who} indices outside 0..{n - 1}, the keys that it was shown.")
    if not bool(draws.weights.isfinite().all()):
        raise ArgumentError(f"{who} weights that are not finite.")


def _diagnostics(sampler: Sampler, settings: dict, spent: int, effective: Tensor) -> dict:
    return {
        "sampler": sampler.name,
        "num_samples": settings["num_samples"],
        "replicates": settings["replicates"],
        "draws_per_row": spent,
        "effective_sample_size": effective,
        "fallbacks": (),
    }


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
    if scale is not None and (isinstance(scale, bool | str) or not hasattr(scale, "__float__")):
        raise DtypeError(f"scale={scale!r} is not allowed: it must be a number.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor.")
        if x.layout != torch.strided or x.is_meta or x.is_nested:
            raise DtypeError(
                f"{name} is a {x.layout} tensor on {x.device}; it must be dense and hold numbers."
            )
        if x.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise DtypeError(f"{name} is {x.dtype}; it must be float32, float64, float16 or bfloat16.")
        if x.dtype != q.dtype or x.device != q.device:
            raise DtypeError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; they must agree."
            )
        if x.ndim < 2:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; it must be (..., length, features).")
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
    if scale is not None and not math.isfinite(scale):
        raise ArgumentError(f"scale={scale} is not allowed: it must be a finite number.")
    if attn_mask is not None:
        _check_mask(attn_mask, (*q.shape[:-1], k.shape[-2]), q, is_causal)
    largest = 1.0 if scale is None else abs(float(scale)) * q.shape[-1]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(
                f"{name} requires a gradient, which sampled_attention does not give: call it under "
                "torch.no_grad(), or pass detached tensors."
            )
        ends = [float(end) for end in x.detach().aminmax()] if x.numel() else [0.0]
        if not all(math.isfinite(end) for end in ends):
            raise ArgumentError(f"{name} holds NaN or infinity; only finite numbers are allowed.")
        if name != "v":
            largest *= max(abs(end) for end in ends)
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
    if mask.is_floating_point() and not bool((mask < torch.inf).all()):
        raise ArgumentError("attn_mask holds NaN or +inf; only finite numbers and -inf are allowed.")
