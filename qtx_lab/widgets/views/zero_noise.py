"""The zero-noise fit that `CircuitView` draws while its levels are moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...backends import QiskitQuantumBackend
from ...checks import check_count
from ...mitigation import ZeroNoiseExtrapolation, project_to_simplex, scale_noise

CURVE_POINTS = 60
"""Points of a fitted curve that are drawn."""


class NoiseLevels:
    """One row measured at several noise levels. Each level is measured once for a number of shots.

    Parameters
    ----------
    backend : QiskitQuantumBackend
        A simulator whose noise can be scaled.
    p : Tensor, (1, n)
        The row.
    seed : int
        Of the shots.
    """

    def __init__(self, backend: QiskitQuantumBackend, p: Tensor, seed: int):
        self.backend, self.p, self._seed = backend, p, seed
        self.measured: dict[tuple[float, int], Tensor] = {}
        """Shares (1, n) of the keys by level and shots."""

    def shares(self, level: float, shots: int) -> Tensor:
        """The share of each key among the shots at a noise level, (1, n)."""
        if (level, shots) not in self.measured:
            generator = torch.Generator().manual_seed(self._seed + round(1e6 * level))
            scaled = scale_noise(self.backend, level, "model")
            counts = scaled.sample_rows(self.p, shots, generator=generator)
            self.measured[level, shots] = counts.probabilities()
        return self.measured[level, shots]

    def fit(self, levels: Sequence[float], method: str, shots: int, key: int | None = None) -> ZeroNoiseFit:
        """Extrapolate every key to no noise.

        Parameters
        ----------
        levels : sequence of float
            1 is the device's own noise.
        method : str
            See `ZeroNoiseExtrapolation`.
        shots : int
            At each level.
        key : int, optional
            Whose probabilities are plotted; the most likely one where None.

        Raises
        ------
        ArgumentError
            Levels that `ZeroNoiseExtrapolation` refuses; a key that the row does not have.
        """
        p = self.p
        zne = ZeroNoiseExtrapolation(levels, method, asymptote=1 / max(1, p.shape[-1]))
        key = int(p[0].argmax()) if key is None else check_count("key", key, 0, p.shape[-1] - 1)
        shares = [self.shares(level, shots) for level in zne.noise_levels]
        errors = [((x * (1 - x)).clamp_min(1 / shots**2) / shots).sqrt() for x in shares]
        estimate = zne.extrapolate(shares, errors)
        assert estimate.std_error is not None
        x = np.linspace(0, 1.04 * max(levels), CURVE_POINTS)
        values = [float(share[0, key]) for share in shares]
        return ZeroNoiseFit(
            levels=list(zne.noise_levels),
            values=values,
            errors=[float(error[0, key]) for error in errors],
            fit=np.stack((x, fitted_curve(zne, np.array(values), x)), -1).tolist(),
            answer=float(estimate.output[0, key]),
            answer_error=float(estimate.std_error[0, key]),
            exact=float(p[0, key]),
            key=key,
            method=zne.method,
            p=project_to_simplex(estimate.output, p > 0)[0].tolist(),
            p_error=estimate.std_error[0].tolist(),
            shots=shots * len(levels),
            fallbacks=list(estimate.fallbacks),
        )


@dataclass(frozen=True)
class ZeroNoiseFit:
    """A row at several noise levels, extrapolated to none.

    Parameters
    ----------
    levels, values, errors : list of float
        Noise levels, and the probability of the plotted key at each with its standard error.
    fit : list of [level, value]
        Points of the fitted curve.
    answer, answer_error, exact : float
        Of the plotted key: the extrapolated probability, its standard error, and the exact probability.
    key : int
        The plotted key.
    method : str
    p, p_error : list of float, (n,)
        Of all keys the extrapolated probability, on the simplex, and the standard error.
    shots : int
        Spent on these levels.
    fallbacks : list of str
        What was done in another way than requested, and why.
    """

    levels: list[float]
    values: list[float]
    errors: list[float]
    fit: list[list[float]]
    answer: float
    answer_error: float
    exact: float
    key: int
    method: str
    p: list[float]
    p_error: list[float]
    shots: int
    fallbacks: list[str]


def fitted_curve(zne: ZeroNoiseExtrapolation, y: np.ndarray, x: np.ndarray) -> Any:
    """The function that `zne` fits through values y at its levels, evaluated at x."""
    levels = np.array(zne.noise_levels)
    degree = {"richardson": len(set(zne.noise_levels)) - 1, "polynomial": zne.degree}.get(zne.method, 1)
    floor = float(zne.asymptote)
    if zne.method == "exponential" and ((y > floor).all() or (y < floor).all()):
        sign, above = np.sign(y[0] - floor), np.abs(y - floor)
        line = np.polyfit(
            levels, np.log(above), 1, w=np.sqrt(above)
        )  # the weights of `ZeroNoiseExtrapolation`
        return floor + sign * np.exp(np.polyval(line, x))
    return np.polyval(np.polyfit(levels, y, degree), x)
