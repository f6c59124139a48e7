"""`sampled_attention`: scaled dot-product attention from draws, with error bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count, check_generator
from ..controls import Control
from ..errors import ArgumentError, DtypeError, ShapeError
from ..estimates import AttentionEstimate, Draws, EstimateInfo, KernelUse
from ..kernels.choice import triton_considered
from ..problem import Rows, blocks, check_inputs, in_dtype, in_units
from ..samplers import (
    ExactSampler,
    InversionSampler,
    LearnedImportanceSampler,
    Sampler,
    SystematicSampler,
    make_sampler,
)
from ..samplers.base import Uniform
from ..samplers.value_order import kept_value_order, value_order
from .corrections import ControlVariate, Correction, correct, make_controls
from .error_bars import Design, ErrorBars
from .gradients import differentiable, outside_graphs
from .kernel_paths import KernelCall, attend_systematic, choose_systematic, make_stream
from .tolerance import check_tolerance, to_tolerance

BLOCK_ELEMENTS = 1 << 20
"""Size of a block of rows: keys, 16 for each draw or 4 for each feature of v, whichever is most, over its rows.
A block's workspace is at most about 32 bytes for each, 32 MiB at the default whatever L and n are, unless one
row alone is longer. Smaller blocks cost more time in starting threads than they save in caches."""


@outside_graphs
def sampled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sampler: str | Sampler = "systematic",
    num_samples: int | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    replicates: int = 1,
    control_variate: ControlVariate | None = None,
    tolerance: float | None = None,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> AttentionEstimate:
    """Estimate softmax(q k^T scale + mask) v from `num_samples` drawn keys a row.

    Shapes, masks, `scale` and grouped-query heads are those of
    `torch.nn.functional.scaled_dot_product_attention`, but for broadcasting: leading dimensions must be equal. Logits and draws are computed in float32 (float64
    for float64 input), cumulative probabilities in float64, in blocks of queries whose workspace does not
    grow with L or n (`BLOCK_ELEMENTS`), autocast or not. Where q, k or v requires one, the output has a gradient, which
    is as unbiased as the sampler is (`qtx_lab.attention.gradients.differentiable`). Under `torch.compile` it runs as it
    is, between two graphs.

    Parameters
    ----------
    q : Tensor, (..., H, L, E)
        Queries; with `enable_gqa=False` the leading dimensions are free and may be absent.
    k : Tensor, (..., Hkv, n, E)
    v : Tensor, (..., Hkv, n, Ev)
        float32, float64, float16 or bfloat16, as k and q.
    sampler : str or Sampler
        A name in `qtx_lab.samplers.SAMPLERS` or an object with its `draw`. If that has `diagnostics`, they are passed
        on as `drawn_by` and `fallbacks`; beside circuits stands `classical`, the estimate from as many pseudo-random
        draws. `systematic` draws are made by kernels on CUDA, as `diagnostics["kernel"]` tells: along the whole row for few
        rows, page by page of 64 keys for causal ones, more than 64 a key head, or gradients
        (`qtx_lab.gpu_quantum_attention`; QTX_LAB_KERNELS=reference keeps to torch). A `LearnedImportanceSampler` gives its own
        self-normalised estimate, biased by O(1 / num_samples), from its proposal; with controls its plain one.
    num_samples : int, optional
        S, the draws of a row and replicate; 64 where neither it nor `tolerance` is given.
    attn_mask : Tensor, broadcastable to (..., H, L, n), optional
        Boolean (True: attend) or float (added to the logits, -inf: masked). A row in which everything is
        masked has output 0 and standard error 0.
    is_causal : bool
        Query i attends to keys 0..i, as in SDPA (upper left corner); not together with `attn_mask`.
    scale : float, optional
        1 / sqrt(E) where None.
    enable_gqa : bool
        H is a multiple of Hkv; query head h uses key head h // (H / Hkv). The heads of a group share their random
        numbers, so that together they read fewer values (`AttentionEstimate.keys_touched`); but for samplers that
        invert nothing.
    replicates : int
        R independent repetitions, averaged; R >= 2 gives every sampler error bars.
    control_variate : str, Control, MultilevelControlVariate, or a list of names and controls, optional
        What corrects the estimate (`qtx_lab.controls.CONTROLS`): unbiased as the sampler is, coefficients one a control
        and query head. No masks but `is_causal`; the sampler must know its draws' probabilities, and rows that share
        their randomness (`sobol`, `halton`, `lattice`) need replicates >= 2.
    tolerance : float, optional
        In place of a count: every row gets as many draws as keep |o_hat - o| <= tolerance |o| with probability
        `confidence`, norms over its features (see `to_tolerance`). `diagnostics` then has for each row
        `draws_per_row`, `pilot_draws_per_row` and `predicted_relative_error`, the bound that was kept.
    confidence : float
        From 0.5 to below 1.
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
        1, an unknown sampler, a gradient that is not given (of `attn_mask`, or by `tolerance` from one replicate).

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
    check_count("num_samples", 64 if num_samples is None else num_samples)
    check_count("replicates", replicates)
    check_generator(generator)
    with torch.no_grad():
        group = check_inputs(q, k, v, attn_mask, is_causal, scale, enable_gqa)
    controls = [] if control_variate is None else make_controls(control_variate)
    if controls and attn_mask is not None:
        raise ArgumentError("control_variate knows no attn_mask, only is_causal: leave one of them out.")
    if controls and replicates == 1 and getattr(sampler, "joint", False):
        raise ArgumentError(
            f"control_variate with sampler={sampler.name!r}, whose rows share their randomness, needs "
            "replicates >= 2: coefficients must come from other draws than those that they correct."
        )
    check_tolerance(tolerance, confidence, num_samples, sampler)
    if tolerance is not None and type(sampler) is not ExactSampler and controls:
        raise ArgumentError("tolerance and control_variate exclude each other: leave one of them out.")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    inputs = [q, k, v] if attn_mask is None else [q, k, v, attn_mask]
    grad, exact = (
        torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
        type(sampler) is ExactSampler,
    )
    told: dict[str, Any] = {}
    plain = type(sampler) is SystematicSampler and not (controls or tolerance)
    if plain and triton_considered(q) and not (attn_mask is not None and attn_mask.requires_grad):
        choice = choose_systematic(q, k, v, is_causal, group)
        if choice.path == "triton":
            stream = make_stream(q, k, generator)
            call = KernelCall(num_samples or 64, replicates, is_causal, scale, group, stream, choice)
            return attend_systematic(q, k, v, attn_mask, call)
        told = {"kernel": KernelUse("torch", choice.reason), "fallbacks": choice.fallbacks}
    if grad and not exact:
        return differentiable(
            sampled_attention,
            q,
            k,
            v,
            sampler=sampler,
            num_samples=num_samples or (64 if tolerance is None else None),
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            replicates=replicates,
            control_variate=control_variate,
            tolerance=tolerance,
            confidence=confidence,
            generator=generator,
        )
    with torch.autocast(q.device.type, enabled=False), torch.set_grad_enabled(grad):
        rows = Rows(q, k, v, attn_mask, is_causal, scale, group)
        settings = {"num_samples": num_samples or 64, "generator": generator, "replicates": replicates}
        if isinstance(sampler, ExactSampler) and exact:
            estimate = _exact(rows, sampler, settings)
            if controls:
                unused = "control_variate is not used: the output is exact."
                estimate = replace(estimate, info=estimate.info.with_fallbacks(unused))
            return estimate
        if isinstance(sampler, LearnedImportanceSampler):
            return _learned(rows, sampler, settings, controls)
        if tolerance is not None and isinstance(sampler, InversionSampler):
            lay_out(rows, sampler)
            step = BLOCK_ELEMENTS // max(rows.num_keys, 4 * v.shape[-1])
            return to_tolerance(rows, sampler, tolerance, confidence, replicates, generator, step)
        estimate = _sampled(rows, sampler, settings, controls)
        if told:
            info = replace(estimate.info, kernel=told["kernel"]).with_fallbacks(*told["fallbacks"])
            estimate = replace(estimate, info=info)
        return estimate


