"""`SinkWindowPolicy`: the first tokens and the newest, as StreamingLLM keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...checks import check_count
from .base import CachePolicy, LayerCache, LayerPrompt
from .chosen_keys import ChosenKeysCache, DecodeStep, KeyChoice


@dataclass(frozen=True, kw_only=True)
class SinkWindowPolicy(CachePolicy):
    """The first `sinks` tokens and, with what the budget leaves, the newest ones.

    Source: Xiao and others, Efficient streaming language models with attention sinks (2309.17453), section
    3.2. There the positions of the kept tokens are counted anew; here keys keep the positions that they were
    encoded with, which is the same method for texts no longer than the model's context.

    Parameters
    ----------
    budget, seed
        As in `CachePolicy`; the sinks are part of the budget, and at least one token is the newest.
    sinks : int
        4 in the paper.
    """

    name: ClassVar[str] = "sink-window"
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.store(sinks=check_count("sinks", self.sinks))

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        return "sink + window"

    def make_cache(self, prompt: LayerPrompt) -> LayerCache:
        """The cache of a layer: see `CachePolicy.make_cache`."""
        return ChosenKeysCache(prompt, _SinkWindow(self), self.layer_seed(prompt.layer))


class _SinkWindow:
    def __init__(self, policy: SinkWindowPolicy):
        self.policy = policy

    def choose(self, step: DecodeStep) -> KeyChoice:
        budget = self.policy.budget_at(step.length)
        sinks = min(self.policy.sinks, budget - 1)
        factors = step.queries.new_zeros(*step.queries.shape[:2], step.length)
        factors[..., :sinks] = 1
        factors[..., step.length - (budget - sinks) :] = 1
        return KeyChoice(factors)
