"""What a field of a spec can hold, how wide its bounds are, and what a form says about it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema
from torch import Tensor

from ..controls import CONTROLS
from ..errors import unknown_name
from ..samplers import BASELINES, SAMPLERS, make_sampler

MAX_SEED = 2**63 - 1
"""The largest seed of every random number generator of the lab."""

Value = TypeVar("Value", bound=Hashable)


def field(
    default: Any,
    text: str,
    unit: str,
    group: str,
    *,
    label: str = "",
    instead_of: str = "",
    start: str = "",
    **bounds: Any,
) -> Any:
    """A field of a spec, with all that a form needs to show it.

    Parameters
    ----------
    default : object
        The value where none is given; `...` where one has to be given.
    text : str
        What the field means, as a sentence.
    unit : str
        The unit of the value, or what sort of value it is: "draws", "s", "name", "yes or no".
    group : str
        The heading under which a form shows the field.
    label : str
        What a form calls the field; its name with spaces where empty.
    instead_of : str
        The field that this one excludes: a form shows a switch between the two.
    start : str
        What a form enters when its switch turns to this field.
    **bounds
        Bounds as pydantic's `Field` takes them: `ge`, `gt`, `le`, `lt`, `min_length`, `max_length`,
        `pattern`; or `examples`, which a form suggests.
    """
    shown: dict[str, Any] = {
        "unit": unit,
        "group": group,
        "label": label,
        "instead_of": instead_of,
        "start": start,
    }
    return Field(default, description=text, json_schema_extra=shown, **bounds)


def each_once(name: str, values: tuple[Value, ...]) -> tuple[Value, ...]:
    """The values of the field `name`, refused by a ValueError if one of them is named more than once."""
    repeated = [value for value in dict.fromkeys(values) if values.count(value) > 1]
    if repeated:
        raise ValueError(f"{name}={list(values)} is not allowed: {repeated[0]!r} is named more than once.")
    return values


def python_number(value: object) -> object:
    """A single number of NumPy or torch as Python's own; every other value as it is."""
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        return value.item()
    return value


def real_number(value: object) -> object:
    """Every number as a float, so that equal specs have equal YAML; -0.0 becomes 0.0."""
    value = python_number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    try:
        return float(value) + 0.0
    except OverflowError:  # a whole number of more than 308 digits: the bounds refuse it
        return value


Whole = Annotated[int, Field(strict=True), BeforeValidator(python_number)]
"""A whole number of Python, NumPy or torch; True, 3.0 and "3" are none."""

Real = Annotated[float, Field(strict=True, allow_inf_nan=False), BeforeValidator(real_number)]
"""A finite number of Python, NumPy or torch; True and "3" are none."""

Count = Annotated[int, Field(strict=True, ge=1, le=65_536), BeforeValidator(python_number)]
"""How many draws a row gets."""

Switch = Annotated[bool, Field(strict=True)]
"""True or False, and nothing that Python takes for either."""


@dataclass(frozen=True)
class AnyOf:
    """Writes the names that a field may hold into its JSON schema: those that exist at that time."""

    names: Callable[[], Iterable[str]]

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(core), "enum": list(self.names())}


@dataclass(frozen=True)
class Suggested:
    """Writes values that a form suggests into a field's JSON schema; others can be typed, too."""

    names: Callable[[], Iterable[str]]

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(core), "examples": list(self.names())}


def _sampler_name(value: str, info: ValidationInfo) -> str:
    names = [*SAMPLERS, *BASELINES]
    if value not in names and value != "circuit":  # of which make_sampler says what it needs
        raise unknown_name(info.field_name or "sampler", value, names)
    return make_sampler(value).name


def _drawing_name(value: str, info: ValidationInfo) -> str:
    if value == "exact":
        raise ValueError("exact attention is always shown: name a sampler that draws")
    return _sampler_name(value, info)


def _control_name(value: str, info: ValidationInfo) -> str:
    if value not in CONTROLS:
        raise unknown_name(info.field_name or "control", value, CONTROLS)
    return value


SamplerName = Annotated[str, AfterValidator(_sampler_name), AnyOf(lambda: [*SAMPLERS, *BASELINES])]
"""The name of a sampler or of a baseline."""

DrawingName = Annotated[
    str,
    AfterValidator(_drawing_name),
    AnyOf(lambda: [name for name in [*SAMPLERS, *BASELINES] if name != "exact"]),
]
"""The name of a sampler or of a baseline that draws: not "exact"."""

ControlName = Annotated[str, AfterValidator(_control_name), AnyOf(lambda: CONTROLS)]
"""The name of a control variate."""
