"""`qtx-lab bench llm_rows`: errors of single attention rows of a real language model, at equal reads.

Every method is a cache policy that decodes the last tokens of a text after an exact prompt, so that all of
them see the same queries, keys and values, and count what they read in the same way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.policies import CachePolicy, Reads, make_policy
from ..models.base import LanguageModel
from ..models.language_model import load_language_model
from ..models.text import reference_text
from .base import BenchRow

LAYERS = (0, 3, 15, 29)
"""Layers of SmolLM2-135M: diffuse and peaked rows, and those whose keys sketches represent worst."""

ROWS = 54
"""The last positions of the text, whose queries attend."""

BUDGET = 0.05
"""The share of the keys that a query head reads."""

MATCHING_STEPS = 5
"""Steps in which the draws of a method are found that read as many values as another one does."""

TARGETS = {
    "head-tail": 0.023,
    "exact logits": 0.023,
    "exact logits, adaptive": 0.023,
    "mixed 48": 0.031,
    "mixed 24, shared": 0.09,
    "mixed 15, shared": 0.09,
}
"""The largest geometric mean of the errors of rows with which a method passes."""

NO_WORSE_THAN_SYSTEMATIC = "exact logits, adaptive"
"""The method whose worst tenth of rows may err as much as that of systematic sampling, in no layer more."""


@dataclass(frozen=True)
class LayerRows:
    """What attends in one layer: q (B, H, L, E), k (B, Hkv, L, E) and v (B, Hkv, L, Ev) of a text."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor

    def exact(self, rows: int) -> Tensor:
        """The exact outputs of the last rows, (B, H, rows, Ev)."""
        n = self.k.shape[-2]
        mask = torch.ones(rows, n, dtype=torch.bool).tril(n - rows)
        grouped = self.q.shape[1] != self.k.shape[1]
        return F.scaled_dot_product_attention(
            self.q[:, :, -rows:], self.k, self.v, attn_mask=mask, enable_gqa=grouped
        )


@dataclass(frozen=True)
class RowErrors:
    """Relative errors |o_hat - o| / |o| of rows, and what was read for them.

    Parameters
    ----------
    errors : Tensor, float64, (layers, seeds, rows of all heads)
    reads : tuple of Reads
        Of each layer.
    seconds : float
        Median over the tokens of all layers, appending included.
    """

    errors: Tensor
    reads: tuple[Reads, ...]
    seconds: float

    @property
    def geometric_mean(self) -> float:
        """Over rows and layers."""
        return float(self.errors.clamp_min(1e-9).log().mean().exp())

    @property
    def worst_tenth(self) -> tuple[float, ...]:
        """The error that a tenth of the rows exceed, in each layer."""
        return tuple(self.errors.flatten(1).quantile(0.9, dim=1).tolist())

    @property
    def mean_reads(self) -> Reads:
        """Over the layers."""
        return Reads.mean(self.reads)


