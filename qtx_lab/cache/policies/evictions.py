"""Evictions: H2O and SnapKV, which keep some tokens of the prompt and forget the others for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_count, check_number
from ...errors import ArgumentError
from .base import CachePolicy, LayerCache, LayerPrompt
from .chosen_keys import ChosenKeysCache, DecodeStep, KeyChoice

SCORE_BYTES = 4
"""Bytes of an accumulated score, which H2O reads and writes for each token that it keeps."""

QUERY_BLOCK = 256
"""Queries whose attention to the prompt is in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class H2OPolicy(CachePolicy):
    """Keeps the newest tokens and, of the older ones, those that got most attention so far.

    A token's score is the sum of the attention probabilities that all queries since it came gave it, those of
    the prompt and, among the tokens kept, those of the generated tokens; of all query heads of its key head,
    which share what is kept. What is evicted is gone.

    Source: Zhang and others, H2O: heavy-hitter oracle for efficient generative inference of large language
    models (2306.14048), algorithm 1. Prompts are attended to in full before the first eviction, as in the
    released code.

    Parameters
    ----------
    budget, seed
        As in `CachePolicy`; nothing is drawn.
    recent : float
        The share of the budget for the newest tokens, half in the paper.
    """

    name: ClassVar[str] = "h2o"
    recent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.store(recent=check_number("recent", self.recent, least=0, most=1))

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        return "H2O"

    def make_cache(self, prompt: LayerPrompt) -> LayerCache:
        """The cache of a layer: see `CachePolicy.make_cache`."""
        return ChosenKeysCache(prompt, _HeavyHitters(self, prompt), self.layer_seed(prompt.layer))


class _HeavyHitters:
    def __init__(self, policy: H2OPolicy, prompt: LayerPrompt):
        self.policy = policy
        self.scores = attention_received(prompt)  # [N, n]
        self.mask = torch.ones_like(self.scores, dtype=torch.bool)

    def choose(self, step: DecodeStep) -> KeyChoice:
        n, budget = step.length, self.policy.budget_at(step.length)
        newer = n - self.scores.shape[1]
        self.scores = F.pad(self.scores, (0, newer))
        self.mask = F.pad(self.mask, (0, newer), value=True)
        recent = min(budget, max(1, round(self.policy.recent * budget)))
        older = self.scores[:, : n - recent].masked_fill(~self.mask[:, : n - recent], -torch.inf)
        heavy = older.topk(budget - recent, -1)
        self.mask[:, : n - recent] = False
        self.mask.scatter_(1, heavy.indices, heavy.values > -torch.inf)

        factors = self.mask[:, None].expand(step.logits.shape).to(step.logits.dtype)
        given = step.logits.masked_fill(factors == 0, -torch.inf).softmax(-1)
        self.scores = self.scores + given.sum(1)
        return KeyChoice(factors, other_bytes=float(self.mask.sum()) * SCORE_BYTES)


@dataclass(frozen=True, kw_only=True)
class SnapKVPolicy(CachePolicy):
    """Keeps the prompt's last tokens and those that their queries attend to; later tokens are all kept.

    The probabilities that the last `window` queries of the prompt give a token are summed and pooled over
    `pool` neighbours; the query heads of a key head share what is kept, by their mean.

    Source: Li and others, SnapKV: LLM knows what you are looking for before generation (2404.14469),
    section 4; sharing as its authors advise for grouped heads and NVIDIA/kvpress does.

    Parameters
    ----------
    budget, seed
        As in `CachePolicy`, of the prompt; nothing is drawn.
    window : int
        Last queries that look at the prompt, and tokens kept; no more than half the budget.
    pool : int
        Neighbours of the average, odd.
    """

    name: ClassVar[str] = "snapkv"
    window: int = 32
    pool: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.store(window=check_count("window", self.window), pool=check_count("pool", self.pool))
        if self.pool % 2 == 0:
            raise ArgumentError(f"pool={self.pool} is not allowed: it must be odd.")

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        return "SnapKV"

    def make_cache(self, prompt: LayerPrompt) -> LayerCache:
        """The cache of a layer: see `CachePolicy.make_cache`."""
        return ChosenKeysCache(prompt, _SeenByTheLast(self, prompt), self.layer_seed(prompt.layer))


class _SeenByTheLast:
    def __init__(self, policy: SnapKVPolicy, prompt: LayerPrompt):
        n = prompt.keys.shape[-2]
        budget = policy.budget_at(n)
        window = min(policy.window, max(1, budget // 2))
        seen = attention_received(prompt, window)[:, : n - window]
        pooled = F.avg_pool1d(seen[:, None], policy.pool, 1, policy.pool // 2)[:, 0]
        self.mask = torch.ones(len(seen), n, dtype=torch.bool, device=seen.device)
        best = pooled.topk(min(budget - window, n - window), -1).indices
        self.mask[:, : n - window] = False
        self.mask.scatter_(1, best, True)

    def choose(self, step: DecodeStep) -> KeyChoice:
        self.mask = F.pad(self.mask, (0, step.length - self.mask.shape[1]), value=True)
        return KeyChoice(self.mask[:, None].expand(step.logits.shape).to(step.logits.dtype))


def attention_received(prompt: LayerPrompt, last: int | None = None) -> Tensor:
    """The causal attention probabilities that a prompt's tokens get, summed over queries: (N, L).

    Parameters
    ----------
    prompt : LayerPrompt
    last : int, optional
        Queries that count: the last ones, or all where None. All query heads of a key head count.
    """
    queries = prompt.grouped_queries(last)  # [N, G, L', E]
    keys = prompt.flat_keys().to(queries.dtype)
    n = keys.shape[1]
    first = n - queries.shape[2]
    total = queries.new_zeros(keys.shape[:2])
    place = torch.arange(n, device=keys.device)
    for start in range(0, queries.shape[2], QUERY_BLOCK):
        block = queries[:, :, start : start + QUERY_BLOCK]
        end = first + start + block.shape[2]
        logits = torch.einsum("ngle,nke->nglk", block, keys[:, :end])
        hidden = place[:end] > place[first + start : end, None]
        total[:, :end] += logits.masked_fill_(hidden, -torch.inf).softmax(-1).sum((1, 2))
    return total
