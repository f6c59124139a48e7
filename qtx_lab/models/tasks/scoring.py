"""Scores of one method on one prompt: the log-probability of the true answer, and what the model says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ...errors import ArgumentError
from .base import TaskPrompt, TextModel


class Decoder(Protocol):
    """A model that has read a prompt, and goes on token by token by some method."""

    @property
    def logits(self) -> Tensor:
        """Logits (1, vocab_size) of the next token."""

    def step(self, token: Tensor) -> Tensor:
        """Add a token, int64, (1,); the logits (1, vocab_size) of the next."""


@dataclass(frozen=True, eq=False)
class TaskScore:
    """How a method did on one prompt.

    Attributes
    ----------
    log_probability : float
        Of the scored tokens of the true answer, each after the true tokens before it: nats, their sum.
    tokens : int
        The number of scored tokens.
    matched : float or None
        The share of the answers that the generated text holds, 0 to 1, in capitals or not (RULER's string
        match). None where nothing is asked, as for long text.
    generated : str
        The text of the likeliest tokens, up to where `matched` is decided.
    divergence : float or None
        KL(exact || method) of the next token, nats, the mean over the scored tokens. None where no exact
        score was given.
    agreement : float or None
        The share of the scored tokens before which exact attention and the method find the same token
        likeliest. None as above.
    log_probabilities : Tensor, float32, (T, vocab_size)
        Of the token at each place of the target, to compare other methods with.
    """

    log_probability: float
    tokens: int
    matched: float | None
    generated: str
    divergence: float | None
    agreement: float | None
    log_probabilities: Tensor = field(repr=False)


def score_prompt(
    model: TextModel,
    prompt: TaskPrompt,
    start: Callable[[], Decoder],
    exact: TaskScore | None = None,
) -> TaskScore:
    """Score a method on a prompt by the true answer and, where that does not decide it, by generation.

    The method first reads the true answer. If the likeliest token is the true one all along, the model says
    the true answer. If it is another, and the answer could still be given in another order or later, the
    method starts again and generates up to `prompt.answer_tokens` tokens, of which the first may be given. It
    stops at a line's end, at the model's stop token, or when the match is decided.

    Parameters
    ----------
    model : TextModel
    prompt : TaskPrompt
    start : callable
        `start()` gives the method's decoder after the prompt. It is called once or twice, and should draw the
        same keys each time.
    exact : TaskScore, optional
        The score of exact attention on the same prompt, which `divergence` and `agreement` compare with.

    Raises
    ------
    ArgumentError
        If `exact` is the score of a prompt with another answer.
    """
    shape = (len(prompt.target), exact.log_probabilities.shape[1]) if exact else None
    if exact and exact.log_probabilities.shape != shape:
        raise ArgumentError(
            f"exact is the score of an answer of {len(exact.log_probabilities)} tokens; that of the prompt "
            f"has {len(prompt.target)}."
        )
    predicted = read_target(start(), prompt.target)  # [T, V]
    tokens = said_by(model, prompt, predicted)
    if tokens is None:
        tokens = generate_answer(model, prompt, start())
    return make_score(model, prompt, predicted, tokens, exact)


def make_score(
    model: TextModel, prompt: TaskPrompt, predicted: Tensor, tokens: Tensor, exact: TaskScore | None
) -> TaskScore:
    """The score of log-probabilities (T, V) at the places of the target, and of the tokens that were said."""
    scored = prompt.scored
    likeliest = predicted.argmax(-1)
    true = predicted.gather(1, prompt.target[:, None])[:, 0]
    divergence = agreement = None
    if exact:
        reference = exact.log_probabilities[scored].double()
        gap = reference.exp() * (reference - predicted[scored].double())
        divergence = gap.sum(-1).mean().item()
        agreement = (reference.argmax(-1) == likeliest[scored]).double().mean().item()
    generated = model.decode(tokens) if prompt.answers else ""
    return TaskScore(
        log_probability=true[scored].double().sum().item(),
        tokens=int(scored.sum()),
        matched=share_matched(prompt.answers, generated) if prompt.answers else None,
        generated=generated,
        divergence=divergence,
        agreement=agreement,
        log_probabilities=predicted,
    )


def said_by(model: TextModel, prompt: TaskPrompt, predicted: Tensor) -> Tensor | None:
    """The likeliest tokens (L,) of a method that read the true answer, as far as it would have said it.

    None if these do not decide which answers it gives.
    """
    likeliest = torch.cat([next_tokens(prompt, i, x[None]) for i, x in enumerate(predicted)])
    agreed = (likeliest == prompt.target).long().cumprod(0).sum()
    tokens = likeliest[: agreed + 1]
    return tokens if not prompt.answers or decided(model, prompt, tokens) else None


def read_target(decoder: Decoder, target: Tensor) -> Tensor:
    """Log-probabilities (T, vocab_size) of the token at each place of the target, after the true ones."""
    rows = [decoder.logits[0]]
    for token in target[:-1].to(rows[0].device):
        rows.append(decoder.step(token[None])[0])
    return torch.stack(rows).float().log_softmax(-1).cpu()


def generate_answer(model: TextModel, prompt: TaskPrompt, decoder: Decoder) -> Tensor:
    """The likeliest tokens (L,), up to where it is decided which answers they hold."""
    tokens = next_tokens(prompt, 0, decoder.logits)
    while not decided(model, prompt, tokens.cpu()):
        tokens = torch.cat((tokens, next_tokens(prompt, len(tokens), decoder.step(tokens[-1:]))))
    return tokens.cpu()


def next_tokens(prompt: TaskPrompt, place: int, logits: Tensor) -> Tensor:
    """What methods say (M,) at a place of the answer by their logits (M, V), or the token that is given."""
    if place < prompt.given_tokens:
        return prompt.target[place].to(logits.device).expand(len(logits))
    return logits.argmax(-1)


def share_matched(answers: tuple[str, ...], text: str) -> float:
    """The share of the answers that a text holds, in capitals or not."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def decided(model: TextModel, prompt: TaskPrompt, tokens: Tensor) -> bool:
    """Whether no further token can change which answers the tokens said so far hold."""
    left = prompt.answer_tokens - len(tokens)
    text = model.decode(tokens)
    if left <= 0 or "\n" in text or int(tokens[-1]) in model.stop_tokens:
        return True
    missing = [answer for answer in prompt.answers if answer.lower() not in text.lower()]
    return all(_fewest_tokens(model, answer, text) > left for answer in missing)


def _fewest_tokens(model: TextModel, answer: str, text: str) -> int:
    """The fewest tokens by which a text that lacks an answer could come to hold it."""
    ends = (answer[i:] for i in range(len(answer)) if text.lower().endswith(answer[:i].lower()))
    return min(len(model.encode(end)) for end in ends)
