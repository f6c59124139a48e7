"""Keys drawn from rows of logits, exact or guessed, as the factors that a `KeyChoice` weighs keys by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...estimates import Draws
from ...samplers import HeadTailSampler, InversionSampler
from ...samplers.value_order import FIRST_VALUES, ValueOrder
from .chosen_keys import DecodeStep

DEFENSIVE = 0.02
"""Weight of the uniform part of a proposal, so that no key that is guessed too low weighs too much."""


def key_factors(draws: Draws, num_keys: int) -> Tensor:
    """c_j / E[c_j] of every key, (..., num_keys), c_j how often it was drawn; 0 where it was not.

    The draws know the probabilities that they were drawn with.
    """
    assert draws.probabilities is not None  # these samplers know p
    drawn = draws.weights > 0
    factors = torch.where(drawn, draws.weights / draws.probabilities.masked_fill(~drawn, 1), 0)
    return factors.new_zeros(*factors.shape[:-1], num_keys).scatter_add_(-1, draws.indices, factors)


def proposed_logits(guesses: Tensor, defensive: float = DEFENSIVE) -> Tensor:
    """Logarithms of q_j = (1 - epsilon) softmax_j(guesses) + epsilon / n, of rows (..., n)."""
    uniform = math.log(defensive / guesses.shape[-1])
    return torch.logaddexp(
        guesses.log_softmax(-1) + math.log1p(-defensive), torch.full_like(guesses, uniform)
    )


class KeyDrawer:
    """Draws keys by an `InversionSampler`, along the order of the values, which grows with the tokens.

    Parameters
    ----------
    sampler : InversionSampler, optional
        `HeadTailSampler` where None.
    """

    def __init__(self, sampler: InversionSampler | None = None):
        self.sampler = HeadTailSampler() if sampler is None else sampler
        self._order: ValueOrder | None = None
        self._order_keys = torch.empty(0, 0, dtype=torch.int64)

    def factors(self, logits: Tensor, draws: int, step: DecodeStep) -> Tensor:
        """The factors of the keys (N, M, n) that rows of logits (N, M, n) draw, M of the step's rows."""
        points = self.sampler.checked_points(step.stream[:, : logits.shape[1]], draws, 1)
        if not self.sampler.ordered or step.length < FIRST_VALUES:
            return key_factors(self.sampler.place(logits, points), step.length)
        order = self._extended_order(step.values.to(logits.dtype))
        in_order = logits.gather(-1, order[:, None].expand_as(logits))
        drawn = self.sampler.place_in_order(in_order, order, points, step.length)
        return key_factors(drawn, step.length)

    def _extended_order(self, values: Tensor) -> Tensor:
        """The order of values (N, n, Ev), int64, (N, n): an order key does not change as tokens come."""
        if self._order is None:
            self._order = ValueOrder.fit(values)
            self._order_keys = self._order.keys(values)
        known = self._order_keys.shape[1]
        if known < values.shape[1]:
            self._order_keys = torch.cat((self._order_keys, self._order.keys(values[:, known:])), 1)
        return self._order_keys.argsort(dim=-1, stable=True)
