"""The heaviest keys of a row as its control."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_count
from .base import EVERY, Control, Prepared, check_keys, check_queries, masked_logits


class TopKControl(Control):
    """p̂ = softmax over the `keys` heaviest exact logits, 0 elsewhere.

    It costs n E + keys d multiply-adds a query: it reads every key, but few values. It removes the noise
    among the heaviest keys and leaves that of the tail. Source: Gupta et al., Memory-efficient transformers
    via top-k attention (2021), here as a control and not as an approximation.

    Parameters
    ----------
    keys : int
        At least 1. A row that sees fewer keys uses them all.
    """

    name = "topk"

    def __init__(self, keys: int = 32):
        keys = check_count("keys", keys)
        self.keys = keys

    def prepare(
        self,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool,
        q: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TopKWeights:
        """Keep the keys and values: see `Control.prepare`."""
        check_keys(k, v, scale)
        return TopKWeights(k, v, scale, causal, min(self.keys, k.shape[1]))


class TopKWeights(Prepared):
    """`TopKControl` for given keys."""

    def __init__(self, k: Tensor, v: Tensor, scale: float, causal: bool, keys: int):
        self.k, self.v, self.scale, self.causal, self.keys = k, v, scale, causal, keys

    def sums(self, q: Tensor, positions: Tensor, *, heads: slice = EVERY) -> Tensor:
        """sum_j p̂_j v_j: see `Prepared.sums`."""
        return self._dense(q, positions, heads) @ self.v[heads]

    def weights_at(self, q: Tensor, positions: Tensor, indices: Tensor, *, heads: slice = EVERY) -> Tensor:
        """p̂ at some keys: see `Prepared.weights_at`."""
        return self._dense(q, positions, heads).gather(-1, indices)

    def exact_rows(self, positions: Tensor) -> Tensor:
        """Those that see no more keys than are taken: see `Prepared.exact_rows`."""
        seen = (positions + 1).clamp_max(self.k.shape[1]) if self.causal else self.k.shape[1]
        return torch.full_like(positions, self.keys) >= seen

    def cost_at(self) -> float:
        """Multiply-adds for a drawn key: see `Prepared.cost_at`."""
        return float(self.k.shape[-1])

    def cost(self, n: int) -> float:
        """Multiply-adds for a query of n keys: see `Prepared.cost`."""
        return float(n * self.k.shape[-1] + min(self.keys, n) * self.v.shape[-1])

    def _dense(self, q: Tensor, positions: Tensor, heads: slice) -> Tensor:
        k = self.k[heads]
        check_queries(q, positions, k)
        logits = masked_logits(q, k, positions, self.scale, self.causal)
        top = logits.topk(self.keys, dim=-1)
        return torch.zeros_like(logits).scatter_(-1, top.indices, top.values.softmax(-1))
