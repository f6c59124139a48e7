"""Rows of attention as masses in fixed point, and the points of a comb along them, in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox_reference import OFFSETS, ROUNDING, ROUNDING_ROUNDS, philox, uniform

PAGE = 64
"""Keys whose masses share an exponent. Draws depend on it, but on no other size of a block."""


GROUP = 8
"""Keys of a page whose masses are summed up by themselves: a draw is looked for among the sums, then among those keys."""


@dataclass(frozen=True)
class Masses:
    """Rows of keys' masses in fixed point, a page's in units of its own.

    Sums of whole numbers do not depend on the order they are summed in, so that a seed gives the same draws however
    the keys are split among blocks. A mass is rounded up with the probability of what rounding down would lose, which
    leaves draws unbiased and adds less than 2 S / units to the variance of S draws, relative to that of their own.

    Parameters
    ----------
    mass : Tensor, int64, (N, M, T, PAGE)
        2^(l - top) * units, rounded; 0 past the last key.
    sums : Tensor, int64, (N, M, T)
    top : Tensor, float32, (N, M, T)
        The page's largest base-2 logit, rounded up; -inf where nothing is seen.
    dtype : torch.dtype
        What masses are kept in, int16 or int32.
    """

    mass: Tensor
    sums: Tensor
    top: Tensor
    dtype: torch.dtype

    @property
    def fine(self) -> int:
        """Bits behind the point of the row's common unit."""
        return fine_bits(self.sums.shape[-1], self.dtype)

    @classmethod
    def of(cls, logits: Tensor, seed: Tensor, dtype: torch.dtype) -> Masses:
        """The masses of base-2 logits (N, M, n) as they are kept in int16 or int32."""
        units = UNITS[dtype]
        heads, _, n = logits.shape
        logits = F.pad(logits, (0, -n % PAGE), value=-torch.inf).unflatten(-1, (-1, PAGE))
        top = logits.amax(-1).ceil()
        exact = torch.exp2(logits - top.masked_fill(top == -torch.inf, 0)[..., None]) * units
        quarter = torch.arange(logits.shape[2] * PAGE // 4, device=logits.device)
        head = torch.arange(heads, device=logits.device)[:, None]
        words = torch.stack(philox(seed, quarter, head, 0, ROUNDING, rounds=ROUNDING_ROUNDS), -1).view(
            heads, 1, -1, PAGE
        )
        mass = (exact + uniform(words)).floor().long()
        return cls(mass, mass.sum(-1), top, dtype)

    def shifts(self) -> tuple[Tensor, Tensor]:
        """Bits by which a page's units are shifted up and down to the row's common ones, (N, M, T) each."""
        highest = self.top.amax(-1, keepdim=True)
        apart = torch.where(self.top > -torch.inf, highest - self.top, 100).clamp_max(100).long()
        return (self.fine - apart).clamp_min(0), (apart - self.fine).clamp_min(0)


UNITS = {torch.int16: 65534.0, torch.int32: float(1 << 23)}
"""Of a page's largest mass, or up to half of them; one less than fits, since float32 may round a sum with a number below 1 up."""


def least_bits(dtype: torch.dtype) -> int:
    """How many a page's sum has at the least, where any key is seen: its largest mass is half of `UNITS` or more."""
    return int(UNITS[dtype] / 2).bit_length()


def fine_bits(pages: int, dtype: torch.dtype) -> int:
    """Bits behind the point with which a row's total stays below 2^56."""
    return (34 if dtype == torch.int16 else 26) - math.ceil(math.log2(max(1, pages)))


def mass_dtype(total: int) -> torch.dtype:
    """16 bits a mass for up to 4096 draws, whose variance their rounding raises by an eighth at the very most."""
    return torch.int16 if total <= 4096 else torch.int32


def offsets(shape: tuple[int, ...], replicates: int, length: int, seed: Tensor) -> Tensor:
    """Where the combs of rows (N, M) start, in parts of the distance of their points: (N, M, R), rows of a group alike."""
    heads, rows = shape
    device = seed.device
    words = philox(
        seed,
        torch.arange(replicates, device=device),
        torch.arange(rows, device=device)[:, None] % length,
        torch.arange(heads, device=device)[:, None, None],
        OFFSETS,
    )
    return words[0].double() * 2.0**-32


def find_page(start: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The pages in which points (N, M, T) lie, and how far behind the pages' starts (N, M, pages)."""
    page = torch.searchsorted(start, points, right=True).sub_(1).clamp_min_(0)
    return page, points - start.gather(-1, page)
