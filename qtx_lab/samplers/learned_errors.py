"""How wrong estimates from a proposal may be: the delta method, and what replicates say beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..estimates import PRIOR_WEIGHT, Draws, rounding_variance
from ..problem import AttentionProblem, log_sum_exp
from .learned_proposal import log_inclusion


class Spread:
    """Variance of each coordinate of the self-normalised estimate, by the delta method.

    With the keys seen at their estimated probabilities p_hat_j = w_j pi_j, and the rest, of mass 1 - sum_{j
    seen} q_j under the proposal, at the mean over the keys that the row may see (by `visible` (N, n), of the
    head; by `position` (M,), where causal, of the row) and with the squared importance weight that is usual:

        (1/R) [ sum_{j seen} ((1 - pi_j) / pi_j) p_hat_j^2 (v_j - o)^2
                + (c/S) (1 - sum_{j seen} q_j) mean_j (v_j - o)^2 ],      c = sum_{j seen} w_j p_hat_j / q_j ~
                1 + chi^2,

    c being at least exp(s^2), s^2 the variance of log(p / q) over the draws, or half of the largest p / q
    drawn if that is less: exp(s^2) is 1 + chi^2 of log-normal weights, of which the draws rarely hold the
    largest. To this the rounding of the sum and of the output's dtype is added. Without c, 95 % intervals
    of best low-rank maps of rank d / 4 covered 88–95 % of the reference model's outputs, layer by layer,
    with it 95–97 %. The bias is not in it: over many replicates it is what is left. Nor is a key that the
    proposal overlooked: `hidden` finds it.

    The plain and the debiased estimate have it as the least variance beside that between replicates, which
    knows nothing of a key that no replicate has drawn.
    """

    def __init__(self, problem: AttentionProblem, independent: bool):
        values, visible = problem.values, problem.visible_keys()
        position = problem.positions(slice(0, problem.shape[1])) if problem.is_causal else None
        self.problem, self.independent, self.output_dtype = problem, independent, problem.v.dtype
        share = torch.ones_like(values[..., :1]) if visible is None else visible[..., None].to(values.dtype)
        count = share.sum(1, keepdim=True).clamp_min(1)
        self.centre = (values * share).sum(1, keepdim=True) / count
        self.size = (values.square() * share).sum(1, keepdim=True).div(count).sqrt()
        centred = (values - self.centre) * share
        self.table = torch.cat((centred, centred.square()), -1)  # [N, n, 2 d]
        self.position = None if position is None else position.clamp_max(values.shape[1] - 1)
        if position is None:
            self.moments = self.table.sum(1, keepdim=True) / count
        else:
            self.moments = self.table.cumsum(1) / share.cumsum(1).clamp_min(1)

    def __call__(self, draws: Draws, proposal: Tensor, output: Tensor, block: tuple[slice, slice]) -> Tensor:
        """(heads, rows, d) of a block of the draws, q at them (N, M, R S) and the output (N, M, d)."""
        heads, part = block
        draws, proposal, o = draws[block], proposal[block], output[block] - self.centre[heads]
        replicates = draws.replicates
        size = draws.indices.shape[-1] // replicates
        pi = log_inclusion(proposal.log(), size, self.independent).exp()
        a, unseen = delta_terms(draws, proposal, pi, size, log_normal_chi(draws, proposal, pi))
        moments = (
            self.moments[heads] if self.position is None else self.moments[heads][:, self.position[part]]
        )
        first, second = (draws.average(self.table[heads], a) + unseen * moments).chunk(2, -1)
        variance = second - 2 * o * first + o.square() * (a.sum(-1, keepdim=True) + unseen)
        rounding = rounding_variance(
            output[block], self.size[heads], draws.indices.shape[-1], self.output_dtype
        )
        seen = (draws.weights > 0).any(-1, keepdim=True)
        variance = torch.where(seen, (variance / replicates).clamp_min(0) + rounding, 0)
        weightless = ~seen & (proposal > 0).any(-1, keepdim=True)  # a sink took all, for all that was drawn
        return torch.where(weightless, self._squares(block), variance) if bool(weightless.any()) else variance

    def _squares(self, block: tuple[slice, slice]) -> Tensor:
        """sum_j p_j sum_j p_j v_j^2 >= (sum_j p_j v_j)^2, (heads, rows, d), by the exact probabilities.

        It bounds the squared error of an estimate of 0.
        """
        p = self._probabilities(block)
        return p.sum(-1, keepdim=True) * (p @ self.problem.values[block[0], : p.shape[-1]].square())

    def distance(self, o: Tensor, head: Tensor, row: Tensor) -> Tensor:
        """The mean of (v_j - o)^2 over the keys that rows (P,) of heads (P,) see, for o (P, d): (P, d)."""
        at = torch.zeros_like(row) if self.position is None else self.position[row]
        first, second = self.moments[head, at].chunk(2, -1)
        o = o - self.centre[head, 0]
        return (second - 2 * o * first + o.square()).clamp_min(0)

    def hidden(self, draws: Draws, block: tuple[slice, slice]) -> Tensor:
        """What `qtx_lab.estimates.reliability` sets standard errors against, (heads, rows).

        From the exact probabilities of all keys, O(n E) a row: nothing else tells what a proposal overlooked.
        """
        p = self._probabilities(block)
        n, width = p.shape[-1], self.problem.width
        distance = self.table[block[0], :n, width:].sum(-1)[..., None]
        return ((draws[block].dense(n) - p).square() @ distance)[..., 0].sqrt()

    def _probabilities(self, block: tuple[slice, slice]) -> Tensor:
        """The exact probabilities of all keys, (heads, rows, n or fewer): 1 in all with that of a sink."""
        heads, rows = block
        logits = self.problem.logits(heads, rows)
        normaliser = log_sum_exp(logits)
        sinks = self.problem.row_sinks
        if sinks is not None:
            sinks = sinks.expand(self.problem.row_shape).reshape(self.problem.shape)[block]
            normaliser = torch.logaddexp(normaliser, sinks)
        return (logits - normaliser[..., None]).exp().masked_fill(logits == -torch.inf, 0)


def _times(draws: Draws) -> Tensor:
    """How often the key of each draw was drawn in its replicate, (..., R S), in the weights' dtype."""
    indices = draws.indices.unflatten(-1, (draws.replicates, -1))
    return Draws(indices, indices).multiplicity().flatten(-2).to(draws.weights.dtype)


