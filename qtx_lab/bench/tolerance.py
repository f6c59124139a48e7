"""`qtx-lab bench tolerance`: how often samplers miss a tolerance, and how many draws they spend on it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from ..attention import sampled_attention
from ..estimates import EstimateInfo
from ..models.reference import load_reference_model
from ..models.text import encode, reference_text
from ..samplers import SAMPLERS
from .base import BenchRow

CONFIDENCE = 0.95
TOLERANCES = (0.1, 0.3)
QUICK = ("head-tail", "systematic")
"""The samplers of a quick run."""
QUICK_CASES = (
    "diffuse",
    "peaked",
    "period 4",
    "blocks",
    "one-hot values",
    "clustered",
    "sink",
    "causal, 1-40 keys",
    "reference model",
)
KEYS, FEATURES, HEADS, ROWS = 512, 16, 2, 4
"""The size of a case. Each head has its own values, and each row its own probabilities."""
ROUNDING = 1e-6
"""How far the relative error of an exact row may exceed a tolerance."""
FALSE_ALARM = 1e-3
"""Probability with which a case that keeps its promise exactly fails the check, by chance."""
LADDER = 2**0.25
"""The ratio of the counts of draws that are tried for the fewest that would do."""


def bench_tolerance(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Misses of a tolerance, and the draws that it takes, by sampler, tolerance and class of rows.

    A case has 2 heads of 4 rows over 512 keys (fewer where it says so), and every row is estimated 200 times
    (50 where quick). A repetition misses where |o_hat - o| > tolerance |o|. The draws that a row *needs* are
    the fewest, on a ladder of ratio 2^(1/4), at which `num_samples` draws of the same sampler miss in no more
    than 5 % of 400 repetitions (100 where quick); its keys, if there is no such count. `seconds` is the time
    of all repetitions, `error` the share of repetitions that miss, `ratio` the draws that rows need over
    those that they take, the median over rows. Further details:

    - `sampler`, `tolerance`, `confidence`;
    - `miss low`, `miss high`: the Clopper-Pearson interval of the share, 95 %;
    - `worst row`: the share of the row that misses most often;
    - `needed`, `spent`, `pilot`: draws a row, medians over rows, pilots apart;
    - `used over needed`: the median over rows of (spent + pilot) / needed; `of each row`: the same for every
      row;
    - `exact`: the share of rows that were computed exactly.

    A case fails where so many misses would have a probability below 0.1 % if each had one of 5 %.
    """
    del copy_bandwidth
    names = [name for name, make in SAMPLERS.items() if make().predicts_variance]
    cases = QUICK_CASES if quick else tuple(CASES)
    runs = [
        (sampler, tolerance, case)
        for sampler in (QUICK if quick else names)
        for tolerance in ((0.2,) if quick else TOLERANCES)
        for case in cases
    ]
    repetitions, trials = (50, 100) if quick else (200, 400)
    rows = [
        measure(sampler, tolerance, case, repetitions, trials)
        for sampler, tolerance, case in tqdm(runs, desc="tolerance", leave=False)
    ]
    print_table(rows)
    return rows


def measure(sampler: str, tolerance: float, name: str, repetitions: int, trials: int) -> BenchRow:
    """Misses and draws of one sampler in one case; `trials` repetitions show how many draws are needed."""
    case, generator = CASES[name](), torch.Generator().manual_seed(1)
    start = time.perf_counter()
    errors, info = case.relative_errors(
        sampler, repetitions, generator, tolerance=tolerance, confidence=CONFIDENCE
    )
    seconds = time.perf_counter() - start
    needed = needed_draws(case, sampler, tolerance, CONFIDENCE, trials, generator)
    missed = errors > tolerance + ROUNDING
    count, total = int(missed.sum()), missed.numel()
    interval = stats.binomtest(count, total).proportion_ci(0.95)
    draws, pilots = info.draws_per_row, info.pilot_draws_per_row
    assert isinstance(draws, Tensor)
    assert isinstance(pilots, Tensor)
    spent, pilot = draws.double().mean(0), pilots.double().mean(0)
    over = (spent + pilot) / needed
    promise_holds = stats.binom.sf(count - 1, total, 1 - CONFIDENCE) >= FALSE_ALARM
    details = {
        "sampler": sampler,
        "tolerance": tolerance,
        "confidence": CONFIDENCE,
        "miss low": interval.low,
        "miss high": interval.high,
        "worst row": missed.double().mean(0).max().item(),
        "needed": needed.double().median().item(),
        "spent": spent.median().item(),
        "pilot": pilot.median().item(),
        "used over needed": over.median().item(),
        "of each row": over.flatten().tolist(),
        "exact": (draws == case.keys_of_each_row()).double().mean().item(),
    }
    return BenchRow(
        f"{name}, tolerance {tolerance}",
        sampler,
        seconds,
        "fewest draws that would do",
        1 / over.median().item() if promise_holds else None,
        count / total,
        "pass" if promise_holds else f"{count / total:.1%} of {total} miss",
        details=details,
    )


