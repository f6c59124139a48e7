"""The attention row itself as its own control: the oracle level, without variance."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import EVERY, check_keys, check_queries, masked_logits


class ExactControl:
    """p̂ = p = softmax(scale q·k): what a perfect control would do.

    Cost n (E + d) a query, that of exact attention: the end of the scale, not a saving. Variance 0.
    """

    name = "exact"
    oracle = True

    def prepare(
        self,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool,
        q: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ExactWeights:
        check_keys(k, v, scale)
        return ExactWeights(k, v, scale, causal)


class ExactWeights:
    """`ExactControl` for given keys."""

    def __init__(self, k: Tensor, v: Tensor, scale: float, causal: bool):
        self.k, self.v, self.scale, self.causal = k, v, scale, causal

    def sums(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> Tensor:
        return self._dense(q, positions, heads) @ self.v[heads]

    def weights_at(self, q: Tensor, positions: Tensor, indices: Tensor, *, heads: slice = EVERY) -> Tensor:
        return self._dense(q, positions, heads).gather(-1, indices)

    def trust(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> Tensor:
        return q.new_ones(q.shape[:2])

    def cost_at(self) -> float:
        return float(self.k.shape[-1])

    def cost(self, n: int) -> float:
        return float(n * (self.k.shape[-1] + self.v.shape[-1]))

    def _dense(self, q: Tensor, positions: Tensor, heads: slice) -> Tensor:
        k = self.k[heads]
        check_queries(q, positions, k)
        return masked_logits(q, k, positions, self.scale, self.causal).softmax(-1)
