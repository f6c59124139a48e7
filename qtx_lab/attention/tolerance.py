"""A tolerance in place of a count: as many draws for each row as keep its output as near as was asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from ..errors import ArgumentError
from ..estimates import AttentionEstimate, Draws, EstimateInfo
from ..problem import AttentionProblem, log_sum_exp
from ..samplers import SAMPLERS, Design, InversionSampler, SampledRows, Sampler
from ..streams import Purpose, Stream
from .error_bars import ErrorBars, degrees_of_freedom

PILOT_DRAWS = 16
"""Draws from which the size of a row's output is first estimated; times 4 until they tell it."""

PILOT_MARGIN = 1.25
"""A pilot tells how long an output is where it is so many times longer than it could be wrong."""

MIN_DRAWS = 4
"""No row gets fewer draws."""


@dataclass(frozen=True)
class Tolerance:
    """What is promised of every row: |o_hat - o| <= `relative` |o| with probability `confidence`."""

    relative: float
    confidence: float

    @classmethod
    def of(
        cls, tolerance: float | None, confidence: float, num_samples: int | None, sampler: Sampler
    ) -> Tolerance | None:
        """The promise that the arguments of `sampled_attention` ask for; None where they ask for none.

        Raises
        ------
        ArgumentError
            If a number is out of bounds, a count was given too, or the sampler cannot say how wrong it will
            be.
        """
        if not _is_number(confidence) or not 0.5 <= confidence < 1:
            raise ArgumentError(f"confidence={confidence!r} is not allowed: it must be from 0.5 to below 1.")
        if tolerance is None:
            return None
        if not _is_number(tolerance) or not 0 < tolerance < math.inf:
            raise ArgumentError(f"tolerance={tolerance!r} is not allowed: it must be a number above 0.")
        if num_samples is not None:
            raise ArgumentError(
                f"num_samples={num_samples} and tolerance={tolerance} exclude each other: give one of them."
            )
        if not (sampler.predicts_variance or sampler.exact):
            able = [name for name, factory in SAMPLERS.items() if factory().predicts_variance]
            raise ArgumentError(
                f"tolerance needs a sampler that predicts its variance; sampler={sampler.name!r} does not: "
                f"use {', '.join(able[:-1])} or {able[-1]}."
            )
        return cls(float(tolerance), float(confidence))


def _is_number(x: object) -> bool:
    return isinstance(x, float | int | np.floating | np.integer) and not isinstance(x, bool)


@dataclass(frozen=True)
class _Group:
    """Rows `index` (heads, B) of some heads that got the same number of draws; `real` is False for
    padding.
    """

    heads: slice
    index: Tensor
    real: Tensor
    draws: Draws
    exact: bool

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """(heads, rows), each (heads, B): what `index` indexes."""
        heads = torch.arange(self.heads.start, self.heads.stop, device=self.index.device)
        return heads[:, None].expand(self.index.shape), self.index

    @property
    def real_rows(self) -> tuple[Tensor, Tensor]:
        """(heads, rows) of the rows that are no padding."""
        head, row = self.rows
        return head[self.real], row[self.real]


@dataclass(frozen=True)
class _Spread:
    """How far the values of a head lie apart: `distance` |v_j - c|^2 (N, n), and `shared`, 1 / f_v of
    `to_tolerance` (N,).
    """

    distance: Tensor
    shared: Tensor

    @classmethod
    def of(cls, problem: AttentionProblem, known: int) -> _Spread:
        """About the mean of the first `known` values, or the first value: any centre gives a valid bound."""
        values, first = problem.values, problem.values[:, : max(1, known)]
        centre = first.mean(1, keepdim=True)
        covariance = (first - centre).mT @ (first - centre)
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1).square()
        shared = covariance.square().sum((1, 2)) / trace.clamp_min(torch.finfo(trace.dtype).tiny)
        if known < first.shape[-1]:  # too few values to say in how many directions they vary
            shared = torch.ones_like(shared)
        return cls((values - centre).square().sum(-1), shared.clamp(1 / problem.width, 1))


