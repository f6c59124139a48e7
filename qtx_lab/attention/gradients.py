"""Gradients of sampled attention: unbiased estimates of the exact ones, from the draws that made the
output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch

from ..checks import check_generator, check_transforms, transformed
from ..errors import ArgumentError, TransformError
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
    """The estimate of a problem, its output and its log-sum-exp with derivatives by q, k, v, mask and sinks.

    Let g be the gradient of the loss by a row's output o = sum_j p_j v_j, l_j = scale q . k_j and a_j = g .
    v_j. Then

        dL/dv_j = p_j g,        dL/dl_j = p_j (a_j - b),        b = sum_j p_j a_j = g . o.

    sum_s w_s f(j_s) estimates sum_j p_j f(j) for every f, so that each draw adds

        w_s g  to dv_(j_s),     c_s k_(j_s)  to dq,     c_s q  to dk_(j_s),        c_s = scale w_s (a_(j_s) -
        b_s).

    A float mask gets w_s (a_(j_s) - b_s) at each draw; with softcap c, c_s is multiplied by the slope of the
    cap, 1 - tanh^2(scale q . k / c). Beside a sink of probability p_0 the weights sum to 1 - p_0, and b = g .
    o is as much less than the mean of a; the sink gets -p_0 b, from all draws. A gradient h of the
    log-sum-exp adds w_s h to each logit and p_0 h to the sink.

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
    the inputs, and a key and a weight for each draw.

    **Forward mode** (`torch.func.jvp`, `torch.autograd.forward_ad`) gives the tangent of the output by the
    transpose of these gradients, from the same draws and as unbiased for given tangents:

        do = sum_s w_s (dv_(j_s) + dl_(j_s) (v_(j_s) - the others' mean of v)),
        dl_j = scale (dq . k_j + q . dk_j),

    times the cap's slope, and with a mask's and a sink's tangents added.

    `torch.func.grad`, `vjp` and `functional_call` work too. Second derivatives, and `vmap` over either mode,
    raise TransformError.

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
        If `tolerance` comes with one replicate.
    """
    call = _Call.of(estimator, problem, settings, seed)
    tensors = (problem.q, problem.k, problem.v, problem.mask, problem.sinks)
    output, log_sum_exp, *_ = _Sampled.apply(*tensors, call)
    estimate, call.estimate = call.estimate, None
    assert estimate is not None
    return replace(
        estimate,
        output=output,
        make_log_sum_exp=None if estimate.make_log_sum_exp is None else lambda: log_sum_exp,
        info=replace(estimate.info, baseline=call.baseline),
    )


def first_derivative(compute: Callable[..., T], *tensors: Tensor | None) -> T:
    """`compute(*tensors)`, of which no derivative is zero in silence: one by any of the tensors is refused.

    Parameters
    ----------
    compute : callable
        Gives a tensor, or a tuple of tensors and None.
    *tensors : Tensor or None
        All tensors that the result depends on.

    Returns
    -------
    Tensor, or tuple of Tensor and None
        Where a graph is made of the result (`create_graph=True`), its backward pass raises TransformError.
    """
    # What torch.autograd.grad(is_grads_batched=True) makes is not seen by `vmap` below.
    if any(x is not None and _functorch.is_legacy_batchedtensor(x) for x in tensors):
        _FirstDerivative.vmap()
    return _FirstDerivative.apply(compute, *tensors)


def same_draws(
    *generators: torch.Generator,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Makes activation checkpointing draw the same keys again, for generators of your own.

    `torch.utils.checkpoint` restores torch's default generators, and no others: a recomputation would
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
    >>> state = g.get_state()
    >>> (expected,) = torch.autograd.grad(attend(x).sum(), x)
    >>> _ = g.set_state(state)
    >>> checkpoint(attend, x, use_reentrant=False, context_fn=partial(same_draws, g)).sum().backward()
    >>> torch.equal(x.grad, expected)
    True
    """
    for generator in generators:
        check_generator(generator)
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

    Random keys of a generator cannot be traced; `fullgraph=True` gets Dynamo's error, with the reason, and
    `torch.jit.script` and `torch.export` a TransformError.
    """

    def refuse_script() -> NoReturn:
        raise TransformError(
            f"qtx_lab.{function.__name__} draws keys, which torch.jit.script cannot compile: use "
            "torch.compile."
        )

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        check_transforms()
        torch._dynamo.graph_break(
            f"qtx_lab.{function.__name__} draws keys, which is not compiled: no fullgraph=True."
        )
        return torch.compiler.disable(function)(*args, **kwargs)

    call.__prepare_scriptable__ = refuse_script  # type: ignore[attr-defined]  # torch.jit.script calls it
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


@dataclass
class _Call:
    """An estimate and its derivatives: what they need besides tensors; see `differentiable`.

    Parameters
    ----------
    estimator : Estimator
    problem : AttentionProblem
        Without gradients; autograd hands over the tensors to use in place of its own.
    settings : AttentionSettings
    baseline : str
    seed : Tensor, int64, (), or int
        A number under `torch.func`, which wraps tensors.
    sequences : list of int, optional
        Those of the problem.
    estimate : AttentionEstimate, optional
        What `_Sampled` made, until it is fetched.
    replicates : int
        Those of its draws.
    """

    estimator: Estimator
    problem: AttentionProblem
    settings: AttentionSettings
    baseline: str
    seed: Tensor | int
    sequences: list[int] | None
    estimate: AttentionEstimate | None = None
    replicates: int = 1

    @classmethod
    def of(
        cls, estimator: Estimator, problem: AttentionProblem, settings: AttentionSettings, seed: Tensor
    ) -> _Call:
        names = None if problem.sequences is None else problem.sequences.tolist()
        number = int(seed) if transformed() else seed
        return cls(estimator, problem.detached(), settings, _baseline(settings), number, names)

    def problem_of(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> AttentionProblem:
        """The problem of the tensors that autograd hands over."""
        names = None if self.sequences is None else torch.tensor(self.sequences)
        return replace(self.problem, q=q, k=k, v=v, mask=mask, sinks=sinks, sequences=names).detached()

    def draws(self, problem: AttentionProblem, indices: Tensor, weights: Tensor) -> tuple[Draws, Tensor]:
        """The draws (N, M, T) for the derivatives by q and k, and the weights (N, M, T) for that by v.

        The weights are those of the output's own draws: v's derivative is that of the sampled output.
        """
        draws, own = Draws(indices, weights, replicates=self.replicates), weights
        if self.baseline == "extra replicate":
            budget = self.settings.budget
            again = replace(self.settings, controls=(), budget=replace(budget, replicates=1))
            if self.settings.controls:
                again = replace(again, sampler=again.sampler.correctable())
            seed = torch.as_tensor(self.seed)
            other = self.estimator(problem, again, seed, first_replicate=budget.replicates).draws
            indices = torch.cat((indices, other.indices), -1)
            draws = Draws(indices, torch.cat((weights, other.weights), -1) / 2, replicates=2)
            own = torch.cat((weights, torch.zeros_like(other.weights)), -1)
        draws = replace(draws, weights=draws.weights.to(problem.dtype))
        return draws.view(problem.shape), own.to(problem.dtype).view(*problem.shape, -1)


class _Sampled(torch.autograd.Function):
    """The output of a call, its log-sum-exp, its drawn keys and their weights.

    Its derivatives are those of `differentiable`.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        seed = torch.as_tensor(call.seed)
        call.estimate = call.estimator(call.problem_of(q, k, v, mask, sinks), call.settings, seed)
        draws, log_sum_exp = call.estimate.draws, call.estimate.log_sum_exp
        call.replicates = draws.replicates
        if log_sum_exp is None:
            log_sum_exp = q.new_empty(0)
        return call.estimate.output, log_sum_exp, draws.indices, draws.weights

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.call = inputs
        _, log_sum_exp, indices, weights = output
        ctx.mark_non_differentiable(indices, weights)
        ctx.set_materialize_grads(False)
        sink_mass = None if tensors[-1] is None else log_sum_exp
        ctx.save_for_backward(*tensors, sink_mass, indices, weights)
        ctx.save_for_forward(*tensors, sink_mass, indices, weights)

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, g_log_sum_exp: Tensor | None, *unused: Tensor
    ) -> tuple[Tensor | None, ...]:
        if g is None and g_log_sum_exp is None:
            return (None,) * 6
        compute = functools.partial(_gradients, ctx.call, ctx.needs_input_grad)
        return *first_derivative(compute, g, g_log_sum_exp, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
        compute = functools.partial(_tangents, ctx.call)
        return *first_derivative(compute, *tangents[:5], *ctx.saved_tensors), None, None


class _FirstDerivative(torch.autograd.Function):
    """What `first_derivative` makes: `compute(*tensors)`, not to be differentiated."""

    @staticmethod
    def forward(compute: Callable[..., Any], *tensors: Tensor | None) -> Any:
        return compute(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise TransformError(
            "drawn attention has first derivatives only, and this one is differentiated again "
            "(create_graph=True, hessian): use sampler='exact' under "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
        )

    jvp = backward

    @staticmethod
    def vmap(*arguments: Any) -> NoReturn:
        raise TransformError(
            "derivatives of drawn attention are not batched by vmap (jacrev, jacfwd, is_grads_batched=True): "
            "torch.autograd.functional.jacobian takes one row at a time."
        )


def _gradients(
    call: _Call,
    needed: Sequence[bool],
    g: Tensor | None,
    g_log_sum_exp: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    log_sum_exp: Tensor | None,
    indices: Tensor,
    weights: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v, mask and sinks, given those of the output and the log-sum-exp.

    Those of the logits' parts are computed only where one of them is needed.
    """
    problem = call.problem_of(q, k, v, mask, sinks)
    logits_too = needed[0] or needed[1] or needed[3]
    if 0 in problem.shape:
        return tuple(
            torch.zeros_like(x) if x is not None and need else None
            for x, need in zip((q, k, v, mask, sinks), needed, strict=False)
        )
    dtype, shape = problem.dtype, problem.shape
    with torch.autocast(q.device.type, enabled=False):
        if logits_too:
            draws, own = call.draws(problem, indices, weights)
        else:
            own = weights.to(dtype).view(*shape, -1)
            draws = Draws(indices.view(own.shape), own, replicates=call.replicates)
        keys, values = (x.to(dtype).reshape(shape[0], -1, x.shape[-1]) for x in (k, v))
        g = values.new_zeros(*shape, problem.width) if g is None else g.to(dtype).reshape(*shape, -1)
        h = 0.0 if g_log_sum_exp is None else g_log_sum_exp.to(dtype).reshape(*shape, 1)
        dv, a = _transposed_average(draws, values, own, g)  # sum_s w_s g at j_s; g . v_(j_s)
        dq = dk = dmask = dsinks = None
        if logits_too:
            c = draws.weights * (a - _mean_of_others(a, draws, call.baseline) + h)
            if mask is not None and needed[3]:
                dmask = _at_draws_of_mask(c, draws, mask, problem)
            c = problem.scale * c * _slope(problem, draws, keys)
            with torch.enable_grad():
                keys = keys.detach().requires_grad_()
                dq = draws.average(keys, c)
                (dk,) = torch.autograd.grad(dq, keys, problem.queries)  # sum_s c_s q at j_s
            dq, dk = dq.detach().view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype)
        if sinks is not None and log_sum_exp is not None and needed[4]:
            b = (draws.weights * a).sum(-1, keepdim=True)
            each = (h - b).view(problem.row_shape) * _sink_mass(problem, log_sum_exp)
            dsinks = each.sum(-1).sum_to_size(sinks.shape).to(sinks.dtype)
    return dq, dk, dv.view(v.shape).to(v.dtype), dmask, dsinks


def _tangents(
    call: _Call,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dmask: Tensor | None,
    dsinks: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    log_sum_exp: Tensor | None,
    indices: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """The tangents of the output and the log-sum-exp, given those of the inputs.

    It is the transpose of `_gradients`.
    """
    problem = call.problem_of(q, k, v, mask, sinks)
    shape, dtype = (*problem.row_shape, problem.width), problem.dtype
    if 0 in problem.shape:
        return v.new_zeros(shape), q.new_zeros(problem.row_shape, dtype=dtype)
    dq, dk, dv = (torch.zeros_like(x) if d is None else d for d, x in ((dq, q), (dk, k), (dv, v)))
    with torch.autocast(q.device.type, enabled=False):
        draws, own = call.draws(problem, indices, weights)
        dq, dk, dv, keys, values = (
            x.to(dtype).reshape(problem.shape[0], -1, x.shape[-1]) for x in (dq, dk, dv, k, v)
        )
        by_q = _transposed_average(draws, keys, own, dq)[1]  # dq . k_(j_s)
        by_k = _transposed_average(draws, dk, own, problem.queries)[1]  # q . dk_(j_s)
        dl = problem.scale * (by_q + by_k) * _slope(problem, draws, keys)
        if mask is not None and dmask is not None:
            every = dmask.to(dtype).expand(*problem.row_shape, problem.num_keys)
            dl = dl + every.gather(-1, draws.indices.view(*problem.row_shape, -1)).view(dl.shape)
        c = draws.weights * dl
        with torch.enable_grad():
            a = torch.zeros_like(c, requires_grad=True)
            (others,) = torch.autograd.grad(_mean_of_others(a, draws, call.baseline), a, c)
        tangent = (draws.average(dv, own) + draws.average(values, c - others)).view(shape)
        of_log_sum_exp = c.sum(-1).view(problem.row_shape)
        if sinks is not None and log_sum_exp is not None and dsinks is not None:
            d = dsinks.to(dtype).expand(problem.row_shape[:-1])[..., None] * _sink_mass(problem, log_sum_exp)
            tangent = tangent - d[..., None] * draws.average(values).view(shape)
            of_log_sum_exp = of_log_sum_exp + d
    return tangent.to(v.dtype), of_log_sum_exp


def _slope(problem: AttentionProblem, draws: Draws, keys: Tensor) -> Tensor | float:
    """The derivative of the softcap at each draw, (N, M, T); 1 without one."""
    if problem.softcap is None:
        return 1.0
    products = _transposed_average(draws, keys, draws.weights, problem.queries)[1]  # q . k_(j_s)
    return 1 - torch.tanh(products * (problem.scale / problem.softcap)).square()


def _sink_mass(problem: AttentionProblem, log_sum_exp: Tensor) -> Tensor:
    """The probability of each row's sink, (..., H, L)."""
    assert problem.row_sinks is not None
    return (problem.row_sinks - log_sum_exp).exp().masked_fill(log_sum_exp == -torch.inf, 0)


def _at_draws_of_mask(c: Tensor, draws: Draws, mask: Tensor, problem: AttentionProblem) -> Tensor:
    """The gradient of a mask, in its shape, from that of the logits at draws (N, M, T)."""
    rows = problem.row_shape
    number = torch.arange(mask.numel(), device=mask.device).view(mask.shape).expand(*rows, problem.num_keys)
    number = number.gather(-1, draws.indices.view(*rows, -1))  # which of the mask's numbers is added
    total = c.new_zeros(mask.numel()).index_add_(0, number.flatten(), c.flatten())
    return total.view(mask.shape).to(mask.dtype)


def _transposed_average(draws: Draws, table: Tensor, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Both derivatives of `draws.average(table, weights)`, given that of the average, rows (N, M, d).

    They are sum_s weights_s rows at j_s, (N, n, d), and rows . table_(j_s), (N, M, T).
    """
    with torch.enable_grad():
        table, weights = table.detach().requires_grad_(), weights.detach().requires_grad_()
        at_keys, at_draws = torch.autograd.grad(draws.average(table, weights), (table, weights), rows)
    return at_keys, at_draws


def _mean_of_others(a: Tensor, draws: Draws, baseline: str) -> Tensor:
    """b_s of `differentiable` from a (N, M, T), broadcastable to it.

    The others' mean, times the mass that the sink leaves to the keys.
    """
    w = draws.weights.to(a.dtype)
    x = w * a
    if baseline == "draws":  # discarded draws have weight 0; the others weigh the same
        mass, tiny = w.sum(-1, keepdim=True), torch.finfo(a.dtype).tiny  # 1 but for a sink
        return (x.sum(-1, keepdim=True) - x) * (mass / (mass - w).clamp_min(tiny))
    r = draws.replicates
    x = x.unflatten(-1, (r, -1)).sum(-1, keepdim=True)  # [N, M, R, 1]
    mean = r * x if baseline == "own replicate" else (x.sum(-2, keepdim=True) - x) * (r / (r - 1))
    return mean.expand(*mean.shape[:-1], a.shape[-1] // r).flatten(-2)
