"""`gpu_quantum_attention`, and what `sampled_attention` hands to the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_count, check_generator
from ..errors import ArgumentError
from ..estimates import AttentionEstimate, Draws, EstimateInfo, KernelUse
from ..kernels.calls import FEW_ROWS, make_seed, memory_named
from ..kernels.choice import Choice, choose
from ..kernels.decode import reference as decode_reference
from ..kernels.decode.reference import Decoded
from ..kernels.inputs import Inputs
from ..kernels.prefill import reference as prefill_reference
from ..problem import check_inputs


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
) -> AttentionEstimate:
    """Sampled attention by Triton kernels on CUDA, by their plain-torch reference elsewhere.

    Few queries without gradients, as in decoding, are drawn systematically along the whole row (`kernels.decode`); many,
    causal ones or those with gradients page by page of 64 keys (`kernels.prefill`), whose gradients for q, k and v are
    unbiased as `sampled_attention`'s are. Nothing is quantum about it: these are the draws that measuring an ideal
    circuit would give, but less noisy. QTX_LAB_KERNELS=triton or reference overrides where it runs.

    Parameters
    ----------
    Q : Tensor, (..., H, L, E)
    K : Tensor, (..., Hkv, n, E)
    V : Tensor, (..., Hkv, n, Ev)
        float32, float16 or bfloat16, up to 256 features; others take the reference. That they are finite is checked,
        which reads them once more.
    num_samples : int
        S, the draws of a row and replicate; in the blocks of `prefill` on average.
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
        Gives the seed of the kernels' counter-based random numbers: the same seed, the same draws, on any GPU up to
        the rounding of logits.

    Returns
    -------
    AttentionEstimate
        `diagnostics["kernel"]` says which kernel, by which path and why; with a gradient `diagnostics["baseline"]` is
        "other pages" (`kernels.prefill_reference.gradients`). `draws` of `prefill` are made when asked for, L * n of them.

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        Before any work.
    BackendUnavailable
        If QTX_LAB_KERNELS=triton cannot be had, or if CUDA runs out of memory.

    Examples
    --------
    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> q, k, v = (torch.randn(2, 100, 16, generator=g) for _ in range(3))
    >>> est = gpu_quantum_attention(q, k, v, num_samples=64, replicates=4, generator=g)
    >>> est.output.shape, est.std_error.shape, est.diagnostics["kernel"]["path"]
    (torch.Size([2, 100, 16]), torch.Size([2, 100, 16]), 'reference')
    """
    check_count("num_samples", num_samples)
    check_count("replicates", replicates)
    check_generator(generator)
    with torch.no_grad():
        group = check_inputs(Q, K, V, attn_mask, is_causal, scale, enable_gqa)
    if attn_mask is not None and attn_mask.requires_grad:
        raise ArgumentError("attn_mask requires a gradient, which draws do not give: detach it.")
    scale = 1 / math.sqrt(Q.shape[-1]) if scale is None else float(scale)
    seed = make_seed(generator, Q.device)
    few = takes_few(Q, K, V, is_causal, group)
    call = Call(num_samples, replicates, is_causal, scale, group, seed)
    return attend(Q, K, V, attn_mask, call, few, choose((Q, K, V), chained=not few))


@dataclass(frozen=True)
class Call:
    """What a call asks for besides tensors."""

    num_samples: int
    replicates: int
    is_causal: bool
    scale: float
    group: int
    seed: Tensor


def takes_few(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, group: int) -> bool:
    """Whether `decode` takes it, and not `prefill`."""
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return not grad and not is_causal and group * q.shape[-2] <= FEW_ROWS


def attend_systematic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    group: int,
    num_samples: int,
    replicates: int,
    generator: torch.Generator | None,
) -> tuple[AttentionEstimate | None, dict[str, Any]]:
    """Systematic draws of checked inputs by `decode` or `prefill`, or None; and what to tell of it in `diagnostics`."""
    few = takes_few(q, k, v, is_causal, group)
    choice = choose((q, k, v), chained=not few)
    if choice.path == "reference":
        return None, {"kernel": KernelUse("torch", choice.reason), "fallbacks": choice.fallbacks}
    seed = make_seed(generator, q.device)
    call = Call(num_samples, replicates, is_causal, scale, group, seed)
    return attend(q, k, v, attn_mask, call, few, choice), {}


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, call: Call, few: bool, choice: Choice
) -> AttentionEstimate:
    """Checked inputs, by the kernel or its reference."""
    with torch.autocast(q.device.type, enabled=False), memory_named():
        if few:
            with torch.no_grad():
                return _few(Inputs.of(q, k, v, attn_mask, call.scale), q.shape[:-1], call, choice)
        return _many(q, k, v, attn_mask, call, choice)


def _info(
    name: str, choice: Choice, num_samples: int, replicates: int, effective: Tensor | None
) -> EstimateInfo:
    return EstimateInfo(
        sampler="systematic" if name == "decode" else "systematic in pages",
        unbiased=True,
        num_samples=num_samples,
        replicates=replicates,
        draws_per_row=num_samples * replicates,
        effective_sample_size=effective,
        kernel=KernelUse(choice.path, choice.reason, name),
        fallbacks=choice.fallbacks,
    )


def _few(x: Inputs, row_shape: torch.Size, call: Call, choice: Choice) -> AttentionEstimate:
    """By `decode`, kernel or reference."""
    num_samples, replicates, seed = call.num_samples, call.replicates, call.seed
    heads, rows, n, width = x.shape
    if 0 in (heads, rows):
        empty = x.q.new_zeros(heads, rows, replicates, width)
        indices = x.q.new_zeros(heads, rows, num_samples * replicates, dtype=torch.int64)
        found = Decoded(empty, indices, x.q.new_zeros(heads, rows, dtype=torch.bool))
    elif choice.path == "triton":
        from ..kernels.decode.launch import decode

        found = decode(x, num_samples, replicates, seed)
    else:
        found = decode_reference.decode(x, num_samples, replicates, seed)
    total = num_samples * replicates
    seen = found.seen.view(row_shape).float()
    draws = Draws(
        found.indices.view(*row_shape, total),
        (seen / total)[..., None].expand(*row_shape, total).contiguous(),
        None,
        replicates,
    )
    std_error = found.std_error()
    return AttentionEstimate(
        output=found.output().view(*row_shape, width).to(x.v.dtype),
        num_keys=n,
        degrees_of_freedom=replicates - 1 if replicates > 1 else math.inf,
        make_draws=lambda: draws,
        make_std_error=None if std_error is None else lambda: std_error.view(*row_shape, width),
        group=call.group,
        info=_info("decode", choice, num_samples, replicates, seen * total),
    )


@dataclass(frozen=True)
class _Replicate:
    """What `_Prefill` is told besides tensors."""

    num_samples: int
    is_causal: bool
    scale: float
    path: str
    replicate: int

    @property
    def options(self) -> dict[str, Any]:
        return {"is_causal": self.is_causal, "replicate": self.replicate}


class _Prefill(torch.autograd.Function):
    """The output (N, M, Ev) of `prefill` in float32, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor, call: _Replicate
    ) -> Tensor:
        x = Inputs.of(q, k, v, mask, call.scale)
        if call.path == "triton":
            from ..kernels.prefill.launch import prefill

            output, normaliser = prefill(x, call.num_samples, seed, **call.options)
        else:
            output = prefill_reference.prefill(x, call.num_samples, seed, **call.options).float()
            normaliser = output.new_empty(0)
        ctx.save_for_backward(q, k, v, mask, seed, output, normaliser)
        ctx.call = call
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, seed, output, normaliser = ctx.saved_tensors
        call: _Replicate = ctx.call
        x = Inputs.of(q, k, v, mask, call.scale)
        with torch.autocast(q.device.type, enabled=False), memory_named():
            if call.path == "triton":
                from ..kernels.prefill.launch import gradients

                found = gradients(x, call.num_samples, seed, g, output, normaliser, **call.options)
            else:
                found = prefill_reference.gradients(x, call.num_samples, seed, g, **call.options)
        dq, dk, dv = (d.view(like.shape).to(like.dtype) for d, like in zip(found, (q, k, v), strict=True))
        return dq, dk, dv, None, None, None


