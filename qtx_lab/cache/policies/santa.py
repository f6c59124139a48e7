"""`SantaPolicy`: S²ANTA's systematic draws in tiles of keys, with the tile of its released kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...checks import check_count
from ...errors import unknown_name
from ...samplers import SantaSampler
from ...samplers.baselines.santa import BUDGETS
from .base import CachePolicy, LayerCache, LayerPrompt
from .chosen_keys import ChosenKeysCache, DecodeStep, KeyChoice
from .exact_logits import SampledChoice


@dataclass(frozen=True, kw_only=True)
class SantaPolicy(CachePolicy):
    """All keys are read for their logits; values are drawn systematically within tiles of keys.

    Source: Lee and others, Stochastic sparse attention for memory-bound inference (2605.01910); see
    `SantaSampler` for its two rules of how many draws a tile gets.

    Parameters
    ----------
    budget, seed
        As in `CachePolicy`; the budget is the number of draws.
    rule : {"proportional", "fixed"}
        S²ANTA-Prop, or S²ANTA-Flash.
    tile : int, optional
        Keys in a tile. Where None what the released kernels choose for the number of keys: 32 up to 1,536
        keys, 64 up to 3,072, else 256.
    """

    name: ClassVar[str] = "santa"
    rule: str = "proportional"
    tile: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in BUDGETS:
            raise unknown_name("rule", self.rule, BUDGETS)
        if self.tile is not None:
            self.store(tile=check_count("tile", self.tile))

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        return f"S²ANTA-{'Prop' if self.rule == 'proportional' else 'Flash'}"

    def make_cache(self, prompt: LayerPrompt) -> LayerCache:
        """The cache of a layer: see `CachePolicy.make_cache`."""
        return ChosenKeysCache(prompt, _Tiles(self), self.layer_seed(prompt.layer))


class _Tiles:
    def __init__(self, policy: SantaPolicy):
        self.policy = policy

    def choose(self, step: DecodeStep) -> KeyChoice:
        tile = automatic_tile(step.length) if self.policy.tile is None else self.policy.tile
        return SampledChoice(self.policy, SantaSampler(self.policy.rule, tile=tile)).choose(step)


def automatic_tile(length: int) -> int:
    """The keys of a tile that S²ANTA's kernels choose for so many keys."""
    return 32 if length <= 1536 else 64 if length <= 3072 else 256
