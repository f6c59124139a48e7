"""Every key, with its exact probability: the sampler without an error."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..estimates import Draws, EstimateInfo
from ..problem import AttentionProblem, in_dtype
from ..streams import Stream
from .base import Budget, Design, SampledRows, Sampler, check_draw_arguments, row_probabilities


class ExactSampler(Sampler):
    """All n keys of a row with weights p = softmax(logits): variance 0, cost n.

    The yardstick of every other sampler. `num_samples` is checked and then not used; replicates
    repeat the same keys.

    >>> import torch
    >>> ExactSampler().draw(torch.zeros(2), num_samples=1).weights
    tensor([0.5000, 0.5000])
    """

    name = "exact"
    exact = True
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
        p = row_probabilities(logits)
        indices = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
        repeat = (*(1,) * (logits.ndim - 1), replicates)
        return Draws(indices.repeat(repeat), p.repeat(repeat) / replicates, p.repeat(repeat), replicates)

    def estimate_rows(self, problem: AttentionProblem, budget: Budget, stream: Stream) -> SampledRows:
        """SDPA's own output; the draws, all L * n of them, are made only when asked for."""
        output = _exact_output(problem)
        later = problem.copied()  # the caller's tensors may have changed by then
        device = problem.q.device.type

        def make_draws() -> Draws:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                logits = later.logits(slice(0, later.shape[0]), slice(0, later.shape[1]))
                return self.draw(logits, budget.num_samples, replicates=budget.replicates)

        info = EstimateInfo(
            sampler=self.name,
            unbiased=True,
            num_samples=budget.num_samples,
            replicates=budget.replicates,
            draws_per_row=problem.num_keys,
            effective_sample_size=torch.full(problem.row_shape, math.inf, device=problem.q.device),
        )
        zero = torch.zeros_like(output, dtype=problem.dtype, requires_grad=False)
        return SampledRows(output, make_draws, Design(False), info, lambda: zero)


def _exact_output(problem: AttentionProblem) -> Tensor:
    """softmax(q k^T scale + mask) v by SDPA, (N, M, d), in v's dtype."""
    q, k, v, mask = problem.q, problem.k, problem.v, problem.mask
    if mask is not None:  # SDPA takes masks of two dimensions or more, in q's dtype
        mask = in_dtype(mask.expand(*torch.broadcast_shapes(mask.shape, (1, 1))), q.dtype)
    is_causal = problem.is_causal and problem.first_position == 0
    if problem.is_causal and not is_causal:  # SDPA knows the upper left corner only
        position = problem.positions(slice(0, problem.length))
        mask = torch.arange(problem.num_keys, device=q.device) <= position[:, None]
    # Its kernels that hold no map want four dimensions and as many features in v as in q: zeros change
    # nothing.
    features = max(v.shape[-1], q.shape[-1])
    lift = (None,) * max(0, 4 - q.ndim)
    q4, k4, v4 = (F.pad(x, (0, features - x.shape[-1]))[lift] for x in (q, k, v))
    output = F.scaled_dot_product_attention(
        q4, k4, v4, attn_mask=mask, is_causal=is_causal, scale=problem.scale, enable_gqa=problem.group > 1
    )
    return output[..., : v.shape[-1]].reshape(*problem.shape, v.shape[-1])