def to_tolerance(
    problem: AttentionProblem, sampler: Sampler, promise: Tolerance, replicates: int, stream: Stream
) -> AttentionEstimate:
    """Estimate every row so that |o_hat - o| <= tolerance |o| with probability `confidence`.

    The row's probabilities are known, and so is a bound of its variance for every count of draws, with D_j =
    |v_j - c|^2 and c the mean value of the head (of the keys that a causal row surely sees,
    `AttentionProblem.runs`):

        T(S) = sum_j b_j,    b_j = a_j(S) D_j,        E|o_hat - o|^2 <= T(S) / R

    (`InversionSampler.variance_weights`). The square of a normal error of covariance C has nearly the
    distribution of tr C chi^2_f / f with f = (tr C)^2 / tr C^2 (Box, Some theorems on quadratic forms, 1954).
    Of C = sum_j b_j u_j u_j' with unit vectors u_j the share 1 / f of pairs of keys is h = sum_j b_j^2 / T^2
    for a key with itself, and for two keys 1 / f_v, f_v being that of the head's values: 1 / f = h + (1 - h)
    / f_v. A key that is far away and drawn seldom makes the error anything but normal: as in Bernstein's
    inequality a third of log(1 / risk) jumps is added, a jump being the root mean square w sqrt(D_j),
    weighted by b_j, of what one draw of weight w can do. S is the least with

        r = sqrt(x_f T(S)) + log(1 / (1 - confidence)) / 3 sqrt(sum_j b_j w^2 D_j / T),        r^2 / R <=
        tolerance^2 |o|^2,

    x_f the quantile of chi^2_f / f (Wilson and Hilferty 1931). |o| is the one thing not known: a pilot, drawn
    again with four times the draws until |o_hat| > `PILOT_MARGIN` r, gives |o_hat| - sqrt(T). Its draws are
    not used again, so that the output is as unbiased as the sampler. A row that would need as many draws as
    it has keys is computed exactly, without a pilot where that can be told before.
    """
    assert isinstance(sampler, InversionSampler)  # all that predict their variance are
    rows = _RowsToTolerance(problem, sampler, promise, replicates, stream)
    for heads, part in problem.blocks(0):
        for known, run in problem.runs(part):
            rows.estimate(heads, run, known)
    return rows.together()


