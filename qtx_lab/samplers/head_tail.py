"""The heaviest keys exactly, the others by systematic draws in value order."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..estimates import Draws
from .base import invert, row_masses
from .systematic import SystematicSampler


class HeadTailSampler(SystematicSampler):
    """Keeps the head of each row exactly and samples its tail systematically along the keys' value order.

    Each key is given an expected number of draws m_j with sum m_j = S: 1 for a key of the head, c p_j for the
    others, and is drawn with weight p_j / m_j: p_j for the head, 1 / c for the tail. Unbiased. With
    `head="optimal"` m_j = min(1, c p_j): the head is every key that would be drawn at least once, and no choice of
    S weighted keys has a smaller expected squared error of the weights (Fearnhead and Clifford, On-line inference
    for hidden Markov models via particle filters, 2003, th. 1). Variance: that of the tail alone, and that of
    systematic sampling in value order (see `value_order`). A row with no more than S keys is exact; the draws left
    over have weight 0.

    Parameters
    ----------
    head : "optimal" or int
        Which keys are the head: chosen per row, or the `head` heaviest, fewer than the draws.

    Raises
    ------
    ArgumentError
        If head is neither; on drawing, if head is not below num_samples.
    """

    name = "head-tail"
    ordered = True

    def __init__(self, head: str | int = "optimal"):
        whole = isinstance(head, int) and not isinstance(head, bool) and head >= 0
        if not whole and head != "optimal":
            raise ArgumentError(f'head={head!r} is not allowed: it must be "optimal" or a whole number >= 0.')
        self.head = head

    def count_variance(self, expected: Tensor) -> None:
        """Not known: in value order it is less than a comb's, by as much as the values are alike."""

    def place(self, logits: Tensor, points: Tensor) -> Draws:
        replicates, s = points.shape[-2:]
        mass = row_masses(logits)
        p = mass / mass.sum(-1, keepdim=True, dtype=torch.float64).clamp_min(1).to(mass.dtype)
        counts = optimal_counts(p, s) if self.head == "optimal" else self._fixed_counts(p, s)
        # In units of draws: a key of count 1 holds exactly one tooth of the comb. Where there are fewer keys than
        # draws, the teeth past the last key are draws of weight 0.
        indices, total = invert(counts, points.flatten(-2), scale=s)
        probabilities = p.gather(-1, indices)
        weights = probabilities / counts.gather(-1, indices).clamp_min(torch.finfo(p.dtype).tiny) / replicates
        weights.masked_fill_(points.flatten(-2) * s >= total, 0)
        return Draws(indices, weights, probabilities, replicates)

    def _fixed_counts(self, p: Tensor, s: int) -> Tensor:
        head = int(self.head)
        if head >= s:
            raise ArgumentError(f"head={head} is not allowed with num_samples={s}: it must be smaller.")
        if head == 0:
            return p * s
        smallest = p.topk(min(head, p.shape[-1]), -1).values[..., -1:]
        kept = (p >= smallest) & (p > 0)
        kept &= kept.cumsum(-1) <= head  # ties beyond the head's size are tail
        tail = p.masked_fill(kept, 0)
        c = (s - kept.sum(-1, keepdim=True)) / tail.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
        return torch.where(kept, torch.ones_like(p), tail * c)


def optimal_counts(p: Tensor, num_samples: int) -> Tensor:
    """min(1, c p) with the c for which a row's counts sum to `num_samples`; 1 for every key where there are no more.

    c is found from below: the keys that c p puts at 1 leave the other draws to the other keys, which raises c,
    until no key joins. A few rounds do, at most one for each key of the head.
    """
    c = torch.full_like(p[..., :1], float(num_samples))
    kept = torch.full_like(c, -1)
    while True:
        head = p * c >= 1
        size = head.sum(-1, keepdim=True).to(p.dtype)
        if torch.equal(size, kept):
            break
        kept = size
        tail = p.masked_fill(head, 0).sum(-1, keepdim=True)
        c = torch.where(tail > 0, torch.maximum(c, (num_samples - size) / tail), c)  # never down by rounding
    short = (p > 0).sum(-1, keepdim=True) <= num_samples
    return torch.where(short, (p > 0).to(p.dtype), (p * c).clamp_max(1))