def log_normal_chi(draws: Draws, proposal: Tensor, pi: Tensor) -> Tensor:
    """1 + chi^2 = E_q (p / q)^2 of a row, from draws from q, as if p / q were log-normal: (..., 1).

    It is exp(s^2), s^2 the variance of log(p / q), but no more than half of the largest p / q drawn: it is
    the mean of p / q over p, and weights that span many powers of e are not log-normal.
    """
    drawn = draws.weights > 0
    tiny = torch.finfo(pi.dtype).tiny
    log_w = (draws.weights * _times(draws) * pi).clamp_min(tiny).log() - proposal.clamp_min(tiny).log()
    largest = log_w.masked_fill(~drawn, -torch.inf).amax(-1, keepdim=True)
    log_w = log_w.masked_fill(~drawn, 0)
    count = drawn.sum(-1, keepdim=True)
    mean = log_w.sum(-1, keepdim=True) / count.clamp_min(1)
    square = (log_w - mean).masked_fill(~drawn, 0).square().sum(-1, keepdim=True)
    return (square / (count - 1).clamp_min(1)).minimum(largest - math.log(2)).exp()


def delta_terms(
    draws: Draws, proposal: Tensor, pi: Tensor, rate: int | Tensor, least: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The factors by which `Spread` multiplies squared distances.

    There is one for each draw, (..., R S), and one for all keys not seen, (..., 1).

    `proposal` and `pi` are q and the inclusion probabilities at the draws, `rate` the draws a unit of q.
    """
    replicates = draws.replicates
    once = 1 / draws.multiplicity().to(pi.dtype)
    weight = draws.weights * replicates * _times(draws)  # w_j
    a = (1 - pi) * pi * weight.square() * once  # ((1 - pi) / pi) p_hat^2, each key once
    unseen = (1 - (proposal * once).sum(-1, keepdim=True)).clamp_min(0) / rate
    chi = draws.weights * weight * pi / proposal.clamp_min(torch.finfo(pi.dtype).tiny)
    held = draws.weights.sum(-1, keepdim=True)  # 1, but for what a sink took
    chi = chi.sum(-1, keepdim=True).maximum((1 if least is None else least) * held.square())
    return a, unseen * chi


@dataclass(frozen=True)
class LevelDraws:
    """Independent draws of P pairs of a row and a replicate, T each, for the debiased estimate.

    Parameters
    ----------
    pair : Tensor, int64, (P,)
    indices : Tensor, int64, (P, T)
    weights : Tensor, (P, T)
        Of the debiased estimate.
    normalised : Tensor, (P, T)
        Of the self-normalised estimate from the same T draws.
    proposal : Tensor, (P, T)
        q of the drawn keys.
    """

    pair: Tensor
    indices: Tensor
    weights: Tensor
    normalised: Tensor
    proposal: Tensor

    def predicted_variance(
        self, values: Tensor, distance: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Variance of the self-normalised estimates by the delta method, and the second term of it, (P, d).

        With w_s the weights of the draws, o the estimate, and the keys not drawn priced as in `Spread`:

            sum_s w_s^2 (v_s - o)^2 + (1 - sum_{j seen} q_j) max(sum_s w_s^2, 1 / T) mean_j (v_j - o)^2.

        Parameters
        ----------
        values : Tensor, (P, T, d)
            Of the drawn keys.
        distance : callable
            Gives the mean of (v_j - o)^2 over the keys that the rows see, (P, d), of o (P, d).
        """
        w = self.normalised.to(values.dtype)
        o = torch.einsum("pt,ptd->pd", w, values)
        drawn = torch.einsum("pt,ptd->pd", w.square(), (values - o[:, None]).square())
        once = self.proposal / Draws(self.indices, w).multiplicity()
        unseen = (1 - once.sum(-1, keepdim=True)).clamp_min(0)
        held = w.sum(-1, keepdim=True)  # 1, but for what a sink took
        square = w.square().sum(-1, keepdim=True).maximum(held.square() / w.shape[-1])
        never = unseen * square * distance(o)
        return drawn + never, never


def mixed_variance(means: Tensor, predicted: Tensor, never: Tensor) -> Tensor:
    """Variance of the mean of replicates (..., R, d), R >= 2, with what is predicted of one: (..., d).

    The prediction counts as `PRIOR_WEIGHT` degrees of freedom. The variance is never below `never`, the
    predicted part of the keys that were not drawn, of which replicates tell nothing.
    """
    replicates = means.shape[-2]
    between = means.var(-2) if means.numel() else means.sum(-2)
    mixed = (PRIOR_WEIGHT * predicted + (replicates - 1) * between) / (PRIOR_WEIGHT + replicates - 1)
    return mixed.maximum(never) / replicates


def standard_error(means: Tensor) -> Tensor:
    """Standard error of the mean of independent replicates (..., R, d), R >= 2: (..., d)."""
    variance = means.var(-2) if means.numel() else means.sum(-2)
    return (variance / means.shape[-2]).sqrt()
