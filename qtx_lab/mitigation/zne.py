"""Zero-noise extrapolation: from results at several noise levels to what there would be without noise, and how sure that is.

Knows nothing of circuits: what scales noise is in `scaling.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError, DtypeError, FallbackWarning, ShapeError, unknown_name
from ..estimates import AttentionEstimate

METHODS = ("richardson", "linear", "polynomial", "exponential")


@dataclass(frozen=True, eq=False, repr=False)
class ZeroNoiseEstimate:
    """What is expected without noise.

    Parameters
    ----------
    output : Tensor, (...)
    std_error : Tensor, (...), optional
        Standard error of each number from those at the noise levels; what the extrapolation's model misses is not in
        it. None where those are unknown.
    weights : Tensor, float64, (levels,)
        Of the levels; for "exponential", those of the logarithms.
    fallbacks : tuple of str
        What was done otherwise, and why.
    """

    output: Tensor
    std_error: Tensor | None
    weights: Tensor
    fallbacks: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"ZeroNoiseEstimate(output {tuple(self.output.shape)}, weights {self.weights.tolist()})"


class ZeroNoiseExtrapolation:
    """Extrapolates whole tensors, each number by itself, from results at several noise levels to noise 0.

    With values y_l at levels x_l, the answer is sum_l w_l y_l with fixed weights that sum to 1: the value at 0 of the
    polynomial through all points ("richardson": its weights are prod_{k != l} x_k / (x_k - x_l)), or of the
    least-squares polynomial of degree `degree` ("polynomial") or 1 ("linear"). "exponential" fits y = A + B e^(-c x)
    with a known A: a least-squares line through log |y - A|. Variances add as w_l^2 var_l (linearised for
    "exponential"): what extrapolation gains in bias it pays in error bars.

    Sources: Temme, Bravyi and Gambetta, Error mitigation for short-depth quantum circuits (2017); Giurgica-Tiron,
    Hindy, LaRose, Mari and Zeng, Digital zero noise extrapolation for quantum error mitigation (2020), for the fits.

    Parameters
    ----------
    noise_levels : sequence of float
        Different, finite, >= 0. Where circuits are folded, 1 is the device's own noise. A level of 0 is the answer
        itself: allowed on simulators, with a warning.
    method : str
        One of `METHODS`.
    degree : int
        Of "polynomial".
    asymptote : float or Tensor
        A of "exponential": what noise turns the values into; 1 / keys for a distribution.

    Raises
    ------
    ArgumentError, DtypeError
        Unknown methods; levels that are negative, equal, not finite or too few.

    Examples
    --------
    >>> zne = ZeroNoiseExtrapolation([1, 2, 3])
    >>> [round(w, 9) for w in zne.weights.tolist()]
    [3.0, -3.0, 1.0]
    >>> zne.extrapolate(torch.tensor([0.9, 0.7, 0.3])).output
    tensor(0.9000)
    """

    def __init__(
        self,
        noise_levels: Sequence[float] = (1.0, 2.0, 3.0),
        method: str = "richardson",
        *,
        degree: int = 2,
        asymptote: float | Tensor = 0.0,
    ):
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
        check_count("degree", degree)
        levels = _check_levels(noise_levels)
        least = {"richardson": 2, "linear": 2, "exponential": 2, "polynomial": degree + 1}[method]
        if len(levels) < least:
            raise ArgumentError(
                f"noise_levels has {len(levels)} levels; {method!r}"
                f"{f' of degree {degree}' if method == 'polynomial' else ''} needs at least {least}."
            )
        if not isinstance(asymptote, int | float | Tensor) or isinstance(asymptote, bool):
            raise DtypeError(f"asymptote is a {type(asymptote).__name__}; it must be a number or a Tensor.")
        if not torch.as_tensor(asymptote).isfinite().all():
            raise ArgumentError("asymptote holds NaN or infinity; it must be finite.")
        self.noise_levels, self.method, self.degree, self.asymptote = levels, method, degree, asymptote

    def __repr__(self) -> str:
        return f"ZeroNoiseExtrapolation({list(self.noise_levels)}, {self.method!r})"

    @property
    def weights(self) -> Tensor:
        """w of each level, float64, (levels,); they sum to 1. For "exponential", those of the logarithms."""
        return self.weights_at(self.noise_levels)

    def weights_at(self, levels: Sequence[float]) -> Tensor:
        """The weights if the levels are these in truth: folding reaches those that were asked for only nearly."""
        levels = _check_levels(levels)
        degree = {"richardson": len(levels) - 1, "polynomial": self.degree}.get(self.method, 1)
        if degree == len(levels) - 1:
            # The closed form: a solve would lose digits where levels are close.
            x = np.array(levels)
            others = [np.delete(x, i) for i in range(len(x))]
            w = np.array([np.prod(o / (o - x_l)) for o, x_l in zip(others, x, strict=True)])
        else:
            # Least squares in orthogonal polynomials on [-1, 1], evaluated where level 0 lies: digits stay where levels
            # are close.
            middle, half = (max(levels) + min(levels)) / 2, (max(levels) - min(levels)) / 2
            fit = np.polynomial.legendre.legvander((np.array(levels) - middle) / half, degree)
            zero = np.polynomial.legendre.legvander(np.array([-middle / half]), degree)
            w = (zero @ np.linalg.pinv(fit))[0]
        return torch.from_numpy(w)

    @property
    def variance_factor(self) -> float:
        """(sum_l |w_l|)^2: how much more variance than one level has, if the same shots are spread by `allocate`."""
        return float(self.weights.abs().sum().square())

    def allocate(self, shots: int, spread: Sequence[float] | None = None) -> list[int]:
        """How many of `shots` go to each level so that the error is least: n_l ∝ |w_l| s_l, and at least one.

        Parameters
        ----------
        shots : int
        spread : sequence of float, optional
            s_l, the standard deviation of a shot at each level; equal where None.

        Raises
        ------
        ArgumentError
            If there are fewer shots than levels; if spread is not one positive number a level.
        """
        check_count("shots", shots)
        count = len(self.noise_levels)
        if shots < count:
            raise ArgumentError(f"shots={shots} is not allowed: {count} noise levels need at least one each.")
        s = np.ones(count) if spread is None else np.asarray(spread, dtype=float)
        if s.shape != (count,) or not np.isfinite(s).all() or not (s > 0).all():
            raise ArgumentError(f"spread={spread!r} is not allowed: it must be {count} positive numbers.")
        share = self.weights.abs().numpy() * s
        ideal = 1 + share / share.sum() * (shots - count)
        whole = np.floor(ideal).astype(int)
        order = np.argsort(whole - ideal, kind="stable")  # the largest remainders get what is left
        whole[order[: shots - int(whole.sum())]] += 1
        return [int(x) for x in whole]

    def extrapolate(
        self,
        values: Sequence[Tensor] | Tensor,
        std_errors: Sequence[Tensor] | Tensor | None = None,
        *,
        levels: Sequence[float] | None = None,
    ) -> ZeroNoiseEstimate:
        """The values at noise 0.

        Parameters
        ----------
        values : Tensor, (levels, ...), or a sequence of Tensors (...)
            At the levels, in their order.
        std_errors : the same, optional
            Independent from level to level.
        levels : sequence of float, optional
            What the levels were in truth; see `weights_at`.

        Returns
        -------
        ZeroNoiseEstimate
            `output` (...) in the values' dtype. Where values lie on both sides of the asymptote there is no exponential
            through them: those are extrapolated linearly, with a FallbackWarning.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            Shapes that differ or do not fit the levels; values that are no real floating-point numbers or not finite.
        """
        y = self._stack("values", values)
        sigma = None if std_errors is None else self._stack("std_errors", std_errors)
        if sigma is not None and sigma.shape != y.shape:
            raise ShapeError(
                f"std_errors has shape {tuple(sigma.shape)}, values {tuple(y.shape)}: the same is needed."
            )
        dtype = values[0].dtype
        weights = self.weights if levels is None else self.weights_at(levels)
        if len(weights) != len(y):
            raise ArgumentError(f"levels has {len(weights)} numbers; there are {len(y)} noise levels.")
        w = weights.to(y.device).view(-1, *[1] * (y.ndim - 1))
        fallbacks: tuple[str, ...] = ()
        if self.method == "exponential":
            output, slopes, fallbacks = self._exponential(y, w, levels)
        else:
            output, slopes = (w * y).sum(0), w.expand_as(y)
        error = None if sigma is None else (slopes * sigma).square().sum(0).sqrt().to(dtype)
        return ZeroNoiseEstimate(output.to(dtype), error, weights, fallbacks)

    def _exponential(
        self, y: Tensor, w: Tensor, levels: Sequence[float] | None
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Values at 0, what they change by with each y, and which could not be fitted."""
        asymptote = torch.as_tensor(self.asymptote, dtype=y.dtype, device=y.device)
        try:
            asymptote = asymptote.expand(y.shape[1:])
        except RuntimeError:
            raise ShapeError(
                f"asymptote has shape {tuple(asymptote.shape)}; it must broadcast to the values', {tuple(y.shape[1:])}."
            ) from None
        above = y - asymptote
        fits = (above > 0).all(0) | (above < 0).all(0)
        decay = (w * above.abs().where(fits, torch.ones_like(above)).log()).sum(0).exp() * above[0].sign()
        output = asymptote + decay
        slopes = decay * w / above.where(fits, torch.ones_like(above))
        if bool(fits.all()):
            return output, slopes, ()
        line = ZeroNoiseExtrapolation(levels or self.noise_levels, "linear")
        v = line.weights.to(y.device).view_as(w)
        reason = (
            f"{int((~fits).sum())} of {fits.numel()} values lie on both sides of the asymptote: "
            "they were extrapolated linearly."
        )
        return (
            torch.where(fits, output, (v * y).sum(0)),
            torch.where(fits, slopes, v.expand_as(y)),
            (reason,),
        )

    def mitigate_attention_errors(
        self, noisy_attention_fn: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor | ZeroNoiseEstimate:
        """Attention without noise, from attention at each noise level.

        Parameters
        ----------
        noisy_attention_fn : callable
            `fn(q, k, v, noise_level=x)` gives the output at level x, a Tensor; or something with `output` and
            `std_error`, as `AttentionEstimate` is.
        q, k, v : Tensor
            Handed on as they are.

        Returns
        -------
        Tensor, or ZeroNoiseEstimate
            The latter, with error bars, where `fn` gives those.

        Raises
        ------
        DtypeError, ShapeError, ArgumentError
            If `fn` cannot be called; as for `extrapolate`.
        """
        if not callable(noisy_attention_fn):
            raise DtypeError(
                f"noisy_attention_fn is a {type(noisy_attention_fn).__name__}; it must be a function "
                "fn(q, k, v, noise_level=...)."
            )
        if 0 in self.noise_levels:
            warnings.warn(
                "noise_levels holds 0, which is the answer itself: only a simulator can give it, and what "
                f"{self.method!r} makes of the other levels adds little or nothing to it.",
                FallbackWarning,
                stacklevel=2,
            )
        results = [noisy_attention_fn(q, k, v, noise_level=level) for level in self.noise_levels]
        outputs = [getattr(result, "output", result) for result in results]
        errors = [getattr(result, "std_error", None) for result in results]
        known = [error for error in errors if error is not None]
        estimate = self.extrapolate(outputs, known if len(known) == len(errors) else None)
        for reason in estimate.fallbacks:
            warnings.warn(reason, FallbackWarning, stacklevel=2)
        if any(isinstance(x, AttentionEstimate) for x in results) or known:
            return estimate
        return estimate.output

    def _stack(self, argument: str, values: Sequence[Tensor] | Tensor) -> Tensor:
        """The levels' tensors as one, float64, (levels, ...)."""
        if not isinstance(values, Tensor | list | tuple):
            raise DtypeError(
                f"{argument} is a {type(values).__name__}; it must be a Tensor or a list of Tensors."
            )
        if len(values) != len(self.noise_levels):
            raise ShapeError(
                f"{argument} has {len(values)} entries; there are {len(self.noise_levels)} noise levels."
            )
        for x in values:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                given = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise DtypeError(f"{argument} holds {given}; it must be floating-point tensors.")
        if len({x.shape for x in values}) > 1:
            raise ShapeError(f"{argument} has shapes {[tuple(x.shape) for x in values]}; they must be equal.")
        stacked = torch.stack([x.double() for x in values])
        if not bool(stacked.isfinite().all()):
            raise ArgumentError(f"{argument} holds NaN or infinity; it must be finite.")
        return stacked


def _check_levels(levels: object) -> tuple[float, ...]:
    if not isinstance(levels, Sequence | np.ndarray | Tensor) or isinstance(levels, str):
        raise DtypeError(f"noise_levels={levels!r} is not allowed: it must be a sequence of numbers.")
    out: list[float] = []
    for x in levels.tolist() if isinstance(levels, np.ndarray | Tensor) else levels:
        if isinstance(x, bool) or not isinstance(x, int | float | np.number):
            raise DtypeError(f"noise_levels holds {x!r}; it must hold numbers.")
        if not math.isfinite(x) or x < 0:
            raise ArgumentError(f"noise_levels holds {x!r}; levels are finite and >= 0.")
        out.append(float(x))
    if len(set(out)) < len(out):
        raise ArgumentError(f"noise_levels={out} holds a level twice; levels must differ.")
    if len(out) < 2:
        raise ArgumentError(f"noise_levels has {len(out)} levels; at least 2 are needed.")
    return tuple(out)
