"""`load_language_model`: the reference model or a real one, by name, folder or hub identifier."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from ..errors import ArgumentError, ModelUnavailable, quoted
from .base import LanguageModel
from .download import PACKAGED_MODELS, fetch_model
from .reference import load_reference_model

REFERENCE = "reference"
"""The name of the model that is in the package."""


def language_models() -> dict[str, str]:
    """The models that `load_language_model` has names for, and what each is.

    Examples
    --------
    >>> sorted(language_models())
    ['reference', 'smollm2-135m']
    """
    reference = "a byte-level model of 1.4 million parameters, in the package"
    return {REFERENCE: reference} | {name: x.title for name, x in PACKAGED_MODELS.items()}


def load_language_model(
    source: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A causal language model whose attention can be replaced at every call, in evaluation mode.

    Parameters
    ----------
    source : str or Path
        - a name: `"reference"`, the byte-level model in this package, or `"smollm2-135m"`, which comes from
          the package registry (93 MB) when it is first asked for, and is kept in the user's cache folder or
          in `$QTX_LAB_MODELS` (540 MB);
        - a folder that transformers' `save_pretrained` wrote, with a tokenizer;
        - an identifier of the Hugging Face hub, "owner/name".
    device : torch.device or str
    dtype : torch.dtype

    Returns
    -------
    LanguageModel
        `model(tokens, attention=fn)` computes each layer's attention by `fn(layer, q, k, v)`;
        `encode`, `decode`, `attention_inputs` and `generate` are the same for all models.

    Raises
    ------
    ArgumentError
        If the source is none of these.
    ModelUnavailable
        If it cannot be fetched or read, which the message says what to do about, or if its layers do not
        each attend once by a softmax over all tokens before: such models work through `qtx_lab.huggingface`.

    Examples
    --------
    >>> model = load_language_model("reference")
    >>> tokens = model.encode("The import statement")
    >>> q, k, v = model.attention_inputs(tokens[None])[3]
    >>> q.shape, k.shape
    (torch.Size([1, 8, 20, 32]), torch.Size([1, 2, 20, 32]))
    """
    if not isinstance(source, str | Path):
        raise ArgumentError(
            f"source={quoted(source)} is not allowed: it must be a name, a folder or a hub identifier."
        )
    if source == REFERENCE:
        return load_reference_model().to(device, dtype)
    name = str(source)
    if (
        name not in PACKAGED_MODELS
        and not os.path.isdir(source)  # also for a text too long for a path
        and (isinstance(source, Path) or "/" not in name)
    ):
        known = ", ".join(language_models())
        raise ArgumentError(
            f"source={quoted(name)} is not allowed: it must be one of {known}, a folder, or a hub identifier "
            "owner/name."
        )
    if importlib.util.find_spec("transformers") is None:
        raise ModelUnavailable(f"{name} needs transformers: pip install 'qtx-lab[llm]'.")
    from .transformers_model import load_transformers_model

    place = fetch_model(name) if name in PACKAGED_MODELS else source
    return load_transformers_model(place, name, torch.device(device), dtype)
