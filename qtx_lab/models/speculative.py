"""Lossless generation: sampled attention drafts tokens, and one exact pass accepts or replaces them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..cache import SampledKVCache
from ..cache.exact_pass import TILE_ROWS
from ..cache.policies.base import HALF_BYTES
from ..cache.policies.sampled import FITTED_QUERIES
from ..checks import MAX_SEED
from ..estimates import AttentionEstimate
from ..streams import sequence_keys
from .base import LanguageModel, causal_sdpa

LAYERS_WITH_ERROR_BARS = 4
"""Number of evenly spread layers whose error bars say how sure a drafted token is, at a millisecond each."""

FADING = 0.9
"""Weight of what was seen before a pass, beside what that pass shows."""

FIRST_ACCEPTANCE = 0.8
"""The share of drafts that is expected to be accepted before any was verified."""

TINY = 1e-30

FIRST_ERROR_RATIO = 1.0
"""The error of a margin of logits, over the error bar of the attention outputs, before any was seen."""

Probabilities = Callable[[Sequence[int], Tensor], Tensor]
"""Gives the probabilities of the next token, float64 (V,), after some tokens and by its logits (V,)."""


@dataclass(frozen=True, eq=False)
class Draft:
    """What a drafter says of the next token.

    Parameters
    ----------
    logits : Tensor, (V,)
    error : float
        The relative standard error of its attention outputs, a root mean square over layers and rows.
    """

    logits: Tensor
    error: float


class Drafter(Protocol):
    """A model after a prompt, which drafts by draws and verifies exactly."""

    logits: Tensor
    """Logits of the token after the prompt, (V,)."""

    def draft(self, token: int) -> Draft:
        """Add a token for now, attending by draws."""

    def verify(self, tokens: Sequence[int]) -> Tensor:
        """Take what was drafted out and add tokens, attending exactly: the logits (T, V) after each."""

    def keep(self, count: int) -> None:
        """Keep the first `count` tokens of the last `verify`, and take the others out again."""

    @property
    def draft_reads(self) -> float:
        """What drafts have read so far in all, in units of what exact attention reads for one token."""


@dataclass(frozen=True)
class LosslessReport:
    """What lossless generation of a text took so far.

    Parameters
    ----------
    tokens : int
        New tokens, without the first one, which the prompt's own pass gives.
    passes : int
        Exact passes.
    drafted, accepted : tuple of int
        Of each position after an exact pass: drafts all of whose predecessors were accepted, and those of
        them that were accepted.
    drafts : int
        All drafted tokens, those after a rejected one among them.
    attention_bytes : float
        Bytes that attention has read for a token, in draws, sketches and exact passes together, over what
        exact decoding reads: keys and values are counted in half precision, as in `Reads`.
    draft_seconds, verify_seconds : float
        Time of all drafts and of all exact passes, the whole model's.
    """

    tokens: int
    passes: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    drafts: int
    attention_bytes: float
    draft_seconds: float
    verify_seconds: float

    @property
    def acceptance(self) -> tuple[float, ...]:
        """The share of drafts that were accepted, by their position after an exact pass."""
        return tuple(a / n for a, n in zip(self.accepted, self.drafted, strict=True))

    @property
    def drafts_per_pass(self) -> float:
        """Drafted tokens an exact pass."""
        return self.drafts / max(1, self.passes)

    @property
    def tokens_per_pass(self) -> float:
        """New tokens an exact pass: the accepted drafts, and one that the pass itself gives."""
        return self.tokens / max(1, self.passes)

    @property
    def seconds_per_token(self) -> float:
        """Time of a new token, drafts and exact passes together."""
        return (self.draft_seconds + self.verify_seconds) / max(1, self.tokens)


@dataclass
class PassCounts:
    """Counts of exact passes so far, from which a report is made at any time."""

    tokens: int = 0
    passes: int = 0
    drafts: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    draft_reads: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    def add(self, drafts: int, accepted: int) -> None:
        """Count a pass that verified so many drafts, of which the first `accepted` were accepted."""
        self.passes, self.drafts, self.tokens = (
            self.passes + 1,
            self.drafts + drafts,
            self.tokens + accepted + 1,
        )
        for position in range(min(drafts, accepted + 1)):
            if position == len(self.drafted):
                self.drafted.append(0)
                self.accepted.append(0)
            self.drafted[position] += 1
            self.accepted[position] += position < accepted

    def report(self) -> LosslessReport:
        """The report of what was counted."""
        return LosslessReport(
            tokens=self.tokens,
            passes=self.passes,
            drafted=tuple(self.drafted),
            accepted=tuple(self.accepted),
            drafts=self.drafts,
            attention_bytes=(self.passes + self.draft_reads) / max(1, self.tokens),
            draft_seconds=self.draft_seconds,
            verify_seconds=self.verify_seconds,
        )


# --- Which drafts are accepted ------------------------------------------------------------------


def is_accepted(tokens: Tensor, p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """Whether tokens (...) that were drawn from q (..., V) are accepted: with probability min(1, p / q).

    `u` (...) is uniform on [0, 1) and independent of the rest.
    """
    p, q = (x.gather(-1, tokens[..., None])[..., 0] for x in (p, q))
    return u * q < p


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The distribution (..., V) of the token in place of a rejected one: max(0, p - q), made to sum to 1."""
    rest = (p - q).clamp_min(0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)  # without a rest they differ by rounding alone


