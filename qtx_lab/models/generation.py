"""Generation with a causal model: the prompt attends exactly, later bytes by a `SampledKVCache`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache import SampledKVCache
from ..checks import check_count, check_generator
from ..errors import ArgumentError, DtypeError
from .base import LanguageModel, causal_sdpa


def generate(
    model: LanguageModel,
    prompt: str | Tensor,
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.0,
    proposal: str | None = "low-rank",
    rank: int | None = None,
    num_samples: int = 64,
    generator: torch.Generator | None = None,
) -> str:
    """Continue a text; each layer of the model decodes with a `SampledKVCache`.

    Parameters
    ----------
    model : LanguageModel
        As `load_language_model` gives it.
    prompt : str or Tensor, int64, (L,)
        Attended to exactly. With the new tokens it must fit in the context.
    max_new_tokens : int
        The text is shorter where the model ends it.
    temperature : float
        0: always the likeliest token. Otherwise the logits are divided by it before a token is drawn.
    proposal, rank : str or None, int
        As for `SampledKVCache.build`. None is exact attention to all tokens.
    num_samples : int
        Draws of each row.
    generator : torch.Generator, optional
        Of tokens and keys. The tokens' random numbers are the same whatever the proposal.

    Returns
    -------
    str
        The new text alone. `model.generate` yields it as it comes.

    Raises
    ------
    ArgumentError, DtypeError
        Before any token.

    Examples
    --------
    >>> model = load_language_model("reference")
    >>> generate(model, "The import statement", 12)[:5]
    ' is a'
    """
    pieces = stream(
        model,
        prompt,
        max_new_tokens,
        temperature=temperature,
        proposal=proposal,
        rank=rank,
        num_samples=num_samples,
        generator=generator,
    )
    return b"".join(pieces).decode(errors="replace")


def stream(
    model: LanguageModel,
    prompt: str | Tensor,
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.0,
    proposal: str | None = "low-rank",
    rank: int | None = None,
    num_samples: int = 64,
    generator: torch.Generator | None = None,
) -> Iterator[bytes]:
    """The text that `generate` gives, in UTF-8, piece by piece as it comes; refusals come on the call."""
    tokens = model.encode(prompt) if isinstance(prompt, str) else prompt
    check_count("max_new_tokens", max_new_tokens)
    check_generator(generator)
    _check_prompt(model, tokens, max_new_tokens)
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not is_number or not 0 <= temperature < math.inf:
        raise ArgumentError(f"temperature={temperature!r} is not allowed: it must be a number >= 0.")
    # Keys have a generator of their own, so that the tokens' numbers are the same whatever the proposal.
    keys = torch.Generator(tokens.device)
    keys.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
    state = Decoding(
        model, tokens[None], proposal=proposal, rank=rank, num_samples=num_samples, generator=keys
    )
    return model.pieces(_tokens(state, max_new_tokens, temperature, generator))


def _check_prompt(model: LanguageModel, tokens: Tensor, max_new_tokens: int) -> None:
    """Refuse what are no tokens of the model, or too many or too few."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 1:
        raise DtypeError(f"prompt={tokens!r:.60} is not allowed: it must be a text, or int64 tokens (L,).")
    limit, vocabulary = model.config.context, model.config.vocab_size
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


class Decoding:
    """A causal model part of the way through a text: a cache a layer, and the next token's logits.

    The tokens given are attended to exactly, and the tokens that `step` adds attend by draws.

    Parameters
    ----------
    model : LanguageModel
    tokens : Tensor, int64, (B, L)
    proposal : str, optional
        As for `SampledKVCache.build`; None: exact attention, with a cache of all keys and values.
    rank : int, optional
    num_samples : int
    generator : torch.Generator, optional

    Raises
    ------
    ArgumentError
        If an argument is not allowed.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        *,
        proposal: str | None = "low-rank",
        rank: int | None = None,
        num_samples: int = 64,
        generator: torch.Generator | None = None,
    ):
        check_count("num_samples", num_samples)
        if proposal is None and rank is not None:
            raise ArgumentError(f"rank={rank} is for proposal='low-rank' only; given None.")
        self.model, self.num_samples, self.generator = model, num_samples, generator
        self.caches: list[SampledKVCache] = []
        """Of each layer, unless attention is exact."""
        self.exact: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each layer, if attention is exact."""
        self.length = tokens.shape[1]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if proposal is None:
                self.exact.append((k, v))
            else:
                self.caches.append(SampledKVCache.build(k, v, proposal, rank, queries=q))
            return causal_sdpa(layer, q, k, v)

        with torch.no_grad():
            self.logits = model(tokens, attention=attend, logits_to_keep=1)[:, -1]  # [B, vocab_size]

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

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.exact:
            earlier = self.exact[layer]
            k, v = (torch.cat((old, new), 2) for old, new in zip(earlier, (k, v), strict=True))
            self.exact[layer] = (k, v)
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        self.caches[layer].append(k, v)
        return self.caches[layer].attend(q, self.num_samples, generator=self.generator).output
