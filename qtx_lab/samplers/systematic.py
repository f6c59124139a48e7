"""A comb of S equally spaced points with one random offset."""

from __future__ import annotations

import torch
from torch import Tensor

from ..estimates import Draws
from .base import check_draw_arguments, invert, uniform


class SystematicSampler:
    """F inverted at u_s = (s + U) / S with one U a row and replicate.

    Unbiased. A key is drawn floor(S p_j) or ceil(S p_j) times, so heavy keys are exact up to 1 / S;
    the variance depends on the order of the keys and has no useful estimate from one replicate.
    Source: Madow, On the theory of systematic sampling II (1949); Carpenter, Clifford and Fearnhead,
    Improved particle filter for nonlinear problems (1999), sec. 3.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> SystematicSampler().draw(torch.zeros(4), 4, generator=g).indices
    tensor([0, 1, 2, 3])
    """

    name = "systematic"
    unbiased = True
    independent = False

    def draw(
        self,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        generator: torch.Generator | None = None,
        replicates: int = 1,
    ) -> Draws:
        check_draw_arguments(logits, num_samples, replicates)
        u = uniform((*logits.shape[:-1], replicates, 1), logits, generator)
        comb = torch.arange(num_samples, device=logits.device, dtype=torch.float64)
        return invert(logits, ((comb + u) / num_samples).flatten(-2), replicates)
