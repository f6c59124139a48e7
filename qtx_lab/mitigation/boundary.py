"""Where zero-noise extrapolation begins to help: the boundary in noise and shots, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..backends import QiskitQuantumBackend
from ..checks import check_number
from ..circuits import check_rows
from ..errors import ArgumentError, DtypeError
from .circuit import CircuitMitigation
from .projection import sum_by_key
from .register import LoaderRegister, register_probabilities
from .results import check_backend
from .scaling import scale_noise
from .zne import ZeroNoiseExtrapolation

SMALL_NOISE = 1e-3
"""Noise level, of the device's own, at which the slope of the bias is taken."""

NO_SLOPE = 1e-9
"""Slopes below this are rounding errors."""


@dataclass(frozen=True)
class HelpBoundary:
    """For which noise and how many shots an extrapolation has a smaller mean squared error than raw counts.

    With noise of strength x and B shots in all, the mean squared error of raw counts less that of the
    extrapolation is, to leading order in x,

        D x^(2p) - K x^q / B.

    D x^(2p) is the squared bias that the extrapolation removes, and K x^q / B the variance that it adds.

    Parameters
    ----------
    improvement : float
        D, above 0.
    penalty : float
        K.
    bias_power : float
        p, above 0: the bias of raw counts grows as x^p.
    variance_power : float
        q, at least 0: the variance of a shot grows as x^q. It is 0 for what varies without noise too, as the
        shares of a row, and 1 for what is certain without noise.

    Raises
    ------
    ArgumentError
        If a number is not allowed.

    Source: Scavino Alfaro, The finite-shot help-harm boundary of zero-noise extrapolation (arXiv:2605.08251),
    theorem 1.

    Examples
    --------
    >>> boundary = HelpBoundary(improvement=4.0, penalty=16.0)
    >>> round(boundary.shots(noise=0.1), 9), round(boundary.noise(shots=400), 9)
    (400.0, 0.1)
    >>> boundary.gain(noise=0.1, shots=300) < 0 < boundary.gain(noise=0.1, shots=500)
    True
    """

    improvement: float
    penalty: float
    bias_power: float = 1.0
    variance_power: float = 0.0

    def __post_init__(self) -> None:
        check_number("improvement", self.improvement, above=0)
        check_number("penalty", self.penalty)
        check_number("bias_power", self.bias_power, above=0)
        check_number("variance_power", self.variance_power, least=0)

    def gain(self, noise: float, shots: float) -> float:
        """Compute the mean squared error of raw counts less that of the extrapolation."""
        noise, shots = check_number("noise", noise, least=0), check_number("shots", shots, above=0)
        bias, variance = 2 * self.bias_power, self.variance_power
        return float(self.improvement * noise**bias - self.penalty * noise**variance / shots)

    def shots(self, noise: float = 1.0) -> float:
        """Compute from how many shots the extrapolation helps: K x^(q - 2p) / D, and 0 where it always does.

        Parameters
        ----------
        noise : float
            Strength of the noise, above 0, in the unit in which the boundary was made.
        """
        noise = check_number("noise", noise, above=0)
        power = self.variance_power - 2 * self.bias_power
        return float(max(self.penalty, 0) / self.improvement * noise**power)

    def noise(self, shots: float) -> float:
        """Compute from which noise the extrapolation helps: (K / (D B))^(1 / (2p - q)).

        For q = 2p there is no such noise but a number of shots, K / D: the result is 0 from there and
        infinite below. For q > 2p the extrapolation helps however weak the noise is, and the result is 0.
        """
        shots = check_number("shots", shots, above=0)
        ratio = max(self.penalty, 0) / (self.improvement * shots)
        power = 2 * self.bias_power - self.variance_power
        if power > 0:
            return float(ratio ** (1 / power))
        return math.inf if power == 0 and ratio > 1 else 0.0


