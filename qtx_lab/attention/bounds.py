"""Intervals that hold without asymptotics: from a row's probabilities, and by Bernstein's bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..estimates import Draws, rounding_variance
from ..problem import AttentionProblem
from ..samplers import Design
from ..samplers.inversion import row_probabilities

ROUNDINGS = 4.0
"""Standard deviations of the output's rounding by which a bound is widened."""


class Bounds:
    """Intervals of every coordinate of rows that attend to the same values.

    With the largest and smallest value h and l of a feature among the keys that a row may see, c the centre
    between them, D_j = |v_j - c|^2 and U the keys that no draw hit, three things hold:

    - With certainty, where p is known: o = sum_{j seen} p_j v_j + sum_{j in U} p_j v_j. The first sum is
      known; each coordinate of the second is within sum_{j in U} p_j times [l, h], and within
      sum_{j in U} p_j sqrt(D_j) of c sum_{j in U} p_j.
    - With probability 1 - e, for T independent draws from p (Bernstein's inequality; Boucheron, Lugosi and
      Massart, Concentration inequalities, 2013, th. 2.10), s^2 being any upper bound of the variance:

          |o_hat - o| <= sqrt(2 s^2 log(2 / e) / T) + (h - l) log(2 / e) / (3 T).

      One that certainly holds is sum_{j seen} p_j (v_j - c)^2 + sum_{j in U} p_j min(D_j, (h - l)^2 / 4), the
      smaller of the two terms taken for all of U.
    - With probability 1 - e, for n independent numbers of mean o (T draws, or the outputs of R replicates)
      with sample variance s^2 (Maurer and Pontil, Empirical Bernstein bounds and sample variance
      penalization, 2009, th. 11):

          |o_hat - o| <= sqrt(2 s^2 log(4 / e) / n) + 7 (h - l) log(4 / e) / (3 (n - 1)).

    The interval is the intersection of those that apply, the risk split evenly between the last two where
    both do.

    Parameters
    ----------
    problem : AttentionProblem
    design : Design
    unbiased : bool
        Whether the mean of a replicate is the exact output; otherwise only the certain interval holds.
    knows_p : bool
        Whether the row's probabilities are those of the problem's logits; not of circuits, whose loader may
        be approximate.
    """

    def __init__(self, problem: AttentionProblem, design: Design, unbiased: bool, knows_p: bool):
        self.problem, self.design = problem, design
        self.unbiased, self.knows_p = unbiased, knows_p
        values, visible = problem.values, problem.visible_keys()
        low = high = values
        if visible is not None:  # hidden values may be anything, also NaN
            hidden = ~visible[..., None]
            low, high = (values.masked_fill(hidden, end) for end in (math.inf, -math.inf))
            values = values.masked_fill(hidden, 0)
        self.values = values
        if problem.is_causal:  # of the keys 0..i that row i sees
            self.low, self.high = low.cummin(1).values, high.cummax(1).values
        else:
            self.low, self.high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
        nobody = self.low > self.high
        self.low, self.high = (x.masked_fill(nobody, 0) for x in (self.low, self.high))

    def __call__(
        self, draws: Draws, output: Tensor, block: tuple[slice, slice], level: float
    ) -> tuple[Tensor, Tensor]:
        """(low, high), each (heads, rows, d), of a block of rows with their draws and uncorrected output."""
        heads, rows = block
        low, high = self.low[heads], self.high[heads]
        if low.shape[1] > 1:
            at = self.problem.positions(rows).clamp_max(low.shape[1] - 1)
            low, high = low[:, at], high[:, at]
        total, replicates = draws.indices.shape[-1], draws.replicates
        values, risk = self.values[heads], 1 - level
        size = torch.maximum(low.abs(), high.abs())
        least, most = (x.expand(output.shape).clone() for x in (low, high))
        reach = torch.full_like(output, math.inf)
        independent = self.design.independent and self.unbiased
        if self.knows_p:
            certain = self._certain(draws, block, low, high)
            middle = certain.seen + certain.unseen_mass * (low + high) / 2
            half = torch.minimum(certain.unseen_mass * (high - low) / 2, certain.unseen_reach)
            least, most = middle - half, middle + half
            if independent:
                risk = risk / 2
                log = math.log(2 / risk)
                reach = (2 * certain.variance * log / total).sqrt() + (high - low) * log / (3 * total)
        if self.unbiased and (independent or replicates > 1):
            count = total if independent else replicates
            if independent:
                table = torch.cat((values, values.square()), -1)
                first, second = draws.average(table).chunk(2, -1)
                variance = (second - first.square()).clamp_min(0) * count / max(1, count - 1)
            else:
                parts = draws.average_by_replicate(values) * replicates
                variance = parts.var(-2) if parts.numel() else parts.sum(-2)
            log = math.log(4 / risk)
            empirical = (2 * variance * log / count).sqrt() + 7 * (high - low) * log / (3 * max(1, count - 1))
            reach = torch.minimum(reach, empirical)
        rounding = ROUNDINGS * rounding_variance(output, size, total, self.problem.v.dtype).sqrt()
        low, high = torch.maximum(least, output - reach), torch.minimum(most, output + reach)
        empty = low > high  # which may happen with the allowed risk: then the certain interval stays
        low, high = torch.where(empty, least, low), torch.where(empty, most, high)
        drawn = (draws.weights > 0).any(-1, keepdim=True)
        return torch.where(drawn, low - rounding, 0), torch.where(drawn, high + rounding, 0)

    def _certain(self, draws: Draws, block: tuple[slice, slice], low: Tensor, high: Tensor) -> _Certain:
        """What the probabilities of a block say of it for certain."""
        heads = block[0]
        p, values = row_probabilities(self.problem.logits(*block)), self.values[heads]
        unseen = p.masked_fill(draws.dense(p.shape[-1]) > 0, 0)
        once = p.gather(-1, draws.indices) * draws.once()
        # Each head has one centre, so that its keys have one distance each; a causal row sees the first key.
        centre = (low[:, -1:] + high[:, -1:]) / 2 if low.shape[1] == 1 else values[:, :1]
        centred = values - centre
        distance = centred.square().sum(-1)[:, : p.shape[-1], None]
        mass, spread = unseen.sum(-1, keepdim=True), unseen @ distance
        first, second = draws.average(torch.cat((centred, centred.square()), -1), once).chunk(2, -1)
        shift = (low + high) / 2 - centre
        reach = unseen @ distance.sqrt() + mass * shift.abs()
        farthest = torch.maximum((high - centre).abs(), (low - centre).abs())
        variance = second + torch.minimum(spread, mass * farthest.square())
        return _Certain(first + once.sum(-1, keepdim=True) * centre, mass, reach, variance)


@dataclass(frozen=True)
class _Certain:
    """What the probabilities of rows (heads, rows) say for certain, with the names of `Bounds`.

    Parameters
    ----------
    seen : Tensor, (heads, rows, d)
        sum_{j seen} p_j v_j.
    unseen_mass : Tensor, (heads, rows, 1)
        sum_{j in U} p_j.
    unseen_reach : Tensor, (heads, rows, d)
        A bound of |sum_{j in U} p_j (v_j - (l + h) / 2)|.
    variance : Tensor, (heads, rows, d)
        An upper bound of the variance of one draw.
    """

    seen: Tensor
    unseen_mass: Tensor
    unseen_reach: Tensor
    variance: Tensor
