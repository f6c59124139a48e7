"""`MagicPIGPolicy`: keys drawn by collisions of random hashes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_count
from .base import CachePolicy, LayerCache, LayerPrompt
from .chosen_keys import ChosenKeysCache, DecodeStep, KeyChoice
from .guessed_keys import KeptEnds

ENTRY_BYTES = 4
"""Bytes of an entry of a bucket, the number of a token."""

LEAST_PROBABILITY = 1e-4
"""Added to a key's probability, as in the released code."""

MAX_TABLES = 1024
"""No more tables than that are made for a budget."""

TUNED_QUERIES = 16
"""The number of tables is chosen by so many of the prompt's last queries."""

MAX_BITS = 15
"""The most bits of a hash: codes are kept in 16 bits, one of which is a sign."""


@dataclass(frozen=True, kw_only=True)
class MagicPIGPolicy(CachePolicy):
    """Reads the keys that collide with the query in two hash tables or more, weighed by how likely that is.

    A table has the signs of `bits` random projections as its hash. With cos the cosine of the query and the
    key, from which the mean of the prompt's keys is subtracted, one bit agrees with probability
    p = 1 - arccos(cos) / pi, and the key is read with

        u = 1 - (1 - p^K)^L - L p^K (1 - p^K)^(L - 1),      K bits, L tables,

    so that its weight is exp(l) / u. The first and the newest tokens of the prompt and all later ones are
    read in any case.

    Source: Chen and others, MagicPIG: LSH sampling for efficient LLM generation (2410.16179), equation 9 and
    algorithm 1; two collisions and the 1e-4 added to u are the released code's.

    Parameters
    ----------
    budget, seed
        As in `CachePolicy`; where `tables` is None, as many tables are made as the prompt's last queries read
        the budget with, on average over the heads of a layer.
    bits : int
        K, 8 to 11 in the paper and 10 in the released scripts.
    tables : int, optional
        L.
    sinks : int
        First tokens, 4 in the paper.
    recent : float
        Share of the budget for the prompt's newest tokens, 64 of them in the paper.
    """

    name: ClassVar[str] = "magicpig"
    bits: int = 10
    tables: int | None = None
    sinks: int = 4
    recent: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = KeptEnds(self.sinks, self.recent)  # refuses what is not allowed
        self.store(bits=check_count("bits", self.bits, 1, MAX_BITS), sinks=ends.sinks, recent=ends.recent)
        if self.tables is not None:
            self.store(tables=check_count("tables", self.tables))

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        return f"MagicPIG, {self.bits} bits"

    def make_cache(self, prompt: LayerPrompt) -> LayerCache:
        """The cache of a layer: see `CachePolicy.make_cache`."""
        seed = self.layer_seed(prompt.layer)
        return ChosenKeysCache(prompt, _Collisions(self, prompt, seed), seed)


class _Collisions:
    def __init__(self, policy: MagicPIGPolicy, prompt: LayerPrompt, seed: Tensor):
        self.policy = policy
        keys = prompt.flat_keys().float()
        n = keys.shape[1]
        self.certain = KeptEnds(policy.sinks, policy.recent).mask(n, policy.budget_at(n), keys.device)
        hashed = keys[:, ~self.certain] if not bool(self.certain.all()) else keys
        self.mean = hashed.mean(1, keepdim=True)  # [N, 1, E]
        centred = keys - self.mean
        self.sizes = centred.norm(dim=-1).clamp_min(torch.finfo(keys.dtype).tiny)  # [N, n]
        if policy.tables is None:
            self.tables = self._choose_tables(prompt, centred)
        else:
            self.tables = torch.full((len(keys), 1, 1), policy.tables, device=keys.device)
        """L of each key head, (N, 1, 1): the same for those of a sequence."""
        generator = torch.Generator().manual_seed(int(seed) & ((1 << 63) - 1))
        # A table's projections do not depend on how many tables other sequences have.
        most = int(self.tables.max())
        shape = (max(MAX_TABLES, most), keys.shape[-1], policy.bits)
        projections = torch.randn(shape, generator=generator)[:most]
        self.projections = projections.transpose(0, 1).flatten(1).to(keys.device)  # [E, L K]
        self.codes = self._hash(centred)  # [N, n, L]

    def choose(self, step: DecodeStep) -> KeyChoice:
        factors = step.queries.new_ones(*step.queries.shape[:2], step.length)
        if self.policy.budget_at(step.length) == step.length:
            return KeyChoice(factors)
        n, q = self.certain.numel(), step.queries.float()
        same = self._hash(q)[:, :, None] == self.codes[:, None]  # [N, G, n, L]
        same &= torch.arange(same.shape[-1], device=q.device) < self.tables[..., None]
        collisions = same.sum(-1) * ~self.certain
        products = step.logits[..., :n].float() - q @ self.mean.mT
        cosine = products / (q.norm(dim=-1, keepdim=True) * self.sizes[:, None])
        likely = collision_probability(cosine, self.policy.bits, self.tables) + LEAST_PROBABILITY
        weights = torch.where(collisions >= 2, 1 / likely, 0)
        factors[..., :n] = torch.where(self.certain, 1, weights).to(factors.dtype)
        return KeyChoice(factors, other_bytes=float(collisions.sum()) * ENTRY_BYTES)

    def _choose_tables(self, prompt: LayerPrompt, centred: Tensor) -> Tensor:
        """The most tables with which the prompt's last queries read no more keys than the budget.

        Of each key head, (N, 1, 1), by the mean over the heads of its sequence.
        """
        q = prompt.grouped_queries(TUNED_QUERIES).float().flatten(1, 2)  # [N, G L', E]
        unit = q / q.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
        cosine = (unit @ (centred / self.sizes[..., None]).mT)[..., ~self.certain]
        cosine = cosine.unflatten(0, (prompt.batch, -1)).flatten(1, 2)  # [B, rows, keys]
        left = self.policy.budget_at(self.certain.numel()) - int(self.certain.sum())
        fewest = torch.full((prompt.batch, 1, 1), 2, device=q.device)
        most = torch.full_like(fewest, MAX_TABLES)
        for _ in range(MAX_TABLES.bit_length()):
            tables = (fewest + most + 1) // 2
            read = collision_probability(cosine, self.policy.bits, tables).sum(-1, keepdim=True)
            fits = read.mean(1, keepdim=True) <= left
            fewest, most = torch.where(fits, tables, fewest), torch.where(fits, most, tables - 1)
            most = torch.maximum(fewest, most)
        return fewest.repeat_interleave(prompt.key_heads, 0)

    def _hash(self, x: Tensor) -> Tensor:
        """The code of vectors (N, m, E) in each table, int16, (N, m, L)."""
        signs = (x @ self.projections > 0).unflatten(-1, (-1, self.policy.bits))
        place = 1 << torch.arange(self.policy.bits, device=x.device)
        return (signs * place).sum(-1).to(torch.int16)


def collision_probability(cosine: Tensor, bits: int, tables: int | Tensor) -> Tensor:
    """How likely two vectors of this cosine have the same hash of so many bits in two tables or more."""
    same = (1 - torch.arccos(cosine.clamp(-1, 1)) / math.pi) ** bits
    return 1 - (1 - same) ** tables - tables * same * (1 - same) ** (tables - 1)
