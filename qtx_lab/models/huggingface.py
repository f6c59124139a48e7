"""Sampled attention in Hugging Face models: `attn_implementation="qtx_sampled"`; see `register`."""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..attention.dispatch import attend
from ..attention.multihead import drop_keys
from ..attention.settings import AttentionSettings
from ..errors import ArgumentError
from ..problem import AttentionProblem
from .huggingface_cache import SampledCache, SampledLayer, attends_exactly, cached_layer
from .huggingface_settings import IMPLEMENTATION, as_json, given_settings, read_settings

__all__ = [
    "IMPLEMENTATION",
    "SampledCache",
    "SampledLayer",
    "attention_forward",
    "read_settings",
    "register",
    "restart",
]

REFUSED = ("position_bias", "softcap", "s_aux", "cache")
"""What a model may ask of its attention and draws do not give; `exact` layers pass it to transformers."""

SEED_STEP = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: what the seeds of neighbouring layers differ by, so that no two agree."""

_DRAWING: WeakKeyDictionary[nn.Module, tuple[str, dict[str, Any]]] = WeakKeyDictionary()
"""Of each attention module that has drawn: the settings as JSON, and the arguments that they mean for it."""


def register() -> None:
    """Make `attn_implementation="qtx_sampled"` known to transformers >= 5. Doing it twice changes nothing.

    Encoders, decoders and encoder-decoders whose attention goes through transformers' attention
    interface then draw keys by `sampled_attention`, with their own masks, caches, grouped heads and
    scales. JSON on the config of the model (of the text model, where there are several) says what is
    drawn, and is saved with it:

        config.qtx_sampled = {"sampler": "head-tail", "num_samples": 64, "seed": 0,
                              "layers": {"0": {"sampler": "exact"}, "5": {"num_samples": 128}}}

    - `sampler`, `num_samples`, `replicates`, `control_variate`: as for `sampled_attention`, names and
    numbers.
      `exact` is transformers' own attention by SDPA.
    - `seed`: of a generator of each layer's own. It moves on from call to call, and starts again where
    the settings
      are assigned anew and differ, or by `restart`. Without it the draws come from torch's default generator.
    - `layers`: what is different in some layers, by their number.

    Dropout of attention weights, in training, drops whole keys for all queries of a head together;
    `exact` layers drop as SDPA does. With `output_attentions=True` in the call come the estimated
    weights.

    Raises
    ------
    ArgumentError, DtypeError
        Not here, but as soon as a model is made or loaded with settings that are not allowed, or whose
        attention does not go through the interface.

    Examples
    --------
    >>> import torch, transformers
    >>> register()
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2)
    >>> config.qtx_sampled = {"num_samples": 8, "layers": {"0": {"sampler": "exact"}}}
    >>> model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="qtx_sampled")
    >>> model(torch.arange(12)[None]).logits.shape
    torch.Size([1, 12, 32])
    """
    if IMPLEMENTATION in AttentionInterface().valid_keys():
        return
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    resolve = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(resolve)
    def get_correct_attn_implementation(self: PreTrainedModel, *args: Any, **kwargs: Any) -> str:
        implementation = resolve(self, *args, **kwargs)
        if implementation == IMPLEMENTATION:
            _check_model(self)
        return implementation

    # The one place that every way to load a model, or to switch its attention, goes through.
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation  # type: ignore[method-assign]


def restart(model: nn.Module) -> None:
    """Let the generators of a model's layers start again from the seed in its settings."""
    for module in model.modules():
        _DRAWING.pop(module, None)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention that transformers calls.

    From query (B, H, L, E), key and value (B, Hkv, n, E) come the output (B, L, H, Ev), and the weights
    or None.

    Raises
    ------
    ArgumentError, ShapeError, DtypeError
        If the settings were changed to what is not allowed, or the model asks for what draws do not give.
    """
    settings = _settings_of(module)
    exact = settings["sampler"].exact or attends_exactly(key)
    layer = cached_layer(key, value)
    if layer is not None and (exact or query.shape[2] > 1):
        key, value = layer.tokens(query)
        exact, layer = exact or layer.prefill == "exact", None
    if exact:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    refused = [name for name in REFUSED if kwargs.get(name) is not None]
    if refused:
        raise ArgumentError(
            f"{type(module).__name__} asks for {', '.join(refused)}, which draws do not give: make its "
            'layers {"sampler": "exact"}.'
        )
    if settings["generator"] is not None and torch._C._current_graph_task_id() != -1:
        raise ArgumentError(
            "Activation checkpointing would draw other keys in the backward pass: leave `seed` out of "
            "config.qtx_sampled, so that the draws come from torch's default generator, which it keeps."
        )
    if layer is not None:
        weighed = bool(kwargs.get("output_attentions"))
        return layer.attend(query, attention_mask, scaling, settings, output_attentions=weighed)
    length, n = query.shape[2], key.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = bool(is_causal) and length > 1 and attention_mask is None
    if is_causal and n > length:  # a static cache that is being filled
        key, value = key[:, :, :length], value[:, :, :length]
    if attention_mask is not None:
        attention_mask = attention_mask[..., :n]
    if dropout:
        value = drop_keys(value, dropout, settings["generator"])
    problem = AttentionProblem.of(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        # Queries are the last tokens, where the keys of others are cached.
        first_position=0 if is_causal else max(0, n - length),
    )
    how = {name: x for name, x in settings.items() if name != "generator"}
    estimate = attend(problem, AttentionSettings.of(**how), settings["generator"])
    weights = estimate.attention_weights().to(query.dtype) if kwargs.get("output_attentions") else None
    return estimate.output.transpose(1, 2).contiguous(), weights


def _check_model(model: PreTrainedModel) -> None:
    """Refuse, when a model is made or switched, what would fail or be ignored when it runs."""
    if not model._can_set_attn_implementation():
        raise ArgumentError(
            f"{type(model).__name__} does not use transformers' attention interface: "
            f"attn_implementation={IMPLEMENTATION!r} would change nothing."
        )
    config = model.config
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    if given_settings(config) and parts:
        raise ArgumentError(
            f"config.{IMPLEMENTATION} is on a {type(config).__name__}, whose attention layers read it from "
            f"{' or '.join(f'config.{name}' for name in parts)}: put it there."
        )
    numbers = [
        getattr(config, name, None) for name in ("num_hidden_layers", "decoder_layers", "encoder_layers")
    ]
    known = [number for number in numbers if isinstance(number, int)]
    read_settings(given_settings(config), max(known, default=None))


def _settings_of(module: nn.Module) -> dict[str, Any]:
    """The arguments of `sampled_attention` for an attention module, its generator among them."""
    config = getattr(module, "config", None)
    given = given_settings(config)
    text = as_json(given)
    former_text, settings = _DRAWING.get(module, ("", {}))
    if former_text == text:
        return settings
    by_layer = read_settings(given)
    layer = getattr(module, "layer_idx", None)
    if len(by_layer) > 1 and layer is None:
        raise ArgumentError(
            f"config.{IMPLEMENTATION}['layers'] is not allowed: {type(module).__name__} does not know "
            "its number."
        )
    settings = by_layer.get(layer, by_layer[None])
    seed = settings.pop("seed")
    if seed is not None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        mixed = (seed + SEED_STEP * (0 if layer is None else layer + 1)) % 2**63
        settings["generator"] = torch.Generator(device).manual_seed(mixed)
    _DRAWING[module] = (text, settings)
    return settings
