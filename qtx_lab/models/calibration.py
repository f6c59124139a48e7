"""`calibrate`: the fewest draws a layer that keep a model's loss within a bound, verified on other texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor
from tqdm.auto import tqdm

from ..cache.policies import CachePolicy, ExactPolicy, Reads, SampledPolicy
from ..checks import check_count, check_number, check_progress
from ..errors import ArgumentError, TextError, unknown_name
from ..storage import json_bytes, write_atomic
from ..streams import sequence_keys
from .base import LanguageModel, check_language_model
from .generation import Decoding
from .huggingface_settings import read_settings
from .layer_options import Window, cheapest, layer_options, measured_options, sampled_policies

MAX_SEED = (1 << 63) - 1

MEASURES = ("loss", "kl")
"""What a bound may be on."""

DEFAULT_LENGTH = 1024
"""Tokens of a prompt, where the model takes so many."""

FEWEST_WINDOWS = 4
"""Two to find settings on, two to verify them on: an interval needs as many."""

MODELLED_WINDOWS = 2
"""Windows on which the layers' errors and gradients are measured."""

CANDIDATES = (0.5, 0.3, 0.2, 0.12, 0.07, 0.03)
"""Predicted divergences of the candidates, as shares of the largest that the bound could allow."""

REPEATS = 3
"""Times that held-out text is read by other draws, whose noise is most of the loss's.

Reading it exactly takes longer.
"""

CHANCE = 0.9
"""The chance that the interval on the held-out windows ends within the bound, going by the candidates."""


@dataclass(frozen=True)
class MeanOverWindows:
    """A mean, and the interval by Student's t in which it is for all texts like the windows.

    Parameters
    ----------
    mean, low, high : float
    confidence : float
    """

    mean: float
    low: float
    high: float
    confidence: float

    @classmethod
    def of(cls, values: NDArray[np.float64], confidence: float) -> MeanOverWindows:
        """The mean of values (windows,), of which there are two or more."""
        mean = float(values.mean())
        t = float(special.stdtrit(len(values) - 1, (1 + confidence) / 2))
        half_width = t * float(values.std(ddof=1)) / math.sqrt(len(values))
        return cls(mean, mean - half_width, mean + half_width, confidence)


@dataclass(frozen=True)
class LossIncrease:
    """What policies cost a model on some texts, with prompts attended to exactly.

    Parameters
    ----------
    loss : MeanOverWindows
        The loss less exact attention's, as a share of exact attention's.
    kl : MeanOverWindows
        KL(exact || policies) of the next token, nats, the mean over tokens.
    exact_loss : float
        Of exact attention, nats a token.
    reads : Reads
        What was read of keys, values and bytes.
    windows, tokens : int
        Stretches of text, over which the intervals are, and the tokens that were scored in all of them.
    """

    loss: MeanOverWindows
    kl: MeanOverWindows
    exact_loss: float
    reads: Reads
    windows: int
    tokens: int


@dataclass(frozen=True)
class Candidate:
    """Policies of all layers, and what they cost on the texts on which they were found.

    Parameters
    ----------
    policies : tuple of CachePolicy
        One a layer.
    measured : LossIncrease
    expected : float
        The upper end of the interval that is expected on the held-out windows, in the bound's unit.
    """

    policies: tuple[CachePolicy, ...]
    measured: LossIncrease
    expected: float


