"""How results at several noise levels become an estimate at noise 0: the interface, and the estimate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from ..checks import check_number
from ..errors import ArgumentError, DtypeError, NumberError

Values = Tensor | np.ndarray | np.floating | float
"""What is measured at one noise level: an array of floating-point numbers, or a plain number."""


@dataclass(frozen=True, eq=False, repr=False)
class ZeroNoiseEstimate:
    """An estimate of what would be measured without noise.

    Parameters
    ----------
    output : Tensor, (...)
        The estimate.
    std_error : Tensor, (...), optional
        Standard error of each number, from the standard errors at the noise levels; None if those are
        unknown. It does not contain the bias that is left where the model of the noise is wrong.
    weights : Tensor, float64, (levels,)
        Weight of each level's values; for "exponential", of equally weighted logarithms.
    fallbacks : tuple of str
        What was done in another way than asked, and why.
    degrees_of_freedom : float or Tensor, float64, (...)
        Of `std_error`, for Student's t; infinite where the errors at the noise levels are known.
    """

    output: Tensor
    std_error: Tensor | None
    weights: Tensor
    fallbacks: tuple[str, ...] = ()
    degrees_of_freedom: float | Tensor = math.inf

    def __repr__(self) -> str:
        return f"ZeroNoiseEstimate(output {tuple(self.output.shape)}, weights {self.weights.tolist()})"

    def confidence_interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """(low, high), each (...): Student's t interval of each number separately.

        Raises
        ------
        ArgumentError
            If level is not between 0 and 1, or if there are no standard errors.

        Examples
        --------
        >>> import torch
        >>> estimate = ZeroNoiseEstimate(torch.zeros(1), torch.ones(1), torch.ones(1), (), 1.0)
        >>> estimate.confidence_interval(0.95)[1]
        tensor([12.7062])
        """
        level = check_number("level", level, above=0, below=1)
        if self.std_error is None:
            raise ArgumentError(
                "There are no standard errors: give extrapolate the std_errors of its values."
            )
        freedom = np.asarray(self.degrees_of_freedom)
        t = torch.as_tensor(special.stdtrit(freedom, (1 + level) / 2)).to(self.std_error)
        return self.output - t * self.std_error, self.output + t * self.std_error


def as_values(argument: str, x: Values) -> Tensor:
    """Return what one noise level gave as a floating-point tensor; plain numbers are float64.

    Raises
    ------
    DtypeError
        If it is neither a number nor an array of floating-point numbers.
    """
    if isinstance(x, float | int) and not isinstance(x, bool):
        return torch.tensor(x, dtype=torch.float64)
    if isinstance(x, np.ndarray | np.generic) and x.dtype.kind == "f":
        return torch.from_numpy(np.array(x))
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor | np.ndarray | np.generic) else type(x).__name__
        raise DtypeError(f"{argument} holds {given}; it must hold floating-point tensors or numbers.")
    return x


class ZeroNoiseInference(ABC):
    """A way to infer what would be measured without noise. It knows nothing of circuits.

    `CircuitMitigation` takes any subclass: it spreads the shots by `allocate`, measures at `noise_levels`,
    and hands the results to `extrapolate`. What scales the noise of circuits is in `scaling.py`.

    Attributes
    ----------
    noise_levels : tuple of float
        Where to measure: 1 is the device's own noise, 3 three times that.
    method : str
        Name of the method, for people.
    keeps_total : bool
        Whether numbers that sum to 1 at every level are inferred to sum to 1. Where they need not, their
        sum may be badly known, and the badly known ones give way; see `project_to_simplex`.

    Examples
    --------
    A new inference is a subclass. This one extends the line through the noise levels 1 and 2:

    >>> import torch
    >>> class LineThroughTwo(ZeroNoiseInference):
    ...     noise_levels, method = (1.0, 2.0), "line through two"
    ...
    ...     def allocate(self, shots, spread=None):
    ...         return [shots - shots // 3, shots // 3]
    ...
    ...     def extrapolate(self, values, std_errors=None, *, levels=None):
    ...         near, far = self.noise_levels if levels is None else levels
    ...         weights = torch.tensor([far, -near], dtype=torch.float64) / (far - near)
    ...         output = weights[0] * values[0] + weights[1] * values[1]
    ...         if std_errors is None:
    ...             return ZeroNoiseEstimate(output, None, weights)
    ...         variance = sum((w * x).square() for w, x in zip(weights, std_errors))
    ...         return ZeroNoiseEstimate(output, variance.sqrt(), weights)
    >>> from qtx_lab.mitigation import CircuitMitigation
    >>> CircuitMitigation(LineThroughTwo(), readout=True).name
    'readout, line through two 1 2 (local)'
    """

    noise_levels: tuple[float, ...]
    method: str
    keeps_total: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        """What a device's record holds of it, as JSON; by default nothing from which it can be made again."""
        return {}

    @abstractmethod
    def allocate(self, shots: int, spread: Sequence[float] | None = None) -> list[int]:
        """Spread `shots` over the noise levels so that the standard error of the result is least.

        Parameters
        ----------
        shots : int
            Shots of all levels together.
        spread : sequence of float, optional
            Standard deviation of a single shot at each level; equal at all levels if None.

        Returns
        -------
        list of int
            Shots of each level, at least one.
        """

    @abstractmethod
    def extrapolate(
        self,
        values: Sequence[Tensor] | Tensor,
        std_errors: Sequence[Tensor] | Tensor | None = None,
        *,
        levels: Sequence[float] | None = None,
    ) -> ZeroNoiseEstimate:
        """Infer the values at noise 0.

        Parameters
        ----------
        values : Tensor, (levels, ...), or sequence of Tensor, (...)
            Values at each level, in the order of `noise_levels`.
        std_errors : same as values, optional
            Standard errors of the values, independent from level to level.
        levels : sequence of float, optional
            The noise levels that were attained, if they differ from `noise_levels`: folding a circuit reaches
            a level only nearly.
        """

    def infer(
        self, values: Sequence[Tensor], std_errors: Sequence[Tensor], levels: Sequence[float]
    ) -> ZeroNoiseEstimate:
        """`extrapolate` for callers that pass its fallbacks on themselves: override it if that one warns."""
        return self.extrapolate(values, std_errors, levels=levels)


def check_noise_levels(levels: object, min_distinct: int = 2) -> tuple[float, ...]:
    """Check noise levels, and return them as a tuple.

    Parameters
    ----------
    levels : sequence of float
    min_distinct : int
        How many levels must differ. A level may be there more than once, to be measured as often.

    Raises
    ------
    DtypeError
        If they are not a sequence of numbers.
    ArgumentError
        If a level is negative or not finite, or if too few levels differ.
    """
    arrays = np.ndarray | Tensor
    if not isinstance(levels, Sequence | arrays) or isinstance(levels, str | bytes):
        raise DtypeError(f"noise_levels={levels!r} is not allowed: it must be a sequence of numbers.")
    if isinstance(levels, arrays) and levels.ndim != 1:
        raise DtypeError(f"noise_levels has {levels.ndim} dimensions; it must be a sequence of numbers.")
    checked: list[float] = []
    for level in levels.tolist() if isinstance(levels, np.ndarray | Tensor) else levels:
        try:
            checked.append(check_number("a level of noise_levels", level, least=0))
        except NumberError:
            raise DtypeError(f"noise_levels holds {level!r}; it must hold numbers.") from None
    distinct = len(set(checked))
    if distinct < min_distinct and distinct < len(checked):
        raise ArgumentError(
            f"noise_levels={checked} holds a level twice; at least {min_distinct} must differ."
        )
    if distinct < min_distinct:
        raise ArgumentError(f"noise_levels has {distinct} levels; at least {min_distinct} are needed.")
    return tuple(checked)
