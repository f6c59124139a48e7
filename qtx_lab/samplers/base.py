"""What a sampler is, and the inversion of a row's distribution that most samplers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError, DtypeError, ShapeError
from ..estimates import Draws
from .value_order import value_order


class Sampler(Protocol):
    """Turns rows of logits into draws."""

    name: str
    unbiased: bool
    """Whether E[sum_s weights_s f(indices_s)] = sum_j p_j f(j) for every f."""
    independent: bool
    """Whether the draws of one replicate are i.i.d. from p, so that one replicate gives error bars."""

    def draw(
        self,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        generator: torch.Generator | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw `replicates` times `num_samples` keys from every row.

        Parameters
        ----------
        logits : Tensor, (..., n), float32 or float64
            Unnormalised log-probabilities; -inf where a key is masked. A row of nothing but -inf
            gets draws of weight 0.
        num_samples : int
            S >= 1, the draws of a replicate.
        values : Tensor, (..., n, d), optional
            What will be averaged, for samplers that use it.
        generator : torch.Generator, optional
            The only source of randomness; torch's default one for the device where None.
        replicates : int
            R >= 1 independent repetitions.

        Returns
        -------
        Draws
            indices and weights (..., R * S).

        Raises
        ------
        ArgumentError, ShapeError, DtypeError
            If num_samples or replicates is below 1, or if logits has no keys, a NaN, +inf or another dtype.
        """
        ...


def check_draw_arguments(logits: Tensor, num_samples: int, replicates: int) -> None:
    """Refuse what no sampler can draw from (see `Sampler.draw`); `row_masses` refuses NaN and +inf."""
    check_count("num_samples", num_samples)
    check_count("replicates", replicates)
    if not isinstance(logits, Tensor) or logits.dtype not in (torch.float32, torch.float64):
        given = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise DtypeError(f"logits is {given}; it must be a float32 or float64 tensor.")
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ShapeError(f"logits has shape {tuple(logits.shape)}; it must be (..., n) with n >= 1 keys.")


