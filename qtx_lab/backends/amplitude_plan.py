"""What an amplitude estimation measures: planes of signs, and the loads that each of them gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..circuits.amplitude import sign_planes
from ..circuits.base import num_bits
from ..errors import ArgumentError
from .amplitude_fit import FittedDecay, Hits, expected_information, second_stage

LEAST_LOADS = 16
"""Fewest loads of the row that are spent on a plane of signs."""

RESIDUAL_PARTS = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6)
"""Parts of the loads of an output that the residual may get."""

PLANE_VARIANCE = 0.8
"""Variance of a plane's difference of probabilities, times the information that its schedule promises."""


@dataclass(frozen=True, eq=False, repr=False)
class Measured:
    """What the shots of an `AmplitudePlan` gave. Leading dimensions are repetitions.

    Parameters
    ----------
    hits : Tensor, float64, (..., I, K)
        How often the shots of each plane gave a key of sign -1.
    shots : Tensor, int64, (..., I, K)
        Shots of both stages.
    counts : Tensor, float64, (..., R, d, 2^m)
        How often each value of the register was measured by the shots for the residual.
    """

    hits: Tensor
    shots: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class AmplitudeProbabilities:
    """What the shots of an `AmplitudePlan` are drawn from.

    Parameters
    ----------
    hits : Tensor, float64, (I, K)
        Probability of a hit, a key of sign -1, of each plane after each number of iterates.
    keys : Tensor, float64, (R, 2^m)
        Probabilities of the register's values for each row, without iterates.
    """

    hits: Tensor
    keys: Tensor

    def draw(self, plan: AmplitudePlan, repetitions: int, generator: torch.Generator) -> Measured:
        """Repeat all shots of a plan, with repetitions as the first dimension.

        Hits are binomial and counts multinomial: repetitions that are drawn so have the distribution of
        those that are simulated shot by shot.
        """
        chance = self.hits.expand(repetitions, *self.hits.shape).contiguous()
        shots = plan.shots.double().expand_as(chance).contiguous()
        hits = torch.binomial(shots, chance, generator=generator)
        second = plan.second_shots(hits).double()
        hits += torch.binomial(second, chance, generator=generator)
        rows, d = plan.residual_shots.shape
        left = plan.residual_shots.double().expand(repetitions, rows, d).clone()
        share = (self.keys / self.keys.sum(-1, keepdim=True).clamp_min(1e-300))[:, None].expand(rows, d, -1)
        counts, rest = [], torch.ones(rows, d, dtype=torch.float64)
        for i in range(share.shape[-1]):  # each binomial of what the values before it left
            chance = (share[..., i] / rest.clamp_min(1e-15)).clamp(0, 1)
            counts.append(torch.binomial(left, chance.expand_as(left).contiguous(), generator=generator))
            left, rest = left - counts[-1], rest - share[..., i]
        return Measured(hits, (shots + second).long(), torch.stack(counts, -1))


