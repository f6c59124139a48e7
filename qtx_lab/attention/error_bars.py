"""Standard errors of sampled attention, from the draws and the probabilities that the row is known to have.

The sample variance alone fails on peaked rows: where all draws hit one key it is 0, and a 95 % interval
of width 0 covers almost nothing. But p is known at every draw, so the mass that was never drawn is known
too, and what it would have added can be predicted from the spread of all values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..estimates import Draws
from ..samplers import Sampler

PRIOR_WEIGHT = 2.0
"""Weight of the predicted variance against the R - 1 degrees of freedom of R replicates."""


def degrees_of_freedom(sampler: Sampler, draws: Draws) -> float:
    """Infinite for what p predicts; R - 1 (or T - 1) for a sample variance; of a mixture, Satterthwaite's."""
    r, known = draws.replicates, draws.probabilities is not None
    if sampler.independent:
        return math.inf if known else max(1.0, draws.indices.shape[-1] - 1.0)
    predicts = known and _count_variance(sampler)(draws.weights[:0]) is not None
    g = PRIOR_WEIGHT if predicts else 0.0
    return (g + r - 1) ** 2 / (r - 1)


def _count_variance(sampler: Sampler) -> Callable[[Tensor], Tensor | None]:
    """The sampler's own, or of nothing known where it has none."""
    return getattr(sampler, "count_variance", lambda expected: None)


class ErrorBars:
    """Standard errors for blocks of rows that attend to the same values.

    Parameters
    ----------
    values : Tensor, (N, n, d)
    visible : Tensor, bool, (N, n), or None
        The keys that some row of the head sees; all where None. What a row of its own does not see is not looked at
        when the unseen mass is priced, unless the mask is causal.
    causal_length : int or None
        L, where row i of each L sees keys 0..i only.
    sampler : Sampler
        If its draws are i.i.d. from p, all T = R * S draws are pooled,

            var = V(p_j / T, 1 / T),    V(a, b) = A_0 var_A(v),

        where var_A is the variance under the measure A that gives a_j to each key j seen and b (1 - sum_{j seen} p_j),
        spread evenly, to all keys, and A_0 its total: sum_j p_j (v_j - o)^2 / T with exact masses for the keys seen
        and the average key for the rest. Otherwise, with s^2 the variance between the means of the R replicates,

            var = [ g V(c_j w_j^2, w_min) + (R - 1) s^2 ] / (g + R - 1) / R,    g = PRIOR_WEIGHT,

        where w_j is the weight of a draw of key j and c_j the variance of its count (`count_variance`; for keys in
        random order, Hartley and Rao 1962). Where the sampler knows neither p nor c_j, only the sample variances
        are left, with g = 0.

    To all of these the rounding of the sum and of the output's dtype is added.
    """

    def __init__(
        self,
        values: Tensor,
        visible: Tensor | None,
        causal_length: int | None,
        sampler: Sampler,
        output_dtype: torch.dtype,
    ):
        self.independent = sampler.independent
        self.count_variance = _count_variance(sampler)
        self.values = values
        self.causal_length = causal_length
        self.output_eps = torch.finfo(output_dtype).eps
        share = torch.ones_like(values[..., :1]) if visible is None else visible[..., None].to(values.dtype)
        count = share.sum(1, keepdim=True).clamp_min(1)
        values = torch.where(share > 0, values, 0)  # what nobody sees may be anything
        self.centre = values.sum(1, keepdim=True) / count  # [N, 1, d]
        self.size = values.square().sum(1, keepdim=True).div(count).sqrt()  # [N, 1, d]
        centred = (values - self.centre) * share
        self.table = torch.cat((centred, centred.square()), dim=-1)  # [N, n, 2 d]
        if causal_length is not None:
            share = share.cumsum(1)
            self.moments = self.table.cumsum(1) / share.clamp_min(1)  # [N, n, 2 d], over keys 0..i
        else:
            self.moments = self.table.sum(1, keepdim=True) / count  # [N, 1, 2 d]

    def __call__(self, draws: Draws, output: Tensor, block: tuple[slice, slice]) -> Tensor:
        """Standard errors (heads, rows, d) of a block of the `output` (N, M, d) of `draws` (N, M, R * S)."""
        draws, output = draws[block], output[block]
        heads, rows = block
        total, r, p = draws.indices.shape[-1], draws.replicates, draws.probabilities
        if self.independent and p is None:
            o = output - self.centre[heads]
            first, second = draws.average(self.table[heads]).chunk(2, dim=-1)
            held = draws.weights.sum(-1, keepdim=True)
            variance = (second - 2 * o * first + held * o.square()) / max(1, total - 1)
        elif self.independent and p is not None:
            each = torch.full_like(p[..., :1], 1 / total)
            variance = self._predicted(draws, p / total, each, p, heads, rows)
        else:
            variance, g = (r - 1) * self._between(draws, heads), 0.0
            w = draws.weights * r
            c = None if p is None else self.count_variance(p / w.clamp_min(torch.finfo(w.dtype).tiny))
            if p is not None and c is not None:
                least, g = w.masked_fill(w <= 0, torch.inf).amin(-1, keepdim=True), PRIOR_WEIGHT
                variance = variance + g * self._predicted(draws, c * w.square(), least, p, heads, rows)
            variance = variance / (g + r - 1) / r
        drawn = (draws.weights > 0).any(-1, keepdim=True)  # an empty row has no error
        summed = torch.finfo(output.dtype).eps * math.sqrt(total) * self.size[heads]
        rounding = summed.square() + (self.output_eps * output).square() / 12
        return torch.where(drawn, variance.clamp_min(0) + rounding, 0).sqrt()

    def _predicted(self, draws: Draws, a: Tensor, b: Tensor, p: Tensor, heads: slice, rows: slice) -> Tensor:
        """V(a, b) of the class's docstring, (heads, rows, d); `a` and `p` at the draws, `b` a row."""
        # sum_s once_s f(j_s) runs over each key seen, once
        once = (draws.weights > 0) / draws.multiplicity().to(p.dtype)
        unseen = (1 - (p * once).sum(-1, keepdim=True)).clamp_min(0)
        unseen = torch.where(b.isfinite(), unseen * b, 0)
        moments = self.moments[heads]
        if self.causal_length is not None:
            position = torch.arange(rows.start, rows.stop, device=p.device) % self.causal_length
            moments = moments[:, position.clamp_max(moments.shape[1] - 1)]
        a = a * once
        sums = draws.average(self.table[heads], a) + unseen * moments
        first, second = sums.chunk(2, dim=-1)
        held = (a.sum(-1, keepdim=True) + unseen).clamp_min(torch.finfo(a.dtype).tiny)
        return second - first.square() / held

    def _between(self, draws: Draws, heads: slice) -> Tensor:
        """Variance between the replicates' outputs, (heads, rows, d)."""
        means = draws.average_by_replicate(self.values[heads]) * draws.replicates
        return means.var(-2) if means.numel() else means.sum(-2)
