"""`qtx-lab bench lossless`: what lossless generation reads and takes, beside exact decoding.

One part generates with a real model, whose drafts are accepted or not; the other times the attention of one
layer at a length that the model has no context for, and takes from the first how many tokens a pass gives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from ..cache import SampledKVCache
from ..cache.policies import ExactPolicy
from ..cache.policies.sampled import FITTED_QUERIES
from ..models.base import LanguageModel
from ..models.generation import Decoding, Prefill
from ..models.language_model import load_language_model
from ..models.speculative import (
    DraftLength,
    LosslessReport,
    PassCounts,
    SampledDrafter,
    most_drafts,
    speculate,
    token_probabilities,
)
from ..models.text import reference_text
from .base import BenchRow, Timing, time_in_turns
from .decode import EXACT_FORMS, LAYERS_BYTES, Layer, exact_forms, synthetic

PROPOSALS: dict[str, dict[str, Any]] = {
    "low-rank 32": {"proposal": "low-rank", "rank": 32},
    "mixed 24": {"proposal": "mixed", "rank": 24},
}
"""What drafts; 64 draws of each row, which the query heads of a key head share."""

DRAWS = 64
MAX_BYTES, MAX_TIME = 0.4, 0.6
"""The shares of the bytes and of the time of exact decoding that attention may take for a token."""

PROMPT = 7936
"""Tokens from which on `MAX_BYTES` is checked: of a short prompt 64 draws are a large share of the keys."""

LONG = 32768
"""Keys from which on `MAX_TIME` is checked: with fewer, the fixed time of a call is most of a draft's."""

GREEDY = {"prompts": 3, "length": 2048, "count": 680}
"""Greedy texts that have to be the exact model's, and tokens of each prompt and text."""

EXACT_STEPS = 5
"""Tokens that exact decoding is timed for."""


@dataclass(frozen=True)
class Continuation:
    """A text that was generated without loss.

    Parameters
    ----------
    tokens : tuple of int
    report : LosslessReport
    least_margin : float
        At temperature 0: the least difference of the two largest logits, by the exact model.
    differing : int
        At temperature 0: tokens that are not the likeliest by the exact model, given the text before them.
    """

    tokens: tuple[int, ...]
    report: LosslessReport
    least_margin: float
    differing: int


