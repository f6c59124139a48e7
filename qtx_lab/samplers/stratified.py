"""One draw from each of S equal slices of the distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from ..streams import Stream
from .inversion_sampler import InversionSampler


class StratifiedSampler(InversionSampler):
    """One point in each of S equal strata of [0, 1), where F is inverted: u_s = (s + U_s) / S.

    It is unbiased. Its variance is never above that of independent draws, and O(S^-2) once S exceeds the
    number of keys. Source: Cochran, Sampling Techniques (1977), ch. 5; Douc and Cappe, Comparison of
    resampling schemes for particle filtering (2005), sec. 3.2.

    Examples
    --------
    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> StratifiedSampler().draw(torch.zeros(4), 4, generator=g).indices
    tensor([0, 1, 2, 3])
    """

    name = "stratified"

    def points(self, stream: Stream, num_samples: int, replicates: int) -> Tensor:
        u = stream.uniform(replicates, num_samples)
        return (torch.arange(num_samples, device=u.device) + u) / num_samples

    def count_variance(self, expected: Tensor) -> Tensor:
        return straddling_variance(expected)


def straddling_variance(expected: Tensor) -> Tensor:
    """Variance of the count of a key that lies anywhere across strata of one draw each, averaged over where.

    A part x of a stratum is drawn with variance x (1 - x), a whole one with none. A key of m < 1 strata lies
    within one with probability 1 - m, or is cut in two at a uniform place; a longer one has a uniform part at
    either end.
    """
    m = expected.clamp_max(1)
    return m - m**2 + m**3 / 3
