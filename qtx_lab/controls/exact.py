"""The attention row as its own control, which leaves no variance."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import EVERY, Control, Prepared, check_keys, check_queries, masked_logits


class ExactControl(Control):
    """p̂ = p = softmax(scale q·k): the limit of what a control can do.

    It costs n (E + d) multiply-adds a query, as much as exact attention, and leaves a variance of 0.
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
        """Keep the keys and values: see `Control.prepare`."""
        check_keys(k, v, scale)
        return ExactWeights(k, v, scale, causal)


class ExactWeights(Prepared):
    """`ExactControl` for given keys."""

    def __init__(self, k: Tensor, v: Tensor, scale: float, causal: bool):
        self.k, self.v, self.scale, self.causal = k, v, scale, causal

    def sums(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> Tensor:
        """sum_j p̂_j v_j: see `Prepared.sums`."""
        return self._dense(q, positions, heads) @ self.v[heads]

    def weights_at(self, q: Tensor, positions: Tensor, indices: Tensor, *, heads: slice = EVERY) -> Tensor:
        """p̂ at some keys: see `Prepared.weights_at`."""
        return self._dense(q, positions, heads).gather(-1, indices)

    def exact_rows(self, positions: Tensor) -> Tensor:
        """All of them: see `Prepared.exact_rows`."""
        return torch.ones_like(positions, dtype=torch.bool)

    def cost_at(self) -> float:
        """Multiply-adds for a drawn key: see `Prepared.cost_at`."""
        return float(self.k.shape[-1])

    def cost(self, n: int) -> float:
        """Multiply-adds for a query of n keys: see `Prepared.cost`."""
        return float(n * (self.k.shape[-1] + self.v.shape[-1]))

    def _dense(self, q: Tensor, positions: Tensor, heads: slice) -> Tensor:
        k = self.k[heads]
        check_queries(q, positions, k)
        return masked_logits(q, k, positions, self.scale, self.causal).softmax(-1)