def bench_lossless(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Lossless generation beside exact decoding.

    Rows of the model: `seconds` is the time of a token of the whole model, drafts and exact passes together;
    `error` the share of tokens that are not those of the exact model, which attends to the same text in one
    pass, for greedy texts; details are `acceptance` by position, `tokens_per_pass`, `drafts_per_pass`,
    `attention_bytes` over those of exact decoding, and `least_margin` of the exact model's logits. Longer
    greedy texts at several prompts (`GREEDY`) are compared in the same way.

    Rows of attention: `seconds` is the time of one layer for a token: of k drafts, appended, attended and
    taken out again, and of one exact pass, over the tokens that a pass gave in the rows of the model, with
    k their drafts a pass; `error` is that of the exact pass. The baseline is the fastest exact form.

    What is read and how long it takes is checked at the lengths `PROMPT` and `LONG` and above, and reported
    at all.
    """
    del copy_bandwidth
    model = load_language_model("reference" if quick else "smollm2-135m")
    length, count = (400, 24) if quick else (PROMPT, 160)
    rows, reports = model_rows(model, length, count)
    rows += greedy_rows(model, **({"prompts": 3, "length": 200, "count": 16} if quick else GREEDY))
    for n in (4096,) if quick else (8192, LONG):
        rows += attention_rows(n, reports, turns=3 if quick else 15)
    return rows


# --- The model --------------------------------------------------------------------------------------


def model_rows(
    model: LanguageModel, length: int, count: int
) -> tuple[list[BenchRow], dict[str, LosslessReport]]:
    """Rows of a model that goes on after a prompt, greedily and by draws; the greedy reports by proposal."""
    text = model.encode(reference_text())
    tokens = text.repeat(1 + length // len(text))[:length]
    prefill = Prefill.of(model, tokens[None])
    baseline = exact_seconds(prefill)
    rows, reports = [], {}
    for temperature in (0.0, 1.0):
        case = f"{model.name}, {length:,} tokens, temperature {temperature:g}"
        print(f"\n{case}: exact decoding {1e3 * baseline:.0f} ms a token")
        for name, options in PROPOSALS.items():
            rank = min(options["rank"], model.config.head_dim)
            result = continuation(prefill, count, temperature, options["proposal"], rank)
            if temperature == 0:
                reports[name] = result.report
            rows.append(model_row(case, name, length, result, baseline))
    return rows, reports


def greedy_rows(model: LanguageModel, prompts: int, length: int, count: int) -> list[BenchRow]:
    """Rows of greedy texts after several prompts, which are evenly spread over a text."""
    text, rows, name = model.encode(reference_text()), [], "low-rank 32"
    for i in range(prompts):
        start = i * (len(text) - length) // prompts
        prefill = Prefill.of(model, text[None, start : start + length])
        result = continuation(prefill, count, 0.0, "low-rank", min(32, model.config.head_dim))
        case = f"{model.name}, greedy text {i + 1} of {prompts}, {length:,} and {count} tokens"
        print(f"\n{case}: least margin of the exact model's logits {result.least_margin:.2g}")
        rows.append(model_row(case, name, length, result, exact_seconds(prefill)))
    return rows


def model_row(case: str, name: str, length: int, result: Continuation, baseline: float) -> BenchRow:
    """The row of a text after a prompt of this length, which is printed."""
    report = result.report
    error = result.differing / len(result.tokens)
    check = "pass" if not error else f"{result.differing} tokens are not the exact model's"
    if not error and length >= PROMPT and report.attention_bytes > MAX_BYTES:
        check = f"attention reads {report.attention_bytes:.2f} of exact decoding's bytes, above {MAX_BYTES}"
    print(
        f"  {name:<12}{1e3 * report.seconds_per_token:>7.0f} ms a token, {report.attention_bytes:.2f} of the "
        f"bytes, {report.drafts_per_pass:.1f} drafts and {report.tokens_per_pass:.1f} tokens a pass, "
        f"accepted by position {' '.join(f'{x:.2f}' for x in report.acceptance)}  {check}"
    )
    return BenchRow(
        case=case,
        method=f"lossless, {name}",
        seconds=report.seconds_per_token,
        baseline="exact",
        ratio=baseline / report.seconds_per_token if not error else None,
        error=error,
        check=check,
        details={
            "acceptance": report.acceptance,
            "tokens_per_pass": report.tokens_per_pass,
            "drafts_per_pass": report.drafts_per_pass,
            "attention_bytes": report.attention_bytes,
            "least_margin": result.least_margin,
        },
    )


def continuation(prefill: Prefill, count: int, temperature: float, proposal: str, rank: int) -> Continuation:
    """A text after a prompt, drafted and verified; a greedy one is compared with the exact model's."""
    model = prefill.model
    caches = [
        SampledKVCache.build(k, v, proposal, rank, queries=q[:, :, -FITTED_QUERIES:])
        for q, k, v in prefill.layers
    ]
    drafter = SampledDrafter(model, prefill.logits[0], caches, DRAWS, seed=0)
    most = most_drafts(model.config.heads // model.config.kv_heads)
    counts, length = PassCounts(), DraftLength(most, temperature)
    new = speculate(
        drafter,
        count,
        lambda text, logits: token_probabilities(logits, temperature),
        length,
        counts,
        generator=torch.Generator().manual_seed(0),
    )
    tokens = tuple(new)
    margin, differing = float("nan"), 0
    if temperature == 0:
        whole = torch.cat((prefill.tokens[0], torch.tensor(tokens)))[None]
        with torch.no_grad():
            logits = model(whole, logits_to_keep=count + 1)[0, :-1]
        top = logits.topk(2)
        margin = float((top.values[:, 0] - top.values[:, 1]).min())
        differing = int((top.indices[:, 0] != torch.tensor(tokens)).sum())
    return Continuation(tokens, counts.report(), margin, differing)


def exact_seconds(prefill: Prefill) -> float:
    """The median time of a token of exact decoding."""
    state, seconds = Decoding.after(prefill, ExactPolicy()), []
    for _ in range(EXACT_STEPS + 1):
        start = time.perf_counter()
        state.step(state.logits.argmax(-1))
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds[1:]).median  # the first one copies the prompt


# --- Attention alone ----------------------------------------------------------------------------------


def attention_rows(n: int, reports: dict[str, LosslessReport], turns: int) -> list[BenchRow]:
    """Rows of the attention of one layer with SmolLM2-135M's heads and synthetic keys."""
    count = max(1, LAYERS_BYTES // (4 * 2 * 3 * n * 64))
    layers = [synthetic(3, n, 64, seed, 3) for seed in range(count)]
    calls: dict[str, Callable[[], object]] = {m.name: m.call for m in exact_forms(layers)}
    passes = {name: DraftedPass.of(layers, name, report) for name, report in reports.items()}
    calls |= {name: x.call for name, x in passes.items()}
    for call in calls.values():
        call()
    timings = time_in_turns(calls, turns)
    fastest = min(EXACT_FORMS, key=lambda name: timings[name].median)
    case = f"attention of one layer, 9 heads on 3, n={n:,}, d=64, {torch.get_num_threads()} threads"
    print(f"\n{case}: exact {1e3 * timings[fastest].median:.2f} ms a token ({fastest})")
    rows = []
    for name, drafted in passes.items():
        timing, tokens = timings[name], reports[name].tokens_per_pass
        share, error = timing.median / tokens / timings[fastest].median, drafted.error()
        check = "pass" if error < 1e-4 else f"error {error:.2g} of the exact pass is above 1e-4"
        if check == "pass" and n >= LONG and share > MAX_TIME:
            check = f"takes {share:.2f} of exact attention's time, above {MAX_TIME}"
        print(
            f"  lossless, {name:<12}{1e3 * timing.median / tokens:>7.2f} ms a token, {share:.2f} of exact: "
            f"{drafted.drafts} drafts and an exact pass in {1e3 * timing.median:.1f} ms for {tokens:.1f} "
            f"tokens  {check}"
        )
        rows.append(
            BenchRow(
                case=case,
                method=f"lossless, {name}",
                seconds=timing.median / tokens,
                baseline=fastest,
                ratio=1 / share if error < 1e-4 else None,
                error=error,
                check=check,
                low=timing.low / tokens,
                high=timing.high / tokens,
                details={"share_of_exact": share, "drafts": drafted.drafts, "tokens_per_pass": tokens},
            )
        )
    return rows


@dataclass(frozen=True)
class DraftedPass:
    """What one layer does for an exact pass and the drafts before it, for several layers in turns.

    Parameters
    ----------
    layers : sequence of Layer
    caches : sequence of SampledKVCache
    drafts : int
    """

    layers: Sequence[Layer]
    caches: Sequence[SampledKVCache]
    drafts: int

    @classmethod
    def of(cls, layers: Sequence[Layer], name: str, report: LosslessReport) -> DraftedPass:
        """The pass with as many drafts as a report says."""
        options = PROPOSALS[name]
        caches = [SampledKVCache.build(x.k, x.v, queries=x.earlier_queries, **options) for x in layers]
        for x, cache in zip(layers, caches, strict=True):  # it has room for more tokens from now on
            n = len(cache)
            cache.append(x.k[:, :1], x.v[:, :1])
            cache.crop(n)
        return cls(layers, caches, max(1, round(report.drafts_per_pass)))

    @property
    def call(self) -> Callable[[], Tensor]:
        """A function that does it for the next layer, and leaves its cache as it was."""
        turns = cycle(zip(self.layers, self.caches, strict=True))

        def call() -> Tensor:
            x, cache = next(turns)
            n = len(cache)
            for i in range(self.drafts):
                cache.append(x.k[:, i : i + 1], x.v[:, i : i + 1])
                _ = cache.attend(x.q[:, i : i + 1], DRAWS, share_keys=True).output
            cache.crop(n)
            more = self.drafts + 1
            cache.append(x.k[:, :more], x.v[:, :more])
            output = cache.attend_exactly(x.q[:, :more])
            cache.crop(n)
            return output

        return call

    def error(self) -> float:
        """The relative error of the exact pass of the first layer."""
        x, more = self.layers[0], self.drafts + 1
        k, v = (torch.cat((y, y[:, :more]), 1).double() for y in (x.k, x.v))
        mask = torch.ones(more, k.shape[1], dtype=torch.bool).tril(k.shape[1] - more)
        expected = torch.nn.functional.scaled_dot_product_attention(
            x.q[None, :, :more].double(), k[None], v[None], mask, enable_gqa=True
        )[0]
        return float((self.call() - expected).norm() / expected.norm())
