"""Zero-noise extrapolation: a curve through the results at several noise levels, evaluated at noise 0."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..errors import ArgumentError, DtypeError, FallbackWarning, ShapeError, unknown_name
from .exponential import MIN_SURVIVAL, fit_exponential
from .inference import Values, ZeroNoiseEstimate, ZeroNoiseInference, as_values, check_noise_levels

METHODS = ("richardson", "linear", "polynomial", "exponential")
"""Names of the curves."""

WEIGHT_SUM_TOLERANCE = 1e-4
"""How far from 1 the sum of weights may be, because they are rounded."""


@runtime_checkable
class _EstimateWithError(Protocol):
    """A result with error bars, as `AttentionEstimate` and `ZeroNoiseEstimate`."""

    @property
    def output(self) -> Tensor: ...

    @property
    def std_error(self) -> Tensor | None: ...


@runtime_checkable
class _EstimateWithDegrees(Protocol):
    """A result that tells how well its error bars are known, too."""

    @property
    def degrees_of_freedom(self) -> float | Tensor: ...


class ZeroNoiseExtrapolation(ZeroNoiseInference):
    """Extrapolates whole tensors, each number separately, from several noise levels to noise 0.

    With values y_l at levels x_l, the estimate is sum_l w_l y_l with fixed weights that sum to 1. It is the
    value at 0 of a polynomial: for "richardson" the polynomial through all points (through the means of those
    at one level), whose weights are prod_{k
    != l} x_k / (x_k - x_l); for "polynomial" the least-squares polynomial of degree `degree`; for "linear"
    that of degree 1. The variance of the estimate is sum_l w_l² var_l: extrapolation takes away bias and pays
    for it with larger error bars.

    The method "exponential" fits y = A + B e^(-c x) with a known A. With standard errors it is a weighted
    least-squares fit of the values, whose error bars are those of its likelihood (`fit_exponential`): values
    within their errors of A have little to say, and the error bar is as wide as what they leave open, as far
    as at least 5 % of the value at noise 0 is left at the lowest level. Without standard errors it is a
    weighted least-squares line through log |y - A|: the error of a share of shots grows as its root, so that
    of the logarithm is 1 / sqrt|y - A|, and the weights in the sum of squares are |y - A|, as in mitiq.

    Sources: Temme, Bravyi and Gambetta, Error mitigation for short-depth quantum circuits (2017);
    Giurgica-Tiron, Hindy, LaRose, Mari and Zeng, Digital zero noise extrapolation for quantum error
    mitigation (2020), for the fits.

    Parameters
    ----------
    noise_levels : sequence of float
        Levels, finite and >= 0. Where circuits are folded, 1 is the device's own noise. A level of 0 is the
        noiseless result: it is allowed on simulators, with a warning. A level that is given several times is
        measured that many times. On the twins of IBM's devices the line through 1 and 5, the default, has the
        least error of all that extrapolate each number separately, with 1,000 to 64,000 shots a row;
        Richardson extrapolation from more levels takes many more shots (`qtx-lab bench mitigation`).
    method : str
        One of `METHODS`.
    degree : int
        Degree of "polynomial".
    asymptote : float or Tensor
        A of "exponential": the value that strong noise leads to, as 1 / keys for a distribution. A Tensor
        must broadcast to the values.

    Raises
    ------
    ArgumentError, DtypeError
        If the method is unknown, if levels are negative, not finite or too few for it, if they leave its
        weights without digits, or if degree or asymptote is not allowed.

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
        noise_levels: Sequence[float] = (1.0, 5.0),
        method: str = "richardson",
        *,
        degree: int = 2,
        asymptote: float | Tensor = 0.0,
    ):
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
        degree = check_count("degree", degree)
        levels = check_noise_levels(noise_levels)
        least = degree + 1 if method == "polynomial" else 2
        if len(set(levels)) < least:
            of_degree = f" of degree {degree}" if method == "polynomial" else ""
            raise ArgumentError(
                f"noise_levels has {len(set(levels))} levels that differ; {method!r}{of_degree} needs at "
                f"least {least}."
            )
        if not isinstance(asymptote, Tensor) or asymptote.ndim == 0:
            asymptote = check_number("asymptote", asymptote)
        elif not asymptote.isfinite().all():
            raise ArgumentError("asymptote holds NaN or infinity; it must be finite.")
        self.noise_levels, self.method, self.degree, self.asymptote = levels, method, degree, asymptote
        self.keeps_total = method != "exponential"
        self.weights_at(levels)  # refuses levels that leave it no digits

    def __repr__(self) -> str:
        return f"ZeroNoiseExtrapolation({list(self.noise_levels)}, {self.method!r})"

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make it again, and its kind; see `ZeroNoiseInference.settings`."""
        asymptote = self.asymptote.tolist() if isinstance(self.asymptote, Tensor) else self.asymptote
        return {
            "kind": "extrapolation",
            "noise_levels": list(self.noise_levels),
            "method": self.method,
            "degree": self.degree,
            "asymptote": asymptote,
        }

    @property
    def weights(self) -> Tensor:
        """Weight w of each level, float64, (levels,), which sum to 1.

        For "exponential", whose estimate is no weighted sum, those of the line through equally weighted
        logarithms.
        """
        return self.weights_at(self.noise_levels)

    def weights_at(self, levels: Sequence[float]) -> Tensor:
        """Compute the weights for the levels that were attained: folding reaches a level only nearly.

        Parameters
        ----------
        levels : sequence of float
            As many as `noise_levels`.

        Returns
        -------
        Tensor, float64, (levels,)
            They sum to 1.

        Raises
        ------
        ArgumentError, DtypeError
            If there are not as many levels, if they are not allowed for the method, or if they lie so close
            together, or so far apart, that the weights would have no digits.
        """
        richardson = len(set(self.noise_levels)) - 1
        degree = {"richardson": richardson, "polynomial": self.degree}.get(self.method, 1)
        levels = check_noise_levels(levels, degree + 1)
        if len(levels) != len(self.noise_levels):
            raise ArgumentError(
                f"levels has {len(levels)} numbers; there are {len(self.noise_levels)} noise levels."
            )
        x, place, count = np.unique(levels, return_inverse=True, return_counts=True)
        if degree == len(x) - 1:
            # The closed form; solving a linear system would lose digits where levels are close. Replicates of
            # a level share its weight.
            others = [np.delete(x, i) for i in range(len(x))]
            with np.errstate(all="ignore"):  # what overflows is refused below
                w = np.array([np.prod(x_k / (x_k - x_l)) for x_k, x_l in zip(others, x, strict=True)])
                w = (w / count)[place]
        else:
            # Least squares in orthogonal polynomials on [-1, 1], evaluated where level 0 lies. This keeps the
            # digits where levels are close.
            middle, half = (max(levels) + min(levels)) / 2, (max(levels) - min(levels)) / 2
            basis = np.polynomial.legendre.legvander((np.array(levels) - middle) / half, degree)
            basis_at_zero = np.polynomial.legendre.legvander(np.array([-middle / half]), degree)
            w = (basis_at_zero @ np.linalg.pinv(basis))[0]
        if not abs(w.sum() - 1) <= WEIGHT_SUM_TOLERANCE:
            raise ArgumentError(
                f"noise_levels={list(levels)} is not allowed: the weights of {self.method!r} would sum to "
                f"{w.sum():.6g} and not to 1, because they lose their digits. Use fewer levels that are "
                "further apart, or another method."
            )
        return torch.from_numpy(w)

    @property
    def variance_factor(self) -> float:
        """(sum_l |w_l|)²: the variance over that of one level with all shots, if `allocate` spreads them."""
        return float(self.weights.abs().sum().square())

    def allocate(self, shots: int, spread: Sequence[float] | None = None) -> list[int]:
        """Spread `shots` so that the standard error is least: n_l ∝ |w_l| s_l, and at least one a level.

        Parameters
        ----------
        shots : int
            Shots of all levels together.
        spread : sequence of float, optional
            s_l, the standard deviation of a single shot at each level; equal at all levels if None.

        Returns
        -------
        list of int

        Raises
        ------
        ArgumentError
            If there are fewer shots than levels, or if spread does not hold one positive number for each
            level.

        Examples
        --------
        >>> ZeroNoiseExtrapolation([1, 3]).allocate(1000)
        [750, 250]
        """
        shots = check_count("shots", shots)
        count = len(self.noise_levels)
        if shots < count:
            raise ArgumentError(
                f"shots={shots} is not allowed: each of the {count} noise levels needs at least one."
            )
        s = np.ones(count) if spread is None else np.asarray(spread, dtype=float)
        if s.shape != (count,) or not np.isfinite(s).all() or not (s > 0).all():
            raise ArgumentError(f"spread={spread!r} is not allowed: it must be {count} positive numbers.")
        share = self.weights.abs().numpy() * s
        ideal = 1 + share / share.sum() * (shots - count)
        rounded = np.floor(ideal).astype(int)
        order = np.argsort(
            rounded - ideal, kind="stable"
        )  # the largest remainders get the shots that are left
        rounded[order[: shots - int(rounded.sum())]] += 1
        return [int(n) for n in rounded]

    def extrapolate(
        self,
        values: Sequence[Values] | Tensor | np.ndarray,
        std_errors: Sequence[Values] | Tensor | np.ndarray | None = None,
        *,
        levels: Sequence[float] | None = None,
        degrees_of_freedom: Sequence[float | Tensor] | None = None,
    ) -> ZeroNoiseEstimate:
        """Estimate the values at noise 0.

        Parameters
        ----------
        values : Tensor, (levels, ...), or sequence of Tensor, (...)
            Values at each level, in the order of `noise_levels`.
        std_errors : same as values, optional
            Standard errors of the values, independent from level to level.
        levels : sequence of float, optional
            The levels that were attained; see `weights_at`.
        degrees_of_freedom : sequence of float or Tensor, optional
            Those of each level's standard errors, f_l; infinite if None. Those of the result are Welch's and
            Satterthwaite's, (sum_l u_l)² / sum_l u_l² / f_l with u_l = w_l² var_l; for "exponential" the
            fewest of any level.

        Returns
        -------
        ZeroNoiseEstimate
            `output` has shape (...) and the dtype of the values. Where no exponential fits, a line is
            extrapolated: `fallbacks` and a FallbackWarning say so. That is where values lie on both sides of
            the asymptote, by more than noise explains if standard errors are given; without them also where
            the value at noise 0 would be 20 times further from the asymptote than any value.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If shapes differ or do not fit the levels, if values are not floating-point or not finite, if
            standard errors are negative, or degrees of freedom not positive.

        Notes
        -----
        Standard errors of few replicates are known badly, and Welch's rule is an approximation: 95 %
        intervals cover 92 to 98 % for one degree of freedom a level, and 94 to 96 % for three or more.
        """
        estimate = self._extrapolate(values, std_errors, levels, degrees_of_freedom)
        _warn_of(estimate.fallbacks)
        return estimate

    def infer(
        self, values: Sequence[Tensor], std_errors: Sequence[Tensor], levels: Sequence[float]
    ) -> ZeroNoiseEstimate:
        """`extrapolate` without its warnings: see `ZeroNoiseInference.infer`."""
        return self._extrapolate(values, std_errors, levels, None)

    def _extrapolate(
        self,
        values: Sequence[Values] | Tensor | np.ndarray,
        std_errors: Sequence[Values] | Tensor | np.ndarray | None,
        levels: Sequence[float] | None,
        degrees_of_freedom: Sequence[float | Tensor] | None,
    ) -> ZeroNoiseEstimate:
        y = self._stack("values", values)
        sigma = None if std_errors is None else self._stack("std_errors", std_errors)
        if sigma is not None and bool((sigma < 0).any()):
            raise ArgumentError("std_errors holds a negative number; standard errors must be >= 0.")
        if sigma is not None and sigma.shape != y.shape:
            raise ShapeError(
                f"std_errors has shape {tuple(sigma.shape)} and values have {tuple(y.shape)}; they must be "
                "the same."
            )
        dtype = as_values("values", values[0]).dtype
        weights = self.weights if levels is None else self.weights_at(levels)
        w = weights.to(y.device).view(-1, *[1] * (y.ndim - 1))
        if self.method == "exponential":
            fit = self._fit_exponential(y, sigma, w, self.noise_levels if levels is None else levels)
        else:
            fit = _line_through(y, sigma, w)
        std_error = None if fit.std_error is None else fit.std_error.to(dtype)
        degrees = self._combine_degrees(degrees_of_freedom, w, sigma)
        return ZeroNoiseEstimate(fit.value.to(dtype), std_error, weights, fit.fallbacks, degrees)

    def _fit_exponential(self, y: Tensor, sigma: Tensor | None, w: Tensor, levels: Sequence[float]) -> _Fit:
        """Fit y = A + B e^(-c x) to values (levels, ...), or a line where no exponential fits."""
        asymptote = torch.as_tensor(self.asymptote, dtype=y.dtype, device=y.device)
        try:
            asymptote = asymptote.expand(y.shape[1:])
        except RuntimeError:
            raise ShapeError(
                f"asymptote has shape {tuple(asymptote.shape)}; it must broadcast to the values, "
                f"{tuple(y.shape[1:])}."
            ) from None
        above = y - asymptote
        on_one_side = (above > 0).all(0) | (above < 0).all(0)
        if sigma is None:
            size = above.where(on_one_side, torch.ones_like(above)).abs()
            amplitude = _amplitude_by_logarithms(size, levels) * above[0].sign()
            std_error = None
            # A value that lies on the asymptote has no weight, but its logarithm tells that it lies there.
            through_all = (w * size.log()).sum(0).exp()
            believed = on_one_side & (through_all * MIN_SURVIVAL <= above.abs().amax(0))
        else:
            fit = fit_exponential(above.reshape(len(y), -1), sigma.reshape(len(y), -1), levels)
            shape = y.shape[1:]
            amplitude, std_error, fits = (x.view(shape) for x in (fit.amplitude, fit.std_error, fit.fits))
            believed = on_one_side | fits
        if bool(believed.all()):
            return _Fit(asymptote + amplitude, std_error)
        linear = ZeroNoiseExtrapolation(levels, "linear").weights.to(y.device).view_as(w)
        line = _line_through(y, sigma, linear)
        crossing, near = int((~(believed | on_one_side)).sum()), int((~believed & on_one_side).sum())
        fallbacks = (
            f"{crossing} of {believed.numel()} values lie on both sides of the asymptote: they were "
            "extrapolated linearly.",
            f"{near} of {believed.numel()} values lie so near the asymptote that an exponential through them "
            f"leaves less than {MIN_SURVIVAL:.0%} at every level: they were extrapolated linearly. Give "
            "std_errors to fit them by their errors.",
        )
        return _Fit(
            torch.where(believed, asymptote + amplitude, line.value),
            None
            if std_error is None or line.std_error is None
            else torch.where(believed, std_error, line.std_error),
            tuple(text for count, text in zip((crossing, near), fallbacks, strict=True) if count),
        )

    def _combine_degrees(
        self, degrees: Sequence[float | Tensor] | None, w: Tensor, sigma: Tensor | None
    ) -> float | Tensor:
        """The degrees of freedom of sum_l w_l y_l, from those of the levels' standard errors sigma."""
        if degrees is None or sigma is None:
            return math.inf
        if len(degrees) != len(w):
            raise ShapeError(
                f"degrees_of_freedom has {len(degrees)} entries; there are {len(w)} noise levels."
            )
        inverse = []
        for f in degrees:
            given = torch.as_tensor(f, dtype=torch.float64, device=sigma.device)
            if not bool((given > 0).all()):
                raise ArgumentError(f"degrees_of_freedom holds {f}; each must be above 0.")
            inverse.append((1 / given).expand(sigma.shape[1:]))
        if self.method == "exponential":  # the levels' shares of the variance are not fixed ones
            return 1 / torch.stack(inverse).amax(0)
        part = (w * sigma).square()
        known = (part.square() * torch.stack(inverse)).sum(0)
        return torch.where(known > 0, part.sum(0).square() / known, math.inf)

    def mitigate_attention_errors(
        self, noisy_attention_fn: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor
    ) -> Any:
        """Estimate attention without noise from attention at each noise level.

        Parameters
        ----------
        noisy_attention_fn : callable
            `fn(q, k, v, noise_level=x)` returns the attention output at level x: a Tensor, an array of
            floating-point numbers, a number, or an estimate with `output` and `std_error`, as
            `AttentionEstimate`.
        q, k, v : Tensor
            Passed to `noisy_attention_fn` as they are.

        Returns
        -------
        Tensor, ndarray, float or ZeroNoiseEstimate
            A Tensor if the function returns Tensors, and so on; an estimate with error bars if it returns
            estimates.

        Raises
        ------
        DtypeError
            If `noisy_attention_fn` cannot be called, or returns something else.
        ShapeError, ArgumentError
            If its results do not fit each other; see `extrapolate`.
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
        return self._combine(results, None)

    def combine_results(self, results: Sequence[Any], *, levels: Sequence[float] | None = None) -> Any:
        """Infer the result at noise 0 from what an executor of the user's own returned at each level.

        Parameters
        ----------
        results : sequence
            One for each level, in the order of `noise_levels`: a number, an array of floating-point numbers,
            a Tensor, or an estimate with `output` and `std_error`.
        levels : sequence of float, optional
            The levels that were attained; see `weights_at`.

        Returns
        -------
        float, ndarray, Tensor or ZeroNoiseEstimate
            Of the kind of the results.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            As `extrapolate`.

        Examples
        --------
        >>> ZeroNoiseExtrapolation([1, 3]).combine_results([0.9, 0.7])
        1.0
        """
        return self._combine(results, levels)

    def _combine(self, results: Sequence[Any], levels: Sequence[float] | None) -> Any:
        estimates = [result for result in results if isinstance(result, _EstimateWithError)]
        outputs = [result.output if isinstance(result, _EstimateWithError) else result for result in results]
        errors = [estimate.std_error for estimate in estimates if estimate.std_error is not None]
        known = len(errors) == len(results)
        degrees = [x.degrees_of_freedom if isinstance(x, _EstimateWithDegrees) else math.inf for x in results]
        estimate = self._extrapolate(outputs, errors if known else None, levels, degrees if known else None)
        _warn_of(estimate.fallbacks, stacklevel=4)
        if estimates:
            return estimate
        if all(isinstance(x, Tensor) for x in results):
            return estimate.output
        if any(isinstance(x, Tensor | np.ndarray) for x in results):
            return estimate.output.numpy()
        return float(estimate.output)

    def _stack(self, argument: str, values: Sequence[Values] | Tensor | np.ndarray) -> Tensor:
        """Check the values of the levels, and return them as one tensor, float64, (levels, ...)."""
        if not isinstance(values, Tensor | np.ndarray | list | tuple):
            raise DtypeError(
                f"{argument} is a {type(values).__name__}; it must be a Tensor or a list of Tensors."
            )
        count = len(values) if not isinstance(values, Tensor | np.ndarray) or values.ndim else 0
        if count != len(self.noise_levels):
            raise ShapeError(
                f"{argument} has {count} entries; there are {len(self.noise_levels)} noise levels."
            )
        tensors = [as_values(argument, x) for x in values]
        if len({x.shape for x in tensors}) > 1:
            raise ShapeError(
                f"{argument} has shapes {[tuple(x.shape) for x in tensors]}; they must be equal."
            )
        stacked = torch.stack([x.double() for x in tensors])
        if not bool(stacked.isfinite().all()):
            raise ArgumentError(f"{argument} holds NaN or infinity; it must be finite.")
        return stacked


@dataclass(frozen=True, eq=False)
class _Fit:
    """Values at noise 0, (...), their standard errors where those of the levels are known, and fallbacks."""

    value: Tensor
    std_error: Tensor | None
    fallbacks: tuple[str, ...] = ()


def _amplitude_by_logarithms(above: Tensor, levels: Sequence[float]) -> Tensor:
    """B of B e^(-c x) from positive values (levels, ...): a line through logarithms, with the weights y."""
    x = torch.as_tensor(np.asarray(levels, dtype=float), device=above.device)
    x = x.view(-1, *[1] * (above.ndim - 1))
    logarithms, weight = above.log(), above / above.sum(0)
    x_mean, log_mean = (weight * x).sum(0), (weight * logarithms).sum(0)
    away = x - x_mean
    slope = (weight * away * (logarithms - log_mean)).sum(0) / (weight * away.square()).sum(0)
    return (log_mean - slope * x_mean).exp()


def _line_through(y: Tensor, sigma: Tensor | None, w: Tensor) -> _Fit:
    """sum_l w_l y_l of values (levels, ...)."""
    return _Fit((w * y).sum(0), None if sigma is None else (w * sigma).square().sum(0).sqrt())


def _warn_of(fallbacks: Sequence[str], stacklevel: int = 3) -> None:
    for fallback in fallbacks:
        warnings.warn(fallback, FallbackWarning, stacklevel=stacklevel)
