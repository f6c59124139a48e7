"""`LanguageModel`: what the reference model and real ones share; `AttentionFn` replaces attention."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DtypeError, quoted

AttentionFn = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`attention(layer, q, k, v)`: q (B, H, L, E), k and v (B, Hkv, L, E), causal -> (B, H, L, E)."""


def causal_sdpa(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact causal attention with grouped-query heads."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class ModelSizes(Protocol):
    """The sizes of a language model."""

    @property
    def context(self) -> int:
        """Length in tokens of the longest text that the model reads."""

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, which are counted from 0."""

    @property
    def layers(self) -> int:
        """Number of layers, which are counted from 0."""

    @property
    def heads(self) -> int:
        """H, the query heads of a layer."""

    @property
    def kv_heads(self) -> int:
        """Hkv, the key heads of a layer, which divides H."""

    @property
    def head_dim(self) -> int:
        """E, the size of a head."""


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model whose attention can be replaced at every call."""

    @property
    def name(self) -> str:
        """What reports call the model."""

    @property
    def config(self) -> ModelSizes:
        """The sizes of the model."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens at which a generated text ends."""

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, int64, (number of tokens,)."""

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens, int64, (number of tokens,)."""

    def chat(self, message: str) -> str:
        """The text by which the model is asked to answer a message."""

    def __call__(
        self,
        tokens: Tensor,
        attention: AttentionFn = causal_sdpa,
        first_position: int = 0,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits (B, L, vocab_size) of the token after each of `tokens`, int64, (B, L).

        Parameters
        ----------
        tokens : Tensor, int64, (B, L)
        attention : AttentionFn
            Called once for each layer, from the first to the last, with the queries, keys and values of these
            tokens.
        first_position : int
            The position of the first of these tokens in its text.
        logits_to_keep : int
            If not 0, only the last so many tokens have logits.
        """

    def attention_inputs(
        self, tokens: Tensor, layers: Collection[int] | None = None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(q, k, v) of layers, after position encoding: see `record_inputs`."""

    def pieces(self, tokens: Iterable[int]) -> Iterator[bytes]:
        """The text of tokens in UTF-8, piece by piece as they come."""


def check_language_model(model: object) -> None:
    """Refuse what is no `LanguageModel`, as a name or a model of transformers."""
    if not isinstance(model, LanguageModel):
        given = f"={quoted(model)} is a text" if isinstance(model, str) else f" is a {type(model).__name__}"
        raise DtypeError(f"model{given}; it must be a language model, as load_language_model gives it.")


def record_inputs(
    model: LanguageModel, tokens: Tensor, layers: Collection[int] | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The (q, k, v) of `layers`, in their order, or of all: q (B, H, L, E), k and v (B, Hkv, L, E).

    Positions are encoded in them. `tokens` are int64, (B, L), and attend exactly.
    """
    inputs = []

    def record(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layers is None or layer in layers:
            inputs.append((q, k, v))
        return causal_sdpa(layer, q, k, v)

    with torch.no_grad():
        model(tokens, attention=record, logits_to_keep=1)
    return inputs
