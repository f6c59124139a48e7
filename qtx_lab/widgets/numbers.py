"""Numbers with errors: distances of rows, and means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

Z95 = 1.96
"""Standard errors of half a 95 % interval."""


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


def spaced(number: int) -> str:
    """A whole number with thin spaces between thousands.

    >>> spaced(1234567) == "1\\u2009234\\u2009567"
    True
    """
    return f"{number:,}".replace(",", "\u2009")
