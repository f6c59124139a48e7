"""Pieces of the code that tabs give to copy: calls of Python with their arguments, and lines of a shell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from ....specs import Spec

MAX_WIDTH = 88
"""Characters of a line of Python, about: longer calls have an argument a line."""

IMPORTS = "import torch\n\nimport qtx_lab as qtx\n"
"""The first lines of all code."""


class Code(str):
    """An expression: it stands in a call as it is, where other values stand by their `repr`."""

    __slots__ = ()


def call(function: str, *arguments: Any, **named: Any) -> str:
    """A call in Python, on one line where that is short.

    >>> call("qtx.runs", Code("home"), limit=3)
    'qtx.runs(home, limit=3)'
    """
    parts = [_written(value) for value in arguments]
    parts += [f"{name}={_written(value)}" for name, value in named.items()]
    line = f"{function}({', '.join(parts)})"
    if len(line) <= MAX_WIDTH:
        return line
    inner = "".join(f"    {part},\n".replace("\n    ", "\n        ") for part in parts)
    return f"{function}(\n{inner})"


def changed_fields(spec: Spec) -> dict[str, Any]:
    """The fields of a spec that are used and not at their defaults, as plain values."""
    values, unused = spec.to_parameters(), spec.unused_fields()
    return {
        name: value
        for name, value in values.items()
        if name not in unused and dict(spec)[name] != type(spec).model_fields[name].default
    }


def shell(*words: str) -> str:
    """A line of a shell.

    >>> shell("qtx-lab", "run", "a b")
    "qtx-lab run 'a b'"
    """
    return shlex.join(words)


def inputs_code(source: Mapping[str, Any]) -> str:
    """The statement that gives `inputs`, what attention is computed from.

    Parameters
    ----------
    source : mapping
        The fields of a `SourceSpec`.
    """
    named: dict[str, Any] = {}
    if source["prompt"] is not None:
        named["text"] = source["prompt"]
    elif source["text"] != "reference":
        named["text"] = Code(call("qtx.read_text", source["text"]))
    own = str(source["model"]).endswith(".safetensors")
    named |= {} if own else {"num_tokens": source["num_tokens"]}
    return f"inputs = {call('qtx.attention_inputs', source['model'], **named)}\n"


def _written(value: Any) -> str:
    return str(value) if isinstance(value, Code) else repr(value)
