"""A comb of S equally spaced points with one random offset."""

from __future__ import annotations

import torch
from torch import Tensor

from ..streams import Stream
from .inversion_sampler import InversionSampler


class SystematicSampler(InversionSampler):
    """F inverted at u_s = (s + U) / S with one U a row and replicate.

    It is unbiased. A key is drawn floor(S p_j) or ceil(S p_j) times, so heavy keys are exact up to 1 / S. The
    variance depends on the order of the keys and has no useful estimate from one replicate. Values that
    alternate in step with the comb are its worst case: worse than independent draws, with intervals too
    short. A tolerance lays keys out in random order for it. Source: Madow, On the theory of systematic
    sampling II (1949); Carpenter, Clifford and Fearnhead, Improved particle filter for nonlinear problems
    (1999), sec. 3.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> SystematicSampler().draw(torch.zeros(4), 4, generator=g).indices
    tensor([0, 1, 2, 3])
    """

    name = "systematic"
    has_kernel = True
    ascending = True

    def points(self, stream: Stream, num_samples: int, replicates: int) -> Tensor:
        u = stream.uniform(replicates, 1)
        return (torch.arange(num_samples, device=u.device) + u) / num_samples
