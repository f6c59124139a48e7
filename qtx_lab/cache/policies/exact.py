"""`ExactPolicy`: exact attention, which every method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ArgumentError
from ..store import grown
from .base import CachePolicy, LayerCache, LayerPrompt


@dataclass(frozen=True, kw_only=True)
class ExactPolicy(CachePolicy):
    """Every query reads all keys and values.

    Parameters
    ----------
    budget, seed
        As in `CachePolicy`; the budget is 1.0, all keys.
    """

    name: ClassVar[str] = "exact"
    budget: float | int = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget != 1.0 or not isinstance(self.budget, float):
            raise ArgumentError(
                f"budget={self.budget!r} is not allowed: exact attention reads all keys (1.0)."
            )

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        return "exact"

    def make_cache(self, prompt: LayerPrompt) -> LayerCache:
        """The cache of a layer: see `CachePolicy.make_cache`."""
        return ExactLayerCache(prompt)


class ExactLayerCache(LayerCache):
    """All keys and values, and attention by torch's `scaled_dot_product_attention`."""

    def __init__(self, prompt: LayerPrompt):
        super().__init__(prompt)
        self._scale, self._batch = prompt.scale, prompt.batch
        # They are the prompt's own until a token is appended; `grown` then copies.
        self._keys, self._values = prompt.flat_keys(), prompt.flat_values()
        self._all = torch.ones(1, 1, dtype=torch.bool, device=prompt.keys.device)

    def add(self, k: Tensor, v: Tensor) -> None:
        """Store a token: see `LayerCache.add`."""
        n = self.length
        self._keys, self._values = grown(self._keys, n, n + 1), grown(self._values, n, n + 1)
        self._keys[:, n], self._values[:, n] = k.flatten(0, 1)[:, 0], v.flatten(0, 1)[:, 0]

    def attend_to_tokens(self, q: Tensor) -> Tensor:
        """Exact attention: see `LayerCache.attend_to_tokens`."""
        k, v = (x[:, : self.length].unflatten(0, (self._batch, -1)) for x in (self._keys, self._values))
        self.count(None, self._all)
        return F.scaled_dot_product_attention(q, k, v, scale=self._scale, enable_gqa=True)