def print_table(rows: Sequence[BenchRow]) -> None:
    """Print the rows, and for each sampler the median over the cases."""
    print(
        f"\n  {'case':<38}{'sampler':<13}{'missed':>8}{'(95 % interval)':>18}{'worst row':>11}{'needed':>8}"
        f"{'spent':>8}{'pilot':>7}{'used/needed':>13}{'exact':>7}  check"
    )
    for row in rows:
        d = row.details
        interval = f"({d['miss low']:.1%}–{d['miss high']:.1%})"
        print(
            f"  {row.case:<38}{row.method:<13}{row.error:>8.1%}{interval:>18}{d['worst row']:>11.1%}"
            f"{d['needed']:>8.0f}{d['spent']:>8.0f}{d['pilot']:>7.0f}{d['used over needed']:>13.2f}"
            f"{d['exact']:>7.0%}  {row.check}"
        )
    for sampler in dict.fromkeys(row.method for row in rows):
        over = [row.details["used over needed"] for row in rows if row.method == sampler]
        print(f"  {sampler}: draws used over needed, median over {len(over)} cases: {median(over):.2f}")


@dataclass(frozen=True)
class Case:
    """Rows of one class: the arguments of an attention call without a batch dimension."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_rows(cls, p: Tensor, v: Tensor) -> Case:
        """Rows of unnormalised probabilities p (H, L, n) over values v (H, n, d)."""
        q = torch.eye(p.shape[1]).expand(p.shape[0], -1, -1)
        return cls(q, p.log().mT.contiguous(), v, {"scale": 1.0})

    def exact(self) -> Tensor:
        """The exact outputs (H, L, d), float64."""
        return F.scaled_dot_product_attention(
            self.q.double(), self.k.double(), self.v.double(), **self.options
        )

    def keys_of_each_row(self) -> Tensor:
        """How many keys each row sees: int64, (H, L)."""
        seen = torch.ones(*self.q.shape[:-1], self.k.shape[-2], dtype=torch.bool)
        if self.options.get("is_causal"):
            seen = seen.tril()
        if "attn_mask" in self.options:
            seen = seen & self.options["attn_mask"]
        return seen.sum(-1)

    def relative_errors(
        self, sampler: str, repetitions: int, generator: torch.Generator, **how: Any
    ) -> tuple[Tensor, EstimateInfo]:
        """|o_hat - o| / |o| of repetitions, (repetitions, H, L), and how the estimate came about."""
        q, k, v = (x.expand(repetitions, *x.shape) for x in (self.q, self.k, self.v))
        with torch.no_grad():
            est = sampled_attention(q, k, v, sampler=sampler, generator=generator, **how, **self.options)
        exact = self.exact()
        return (est.output - exact).norm(dim=-1) / exact.norm(dim=-1), est.info


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _diffuse() -> Case:
    return Case.of_rows(
        (0.5 * _normal(HEADS, ROWS, KEYS)).exp(), _normal(HEADS, KEYS, FEATURES, seed=1) + 0.5
    )


def _zero_mean() -> Case:
    return Case.of_rows((1.5 * _normal(HEADS, ROWS, KEYS)).exp(), _normal(HEADS, KEYS, FEATURES, seed=1))


def _peaked() -> Case:
    return Case.of_rows(
        (3.0 * _normal(HEADS, ROWS, KEYS)).exp(), _normal(HEADS, KEYS, FEATURES, seed=1) + 0.5
    )


def _skewed() -> Case:
    rank = torch.stack([_normal(KEYS, seed=i).argsort() for i in range(HEADS * ROWS)]).view(HEADS, ROWS, KEYS)
    return Case.of_rows(1 / (1.0 + rank), _normal(HEADS, KEYS, FEATURES, seed=1) + 0.3)


def _uneven_values() -> Case:
    heavy = _normal(HEADS, KEYS, FEATURES, seed=1).exp() ** 1.5
    return Case.of_rows((0.5 * _normal(HEADS, ROWS, KEYS)).exp(), heavy)


def _periodic(period: int) -> Callable[[], Case]:
    def make() -> Case:
        phase = (torch.arange(KEYS) % period < period / 2).float() * 2 - 1
        values = 1 + 0.3 * phase[:, None] * torch.ones(FEATURES)
        return Case.of_rows(torch.ones(HEADS, ROWS, KEYS), values.expand(HEADS, -1, -1))

    return make


def _blocks() -> Case:
    centres = _normal(HEADS, KEYS // 16, 1, FEATURES, seed=1).expand(-1, -1, 16, -1).reshape(HEADS, KEYS, -1)
    return Case.of_rows((0.5 * _normal(HEADS, ROWS, KEYS)).exp(), centres + 0.5)


def _one_hot() -> Case:
    v = torch.eye(FEATURES).repeat(KEYS // FEATURES, 1).expand(HEADS, -1, -1)
    return Case.of_rows((0.5 * _normal(HEADS, ROWS, KEYS)).exp(), v)


def _outlier() -> Case:
    p = torch.full((HEADS, ROWS, KEYS), (1 - 1e-3) / (KEYS - 1))
    p[..., 100] = 1e-3
    v = 1 + 0.1 * _normal(HEADS, KEYS, FEATURES, seed=1)
    v[:, 100] += torch.tensor([60.0, 250.0])[:, None]
    return Case.of_rows(p, v)


def _alternating_with_outlier() -> Case:
    case = _periodic(4)()
    v = case.v.clone()
    v[:, 7] += 40.0
    p = torch.ones(HEADS, ROWS, KEYS)
    p[..., 7] = 0.1
    return Case.of_rows(p, v)


def _sorted() -> Case:
    v = (_normal(HEADS, KEYS, 1, seed=1).sort(1).values + 1) * torch.ones(FEATURES)
    return Case.of_rows((0.5 * _normal(HEADS, ROWS, KEYS)).exp(), v)


def _duplicated() -> Case:
    p = (1.5 * _normal(HEADS, ROWS, KEYS // 8)).exp().repeat(1, 1, 8)
    v = (_normal(HEADS, KEYS // 8, FEATURES, seed=1) + 0.5).repeat(1, 8, 1)
    return Case.of_rows(p, v)


def _clustered() -> Case:
    which = torch.arange(KEYS) % 8
    centres = 2 * _normal(HEADS, 8, FEATURES, seed=1)
    v = centres[:, which] + 0.2 * _normal(HEADS, KEYS, FEATURES, seed=2)
    logits = 1.5 * _normal(HEADS, ROWS, 8)[..., which] + 0.5 * _normal(HEADS, ROWS, KEYS, seed=3)
    return Case.of_rows(logits.exp(), v)


def _sinks() -> Case:
    p = _normal(HEADS, ROWS, KEYS).exp()
    p[..., 0] = torch.tensor([1.0, 2.0, 10.0, 30.0])[:ROWS] * p.sum(-1)
    v = _normal(HEADS, KEYS, FEATURES, seed=1) + 0.3
    v[:, 0] *= 0.02
    return Case.of_rows(p, v)


def _narrow_cluster() -> Case:
    """Each row attends to a few keys whose values differ along one direction of its own."""
    v = _normal(HEADS, KEYS, FEATURES, seed=1)
    p = torch.full((HEADS, ROWS, KEYS), 1e-6)
    for i in range(ROWS):
        along = _normal(HEADS, 1, FEATURES, seed=10 + i)
        v[:, 40 * i : 40 * i + 40] = 0.3 + along * _normal(HEADS, 40, 1, seed=20 + i)
        p[:, i, 40 * i : 40 * i + 40] = 1
    return Case.of_rows(p, v)


def _causal() -> Case:
    q, k, v = (_normal(HEADS, 40, 8, seed=i) for i in range(3))
    return Case(q, k, v + 0.5, {"is_causal": True})


def _reference_model() -> Case:
    tokens = encode(reference_text())[None, 20_000 : 20_000 + KEYS]
    layers = list(load_reference_model().attention_inputs(tokens))
    parts = []
    for q, k, v in layers[1:4:2]:
        group = q.shape[1] // k.shape[1]
        parts.append((q[0, ::group, 63::48], k[0], v[0]))
    q, k, v = (torch.cat(x)[::2] for x in zip(*parts, strict=True))
    mask = torch.arange(KEYS) <= torch.arange(63, KEYS, 48)[:, None]
    return Case(q, k, v, {"attn_mask": mask})


CASES: dict[str, Callable[[], Case]] = {
    "diffuse": _diffuse,
    "values of mean zero": _zero_mean,
    "peaked": _peaked,
    "p ~ 1 / rank": _skewed,
    "heavy-tailed values": _uneven_values,
    "period 2": _periodic(2),
    "period 4": _periodic(4),
    "period 7": _periodic(7),
    "blocks": _blocks,
    "one-hot values": _one_hot,
    "outlier at p = .001": _outlier,
    "period 4 and outlier": _alternating_with_outlier,
    "sorted": _sorted,
    "duplicated keys": _duplicated,
    "clustered": _clustered,
    "narrow clusters": _narrow_cluster,
    "sink": _sinks,
    "causal, 1-40 keys": _causal,
    "reference model": _reference_model,
}


def needed_draws(
    case: Case,
    sampler: str,
    tolerance: float,
    confidence: float,
    repetitions: int,
    generator: torch.Generator,
) -> Tensor:
    """The fewest draws of each row (H, L) at which enough repetitions keep the tolerance.

    No more than 1 - confidence of them may miss it. Where no number is enough, it is the row's keys.
    """
    keys = case.keys_of_each_row()
    needed = keys.clone()
    open_rows = torch.ones_like(needed, dtype=torch.bool)
    count, last = 1.0, 0
    while bool(open_rows.any()) and count < int(keys.max()):
        s = math.ceil(count)
        if s > last:
            errors, _ = case.relative_errors(sampler, repetitions, generator, num_samples=s)
            few_enough = (errors > tolerance).double().mean(0) <= 1 - confidence
            new = open_rows & few_enough
            needed[new] = torch.minimum(needed[new], torch.tensor(s))
            open_rows &= ~few_enough & (s < keys)
        last, count = s, count * LADDER
    return needed
