"""`attention_inputs`: the queries, keys and values that a model has for a text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError, DtypeError
from ..storage import read_tensors
from .base import LanguageModel
from .language_model import language_models, load_language_model
from .text import reference_text

LONGEST_TOKEN = 12
"""Characters of a token, at most, but for a few: so much of a long text is encoded for each token."""


@dataclass(frozen=True)
class AttentionInputs:
    """What a model's attention is computed from.

    Parameters
    ----------
    layers : tuple of (q, k, v)
        Of each layer: q (H, L, E), k (Hkv, n, E), v (Hkv, n, Ev).
    tokens : tuple of str
        What stands at each key; empty where that is unknown.
    is_causal : bool

    Examples
    --------
    >>> inputs = attention_inputs("reference", "The import statement")
    >>> len(inputs.layers), inputs.tokens[:3], inputs.is_causal
    (6, ('T', 'h', 'e'), True)
    """

    layers: tuple[tuple[Tensor, Tensor, Tensor], ...]
    tokens: tuple[str, ...]
    is_causal: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all layers as float32."""
        return sum(x.numel() * 4 for layer in self.layers for x in layer)

    def layer_of(self, layer: int, head: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a layer.

        Raises
        ------
        ArgumentError
            If there is no such layer, or no such query head in it.
        """
        if not 0 <= layer < len(self.layers):
            raise ArgumentError(
                f"layer={layer} is not allowed: there are {len(self.layers)}, counted from 0."
            )
        q, k, v = self.layers[layer]
        if not 0 <= head < q.shape[0]:
            raise ArgumentError(f"head={head} is not allowed: there are {q.shape[0]}, counted from 0.")
        return q, k, v

    def weights(self, layer: int, head: int) -> Tensor:
        """The exact attention of one head: softmax of its logits, float64, (L, n).

        Raises
        ------
        ArgumentError
            If there is no such layer or head.
        """
        q, k, _ = self.layer_of(layer, head)
        key = k[head * k.shape[0] // q.shape[0]]
        logits = q[head].double() @ key.double().mT / q.shape[-1] ** 0.5
        if self.is_causal:
            logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf)
        return logits.softmax(-1)


def attention_inputs(
    model: str | Path = "reference", text: str | None = None, num_tokens: int = 512
) -> AttentionInputs:
    """The queries, keys and values of every layer of a model for the beginning of a text.

    Parameters
    ----------
    model : str or Path
        A name that `language_models` lists, the folder of a Hugging Face model, or a `.safetensors` file of
        tensors q, k and v, each (layers, heads, positions, features), as the workbench saves them.
    text : str, optional
        The shipped text where None.
    num_tokens : int
        Length of the text's beginning that is used.

    Raises
    ------
    ArgumentError
        If `model` is none of these, or if the text has no tokens.

    Examples
    --------
    >>> inputs = attention_inputs("reference", "The import statement")
    >>> q, k, v = inputs.layers[3]
    >>> q.shape, k.shape, inputs.is_causal
    (torch.Size([8, 20, 32]), torch.Size([2, 20, 32]), True)
    >>> inputs.weights(layer=3, head=0).shape
    torch.Size([20, 20])
    """
    if not isinstance(model, str | Path):
        raise DtypeError(f"model is a {type(model).__name__}; it must be the name of a model, or a path.")
    path, num_tokens = Path(model), check_count("num_tokens", num_tokens)
    if path.suffix == ".safetensors":
        return _from_tensors(path)
    words = reference_text() if text is None else text
    if not words:
        raise ArgumentError(f"text={text!r} has no tokens.")
    if str(model) in language_models():
        return _from_language_model(load_language_model(model), words, num_tokens)
    if not (path / "config.json").is_file():
        raise ArgumentError(
            f"model={str(model)!r} is not allowed: it must be {' or '.join(map(repr, language_models()))}, "
            "or the folder of a Hugging Face model."
        )
    return _from_huggingface(path, words, num_tokens)


def _from_language_model(model: LanguageModel, words: str, num_tokens: int) -> AttentionInputs:
    tokens = model.encode(words[: LONGEST_TOKEN * num_tokens])[:num_tokens]
    layers = model.attention_inputs(tokens[None])
    names = tuple(model.decode(token[None]) for token in tokens)
    return AttentionInputs(tuple((q[0], k[0], v[0]) for q, k, v in layers), names, True)


def _from_tensors(path: Path) -> AttentionInputs:
    try:
        tensors, about = read_tensors(path)
        layers = tuple(zip(tensors["q"], tensors["k"], tensors["v"], strict=True))
        return AttentionInputs(layers, tuple(json.loads(about["tokens"])), json.loads(about["is_causal"]))
    except (KeyError, ValueError) as error:
        raise ArgumentError(f"model={str(path)!r} does not hold q, k and v: {error}") from error


def _from_huggingface(path: Path, words: str, num_tokens: int) -> AttentionInputs:
    """What every attention layer of a model is given for a text, as its heads see it."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    layers: list[tuple[Tensor, Tensor, Tensor]] = []
    causal: list[bool] = []

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        width = query.shape[-1]
        scale = more.get("scaling") or width**-0.5
        layers.append((query[0] * (scale * width**0.5), key[0], value[0]))
        causal.append(bool(getattr(module, "is_causal", False)))  # not every module of theirs says so
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    AttentionInterface.register("qtx_recorded", record)
    AttentionMaskInterface.register("qtx_recorded", sdpa_mask)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModel.from_pretrained(
        path, local_files_only=True, attn_implementation="qtx_recorded", dtype=torch.float32
    ).eval()
    ids = tokenizer(words, return_tensors="pt", truncation=True, max_length=num_tokens).input_ids
    with torch.no_grad():
        model(ids)
    if not layers:
        raise ArgumentError(
            f"model={str(path)!r} has no attention that goes through transformers' interface."
        )
    return AttentionInputs(tuple(layers), tuple(tokenizer.convert_ids_to_tokens(ids[0])), causal[0])
