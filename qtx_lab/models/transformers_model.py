"""`TransformersModel`: a decoder of Hugging Face's transformers with the face that all models here have."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import ArgumentError, ModelUnavailable
from .base import AttentionFn, causal_sdpa, record_inputs
from .generation import TextStream, stream
from .huggingface import HARMLESS

IMPLEMENTATION = "qtx_function"
"""The value of `attn_implementation` of these models."""

_ATTENTION: ContextVar[AttentionFn] = ContextVar("attention")
"""What computes the attention of the call that is running."""

TOLERANCE = 1e-3
"""The largest difference from transformers' own logits, over their largest, at which a model is the same."""


@dataclass(frozen=True)
class TransformersConfig:
    """The sizes of a model of transformers; see `ModelSizes`."""

    context: int
    vocab_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


class TransformersModel(nn.Module):
    """A decoder of transformers whose attention can be replaced at every call.

    It has the methods of `qtx_lab.models.base.LanguageModel`. `load_language_model` makes it.

    Parameters
    ----------
    network : transformers.PreTrainedModel
        A causal language model in which each layer attends once, by a softmax over all tokens before. Where
        a layer has a sliding window, `config.context` is at most the window.
    tokenizer : transformers.PreTrainedTokenizerBase
    name : str

    Raises
    ------
    ModelUnavailable
        If the model has another attention, such as sinks, capped logits or recurrent layers: these work
        through `qtx_lab.huggingface`.
    """

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str):
        super().__init__()
        self.network, self.tokenizer, self.name = network.eval(), tokenizer, name
        own = network.config.get_text_config(decoder=True)
        heads = own.num_attention_heads
        given = own.to_dict()
        limits = [own.max_position_embeddings, given.get("sliding_window")]
        self.config = TransformersConfig(
            context=min(limit for limit in limits if limit),
            vocab_size=own.vocab_size,
            layers=own.num_hidden_layers,
            heads=heads,
            kv_heads=given.get("num_key_value_heads") or heads,
            head_dim=given.get("head_dim") or own.hidden_size // heads,
        )
        stop = network.generation_config.eos_token_id
        self.stop_tokens = frozenset([stop] if isinstance(stop, int) else stop or [])
        _register()
        self._check()

    def _check(self) -> None:
        """Refuse a model that does not compute the same when its attention is `causal_sdpa`."""
        tokens = torch.arange(min(8, self.config.vocab_size, self.config.context))
        tokens = tokens[None].to(self.network.device)
        calls = []

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            calls.append(layer)
            return causal_sdpa(layer, q, k, v)

        with torch.no_grad():
            expected = self.network(tokens, use_cache=False).logits
            try:
                self.network.set_attn_implementation(IMPLEMENTATION)
                logits = self(tokens, attention)
            except (ValueError, ImportError) as error:
                raise self._unfit(str(error)) from error
        if calls != list(range(self.config.layers)):
            raise self._unfit(f"its layers attend in the order {calls}")
        difference = float((logits - expected).abs().max() / expected.abs().max())
        if not difference <= TOLERANCE:
            raise self._unfit(f"its logits differ by {difference:.2g}")

    def _unfit(self, why: str) -> ModelUnavailable:
        return ModelUnavailable(
            f"{self.name} ({type(self.network).__name__}) is not a model whose layers each attend once, by a "
            f"softmax over all tokens before ({why}): use it through qtx_lab.huggingface."
        )

    def forward(
        self,
        tokens: Tensor,
        attention: AttentionFn = causal_sdpa,
        first_position: int = 0,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits (B, L, vocab_size): see `LanguageModel`."""
        positions = torch.arange(first_position, first_position + tokens.shape[1], device=tokens.device)
        token = _ATTENTION.set(attention)
        try:
            return self.network(
                tokens,
                position_ids=positions.expand(tokens.shape),
                use_cache=False,
                logits_to_keep=logits_to_keep,
            ).logits
        finally:
            _ATTENTION.reset(token)

    def attention_inputs(
        self, tokens: Tensor, layers: Collection[int] | None = None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(q, k, v) of every layer, or of `layers`, for tokens (B, L), after position encoding."""
        return record_inputs(self, tokens, layers)

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, int64, (number of tokens,), without added ones."""
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens, special ones left out."""
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    def chat(self, message: str) -> str:
        """The message in the model's chat template, if it has one, ready for the answer."""
        if self.tokenizer.chat_template is None:
            return message
        messages = [{"role": "user", "content": message}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def pieces(self, tokens: Iterable[int]) -> Iterator[bytes]:
        """The text of tokens in UTF-8, in whole characters as they come."""
        sent, came, text = 0, [], ""
        for token in tokens:
            came.append(token)
            text = self.decode(torch.tensor(came))
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the last character may not be whole yet
                yield text[sent:].encode()
                sent = len(text)
        if text[sent:]:
            yield text[sent:].encode()

    def generate(self, prompt: str | Tensor, max_new_tokens: int = 256, **settings: Any) -> TextStream:
        """Continue a text, as `ReferenceModel.generate`, in whole characters."""
        return stream(self, prompt, max_new_tokens, **settings)


def _register() -> None:
    """Make `attn_implementation="qtx_function"` known to transformers."""
    if IMPLEMENTATION not in AttentionInterface().valid_keys():
        AttentionInterface.register(IMPLEMENTATION, _attention_forward)
        AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """No mask: every attention function is causal."""


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers calls, (B, L, H, Ev), by the function of the call that is running."""
    others = [name for name, x in asked.items() if x is not None and x is not False and name not in HARMLESS]
    if others or attention_mask is not None or is_causal is False or value.shape[-1] != query.shape[-1]:
        raise ArgumentError(
            f"{type(module).__name__} asks its attention for {', '.join(others) or 'a mask of its own'}"
        )
    default = 1 / math.sqrt(query.shape[-1])
    if scaling is not None and not math.isclose(scaling, default):
        query = query * (scaling / default)
    layer: Any = module.layer_idx
    output = _ATTENTION.get(causal_sdpa)(layer, query, key, value)
    return output.transpose(1, 2).contiguous(), None


def load_transformers_model(
    source: str | Path, name: str, device: torch.device, dtype: torch.dtype
) -> TransformersModel:
    """The model and tokenizer of a folder, or of a hub's identifier.

    Raises
    ------
    ModelUnavailable
        If it cannot be read or fetched, or is not fit: see `TransformersModel`.
    """
    if not Path(source).is_dir():
        tqdm.write(
            f"Asking the Hugging Face hub for {name}, which takes up to a minute without a network "
            "(HF_HUB_OFFLINE=1 asks nobody) ...",
            file=sys.stderr,
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        network = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelUnavailable(f"{name} cannot be read by transformers: {reason}") from error
    return TransformersModel(network, tokenizer, name).to(device)
