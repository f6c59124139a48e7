"""What attention is computed from: the queries, keys and values that a model has for a text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....errors import ArgumentError
from ....models.base import LanguageModel
from ....models.language_model import language_models, load_language_model
from ....models.text import read_text, reference_text
from ....storage import read_tensors


@dataclass(frozen=True)
class Inputs:
    """What attention is computed from.

    Parameters
    ----------
    layers : tuple of (q, k, v)
        Of each layer: q (H, L, E), k (Hkv, n, E), v (Hkv, n, Ev).
    tokens : tuple of str
        What stands at each key; empty where that is unknown.
    is_causal : bool
    """

    layers: tuple[tuple[Tensor, Tensor, Tensor], ...]
    tokens: tuple[str, ...]
    is_causal: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all layers as float32."""
        return sum(x.numel() * 4 for layer in self.layers for x in layer)

    def layer_of(self, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a layer.

        Raises
        ------
        ArgumentError
            If there is no such layer, or no such query head in it.
        """
        if layer >= len(self.layers):
            raise ArgumentError(
                f"layer={layer} is not allowed: there are {len(self.layers)}, counted from 0."
            )
        q, k, v = self.layers[layer]
        if head >= q.shape[0]:
            raise ArgumentError(f"head={head} is not allowed: there are {q.shape[0]}, counted from 0.")
        return q, k, v


@lru_cache(maxsize=2)
def load_inputs(model: str, text: str, num_tokens: int) -> Inputs:
    """The attention inputs of a model for a text.

    Parameters
    ----------
    model : str
        A name that `load_language_model` knows, the folder of a Hugging Face model, or a file of tensors q, k
        and v.
    text : str
        "reference", or a UTF-8 file.
    num_tokens : int
        Length of the text's beginning that is used.

    Raises
    ------
    ArgumentError
        If `model` is none of these.
    """
    path = Path(model)
    if path.suffix == ".safetensors":
        return _from_tensors(path)
    words = reference_text() if text == "reference" else read_text(text)
    if model in language_models():
        return _from_language_model(load_language_model(model), words, num_tokens)
    if not (path / "config.json").is_file():
        raise ArgumentError(
            f"model={model!r} is not allowed: it must be {' or '.join(map(repr, language_models()))}, or the "
            "folder of a Hugging Face model."
        )
    return _from_huggingface(path, words, num_tokens)


def exact_weights(inputs: Inputs, layer: int, head: int) -> Tensor:
    """The exact attention of one head: softmax of its logits, float64, (L, n)."""
    q, k, _ = inputs.layer_of(layer, head)
    key = k[head * k.shape[0] // q.shape[0]]
    logits = q[head].double() @ key.double().mT / q.shape[-1] ** 0.5
    if inputs.is_causal:
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf)
    return logits.softmax(-1)


def _from_language_model(model: LanguageModel, words: str, num_tokens: int) -> Inputs:
    # A token has a dozen characters at most, but for a few: not the whole of a long text is encoded.
    tokens = model.encode(words[: 12 * num_tokens])[:num_tokens]
    layers = model.attention_inputs(tokens[None])
    names = tuple(model.decode(token[None]) for token in tokens)
    return Inputs(tuple((q[0], k[0], v[0]) for q, k, v in layers), names, True)


def _from_tensors(path: Path) -> Inputs:
    try:
        tensors, about = read_tensors(path)
        layers = tuple(zip(tensors["q"], tensors["k"], tensors["v"], strict=True))
        return Inputs(layers, tuple(json.loads(about["tokens"])), json.loads(about["is_causal"]))
    except (KeyError, ValueError) as error:
        raise ArgumentError(f"model={str(path)!r} does not hold q, k and v: {error}") from error


def _from_huggingface(path: Path, words: str, num_tokens: int) -> Inputs:
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
    return Inputs(tuple(layers), tuple(tokenizer.convert_ids_to_tokens(ids[0])), causal[0])
