"""Standard errors of sampled attention, from the draws and the probabilities that the row is known to have.

The sample variance alone fails on peaked rows: where all draws hit one key it is 0, and a 95 % interval
of width 0 covers almost nothing. But p is known at every draw, so the mass that was never drawn is known
too, and what it would have added can be predicted from the spread of all values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..estimates import PRIOR_WEIGHT, Draws, mixed_degrees_of_freedom, rounding_variance
from ..samplers import Design
from .corrections import Correction

FAR = 4.0
"""A key is far where its value lies so many times the usual squared distance from the centre."""

ORDER_PRIOR = 4.0
"""Weight, in pairs of neighbours, of the assumption that value order saves nothing."""

SURE = 1e-5
"""Variance of the count of a key below which it comes from rounding."""

RULE_OF_THREE = 3.0
"""A key that T draws have not hit has a probability below 3 / T with 95 % confidence."""


def degrees_of_freedom(design: Design, draws: Draws) -> float:
    """Infinite for what p predicts; R - 1 (or T - 1) for a sample variance; of a mixture, Satterthwaite's."""
    r, knows_p = draws.replicates, draws.probabilities is not None or design.variance_weights is not None
    if design.independent:
        return math.inf if knows_p else max(1.0, draws.indices.shape[-1] - 1.0)
    predicted = design.count_variance(draws.weights[:0]) if knows_p and design.count_variance else None
    return max(1.0, r - 1.0) if predicted is None else mixed_degrees_of_freedom(r)


@dataclass(frozen=True)
class RowSums:
    """What is known of rows (heads, rows) without the features of values that no draw hit.

    With a_j the part of key j in the variance of one replicate (`InversionSampler.variance_weights`; p_j / S
    where the design does not say), w_j the weight that the draws give to it, D_j = |v_j - c|^2 and U the keys
    not seen. Keys are of two kinds, near c and far from it (`FAR`).

    Parameters
    ----------
    weight : Tensor, (heads, rows, 2)
        sum_{j in U} a_j of the near and of the far keys.
    spread : Tensor, (heads, rows, 2)
        sum_{j in U} a_j D_j of either.
    square : Tensor, (heads, rows, 1)
        sum_{j in U} a_j^2.
    deviation : Tensor, (heads, rows, 2)
        sum_j (w_j - p_j)^2 D_j of either.
    """

    weight: Tensor
    spread: Tensor
    square: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, p: Tensor, draws: Draws, distance: Tensor, design: Design) -> RowSums:
        """The sums of rows p (heads, rows, n) and their draws; D is (heads, n, 2), 0 for the other kind."""
        size = draws.indices.shape[-1] // draws.replicates
        drawn = draws.dense(p.shape[-1])
        a = p / size if design.variance_weights is None else design.variance_weights(p)
        a = a.masked_fill((drawn > 0) | (p == 0), 0)
        kinds = distance[:, : p.shape[-1]]
        return cls(
            a @ (kinds > 0).to(a.dtype),
            a @ kinds,
            a.square().sum(-1, keepdim=True),
            (drawn - p).square() @ kinds,
        )


