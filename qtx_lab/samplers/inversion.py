"""The inversion of a row's cumulative distribution at given points, which most samplers share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError

INVERSION_BLOCK = 16
"""Keys in a block of `invert`: long rows are searched by block first, so that only block masses are summed
up.
"""

FEWEST_LIGHT = 16
"""Draws of keys that are not sure that an adaptive row makes at the least, or a little fewer: the search for
them is short. See `HeadTailSampler` and `SampledKVCache`."""


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
    mass = logits.new_empty(*lead, -(-n // INVERSION_BLOCK) * INVERSION_BLOCK)
    mass[..., n:] = 0
    torch.sub(logits, top.masked_fill(top == -torch.inf, 0), out=mass[..., :n]).exp_()
    return mass


def row_probabilities(logits: Tensor) -> Tensor:
    """softmax(logits) of rows (..., n); 0 everywhere in an all-masked row. Raises as `row_masses`."""
    mass = row_masses(logits)[..., : logits.shape[-1]]
    return mass / mass.sum(-1, keepdim=True).clamp_min(1)


def invert(mass: Tensor, points: Tensor, scale: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keys at given points of the cumulative masses of rows.

    Parameters
    ----------
    mass : Tensor, (..., N * INVERSION_BLOCK), >= 0
    points : Tensor, (..., T), float64 in [0, 1)
    scale : float or Tensor (..., 1), optional
        What a point of 1 stands for; the row's total mass where None.

    Returns
    -------
    indices : Tensor, int64, (..., T)
        min {j : F_j > scale * points_t}, never a key without mass; the last key with mass for a point past
        the row's total, 0 in a row without mass. Masses within a block have their own precision, those of
        whole blocks are summed in float64: the probability of a key is off by a rounding of its block's,
        however long the row.
    total : Tensor, (..., 1), float64
        The mass of each row.
    """
    *lead, padded = mass.shape
    parts = mass.view(-1, INVERSION_BLOCK)
    cdf = parts.sum(-1).view(*lead, padded // INVERSION_BLOCK).cumsum(-1, dtype=torch.float64)  # [..., N]
    total = cdf[..., -1:]
    empty = total == 0
    target = _below(points * (total if scale is None else scale), total)
    block = torch.searchsorted(cdf, target, right=True).masked_fill_(empty, 0)  # [..., T]
    rest = (target - F.pad(cdf, (1, 0)).gather(-1, block)).to(mass.dtype)  # left to go in the block

    row = torch.arange(cdf[..., 0].numel(), device=mass.device).view(*lead, 1)
    inside = F.embedding(block + row * cdf.shape[-1], parts).cumsum_(-1)  # [..., T, INVERSION_BLOCK]
    rest = _below(rest[..., None], inside[..., -1:])
    indices = block * INVERSION_BLOCK + inside.le_(rest).sum(-1).long()
    return indices.masked_fill_(empty, 0), total


def _below(x: Tensor, limit: Tensor) -> Tensor:
    """min(x, the number just below limit): what has mass above it, whatever was rounded."""
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))
