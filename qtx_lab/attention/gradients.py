"""Gradients of sampled attention: unbiased estimates of the exact ones, from the draws that made the
output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ArgumentError
from ..estimates import AttentionEstimate, Draws
from ..problem import AttentionProblem
from .settings import AttentionSettings

P = ParamSpec("P")
T = TypeVar("T")


class Estimator(Protocol):
    """Makes the estimate of a problem, without gradients."""

    def __call__(
        self, problem: AttentionProblem, settings: AttentionSettings, seed: Tensor, first_replicate: int = 0
    ) -> AttentionEstimate: ...


def differentiable(
    estimator: Estimator, problem: AttentionProblem, settings: AttentionSettings, seed: Tensor
) -> AttentionEstimate:
    """The estimate of a problem, its output with a gradient for q, k and v.

    Let g be the gradient of the loss by a row's output o = sum_j p_j v_j, l_j = scale q . k_j and a_j = g .
    v_j. Then

        dL/dv_j = p_j g,        dL/dl_j = p_j (a_j - b),        b = sum_j p_j a_j = g . o.

    sum_s w_s f(j_s) estimates sum_j p_j f(j) for every f, so that each draw adds

        w_s g  to dv_(j_s),     c_s k_(j_s)  to dq,     c_s q  to dk_(j_s),        c_s = scale w_s (a_(j_s) -
        b_s).

    That is unbiased if b_s estimates b without bias and from other draws than s: with all draws, S
    independent ones lose the share 1 / S of the gradient. This leave-one-out baseline is the mean of a over

    - `draws`: the other draws, where all are independent;
    - `replicates`: the draws of the other replicates, where those of one depend on each other;
    - `extra replicate`: as many draws again, made in the backward pass for q and k alone, where there is one
      replicate of dependent draws (or one draw); both are each other's baseline. They are the next replicate
      of the same stream. It takes as long as the forward pass again: two replicates of half as many draws do
      not;
    - `own replicate`: the same draws, for the self-normalised weights of a `LearnedImportanceSampler`: the
      gradient of that estimate with the proposal held fixed, biased by O(1 / num_samples) as the estimate is.

    `info.baseline` says which.

    **What is unbiased.** For a given g all three gradients, as far as the sampler is: so for a loss that is
    linear in the output. Otherwise g depends on the draws, and q's and k's gradients have a bias of O(1 /
    num_samples); v's is the derivative of the sampled output itself, as long as the draws do not depend on v.

    Control variates make the output better and not the gradients, which are those of the plain draws. Memory:
    the inputs, and a key and a weight for each draw. No second derivatives, none for `attn_mask`.

    Source: leave-one-out baselines of score-function estimates, Kool, van Hoof and Welling, Buy 4 REINFORCE
    samples, get a baseline for free! (2019).

    Parameters
    ----------
    estimator : callable
        Gives the estimate of a problem without gradients.
    problem : AttentionProblem
    settings : AttentionSettings
    seed : Tensor, int64, ()

    Raises
    ------
    ArgumentError
        If `attn_mask` requires a gradient, or `tolerance` comes with one replicate.
    """
    sampler = settings.sampler
    if problem.mask is not None and problem.mask.requires_grad:
        raise ArgumentError(
            f"attn_mask requires a gradient, which sampler={sampler.name!r} does not give: detach it, or "
            "use 'exact'."
        )
    for name, x in (("sinks", problem.sinks), ("softcap", problem.softcap)):
        if x is not None:
            raise ArgumentError(
                f"{name} with inputs that require a gradient: use 'exact', or torch.no_grad()."
            )
    baseline = _baseline(settings)
    estimate = estimator(problem.detached(), settings, seed)
    redraw = None
    if baseline == "extra replicate":
        again = replace(settings, controls=(), budget=replace(settings.budget, replicates=1))
        if settings.controls:
            again = replace(again, sampler=sampler.correctable())
        replicates = settings.budget.replicates

        def redraw(q: Tensor, k: Tensor, v: Tensor) -> Draws:
            detached = replace(problem, q=q.detach(), k=k.detach(), v=v.detach())
            return estimator(detached, again, seed, first_replicate=replicates).draws

    draws = estimate.draws
    how = _How(baseline, problem.scale, draws.replicates, redraw)
    output = _Sampled.apply(
        problem.q, problem.k, problem.v, estimate.output, draws.indices, draws.weights, how
    )
    return replace(estimate, output=output, info=replace(estimate.info, baseline=baseline))


def same_draws(
    *generators: torch.Generator,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Makes activation checkpointing draw the same keys again, for generators of your own.

    `torch.utils.checkpoint` keeps torch's default generators by itself, and no others: a recomputation would
    draw other keys than the forward pass did. Pass this, with the generators, as its `context_fn`.

    Returns
    -------
    forward, recomputation : context managers

    Examples
    --------
    >>> import torch
    >>> from functools import partial
    >>> from torch.utils.checkpoint import checkpoint
    >>> from qtx_lab import sampled_attention, same_draws
    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(8, 4, generator=g, requires_grad=True)
    >>> attend = lambda x: sampled_attention(x, x, x, num_samples=4, generator=g).output
    >>> checkpoint(attend, x, use_reentrant=False, context_fn=partial(same_draws, g)).sum().backward()
    """
    before: list[Tensor] = []

    @contextmanager
    def forward() -> Iterator[None]:
        before[:] = [g.get_state() for g in generators]
        yield

    @contextmanager
    def recomputation() -> Iterator[None]:
        after = [g.get_state() for g in generators]
        for g, state in zip(generators, before, strict=True):
            g.set_state(state)
        try:
            yield
        finally:
            for g, state in zip(generators, after, strict=True):
                g.set_state(state)

    return forward(), recomputation()


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, called as it is between two compiled graphs where `torch.compile` meets it.

    Random keys of a generator cannot be traced; `fullgraph=True` gets Dynamo's error, with the reason.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        torch._dynamo.graph_break(
            f"qtx_lab.{function.__name__} draws keys, which is not compiled: no fullgraph=True."
        )
        return torch.compiler.disable(function)(*args, **kwargs)

    return call