@dataclass(frozen=True, eq=False, repr=False)
class AmplitudePlan:
    """What an amplitude estimation measures: I planes of signs, each with a schedule of iterates.

    Parameters
    ----------
    p, signs : Tensor, (I, n)
        The row of each plane, and its signs.
    output : Tensor, int64, (I,)
        Which of the R × d outputs the plane belongs to.
    weights : Tensor, float64, (I,)
        With which the plane's difference of probabilities is added to the output.
    iterates : tuple of int
        Numbers of Grover iterates, (K,), ascending.
    shots : Tensor, int64, (I, K)
        Shots of each plane after each number of iterates, in the first stage.
    left, most : Tensor, int64, (I,)
        Loads of each plane for the second stage, and its largest number of iterates.
    rows : Tensor, float64, (R, n)
        The rows.
    centre, scale : Tensor, float64, (R, d)
        Middle and half width of the range of the planes' sums.
    residual : Tensor, float64, (R, d, n)
        What the planes leave of the values. Its mean is estimated from shots without iterates.
    residual_shots : Tensor, int64, (R, d)
        Their number.
    expected : FittedDecay or None
        The decay that the device's calibration predicts; None where there is no noise.
    """

    p: Tensor
    signs: Tensor
    output: Tensor
    weights: Tensor
    iterates: tuple[int, ...]
    shots: Tensor
    left: Tensor
    most: Tensor
    rows: Tensor
    centre: Tensor
    scale: Tensor
    residual: Tensor
    residual_shots: Tensor
    expected: FittedDecay | None

    @property
    def mixed(self) -> Tensor:
        """Probability of a hit in the mixture of all states of the register, float64 (I,)."""
        return (self.signs < 0).sum(-1) / float(1 << num_bits(self.rows.shape[-1]))

    @property
    def minus(self) -> Tensor:
        """1 at the register's values that are keys of sign -1: float64 (I, 2^m)."""
        n = self.p.shape[-1]
        return F.pad((self.signs < 0).double(), (0, (1 << num_bits(n)) - n))

    def second_shots(self, hits: Tensor) -> Tensor:
        """Shots of the second stage, int64 (..., I, K), which the hits of the first (..., I, K) suggest."""
        if not len(self.p):
            return torch.zeros(hits.shape, dtype=torch.int64)
        data = Hits(self.iterates, hits, self.shots.double().expand_as(hits), self.mixed)
        return second_stage(data, self.expected, self.left, self.most)

    def loads(self, shots: Tensor) -> Tensor:
        """Uses of each row's loader or its inverse: int64 (R, d).

        A shot after k iterates uses them 2k + 1 times. `shots`, int64 (I, K), are those of both stages.
        """
        each = (shots * (2 * torch.tensor(self.iterates, dtype=torch.int64) + 1)).sum(-1)
        return self.residual_shots.flatten().index_add(0, self.output, each).view_as(self.centre)

    def ideal_probabilities(self) -> AmplitudeProbabilities:
        """What an ideal device gives: a hit after k iterates has the probability sin²((2k + 1) theta)."""
        theta = (self.p * (self.signs < 0)).sum(-1).clamp(0, 1).sqrt().asin()
        hits = (theta[:, None] * (2 * torch.tensor(self.iterates) + 1)).sin().square()
        states = 1 << num_bits(self.rows.shape[-1])
        return AmplitudeProbabilities(hits, F.pad(self.rows, (0, states - self.rows.shape[-1])))


@dataclass(frozen=True, eq=False)
class PlaneShares:
    """Planes (O, T) of O outputs, with the loads of each, and the loads of the residual (O,)."""

    centre: Tensor
    weights: Tensor
    signs: Tensor
    residual: Tensor
    loads: Tensor
    residual_loads: Tensor
    decay: float


def best_shares(values: Tensor, loads: int, decay: float) -> PlaneShares:
    """Choose the planes of each output, values (O, n), and share its loads among them and the residual."""
    count, n = values.shape
    best = torch.full((count,), torch.inf, dtype=torch.float64)
    shares = PlaneShares(
        values[:, 0].clone(),
        values.new_zeros(count, n - 1),
        torch.ones(count, n - 1, n, dtype=torch.int8),
        torch.zeros_like(values),
        torch.zeros(count, n - 1, dtype=torch.int64),
        torch.zeros(count, dtype=torch.int64),
        decay,
    )
    for number in range(1, n):
        planes = sign_planes(values, number)
        used = planes.weights > 0
        spread = planes.residual.square().mean(-1).sqrt()
        powers = planes.weights.pow(2 / 3)
        for part in RESIDUAL_PARTS:
            residual_loads = torch.where(spread > 0, math.floor(part * loads), 0)
            share = powers / powers.sum(-1, keepdim=True).clamp_min(1e-300)
            each = (share * (loads - residual_loads)[:, None]).floor().long()
            # few distinct numbers of loads, so that few schedules are made
            each = torch.tensor([_two_digits(x) for x in each.flatten().tolist()]).view(each.shape)
            allowed = (~used | (each >= LEAST_LOADS)).all(-1) & used.any(-1)
            information = torch.tensor([expected_information(x, decay) for x in each.flatten().tolist()])
            variance = (planes.weights.square() / information.view(each.shape).clamp_min(1e-9)).sum(-1)
            variance = PLANE_VARIANCE * variance + spread.square() / residual_loads.clamp_min(1)
            better = allowed & (variance < best)
            best = torch.where(better, variance, best)
            new = (planes.weights, planes.signs, torch.where(used, each, 0))
            for old, x in zip((shares.weights, shares.signs, shares.loads), new, strict=True):
                old[better, :number] = x[better].to(old.dtype)
            shares.centre[better] = planes.centre[better, 0]
            shares.residual[better] = planes.residual[better]
            shares.residual_loads[better] = residual_loads[better]
    lacking = best.isinf() & (values != values[:, :1]).any(-1)
    if bool(lacking.any()):
        raise ArgumentError(f"loads={loads} is not allowed: at least {LEAST_LOADS} are needed.")
    return shares


def _two_digits(x: int) -> int:
    """Round down to 1/64 of the number's size.

    >>> _two_digits(1000), _two_digits(50)
    (992, 50)
    """
    shift = max(0, x.bit_length() - 6)
    return x >> shift << shift
