"""An exponential through values with error bars, and what it says of the value at noise 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor

from ..errors import ArgumentError

MIN_SURVIVAL = 0.05
"""Least share of the value at noise 0 that is left at the lowest level; less is believed only of values that
all differ from the asymptote by `SIGNIFICANT` standard errors. Without a limit, values within their errors of
the asymptote would allow any value at noise 0."""

SIGNIFICANT = 4.0
"""Standard errors by which a value must differ from the asymptote so that its logarithm is used."""

MISFIT_LEVEL = 1e-4
"""Probability by which noise alone would make an exponential fit as badly as one that is given up."""

QUANTILE = 1.959964
"""Half the width of a 95 % interval, in standard errors."""

RATE_STEP = 0.25
"""Largest step of the rates that are tried, times the highest level."""

LOCAL_RATES = 65
"""Rates that are tried within `LOCAL_REACH` standard errors of the best one."""

LOCAL_REACH = 4.0

NUMBERS_AT_ONCE = 4096
"""Numbers that are fitted at once; each takes some 200 rates times levels of workspace."""

NEWTON_STEPS = 12


@dataclass(frozen=True, eq=False)
class ExponentialFit:
    """An exponential through each of K numbers.

    Parameters
    ----------
    amplitude : Tensor, float64, (K,)
        B of B e^(-c x), its value at noise 0.
    std_error : Tensor, float64, (K,)
        The wider arm of its 95 % likelihood interval, over 1.96: where values lie well above their errors
        this is the usual linearised standard error. Where noise does not explain what the exponential misses,
        it is larger by the root of chi^2 over its degrees of freedom.
    fits : Tensor, bool, (K,)
        Whether noise explains what the exponential misses.
    """

    amplitude: Tensor
    std_error: Tensor
    fits: Tensor


def fit_exponential(values: Tensor, std_errors: Tensor, levels: Sequence[float]) -> ExponentialFit:
    """Fit B e^(-c x) to values at levels x by weighted least squares, each number separately.

    For a given rate c the best amplitude is linear in the values, B(c) = sum_l h_l y_l / s_l^2 / S(c) with
    h_l = e^(-c x_l) and S(c) = sum_l h_l^2 / s_l^2, so that only the rate is searched for. Logarithms are not
    taken: a value near 0, or with the wrong sign by chance, has the weight that its error gives it. The
    interval holds every amplitude B for which some rate has chi^2(B, c) <= min chi^2 + 1.96^2: the profile
    likelihood interval.

    Source: Venzon and Moolgavkar, A method for computing profile-likelihood-based confidence intervals
    (1988).

    Parameters
    ----------
    values : Tensor, float64, (levels, K)
        Less the asymptote.
    std_errors : Tensor, float64, (levels, K)
        Those of the values; 0 is taken as a billionth of the number's largest value.
    levels : sequence of float
        Noise levels, >= 0, of which two differ.

    Raises
    ------
    ArgumentError
        If a standard error is negative.

    Examples
    --------
    >>> levels = [1.0, 2.0, 4.0]
    >>> y = 0.8 * (-0.3 * torch.tensor([levels], dtype=torch.float64).T).exp()
    >>> fit = fit_exponential(y, torch.full_like(y, 0.01), levels)
    >>> round(float(fit.amplitude), 6), round(float(fit.std_error), 3)
    (0.8, 0.022)
    """
    if bool((std_errors < 0).any()):
        raise ArgumentError("std_errors holds a negative number; standard errors must be >= 0.")
    x = torch.as_tensor(np.asarray(levels, dtype=float), device=values.device)
    smallest = (1e-9 * values.abs().amax(0)).clamp_min(1e-100)
    std_errors = torch.maximum(std_errors, smallest)
    parts = [
        _fit(y, s, x)
        for y, s in zip(values.split(NUMBERS_AT_ONCE, 1), std_errors.split(NUMBERS_AT_ONCE, 1), strict=True)
    ]
    return ExponentialFit(
        torch.cat([p.amplitude for p in parts]),
        torch.cat([p.std_error for p in parts]),
        torch.cat([p.fits for p in parts]),
    )


def _fit(y: Tensor, s: Tensor, x: Tensor) -> ExponentialFit:
    """`fit_exponential` of few numbers: y and s (levels, K), x (levels,)."""
    count = len(x)
    limit = -math.log(MIN_SURVIVAL) / float(x[x > 0].min())
    steps = math.ceil(2 * limit * float(x.max()) / RATE_STEP)
    rates = torch.linspace(-limit, limit, steps + 1, dtype=torch.float64, device=x.device)[:, None]  # [G, 1]
    tried = _Profile.of(y, s, x, rates)  # [G, K]
    best = tried.chi_square.argmin(0, keepdim=True)
    rate = rates.expand_as(tried.chi_square).gather(0, best)[0]  # [K]

    # Values that all lie on one side, beyond their errors, give a rate by their logarithms, however large.
    sure = (y.abs() > SIGNIFICANT * s).all(0) & ((y > 0).all(0) | (y < 0).all(0))
    rate = torch.where(sure, _log_slope(y, s, x), rate)
    rate = _descend(y, s, x, rate, sure, limit)
    at_best = _Profile.of(y, s, x, rate[None])
    amplitude, least = at_best.amplitude[0], at_best.chi_square[0]

    reach = torch.linspace(-LOCAL_REACH, LOCAL_REACH, LOCAL_RATES, dtype=torch.float64, device=x.device)
    near = rate + reach[:, None] * _rate_error(y, s, x, rate, amplitude).clamp_max(limit)
    near = torch.where(sure, near, near.clamp(-limit, limit))
    low, high = amplitude, amplitude
    for profile in (tried, _Profile.of(y, s, x, near)):
        room = QUANTILE**2 - (profile.chi_square - least)
        arm = (room.clamp_min(0) / profile.information).sqrt()
        inside = room >= 0
        high = torch.maximum(high, (profile.amplitude + arm).where(inside, amplitude).amax(0))
        low = torch.minimum(low, (profile.amplitude - arm).where(inside, amplitude).amin(0))
    std_error = torch.maximum(high - amplitude, amplitude - low) / QUANTILE
    degrees = max(count - 2, 1)
    fits = least <= float(special.chdtri(degrees, MISFIT_LEVEL))
    return ExponentialFit(amplitude, torch.where(fits, 1, (least / degrees).sqrt()) * std_error, fits)


@dataclass(frozen=True, eq=False)
class _Profile:
    """The best amplitude for each rate, its information S and what it misses, chi^2, each (G, K)."""

    amplitude: Tensor
    information: Tensor
    chi_square: Tensor

    @classmethod
    def of(cls, y: Tensor, s: Tensor, x: Tensor, rates: Tensor) -> _Profile:
        """The profile at rates (G, K), or (G, 1) for all numbers alike."""
        h = (-rates[:, None] * x[:, None]).exp()  # [G, levels, K or 1]
        information = (h / s).square().sum(1)
        amplitude = (h * y / s.square()).sum(1) / information
        chi_square = ((y - amplitude[:, None] * h) / s).square().sum(1)
        return cls(amplitude, information, chi_square)


def _log_slope(y: Tensor, s: Tensor, x: Tensor) -> Tensor:
    """The rate (K,) of the weighted line through log |y|, whose errors are s / |y|."""
    weight = (y / s).square()
    log = y.abs().clamp_min(torch.finfo(y.dtype).tiny).log()
    total = weight.sum(0)
    x_mean, log_mean = (weight * x[:, None]).sum(0) / total, (weight * log).sum(0) / total
    away = x[:, None] - x_mean
    return -(weight * away * (log - log_mean)).sum(0) / (weight * away.square()).sum(0)


def _normal_equations(s: Tensor, x: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, and sums of h^2, x h^2 and x^2 h^2 over s^2, of rates (K,)."""
    h = (-rate * x[:, None]).exp()
    u, w = h / s, x[:, None] * h / s
    return h, u.square().sum(0), (u * w).sum(0), w.square().sum(0)


