"""What every method of sparse decoding has in common: a policy, the cache of a layer, and what was read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import MAX_SEED, check_count, check_scale, check_tensors, python_number
from ...errors import ArgumentError, DtypeError, ShapeError
from ...streams import sequence_keys

HALF_BYTES = 2
"""Bytes of a number in half precision, in which keys and values are counted."""


@dataclass(frozen=True)
class Reads:
    """What attention of one query read, as shares of what exact attention reads, averaged over tokens.

    The query heads of a group share a key head: what several of them read counts once.

    Parameters
    ----------
    keys : float
        Keys of which the whole vector was read, as a share of all keys.
    values : float
        Values, as a share of all values.
    bytes : float
        Bytes of keys and values in half precision, and those of what a method reads beside them (sketches,
        bounds of pages, codes, in the precision in which the method stores them), as a share of the bytes of
        all keys and values in half precision.
    tokens : int
        How many queries the means are over.
    """

    keys: float
    values: float
    bytes: float
    tokens: int

    @staticmethod
    def mean(reads: Sequence[Reads]) -> Reads:
        """The mean over several caches, such as the layers of a model, weighted by their tokens.

        Examples
        --------
        >>> Reads.mean([Reads(1.0, 1.0, 1.0, 5), Reads(0.0, 0.5, 0.25, 5)])
        Reads(keys=0.5, values=0.75, bytes=0.625, tokens=10)
        """
        tokens = sum(x.tokens for x in reads)
        if not tokens:
            raise ArgumentError("reads is not allowed: there must be reads of at least one token.")
        keys, values, size = (
            sum(x.tokens * share for x, share in zip(reads, shares, strict=True)) / tokens
            for shares in zip(*((x.keys, x.values, x.bytes) for x in reads), strict=True)
        )
        return Reads(keys, values, size, tokens)


@dataclass(frozen=True, eq=False)
class LayerPrompt:
    """The prompt of one layer, computed exactly. All policies share its tensors; none changes them.

    Parameters
    ----------
    layer : int
        Which layer, from 0.
    queries : Tensor, (B, H, L, E)
        After position encoding.
    keys : Tensor, (B, Hkv, L, E)
        After position encoding.
    values : Tensor, (B, Hkv, L, Ev)
    scale : float
        What products of queries and keys are multiplied by.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float

    @property
    def batch(self) -> int:
        """B, the sequences."""
        return self.keys.shape[0]

    @property
    def key_heads(self) -> int:
        """Hkv."""
        return self.keys.shape[1]

    @property
    def group(self) -> int:
        """G = H / Hkv, the query heads that share a key head."""
        return self.queries.shape[1] // self.key_heads

    def grouped_queries(self, last: int | None = None) -> Tensor:
        """The last queries, all of them where None, scaled, by key heads: (N, G, L', E), N = B Hkv."""
        some = self.queries if last is None else self.queries[:, :, -last:]
        precision = torch.promote_types(some.dtype, torch.float32)
        rows = self.batch * self.key_heads
        return (some.to(precision) * self.scale).reshape(rows, self.group, -1, some.shape[-1])

    def flat_keys(self) -> Tensor:
        """Keys (N, L, E)."""
        return self.keys.flatten(0, 1)

    def flat_values(self) -> Tensor:
        """Values (N, L, Ev)."""
        return self.values.flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class CachePolicy(ABC):
    """How a method decodes after an exact prompt: what it keeps, and what a new query reads of it.

    A policy is a value: settings only. `start` gives the state of one layer of one prompt.

    Parameters
    ----------
    budget : float or int
        The keys of which a query head reads key and value: a share of all keys that there are (a float,
        above 0 and at most 1), or a number of tokens (an int).
    seed : int
        Of the random numbers of a method that draws. Give every prompt a seed of its own.

    Raises
    ------
    ArgumentError
        If a setting is not allowed.
    """

    budget: float | int = 0.05
    seed: int = 0

    name: ClassVar[str]
    """The name by which `make_policy` knows the policy."""

    def __post_init__(self) -> None:
        self.store(budget=check_budget(self.budget), seed=check_count("seed", self.seed, 0, MAX_SEED))

    @property
    @abstractmethod
    def label(self) -> str:
        """What it is called in tables and figures."""

    def store(self, **settings: Any) -> None:
        """Set settings to what their checks returned, Python's own numbers; only while a policy is made."""
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    def budget_at(self, length: int) -> int:
        """How many of `length` keys a query head may read, at least 1 and at most all."""
        if isinstance(self.budget, float):
            return max(1, round(self.budget * length))
        return min(self.budget, length)

    def layer_seed(self, layer: int) -> Tensor:
        """The seed of the random numbers of a layer, int64, ()."""
        return sequence_keys(self.seed, layer)

    def start(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float | None = None
    ) -> LayerCache:
        """The cache of one layer after its exact prompt.

        Parameters
        ----------
        layer : int
        queries : Tensor, (B, H, L, E)
            All queries of the prompt after position encoding, H a multiple of Hkv.
        keys : Tensor, (B, Hkv, L, E)
            After position encoding.
        values : Tensor, (B, Hkv, L, Ev)
        scale : float, optional
            1 / sqrt(E) where None.

        Returns
        -------
        LayerCache
            It reads the tensors and does not change them, so that one prompt serves many policies.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If tensors do not fit each other.
        """
        layer = check_count("layer", layer, 0)
        check_scale(scale)
        check_tensors(queries=queries, keys=keys, values=values)
        _check_prompt(queries, keys, values)
        scale = 1 / math.sqrt(queries.shape[-1]) if scale is None else float(scale)
        queries, keys, values = queries.detach(), keys.detach(), values.detach()
        with torch.no_grad():
            return self.make_cache(LayerPrompt(layer, queries, keys, values, scale))

    @abstractmethod
    def make_cache(self, prompt: LayerPrompt) -> LayerCache:
        """The cache of one layer after a checked prompt."""


