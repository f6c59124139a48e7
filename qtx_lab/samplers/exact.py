"""Every key, with its exact probability: the sampler without an error."""

from __future__ import annotations

import torch
from torch import Tensor

from ..estimates import Draws
from .base import check_draw_arguments, row_masses


class ExactSampler:
    """All n keys of a row with weights p = softmax(logits): variance 0, cost n.

    The yardstick of every other sampler. `num_samples` is checked and then not used; replicates
    repeat the same keys.

    >>> import torch
    >>> ExactSampler().draw(torch.zeros(2), num_samples=1).weights
    tensor([0.5000, 0.5000])
    """

    name = "exact"
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
        p = row_masses(logits)[..., : logits.shape[-1]]
        p = p / p.sum(-1, keepdim=True).clamp_min(1)
        indices = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
        repeat = (*(1,) * (logits.ndim - 1), replicates)
        return Draws(indices.repeat(repeat), p.repeat(repeat) / replicates, p.repeat(repeat), replicates)
