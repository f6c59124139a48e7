"""Copying: a list of words that stands in documentation among others is begun again, and is to go on."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from .base import Draft, Request, Task, TextModel, check_setting, fit, listed
from .haystack import haystack
from .words import NOUNS


@dataclass(frozen=True)
class Copying(Task):
    """Lists of random words hidden in documentation, one of which is begun again at the end.

    The model continues plain text: what is measured is whether it goes on as the list did (an induction
    head's task; Olsson et al., In-context learning and induction heads, 2022).

    Parameters
    ----------
    lists : int
        1 to 16.
    words : int
        Of a list, `copied` + 2 to 32. No list has a word twice, two lists may share words.
    copied : int
        The words that are to follow those given, 1 to 16.
    """

    name: ClassVar[str] = "copying"
    lists: int = 4
    words: int = 12
    copied: int = 4

    def __post_init__(self) -> None:
        check_setting("lists", self.lists, 1, 16)
        check_setting("copied", self.copied, 1, 16)
        check_setting("words", self.words, self.copied + 2, 32)

    def draft(self, model: TextModel, length: int, random: Random) -> Draft:
        """At least two words of the list are given again; the next `copied` are the answers."""
        lists = [random.sample(NOUNS, self.words) for _ in range(self.lists)]
        repeated = random.randrange(self.lists)
        shown = random.randint(2, self.words - self.copied)
        answers = tuple(lists[repeated][shown : shown + self.copied])
        hidden = [f"List {i}: {', '.join(words)}." for i, words in enumerate(lists, 1)]
        request = Request(
            instruction="The following text holds lists of words.",
            question=f"Once more, list {repeated + 1}: {', '.join(lists[repeated][:shown])}",
            opening="",
            pieces=((",", False), *listed(answers, last=",")),
            answers=answers,
            filling=haystack(model, hidden, random),
            chat=False,
        )
        return fit(self.name, model, length, request)
