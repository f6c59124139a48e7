"""`score_methods`: scores of many cache policies on one prompt, which decode side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...cache.policies import CachePolicy, Reads
from ..generation import Decoding, Prefill
from .base import TaskPrompt
from .scoring import TaskScore, decided, make_score, next_tokens, said_by


def score_methods(
    prefill: Prefill,
    prompt: TaskPrompt,
    policies: Sequence[CachePolicy],
    exact: TaskScore | None = None,
) -> list[tuple[TaskScore, Reads]]:
    """The score of each policy on a prompt, as `score_prompt` has it, and what it reads of the true answer.

    All policies decode in one batch, so that the weights of the model are read once a token.

    Parameters
    ----------
    prefill : Prefill
        Of the prompt.
    prompt : TaskPrompt
        Its target has two tokens or more.
    policies : sequence of CachePolicy
    exact : TaskScore, optional
        As for `score_prompt`.
    """
    model = prefill.model
    state = Decoding.side_by_side(prefill, policies)
    rows = [state.logits]
    for token in prompt.target[:-1].to(prefill.logits.device):
        rows.append(state.step(token.expand(len(policies))))
    predicted = torch.stack(rows, 1).float().log_softmax(-1).cpu()  # [M, T, V]
    reads = state.reads_by_sequence
    answers = [said_by(model, prompt, x) for x in predicted]
    undecided = [i for i, tokens in enumerate(answers) if tokens is None]
    if undecided:
        state = Decoding.side_by_side(prefill, [policies[i] for i in undecided])
        for i, tokens in zip(undecided, _generate(state, prompt), strict=True):
            answers[i] = tokens
    return [
        (make_score(model, prompt, x, tokens, exact), read)
        for x, tokens, read in zip(predicted, answers, reads, strict=True)
        if tokens is not None
    ]


def _generate(state: Decoding, prompt: TaskPrompt) -> list[Tensor]:
    """The likeliest tokens of each sequence, up to where it is decided which answers they hold."""
    likeliest = next_tokens(prompt, 0, state.logits)
    answers, place = [[int(token)] for token in likeliest], 0
    while True:
        open_ends = [i for i, x in enumerate(answers) if not decided(state.model, prompt, torch.tensor(x))]
        if not open_ends:
            return [torch.tensor(x) for x in answers]
        place += 1
        logits = state.step(likeliest)  # sequences that are decided go on, unseen
        likeliest = next_tokens(prompt, place, logits)
        for i in open_ends:
            answers[i].append(int(likeliest[i]))
