"""Standard errors of sampled attention, from the draws and the probabilities that the row is known to have.

The sample variance alone fails on peaked rows: where all draws hit one key it is 0, and a 95 % interval
of width 0 covers almost nothing. But p is known at every draw, so the mass that was never drawn is known
too, and what it would have added can be predicted from the spread of all values.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..estimates import Draws, rounding_variance
from ..problem import AttentionProblem
from ..samplers import Design, SampledRows
from .corrections import Correction

PRIOR_WEIGHT = 2.0
"""Weight of the predicted variance against the R - 1 degrees of freedom of R replicates."""


def degrees_of_freedom(design: Design, draws: Draws) -> float:
    """Infinite for what p predicts; R - 1 (or T - 1) for a sample variance; of a mixture, Satterthwaite's."""
    r, known = draws.replicates, draws.probabilities is not None
    if design.independent:
        return math.inf if known else max(1.0, draws.indices.shape[-1] - 1.0)
    predicted = design.count_variance(draws.weights[:0]) if known and design.count_variance else None
    g = 0.0 if predicted is None else PRIOR_WEIGHT
    return (g + r - 1) ** 2 / (r - 1)


def with_error_bars(
    sampled: SampledRows, problem: AttentionProblem, correction: Correction | None = None
) -> SampledRows:
    """The same estimate with standard errors, made when they are first read; without any where one replicate
    cannot tell.

    A sampler's own standard errors stay as they are.

    Parameters
    ----------
    correction : Correction, optional
        What made the output, where controls did.
    """
    if sampled.make_std_error is not None:
        return sampled
    if correction is not None and bool(correction.exact_rows.all()):
        zero = torch.zeros_like(sampled.output)
        return replace(sampled, make_std_error=lambda: zero, degrees_of_freedom=math.inf)
    draws, design = sampled.make_draws(), sampled.design
    if not (design.independent or draws.replicates > 1):
        return sampled
    # Copies, and not the problem itself, which would keep q and k alive.
    values, visible, unit = problem.values.clone(), problem.visible_keys(), problem.unit
    causal, dtype = problem.is_causal, problem.v.dtype
    positions = problem.positions(slice(0, problem.shape[1]))
    cuts = list(problem.blocks(16 * draws.indices.shape[-1]))
    output = sampled.output if unit is None else sampled.output / unit

    def make_std_error() -> Tensor:
        std_error = torch.empty_like(output)
        with torch.no_grad():
            bars = ErrorBars(values, visible, causal, design, dtype)
            for block in cuts:
                cut = None if correction is None else correction[block]
                std_error[block] = bars(draws[block], output[block], block[0], positions[block[1]], cut)
        return std_error if unit is None else std_error * unit

    degrees = degrees_of_freedom(design, draws)
    return replace(sampled, make_std_error=make_std_error, degrees_of_freedom=degrees)


