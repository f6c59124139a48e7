"""Control variates in `sampled_attention`: the corrected output, and the corrected value of each draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..controls import (
    Control,
    Folds,
    MultilevelControlVariate,
    Prepared,
    RowVariance,
    make_control,
    mix_controls,
    regress,
    value_spread,
)
from ..errors import ArgumentError
from ..estimates import ControlReport, Draws
from ..problem import FIRST_KNOWN, AttentionProblem
from ..samplers import Design, SampledRows
from ..streams import Purpose, Stream

ControlVariate = str | Control | Sequence[str | Control] | MultilevelControlVariate


def make_controls(control_variate: ControlVariate) -> list[Control]:
    """The controls of an argument: one by name or object, several in a list or a `MultilevelControlVariate`.

    Raises
    ------
    ArgumentError, DtypeError
        If a name is unknown or comes twice, or an object cannot be prepared.
    """
    if isinstance(control_variate, MultilevelControlVariate):
        return control_variate.controls
    if isinstance(control_variate, list | tuple):
        return MultilevelControlVariate(control_variate).controls
    return [make_control(control_variate)]


@dataclass(frozen=True)
class Correction:
    """The draws of rows (N, M), corrected by controls.

    With r_cs = p̂_c(j_s) / p(j_s), coefficients β and known sums μ_c, the corrected estimate is

        z = sum_s weights_s g_s,        g_s = (1 - sum_c β_c r_cs) v_{j_s} + sum_c β_c r_cs μ_c.

    Parameters
    ----------
    output : Tensor, (N, M, d)
    by_replicate : Tensor, (N, M, R, d)
        The corrected estimate of each replicate; their mean is the output.
    shares : Tensor, (C, N, M, R * S)
        β_c r_cs.
    means : Tensor, (C, N, M, d)
        μ_c.
    unseen_share : Tensor, (N, M)
        The share of the variance that remains, on average, of keys that a row's draws are likely to miss.
    exact_rows : Tensor, bool, (M,)
        Where a control is the row itself, and the output exact.
    report : ControlReport
    """

    output: Tensor
    by_replicate: Tensor
    shares: Tensor
    means: Tensor
    unseen_share: Tensor
    exact_rows: Tensor
    report: ControlReport

    def __getitem__(self, rows: tuple[slice, slice]) -> Correction:
        """The correction of some rows."""
        return replace(
            self,
            output=self.output[rows],
            by_replicate=self.by_replicate[rows],
            shares=self.shares[:, *rows],
            means=self.means[:, *rows],
            unseen_share=self.unseen_share[rows],
            exact_rows=self.exact_rows[rows[1]],
        )

    def applied(self, sampled: SampledRows, problem: AttentionProblem) -> SampledRows:
        """The corrected estimate, with a report; controls as costly as the exact output are a fallback."""
        report = self.report
        info = replace(sampled.info, control_variate=report)
        costly = [f"{name} {cost:,.0f}" for name, cost in report.costs.items() if cost >= report.exact_cost]
        if costly:
            info = info.with_fallbacks(
                f"Controls cost as much as the exact output, {report.exact_cost:,.0f} multiply-adds a query: "
                f"{', '.join(costly)}."
            )
        return replace(
            sampled,
            output=problem.in_units(self.output),
            info=info,
            make_std_error=None,
            make_reliability=None,
        )

    def moments(self, draws: Draws, a: Tensor, table: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """sum_s a_s (g_s - c) and sum_s a_s (g_s - c)^2, each (N, M, d).

        `table` (N, n, 2 d) holds v - c and (v - c)^2, `centre` (N, 1, d) is c.
        """
        shares, mu = self.shares, self.means - centre  # [C, N, M, T], [C, N, M, d]
        v, square = table.chunk(2, dim=-1)
        keep = 1 - shares.sum(0)
        control_weight = torch.einsum("hmt,chmt->chm", a, shares)[..., None]
        pairs = torch.einsum("hmt,chmt,ehmt->cehm", a, shares, shares)
        first = draws.average(v, a * keep) + (control_weight * mu).sum(0)
        second = draws.average(square, a * keep.square()) + torch.einsum("cehm,chmd,ehmd->hmd", pairs, mu, mu)
        for share, mean in zip(shares, mu, strict=True):  # over controls, a handful
            second += 2 * mean * draws.average(v, a * keep * share)
        return first, second


def correct(
    problem: AttentionProblem,
    sampled: SampledRows,
    controls: Sequence[Control],
    seed: Tensor,
    *,
    rows_are_independent: bool = True,
) -> Correction:
    """Correct the estimate that a sampler gave of the rows of a problem.

    Each row mixes the controls by weights that follow from its probabilities (`row_weights`), not from its
    draws. Where draws are independent, that is all, and a corrected row does not depend on the rows beside
    it. Other draws lie more evenly than the weights assume, so the mixture then gets a coefficient below 1
    where `regress` finds one beyond doubt, in the other rows and replicates of the query head: in earlier
    rows only in a causal problem. Draws in value order and those that rows share, whose noise may be less
    than what a control brings, are corrected only where `regress` finds beyond doubt that this helps.

    Parameters
    ----------
    problem : AttentionProblem
    sampled : SampledRows
        Of that problem.
    controls : sequence of Control
    seed : Tensor, int64, ()
        Of the random features of controls.
    rows_are_independent : bool
        Whether the draws of different rows of a head are independent of each other.

    Raises
    ------
    ArgumentError
        If the sampler does not know the probabilities of its draws.
    """
    draws = sampled.make_draws()
    if draws.probabilities is None:
        raise ArgumentError(
            f"control_variate needs the probabilities of the draws, which sampler={sampled.info.sampler!r} "
            "does not know."
        )
    queries = _queries_to_fit(problem)
    prepared = [
        control.prepare(
            problem.keys,
            problem.values,
            scale=problem.scale,
            causal=problem.is_causal,
            q=queries,
            generator=_feature_generator(problem, seed),
        )
        for control in controls
    ]
    parts = _control_parts(problem, draws, prepared, sampled.design.variance_weights)
    coefficients = _coefficients(problem, parts, sampled.design, rows_are_independent)
    by_replicate = parts.estimates - coefficients[..., None] * parts.noise
    exact = parts.exact_rows
    output = by_replicate.mean(2)
    if bool(exact.any()):
        output = torch.where(exact[:, None], (parts.weights[..., None] * parts.means).sum(0), output)
    each = coefficients.repeat_interleave(draws.indices.shape[-1] // draws.replicates, -1)  # [N, M, R * S]
    mean = coefficients.mean(-1)
    return Correction(
        output,
        by_replicate,
        parts.ratios * parts.weights[..., None] * each,
        parts.means,
        (1 - 2 * mean * parts.unseen[0] + mean.square() * parts.unseen[1]).clamp_min(0),
        exact,
        _report(problem, draws, controls, prepared, parts, coefficients, by_replicate),
    )


def _queries_to_fit(problem: AttentionProblem) -> Tensor:
    """The queries that controls may tune themselves to, (N, queries, E).

    In a causal problem these are the queries that every row knows which sees `FIRST_KNOWN` keys.
    """
    if not problem.is_causal:
        return problem.queries
    known = max(1, FIRST_KNOWN - problem.first_position)
    return problem.queries.unflatten(1, (problem.group, problem.length))[:, :, :known].flatten(1, 2)


def _feature_generator(problem: AttentionProblem, seed: Tensor) -> torch.Generator:
    """The source of a control's random features: the same for every sequence and head."""
    stream = Stream.of(seed, 1, 1, 1).of_purpose(Purpose.FEATURES)
    return torch.Generator(problem.q.device).manual_seed(int(stream.uniform(1, 1).item() * 2**53))


