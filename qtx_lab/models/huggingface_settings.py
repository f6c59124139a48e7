"""What `config.qtx_sampled` says: the sampling settings of a Hugging Face model's layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..attention.multihead import attention_settings
from ..errors import ArgumentError, unknown_name

IMPLEMENTATION = "qtx_sampled"
"""The value of `attn_implementation`, and the name of the settings on a model's config."""

LAYER_SETTINGS = ("sampler", "num_samples", "replicates", "control_variate")
SETTINGS = (*LAYER_SETTINGS, "seed", "layers")

MAX_SEED = 2**63 - 1
"""The largest seed that a torch.Generator takes."""

MAX_LAYERS = 10**9


def read_settings(given: object, layers: int | None = None) -> dict[int | None, dict[str, Any]]:
    """What settings mean: arguments of `sampled_attention` and `seed`, by layer.

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
    by_layer: dict[int | None, dict[str, Any]] = {None: _arguments(common, "")}
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
        by_layer[index] = _arguments({**common, **_mapping(changes, where, LAYER_SETTINGS)}, where)
    return by_layer


def given_settings(config: Any) -> Any:
    """The settings on a model's config; an empty mapping where there are none."""
    given = getattr(config, IMPLEMENTATION, None)
    return {} if given is None else given


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


def _mapping(given: object, where: str, allowed: tuple[str, ...] | None) -> dict[Any, Any]:
    if not isinstance(given, Mapping):
        raise ArgumentError(f"config.{IMPLEMENTATION}{where}={given!r} is not allowed: it must be a mapping.")
    for key in given:
        if allowed is not None and key not in allowed:
            raise unknown_name(f"config.{IMPLEMENTATION}{where}", str(key), allowed)
    return dict(given)


def _arguments(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments that settings mean, and `seed`; errors say where in the config the settings are."""
    seed = given.pop("seed", None)
    is_whole = isinstance(seed, int) and not isinstance(seed, bool)
    if seed is not None and (not is_whole or not 0 <= seed <= MAX_SEED):
        raise ArgumentError(
            f"config.{IMPLEMENTATION}{where}['seed']={seed!r} is not allowed: it must be a whole number from "
            f"0 to {MAX_SEED}, or None."
        )
    try:
        return {**attention_settings(**given), "seed": seed}
    except ValueError as error:
        raise ArgumentError(f"config.{IMPLEMENTATION}{where}: {error}") from error
    except TypeError as error:
        raise ArgumentError(f"config.{IMPLEMENTATION}{where} is not allowed: {error}") from error
