"""`sampled_attention`: scaled dot-product attention from draws, with error bars."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, DtypeError, ShapeError
from ..estimates import AttentionEstimate, Draws
from ..samplers import ExactSampler, InversionSampler, Sampler, make_sampler, value_order
from ..samplers.base import Uniform, check_count
from ..samplers.rows import Rows, blocks, check_inputs
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