@dataclass(frozen=True)
class _ControlParts:
    """What controls say about the draws of rows (N, M).

    Parameters
    ----------
    estimates : Tensor, (N, M, R, d)
        The uncorrected estimate of each replicate.
    noise : Tensor, (N, M, R, d)
        The error of the mixture of controls: see `MixedControls.noise`.
    weights : Tensor, (C, N, M)
        Of the controls in the mixture.
    means : Tensor, (C, N, M, d)
        Known sums of the controls.
    ratios : Tensor, (C, N, M, R * S)
        p̂ / p of each control and draw.
    unseen : Tensor, (2, N, M)
        See `MixedControls`.
    exact_rows : Tensor, bool, (M,)
        Where a control is the row itself.
    """

    estimates: Tensor
    noise: Tensor
    weights: Tensor
    means: Tensor
    ratios: Tensor
    unseen: Tensor
    exact_rows: Tensor


def _control_parts(
    problem: AttentionProblem,
    draws: Draws,
    prepared: Sequence[Prepared],
    variance_weights: Callable[[Tensor], Tensor] | None,
) -> _ControlParts:
    values, shape, count = problem.values, problem.shape, len(prepared)
    total, r, width = draws.indices.shape[-1], draws.replicates, problem.width
    estimates, noise = values.new_empty(2, *shape, r, width)
    weights, unseen = values.new_empty(count, *shape), values.new_empty(2, *shape)
    means, ratios = values.new_empty(count, *shape, width), values.new_empty(count, *shape, total)
    spread = value_spread(values)
    for heads, rows in problem.blocks(max(16 * total, (count + 2) * problem.num_keys // 2)):
        block, own = (heads, rows), draws[heads, rows]
        log_p = problem.logits(heads, rows).log_softmax(-1)
        variance = RowVariance(log_p, spread[heads, : log_p.shape[-1]], variance_weights)
        q, positions = problem.queries[heads, rows], problem.positions(rows)
        mixed = mix_controls(prepared, q, positions, own, variance, heads=heads)
        estimates[block] = r * own.average_by_replicate(values[heads])
        noise[block] = mixed.noise(own, values[heads])
        weights[:, *block], unseen[:, *block] = mixed.weights, mixed.unseen
        means[:, *block], ratios[:, *block] = mixed.means, mixed.ratios
    positions = problem.positions(slice(0, shape[1]))
    exact = torch.stack([x.exact_rows(positions) for x in prepared]).any(0)
    return _ControlParts(estimates, noise, weights, means, ratios, unseen, exact)


def _coefficients(
    problem: AttentionProblem, parts: _ControlParts, design: Design, rows_are_independent: bool
) -> Tensor:
    """The coefficient of the mixture in each row and replicate, (N, M, R); 1 where draws are independent."""
    n, m, r, width = parts.noise.shape
    ones = parts.noise.new_ones(n, m, r)
    if design.independent:
        return ones
    heads, length = n * problem.group, problem.length
    rows = ~parts.exact_rows[:length]  # those to fit; exact ones say nothing of the others
    estimates, noise = (x.view(heads, length, r, width)[:, rows] for x in (parts.estimates, parts.noise))
    share = parts.weights / parts.weights.sum(0).clamp_min(torch.finfo(ones.dtype).tiny)
    centre = (share[..., None] * parts.means).sum(0).view(heads, length, width)[:, rows]
    folds = None
    if problem.is_causal:
        folds = Folds.of_earlier_rows(
            int(rows.sum()), r, rows_are_independent=rows_are_independent, device=rows.device
        )
    # Value order may leave less noise than a control brings: 0 then, unless the control helps beyond doubt.
    # Else it is 1 unless another is better beyond doubt: what is fitted is how far it is from 1.
    default = 0 if design.in_order or not rows_are_independent else 1
    fit = regress(estimates - default * noise, noise[None], centre, folds=folds, largest=1.0)
    fitted = (default + fit.coefficients[..., 0]).clamp_max(1)  # [H, F]
    coefficients = ones.view(heads, length, r)
    coefficients[:, rows] = fitted[:, fit.folds.fold].to(ones)
    return coefficients.view(n, m, r)


def _report(
    problem: AttentionProblem,
    draws: Draws,
    controls: Sequence[Control],
    prepared: Sequence[Prepared],
    parts: _ControlParts,
    coefficients: Tensor,
    by_replicate: Tensor,
) -> ControlReport:
    lead, names, n = problem.row_shape[:-1], [c.name for c in controls], problem.num_keys
    heads, length, total = problem.shape[0] * problem.group, problem.length, draws.indices.shape[-1]

    def variance(x: Tensor) -> Tensor | None:
        """The variance of the output, (..., H), from its replicates (N, M, R, d)."""
        if draws.replicates == 1 or not x.numel():
            return None
        spread = problem.in_units(x.var(2).sqrt()).square().sum(-1)
        return spread.view(heads, length).mean(1).view(lead) / draws.replicates

    used = (parts.weights * coefficients.mean(-1)).double().view(len(names), heads, length)
    mean = used.sum(-1) / max(1, length)  # [C, H]
    return ControlReport(
        coefficients={name: x.reshape(lead) for name, x in zip(names, mean, strict=True)},
        costs={name: p.cost(n) + total * p.cost_at() for name, p in zip(names, prepared, strict=True)},
        exact_cost=float(n * (problem.keys.shape[-1] + problem.width)),
        variance_before=variance(parts.estimates),
        variance_after=variance(by_replicate),
    )
