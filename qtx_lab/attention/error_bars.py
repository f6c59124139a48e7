"""Standard errors of sampled attention, from the draws and the probabilities that the row is known to have.

The sample variance alone fails on peaked rows: where all draws hit one key it is 0, and a 95 % interval
of width 0 covers almost nothing. But p is known at every draw, so the mass that was never drawn is known
too, and what it would have added can be predicted from the spread of all values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..estimates import Draws

PRIOR_WEIGHT = 2.0
"""Weight of the predicted variance against the R - 1 degrees of freedom of R replicates."""


class ErrorBars:
    """Standard errors for blocks of rows that attend to the same values.

    Parameters
    ----------
    values : Tensor, (N, n, d)
    causal_length : int or None
        L, where row i of each L sees keys 0..i only. Other masks are not looked at when the unseen mass is
        priced.
    independent : bool
        Whether draws are i.i.d. from p. If so, all T = R * S draws are pooled,

            var = V(p) / T,    V(a) = sum_{j seen} a_j (v_j - o)^2 + (1 - sum_{j seen} p_j) mean_j (v_j - o)^2,

        which is sum_j p_j (v_j - o)^2 / T with exact masses for the keys seen and the average key for the
        rest. Otherwise, with s^2 the variance between the means of the R replicates,

            var = [ g V(a) / S + (R - 1) s^2 ] / (g + R - 1) / R,    a_j = f_j (1 - f_j) / S,    g = PRIOR_WEIGHT,

        where f_j is the fractional part of S p_j: in a systematic design a key is drawn floor(S p_j)
        times and once more with probability f_j (Hartley and Rao 1962, for keys in random order). Where the
        sampler does not know p, only the sample variances are left, with g = 0.
    """

    def __init__(self, values: Tensor, causal_length: int | None, independent: bool):
        self.independent = independent
        self.causal_length = causal_length
        self.values = values
        self.centre = values.mean(1, keepdim=True)  # [N, 1, d]
        centred = values - self.centre
        self.table = torch.cat((centred, centred.square()), dim=-1)  # [N, n, 2 d]
        if causal_length is not None:
            count = torch.arange(1, values.shape[1] + 1, device=values.device, dtype=values.dtype)
            self.moments = self.table.cumsum(1) / count[:, None]  # [N, n, 2 d], over keys 0..i
        else:
            self.moments = self.table.mean(1, keepdim=True)  # [N, 1, 2 d]

    def degrees_of_freedom(self, draws: Draws) -> float:
        """Infinite for what p predicts; R - 1 (or T - 1) for a sample variance; of a mixture, Satterthwaite's."""
        r = draws.replicates
        if self.independent:
            return max(1.0, draws.indices.shape[-1] - 1.0) if draws.probabilities is None else math.inf
        return r - 1.0 if draws.probabilities is None else (PRIOR_WEIGHT + r - 1) ** 2 / (r - 1)

    def __call__(self, draws: Draws, output: Tensor, block: tuple[slice, slice]) -> Tensor:
        """Standard errors (heads, rows, d) of a block of the `output` (N, M, d) of `draws` (N, M, R * S)."""
        draws, output = draws[block], output[block]
        heads, rows = block
        total, r, p = draws.indices.shape[-1], draws.replicates, draws.probabilities
        o = output - self.centre[heads]
        if self.independent:
            if p is None:
                variance = self._spread(draws, draws.weights, o, heads) / max(1, total - 1)
            else:
                variance = self._predicted(draws, p, p, o, heads, rows) / total
        else:
            s = total // r
            variance = (r - 1) * self._between(draws, heads)
            if p is not None:
                f = (p * s).frac()
                predicted = self._predicted(draws, f * (1 - f) / s, p, o, heads, rows)
                variance = variance + PRIOR_WEIGHT * predicted / s
            variance = variance / ((0 if p is None else PRIOR_WEIGHT) + r - 1) / r
        return variance.clamp_min(0).sqrt()

    def _predicted(self, draws: Draws, a: Tensor, p: Tensor, o: Tensor, heads: slice, rows: slice) -> Tensor:
        """V(a) of the class's docstring, (heads, rows, d); `a` and `p` at the draws, `o` about the centre."""
        once = 1 / draws.multiplicity().to(p.dtype)  # sum_s once_s f(j_s) runs over each key seen once
        unseen = (1 - (p * once).sum(-1, keepdim=True)).clamp_min(0)
        unseen = unseen * (draws.weights[..., :1] > 0)  # an empty row has no error
        moments = self.moments[heads]
        if self.causal_length is not None:
            position = torch.arange(rows.start, rows.stop, device=o.device) % self.causal_length
            moments = moments[:, position.clamp_max(moments.shape[1] - 1)]
        first, second = moments.chunk(2, dim=-1)
        return self._spread(draws, a * once, o, heads) + unseen * (second - 2 * o * first + o.square())

    def _between(self, draws: Draws, heads: slice) -> Tensor:
        """Variance between the replicates' outputs, (heads, rows, d)."""
        means = draws.average_by_replicate(self.values[heads]) * draws.replicates
        return means.var(-2) if means.numel() else means.sum(-2)

    def _spread(self, draws: Draws, weights: Tensor, o: Tensor, heads: slice) -> Tensor:
        """sum_s weights_s (v_{j_s} - o)^2, (heads, rows, d); o about the centre."""
        first, second = draws.average(self.table[heads], weights).chunk(2, dim=-1)
        return second - 2 * o * first + o.square() * weights.sum(-1, keepdim=True)