def zne_boundary(
    zne: ZeroNoiseExtrapolation,
    *,
    slope: float,
    variance: float,
    variance_power: float = 0.0,
    shares: Sequence[float] | None = None,
) -> HelpBoundary:
    """Compute where an extrapolation helps a value whose bias is linear in weak noise.

    The weights w_l of the extrapolation sum to 1 and those times their levels x_l to 0, so that the leading
    bias a x vanishes: D = a². Raw counts have the variance v x^q / B. The extrapolation has
    sum_l w_l² v (x_l x)^q / (s_l B), where s_l are the shares of the shots. The difference is
    K = v (sum_l w_l² x_l^q / s_l - 1). With q = 0 and shares in proportion to |w_l|, it is
    v ((sum_l |w_l|)² - 1).

    Parameters
    ----------
    zne : ZeroNoiseExtrapolation
        Of any method whose estimate is a weighted sum, which "exponential" is not.
    slope : float
        a, the derivative of the raw value by the strength of the noise at 0. For several values, the root of
        the sum of squares.
    variance : float
        v, with v x^q the variance of one shot; for several values, the sum.
    variance_power : float
        q, at least 0.
    shares : sequence of float, optional
        Part of the shots at each level; those of `ZeroNoiseExtrapolation.allocate` if None.

    Returns
    -------
    HelpBoundary

    Raises
    ------
    DtypeError
        If zne is not a ZeroNoiseExtrapolation.
    ArgumentError
        If its method is "exponential", a level is 0, slope is 0, or shares are not one positive number for
        each level that sum to 1.

    Source: Scavino Alfaro (arXiv:2605.08251), where shares are equal.

    Examples
    --------
    >>> equal = zne_boundary(ZeroNoiseExtrapolation([1, 3]), slope=2.0, variance=1.0, shares=[0.5, 0.5])
    >>> equal.improvement, round(equal.penalty, 9)
    (4.0, 4.0)
    >>> round(zne_boundary(ZeroNoiseExtrapolation([1, 3]), slope=2.0, variance=1.0).penalty, 9)
    3.0
    """
    weights, parts = _weights_and_shares(zne, shares)
    slope = check_number("slope", slope)
    if slope == 0:
        raise ArgumentError("slope=0 is not allowed: an extrapolation has no bias to remove.")
    variance = check_number("variance", variance, least=0)
    power = check_number("variance_power", variance_power, least=0)
    levels = np.asarray(zne.noise_levels)
    penalty = variance * float((weights**2 * levels**power / parts).sum() - 1)
    return HelpBoundary(slope**2, penalty, variance_power=power)


def rows_boundary(
    backend: QiskitQuantumBackend,
    p: Tensor,
    zne: ZeroNoiseExtrapolation,
    *,
    shares: Sequence[float] | None = None,
) -> HelpBoundary:
    """Compute where an extrapolation helps rows, by the noise of a simulator; 1 is the simulator's own noise.

    Squared errors are summed over the keys and averaged over the rows. The slope of the bias is taken at
    weak noise, and all of the noise is taken to be scaled, as scaling="model" does.

    Parameters
    ----------
    backend : QiskitQuantumBackend
        A simulator or a device's twin.
    p : Tensor, (R, n)
        Rows of probabilities.
    zne, shares
        As for `zne_boundary`.

    Returns
    -------
    HelpBoundary
        With q = 0, because the shares of a row vary from shot to shot without noise too.

    Raises
    ------
    ArgumentError, DtypeError, ShapeError, BackendUnavailable
        As `zne_boundary`; also for a backend that is not a simulator, rows without a key, circuits that are
        too large, and noise that does not change the rows.
    """
    p = _rows(backend, p)
    levels = (SMALL_NOISE, 2 * SMALL_NOISE)
    near, far = (_key_probabilities(scale_noise(backend, level, "model"), p) for level in levels)
    slope = (4 * near - far - 3 * p) / (2 * SMALL_NOISE)  # [R, n], without the error of second order
    size = float(slope.square().sum(-1).mean().sqrt())
    if size < NO_SLOPE:
        raise ArgumentError("p has no row that the noise of the backend changes: there is no bias to remove.")
    return zne_boundary(zne, slope=size, variance=float((p * (1 - p)).sum(-1).mean()), shares=shares)


