"""What `config.qtx_sampled` says: the sampling settings of a Hugging Face model's layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..attention.multihead import attention_settings
from ..cache.sketches import PROPOSALS
from ..checks import check_count
from ..errors import ArgumentError, quoted, unknown_name

IMPLEMENTATION = "qtx_sampled"
"""The value of `attn_implementation`, and the name of the settings on a model's config."""

CACHE_SETTINGS = ("proposal", "rank", "share_keys")
"""What only a `SampledCache` reads: how its layers propose and draw keys."""

LAYER_SETTINGS = ("sampler", "num_samples", "replicates", "control_variate", *CACHE_SETTINGS)
SETTINGS = (*LAYER_SETTINGS, "seed", "layers")

MAX_SEED = 2**63 - 1
"""The largest seed that a torch.Generator takes."""

MAX_LAYERS = 10**9

SEED_STEP = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: what the seeds of neighbouring layers differ by, so that no two agree."""

DRAWING: WeakKeyDictionary[nn.Module, tuple[str, dict[str, Any]]] = WeakKeyDictionary()
"""For each attention module that has drawn: its settings as JSON, and the arguments that they mean for it."""


def read_settings(given: object, layers: int | None = None) -> dict[int | None, dict[str, Any]]:
    """What settings mean: arguments of `sampled_attention`, `seed`, and those of a cache, by layer.

    None stands for all layers without settings of their own.

    Parameters
    ----------
    given : object
        The value of `config.qtx_sampled`.
    layers : int, optional
        How many layers the model has, if that is known.

    Raises
    ------
    ArgumentError, DtypeError
        If it is not a mapping, a key is unknown, a value is not allowed, or there is no such layer.
    """
    top = _mapping(given, "", SETTINGS)
    as_json(given)
    common = {name: x for name, x in top.items() if name != "layers"}
    by_layer: dict[int | None, dict[str, Any]] = {None: _arguments(dict(common), "")}
    changed = {} if top.get("layers") is None else top["layers"]
    for number, changes in _mapping(changed, "['layers']", None).items():
        where = f"['layers'][{number!r}]"
        index = int(number) if str(number).isdecimal() else -1
        if not 0 <= index < (MAX_LAYERS if layers is None else layers):
            allowed = "from 0" if layers is None else f"from 0 to {layers - 1}"
            raise ArgumentError(
                f"config.{IMPLEMENTATION}{where} is not allowed: layers are numbered {allowed}."
            )
        if index in by_layer:
            raise ArgumentError(f"config.{IMPLEMENTATION}{where} is there twice.")
        changes = _mapping(changes, where, LAYER_SETTINGS)
        # A rank belongs to the proposal beside it.
        other = {"rank": None} if "proposal" in changes else {}
        by_layer[index] = _arguments({**common, **other, **changes}, where)
    return by_layer


def given_settings(config: Any) -> Any:
    """The settings on a model's config; an empty mapping where there are none."""
    given = getattr(config, IMPLEMENTATION, None)
    return {} if given is None else given


def layer_counts(config: Any) -> list[int]:
    """How many layers a config says that there are, of the encoder, the decoder, or at all."""
    names = ("num_hidden_layers", "decoder_layers", "encoder_layers")
    counts = [getattr(config, name, None) for name in names]
    return [count for count in counts if isinstance(count, int)]


def as_json(given: object) -> str:
    """Settings as JSON.

    Raises
    ------
    ArgumentError
        If they hold more than names and numbers.
    """
    try:
        return json.dumps(given)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"config.{IMPLEMENTATION} is not allowed: it must be JSON, names and numbers only ({error})."
        ) from None


def settings_of(module: nn.Module, config: Any = None, number: int | None = None) -> dict[str, Any]:
    """The arguments of `sampled_attention` for an attention module, its generator among them.

    The config is the module's own and the number that of its layer, where they are not given.
    """
    config = getattr(module, "config", None) if config is None else config
    given = given_settings(config)
    text = as_json(given)
    former_text, settings = DRAWING.get(module, ("", {}))
    if former_text == text:
        return settings
    by_layer = read_settings(given, max(layer_counts(config), default=None))
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
        number = layer if number is None else number
        mixed = (seed + SEED_STEP * (0 if number is None else number + 1)) % 2**63
        settings["generator"] = torch.Generator(device).manual_seed(mixed)
    DRAWING[module] = (text, settings)
    return settings


def refuse_recomputing(settings: dict[str, Any]) -> None:
    """Refuse to draw in a backward pass, where activation checkpointing computes a layer again.

    Raises
    ------
    ArgumentError
        If the draws come from a generator of the layer's own, which has moved on.
    """
    if settings["generator"] is not None and torch._C._current_graph_task_id() != -1:
        raise ArgumentError(
            "Activation checkpointing would draw other keys in the backward pass: leave `seed` out of "
            "config.qtx_sampled, so that the draws come from torch's default generator, which it keeps."
        )


def refuse_cache_settings(settings: dict[str, Any]) -> None:
    """Refuse to draw without a `SampledCache` by settings that are meant for one.

    Raises
    ------
    ArgumentError
        If the settings name a proposal, or share keys.
    """
    given = [name for name in CACHE_SETTINGS if settings[name]]
    if given:
        raise ArgumentError(
            f"config.{IMPLEMENTATION} has {' and '.join(given)}, which only a SampledCache uses: pass "
            "past_key_values=SampledCache(model.config), or leave it out."
        )


def _cache_settings(proposal: object, rank: object, share_keys: object, where: str) -> dict[str, Any]:
    """The settings of a cache; it checks itself whether the size of its keys allows the rank."""
    if proposal is not None and proposal not in PROPOSALS:
        raise unknown_name(f"config.{IMPLEMENTATION}{where}['proposal']", str(proposal), PROPOSALS)
    if rank is not None:
        if proposal is None:
            raise ArgumentError(
                f"config.{IMPLEMENTATION}{where}['rank']={quoted(rank)} needs a proposal beside it."
            )
        rank = check_count(f"config.{IMPLEMENTATION}{where}['rank']", rank)
    if share_keys is not None and not isinstance(share_keys, bool):
        raise ArgumentError(
            f"config.{IMPLEMENTATION}{where}['share_keys']={quoted(share_keys)} is not allowed: it must be "
            "true or false."
        )
    return {"proposal": proposal, "rank": rank, "share_keys": bool(share_keys)}


def _mapping(given: object, where: str, allowed: tuple[str, ...] | None) -> dict[Any, Any]:
    if not isinstance(given, Mapping):
        raise ArgumentError(
            f"config.{IMPLEMENTATION}{where}={quoted(given)} is not allowed: it must be a mapping."
        )
    for key in given:
        if allowed is not None and key not in allowed:
            raise unknown_name(f"config.{IMPLEMENTATION}{where}", str(key), allowed)
    return dict(given)


def _arguments(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments that settings mean, and `seed`; errors say where in the config the settings are."""
    seed, proposal, rank, share_keys = (given.pop(name, None) for name in ("seed", *CACHE_SETTINGS))
    if seed is not None:
        seed = check_count(f"config.{IMPLEMENTATION}{where}['seed']", seed, 0, MAX_SEED)
    cache = _cache_settings(proposal, rank, share_keys, where)
    try:
        return {**attention_settings(**given), **cache, "seed": seed}
    except ValueError as error:
        raise ArgumentError(f"config.{IMPLEMENTATION}{where}: {error}") from error
    except TypeError as error:
        raise ArgumentError(f"config.{IMPLEMENTATION}{where} is not allowed: {error}") from error
