"""Draws from a cache's rows in plain torch: what the compiled pass computes, in any precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...samplers.inversion import FEWEST_LIGHT, invert, row_masses

FIRST_RATE, NEWTON_STEPS = 2.0, 2
"""Where the search for the draws a unit of mass starts, in draws, and its steps: see `sure_mass`."""

LEAST_MASS = 1e-30
"""The mass from which a key is sure is not below it."""


@dataclass(frozen=True)
class DrawRule:
    """How many keys a row draws, and how those whose mass the sketch may guess too low.

    Parameters
    ----------
    num_samples : int
        S.
    replicates : int
        R.
    defensive : float
        epsilon: the share of the draws that are not sure which are made from all keys alike.
    adaptive : bool
        S is the most that a row draws: see `sure_mass`.
    grouped : bool
        The query heads of a key head draw the same keys at each position.
    """

    num_samples: int
    replicates: int
    defensive: float
    adaptive: bool = False
    grouped: bool = False


@dataclass(frozen=True)
class DrawnRows:
    """Draws of rows (N, M), T = R S of each, and what they make.

    Parameters
    ----------
    indices : Tensor, int64, (N, M, T)
        The tokens that were drawn.
    weights : Tensor, (N, M, T)
        Of their values; 0 for a draw that found no key of its own.
    proposed : Tensor, (N, M, T)
        q of the drawn keys.
    inclusion : Tensor, (N, M, T)
        pi = min(1, c q), the probability that a replicate draws the key.
    rate : Tensor, (N, M, 1)
        c, the draws a unit of q.
    output : Tensor, (N, M, Ev)
    effective_sample_size : Tensor, (N, M)
        Kish's.
    """

    indices: Tensor
    weights: Tensor
    proposed: Tensor
    inclusion: Tensor
    rate: Tensor
    output: Tensor
    effective_sample_size: Tensor


def draw_rows(
    x: Tensor, scores: Tensor, points: Tensor, table: Tensor, order: Tensor, rule: DrawRule
) -> DrawnRows:
    """Draw keys by scores, and average their values by exact logits.

    With q the scores' softmax, raised by a uniform part, points that are equally far apart draw key j with
    probability pi_j = min(1, c q_j), c such that sum_j pi_j is S, or less for an adaptive rule. The exact
    logits l_j of the drawn keys weigh them, w_j proportional to exp(l_j) / pi_j (Hajek 1971). Where a rule is
    grouped, keys are drawn by the mean of q over the rows.

    Parameters
    ----------
    x : Tensor, (N, M, E)
        Queries times the scale; for a grouped rule the M rows of a group.
    scores : Tensor, (N, M, n)
        Guesses of the logits, in the order of the places, up to a shift of each row.
    points : Tensor, float64, (N, M, R S)
        (s + u) / S for each replicate.
    table : Tensor, (N, n or more, E + Ev)
        Keys and values of the tokens, side by side.
    order : Tensor, int64, (N, n or more)
        The token at each place.
    rule : DrawRule

    Raises
    ------
    ArgumentError
        If scores hold NaN or +inf.
    """
    n, features, num_samples = scores.shape[-1], x.shape[-1], rule.num_samples
    mass = row_masses(scores)
    own = mass
    if rule.grouped:
        own = mass / mass.sum(-1, keepdim=True)
        mass = own.mean(1, keepdim=True).expand_as(own).clone()
    limit, total = sure_mass(mass, n, rule)
    last = num_samples * limit.double()
    place, reached = invert(torch.minimum(mass, limit), points, scale=last)
    mass_drawn = mass.gather(-1, place)
    inclusion = (mass_drawn / limit).clamp_(max=1)
    proposed = own.gather(-1, place) if rule.grouped else mass_drawn / total
    indices = order[:, None].expand(-1, x.shape[1], -1).gather(-1, place)
    rows = rows_at(table, indices).to(x.dtype).flatten(0, 1)
    k, v = rows[..., :features], rows[..., features:]  # [N M, T, E]
    log_w = torch.bmm(x.flatten(0, 1)[:, None], k.mT).view(place.shape) - inclusion.log()
    log_w.masked_fill_(points * last >= reached, -torch.inf)  # past the last key
    by_replicate, log_w = (y.unflatten(-1, (-1, num_samples)) for y in (place, log_w))
    # A key of pi = 1 holds one point, or two by rounding.
    log_w[..., 1:].masked_fill_(by_replicate[..., 1:] == by_replicate[..., :-1], -torch.inf)
    weights = (log_w.softmax(-1) / log_w.shape[-2]).flatten(-2)
    output = torch.bmm(weights.flatten(0, 1)[:, None], v).view(*x.shape[:2], v.shape[-1])
    effective = weights.square().sum(-1).reciprocal()
    return DrawnRows(indices, weights, proposed, inclusion, total / limit, output, effective)


def rows_at(table: Tensor, indices: Tensor) -> Tensor:
    """Lines of a table (N, C, d) at indices (N, M, T): (N, M, T, d)."""
    first = torch.arange(table.shape[0], device=table.device) * table.shape[1]
    return F.embedding(indices + first[:, None, None], table.flatten(0, 1))


def sure_mass(mass: Tensor, n: int, rule: DrawRule) -> tuple[Tensor, Tensor]:
    """The mass 1 / c from which a key is drawn surely, and the total mass, each (N, M, 1).

    c solves sum_j min(1, c mass_j) = S by Newton's steps. The sum is concave in c, so that it does not exceed
    S from the first step on; what is missing to S after the last step are draws without a key.

    For an adaptive rule c is S over the total mass: only keys of a mass of 1 / S or more are sure, as they
    would be for systematic sampling, so that a row whose mass lies on few keys draws few. c is larger where
    this would leave fewer than `FEWEST_LIGHT` draws of keys that are not sure, and never more than S draws
    are made. Where rows have values of equal spread, this is how a sum of draws over many rows has the least
    sum of variances: to draw one more key takes as much off the variance of each row.

    Of the draws that are not sure, a share epsilon is made from all keys alike: then `mass` is raised in
    place. A share of all draws instead would be spent on keys without mass wherever most mass is sure.

    Parameters
    ----------
    mass : Tensor, (N, M, n or more)
        0 past the n keys.
    n : int
    rule : DrawRule
    """
    total, num_samples = mass.sum(-1, keepdim=True), rule.num_samples
    uniform = rule.defensive / (1 - rule.defensive)
    if n <= num_samples:  # the sum is never S: every key is drawn
        mass[..., :n] += total * (uniform / n)
        return torch.full_like(total, LEAST_MASS), total * (1 + uniform)
    most, work = total / num_samples, torch.empty_like(mass)
    limit = most if rule.adaptive else most / FIRST_RATE
    for step in range(NEWTON_STEPS + 1):
        sure = torch.ge(mass, limit, out=work).sum(-1, keepdim=True)
        light = torch.minimum(mass, limit, out=work).sum(-1, keepdim=True).addcmul_(sure, limit, value=-1)
        if step == NEWTON_STEPS - 1:
            raised = (light * uniform).clamp_min(n * LEAST_MASS / 2)  # below a sure mass
        left = num_samples - sure
        if rule.adaptive:
            left = torch.minimum(left, (light / most).clamp_min(FEWEST_LIGHT))
        limit = (light / left).clamp_min(LEAST_MASS)
        # Where as many keys were sure as there are draws, the search started too far out.
        limit = torch.minimum(torch.where(sure < num_samples, limit, most), most)
        if step == NEWTON_STEPS - 1:
            mass[..., :n] += raised / n
            total = total + raised
    return limit, total