def shots_that_extrapolation_needs(
    backend: QiskitQuantumBackend, p: Tensor, mitigation: CircuitMitigation
) -> float:
    """Compute from how many shots an extrapolation helps rows at a simulator's own noise, however strong.

    At fixed noise the mean squared errors of raw counts and of the extrapolation are b² + v / B and
    b'² + v' / B, so that the boundary is B = (v' - v) / (b² - b'²), without an expansion in the noise. It
    tends to `rows_boundary(...).shots(noise)` as the noise goes to 0. The projection onto the distributions,
    which only brings rows nearer, is left out.

    Parameters
    ----------
    backend : QiskitQuantumBackend
        A simulator or a device's twin.
    p : Tensor, (R, n)
        Rows of probabilities.
    mitigation : CircuitMitigation
        With a `ZeroNoiseExtrapolation` whose estimate is a weighted sum, in any scaling, without readout.

    Returns
    -------
    float
        Shots of a row; infinite where the extrapolation has the larger bias.

    Raises
    ------
    ArgumentError, DtypeError, ShapeError, BackendUnavailable
        As `rows_boundary`; also if the mitigation undoes readout errors.
    """
    p = _rows(backend, p)
    if not isinstance(mitigation, CircuitMitigation):
        raise DtypeError(f"mitigation is a {type(mitigation).__name__}; it must be a CircuitMitigation.")
    if mitigation.readout:
        raise ArgumentError("mitigation undoes readout errors: its variance has no closed form here.")
    zne = mitigation.zne
    if not isinstance(zne, ZeroNoiseExtrapolation):
        raise DtypeError(f"mitigation.zne is {zne!r}; it must be a ZeroNoiseExtrapolation.")
    _, parts = _weights_and_shares(zne, None)
    weights = zne.weights_at(mitigation.attained_levels(backend, p.shape[-1])).numpy()
    levels = [_key_probabilities(variant, p) for variant in mitigation.construct_backends(backend)]
    raw = _key_probabilities(backend, p)
    extrapolated = sum(w * x for w, x in zip(weights, levels, strict=True))

    def size(x: Tensor) -> float:
        return float(x.square().sum(-1).mean())

    def spread(x: Tensor) -> float:
        return float((x * (1 - x)).sum(-1).mean())

    gain = size(raw - p) - size(extrapolated - p)
    loss = sum(w**2 / s * spread(x) for w, s, x in zip(weights, parts, levels, strict=True)) - spread(raw)
    if gain <= 0:
        return math.inf
    return max(float(loss) / gain, 0.0)


def _weights_and_shares(
    zne: ZeroNoiseExtrapolation, shares: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The weight of each level, and its part of the shots."""
    if not isinstance(zne, ZeroNoiseExtrapolation):
        raise DtypeError(f"zne is a {type(zne).__name__}; it must be a ZeroNoiseExtrapolation.")
    if zne.method == "exponential":
        raise ArgumentError("zne.method='exponential' is not allowed: its estimate is no weighted sum.")
    if 0 in zne.noise_levels:
        raise ArgumentError(
            f"noise_levels={list(zne.noise_levels)} is not allowed: level 0 is the answer itself."
        )
    weights = zne.weights.numpy()
    parts = np.abs(weights) / np.abs(weights).sum() if shares is None else np.asarray(shares, dtype=float)
    allowed = parts.shape == weights.shape and np.isfinite(parts).all() and (parts > 0).all()
    if not allowed or abs(parts.sum() - 1) > 1e-9:
        raise ArgumentError(
            f"shares={shares!r} is not allowed: it must be {len(weights)} positive numbers that sum to 1."
        )
    return weights, parts


def _rows(backend: object, p: Tensor) -> Tensor:
    check_backend(backend)
    checked = check_rows(p)
    if not bool((checked.sum(-1) > 0).all()):
        raise ArgumentError("p holds a row without a key of probability above 0: it has no error.")
    return checked


def _key_probabilities(backend: QiskitQuantumBackend, p: Tensor) -> Tensor:
    """What infinitely many raw shots give, float64 (R, n): shares of the shots that give a key."""
    register = LoaderRegister.of(backend, p.shape[-1])
    by_key = sum_by_key(register_probabilities(backend, p), register.keys, p > 0)
    return by_key / by_key.sum(-1, keepdim=True)
