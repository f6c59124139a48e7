"""`qtx-lab bench coverage`: how often 95 % intervals hold the exact output, by sampler and class of rows."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from ..attention import sampled_attention
from ..errors import FallbackWarning
from ..estimates import RELIABLE
from ..samplers import SAMPLERS
from .base import BenchRow, shown

BASELINE = "monte-carlo"
LEVEL = 0.95
LEAST_COVERAGE = 0.90
"""A class of rows passes if so many of the coordinates of its trusted rows are inside their intervals."""
LEAST_FLAGGED = 0.95
"""And if so many of the misses of rows that are covered less often than that are flagged."""
NUM_KEYS = 256
NUM_SAMPLES = 32
WIDTH = 16


@dataclass(frozen=True)
class RowClass:
    """Rows of one kind that attend to the same keys.

    Parameters
    ----------
    name : str
    q : Tensor, (rows, E)
    k : Tensor, (n, E)
    v : Tensor, (n, d)
    options : mapping
        Further arguments of the attention.
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_logits(cls, name: str, logits: Tensor, v: Tensor) -> RowClass:
        """Rows with these logits (rows, n)."""
        return cls(name, logits, torch.eye(logits.shape[-1]), v, {"scale": 1.0})

    def exact(self) -> Tensor:
        """The exact output, (rows, d), float64."""
        q, k, v = (x.double()[None] for x in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, **self.options)[0]


@dataclass(frozen=True)
class Coverage:
    """How the intervals of a sampler fared on a class of rows.

    Parameters
    ----------
    draws : int
        Rows times seeds, or seeds alone for a sampler whose rows share their randomness: what the bounds of
        the coverage count as independent.
    coverage, low, high : float
        Share of coordinates inside, with the bounds of Clopper and Pearson (1934).
    trusted : float
        The same among rows whose `reliable` is set; NaN where there is none.
    width : float
        Mean half-width over the root mean squared error.
    flagged : float
        Share of rows whose `reliable` is not set.
    beyond : float
        Share of rows that miss: their output is farther from the exact one than their half-width, lengths
        over features.
    beyond_flagged : float
        Share of those that are flagged; NaN where none misses.
    poor : float
        Share of rows that are covered less than `LEAST_COVERAGE` over their seeds, going by the upper bound
        of Clopper and Pearson.
    poor_flagged : float
        Of how often those miss, the share that is flagged; NaN where there are none.
    bernstein, bernstein_width : float
        Share of coordinates inside the interval that holds without asymptotics, and its mean width over that
        of the other; NaN where there is none.
    error : float
        Relative error of the output.
    """

    draws: int
    coverage: float
    low: float
    high: float
    trusted: float
    width: float
    flagged: float
    beyond: float
    beyond_flagged: float
    poor: float
    poor_flagged: float
    bernstein: float
    bernstein_width: float
    error: float

    @property
    def check(self) -> str:
        """ "pass", or what falls short."""
        if self.trusted < LEAST_COVERAGE:
            return f"covers {self.trusted:.3f} where it is trusted"
        if self.poor_flagged < LEAST_FLAGGED:  # not where it is NaN
            return f"flags {self.poor_flagged:.0%} of the misses of rows that are covered too seldom"
        return "pass"


