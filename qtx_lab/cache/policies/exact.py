"""`ExactPolicy`: exact attention, which every method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import ArgumentError
from .base import CachePolicy, LayerCache, LayerPrompt
from .chosen_keys import ChosenKeysCache, DecodeStep, KeyChoice


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
        return ChosenKeysCache(prompt, _AllKeys(), self.layer_seed(prompt.layer))


class _AllKeys:
    def choose(self, step: DecodeStep) -> KeyChoice:
        return KeyChoice(step.queries.new_ones(*step.queries.shape[:2], step.length))
