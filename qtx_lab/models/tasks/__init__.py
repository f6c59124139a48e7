"""Tasks that measure a language model, made from seeds: needles, variables, lists, copying, long text."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ...errors import ArgumentError, unknown_name
from .base import Task, TaskPrompt, TextModel
from .copying import Copying
from .counting import CommonWords, FrequentWords
from .long_text import LongText
from .needles import ManyKeys, ManyQueries, ManyValues, SingleNeedle
from .recall import Recall
from .variables import VariableTracking

TASKS: dict[str, type[Task]] = {
    kind.name: kind
    for kind in (
        SingleNeedle,
        ManyKeys,
        ManyValues,
        ManyQueries,
        VariableTracking,
        CommonWords,
        FrequentWords,
        Copying,
        Recall,
        LongText,
    )
}
"""The kinds of task by name."""


def make_task(
    task: str, model: TextModel, *, length: int = 2048, seed: int = 0, **settings: Any
) -> TaskPrompt:
    """One prompt of a task, for a model's tokenizer.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    model : TextModel
        As `load_language_model` gives it.
    length : int
        Tokens of the prompt and of the longest answer together.
    seed : int
        Which of the prompts of this kind, a whole number >= 0.
    **settings
        What makes the task easier or harder, as the parameters of its class say: `TASKS["many-keys"]` has
        `keys` and `digits`.

    Raises
    ------
    ArgumentError
        If the task, a setting or the length is not allowed.

    Examples
    --------
    >>> from qtx_lab.models.reference import load_reference_model
    >>> model = load_reference_model()  # its tokens are bytes
    >>> prompt = make_task("many-keys", model, length=800, keys=3, seed=1)
    >>> len(prompt.tokens) + prompt.answer_tokens
    800
    >>> model.decode(prompt.tokens[-38:]), prompt.answers
    ('The secret number of the huge chest is', ('1564305',))
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    kind = TASKS[task]
    known = [field.name for field in fields(kind)]
    for setting in settings:
        if setting not in known:
            raise ArgumentError(
                f"{setting}={settings[setting]!r} is no setting of the task {task!r}; it has "
                f"{', '.join(known)}."
            )
    return kind(**settings).prompt(model, length, seed)
