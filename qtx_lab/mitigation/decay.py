"""Zero-noise inference that learns from all rows how fast each parity of the measured bits decays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_flags
from ..circuits.base import walsh_hadamard
from ..errors import ArgumentError, ShapeError
from .inference import ZeroNoiseEstimate, ZeroNoiseInference, as_values
from .zne import ZeroNoiseExtrapolation

MIN_SURVIVAL, MAX_SURVIVAL = 0.05, 1.0
"""Limits of the share of a parity that is left at the second level."""

LEAST_ROWS = 5
"""Rows from which the noise of the decays is estimated."""

JACKKNIFE_GROUPS = 16
"""Most groups of rows that are left out in turn."""


class SharedDecay(ZeroNoiseInference):
    """Infers what one circuit would measure with many different angles, if there were no noise.

    Under Pauli noise the parity <Z_S> of a set S of measured bits decays exponentially with the noise,
    towards a value that relaxation gives it. How fast depends on the circuit and hardly on its angles. So the
    decay of each parity is learned by a regression over all rows, of the values at the second level on those
    at the first, less the variance that shots add there. It is then undone in each row. The second level has
    to say little about a single row, and the large error bars of an extrapolation row by row are avoided.
    What differs between rows stays as bias. With `corrected`, the Richardson extrapolation of each row is
    used instead, less the error that it makes on the shared exponential.

    The method is our own and has no paper. It uses the Fourier analysis of Pauli noise of Flammia and
    Wallman, Efficient estimation of Pauli channels (2020).

    Parameters
    ----------
    noise_levels : sequence of float
        Levels as for `ZeroNoiseExtrapolation`. Decays are learned from the two lowest.
    corrected : bool
        Whether to correct the Richardson extrapolation of each row.

    Raises
    ------
    ArgumentError, DtypeError
        If levels are negative, equal, not finite or fewer than two.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> p = torch.randn(9, 4, generator=g, dtype=torch.float64).softmax(-1)
    >>> noisy = [0.25 + (p - 0.25) * 0.9**x for x in (1, 3)]
    >>> bool((SharedDecay([1, 3]).extrapolate(noisy).output - p).abs().max() < 1e-9)
    True
    """

    def __init__(self, noise_levels: Sequence[float] = (1.0, 5.0), *, corrected: bool = False):
        self._richardson = ZeroNoiseExtrapolation(noise_levels, "richardson")
        check_flags(corrected=corrected)
        levels = self._richardson.noise_levels
        if len(set(levels)) < len(levels):
            raise ArgumentError(f"noise_levels={list(levels)} holds a level twice; all of them must differ.")
        self.noise_levels, self.corrected = self._richardson.noise_levels, corrected
        self.method = "corrected decay" if corrected else "shared decay"

    def __repr__(self) -> str:
        return f"SharedDecay({list(self.noise_levels)}, corrected={self.corrected})"

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make it again, and its kind; see `ZeroNoiseInference.settings`."""
        return {"kind": "shared decay", "noise_levels": list(self.noise_levels), "corrected": self.corrected}

    def allocate(self, shots: int, spread: Sequence[float] | None = None) -> list[int]:
        """Spread `shots` as for Richardson extrapolation; see `ZeroNoiseInference.allocate`.

        Without `corrected` only the two lowest levels are used: any other gets a single shot.
        """
        if self.corrected or len(self.noise_levels) == 2:
            return self._richardson.allocate(shots, spread)
        order = np.argsort(self.noise_levels)
        each = np.ones(len(order), dtype=int)
        near_and_far = ZeroNoiseExtrapolation([self.noise_levels[i] for i in order[:2]], "richardson")
        used_spread = None if spread is None else [spread[i] for i in order[:2]]
        each[order[:2]] = near_and_far.allocate(shots - len(order) + 2, used_spread)
        return [int(n) for n in each]

    def extrapolate(
        self,
        values: Sequence[Tensor] | Tensor,
        std_errors: Sequence[Tensor] | Tensor | None = None,
        *,
        levels: Sequence[float] | None = None,
    ) -> ZeroNoiseEstimate:
        """Estimate the distributions at noise 0.

        Parameters
        ----------
        values : Tensor, float64, (levels, R, 2^bits), or sequence of Tensor, (R, 2^bits)
            Shares of the register's values at each level, in the order of `noise_levels`.
        std_errors : same as values, optional
            Standard errors of the values; 0 if None.
        levels : sequence of float, optional
            The levels that were attained, if they differ from `noise_levels`.

        Returns
        -------
        ZeroNoiseEstimate
            Its standard errors hold the noise of each row's shots and that of the decays, which is found by
            leaving out groups of rows (the jackknife) where there are five rows or more. What the decays of
            rows differ by is a bias that they do not hold.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            As `ZeroNoiseExtrapolation.extrapolate`; also if values are not rows of 2^bits numbers.
        """
        richardson = self._richardson.extrapolate(values, std_errors, levels=levels)
        values = [as_values("values", x) for x in values]
        std_errors = None if std_errors is None else [as_values("std_errors", x) for x in std_errors]
        n = values[0].shape[-1] if values[0].ndim else 0
        if values[0].ndim != 2 or n & (n - 1):
            raise ShapeError(
                f"values has shape {tuple(values[0].shape)}; it must be (R, 2^bits) at each level."
            )
        attained = self.noise_levels if levels is None else levels
        order = sorted(range(len(attained)), key=lambda level: attained[level])
        x = [float(attained[level]) for level in order]
        shares = [values[level] for level in order]
        errors = None if std_errors is None else [std_errors[level] for level in order]
        near, far = (
            walsh_hadamard(shares[0]),
            walsh_hadamard(shares[1]),
        )  # parities at the two lowest, [R, 2^bits]
        # Shots add this much to the sum of a squared parity over all rows.
        shot_variance = 0.0 if errors is None else float(errors[0].square().sum())

        def undo(decay: _Decay) -> _Undone:
            if self.corrected:
                return _correct_extrapolation(decay, near, richardson, richardson.weights[order], x)
            return _undo_decay(decay, near, x)

        undone = undo(_shared_decay(near, far, shot_variance))
        output = walsh_hadamard(undone.parity) / n
        if errors is None:
            return ZeroNoiseEstimate(output, None, richardson.weights)
        # A factor for each parity is a convolution over the register's values; its square maps variances to
        # variances.
        without = [
            walsh_hadamard(
                undo(_shared_decay(near[left], far[left], shot_variance * len(left) / len(near))).parity
            )
            / n
            for left in _without_groups(len(near))
        ]
        variance = torch.zeros_like(output)
        if without:
            variance += (len(without) - 1) * torch.stack(without).var(0, correction=0)
        for slope, error in zip(undone.slopes, errors, strict=True):
            kernel = (walsh_hadamard(slope[None]) / n).square()
            variance += walsh_hadamard(walsh_hadamard(kernel) * walsh_hadamard(error.square())) / n
        return ZeroNoiseEstimate(output, variance.clamp_min(0).sqrt(), richardson.weights)


