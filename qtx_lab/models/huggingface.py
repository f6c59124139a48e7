"""Sampled attention in Hugging Face models: `attn_implementation="qtx_sampled"`; see `register`.

Examples
--------
>>> import torch, transformers
>>> register()
>>> config = transformers.LlamaConfig(
...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
...     attn_implementation="qtx_sampled",
... )
>>> config.qtx_sampled = {"sampler": "head-tail", "num_samples": 4}
>>> model = transformers.LlamaForCausalLM(config)
>>> model(torch.tensor([[1, 2, 3]])).logits.shape
torch.Size([1, 3, 8])
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..attention.dispatch import attend
from ..attention.multihead import drop_keys
from ..attention.settings import AttentionSettings
from ..errors import ArgumentError
from ..problem import AttentionProblem
from .huggingface_cache import SampledCache, attends_exactly, has_sampled_cache
from .huggingface_layer import SampledLayer, arguments_of_a_step, cached_layer
from .huggingface_lossless import LosslessGeneration, generate_lossless
from .huggingface_masks import (
    Visibility,
    as_bias,
    as_visible,
    keep_selected,
    make_mask,
    read_mask,
    with_sink_key,
)
from .huggingface_settings import (
    CACHE_SETTINGS,
    DRAWING,
    IMPLEMENTATION,
    given_settings,
    layer_counts,
    read_settings,
    refuse_cache_settings,
    refuse_recomputing,
    settings_of,
)
from .huggingface_softmax import draw_by_softmax, draws_by_softmax, stop_drawing

__all__ = [
    "IMPLEMENTATION",
    "LosslessGeneration",
    "SampledCache",
    "SampledLayer",
    "attention_forward",
    "generate_lossless",
    "read_settings",
    "register",
    "restart",
    "samplers_of",
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

_SDPA_CONFIGS = WeakIdKeyDictionary()
"""Whether SDPA may compute a model's attention, as transformers says, by the model's config."""

_SDPA_KINDS: dict[type, bool] = {}
"""The same by the kind of the config, for copies of models: whether it may in all models so far."""


def register() -> None:
    """Make `attn_implementation="qtx_sampled"` known to transformers >= 5. Doing it twice changes nothing.

    Encoders, decoders and encoder-decoders then draw keys by `sampled_attention`, with their own masks,
    caches, grouped heads, scales, sinks, softcap and biases: where their attention goes through transformers'
    attention interface, in place of it, otherwise through its softmax, which saves no time
    (`huggingface_softmax.DrawnSoftmax`). A model with attention of both kinds draws in the first only;
    `samplers_of` tells in which modules. `qtx_lab/models/assets/huggingface_models.md` is a table of
    transformers' models that were tried.

    JSON on the config of the model (of the text model, where there are several) says what is drawn, and is
    saved with it:

        config.qtx_sampled = {"sampler": "head-tail", "num_samples": 64, "seed": 0,
                              "layers": {"0": {"sampler": "exact"}, "5": {"num_samples": 128}}}

    - `sampler`, `num_samples`, `replicates`, `control_variate`: as for `sampled_attention`, names and
      numbers. `exact` is the model's own attention: by SDPA where transformers says that it may be, and where
      SDPA gives all that the model asks for, otherwise the one that transformers calls "eager".
    - `seed`: of a generator of each layer's own. It moves on from call to call, and starts again where the
      settings are assigned anew and differ, or by `restart`. Without it the draws come from torch's default
      generator.
    - `proposal`, `rank`, `share_keys`: how the layers of a `SampledCache` propose and draw keys, as for
      `SampledKVCache.build` and `attend`. Drawing without a `SampledCache` is then refused.
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
    switch = PreTrainedModel.set_attn_implementation

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

    # The one place that every way to load a model, or to switch its attention, goes through ...
    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation  # type: ignore[method-assign]

    @functools.wraps(switch)
    def set_attn_implementation(
        self: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if _switch_softmax(self, attn_implementation):
            return switch(self, attn_implementation, *args, **kwargs)
        return None

    # ... but for models with an attention of their own only, of which transformers switches nothing.
    PreTrainedModel.set_attn_implementation = set_attn_implementation  # type: ignore[method-assign]


def restart(model: nn.Module) -> None:
    """Let the generators of a model's layers start again from the seed in its settings."""
    for module in model.modules():
        DRAWING.pop(module, None)


def samplers_of(model: nn.Module) -> dict[str, str]:
    """The attention modules of a model that have run, by name, and the sampler of each.

    Examples
    --------
    >>> import torch, transformers
    >>> register()
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4)
    >>> config.qtx_sampled = {"layers": {"0": {"sampler": "exact"}}}
    >>> model = transformers.AutoModel.from_config(config, attn_implementation="qtx_sampled")
    >>> _ = model(torch.arange(12)[None])
    >>> samplers_of(model)
    {'layers.0.self_attn': 'exact', 'layers.1.self_attn': 'systematic'}
    """
    return {
        name: DRAWING[module][1]["sampler"].name
        for name, module in model.named_modules()
        if module in DRAWING
    }


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
    requested = _understood(module, kwargs)
    settings = settings_of(module)
    exact = settings["sampler"].exact or attends_exactly(key)
    layer = cached_layer(key, value)
    if kwargs.get("use_cache") is False and (layer is not None or has_sampled_cache(key)):
        raise ArgumentError(
            "use_cache=False is not allowed with a SampledCache: the model would add all tokens to it at "
            "each step. Leave out one of them."
        )
    if not exact and layer is None and not has_sampled_cache(key):
        refuse_cache_settings(settings)
    beside = {} if layer is None or exact else arguments_of_a_step(module, requested)
    if (
        layer is not None
        and layer.verifies
        and layer.groups
        and not exact
        and not beside["output_attentions"]
    ):
        visible = read_mask(attention_mask, is_causal, True, query.shape[2], key.shape[2])
        if visible.mask is None and visible.num_keys == key.shape[2]:
            return layer.attend_exactly(query, scaling, beside["sinks"], beside["softcap"]), None
    if layer is not None and (exact or layer.verifies or query.shape[2] > 1):
        exact = exact or layer.verifies or layer.prefill == "exact"
        (key, value), layer = layer.tokens(query), None
    if not exact:
        refuse_recomputing(settings)
    if layer is not None:
        return layer.attend(query, attention_mask, scaling, settings, **beside)
    length, n = query.shape[2], key.shape[2]
    if "indices" in requested:
        attention_mask = keep_selected(attention_mask, requested.pop("indices"), n)
    visible = read_mask(attention_mask, is_causal, getattr(module, "is_causal", True), length, n)
    if not exact:
        return _draw(query, key, value, visible, dropout, scaling, settings, requested)
    by_sdpa = _SDPA_CONFIGS.get(module.config, _SDPA_KINDS.get(type(module.config), False))
    if by_sdpa and not requested.keys() & NEEDS_EAGER:
        return _attend_by_sdpa(module, query, key, value, visible, dropout, scaling, requested)
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
    requested = {name: x for name, x in keywords.items() if x is not None and name not in HARMLESS}
    if not requested.get("output_attentions", True):
        del requested["output_attentions"]
    unknown = sorted(requested.keys() - UNDERSTOOD)
    if unknown:
        raise ArgumentError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which "
            f"attn_implementation={IMPLEMENTATION!r} does not know: use another one for this model."
        )
    return requested


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
    n = key.shape[2]
    key, value = key[:, :, : visible.num_keys], value[:, :, : visible.num_keys]
    sinks = asked.get("s_aux", asked.get("sinks"))
    if "position_bias" in asked:
        visible = visible.with_bias(asked["position_bias"][..., : visible.num_keys], query)
    if dropout:
        value = drop_keys(value, dropout, settings["generator"])
    if sinks is not None and sinks.ndim == 4:
        key, value, visible = with_sink_key(query, key, value, visible, sinks)
        sinks = None
    problem = AttentionProblem.of(
        query,
        key,
        value,
        attn_mask=None if visible.mask is None else as_visible(visible.mask),
        is_causal=visible.is_causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        first_position=visible.first_position,
        sinks=sinks,
        softcap=asked.get("softcap"),
    )
    how = {name: x for name, x in settings.items() if name not in ("generator", *CACHE_SETTINGS)}
    estimate = attend(problem, AttentionSettings.of(**how), settings["generator"])
    weights = None
    if "output_attentions" in asked:
        weights = estimate.attention_weights()[..., : visible.num_keys].to(query.dtype)
        weights = nn.functional.pad(weights, (0, n - visible.num_keys))
    return estimate.output.transpose(1, 2).contiguous(), weights


