"""`sampled_attention`: scaled dot-product attention from draws, with error bars."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..checks import check_generator, transformed
from ..errors import ArgumentError, TransformError
from ..estimates import AttentionEstimate, KernelUse
from ..kernels.choice import triton_considered
from ..problem import AttentionProblem, Window
from ..samplers import Sampler, make_sampler
from ..streams import make_seed
from .corrections import ControlVariate, correct
from .gradients import differentiable, outside_graphs
from .kernel_paths import KernelCall, attend_systematic, choose_systematic
from .settings import AttentionSettings
from .tolerance import to_tolerance
from .uncertainty import with_error_bars


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
    sequences: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    window: int | Window | None = None,
    generator: torch.Generator | None = None,
) -> AttentionEstimate:
    """Estimate softmax(q k^T scale + mask) v from `num_samples` drawn keys a row.

    Shapes, masks, `scale` and grouped-query heads are those of
    `torch.nn.functional.scaled_dot_product_attention`, but for broadcasting: leading dimensions must be
    equal. Logits and draws are computed in float32 (float64 for float64 input), cumulative probabilities in
    float64, in blocks of rows whose workspace does not grow with L or n (`qtx_lab.problem.BLOCK_ELEMENTS`),
    autocast or not. Where q, k or v requires one, the output has a gradient, which is as unbiased as the
    sampler is (`qtx_lab.attention.gradients.differentiable`), and so has the tangent of forward-mode
    differentiation; second derivatives are refused. Under `torch.compile` it runs as it is, between two
    graphs.

    The draws of a row are a function of the generator's seed, the sequence, the key head, the query's
    position and the replicate (`qtx_lab.streams`): they do not depend on other rows, heads and sequences. A
    causal row depends on no later token.

    Parameters
    ----------
    q : Tensor, (..., H, L, E)
        Queries; with `enable_gqa=False` the leading dimensions are free and may be absent. The third
        dimension from the end counts heads, those before it sequences.
    k : Tensor, (..., Hkv, n, E)
    v : Tensor, (..., Hkv, n, Ev)
        float32, float64, float16 or bfloat16, as k and q.
    sampler : str or Sampler
        A name in `qtx_lab.samplers.SAMPLERS` or an object with its `draw`. What it reports about its draws
        (`last_facts`) is passed on as `info.drawn_by`; for circuits, `info.classical` is the estimate from as
        many pseudo-random draws. `systematic` draws are made by kernels on CUDA, as `info.kernel` says: along
        the whole row for few rows, page by page of 64 keys for causal ones, more than 64 a key head, or
        gradients (QTX_LAB_KERNELS=reference keeps to torch). A `LearnedImportanceSampler` gives its own
        self-normalised estimate, biased by O(1 / num_samples), from its proposal; with controls its plain
        one.
    num_samples : int, optional
        S, the draws of a row and replicate; 64 where neither it nor `tolerance` is given.
    attn_mask : Tensor, broadcastable to (..., H, L, n), optional
        Boolean (True: attend) or float (added to the logits after `softcap`, -inf: masked), or a
        `torch.nn.attention.bias.CausalBias`. A row in which everything is masked has output 0 and standard
        error 0.
    is_causal : bool
        Query i attends to keys 0..i, as in SDPA (upper left corner); not together with `attn_mask`.
    scale : float, optional
        1 / sqrt(E) where None.
    enable_gqa : bool
        H is a multiple of Hkv; query head h uses key head h // (H / Hkv). The heads of a group share their
        random numbers, so that together they read fewer values (`AttentionEstimate.keys_touched`).
    replicates : int
        R independent repetitions, averaged; R >= 2 gives every sampler error bars.
    control_variate : str, Control, MultilevelControlVariate, or a list of names and controls, optional
        What corrects the estimate (`qtx_lab.controls.CONTROLS`), unbiased as the sampler is: each row mixes
        the controls by weights that follow from its probabilities before any draw, so that more controls do
        not lose what one gains. No masks but `is_causal`, no softcap, no window; the sampler must know its
        draws' probabilities, and rows that share their randomness (`sobol`, `halton`, `lattice`) need
        replicates >= 2.
    tolerance : float, optional
        In place of a count: every row gets as many draws as keep |o_hat - o| <= tolerance |o| with
        probability `confidence`, norms over its features (see `to_tolerance`). Keys are then laid out in
        random order where the sampler's errors depend on their order. `info` has for each row
        `draws_per_row`, `pilot_draws_per_row` and `predicted_relative_error`, the bound that was met.
    confidence : float
        From 0.5 to below 1.
    sequences : Tensor, int64, (B,), optional
        A whole number that names each sequence of the batch; its index in the batch where None. A sequence
        draws the same keys under the same name, wherever it stands.
    sinks : Tensor, (H,) or broadcastable to (..., H), optional
        A learned logit for each query head, as in GPT-OSS, which takes probability from the keys and has no
        value; neither scaled, capped nor masked. Draws are made from the keys; the output, its error and the
        weights are multiplied by the probability that is left to them.
    softcap : float, optional
        c > 0: scaled logits become c tanh(logits / c) before masks and bias, as in Gemma 2.
    window : int or (int or None, int or None), optional
        (left, right), or one number for both: the query at position i attends to keys i - left … i + right
        only, on top of `attn_mask` or `is_causal`. None: no limit on that side.
    generator : torch.Generator, optional
        Gives the seed; torch's default generator of the CPU where None.

    Returns
    -------
    AttentionEstimate
        `output` (..., H, L, Ev) in v's dtype.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        Before any work: shapes that do not fit, mixed or unsupported dtypes, NaN or infinities, counts below
        1, an unknown sampler, a gradient that is not given (by `tolerance` from one replicate).
    TransformError
        Under `torch.func.vmap`, `torch.export`, `torch.jit.script` and `torch.jit.trace`, and where a
        derivative is differentiated again.

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
    settings = AttentionSettings.of(sampler, num_samples, replicates, control_variate, tolerance, confidence)
    problem = AttentionProblem.of(
        q,
        k,
        v,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        sequences=sequences,
        sinks=sinks,
        softcap=softcap,
        window=window,
    )
    return attend(problem, settings, generator)


