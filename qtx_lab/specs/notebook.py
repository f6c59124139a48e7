"""`NotebookSpec`: a notebook with parameters of its own."""

from __future__ import annotations

from pydantic import JsonValue

from .base import Spec
from .fields import field


class NotebookSpec(Spec):
    """A notebook with parameters of its own, and the values that were given for them."""

    notebook: str = field(
        ..., "The notebook's name, without its folder and ending.", "name", "notebook", min_length=1
    )
    parameters: dict[str, JsonValue] = field(
        {}, "The values that were given, by parameter.", "values", "notebook"
    )
