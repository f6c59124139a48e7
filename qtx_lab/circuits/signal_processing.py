"""Polynomials of an amplitude: the polynomial that stands for an exponential, and the phases that compute it.

Quantum signal processing alternates a rotation by an unknown angle arccos(x) with rotations by known phases,
and makes a polynomial of x out of it. The quantum singular value transformation does so for all amplitudes of
a block-encoding at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.polynomial import chebyshev
from scipy.optimize import linprog

from ..checks import check_count, check_number
from ..errors import ArgumentError

MAX_DEGREE = 40
"""Highest degree for which phases are computed."""

MAX_POLYNOMIAL = 0.999
"""Largest value of a polynomial: phases are hard to find where it touches 1."""

FOURIER_POINTS = 1 << 14
"""Points on the unit circle at which a polynomial is completed."""

PHASE_TOLERANCE = 1e-9
"""Largest error of the polynomial that the phases compute."""


@dataclass(frozen=True, eq=False)
class ExponentialPolynomial:
    """A polynomial P that is nearly `scale` exp((alpha x - max_logit) / 2) where |alpha x| <= max_logit.

    Its even part is at most `weight` and its odd part at most 1 - `weight` everywhere on [-1, 1], so that a
    linear combination of two signal processings with these weights computes P.

    Parameters
    ----------
    alpha, max_logit, tolerance : float
        As for `exponential_polynomial`.
    coefficients : ndarray, float64, (degree + 1,)
        Of the Chebyshev polynomials T_0, T_1, ...
    scale : float
        P is within `tolerance` of this number times the exponential, so that it is at most 1 + `tolerance`.
        The probability of success of a key with the logit l is nearly scale² exp(l - max_logit).
    weight : float
        Of the even part, from 0 to 1.
    """

    alpha: float
    max_logit: float
    tolerance: float
    coefficients: np.ndarray
    scale: float
    weight: float

    @property
    def degree(self) -> int:
        """Degree of the polynomial."""
        return len(self.coefficients) - 1

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """P(x), for x (...) from -1 to 1."""
        return np.asarray(chebyshev.chebval(x, self.coefficients))

    def part(self, parity: int) -> np.ndarray:
        """Chebyshev coefficients of the even (0) or odd (1) part, divided by its weight."""
        of_parity = np.where(np.arange(self.degree + 1) % 2 == parity, self.coefficients, 0)
        last = self.degree if self.degree % 2 == parity else self.degree - 1
        return of_parity[: last + 1] / max((1 - self.weight) if parity else self.weight, 1e-12)


@lru_cache(maxsize=256)
def exponential_polynomial(
    alpha: float, degree: int, *, max_logit: float | None = None, tolerance: float = 0.01
) -> ExponentialPolynomial:
    """Find the polynomial of a degree that stands for exp(alpha x / 2) with the largest scale.

    The relative error is at most `tolerance` where |alpha x| <= `max_logit`; elsewhere only the bound of the
    polynomial matters. Probabilities proportional to P(x_j)² are then within a total variation of `tolerance`
    of softmax(alpha x_j). The coefficients solve a linear programme on a grid.

    Parameters
    ----------
    alpha : float
        Subnormalisation > 0: the logits are alpha x, with |x| <= 1.
    degree : int
        From 1 to `MAX_DEGREE`.
    max_logit : float, optional
        Bound of the logits, up to alpha; alpha where None. A smaller bound makes success more likely, by up
        to exp(alpha - max_logit), for a higher degree.
    tolerance : float
        Relative error, above 0 and below 1.

    Raises
    ------
    ArgumentError
        If an argument is out of its bounds, or the degree is too low for the tolerance.

    Source: Gilyén, Su, Low and Wiebe, Quantum singular value transformation and beyond (2019), section 5, for
    what polynomials can be computed. The linear programme is ours.

    Examples
    --------
    >>> polynomial = exponential_polynomial(2.0, 4)
    >>> x = np.array([-1.0, 0.0, 1.0])
    >>> np.round(np.exp(1 - x) * polynomial(x), 2)
    array([1., 1., 1.])
    """
    alpha = check_number("alpha", alpha, least=1e-6, most=1e3)
    degree = check_count("degree", degree, 1, MAX_DEGREE)
    tolerance = check_number("tolerance", tolerance, least=1e-6, most=0.9)
    bound = alpha if max_logit is None else check_number("max_logit", max_logit, least=0, most=alpha)
    reach = min(1.0, bound / alpha)
    nodes = np.cos(np.linspace(0, np.pi, 32 * degree + 1))
    inside, basis = reach * nodes, np.eye(degree + 1)
    fit = chebyshev.chebval(inside, basis).T  # [N, degree + 1]
    everywhere = chebyshev.chebval(nodes[nodes >= 0], basis).T
    even = np.where(np.arange(degree + 1) % 2 == 0, everywhere, 0)
    odd, ones = everywhere - even, np.ones((len(everywhere), 1))
    target = np.exp((alpha * inside - bound) / 2)[:, None]
    none = np.zeros_like(ones)
    # Unknown: the coefficients, the weight w and the scale c. |even| <= w, |odd| <= 1 - w, |P - c f| <= c e f
    rows = [
        np.hstack([sign * part, w * ones, none]) for part, w in ((even, -1), (odd, 1)) for sign in (1, -1)
    ]
    rows += [np.hstack([fit, 0 * target, -(1 + tolerance) * target])]
    rows += [np.hstack([-fit, 0 * target, (1 - tolerance) * target])]
    limits = [none[:, 0]] * 2 + [ones[:, 0]] * 2 + [np.zeros(len(fit))] * 2
    solution = linprog(
        [0] * (degree + 2) + [-1.0],
        np.vstack(rows),
        np.concatenate(limits),
        bounds=[(None, None)] * (degree + 1) + [(0, 1), (0, None)],
    )
    if not solution.success or solution.x[-1] < 1e-4:
        raise ArgumentError(
            f"degree={degree} is too low: no polynomial of it is within tolerance={tolerance:g} of the "
            f"exponential for logits up to {bound:g} with the subnormalisation alpha={alpha:g}. Take a "
            f"higher degree, up to {MAX_DEGREE}, or a larger tolerance."
        )
    *_, weight, scale = solution.x
    coefficients = solution.x[:-2]
    polynomial = ExponentialPolynomial(alpha, bound, tolerance, coefficients, scale, weight)
    between = np.cos(np.linspace(0, np.pi / 2, 100 * degree))  # the grid's bounds hold only nearly between
    most = max(np.abs(chebyshev.chebval(between, polynomial.part(parity))).max() for parity in (0, 1))
    factor = MAX_POLYNOMIAL / max(1.0, most)
    return replace(polynomial, coefficients=factor * coefficients, scale=factor * scale)


def signal(phases: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The matrices exp(-i phi_D Z) R exp(-i phi_(D-1) Z) R ... exp(-i phi_0 Z), complex (N, 2, 2).

    R is the rotation exp(i Y arccos x).

    Parameters
    ----------
    phases : ndarray, (D + 1,)
        Radians.
    x : ndarray, (N,)
        From -1 to 1.

    Examples
    --------
    Without phases, Chebyshev polynomials come out:

    >>> signal(np.zeros(4), np.array([0.5]))[0, 0, 0].real.round(6)  # T_3(1/2)
    np.float64(-1.0)
    """
    s = np.sqrt(np.clip(1 - x * x, 0, None))
    rotation = np.stack([x, s, -s, x], -1).reshape(-1, 2, 2)
    turns = np.exp(-1j * phases[:, None] * np.array([1, -1]))
    out = np.broadcast_to(np.diag(turns[0]), rotation.shape)
    for turn in turns[1:]:
        out = turn[:, None] * (rotation @ out)
    return out


