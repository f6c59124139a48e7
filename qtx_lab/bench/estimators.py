"""`qtx-lab bench estimators`: the error of every estimator at equal draws, beside i.i.d. draws and published
methods.

They are measured on the reference model's own queries, keys and values, layer by layer, over text that it was
not trained on, and on diffuse and peaked synthetic rows. The learned proposal is fitted to other text, or to
other synthetic rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..attention import sampled_attention
from ..models.reference import load_reference_model
from ..models.text import encode, reference_text
from ..samplers import BASELINES, SAMPLERS, LearnedImportanceSampler, make_sampler
from .base import BenchRow, Timing, shown
from .control_sets import bench_control_sets
from .coreset_controls import bench_coreset_controls

BASELINE = "monte-carlo"
DIFFUSE = 1 / 8
"""A head is diffuse if 1 / sum p², the effective number of keys, is on average this share of those seen."""

CONTROLS = ("performer", "linformer", "topk")
ALL = "all three"
ALLOWED = 1.1
"""An unbiased method may have this many times the error of i.i.d. draws."""

Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """Attention to estimate: q (B, H, L, E), k and v (B, Hkv, L, E) of each layer."""

    name: str
    layers: Sequence[Inputs]
    training: Sequence[Inputs]
    """Inputs of the same kind to which the learned proposal is fitted."""
    options: dict[str, Any]
    """Arguments of SDPA, such as `is_causal`."""
    first: int
    """The first row whose error counts: the causal rows before it see too few keys."""


@dataclass(frozen=True)
class Estimator:
    """One competitor: its name, and the arguments that select it in `sampled_attention`."""

    name: str
    options: dict[str, Any]

    @property
    def unbiased(self) -> bool:
        """Whether it promises no bias. A learned proposal does not: its estimate is self-normalised."""
        sampler = self.options["sampler"]
        return make_sampler(sampler).unbiased and not isinstance(sampler, LearnedImportanceSampler)


@dataclass(frozen=True)
class EstimatorError:
    """The error of one estimator at one number of draws, by layers and heads (layers, H), float64."""

    name: str
    unbiased: bool
    square: Tensor
    """Mean squared error."""
    bias: Tensor
    """The part of the squared error that averaging does not remove; being estimated, it may be below 0."""
    size: Tensor
    """Mean square of the exact output."""
    seconds: list[float]
    """Time of each call, over layers and repetitions."""
    values_read: float
    """Distinct values that the draws of a query position read, the heads of a group together, on average."""


@dataclass(frozen=True)
class Fit:
    """Learned proposals of rank d / 2 by name, for each layer, and the chi² divergence on held-out rows."""

    proposals: list[dict[str, LearnedImportanceSampler]]
    chi_square: float
    """Geometric mean over the layers."""
    chi_square_random: float
    """The same of random projections that were not fitted."""


@dataclass(frozen=True)
class Target:
    """A ratio of errors, and its limit."""

    name: str
    ratio: float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether the ratio is within the limit."""
        return self.ratio <= self.limit if self.at_most else self.ratio >= self.limit


