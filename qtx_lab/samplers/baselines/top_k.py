"""Softmax over the heaviest keys of a row, a baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...estimates import Draws
from ..base import Sampler, check_draw_arguments
from ..inversion import row_probabilities


class TopKSampler(Sampler):
    """The S heaviest keys of a row with their probabilities, normalised by their sum.

    No variance, but biased: what the other keys hold is missing, however many repetitions are averaged.
    `oracle`, because it is told all exact logits: every top-k method that guesses at them does worse.

    >>> import torch
    >>> TopKSampler().draw(torch.tensor([0.0, 2.0, 1.0]), 2).indices
    tensor([1, 2])
    """

    name = "oracle-top-k"
    unbiased = False
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
        """The heaviest keys, repeated for each replicate: see `Sampler.draw`."""
        num_samples, replicates = check_draw_arguments(logits, num_samples, replicates)
        p = row_probabilities(logits)
        top, indices = p.topk(min(num_samples, p.shape[-1]), -1)
        spare = (0, num_samples - top.shape[-1])  # more draws than keys: those left over have weight 0
        weights = (
            F.pad(top / top.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny), spare) / replicates
        )
        repeat = (*(1,) * (logits.ndim - 1), replicates)
        indices = F.pad(indices, spare).repeat(repeat)
        return Draws(indices, weights.repeat(repeat), p.gather(-1, indices), replicates)
