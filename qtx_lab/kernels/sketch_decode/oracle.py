"""Decoding from a sketch as a newcomer would write it, in float64.

Tests compare the kernels and their reference with it:

pi = inclusion(guessed_logits, num_samples, defensive)    # the probability with which each key is drawn
indices = draw(pi, offsets)                               # the drawn keys
output, std_error = weigh(logits[indices], pi[indices], values[indices])
"""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion(guessed_logits: Tensor, num_samples: int, defensive: float) -> Tensor:
    """The probabilities pi_j = min(1, c q_j) with which a group draws keys, which sum to S: (..., n).

    The proposal q is (1 - epsilon) r + epsilon / n, where r_j is proportional to the sum of exp(l_gj) over
    the rows of the group, of guessed logits (..., G, n) relative to the rows' normalisers. c is found by
    bisection.

    >>> inclusion(torch.zeros(1, 4), 2, 0.02)
    tensor([0.5000, 0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """
    n = guessed_logits.shape[-1]
    q = (1 - defensive) * guessed_logits.double().logsumexp(-2).softmax(-1) + defensive / n
    low, high = torch.zeros_like(q[..., :1]), num_samples / q.amin(-1, keepdim=True)
    for _ in range(100):
        c = (low + high) / 2
        too_many = (c * q).clamp_max(1).sum(-1, keepdim=True) > num_samples
        low, high = torch.where(too_many, low, c), torch.where(too_many, c, high)
    return (low * q).clamp_max(1)


def draw(pi: Tensor, offsets: Tensor) -> Tensor:
    """The keys at the points u, u + 1, … of the running sum of pi (..., n), for offsets u (...): (..., S).

    No key is drawn twice, since pi is at most 1.

    >>> draw(torch.tensor([0.5, 1.0, 0.5]), torch.tensor(0.25))
    tensor([0, 1])
    """
    cumulative = pi.double().cumsum(-1)
    points = torch.arange(round(float(cumulative[..., -1].max())), device=pi.device) + offsets[..., None]
    return torch.searchsorted(cumulative, points, right=True).clamp_max(pi.shape[-1] - 1)


def weigh(logits: Tensor, pi: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted average of the values (S, Ev) of one row's draws and its standard error, (Ev,) each.

    Weights are proportional to exp(logit) / pi and sum to 1 (Hajek 1971).
    """
    weights = (logits.double() - pi.double().log()).softmax(-1)
    output = weights @ values.double()
    variance = ((1 - pi.double()) * weights.square()) @ (values.double() - output).square()
    return output, variance.sqrt()
