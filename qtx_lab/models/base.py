"""`CausalModel`: what generation asks of a language model; `AttentionFn`: what replaces its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

AttentionFn = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`attention(layer, q, k, v)`: q (B, H, L, E), k and v (B, Hkv, L, E), causal -> (B, H, L, E)."""


class ModelShape(Protocol):
    """The sizes of a model that a prompt has to fit."""

    @property
    def context(self) -> int:
        """Length in tokens of the longest text that the model reads."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, which are counted from 0."""


class CausalModel(Protocol):
    """A causal language model whose attention can be replaced at every call."""

    @property
    def config(self) -> ModelShape:
        """The sizes of the model."""

    def __call__(self, tokens: Tensor, attention: AttentionFn, first_position: int = 0) -> Tensor:
        """Logits (B, L, vocab_size) of the token after each of `tokens`, int64, (B, L).

        Parameters
        ----------
        tokens : Tensor, int64, (B, L)
        attention : AttentionFn
            Called once for each layer, from the first to the last, with the queries, keys and values of these
            tokens.
        first_position : int
            The position of the first of these tokens in its text.
        """
