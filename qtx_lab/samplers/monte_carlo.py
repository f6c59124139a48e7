"""Independent draws: the baseline of every comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from ..estimates import Draws
from .base import check_draw_arguments, invert, uniform


class MonteCarloSampler:
    """S independent draws from p, by inversion.

    Unbiased. Variance of an output coordinate: (sum_j p_j v_j^2 - o^2) / S. This is also what
    measuring S shots of an ideal circuit that holds sum_j sqrt(p_j) |j> gives.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> MonteCarloSampler().draw(torch.tensor([0.0, -torch.inf]), 3, generator=g).indices
    tensor([0, 0, 0])
    """

    name = "monte-carlo"
    unbiased = True
    independent = True

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
        shape = (*logits.shape[:-1], replicates * num_samples)
        return invert(logits, uniform(shape, logits, generator), replicates)
