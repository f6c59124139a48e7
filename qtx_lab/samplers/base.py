"""What a sampler is, and the inversion of a row's distribution that most samplers share."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, DtypeError, ShapeError
from ..estimates import Draws


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
    """Refuse what no sampler can draw from (see `Sampler.draw`)."""
    check_count("num_samples", num_samples)
    check_count("replicates", replicates)
    if not isinstance(logits, Tensor) or logits.dtype not in (torch.float32, torch.float64):
        given = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise DtypeError(f"logits is {given}; it must be a float32 or float64 tensor.")
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ShapeError(f"logits has shape {tuple(logits.shape)}; it must be (..., n) with n >= 1 keys.")
    if logits.numel() and not bool(logits.amax() < torch.inf):  # also False for NaN
        raise ArgumentError("logits holds NaN or +inf; only finite numbers and -inf are allowed.")


def check_count(argument: str, given: object) -> None:
    """Refuse a count that is not a whole number >= 1."""
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ArgumentError(f"{argument}={given!r} is not allowed: it must be a whole number of at least 1.")


def uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1) with 53 random bits, float64, on `like`'s device.

    float32 has 24 bits: a key of probability 1e-5 would be drawn up to 0.6 % too often.
    """
    device = like.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=device, dtype=torch.float64).to(like.device)


BLOCK = 16
"""Keys a block of `invert`: long rows are searched by block first, so that only block masses are summed up."""


def invert(logits: Tensor, points: Tensor, replicates: int) -> Draws:
    """Draws at given points of each row's cumulative distribution.

    Parameters
    ----------
    logits : Tensor, (..., n)
    points : Tensor, (..., T), float64 in [0, 1)
        Where the cumulative distribution is inverted: index_t = min {j : F_j > points_t}.
    replicates : int
        How many repetitions the T points hold.

    Returns
    -------
    Draws
        Of equal weights 1 / T; never a masked key; probabilities known. Masses within a block of `BLOCK` keys
        have the logits' precision, those of whole blocks are summed in float64: the probability of a key is
        off by a rounding of its block's, however long the row.
    """
    *lead, n = logits.shape
    top = logits.amax(-1, keepdim=True)
    empty = top == -torch.inf
    mass = logits.new_empty(*lead, -(-n // BLOCK) * BLOCK)  # unnormalised p, the largest 1, padded by 0
    mass[..., n:] = 0
    torch.sub(logits, top.masked_fill(empty, 0), out=mass[..., :n]).exp_()
    blocks = mass.view(-1, BLOCK)

    cdf = (
        blocks.sum(-1).view(*lead, mass.shape[-1] // BLOCK).cumsum(-1, dtype=torch.float64)
    )  # [..., N], over whole blocks
    total = cdf[..., -1:]
    target = _below(points * total, total)
    block = torch.searchsorted(cdf, target, right=True).masked_fill_(empty, 0)  # [..., T]
    rest = (target - F.pad(cdf, (1, 0)).gather(-1, block)).to(mass.dtype)  # left to find in the block

    row = torch.arange(cdf[..., 0].numel(), device=logits.device).view(*lead, 1)
    inside = F.embedding(block + row * cdf.shape[-1], blocks).cumsum_(-1)  # [..., T, BLOCK]
    rest = _below(rest[..., None], inside[..., -1:])
    indices = block * BLOCK + inside.le_(rest).sum(-1).long()
    indices = indices.masked_fill_(empty, 0)

    probabilities = mass.gather(-1, indices) / total.clamp_min_(1).to(mass.dtype)
    weights = torch.full_like(probabilities, 1 / points.shape[-1]).masked_fill_(empty, 0)
    return Draws(indices, weights, probabilities, replicates)


def _below(x: Tensor, limit: Tensor) -> Tensor:
    """min(x, the number just below limit): what has mass above it, whatever was rounded."""
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))
