"""`ChosenKeysCache`: attention over the keys that a method chooses for each query, weighed as it says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ...streams import Stream
from ..store import grown
from .base import LayerCache, LayerPrompt


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """One new query of each query head and the tokens that it may attend to, itself among them.

    Parameters
    ----------
    queries : Tensor, (N, G, E)
        Scaled, N = B Hkv key heads with G query heads each, float32 or float64.
    keys : Tensor, (N, n, E)
    values : Tensor, (N, n, Ev)
    stream : Stream
        The random numbers of the rows: the query heads of a group share them.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    stream: Stream

    @property
    def length(self) -> int:
        """n."""
        return self.keys.shape[1]

    @cached_property
    def logits(self) -> Tensor:
        """The exact logits, (N, G, n)."""
        return torch.bmm(self.queries, self.keys.to(self.queries.dtype).mT)


@dataclass(frozen=True, eq=False)
class KeyChoice:
    """Which keys a query reads, and how much each of them stands for.

    Key j, of exact logit l_j, has the weight f_j exp(l_j) / sum_i f_i exp(l_i). A method that cuts has
    f_j = 1 for what it reads. One that draws has f_j = c_j / E[c_j], c_j how often key j was drawn: then
    numerator and denominator are unbiased.

    Parameters
    ----------
    factors : Tensor, (N, G, n)
        f_j >= 0; 0 where a key is not read.
    keys_read : Tensor, bool, (N, n), or None
        The keys of which the whole vector was read. `factors > 0` of any query head where None.
    all_keys_read : bool
        Whether the choice itself took all exact logits.
    other_bytes : float
        Bytes of what the choice was made by, such as codes of all keys, for all key heads together.
    """

    factors: Tensor
    keys_read: Tensor | None = None
    all_keys_read: bool = False
    other_bytes: float = 0.0


class KeyChooser(Protocol):
    """What chooses keys. It may hold state, such as codes of the keys, and catch up with newer tokens."""

    def choose(self, step: DecodeStep) -> KeyChoice:
        """The keys that a new query reads."""


class ChosenKeysCache(LayerCache):
    """All tokens of a layer, of which every query attends to those that a chooser names.

    It is made to measure quality and what is read, not for speed: it computes all logits, and leaves
    out those that the method does not read.

    Parameters
    ----------
    prompt : LayerPrompt
    chooser : KeyChooser
    seed : Tensor, int64, ()
        Of the layer's random numbers.
    """

    def __init__(self, prompt: LayerPrompt, chooser: KeyChooser, seed: Tensor):
        super().__init__(prompt)
        self.chooser = chooser
        self._scale, self._seed = prompt.scale, seed
        # They are the prompt's own until a token is appended; `grown` then copies.
        self._keys, self._values = prompt.flat_keys(), prompt.flat_values()

    def add(self, k: Tensor, v: Tensor) -> None:
        """Store a token: see `LayerCache.add`."""
        n = self.length
        self._keys, self._values = grown(self._keys, n, n + 1), grown(self._values, n, n + 1)
        self._keys[:, n:][:, :1] = k.flatten(0, 1)
        self._values[:, n:][:, :1] = v.flatten(0, 1)

    def attend_to_tokens(self, q: Tensor) -> Tensor:
        """Attention over the chosen keys: see `LayerCache.attend_to_tokens`."""
        (batch, heads, _, width), n = q.shape, self.length
        rows = self._keys.shape[0]
        group, key_heads = batch * heads // rows, rows // batch
        precision = torch.promote_types(q.dtype, torch.float32)
        stream = Stream.of(self._seed, batch, key_heads, 1, n - 1, q.device)
        position = torch.full((group,), n - 1, dtype=torch.int64, device=q.device)
        step = DecodeStep(
            q.to(precision).reshape(rows, group, width) * self._scale,
            self._keys[:, :n],
            self._values[:, :n],
            stream.of_block(slice(None), position),
        )
        choice = self.chooser.choose(step)
        logits = step.logits.masked_fill(choice.factors == 0, -torch.inf)
        mass = choice.factors * (logits - logits.amax(-1, keepdim=True)).exp()
        output = torch.bmm(mass, step.values.to(precision)) / mass.sum(-1, keepdim=True)
        read = (choice.factors > 0).any(1)
        keys = None if choice.all_keys_read else read if choice.keys_read is None else choice.keys_read
        self.count(keys, read, choice.other_bytes)
        return output.to(q.dtype).view(batch, heads, 1, -1)
