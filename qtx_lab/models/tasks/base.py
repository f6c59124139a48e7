"""What a task is: from a seed, a `Task` makes a `TaskPrompt` of exactly the length that was asked for."""

from __future__ import annotations

import hashlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ...checks import check_count
from ...errors import ArgumentError, quoted

CONTEXT_MARK = "\n[[context]]\n"
"""Stands in a request for the text that fills the prompt, until it is known how many tokens that may have."""


@dataclass(frozen=True)
class Filling:
    """What stands between the instruction and the question.

    Attributes
    ----------
    minimum : int
        The fewest tokens that hold what is asked for.
    tokens : callable
        `tokens(count)`: exactly `count` tokens, int64, count >= minimum.
    """

    minimum: int
    tokens: Callable[[int], Tensor]


class ContextSize(Protocol):
    """The size of a model that a prompt has to fit."""

    @property
    def context(self) -> int:
        """Length in tokens of the longest text that the model reads."""


class TextModel(Protocol):
    """What tasks ask of a `LanguageModel`: how it writes text as tokens, and how it is spoken to."""

    @property
    def config(self) -> ContextSize:
        """The sizes of the model."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens at which a generated text ends."""

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, int64, (number of tokens,), without added ones."""

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens, int64, (number of tokens,)."""

    def chat(self, message: str) -> str:
        """The text by which the model is asked to answer a message."""