def _many(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call, choice: Choice
) -> AttentionEstimate:
    """By `prefill`, kernel or reference."""
    row_shape, width, n = q.shape[:-1], v.shape[-1], k.shape[-2]
    num_samples, replicates, seed = call.num_samples, call.replicates, call.seed
    calls = [_Replicate(num_samples, call.is_causal, call.scale, choice.path, r) for r in range(replicates)]
    if q.numel() == 0:
        parts = q.new_zeros(replicates, *row_shape, width, dtype=torch.float32)
    else:
        parts = torch.stack([_Prefill.apply(q, k, v, mask, seed, each) for each in calls])
    parts = parts.view(replicates, *row_shape, width)
    std_error = None if replicates == 1 else parts.detach().std(0) / math.sqrt(replicates)
    x = Inputs.of(q.detach(), k.detach(), v.detach(), mask, call.scale)

    def make_draws() -> Draws:
        found = [
            prefill_reference.weights(x, c.num_samples, seed, **c.options)[1].flatten(-2)[..., :n]
            for c in calls
        ]
        weights = torch.cat(found, -1).view(*row_shape, replicates * n) / replicates
        indices = torch.arange(n, device=q.device).repeat(replicates).expand_as(weights)
        return Draws(indices.contiguous(), weights, None, replicates)

    return AttentionEstimate(
        output=parts.mean(0).to(v.dtype),
        num_keys=n,
        degrees_of_freedom=replicates - 1 if replicates > 1 else math.inf,
        make_draws=make_draws,
        make_std_error=None if std_error is None else lambda: std_error,
        group=call.group,
        info=replace(
            _info("prefill", choice, num_samples, replicates, None),
            baseline="other pages" if parts.requires_grad else None,
        ),
    )