def _without_groups(rows: int) -> list[Tensor]:
    """The rows that are left when each of up to `JACKKNIFE_GROUPS` groups is left out; none for few rows."""
    if rows < LEAST_ROWS:
        return []
    groups = torch.arange(rows) % min(rows, JACKKNIFE_GROUPS)
    return [(groups != group).nonzero()[:, 0] for group in groups.unique()]


@dataclass(frozen=True, eq=False)
class _Decay:
    """How parities decay from the first level to the second: far = survival near + offset, (2^bits,) each."""

    survival: Tensor
    offset: Tensor

    def rate(self, x: Sequence[float]) -> Tensor:
        """Decay rate per level, given the two lowest levels x."""
        return -self.survival.log() / (x[1] - x[0])


@dataclass(frozen=True, eq=False)
class _Undone:
    """Parities at noise 0, (R, 2^bits), and their derivatives by those at each level, (2^bits,) each."""

    parity: Tensor
    slopes: list[Tensor]


def _undo_decay(decay: _Decay, near: Tensor, x: Sequence[float]) -> _Undone:
    """Undo the decay from level 0 to the lowest level; it goes towards offset / (1 - survival)."""
    rate = decay.rate(x)
    growth = (rate * x[0]).exp()
    shift = torch.where(rate == 0, -x[0] / (x[1] - x[0]), (1 - growth) / (1 - decay.survival))
    return _Undone(near * growth + decay.offset * shift, [growth, *[torch.zeros_like(growth)] * (len(x) - 1)])


def _correct_extrapolation(
    decay: _Decay, near: Tensor, richardson: ZeroNoiseEstimate, weights: Tensor, x: Sequence[float]
) -> _Undone:
    """Add to the extrapolation of each row what it misses on the shared exponential."""
    rate = decay.rate(x)
    growth = (rate * x[0]).exp()
    levels = torch.tensor(x, dtype=torch.float64)
    missed = 1 - (weights[:, None] * (-rate * levels[:, None]).exp()).sum(0)
    limit = decay.offset / (1 - decay.survival).clamp_min(1e-9)
    parity = walsh_hadamard(richardson.output.double()) + missed * (near - limit) * growth
    return _Undone(parity, [w + missed * growth * (level == 0) for level, w in enumerate(weights)])


def _shared_decay(near: Tensor, far: Tensor, shot_variance: float) -> _Decay:
    """Learn the decay of each parity by regression with an intercept over rows of parities, (R, 2^bits).

    The regression is drawn towards the mean survival of all parities where the rows say little: if they are
    few, or all the same, or lost in the noise of their shots.

    Parameters
    ----------
    near, far : Tensor, (R, 2^bits)
        Parities at the lowest and at the second level.
    shot_variance : float
        What shots add to the sum of a squared parity over all rows.
    """
    rows = len(near)
    signal = float((near.square().sum(0) - shot_variance)[1:].sum())
    # Without any parity, `signal` has a standard deviation of shot_variance sqrt(2 n / rows).
    significant = signal > 4 * shot_variance * (2 * near.shape[1] / rows) ** 0.5
    prior = float((near * far)[:, 1:].sum()) / signal if significant else 1.0
    prior = min(max(prior, MIN_SURVIVAL), MAX_SURVIVAL)
    spread = (near - near.mean(0)).square().sum(0) - shot_variance * (1 - 1 / rows)
    covariance = ((near - near.mean(0)) * (far - far.mean(0))).sum(0)
    prior_weight = 4 * shot_variance + 1e-12
    survival = (covariance + prior_weight * prior) / (spread.clamp_min(0) + prior_weight)
    survival = survival.clamp(MIN_SURVIVAL, MAX_SURVIVAL)
    offset = far.mean(0) - survival * near.mean(0)
    if rows < 4:  # too few to tell a parity's own decay from shot noise, or a decay from an intercept
        survival, offset = torch.full_like(survival, prior), torch.zeros_like(offset)
    survival[0], offset[0] = 1.0, 0.0  # the sum of all shares
    return _Decay(survival, offset)
