"""Amplitudes from the hits of Grover circuits: schedules of iterates, and likelihoods with a fitted decay.

After k iterates a shot hits with the probability P_k = b + C_k (sin²((2k + 1) theta) - b), with the
contrast C_k = C exp(-decay k) and the offset b = f + shift. Here f is the share of the register's states
that count as hits: noise that mixes all states leads there. The contrast, the decay and the shift belong
to the device and are the same for all amplitudes of a call: they are fitted to all of them together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

RUNG_SHOTS = 24
"""Shots at full contrast with which a rung of the schedule tells apart what the rung above it cannot."""

EXTRA_SHOTS = 8
"""Further shots of a rung for each rung between it and the highest: an error of a low one costs most."""

LADDER_SHARE = 0.6
"""Largest share of the loads that is spent on the rungs below the highest."""

PRIOR_LOG_DECAY, PRIOR_CONTRAST, PRIOR_SHIFT = 0.5, 0.03, 0.02
"""Standard deviations of the prior around what the calibration predicts: of the logarithm of the decay, of
the contrast without iterates, and of the offset."""

PLANE_LOG_DECAY, PLANE_CONTRAST, PLANE_SHIFT = 0.25, 0.02, 0.015
"""Standard deviations by which an amplitude's own decay, contrast and offset differ from the common ones.

