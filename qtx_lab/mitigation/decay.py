"""Extrapolation that learns from all rows together how fast each parity of the measured bits decays with noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ShapeError
from .zne import ZeroNoiseEstimate, ZeroNoiseExtrapolation

SLOWEST, FASTEST = 1.0, 0.05
"""What may be left of a parity from the first level to the second."""


class SharedDecay:
    """Zero-noise extrapolation of the distributions that one circuit gives with many angles.

    Under Pauli noise the parity <Z_S> of a set S of measured bits decays exponentially with the noise, each Pauli that
    it passes by its own fidelity, towards a value that relaxation gives it. Those fidelities belong to the circuit and
    hardly to its angles. So the decay of each parity is learned by regression over all rows, of the second level's
    values on the first's (less the variance that shots add there), and undone in each row: the second level has to say
    little about a single row, and the noise of an extrapolation row by row is not paid. What the shared decay misses
    stays as bias; `corrected` takes the Richardson extrapolation of each row instead and removes from it what it gets
    wrong on the shared exponential.

    Own work; Fourier analysis of Pauli noise as in Flammia and Wallman, Efficient estimation of Pauli channels (2020).

    Parameters
    ----------
    noise_levels : sequence of float
        See `ZeroNoiseExtrapolation`; decays are learned from the first two.
    corrected : bool

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> p = torch.randn(9, 4, generator=g, dtype=torch.float64).softmax(-1)
    >>> noisy = [0.25 + (p - 0.25) * 0.9**x for x in (1, 3)]
    >>> bool((SharedDecay([1, 3]).extrapolate(noisy).output - p).abs().max() < 1e-9)
    True
    """

    def __init__(self, noise_levels: Sequence[float] = (1.0, 3.0), *, corrected: bool = False):
        self._line = ZeroNoiseExtrapolation(noise_levels)
        self.noise_levels, self.corrected = self._line.noise_levels, corrected
        self.method = "corrected decay" if corrected else "shared decay"
        self.allocate = self._line.allocate

    def __repr__(self) -> str:
        return f"SharedDecay({list(self.noise_levels)}, corrected={self.corrected})"

    def extrapolate(
        self,
        values: Sequence[Tensor],
        std_errors: Sequence[Tensor] | None = None,
        *,
        levels: Sequence[float] | None = None,
    ) -> ZeroNoiseEstimate:
        """The distributions at noise 0.

        Parameters
        ----------
        values : sequence of Tensor, float64, (R, 2^bits)
            Shares of the register's values, at each level.
        std_errors : the same, optional
            Taken to be 0 where None.
        levels : sequence of float, optional
            What the levels were in truth.

        Returns
        -------
        ZeroNoiseEstimate
            Its standard errors take the shared decays as known: 95 % intervals cover about 90 %.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            As `ZeroNoiseExtrapolation.extrapolate`; if values are not rows of 2^bits numbers.
        """
        plain = self._line.extrapolate(values, std_errors, levels=levels)
        n = values[0].shape[-1]
        if values[0].ndim != 2 or n & (n - 1):
            raise ShapeError(
                f"values has shape {tuple(values[0].shape)}; it must be (R, 2^bits) at each level."
            )
        x = self.noise_levels if levels is None else levels
        order = sorted(range(len(x)), key=lambda level: x[level])  # the two lowest tell the decay
        x, values = [x[level] for level in order], [values[level] for level in order]
        std_errors = None if std_errors is None else [std_errors[level] for level in order]
        near, far = parities(values[0]), parities(values[1])  # [R, 2^bits]
        added = 0.0 if std_errors is None else float(std_errors[0].square().sum())  # over rows, of a parity
        left, offset = _shared_decay(near, far, added)
        rate = -left.log() / (x[1] - x[0])
        grown = (rate * x[0]).exp()
        # far = left near + offset: a decay towards offset / (1 - left), undone from x_0 to 0.
        if not self.corrected:
            limit = torch.where(rate == 0, -x[0] / (x[1] - x[0]), (1 - grown) / (1 - left))
            parity = near * grown + offset * limit
            slopes = [grown, *[torch.zeros_like(grown)] * (len(x) - 1)]
        else:
            w = plain.weights[order]
            missed = 1 - (w[:, None] * (-rate * torch.tensor(x, dtype=torch.float64)[:, None]).exp()).sum(0)
            towards = offset / (1 - left).clamp_min(1e-9)
            parity = parities(plain.output.double()) + missed * (near - towards) * grown
            slopes = [w_l + missed * grown * (level == 0) for level, w_l in enumerate(w)]
        output = parities(parity) / n
        if std_errors is None:
            return ZeroNoiseEstimate(output, None, plain.weights)
        # Parity by parity is a convolution over the register's values, and its square takes variances to variances.
        variance = sum(
            parities(parities((parities(slope[None]) / n).square()) * parities(error.square())) / n
            for slope, error in zip(slopes, std_errors, strict=True)
        )
        assert isinstance(variance, Tensor)
        return ZeroNoiseEstimate(output, variance.clamp_min(0).sqrt(), plain.weights)


def parities(x: Tensor) -> Tensor:
    """sum_v (-1)^|v & s| x_v for each s: the Walsh-Hadamard transform of rows (R, 2^bits); 2^bits times its own inverse."""
    shape, half = x.shape, 1
    while half < shape[-1]:
        pairs = x.reshape(len(x), -1, 2, half)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2)
        half *= 2
    return x.reshape(shape)


def _shared_decay(near: Tensor, far: Tensor, added: float) -> tuple[Tensor, Tensor]:
    """What is left of each parity at the second level, and what is added to it: (2^bits,) each.

    Regression with an intercept, drawn towards what is left of all parities together where rows tell little: few of
    them, all alike, or lost in shot noise.
    """
    rows = len(near)
    total = float((near.square().sum(0) - added)[1:].sum())
    # Where there is no parity but shot noise, `total` has a standard deviation of added sqrt(2 n / rows).
    seen = total > 4 * added * (2 * near.shape[1] / rows) ** 0.5
    prior = float((near * far)[:, 1:].sum()) / total if seen else 1.0
    prior = min(max(prior, FASTEST), SLOWEST)
    spread = (near - near.mean(0)).square().sum(0) - added * (1 - 1 / rows)
    together = ((near - near.mean(0)) * (far - far.mean(0))).sum(0)
    weight = 4 * added + 1e-12
    left = (together + weight * prior) / (spread.clamp_min(0) + weight)
    left = left.clamp(FASTEST, SLOWEST)
    offset = far.mean(0) - left * near.mean(0)
    if rows < 4:  # no row can tell a parity's own decay from shot noise, nor a decay from an intercept
        left, offset = torch.full_like(left, prior), torch.zeros_like(left)
    left[0], offset[0] = 1.0, 0.0  # the sum of all shares
    return left, offset