class InversionSampler(ABC):
    """Base of the samplers that invert each row's cumulative distribution at points of [0, 1).

    What makes them differ is where the points lie: `points`. `sampled_attention` makes the points of all
    rows at once and places them block by block.
    """

    name: str
    unbiased = True
    independent = False
    ordered = False
    """Whether the keys are laid out in value order first (see `value_order`)."""
    joint = False
    """Whether the rows of a head share their randomness."""

    @abstractmethod
    def points(self, rows: tuple[int, ...], num_samples: int, replicates: int, uniform: Uniform) -> Tensor:
        """Points (*rows, R, S), float64 in [0, 1), replicates independent.

        Averaged over a replicate's points, which key they hit must have the distribution of a uniform number.

        The last of `rows` counts queries of the same head, which may share a point set.
        """

    def count_variance(self, expected: Tensor) -> Tensor | None:
        """Variance of how often a key is drawn in a replicate, given how often it is on average; None: not known.

        Used for error bars. Here that of a comb, f (1 - f) with f the fractional part: a key is drawn as often as
        its share, rounded down or up.
        """
        f = expected.frac()
        return f * (1 - f)

    def variance_weights(self, p: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
        """a_j of rows p (..., n), and the weight w (..., 1) of a draw that varies.

        sum_j a_j (v_j - c)^2, for any c, is above the variance of one replicate, if keys lie in random order or neighbours
        in it are alike: a_j = c_j w^2 with the variance c_j of a key's count (`count_variance`), 0 for one that is sure.
        """
        variance = self.count_variance(num_samples * p)
        assert variance is not None
        return variance / num_samples**2, torch.full_like(p[..., :1], 1 / num_samples)

    def place(self, logits: Tensor, points: Tensor) -> Draws:
        """Draws at given points (..., R, S) of rows (..., n)."""
        mass = row_masses(logits)
        indices, total = invert(mass, points.flatten(-2))
        probabilities = mass.gather(-1, indices) / total.clamp_min(1).to(mass.dtype)
        weights = torch.full_like(probabilities, 1 / indices.shape[-1]).masked_fill_(total == 0, 0)
        return Draws(indices, weights, probabilities, points.shape[-2])

    def draw(
        self,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        generator: torch.Generator | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw keys: see `Sampler.draw`."""
        check_draw_arguments(logits, num_samples, replicates)
        points = self.points(
            tuple(logits.shape[:-1]), num_samples, replicates, Uniform(generator, logits.device)
        )
        if not self.ordered or values is None:
            return self.place(logits, points)
        order = value_order(values)  # [..., n], for rows of logits [..., L, n]
        order = order.unsqueeze(-2).expand(logits.shape) if logits.ndim > 1 else order
        draws = self.place(logits.gather(-1, order), points)
        return replace(draws, indices=order.gather(-1, draws.indices))

    def sample_attention_weights(
        self, logits: Tensor, num_samples: int, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Dense attention weights (..., n) estimated from `num_samples` draws of each row (..., n)."""
        return self.draw(logits, num_samples, generator=generator).dense(logits.shape[-1])


@dataclass(frozen=True)
class Uniform:
    """Uniform numbers in [0, 1) from a generator, for tensors on a device."""

    generator: torch.Generator | None
    device: torch.device

    def __call__(self, *shape: int) -> Tensor:
        """float64 with 53 random bits, of this shape.

        float32 has 24 bits: a key of probability 1e-5 would be drawn up to 0.6 % too often.
        """
        source = self.device if self.generator is None else self.generator.device
        u = torch.rand(shape, generator=self.generator, device=source, dtype=torch.float64)
        return u.to(self.device)


BLOCK = 16
"""Keys a block of `invert`: long rows are searched by block first, so that only block masses are summed up."""


def row_masses(logits: Tensor) -> Tensor:
    """exp(logits - max) of rows (..., n), padded by zeros to whole blocks; all zero in an all-masked row.

    Raises
    ------
    ArgumentError
        If logits holds NaN or +inf.
    """
    *lead, n = logits.shape
    top = logits.amax(-1, keepdim=True)
    if not bool((top < torch.inf).all()):  # also False for NaN
        raise ArgumentError("logits holds NaN or +inf; only finite numbers and -inf are allowed.")
    mass = logits.new_empty(*lead, -(-n // BLOCK) * BLOCK)
    mass[..., n:] = 0
    torch.sub(logits, top.masked_fill(top == -torch.inf, 0), out=mass[..., :n]).exp_()
    return mass


def invert(mass: Tensor, points: Tensor, scale: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keys at given points of the cumulative masses of rows.

    Parameters
    ----------
    mass : Tensor, (..., N * BLOCK), >= 0
    points : Tensor, (..., T), float64 in [0, 1)
    scale : float or Tensor (..., 1), optional
        What a point of 1 stands for; the row's total mass where None.

    Returns
    -------
    indices : Tensor, int64, (..., T)
        min {j : F_j > scale * points_t}, never a key without mass; the last key with mass for a point past the
        row's total, 0 in a row without mass. Masses within a block have their own precision, those of whole blocks
        are summed in float64: the probability of a key is off by a rounding of its block's, however long the row.
    total : Tensor, (..., 1), float64
        The mass of each row.
    """
    *lead, padded = mass.shape
    blocks = mass.view(-1, BLOCK)
    cdf = blocks.sum(-1).view(*lead, padded // BLOCK).cumsum(-1, dtype=torch.float64)  # [..., N]
    total = cdf[..., -1:]
    empty = total == 0
    target = _below(points * (total if scale is None else scale), total)
    block = torch.searchsorted(cdf, target, right=True).masked_fill_(empty, 0)  # [..., T]
    rest = (target - F.pad(cdf, (1, 0)).gather(-1, block)).to(mass.dtype)  # left to find in the block

    row = torch.arange(cdf[..., 0].numel(), device=mass.device).view(*lead, 1)
    inside = F.embedding(block + row * cdf.shape[-1], blocks).cumsum_(-1)  # [..., T, BLOCK]
    rest = _below(rest[..., None], inside[..., -1:])
    indices = block * BLOCK + inside.le_(rest).sum(-1).long()
    return indices.masked_fill_(empty, 0), total


def _below(x: Tensor, limit: Tensor) -> Tensor:
    """min(x, the number just below limit): what has mass above it, whatever was rounded."""
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))
