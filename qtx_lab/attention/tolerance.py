"""A tolerance in place of a count: as many draws for each row as keep its output as near as was asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ..errors import ArgumentError
from ..estimates import AttentionEstimate, Draws, EstimateInfo
from ..problem import Rows, blocks, in_units
from ..samplers import ExactSampler, InversionSampler, Sampler
from ..samplers.base import Uniform
from .error_bars import Design, ErrorBars

PILOT = 16
"""Draws from which the size of a row's output is first estimated; times 4 until they tell it."""

CLEAR = 1.25
"""A pilot tells how long an output is where it is so many times longer than it could be wrong."""

LEAST = 4
"""No row gets fewer draws."""


def check_tolerance(
    tolerance: float | None, confidence: float, num_samples: int | None, sampler: Sampler
) -> None:
    """Refuse what `sampled_attention` cannot keep.

    Raises
    ------
    ArgumentError
        If a number is out of bounds, a count was given too, or the sampler cannot say how wrong it will be.
    """
    if not _is_number(confidence) or not 0.5 <= confidence < 1:
        raise ArgumentError(f"confidence={confidence!r} is not allowed: it must be from 0.5 to below 1.")
    if tolerance is None:
        return
    if not _is_number(tolerance) or not 0 < tolerance < math.inf:
        raise ArgumentError(f"tolerance={tolerance!r} is not allowed: it must be a number above 0.")
    if num_samples is not None:
        raise ArgumentError(
            f"num_samples={num_samples} and tolerance={tolerance} exclude each other: give one of them."
        )
    if not isinstance(sampler, InversionSampler | ExactSampler):
        raise ArgumentError(
            f"tolerance needs a sampler that predicts its variance; sampler={sampler.name!r} does not: use "
            "monte-carlo, stratified, systematic, sobol, halton, lattice or head-tail."
        )


def _is_number(x: object) -> bool:
    return isinstance(x, float | int | np.floating | np.integer) and not isinstance(x, bool)


@dataclass(frozen=True)
class _Group:
    """Rows `index` (heads, B) of some heads that got the same number of draws; of the padding `kept` is False."""

    heads: slice
    index: Tensor
    kept: Tensor
    draws: Draws
    exact: bool

    @property
    def where(self) -> tuple[Tensor, Tensor]:
        """(heads, rows), each (heads, B): what `index` indexes."""
        heads = torch.arange(self.heads.start, self.heads.stop, device=self.index.device)
        return heads[:, None].expand(self.index.shape), self.index

    @property
    def kept_where(self) -> tuple[Tensor, Tensor]:
        """(heads, rows) of the rows that are kept."""
        head, row = self.where
        return head[self.kept], row[self.kept]


