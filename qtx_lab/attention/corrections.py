"""Control variates in `sampled_attention`: the corrected output, and what it leaves of each draw for the
error bars.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..controls import Control, MultilevelControlVariate, make_control, regress
from ..controls.base import Prepared, control_ratios
from ..errors import ArgumentError
from ..estimates import ControlReport, Draws
from ..problem import AttentionProblem
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
    return [make_control(control_variate)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Correction:
    """What controls make of the draws of rows (N, M).

    With r_cs = trust_c p̂_c(j_s) / p(j_s), the coefficients β and the known sums μ_c, the corrected estimate
    is

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
    oracle : bool
        Whether a control is the target itself, and the output exact.
    report : ControlReport
    """

    output: Tensor
    by_replicate: Tensor
    shares: Tensor
    means: Tensor
    oracle: bool
    report: ControlReport

    def __getitem__(self, rows: tuple[slice, slice]) -> Correction:
        """The correction of some rows."""
        return replace(
            self,
            output=self.output[rows],
            by_replicate=self.by_replicate[rows],
            shares=self.shares[:, *rows],
            means=self.means[:, *rows],
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
        if problem.length * self.by_replicate.shape[2] == 1 and not self.oracle:
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
    problem: AttentionProblem, sampled: SampledRows, controls: Sequence[Control], seed: Tensor
) -> Correction:
    """Correct the estimate that a sampler made of the rows of a problem.

    Coefficients are those of `regress`, one a control and query head, fitted over its rows and replicates.

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
    prepared = [
        control.prepare(
            problem.keys,
            problem.values,
            scale=problem.scale,
            causal=problem.is_causal,
            q=problem.queries,
            generator=_feature_generator(problem, seed),
        )
        for control in controls
    ]
    parts = _control_parts(problem, draws, prepared, sampled.design.variance_weights)
    oracle = next((i for i, control in enumerate(controls) if control.oracle), None)
    fitted = _regressed(problem, parts) if oracle is None else _oracle(problem, parts, oracle)
    report = _report(problem, draws, controls, prepared, parts, fitted)
    return Correction(
        fitted.output, fitted.by_replicate, fitted.shares, parts.means, oracle is not None, report
    )


def _feature_generator(problem: AttentionProblem, seed: Tensor) -> torch.Generator:
    """The source of a control's random features: the same for every sequence and head."""
    stream = Stream.of(seed, 1, 1, 1).of_purpose(Purpose.FEATURES)
    return torch.Generator(problem.q.device).manual_seed(int(stream.uniform(1, 1).item() * 2**53))


@dataclass(frozen=True)
class _ControlParts:
    """What controls say about the draws of rows (N, M): estimates (N, M, R, d), noise (C, N, M, R, d), means
    (C, N, M, d)
    and r_cs of `Correction` (C, N, M, R * S)."""

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
    """A corrected estimate: output (N, M, d), by replicate (N, M, R, d), β_c r_cs (C, N, M, R * S),
    coefficients (H, C).
    """

    output: Tensor
    by_replicate: Tensor
    shares: Tensor
    coefficients: Tensor


def _regressed(problem: AttentionProblem, parts: _ControlParts) -> _Fitted:
    """Corrected by coefficients that are fitted to other draws than those that they correct."""
    (_, _, r, width), controls = parts.estimates.shape, len(parts.noise)
    heads, length = problem.shape[0] * problem.group, problem.length
    fit = regress(
        parts.estimates.view(heads, length, r, width),
        parts.noise.view(controls, heads, length, r, width),
        parts.means.mean(0).view(heads, length, width),
        most=1.0,
    )
    beta = fit.coefficients[:, fit.fold].to(parts.shares.dtype)  # [H, L, R, C]
    shares = (
        parts.shares.view(controls, heads, length, r, parts.shares.shape[-1] // r)
        * beta.movedim(-1, 0)[..., None]
    )
    corrected = fit.by_replicate.view(parts.estimates.shape)
    return _Fitted(corrected.mean(2), corrected, shares.view(parts.shares.shape), fit.coefficients.mean(1))


def _oracle(problem: AttentionProblem, parts: _ControlParts, oracle: int) -> _Fitted:
    """Corrected by the control that is the target itself, with coefficient 1."""
    only = torch.arange(len(parts.noise), device=parts.noise.device).eq(oracle)
    coefficients = only.double().expand(problem.shape[0] * problem.group, -1)
    corrected = parts.estimates - parts.noise[oracle]
    return _Fitted(parts.means[oracle], corrected, parts.shares * only.view(-1, 1, 1, 1), coefficients)


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