def bench_coverage(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Measure the coverage of 95 % intervals by sampler and class of rows.

    It does so for 2, 4 and 8 replicates, and for 1 where that gives error bars.

    Every row is drawn with as many seeds as stand in the table; `NUM_SAMPLES` draws a replicate of `NUM_KEYS`
    keys. The classes are those of `row_classes`. Each result's details are the fields of `Coverage`; its
    `error` is that of the output, `seconds` the time of the estimate and its error bars.

    A sampler fails its check on a class if trusted rows are covered less than `LEAST_COVERAGE`, or if fewer
    than `LEAST_FLAGGED` of the misses of rows are flagged that their intervals cover less often than that. Of
    all misses some are chance, as one in twenty intervals may miss, and no flag can tell.
    """
    del copy_bandwidth
    num_rows, seeds = (16, 12) if quick else (40, 100)
    results: list[BenchRow] = []
    names = [BASELINE, *(name for name in SAMPLERS if name not in (BASELINE, "exact"))]
    for rows in row_classes(num_rows):
        of_class: list[BenchRow] = []
        for replicates in (1, 2, 4, 8):
            measured = {}
            for name in names:
                start = time.perf_counter()
                coverage = measure(rows, name, replicates, seeds)
                if coverage is not None:
                    measured[name] = coverage, time.perf_counter() - start
            case = f"{rows.name}, {replicates} replicate{'s' if replicates > 1 else ''}"
            of_class += [bench_row(case, name, *measured[name], measured[BASELINE][1]) for name in measured]
        print_rows(rows.name, of_class, num_rows, seeds)
        results += of_class
    print_summary(results)
    return results


def measure(
    rows: RowClass,
    sampler: str,
    replicates: int,
    seeds: int,
    num_samples: int = NUM_SAMPLES,
    scale_bars: float = 1.0,
) -> Coverage | None:
    """The coverage of a sampler on a class of rows; None where one replicate gives no error bars.

    Parameters
    ----------
    seeds : int
        How often each row is drawn.
    scale_bars : float
        A fault to plant: what standard errors are multiplied by.
    """
    q, k, v = (x.expand(seeds, 1, *x.shape).contiguous() for x in (rows.q, rows.k, rows.v))
    generator = torch.Generator().manual_seed(replicates)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        estimate = sampled_attention(
            q, k, v, sampler=sampler, num_samples=num_samples, replicates=replicates, generator=generator,
            **rows.options,
        )  # fmt: skip
    if estimate.std_error is None:
        return None
    exact = rows.exact()
    slack = 1e-5 * exact.abs().max()  # the float32 of the logits
    low, high = (x[:, 0].double() for x in estimate.confidence_interval(LEVEL))
    half, error = scale_bars * (high - low) / 2 + slack, estimate.output[:, 0].double() - exact
    inside = (error.abs() <= half).double().mean(-1)  # [seeds, rows]
    beyond = error.norm(dim=-1) > half.norm(dim=-1)
    assert estimate.reliability is not None  # all samplers by name know it
    flagged = scale_bars * estimate.reliability[:, 0] < RELIABLE
    bernstein, bernstein_width = math.nan, math.nan
    if estimate.make_bounds is not None:
        least, most = (x[:, 0].double() for x in estimate.confidence_interval(LEVEL, method="bernstein"))
        bernstein = float(((least - slack <= exact) & (exact <= most + slack)).double().mean())
        bernstein_width = float((most - least).mean() / (high - low).mean())
    poor = torch.tensor(
        [clopper_pearson(round(x * seeds), seeds)[1] < LEAST_COVERAGE for x in inside.mean(0).tolist()]
    )
    draws = seeds if SAMPLERS[sampler]().joint else inside.numel()
    covered = float(inside.mean())
    bounds = clopper_pearson(round(covered * draws), draws)
    return Coverage(
        draws=draws,
        coverage=covered,
        low=bounds[0],
        high=bounds[1],
        trusted=_mean(inside[~flagged]),
        width=float(half.mean() / error.square().mean().sqrt().clamp_min(1e-12)),
        flagged=float(flagged.double().mean()),
        beyond=float(beyond.double().mean()),
        beyond_flagged=_mean(flagged[beyond].double()),
        poor=float(poor.double().mean()),
        poor_flagged=_mean(flagged[:, poor][beyond[:, poor]].double()),
        bernstein=bernstein,
        bernstein_width=bernstein_width,
        error=float(error.norm() / exact.norm() / math.sqrt(seeds)),
    )


def _mean(x: Tensor) -> float:
    return float(x.mean()) if x.numel() else math.nan


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Bounds of the probability that gave so many successes in so many independent trials.

    Source: Clopper and Pearson, The use of confidence or fiducial limits (1934).

    >>> [round(x, 3) for x in clopper_pearson(95, 100)]
    [0.887, 0.984]
    """
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(stats.beta.isf(tail, successes + 1, trials - successes))
    return low, high


# --- The classes of rows --------------------------------------------------------------------------


def row_classes(num_rows: int, num_keys: int = NUM_KEYS, width: int = WIDTH, seed: int = 0) -> list[RowClass]:
    """Rows of eleven classes, `num_rows` (a multiple of 4) of each, which attend to `num_keys` keys.

    - peaked: one key holds .9 to .997, values are normally distributed;
    - diffuse: all keys hold about as much;
    - skewed: log-normal probabilities and values;
    - one-hot: each feature is 10 at one key and 0 elsewhere;
    - outlier: a key of probability 3e-4 to 1e-2 whose value is 100 times as large as the others';
    - clustered: keys of 16 clusters with nearly the same logits and values within each;
    - sinks: the first key holds .5 to .995 and has a value near 0;
    - inverse: values in proportion to 1 / p;
    - causal: rows of a causal mask that see 1, 2, 3, … keys;
    - language model: see `language_model_rows`;
    - anisotropic: peaked rows of logits that no map of low rank knows, for the learned proposal.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def spread(low: float, high: float) -> Tensor:
        return torch.logspace(math.log10(low), math.log10(high), 4).repeat(num_rows // 4)

    def holding(logits: Tensor, key: Tensor | int, mass: Tensor) -> Tensor:
        """The logits with one key of each row set so that it holds a mass."""
        at = torch.as_tensor(key).expand(len(logits))[:, None]
        others = logits.scatter(1, at, -math.inf).logsumexp(-1)
        return logits.scatter(1, at, (others + mass.logit())[:, None])

    n, values = num_keys, normal(num_keys, width)
    one_hot = torch.zeros(n, width)
    one_hot[torch.randperm(n, generator=g)[:width], torch.arange(width)] = 10.0
    outlier = values.clone()
    outlier[0] = 100.0 * normal(width).sign()
    sink = values.clone()
    sink[0] *= 0.01
    top = torch.randint(n, (num_rows,), generator=g)
    flat, uneven = 0.3 * normal(num_rows, n), normal(num_rows, n)
    cluster = torch.randint(16, (n,), generator=g)
    clusters = 1.5 * normal(num_rows, 16)[:, cluster] + 0.1 * normal(num_rows, n)
    inverse = 1 / (n * (1.5 * uneven).softmax(-1).mean(0))[:, None]
    causal = {"is_causal": True}
    of_logits = RowClass.of_logits
    return [
        of_logits("peaked", holding(torch.zeros(num_rows, n), top, 1 - spread(0.1, 0.003)), values),
        of_logits("diffuse", flat, values),
        of_logits("skewed", 2 * uneven, (1.5 * normal(n, width)).exp()),
        of_logits("one-hot", uneven, one_hot),
        of_logits("outlier", holding(0.5 * uneven, 0, spread(3e-4, 1e-2)), outlier),
        of_logits("clustered", clusters, 3 * normal(16, width)[cluster] + 0.1 * normal(n, width)),
        of_logits("sinks", holding(flat, 0, 1 - spread(0.5, 0.005)), sink),
        of_logits("inverse", 1.5 * uneven, inverse * (1 + 0.3 * normal(n, width))),
        RowClass("causal", 1.5 * normal(64, 32), normal(64, 32), normal(64, width), causal),
        language_model_rows(num_rows, n, width, g),
        RowClass("anisotropic", 4 * normal(num_rows, 32), normal(n, 32), values),
    ]


def language_model_rows(
    num_rows: int, num_keys: int, width: int, generator: torch.Generator, features: int = 64
) -> RowClass:
    """The last rows of a head as language models have them.

    Queries and keys share a direction in the slowly turning half of their rotary embedding (RoPE; Su et al.,
    RoFormer, 2021), the first key is a sink with hardly a value, and values are heavy-tailed over keys and
    features.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    frequency = 10_000.0 ** (-torch.arange(0, features, 2) / features)

    def turned(x: Tensor, position: Tensor) -> Tensor:
        angle = position[:, None] * frequency
        even, odd = x[:, ::2], x[:, 1::2]
        pairs = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        return torch.stack(pairs, -1).flatten(-2)

    slow = (torch.arange(features) >= features // 2).float()
    shared, own = 2 * slow * normal(features), slow * normal(features)
    position = torch.arange(num_keys, dtype=torch.float32)
    k = turned(normal(num_keys, features) + shared, position)
    q = turned(normal(num_rows, features) + shared + own, position[-num_rows:])
    scale = features**-0.5
    others = (q @ k[1:].mT * scale).logsumexp(-1).mean()
    mean = q.mean(0)
    k[0] = (others + 1) / scale * mean / mean.square().sum()  # e times as much as all others together
    v = normal(num_keys, width) * (0.8 * normal(num_keys, 1)).exp() * (0.7 * normal(1, width)).exp()
    v[0] *= 0.02
    return RowClass("language model", q, k, v)


# --- What is printed ------------------------------------------------------------------------------


def bench_row(case: str, name: str, x: Coverage, seconds: float, baseline_seconds: float) -> BenchRow:
    """The result of a sampler on a class of rows."""
    passed = x.check == "pass"
    details = {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in vars(x).items()
        if key != "error"
    }
    ratio = baseline_seconds / seconds if passed else None
    return BenchRow(case, name, seconds, BASELINE, ratio, x.error, x.check, details=details)


def print_rows(name: str, rows: Sequence[BenchRow], num_rows: int, seeds: int) -> None:
    """Print the table of a class of rows."""
    print(f"\n{name}: {num_rows} rows × {seeds} seeds, {NUM_SAMPLES} draws a replicate")
    print(
        f"  {'sampler':<13}{'replicates':>11}{'coverage':>10}{'(95 % bounds)':>15}{'trusted':>9}"
        f"{'flagged':>9}{'miss':>7}{'flagged':>9}{'poor':>6}{'flagged':>9}{'width':>7}{'bernstein':>11}"
        f"{'width':>7}  check"
    )
    for row in rows:
        x = row.details
        bounds = f"{x['low']:.3f}–{x['high']:.3f}"
        print(
            f"  {row.method:<13}{row.case.split()[-2]:>11}{x['coverage']:>10.3f}{bounds:>15}"
            f"{shown(x['trusted'], '.3f'):>9}{x['flagged']:>9.0%}{x['beyond']:>7.1%}"
            f"{shown(x['beyond_flagged'], '.0%'):>9}{x['poor']:>6.0%}{shown(x['poor_flagged'], '.0%'):>9}"
            f"{x['width']:>7.2f}{shown(x['bernstein'], '.3f'):>11}"
            f"{shown(x['bernstein_width'], '.1f'):>7}  {row.check}"
        )


def print_summary(rows: Sequence[BenchRow]) -> None:
    """Print the worst class of each sampler, and what is flagged over all."""
    print(
        f"\n  {'sampler':<13}{'worst coverage':>15}{'where trusted':>15}{'flagged':>9}{'of misses':>11}"
        f"{'width':>7}"
    )
    for name in dict.fromkeys(row.method for row in rows):
        of_sampler = [row.details for row in rows if row.method == name]
        trusted = [x["trusted"] for x in of_sampler if x["trusted"] is not None]
        beyond = sum(x["beyond"] for x in of_sampler)
        caught = sum(x["beyond"] * (x["beyond_flagged"] or 0) for x in of_sampler)
        flagged, width = (_of(of_sampler, key, sum) / len(of_sampler) for key in ("flagged", "width"))
        print(
            f"  {name:<13}{_of(of_sampler, 'coverage', min):>15.3f}{min(trusted, default=math.nan):>15.3f}"
            f"{flagged:>9.1%}{shown(caught / beyond if beyond else None, '.0%'):>11}{width:>7.2f}"
        )
    print(
        "  coverage: share of coordinates inside 95 % intervals, with Clopper–Pearson bounds; trusted: the\n"
        "  same of rows that are not flagged (est.reliable); miss: rows farther from the exact output than\n"
        "  their half-width, and how many of these are flagged; poor: rows covered less than .90 over their\n"
        "  seeds, and how many of their misses are flagged; width: mean half-width over root mean squared\n"
        '  error; bernstein: coverage by method="bernstein", and its width over the other one\'s.'
    )


def _of(details: Sequence[Mapping[str, Any]], key: str, of: Callable[[list[float]], float]) -> float:
    return of([x[key] for x in details])
