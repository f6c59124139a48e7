"""Sampled attention in Hugging Face models: `attn_implementation="qtx_sampled"`, and a cache to decode with."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..attention.dispatch import sampled_attention
from ..attention.multihead import attention_settings, drop_keys
from ..cache.kv_cache import SampledKVCache
from ..errors import ArgumentError, ShapeError, unknown_name
from ..samplers import ExactSampler

IMPLEMENTATION = "qtx_sampled"
"""What `attn_implementation` is to say, and the name of the settings on a model's config."""

SETTINGS = ("sampler", "num_samples", "replicates", "control_variate", "seed", "layers")
REFUSED = ("position_bias", "softcap", "s_aux", "cache")
"""What a model may ask of its attention and draws do not give; `exact` layers pass it to transformers."""

MAX_SEED = 2**63 - 1

_DRAWING: WeakKeyDictionary[nn.Module, tuple[str, dict[str, Any]]] = WeakKeyDictionary()
"""Of each attention module that has drawn: the settings as JSON, and what they mean for it, generator and all."""


def register() -> None:
    """Make `attn_implementation="qtx_sampled"` known to transformers, >= 5; doing it twice changes nothing.

    Encoders, decoders and encoder-decoders whose attention goes through transformers' attention interface
    then draw keys by `sampled_attention`, with their own masks, caches, grouped heads and scales. What is
    drawn is said by JSON on the config of the model (of the text model, where there are several), which
    is saved with it:

        config.qtx_sampled = {"sampler": "head-tail", "num_samples": 64, "seed": 0,
                              "layers": {"0": {"sampler": "exact"}, "5": {"num_samples": 128}}}

    - `sampler`, `num_samples`, `replicates`, `control_variate`: as for `sampled_attention`, names and
      numbers. `exact`
      is transformers' own attention by SDPA.
    - `seed`: of a generator of each layer's own, which moves on from call to call and starts again where
      the settings
      are assigned anew and differ, or by `restart`. Without it the draws come from torch's default generator.
    - `layers`: what is different in some layers, by their number.

    Dropout of attention weights, in training, drops whole keys, for all queries of a head alike; `exact`
    layers drop as SDPA does. With `output_attentions=True` in the call come the estimated weights.

    Raises
    ------
    ArgumentError, DtypeError
        Not here: as soon as a model is made or loaded with settings that are not allowed, or whose
        attention does not go through the interface.

    Examples
    --------
    >>> import torch, transformers
    >>> register()
    >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
    num_hidden_layers=2, ...                                   num_attention_heads=4,
    num_key_value_heads=2)
    >>> config.qtx_sampled = {"sampler": "systematic", "num_samples": 8, "layers": {"0": {"sampler":
    "exact"}}}
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
        found = resolve(self, *args, **kwargs)
        if found == IMPLEMENTATION:
            _check_model(self)
        return found

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
    """What transformers calls: query (B, H, L, E), key and value (B, Hkv, n, E) -> (B, L, H, Ev) and weights or None.

    Raises
    ------
    ArgumentError, ShapeError, DtypeError
        If the settings were changed to what is not allowed, or the model asks for what draws do not give.
    """
    settings = _settings_of(module)
    layer: SampledLayer | None = getattr(key, "qtx_layer", None)
    if isinstance(settings["sampler"], ExactSampler) and layer is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    asked = [name for name in REFUSED if kwargs.get(name) is not None]
    if asked:
        raise ArgumentError(
            f"{type(module).__name__} asks for {', '.join(asked)}, which draws do not give: make its layers "
            '{"sampler": "exact"}.'
        )
    if settings["generator"] is not None and torch._C._current_graph_task_id() != -1:
        raise ArgumentError(
            "Activation checkpointing would draw other keys in the backward pass: leave `seed` out of "
            "config.qtx_sampled, so that the draws come from torch's default generator, which it keeps."
        )
    if layer is not None:
        return layer.attend(query, attention_mask, scaling, settings), None
    length, n = query.shape[2], key.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = bool(is_causal) and length > 1 and attention_mask is None
    if is_causal and n > length:  # a static cache that is being filled
        key, value = key[:, :, :length], value[:, :, :length]
    if attention_mask is not None:
        attention_mask = attention_mask[..., :n]
    if dropout:
        value = drop_keys(value, dropout, settings["generator"])
    estimate = sampled_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        **settings,
    )
    weights = estimate.attention_weights().to(query.dtype) if kwargs.get("output_attentions") else None
    return estimate.output.transpose(1, 2).contiguous(), weights


# --- Settings -------------------------------------------------------------------------------------


def read_settings(given: object, layers: int | None = None) -> dict[int | None, dict[str, Any]]:
    """What `config.qtx_sampled` means: arguments of `sampled_attention`, and `seed`, by layer; None: of all others.

    Raises
    ------
    ArgumentError, DtypeError
        If it is no mapping, a key is unknown, a value is not allowed, or there is no such layer among
        `layers`.
    """
    top = _mapping(given, "", SETTINGS)
    _written(given)
    common = {name: x for name, x in top.items() if name != "layers"}
    made: dict[int | None, dict[str, Any]] = {None: _made(common, "")}
    own = {} if top.get("layers") is None else top["layers"]
    for number, changes in _mapping(own, "['layers']", None).items():
        where = f"['layers'][{number!r}]"
        index = int(number) if str(number).isdecimal() else -1
        if not 0 <= index < (10**9 if layers is None else layers):
            allowed = "from 0" if layers is None else f"from 0 to {layers - 1}"
            raise ArgumentError(
                f"config.{IMPLEMENTATION}{where} is not allowed: layers are numbered {allowed}."
            )
        if index in made:
            raise ArgumentError(f"config.{IMPLEMENTATION}{where} is there twice.")
        made[index] = _made({**common, **_mapping(changes, where, SETTINGS[:-2])}, where)
    return made


def _given(config: Any) -> Any:
    given = getattr(config, IMPLEMENTATION, None)
    return {} if given is None else given


def _written(given: object) -> str:
    try:
        return json.dumps(given)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"config.{IMPLEMENTATION} is not allowed: it must be JSON, names and numbers only ({error})."
        ) from None


def _mapping(given: object, where: str, allowed: tuple[str, ...] | None) -> dict[Any, Any]:
    if not isinstance(given, Mapping):
        raise ArgumentError(f"config.{IMPLEMENTATION}{where}={given!r} is not allowed: it must be a mapping.")
    for key in given:
        if allowed is not None and key not in allowed:
            raise unknown_name(f"config.{IMPLEMENTATION}{where}", str(key), allowed)
    return dict(given)


def _made(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments that the settings mean, and `seed`; errors say where in the config they stood."""
    seed = given.pop("seed", None)
    if seed is not None and (
        isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED
    ):
        raise ArgumentError(
            f"config.{IMPLEMENTATION}{where}['seed']={seed!r} is not allowed: it must be a whole number from 0 to "
            f"{MAX_SEED}, or None."
        )
    try:
        return {**attention_settings(**given), "seed": seed}
    except ValueError as error:
        raise ArgumentError(f"config.{IMPLEMENTATION}{where}: {error}") from error
    except TypeError as error:
        raise ArgumentError(f"config.{IMPLEMENTATION}{where} is not allowed: {error}") from error