class ErrorBars:
    """Standard errors for blocks of rows that attend to the same values.

    Parameters
    ----------
    values : Tensor, (N, n, d)
    visible : Tensor, bool, (N, n), or None
        The keys that some row of the head sees; all where None. What a row of its own does not see is not
        looked at when the unseen mass is priced, unless the mask is causal.
    causal : bool
        Whether row i sees keys 0..i only.
    design : Design
        If the draws are i.i.d. from p, all T = R * S draws are pooled,

            var = V(p_j / T, 1 / T),    V(a, b) = A_0 var_A(v),

        where var_A is the variance under the measure A that gives a_j to each key j seen and b (1 - sum_{j
        seen} p_j), spread evenly, to all keys, and A_0 its total: sum_j p_j (v_j - o)^2 / T with exact masses
        for the keys seen and the average key for the rest. Otherwise, with s^2 the variance between the means
        of the R replicates,

            var = [ g V(c_j w_j^2, w_min) + (R - 1) s^2 ] / (g + R - 1) / R,    g = PRIOR_WEIGHT,

        where w_j is the weight of a draw of key j and c_j the variance of its count (`count_variance`; for
        keys in random order, Hartley and Rao 1962). Where the design knows neither p nor c_j, only the sample
        variances are left, with g = 0.

    To all of these the rounding of the sum and of the output's dtype is added.
    """

    def __init__(
        self,
        values: Tensor,
        visible: Tensor | None,
        causal: bool,
        design: Design,
        output_dtype: torch.dtype,
    ):
        self.design = design
        self.values = values
        self.output_dtype = output_dtype
        share = torch.ones_like(values[..., :1]) if visible is None else visible[..., None].to(values.dtype)
        count = share.sum(1, keepdim=True).clamp_min(1)
        values = torch.where(share > 0, values, 0)  # what nobody sees may be anything
        self.centre = values.sum(1, keepdim=True) / count  # [N, 1, d]
        self.size = values.square().sum(1, keepdim=True).div(count).sqrt()  # [N, 1, d]
        centred = (values - self.centre) * share
        self.table = torch.cat((centred, centred.square()), dim=-1)  # [N, n, 2 d]
        if causal:
            share = share.cumsum(1)
            self.moments = self.table.cumsum(1) / share.clamp_min(1)  # [N, n, 2 d], over keys 0..i
        else:
            self.moments = self.table.sum(1, keepdim=True) / count  # [N, 1, 2 d]

    def __call__(
        self,
        draws: Draws,
        output: Tensor,
        heads: slice,
        positions: Tensor,
        correction: Correction | None = None,
    ) -> Tensor:
        """Standard errors (heads, rows, d) of rows of some heads.

        Parameters
        ----------
        draws : Draws
            Rows (heads, rows).
        output : Tensor, (heads, rows, d)
            Their estimate.
        positions : Tensor, int64, (rows,) or (heads, rows)
            Query positions; looked at where the mask is causal.
        correction : Correction, optional
            Of the same rows, where controls corrected the estimate: v_j becomes what they leave of it, g_j,
            and keys never seen are priced at what is left of those drawn once, which stand for them (Good,
            The population frequencies of species, 1953).
        """
        total, r, p = draws.indices.shape[-1], draws.replicates, draws.probabilities
        if self.design.independent and p is None:
            o = output - self.centre[heads]
            first, second = draws.average(self.table[heads]).chunk(2, dim=-1)
            held = draws.weights.sum(-1, keepdim=True)
            variance = (second - 2 * o * first + held * o.square()) / max(1, total - 1)
        elif self.design.independent and p is not None:
            each = torch.full_like(p[..., :1], 1 / total)
            variance = self._predicted(draws, output, p / total, each, heads, positions, correction)
        else:
            variance, g = (r - 1) * self._between(draws, heads, correction), 0.0
            w = draws.weights * r
            c = None
            if p is not None and self.design.count_variance is not None:
                c = self.design.count_variance(p / w.clamp_min(torch.finfo(w.dtype).tiny))
            if p is not None and c is not None:
                least, g = w.masked_fill(w <= 0, torch.inf).amin(-1, keepdim=True), PRIOR_WEIGHT
                predicted = self._predicted(
                    draws, output, c * w.square(), least, heads, positions, correction
                )
                variance = variance + g * predicted
            variance = variance / (g + r - 1) / r
        drawn = (draws.weights > 0).any(-1, keepdim=True)  # an empty row has no error
        if correction is not None:
            variance = variance.masked_fill(correction.exact_rows[:, None], 0)
        rounding = rounding_variance(output, self.size[heads], total, self.output_dtype)
        return torch.where(drawn, variance.clamp_min(0) + rounding, 0).sqrt()

    def _predicted(
        self,
        draws: Draws,
        output: Tensor,
        a: Tensor,
        b: Tensor,
        heads: slice,
        positions: Tensor,
        correction: Correction | None,
    ) -> Tensor:
        """V(a, b) of the class's docstring, (heads, rows, d); `a` at the draws, `b` a row."""
        p = draws.probabilities
        assert p is not None
        # sum_s once_s f(j_s) runs over each key seen, once
        times = draws.multiplicity()
        once = (draws.weights > 0) / times.to(p.dtype)
        unseen = (1 - (p * once).sum(-1, keepdim=True)).clamp_min(0)
        unseen = torch.where(b.isfinite(), unseen * b, 0)
        moments = self.moments[heads]
        if moments.shape[1] > 1:
            at = positions.clamp_max(moments.shape[1] - 1).expand(output.shape[:2])
            moments = moments.gather(1, at[..., None].expand(*at.shape, moments.shape[-1]))
        a, table = a * once, self.table[heads]
        held = a.sum(-1, keepdim=True)
        if correction is None:
            sums = draws.average(table, a) + unseen * moments
            first, second = sums.chunk(2, dim=-1)
            return second - first.square() / (held + unseen).clamp_min(torch.finfo(a.dtype).tiny)
        o, centre = output - self.centre[heads], self.centre[heads]
        rare = draws.weights * (times == 1)
        mass = rare.sum(-1, keepdim=True)
        known = correction.exact_rows[:, None]  # what is left of these rows says nothing of the others
        left = (
            _about(o, mass, *correction.moments(draws, rare, table, centre)).masked_fill(known, 0).sum((1, 2))
        )
        plain = (
            _about(o, mass, *draws.average(table, rare).chunk(2, dim=-1)).masked_fill(known, 0).sum((1, 2))
        )
        rho = torch.where(plain > 0, left / plain, 1).clamp(0, 1)[:, None, None]
        first, second = correction.moments(draws, a, table, centre)
        seen = _about(o, held, first, second)
        mean, square = moments.chunk(2, dim=-1)
        away = first - held * o + unseen * rho.sqrt() * (mean - o)
        total = seen + unseen * rho * _about(o, 1, mean, square)
        return total - away.square() / (held + unseen).clamp_min(torch.finfo(a.dtype).tiny)

    def _between(self, draws: Draws, heads: slice, correction: Correction | None) -> Tensor:
        """Variance between the replicates' outputs, (heads, rows, d)."""
        if correction is None:
            means = draws.average_by_replicate(self.values[heads]) * draws.replicates
        else:
            means = correction.by_replicate
        return means.var(-2) if means.numel() else means.sum(-2)


def _about(o: Tensor, mass: Tensor | float, first: Tensor, second: Tensor) -> Tensor:
    """sum a (g - o)^2 from the sums of a, a g and a g^2."""
    return second - 2 * o * first + mass * o.square()