def _check_model(model: PreTrainedModel) -> str:
    """Refuse, when a model is made or switched to ours, what would fail or be ignored when it runs.

    Returns the attention implementation: "eager" for a model that has only its own, and draws in its softmax.
    """
    config = model.config
    if not has_own_layers(config):
        if given_settings(config):
            parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
            raise ArgumentError(
                f"config.{IMPLEMENTATION} is on a {type(config).__name__}, whose attention layers read it "
                f"from {' or '.join(f'config.{name}' for name in parts)}: put it there."
            )
        return IMPLEMENTATION  # each part of the model is asked by itself
    by_layer = read_settings(given_settings(config), max(layer_counts(config), default=None))
    if _has_interface(type(model)):
        _SDPA_CONFIGS[config] = bool(model._supports_sdpa)
        _SDPA_KINDS[type(config)] = _SDPA_KINDS.get(type(config), True) and _SDPA_CONFIGS[config]
        return IMPLEMENTATION
    if all(settings["sampler"].exact for settings in by_layer.values()):
        return "eager"
    if "softmax" not in _source(type(model)).lower():
        raise ArgumentError(
            f"{type(model).__name__} has no attention by softmax: "
            f"attn_implementation={IMPLEMENTATION!r} would change nothing."
        )
    draw_by_softmax(model)
    return "eager"


