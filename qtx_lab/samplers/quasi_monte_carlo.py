"""Low-discrepancy points over queries and keys together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import unknown_name
from .base import InversionSampler, Uniform
from .stratified import straddling_variance

SEQUENCES = ("sobol", "halton", "lattice")
GOLDEN = (math.sqrt(5) - 1) / 2


class QuasiMonteCarloSampler(InversionSampler):
    """Points that are evenly spread within each row and over the rows of a head, so that averages over rows
    (a pooled output, a gradient) converge faster too.

    Within one row a low-discrepancy sequence is nearly systematic sampling. Here draw s of query i is point
    t = i S + s of one stream a head, that is (t / (L S), u_t) in the unit square of queries and keys:

    - `sobol`: u is van der Corput's sequence (Sobol's first dimension): a (0, m, 2)-net for L S = 2^m, randomised
      by a digital shift (L'Ecuyer and Lemieux 2002, sec. 2.5);
    - `halton`: u is the radical inverse in base 3, randomised by a shift modulo 1 (Cranley and Patterson 1976);
    - `lattice`: each row is a comb of spacing 1 / S whose offset moves by the golden section from row to row: a
      rank-1 lattice for every L and S, randomised by a shift modulo 1.

    Every head and replicate has its own randomisation. Unbiased: each point by itself is uniform (for `lattice`, over
    its comb). Variance: below that of independent draws, by most for sums over queries that attend alike; no
    estimate from one replicate. The rows of a head share their randomness, so their errors are not independent.

    Parameters
    ----------
    sequence_type : str
        "sobol", "halton" or "lattice".
    ordered : bool
        Whether the keys are laid out in value order first (see `value_order`): points that are close together then
        stand for similar values, and errors of single rows fall too.

    Raises
    ------
    ArgumentError
        If the sequence is unknown.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> QuasiMonteCarloSampler("sobol").sample_attention_weights(torch.zeros(2, 4), 4, generator=g)
    tensor([[0.2500, 0.2500, 0.2500, 0.2500],
            [0.2500, 0.2500, 0.2500, 0.2500]])
    """

    joint = True

    def __init__(self, sequence_type: str = "sobol", ordered: bool = True):
        if sequence_type not in SEQUENCES:
            raise unknown_name("sequence_type", sequence_type, SEQUENCES)
        self.name = sequence_type
        self.ordered = ordered

    def points(self, rows: tuple[int, ...], num_samples: int, replicates: int, uniform: Uniform) -> Tensor:
        *heads, length = rows or (1,)
        shift = uniform(*heads, 1, replicates, 1)
        points = (_lattice if self.name == "lattice" else _stream)(self.name, length, num_samples, shift)
        return points.expand(*heads, length, replicates, num_samples).reshape(*rows, replicates, num_samples)

    def count_variance(self, expected: Tensor) -> Tensor | None:
        # In value order an estimate varies less than this says: intervals err on the safe side.
        return super().count_variance(expected) if self.name == "lattice" else straddling_variance(expected)


def _lattice(name: str, length: int, num_samples: int, shift: Tensor) -> Tensor:
    """A comb a row, its offset moved by the golden section from row to row, (..., L, R, S)."""
    row = torch.arange(length, device=shift.device, dtype=torch.float64)[:, None, None]
    offset = (shift + GOLDEN * row).frac()
    return (torch.arange(num_samples, device=shift.device) + offset) / num_samples


def _stream(name: str, length: int, num_samples: int, shift: Tensor) -> Tensor:
    """One randomised sequence, S points of it for each row in turn, (..., L, R, S)."""
    count = length * num_samples
    if name == "halton":
        from scipy.stats import qmc

        base = torch.from_numpy(qmc.Halton(d=2, scramble=False).random(count)[:, 1].copy())
        base = base.to(shift.device).view(length, 1, num_samples)
        return (base + shift).frac()
    # 53 bits: van der Corput's point is the reversed bits of its index, for streams of up to 2^53 points.
    bits = 53
    index = torch.arange(count, device=shift.device)
    reverse = torch.zeros_like(index)
    for k in range(max(1, (count - 1).bit_length())):
        reverse |= ((index >> k) & 1) << (bits - 1 - k)
    digits = (shift * 2.0**bits).long()
    return (reverse.view(length, 1, num_samples) ^ digits).double() / 2.0**bits
