"""Generation with a causal model: the prompt attends exactly, later bytes by a `SampledKVCache`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..cache.policies import CachePolicy, ExactPolicy, LayerCache, Reads, SampledPolicy
from ..checks import check_count, check_flags, check_generator, check_number
from ..errors import ArgumentError, DtypeError, unknown_name
from .base import LanguageModel, causal_sdpa, check_language_model
from .speculative import (
    DraftLength,
    LosslessReport,
    PassCounts,
    SampledDrafter,
    most_drafts,
    speculate,
    token_probabilities,
)

LEAST_TEMPERATURE = 1e-30
"""The least temperature above 0, for which logits over it are numbers of float32."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How a text is continued: the keyword arguments of `generate`, `stream` and `model.generate`.

    Parameters
    ----------
    temperature : float
        0: always the likeliest token. Otherwise the logits are divided by it, 1e-30 or more, before a token
        is drawn.
    proposal, rank : str or None, int
        As for `SampledKVCache.build`. None is exact attention to all tokens.
    num_samples : int
        Draws of each row.
    lossless : bool
        Whether sampled attention only drafts tokens, which exact passes over the cache accept or replace, so
        that the text has exactly the distribution that it has by exact attention, and at temperature 0 is
        the same text: see `qtx_lab.models.speculative`. The query heads of a key head then share their draws.
    max_drafts : int, optional
        For `lossless` only: the tokens that are drafted at most before an exact pass. Where None, as many as
        one pass can verify with keys and values read once, for which the query heads of a key head, at all
        drafts and one more position, may be 32 rows; more are not allowed.
    generator : torch.Generator, optional
        Of tokens and keys. Without `lossless` the tokens' random numbers are the same whatever the proposal.

    Raises
    ------
    ArgumentError, DtypeError
        If a setting is not allowed.
    """

    temperature: float = 0.0
    proposal: str | None = "low-rank"
    rank: int | None = None
    num_samples: int = 64
    lossless: bool = False
    max_drafts: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_generator(self.generator)
        temperature = check_number("temperature", self.temperature, least=0)
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ArgumentError(
                f"temperature={self.temperature} is not allowed: it must be 0, for the likeliest token, or "
                f"{LEAST_TEMPERATURE:g} or more."
            )
        decoding_policy(self.proposal, self.rank, self.num_samples, 0)
        check_flags(lossless=self.lossless)
        if self.max_drafts is not None:
            check_count("max_drafts", self.max_drafts)
        if self.lossless and self.proposal is None:
            raise ArgumentError(
                "lossless=True is not allowed with proposal=None, which is exact already: name a proposal "
                "that drafts."
            )
        if self.max_drafts is not None and not self.lossless:
            raise ArgumentError(f"max_drafts={self.max_drafts} is for lossless=True only; given False.")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> GenerationSettings:
        """The settings of keyword arguments.

        Raises
        ------
        ArgumentError, DtypeError
            If a name is unknown, or a setting is not allowed.
        """
        names = [x.name for x in fields(cls)]
        for name in given:
            if name not in names:
                raise unknown_name("keyword argument", name, names)
        return cls(**given)


class TextStream(Iterator[bytes]):
    """A text in UTF-8, piece by piece as it comes; of a lossless one there is a report at any time.

    Parameters
    ----------
    pieces : iterator of bytes
    counts : PassCounts, optional
        Of lossless generation.
    """

    def __init__(self, pieces: Iterator[bytes], counts: PassCounts | None = None):
        self._pieces, self._counts = pieces, counts

    def __next__(self) -> bytes:
        return next(self._pieces)

    @property
    def report(self) -> LosslessReport:
        """What lossless generation took so far: acceptance by position, bytes read, time.

        Raises
        ------
        ArgumentError
            If the text is not generated with `lossless=True`.
        """
        if self._counts is None:
            raise ArgumentError("report is known for texts that are generated with lossless=True only.")
        return self._counts.report()


def generate(model: LanguageModel, prompt: str | Tensor, max_new_tokens: int = 256, **settings: Any) -> str:
    """Continue a text; each layer of the model decodes with a `SampledKVCache`.

    Parameters
    ----------
    model : LanguageModel
        As `load_language_model` gives it.
    prompt : str or Tensor, int64, (L,)
        Attended to exactly. With the new tokens it must fit in the context.
    max_new_tokens : int
        The text is shorter where the model ends it.
    **settings
        `temperature`, `proposal`, `rank`, `num_samples`, `lossless`, `max_drafts` and `generator`: see
        `GenerationSettings`. With `lossless=True` the text has exactly the distribution of exact attention,
        and at temperature 0 it is the same text.

    Returns
    -------
    str
        The new text alone. `model.generate` yields it as it comes, and has the report of a lossless one.

    Raises
    ------
    ArgumentError, DtypeError
        Before any token.

    Examples
    --------
    >>> import qtx_lab as qtx
    >>> model = qtx.load_language_model("reference")
    >>> generate(model, "The import statement", 12)[:5]
    ' is a'
    >>> pieces = model.generate("The import statement", 12, lossless=True)
    >>> b"".join(pieces).decode() == generate(model, "The import statement", 12, proposal=None)
    True
    >>> pieces.report.tokens, pieces.report.passes < 11
    (11, True)
    """
    return b"".join(stream(model, prompt, max_new_tokens, **settings)).decode(errors="replace")


def stream(
    model: LanguageModel, prompt: str | Tensor, max_new_tokens: int = 256, **settings: Any
) -> TextStream:
    """The text that `generate` gives, in UTF-8, piece by piece as it comes; refusals come on the call."""
    check_language_model(model)
    how = GenerationSettings.of(settings)
    tokens = model.encode(prompt) if isinstance(prompt, str) else prompt
    max_new_tokens = check_count("max_new_tokens", max_new_tokens)
    _check_prompt(model, tokens, max_new_tokens)
    # Keys have a seed of their own, so that the tokens' numbers are the same whatever the proposal.
    seed = int(torch.randint(1 << 62, (), generator=how.generator))
    if how.lossless:
        counts = PassCounts()
        return TextStream(
            model.pieces(_lossless_tokens(model, tokens, max_new_tokens, how, seed, counts)), counts
        )
    policy = decoding_policy(how.proposal, how.rank, how.num_samples, seed)
    state = Decoding(model, tokens[None], policy)
    return TextStream(model.pieces(_tokens(state, max_new_tokens, how.temperature, how.generator)))


def _lossless_tokens(
    model: LanguageModel, tokens: Tensor, count: int, how: GenerationSettings, seed: int, counts: PassCounts
) -> Iterator[int]:
    """The new tokens of a text, up to `count`, drafted and verified, without the one that ends it."""
    assert how.proposal is not None
    most = most_drafts(model.config.heads // model.config.kv_heads)
    if how.max_drafts is not None and how.max_drafts > most:
        raise ArgumentError(
            f"max_drafts={how.max_drafts} is not allowed: an exact pass of {model.name} verifies up to "
            f"{most} drafts with keys and values read once."
        )
    drafter = SampledDrafter.after(model, tokens, how.proposal, how.rank, how.num_samples, seed)
    length = DraftLength(most if how.max_drafts is None else how.max_drafts, how.temperature)

    def probabilities(text: Sequence[int], logits: Tensor) -> Tensor:
        return token_probabilities(logits, how.temperature)

    new = speculate(drafter, count, probabilities, length, counts, generator=how.generator)
    return itertools.takewhile(lambda token: token not in model.stop_tokens, new)


def decoding_policy(proposal: str | None, rank: int | None, num_samples: int, seed: int) -> CachePolicy:
    """The policy that the arguments of `generate` mean."""
    num_samples = check_count("num_samples", num_samples)
    if proposal is not None:
        return SampledPolicy(proposal=proposal, rank=rank, budget=num_samples, seed=seed)
    if rank is not None:
        raise ArgumentError(f"rank={rank} is for proposal='low-rank' only; given None.")
    return ExactPolicy()


def _check_prompt(model: LanguageModel, tokens: Tensor, max_new_tokens: int) -> None:
    """Refuse what are no tokens of the model, or too many or too few."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 1 or tokens.is_meta:
        raise DtypeError(f"prompt={tokens!r:.60} is not allowed: it must be a text, or int64 tokens (L,).")
    limit, vocabulary = model.config.context, model.config.vocab_size
    if max_new_tokens >= limit:
        raise ArgumentError(
            f"max_new_tokens={max_new_tokens} is not allowed: {model.name} takes {limit} tokens, of which at "
            f"least one is the prompt's, so that it must be from 1 to {limit - 1}."
        )
    if not 1 <= len(tokens) <= limit - max_new_tokens:
        raise ArgumentError(
            f"prompt has {len(tokens)} tokens; with max_new_tokens={max_new_tokens} it must have 1 to "
            f"{limit - max_new_tokens}."
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ArgumentError(
            f"prompt holds tokens from {int(tokens.min())} to {int(tokens.max())}; they must be 0 to "
            f"{vocabulary - 1}."
        )


def _tokens(
    state: Decoding, count: int, temperature: float, generator: torch.Generator | None
) -> Iterator[int]:
    """The new tokens of a text, up to `count`, without the one that ends it."""
    for left in reversed(range(count)):
        logits = state.logits[0].cpu().float()
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = (logits / temperature).softmax(-1).multinomial(1, generator=generator)
        if int(token) in state.model.stop_tokens:
            return
        yield int(token)
        if left:
            state.step(token.to(state.logits.device))


@dataclass(frozen=True, eq=False)
class Prefill:
    """A prompt that a model has attended to exactly: where every policy starts, so that one serves many.

    Parameters
    ----------
    model : LanguageModel
    tokens : Tensor, int64, (B, L)
    logits : Tensor, (B, vocab_size)
        Of the token after the prompt.
    layers : tuple of (Tensor, Tensor, Tensor)
        q (B, H, L, E), k and v (B, Hkv, L, E) of each layer, after position encoding.
    """

    model: LanguageModel
    tokens: Tensor
    logits: Tensor
    layers: tuple[tuple[Tensor, Tensor, Tensor], ...]

    @classmethod
    def of(cls, model: LanguageModel, tokens: Tensor) -> Prefill:
        """The prefill of tokens (B, L), int64."""
        layers = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layers.append((q, k, v))
            return causal_sdpa(layer, q, k, v)

        with torch.no_grad():
            logits = model(tokens, attend, logits_to_keep=1)[:, -1]
        return cls(model, tokens, logits, tuple(layers))

    def repeated(self, batch: int) -> Prefill:
        """A single prompt as a batch of the same ones, which share its tensors."""
        tokens, logits = (x.expand(batch, -1) for x in (self.tokens, self.logits))
        size = (batch, -1, -1, -1)
        layers = tuple((q.expand(size), k.expand(size), v.expand(size)) for q, k, v in self.layers)
        return Prefill(self.model, tokens, logits, layers)


class CachesSideBySide:
    """The caches of several policies for one layer of one prompt; sequence i of a batch is that of cache i.

    Parameters
    ----------
    caches : sequence of LayerCache
        Each of one sequence.
    """

    def __init__(self, caches: Sequence[LayerCache]):
        self.caches = caches

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add the newest token of each sequence: see `LayerCache.append`."""
        for cache, keys, values in zip(self.caches, k.split(1), v.split(1), strict=True):
            cache.append(keys, values)

    def attend(self, q: Tensor) -> Tensor:
        """Attention of the newest query of each sequence: see `LayerCache.attend`."""
        return torch.cat([cache.attend(x) for cache, x in zip(self.caches, q.split(1), strict=True)])

    @property
    def reads(self) -> Reads:
        """What was read, a mean over the sequences."""
        return Reads.mean([cache.reads for cache in self.caches])


class Decoding:
    """A model part of the way through a text: a cache a layer, and the next token's logits.

    The prompt is attended to exactly, and the tokens that `step` adds attend as a policy says.

    Parameters
    ----------
    model : LanguageModel
    tokens : Tensor, int64, (B, L)
        The prompts, of one length.
    policy : CachePolicy or sequence of CachePolicy
        Of all layers, or one a layer.
    """

    def __init__(self, model: LanguageModel, tokens: Tensor, policy: CachePolicy | Sequence[CachePolicy]):
        policies = _by_layer(model, policy)
        caches = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            caches.append(policies[layer].start(layer, q, k, v))
            return causal_sdpa(layer, q, k, v)

        with torch.no_grad():
            logits = model(tokens, attend, logits_to_keep=1)[:, -1]
        self._start(model, tokens.shape[1], logits, caches)

    def _start(
        self,
        model: LanguageModel,
        length: int,
        logits: Tensor,
        caches: Sequence[LayerCache | CachesSideBySide],
    ) -> None:
        self.model, self.length = model, length
        self.logits = logits
        """Logits of the next token, (B, vocab_size)."""
        self.caches = caches
        """The cache of each layer."""

    @classmethod
    def after(cls, prefill: Prefill, policy: CachePolicy | Sequence[CachePolicy]) -> Decoding:
        """Go on from a prompt that was computed before; the prompt serves others, too."""
        policies = _by_layer(prefill.model, policy)
        caches = [policies[i].start(i, *layer) for i, layer in enumerate(prefill.layers)]
        state = cls.__new__(cls)
        state._start(prefill.model, prefill.tokens.shape[1], prefill.logits, caches)
        return state

    @classmethod
    def side_by_side(
        cls, prefill: Prefill, policies: Sequence[CachePolicy | Sequence[CachePolicy]]
    ) -> Decoding:
        """Go on from one prompt by several policies at once: sequence i of the batch is that of policy i.

        The weights of the model are then read once for all of them. `reads_by_sequence` tells what each
        policy has read.

        Raises
        ------
        ArgumentError
            If the prompt is not a single one.
        """
        batch = prefill.tokens.shape[0]
        if batch != 1:
            raise ArgumentError(
                f"prefill has {batch} prompts; policies side by side start from a single one."
            )
        each = [cls.after(prefill, policy).caches for policy in policies]
        caches = [CachesSideBySide(of_layer) for of_layer in zip(*each, strict=True)]
        state = cls.__new__(cls)
        logits = prefill.logits.expand(len(policies), -1)
        state._start(prefill.model, prefill.tokens.shape[1], logits, caches)
        return state

    @property
    def reads_by_sequence(self) -> list[Reads]:
        """What each policy of `side_by_side` has read, a mean over layers and tokens."""
        by_layer = [layer.caches for layer in self.caches if isinstance(layer, CachesSideBySide)]
        return [Reads.mean([x.reads for x in caches]) for caches in zip(*by_layer, strict=True)]

    @property
    def reads(self) -> Reads:
        """What the steps have read, a mean over layers, sequences and tokens."""
        return Reads.mean([cache.reads for cache in self.caches])

    def step(self, token: Tensor) -> Tensor:
        """Add one token (B,) to each text; the logits (B, vocab_size) of the next.

        Raises
        ------
        ArgumentError
            If the context is full.
        """
        if self.length == self.model.config.context:
            raise ArgumentError(f"the context of {self.length} tokens is full.")
        with torch.no_grad():
            self.logits = self.model(token[:, None], self._attend, self.length)[:, 0]
        self.length += 1
        return self.logits

    def steps(self, tokens: Tensor) -> Tensor:
        """Add tokens (B, T) that are known already; the logits (B, T, vocab_size) after each.

        They are those of T calls of `step`, in less time: the tokens go through each layer together, and in
        it attend one after the other.

        Raises
        ------
        ArgumentError
            If they do not fit in the context.
        """
        left = self.model.config.context - self.length
        if tokens.shape[1] > left:
            raise ArgumentError(f"tokens has {tokens.shape[1]} tokens; the context has room for {left}.")
        with torch.no_grad():
            logits = self.model(tokens, self._attend, self.length)
        self.length += tokens.shape[1]
        self.logits = logits[:, -1]
        return logits

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, outputs = self.caches[layer], []
        for query, key, value in zip(q.split(1, 2), k.split(1, 2), v.split(1, 2), strict=True):
            cache.append(key, value)
            outputs.append(cache.attend(query))
        return torch.cat(outputs, 2)


def _by_layer(model: LanguageModel, policy: CachePolicy | Sequence[CachePolicy]) -> Sequence[CachePolicy]:
    """One policy a layer."""
    layers = model.config.layers
    if isinstance(policy, CachePolicy):
        return [policy] * layers
    if len(policy) != layers:
        raise ArgumentError(f"policy has {len(policy)} policies; {model.name} has {layers} layers.")
    return policy
