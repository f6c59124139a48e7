"""Needles in a haystack: numbers hidden in documentation, of which one or several are asked for.

Source: Hsieh et al., RULER: What's the real context size of your long-context language models? (2024), §3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from .base import Draft, Request, Task, TextModel, check_setting, fit, listed
from .haystack import haystack
from .words import ADJECTIVES, NOUNS

MAX_KEYS = min(len(NOUNS), len(ADJECTIVES))
"""So many keys have no word in common."""
MAX_DIGITS = 15
"""The most digits of a hidden number."""


@dataclass(frozen=True)
class SingleNeedle(Task):
    """One hidden number, which is asked for.

    Parameters
    ----------
    digits : int
        Of the number, 1 to 15.
    """

    name: ClassVar[str] = "single-needle"
    digits: int = 7

    def __post_init__(self) -> None:
        check_setting("digits", self.digits, 1, MAX_DIGITS)

    def draft(self, model: TextModel, length: int, random: Random) -> Draft:
        """One key, one number."""
        values = hidden_numbers(1, 1, self.digits, random)
        return ask(self.name, model, length, random, values, list(values))


@dataclass(frozen=True)
class ManyKeys(Task):
    """A number hidden for each of several keys; that of one key is asked for.

    Parameters
    ----------
    keys : int
        1 to 98. The more keys there are, the more resemble the one that is asked for.
    digits : int
        Of a number, 2 to 15.
    """

    name: ClassVar[str] = "many-keys"
    keys: int = 8
    digits: int = 7

    def __post_init__(self) -> None:
        check_setting("keys", self.keys, 1, MAX_KEYS)
        check_setting("digits", self.digits, 2, MAX_DIGITS)

    def draft(self, model: TextModel, length: int, random: Random) -> Draft:
        """The first key is asked for; the order in the text is random."""
        values = hidden_numbers(self.keys, 1, self.digits, random)
        return ask(self.name, model, length, random, values, list(values)[:1])


@dataclass(frozen=True)
class ManyValues(Task):
    """Several numbers hidden for one key, all of which are asked for.

    Parameters
    ----------
    values : int
        1 to 8.
    digits : int
        Of a number, 2 to 15.
    """

    name: ClassVar[str] = "many-values"
    values: int = 2
    digits: int = 4

    def __post_init__(self) -> None:
        check_setting("values", self.values, 1, 8)
        check_setting("digits", self.digits, 2, MAX_DIGITS)

    def draft(self, model: TextModel, length: int, random: Random) -> Draft:
        """One key, several numbers; the true answer has them in the order of the text."""
        values = hidden_numbers(1, self.values, self.digits, random)
        return ask(self.name, model, length, random, values, list(values))


@dataclass(frozen=True)
class ManyQueries(Task):
    """A number hidden for each of several keys; those of some keys are asked for at once.

    Parameters
    ----------
    queries : int
        1 to 8.
    keys : int
        `queries` to 98.
    digits : int
        Of a number, 2 to 15.
    """

    name: ClassVar[str] = "many-queries"
    queries: int = 2
    keys: int = 4
    digits: int = 4

    def __post_init__(self) -> None:
        check_setting("queries", self.queries, 1, 8)
        check_setting("keys", self.keys, self.queries, MAX_KEYS)
        check_setting("digits", self.digits, 2, MAX_DIGITS)

    def draft(self, model: TextModel, length: int, random: Random) -> Draft:
        """The first keys are asked for; the true answer has their numbers in the order of the question."""
        values = hidden_numbers(self.keys, 1, self.digits, random)
        return ask(self.name, model, length, random, values, list(values)[: self.queries])


def hidden_numbers(keys: int, values: int, digits: int, random: Random) -> dict[str, list[str]]:
    """Numbers by key, such as "quiet lamp"; no word is in two keys and no number comes twice."""
    pairs = zip(random.sample(ADJECTIVES, keys), random.sample(NOUNS, keys), strict=True)
    numbers = iter(random.sample(range(10 ** (digits - 1), 10**digits), keys * values))
    return {" ".join(pair): [str(next(numbers)) for _ in range(values)] for pair in pairs}


def ask(
    task: str, model: TextModel, length: int, random: Random, values: dict[str, list[str]], asked: list[str]
) -> Draft:
    """A prompt that hides all numbers in documentation and asks for those of the `asked` keys."""
    hidden = [(key, value) for key, numbers in values.items() for value in numbers]
    random.shuffle(hidden)
    answers = tuple(value for name in asked for key, value in hidden if key == name)
    them, numbers = ("it", "a secret number") if len(hidden) == 1 else ("them", "secret numbers")
    keys = " and ".join(f"the {name}" for name in asked)
    verb, number = ("is", "number") if len(answers) == 1 else ("are", "numbers")
    request = Request(
        instruction=f"The following text hides {numbers}. Remember {them}.",
        question=f"What {verb} the secret {number} of {keys}?",
        opening=f"The secret {number} of {keys} {verb}",
        pieces=listed(answers),
        answers=answers,
        filling=haystack(model, [f"The secret number of the {k} is {v}." for k, v in hidden], random),
        spare_tokens=0 if len(answers) == 1 else 2,
    )
    return fit(task, model, length, request)
