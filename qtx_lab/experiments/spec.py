"""Specs: frozen, checked descriptions of what to do, which travel as YAML and as notebook parameters."""

from __future__ import annotations

import difflib
import hashlib
import json
import operator
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
)

from ..errors import SpecError
from ..samplers import Sampler, make_sampler

MAX_SEED = 2**63 - 1

Value = TypeVar("Value", bound=Hashable)


def _whole(value: object) -> object:
    """Numpy's whole numbers become int; True, 3.0 and "3" are left for the strict check to refuse."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def _sampler_name(value: str) -> str:
    return make_sampler(value).name


def _drawing_name(value: str) -> str:
    if value == "exact":
        raise ValueError("exact attention is always shown: name a sampler that draws")
    return _sampler_name(value)


Whole = Annotated[int, Field(strict=True), BeforeValidator(_whole)]
Count = Annotated[int, Field(strict=True, ge=1, le=65_536), BeforeValidator(_whole)]


class Spec(BaseModel):
    """Base of every spec: immutable, refuses unknown keys, and says in one error all that is wrong.

    Raises
    ------
    SpecError
        On making one, naming each bad field, what was given and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise SpecError(" ".join(_problems(type(self), error))) from None

    @property
    def identity(self) -> str:
        """Hex SHA-256 of the kind of spec and its fields: equal exactly where the same was asked."""
        content = {"kind": type(self).__name__, **self.to_parameters()}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_parameters(self) -> dict[str, Any]:
        """The fields as plain JSON types, one notebook parameter each."""
        return self.model_dump(mode="json")

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The spec with these fields, the rest at their defaults.

        Raises
        ------
        SpecError
            If a key is unknown or a value is not allowed.
        """
        odd = [key for key in parameters if not isinstance(key, str)]
        if odd:
            raise SpecError(f"{cls.__name__} has the key {odd[0]!r}; keys must be names.")
        return cls(**parameters)

    def to_yaml(self) -> str:
        """The fields as YAML, in the order in which they are declared."""
        parameters = self.to_parameters()
        text = yaml.safe_dump(parameters, sort_keys=False, allow_unicode=True)
        if (
            not text.isascii() and yaml.safe_load(text) != parameters
        ):  # line breaks of Unicode's own are folded
            text = yaml.safe_dump(parameters, sort_keys=False)
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """The spec that a YAML text, or the file at a `Path` or a name ending in .yaml or .yml, describes.

        Raises
        ------
        SpecError
            If the file cannot be read, is not YAML, names a key twice, or is not such a spec.
        """
        where = "The YAML text"
        if isinstance(source, Path) or source.endswith((".yaml", ".yml")):
            where = str(source)
            try:
                source = Path(source).read_text(encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise SpecError(f"{where} cannot be read as a spec: {error}.") from error
        try:
            content = yaml.load(source, _UniqueKeys)
        except (yaml.YAMLError, ValueError) as error:
            raise SpecError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from None
        if not isinstance(content, dict):
            raise SpecError(f"{where} holds a {type(content).__name__}; it must be `field: value` lines.")
        return cls.from_parameters(content)


class SamplerSpec(Spec):
    """Which sampler draws, how much, and how often."""

    name: str = Field("systematic", description="The method that turns a row of logits into draws.")
    num_samples: Whole = Field(
        64,
        ge=1,
        le=65_536,
        description="Draws of each row and replicate.",
        json_schema_extra={"unit": "draws"},
    )
    replicates: Whole = Field(
        1,
        ge=1,
        le=1024,
        description="Independent repetitions; 2 or more give every sampler error bars.",
        json_schema_extra={"unit": "repetitions"},
    )

    _known = field_validator("name")(_sampler_name)

    def build(self) -> Sampler:
        """The sampler of that name."""
        return make_sampler(self.name)


class ExperimentSpec(Spec):
    """What the quickstart notebook does: which text, which head, which samplers, how many draws."""

    text: str = Field(
        "reference",
        min_length=1,
        description='"reference" for the held-out text shipped with the model, or the path of a UTF-8 file.',
        json_schema_extra={"unit": "path"},
    )
    layer: Whole = Field(
        3, ge=0, le=5, description="Layer whose attention is shown.", json_schema_extra={"unit": "index"}
    )
    head: Whole = Field(
        0, ge=0, le=7, description="Query head whose attention is shown.", json_schema_extra={"unit": "index"}
    )
    sampler: str = Field(
        "systematic", description="Sampler of the attention maps.", json_schema_extra={"unit": "name"}
    )
    samplers: tuple[str, ...] = Field(
        ("monte-carlo", "stratified", "systematic", "head-tail"),
        min_length=1,
        description="Samplers compared, each named once.",
        json_schema_extra={"unit": "name"},
    )
    sample_counts: tuple[Count, ...] = Field(
        (8, 32, 128),
        min_length=1,
        description="Draws a row at which the samplers are compared; kept in rising order, each once.",
        json_schema_extra={"unit": "draws"},
    )
    seed: Whole = Field(
        0, ge=0, le=MAX_SEED, description="Seed of every random number.", json_schema_extra={"unit": "number"}
    )
    num_tokens: Whole = Field(
        512, ge=16, le=1024, description="Length of a window of text.", json_schema_extra={"unit": "bytes"}
    )
    num_windows: Whole = Field(
        4,
        ge=1,
        le=1024,
        description="Held-out windows over which bits per byte are averaged.",
        json_schema_extra={"unit": "windows"},
    )

    _known = field_validator("sampler")(_drawing_name)

    @field_validator("samplers")
    @classmethod
    def _known_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _once("samplers", tuple(_drawing_name(name) for name in names))

    @field_validator("sample_counts")
    @classmethod
    def _rising_once(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(_once("sample_counts", counts)))


class NotebookSpec(Spec):
    """A notebook and the parameters it was given."""

    notebook: str = Field(min_length=1, description="The notebook's name, without its folder and ending.")
    parameters: dict[str, JsonValue] = Field(default={}, description="Parameters given, by name.")


def nearest(given: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the known name closest to the given one, or nothing."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _once(field: str, values: tuple[Value, ...]) -> tuple[Value, ...]:
    twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
    if twice:
        raise ValueError(f"{field}={list(values)} is not allowed: {twice[0]!r} is named more than once.")
    return values


def _problems(cls: type[Spec], error: ValidationError) -> list[str]:
    """One sentence for each thing that is wrong."""
    properties = cls.model_json_schema()["properties"]
    problems = error.errors(include_url=False)
    bad_items = {problem["loc"][0] for problem in problems if len(problem["loc"]) > 1}
    sentences = []
    for problem in problems:
        field, *inside = problem["loc"] or ("spec",)
        given = problem["input"]
        if problem["type"] == "too_short" and field in bad_items:  # short only because items were refused
            continue
        if problem["type"] == "extra_forbidden":
            hint = nearest(str(field), properties)
            sentences.append(
                f"{cls.__name__} has no field {field!r}.{hint} Allowed: {', '.join(properties)}."
            )
        elif problem["type"] == "missing":
            sentences.append(f"{field} is missing: {cls.__name__} needs it.")
        elif problem["type"] == "value_error":  # from a validator of ours
            message = str(problem["ctx"]["error"])
            sentences.append(message if message.startswith(str(field)) else f"{field}: {message}")
        else:
            schema = properties.get(field, {})
            if inside:
                schema = schema.get("items", {})
            place = str(field) + "".join(f"[{part!r}]" for part in inside)
            sentences.append(f"{place}={given!r} is not allowed: {_allowed(schema, problem['msg'])}.")
    return sentences


def _allowed(schema: Mapping[str, Any], message: str) -> str:
    if schema.get("type") == "integer":
        return f"it must be a whole number from {schema['minimum']} to {schema['maximum']}"
    if schema.get("type") == "array":
        return f"it must be a list of at least {schema.get('minItems', 0)}"
    return message.replace("Input should", "it must").replace("String should", "it must")


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which naming a key twice is an error instead of a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is named twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


__all__ = ["MAX_SEED", "ExperimentSpec", "NotebookSpec", "SamplerSpec", "Spec"]
