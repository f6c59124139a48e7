"""Heads picked by hand: which layers and heads of a model draw, written as `0-2, 3:0, 3:5-7`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator

from ..errors import ArgumentError

PART = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?(?::(\d{1,4})(?:-(\d{1,4}))?)?")


def read_heads(text: str) -> dict[int, frozenset[int] | None]:
    """The heads that a text names, by layer; None stands for all heads of a layer.

    Raises
    ------
    ValueError
        If the text is of another form, or a range falls.

    Examples
    --------
    >>> read_heads("0-1, 3:0, 3:5-6")
    {0: None, 1: None, 3: frozenset({0, 5, 6})}
    """
    heads: dict[int, frozenset[int] | None] = {}
    for part in text.split(","):
        match = PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"{part.strip()!r} names no heads: write a layer as 3, layers as 0-2, heads of a layer as "
                "3:5 or 3:0-4"
            )
        layers, of_layer = _range(match[1], match[2]), match[3] and frozenset(_range(match[3], match[4]))
        for layer in layers:
            known = heads.get(layer, frozenset())
            heads[layer] = None if known is None or not of_layer else known | of_layer
    return heads


def heads_text(places: Iterable[tuple[int, int]]) -> str:
    """The text that names these (layer, head).

    >>> heads_text([(3, 0), (3, 5), (3, 6), (0, 1)])
    '0:1, 3:0, 3:5-6'
    """
    parts: list[list[int]] = []
    for layer, head in sorted(set(places)):
        if parts and parts[-1][0] == layer and parts[-1][2] == head - 1:
            parts[-1][2] = head
        else:
            parts.append([layer, head, head])
    return ", ".join(f"{layer}:{a}-{b}" if a < b else f"{layer}:{a}" for layer, a, b in parts)


def places_of(text: str, layers: int, heads: int) -> list[tuple[int, int]]:
    """The (layer, head) that a text names, of a model with so many layers and query heads in each.

    Raises
    ------
    ArgumentError
        If the model lacks one of them.

    Examples
    --------
    >>> places_of("1, 0:1", layers=2, heads=2)
    [(0, 1), (1, 0), (1, 1)]
    """
    named = read_heads(text)
    for layer, of_layer in named.items():
        if layer >= layers or max(of_layer or (0,)) >= heads:
            raise ArgumentError(
                f"drawn_heads={text!r} is not allowed: the model has the layers 0 to {layers - 1}, with the "
                f"heads 0 to {heads - 1} each."
            )
    picked = {layer: range(heads) if of_layer is None else of_layer for layer, of_layer in named.items()}
    return sorted((layer, head) for layer, of_layer in picked.items() for head in of_layer)


def _range(first: str, last: str | None) -> range:
    low, high = int(first), int(last or first)
    if high < low:
        raise ValueError(f"{first}-{last} is no range: the first number must not be larger than the second")
    return range(low, high + 1)


def _checked(text: str) -> str:
    read_heads(text)
    return text


DrawnHeads = Annotated[str, AfterValidator(_checked)]
"""Which layers and heads draw, as `read_heads` takes them."""
