"""Every key, with its exact probability: the sampler without an error."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..estimates import Draws, EstimateInfo
from ..problem import AttentionProblem, in_dtype
from ..streams import Stream
from .base import Budget, Design, SampledRows, Sampler, check_draw_arguments
from .inversion import row_probabilities


class ExactSampler(Sampler):
    """All n keys of a row with weights p = softmax(logits): variance 0, cost n.

    The exact result with which other samplers are compared. `num_samples` is checked and then not used;
    replicates repeat the same keys.

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
        num_samples, replicates = check_draw_arguments(logits, num_samples, replicates)
        p = row_probabilities(logits)
        indices = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
        repeat = (*(1,) * (logits.ndim - 1), replicates)
        return Draws(indices.repeat(repeat), p.repeat(repeat) / replicates, p.repeat(repeat), replicates)

    def estimate_rows(self, problem: AttentionProblem, budget: Budget, stream: Stream) -> SampledRows:
        """SDPA's own output; the draws, all L * n of them, and log-sum-exps are made only when asked for."""
        by_blocks = problem.softcap is not None or problem.window is not None
        output = _output_by_blocks(problem) if by_blocks else _output_by_sdpa(problem)
        later = problem.copied()  # the caller's tensors may have changed by then
        device, grad = problem.q.device.type, problem.requires_grad

        def make_draws() -> Draws:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                logits = later.logits(slice(0, later.shape[0]), slice(0, later.shape[1]))
                return self.draw(logits, budget.num_samples, replicates=budget.replicates)

        def make_log_sum_exp() -> Tensor:
            with torch.set_grad_enabled(grad), torch.autocast(device, enabled=False):
                return later.log_sum_exp()

        info = EstimateInfo(
            sampler=self.name,
            unbiased=True,
            num_samples=budget.num_samples,
            replicates=budget.replicates,
            draws_per_row=problem.num_keys,
            effective_sample_size=torch.full(problem.row_shape, math.inf, device=problem.q.device),
            log_sum_exp="exact",
        )
        zero = torch.zeros_like(output, dtype=problem.dtype, requires_grad=False)
        sure = torch.full(problem.shape, math.inf, dtype=problem.dtype, device=problem.q.device)
        return SampledRows(
            output,
            make_draws,
            Design(False),
            info,
            lambda: zero,
            make_reliability=lambda: sure,
            make_bounds=lambda level: (output.detach().to(zero.dtype),) * 2,
            make_log_sum_exp=make_log_sum_exp,
        )


def _output_by_blocks(problem: AttentionProblem) -> Tensor:
    """softmax(logits) v for logits that SDPA does not know, (N, M, d), in v's dtype.

    In blocks of rows, whose maps are kept where gradients will need them.
    """
    parts = []
    for heads, rows in problem.blocks(0):
        logits = problem.logits(heads, rows)
        empty = (logits == -torch.inf).all(-1, keepdim=True)
        p = logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
        parts.append((p @ problem.values[heads, : p.shape[-1]]).flatten(0, 1))
    shape = (*problem.shape, problem.width)
    output = torch.cat(parts).view(shape) if parts else problem.values.new_empty(shape)
    return problem.in_units(output).to(problem.v.dtype)


def _output_by_sdpa(problem: AttentionProblem) -> Tensor:
    """softmax(q k^T scale + mask) v by SDPA, (N, M, d), in v's dtype."""
    q, k, v, mask, scale = problem.q, problem.k, problem.v, problem.mask, problem.scale
    if problem.unit is not None:  # torch's kernels add up values before they divide by the sum of weights
        v = problem.values.to(v.dtype).view(v.shape)
    if scale <= 0:  # torch's CPU kernel multiplies a causal mask's -inf by the scale: NaN, or keys unmasked
        q, scale = (-q, -scale) if scale else (0 * q, 1.0)
    if mask is not None:  # SDPA takes masks of two dimensions or more, in q's dtype
        mask = in_dtype(torch.atleast_2d(mask), q.dtype)
    is_causal = problem.is_causal and problem.first_position == 0
    if problem.is_causal and not is_causal:  # SDPA knows the upper left corner only
        position = problem.positions(slice(0, problem.length))
        mask = torch.arange(problem.num_keys, device=q.device) <= position[:, None]
    # Its kernels that hold no map want four dimensions and as many features in v as in q: zeros change
    # nothing.
    features = max(v.shape[-1], q.shape[-1])
    lift = (None,) * max(0, 4 - q.ndim)
    q4, k4, v4 = (F.pad(x, (0, features - x.shape[-1]))[lift] for x in (q, k, v))
    # Of torch's implementations only the plain one has tangents of forward mode.
    with sdpa_kernel(SDPBackend.MATH) if problem.has_tangents else nullcontext():
        output = F.scaled_dot_product_attention(
            q4, k4, v4, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=problem.group > 1
        )
    output = output[..., : v.shape[-1]].reshape(*problem.shape, v.shape[-1])
    return problem.in_units(output).to(v.dtype)
