"""How many draws each layer of a model is worth: predicted divergence against bytes read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..cache import SampledKVCache
from ..cache.policies import CachePolicy, ExactPolicy, SampledPolicy
from ..cache.policies.base import HALF_BYTES
from .base import LanguageModel, causal_sdpa
from .generation import Prefill

GRADIENT_SAMPLES = 4
"""Continuations a window by which the Fisher information of the outputs is estimated."""

MEASURED_DRAWS = (4, 8, 16, 32, 64, 128, 256)
"""Numbers of draws at which the errors of rows are measured; others are interpolated."""

MAX_SHARE = 0.25
"""No more draws than this share of the keys: exact attention is then as good a choice."""

LAGRANGE_STEPS = 60
"""Bisections of the price of a nat, which spans e^-40 to e^40 bytes."""


@dataclass(frozen=True, eq=False)
class Window:
    """A stretch of text that a model has read exactly: a prompt, and tokens after it that are scored.

    Parameters
    ----------
    model : LanguageModel
    tokens : Tensor, int64, (1, P + T + 1)
        P of the prompt; T more are read one by one; T are predicted, the last of them only that.
    log_probabilities : Tensor, float32, (T, vocab_size)
        Of the token after each of the T tokens, by exact attention.
    layers : tuple of (Tensor, Tensor, Tensor)
        q (1, H, P + T, E), k and v (1, Hkv, P + T, E) of each layer, after position encoding.
    """

    model: LanguageModel
    tokens: Tensor
    log_probabilities: Tensor
    layers: tuple[tuple[Tensor, Tensor, Tensor], ...]

    @classmethod
    def read(cls, model: LanguageModel, tokens: Tensor, scored: int) -> Window:
        """Read tokens (1, P + T + 1) exactly, T = `scored`."""
        layers = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layers.append((q, k, v))
            return causal_sdpa(layer, q, k, v)

        with torch.no_grad():
            logits = model(tokens[:, :-1], attend, logits_to_keep=scored)
        return cls(model, tokens, logits[0].float().log_softmax(-1), tuple(layers))

    @property
    def scored(self) -> int:
        """T."""
        return len(self.log_probabilities)

    @property
    def prompt(self) -> int:
        """P."""
        return self.tokens.shape[1] - self.scored - 1

    @property
    def continuation(self) -> Tensor:
        """The T tokens after the prompt, (1, T)."""
        return self.tokens[:, self.prompt : -1]

    @property
    def targets(self) -> Tensor:
        """The T tokens to predict, (T,)."""
        return self.tokens[0, self.prompt + 1 :]

    def prefill(self) -> Prefill:
        """The prompt alone. It has no logits: no token is drawn from it."""
        cut = [tuple(x[:, :, : self.prompt] for x in layer) for layer in self.layers]
        none = self.log_probabilities.new_empty(1, 0)
        return Prefill(self.model, self.tokens[:, : self.prompt], none, tuple(cut))  # type: ignore[arg-type]


def output_gradients(window: Window, generator: torch.Generator) -> list[Tensor]:
    """Gradients of log-probabilities in each layer's attention output: (Y, H, T, E) a layer.

    With y a continuation drawn from the model and o_l the output of layer l at the T tokens,
    g_l = d log p(y) / d o_l. The expectation of g g^T over y is the Fisher information F of o, and a small
    error delta of the outputs changes the next tokens' distributions by KL = delta^T F delta / 2 [1]_.

    References
    ----------
    .. [1] Martens, New insights and perspectives on the natural gradient method, JMLR 21 (2020), §5.
    """
    model, prompt = window.model, window.prompt
    probes: list[Tensor] = []
    position = torch.arange(prompt + window.scored, device=window.tokens.device)
    visible = position <= position[prompt:, None]  # [T, P + T]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        old = window.layers[layer]
        k, v = (torch.cat((x[:, :, :prompt], y), 2) for x, y in zip(old[1:], (k, v), strict=True))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1])
        probes.append(torch.zeros_like(o, requires_grad=True))
        return o + probes[-1]

    with torch.enable_grad():
        logits = model(window.continuation, attend, prompt)[0]
        log_p = logits.float().log_softmax(-1)
        samples = []
        for last in (False,) * (GRADIENT_SAMPLES - 1) + (True,):
            drawn = log_p.detach().exp().cpu().multinomial(1, generator=generator).to(log_p.device)
            samples.append(torch.autograd.grad(log_p.gather(-1, drawn).sum(), probes, retain_graph=not last))
    return [torch.cat(of_layer) for of_layer in zip(*samples, strict=True)]


@dataclass(frozen=True)
class LayerOption:
    """What a layer would cost with one policy.

    Parameters
    ----------
    policy : CachePolicy
    divergence : float
        The KL that it adds, nats a token, as predicted.
    bytes : float
        The share of the layer's bytes that it reads: see `Reads`.
    """

    policy: CachePolicy
    divergence: float
    bytes: float


def sampled_policies(model: LanguageModel, seed: int) -> list[SampledPolicy]:
    """The proposals that a layer of a model may have, from the fewest bytes to the most.

    The query heads of a group share their keys.
    """
    sizes = model.config
    e = sizes.head_dim
    # For E = 64 they are 4, 8, 16 and 32 bytes a key.
    proposals = [
        ("low-rank", max(1, e // 16)),
        ("mixed", max(3, 3 * e // 8)),
        ("mixed", 3 * e // 4),
        ("int4", None),
    ]
    return [
        SampledPolicy(proposal=proposal, rank=rank, budget=1, seed=seed, shared=sizes.heads > sizes.kv_heads)
        for proposal, rank in proposals
    ]


def measured_options(
    window: Window, policies: Sequence[SampledPolicy], generator: torch.Generator
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """For each layer: predicted divergences and bytes, (policies, draws) each, at `draws_for` a window.

    The errors are those of rows of the window's own queries, which are attended to all its keys at once, by
    draws and exactly. Those of the query heads of a group, which share their random numbers, are added up
    before they are squared; those of other rows are independent.
    """
    gradients = output_gradients(window, generator)
    for (q, k, v), gradient in zip(window.layers, gradients, strict=True):
        yield _layer_options(window, q, k, v, gradient, policies, generator)


def draws_for(length: int) -> list[int]:
    """The numbers of draws that are measured on prompts of `length` tokens."""
    some = [draws for draws in MEASURED_DRAWS if draws <= MAX_SHARE * length]
    return some or [MEASURED_DRAWS[0]]


def _layer_options(
    window: Window,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gradient: Tensor,
    policies: Sequence[SampledPolicy],
    generator: torch.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The predicted divergences and bytes of one layer, (policies, draws) each."""
    prompt, heads, n = window.prompt, k.shape[1], k.shape[2]
    some = slice(prompt, None, 2)  # half of the rows, which says as much as all within the noise of draws
    x, seen = q[:, :, some], q[:, :, max(0, prompt - policies[0].fitted_queries) : prompt]
    g = gradient[:, :, ::2]
    with torch.no_grad():
        exact = F.scaled_dot_product_attention(x, k, v, enable_gqa=q.shape[1] != heads)
        draws = draws_for(prompt)
        divergence, size = (np.empty((len(policies), len(draws))) for _ in range(2))
        for i, policy in enumerate(policies):
            cache = SampledKVCache.build(k, v, policy.proposal, policy.rank, queries=seen)
            sketch = cache.sketch_nbytes() / (heads * n * (k.shape[-1] + v.shape[-1]) * HALF_BYTES)
            for j, number in enumerate(draws):
                estimate = cache.attend(x, number, share_keys=policy.shared, generator=generator)
                change = torch.einsum("yhte,hte->yht", g, (estimate.output - exact)[0])
                change = change.unflatten(1, (heads, -1)).sum(2)  # [Y, Hkv, T']
                divergence[i, j] = float(change.double().square().sum(1).mean()) / 2
                drawn = estimate.draws
                size[i, j] = sketch + _distinct(drawn.indices[0], drawn.weights[0] > 0, heads) / n
    return divergence, size


