"""`PQCachePolicy`: keys chosen by product codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...checks import check_count
from .base import CachePolicy, LayerCache, LayerPrompt
from .chosen_keys import ChosenKeysCache
from .guessed_keys import GuessedKeys, KeptEnds
from .product_codes import MAX_CODE_BITS, ProductCodes


@dataclass(frozen=True, kw_only=True)
class PQCachePolicy(CachePolicy):
    """Reads the first and the newest tokens, and those of largest logit by product codes.

    Source: Zhang and others, PQCache: product quantization-based KVCache for long context LLM inference
    (2407.12820), algorithm 2. Its released settings are the defaults here but for 32 sinks, which for budgets
    of some forty tokens have 1.8 times the error.

    Parameters
    ----------
    budget, seed
        As in `CachePolicy`; the first and the newest tokens are part of it.
    parts, bits, rounds : int
        See `ProductCodes`; of `rounds` of k-means the paper makes as many as the prefill of a layer leaves
        time for.
    sinks : int
        The first tokens.
    recent : float
        The share of the budget for the newest tokens.
    draw : bool
        Not the paper's: whether the others are drawn, by the codes, and weighed by exact logits.
    shared : bool
        Whether the query heads of a key head read the same tokens, as in the paper.
    """

    name: ClassVar[str] = "pqcache"
    parts: int = 2
    bits: int = 6
    rounds: int = 10
    sinks: int = 4
    recent: float = 0.5
    draw: bool = False
    shared: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("parts", "rounds"):
            self.store(**{name: check_count(name, vars(self)[name])})
        ends = KeptEnds(self.sinks, self.recent)  # refuses what is not allowed
        self.store(
            bits=check_count("bits", self.bits, 1, MAX_CODE_BITS), sinks=ends.sinks, recent=ends.recent
        )

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        return f"PQCache, {self.parts}x{self.bits} bits{', drawn' if self.draw else ''}"

    def make_cache(self, prompt: LayerPrompt) -> LayerCache:
        """The cache of a layer: see `CachePolicy.make_cache`."""
        seed = self.layer_seed(prompt.layer)
        codes = ProductCodes(prompt, self.parts, self.bits, self.rounds, seed)
        ends = KeptEnds(self.sinks, self.recent)
        return ChosenKeysCache(prompt, GuessedKeys(self, codes, self.draw, ends, self.shared), seed)
