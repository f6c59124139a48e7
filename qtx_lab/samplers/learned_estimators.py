"""What is made of draws from a proposal: the self-normalised, the plain and the debiased estimate."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..estimates import (
    Draws,
    EstimateInfo,
    mixed_degrees_of_freedom,
    reliability,
    rounding_variance,
)
from ..problem import AttentionProblem, Block, log_sum_exp
from ..streams import Purpose, Stream
from .base import Budget, Design, SampledRows
from .inversion import invert, row_masses
from .inversion_sampler import InversionSampler
from .learned_errors import LevelDraws, Spread, mixed_variance, standard_error
from .learned_proposal import BLOCK_ELEMENTS, ProposedRows, log_inclusion

LEVEL_RATIO = 2**-1.5
"""P(level + 1) / P(level) of the debiased estimator. A level doubles the draws and divides the variance of
its correction by 4: any ratio between 1/4 and 1/2 has finite variance and cost, the geometric mean is the
best."""

MOST_DRAWS = 4
"""`adaptive` gives no row more than this many times the mean number of draws."""


def importance(
    rows: ProposedRows,
    sampler: InversionSampler,
    budget: Budget,
    stream: Stream,
    info: EstimateInfo,
    *,
    plain: bool,
    log_normaliser: Tensor | None = None,
) -> SampledRows:
    """The plain or the self-normalised estimate, block by block (see `LearnedImportanceSampler`).

    Parameters
    ----------
    sampler : InversionSampler
        Where the proposal is inverted.
    info : EstimateInfo
        What is known before the draws.
    log_normaliser : Tensor, (N, M), optional
        Of the plain estimate; computed from all exact logits where None.
    """
    problem, replicates = rows.problem, budget.replicates
    drawn = _draw_rows(rows, sampler, budget, stream, plain=plain, log_normaliser=log_normaliser)
    flat, output, proposal = drawn.draws, drawn.output, drawn.proposal
    effective = flat.effective_sample_size().view(problem.row_shape)
    info = replace(
        info,
        draws_per_row=budget.total,
        effective_sample_size=effective,
        log_sum_exp="exact" if plain else "estimated",
    )

    for_later = problem.for_later()

    def measured() -> Tensor:
        std_error, later = torch.empty_like(output), for_later()
        spread = Spread(later, sampler.independent)
        for block in drawn.blocks:
            variance = spread(flat, proposal, output, block)
            if plain:  # its weights should sum to 1: what they have too much is an error that is seen
                variance += ((flat.weights[block].sum(-1, keepdim=True) - 1) * output[block]).square()
            std_error[block] = variance.sqrt()
        if not plain:
            return std_error
        return std_error.maximum(standard_error(flat.average_by_replicate(later.values) * replicates))

    sampled = SampledRows(
        problem.in_units(output),
        lambda: flat,
        Design(False),
        info,
        degrees_of_freedom=mixed_degrees_of_freedom(replicates) if plain and replicates > 1 else math.inf,
        make_log_sum_exp=lambda: drawn.normaliser,
    )
    if plain and replicates == 1:
        return sampled
    return _with_error_bars(sampled, problem, measured)


@dataclass(frozen=True)
class _DrawnRows:
    """Draws of the rows (N, M) of a problem from their proposals, and what follows from them.

    Parameters
    ----------
    draws : Draws, (N, M, R * S)
    proposal : Tensor, (N, M, R * S)
        q of the drawn keys.
    output : Tensor, (N, M, d)
        In units of the problem's values.
    normaliser : Tensor, (N, M)
        The log-sum-exp of the logits, exact or estimated.
    blocks : list of (slice, slice)
        The blocks of rows that were drawn together.
    """

    draws: Draws
    proposal: Tensor
    output: Tensor
    normaliser: Tensor
    blocks: list[Block]


def _draw_rows(
    rows: ProposedRows,
    sampler: InversionSampler,
    budget: Budget,
    stream: Stream,
    *,
    plain: bool,
    log_normaliser: Tensor | None,
) -> _DrawnRows:
    """Draw from the proposals, block by block, and weigh the draws; arguments as for `importance`."""
    problem, shape, total = rows.problem, rows.problem.shape, budget.total
    num_samples, replicates = budget.num_samples, budget.replicates
    output = problem.values.new_empty(*shape, problem.width)
    indices = torch.empty(*shape, total, dtype=torch.int64, device=output.device)
    weights, proposal = output.new_empty(*shape, total), output.new_empty(*shape, total)
    p = torch.empty_like(weights) if plain else None
    normaliser = output.new_empty(shape)
    sinks = problem.row_sinks
    if sinks is not None:
        sinks = sinks.expand(problem.row_shape).reshape(shape)
    blocks = list(rows.blocks(total))
    for heads, part in blocks:
        points = sampler.points(stream.of_block(heads, problem.positions(part)), num_samples, replicates)
        drawn, exact, log_q = rows.draw(heads, part, points.flatten(-2))
        by_replicate = drawn.unflatten(-1, (replicates, num_samples))
        times = Draws(by_replicate, by_replicate).multiplicity().flatten(-2).to(exact.dtype)
        log_share = -log_inclusion(log_q, num_samples, sampler.independent) - times.log()
        empty = log_q == -torch.inf  # of a row in which all is masked
        if p is None:
            # The largest logit is taken off first: next to a logit of millions log_share is lost to rounding.
            largest = exact.masked_fill(empty, 0).amax(-1, keepdim=True)
            log_w = (exact - largest + log_share).unflatten(-1, by_replicate.shape[-2:])
            z = log_w.logsumexp(-1)  # [heads, rows, R], of the estimated sum over keys
            if sinks is not None:
                z = torch.logaddexp(z, sinks[heads, part, None] - largest)
            w = (log_w - z[..., None]).exp().flatten(-2)
            z = largest[..., 0] + z.logsumexp(-1) - math.log(replicates)
        else:
            z = log_normaliser
            z = log_sum_exp(problem.logits(heads, part)) if z is None else z[heads, part]
            log_p = (exact - z[..., None]).clamp_max(0)  # sums that are rounded otherwise can make it more
            w = (log_p + log_share).exp()
            p[heads, part] = log_p.exp().masked_fill(empty, 0)
        nothing = -torch.inf if sinks is None else sinks[heads, part]
        normaliser[heads, part] = torch.where(empty[..., 0], nothing, z)
        w = (w / replicates).masked_fill(empty, 0)
        indices[heads, part], weights[heads, part], proposal[heads, part] = drawn, w, log_q.exp()
        output[heads, part] = Draws(drawn, w, None, replicates).average(problem.values[heads])
    return _DrawnRows(Draws(indices, weights, p, replicates), proposal, output, normaliser, blocks)


def _with_error_bars(
    sampled: SampledRows, problem: AttentionProblem, measure: Callable[[], Tensor]
) -> SampledRows:
    """The same estimate with standard errors and their reliability.

    `measure` gives the standard errors (N, M, d) in units of the values. The reliability is computed from the
    exact probabilities of all keys.
    """
    for_later, unit = problem.for_later(), problem.unit

    @functools.cache
    def measured() -> Tensor:
        with torch.no_grad():
            return measure()

    def make_reliability() -> Tensor:
        std_error, later, draws = measured(), for_later(), sampled.make_draws()
        hidden = torch.empty_like(std_error[..., 0])
        with torch.no_grad():
            spread = Spread(later, False)
            for block in later.blocks(0):
                hidden[block] = spread.hidden(draws, block)
        return reliability(std_error, hidden, sampled.degrees_of_freedom)

    return replace(
        sampled,
        make_std_error=lambda: measured() if unit is None else measured() * unit,
        make_reliability=make_reliability,
    )


def debiased(rows: ProposedRows, budget: Budget, stream: Stream, info: EstimateInfo) -> SampledRows:
    """Randomised truncation: each row and replicate has a level of its own; rows of one level go together."""
    problem, replicates = rows.problem, budget.replicates
    drawn = _draw_levels(rows, budget, stream)
    spent = (budget.num_samples << drawn.level).view(*problem.shape, replicates).sum(-1)  # [N, M]
    info = replace(
        info,
        draws_per_row=float(spent.double().mean()) if spent.numel() else 0.0,
        draws_of_each_row=spent.view(problem.row_shape),
        effective_sample_size=drawn.effective_sample_size().view(problem.row_shape),
    )
    sampled = SampledRows(
        problem.in_units(drawn.means.mean(-2)),
        drawn.as_draws,
        Design(False),
        info,
        degrees_of_freedom=mixed_degrees_of_freedom(max(2, replicates)),
    )
    if replicates == 1:
        return sampled
    for_later = problem.for_later()
    return _with_error_bars(sampled, problem, lambda: drawn.std_error(for_later()))


@dataclass(frozen=True)
class _LevelledRows:
    """Draws of the rows (N, M) of a problem, of which each replicate has a level of its own.

    Parameters
    ----------
    num_samples : int
        S, the draws of level 0; level l has S 2^l.
    level : Tensor, int64, (N * M * R,)
    chunks : list of LevelDraws
        The draws, of some rows and replicates of one level each.
    means : Tensor, (N, M, R, d)
        The estimate of each replicate, in units of the problem's values.
    """

    num_samples: int
    level: Tensor
    chunks: list[LevelDraws]
    means: Tensor

    def effective_sample_size(self) -> Tensor:
        """(sum w)^2 / sum w^2 of each row, (N * M,)."""
        n, m, replicates, _ = self.means.shape
        square, sums = self.means.new_zeros(n * m), self.means.new_zeros(n * m)
        for x in self.chunks:
            square.index_add_(0, x.pair // replicates, x.weights.square().sum(-1))
            sums.index_add_(0, x.pair // replicates, x.weights.sum(-1))
        return sums.square() / square.clamp_min(torch.finfo(square.dtype).tiny)

    def std_error(self, problem: AttentionProblem) -> Tensor:
        """Standard errors of the rows, (N, M, d), in units of the values of the problem that was drawn."""
        n, m, replicates, width = self.means.shape
        predicted = self.means.new_zeros(2, n * m * replicates, width)
        spread, values = Spread(problem, True), problem.values.flatten(0, 1)
        for x in self.chunks:
            head, row = x.pair // (m * replicates), x.pair // replicates % m
            drawn = F.embedding(x.indices + head[:, None] * problem.num_keys, values)
            distance = functools.partial(spread.distance, head=head, row=row)
            predicted[:, x.pair] = torch.stack(x.predicted_variance(drawn, distance))
        variance = mixed_variance(self.means, *predicted.view(2, *self.means.shape).mean(-2))
        draws = self.num_samples * replicates
        rounding = rounding_variance(self.means.mean(-2), spread.size, draws, problem.v.dtype)
        return (variance + rounding).sqrt()

    def as_draws(self) -> Draws:
        """The draws of all rows, (N, M, R * most), as many as the highest level has; the rest weigh 0."""
        n, m, replicates, _ = self.means.shape
        most = self.num_samples << int(self.level.max()) if len(self.level) else self.num_samples
        indices = torch.zeros(n * m * replicates, most, dtype=torch.int64, device=self.level.device)
        weights = self.means.new_zeros(indices.shape)
        for x in self.chunks:
            size = x.indices.shape[1]
            indices[x.pair, :size], weights[x.pair, :size] = x.indices, x.weights / replicates
        shape = (n, m, replicates * most)
        return Draws(indices.view(shape), weights.view(shape), None, replicates)


def _draw_levels(rows: ProposedRows, budget: Budget, stream: Stream) -> _LevelledRows:
    """Draw a level for each row and replicate, and the keys of that level."""
    problem, num_samples, replicates = rows.problem, budget.num_samples, budget.replicates
    n, m = problem.shape
    u = stream.of_purpose(Purpose.LEVEL).uniform(replicates, 1)[..., 0]  # [N, L, R]
    u = u[:, problem.queries_of(slice(0, m))].flatten()
    level = ((1 - u).log() / math.log(LEVEL_RATIO)).long()  # P(level >= l) = ratio^l
    chunks: list[LevelDraws] = []
    means = problem.values.new_zeros(n * m * replicates, problem.width)
    replicate = torch.arange(replicates, device=u.device)
    for heads, part in rows.blocks(num_samples):
        log_q = rows.log_proposal(heads, part).flatten(0, 1)
        pair = (problem.row_numbers(heads, part)[:, None] * replicates + replicate).flatten()
        for depth in level[pair].unique().tolist():
            here = (level[pair] == depth).nonzero().squeeze(1)
            size = num_samples << depth
            step = max(1, BLOCK_ELEMENTS // max(log_q.shape[-1], size * problem.k.shape[-1]))
            for some in here.split(step):
                own_log_q = log_q[some // replicates]
                chunk = _draw_level(problem, own_log_q, pair[some], depth, budget, stream)
                chunks.append(chunk)
                means[pair[some]] = rows.average(pair[some] // replicates, chunk.indices, chunk.weights)
    return _LevelledRows(num_samples, level, chunks, means.view(n, m, replicates, problem.width))


def _draw_level(
    problem: AttentionProblem, log_q: Tensor, pair: Tensor, depth: int, budget: Budget, stream: Stream
) -> LevelDraws:
    """The draws of some rows and replicates (B,) of one level, from their proposals log_q (B, n)."""
    num_samples, m = budget.num_samples, problem.shape[1]
    size, mass = num_samples << depth, (1 - LEVEL_RATIO) * LEVEL_RATIO**depth
    row = pair // budget.replicates  # of the N * M
    position = problem.first_position + row % m % problem.length
    numbers = stream.of_single_rows(row // m, position, pair % budget.replicates).uniform(1, size)
    indices, total = invert(row_masses(log_q), numbers[:, 0, 0])
    drawn_log_q = log_q.gather(-1, indices)
    log_w = problem.logits_at(row, indices) - drawn_log_q
    weights = log_w.view(-1, 1 << depth, num_samples).softmax(-1).flatten(1) / (1 << depth)
    normalised = log_w.softmax(-1)
    if depth:
        halves = log_w.view(-1, 2, size // 2).softmax(-1).flatten(1)
        weights += (normalised - halves / 2) / mass
    for x in (weights, normalised):
        x.masked_fill_(total == 0, 0)
    return LevelDraws(pair, indices, weights, normalised, drawn_log_q.exp())


def adaptive(rows: ProposedRows, mean: int, independent: bool, stream: Stream) -> Tensor:
    """The self-normalised estimate (N, M, d) with `mean` draws a row on average (see `allocate`)."""
    problem, counts = rows.problem, allocate(rows, mean)
    output = problem.values.new_empty(*problem.shape, problem.width)
    most = int(counts.max()) if counts.numel() else 1
    for heads, part in rows.blocks(most):
        count = counts[heads, part, None]
        slot = torch.arange(most, device=count.device)
        here = stream.of_block(heads, problem.positions(part))
        u = here.uniform(1, most if independent else 1)[:, :, 0]
        points = u if independent else ((slot + u) / count).clamp_max(1 - 2**-53)
        indices, exact, log_q = rows.draw(heads, part, points)
        spare = slot >= count
        # Slots past a row's count get keys of their own, which no drawn key is counted with.
        apart = torch.where(spare, problem.num_keys + slot, indices)
        log_w = exact - log_inclusion(log_q, count, independent) - Draws(apart, exact).multiplicity().log()
        weights = log_w.masked_fill(spare, -torch.inf).softmax(-1).masked_fill(log_q == -torch.inf, 0)
        output[heads, part] = Draws(indices, weights).average(problem.values[heads])
    return output


def allocate(rows: ProposedRows, mean: int) -> Tensor:
    """The number of draws of each row, (N, M), int64, of mean at most `mean`.

    Proportional to sqrt(1 - sum_j q_j^2), the spread of values under q if all values are equally far apart:
    the allocation that minimises the sum of the rows' variances (Neyman 1934). At least 2, at most
    `MOST_DRAWS` means.
    """
    need = rows.problem.values.new_empty(rows.problem.shape)
    for heads, part in rows.blocks(1):
        collision = (2 * rows.log_proposal(heads, part)).exp().sum(-1)
        need[heads, part] = (1 - collision).clamp_min(0).sqrt()
    low, high = min(2, mean), MOST_DRAWS * mean
    few, many = 0.0, float(high / need.clamp_min(1e-6).amin()) if need.numel() else 0.0
    for _ in range(40):  # bisection: the mean grows with the factor
        middle = (few + many) / 2
        fits = bool((need * middle).clamp(low, high).mean(dtype=torch.float64) <= mean)
        few, many = (middle, many) if fits else (few, middle)
    return (need * few).clamp(low, high).long()