def _check_model(model: PreTrainedModel) -> None:
    """Refuse, when it is made or switched, what would fail or be ignored when it runs."""
    if not model._can_set_attn_implementation():
        raise ArgumentError(
            f"{type(model).__name__} does not use transformers' attention interface: "
            f"attn_implementation={IMPLEMENTATION!r} would change nothing."
        )
    config = model.config
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    if _given(config) and parts:
        raise ArgumentError(
            f"config.{IMPLEMENTATION} is on a {type(config).__name__}, whose attention layers read it from "
            f"{' or '.join(f'config.{name}' for name in parts)}: put it there."
        )
    numbers = [
        getattr(config, name, None) for name in ("num_hidden_layers", "decoder_layers", "encoder_layers")
    ]
    known = [number for number in numbers if isinstance(number, int)]
    read_settings(_given(config), max(known, default=None))


def _settings_of(module: nn.Module) -> dict[str, Any]:
    """The arguments of `sampled_attention` for an attention module, its generator among them."""
    config = getattr(module, "config", None)
    given = _given(config)
    written = _written(given)
    before, settings = _DRAWING.get(module, ("", {}))
    if before == written:
        return settings
    made = read_settings(given)
    layer = getattr(module, "layer_idx", None)
    if len(made) > 1 and layer is None:
        raise ArgumentError(
            f"config.{IMPLEMENTATION}['layers'] is not allowed: {type(module).__name__} does not know its number."
        )
    settings = made.get(layer, made[None])
    seed = settings.pop("seed")
    if seed is not None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        # Two layers with one seed must not draw alike: the seed is spread by the layer's number.
        mixed = (seed + 0x9E3779B97F4A7C15 * (0 if layer is None else layer + 1)) % 2**63
        settings["generator"] = torch.Generator(device).manual_seed(mixed)
    _DRAWING[module] = (written, settings)
    return settings


