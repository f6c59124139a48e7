"""How wrong a row's output will be at a number of draws, predicted from its probabilities before any draw."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..problem import AttentionProblem
from ..samplers import InversionSampler
from ..streams import Purpose, Stream

COMPONENTS = 8
"""Number of directions along which the components of every value are stored."""

PROBES = 4
"""Number of random directions that stand for all the others."""

FAR = tuple(4.0 * 2**i for i in range(8))
"""Thresholds of |v_j - c|^2, as multiples of its mean over the first keys: how often keys beyond each of them
are drawn is predicted separately."""


@dataclass(frozen=True)
class ValueTable:
    """A few numbers for each value of N heads, from which the error of a row can be predicted.

    A value is split into P, its components along `COMPONENTS` directions, and the residual R, of which only
    the components along `PROBES` random directions are stored. Values of few features have fewer directions.

    Parameters
    ----------
    centre : Tensor, (N, 1, d)
        c, the mean of the first values.
    directions : Tensor, (N, d, r)
        Orthonormal. The first ones span c and the principal axes of the first values, turned at random, so
        that none of them is one of those; the others are random ones within R.
    components : int
        How many of them belong to P.
    mean_distance : Tensor, (N, 1, 1)
        D, the mean of |v_j - c|^2 over the first values; |c|^2 where there are none.
    distance : Tensor, (N, n, 2 + 2 F)
        |v_j - c|^2 and its square over D; for each of `FAR`, 1 for keys that are further away, and |v_j -
        c|^2 for them.
    projections : Tensor, (N, n, r)
        The components of v_j - c.
    rest : Tensor, (N, n)
        |R (v_j - c)|, which is |R v_j|.
    rest_shared : Tensor, (N,)
        tr C^2 / (tr C)^2 for the covariance C of R v_j over keys: 1 over the number of directions in which
        they vary.
    """

    centre: Tensor
    directions: Tensor
    components: int
    mean_distance: Tensor
    distance: Tensor
    projections: Tensor
    rest: Tensor
    rest_shared: Tensor

    @classmethod
    def of(cls, problem: AttentionProblem, fitted: int, stream: Stream) -> ValueTable:
        """The table of a problem's values, with the centre and directions of the first `fitted` ones.

        Where that is 0, the centre is the first value, and the directions are random.
        """
        values, visible = problem.values, problem.visible_keys()
        if visible is not None:  # hidden values may be anything, also NaN
            values = torch.where(visible[..., None], values, 0)
        first = values[:, : max(1, fitted)]
        centre = first.mean(1, keepdim=True)
        directions = _directions(centre, first - centre, fitted > 0, stream)
        components = min(COMPONENTS, problem.width)
        centred = values - centre
        x = centred @ directions
        residual = centred - x[..., :components] @ directions[..., :components].mT
        limits = torch.finfo(values.dtype)
        distance = centred.square().sum(-1, keepdim=True)
        scale = (
            distance[:, :fitted].mean(1, keepdim=True) if fitted else centre.square().sum(-1, keepdim=True)
        )
        mean = scale.clamp_min(limits.tiny)
        square = (distance * (distance / mean)).clamp_max(limits.max**0.9)
        far = (distance > mean * distance.new_tensor(FAR)).to(distance.dtype)
        covariance = residual[:, : max(1, fitted)].mT @ residual[:, : max(1, fitted)]
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(limits.tiny)
        shared = (covariance / trace[:, None, None]).square().sum((1, 2))
        if fitted < 2 * problem.width:  # too few values to say in how many directions they vary
            shared = torch.ones_like(shared)
        return cls(
            centre,
            directions,
            components,
            mean,
            torch.cat((distance, square, far, far * distance), -1),
            x,
            residual.square().sum(-1).sqrt(),
            shared.clamp(1 / problem.width, 1),
        )


def _directions(centre: Tensor, away: Tensor, fitted: bool, stream: Stream) -> Tensor:
    """`ValueTable.directions` for values c + `away`; random ones where they are not to be `fitted`."""
    d = away.shape[-1]
    count, total = min(COMPONENTS, d), min(COMPONENTS + PROBES, d)
    number = stream.of_purpose(Purpose.PROBES).uniform_of_heads(1, total * d).view(-1, d, total)
    random = torch.special.ndtri(number.clamp_min(2.0**-53))  # normal, so that no direction is preferred
    size = away.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(away.dtype).tiny)
    x = (away / size).double()
    axes = torch.linalg.eigh(x.mT @ x).eigenvectors.flip(-1) if fitted else random
    longest = centre.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(away.dtype).tiny)
    span = ((centre / longest).double().mT, axes[..., : count - 1], random[..., count:])
    basis = torch.linalg.qr(torch.cat(span, -1)).Q
    turn = torch.linalg.qr(random[..., :count, :count]).Q
    return torch.cat((basis[..., :count] @ turn, basis[..., count:]), -1).to(away.dtype)


@dataclass(frozen=True)
class OutputSize:
    """Estimate and bounds of the size |o| of rows' outputs from the table alone; each (heads, rows).

    Parameters
    ----------
    projected : Tensor
        |P o|^2.
    probed : Tensor
        An estimate of |R o|^2 from the probes.
    probe_variance : float
        Its relative variance, if the direction of R o is uniformly random.
    least, most : Tensor
        Bounds of |o|^2.
    """

    projected: Tensor
    probed: Tensor
    probe_variance: float
    least: Tensor
    most: Tensor

    @classmethod
    def of(cls, p: Tensor, table: ValueTable, heads: slice) -> OutputSize:
        """The size of the output of rows p (heads, rows, n): |R o| <= sum_j p_j |R v_j|."""
        n, r = p.shape[-1], table.components
        mass = p.sum(-1, keepdim=True)  # 0 in a row that attends to nothing
        centre = table.centre[heads] @ table.directions[heads]
        along = (p @ table.projections[heads, :n] + mass * centre).square()
        projected, probed = along[..., :r].sum(-1), along[..., r:].sum(-1)
        rest = (p @ table.rest[heads, :n, None]).squeeze(-1)
        probes, others = along.shape[-1] - r, table.centre.shape[-1] - r
        ratio = others / max(1, probes)
        variance = 2 / max(1, probes) * (1 - probes / max(1, others)) if others else 0.0
        projected, probed, rest = projected.double(), probed.double(), rest.double()
        return cls(projected, ratio * probed, variance, projected + probed, projected + rest.square())


def rest_square(o: Tensor, table: ValueTable, heads: slice) -> Tensor:
    """|R o|^2 of outputs o (heads, rows, d), (heads, rows)."""
    along = o @ table.directions[heads][..., : table.components]
    return (o - along @ table.directions[heads][..., : table.components].mT).square().sum(-1).double()


@dataclass(frozen=True)
class Scale:
    """The measured mean square error over the predicted one, along the components and in R: (heads, rows)."""

    projected: Tensor
    rest: Tensor


@dataclass(frozen=True)
class ErrorModel:
    """The error of one replicate of rows, each of its own number of draws; everything (heads, rows).

    Parameters
    ----------
    projected, probed, rest : Tensor
        E|o_hat - o|^2 along the components, along the probes, and in all of R.
    shared : Tensor
        1 / f, where |o_hat - o|^2 has nearly the distribution of its mean times chi^2_f / f.
    rest_shared : Tensor
        The same of R (o_hat - o).
    jump : Tensor
        Root mean square of the change of the output by one draw of a rarely drawn key.
    far_rate, far_jump2 : Tensor, (heads, rows, F)
        How often keys beyond each threshold of `FAR` are drawn, and the mean square of the change of the
        output by one such draw.
    """

    projected: Tensor
    probed: Tensor
    rest: Tensor
    shared: Tensor
    rest_shared: Tensor
    jump: Tensor
    far_rate: Tensor
    far_jump2: Tensor

    @classmethod
    def of(
        cls, p: Tensor, counts: Tensor, sampler: InversionSampler, table: ValueTable, heads: slice
    ) -> ErrorModel:
        """At `counts` (heads, rows) draws of rows p (heads, rows, n).

        With a_j of `InversionSampler.variance_weights`, A = sum_j a_j and m the mean of the values by these
        weights the mean square is sum_j a_j |v_j - m|^2 = sum_j a_j |v_j - c|^2 - A |m - c|^2 (Hartley and
        Rao, Sampling with unequal probabilities and without replacement, 1962). In R, where m is not known,
        the second term is taken to be the same share of the first as along the probes.

        The square of a normal error of covariance C has nearly the distribution of tr C chi^2_f / f with f =
        (tr C)^2 / tr C^2 (Box, Some theorems on quadratic forms, 1954). For the components tr C^2 is
        estimated from the diagonal of C, sum_i C_ii^2 = ((tr C)^2 + 2 tr C^2) / (r + 2) on average over turns
        of r axes; for R, of C = sum_j b_j u_j u_j' with unit vectors u_j, it is (tr C)^2 (h + (1 - h)
        `ValueTable.rest_shared`), with the share h = sum_j b_j^2 / (sum_j b_j)^2 of pairs of a key with
        itself.
        """
        n, r = p.shape[-1], table.components
        tiny, eps = torch.finfo(p.dtype).tiny, torch.finfo(p.dtype).eps
        distance, x = table.distance[heads, :n], table.projections[heads, :n]
        a, weight = sampler.variance_weights(p, counts[..., None])
        weight_sum = a.sum(-1, keepdim=True).clamp_min(tiny)
        sums = a @ distance
        second, fourth, far, far_away = sums[..., 0], sums[..., 1], *sums[..., 2:].chunk(2, -1)
        square = a @ x.square()
        # The second term stands for the rounding of the difference.
        variances = (square - (a @ x).square() / weight_sum).clamp_min(0) + 4 * eps * square
        projected, probed = variances[..., :r].sum(-1), variances[..., r:].sum(-1)
        rest = (second - square[..., :r].sum(-1)).clamp_min(0)
        rest = rest * (probed / square[..., r:].sum(-1).clamp_min(tiny)).clamp_max(1)
        total = (projected + rest).clamp_min(tiny)
        h = (a * distance[..., 0].unsqueeze(1) / second.clamp_min(tiny)[..., None]).square().sum(-1)
        share = (projected / total).square()
        of_projected = ((r + 2) * (variances[..., :r] / total[..., None]).square().sum(-1) - share) / 2
        of_projected = torch.minimum(torch.maximum(of_projected, share / r), share)
        rest_shared = (h + (1 - h) * table.rest_shared[heads, None]).clamp_max(1)
        shared = torch.maximum(of_projected + (rest / total).square() * rest_shared, h).clamp_max(1)
        jump = weight[..., 0] * (fourth / second.clamp_min(tiny) * table.mean_distance[heads, 0]).sqrt()
        rate = far / weight.square().clamp_min(tiny)
        far_jump2 = weight.square() * far_away / far.clamp_min(tiny)
        fields = (projected, probed, rest, shared, rest_shared, jump, rate, far_jump2)
        return cls(*(x.double() for x in fields))

    @property
    def total(self) -> Tensor:
        """E|o_hat - o|^2."""
        return self.projected + self.rest

    def scaled(self, scale: Scale) -> ErrorModel:
        """The same model with its mean squares multiplied by `scale`."""
        return replace(self, projected=self.projected * scale.projected, rest=self.rest * scale.rest)

    def quantile(self, confidence: float) -> Tensor:
        """The square of what |o_hat - o| does not exceed with probability `confidence`.

        (sqrt(x_f tr C) + c jump)^2, x_f the quantile of chi^2_f / f, c of `jump_factor`; and no less than
        tr C with the square of a jump to keys so far away that one of them is drawn with probability 1 -
        `confidence`.
        """
        table = _quantiles(confidence).to(self.shared)
        place = self.shared.clamp(0, 1) * (len(table) - 1)
        below = place.long().clamp_max(len(table) - 2)
        x = torch.lerp(table[below], table[below + 1], place - below)
        usual = ((self.total * x).sqrt() + jump_factor(confidence) * self.jump).square()
        rare = torch.where(self.far_rate >= -math.log(confidence), self.far_jump2, 0).amax(-1)
        return torch.maximum(usual, self.total + rare)


@cache
def _quantiles(confidence: float) -> Tensor:
    """Quantiles of chi^2_f / f for 1 / f = 0, 1/64, ..., 1."""
    from scipy import special

    shared = np.linspace(0, 1, 65)[1:]
    return torch.from_numpy(np.append(1.0, 2 * special.gammaincinv(0.5 / shared, confidence) * shared))


@cache
def jump_factor(confidence: float) -> float:
    """c such that |N - m| <= z sqrt(m) + c with probability `confidence` for Poisson counts N of any mean m.

    z is the two-sided quantile of the normal distribution. The worst means are those where another
    count just stops being rare enough: P(N >= k) = 1 - confidence.

    >>> round(jump_factor(0.95), 3)
    0.505
    """
    from scipy import special

    z = float(-special.ndtri((1 - confidence) / 2))
    k = torch.arange(1, 33, dtype=torch.float64)
    m = torch.from_numpy(special.gammaincinv(k.numpy(), 1 - confidence))
    return max(0.0, float((k - m - z * m.sqrt()).max()))


def student_factor(confidence: float) -> float:
    """How many times the relative variance of an estimated variance, halved, a squared quantile grows.

    Of Student's t with nu degrees of freedom t^2 = z^2 (1 + (z^2 + 1) / (2 nu) + ...), and the estimated
    variance has the relative variance 2 / nu.
    """
    from scipy import special

    return float(-special.ndtri((1 - confidence) / 2)) ** 2 + 1