def to_tolerance(
    rows: Rows,
    sampler: InversionSampler,
    tolerance: float,
    confidence: float,
    replicates: int,
    generator: torch.Generator | None,
    step: int,
) -> AttentionEstimate:
    """Estimate every row so that |o_hat - o| <= tolerance |o| with probability `confidence`, in blocks of `step` rows.

    The row's probabilities are known, and so is a bound of its variance for every count of draws, with D_j = |v_j - c|^2
    and c the mean value of the head:

        T(S) = sum_j b_j,    b_j = a_j(S) D_j,        E|o_hat - o|^2 <= T(S) / R

    (`InversionSampler.variance_weights`). The square of a normal error of covariance C has nearly the distribution of
    tr C chi^2_f / f with f = (tr C)^2 / tr C^2 (Box, Some theorems on quadratic forms, 1954). Of C = sum_j b_j u_j u_j'
    with unit vectors u_j the share 1 / f of pairs of keys is h = sum_j b_j^2 / T^2 for a key with itself, and for two keys
    1 / f_v, f_v being that of the head's values: 1 / f = h + (1 - h) / f_v. A key that is far away and drawn seldom makes
    the error anything but normal: as in Bernstein's inequality a third of log(1 / risk) jumps is added, a jump being the
    root mean square w sqrt(D_j), weighted by b_j, of what one draw of weight w can do. S is the least with

        r = sqrt(x_f T(S)) + log(1 / (1 - confidence)) / 3 sqrt(sum_j b_j w^2 D_j / T),        r^2 / R <= tolerance^2 |o|^2,

    x_f the quantile of chi^2_f / f (Wilson and Hilferty 1931). |o| is the one thing not known: a pilot, drawn again with
    four times the draws until |o_hat| > `CLEAR` r, gives |o_hat| - sqrt(T). Its draws are not used again, so that the
    output is as unbiased as the sampler. A row that would need as many draws as it has keys is computed exactly, without
    a pilot where that can be told before.
    """
    uniform = Uniform(generator, rows.q.device)
    shape, width = (rows.count, rows.rows), rows.v.shape[-1]
    output = rows.v.new_empty(*shape, width)
    spent, pilot = (torch.zeros(shape, dtype=torch.int64, device=output.device) for _ in range(2))
    predicted = output.new_zeros(shape)
    groups: list[_Group] = []
    centred = rows.v - rows.v.mean(1, keepdim=True)
    distance = centred.square().sum(-1)  # [N, n]
    covariance = centred.mT @ centred
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1).square()
    alike = (covariance.square().sum((1, 2)) / trace.clamp_min(torch.finfo(trace.dtype).tiny)).clamp(
        1 / width, 1
    )  # [N], 1 / f_v
    exact_rows = 0
    for heads, part in blocks(shape, step):
        logits, values = rows.logits(heads, part), rows.v[heads]
        apart = distance[heads, None, : logits.shape[-1]]
        masked = logits == -torch.inf
        p = logits.softmax(-1).masked_fill_(masked, 0)
        keys = (~masked).sum(-1)
        # |o|^2 <= sum_j p_j |v_j|^2: where even that is too little for as many draws as keys, no pilot is needed.
        largest = (p * values[:, None, : p.shape[-1]].square().sum(-1)).sum(-1)
        near = alike[heads, None]
        top = _bound(p, apart, p.shape[-1], sampler, near, confidence)
        open_ = (keys > PILOT) & (top <= tolerance**2 * largest * replicates)
        size, tried = _output_size(logits, p, apart, values, keys, sampler, uniform, open_, near, confidence)
        allowed = tolerance**2 * size * replicates
        counts, bound = _counts(p, apart, keys, allowed, sampler, alike[heads], confidence)
        pilot[heads, part] = tried
        spent[heads, part] = torch.where(counts < 0, keys, counts * replicates)
        predicted[heads, part] = (bound / replicates / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt()
        for count, index, kept in _by_count(counts):
            chosen = index[..., None].expand(*index.shape, logits.shape[-1])
            if count < 0:
                draws = _every_key(p.gather(1, chosen), replicates)
                exact_rows += int(kept.sum())
            else:
                points = sampler.points(tuple(index.shape), count, replicates, uniform)
                draws = sampler.place(logits.gather(1, chosen), points)
            average = draws.average(values)[kept]
            if (laid := rows.order) is not None:  # back to the caller's keys
                order = laid[heads][:, None].expand(*index.shape, rows.num_keys)
                draws = Draws(order.gather(-1, draws.indices), draws.weights, draws.probabilities, replicates)
            groups.append(_Group(heads, index + part.start, kept, draws, count < 0))
            output[groups[-1].kept_where] = average
    values = rows.v.clone()
    if rows.order is not None:
        values = torch.empty_like(values).scatter_(1, rows.order[..., None].expand_as(values), values)
    visible, positions, causal = rows.visible_keys(), rows.positions(slice(0, rows.rows)), rows.is_causal
    row_shape, dtype, unit = rows.row_shape, rows.args[2].dtype, rows.unit

    def make_draws() -> Draws:
        most = max((g.draws.indices.shape[-1] for g in groups), default=replicates) // replicates
        indices = torch.zeros(*shape, replicates, most, dtype=torch.int64, device=output.device)
        weights, p = (output.new_zeros(*shape, replicates, most) for _ in range(2))
        for g in groups:
            assert g.draws.probabilities is not None  # every sampler that inverts p knows it
            for x, y in ((indices, g.draws.indices), (weights, g.draws.weights), (p, g.draws.probabilities)):
                y = y[g.kept].unflatten(-1, (replicates, -1))
                x[(*g.kept_where, slice(None), slice(0, y.shape[-1]))] = y
        padded = Draws(indices.flatten(-2), weights.flatten(-2), p.flatten(-2), replicates)
        return padded.view(row_shape)

    def make_std_error() -> Tensor:
        std_error = torch.zeros_like(output)
        bars = ErrorBars(values, visible, causal, design, dtype)
        for g in groups:
            if g.exact:
                continue
            error = bars(g.draws, output[g.where], g.heads, positions[g.index])
            std_error[g.kept_where] = error[g.kept]
        return in_units(std_error, unit).view(*row_shape, width)

    told = sampler.independent or replicates > 1
    design = Design.of(sampler)
    sample = groups[0].draws if groups else Draws(spent[..., :0], output[..., :0, 0], None, replicates)
    total = output.shape[:2].numel()
    return AttentionEstimate(
        output=in_units(output, unit).view(*row_shape, width).to(dtype),
        num_keys=rows.num_keys,
        degrees_of_freedom=design.degrees_of_freedom(sample) if told else math.inf,
        make_draws=make_draws,
        make_std_error=make_std_error if told else None,
        group=rows.group,
        info=EstimateInfo(
            sampler=sampler.name,
            unbiased=sampler.unbiased,
            tolerance=tolerance,
            confidence=confidence,
            replicates=replicates,
            draws_per_row=spent.view(row_shape),
            pilot_draws_per_row=pilot.view(row_shape),
            predicted_relative_error=predicted.view(row_shape),
            fallbacks=(
                f"{exact_rows:,} of {total:,} rows were computed exactly: to the tolerance they need as many draws "
                f"as they have keys. With pilots a row took {(spent + pilot).double().mean():.1f} draws on average.",
            )
            if exact_rows
            else (),
        ),
    )


def _output_size(
    logits: Tensor,
    p: Tensor,
    apart: Tensor,
    values: Tensor,
    keys: Tensor,
    sampler: InversionSampler,
    uniform: Uniform,
    open_: Tensor,
    alike: Tensor,
    confidence: float,
) -> tuple[Tensor, Tensor]:
    """A size of |o|^2 of the `open_` rows from pilot draws, (heads, rows), 0 where they do not tell; their count."""
    size, spent = torch.zeros_like(p[..., 0]), torch.zeros_like(keys)
    count = PILOT
    rounds = 1 + max(0, int(math.log2(max(1, p.shape[-1] / PILOT)) / 2))
    sure = 1 - (1 - confidence) / (4 * rounds)  # of all rounds together, a quarter of the risk
    while bool(open_.any()):
        index, kept = _padded(open_)
        chosen = index[..., None].expand(*index.shape, p.shape[-1])
        points = sampler.points(tuple(index.shape), count, 1, uniform)
        length = sampler.place(logits.gather(1, chosen), points).average(values).norm(dim=-1)
        some = p.gather(1, chosen)
        told = kept & (length > CLEAR * _bound(some, apart, count, sampler, alike, sure).sqrt())
        error = (sampler.variance_weights(some, count)[0] * apart).sum(-1).sqrt()
        head = torch.arange(len(p), device=p.device)[:, None].expand(index.shape)
        size[head[told], index[told]] = (length - error)[told].clamp_min(0).square()
        spent[head[kept], index[kept]] += count
        open_[head[told], index[told]] = False
        count *= 4
        open_ &= keys > 2 * count  # as dear as the exact row
    return size, spent


def _bound(
    p: Tensor, apart: Tensor, count: int, sampler: InversionSampler, alike: Tensor, confidence: float
) -> Tensor:
    """r^2 of rows p (..., n) at `count` draws, (...): see `to_tolerance`."""
    a, weight = sampler.variance_weights(p, count)
    b = a * apart
    total = b.sum(-1)
    tiny = torch.finfo(total.dtype).tiny
    h = b.square().sum(-1) / total.square().clamp_min(tiny)
    c = 2 / 9 * (h + (1 - h) * alike)
    normal = total * (1 - c + float(stats.norm.ppf(confidence)) * c.sqrt()).clamp_min(0) ** 3
    jump = weight[..., 0] * ((b * apart).sum(-1) / total.clamp_min(tiny)).sqrt()
    return (normal.sqrt() - math.log(1 - confidence) / 3 * jump).square()


def _counts(
    p: Tensor,
    apart: Tensor,
    keys: Tensor,
    allowed: Tensor,
    sampler: InversionSampler,
    alike: Tensor,
    confidence: float,
) -> tuple[Tensor, Tensor]:
    """The least count of draws with r^2 <= allowed, on a ladder of ratio sqrt(2), and r^2.

    -1 and 0 where that is no less than the row's keys.
    """
    most = int(keys.max()) if keys.numel() else 0
    ladder = [round(LEAST * 2 ** (i / 2)) for i in range(64) if LEAST * 2 ** (i / 2) < most]
    low = torch.zeros_like(keys)
    high = torch.where((keys > 0) & (allowed > 0), len(ladder), 0)
    bound = torch.zeros_like(allowed)
    apart, alike = apart.expand_as(p), alike[:, None].expand_as(allowed)
    while bool((low < high).any()):  # bisection, rows of the same rung together
        middle = (low + high) // 2
        for rung in middle[low < high].unique().tolist():
            these = (low < high) & (middle == rung)
            expected = _bound(p[these], apart[these], ladder[rung], sampler, alike[these], confidence)
            enough = expected <= allowed[these]
            high[these] = torch.where(enough, rung, high[these])
            low[these] = torch.where(enough, low[these], rung + 1)
            bound[these] = torch.where(enough, expected, bound[these])
    found = torch.tensor([*ladder, -1], device=keys.device)[high]
    found = torch.where((found < keys) & (allowed > 0), found, -1)
    found[keys == 0] = LEAST  # nothing to attend to
    return found, torch.where(found > 0, bound, 0)


def _by_count(counts: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(count, index (heads, B), kept (heads, B)) of the rows of each count of `counts` (heads, rows)."""
    for count in counts.unique().tolist():
        yield int(count), *_padded(counts == count)


def _padded(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen rows of each head, (heads, B), filled up with others to the most that a head has; which were chosen."""
    most = int(chosen.sum(-1).max()) if chosen.numel() else 0
    index = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :most]
    return index, chosen.gather(-1, index)


def _every_key(p: Tensor, replicates: int) -> Draws:
    """Rows p (heads, B, n) computed exactly, as draws of every key."""
    n = p.shape[-1]
    index = torch.arange(n, device=p.device).repeat(replicates).expand(*p.shape[:-1], replicates * n)
    return Draws(index, p.repeat(1, 1, replicates) / replicates, p.repeat(1, 1, replicates), replicates)