Errors depend on the angles of a circuit, and so on the amplitude. Without these, the fit is surer of its
decay than it may be: at 16 keys and 16,384 loads on the twin of Boston, 95 % intervals cover 93 %, and 92 %
by "mle".
"""

PRIOR_PARTS, PLANE_PARTS = (0.6, 0.4), (0.4, 0.3)
"""The same of the contrast, as a part of the contrast that is predicted to be lost, and of the offset, as a
part of the errors of a circuit with one iterate, where these are larger: strong noise leads nowhere known."""

GRID = 257
"""Angles at which a likelihood is computed."""

NODE_STEP, SCORING_STEPS = 4, 6
"""Every so many of these angles are nodes of the integrals to which the decay is fitted, in so many steps."""

DEPTH_OF_LIKELIHOOD = 16.0
"""A likelihood is computed where its logarithm is above its maximum less this number."""

RESOLVED_PHASE = 0.5
"""Largest standard deviation of the phase (2k + 1) theta at which the second stage is used, radians."""

SECOND_SHARE = 0.3
"""Share of the second stage at another number of iterates, which tells apart angles that the first cannot."""

FINEST_PHASE = 0.4
"""Largest step of the phase (2k + 1) theta at which the likelihood of a rung is computed, radians."""


@dataclass(frozen=True)
class FittedDecay:
    """What noise does to the probability of a hit, the same for all amplitudes of a call.

    Parameters
    ----------
    contrast : float
        Contrast without iterates; 1 without noise.
    per_iterate : float
        Decay: each iterate multiplies the contrast by exp(-per_iterate).
    shift : float
        By how much the offset, which the contrast decays to, is above the share of states that count as hits.
    std_error : tuple of float
        Standard errors of the contrast, the decay and the shift; 0 where they are known.
    """

    contrast: float = 1.0
    per_iterate: float = 0.0
    shift: float = 0.0
    std_error: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Schedule:
    """Shots of the first stage of an amplitude, and what is left for the second.

    Parameters
    ----------
    ladder : dict
        From the number of iterates to shots.
    left : int
        Loads for the second stage.
    most : int
        Largest number of iterates of the second stage.
    """

    ladder: dict[int, int]
    left: int
    most: int


def candidates(most: int) -> tuple[int, ...]:
    """Numbers of iterates from 0 to `most`, at least, four to each doubling.

    >>> candidates(10)
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 10)
    """
    return tuple(
        sorted({0, *(round(2 ** (i / 4)) for i in range(4 * most.bit_length() + 1))} & {*range(most + 1)})
    )


def best_depth(decay: float, most: int) -> int:
    """Number of iterates at which a load has the most information, (2k + 1) C_k², at most `most`.

    >>> best_depth(0.02, 100)
    24
    """
    return min(most, max(0, math.floor((1 / decay - 1) / 2))) if decay > 0 else most


def schedule(loads: int, decay: float, most: int) -> Schedule:
    """Share the loads of an amplitude between two stages.

    A shot after k iterates takes 2k + 1 loads. Where it hits as often as not, the Fisher information of
    its angle is 4 (2k + 1)² C_k², so that the information of a load, (2k + 1) C_k², is largest at 2k + 1
    = 1 / decay. The first stage has rungs at 0, 1, 2, 4, ... iterates, which tell apart the angles that
    agree at a higher rung. The second one spends the rest after the number of iterates at which the angle
    that the first stage found is steepest; see `second_stage`. The highest rung is the one that promises
    the most information.

    Parameters
    ----------
    loads : int
        Uses of the loader and its inverse that the shots may take together.
    decay : float
        Expected decay of the contrast for each iterate.
    most : int
        Largest number of iterates.

    Source: Suzuki et al., Amplitude estimation without phase estimation (2020), for the rungs; Kimmel,
    Low and Yoder, Robust calibration of a universal single-qubit gate set via robust phase estimation
    (2015), for more shots on the lower ones; Tanaka et al., Amplitude estimation via maximum likelihood
    on noisy quantum computer (2021), for the optimum under decay.

    Examples
    --------
    >>> schedule(1000, decay=0.01, most=100)
    Schedule(ladder={0: 48, 1: 41, 2: 34, 4: 26}, left=425, most=9)
    """
    most = best_depth(decay, most)
    rungs = [0, *(1 << i for i in range(most.bit_length()))]
    best, best_information = Schedule({}, loads, 0), float(loads)
    for number in range(1, len(rungs) + 1):
        ladder = {
            k: math.ceil((RUNG_SHOTS + EXTRA_SHOTS * (number - 1 - i)) * math.exp(2 * decay * k))
            for i, k in enumerate(rungs[:number])
        }
        left = loads - spent_loads(ladder)
        if left < (1 - LADDER_SHARE) * loads:
            break
        deepest = min(most, 2 * rungs[number - 1] + 1)
        information = sum(n * (2 * k + 1) ** 2 * _mean_information(k, decay) for k, n in ladder.items())
        information += left * max((2 * k + 1) * math.exp(-2 * decay * k) for k in candidates(deepest))
        if information > best_information:
            best, best_information = Schedule(ladder, left, deepest), information
    return best


def _mean_information(k: int, decay: float) -> float:
    """Fisher information of an angle, over 4 (2k + 1)², in the mean over its phase: 1 - sqrt(1 - C_k²)."""
    return 1 - math.sqrt(max(0.0, 1 - math.exp(-2 * decay * k)))


@lru_cache(maxsize=65536)
def expected_information(loads: int, decay: float) -> float:
    """Fisher information of theta, over 4, that a schedule promises for so many loads; see `schedule`."""
    plan = schedule(loads, decay, 1 << 20)
    known = sum(n * (2 * k + 1) ** 2 * _mean_information(k, decay) for k, n in plan.ladder.items())
    return known + plan.left * max((2 * k + 1) * math.exp(-2 * decay * k) for k in candidates(plan.most))


def spent_loads(plan: Mapping[int, int]) -> int:
    """Uses of the loader and its inverse by shots after some iterates: 2k + 1 each."""
    return sum((2 * k + 1) * shots for k, shots in plan.items())


@dataclass(frozen=True, eq=False)
class Hits:
    """How often the shots of some amplitudes hit.

    Parameters
    ----------
    iterates : tuple of int
        Numbers of iterates, (K,), ascending.
    hits, shots : Tensor, float64, (..., I, K)
        Of I amplitudes that share a device. Leading dimensions are calls of their own.
    mixed : Tensor, float64, (I,)
        Probability of a hit of the mixture of all states of the register.
    """

    iterates: tuple[int, ...]
    hits: Tensor
    shots: Tensor
    mixed: Tensor


@dataclass(frozen=True, eq=False)
class Angles:
    """Estimates of cos(2 theta) = 1 - 2 P, P being the probability of a hit without iterates and noise.

    Parameters
    ----------
    value, lower, upper : Tensor, float64, (..., I)
        Estimates and the ends of their intervals.
    likeliest : Tensor, float64, (..., I)
        Where the likelihood is largest: `value` itself by "mle".
    decay : Tensor, float64, (..., 3)
        Fitted contrast, decay and shift of each call.
    decay_std_error : Tensor, float64, (..., 3)
    """

    value: Tensor
    lower: Tensor
    upper: Tensor
    likeliest: Tensor
    decay: Tensor
    decay_std_error: Tensor


def fit_angles(
    data: Hits, *, expected: FittedDecay | None, confidence: float, method: str = "bayes"
) -> Angles:
    """Estimate angles from hits.

    The decay is fitted to all amplitudes of a call. Its uncertainty, and by how much an amplitude's own decay
    may differ from it, are integrated out of the likelihood of each amplitude by the points of a cubature
    rule.

    Parameters
    ----------
    data : Hits
    expected : FittedDecay or None
        What the calibration predicts; None where there is no noise, and nothing is fitted.
    confidence : float
        Of the intervals.
    method : {"bayes", "mle"}
        "bayes": posterior mean and central interval under the prior that is uniform in theta, which is
        Jeffreys' without noise; where an end of all angles is likeliest, the interval reaches to that end.
        "mle": the maximum of the likelihood, and where twice its logarithm is within the quantile of
        chi-squared of it.

    Source: Suzuki et al. (2020) for the likelihood; Julier and Uhlmann (1997) for the cubature; Brown, Cai
    and DasGupta, Interval estimation for a binomial proportion (2001), section 4.1.2, for intervals that
    reach to an end.
    """
    shape = data.hits.shape[:-2]
    if expected is None:
        nuisance = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).expand(*shape, 3)
        spread = torch.zeros(*shape, 3, 3, dtype=torch.float64)
        points = nuisance[..., None, :]
    else:
        nuisance, spread = _fit_nuisance(data, expected)
        own = _spread(expected, (PLANE_CONTRAST, PLANE_LOG_DECAY, PLANE_SHIFT), PLANE_PARTS)
        root = torch.linalg.cholesky(spread + torch.diag(own.square())) * math.sqrt(3)
        steps = torch.cat([root.mT, -root.mT], -2)  # [..., 6, 3]
        points = _of_free(_free(nuisance)[..., None, :] + steps)
        # errors of the free parameters as those of the parameters themselves
        scale = torch.stack(
            [torch.ones_like(nuisance[..., 0]), nuisance[..., 1], torch.ones_like(nuisance[..., 0])], -1
        )
        spread = spread * scale[..., :, None] * scale[..., None, :]
    parts = []
    for part in _parts(data.hits.shape):
        some = Hits(data.iterates, data.hits[..., part, :], data.shots[..., part, :], data.mixed[part])
        parts.append(_read(*_refined(some, points), confidence, method))
    value, lower, upper, likeliest = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    return Angles(value, lower, upper, likeliest, nuisance, torch.diagonal(spread, dim1=-2, dim2=-1).sqrt())


def second_stage(data: Hits, expected: FittedDecay | None, left: Tensor, most: Tensor) -> Tensor:
    """Choose the shots of the second stage.

    Each amplitude gets the number of iterates with the most expected information for each load, given the
    hits of the first stage, and a part at another number.

    Parameters
    ----------
    data : Hits
        Of the first stage, with a column for each number of iterates that may be chosen.
    expected : FittedDecay or None
        As for `fit_angles`.
    left, most : Tensor, int64, (I,)
        Loads for the second stage, and the largest number of iterates.

    Returns
    -------
    Tensor, int64, (..., I, K)
        Shots of the second stage.
    """
    known = expected or FittedDecay()
    point = torch.tensor([known.contrast, known.per_iterate, known.shift], dtype=torch.float64)
    turns = torch.tensor([2 * k + 1 for k in data.iterates])
    shots = torch.zeros(data.hits.shape, dtype=torch.int64)
    for part in _parts(data.hits.shape):
        some = Hits(data.iterates, data.hits[..., part, :], data.shots[..., part, :], data.mixed[part])
        grid, log_likelihood = _refined(some, point[None])
        mass = (log_likelihood - log_likelihood.amax(-1, keepdim=True)).exp()
        mass = mass / mass.sum(-1, keepdim=True)
        mean = (mass * grid).sum(-1)
        spread = (mass * (grid - mean[..., None]).square()).sum(-1).sqrt()
        information = mean.new_zeros(*mean.shape, len(turns))
        for node, weight in zip((-1.5, -0.5, 0.5, 1.5), (0.15, 0.35, 0.35, 0.15), strict=True):
            theta = (mean + node * spread)[..., None]
            probability = _probability(theta, turns.double(), some.mixed[:, None], point).clamp(
                1e-9, 1 - 1e-9
            )
            slope = known.contrast * (-known.per_iterate * (turns - 1) / 2).exp() * (2 * turns * theta).sin()
            information += weight * turns * slope.square() / (4 * probability * (1 - probability))
        resolved = turns * spread[..., None] <= RESOLVED_PHASE
        resolved |= turns == turns.min()
        information = torch.where(resolved & ((turns - 1) / 2 <= most[part, None]), information, -1.0)
        chosen = information.argmax(-1, keepdim=True)
        other = (turns < 0.8 * turns[chosen]) | (turns > 1.25 * turns[chosen])
        second = torch.where(other, information, -2.0).argmax(-1, keepdim=True)
        for which, share in ((chosen, 1 - SECOND_SHARE), (second, SECOND_SHARE)):
            amount = (share * left[part, None] / turns[which]).floor().long()
            shots[..., part, :].scatter_add_(-1, which, amount)
    return shots


def _parts(shape: torch.Size) -> list[slice]:
    """Amplitudes whose likelihoods are in memory together, for hits of a shape (..., I, K)."""
    step = max(1, (1 << 21) // (GRID * max(1, math.prod(shape[:-2]))))
    return [slice(i, i + step) for i in range(0, shape[-2], step)]


def _free(nuisance: Tensor) -> Tensor:
    """(contrast, log decay, shift)."""
    contrast, decay, shift = nuisance.unbind(-1)
    return torch.stack([contrast, decay.clamp_min(1e-12).log(), shift], -1)


def _of_free(free: Tensor) -> Tensor:
    contrast, log_decay, shift = free.unbind(-1)
    return torch.stack([contrast.clamp(1e-3, 1.0), log_decay.exp(), shift], -1)


def _probability(theta: Tensor, turns: Tensor, mixed: Tensor, nuisance: Tensor) -> Tensor:
    """P_k for broadcast angles, turns 2k + 1, f, and (contrast, decay, shift) in the last dimension."""
    contrast, decay, shift = nuisance.unbind(-1)
    offset = (mixed + shift).clamp(0, 1)
    faded = contrast * (-decay * (turns - 1) / 2).exp()
    return offset + faded * ((turns * theta).sin().square() - offset)


def _log_likelihood(data: Hits, theta: Tensor, points: Tensor, coarse: Tensor | None = None) -> Tensor:
    """Logarithm of the likelihood, averaged over points (..., Q, 3), at angles (..., I, G)."""
    turns = torch.tensor([2.0 * k + 1 for k in data.iterates], dtype=torch.float64)
    total = theta.new_zeros(*theta.shape, points.shape[-2])
    for q in range(points.shape[-2]):
        nuisance = points[..., q, None, None, :]
        for i in range(len(turns)):
            used = data.shots[..., i] if coarse is None else data.shots[..., i] * coarse[..., i]
            if not bool(used.any()):
                continue
            hits = data.hits[..., i] if coarse is None else data.hits[..., i] * coarse[..., i]
            probability = _probability(theta, turns[i], data.mixed[:, None], nuisance).clamp(1e-12, 1 - 1e-12)
            total[..., q] += (
                hits[..., None] * probability.log() + (used - hits)[..., None] * (-probability).log1p()
            )
    return total.logsumexp(-1) - math.log(points.shape[-2])


def _refined(data: Hits, points: Tensor) -> tuple[Tensor, Tensor]:
    """Angles (..., I, G) and the logarithm of the likelihood there, where it is not negligible.

    The interval of angles shrinks from rung to rung: a rung is used once the grid resolves its phase. The
    search for it takes the middle of the points, because the points are near each other; the likelihood that
    is returned is averaged over all of them.
    """
    middle = points.mean(-2, keepdim=True)
    turns = torch.tensor([2.0 * k + 1 for k in data.iterates], dtype=torch.float64)
    unit = torch.linspace(0, 1, GRID, dtype=torch.float64)
    low = data.hits.new_zeros(data.hits.shape[:-1])
    high = torch.full_like(low, math.pi / 2)
    for _ in range(40):
        grid = low[..., None] + (high - low)[..., None] * unit
        step = (high - low) / (GRID - 1)
        resolved = turns * step[..., None] <= FINEST_PHASE  # [..., I, K]
        log_likelihood = _log_likelihood(data, grid, middle, resolved.double())
        peak = log_likelihood.amax(-1, keepdim=True)
        inside = log_likelihood > peak - DEPTH_OF_LIKELIHOOD
        first = inside.double().argmax(-1)
        last = GRID - 1 - inside.flip(-1).double().argmax(-1)
        left = (low + (first - 1) * step).clamp_min(0)
        right = (low + (last + 1) * step).clamp_max(math.pi / 2)
        shrunk = (right - left) < 0.8 * (high - low)
        stuck = ~shrunk & ~resolved.all(-1)
        if bool(
            stuck.any()
        ):  # peaks far apart that no finer rung can be told from: the highest one is followed
            best = log_likelihood.argmax(-1)
            around = GRID // 8
            left = torch.where(stuck, (low + (best - around) * step).clamp_min(0), left)
            right = torch.where(stuck, (low + (best + around) * step).clamp_max(math.pi / 2), right)
        if not bool((shrunk | stuck).any()):
            break
        moved = shrunk | stuck
        low, high = torch.where(moved, left, low), torch.where(moved, right, high)
    if points.shape[-2] > 1:
        log_likelihood = _log_likelihood(data, grid, points, resolved.double())
    return grid, log_likelihood


def _spread(expected: FittedDecay, least: tuple[float, float, float], parts: tuple[float, float]) -> Tensor:
    """Standard deviations of contrast, logarithm of the decay, and offset: (3,)."""
    lost = 1 - expected.contrast
    wrong = min(1.0, lost + expected.per_iterate)
    contrast, log_decay, shift = least
    return torch.tensor(
        [max(contrast, parts[0] * lost), log_decay, max(shift, parts[1] * wrong)], dtype=torch.float64
    )


def _fit_nuisance(data: Hits, expected: FittedDecay) -> tuple[Tensor, Tensor]:
    """Contrast, decay and shift of each call (..., 3), and the covariance of contrast, log decay and shift.

    Fisher scoring of the likelihood whose angles are integrated out. At the likeliest angles, which follow
    the noise of their few shots, the likelihood is largest at a contrast that is too large: by .01 for the 37
    amplitudes of eight rows of 8 keys at 1,024 loads.

    Sources: Neyman and Scott, Consistent estimates based on partially consistent observations (1948), for
    that; Louis, Finding the observed information matrix when using the EM algorithm (1982).
    """
    start = torch.tensor(
        [expected.contrast, max(expected.per_iterate, 1e-9), expected.shift], dtype=torch.float64
    ).expand(*data.hits.shape[:-2], 3)
    parts = []
    for part in _parts(data.hits.shape):
        some = Hits(data.iterates, data.hits[..., part, :], data.shots[..., part, :], data.mixed[part])
        parts.append((some, _refined(some, start[..., None, :])[0][..., ::NODE_STEP]))
    mean = _free(start)
    deviation = _spread(expected, (PRIOR_CONTRAST, PRIOR_LOG_DECAY, PRIOR_SHIFT), PRIOR_PARTS)
    free = mean.clone()
    for _ in range(SCORING_STEPS):
        gradient = (mean - free) / deviation.square()
        information = torch.diag(deviation**-2).expand(*free.shape, 3)
        for some, theta in parts:
            of_part = _marginal_scores(some, theta, free)
            gradient, information = gradient + of_part[0], information + of_part[1]
        covariance = _covariance(information, deviation)
        free = free + (covariance @ gradient[..., None])[..., 0].clamp(-0.3, 0.3)
    return _of_free(free), covariance


def _marginal_scores(data: Hits, theta: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (..., 3) of the log likelihood in the free parameters, and its information (..., 3, 3).

    The angles are integrated out by nodes theta (..., I, G) of equal distances.
    """
    point = _of_free(free)
    contrast, decay, shift = (x[..., None, None] for x in point.unbind(-1))
    offset = (data.mixed[:, None] + shift).clamp(0, 1)
    log_likelihood, score = torch.zeros_like(theta), theta.new_zeros(*theta.shape, 3)
    slopes, weights = [], []
    for i, k in enumerate(data.iterates):
        shots, hits = data.shots[..., i, None], data.hits[..., i, None]
        if not bool(shots.any()):
            continue
        fade = (-decay * k).exp()
        wave = ((2 * k + 1) * theta).sin().square() - offset
        probability = (offset + contrast * fade * wave).clamp(1e-6, 1 - 1e-6)
        log_likelihood += hits * probability.log() + (shots - hits) * (-probability).log1p()
        slope = torch.stack(
            [fade * wave, -decay * k * contrast * fade * wave, (1 - contrast * fade).expand_as(wave)], -1
        )
        weight = 1 / (probability * (1 - probability))
        score += ((hits - shots * probability) * weight)[..., None] * slope
        slopes.append(slope)
        weights.append(shots * weight)
    mass = (log_likelihood - log_likelihood.amax(-1, keepdim=True)).exp()
    mass[..., 0] /= 2
    mass[..., -1] /= 2
    mass = mass / mass.sum(-1, keepdim=True)
    mean = (mass[..., None] * score).sum(-2)
    away = score - mean[..., None, :]
    information = -torch.einsum("...ig,...iga,...igb->...ab", mass, away, away)
    for slope, weight in zip(slopes, weights, strict=True):
        information += torch.einsum("...ig,...iga,...igb->...ab", mass * weight, slope, slope)
    return mean.sum(-2), information


