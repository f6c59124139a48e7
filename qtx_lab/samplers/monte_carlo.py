"""Independent draws: the baseline of every comparison."""

from __future__ import annotations

from torch import Tensor

from ..streams import Stream
from .inversion_sampler import InversionSampler


class MonteCarloSampler(InversionSampler):
    """S independent draws from p, by inversion.

    It is unbiased, and the variance of an output's coordinate is (sum_j p_j v_j^2 - o^2) / S. Measuring S
    shots of an ideal circuit that holds sum_j sqrt(p_j) |j> gives the same.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> MonteCarloSampler().draw(torch.tensor([0.0, -torch.inf]), 3, generator=g).indices
    tensor([0, 0, 0])
    """

    name = "monte-carlo"
    independent = True

    def points(self, stream: Stream, num_samples: int, replicates: int) -> Tensor:
        return stream.uniform(replicates, num_samples)

    def count_variance(self, expected: Tensor) -> Tensor:
        """The variance of a sum of independent rare events.

        It is above the binomial's, by what the variance of a mean takes off again.
        """
        return expected
