"""Counting words: the commonest words of a list, and of a text in code.

Source: Hsieh et al., RULER (2024), §3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_scale
from ...errors import ArgumentError
from .base import Draft, Filling, Request, Task, TextModel, check_setting, fit
from .haystack import haystack
from .words import ADJECTIVES, NOUNS

CODE_WORDS = 20
"""Different words of a text in code."""


@dataclass(frozen=True)
class CommonWords(Task):
    """A list of words, of which a few come more often than all others and are asked for.

    Parameters
    ----------
    words : int
        How many words are asked for, 1 to 10.
    ratio : int
        They come so many times as often as the others, 2 to 100. RULER has 6 below 4,096 tokens, then 10.
    """

    name: ClassVar[str] = "common-words"
    words: int = 2
    ratio: int = 20

    def __post_init__(self) -> None:
        check_setting("words", self.words, 1, 10)
        check_setting("ratio", self.ratio, 2, 100)

    def draft(self, model: TextModel, length: int, random: Random) -> Draft:
        """Draft a prompt of as many words as there is room for."""
        vocabulary = random.sample(NOUNS + ADJECTIVES, len(NOUNS + ADJECTIVES))
        common, others = vocabulary[: self.words], vocabulary[self.words :]
        order = random.random()

        def text(count: int) -> str:
            # The others in turn, the common ones `ratio` times as often as the first of the others.
            words = [others[i % len(others)] for i in range(count)]
            words += common * (self.ratio * (1 + (count - 1) // len(others)))
            Random(order).shuffle(words)
            return ", ".join(words)

        return ask_for_common(self.name, model, length, random, "list of words", common, text)


@dataclass(frozen=True)
class FrequentWords(Task):
    """A text in code, the frequencies of whose words fall as a power of their rank; the first are asked for.

    Parameters
    ----------
    words : int
        How many words are asked for, 1 to 10.
    exponent : float
        A word of rank k comes in proportion to k^-exponent, 1 to 4. RULER has 2, and does not ask for the
        first word.
    """

    name: ClassVar[str] = "frequent-words"
    words: int = 1
    exponent: float = 2.0

    def __post_init__(self) -> None:
        check_setting("words", self.words, 1, 10)
        check_scale(self.exponent, "exponent")
        if not 1 <= self.exponent <= 4:
            raise ArgumentError(f"exponent={self.exponent} is not allowed: it must be a number from 1 to 4.")

    def draft(self, model: TextModel, length: int, random: Random) -> Draft:
        """Words of the code are made of syllables such as "bo" and "ki"."""
        syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
        drawn = random.sample(syllables, 3 * CODE_WORDS)  # no syllable is in two words
        vocabulary = ["".join(drawn[i : i + 3]) for i in range(0, len(drawn), 3)]
        shares = [rank**-self.exponent for rank in range(1, CODE_WORDS + 1)]
        order = random.random()

        def text(count: int) -> str:
            counts = [max(1, int(count * share / sum(shares))) for share in shares]
            words = [word for word, n in zip(vocabulary, counts, strict=True) for _ in range(n)]
            Random(order).shuffle(words)
            return " ".join(words)

        return ask_for_common(
            self.name, model, length, random, "text in code", vocabulary[: self.words], text
        )


def ask_for_common(
    task: str,
    model: TextModel,
    length: int,
    random: Random,
    what: str,
    common: Sequence[str],
    text: Callable[[int], str],
) -> Draft:
    """A prompt of the longest text(count) that fits, after a little documentation, which asks for words."""
    fewest = 4 * len(common)
    documentation = haystack(model, (), random)

    def tokens(size: int) -> Tensor:
        low, high = fewest, size  # no text has fewer tokens than words
        while high - low > 1:
            middle = (low + high) // 2
            fits = len(model.encode("\n" + text(middle))) < size
            low, high = (middle, high) if fits else (low, middle)
        body = model.encode("\n" + text(low))
        return torch.cat((documentation.tokens(size - len(body)), body))

    few = len(common) == 1
    request = Request(
        instruction=f"The following {what} holds some words more often than others.",
        question=f"Which {'word is' if few else f'{len(common)} words are'} the most common?",
        opening=f"The most common {'word is' if few else 'words are'}",
        pieces=quoted(common),
        answers=tuple(common),
        filling=Filling(len(model.encode("\n" + text(fewest))) + 1, tokens),
        spare_tokens=0 if few else 4,
    )
    return fit(task, model, length, request)


def quoted(words: Sequence[str]) -> tuple[tuple[str, bool], ...]:
    """The pieces of a true answer, "one" and "two", of which the words are scored, and the marks are not."""
    pieces: list[tuple[str, bool]] = []
    for number, word in enumerate(words):
        before = "" if number == 0 else " and" if number == len(words) - 1 else ","
        pieces += [(f'{before} "', False), (word, True), ('"', False)]
    return tuple(pieces)
