"""`SampledPolicy`: the lab's own sampled attention, keys drawn by a sketch and weighed by exact logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_count
from ...errors import ArgumentError, unknown_name
from ..kv_cache import SampledKVCache
from ..sketches import PROPOSALS
from .base import CachePolicy, LayerCache, LayerPrompt
from .chosen_keys import ChosenKeysCache, DecodeStep
from .guessed_keys import GuessedKeys, Guesses, KeptEnds

FITTED_QUERIES = 64
"""A sketch is fitted to so many of the prompt's last queries, which are most like those to come.

On SmolLM2 at 2,048 tokens they have .8 times the error of all queries with rank 16, and .4 times with rank 4.
"""


@dataclass(frozen=True, kw_only=True)
class SampledPolicy(CachePolicy):
    """Draws keys by a sketch of all keys, and weighs them by their exact logits.

    With the defaults of the last four settings it is a `SampledKVCache`, as users run it. The others say what
    more there is to gain, or to lose, by choosing keys otherwise. On SmolLM2 at 2,048 tokens, draws that the
    query heads of a key head share have .6 times the error of draws of their own, with rank 16 and 12 % of
    the bytes; with rank 4 and 7 %, a tenth of the budget for the newest tokens leaves .7 times that.

    Parameters
    ----------
    budget, seed
        As in `CachePolicy`; the budget is the number of draws.
    proposal : {"low-rank", "int4", "mixed", "exact"}
    rank : int, optional
        Of a low-rank or mixed sketch; as in `SampledKVCache.build` where None.
    fitted_queries : int
        How many of the prompt's last queries a sketch is fitted to.
    shared : bool
        Whether the query heads of a key head draw the same keys, by the mean of their proposals (by the root
        mean square where some tokens are read in any case); each weighs them by its own exact logits.
    sinks : int
        First tokens that are read in any case; they are part of the budget.
    recent : float
        Share of the budget for the newest tokens, which are read in any case.
    draw : bool
        Whether keys are drawn. Otherwise those of largest score by the sketch are read and nothing else, as
        in SparQ and Loki, which is no estimate of the sum over all keys.
    adaptive : bool
        Whether the budget is the most that a row draws: see `SampledKVCache.attend`.
    """

    name: ClassVar[str] = "sampled"
    proposal: str = "low-rank"
    rank: int | None = None
    fitted_queries: int = FITTED_QUERIES
    shared: bool = False
    sinks: int = 0
    recent: float = 0.0
    draw: bool = True
    adaptive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proposal not in PROPOSALS:
            raise unknown_name("proposal", self.proposal, PROPOSALS)
        if self.rank is not None:
            self.store(rank=check_count("rank", self.rank))
        self.store(fitted_queries=check_count("fitted_queries", self.fitted_queries))
        ends = KeptEnds(self.sinks, self.recent)  # refuses what is not allowed
        self.store(sinks=ends.sinks, recent=ends.recent)
        if self.adaptive and (not self.draw or self.sinks or self.recent):
            raise ArgumentError("adaptive=True is not allowed with draw=False, sinks and recent.")

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        sketch = self.proposal if self.rank is None else f"{self.proposal} {self.rank}"
        how = f"{', shared' if self.shared else ''}{', ends' if self.sinks or self.recent else ''}"
        how += ", adaptive" if self.adaptive else ""
        return f"{'sampled' if self.draw else 'top-k'}, {sketch}{how}"

    def make_cache(self, prompt: LayerPrompt) -> LayerCache:
        """The cache of a layer: see `CachePolicy.make_cache`."""
        cache = build_cache(prompt, self.proposal, self.rank, self.fitted_queries)
        if self.draw and not (self.sinks or self.recent):
            return SampledLayerCache(self, prompt, cache)
        ends, guesser = KeptEnds(self.sinks, self.recent), SketchGuesser(cache, prompt.batch)
        chooser = GuessedKeys(self, guesser, self.draw, ends, self.shared)
        return ChosenKeysCache(prompt, chooser, self.layer_seed(prompt.layer))


class SampledLayerCache(LayerCache):
    """A `SampledKVCache` with a policy's budget and random numbers, which counts what it reads."""

    def __init__(self, policy: SampledPolicy, prompt: LayerPrompt, cache: SampledKVCache):
        super().__init__(prompt)
        self._policy, self._scale, self._cache = policy, prompt.scale, cache
        seed = int(policy.layer_seed(prompt.layer)) & ((1 << 63) - 1)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, k: Tensor, v: Tensor) -> None:
        """Store a token: see `LayerCache.add`."""
        self._cache.append(k, v)

    def attend_to_tokens(self, q: Tensor) -> Tensor:
        """Attention by draws: see `LayerCache.attend_to_tokens`."""
        n, heads = self.length, self.heads
        policy = self._policy
        estimate = self._cache.attend(
            q,
            policy.budget_at(n),
            adaptive=policy.adaptive,
            share_keys=policy.shared,
            scale=self._scale,
            generator=self._generator,
        )
        indices = estimate.draws.indices.reshape(heads, -1)
        drawn = (estimate.draws.weights > 0).view(heads, -1)
        # A place past the last one takes the draws of weight 0, which read nothing.
        read = torch.zeros(heads, n + 1, dtype=torch.bool, device=q.device)
        read = read.scatter_(1, indices.masked_fill(~drawn, n), True)[:, :n]
        exact = self._cache.proposal == "exact"
        self.count(None if exact else read, read, 0 if exact else self._cache.sketch_nbytes())
        return estimate.output


class SketchGuesser:
    """Guesses logits by the sketch of a `SampledKVCache`.

    Parameters
    ----------
    cache : SampledKVCache
        Of the prompt's tokens, as `build_cache` makes it.
    batch : int
        B, its sequences.
    """

    def __init__(self, cache: SampledKVCache, batch: int):
        self._cache, self._batch = cache, batch

    def guess(self, step: DecodeStep) -> Guesses:
        """Guessed logits of all keys: see `LogitGuesser.guess`."""
        known, n = len(self._cache), step.length
        if known < n:
            self._cache.append(
                *(x[:, known:].unflatten(0, (self._batch, -1)) for x in (step.keys, step.values))
            )
        q = step.queries.unflatten(0, (self._batch, -1)).flatten(1, 2)[:, :, None]
        logits = self._cache.scores(q, scale=1.0).view(*step.queries.shape[:2], n)  # queries are scaled
        exact = self._cache.proposal == "exact"
        return Guesses(logits, 0 if exact else self._cache.sketch_nbytes(), all_keys_read=exact)


def build_cache(
    prompt: LayerPrompt, proposal: str, rank: int | None, fitted_queries: int = FITTED_QUERIES
) -> SampledKVCache:
    """A `SampledKVCache` of a prompt, its sketch fitted to the last queries."""
    queries = prompt.queries[:, :, -fitted_queries:]
    return SampledKVCache.build(prompt.keys, prompt.values, proposal, rank, queries=queries)