def accept_or_replace(
    tokens: Tensor, p: Tensor, q: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens that have the distribution p, made of tokens that were drawn from q.

    An accepted token, or else one drawn from the residual, has the distribution p, whatever q is (Leviathan
    and others, Fast inference from transformers via speculative decoding, ICML 2023, appendix A.1; Chen and
    others, 2302.01318, theorem 1). Here q is the distribution given the keys that were drawn, from which
    the token was in fact taken, so that the noise of the draws is a part of the drafter.

    Parameters
    ----------
    tokens : Tensor, int64, (...)
        Drawn from q, independently of the generator's next numbers.
    p, q : Tensor, float64, (..., V)
    generator : torch.Generator, optional

    Returns
    -------
    tokens : Tensor, int64, (...)
    accepted : Tensor, bool, (...)

    Examples
    --------
    >>> p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.0, 1.0], [1.0, 0.0]))
    >>> accept_or_replace(torch.tensor(0), p, q)
    (tensor(1), tensor(False))
    """
    accepted = is_accepted(tokens, p, q, torch.rand(tokens.shape, dtype=p.dtype, generator=generator))
    if bool(accepted.all()):
        return tokens, accepted
    rest = residual(p[~accepted], q[~accepted])
    return tokens.masked_scatter(~accepted, rest.multinomial(1, generator=generator)), accepted


def token_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """The distribution of the next token, float64 (V,); at temperature 0 all of it is on the likeliest."""
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float64).scatter_(0, logits.argmax(-1, keepdim=True), 1)
    return (logits.double() / temperature).softmax(-1)


def speculate(
    drafter: Drafter,
    count: int,
    probabilities: Probabilities,
    length: DraftLength,
    counts: PassCounts,
    *,
    context: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """New tokens, each with its exact distribution given those before it.

    Parameters
    ----------
    drafter : Drafter
        After a prompt.
    count : int
        Tokens at most.
    probabilities : callable
        How the exact model chooses tokens by its logits; it may put all probability on one of them.
    length : DraftLength
    counts : PassCounts
        Counts passes as they go on.
    context : sequence of int
        The prompt, which `probabilities` is given.
    generator : torch.Generator, optional
    """
    text = [*context, _drawn(probabilities(context, drafter.logits.cpu()), generator)]
    yield text[-1]
    left = count - 1
    while left:
        # The pass itself gives a token, too.
        drafts, proposals, seen = _draft(drafter, text, left - 1, probabilities, length, counts, generator)
        start = time.perf_counter()
        logits = drafter.verify([text[-1], *drafts]).cpu()
        counts.verify_seconds += time.perf_counter() - start
        new: list[int] = []
        for i, p_logits in enumerate(logits):
            p = probabilities([*text, *drafts[:i]], p_logits)
            if i == len(drafts):
                new.append(_drawn(p, generator))
                break
            token, accepted = accept_or_replace(torch.tensor(drafts[i]), p, proposals[i], generator)
            new.append(int(token))
            if not accepted:
                break
        drafter.keep(len(new))
        counts.add(len(drafts), len(new) - 1)
        counts.draft_reads = drafter.draft_reads
        length.learn(seen, logits, len(new) - 1, counts)
        left -= len(new)
        text += new
        yield from new


def _draft(
    drafter: Drafter,
    text: Sequence[int],
    most: int,
    probabilities: Probabilities,
    length: DraftLength,
    counts: PassCounts,
    generator: torch.Generator | None,
) -> tuple[list[int], list[Tensor], list[Draft]]:
    """Drafted tokens, the probabilities that each was drawn from, and the drafter's `Draft` of each."""
    start = time.perf_counter()
    drafts: list[int] = []
    proposals: list[Tensor] = []
    seen: list[Draft] = []
    length.begin()
    while len(drafts) < most and length.goes_on():
        draft = drafter.draft([*text[-1:], *drafts][-1])
        q = probabilities([*text, *drafts], draft.logits.cpu())
        drafts.append(_drawn(q, generator))
        proposals.append(q)
        seen.append(draft)
        length.drafted(draft)
    counts.draft_seconds += time.perf_counter() - start
    return drafts, proposals, seen


