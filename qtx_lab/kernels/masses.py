"""Rows of attention as whole numbers, and combs of equally spaced points along them, in plain torch.

A row of n keys is cut into T pages of `PAGE` keys. The mass of a key is its probability, but for a factor,
rounded at random to a whole number of the page's unit. Sums of whole numbers do not depend on the order of
the summands, so the same seed gives the same draws however the keys are spread over blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..streams import Purpose, Stream, philox

PAGE = 64
"""Keys whose masses have a unit of their own. Draws depend on it, but on no other size of a block."""

SUBPAGE = 8
"""Keys whose masses are summed: a draw is located among the sums of a page, then among the keys of a sum."""

UNITS = {torch.int16: 65534.0, torch.int32: float(1 << 23)}
"""The largest mass of a page for each dtype that holds masses; it is between half of this and all of it.

One less than fits, since float32 may round the sum of a mass and a number below 1 up.
"""

ROUNDING_ROUNDS = 7
"""Rounds of Philox for rounding masses, which takes as many numbers as there are keys.

They are the fewest that pass BigCrush (Salmon and others, 2011, table 2).
"""


def mass_dtype(draws: int) -> torch.dtype:
    """The dtype of masses for this number of draws, over all replicates.

    Rounding to 16 bits raises the variance of 4096 draws by an eighth at most; more draws get 32 bits.
    """
    return torch.int16 if draws <= 4096 else torch.int32


def group_dtype(draws: int, num_keys: int) -> torch.dtype:
    """The dtype of the masses that a group shares.

    16 bits tell keys of a page apart down to a thousandth of its heaviest one; with many draws for each key,
    rarer ones count too.
    """
    return torch.int16 if 16 * draws <= num_keys else torch.int32


def group_units(group: int, dtype: torch.dtype) -> float:
    """The largest mass of one of G rows, such that the mass of all of them fits."""
    return float(int(UNITS[dtype]) // group)


def min_mass_bits(dtype: torch.dtype) -> int:
    """The least number of bits of a page's mass where any key is seen."""
    return int(UNITS[dtype] / 2).bit_length()


def fraction_bits(pages: int, dtype: torch.dtype) -> int:
    """Bits after the binary point of the row's unit, so that the mass of `pages` pages stays below 2^56."""
    return (34 if dtype == torch.int16 else 26) - math.ceil(math.log2(max(1, pages)))


@dataclass(frozen=True)
class Masses:
    """The masses of N heads of M rows, each page in its own unit.

    A mass is rounded up with the probability of what rounding down would lose. That leaves draws unbiased and
    adds less than 2 S / `UNITS` to the variance of S draws, relative to their own.

    Parameters
    ----------
    mass : Tensor, int64, (N, M, T, PAGE)
        2^(logit - page_exponent) * UNITS, rounded; 0 past the last key.
    page_mass : Tensor, int64, (N, M, T)
        The sum of each page.
    page_exponent : Tensor, float32, (N, M, T)
        The page's largest base-2 logit, rounded up; -inf where every key is masked.
    dtype : torch.dtype
        What kernels hold masses in: int16, read without a sign, or int32.
    """

    mass: Tensor
    page_mass: Tensor
    page_exponent: Tensor
    dtype: torch.dtype
    min_bits: int
    """The least number of bits of a page's mass where any key is seen."""
    fraction_bits: int
    """Bits after the binary point of the row's unit."""

    @classmethod
    def of(cls, logits: Tensor, stream: Stream, dtype: torch.dtype) -> Masses:
        """Round the masses of base-2 logits (N, M, n)."""
        logits = F.pad(logits, (0, -logits.shape[-1] % PAGE), value=-torch.inf).unflatten(-1, (-1, PAGE))
        exponent = logits.amax(-1).ceil()  # [N, M, T]
        shift = exponent.masked_fill(exponent == -torch.inf, 0)[..., None]
        exact = torch.exp2(logits - shift) * UNITS[dtype]  # [N, M, T, PAGE]
        mass = (exact + rounding_numbers(stream, logits.shape[2])).floor().long()
        bits = fraction_bits(exponent.shape[2], dtype)
        return cls(mass, mass.sum(-1), exponent, dtype, min_mass_bits(dtype), bits)

    @classmethod
    def of_groups(cls, logits: Tensor, dtype: torch.dtype, most_pages: int | None = None) -> Masses:
        """The masses that groups of rows share, of base-2 logits (N, G, L, n), relative to the normalisers.

        A key's mass is the sum of its probabilities in the G rows of a group, 0 where it has the logit -inf.
        It is rounded to the nearest whole number: the probability of drawing a key is known, whatever its
        mass is. No group sees keys of more than `most_pages` pages, T where None.
        """
        units = group_units(logits.shape[1], dtype)
        logits = F.pad(logits, (0, -logits.shape[-1] % PAGE), value=-torch.inf).unflatten(-1, (-1, PAGE))
        exponent = logits.amax((1, -1)).ceil()  # [N, L, T]
        shift = exponent.masked_fill(exponent == -torch.inf, 0)[:, None, ..., None]
        mass = (torch.exp2(logits - shift) * units).round().long().sum(1)
        bits = fraction_bits(most_pages or exponent.shape[2], dtype)
        return cls(mass, mass.sum(-1), exponent, dtype, int(units / 2).bit_length(), bits)

    def shifts(self) -> tuple[Tensor, Tensor]:
        """Bits by which a page's masses are shifted up and down to be in the row's unit, (N, M, T) each."""
        row_exponent = self.page_exponent.amax(-1, keepdim=True)
        visible = self.page_exponent > -torch.inf
        below = torch.where(visible, row_exponent - self.page_exponent, 100).clamp_max(100).long()
        return (self.fraction_bits - below).clamp_min(0), (below - self.fraction_bits).clamp_min(0)


def rounding_numbers(stream: Stream, pages: int) -> Tensor:
    """Numbers in [0, 1) that round the masses of keys: (N, 1, T, PAGE), float32.

    All rows of a head share them, whatever their positions. The four words of a counter, whose first word is
    the index of the key // 4, serve four keys, with 24 bits each.
    """
    quads = torch.arange(pages * PAGE // 4, device=stream.keys.device)
    counter = (quads, 0, stream.groups[:, None], int(Purpose.MASS_ROUNDING))
    words = torch.stack(
        philox(stream.keys[:, None], *counter, rounds=ROUNDING_ROUNDS), -1
    )  # [N, T PAGE / 4, 4]
    return uniform24(words).view(-1, 1, pages, PAGE)


def uniform24(word: Tensor) -> Tensor:
    """A number in [0, 1) from the upper 24 bits of each word, float32."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def group_offsets(stream: Stream, replicates: int) -> Tensor:
    """Where the combs of L groups start, in units of the distance of their points: (N, L, R), float64."""
    return stream.uniform(replicates, 1)[..., 0]


def comb_offsets(stream: Stream, replicates: int, rows: int) -> Tensor:
    """Where the combs of all M rows start, in units of the distance of their points: (N, M, R), float64.

    The query heads of a group share them.
    """
    offsets = group_offsets(stream, replicates)
    return offsets.repeat(1, rows // offsets.shape[1], 1)


def locate_page(page_start: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The pages in which points (N, M, P) lie, and how far behind the starts of these pages (N, M, T)."""
    page = torch.searchsorted(page_start, points, right=True).sub_(1).clamp_min_(0)
    return page, points - page_start.gather(-1, page)