# --- Decoding -------------------------------------------------------------------------------------


class SampledCache(Cache):
    """A cache to generate with whose layers are `SampledKVCache`s: a new token reads a sketch, and few keys and values.

    The prompt is attended to by `sampled_attention`; layers that the settings keep `exact` have
    transformers' own cache. One sequence, or several of equal length: no padding, no beams, no sliding
    windows.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the (text) model, whose `attn_implementation` is "qtx_sampled".
    proposal, rank, defensive
        As for `SampledKVCache.build`.

    Raises
    ------
    ArgumentError
        If config has another attention, or layers that do not attend to all tokens before them.

    Examples
    --------
    >>> import torch, transformers
    >>> register()
    >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,
    num_hidden_layers=2, ...                                   num_attention_heads=4,
    num_key_value_heads=2, attn_implementation="qtx_sampled")
    >>> model = transformers.AutoModelForCausalLM.from_config(config)
    >>> cache = SampledCache(model.config, proposal="low-rank", rank=2)
    >>> four = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    >>> model.generate(torch.arange(12)[None], past_key_values=cache, **four).shape
    torch.Size([1, 16])
    """

    def __init__(self, config: Any, **options: Any):
        if getattr(config, "_attn_implementation", None) != IMPLEMENTATION:
            raise ArgumentError(
                f"config has attn_implementation={getattr(config, '_attn_implementation', None)!r}; a SampledCache is for "
                f"models with {IMPLEMENTATION!r}."
            )
        number = config.num_hidden_layers
        window = ("sliding_attention",) if getattr(config, "sliding_window", None) else ()
        kinds = set(getattr(config, "layer_types", None) or window) - {"full_attention"}
        if kinds:
            raise ArgumentError(
                f"config has layers of {', '.join(sorted(kinds))}; only full attention is cached so."
            )
        made = read_settings(_given(config), number)
        exact = [isinstance(made.get(i, made[None])["sampler"], ExactSampler) for i in range(number)]
        features = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        probe = torch.zeros(1, features)
        SampledKVCache.build(probe, probe, **options)  # a mistake in the options is refused now
        super().__init__(layers=[DynamicLayer() if whole else SampledLayer(options) for whole in exact])


class SampledLayer(DynamicLayer):
    """One layer of a `SampledCache`: its `sampled`, a `SampledKVCache`, holds the tokens."""

    is_croppable = False

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        self.options = options
        self.sampled: SampledKVCache | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep new tokens; what is returned has the shape of all keys and values, and of one new token nothing else."""
        if self.sampled is None:
            self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
            self.sampled = SampledKVCache.build(key_states, value_states, **self.options)
            return key_states, value_states
        self.sampled.append(key_states, value_states)
        if key_states.shape[-2] > 1:
            return self.sampled.tokens()
        # Attention reads the cache, not these: NaN, so that whoever else reads them cannot miss it.
        shape = (*key_states.shape[:-2], len(self.sampled))
        k, v = (x.new_full((), torch.nan).expand(*shape, x.shape[-1]) for x in (key_states, value_states))
        k.qtx_layer = self  # type: ignore[attr-defined]
        return k, v

    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float | None, settings: dict[str, Any]
    ) -> Tensor:
        """The output for one new token, query (B, H, 1, E): (B, 1, H, Ev)."""
        assert self.sampled is not None
        seen = None if mask is None else (mask if mask.dtype == torch.bool else mask >= 0)
        if seen is not None and not bool(seen.all()):
            raise ShapeError(
                "A SampledCache attends to every token: given an attention mask that hides some (padding, or a window)."
            )
        estimate = self.sampled.attend(
            query,
            settings["num_samples"],
            replicates=settings["replicates"],
            scale=scaling,
            generator=settings["generator"],
        )
        return estimate.output.transpose(1, 2).contiguous()

    def get_seq_length(self) -> int:
        return 0 if self.sampled is None else len(self.sampled)

    def reset(self) -> None:
        self.sampled, self.is_initialized = None, False

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise ArgumentError(
            "A SampledCache cannot be reordered, cropped or moved: no beams, no assistants, no offloading."
        )

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = offload = prefetch = _refuse
