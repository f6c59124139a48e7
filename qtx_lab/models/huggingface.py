"""Sampled attention in Hugging Face models: `attn_implementation="qtx_sampled"`; see `register`."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..attention.dispatch import attend
from ..attention.multihead import drop_keys
from ..attention.settings import AttentionSettings
from ..errors import ArgumentError
from ..problem import AttentionProblem
from .huggingface_cache import SampledCache, SampledLayer, attends_exactly, cached_layer
from .huggingface_masks import Visibility, as_bias, as_visible, keep_selected, make_mask, read_mask
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

UNDERSTOOD = {"indices", "output_attentions", "position_bias", "s_aux", "sinks", "softcap"}
"""What a model may ask of its attention that changes the result, and that is done as it says."""

NEEDS_EAGER = {"output_attentions", "s_aux", "sinks", "softcap"}
"""What of it SDPA does not give."""

HARMLESS = {
    # For kernels that take no mask, which says the same:
    *("sliding_window", "position_ids", "cache_position", "max_length_q", "max_length_k", "seq_idx"),
    "deterministic",
    # For other parts of the model:
    *("use_cache", "return_dict", "output_hidden_states", "output_router_logits", "num_items_in_batch"),
    "logits_to_keep",
}
"""What models hand on to every attention, though it changes nothing in transformers' own."""

TEXT_PARTS = {"decoder", "generator", "text_config", "text_encoder"}
"""Where transformers has the config of a language model that is a part of another model."""

SEED_STEP = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: what the seeds of neighbouring layers differ by, so that no two agree."""

_DRAWING: WeakKeyDictionary[nn.Module, tuple[str, dict[str, Any]]] = WeakKeyDictionary()
"""Of each attention module that has drawn: the settings as JSON, and the arguments that they mean for it."""

_SDPA_CONFIGS = WeakIdKeyDictionary()
"""The configs of the models whose attention SDPA may compute, as transformers says."""


def register() -> None:
    """Make `attn_implementation="qtx_sampled"` known to transformers >= 5. Doing it twice changes nothing.

    Encoders, decoders and encoder-decoders whose attention goes through transformers' attention
    interface then draw keys by `sampled_attention`, with their own masks, caches, grouped heads and
    scales. JSON on the config of the model (of the text model, where there are several) says what is
    drawn, and is saved with it:

        config.qtx_sampled = {"sampler": "head-tail", "num_samples": 64, "seed": 0,
                              "layers": {"0": {"sampler": "exact"}, "5": {"num_samples": 128}}}

    - `sampler`, `num_samples`, `replicates`, `control_variate`: as for `sampled_attention`, names and
      numbers. `exact` is the model's own attention: by SDPA where transformers says that it may be, and where
      SDPA gives all that the model asks for, otherwise the one that transformers calls "eager".
    - `seed`: of a generator of each layer's own. It moves on from call to call, and starts again where the
      settings are assigned anew and differ, or by `restart`. Without it the draws come from torch's default
      generator.
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
    AttentionMaskInterface.register(IMPLEMENTATION, make_mask)
    resolve, choose = PreTrainedModel.get_correct_attn_implementation, AttentionInterface.get_interface

    @functools.wraps(choose)
    def get_interface(self: AttentionInterface, attn_implementation: str, default: Callable) -> Callable:
        if attn_implementation == IMPLEMENTATION:
            return functools.partial(attention_forward, eager=default)
        return choose(self, attn_implementation, default)

    # Where a module says which function is its own eager attention.
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]

    @functools.wraps(resolve)
    def get_correct_attn_implementation(self: PreTrainedModel, *args: Any, **kwargs: Any) -> str:
        implementation = resolve(self, *args, **kwargs)
        return _check_model(self) if implementation == IMPLEMENTATION else implementation

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
    eager: Callable | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention that transformers calls.

    From query (B, H, L, E), key and value (B, Hkv, n, E) come the output (B, L, H, Ev), and the weights
    or None. `eager` is the module's own attention function.

    Raises
    ------
    ArgumentError, ShapeError, DtypeError
        If the settings were changed to what is not allowed, or the model asks for what draws do not give.
    """
    asked = _understood(module, kwargs)
    settings = _settings_of(module)
    exact = settings["sampler"].exact or attends_exactly(key)
    layer = cached_layer(key, value)
    if layer is not None and (exact or query.shape[2] > 1):
        key, value = layer.tokens(query)
        exact, layer = exact or layer.prefill == "exact", None
    if not exact and settings["generator"] is not None and torch._C._current_graph_task_id() != -1:
        raise ArgumentError(
            "Activation checkpointing would draw other keys in the backward pass: leave `seed` out of "
            "config.qtx_sampled, so that the draws come from torch's default generator, which it keeps."
        )
    if layer is not None:
        weighed = asked.pop("output_attentions", False)
        if asked:
            raise ArgumentError(
                f"{type(module).__name__} asks its attention for {', '.join(sorted(asked))}, which a "
                "SampledCache does not give: use transformers' own cache."
            )
        return layer.attend(query, attention_mask, scaling, settings, output_attentions=weighed)
    length, n = query.shape[2], key.shape[2]
    if "indices" in asked:
        attention_mask = keep_selected(attention_mask, asked.pop("indices"), n)
    visible = read_mask(attention_mask, is_causal, getattr(module, "is_causal", True), length, n)
    if not exact:
        return _draw(query, key, value, visible, dropout, scaling, settings, asked)
    if _SDPA_CONFIGS.get(module.config) and not asked.keys() & NEEDS_EAGER:
        return _attend_by_sdpa(module, query, key, value, visible, dropout, scaling, asked)
    if eager is None:
        raise ArgumentError(
            f"{type(module).__name__} does not say which its own attention is, as "
            "ALL_ATTENTION_FUNCTIONS.get_interface does: use another attn_implementation for this model."
        )
    mask = visible.as_mask(query) if attention_mask is None else attention_mask
    bias = None if mask is None else as_bias(mask, query.dtype)
    others = {name: x for name, x in kwargs.items() if name != "indices"}
    return eager(module, query, key, value, bias, scaling=scaling, dropout=dropout, **others)


def _understood(module: nn.Module, keywords: dict[str, Any]) -> dict[str, Any]:
    """What a module asks of its attention that changes the result, by name."""
    asked = {name: x for name, x in keywords.items() if x is not None and name not in HARMLESS}
    if not asked.get("output_attentions", True):
        del asked["output_attentions"]
    unknown = sorted(asked.keys() - UNDERSTOOD)
    if unknown:
        raise ArgumentError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which "
            f"attn_implementation={IMPLEMENTATION!r} does not know: use another one for this model."
        )
    return asked


def _attend_by_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    dropout: float,
    scaling: float | None,
    asked: dict[str, Any],
) -> tuple[Tensor, None]:
    """The exact output as transformers has SDPA compute it."""
    key, value = key[:, :, : visible.num_keys], value[:, :, : visible.num_keys]
    top_left = visible.is_causal and visible.first_position == 0
    mask = None if top_left else visible.as_mask(query)
    bias = asked.get("position_bias")
    bias = None if bias is None else bias[..., : visible.num_keys]
    return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, top_left, bias)


def _draw(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Visibility,
    dropout: float,
    scaling: float | None,
    settings: dict[str, Any],
    asked: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The output and weights by drawn keys."""
    refused = sorted(asked.keys() & {"s_aux", "sinks", "softcap"})
    if refused:
        raise ArgumentError(
            f"The model asks its attention for {', '.join(refused)}, which draws do not give: make its "
            'layers {"sampler": "exact"}.'
        )
    key, value = key[:, :, : visible.num_keys], value[:, :, : visible.num_keys]
    if "position_bias" in asked:
        visible = visible.with_bias(asked["position_bias"][..., : visible.num_keys], query)
    if dropout:
        value = drop_keys(value, dropout, settings["generator"])
    problem = AttentionProblem.of(
        query,
        key,
        value,
        attn_mask=None if visible.mask is None else as_visible(visible.mask),
        is_causal=visible.is_causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        first_position=visible.first_position,
    )
    how = {name: x for name, x in settings.items() if name != "generator"}
    estimate = attend(problem, AttentionSettings.of(**how), settings["generator"])
    weights = estimate.attention_weights().to(query.dtype) if "output_attentions" in asked else None
    return estimate.output.transpose(1, 2).contiguous(), weights


