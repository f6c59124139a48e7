"""`SampledCache`: a cache for transformers' generation that attends to a `SampledKVCache` a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, get_layer_types_and_kwargs

from ..cache import SampledKVCache
from ..errors import ArgumentError, unknown_name
from .huggingface_layer import CachedTokens, SampledLayer
from .huggingface_settings import IMPLEMENTATION, given_settings, read_settings

PREFILLS = ("exact", "sampled")
"""The ways in which several new tokens at once, such as a prompt, may attend."""

OWN_STEPS = WeakIdKeyDictionary()
"""Keys that a `SampledCache` returned for layers with transformers' own cache, and whether the step that they
are for is to attend exactly."""


class SampledCache(Cache):
    """A cache to generate with: a new token reads a sketch of the keys, and then few keys and values.

    Layers that attend to all tokens before them, and that the settings do not make `exact`, keep their
    tokens in a `SampledKVCache`, which draws for each new token as `config.qtx_sampled` says: `num_samples`,
    `replicates`, `share_keys` and `seed`, and perhaps `proposal` and `rank`. All other layers (sliding
    windows, `exact` ones, recurrent states) have transformers' own. Tokens that the mask hides, as padding at
    the left does, are left out: a padded sequence attends to its own tokens alone. Beams, assistants, crops,
    sinks and softcap are as with transformers' caches. Biases, selected keys, gradients, and models that
    change keys or values after the cache gave them (multi-head latent attention, DiffLlama) are refused.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of a decoder whose `attn_implementation` is "qtx_sampled".
    proposal, rank : str, int, optional
        As for `SampledKVCache.build`, for layers whose settings name no proposal; low-rank where None.
    defensive : float
        As for `SampledKVCache.build`.
    prefill : {"exact", "sampled"}
        How several new tokens at once, a prompt for the most part, attend in all layers: exactly, or by
        `sampled_attention` with the `sampler` and `control_variate` of the settings. New tokens that come
        one by one draw in the cache's own way; settings that would be of no use are refused.

    Raises
    ------
    ArgumentError
        If the config has another attention, is an encoder-decoder's, or has no layer that attends to all
        tokens before it, or if an argument or a setting is not allowed.

    Examples
    --------
    >>> import torch, transformers
    >>> from qtx_lab import huggingface
    >>> huggingface.register()
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, attn_implementation="qtx_sampled")
    >>> model = transformers.AutoModelForCausalLM.from_config(config)
    >>> cache = SampledCache(model.config, proposal="low-rank", rank=2)
    >>> four = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    >>> model.generate(torch.arange(12)[None], past_key_values=cache, **four).shape
    torch.Size([1, 16])
    """

    def __init__(
        self,
        config: Any,
        proposal: str | None = None,
        rank: int | None = None,
        *,
        defensive: float = 0.02,
        prefill: str = "exact",
    ):
        if prefill not in PREFILLS:
            raise unknown_name("prefill", prefill, PREFILLS)
        config = config.get_text_config(decoder=True)
        given = getattr(config, "_attn_implementation", None)
        if given != IMPLEMENTATION:
            raise ArgumentError(
                f"config has attn_implementation={given!r}; a SampledCache is for models with "
                f"{IMPLEMENTATION!r}."
            )
        if config.is_encoder_decoder:
            raise ArgumentError(
                f"config is a {type(config).__name__}, of an encoder-decoder; a SampledCache is for decoders."
            )
        self.prefill = prefill
        proposal = "low-rank" if proposal is None else proposal
        options = {"proposal": proposal, "rank": rank, "defensive": defensive}
        super().__init__(layers=_layers(config, prefill, options))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens to a layer; returns what has the shape of all its keys and values."""
        if layer_idx >= len(self.layers):
            raise ArgumentError(
                f"past_key_values is a SampledCache of {len(self.layers)} layers, and the model has more: "
                "make it with this model's config."
            )
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if not isinstance(k, CachedTokens):
            OWN_STEPS[k] = self.prefill == "exact" and key_states.shape[-2] > 1
        return k, v


def _layers(config: Any, prefill: str, options: dict[str, Any]) -> list[Any]:
    """The layers of a cache: transformers' own, but for those that are drawn and attend to all tokens."""
    try:
        own = DynamicCache(config=config).layers
    except AttributeError as error:
        raise ArgumentError(
            f"config is a {type(config).__name__}, which does not say which layers there are: {error}"
        ) from error
    given = given_settings(config)
    settings = read_settings(given, len(own))
    full = [type(layer) is DynamicLayer for layer in own]
    if not any(full):
        kinds = get_layer_types_and_kwargs(config)[0]
        raise ArgumentError(
            f"config has layers of {', '.join(sorted(set(kinds)))}; a SampledCache is for full attention "
            "only."
        )
    exact = [settings.get(i, settings[None])["sampler"].exact for i in range(len(own))]
    drawn = [is_full and not is_exact for is_full, is_exact in zip(full, exact, strict=True)]
    by_layer = [{**options, **_proposal(settings.get(i, settings[None]))} for i in range(len(own))]
    for layer_config, is_full, own_options in zip(config.per_layer_config, full, by_layer, strict=True):
        probe = torch.zeros(1, _features(layer_config))
        if is_full:
            SampledKVCache.build(probe, probe, **own_options)  # a mistake in the options is refused now
    if prefill == "exact":
        _refuse_unused(given, drawn, [not (a or b) for a, b in zip(drawn, exact, strict=True)])
    return [
        SampledLayer(own_options, prefill) if is_drawn else layer
        for layer, is_drawn, own_options in zip(own, drawn, by_layer, strict=True)
    ]


def _proposal(settings: dict[str, Any]) -> dict[str, Any]:
    """The proposal that settings name, with its rank, as arguments of `SampledKVCache.build`."""
    return {} if settings["proposal"] is None else {name: settings[name] for name in ("proposal", "rank")}


def _features(config: Any) -> int:
    """E, or more where the config does not say it plainly."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _refuse_unused(given: Any, drawn: list[bool], otherwise_drawn: list[bool]) -> None:
    """Refuse settings that no layer would use, as all its new tokens are drawn in the cache's own way."""
    settings = [("", given, range(len(drawn)))]
    for number, changes in (given.get("layers") or {}).items():
        settings.append((f"['layers'][{number!r}]", changes, range(int(number), int(number) + 1)))
    for where, changes, layers in settings:
        for name in ("sampler", "control_variate"):
            is_set = changes.get(name) not in (None, "exact")
            if is_set and any(drawn[i] for i in layers) and not any(otherwise_drawn[i] for i in layers):
                raise ArgumentError(
                    f"config.{IMPLEMENTATION}{where}[{name!r}]={changes[name]!r} would change nothing: "
                    "prompts attend exactly, and a SampledCache draws for new tokens in its own way. Leave "
                    'it out, or make the cache with prefill="sampled".'
                )


def attends_exactly(key: Tensor) -> bool:
    """Whether a `SampledCache` asks that this step attend exactly, in a layer of transformers' own cache."""
    return bool(OWN_STEPS.get(key))


def has_sampled_cache(key: Tensor) -> bool:
    """Whether keys came from a `SampledCache`, in a layer of transformers' own cache."""
    return key in OWN_STEPS