@dataclass(frozen=True)
class MeasuredRows:
    """How wrong rows (heads, rows) may be.

    Parameters
    ----------
    std_error : Tensor, (heads, rows, d)
    hidden : Tensor, (heads, rows)
        What `qtx_lab.estimates.reliability` sets them against.
    """

    std_error: Tensor
    hidden: Tensor


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
        With a_j the part of key j in the variance of a replicate, the design predicts the variance A_0
        var_A(v), where the measure A gives a_j to each key and A_0 is its total. The keys seen have their own
        values in it. Of the others, U, only the total weight and the total spread sum_{j in U} a_j D_j are
        known (`RowSums`): they are given the values of an average key not seen, moved away from c until
        their spread is right. If the draws are i.i.d. from p, a_j = p_j / S and

            var = A_0 var_A(v) / R.

        Otherwise, with s^2 the variance between the means of the R replicates, a_j = c_j w_j^2 from the
        weight w_j of a draw of key j and the variance c_j of its count (`count_variance`; for keys in random
        order, Hartley and Rao 1962), g = PRIOR_WEIGHT and V_U the part of U in the prediction,

            var = max( [ g A_0 var_A(v) + (R - 1) s^2 ] / (g + R - 1), V_U ) / R:

        what was never drawn cannot show in the replicates. Where the design knows no c_j, g = 0 and V_U is
        that of independent draws; where it does not know p, the mass of U is what draws say of it.

        Two corrections are for what the formulae leave out. Counts that add up to S vary against each other:
        a prediction from few keys is divided by 1 - sum_j a_j^2 / A_0^2. And where the draws of a replicate
        stand in the order of their values (`Design.in_order`), the part of near keys is multiplied by how far
        neighbouring draws lie apart over how far any two do, or by what the replicates say if that is less.

    To all of these the rounding of the sum and of the output's dtype is added.

    Attributes
    ----------
    distance : Tensor, (N, n)
        D_j = |v_j - c|^2, c being the mean value, or the first one where the mask is causal, so that no row
        depends on later tokens.
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
        count = share.sum(1, keepdim=True)
        values = torch.where(share > 0, values, 0)  # what nobody sees may be anything
        mean = values.sum(1, keepdim=True) / count.clamp_min(1)
        self.centre = values[:, :1] if causal else mean  # [N, 1, d]
        self.size = values.square().sum(1, keepdim=True).div(count.clamp_min(1)).sqrt()  # [N, 1, d]
        centred = (values - self.centre) * share
        self.table = torch.cat((centred, centred.square()), dim=-1)  # [N, n, 2 d]
        distance = self.table[..., values.shape[-1] :].sum(-1, keepdim=True)
        counts = share.cumsum(1) if causal else count
        mean_distance = (distance.cumsum(1) if causal else distance.sum(1, keepdim=True)) / counts.clamp_min(
            1
        )
        far = (distance > FAR * mean_distance).to(values.dtype)
        self.kinds = torch.cat((1 - far, far), dim=-1) * share  # [N, n, 2]
        self.distance = self.kinds * distance.clamp_min(torch.finfo(values.dtype).tiny)
        # Sums over the near and the far keys that a row may see, and how many these are; over keys 0..i of a
        # causal one.
        sums, counts = self.kinds[..., None] * self.table[:, :, None], self.kinds[..., None]
        self.sums, self.counts = (
            x.cumsum(1) if causal else x.sum(1, keepdim=True) for x in (sums, counts)
        )  # [N, 1 or n, 2, 2 d] and [N, 1 or n, 2, 1]

    def __call__(
        self,
        draws: Draws,
        output: Tensor,
        heads: slice,
        positions: Tensor,
        correction: Correction | None = None,
        sums: RowSums | None = None,
    ) -> Tensor:
        """Standard errors (heads, rows, d) of rows of some heads: see `measure`."""
        return self.measure(draws, output, heads, positions, correction, sums).std_error

    def measure(
        self,
        draws: Draws,
        output: Tensor,
        heads: slice,
        positions: Tensor,
        correction: Correction | None = None,
        sums: RowSums | None = None,
    ) -> MeasuredRows:
        """How wrong rows of some heads may be.

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
            and keys never seen are priced at its `unseen_share`.
        sums : RowSums, optional
            Of the same rows; where None the mass never drawn is spread evenly over all keys.
        """
        if draws.probabilities is None:
            variance = self._sample_variance(draws, output, heads, positions, correction)
            hidden = self._may_hide(draws, heads, positions)
        else:
            variance, hidden = self._known_variance(draws, output, heads, positions, correction, sums)
        drawn = (draws.weights > 0).any(-1, keepdim=True)  # an empty row has no error
        if correction is not None:
            variance = variance.masked_fill(correction.exact_rows[:, None], 0)
            hidden = hidden.masked_fill(correction.exact_rows, 0)
        rounding = rounding_variance(output, self.size[heads], draws.indices.shape[-1], self.output_dtype)
        std_error = torch.where(drawn, variance.clamp_min(0) + rounding, 0).sqrt()
        return MeasuredRows(std_error, torch.where(drawn[..., 0], hidden, 0))

    def _known_variance(
        self,
        draws: Draws,
        output: Tensor,
        heads: slice,
        positions: Tensor,
        correction: Correction | None,
        sums: RowSums | None,
    ) -> tuple[Tensor, Tensor]:
        """The variance (heads, rows, d) of the output of draws whose probabilities are known: see the class.

        The second result is the error that they may hide, (heads, rows).
        """
        total, r, p = draws.indices.shape[-1], draws.replicates, draws.probabilities
        assert p is not None
        w = draws.weights * r
        c = None
        if self.design.count_variance is not None and not self.design.independent:
            drawn = w > 0
            expected = torch.where(drawn, p / torch.where(drawn, w, 1), 0)
            c = self.design.count_variance(expected)
            if c is not None:  # a key that is sure has a count of 1 but for rounding
                c = c.masked_fill((expected > 0.5) & (c < SURE), 0)
        if c is None:
            a, least = p * (r / total), torch.full_like(p[..., :1], r / total)
        else:
            a, least = c * w.square(), w.masked_fill(w <= 0, torch.inf).amin(-1, keepdim=True)
        unseen = self._not_seen(draws, least, heads, positions, sums)
        predicted = self._predicted(draws, output, a, unseen, heads, correction)
        variance = predicted.variance / r
        if not self.design.independent:
            pair_factor = 1.0 if c is None else self._few_keys(draws, a, unseen, sums)
            g = 0.0 if c is None else PRIOR_WEIGHT
            between = self._between(draws, heads, correction)
            mixed = (g * pair_factor * predicted.variance + (r - 1) * between) / (g + r - 1)
            # What controls leave of a key not seen is too little known, but better than nothing.
            if correction is None or c is None:
                mixed = torch.maximum(mixed, pair_factor * predicted.unseen)
            variance = mixed / r
        hidden = torch.zeros_like(output[..., 0])
        if sums is not None:
            hidden = (predicted.remaining * sums.deviation).sum(-1).sqrt()
        return variance, hidden

    def _sample_variance(
        self,
        draws: Draws,
        output: Tensor,
        heads: slice,
        positions: Tensor,
        correction: Correction | None,
    ) -> Tensor:
        """Variance of the output of draws whose probabilities are not known, (heads, rows, d).

        The mass never drawn is taken to be the share of draws whose key was drawn once (Good 1953), or one
        draw more, and priced at an average key.
        """
        total, o = draws.indices.shape[-1], output - self.centre[heads]
        sums, counts = (x.sum(2) for x in self._visible(heads, positions, draws.indices.shape[:2]))
        of_average_key = _about(o, 1, *(sums / counts.clamp_min(1)).chunk(2, dim=-1))
        unseen = (draws.once() == 1).to(o.dtype).mean(-1, keepdim=True).clamp_min(1 / (total + 1))
        if not self.design.independent:
            size = total // draws.replicates
            between = self._between(draws, heads, correction)
            return torch.maximum(between, unseen * of_average_key / size) / draws.replicates
        first, second = draws.average(self.table[heads]).chunk(2, dim=-1)
        of_drawn_keys = _about(o, draws.weights.sum(-1, keepdim=True), first, second)
        return ((1 - unseen) * of_drawn_keys + unseen * of_average_key) / max(1, total - 1)

    def _may_hide(self, draws: Draws, heads: slice, positions: Tensor) -> Tensor:
        """What a key that was never drawn may move the output by where p is not known, (heads, rows).

        Its probability is below 3 / T with 95 % confidence; its value is the farthest of those not drawn.
        """
        hits = draws.dense(self.values.shape[1]) > 0
        if len(self.sums[0]) > 1:  # causal
            hits |= torch.arange(hits.shape[-1], device=hits.device) > positions[..., None]
        farthest = self.distance[heads].sum(-1)[:, None].expand(hits.shape).masked_fill(hits, 0).amax(-1)
        return min(1.0, RULE_OF_THREE / draws.indices.shape[-1]) * farthest.sqrt()

    def of_replicates(self, parts: Tensor, p: Tensor, heads: slice, positions: Tensor) -> Tensor:
        """Standard errors (heads, rows, d) of rows whose draws are not at hand: of a kernel that keeps none.

        The prediction takes every key for one not seen, and the replicates count as in `measure`.

        Parameters
        ----------
        parts : Tensor, (heads, rows, R, d)
            The outputs of R >= 2 replicates.
        p : Tensor, (heads, rows, n)
        positions : Tensor, int64, (rows,)
        """
        assert self.design.variance_weights is not None
        r, a, kinds = parts.shape[2], self.design.variance_weights(p), self.distance[heads, : p.shape[-1]]
        sums, counts = self._visible(heads, positions, p.shape[:2])
        unseen = _priced(sums / counts.clamp_min(1), a @ (kinds > 0).to(a.dtype), a @ kinds)
        mean = unseen.first.sum(2) / unseen.weight.sum(2).clamp_min(torch.finfo(a.dtype).tiny)
        predicted = _about(mean[:, :, None], unseen.weight, unseen.first, unseen.second).sum(2).clamp_min(0)
        variance = (PRIOR_WEIGHT * predicted + (r - 1) * parts.var(2)) / (PRIOR_WEIGHT + r - 1) / r
        rounding = rounding_variance(parts.mean(2), self.size[heads], r, self.output_dtype)
        attends = (p > 0).any(-1, keepdim=True)
        return torch.where(attends, variance + rounding, 0).sqrt()

    def _visible(self, heads: slice, positions: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Sums over the near and far keys that rows may see, and how many: (h, m, 2, 2 d) and (h, m, 2, 1).

        One row stands for all where no mask is causal.
        """
        sums, counts = self.sums[heads], self.counts[heads]
        if sums.shape[1] == 1:
            return sums, counts
        at = positions.clamp_max(sums.shape[1] - 1).expand(shape)
        head = torch.arange(len(sums), device=sums.device)[:, None]
        return sums[head, at], counts[head, at]

    def _not_seen(
        self, draws: Draws, least: Tensor, heads: slice, positions: Tensor, row_sums: RowSums | None
    ) -> _Moments:
        """The moments of the keys not seen, near and far ones; both together where nothing is known of them.

        `least` is the weight of a draw that the mass never drawn is expected with, (heads, rows, 1).
        """
        assert draws.probabilities is not None
        sums, counts = self._visible(heads, positions, draws.indices.shape[:2])
        once = draws.once()
        if row_sums is None:
            mean, square = (sums.sum(2) / counts.sum(2).clamp_min(1)).chunk(2, dim=-1)
            mass = (1 - (draws.probabilities * once).sum(-1, keepdim=True)).clamp_min(0)
            weight = torch.where(least.isfinite(), mass * least, 0)[..., None]
            return _Moments(weight, weight * mean[:, :, None], weight * square[:, :, None])
        table, kinds = self.table[heads], self.kinds[heads]
        seen = torch.stack([draws.average(kind[..., None] * table, once) for kind in kinds.unbind(-1)], 2)
        count = draws.average(kinds, once)[..., None]
        # Each kind has one average key more than are left, as those seen may not be all that is there.
        rest = sums - seen + sums / counts.clamp_min(1)
        return _priced(rest / (counts - count).clamp_min(0).add(1), row_sums.weight, row_sums.spread)

    def _few_keys(self, draws: Draws, a: Tensor, unseen: _Moments, row_sums: RowSums | None) -> Tensor:
        """1 / (1 - sum_j a_j^2 / A_0^2), (heads, rows, 1): counts that add up to S vary against each other.

        Two keys whose counts vary do so as one, as n / (n - 1) of a sample variance does with n = 2.
        """
        once = draws.once()
        square = (a.square() * once).sum(-1, keepdim=True)
        if row_sums is not None:
            square = square + row_sums.square
        total = (a * once).sum(-1, keepdim=True) + unseen.weight.sum(2)
        return 1 / (1 - square / total.square().clamp_min(torch.finfo(a.dtype).tiny)).clamp_min(0.5)

    def _neighbours(self, draws: Draws, a: Tensor, heads: slice) -> Tensor:
        """The squared distance of neighbouring draws of a replicate, over that of any two draws, at most 1.

        (heads, rows, 1); of the draws of near keys that vary. In value order that is what the order saves
        (successive differences: Wolter, Introduction to variance estimation, 2007, sec. 8.2).
        """
        r, d = draws.replicates, self.values.shape[-1]
        vary = ((a > 0) & (draws.weights > 0)).unflatten(-1, (r, -1))
        indices = draws.indices.unflatten(-1, (r, -1))
        near = self.kinds[heads][:, None, None, :, 0].expand(*indices.shape[:3], -1)
        vary &= near.gather(-1, indices) > 0
        place = (~vary).to(torch.int8).argsort(dim=-1, stable=True)  # those that vary, in their order
        vary, indices = vary.gather(-1, place), indices.gather(-1, place)
        base = torch.arange(len(indices), device=indices.device)[:, None, None, None] * self.table.shape[1]
        v = F.embedding(indices + base, self.table[heads][..., :d].flatten(0, 1))  # [h, m, R, S, d]
        pairs = vary[..., 1:]  # both do, as these stand first
        adjacent = (v[..., 1:, :] - v[..., :-1, :]).square().sum(-1).mul(pairs).sum((-1, -2)) / 2
        count = vary.sum((-1, -2)).clamp_min(1)
        v = v * vary[..., None]
        mean = v.sum((-2, -3)) / count[..., None]
        any_two = (v.square().sum((-1, -2, -3)) / count - mean.square().sum(-1)).clamp_min(0)
        tiny = torch.finfo(v.dtype).tiny
        adjacent = (adjacent + ORDER_PRIOR * any_two) / (pairs.sum((-1, -2)) + ORDER_PRIOR)
        return torch.where(any_two > tiny, adjacent / any_two.clamp_min(tiny), 1).clamp_max(1)[..., None]

    def _predicted(
        self,
        draws: Draws,
        output: Tensor,
        a: Tensor,
        unseen: _Moments,
        heads: slice,
        correction: Correction | None,
    ) -> _Prediction:
        """What the design says of one replicate, counts that vary by themselves.

        `a` is a_j at the draws, `unseen` the moments of the keys not seen.
        """
        once, table = draws.once(), self.table[heads]
        a = a * once
        seen_weight, remaining = a.sum(-1, keepdim=True), torch.ones_like(unseen.weight[..., 0])
        if correction is None:
            first, second = draws.average(table, a).chunk(2, dim=-1)
        else:
            o, centre = output - self.centre[heads], self.centre[heads]
            rho = correction.unseen_share[..., None]
            unseen, remaining = unseen.shrunk_to(o[:, :, None], rho[..., None]), rho * remaining
            first, second = correction.moments(draws, a, table, centre)
        total = (seen_weight + unseen.weight.sum(2)).clamp_min(torch.finfo(a.dtype).tiny)
        mean = (first + unseen.first.sum(2)) / total
        of_unseen = _about(mean[:, :, None], unseen.weight, unseen.first, unseen.second).clamp_min(0)
        of_seen = _about(mean, seen_weight, first, second)
        if self.design.in_order:  # far keys have no neighbours
            adjacent = self._neighbours(draws, a, heads)
            unordered = (of_seen + of_unseen[:, :, 0]).sum(-1, keepdim=True)
            order = self._order_gain(draws, adjacent, unordered, heads, correction)
            others = torch.ones_like(order)
            of_seen, remaining = order * of_seen, remaining * torch.cat((adjacent, others), -1)
            of_unseen = torch.cat((order, others), -1)[..., None] * of_unseen
        return _Prediction(of_seen + of_unseen.sum(2), of_unseen.sum(2), remaining)

    def _order_gain(
        self, draws: Draws, adjacent: Tensor, unordered: Tensor, heads: slice, correction: Correction | None
    ) -> Tensor:
        """What value order leaves of the variance of near keys in random order, (heads, rows, 1).

        `adjacent` is the estimate of it from neighbouring draws, `unordered` the variance in random order.
        The variance between replicates can only lower the estimate.
        """
        between = self._between(draws, heads, correction).sum(-1, keepdim=True)
        lower = torch.minimum(between / unordered.clamp_min(torch.finfo(unordered.dtype).tiny), adjacent)
        r = draws.replicates
        return (PRIOR_WEIGHT * adjacent + (r - 1) * lower) / (PRIOR_WEIGHT + r - 1)

    def _between(self, draws: Draws, heads: slice, correction: Correction | None) -> Tensor:
        """Variance between the replicates' outputs, (heads, rows, d)."""
        if correction is None:
            means = draws.average_by_replicate(self.values[heads]) * draws.replicates
        else:
            means = correction.by_replicate
        return means.var(-2) if means.numel() else means.sum(-2)


@dataclass(frozen=True)
class _Prediction:
    """What a design says of the variance of one replicate.

    Parameters
    ----------
    variance, unseen : Tensor, (heads, rows, d)
        A_0 var_A(v), and the part of it of the keys not seen.
    remaining : Tensor, (heads, rows, kinds)
        What value order and controls leave of the squared error that near and far keys would cause.
    """

    variance: Tensor
    unseen: Tensor
    remaining: Tensor


@dataclass(frozen=True)
class _Moments:
    """Sums of a_j, a_j (v_j - c) and a_j (v_j - c)^2 over keys of each kind, (heads, rows, kinds, 1 or d)."""

    weight: Tensor
    first: Tensor
    second: Tensor

    def shrunk_to(self, o: Tensor, rho: Tensor) -> _Moments:
        """The moments where each value comes nearer to o + c, by the root of rho."""
        first = rho.sqrt() * (self.first - self.weight * o) + self.weight * o
        square = rho * _about(o, self.weight, self.first, self.second)
        return _Moments(self.weight, first, square + 2 * o * first - self.weight * o.square())


def _priced(average: Tensor, weight: Tensor, spread: Tensor) -> _Moments:
    """Moments of keys of known weight and spread (h, m, kinds), with values like those of an average key.

    `average` has the means of v - c and (v - c)^2 over keys of each kind, (h, m, kinds, 2 d).
    """
    mean, square = average.chunk(2, dim=-1)
    square = torch.maximum(square, mean.square())  # they may be differences of sums, which are rounded
    weight, tiny = weight[..., None], torch.finfo(mean.dtype).tiny
    further = spread[..., None] / square.sum(-1, keepdim=True).clamp_min(tiny)
    return _Moments(weight, (weight * further).sqrt() * mean, further * square)


def _about(o: Tensor, mass: Tensor | float, first: Tensor, second: Tensor) -> Tensor:
    """sum a (g - o)^2 from the sums of a, a g and a g^2."""
    return second - 2 * o * first + mass * o.square()