def signal_phases(coefficients: np.ndarray) -> np.ndarray:
    """Find phases with Re `signal(phases, x)`[0, 0] = P(x).

    The polynomial is completed to a unitary matrix, from which the rotations are then taken off one by one.

    Parameters
    ----------
    coefficients : ndarray, float64, (D + 1,)
        Of the Chebyshev polynomials in P, which is even or odd as D is, and |P| < 1 on [-1, 1].

    Returns
    -------
    ndarray, float64, (D + 1,)
        Radians.

    Raises
    ------
    ArgumentError
        If P has no such parity, or comes too near to 1.

    Source: Berntson and Sünderhauf, Complementary polynomials in quantum signal processing (2024), for the
    completion by Fourier transforms; Haah, Product decomposition of periodic functions in quantum signal
    processing (2019), for taking off the rotations.

    Examples
    --------
    >>> phases = signal_phases(np.array([0.1, 0.0, 0.5]))
    >>> signal(phases, np.array([1.0]))[0, 0, 0].real.round(6)
    np.float64(0.6)
    """
    degree = len(coefficients) - 1
    if np.abs(coefficients[1 - degree % 2 :: 2][: (degree + 1) // 2]).max(initial=0) > 0:
        raise ArgumentError(f"coefficients must be of a polynomial that is {('even', 'odd')[degree % 2]}.")
    # With z = exp(i arccos x), the first column of the matrix is (u(z), i v(z)): u = P, |u|² + |v|² = 1.
    # Both hold powers z^-D, z^(2-D), ..., z^D.
    u = np.concatenate([coefficients[:0:-1] / 2, coefficients[:1], coefficients[1:] / 2])[::2]
    w = np.arange(FOURIER_POINTS) * (2 * np.pi / FOURIER_POINTS)  # z² = exp(i w)
    rest = 1 - chebyshev.chebval(np.cos(w / 2), coefficients) ** 2
    if rest.min() <= 0:
        raise ArgumentError("coefficients must be of a polynomial that is below 1 and above -1 on [-1, 1].")
    # The polynomial without zeros inside the unit circle whose absolute value is sqrt(rest) on it.
    logarithm = np.fft.fft(np.log(rest) / 2) / FOURIER_POINTS
    logarithm[1 : FOURIER_POINTS // 2] *= 2
    logarithm[FOURIER_POINTS // 2 :] = 0
    boundary = np.exp(np.fft.ifft(logarithm) * FOURIER_POINTS)
    v = (np.fft.fft(boundary) / FOURIER_POINTS)[: degree + 1].real
    phases = np.zeros(degree + 1)
    for i in range(degree, 0, -1):
        phases[i] = math.atan2(u[0], v[0])
        c, s = math.cos(phases[i]), math.sin(phases[i])
        u, v = (c * u - s * v)[1:], (c * v + s * u)[:-1]  # the coefficients left out are 0
    phases[0] = math.atan2(-v[0], u[0])
    x = np.cos(np.linspace(0, np.pi, 4 * degree + 1))
    if np.abs(signal(phases, x)[:, 0, 0].real - chebyshev.chebval(x, coefficients)).max() > PHASE_TOLERANCE:
        raise ArgumentError(f"No phases were found for the polynomial of degree {degree}.")
    return phases