def _rate_error(y: Tensor, s: Tensor, x: Tensor, rate: Tensor, amplitude: Tensor) -> Tensor:
    """The linearised standard error (K,) of a rate; huge where the amplitude is 0."""
    _, uu, uw, ww = _normal_equations(s, x, rate)
    tiny = torch.finfo(y.dtype).tiny
    return (uu / (uu * ww - uw.square()).clamp_min(tiny)).sqrt() / amplitude.abs().clamp_min(tiny)


def _descend(y: Tensor, s: Tensor, x: Tensor, rate: Tensor, sure: Tensor, limit: float) -> Tensor:
    """Rates (K,) after Gauss-Newton steps on chi^2, of which only those that lower it are taken."""
    least = _Profile.of(y, s, x, rate[None])
    for _ in range(NEWTON_STEPS):
        h, uu, uw, ww = _normal_equations(s, x, rate)
        amplitude = least.amplitude[0]
        missed = (y - amplitude * h) / s.square() * h
        slope = -amplitude * (missed * x[:, None]).sum(0)  # missed is orthogonal to h already
        curvature = amplitude.square() * (ww - uw.square() / uu)
        step = slope / curvature.clamp_min(torch.finfo(y.dtype).tiny)
        new = rate + step.clamp(-1 / float(x.max()), 1 / float(x.max()))
        new = torch.where(sure, new, new.clamp(-limit, limit))
        at_new = _Profile.of(y, s, x, new[None])
        better = at_new.chi_square < least.chi_square
        rate = torch.where(better[0], new, rate)
        least = _Profile(
            *(
                torch.where(better, a, b)
                for a, b in (
                    (at_new.amplitude, least.amplitude),
                    (at_new.information, least.information),
                    (at_new.chi_square, least.chi_square),
                )
            )
        )
    return rate
