"""Control variates in `sampled_attention`: the corrected output, and what it leaves of each draw for the error bars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..controls import Control, MultilevelControlVariate, make_control, regress
from ..controls.base import control_ratios
from ..estimates import ControlReport, Draws
from ..problem import Rows, in_units

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

    With r_cs = trust_c p̂_c(j_s) / p(j_s), the coefficients β and the known sums μ_c, the corrected estimate is

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
    rows: Rows,
    keys: Tensor,
    values: Tensor,
    draws: Draws,
    controls: Sequence[Control],
    generator: torch.Generator | None,
    variance_weights: Callable[[Tensor], Tensor] | None,
    blocks: Iterable[tuple[slice, slice]],
) -> Correction:
    """Correct the estimate of `draws`, rows (N, M), of `keys` (N, n, E) and `values` (N, n, d) in the caller's order.

    Coefficients are those of `regress`, one a control and query head, fitted over its rows and replicates.
    `variance_weights` is the sampler's, None for independent draws.
    """
    n, total, r = rows.num_keys, draws.indices.shape[-1], draws.replicates
    count, length, width = rows.count * rows.group, rows.length, values.shape[-1]
    prepared = [
        c.prepare(keys, values, scale=rows.scale, causal=rows.is_causal, q=rows.q, generator=generator)
        for c in controls
    ]
    shape = (len(controls), rows.count, rows.rows)
    means, shares = values.new_empty(*shape, width), values.new_empty(*shape, total)
    noise = values.new_empty(*shape, r, width)
    estimates = values.new_empty(*shape[1:], r, width)
    for heads, part in blocks:
        q, at, own = rows.q[heads, part], rows.positions(part), draws[heads, part]
        estimates[heads, part] = r * own.average_by_replicate(values[heads])
        live = own.weights > 0
        for c, control in enumerate(prepared):
            w = control_ratios(
                control,
                q,
                at,
                keys[heads],
                own,
                scale=rows.scale,
                causal=rows.is_causal,
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
    oracle = next((i for i, c in enumerate(controls) if c.oracle), None)
    if oracle is None:
        fit = regress(
            estimates.view(count, length, r, width),
            noise.view(len(controls), count, length, r, width),
            means.mean(0).view(count, length, width),
            most=1.0,
        )
        coefficients = fit.coefficients.mean(1)  # [H, C]
        beta = fit.coefficients[:, fit.fold].to(values.dtype)  # [H, L, R, C]
        shares.view(len(controls), count, length, r, total // r).mul_(beta.movedim(-1, 0)[..., None])
        corrected = fit.by_replicate.view(estimates.shape)
        output = corrected.mean(2)
    else:
        shares *= torch.arange(len(controls)).eq(oracle).view(-1, 1, 1, 1)
        corrected, output = estimates - noise[oracle], means[oracle]
        coefficients = torch.arange(len(controls)).eq(oracle).double().expand(count, -1)
    lead, names = rows.row_shape[:-1], [c.name for c in controls]
    before = after = None
    if r > 1 and estimates.numel():
        before, after = (
            in_units(x.var(2).sqrt(), rows.unit).square().sum(-1).view(count, length).mean(1).view(lead) / r
            for x in (estimates, corrected)
        )
    report = ControlReport(
        coefficients={name: coefficients[:, c].reshape(lead) for c, name in enumerate(names)},
        costs={name: p.cost(n) + total * p.cost_at() for name, p in zip(names, prepared, strict=True)},
        exact_cost=float(n * (keys.shape[-1] + width)),
        variance_before=before,
        variance_after=after,
    )
    return Correction(output, corrected, shares, means, oracle is not None, report)
