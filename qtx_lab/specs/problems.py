"""Sentences that say what is wrong with a spec: which field, what was given, and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import quoted

_BOUND_WORDS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "exclusiveMaximum": "to below",
}
"""How a sentence names each bound of a JSON schema, in the order in which it names them."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a spec.

    Parameters
    ----------
    field : str
        The field that it is about; "" where it is about no field in particular.
    text : str
        One sentence or more, for people.
    """

    field: str
    text: str


def nearest(given: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the known name that is closest to the given one, or nothing.

    >>> nearest("sistematic", ["systematic", "sobol"])
    " Did you mean 'systematic'?"
    """
    close = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def problems_of(kind: type[BaseModel], error: ValidationError) -> list[Problem]:
    """All that pydantic found wrong with a spec of this kind."""
    properties = kind.model_json_schema()["properties"]
    details = error.errors(include_url=False)
    with_bad_items = {detail["loc"][0] for detail in details if len(detail["loc"]) > 1}
    return [
        _problem(kind.__name__, properties, detail)
        for detail in details
        # A list whose items were refused is too short for that reason alone.
        if not (detail["type"] == "too_short" and detail["loc"][0] in with_bad_items)
    ]


def _problem(kind: str, properties: Mapping[str, Any], detail: Mapping[str, Any]) -> Problem:
    field, *inside = detail["loc"] or ("",)
    if detail["type"] == "extra_forbidden":
        hint = nearest(str(field), properties)
        text = f"{kind} has no field {field!r}.{hint} Allowed: {', '.join(properties)}."
    elif detail["type"] == "missing":
        text = f"{field} is missing: {kind} needs it."
    elif detail["type"] == "value_error":  # raised by a validator of the specs, with a sentence of its own
        text = str(detail["ctx"]["error"])
        if not field:  # of several fields: it is shown beside the one that the sentence begins with
            field = next((word for word in re.findall(r"\w+", text)[:1] if word in properties), "")
        text = text if text.startswith(str(field)) else f"{field}: {text}"
    else:
        schema = properties.get(field, {})
        schema = schema.get("items", {}) if inside else schema
        place = str(field) + "".join(f"[{part!r}]" for part in inside)
        given = detail["input"]
        names = [str(name) for name in _without_none(schema).get("enum", ())]
        hint = nearest(given, names) if isinstance(given, str) else ""
        text = f"{place}={quoted(given)} is not allowed: {_allowed(schema, detail['msg'])}.{hint}"
    return Problem(str(field), text)


def _without_none(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a value that is not None."""
    return next((part for part in schema.get("anyOf", ()) if part.get("type") != "null"), schema)


def _allowed(schema: Mapping[str, Any], message: str) -> str:
    """What a field may hold, as half a sentence: from its schema, else from pydantic's own message."""
    if "anyOf" in schema:
        return f"{_allowed(_without_none(schema), message)}, or None"
    if "enum" in schema:
        return f"it must be one of {', '.join(map(str, schema['enum']))}"
    if schema.get("type") == "boolean":
        return "it must be True or False"
    if schema.get("type") == "array":
        least = f" of at least {schema['minItems']}" if "minItems" in schema else ""
        return f"it must be a list{least}"
    number = {"integer": "a whole number", "number": "a number"}.get(schema.get("type", ""))
    bounds = [
        f"{word} {schema[key]:g}" if isinstance(schema[key], float) else f"{word} {schema[key]}"
        for key, word in _BOUND_WORDS.items()
        if key in schema
    ]
    if number and bounds:
        return f"it must be {number} {' '.join(bounds)}"
    return message.replace("Input should", "it must").replace("String should", "it must")
