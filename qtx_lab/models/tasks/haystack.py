"""The haystack: documentation that Python ships, as sentences between which tasks hide what they ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from ..text import reference_text
from .base import Filling, TextModel


def sentences() -> list[str]:
    """The sentences of `reference_text`, with single spaces, the same for every version of Python."""
    return re.split(r"(?<=[.!?]) ", " ".join(reference_text().split()))


def haystack(model: TextModel, hidden: Sequence[str], random: Random) -> Filling:
    """Documentation with sentences hidden in it, at random places between its own, in the order given.

    The documentation begins at a random sentence and goes on from its start after its end. Its last sentence
    is cut, so that the tokens are exactly as many as asked.
    """
    start = random.random()
    places = sorted(random.random() for _ in hidden)
    needles = [model.encode(" " + sentence) for sentence in hidden]
    size = sum(map(len, needles))

    def tokens(count: int) -> Tensor:
        texts = sentences()
        first, missing = int(start * len(texts)), count - size
        parts: list[Tensor] = []
        while missing > 0:
            part = model.encode(" " + texts[(first + len(parts)) % len(texts)])[:missing]
            parts.append(part)
            missing -= len(part)
        positions = [1 + int(place * len(parts)) for place in places]
        for position, needle in reversed(list(zip(positions, needles, strict=True))):
            parts.insert(position, needle)
        return torch.cat(parts)

    return Filling(minimum=size + 1, tokens=tokens)
