"""Control variates in `sampled_attention`: the corrected output, and what remains of each draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..controls import Control, Folds, MultilevelControlVariate, make_control, regress
from ..controls.base import Prepared, control_ratios
from ..errors import ArgumentError
from ..estimates import ControlReport, Draws
from ..problem import FIRST_KNOWN, AttentionProblem
from ..samplers import SampledRows
from ..streams import Purpose, Stream

ControlVariate = str | Control | Sequence[str | Control] | MultilevelControlVariate


def make_controls(control_variate: ControlVariate) -> list[Control]:
    """The controls meant: one by name or object, several in a list or a `MultilevelControlVariate`.

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
    """What controls make of the draws of rows (N, M).

    With r_cs = trust_c p̂_c(j_s) / p(j_s), coefficients β and known sums μ_c, the corrected estimate is

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
    exact_rows : Tensor, bool, (M,)
        Where a control is the row itself, and the output exact.
    report : ControlReport
    """

    output: Tensor
    by_replicate: Tensor
    shares: Tensor
    means: Tensor
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
            exact_rows=self.exact_rows[rows[1]],
        )

    def applied(self, sampled: SampledRows, problem: AttentionProblem) -> SampledRows:
        """The corrected estimate, with a report and what was not done as asked."""
        report = self.report
        info = replace(sampled.info, control_variate=report)
        costly = [f"{name} {cost:,.0f}" for name, cost in report.costs.items() if cost >= report.exact_cost]
        if costly:
            info = info.with_fallbacks(
                f"Controls cost as much as the exact output, {report.exact_cost:,.0f} multiply-adds a query: "
                f"{', '.join(costly)}."
            )
        if problem.length * self.by_replicate.shape[2] == 1 and not bool(self.shares.any()):
            info = info.with_fallbacks(
                "Not corrected by control_variate: one row of one replicate leaves nothing to fit "
                "coefficients to."
            )
        return replace(sampled, output=problem.in_units(self.output), info=info, make_std_error=None)

    def moments(self, draws: Draws, a: Tensor, table: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """sum_s a_s (g_s - c) and sum_s a_s (g_s - c)^2, each (N, M, d).

        `table` (N, n, 2 d) holds v - c and (v - c)^2, `centre` (N, 1, d) is c.
        """
        shares, mu = self.shares, self.means - centre  # [C, N, M, T], [C, N, M, d]
        v, square = table.chunk(2, dim=-1)
        keep = 1 - shares.sum(0)
        held = torch.einsum("hmt,chmt->chm", a, shares)[..., None]
        pairs = torch.einsum("hmt,chmt,ehmt->cehm", a, shares, shares)
        first = draws.average(v, a * keep) + (held * mu).sum(0)
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

    Coefficients are those of `regress`, fitted for each control and query head to the head's rows and
    replicates: to earlier rows only in a causal problem.

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
            "control_variate needs the probabilities of the draws, which "
            f"sampler={sampled.info.sampler!r} does not know."
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
    fitted = _fit(problem, parts, controls, prepared, rows_are_independent)
    report = _report(problem, draws, controls, prepared, parts, fitted)
    return Correction(
        fitted.output,
        fitted.by_replicate,
        fitted.shares,
        parts.means,
        fitted.exact_rows,
        report,
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
    noise : Tensor, (C, N, M, R, d)
        The error of each control's estimate: see `control_noise`.
    means : Tensor, (C, N, M, d)
        Known sums of the controls.
    shares : Tensor, (C, N, M, R * S)
        r_cs of `Correction`.
    """

    estimates: Tensor
    noise: Tensor
    means: Tensor
    shares: Tensor


def _control_parts(
    problem: AttentionProblem,
    draws: Draws,
    prepared: Sequence[Prepared],
    variance_weights: Callable[[Tensor], Tensor] | None,
) -> _ControlParts:
    keys, values = problem.keys, problem.values
    total, r, width = draws.indices.shape[-1], draws.replicates, problem.width
    shape = (len(prepared), *problem.shape)
    means, shares = values.new_empty(*shape, width), values.new_empty(*shape, total)
    noise = values.new_empty(*shape, r, width)
    estimates = values.new_empty(*problem.shape, r, width)
    for heads, part in problem.blocks(16 * total):
        q, at, own = problem.queries[heads, part], problem.positions(part), draws[heads, part]
        estimates[heads, part] = r * own.average_by_replicate(values[heads])
        live = own.weights > 0
        for c, control in enumerate(prepared):
            w = control_ratios(
                control,
                q,
                at,
                keys[heads],
                own,
                scale=problem.scale,
                causal=problem.is_causal,
                variance_weights=variance_weights,
                heads=heads,
            )
            mean = control.sums(q, at, heads=heads)
            held = w.unflatten(-1, (r, total // r)).sum(-1, keepdim=True)
            noise[c, heads, part] = r * (
                own.average_by_replicate(values[heads], w) - held * mean[..., None, :]
            )
            means[c, heads, part] = mean
            shares[c, heads, part] = torch.where(live, w / own.weights.masked_fill(~live, 1), 0)
    return _ControlParts(estimates, noise, means, shares)


@dataclass(frozen=True)
class _Fitted:
    """A corrected estimate: `output`, `by_replicate`, `shares` and `exact_rows` of `Correction`, and the mean
    coefficients of query heads (H, C)."""

    output: Tensor
    by_replicate: Tensor
    shares: Tensor
    coefficients: Tensor
    exact_rows: Tensor


def _fit(
    problem: AttentionProblem,
    parts: _ControlParts,
    controls: Sequence[Control],
    prepared: Sequence[Prepared],
    rows_are_independent: bool,
) -> _Fitted:
    """Corrected by coefficients that are fitted to other draws than those that they correct."""
    (_, _, r, width), count = parts.estimates.shape, len(parts.noise)
    heads, length = problem.shape[0] * problem.group, problem.length
    estimates = parts.estimates.view(heads, length, r, width)
    noise = parts.noise.view(count, heads, length, r, width)
    means = parts.means.view(count, heads, length, width)
    known = _known_coefficients(problem, controls, prepared)  # [L, C]
    rows = ~known.any(1)  # those to fit; where a control is exact, it says nothing of the other rows
    folds = None
    if problem.is_causal:
        independent = rows_are_independent
        folds = Folds.of_earlier_rows(
            int(rows.sum()), r, rows_are_independent=independent, device=rows.device
        )
    fit = regress(estimates[:, rows], noise[:, :, rows], means.mean(0)[:, rows], folds=folds, largest=1.0)
    beta = known.to(noise)[:, None].repeat(heads, 1, r, 1)  # [H, L, R, C]
    beta[:, rows] = fit.coefficients[:, fit.folds.fold].to(beta)
    corrected = estimates - torch.einsum("lc,chlrd->hlrd", known.to(noise), noise)
    corrected[:, rows] = fit.by_replicate
    exact = torch.einsum("lc,chld->hld", known.to(means), means)
    output = torch.where(rows[:, None], corrected.mean(2), exact)
    draws = parts.shares.shape[-1] // r
    shares = parts.shares.view(count, heads, length, r, draws) * beta.movedim(-1, 0)[..., None]
    return _Fitted(
        output.view(*problem.shape, width),
        corrected.view(parts.estimates.shape),
        shares.view(parts.shares.shape),
        beta.double().sum((1, 2)) / max(1, length * r),
        ~rows.repeat(problem.group),
    )


def _known_coefficients(
    problem: AttentionProblem, controls: Sequence[Control], prepared: Sequence[Prepared]
) -> Tensor:
    """1 for the control that is the row itself, an oracle before others, else 0: bool, (L, C)."""
    positions = problem.positions(slice(0, problem.length))
    exact = torch.stack([control.exact_rows(positions) for control in prepared], -1)  # [L, C]
    oracle = torch.tensor([control.oracle for control in controls], device=exact.device)
    return F.one_hot((exact.int() + oracle).argmax(-1), len(controls)).bool() & exact


def _report(
    problem: AttentionProblem,
    draws: Draws,
    controls: Sequence[Control],
    prepared: Sequence[Prepared],
    parts: _ControlParts,
    fitted: _Fitted,
) -> ControlReport:
    lead, names, n = problem.row_shape[:-1], [c.name for c in controls], problem.num_keys
    heads, length, total = problem.shape[0] * problem.group, problem.length, draws.indices.shape[-1]

    def variance(x: Tensor) -> Tensor | None:
        """Of the output (..., H), from its replicates (N, M, R, d)."""
        if draws.replicates == 1 or not x.numel():
            return None
        spread = problem.in_units(x.var(2).sqrt()).square().sum(-1)
        return spread.view(heads, length).mean(1).view(lead) / draws.replicates

    return ControlReport(
        coefficients={name: fitted.coefficients[:, c].reshape(lead) for c, name in enumerate(names)},
        costs={name: p.cost(n) + total * p.cost_at() for name, p in zip(names, prepared, strict=True)},
        exact_cost=float(n * (problem.keys.shape[-1] + problem.width)),
        variance_before=variance(parts.estimates),
        variance_after=variance(fitted.by_replicate),
    )