@dataclass(frozen=True, eq=False)
class TaskPrompt:
    """One prompt of a task: what the model reads, what it should answer and what is scored.

    Attributes
    ----------
    task : str
        The name of the task.
    length : int
        Tokens of the prompt and of the longest answer together; the model's context holds them.
    seed : int
    settings : Mapping
        The settings of the task by name, which make it easier or harder.
    tokens : Tensor, int64, (L,)
        The prompt: L + `answer_tokens` is exactly `length`.
    answers : tuple of str
        The generated text should hold each of them, in any order. Empty where nothing is asked, as for long
        text.
    target : Tensor, int64, (T,)
        The true answer, as it follows the prompt. Its first token depends on the prompt alone, which every
        method attends to exactly: methods differ from the second on, where what is asked for begins.
    scored : Tensor, bool, (T,)
        Which tokens of the target are scored. The others separate answers, or begin the answer.
    answer_tokens : int
        The most tokens that are generated: T, and a few more where an answer may be written in several ways.
    """

    task: str
    length: int
    seed: int
    settings: Mapping[str, Any]
    tokens: Tensor
    answers: tuple[str, ...]
    target: Tensor
    scored: Tensor
    answer_tokens: int

    @property
    def given_tokens(self) -> int:
        """The tokens of the target before the first scored one: they are given, and answers go on."""
        return int(self.scored.long().argmax())

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the tokens, by which two machines compare their prompts."""
        numbers = torch.cat((self.tokens, torch.tensor([-1]), self.target))
        return hashlib.sha256(numbers.numpy().astype("<i8").tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Request:
    """What a task asks, in words, before it is fitted to a length.

    Attributes
    ----------
    instruction, question : str
        The text before and after what fills the prompt.
    opening : str
        How the model's answer begins. It belongs to the prompt, so that the answer itself follows at once.
    pieces : tuple of (str, bool)
        The true answer, cut where scored text meets text that is not; True where scored.
    answers : tuple of str
    filling : Filling
    chat : bool
        Whether it is given as a message of a chat. Otherwise the model continues a plain text.
    spare_tokens : int
        By so many tokens a generated answer may be longer than the true one.
    """

    instruction: str
    question: str
    opening: str
    pieces: tuple[tuple[str, bool], ...]
    answers: tuple[str, ...]
    filling: Filling
    chat: bool = True
    spare_tokens: int = 0


@dataclass(frozen=True)
class Draft:
    """The tokens of a prompt and of its answer: fields of a `TaskPrompt` that depend on the seed."""

    tokens: Tensor
    answers: tuple[str, ...]
    target: Tensor
    scored: Tensor
    answer_tokens: int


@dataclass(frozen=True)
class Task(ABC):
    """A kind of prompt; the fields of a subclass are its settings. Their defaults were set by measurement.

    Raises
    ------
    ArgumentError
        If a setting is not allowed.
    """

    name: ClassVar[str]

    @abstractmethod
    def draft(self, model: TextModel, length: int, random: Random) -> Draft:
        """The tokens of one prompt: L + `answer_tokens` is exactly `length`."""

    def prompt(self, model: TextModel, length: int = 2048, seed: int = 0) -> TaskPrompt:
        """One prompt for a model; the same seed gives the same prompt.

        Parameters
        ----------
        model : TextModel
            As `load_language_model` gives it. Only its tokenizer and the size of its context are used.
        length : int
            Tokens of the prompt and of the longest answer together.
        seed : int
            A whole number >= 0: which of the prompts of this kind.

        Raises
        ------
        ArgumentError
            If the length is too short for the task, or longer than the model's context.
        """
        check_count("length", length)
        length = operator.index(length)
        if length > model.config.context:
            raise ArgumentError(
                f"length={length} is longer than the model's context of {model.config.context} tokens."
            )
        seed = check_setting("seed", seed, 0, (1 << 63) - 1)
        draft = self.draft(model, length, Random(f"{self.name} {seed}"))
        return TaskPrompt(
            task=self.name,
            length=length,
            seed=seed,
            settings=asdict(self),
            tokens=draft.tokens,
            answers=draft.answers,
            target=draft.target,
            scored=draft.scored,
            answer_tokens=draft.answer_tokens,
        )


def check_setting(argument: str, given: Any, low: int, high: int) -> int:
    """The whole number from low to high that was given.

    Raises
    ------
    ArgumentError
        If it is none.
    """
    try:
        number = low - 1 if isinstance(given, bool | Tensor) else operator.index(given)
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        raise ArgumentError(
            f"{argument}={quoted(given)} is not allowed: it must be a whole number from {low} to {high}."
        )
    return number


def fit(name: str, model: TextModel, length: int, request: Request) -> Draft:
    """The tokens of a request whose filling makes it exactly as long as asked.

    The parts are encoded apart and meet at line ends, where tokenizers do not merge.

    Raises
    ------
    ArgumentError
        If it is too short for the request.
    """
    message = request.instruction + CONTEXT_MARK + request.question
    text = (model.chat(message) if request.chat else message) + request.opening
    before, after = text.split(CONTEXT_MARK)
    head, tail = model.encode(before + "\n"), model.encode("\n" + after)
    pieces = [model.encode(piece) for piece, _ in request.pieces]
    scored = [
        torch.full((len(x),), is_scored) for x, (_, is_scored) in zip(pieces, request.pieces, strict=True)
    ]
    target = torch.cat(pieces)
    answer_tokens = len(target) + request.spare_tokens
    count = length - len(head) - len(tail) - answer_tokens
    minimum = length - count + request.filling.minimum
    if length < minimum:
        raise ArgumentError(
            f"length={length} is too short for the task {name!r} with these settings: it must be {minimum} "
            "or more."
        )
    body = request.filling.tokens(count)
    return Draft(torch.cat((head, body, tail)), request.answers, target, torch.cat(scored), answer_tokens)


def listed(answers: tuple[str, ...], last: str = " and") -> tuple[tuple[str, bool], ...]:
    """The pieces of a true answer, "one, two and three", of which the words or numbers are scored.

    `last` stands before the last of them.
    """
    separators = [""] + [","] * (len(answers) - 2) + [last]
    pairs = [((before, False), (f" {x}", True)) for before, x in zip(separators, answers, strict=False)]
    return tuple(piece for pair in pairs for piece in pair)[1:]