def _exact(rows: Rows, sampler: ExactSampler, settings: dict) -> AttentionEstimate:
    """SDPA itself; the draws, all L * n of them, are made only when asked for."""
    q, k, v, mask, is_causal, scale, enable_gqa = rows.args
    if mask is not None:  # SDPA takes masks of two dimensions or more, in q's dtype
        mask = in_dtype(mask.expand(*torch.broadcast_shapes(mask.shape, (1, 1))), q.dtype)
    # Its kernels that hold no map want four dimensions and as many features in v as in q: zeros change nothing.
    width, wanted = v.shape[-1], max(v.shape[-1], q.shape[-1])
    lift = (None,) * max(0, 4 - q.ndim)
    q4, k4, v4 = (F.pad(x, (0, wanted - x.shape[-1]))[lift] for x in (q, k, v))
    output = F.scaled_dot_product_attention(
        q4, k4, v4, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    output = output[..., :width].reshape(*q.shape[:-1], width)
    q, k, v = (x.detach() for x in (q, k, v))
    kept_mask = None if rows.args[3] is None else rows.args[3].clone()
    kept = Rows(q.clone(), k.clone(), v, kept_mask, is_causal, scale, rows.group)

    def make_draws() -> Draws:
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            logits = kept.logits(slice(0, kept.count), slice(0, kept.rows))
            return sampler.draw(logits.view(*kept.row_shape, logits.shape[-1]), **settings)

    full = torch.full(rows.row_shape, math.inf, device=q.device)
    return AttentionEstimate(
        output=output,
        num_keys=rows.num_keys,
        degrees_of_freedom=math.inf,
        make_draws=make_draws,
        make_std_error=lambda: torch.zeros_like(output, dtype=kept.dtype),
        group=rows.group,
        info=_info(sampler, settings, rows.num_keys, full),
    )


def lay_out(rows: Rows, sampler: InversionSampler) -> None:
    """Put the keys in value order, if the sampler wants that."""
    visible = rows.visible_keys()
    if sampler.ordered and visible is None:
        rows.reorder(kept_value_order(rows.args[2]).view(rows.count, rows.num_keys))
    elif sampler.ordered and visible is not None:  # what is masked for all would only spread the order
        rows.reorder(value_order(rows.v * visible[..., None]))


def _sampled(
    rows: Rows, sampler: Sampler, settings: dict, controls: Sequence[Control] = ()
) -> AttentionEstimate:
    """Draw and average, block by block."""
    replicates, total = settings["replicates"], settings["replicates"] * settings["num_samples"]
    shape, width = (rows.count, rows.rows), rows.v.shape[-1]
    keys, values = rows.k, rows.v  # in the caller's order
    step = BLOCK_ELEMENTS // max(rows.num_keys, 16 * total, 4 * width)
    output = values.new_empty(*shape, width)
    indices = torch.empty(*shape, total, dtype=torch.int64, device=rows.q.device)
    weights = rows.q.new_empty(*shape, total)
    probabilities: Tensor | None = rows.q.new_empty(*shape, total)
    points = None
    if isinstance(sampler, InversionSampler):
        uniform = Uniform(settings["generator"], rows.q.device)
        # One set of points for the query heads of a group.
        points = sampler.points((rows.count, rows.length), settings["num_samples"], replicates, uniform)
        lay_out(rows, sampler)
    told: dict[str, None] = {}
    drawn_by: dict[str, Any] = {}
    for heads, part in blocks(shape, step):
        logits, laid = rows.logits(heads, part), rows.v[heads]
        if points is not None and isinstance(sampler, InversionSampler):
            at = points[heads, part] if rows.group == 1 else points[heads, rows.positions(part)]
            draws = sampler.place(logits, at)
        else:
            draws = sampler.draw(logits, values=laid[:, : logits.shape[-1]], **settings)
            check_draws(sampler, draws, logits, replicates, total)
            facts = dict(getattr(sampler, "diagnostics", {}))
            told |= dict.fromkeys(facts.pop("fallbacks", ()))
            for name in ("quantum_rows", "classical_rows"):  # of all blocks
                if name in facts:
                    facts[name] += drawn_by.get(name, 0)
            drawn_by |= facts
        output[heads, part] = draws.average(laid)
        indices[heads, part], weights[heads, part] = draws.indices, draws.weights
        if probabilities is None or draws.probabilities is None:
            probabilities = None
        else:
            probabilities[heads, part] = draws.probabilities
    del points
    if rows.order is not None:  # back to the caller's keys
        indices = rows.order[:, None].expand(*shape, rows.num_keys).gather(-1, indices)
    flat = Draws(indices, weights, probabilities, replicates)
    info = _info(sampler, settings, total, flat.view(rows.row_shape).effective_sample_size())
    info = replace(info.with_fallbacks(*told), drawn_by=drawn_by or None)
    if baseline := getattr(sampler, "classical_baseline", None):
        info = replace(info, classical=_sampled(rows, make_sampler(baseline), settings))
    if not controls:
        return _estimate(rows, Design.of(sampler), flat, values, output, info, step)
    if probabilities is None:
        raise ArgumentError(
            f"control_variate needs the probabilities of the draws, which sampler={sampler.name!r} does not know."
        )
    weigh = None
    if isinstance(sampler, InversionSampler) and not sampler.independent:

        def weigh(p: Tensor) -> Tensor:
            return sampler.variance_weights(p, settings["num_samples"])[0]

    correction = correct(
        rows, keys, values, flat, controls, settings["generator"], weigh, blocks(shape, step)
    )
    return _corrected(rows, Design.of(sampler), flat, values, info, step, correction)


def _learned(
    rows: Rows, sampler: LearnedImportanceSampler, settings: dict, controls: Sequence[Control]
) -> AttentionEstimate:
    """The sampler's own estimate, from its proposal; with controls the plain one, which knows its probabilities."""
    q, k, v, mask, is_causal, scale, enable_gqa = rows.args
    call = {"attn_mask": mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, **settings}
    if not controls:
        return sampler.estimate(q, k, v, **call)
    plain = sampler.estimate(q, k, v, estimator="plain", **call)
    shape = (rows.count, rows.rows)
    flat = plain.draws.view(shape)
    step = BLOCK_ELEMENTS // max(rows.num_keys, 16 * flat.indices.shape[-1], 4 * v.shape[-1])
    correction = correct(
        rows, rows.k, rows.v, flat, controls, settings["generator"], None, blocks(shape, step)
    )
    return _corrected(rows, Design(False), flat, rows.v, plain.info, step, correction)


def _corrected(
    rows: Rows,
    design: Design,
    flat: Draws,
    values: Tensor,
    info: EstimateInfo,
    step: int,
    correction: Correction,
) -> AttentionEstimate:
    report = correction.report
    info = replace(info, control_variate=report)
    costly = [f"{name} {cost:,.0f}" for name, cost in report.costs.items() if cost >= report.exact_cost]
    if costly:
        info = info.with_fallbacks(
            f"Controls cost as much as the exact output, {report.exact_cost:,.0f} multiply-adds a query: "
            f"{', '.join(costly)}.",
        )
    if rows.length * flat.replicates == 1 and not correction.oracle:
        info = info.with_fallbacks(
            "Not corrected by control_variate: one row of one replicate leaves nothing to fit coefficients to.",
        )
    return _estimate(rows, design, flat, values, correction.output, info, step, correction)


def _estimate(
    rows: Rows,
    design: Design,
    flat: Draws,
    values: Tensor,
    output: Tensor,
    info: EstimateInfo,
    step: int,
    correction: Correction | None = None,
) -> AttentionEstimate:
    """What the draws `flat` (N, M, T) and the `output` (N, M, d) come to; error bars are made when first read."""
    make_std_error, degrees, shape = None, math.inf, (rows.count, rows.rows)
    row_shape, width, dtype, unit = rows.row_shape, values.shape[-1], rows.args[2].dtype, rows.unit
    if correction is not None and correction.oracle:

        def make_std_error() -> Tensor:
            return torch.zeros_like(output).reshape(*row_shape, width)

    elif design.independent or flat.replicates > 1:
        # Copies, and not rows itself, which would keep q and k alive.
        causal, positions = rows.is_causal, rows.positions(slice(0, rows.rows))
        visible, values = rows.visible_keys(), values.clone()
        degrees = design.degrees_of_freedom(flat)

        def make_std_error() -> Tensor:
            std_error = torch.empty_like(output)
            with torch.no_grad():
                bars = ErrorBars(values, visible, causal, design, dtype)
                for block in blocks(shape, step):
                    cut = None if correction is None else correction[block]
                    std_error[block] = bars(flat[block], output[block], block[0], positions[block[1]], cut)
            return in_units(std_error, unit).view(*row_shape, width)

    draws = flat.view(row_shape)
    return AttentionEstimate(
        output=in_units(output, unit).reshape(*row_shape, width).to(dtype),
        num_keys=rows.num_keys,
        degrees_of_freedom=degrees,
        make_draws=lambda: draws,
        make_std_error=make_std_error,
        group=rows.group,
        info=info,
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


def _info(sampler: Sampler, settings: dict, spent: int, effective: Tensor) -> EstimateInfo:
    return EstimateInfo(
        sampler=sampler.name,
        unbiased=bool(getattr(sampler, "unbiased", False)),
        num_samples=settings["num_samples"],
        replicates=settings["replicates"],
        draws_per_row=spent,
        effective_sample_size=effective,
    )
