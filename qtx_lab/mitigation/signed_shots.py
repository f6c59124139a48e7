"""Estimates of rows from shots with signs, which count as gamma or -gamma."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import special
from torch import Tensor

from .projection import project_to_simplex, sum_by_key
from .readout import laplace_variance, undo_readout
from .results import MitigatedRows

LOW_MASS = 0.5
"""Rows whose signed shares sum to less are reported."""

MIN_SIGNAL = 2.0
"""Least sum of a row's signed shares, in its standard errors, for which the row is estimated."""


def combine_signed(
    p: Tensor, counts: Tensor, gamma: float, keys: Tensor, errors: Tensor | None = None
) -> MitigatedRows:
    """Estimate rows from the counts of shots with signs, for each of which Paulis were drawn.

    Parameters
    ----------
    p : Tensor, (R, n)
        The rows that were measured; only which keys are masked is used.
    counts : Tensor, (R, 2 * V)
        How often the register had each of its V values in shots that count as gamma, and then in those that
        count as -gamma.
    gamma : float
    keys : Tensor, int64, (V,)
        Key of each value, -1 for no key.
    errors : Tensor, (bits, 2, 2), optional
        Readout errors to be undone.

    Returns
    -------
    MitigatedRows
        A row whose signed shares nearly cancel has estimate 0 and standard error NaN, and a fallback says so.
    """
    n, support = p.shape[-1], (p > 0).double()
    shots = counts.sum(-1, keepdim=True).double()
    plus, minus = (counts.double() / shots).view(len(p), 2, -1).unbind(1)
    values = torch.eye(plus.shape[-1], dtype=torch.float64)
    if errors is not None:
        values = undo_readout(values, errors)
    # What a shot that reads value v adds to key k of a row without a mask, [V, n].
    adds = sum_by_key(values, keys, torch.ones(len(values), n, dtype=torch.bool))
    by_key = gamma * (plus - minus) @ adds * support
    mass = by_key.sum(-1, keepdim=True)
    share, adds_mass = plus + minus, support @ adds.mT  # [R, V]: what a shot adds to the row's mass
    square_of_mass = (share * adds_mass.square()).sum(-1, keepdim=True)
    known = mass > MIN_SIGNAL * ((gamma**2 * square_of_mass - mass.square()) / shots).clamp_min(0).sqrt()
    signed_mass, mass = mass[:, 0], mass.where(known, torch.ones_like(mass))
    estimate = by_key / mass
    # The variance of a ratio, as in `combine_instances`: the mean over the shots of
    # gamma² (adds_k - estimate_k adds_mass)².
    square = share @ adds.square() - 2 * estimate * ((share * adds_mass) @ adds)
    beyond = gamma**2 * (square + estimate.square() * square_of_mass).clamp_min(0)
    spread = gamma * (estimate + 1 / n)
    variance = beyond / shots + (spread / shots).square()
    return _signed_rows(_Signed(estimate, variance, mass, known, signed_mass), shots, gamma, p > 0)


def combine_instances(
    p: Tensor, counts: Tensor, signs: Tensor, keys: Tensor, errors: Tensor | None = None
) -> MitigatedRows:
    """Estimate rows from counts of circuits with drawn Paulis, several instances for each row.

    Parameters
    ----------
    p : Tensor, (R, n)
        The rows that were measured; only which keys are masked is used.
    counts : Tensor, (R instances, V)
        How often the register had each value, the instances of a row one after the other.
    signs : Tensor, float64, (R instances,)
        What a shot of each instance counts as: gamma or -gamma.
    keys : Tensor, int64, (V,)
        Key of each value, -1 for no key.
    errors : Tensor, (bits, 2, 2), optional
        Readout errors to be undone.

    Returns
    -------
    MitigatedRows
        As of `combine_signed`.
    """
    rows, support = len(p), p > 0
    instances = len(counts) // rows
    shares = counts.double() / counts.sum(-1, keepdim=True)
    if errors is not None:
        shares = undo_readout(shares, errors)
    by_key = sum_by_key(signs[:, None] * shares, keys, support.repeat_interleave(instances, 0))
    by_key = by_key.view(rows, instances, -1)
    masses = by_key.sum(-1, keepdim=True)  # [R, instances, 1]
    mass = masses.mean(1)
    known = mass > MIN_SIGNAL * masses.std(1) / instances**0.5
    signed_mass, mass = mass[:, 0], mass.where(known, torch.ones_like(mass))
    estimate = by_key.mean(1) / mass
    # The variance of a ratio: what each instance has beyond its share of the mass, which varies with the
    # signs. Laplace's rule, as for plain counts, for what few instances and few shots do not show: one
    # more instance whose Paulis, with the other sign, spread it over all keys, and one more shot for and
    # against each key.
    beyond = by_key - estimate[:, None] * masses
    gamma = float(signs.abs().max())
    spread = gamma * (estimate + 1 / p.shape[-1])
    variance = (beyond.square().sum(1) + spread.square()) / (instances * (instances - 1))
    # Student's t for few instances: 1.96 standard errors are a 95 % interval.
    few = float(special.stdtrit(instances - 1, 0.975) / special.ndtri(0.975))
    shots = counts.view(rows, instances, -1).sum((1, 2))[:, None].double()
    return _signed_rows(_Signed(estimate, variance, mass, known, signed_mass), shots, gamma, support, few)


@dataclass(frozen=True, eq=False)
class _Signed:
    """Rows (R, n) from signed shots: estimates and their variances, both of which are still to be finished.

    The mass (R, 1) is that by which rows are divided, 1 where nothing is known of them; `signed_mass` (R,) is
    what was measured.
    """

    estimate: Tensor
    variance: Tensor
    mass: Tensor
    known: Tensor
    signed_mass: Tensor


def _signed_rows(
    rows: _Signed, shots: Tensor, gamma: float, support: Tensor, few: float = 1.0
) -> MitigatedRows:
    """Project estimates, count what few shots (R, 1) do not show, and say of which rows little is known."""
    fallbacks: tuple[str, ...] = ()
    known, count = rows.known, len(rows.known)
    if not bool(known.all()):
        fallbacks = (
            f"The signed shots of {int((~known).sum())} of {count} rows cancel to within {MIN_SIGNAL:g} "
            "standard errors: their weights are 0. Use more shots or another mitigation.",
        )
    low = int((known & (rows.mass < LOW_MASS)).sum())
    if low:
        fallbacks += (
            f"The signed shots of {low} of {count} rows sum to less than {LOW_MASS:g} and not to about 1: "
            "their weights are badly known. Use more shots or another mitigation.",
        )
    unseen = gamma**2 * laplace_variance(shots * rows.estimate.clamp(0, 1), shots)
    std_error = few * torch.maximum(rows.variance, unseen).sqrt() / rows.mass
    return MitigatedRows(
        project_to_simplex(rows.estimate, support).where(known, 0),
        std_error.where(known, torch.nan),
        fallbacks,
        rows.signed_mass,
    )