def row_errors(
    layers: Sequence[LayerRows],
    policy: CachePolicy,
    *,
    rows: int = ROWS,
    seeds: int = 2,
    values_like: RowErrors | None = None,
) -> RowErrors:
    """Errors of the last rows of layers, decoded one by one by a policy.

    Parameters
    ----------
    layers : sequence of LayerRows
    policy : CachePolicy
    rows : int
    seeds : int
        How often it decodes, each time with other random numbers.
    values_like : RowErrors, optional
        The policy gets the budget in each layer, in place of its own, with which it reads as many values as
        these did. For methods whose budget is the most that a row reads.
    """
    errors: list[Tensor] = []
    reads: list[Reads] = []
    seconds: list[float] = []
    for i, layer in enumerate(layers):
        chosen = policy
        if values_like is not None:
            chosen = matched(policy, layer, rows, values_like.reads[i].values)
        exact = layer.exact(rows).double()
        of_seeds: list[Tensor] = []
        for seed in range(seeds):
            output, read, times = decode(layer, replace(chosen, seed=policy.seed + seed), rows)
            error = (output.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
            of_seeds.append(error.flatten())
            seconds += times
        errors.append(torch.stack(of_seeds))
        reads.append(read)
    return RowErrors(torch.stack(errors), tuple(reads), float(torch.tensor(seconds).median()))


def decode(layer: LayerRows, policy: CachePolicy, rows: int) -> tuple[Tensor, Reads, list[float]]:
    """Outputs (B, H, rows, Ev) of the last rows by a policy, its reads, and the seconds of each token."""
    prompt = layer.k.shape[-2] - rows
    q, k, v = (x[:, :, :prompt] for x in (layer.q, layer.k, layer.v))
    cache = policy.start(layer.layer, q, k, v)
    outputs, seconds = [], []
    for i in range(prompt, prompt + rows):
        start = time.perf_counter()
        cache.append(layer.k[:, :, i : i + 1], layer.v[:, :, i : i + 1])
        outputs.append(cache.attend(layer.q[:, :, i : i + 1]))
        seconds.append(time.perf_counter() - start)
    return torch.cat(outputs, 2), cache.reads, seconds


def matched(policy: CachePolicy, layer: LayerRows, rows: int, values: float) -> CachePolicy:
    """The policy with the budget that reads this share of the values, found by secants of logarithms."""
    n = layer.k.shape[-2]
    budget = max(1, round(BUDGET * n))
    for _ in range(MATCHING_STEPS):
        read = decode(layer, replace(policy, budget=budget), rows)[1].values
        # Of a row that is spread out the reads grow as the budget, of a peaked one more slowly.
        budget = min(n, max(1, round(budget * (values / read) ** 1.3)))
    return replace(policy, budget=budget)


def text_rows(model: LanguageModel, length: int = 2048, layers: Sequence[int] = LAYERS) -> list[LayerRows]:
    """Layers over the first tokens of documentation text."""
    tokens = model.encode(reference_text())[None, :length]
    inputs = model.attention_inputs(tokens, layers)
    return [LayerRows(layer, *x) for layer, x in zip(layers, inputs, strict=True)]


def policies() -> dict[str, CachePolicy]:
    """The methods by name; the adaptive ones and systematic sampling are to read what head-tail reads."""
    settings: dict[str, dict[str, Any]] = {
        "head-tail": {"name": "sampler", "sampler": "head-tail"},
        "systematic": {"name": "sampler", "sampler": "systematic"},
        "exact logits": {"name": "sampled", "proposal": "exact"},
        "exact logits, adaptive": {"name": "sampled", "proposal": "exact", "adaptive": True},
        "int4": {"name": "sampled", "proposal": "int4"},
        "int4, adaptive": {"name": "sampled", "proposal": "int4", "adaptive": True},
        "mixed 48": {"name": "sampled", "proposal": "mixed", "rank": 48},
        "mixed 24": {"name": "sampled", "proposal": "mixed", "rank": 24},
        "low-rank 16": {"name": "sampled", "proposal": "low-rank", "rank": 16},
        "mixed 24, shared": {"name": "sampled", "proposal": "mixed", "rank": 24, "shared": True},
        "mixed 15, shared": {"name": "sampled", "proposal": "mixed", "rank": 15, "shared": True},
        "oracle top-k": {"name": "oracle-top-k"},
        "Quest": {"name": "quest", "page": 8},
        "PQCache": {"name": "pqcache"},
        "PQCache, drawn and shared": {"name": "pqcache", "draw": True, "shared": True},
    }
    return {name: make_policy(**options, budget=BUDGET) for name, options in settings.items()}


def bench_llm_rows(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Rows of SmolLM2-135M over documentation text, at 5 % of the keys.

    `error` is the geometric mean over rows and layers of |o_hat - o| / |o|, `seconds` the median time to
    append and attend to one token in one layer; there is no baseline and no ratio, since policies count what
    they read. Further details: `worst tenth`, the 90 % quantile of the errors in each layer; `keys`, `values`
    and `bytes`, what was read as shares of what exact attention reads, in half precision, where the query
    heads of a key head read what they share once.
    """
    del copy_bandwidth
    model = load_language_model("smollm2-135m")
    layers = text_rows(model, 1024 if quick else 2048)
    measured: dict[str, RowErrors] = {}
    for name, policy in policies().items():
        if quick and name in ("Quest", "mixed 15, shared", "PQCache, drawn and shared"):
            continue
        like = measured["head-tail"] if name == "systematic" or name.endswith("adaptive") else None
        rows, seeds = (16, 1) if quick else (ROWS, 2)
        measured[name] = row_errors(layers, policy, rows=rows, seeds=seeds, values_like=like)
    case = f"SmolLM2-135M, layers {', '.join(map(str, LAYERS))}, {BUDGET:.0%} of the keys"
    result = [bench_row(case, name, x, {} if quick else TARGETS) for name, x in measured.items()]
    if not quick:
        result = [with_worst_rows_checked(row, measured["systematic"]) for row in result]
    print_rows(case, result)
    return result


def bench_row(case: str, name: str, measured: RowErrors, targets: Mapping[str, float]) -> BenchRow:
    """A method's row."""
    reads, target = measured.mean_reads, targets.get(name, math.inf)
    error = measured.geometric_mean
    return BenchRow(
        case=case,
        method=name,
        seconds=measured.seconds,
        baseline="",
        ratio=None,
        error=error,
        check="pass" if error <= target else f"error {error:.3f} is above {target}",
        details={
            "worst tenth": measured.worst_tenth,
            "keys": reads.keys,
            "values": reads.values,
            "bytes": reads.bytes,
        },
    )


def with_worst_rows_checked(row: BenchRow, systematic: RowErrors) -> BenchRow:
    """The row of `NO_WORSE_THAN_SYSTEMATIC`, which fails if its worst rows err more; others as they are."""
    if row.method != NO_WORSE_THAN_SYSTEMATIC or not row.passed:
        return row
    both = zip(row.details["worst tenth"], systematic.worst_tenth, strict=True)
    worse = [f"{mine:.3f} > {other:.3f}" for mine, other in both if mine > other]
    check = f"worst rows err more than systematic sampling's: {', '.join(worse)}" if worse else "pass"
    return replace(row, check=check)


def print_rows(case: str, rows: Sequence[BenchRow]) -> None:
    """Print the table."""
    print(f"\n{case}\n  {'method':<27}{'error':>8}{'keys':>7}{'values':>8}{'bytes':>7}  worst tenth")
    for row in rows:
        worst = " ".join(f"{x:.3f}" for x in row.details["worst tenth"])
        print(
            f"  {row.method:<27}{row.error:>8.4f}{row.details['keys']:>7.1%}{row.details['values']:>8.1%}"
            f"{row.details['bytes']:>7.1%}  {worst}  {row.check}"
        )
