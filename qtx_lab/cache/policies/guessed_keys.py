"""`GuessedKeys`: keys that are chosen by guessed logits, the likeliest of them or draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...checks import check_count, check_number
from .base import CachePolicy
from .chosen_keys import DecodeStep, KeyChoice
from .draws import KeyDrawer, proposed_logits


@dataclass(frozen=True, eq=False)
class Guesses:
    """Guessed logits of one step.

    Parameters
    ----------
    logits : Tensor, (N, G, n)
        Up to a shift of each row.
    nbytes : float
        What was read to make them, by all key heads together.
    all_keys_read : bool
        Whether they are exact, made from all keys.
    """

    logits: Tensor
    nbytes: float
    all_keys_read: bool = False


class LogitGuesser(Protocol):
    """What guesses at logits by less than the keys. It catches up with the tokens of a step itself."""

    def guess(self, step: DecodeStep) -> Guesses:
        """Guessed logits of all keys."""


class ExactGuesser:
    """The logits themselves: what every guess aims at."""

    def guess(self, step: DecodeStep) -> Guesses:
        """The logits of all keys: see `LogitGuesser.guess`."""
        return Guesses(step.logits, 0.0, all_keys_read=True)


@dataclass(frozen=True)
class KeptEnds:
    """The first and the newest tokens, which a method reads whatever it guesses.

    Parameters
    ----------
    sinks : int
        The first tokens.
    recent : float
        The share of the budget that the newest tokens take.
    """

    sinks: int = 0
    recent: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sinks", check_count("sinks", self.sinks, 0))
        object.__setattr__(self, "recent", check_number("recent", self.recent, least=0, most=1))

    def mask(self, length: int, budget: int, device: torch.device) -> Tensor:
        """Which of so many tokens are kept, bool, (length,): the newest first, within the budget."""
        recent = min(budget, max(1, round(self.recent * budget))) if self.recent else 0
        sinks = min(self.sinks, budget - recent)
        place = torch.arange(length, device=device)
        return (place < sinks) | (place >= length - recent)


class GuessedKeys:
    """Chooses the keys of largest guessed logit, or draws keys by the guesses.

    Drawn keys are weighed by their exact logits and the inverse of how often each is drawn on average, as
    `SampledKVCache` does: the estimate is consistent whatever the guesses are. Of keys that are cut off
    nothing is known.

    Parameters
    ----------
    policy : CachePolicy
        Whose budget it is.
    guesser : LogitGuesser
    draw : bool
        Whether keys are drawn.
    ends : KeptEnds
        Tokens that are read in any case; they are part of the budget.
    shared : bool
        Whether the query heads of a key head read the same keys: those of the largest mean probability, or
        draws by the root mean square of their proposals, by which the mean square of the heads' errors is
        smallest.
    """

    def __init__(
        self,
        policy: CachePolicy,
        guesser: LogitGuesser,
        draw: bool,
        ends: KeptEnds | None = None,
        shared: bool = False,
    ):
        self.policy, self.guesser = policy, guesser
        self.ends, self.shared = KeptEnds() if ends is None else ends, shared
        self._drawer = KeyDrawer() if draw else None

    def choose(self, step: DecodeStep) -> KeyChoice:
        """The keys that are read: see `KeyChooser.choose`."""
        budget = self.policy.budget_at(step.length)
        ends = self.ends.mask(step.length, budget, step.keys.device)
        guesses = self.guesser.guess(step)
        left = budget - int(ends.sum())
        factors = ends.to(guesses.logits.dtype).expand(guesses.logits.shape).clone()
        if left:
            others = guesses.logits.masked_fill(ends, -torch.inf)
            factors += (
                self._drawn(others, left, step) if self._drawer is not None else self._top(others, left)
            )
        return KeyChoice(factors, all_keys_read=guesses.all_keys_read, other_bytes=guesses.nbytes)

    def _top(self, logits: Tensor, count: int) -> Tensor:
        if self.shared:
            logits = logits.softmax(-1).mean(1, keepdim=True).expand(logits.shape)
        return torch.zeros_like(logits).scatter_(-1, logits.topk(count, -1).indices, 1)

    def _drawn(self, logits: Tensor, count: int, step: DecodeStep) -> Tensor:
        assert self._drawer is not None
        proposed = proposed_logits(logits)
        if self.shared:
            proposed = (2 * proposed).logsumexp(1, keepdim=True) / 2
        hidden = logits[:, : proposed.shape[1]] == -torch.inf  # the kept ends, the same in all rows
        return self._drawer.factors(proposed.masked_fill(hidden, -torch.inf), count, step)