def _baseline(settings: AttentionSettings) -> str:
    """Which draws the baseline of `differentiable` comes from."""
    sampler, budget = settings.sampler, settings.budget
    if sampler.self_normalised and not settings.controls:
        return "own replicate"
    if sampler.draws_are_exchangeable and settings.tolerance is None and budget.total > 1:
        return "draws"
    if budget.replicates > 1:
        return "replicates"
    if settings.tolerance is not None:
        raise ArgumentError(
            "tolerance with inputs that require a gradient needs replicates >= 2, or torch.no_grad()."
        )
    return "extra replicate"


@dataclass(frozen=True)
class _How:
    """What the backward pass must know besides tensors: see `differentiable`."""

    baseline: str
    scale: float
    replicates: int
    redraw: Callable[[Tensor, Tensor, Tensor], Draws] | None


class _Sampled(torch.autograd.Function):
    """The output given, with the gradients of `differentiable`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, output: Tensor, indices: Tensor, weights: Tensor, how: _How
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, indices, weights)
        ctx.how = how
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, indices, weights = ctx.saved_tensors
        how: _How = ctx.how
        shape = (k.shape[:-2].numel(), q.shape[:-1].numel() // max(1, k.shape[:-2].numel()))  # N, M
        draws = Draws(indices, weights, replicates=how.replicates)
        path = weights  # of v's gradient, which is that of the output's own draws
        with torch.autocast(q.device.type, enabled=False):
            logits_too = any(ctx.needs_input_grad[:2])
            if how.redraw is not None and logits_too:
                again = how.redraw(q, k, v)
                indices = torch.cat((indices, again.indices), -1)
                path = torch.cat((weights, torch.zeros_like(again.weights)), -1)
                draws = Draws(indices, torch.cat((weights, again.weights), -1) / 2, replicates=2)
            dtype = torch.promote_types(q.dtype, torch.float32)
            rows, keys, values, g = (
                x.detach().to(dtype).reshape(shape[0], -1, x.shape[-1]) for x in (q, k, v, g)
            )
            draws, path = draws.view(shape), path.view(*shape, -1)
            # A weighted sum over draws has both rules that are needed: scatter to its table, gather to its
            # weights.
            with torch.enable_grad():
                values, w = values.requires_grad_(), path.to(dtype).detach().requires_grad_()
                summed = draws.average(values, w)
                dv, a = torch.autograd.grad(summed, (values, w), g)  # sum_s w_s g at j_s; g . v_(j_s)
                dv = dv.view(v.shape).to(v.dtype)
                if not logits_too:
                    return None, None, dv, None, None, None, None
                c = how.scale * draws.weights.to(dtype) * (a - _mean_of_others(a, draws, how.baseline))
                dq = draws.average(keys.requires_grad_(), c)
                (dk,) = torch.autograd.grad(dq, keys, rows)
        return dq.detach().view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype), dv, None, None, None, None


def _mean_of_others(a: Tensor, draws: Draws, baseline: str) -> Tensor:
    """b_s of `differentiable` from a (N, M, T), broadcastable to it."""
    w = draws.weights.to(a.dtype)
    tiny = torch.finfo(a.dtype).tiny
    x = w * a
    if baseline == "draws":  # discarded draws have weight 0; the others weigh the same
        return (x.sum(-1, keepdim=True) - x) / (w.sum(-1, keepdim=True) - w).clamp_min(tiny)
    r = draws.replicates
    x, w = (y.unflatten(-1, (r, -1)).sum(-1, keepdim=True) for y in (x, w))  # [N, M, R, 1]
    if baseline == "own replicate":
        mean = x / w.clamp_min(tiny)
    else:
        mean = (x.sum(-2, keepdim=True) - x) * (r / (r - 1))
    return mean.expand(*mean.shape[:-1], a.shape[-1] // r).flatten(-2)