def _drawn(p: Tensor, generator: torch.Generator | None) -> int:
    return int(p.multinomial(1, generator=generator))


# --- How many tokens are drafted ----------------------------------------------------------------


def most_drafts(group: int) -> int:
    """The most tokens that an exact pass can verify with keys and values read once.

    `group` is the number of query heads of a key head.
    """
    return max(1, TILE_ROWS // group - 1)


class DraftLength:
    """Decides after each drafted token whether one more is worth what it reads.

    With a_i the probability that draft i is accepted, i drafts and an exact pass give 1 + a_1 + a_1 a_2 + ...
    tokens and read 1 + i c, c what a draft reads in units of the exact pass. One more draft is made while it
    raises the expected tokens over what is read.

    a_i comes from error bars. Let m be the draft's margin, the logit of its likeliest token over that of the
    second. Its standard error is sigma = g s, s the error bar of the attention outputs (`Draft.error`) and g
    what exact passes have shown: the root mean square of the margins' errors over that of s. A greedy draft
    is accepted with the probability that the margin's sign is right, Phi(m / sigma). Drawn from
    q = softmax(logits), it is accepted with probability 1 - TV(p, q); for independent normal errors of
    variance sigma^2 / 2 in the logits, TV is, to first order,

        x = sigma / (2 sqrt(pi)) sum_j q_j sqrt(1 - 2 q_j + sum_i q_i^2),

    of which 1 - e^-x is taken, which stays below 1 where sigma is large.

    The draft after it, of which no error bar is known yet, is expected to be accepted as those before were.

    What is decided depends on drafts and draws alone, not on time: the same seed gives the same text.

    Parameters
    ----------
    most : int
        Tokens that are drafted at most before an exact pass.
    temperature : float
        What logits are divided by before tokens are drawn; 0 where the likeliest is taken.
    """

    def __init__(self, most: int, temperature: float = 0.0):
        self.most, self.temperature = most, temperature
        self._cost = 0.1  # c, what a draft reads
        self._accepted, self._judged = FIRST_ACCEPTANCE, 1.0  # faded sums
        self._margin_errors, self._errors = FIRST_ERROR_RATIO**2 * 1e-4, 1e-4  # faded sums of squares
        self.begin()

    def begin(self) -> None:
        """An exact pass is behind."""
        self._made, self._reached, self._tokens = 0, 1.0, 1.0

    @property
    def acceptance(self) -> float:
        """The probability that a draft is accepted of which nothing else is known."""
        return self._accepted / self._judged

    def goes_on(self) -> bool:
        """Whether one more token should be drafted."""
        if self._made >= self.most:
            return False
        gain = self._reached * self.acceptance / self._cost
        return self._made == 0 or gain > self._tokens / (1 + self._made * self._cost)

    def drafted(self, draft: Draft) -> None:
        """Take note of a drafted token."""
        self._made += 1
        self._reached *= self.predicted(draft)
        self._tokens += self._reached

    def predicted(self, draft: Draft) -> float:
        """a_i, by the error bar."""
        sigma = math.sqrt(self._margin_errors / self._errors) * draft.error
        if self.temperature == 0:
            top = draft.logits.double().topk(2).values
            return 0.5 * (1 + math.erf(float(top[0] - top[1]) / max(sigma, 1e-12) / math.sqrt(2)))
        q = (draft.logits.double() / self.temperature).softmax(-1)
        spread = float((q * (1 - 2 * q + q.square().sum()).clamp_min(0).sqrt()).sum())
        return math.exp(-sigma / self.temperature / (2 * math.sqrt(math.pi)) * spread)

    def learn(self, seen: Sequence[Draft], exact: Tensor, accepted: int, counts: PassCounts) -> None:
        """Take note of a pass: what was drafted, the exact logits (T, V), and how many were accepted."""
        for sum_ in ("_accepted", "_judged", "_margin_errors", "_errors"):
            vars(self)[sum_] *= FADING
        self._accepted += accepted
        self._judged += min(len(seen), accepted + 1)
        for draft, logits in zip(seen, exact, strict=False):
            top = draft.logits.topk(2)
            error = float(top.values[0] - top.values[1] - (logits[top.indices[0]] - logits[top.indices[1]]))
            if math.isfinite(error):
                self._margin_errors += error**2
                self._errors += draft.error**2
        if counts.draft_reads:
            self._cost = counts.draft_reads / counts.drafts


# --- Models whose attention can be replaced -------------------------------------------------------


class SampledDrafter:
    """A `LanguageModel` after a prompt, each layer of which has a `SampledKVCache`.

    What is kept in the caches is always from exact passes: keys and values that drafts have computed are
    taken out before a pass. The query heads of a key head share their draws.

    Parameters
    ----------
    model : LanguageModel
    logits : Tensor, (V,)
        Of the token after the prompt.
    caches : sequence of SampledKVCache
        Of each layer, with the prompt's tokens.
    num_samples : int
        Draws of each row.
    seed : int
    """

    def __init__(
        self,
        model: LanguageModel,
        logits: Tensor,
        caches: Sequence[SampledKVCache],
        num_samples: int,
        seed: int,
    ):
        self.model, self.logits, self.caches = model, logits, caches
        self.length = len(caches[0])
        """Tokens that are there for good."""
        self._num_samples = num_samples
        self._generators = [torch.Generator().manual_seed(layer_seed(seed, i)) for i in range(len(caches))]
        self._with_bars = layers_with_error_bars(len(caches))
        self._errors: list[float] = []  # squared, of the layers of a draft
        self._reads, self._verified = 0.0, 0

    @classmethod
    def after(
        cls,
        model: LanguageModel,
        tokens: Tensor,
        proposal: str,
        rank: int | None,
        num_samples: int,
        seed: int,
    ) -> SampledDrafter:
        """After a prompt, tokens (L,), which is attended to exactly; the others as for `SampledKVCache`."""
        caches = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            caches.append(SampledKVCache.build(k, v, proposal, rank, queries=q[:, :, -FITTED_QUERIES:]))
            return causal_sdpa(layer, q, k, v)

        with torch.no_grad():
            logits = model(tokens[None], attend, logits_to_keep=1)[0, -1]
        return cls(model, logits, caches, num_samples, seed)

    @property
    def draft_reads(self) -> float:
        """What drafts have read so far: see `Drafter.draft_reads`."""
        return self._reads / len(self.caches)

    def draft(self, token: int) -> Draft:
        """Add a token for now, attending by draws: see `Drafter.draft`."""
        self._errors = []
        tokens = torch.tensor([[token]], device=self.logits.device)
        logits = self._forward(tokens, len(self.caches[0]), self._attend_by_draws)[0, 0]
        return Draft(logits, math.sqrt(sum(self._errors) / len(self._errors)))

    def verify(self, tokens: Sequence[int]) -> Tensor:
        """Exact logits (T, V) after each of these tokens: see `Drafter.verify`."""
        return self._verify(torch.tensor([tokens], device=self.logits.device))[0]

    def keep(self, count: int) -> None:
        """Take all but the first `count` tokens of the last `verify` out: see `Drafter.keep`."""
        self.length += count
        for cache in self.caches if count < self._verified else ():
            cache.crop(self.length)

    def _verify(self, tokens: Tensor) -> Tensor:
        """Exact logits (B, T, V) after tokens (B, T), in place of what was drafted."""
        for cache in self.caches:
            cache.crop(self.length)
        self._verified = tokens.shape[1]
        return self._forward(tokens, self.length, self._attend_exactly)

    def _forward(
        self, tokens: Tensor, position: int, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        with torch.no_grad():
            return self.model(tokens, attend, position)

    def _attend_exactly(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.caches[layer].append(k, v)
        return self.caches[layer].attend_exactly(q)

    def _attend_by_draws(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.caches[layer]
        cache.append(k, v)
        estimate = cache.attend(q, self._num_samples, share_keys=True, generator=self._generators[layer])
        self._reads += share_read(cache, estimate, k.shape[-1], v.shape[-1])
        if layer in self._with_bars:
            self._errors.append(squared_error(estimate))
        return estimate.output


def layer_seed(seed: int, layer: int) -> int:
    """The seed of a layer's draws."""
    return int(sequence_keys(seed, layer)) & MAX_SEED


def layers_with_error_bars(layers: int) -> frozenset[int]:
    """The layers whose error bars are asked for: `LAYERS_WITH_ERROR_BARS`, evenly spread, or all if fewer."""
    return frozenset(torch.linspace(0, layers - 1, LAYERS_WITH_ERROR_BARS).round().int().tolist())


def squared_error(estimate: AttentionEstimate) -> float:
    """The squared relative error by an estimate's error bars, as a mean over its rows."""
    assert estimate.std_error is not None  # a cache's estimates have them
    output, error = estimate.output.double(), estimate.std_error.double()
    return float((error.square().sum(-1) / output.square().sum(-1).clamp_min(TINY)).mean())


def share_read(cache: SampledKVCache, estimate: AttentionEstimate, features: int, width: int) -> float:
    """What the draws of one token read, over what exact attention reads for it.

    Keys, of E features, and values, of Ev, count in half precision, and once for all query heads of a key
    head.
    """
    touched = estimate.keys_touched()
    heads, distinct = touched.numel(), int(touched.sum())
    exact = heads * len(cache) * (features + width) * HALF_BYTES
    if cache.proposal == "exact":
        return (heads * len(cache) * features + distinct * width) * HALF_BYTES / exact
    return (distinct * (features + width) * HALF_BYTES + cache.sketch_nbytes()) / exact
