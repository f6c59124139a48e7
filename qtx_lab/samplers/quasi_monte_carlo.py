"""Low-discrepancy points over queries and keys together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_flags
from ..errors import unknown_name
from ..streams import Stream
from .inversion_sampler import InversionSampler
from .stratified import straddling_variance

SEQUENCES = ("sobol", "halton", "lattice")
GOLDEN = (math.sqrt(5) - 1) / 2


class QuasiMonteCarloSampler(InversionSampler):
    """Points that are evenly spread within each row and over the rows of a head.

    So averages over rows, such as a pooled output or a gradient, converge faster too.

    Within one row a low-discrepancy sequence is nearly systematic sampling. Here draw s of query i is point
    t = i S + s of one stream a head, that is (t / (L S), u_t) in the unit square of queries and keys:

    - `sobol`: u is van der Corput's sequence (Sobol's first dimension): a (0, m, 2)-net for L S = 2^m,
      randomised by a digital shift (L'Ecuyer and Lemieux 2002, sec. 2.5);
    - `halton`: u is the radical inverse in base 3, randomised by a shift modulo 1 (Cranley and Patterson
      1976);
    - `lattice`: each row is a comb of spacing 1 / S whose offset moves by the golden section from row to row:
      a rank-1 lattice for every L and S, randomised by a shift modulo 1.

    Every head and replicate has its own randomisation. Unbiased: each single point is uniform (for
    `lattice`, over its comb). Variance: below that of independent draws, by most for sums over queries that
    attend alike; no estimate from one replicate. The rows of a head share their randomness, so their errors
    are not independent.

    Parameters
    ----------
    sequence_type : str
        "sobol", "halton" or "lattice".
    ordered : bool
        Whether the keys are laid out in value order first (see `value_order`): points that are close together
        then stand for similar values, and errors of single rows fall too.

    Raises
    ------
    ArgumentError
        If the sequence is unknown.

    Examples
    --------
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
        check_flags(ordered=ordered)
        self.ordered = ordered

    def points(self, stream: Stream, num_samples: int, replicates: int) -> Tensor:
        shift = stream.uniform_of_heads(replicates, 1)  # [N, 1, R, 1]
        positions = stream.positions if stream.positions.ndim == 2 else stream.positions[None]
        row = positions[:, :, None, None]  # [N or 1, P, 1, 1]
        draw = torch.arange(num_samples, device=shift.device)
        if self.name == "lattice":
            return (draw + (shift + GOLDEN * row).frac()) / num_samples
        point = row * num_samples + draw
        if self.name == "halton":
            return (radical_inverse(point, 3) + shift).frac()
        return digital_shift(point, shift)

    def count_variance(self, expected: Tensor) -> Tensor | None:
        # In value order an estimate varies less than this says: intervals err on the safe side.
        return super().count_variance(expected) if self.name == "lattice" else straddling_variance(expected)


def radical_inverse(index: Tensor, base: int) -> Tensor:
    """The digits of whole numbers in a base, mirrored at the point.

    float64 in [0, 1), of the shape of `index`.
    """
    largest = int(index.max()) if index.numel() else 0
    result, scale, rest = torch.zeros(index.shape, dtype=torch.float64, device=index.device), 1.0, index
    while largest:
        scale /= base
        result += (rest % base) * scale
        rest, largest = rest // base, largest // base
    return result


def digital_shift(index: Tensor, shift: Tensor) -> Tensor:
    """Van der Corput's points in base 2, with their binary digits flipped by those of `shift`.

    float64 in [0, 1).

    The point is the reversed bits of its index, 53 of them.
    """
    bits = 53
    largest = int(index.max()) if index.numel() else 0
    reverse = torch.zeros_like(index)
    for k in range(max(1, largest.bit_length())):
        reverse |= ((index >> k) & 1) << (bits - 1 - k)
    return (reverse ^ (shift * 2.0**bits).long()).double() / 2.0**bits