class LayerCache(ABC):
    """The tokens of one layer and what a policy knows of them; it counts what it reads.

    Parameters
    ----------
    prompt : LayerPrompt
    """

    def __init__(self, prompt: LayerPrompt):
        self.prompt_length = prompt.keys.shape[-2]
        self.length = self.prompt_length
        """n, the tokens so far."""
        self._like_keys, self._like_values = prompt.keys[:, :, :0], prompt.values[:, :, :0]
        self._query_shape = (*prompt.queries.shape[:2], 1, prompt.queries.shape[-1])
        self.heads = prompt.batch * prompt.key_heads
        """N, the key heads of all sequences."""
        self._totals = [0.0, 0.0, 0.0]  # keys, values, bytes
        self._attended = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add the newest token: k (B, Hkv, 1, E), after position encoding, and v (B, Hkv, 1, Ev).

        Raises
        ------
        ShapeError, DtypeError
            If they are not like the keys and values of the prompt.
        """
        for name, x, like in (("k", k, self._like_keys), ("v", v, self._like_values)):
            if x.shape != (*like.shape[:2], 1, like.shape[-1]):
                expected = (*like.shape[:2], 1, like.shape[-1])
                raise ShapeError(f"{name} has shape {tuple(x.shape)}; it must be {expected}.")
            _check_like(name, x, like)
        with torch.no_grad():
            self.add(k.detach(), v.detach())
        self.length += 1

    def attend(self, q: Tensor) -> Tensor:
        """Attention of the newest query q (B, H, 1, E) to all tokens so far, itself among them.

        Returns
        -------
        Tensor, (B, H, 1, Ev)

        Raises
        ------
        ShapeError, DtypeError
            If it is not like the queries of the prompt.
        """
        if q.shape != self._query_shape:
            raise ShapeError(f"q has shape {tuple(q.shape)}; it must be {self._query_shape}.")
        _check_like("q", q, self._like_keys)
        with torch.no_grad():
            return self.attend_to_tokens(q.detach())

    @abstractmethod
    def add(self, k: Tensor, v: Tensor) -> None:
        """Add a checked token; `length` does not count it yet."""

    @abstractmethod
    def attend_to_tokens(self, q: Tensor) -> Tensor:
        """Attention of a checked query, (B, H, 1, Ev). It calls `count` once."""

    def count(self, keys: Tensor | None, values: Tensor, other_bytes: float = 0.0) -> None:
        """Count what one query read.

        Parameters
        ----------
        keys : Tensor, bool, (N, n), or None
            The keys of each of N = B Hkv key heads that were read; all where None.
        values : Tensor, bool, (N, n)
            The values that were read.
        other_bytes : float
            Bytes of what was read beside them, by all key heads together.
        """
        of_keys = 1.0 if keys is None else float(keys.double().mean())
        of_values = float(values.double().mean())
        width, value_width = self._like_keys.shape[-1], self._like_values.shape[-1]
        exact = values.numel() * (width + value_width) * HALF_BYTES
        of_bytes = (of_keys * width + of_values * value_width) / (width + value_width) + other_bytes / exact
        self._totals = [x + y for x, y in zip(self._totals, (of_keys, of_values, of_bytes), strict=True)]
        self._attended += 1

    @property
    def reads(self) -> Reads:
        """What was read so far, a mean over the queries.

        Raises
        ------
        ArgumentError
            If there was no query yet.
        """
        if not self._attended:
            raise ArgumentError("reads is not known yet: it is a mean over queries, and there was none.")
        keys, values, size = (x / self._attended for x in self._totals)
        return Reads(keys, values, size, self._attended)


def check_budget(budget: float | int) -> float | int:
    """Return what is a share of the keys, a float, or a number of tokens, an int."""
    number = python_number(budget)
    if not isinstance(number, float):
        return check_count("budget", budget)
    if not 0 < number <= 1:
        raise ArgumentError(
            f"budget={budget} is not allowed: a share of the keys must be above 0 and at most 1."
        )
    return number


def _check_prompt(queries: Tensor, keys: Tensor, values: Tensor) -> None:
    if not (queries.ndim == keys.ndim == values.ndim == 4):
        shapes = ", ".join(str(tuple(x.shape)) for x in (queries, keys, values))
        raise ShapeError(
            f"queries, keys and values have shapes {shapes}; they must be (B, H, L, E), (B, Hkv, L, E) and "
            "(B, Hkv, L, Ev)."
        )
    heads, key_heads = queries.shape[1], keys.shape[1]
    fits = (
        queries.shape[0] == keys.shape[0]
        and queries.shape[2:] == keys.shape[2:]
        and keys.shape[:3] == values.shape[:3]
        and 0 not in (*queries.shape, *keys.shape, *values.shape)
        and heads % key_heads == 0
    )
    if not fits:
        raise ShapeError(
            f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} must "
            "be (B, H, L, E), (B, Hkv, L, E) and (B, Hkv, L, Ev), none of them empty, H a multiple of Hkv."
        )


def _check_like(name: str, x: Tensor, like: Tensor) -> None:
    if x.dtype != like.dtype or x.device != like.device:
        raise DtypeError(f"{name} is {x.dtype} on {x.device}; the prompt is {like.dtype} on {like.device}.")