@outside_graphs
def attend(
    problem: AttentionProblem, settings: AttentionSettings, generator: torch.Generator | None = None
) -> AttentionEstimate:
    """Estimate the output of a problem: `sampled_attention` for what is checked already.

    Parameters
    ----------
    problem : AttentionProblem
    settings : AttentionSettings
    generator : torch.Generator, optional
        Gives the seed.

    Raises
    ------
    ArgumentError
        If the settings do not fit the problem.
    TransformError
        Under `torch.jit.trace`, except for the exact sampler.
    """
    check_generator(generator)
    if settings.controls:
        unknown = {"attn_mask": problem.mask, "softcap": problem.softcap, "window": problem.window}
        for name, x in unknown.items():
            if x is not None:
                raise ArgumentError(
                    f"control_variate is not allowed with {name}, only with is_causal and sinks: "
                    "leave one of them out."
                )
    if torch.jit.is_tracing() and not settings.sampler.exact:
        raise TransformError(
            f"sampler={settings.sampler.name!r} draws keys, which torch.jit.trace would keep as constants: "
            "use torch.compile, or trace with sampler='exact'."
        )
    seed = make_seed(generator)
    derivatives = problem.requires_grad or problem.has_tangents or transformed()
    kernel: KernelUse | None = None
    fallbacks: tuple[str, ...] = ()
    plain = not (settings.controls or settings.tolerance or problem.has_tangents or transformed())
    if settings.sampler.has_kernel and plain and triton_considered(problem.q):
        choice = choose_systematic(problem)
        if choice.path == "triton":
            return attend_systematic(KernelCall(problem, settings.budget, problem.stream(seed), choice))
        kernel, fallbacks = KernelUse("torch", choice.reason), choice.fallbacks
    if derivatives and not settings.sampler.exact:
        estimate = differentiable(estimate_problem, problem, settings, seed)
    else:
        estimate = estimate_problem(problem, settings, seed)
    if kernel is None:
        return estimate
    return replace(estimate, info=replace(estimate.info, kernel=kernel).with_fallbacks(*fallbacks))


def estimate_problem(
    problem: AttentionProblem, settings: AttentionSettings, seed: Tensor, first_replicate: int = 0
) -> AttentionEstimate:
    """The estimate by the samplers' own torch, without gradients but for the exact sampler's.

    `first_replicate` numbers the replicates: higher numbers give independent repetitions.
    """
    sinks = problem.row_sinks
    if sinks is None or (settings.sampler.takes_sinks and not settings.controls):
        return _estimate_rows(problem, settings, seed, first_replicate)
    keys = problem.without_sinks()
    estimate = _estimate_rows(keys, settings, seed, first_replicate)
    grad = problem.requires_grad
    with torch.autocast(problem.q.device.type, enabled=False), torch.set_grad_enabled(grad):
        if estimate.log_sum_exp is None:
            normaliser = keys.log_sum_exp().view(problem.row_shape)
            info = replace(estimate.info, log_sum_exp="exact")
            estimate = replace(estimate, make_log_sum_exp=lambda: normaliser, info=info)
        return estimate.with_sinks(sinks)


def _estimate_rows(
    problem: AttentionProblem, settings: AttentionSettings, seed: Tensor, first_replicate: int
) -> AttentionEstimate:
    """`estimate_problem` for a problem without sinks, or a sampler that knows them."""
    sampler, budget = settings.sampler, settings.budget
    grad = problem.requires_grad
    with torch.autocast(problem.q.device.type, enabled=False), torch.set_grad_enabled(grad):
        stream = problem.stream(seed)
        stream = stream.of_purpose(stream.purpose, first_replicate)
        if settings.tolerance is not None and not sampler.exact:
            return to_tolerance(problem, sampler, settings.tolerance, budget.replicates, stream)
        controls = () if sampler.exact else settings.controls
        if controls:
            sampler = sampler.correctable()
        sampled = sampler.estimate_rows(problem, budget, stream)
        info = sampled.info
        if settings.controls and not controls:
            info = info.with_fallbacks("control_variate is not used: the output is exact.")
        if sampler.classical_baseline is not None:
            baseline = replace(settings, sampler=make_sampler(sampler.classical_baseline), controls=())
            info = replace(info, classical=_estimate_rows(problem, baseline, seed, first_replicate))
        sampled = replace(sampled, info=info)
        if not controls:
            return with_error_bars(sampled, problem).to_estimate(problem)
        independent = not sampler.joint
        correction = correct(problem, sampled, controls, seed, rows_are_independent=independent)
        return with_error_bars(correction.applied(sampled, problem), problem, correction).to_estimate(problem)