def _switch_softmax(model: PreTrainedModel, implementation: Any) -> bool:
    """Have the parts of a model that have only their own attention draw by it, or no longer.

    Returns whether there are other parts, which transformers switches.

    Raises
    ------
    ArgumentError
        If `implementation` is a mapping by parts, and a part with its own attention draws or should.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    own = [part for part in parts if has_own_layers(part.config) and not _has_interface(type(part))]
    if isinstance(implementation, dict):
        if any(map(draws_by_softmax, own)) or (own and IMPLEMENTATION in str(implementation)):
            raise ArgumentError(
                f"attn_implementation={implementation!r} is not allowed: {type(own[0]).__name__} draws in "
                "its own attention, which is switched by one name for the whole model."
            )
        return True
    for part in own:
        if implementation == IMPLEMENTATION:
            _check_model(part)
        else:
            stop_drawing(part)
    return len(own) < len(parts)


def has_own_layers(config: Any) -> bool:
    """Whether a model's layers read this config, and not the configs that are parts of it."""
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    return not parts or (bool(layer_counts(config)) and not TEXT_PARTS.intersection(parts))


def _has_interface(model: type[PreTrainedModel]) -> bool:
    """Whether the attention of a model's file goes through transformers' attention interface."""
    source = _source(model)
    # Not where its attention classes have names that the file knows.
    if not source or re.search(r"_ATTENTION_CLASSES\[[\w.]*_attn_implementation\]", source):
        return False
    imported = r"import .*(Attention|DecoderLayer|EncoderLayer)\b"  # of another model
    uses = re.search(rf"ALL_ATTENTION_FUNCTIONS|{imported}", source) is not None
    return uses and model._can_set_attn_implementation()


def _source(model: type[PreTrainedModel]) -> str:
    """The code of a model's file; empty where there is none, as in a shell."""
    try:
        return inspect.getsource(sys.modules[model.__module__])
    except (KeyError, OSError, TypeError):
        return ""
