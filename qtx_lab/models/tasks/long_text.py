"""Long text: how well a model predicts the end of a long passage that it has read."""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics
from random import Random
from typing import ClassVar

import torch

from ...errors import ArgumentError
from ..text import read_text
from .base import Draft, Task, TextModel, check_setting

TOPICS = "topics"
"""The source of which every installation of Python has a copy."""


@dataclass(frozen=True)
class LongText(Task):
    """A passage of documentation, of whose last tokens the log-probabilities are measured.

    The passage begins at a random line of the source and goes on from its first line after its last.

    Parameters
    ----------
    scored_tokens : int
        The last tokens of the passage, which are scored, 1 to 4096.
    source : str
        "topics", all that `pydoc` shows on the language's topics: 465,000 characters, which every version of
        Python writes a little differently (`TaskPrompt.digest` tells). Or the path of a UTF-8 file.
    """

    name: ClassVar[str] = "long-text"
    scored_tokens: int = 64
    source: str = TOPICS

    def __post_init__(self) -> None:
        check_setting("scored_tokens", self.scored_tokens, 1, 4096)
        if not isinstance(self.source, str):
            raise ArgumentError(f"source={self.source!r} is not allowed: it must be 'topics' or a path.")

    def draft(self, model: TextModel, length: int, random: Random) -> Draft:
        """The tokens before the scored ones are the prompt; the scored ones are the target."""
        if length <= self.scored_tokens:
            raise ArgumentError(
                f"length={length} is too short for scored_tokens={self.scored_tokens}: it must be more."
            )
        text = "\n\n".join(topics.values()) if self.source == TOPICS else read_text(self.source)
        start = text.find("\n", random.randrange(len(text))) + 1
        text = text[start:] + "\n" + text[:start]
        # A token of text has 3 to 5 characters, and the whole text has 100,000 tokens: begin with a part.
        tokens = model.encode(text[: 12 * length])
        tokens = tokens if len(tokens) >= length else model.encode(text)
        if len(tokens) < length:
            raise ArgumentError(
                f"length={length} is longer than the text of source={self.source!r}, {len(tokens)} tokens."
            )
        prompt, target = tokens[:length].split([length - self.scored_tokens, self.scored_tokens])
        return Draft(prompt, (), target, torch.ones(len(target), dtype=torch.bool), len(target))