def _covariance(information: Tensor, deviation: Tensor) -> Tensor:
    """Inverse of the information (..., 3, 3), whose data never make what the prior knows less certain."""
    scale = deviation[:, None] * deviation
    known, directions = torch.linalg.eigh(information * scale)
    return directions @ (directions / known.clamp_min(1)[..., None, :]).mT * scale


def _read(
    grid: Tensor, log_likelihood: Tensor, confidence: float, method: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Estimate and interval of cos(2 theta), and where it is likeliest."""
    peak, at = log_likelihood.max(-1, keepdim=True)
    likeliest = (2 * grid.gather(-1, at)[..., 0]).cos()
    if method == "mle":
        drop = torch.distributions.Normal(0.0, 1.0).icdf(
            torch.tensor((1 + confidence) / 2, dtype=torch.float64)
        )
        inside = log_likelihood >= peak - drop.square() / 2
        first = (inside.double().argmax(-1, keepdim=True) - 1).clamp_min(0)
        last = (GRID - inside.flip(-1).double().argmax(-1, keepdim=True)).clamp_max(GRID - 1)
        upper, lower = ((2 * grid.gather(-1, i)[..., 0]).cos() for i in (first, last))
        return likeliest, lower, upper, likeliest
    mass = (log_likelihood - peak).exp()
    mass[..., 0] /= 2
    mass[..., -1] /= 2
    mass = mass / mass.sum(-1, keepdim=True)
    value = (mass * (2 * grid).cos()).sum(-1)
    cumulative = mass.cumsum(-1) - mass / 2
    tail = (1 - confidence) / 2
    ends = []
    for level in (1 - tail, tail):  # a larger angle has a smaller cosine
        after = torch.searchsorted(cumulative, torch.full_like(value[..., None], level)).clamp(1, GRID - 1)
        c0, c1 = cumulative.gather(-1, after - 1), cumulative.gather(-1, after)
        part = ((level - c0) / (c1 - c0).clamp_min(1e-300)).clamp(0, 1)
        angle = grid.gather(-1, after - 1) * (1 - part) + grid.gather(-1, after) * part
        ends.append((2 * angle[..., 0]).cos())
    # Where an end of all angles is likeliest, as where no shot hits, equal tails would never hold that end.
    lower = torch.where(at[..., 0] == GRID - 1, (2 * grid[..., -1]).cos(), ends[0])
    upper = torch.where(at[..., 0] == 0, (2 * grid[..., 0]).cos(), ends[1])
    return value, lower, upper, likeliest


def sum_of_estimates(
    value: Tensor, lower: Tensor, upper: Tensor, likeliest: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A weighted sum of independent estimates over the last dimension, and its interval.

    The distances of what is likeliest to its lower end add by squares, and so do those to its upper end, with
    weights >= 0. Distances of posterior means would make the interval miss on one side: the prior draws each
    mean towards the middle, by a little, and these little parts add up without squares.

    Source: Zou and Donner, Construction of confidence limits about effect measures (2008).
    """
    total, centre = (weights * value).sum(-1), (weights * likeliest).sum(-1)
    below = (weights * (likeliest - lower).clamp_min(0)).square().sum(-1).sqrt()
    above = (weights * (upper - likeliest).clamp_min(0)).square().sum(-1).sqrt()
    return total, torch.minimum(total, centre - below), torch.maximum(total, centre + above)
