"""The heaviest keys exactly, the others by systematic draws in value order."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError, quoted
from ..estimates import Draws
from .inversion import FEWEST_LIGHT, invert, row_masses
from .systematic import SystematicSampler


class HeadTailSampler(SystematicSampler):
    """Keeps the head of each row exactly and samples its tail systematically along the keys' value order.

    Each key is given an expected number of draws m_j with sum m_j = S: 1 for a key of the head, c p_j for the
    others, and is drawn with weight p_j / m_j: p_j for the head, 1 / c for the tail. Unbiased. With
    `head="optimal"` m_j = min(1, c p_j): the head is every key that would be drawn at least once, and no
    choice of S weighted keys has a smaller expected squared error of the weights (Fearnhead and Clifford,
    On-line inference for hidden Markov models via particle filters, 2003, th. 1). Variance: that of the tail
    alone, and that of systematic sampling in value order (see `value_order`). A row with no more than S keys
    is exact; the draws left over have weight 0.

    With `head="adaptive"` S is the most that a row draws: m_j = min(1, S p_j), so that rows whose mass lies
    on few keys draw fewer, and about `FEWEST_LIGHT` of the tail at the least. At an equal mean number of keys
    read the worst rows err less than with `head="optimal"` and the best ones more.

    Parameters
    ----------
    head : "optimal", "adaptive" or int
        Which keys are the head: chosen per row, those of a probability of 1 / S or more, or the `head`
        heaviest, fewer than the draws.

    Raises
    ------
    ArgumentError
        If head is neither; on drawing, if head is not below num_samples.

    Examples
    --------
    >>> logits = torch.tensor([0.9, 0.04, 0.03, 0.03]).log()
    >>> draws = HeadTailSampler().draw(logits, 2, generator=torch.Generator().manual_seed(0))
    >>> int(draws.indices[0]), draws.weights  # the head's key has its probability as its weight
    (0, tensor([0.9000, 0.1000]))
    """

    name = "head-tail"
    ordered = True
    has_kernel = False

    def __init__(self, head: str | int = "optimal"):
        if isinstance(head, str) and head not in ("optimal", "adaptive"):
            raise ArgumentError(
                f'head={quoted(head)} is not allowed: it must be "optimal", "adaptive" or a whole number '
                ">= 0."
            )
        self.head = head if isinstance(head, str) else check_count("head", head, 0)

    @property
    def min_samples(self) -> int:
        return 1 if isinstance(self.head, str) else int(self.head) + 1

    def expected_counts(self, p: Tensor, num_samples: int | Tensor) -> Tensor:
        """How often each key of rows p (..., n) is drawn on average."""
        if self.head == "adaptive":
            return adaptive_counts(p, num_samples)
        return expected_counts(p, num_samples, None if self.head == "optimal" else int(self.head))

    def variance_weights(self, p: Tensor, num_samples: int | Tensor) -> tuple[Tensor, Tensor]:
        counts = self.expected_counts(p, num_samples)
        left = counts.frac()
        weight = p / counts.clamp_min(torch.finfo(p.dtype).tiny)
        return left * (1 - left) * weight.square(), (weight * (left > 0)).amax(-1, keepdim=True)

    def place(self, logits: Tensor, points: Tensor) -> Draws:
        replicates, s = points.shape[-2:]
        mass = row_masses(logits)
        p = mass / mass.sum(-1, keepdim=True, dtype=torch.float64).clamp_min(1).to(mass.dtype)
        counts = self.expected_counts(p, s)
        # In units of draws: a key of count 1 holds exactly one tooth of the comb. Where there are fewer keys
        # than draws, the teeth past the last key are draws of weight 0.
        indices, total = invert(counts, points.flatten(-2), scale=s)
        probabilities = p.gather(-1, indices)
        weights = probabilities / counts.gather(-1, indices).clamp_min(torch.finfo(p.dtype).tiny) / replicates
        weights.masked_fill_(points.flatten(-2) * s >= total, 0)
        return Draws(indices, weights, probabilities, replicates)


def expected_counts(p: Tensor, num_samples: int | Tensor, head: int | None = None) -> Tensor:
    """How often each key of rows p (..., n) is drawn on average: 1 in the head, c p_j in the tail, S in all.

    The head is the `head` heaviest keys (more where they are tied), or, where None, the smallest one that
    leaves no key of the tail more than one draw: the heaviest h keys for the first h with p_(h+1) (S - h) /
    (tail's mass) < 1. Where no more than S keys have mass, each is drawn once. In the tail a count is not cut
    off at 1, so that rounding in the choice of the head costs no draw and no bias. S is `num_samples`, or a
    whole number for each row, (..., 1).

    Raises
    ------
    ArgumentError
        If head is not below num_samples.
    """
    fewest, most = (num_samples, num_samples) if isinstance(num_samples, int) else _limits(num_samples)
    if head is not None and head >= fewest:
        raise ArgumentError(f"head={head} is not allowed with num_samples={fewest}: it must be smaller.")
    top = p.topk(min(most, p.shape[-1]), -1).values  # heaviest first
    if head is None:
        h = torch.arange(top.shape[-1], device=p.device)
        tail = p.sum(-1, keepdim=True) - top.cumsum(-1) + top  # mass from the (h + 1)-th on
        fits = top * (num_samples - h) < tail
        first = torch.where(fits.any(-1, keepdim=True), fits.int().argmax(-1, keepdim=True), most)
        size = first.clamp_max(num_samples - 1)
    else:
        size = torch.full_like(top[..., :1], head, dtype=torch.int64)
    least = top.gather(-1, (size - 1).clamp(0, top.shape[-1] - 1)).masked_fill(size == 0, torch.inf)
    in_head = p >= least
    tail = p.masked_fill(in_head, 0)
    left = (num_samples - in_head.sum(-1, keepdim=True)).clamp_min(0)
    limits = torch.finfo(p.dtype)
    scale = left / _sum(tail).clamp_min(limits.tiny)
    counts = tail * scale.clamp_max(limits.max)  # where the head is all there is, 0 and not 0 times infinity
    seen = p > 0
    counts = torch.where(in_head & seen, 1, counts)
    if head is not None:
        return counts
    few = seen.sum(-1, keepdim=True) <= num_samples
    return torch.where(few, seen, counts)


ADAPTIVE_STEPS = 4
"""Steps by which the head of a row grows that would have fewer draws of its tail."""


def adaptive_counts(p: Tensor, num_samples: int | Tensor) -> Tensor:
    """min(1, p_j / w) for each key of rows p (..., n), w = 1 / S, or less: then there are few other draws.

    Where no more than S keys have mass, each is drawn once. S is `num_samples`, or a whole number for each
    row, (..., 1).
    """
    rate = torch.as_tensor(num_samples, dtype=p.dtype, device=p.device)
    limit = (1 / rate).expand(*p.shape[:-1], 1)
    tiny = torch.finfo(p.dtype).tiny
    for _ in range(ADAPTIVE_STEPS):
        light = _sum(torch.where(p < limit, p, 0))
        sure = (p >= limit).sum(-1, keepdim=True)
        left = torch.minimum(rate - sure, (light * rate).clamp_min(FEWEST_LIGHT))
        limit = torch.where(left > 0, light / left.clamp_min(1), limit).clamp_min(tiny)
    seen = p > 0
    counts = torch.where(seen, (p / limit).clamp_max(1), 0)
    return torch.where(seen.sum(-1, keepdim=True) <= num_samples, seen, counts)


def _limits(counts: Tensor) -> tuple[int, int]:
    """The least and the greatest of some counts."""
    return (int(counts.min()), int(counts.max())) if counts.numel() else (1, 1)


def _sum(x: Tensor) -> Tensor:
    """The sum of rows (..., n), (..., 1): in float64, so that it does not depend on the order of the keys."""
    return x.sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype)
