"""Numbers with errors: distances of rows, their means, and numbers as text that never is a negative zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

Z95 = 1.96
"""Standard errors of half a 95 % interval."""

MAX_PLACES = 8
"""Decimal places of a number with an interval, at most."""


def fixed(value: float, places: int) -> str:
    """A number with some decimal places; what is rounded to zero has no sign.

    >>> fixed(-0.0004, 3), fixed(-0.0006, 3)
    ('0.000', '−0.001')
    """
    text = f"{abs(value):.{places}f}"
    return f"−{text}" if value < 0 and float(text) > 0 else text


def with_error(value: float, half_width: float | None) -> str:
    """A number and half of its interval, with as many digits as that allows; `withError` of the browser.

    Parameters
    ----------
    value : float
    half_width : float or None
        Half of the 95 % interval; without one the number has three significant digits.

    Examples
    --------
    >>> with_error(0.08312, 0.0041), with_error(0.1504, 0.0213), with_error(0.1504, None)
    ('0.083 ± 0.004', '0.150 ± 0.021', '0.15')
    """
    if not math.isfinite(value):
        return "–"
    if half_width is None or not math.isfinite(half_width) or half_width <= 0:
        return f"{value:.3g}".replace("-", "−") if value else "0"
    exponent = math.floor(math.log10(half_width) + 1e-9)
    one_digit = half_width / 10**exponent >= 3
    places = min(MAX_PLACES, max(0, 1 - exponent - one_digit))
    return f"{fixed(value, places)} ± {half_width:.{places}f}"


@dataclass(frozen=True)
class Distances:
    """Total variation of each row from the exact one, with its standard error over repetitions of the shots.

    Parameters
    ----------
    value, std_error : tuple of float, (R,)
        NaN in a row without counts.
    """

    value: tuple[float, ...]
    std_error: tuple[float, ...]

    @property
    def mean(self) -> tuple[float, float]:
        """Mean over rows and its standard error; rows are measured independently."""
        return mean_with_error(self.value, self.std_error)


def mean_with_error(values: Sequence[float], std_errors: Sequence[float]) -> tuple[float, float]:
    """Mean of numbers with independent errors, and its standard error.

    >>> mean_with_error([0.125, 0.375], [0.03, 0.04])
    (0.25, 0.025)
    """
    return fmean(values), math.hypot(*std_errors) / len(values)
