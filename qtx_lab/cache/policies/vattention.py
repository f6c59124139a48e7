"""`VAttentionPolicy`: vAttention's tail of uniform draws, as many as an (epsilon, delta) promise takes."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_number
from ...errors import unknown_name
from .base import CachePolicy, LayerCache, LayerPrompt
from .chosen_keys import ChosenKeysCache, DecodeStep, KeyChoice
from .guessed_keys import ExactGuesser, KeptEnds, LogitGuesser
from .product_codes import ProductCodes
from .sampled import SketchGuesser, build_cache

HEAVY_BY = ("exact", "pq", "low-rank", "int4")
"""The ways in which the heaviest keys are found."""

PQ_PARTS, PQ_BITS, PQ_ROUNDS = 2, 6, 10
"""Parts, bits and rounds of the product codes, as PQCache has them."""


@dataclass(frozen=True, kw_only=True)
class VAttentionPolicy(CachePolicy):
    """Reads the first, the newest and the heaviest keys, and a uniform sample of the others.

    A key of the sample counts m / b times, b of m others being drawn without replacement. Without `epsilon`,
    b is what the budget leaves. With it, that many draws are a base sample, by which the standard deviation
    sigma of the others' exp(l_j) and the denominator D are estimated, and b grows, row by row, to

        (z_(1 - delta) m sigma / (epsilon D))²,

    so that D is off by more than a share of epsilon with a probability of about delta on either side.

    Source: Desai and others, vAttention: verified sparse attention (2510.05688), algorithms 1 and 2, with the
    quantile of the released code (skylight-org/sparse-attention-hub). That draws with replacement and the
    base sample apart, both of which read more for the same error.

    Parameters
    ----------
    budget, seed
        As in `CachePolicy`; with `epsilon` it is the least that is read.
    sinks : int
        The first tokens.
    recent, heavy : float
        Shares of the budget for the newest and for the heaviest keys, at most 1 together.
    epsilon : float, optional
        Relative error of the denominator, above 0.
    delta : float
        Probability of a larger one, on one side; above 0 and below 1/2.
    heavy_by : {"exact", "pq", "low-rank", "int4"}
        What tells the heaviest keys: their exact logits, PQCache's codes, or a sketch of the lab.
    """

    name: ClassVar[str] = "vattention"
    sinks: int = 4
    recent: float = 0.1
    heavy: float = 0.5
    epsilon: float | None = None
    delta: float = 0.1
    heavy_by: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = KeptEnds(self.sinks, self.recent)  # refuses what is not allowed
        self.store(
            sinks=ends.sinks,
            recent=ends.recent,
            heavy=check_number("heavy", self.heavy, least=0, most=1 - ends.recent),
            delta=check_number("delta", self.delta, above=0, below=0.5),
        )
        if self.epsilon is not None:
            self.store(epsilon=check_number("epsilon", self.epsilon, above=0))
        if self.heavy_by not in HEAVY_BY:
            raise unknown_name("heavy_by", self.heavy_by, HEAVY_BY)

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        promise = "" if self.epsilon is None else f" ({self.epsilon:g}, {self.delta:g})"
        return f"vAttention{promise}, heavy by {self.heavy_by}"

    def make_cache(self, prompt: LayerPrompt) -> LayerCache:
        """The cache of a layer: see `CachePolicy.make_cache`."""
        seed = self.layer_seed(prompt.layer)
        guesser: LogitGuesser
        if self.heavy_by == "exact":
            guesser = ExactGuesser()
        elif self.heavy_by == "pq":
            guesser = ProductCodes(prompt, PQ_PARTS, PQ_BITS, PQ_ROUNDS, seed)
        else:
            guesser = SketchGuesser(build_cache(prompt, self.heavy_by, None), prompt.batch)
        return ChosenKeysCache(prompt, _HeavyAndUniform(self, guesser), seed)


class _HeavyAndUniform:
    def __init__(self, policy: VAttentionPolicy, guesser: LogitGuesser):
        self.policy, self.guesser = policy, guesser
        self.ends = KeptEnds(policy.sinks, policy.recent)

    def choose(self, step: DecodeStep) -> KeyChoice:
        budget = self.policy.budget_at(step.length)
        guesses = self.guesser.guess(step)
        ends = self.ends.mask(step.length, budget, step.keys.device)
        left = budget - int(ends.sum())
        heavy = min(left, round(self.policy.heavy * budget))
        certain = ends.expand(guesses.logits.shape)
        heaviest = guesses.logits.masked_fill(certain, -torch.inf).topk(heavy, -1).indices
        certain = certain.scatter(-1, heaviest, True)

        # The others in random order, from 0 on: the first of them are drawn.
        turn = step.stream.uniform(1, step.length)[:, :, 0].masked_fill(certain, 2)
        turn = turn.argsort(-1).argsort(-1)
        others = step.length - budget + left - heavy
        draws: Tensor | int = left - heavy
        if self.policy.epsilon is not None:
            draws = self._needed_draws(step.logits, certain, turn, left - heavy, others)
        drawn = ~certain & (turn < draws)
        share = others / torch.as_tensor(draws, device=turn.device).clamp_min(1).to(step.logits.dtype)
        factors = torch.where(certain, 1, torch.where(drawn, share, 0).to(step.logits.dtype))
        return KeyChoice(factors, all_keys_read=guesses.all_keys_read, other_bytes=guesses.nbytes)

    def _needed_draws(self, logits: Tensor, certain: Tensor, turn: Tensor, base: int, others: int) -> Tensor:
        """Draws of each row, (N, G, 1), by the first `base` of them, or two."""
        base = min(max(base, 2), others)
        first = ~certain & (turn < base)
        read = certain | first
        mass = (logits - logits.masked_fill(~read, -torch.inf).amax(-1, keepdim=True)).exp()
        sample = mass * first
        mean = sample.sum(-1, keepdim=True) / max(base, 1)
        variance = ((mass - mean).square() * first).sum(-1, keepdim=True) / max(base - 1, 1)
        total = (mass * certain).sum(-1, keepdim=True) + others * mean
        assert self.policy.epsilon is not None
        spread = NormalDist().inv_cdf(1 - self.policy.delta) * others * variance.sqrt()
        needed = (spread / (self.policy.epsilon * total)).square()
        return needed.ceil().clamp(base, max(others, base)).long()