@dataclass(frozen=True)
class Calibration:
    """The settings that `calibrate` has found, and how far they hold.

    Parameters
    ----------
    model : str
    measure : {"loss", "kl"}
    max_loss : float
        The bound.
    length : int
        Tokens of a prompt.
    policies : tuple of CachePolicy
        One a layer, as `Decoding` takes them.
    found : LossIncrease
        On the texts on which the policies were found; since they were chosen there, it is a little too good.
    held_out : LossIncrease
        On other texts, after the choice. `tokens` counts each once, though several draws are averaged.
    candidates : tuple of Candidate
        All that were measured, from the fewest bytes to the most: loss against bytes read.
    seed : int

    Examples
    --------
    `calibrate` makes it; `config.qtx_sampled` of a model takes its settings, and a file keeps all of it:

    >>> import tempfile
    >>> import qtx_lab as qtx
    >>> model, text = qtx.load_language_model("reference"), qtx.reference_text()
    >>> tiny = {"length": 64, "windows": 4, "scored_tokens": 8, "progress": False}
    >>> best = qtx.calibrate(model, text[:2000], 0.1, **tiny)
    >>> best.verified, best.settings["num_samples"], len(best.policies)
    (True, 16, 6)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     best.write_json(f"{folder}/settings.json")
    """

    model: str
    measure: str
    max_loss: float
    length: int
    policies: tuple[CachePolicy, ...]
    found: LossIncrease
    held_out: LossIncrease
    candidates: tuple[Candidate, ...]
    seed: int

    @property
    def verified(self) -> bool:
        """Whether the interval on the held-out texts ends at or below the bound."""
        return _bounded(self.held_out, self.measure).high <= self.max_loss

    @property
    def settings(self) -> dict[str, Any]:
        """What `config.qtx_sampled` takes, for a `qtx_lab.huggingface.SampledCache`."""
        return adapter_settings(self.policies, self.seed)

    def to_dict(self) -> dict[str, Any]:
        """All of it as names and numbers, the settings under `qtx_sampled`."""
        return {
            "qtx_sampled": self.settings,
            "model": self.model,
            "measure": self.measure,
            "max_loss": self.max_loss,
            "length": self.length,
            "verified": self.verified,
            "found": asdict(self.found),
            "held_out": asdict(self.held_out),
            "candidates": [
                {"qtx_sampled": adapter_settings(x.policies, self.seed), **asdict(x.measured)}
                for x in self.candidates
            ],
            "seed": self.seed,
        }

    def write_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file, whole or not at all.

        Raises
        ------
        StorageError
            If it cannot be written.
        """
        write_atomic(Path(path), json_bytes(self.to_dict()))

    def __str__(self) -> str:
        seen = _bounded(self.held_out, self.measure)
        reads, layers = self.held_out.reads, len(self.policies)
        dense = sum(isinstance(policy, ExactPolicy) for policy in self.policies)
        draws = sorted(x.budget for x in self.policies if isinstance(x, SampledPolicy))
        percent = self.measure == "loss"
        of = "loss over exact attention's" if percent else "KL to exact attention, nats a token"
        bound, mean, low, high = (
            f"{100 * x:.2f} %" if percent else f"{x:.2g}"
            for x in (self.max_loss, seen.mean, seen.low, seen.high)
        )
        drawn = f"{draws[0]} to {draws[-1]} draws a row" if draws else "no draws"
        return (
            f"{self.model}, prompts of {self.length:,} tokens: {drawn}, {dense} of {layers} layers exact.\n"
            f"On held-out text ({self.held_out.windows} windows, {self.held_out.tokens} tokens), {of}: "
            f"{mean} ({low} to {high}); {'within' if self.verified else 'NOT VERIFIED to be within'} the "
            f"bound of {bound}.\n"
            f"Reads {100 * reads.keys:.1f} % of keys, {100 * reads.values:.1f} % of values, "
            f"{100 * reads.bytes:.1f} % of bytes."
        )


def calibrate(
    model: LanguageModel,
    texts: str | Sequence[str],
    max_loss: float = 0.01,
    *,
    measure: str = "loss",
    held_out: str | Sequence[str] | None = None,
    length: int | None = None,
    scored_tokens: int = 64,
    windows: int = 12,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | Callable[[float], object] = True,
) -> Calibration:
    """Find the draws of each layer that read the fewest bytes within a bound on the model's loss.

    As in generation, prompts attend exactly, and the tokens after them by draws. Windows of text are read; a
    third of them find the settings, and the others verify the one choice. For every layer and setting the
    search computes the bytes that it reads, and from the Fisher information of the layer's output what its
    errors add to the KL of the next token (`layer_options.output_gradients`). From these follow the cheapest
    settings for any KL. A few of these are tried, and of those whose interval on the held-out windows should
    end within the bound, the one that reads fewest bytes is taken.

    Parameters
    ----------
    model : LanguageModel
        As `load_language_model` gives it.
    texts : str or sequence of str
        Like those that the model will be used for.
    max_loss : float
        The bound: with `measure="loss"` on the increase of the loss as a share of exact attention's (.01: one
        per cent), with "kl" on KL(exact || draws) of the next token, nats a token.
    measure : {"loss", "kl"}
    held_out : str or sequence of str, optional
        Texts to verify on. The last two thirds of the windows of `texts` where None.
    length : int, optional
        Tokens of a prompt; 1,024 where None, or what the model takes. Settings hold for prompts of about
        this length: calibrate at the length that you use.
    scored_tokens : int
        Tokens after each prompt that are read by draws, and predicted.
    windows : int
        No more windows than that, 4 or more, evenly spread. With fewer tokens in all, intervals are wider and
        settings costlier.
    confidence : float
        Of the intervals over windows.
    seed : int
        Of all draws.
    progress : bool or callable
        Whether to show a progress bar; or `progress(share)`, called with the share that is done, 0 to 1.

    Returns
    -------
    Calibration
        `policies` for `Decoding`, `settings` for `config.qtx_sampled`, and `verified`, which is False where
        no settings were found that hold.

    Raises
    ------
    ArgumentError
        If an argument is not allowed.
    TextError
        If the texts have too few tokens.

    Examples
    --------
    >>> import qtx_lab as qtx
    >>> model, text = qtx.load_language_model("reference"), qtx.reference_text()
    >>> quick = {"length": 128, "windows": 8, "scored_tokens": 12, "progress": False}
    >>> best = calibrate(model, text[:8000], 0.1, **quick)
    >>> best.verified, best.held_out.reads.values < 0.7, sorted(best.settings)[:2]
    (True, True, ['layers', 'num_samples'])
    """
    check_language_model(model)
    if measure not in MEASURES:
        raise unknown_name("measure", measure, MEASURES)
    max_loss = check_number("max_loss", max_loss, above=0)
    scored_tokens = check_count("scored_tokens", scored_tokens)
    windows = check_count("windows", windows, FEWEST_WINDOWS)
    confidence = check_number("confidence", confidence, above=0, below=1)
    seed = check_count("seed", seed, 0, MAX_SEED - REPEATS)  # the repetitions have the seeds after it
    check_progress(progress)
    length = _checked_length(model, length, scored_tokens)
    find, verify = _windows(model, texts, held_out, length + scored_tokens + 1, windows)
    total = min(MODELLED_WINDOWS, len(find)) + len(find) * (1 + len(CANDIDATES))
    total += len(verify) * (1 + REPEATS)
    with _Progress(total, progress) as bar:
        options, exact_loss = _modelled(model, find[:MODELLED_WINDOWS], scored_tokens, seed, bar)
        largest = max_loss * exact_loss if measure == "loss" else max_loss
        tried = [
            tuple(option.policy for option in cheapest(options, share * largest)) for share in CANDIDATES
        ]
        tried = list(dict.fromkeys(tried))
        losses = _measured(model, find, scored_tokens, tried, bar)
        candidates = [
            Candidate(policies, x.summary(confidence), x.expected(len(verify), confidence, measure))
            for policies, x in zip(tried, losses, strict=True)
        ]
        candidates.sort(key=lambda x: x.measured.reads.bytes)
        fit = [x for x in candidates if x.expected <= max_loss]
        chosen = fit[0] if fit else min(candidates, key=lambda x: x.expected)
        repeated = [reseeded(chosen.policies, seed + 1 + i) for i in range(REPEATS)]
        verified = TokenLosses.mean(_measured(model, verify, scored_tokens, repeated, bar))
    return Calibration(
        model.name,
        measure,
        max_loss,
        length,
        chosen.policies,
        chosen.measured,
        verified.summary(confidence),
        tuple(candidates),
        seed,
    )


def adapter_settings(policies: Sequence[CachePolicy], seed: int) -> dict[str, Any]:
    """Policies, one a layer, as `config.qtx_sampled` takes them.

    Raises
    ------
    ArgumentError
        If one is neither exact nor sampled.
    """
    by_layer = [_layer_settings(policy) for policy in policies]
    drawn = [x for x in by_layer if "sampler" not in x]
    common = {
        name: Counter(x[name] for x in drawn).most_common(1)[0][0]
        for name in ("num_samples", "share_keys")
        if drawn
    }
    changed = {
        str(i): {name: x for name, x in settings.items() if common.get(name) != x}
        for i, settings in enumerate(by_layer)
    }
    return {**common, "seed": seed, "layers": {i: settings for i, settings in changed.items() if settings}}


def _layer_settings(policy: CachePolicy) -> dict[str, Any]:
    """What `config.qtx_sampled` says of a layer."""
    if isinstance(policy, ExactPolicy):
        return {"sampler": "exact"}
    if isinstance(policy, SampledPolicy) and isinstance(policy.budget, int):
        plain = SampledPolicy(
            budget=policy.budget,
            seed=policy.seed,
            proposal=policy.proposal,
            rank=policy.rank,
            shared=policy.shared,
        )
        if policy == plain:
            rank = {} if policy.rank is None else {"rank": policy.rank}
            about = {"num_samples": policy.budget, "proposal": policy.proposal, "share_keys": policy.shared}
            return about | rank
    raise ArgumentError(
        f"policies holds {policy}; config.qtx_sampled can hold exact policies, and sampled ones with a "
        "number of draws, a proposal, a rank and shared draws."
    )


def adapter_policies(settings: Mapping[str, Any], layers: int) -> tuple[CachePolicy, ...]:
    """What `adapter_settings` gave, as policies of so many layers: drawn ones, or exact.

    Raises
    ------
    ArgumentError, DtypeError
        If `config.qtx_sampled` does not take the settings.
    """
    by_layer = read_settings(settings, layers)
    policies: list[CachePolicy] = []
    for layer in range(layers):
        own = by_layer.get(layer, by_layer[None])
        policies.append(
            ExactPolicy()
            if own["sampler"].exact
            else SampledPolicy(
                budget=own["num_samples"],
                proposal=own["proposal"] or SampledPolicy.proposal,
                rank=own["rank"],
                shared=own["share_keys"],
                seed=by_layer[None]["seed"] or 0,
            )
        )
    return tuple(policies)


def reseeded(policies: Sequence[CachePolicy], number: int) -> tuple[CachePolicy, ...]:
    """Policies with other seeds, for another window."""
    return tuple(replace(x, seed=int(sequence_keys(x.seed, number)) & MAX_SEED) for x in policies)


# --- Windows of text ----------------------------------------------------------------------------


def _checked_length(model: LanguageModel, length: int | None, scored_tokens: int) -> int:
    """The length of a prompt, which leaves room for the tokens that are scored after it."""
    room = model.config.context - scored_tokens
    length = check_count("length", min(DEFAULT_LENGTH, room) if length is None else length)
    if length > room:
        raise ArgumentError(
            f"length={length} is not allowed: {model.name} takes {model.config.context} tokens, of which "
            f"scored_tokens={scored_tokens} come after the prompt."
        )
    return length


def _windows(
    model: LanguageModel,
    texts: str | Sequence[str],
    held_out: str | Sequence[str] | None,
    size: int,
    windows: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Windows of `size` tokens, (1, size), to find on and to verify on."""
    find = _cut(model, "texts", texts, size)
    if held_out is None:
        if len(find) < FEWEST_WINDOWS:
            raise _too_short("texts", len(find), FEWEST_WINDOWS, size)
        find = _spread(find, windows)
        first = max(2, len(find) // 3)
        return find[:first], find[first:]
    verify = _cut(model, "held_out", held_out, size)
    for name, some in (("texts", find), ("held_out", verify)):
        if len(some) < 2:
            raise _too_short(name, len(some), 2, size)
    first = max(2, windows // 3)
    return _spread(find, first), _spread(verify, windows - first)


def _cut(model: LanguageModel, name: str, texts: str | Sequence[str], size: int) -> list[Tensor]:
    """All whole windows of texts, side by side."""
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ArgumentError(f"{name} is not allowed: it must be a text, or a sequence of texts.")
    tokens = [model.encode(text) for text in texts]
    return [window[None] for x in tokens for window in x.split(size) if len(window) == size]


def _too_short(name: str, count: int, needed: int, size: int) -> TextError:
    return TextError(
        f"{name} have {count} windows of {size} tokens (a prompt and what is scored after it); {needed} or "
        "more are needed: give more or longer texts, or a smaller length."
    )


def _spread(windows: list[Tensor], count: int) -> list[Tensor]:
    """Up to `count` of the windows, evenly spread."""
    count = min(count, len(windows))
    return [windows[i * len(windows) // count] for i in range(count)]


# --- Measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenLosses:
    """What policies cost at every scored token.

    Parameters
    ----------
    loss, exact_loss : array, (windows, tokens)
        Nats.
    kl : array, (windows, tokens)
        KL(exact || policies), nats.
    reads : Reads
    """

    loss: NDArray[np.float64]
    exact_loss: NDArray[np.float64]
    kl: NDArray[np.float64]
    reads: Reads

    @classmethod
    def mean(cls, losses: Sequence[TokenLosses]) -> TokenLosses:
        """The mean of several measures of the same windows."""
        arrays = ((x.loss, x.exact_loss, x.kl) for x in losses)
        loss, exact_loss, kl = (np.mean(x, 0) for x in zip(*arrays, strict=True))
        return cls(loss, exact_loss, kl, Reads.mean([x.reads for x in losses]))

    def summary(self, confidence: float) -> LossIncrease:
        """Means with intervals over windows."""
        increase, exact = (self.loss - self.exact_loss).mean(1), self.exact_loss.mean(1)
        ratio = increase.mean() / exact.mean()
        # A ratio of means varies as the mean of these (Cochran, Sampling Techniques, 1977, §6.3).
        relative = ratio + (increase - ratio * exact) / exact.mean()
        return LossIncrease(
            MeanOverWindows.of(relative, confidence),
            MeanOverWindows.of(self.kl.mean(1), confidence),
            float(exact.mean()),
            self.reads,
            len(self.kl),
            self.kl.size,
        )

    def expected(self, windows: int, confidence: float, measure: str) -> float:
        """The upper end of the interval that these policies should have on so many other windows.

        It is lower than that with the chance `CHANCE`. The expected increase of the loss is the KL, which has
        far less noise, if the model's probabilities are those of the text.
        """
        errors = float(special.stdtrit(windows - 1, (1 + confidence) / 2) + special.ndtri(CHANCE))
        if measure == "kl":
            return float(self.kl.mean() + errors * self.kl.mean(1).std(ddof=1) / math.sqrt(windows))
        noise = (self.loss - self.exact_loss).std() / math.sqrt(windows * self.kl.shape[1] * REPEATS)
        return float((self.kl.mean() + errors * noise) / self.exact_loss.mean())


def _bounded(measured: LossIncrease, measure: str) -> MeanOverWindows:
    """What the bound is on."""
    return measured.loss if measure == "loss" else measured.kl


class _Progress:
    """Steps that are done, of a total: on a bar, or told to a function."""

    def __init__(self, total: int, progress: bool | Callable[[float], object]):
        self.total, self.progress, self.done = total, progress, 0
        self.bar = tqdm(total=total, desc="calibrating", leave=False, disable=progress is not True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self) -> None:
        """Count one step."""
        self.done += 1
        self.bar.update()
        if callable(self.progress):
            self.progress(self.done / self.total)


def _modelled(
    model: LanguageModel, windows: list[Tensor], scored: int, seed: int, bar: _Progress
) -> tuple[list[list[Any]], float]:
    """The options of each layer, by means over windows, and the loss of exact attention."""
    policies = sampled_policies(model, seed)
    generator = torch.Generator().manual_seed(seed)
    divergence, size, losses = [], [], []
    for tokens in windows:
        window = Window.read(model, tokens, scored)
        losses.append(float(-window.log_probabilities.gather(-1, window.targets[:, None]).mean()))
        layers = list(measured_options(window, policies, generator))
        divergence.append([x for x, _ in layers])
        size.append([x for _, x in layers])
        bar.update()
    means = (np.mean(divergence, 0), np.mean(size, 0))
    return layer_options(*means, policies, window.prompt), float(np.mean(losses))


def _measured(
    model: LanguageModel,
    windows: list[Tensor],
    scored: int,
    tried: Sequence[tuple[CachePolicy, ...]],
    bar: _Progress,
) -> list[TokenLosses]:
    """What each of `tried` costs on windows, of which one at a time is held."""
    exact: list[NDArray[np.float64]] = []
    seen: list[list[tuple[Any, Any, Reads]]] = [[] for _ in tried]
    for number, tokens in enumerate(windows):
        window = Window.read(model, tokens, scored)
        log_p, targets = window.log_probabilities, window.targets[:, None]
        exact.append(-log_p.gather(-1, targets)[:, 0].double().cpu().numpy())
        bar.update()
        prefill = window.prefill()
        for policies, collected in zip(tried, seen, strict=True):
            state = Decoding.after(prefill, reseeded(policies, number))
            log_q = state.steps(window.continuation)[0].float().log_softmax(-1)
            loss = -log_q.gather(-1, targets)[:, 0].double().cpu().numpy()
            kl = (log_p.exp() * (log_p - log_q)).double().sum(-1).cpu().numpy()
            collected.append((loss, kl, state.reads))
            bar.update()
    return [
        TokenLosses(
            np.stack([x[0] for x in of]),
            np.stack(exact),
            np.stack([x[1] for x in of]),
            Reads.mean([x[2] for x in of]),
        )
        for of in seen
    ]