class _RowsToTolerance:
    """The estimate as it is made, run by run."""

    def __init__(
        self,
        problem: AttentionProblem,
        sampler: InversionSampler,
        promise: Tolerance,
        replicates: int,
        stream: Stream,
    ):
        self.problem, self.sampler, self.promise = problem, sampler, promise
        self.replicates, self.stream = replicates, stream
        shape = problem.shape
        self.output = problem.values.new_empty(*shape, problem.width)
        self.spent, self.pilot = (
            torch.zeros(shape, dtype=torch.int64, device=self.output.device) for _ in range(2)
        )
        self.predicted, self.log_sum_exp = (self.output.new_zeros(shape) for _ in range(2))
        self.groups: list[_Group] = []
        self.exact_rows = 0
        layout = sampler.layout(problem)
        self.order = None if layout is None else layout.order
        self.spreads: dict[int, _Spread] = {}

    def estimate(self, heads: slice, part: slice, known: int) -> None:
        """Choose counts for rows `part` of some heads, which know the first `known` keys, and draw."""
        problem, sampler, replicates = self.problem, self.sampler, self.replicates
        if known not in self.spreads:
            self.spreads[known] = _Spread.of(problem, known)
        spread, confidence = self.spreads[known], self.promise.confidence
        logits, values = problem.logits(heads, part), problem.values[heads]
        self.log_sum_exp[heads, part] = log_sum_exp(logits)
        distance = spread.distance[heads, None, : logits.shape[-1]]
        shared = spread.shared[heads]
        masked = logits == -torch.inf
        p = logits.softmax(-1).masked_fill_(masked, 0)
        keys = (~masked).sum(-1)
        # |o|^2 <= sum_j p_j |v_j|^2: where even that is too little for as many draws as keys, no pilot is
        # needed.
        largest = (p * values[:, None, : p.shape[-1]].square().sum(-1)).sum(-1)
        top = _bound(p, distance, p.shape[-1], sampler, shared[:, None], confidence)
        unknown = (keys > PILOT_DRAWS) & (top <= self.promise.relative**2 * largest * replicates)
        size, pilot = self._output_size(logits, p, distance, keys, unknown, heads, part, shared[:, None])
        allowed = self.promise.relative**2 * size * replicates
        counts, bound = _counts(p, distance, keys, allowed, sampler, shared, confidence)
        self.pilot[heads, part] = pilot
        self.spent[heads, part] = torch.where(counts < 0, keys, counts * replicates)
        tiny = torch.finfo(size.dtype).tiny
        self.predicted[heads, part] = (bound / replicates / size.clamp_min(tiny)).sqrt()
        positions = problem.positions(part)
        for count, index, real in _by_count(counts):
            chosen = index[..., None].expand(*index.shape, logits.shape[-1])
            if count < 0:
                draws = _every_key(p.gather(1, chosen), replicates)
                self.exact_rows += int(real.sum())
            else:
                stream = self.stream.of_block(heads, positions[index])
                draws = self._place(
                    logits.gather(1, chosen), heads, sampler.points(stream, count, replicates)
                )
            group = _Group(heads, index + part.start, real, draws, count < 0)
            self.groups.append(group)
            self.output[group.real_rows] = draws.average(values)[real]

    def _place(self, logits: Tensor, heads: slice, points: Tensor) -> Draws:
        """Draws at points of rows (heads, B, keys), whose keys stand as they come."""
        if self.order is None:
            return self.sampler.place(logits, points)
        order = self.order[heads]
        logits = F.pad(logits, (0, order.shape[-1] - logits.shape[-1]), value=-torch.inf)
        in_order = logits.gather(-1, order[:, None].expand_as(logits))
        seen = (logits > -torch.inf).sum(-1)
        return self.sampler.place_in_order(in_order, order, points, seen)

    def _output_size(
        self,
        logits: Tensor,
        p: Tensor,
        distance: Tensor,
        keys: Tensor,
        unknown: Tensor,
        heads: slice,
        part: slice,
        shared: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """|o|^2 of the `unknown` rows from pilot draws, (heads, rows), 0 where they do not tell; how many
        draws.
        """
        size, spent = torch.zeros_like(p[..., 0]), torch.zeros_like(keys)
        positions, count, sampler = self.problem.positions(part), PILOT_DRAWS, self.sampler
        rounds = 1 + max(0, int(math.log2(max(1, p.shape[-1] / PILOT_DRAWS)) / 2))
        sure = 1 - (1 - self.promise.confidence) / (
            4 * rounds
        )  # of all rounds together, a quarter of the risk
        repetition = 0
        while bool(unknown.any()):
            index, real = _padded(unknown)
            chosen = index[..., None].expand(*index.shape, p.shape[-1])
            stream = self.stream.of_block(heads, positions[index]).of_purpose(Purpose.PILOT, repetition)
            draws = self._place(logits.gather(1, chosen), heads, sampler.points(stream, count, 1))
            length = draws.average(self.problem.values[heads]).norm(dim=-1)
            some = p.gather(1, chosen)
            margin = PILOT_MARGIN * _bound(some, distance, count, sampler, shared, sure).sqrt()
            clear = real & (length > margin)
            error = (sampler.variance_weights(some, count)[0] * distance).sum(-1).sqrt()
            head = torch.arange(len(p), device=p.device)[:, None].expand(index.shape)
            size[head[clear], index[clear]] = (length - error)[clear].clamp_min(0).square()
            spent[head[real], index[real]] += count
            unknown[head[clear], index[clear]] = False
            count, repetition = 4 * count, repetition + 1
            unknown &= keys > 2 * count  # it would cost as much as the exact row
        return size, spent

    def together(self) -> AttentionEstimate:
        """The estimate of all rows."""
        problem, groups, output = self.problem, self.groups, self.output
        design = Design(self.sampler.independent, self.sampler.count_variance)
        has_error = self.sampler.independent or self.replicates > 1
        sample = (
            groups[0].draws
            if groups
            else Draws(self.spent[..., :0], output[..., :0, 0], None, self.replicates)
        )
        # Copies, and not the problem itself, which would keep q and k alive.
        values, visible, unit = problem.values.clone(), problem.visible_keys(), problem.unit
        causal, dtype = problem.is_causal, problem.v.dtype
        positions = problem.positions(slice(0, problem.shape[1]))

        def make_std_error() -> Tensor:
            std_error = torch.zeros_like(output)
            bars = ErrorBars(values, visible, causal, design, dtype)
            for g in groups:
                if not g.exact:
                    error = bars(g.draws, output[g.rows], g.heads, positions[g.index])
                    std_error[g.real_rows] = error[g.real]
            return std_error if unit is None else std_error * unit

        shape, replicates = problem.shape, self.replicates
        sampled = SampledRows(
            problem.in_units(output),
            lambda: _padded_draws(groups, shape, replicates, output),
            design,
            self._info(),
            make_std_error if has_error else None,
            degrees_of_freedom(design, sample) if has_error else math.inf,
            lambda: self.log_sum_exp,
        )
        return sampled.to_estimate(problem)

    def _info(self) -> EstimateInfo:
        rows, total = self.problem.row_shape, self.output.shape[:2].numel()
        fallbacks: tuple[str, ...] = ()
        if self.exact_rows:
            mean = (self.spent + self.pilot).double().mean()
            fallbacks = (
                f"{self.exact_rows:,} of {total:,} rows were computed exactly: to the tolerance they need "
                "as many draws "
                f"as they have keys. With pilots a row took {mean:.1f} draws on average.",
            )
        return EstimateInfo(
            sampler=self.sampler.name,
            unbiased=self.sampler.unbiased,
            tolerance=self.promise.relative,
            confidence=self.promise.confidence,
            replicates=self.replicates,
            draws_per_row=self.spent.view(rows),
            pilot_draws_per_row=self.pilot.view(rows),
            predicted_relative_error=self.predicted.view(rows),
            fallbacks=fallbacks,
            log_sum_exp="exact",
        )


def _padded_draws(groups: list[_Group], shape: tuple[int, int], replicates: int, like: Tensor) -> Draws:
    """The draws of all rows (N, M), padded by draws of weight 0 to the most that a row has."""
    most = max((g.draws.indices.shape[-1] for g in groups), default=replicates) // replicates
    indices = torch.zeros(*shape, replicates, most, dtype=torch.int64, device=like.device)
    weights, p = (like.new_zeros(*shape, replicates, most) for _ in range(2))
    for g in groups:
        assert g.draws.probabilities is not None  # every sampler that inverts p knows it
        for x, y in ((indices, g.draws.indices), (weights, g.draws.weights), (p, g.draws.probabilities)):
            y = y[g.real].unflatten(-1, (replicates, -1))
            x[(*g.real_rows, slice(None), slice(0, y.shape[-1]))] = y
    return Draws(indices.flatten(-2), weights.flatten(-2), p.flatten(-2), replicates)


def _bound(
    p: Tensor, distance: Tensor, count: int, sampler: InversionSampler, shared: Tensor, confidence: float
) -> Tensor:
    """r^2 of rows p (..., n) at `count` draws, (...): see `to_tolerance`."""
    a, weight = sampler.variance_weights(p, count)
    b = a * distance
    total = b.sum(-1)
    tiny = torch.finfo(total.dtype).tiny
    h = b.square().sum(-1) / total.square().clamp_min(tiny)
    c = 2 / 9 * (h + (1 - h) * shared)
    normal = total * (1 - c + float(stats.norm.ppf(confidence)) * c.sqrt()).clamp_min(0) ** 3
    jump = weight[..., 0] * ((b * distance).sum(-1) / total.clamp_min(tiny)).sqrt()
    return (normal.sqrt() - math.log(1 - confidence) / 3 * jump).square()


def _counts(
    p: Tensor,
    distance: Tensor,
    keys: Tensor,
    allowed: Tensor,
    sampler: InversionSampler,
    shared: Tensor,
    confidence: float,
) -> tuple[Tensor, Tensor]:
    """The least count of draws with r^2 <= allowed, on a ladder of ratio sqrt(2), and r^2.

    -1 and 0 where that is no less than the row's keys.
    """
    most = int(keys.max()) if keys.numel() else 0
    ladder = [round(MIN_DRAWS * 2 ** (i / 2)) for i in range(64) if MIN_DRAWS * 2 ** (i / 2) < most]
    low = torch.zeros_like(keys)
    high = torch.where((keys > 0) & (allowed > 0), len(ladder), 0)
    bound = torch.zeros_like(allowed)
    distance, shared = distance.expand_as(p), shared[:, None].expand_as(allowed)
    while bool((low < high).any()):  # bisection, rows of the same rung together
        middle = (low + high) // 2
        for rung in middle[low < high].unique().tolist():
            these = (low < high) & (middle == rung)
            expected = _bound(p[these], distance[these], ladder[rung], sampler, shared[these], confidence)
            enough = expected <= allowed[these]
            high[these] = torch.where(enough, rung, high[these])
            low[these] = torch.where(enough, low[these], rung + 1)
            bound[these] = torch.where(enough, expected, bound[these])
    chosen = torch.tensor([*ladder, -1], device=keys.device)[high]
    chosen = torch.where((chosen < keys) & (allowed > 0), chosen, -1)
    chosen[keys == 0] = MIN_DRAWS  # nothing to attend to
    return chosen, torch.where(chosen > 0, bound, 0)


def _by_count(counts: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(count, index (heads, B), kept (heads, B)) of the rows of each count of `counts` (heads, rows)."""
    for count in counts.unique().tolist():
        yield int(count), *_padded(counts == count)


def _padded(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen rows of each head, (heads, B), filled up with others to the most that a head has; which
    were chosen.
    """
    most = int(chosen.sum(-1).max()) if chosen.numel() else 0
    index = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :most]
    return index, chosen.gather(-1, index)


def _every_key(p: Tensor, replicates: int) -> Draws:
    """Rows p (heads, B, n) computed exactly, as draws of every key."""
    n = p.shape[-1]
    index = torch.arange(n, device=p.device).repeat(replicates).expand(*p.shape[:-1], replicates * n)
    return Draws(index, p.repeat(1, 1, replicates) / replicates, p.repeat(1, 1, replicates), replicates)