def _check_model(model: PreTrainedModel) -> str:
    """Refuse, when a model is made or switched to ours, what would fail or be ignored when it runs.

    Returns the attention implementation: "eager" for a model that has its own only, and no drawn layers.
    """
    config = model.config
    numbers = [
        getattr(config, name, None) for name in ("num_hidden_layers", "decoder_layers", "encoder_layers")
    ]
    known = [number for number in numbers if isinstance(number, int)]
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    if parts and (not known or TEXT_PARTS.intersection(parts)):
        if given_settings(config):
            raise ArgumentError(
                f"config.{IMPLEMENTATION} is on a {type(config).__name__}, whose attention layers read it "
                f"from {' or '.join(f'config.{name}' for name in parts)}: put it there."
            )
        return IMPLEMENTATION  # each part of the model is asked by itself
    by_layer = read_settings(given_settings(config), max(known, default=None))
    if _has_interface(type(model)):
        _SDPA_CONFIGS[config] = bool(model._supports_sdpa)
        return IMPLEMENTATION
    if all(settings["sampler"].exact for settings in by_layer.values()):
        return "eager"
    raise ArgumentError(
        f"{type(model).__name__} does not use transformers' attention interface: "
        f"attn_implementation={IMPLEMENTATION!r} would change nothing."
    )


def _has_interface(model: type[PreTrainedModel]) -> bool:
    """Whether the attention of a model's file goes through transformers' attention interface."""
    if not model._can_set_attn_implementation():
        return False
    source = inspect.getsource(sys.modules[model.__module__])
    if re.search(r"_ATTENTION_CLASSES\[[\w.]*_attn_implementation\]", source):
        return False  # Attention classes by the names that the file knows.
    imported = r"import .*(Attention|DecoderLayer|EncoderLayer)\b"  # of another model
    return re.search(rf"ALL_ATTENTION_FUNCTIONS|{imported}", source) is not None


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