def bench_estimators(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Every estimator's error against that of i.i.d. draws.

    `error` is the root mean squared error over the exact output's root mean square, as the geometric mean
    over heads; `ratio` is of the time (above 1: faster than i.i.d. draws). Further details of the rows:

    - `error ratio`: the root mean squared error over that of i.i.d. draws, as the geometric mean over heads;
      the same over some heads as `error ratio, diffuse heads` (see `DIFFUSE`) and `error ratio, other heads`,
      and over another method as `error ratio to systematic`;
    - `draws of i.i.d.`: how many times as many i.i.d. draws would have the same error, 1 / (error ratio)²;
    - `values read`: distinct values that the draws of a query position read, the heads of a group together
      (the values that a control variate reads are not counted);
    - `bias share`: the share of the squared error, over all heads, that is bias;
    - `microseconds a row`.

    The tables of `bench_control_sets` follow: what sets of control variates leave of the error. The last one
    is of `bench_coreset_controls`.

    A method fails its check if its error is not finite, or if it is unbiased and has more than 1.1 times the
    error of i.i.d. draws. It then gets none of these ratios.
    """
    del copy_bandwidth
    rows: list[BenchRow] = []
    repetitions = 3 if quick else 4
    for case in cases(quick):
        n = case.layers[0][1].shape[-2]
        fitted = fit(case, steps=100 if quick else 400)
        errors: dict[int, dict[str, EstimatorError]] = {}
        for draws in (n // 32, n // 4) if quick else (n // 32, n // 8, n // 4):
            errors[draws] = measure(case, fitted.proposals, draws, repetitions)
            rows += table(case, draws, errors[draws])
        if (
            case.options
        ):  # only learned attention: synthetic rows have no heads to average over, and no low rank
            print_targets(case, errors, fitted)
    return rows + bench_control_sets(quick) + bench_coreset_controls(quick)


# --- What is estimated ----------------------------------------------------------------------------


def cases(quick: bool) -> list[Case]:
    """The reference model's attention, and synthetic rows of two kinds."""
    n, windows = (256, 24) if quick else (512, 48)
    tokens = encode(reference_text())
    tokens = tokens[: len(tokens) // n * n].view(-1, n)
    model = load_reference_model()
    training, held_out = (model.attention_inputs(x) for x in (tokens[:windows], tokens[-1:]))
    options = {"is_causal": True, "enable_gqa": True}
    name = f"reference model, n={n}, last {n // 4} rows"
    all_cases = [Case(name, held_out, training, options, 3 * n // 4)]
    for kind, spread in (("diffuse", 0.5), ("peaked", 2.5)):
        layer, other = (synthetic(n, spread, batch, seed) for seed, batch in ((0, 1), (1, 8)))
        all_cases.append(Case(f"{kind} synthetic rows, n={n}", [layer], [other], {}, 0))
    return all_cases


def synthetic(n: int, spread: float, batch: int, seed: int) -> Inputs:
    """Gaussian q, k, v (batch, 8, n, 32) whose logits have standard deviation `spread`."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, 8, n, 32, generator=g) for _ in range(3))
    return spread * q, k, v


def effective_share(q: Tensor, k: Tensor, options: dict[str, Any], first: int) -> Tensor:
    """1 / sum p² as a share of the keys that a row sees, averaged over the rows from `first` on; (H,)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q[:, :, first:] @ k.mT / math.sqrt(q.shape[-1])
    position = torch.arange(first, q.shape[-2])[:, None]
    hidden = (torch.arange(k.shape[-2]) > position) & bool(options.get("is_causal"))
    p = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return (1 / p.square().sum(-1) / (~hidden).sum(-1)).mean((0, 2))


# --- How it is estimated --------------------------------------------------------------------------


def estimators(proposals: dict[str, LearnedImportanceSampler]) -> list[Estimator]:
    """Everything that is compared, i.i.d. draws first."""
    names = [BASELINE, *(name for name in SAMPLERS if name not in (BASELINE, "learned")), *BASELINES]
    compared = [Estimator(name, {"sampler": name}) for name in names]
    compared += [Estimator(name, {"sampler": sampler}) for name, sampler in proposals.items()]
    for sampler in (BASELINE, "head-tail"):
        controls: dict[str, str | list[str]] = {name: name for name in CONTROLS}
        for name, control in {**controls, ALL: list(CONTROLS)}.items():
            options = {"sampler": sampler, "control_variate": control}
            compared.append(Estimator(f"{sampler} + {name}", options))
    return compared


def fit(case: Case, steps: int) -> Fit:
    """Fit a proposal to the training inputs of each layer, and measure it on the layer itself."""
    proposals, chi_squares = [], []
    for (q, k, v), held_out in zip(case.training, case.layers, strict=True):
        heads = k.shape[1] if case.options.get("enable_gqa") else 1
        learned, random = (LearnedImportanceSampler(q.shape[-1], q.shape[-1] // 2, heads) for _ in range(2))
        options: dict[str, Any] = {**case.options, "seed": 0, "progress": False}
        learned.fit(q, k, v, num_samples=k.shape[-2] // 8, steps=steps, batch_rows=64, **options)
        random.fit(q, k, steps=0, initialise="random", **options)
        divergences = [x.chi_square(*held_out[:2], **case.options) for x in (learned, random)]
        chi_squares.append([float(x[:, :, case.first :].mean()) for x in divergences])
        independent = LearnedImportanceSampler(q.shape[-1], q.shape[-1] // 2, heads, points="monte-carlo")
        independent.load_state_dict(learned.state_dict())
        proposals.append({"learned": learned, "learned, i.i.d. points": independent})
    return Fit(proposals, *torch.tensor(chi_squares).log().mean(0).exp().tolist())


class _Sums:
    """Sums over repetitions and layers for one estimator."""

    def __init__(self) -> None:
        self.squares: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.seconds: list[float] = []
        self.values_read: list[float] = []

    def add_layer(self, errors: Sequence[Tensor], first: int) -> None:
        """Add the errors (B, H, L, d) of each repetition on one layer."""
        count = len(errors)
        square = head_means(torch.stack([x.square() for x in errors]).mean(0), first)
        squared_mean = head_means(torch.stack(list(errors)).mean(0).square(), first)
        # E[squared_mean] = bias² + variance / count, and E[square] = bias² + variance
        self.squares.append(square)
        self.biases.append((count * squared_mean - square) / (count - 1))


def measure(
    case: Case, proposals: list[dict[str, LearnedImportanceSampler]], draws: int, repetitions: int
) -> dict[str, EstimatorError]:
    """Run all estimators in turns, layer by layer, `repetitions` times each."""
    compared = estimators(proposals[0])
    sums = {estimator.name: _Sums() for estimator in compared}
    sizes = []
    calls = len(case.layers) * repetitions * len(compared)
    with tqdm(total=calls, desc=f"{case.name}, {draws} draws", leave=False) as bar:
        for (q, k, v), of_layer in zip(case.layers, proposals, strict=True):
            exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **case.options)
            sizes.append(head_means(exact.square(), case.first))
            errors: dict[str, list[Tensor]] = {estimator.name: [] for estimator in compared}
            for repetition in range(repetitions):
                for estimator in estimators(of_layer):
                    generator = torch.Generator().manual_seed(repetition)
                    options = {**estimator.options, **case.options, "num_samples": draws}
                    start = time.perf_counter()
                    estimate = sampled_attention(q, k, v, generator=generator, **options)
                    sums[estimator.name].seconds.append(time.perf_counter() - start)
                    if repetition == 0:
                        touched = estimate.keys_touched()[..., case.first :]
                        sums[estimator.name].values_read.append(float(touched.double().mean()))
                    errors[estimator.name].append(estimate.output.double() - exact)
                    bar.update()
            for name, of_estimator in errors.items():
                sums[name].add_layer(of_estimator, case.first)
    return {
        estimator.name: EstimatorError(
            estimator.name,
            estimator.unbiased,
            torch.stack(sums[estimator.name].squares),
            torch.stack(sums[estimator.name].biases),
            torch.stack(sizes),
            sums[estimator.name].seconds,
            sum(sums[estimator.name].values_read) / len(case.layers),
        )
        for estimator in compared
    }


def head_means(x: Tensor, first: int) -> Tensor:
    """Mean of (B, H, L, d) over everything but heads, without the rows before `first`; (H,)."""
    return x[:, :, first:].mean((0, 2, 3))


# --- What is printed ------------------------------------------------------------------------------


def geometric(ratio_of_squares: Tensor) -> float:
    """Geometric mean of the root ratios; NaN of an empty tensor."""
    return float(ratio_of_squares.clamp_min(1e-30).log().mean().div(2).exp())


def table(case: Case, draws: int, errors: dict[str, EstimatorError]) -> list[BenchRow]:
    """The rows of a case at a number of draws; prints them too."""
    iid, systematic = errors[BASELINE], errors["systematic"]
    shares = [effective_share(q, k, case.options, case.first) for q, k, _ in case.layers]
    diffuse = torch.stack(shares) >= DIFFUSE
    num_rows = case.layers[0][0].shape[:-1].numel()
    rows = []
    for m in errors.values():
        against = m.square / iid.square
        error, ratio = geometric(m.square / m.size), geometric(against)
        check = check_error(m, error, ratio)
        timing = Timing.of(m.seconds)
        ratios: dict[str, float | None] = {
            "error ratio": ratio,
            "error ratio, diffuse heads": geometric(against[diffuse]) if diffuse.any() else None,
            "error ratio, other heads": geometric(against[~diffuse]) if not diffuse.all() else None,
            "error ratio to systematic": geometric(m.square / systematic.square),
            "draws of i.i.d.": 1 / ratio**2,
            "bias share": float((m.bias.sum() / m.square.sum()).clamp(0, 1)),
        }
        if check != "pass":
            ratios = dict.fromkeys(ratios)
        rows.append(
            BenchRow(
                case=f"{case.name}, {draws} draws",
                method=m.name,
                seconds=timing.median,
                baseline=BASELINE,
                ratio=median(iid.seconds) / timing.median if check == "pass" else None,
                error=error,
                check=check,
                low=timing.low,
                high=timing.high,
                details={
                    "microseconds a row": 1e6 * timing.median / num_rows,
                    "values read": m.values_read,
                    **ratios,
                },
            )
        )
    print_rows(rows, int(diffuse.sum()), diffuse.numel())
    return rows


def check_error(m: EstimatorError, error: float, ratio: float) -> str:
    """Whether the error is what the method promises: "pass", or why not."""
    if not math.isfinite(error) or not math.isfinite(ratio):
        return "its output is not finite"
    if m.name == "exact" and error > 1e-4:
        return f"error {error:.2g} of what should be exact"
    if m.unbiased and ratio > ALLOWED:
        return f"error {ratio:.2f} times that of i.i.d. draws"
    return "pass"


def print_rows(rows: Sequence[BenchRow], num_diffuse: int, num_heads: int) -> None:
    """Print the table of a case at a number of draws."""
    print(
        f"\n{rows[0].case} ({num_diffuse} of {num_heads} heads diffuse: "
        f"1 / sum p² at least {DIFFUSE:.3g} of the keys)"
    )
    print(
        f"  {'method':<24}{'error':>9}{'× i.i.d.':>10}{'diffuse':>9}{'others':>9}{'× systematic':>14}"
        f"{'draws of i.i.d.':>17}{'values read':>13}{'bias':>7}{'µs a row':>10}{'speed':>7}  check"
    )
    for row in rows:
        details = row.details
        factor = details["draws of i.i.d."]
        if factor is not None and factor > 1e6:  # of an exact method it means nothing
            factor = None
        print(
            f"  {row.method:<24}{row.error:>9.2g}{shown(details['error ratio'], '.3f'):>10}"
            f"{shown(details['error ratio, diffuse heads'], '.3f'):>9}"
            f"{shown(details['error ratio, other heads'], '.3f'):>9}"
            f"{shown(details['error ratio to systematic'], '.3f'):>14}{shown(factor, '.1f'):>17}"
            f"{details['values read']:>13.1f}{shown(details['bias share'], '.0%'):>7}"
            f"{details['microseconds a row']:>10.1f}{shown(row.ratio):>7}  {row.check}"
        )


def print_targets(case: Case, errors: dict[int, dict[str, EstimatorError]], fitted: Fit) -> None:
    """Print what the lab promises of its estimators at n / 4 draws, beside what was measured."""
    most, fewest = max(errors), min(errors)
    at = errors[most]
    few = errors[fewest]

    def over(a: EstimatorError, b: EstimatorError) -> float:
        return geometric(a.square / b.square)

    iid, head_tail, systematic = at[BASELINE], at["head-tail"], at["systematic"]
    targets = [
        Target("head-tail over i.i.d.", over(head_tail, iid), 0.28),
        Target("head-tail over systematic", over(head_tail, systematic), 0.5),
        # The error of i.i.d. draws falls as the root of their number.
        Target("head-tail over i.i.d. at 8 times its draws", 8**0.5 * over(head_tail, iid), 1.0),
        Target(f"head-tail at {fewest} draws over i.i.d.", over(few["head-tail"], iid), 1.0),
        Target(f"head-tail + {ALL} at {fewest} draws over i.i.d.", over(few[f"head-tail + {ALL}"], iid), 1.0),
        *several_controls(at),
        Target("learned over systematic", over(at["learned"], systematic), 1.1),
        Target("learned over i.i.d., i.i.d. points", over(at["learned, i.i.d. points"], iid), 1.1),
        Target(
            "chi² of random projections over fitted",
            fitted.chi_square_random / fitted.chi_square,
            2.0,
            at_most=False,
        ),
    ]
    print(f"\n  {case.name}, {most} draws, errors over errors")
    for x in targets:
        sign = "<=" if x.at_most else ">="
        print(f"    {x.name:<52}{x.ratio:>8.3f}  {sign} {x.limit:<5}{'met' if x.met else 'missed'}")


def several_controls(errors: dict[str, EstimatorError]) -> list[Target]:
    """Variance times time of all controls together, over that of the best single one."""
    targets = []
    for sampler in (BASELINE, "head-tail"):
        together, *single = (errors[f"{sampler} + {name}"] for name in (ALL, *CONTROLS))
        best = min(
            geometric(x.square / together.square) ** 2 * median(x.seconds) / median(together.seconds)
            for x in single
        )
        targets.append(Target(f"{sampler} + {ALL} over the best one, equal time", 1 / best, 1.0))
    return targets
