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
    PRIOR_WEIGHT,
    Draws,
    EstimateInfo,
    mixed_degrees_of_freedom,
    reliability,
    rounding_variance,
)
from ..problem import AttentionProblem, log_sum_exp
from ..streams import Purpose, Stream
from .base import Budget, Design, SampledRows
from .inversion import invert, row_masses
from .inversion_sampler import InversionSampler
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
    cut = list(rows.blocks(total))
    for heads, part in cut:
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
    flat = Draws(indices, weights, p, replicates)
    effective = flat.effective_sample_size().view(problem.row_shape)
    info = replace(
        info,
        draws_per_row=total,
        effective_sample_size=effective,
        log_sum_exp="exact" if plain else "estimated",
    )

    for_later = problem.for_later()

    def measured() -> Tensor:
        std_error, later = torch.empty_like(output), for_later()
        spread = Spread(later, sampler.independent)
        for block in cut:
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
        make_log_sum_exp=lambda: normaliser,
    )
    if plain and replicates == 1:
        return sampled
    return _with_error_bars(sampled, problem, measured)


def _with_error_bars(
    sampled: SampledRows, problem: AttentionProblem, measure: Callable[[], Tensor]
) -> SampledRows:
    """The same estimate with standard errors, which `measure` gives in units of the values, (N, M, d), and
    their reliability, by the exact probabilities of all keys.
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
        return torch.where(seen, (variance / replicates).clamp_min(0) + rounding, 0)

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
        heads, rows = block
        logits = self.problem.logits(heads, rows)
        normaliser = log_sum_exp(logits)
        sinks = self.problem.row_sinks
        if sinks is not None:
            sinks = sinks.expand(self.problem.row_shape).reshape(self.problem.shape)[block]
            normaliser = torch.logaddexp(normaliser, sinks)
        p = (logits - normaliser[..., None]).exp().masked_fill(logits == -torch.inf, 0)
        n, width = p.shape[-1], self.problem.width
        distance = self.table[heads, :n, width:].sum(-1)[..., None]
        return ((draws[block].dense(n) - p).square() @ distance)[..., 0].sqrt()


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


def debiased(rows: ProposedRows, budget: Budget, stream: Stream, info: EstimateInfo) -> SampledRows:
    """Randomised truncation: each row and replicate has a level of its own; rows of one level go together."""
    problem, num_samples, replicates = rows.problem, budget.num_samples, budget.replicates
    n, m = problem.shape
    u = stream.of_purpose(Purpose.LEVEL).uniform(replicates, 1)[..., 0]  # [N, L, R]
    u = u[:, problem.queries_of(slice(0, m))].flatten()
    level = ((1 - u).log() / math.log(LEVEL_RATIO)).long()  # P(level >= l) = ratio^l
    chunks: list[LevelDraws] = []
    means = problem.values.new_zeros(n * m * replicates, problem.width)
    for heads, part in rows.blocks(num_samples):
        log_q = rows.log_proposal(heads, part).flatten(0, 1)
        pair = (
            problem.row_numbers(heads, part)[:, None] * replicates + torch.arange(replicates, device=u.device)
        ).flatten()
        for depth in level[pair].unique().tolist():
            size, mass = num_samples << depth, (1 - LEVEL_RATIO) * LEVEL_RATIO**depth
            here_pairs = (level[pair] == depth).nonzero().squeeze(1)
            step = max(1, BLOCK_ELEMENTS // max(log_q.shape[-1], size * problem.k.shape[-1]))
            for some in here_pairs.split(step):
                here = some // replicates  # row of the block
                which = pair[some] // replicates  # row of the N * M
                position = problem.first_position + which % m % problem.length
                numbers = stream.of_single_rows(which // m, position, pair[some] % replicates).uniform(
                    1, size
                )
                indices, total = invert(row_masses(log_q[here]), numbers[:, 0, 0])
                log_w, drawn_log_q = problem.logits_at(which, indices), log_q[here].gather(-1, indices)
                log_w = log_w - drawn_log_q
                w = log_w.view(-1, 1 << depth, num_samples).softmax(-1).flatten(1) / (1 << depth)
                normalised = log_w.softmax(-1)
                if depth:
                    halves = log_w.view(-1, 2, size // 2).softmax(-1).flatten(1)
                    w += (normalised - halves / 2) / mass
                for x in (w, normalised):
                    x.masked_fill_(total == 0, 0)
                chunks.append(LevelDraws(pair[some], indices, w, normalised, drawn_log_q.exp()))
                means[pair[some]] = rows.average(which, indices, w)
    means = means.view(n, m, replicates, means.shape[-1])
    spent = (num_samples << level).view(n, m, replicates).sum(-1)  # [N, M]
    square, sums = means.new_zeros(n * m), means.new_zeros(n * m)
    for x in chunks:
        square.index_add_(0, x.pair // replicates, x.weights.square().sum(-1))
        sums.index_add_(0, x.pair // replicates, x.weights.sum(-1))
    effective = sums.square() / square.clamp_min(torch.finfo(square.dtype).tiny)
    for_later = problem.for_later()

    def measured() -> Tensor:
        later, predicted = for_later(), means.new_zeros(2, n * m * replicates, means.shape[-1])
        spread, values = Spread(later, True), later.values.flatten(0, 1)
        for x in chunks:
            head, row = x.pair // (m * replicates), x.pair // replicates % m
            drawn = F.embedding(x.indices + head[:, None] * later.num_keys, values)
            distance = functools.partial(spread.distance, head=head, row=row)
            predicted[:, x.pair] = torch.stack(x.predicted_variance(drawn, distance))
        variance = mixed_variance(means, *predicted.view(2, *means.shape).mean(-2))
        rounding = rounding_variance(means.mean(-2), spread.size, num_samples * replicates, later.v.dtype)
        return (variance + rounding).sqrt()

    def make_draws() -> Draws:
        most = num_samples << int(level.max()) if len(level) else num_samples
        indices = torch.zeros(n * m * replicates, most, dtype=torch.int64, device=level.device)
        weights = square.new_zeros(indices.shape)
        for x in chunks:
            size = x.indices.shape[1]
            indices[x.pair, :size], weights[x.pair, :size] = x.indices, x.weights / replicates
        shape = (n, m, replicates * most)
        return Draws(indices.view(shape), weights.view(shape), None, replicates)

    info = replace(
        info,
        draws_per_row=float(spent.double().mean()) if n * m else 0.0,
        draws_of_each_row=spent.view(problem.row_shape),
        effective_sample_size=effective.view(problem.row_shape),
    )
    sampled = SampledRows(
        problem.in_units(means.mean(-2)),
        make_draws,
        Design(False),
        info,
        degrees_of_freedom=mixed_degrees_of_freedom(max(2, replicates)),
    )
    return sampled if replicates == 1 else _with_error_bars(sampled, problem, measured)


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
