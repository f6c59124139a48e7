"""Policies that take all exact logits and read few values: samplers of the lab, and oracle top-k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...errors import unknown_name
from ...samplers import BASELINES, SAMPLERS, InversionSampler, StreamSampler, make_sampler
from .base import CachePolicy, LayerCache, LayerPrompt
from .chosen_keys import ChosenKeysCache, DecodeStep, KeyChoice
from .draws import KeyDrawer, key_factors
from .guessed_keys import ExactGuesser, GuessedKeys


@dataclass(frozen=True, kw_only=True)
class SamplerPolicy(CachePolicy):
    """All keys are read for their exact logits, from which a sampler draws the values that are read.

    Parameters
    ----------
    budget, seed
        As in `CachePolicy`; the budget is the number of draws.
    sampler : str
        "head-tail", "systematic", "lattice" and others of `make_sampler`: those that draw from a row without
        the rows beside it.
    """

    name: ClassVar[str] = "sampler"
    sampler: str = "head-tail"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = SAMPLERS | BASELINES
        if self.sampler not in known or not isinstance(make_sampler(self.sampler), StreamSampler):
            allowed = [x for x in known if isinstance(make_sampler(x), StreamSampler)]
            raise unknown_name("sampler", self.sampler, allowed)

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        return f"{self.sampler}, exact logits"

    def make_cache(self, prompt: LayerPrompt) -> LayerCache:
        """The cache of a layer: see `CachePolicy.make_cache`."""
        sampler = make_sampler(self.sampler)
        assert isinstance(sampler, StreamSampler)  # checked when the policy was made
        return ChosenKeysCache(prompt, SampledChoice(self, sampler), self.layer_seed(prompt.layer))


class SampledChoice:
    """Chooses keys by a sampler, from their exact logits."""

    def __init__(self, policy: CachePolicy, sampler: StreamSampler):
        self.policy, self.sampler = policy, sampler
        self._drawer = KeyDrawer(sampler) if isinstance(sampler, InversionSampler) else None

    def choose(self, step: DecodeStep) -> KeyChoice:
        """The keys that are drawn: see `KeyChooser.choose`."""
        draws = self.policy.budget_at(step.length)
        if self._drawer is not None:
            factors = self._drawer.factors(step.logits, draws, step)
        else:
            drawn = self.sampler.draw_from(step.stream, step.logits, draws)
            factors = key_factors(drawn, step.length)
        return KeyChoice(factors, all_keys_read=True)


@dataclass(frozen=True, kw_only=True)
class TopKPolicy(CachePolicy):
    """The keys of largest exact logit and nothing else: what every method that guesses top keys aims at.

    Parameters
    ----------
    budget, seed
        As in `CachePolicy`.
    """

    name: ClassVar[str] = "oracle-top-k"

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        return "oracle top-k"

    def make_cache(self, prompt: LayerPrompt) -> LayerCache:
        """The cache of a layer: see `CachePolicy.make_cache`."""
        chooser = GuessedKeys(self, ExactGuesser(), draw=False)
        return ChosenKeysCache(prompt, chooser, self.layer_seed(prompt.layer))
