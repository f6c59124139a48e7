"""`gpu_quantum_attention`, and how an attention call becomes launches of kernels and an estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor

from ..checks import check_count, check_flags, check_generator, transformed
from ..errors import ArgumentError, TransformError
from ..estimates import AttentionEstimate, Draws, EstimateInfo, KernelUse, mixed_degrees_of_freedom
from ..kernels.choice import Choice, choose, slower_decode, slower_prefill
from ..kernels.decode import reference as decode_reference
from ..kernels.decode.reference import DecodeResult
from ..kernels.inputs import MAX_DECODE_ROWS, Inputs
from ..kernels.memory import out_of_memory_explained
from ..kernels.prefill import reference as prefill_reference
from ..problem import AttentionProblem
from ..samplers import Budget, Design, SampledRows, SystematicSampler
from ..samplers.inversion import row_probabilities
from ..streams import Stream, make_seed
from .error_bars import ErrorBars
from .gradients import first_derivative, outside_graphs
from .uncertainty import with_error_bars


@overload
def gpu_quantum_attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    num_samples: int = ...,
    *,
    attn_mask: Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    replicates: int = ...,
    generator: torch.Generator | None = ...,
    return_estimate: Literal[False] = ...,
) -> Tensor: ...


@overload
def gpu_quantum_attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    num_samples: int = ...,
    *,
    attn_mask: Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    replicates: int = ...,
    generator: torch.Generator | None = ...,
    return_estimate: Literal[True],
) -> AttentionEstimate: ...


@outside_graphs
def gpu_quantum_attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    num_samples: int = 64,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    replicates: int = 1,
    generator: torch.Generator | None = None,
    return_estimate: bool = False,
) -> Tensor | AttentionEstimate:
    """Sampled attention by Triton kernels on CUDA, and by their plain-torch reference elsewhere.

    A few queries without gradients, as in decoding, are drawn systematically along the whole row
    (`kernels.decode`). Many queries, causal ones and those with gradients are drawn page by page of 64 keys
    (`kernels.prefill`); their gradients for q, k and v are unbiased, as those of `sampled_attention` are.
    Exact attention of many queries takes less time than that, and so does exact decoding of short rows:
    `info.kernel.slower_than_exact` then says why.
    Nothing about it is quantum: these are the draws that measuring an ideal circuit would give, but with less
    noise. The environment variable QTX_LAB_KERNELS=triton or reference overrides which of the two runs.

    Parameters
    ----------
    Q : Tensor, (..., H, L, E)
    K : Tensor, (..., Hkv, n, E)
    V : Tensor, (..., Hkv, n, Ev)
        float32, float16 or bfloat16, up to 256 features; others take the reference. They are checked to be
        finite, for which they are read once more.
    num_samples : int
        S, the draws of a row and replicate; where rows are drawn page by page, on average.
    attn_mask : Tensor, broadcastable to (..., H, L, n), optional
        Boolean (True: attend) or added to the logits. A row in which everything is masked has output 0.
    is_causal : bool
        Query i attends to keys 0..i; not together with `attn_mask`.
    scale : float, optional
        1 / sqrt(E) where None.
    enable_gqa : bool
        H is a multiple of Hkv; the heads of a group share their random numbers.
    replicates : int
        R independent repetitions, averaged; R >= 2 gives standard errors.
    generator : torch.Generator, optional
        Gives the seed of the kernels' counter-based random numbers. The same seed gives the same draws on any
        device, up to the rounding of logits.
    return_estimate : bool
        Whether to return the estimate, with its draws and errors, in place of the output alone.

    Returns
    -------
    Tensor, (..., H, L, Ev), in V's dtype; or AttentionEstimate
        The estimate's `info.kernel` says which kernel ran, by which path and why; with a gradient
        `info.baseline` is "other pages" (`kernels.prefill.reference.gradients`). Its `draws`, where rows are
        drawn page by page, are computed when they are read, L * n of them.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        Before any work.
    TransformError
        Under a transform of `torch.func`, with tangents, or traced by `torch.jit`.
    BackendUnavailable
        If QTX_LAB_KERNELS=triton is not possible here, or if CUDA runs out of memory.

    Examples
    --------
    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> q, k, v = (torch.randn(2, 100, 16, generator=g) for _ in range(3))
    >>> gpu_quantum_attention(q, k, v, num_samples=64, generator=g).shape
    torch.Size([2, 100, 16])
    >>> est = gpu_quantum_attention(q, k, v, replicates=4, generator=g, return_estimate=True)
    >>> est.std_error.shape, est.info.kernel.path
    (torch.Size([2, 100, 16]), 'reference')
    """
    num_samples = check_count("num_samples", num_samples)
    replicates = check_count("replicates", replicates)
    check_flags(return_estimate=return_estimate)
    check_generator(generator)
    problem = AttentionProblem.of(
        Q, K, V, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if attn_mask is not None and attn_mask.requires_grad:
        raise ArgumentError("attn_mask requires a gradient, which the kernels do not give: detach it.")
    if transformed() or problem.has_tangents or torch.jit.is_tracing():
        raise TransformError(
            "gpu_quantum_attention runs eagerly and has gradients of reverse mode only: use "
            "sampled_attention for torch.func and forward mode, and torch.compile, not torch.jit.trace."
        )
    stream = problem.stream(make_seed(generator))
    call = KernelCall(problem, Budget(num_samples, replicates), stream, choose_systematic(problem))
    estimate = attend_systematic(call)
    return estimate if return_estimate else estimate.output


@dataclass(frozen=True)
class KernelCall:
    """A problem for the systematic kernels.

    Parameters
    ----------
    problem : AttentionProblem
    budget : Budget
    stream : Stream
        Of the problem's key heads and positions.
    choice : Choice
        The kernel or its reference, from `choose_systematic`.
    """

    problem: AttentionProblem
    budget: Budget
    stream: Stream
    choice: Choice

    @property
    def inputs(self) -> Inputs:
        """The tensors as kernels take them, without gradients."""
        p = self.problem
        window = p.window
        if p.is_causal and takes_decode(p):  # which knows causality as a window
            window = (None if window is None else window[0], 0)
        return Inputs.of(
            p.q.detach(),
            p.k.detach(),
            p.v.detach(),
            p.mask,
            p.scale,
            p.first_position,
            softcap=p.softcap,
            window=window,
        )


def not_in_kernels(problem: AttentionProblem) -> str | None:
    """What of a problem the kernels do not know, None if they know all of it."""
    for name, x in (("softcap", problem.softcap), ("window", problem.window)):
        if x is not None and not takes_decode(problem):
            return (
                f"{name} is in the kernel of up to {MAX_DECODE_ROWS} rows a key head without gradients only"
            )
    if problem.sinks is not None and problem.requires_grad:
        return "the kernel gives no gradients beside sinks"
    if problem.mask is not None and problem.mask.requires_grad:
        return "the kernel gives no gradient of attn_mask"
    return None


def takes_decode(problem: AttentionProblem) -> bool:
    """Whether `kernels.decode` draws a problem, along whole rows, and not `kernels.prefill`, page by page."""
    if problem.requires_grad or problem.shape[1] > MAX_DECODE_ROWS:
        return False
    return not problem.is_causal or problem.softcap is not None or problem.window is not None


def choose_systematic(problem: AttentionProblem) -> Choice:
    """Choose between the kernel that draws a problem systematically and its reference."""
    obstacle = not_in_kernels(problem)
    return choose((problem.q, problem.k, problem.v), chained=not takes_decode(problem), obstacle=obstacle)


def attend_systematic(call: KernelCall) -> AttentionEstimate:
    """Estimate attention from systematic draws, by the kernel or its reference.

    Kernels know no sinks: these take their share of what a kernel estimates from the keys.
    """
    sinks = call.problem.row_sinks
    with torch.autocast(call.problem.q.device.type, enabled=False), out_of_memory_explained():
        if takes_decode(call.problem):
            with torch.no_grad():
                estimate = _decode(call)
        else:
            estimate = _prefill(call)
        return estimate if sinks is None else estimate.with_sinks(sinks)


def _info(kernel: str, sampler: str, call: KernelCall, slower: str | None) -> EstimateInfo:
    """What the estimates of both kernels say about themselves; `slower`: why exact attention is faster."""
    return EstimateInfo(
        sampler=sampler,
        unbiased=True,
        num_samples=call.budget.num_samples,
        replicates=call.budget.replicates,
        draws_per_row=call.budget.total,
        kernel=KernelUse(call.choice.path, call.choice.reason, kernel, slower),
        fallbacks=call.choice.fallbacks,
    )


def _decode(call: KernelCall) -> AttentionEstimate:
    """An estimate by `kernels.decode`."""
    x, row_shape = call.inputs, call.problem.row_shape
    heads, rows, _, width = x.shape
    total = call.budget.total
    if 0 in (heads, rows):
        result = DecodeResult(
            x.q.new_zeros(heads, rows, call.budget.replicates, width),
            x.q.new_zeros(heads, rows, total, dtype=torch.int64),
            x.q.new_zeros(heads, rows, dtype=torch.int64),
            x.q.new_zeros(heads, rows, dtype=torch.float32),
            0.0,
        )
    elif call.choice.path == "triton":
        from ..kernels.decode.launch import decode

        result = decode(x, call.budget.num_samples, call.budget.replicates, call.stream)
    else:
        result = decode_reference.decode(x, call.budget.num_samples, call.budget.replicates, call.stream)
    visible = result.visible.float()
    weights = (visible / total)[..., None].expand(heads, rows, total).contiguous()
    draws = Draws(result.indices, weights, None, call.budget.replicates)
    sampled = SampledRows(
        result.output,
        lambda: draws,
        _design(call),
        replace(
            _info("decode", "systematic", call, slower_decode(call.choice.path, x.k.nbytes + x.v.nbytes)),
            effective_sample_size=visible.view(row_shape) * total,
            log_sum_exp="exact",
        ),
        make_log_sum_exp=lambda: result.log_sum_exp,
    )
    problem = call.problem.without_sinks()
    return with_error_bars(sampled, problem).to_estimate(problem)


def _design(call: KernelCall) -> Design:
    """The design of systematic draws, as far as error bars need to know it."""
    sampler = SystematicSampler()

    def variance_weights(p: Tensor) -> Tensor:
        return sampler.variance_weights(p, call.budget.num_samples)[0]

    return Design(False, sampler.count_variance, variance_weights)


def _page_errors(call: KernelCall, parts: Tensor) -> Callable[[], Tensor]:
    """Gives the standard errors (..., L, Ev) of replicates (R, ..., L, Ev) drawn page by page."""
    design, for_later = _design(call), call.problem.without_sinks().for_later()
    shape, width = call.problem.shape, call.problem.width
    parts = parts.detach().view(-1, *shape, width).movedim(0, 2)  # [N, M, R, Ev]

    def make_std_error() -> Tensor:
        later = for_later()
        std_error = parts.new_empty(*shape, width)
        unit = torch.ones_like(parts[:, :1, 0, :1]) if later.unit is None else later.unit
        with torch.no_grad(), torch.autocast(parts.device.type, enabled=False):
            bars = ErrorBars(later.values, later.visible_keys(), later.is_causal, design, later.v.dtype)
            for heads, rows in later.blocks(0):
                own = parts[heads, rows] / unit[heads, :, None]
                p = row_probabilities(later.logits(heads, rows))
                std_error[heads, rows] = bars.of_replicates(own, p, heads, later.positions(rows))
            return (std_error * unit).view(*later.row_shape, width)

    return make_std_error


class _Prefill(torch.autograd.Function):
    """The output (N, M, Ev) of one replicate by `kernels.prefill`, in float32, with its gradients.

    The kernel's normaliser (N, M) comes with it, without a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, stream: Stream, call: KernelCall
    ) -> tuple[Tensor, Tensor]:
        x = Inputs.of(q, k, v, mask, call.problem.scale, call.problem.first_position)
        if q.numel() == 0:
            normaliser = q.new_empty(0)
            output = q.new_zeros(*call.problem.shape, call.problem.width, dtype=torch.float32)
        elif call.choice.path == "triton":
            from ..kernels.prefill.launch import prefill

            result = prefill(x, call.budget.num_samples, stream, is_causal=call.problem.is_causal)
            output, normaliser = result.output, result.normaliser
        else:
            sampled = prefill_reference.prefill(
                x, call.budget.num_samples, stream, is_causal=call.problem.is_causal
            )
            output, normaliser = sampled.float(), q.new_empty(0)
        ctx.save_for_backward(q, k, v, mask, output, normaliser)
        ctx.mark_non_differentiable(normaliser)
        ctx.stream, ctx.call = stream, call
        return output, normaliser

    @staticmethod
    def backward(ctx: Any, g: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        compute = partial(_prefill_gradients, ctx.stream, ctx.call)
        return *first_derivative(compute, g, *ctx.saved_tensors), None, None, None


def _prefill_gradients(
    stream: Stream,
    call: KernelCall,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    output: Tensor,
    normaliser: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, given that of `_Prefill`'s output."""
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    x = Inputs.of(q, k, v, mask, call.problem.scale, call.problem.first_position)
    options: dict[str, Any] = {"is_causal": call.problem.is_causal}
    with torch.autocast(q.device.type, enabled=False), out_of_memory_explained():
        if call.choice.path == "triton":
            from ..kernels.prefill.launch import PrefillResult, gradients

            forward = PrefillResult(output, normaliser)
            grad = gradients(x, call.budget.num_samples, stream, g, forward, **options)
        else:
            grad = prefill_reference.gradients(x, call.budget.num_samples, stream, g, **options)
    pairs = ((grad.q, q), (grad.k, k), (grad.v, v))
    return tuple(d.view(x.shape).to(x.dtype) for d, x in pairs)


class _WithoutGradient(torch.autograd.Function):
    """A log-sum-exp that depends on other tensors, whose gradients are refused and not zero in silence."""

    @staticmethod
    def forward(ctx: Any, log_sum_exp: Tensor, *tensors: Tensor) -> Tensor:
        return log_sum_exp.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise ArgumentError(
            "log_sum_exp has no gradient by the prefill kernel: with QTX_LAB_KERNELS=reference "
            "sampled_attention gives one."
        )


def _prefill(call: KernelCall) -> AttentionEstimate:
    """An estimate by `kernels.prefill`."""
    problem, replicates = call.problem, call.budget.replicates
    q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
    row_shape, width, n = problem.row_shape, problem.width, problem.num_keys
    first = call.stream.first_replicate
    streams = [replace(call.stream, first_replicate=first + r) for r in range(replicates)]
    outputs, normalisers = zip(
        *(_Prefill.apply(q, k, v, mask, stream, call) for stream in streams), strict=True
    )
    parts = torch.stack(outputs).view(replicates, *row_shape, width)
    x = call.inputs

    def make_draws() -> Draws:
        pages = [
            prefill_reference.draw(x, call.budget.num_samples, stream, is_causal=call.problem.is_causal)
            for stream in streams
        ]
        weights = torch.cat([drawn.weights.flatten(-2)[..., :n] for drawn in pages], -1)
        weights = weights.view(*row_shape, replicates * n) / replicates
        indices = torch.arange(n, device=q.device).repeat(replicates).expand_as(weights)
        return Draws(indices.contiguous(), weights, None, replicates)

    def make_log_sum_exp() -> Tensor:
        if call.choice.path == "triton" and q.numel():
            from ..kernels.prefill.launch import PrefillResult

            log_sum_exp = PrefillResult(outputs[0].detach(), normalisers[0]).log_sum_exp(x)
        else:
            log_sum_exp = prefill_reference.masked_logits(x, problem.is_causal).logsumexp(-1)
        return _WithoutGradient.apply(log_sum_exp.view(row_shape), q, k)

    return AttentionEstimate(
        output=parts.mean(0).to(v.dtype),
        num_keys=n,
        degrees_of_freedom=mixed_degrees_of_freedom(replicates) if replicates > 1 else math.inf,
        make_draws=make_draws,
        make_std_error=None if replicates == 1 else _page_errors(call, parts),
        group=call.problem.group,
        make_log_sum_exp=make_log_sum_exp,
        info=replace(
            _info("prefill", "systematic in pages", call, slower_prefill()),
            baseline="other pages" if parts.requires_grad else None,
            log_sum_exp="exact",
        ),
    )