def _distinct(indices: Tensor, drawn: Tensor, heads: int) -> float:
    """Different keys that a query reads of a key head, from indices (H, T, S): a mean over both."""
    indices = indices.masked_fill(~drawn, -1).unflatten(0, (heads, -1)).transpose(1, 2).flatten(2)
    ordered = indices.sort(-1).values  # [Hkv, T, G S]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return float((first & (ordered >= 0)).sum(-1).double().mean())


def layer_options(
    divergence: NDArray[np.float64],
    size: NDArray[np.float64],
    policies: Sequence[SampledPolicy],
    length: int,
) -> list[list[LayerOption]]:
    """The options of every layer, from divergences and bytes (layers, policies, draws) at `draws_for`.

    Each policy has draws in steps of 2^(1/2). The divergence is that of the straight line through the
    logarithms of the measured ones, so that their noise does not choose.
    """
    measured = np.log(draws_for(length))
    draws = _draws_between(measured)
    tiny = np.finfo(np.float64).tiny
    by_layer = []
    for layer in range(len(divergence)):
        options = [LayerOption(ExactPolicy(), 0.0, 1.0)]
        for i, policy in enumerate(policies):
            height = np.log(divergence[layer, i] + tiny)
            slope, offset = np.polyfit(measured, height, 1) if len(measured) > 1 else (0.0, height[0])
            for number in draws:
                kl = math.exp(min(offset + slope * math.log(number), 700))
                share = float(np.interp(math.log(number), measured, size[layer, i]))
                options.append(LayerOption(replace(policy, budget=number), kl, share))
        by_layer.append(options)
    return by_layer


def _draws_between(measured: NDArray[np.float64]) -> list[int]:
    steps = round((measured[-1] - measured[0]) / math.log(2) * 2)
    return sorted({round(math.exp(measured[0] + i * math.log(2) / 2)) for i in range(steps + 1)})


def cheapest(options: Sequence[Sequence[LayerOption]], divergence: float) -> list[LayerOption]:
    """An option a layer, with the fewest bytes together among those whose divergences add up to a bound.

    By a Lagrange multiplier: each layer minimises its bytes plus the price of a nat times its divergence,
    which gives the best choice for some bound at or a little below the one asked for (Everett, Generalized
    Lagrange multiplier method, Operations Research 11, 1963).
    """
    kl, size = (
        [np.array([x.divergence for x in layer]) for layer in options],
        [np.array([x.bytes for x in layer]) for layer in options],
    )

    def choice(log_price: float) -> list[int]:
        price = math.exp(log_price)
        return [int(np.argmin(s + price * d)) for s, d in zip(size, kl, strict=True)]

    low, high = -40.0, 40.0
    for _ in range(LAGRANGE_STEPS):
        middle = (low + high) / 2
        if sum(d[i] for d, i in zip(kl, choice(middle), strict=True)) <= divergence:
            high = middle
        else:
            low = middle
    return [layer[i] for layer, i in zip(options, choice(high), strict=True)]
