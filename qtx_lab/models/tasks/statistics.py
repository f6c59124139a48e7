"""What scores of several prompts say: their mean, and the difference of two methods, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ...errors import ArgumentError, ShapeError

RESAMPLES = 4000
"""How often a bootstrap draws its sample again."""


@dataclass(frozen=True)
class MeanInterval:
    """The mean of scores over prompts.

    Attributes
    ----------
    mean : float
    low, high : float
        The bootstrap interval of the mean over all prompts of the kind.
    confidence : float
    prompts : int
    """

    mean: float
    low: float
    high: float
    confidence: float
    prompts: int


@dataclass(frozen=True)
class PairedDifference(MeanInterval):
    """The mean over prompts of a method's score less the exact one's on the same prompt.

    Attributes
    ----------
    higher, lower : int
        The prompts on which the method has the higher, and the lower score.
    p_value : float
        Of the exact sign test: the probability of so uneven a split of higher and lower, or one yet more
        uneven, if each were as likely. For scores of 0 and 1 it is McNemar's exact test.
    """

    higher: int
    lower: int
    p_value: float


def mean_interval(
    scores: Sequence[float] | np.ndarray,
    *,
    bounds: tuple[float, float] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> MeanInterval:
    """The mean of scores, with a bootstrap interval over prompts.

    It is the percentile interval with expanded percentiles, as wide as Student's t has it, which few prompts
    need [1]_. Where scores have bounds, the resamples draw from one more prompt at each bound, as otherwise
    six matches of six would give an interval of width 0; `mean` is of the scores alone. Bonett and Price add
    as much to Wald's interval for differences of matches [2]_.

    Parameters
    ----------
    scores : array_like, (n,)
        One a prompt, finite.
    bounds : (float, float), optional
        The lowest and highest possible score, as (0, 1) for matches.
    confidence : float
    seed : int
        Of the resamples.

    Raises
    ------
    ArgumentError, ShapeError
        If there are fewer than 2 scores, or one is not finite or out of bounds.

    References
    ----------
    .. [1] Hesterberg, What teachers should know about the bootstrap, The American Statistician 69
       (2015), §4.3.
    .. [2] Bonett and Price, Adjusted Wald confidence interval for a difference of binomial proportions based
       on paired data, Journal of Educational and Behavioral Statistics 37 (2012).

    Examples
    --------
    >>> seen = mean_interval([1, 1, 1, 0, 1, 1, 1, 1], bounds=(0, 1))
    >>> print(f"{seen.mean:.3f} ({seen.low:.2f} to {seen.high:.2f})")
    0.875 (0.50 to 1.00)
    """
    x = _checked("scores", scores, bounds)
    low, high = _bootstrap(x, bounds, confidence, seed)
    return MeanInterval(float(x.mean()), low, high, confidence, len(x))


def paired_difference(
    scores: Sequence[float] | np.ndarray,
    exact: Sequence[float] | np.ndarray,
    *,
    bounds: tuple[float, float] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """The mean difference of a method to exact attention on the same prompts, with a bootstrap interval.

    Parameters
    ----------
    scores, exact : array_like, (n,)
        Of the method and of exact attention, one a prompt, in the same order.
    bounds, confidence, seed
        As for `mean_interval`; the bounds are those of a score, not of a difference.

    Raises
    ------
    ArgumentError, ShapeError
        As for `mean_interval`, or if there are not as many of the one as of the other.
    """
    x, y = _checked("scores", scores, bounds), _checked("exact", exact, bounds)
    if len(x) != len(y):
        raise ShapeError(f"scores has {len(x)} prompts, exact has {len(y)}; they must be the same prompts.")
    difference = x - y
    widest = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    low, high = _bootstrap(difference, widest, confidence, seed)
    higher, lower = int((difference > 0).sum()), int((difference < 0).sum())
    p_value = stats.binomtest(higher, higher + lower).pvalue if higher + lower else 1.0
    return PairedDifference(
        float(difference.mean()), low, high, confidence, len(x), higher, lower, float(p_value)
    )


def _checked(
    argument: str, scores: Sequence[float] | np.ndarray, bounds: tuple[float, float] | None
) -> np.ndarray:
    """The scores (n,) as float64, of which there are two or more, all finite and within bounds."""
    x = np.asarray(scores, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ShapeError(
            f"{argument} has shape {x.shape}; it must be (n,), a score for each of 2 or more prompts."
        )
    low, high = bounds or (-np.inf, np.inf)
    wrong = x[~(np.isfinite(x) & (x >= low) & (x <= high))]
    if len(wrong):
        raise ArgumentError(
            f"{argument} holds {wrong[0]}; scores must be finite numbers from {low} to {high}."
        )
    return x


def _bootstrap(
    x: np.ndarray, bounds: tuple[float, float] | None, confidence: float, seed: int
) -> tuple[float, float]:
    """The ends of the interval of the mean of x (n,)."""
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence={confidence} is not allowed: it must be above 0 and below 1.")
    if bounds is not None:
        x = np.append(x, bounds)
    n = len(x)
    if np.ptp(x) == 0:
        return float(x[0]), float(x[0])
    upper = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 + confidence) / 2, n - 1))
    # How often a resample has each different score is multinomial.
    values, counts = np.unique(x, return_counts=True)
    resamples = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES)  # [RESAMPLES, values]
    low, high = np.quantile(resamples @ values / n, [1 - upper, upper])
    return float(low), float(high)
