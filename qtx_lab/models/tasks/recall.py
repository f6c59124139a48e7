"""In-context recall: pairs of words, of which the second word of one pair is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from .base import Draft, Filling, Request, Task, TextModel, check_setting, fit
from .haystack import haystack
from .words import ADJECTIVES, NOUNS


@dataclass(frozen=True)
class Recall(Task):
    """A list of pairs such as "quiet lamp: river" after documentation, of which one is begun again.

    Source: Arora et al., Zoology: Measuring and improving recall in efficient language models (2023).

    Parameters
    ----------
    pairs : int
        1 to 90. No word stands in two pairs.
    """

    name: ClassVar[str] = "recall"
    pairs: int = 16

    def __post_init__(self) -> None:
        check_setting("pairs", self.pairs, 1, min(len(ADJECTIVES), len(NOUNS) // 2))

    def draft(self, model: TextModel, length: int, random: Random) -> Draft:
        """The pairs stand together in random order, after as much documentation as there is room for."""
        nouns = random.sample(NOUNS, 2 * self.pairs)
        keys = [f"{a} {b}" for a, b in zip(random.sample(ADJECTIVES, self.pairs), nouns[::2], strict=True)]
        values, asked = nouns[1::2], random.randrange(self.pairs)
        lines = "\nPairs:" + "".join(f"\n{key}: {value}" for key, value in zip(keys, values, strict=True))
        pairs, text = model.encode(lines), haystack(model, (), random)

        def tokens(count: int) -> Tensor:
            return torch.cat((text.tokens(count - len(pairs)), pairs))

        request = Request(
            instruction="The following text ends with pairs of words.",
            question=keys[asked],
            opening="",
            pieces=((":", False), (f" {values[asked]}", True)),
            answers=(values[asked],),
            filling=Filling(len(pairs) + 1, tokens),
            chat=False,
        )
        return fit(self.name, model, length, request)
