"""`Spec`, the base class of all specs: immutable, checked as a whole, the same in Python, YAML and JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from ..errors import SpecError, quoted
from .problems import problems_of
from .words import read_words, value_of, write_yaml

MAX_PROBLEMS = 8
"""How many problems of a spec its error names; a list may have thousands of bad items."""


class Spec(BaseModel):
    """Base of every spec: immutable, without unknown fields; one error names all that is wrong.

    Raises
    ------
    SpecError
        When it is made, naming each bad field, what was given and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            sentences = [problem.text for problem in problems_of(type(self), error)]
            more = len(sentences) - MAX_PROBLEMS
            ending = [f"And {more:,} more."] if more > 0 else []
            raise SpecError(" ".join([*sentences[:MAX_PROBLEMS], *ending])) from None

    @classmethod
    def problems(cls, parameters: Mapping[str, Any]) -> dict[str, str]:
        """What is wrong with these fields: a text for each bad field, as forms show it; empty if nothing is.

        What concerns no single field has the key "".
        """
        texts: dict[str, str] = {}
        try:
            cls.__pydantic_validator__.validate_python(dict(parameters), self_instance=cls.__new__(cls))
        except ValidationError as error:
            for problem in problems_of(cls, error):
                texts[problem.field] = f"{texts.get(problem.field, '')} {problem.text}".strip()
        return texts

    @classmethod
    @cache
    def groups(cls) -> dict[str, str]:
        """The heading under which a form shows each field."""
        return {name: schema["group"] for name, schema in cls.model_json_schema()["properties"].items()}

    def unused_fields(self) -> dict[str, str]:
        """The fields that nothing uses while the others are as they are, with what each of them is for."""
        return {}

    @model_validator(mode="after")
    def _refuse_unused_fields(self) -> Self:
        """Refuse fields that were given and would be ignored.

        Where every field is given, as forms, YAML and records of runs give them, those of what is not chosen
        are no request: a form remembers them until they are chosen again.
        """
        if len(self.model_fields_set) == len(type(self).model_fields):
            return self
        defaults, given = type(self).model_fields, self.to_parameters()
        refused = [
            f"{name}={quoted(given[name])} is not allowed {reason}."
            for name, reason in self.unused_fields().items()
            if dict(self)[name] != defaults[name].default
        ]
        if refused:
            raise ValueError(" ".join(refused))
        return self

    @property
    def identity(self) -> str:
        """SHA-256 of the kind of spec and its fields, in hex: two specs are equal exactly where these are."""
        content = {"kind": type(self).__name__, **self.to_parameters()}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_parameters(self) -> dict[str, Any]:
        """The fields as plain JSON types, each of them one parameter of a notebook."""
        return self.model_dump(mode="json")

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The spec with these fields, and the others at their defaults.

        Raises
        ------
        SpecError
            If a key is unknown or a value is not allowed.
        """
        other_keys = [key for key in parameters if not isinstance(key, str)]
        if other_keys:
            raise SpecError(f"{cls.__name__} has the key {other_keys[0]!r}; keys must be names.")
        return cls(**parameters)

    def to_yaml(self) -> str:
        """The fields as YAML, in the order in which they are declared."""
        return write_yaml(self.to_parameters())

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """The spec that a YAML text describes, or a file: a `Path`, or a name that ends in .yaml or .yml.

        What is written without quotation marks is taken as the field declares it: see `value_of`.

        Raises
        ------
        SpecError
            If the file cannot be read, is not YAML, names a key twice, or does not describe such a spec.
        """
        where = "The YAML text"
        if isinstance(source, Path) or source.endswith((".yaml", ".yml")):
            where = str(source)
            try:
                source = Path(os.path.expanduser(source)).read_text(encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise SpecError(f"{where} cannot be read as a spec: {error}.") from error
        try:
            content = read_words(source)
        except ValueError as error:
            raise SpecError(f"{where} is not valid YAML: {error}.") from None
        if not isinstance(content, dict):
            raise SpecError(f"{where} holds a {type(content).__name__}; it must be `field: value` lines.")
        return cls.from_parameters(cls.read_fields(content))

    @classmethod
    def read_fields(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """The fields whose values were typed as Words, as what the spec declares them to be."""
        fields = cls.model_json_schema()["properties"]
        return {value_of(name, {}): value_of(value, fields.get(name, {})) for name, value in content.items()}
