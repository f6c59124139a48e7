"""`qtx-lab bench estimators`: how wrong every estimator is at equal draws, beside i.i.d. draws and what others do.

On the reference model's own queries, keys and values, layer by layer, over text that it was not trained on, and on
diffuse and peaked synthetic rows. The learned proposal is fitted to other text (other draws of the synthetic rows).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..attention import sampled_attention
from ..models.reference import encode, load_reference_model, reference_text
from ..samplers import BASELINES, SAMPLERS, LearnedImportanceSampler, make_sampler

BASELINE = "monte-carlo"
DIFFUSE = 1 / 8
"""A head is diffuse where a row's effective number of keys, 1 / sum p^2, is this share of those seen, on average."""

CONTROLS = ("performer", "linformer", "topk")
ALL = "all three"

Inputs = tuple[Tensor, Tensor, Tensor]
Method = tuple[str, dict[str, Any]]
"""What it is called, and what it is to `sampled_attention`."""


@dataclass(frozen=True)
class Case:
    """Attention to estimate: q (B, H, L, E), k and v (B, Hkv, L, E) of each layer."""

    name: str
    layers: Sequence[Inputs]
    training: Sequence[Inputs]
    options: dict[str, Any]
    """How it is attended, as in SDPA."""
    first: int
    """The first row whose error counts: causal rows before it see too few keys."""


@dataclass(frozen=True)
class Measured:
    """One method at one number of draws, over layers and heads (layers, H), float64."""

    label: str
    unbiased: bool
    square: Tensor
    """Mean squared error."""
    bias: Tensor
    """The part of it that no averaging removes, estimated from the repetitions; may come out below 0."""
    size: Tensor
    """Mean square of the exact output."""
    seconds: list[float]
    """Of each call, a layer and repetition."""
    read: float
    """Distinct values that the draws of a query position read, the heads of a group together, on average."""


def bench_estimators(quick: bool, copy: float) -> list[dict[str, Any]]:
    """Every estimator's error against that of i.i.d. draws; rows as in `run_bench`, and with

    - `error`: root mean squared error over the exact output's root mean square, geometric mean over heads;
    - `error ratio`: root mean squared error over that of i.i.d. draws, likewise; `error ratio, diffuse heads` and
      `error ratio, other heads` apart (see `DIFFUSE`), `error ratio to systematic`;
    - `draws of i.i.d.`: how many times the draws i.i.d. sampling would need for the same error, 1 / (error ratio)^2;
    - `values read`: distinct values that the draws of a query position read, the heads of a group together (what a
      control reads comes on top);
    - `bias share`: the part of the squared error, over all heads, that is bias;
    - `seconds`, `ratio` of the time (above 1: faster than i.i.d.), `microseconds a row`.

    All of these ratios are None where the check fails: an error that is not finite, or for an unbiased method one
    above 1.1 times that of i.i.d. draws.
    """
    del copy
    rows: list[dict[str, Any]] = []
    repetitions = 3 if quick else 4
    for case in cases(quick):
        n = case.layers[0][1].shape[-2]
        learned, chi_square = fit(case, steps=100 if quick else 400)
        found: dict[int, dict[str, Measured]] = {}
        for draws in (n // 32, n // 4) if quick else (n // 32, n // 8, n // 4):
            found[draws] = measure(case, learned, draws, repetitions)
            rows += table(case, draws, found[draws])
        if (
            case.options
        ):  # of learned attention: synthetic rows have no heads to average over, and no low rank
            print_targets(case, found, chi_square)
    return rows


# --- What is estimated ----------------------------------------------------------------------------


def cases(quick: bool) -> list[Case]:
    """The reference model's attention, and synthetic rows of two kinds."""
    n, windows = (256, 24) if quick else (512, 48)
    tokens = encode(reference_text())
    tokens = tokens[: len(tokens) // n * n].view(-1, n)
    model = load_reference_model()
    fitted, held_out = (model.attention_inputs(x) for x in (tokens[:windows], tokens[-1:]))
    options = {"is_causal": True, "enable_gqa": True}
    found = [Case(f"reference model, n={n}, last {n // 4} rows", held_out, fitted, options, 3 * n // 4)]
    for name, spread in (("diffuse", 0.5), ("peaked", 2.5)):
        some, other = (synthetic(n, spread, batch, seed) for seed, batch in ((0, 1), (1, 8)))
        found.append(Case(f"{name} synthetic rows, n={n}", [some], [other], {}, 0))
    return found


def synthetic(n: int, spread: float, batch: int, seed: int) -> Inputs:
    """Gaussian q, k, v (batch, 8, n, 32) whose logits have standard deviation `spread`."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, 8, n, 32, generator=g) for _ in range(3))
    return spread * q, k, v


def effective_share(q: Tensor, k: Tensor, options: dict[str, Any], first: int) -> Tensor:
    """1 / sum p^2 over the keys seen, mean over the rows that count: (H,)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q[:, :, first:] @ k.mT / math.sqrt(q.shape[-1])
    position = torch.arange(first, q.shape[-2])[:, None]
    hidden = (torch.arange(k.shape[-2]) > position) & bool(options.get("is_causal"))
    p = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return (1 / p.square().sum(-1) / (~hidden).sum(-1)).mean((0, 2))


# --- How it is estimated --------------------------------------------------------------------------


def methods(learned: dict[str, LearnedImportanceSampler]) -> list[Method]:
    """Everything that is compared, i.i.d. draws first."""
    names = [BASELINE, *(name for name in SAMPLERS if name not in (BASELINE, "learned")), *BASELINES]
    found: list[Method] = [(name, {"sampler": name}) for name in names]
    found += [(label, {"sampler": sampler}) for label, sampler in learned.items()]
    for sampler in (BASELINE, "head-tail"):
        for control in CONTROLS:
            found.append((f"{sampler} + {control}", {"sampler": sampler, "control_variate": control}))
        found.append((f"{sampler} + {ALL}", {"sampler": sampler, "control_variate": list(CONTROLS)}))
    return found


def fit(case: Case, steps: int) -> tuple[list[dict[str, LearnedImportanceSampler]], tuple[float, float]]:
    """Proposals of rank d / 2 for each layer, by points; and the mean chi^2 on held-out rows of fitted and random ones."""
    fitted, chi = [], []
    for (q, k, v), held_out in zip(case.training, case.layers, strict=True):
        heads = k.shape[1] if case.options.get("enable_gqa") else 1
        made = [LearnedImportanceSampler(q.shape[-1], q.shape[-1] // 2, heads) for _ in range(2)]
        how: dict[str, Any] = {**case.options, "seed": 0, "progress": False}
        made[0].fit(q, k, v, num_samples=k.shape[-2] // 8, steps=steps, batch_rows=64, **how)
        made[1].fit(q, k, steps=0, initialise="random", **how)
        chi.append(
            [float(x.chi_square(*held_out[:2], **case.options)[:, :, case.first :].mean()) for x in made]
        )
        independent = LearnedImportanceSampler(q.shape[-1], q.shape[-1] // 2, heads, points="monte-carlo")
        independent.load_state_dict(made[0].state_dict())
        fitted.append({"learned": made[0], "learned, i.i.d. points": independent})
    ours, random = torch.tensor(chi).log().mean(0).exp().tolist()
    return fitted, (ours, random)


def measure(
    case: Case, learned: list[dict[str, LearnedImportanceSampler]], draws: int, repetitions: int
) -> dict[str, Measured]:
    """Run all methods in turns, layer by layer, `repetitions` times each."""
    squares: dict[str, list[Tensor]] = {}
    biases: dict[str, list[Tensor]] = {}
    seconds: dict[str, list[float]] = {}
    read: dict[str, list[float]] = {}
    sizes = []
    calls = len(case.layers) * repetitions * len(methods(learned[0]))
    with tqdm(total=calls, desc=f"{case.name}, {draws} draws", leave=False) as bar:
        for (q, k, v), proposals in zip(case.layers, learned, strict=True):
            exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **case.options)
            sizes.append(head_means(exact.square(), case.first))
            total: dict[str, list[Tensor]] = {}
            for repetition in range(repetitions):
                for label, how in methods(proposals):
                    generator = torch.Generator().manual_seed(repetition)
                    start = time.perf_counter()
                    options = {**how, **case.options, "num_samples": draws, "generator": generator}
                    estimate = sampled_attention(q, k, v, **options)
                    seconds.setdefault(label, []).append(time.perf_counter() - start)
                    if repetition == 0:
                        touched = estimate.keys_touched()[..., case.first :]
                        read.setdefault(label, []).append(float(touched.double().mean()))
                    error = estimate.output.double() - exact
                    sums = total.setdefault(label, [torch.zeros_like(error), torch.zeros_like(error)])
                    sums[0] += error
                    sums[1] += error.square()
                    bar.update()
            for label, (first, second) in total.items():
                square = head_means(second / repetitions, case.first)
                mean = head_means((first / repetitions).square(), case.first)
                # E[mean^2] = bias^2 + variance / repetitions, E[square] = bias^2 + variance
                squares.setdefault(label, []).append(square)
                biases.setdefault(label, []).append((repetitions * mean - square) / (repetitions - 1))
    return {
        label: Measured(
            label,
            is_unbiased(how),
            torch.stack(squares[label]),
            torch.stack(biases[label]),
            torch.stack(sizes),
            seconds[label],
            sum(read[label]) / len(read[label]),
        )
        for label, how in methods(learned[0])
    }


def is_unbiased(how: dict[str, Any]) -> bool:
    """Whether a method promises no bias; a learned proposal's estimate is self-normalised."""
    sampler = how["sampler"]
    return make_sampler(sampler).unbiased and not isinstance(sampler, LearnedImportanceSampler)


def head_means(x: Tensor, first: int) -> Tensor:
    """Mean of (B, H, L, d) over everything but heads, rows before `first` left out: (H,)."""
    return x[:, :, first:].mean((0, 2, 3))


# --- What is printed ------------------------------------------------------------------------------


def geometric(ratio_of_squares: Tensor) -> float:
    """Geometric mean of root ratios; NaN of nothing."""
    return float(ratio_of_squares.clamp_min(1e-30).log().mean().div(2).exp())


def table(case: Case, draws: int, found: dict[str, Measured]) -> list[dict[str, Any]]:
    """The rows of a case at a number of draws, printed."""
    iid, systematic = found[BASELINE], found["systematic"]
    diffuse = (
        torch.stack([effective_share(q, k, case.options, case.first) for q, k, _ in case.layers]) >= DIFFUSE
    )
    q = case.layers[0][0]
    rows = []
    for m in found.values():
        against = m.square / iid.square
        error, ratio = geometric(m.square / m.size), geometric(against)
        check = check_error(m, error, ratio)
        passed = check == "pass"
        rows.append(
            {
                "case": f"{case.name}, {draws} draws",
                "method": m.label,
                "seconds": median(m.seconds),
                "low": min(m.seconds),
                "high": max(m.seconds),
                "microseconds a row": 1e6 * median(m.seconds) / q.shape[:-1].numel(),
                "baseline": BASELINE,
                "ratio": median(iid.seconds) / median(m.seconds) if passed else None,
                "error": error,
                "error ratio": ratio if passed else None,
                "error ratio, diffuse heads": geometric(against[diffuse])
                if passed and diffuse.any()
                else None,
                "error ratio, other heads": geometric(against[~diffuse])
                if passed and not diffuse.all()
                else None,
                "error ratio to systematic": geometric(m.square / systematic.square) if passed else None,
                "draws of i.i.d.": 1 / ratio**2 if passed else None,
                "values read": m.read,
                "bias share": float((m.bias.sum() / m.square.sum()).clamp(0, 1)) if passed else None,
                "check": check,
            }
        )
    print_rows(rows, int(diffuse.sum()), diffuse.numel())
    return rows


def check_error(m: Measured, error: float, ratio: float) -> str:
    """Whether the error is what the method promises: "pass", or why not."""
    if not math.isfinite(error) or not math.isfinite(ratio):
        return "its output is not finite"
    if m.label == "exact" and error > 1e-4:
        return f"error {error:.2g} of what should be exact"
    if m.unbiased and ratio > 1.1:
        return f"error {ratio:.2f} times that of i.i.d. draws"
    return "pass"


def print_rows(rows: Sequence[dict[str, Any]], diffuse: int, heads: int) -> None:
    """The table of a case at a number of draws."""
    print(
        f"\n{rows[0]['case']} ({diffuse} of {heads} heads diffuse: 1 / sum p^2 at least {DIFFUSE:.3g} of the keys)"
    )
    print(
        f"  {'method':<24}{'error':>9}{'× i.i.d.':>10}{'diffuse':>9}{'others':>9}{'× systematic':>14}"
        f"{'draws of i.i.d.':>17}{'values read':>13}{'bias':>7}{'µs a row':>10}{'speed':>7}  check"
    )
    for row in rows:
        keys = ("error ratio", "error ratio, diffuse heads", "error ratio, other heads")
        ratios = "".join(
            f"{shown(row[key], '.3f'):>{width}}" for key, width in zip(keys, (10, 9, 9), strict=True)
        )
        needed = row["draws of i.i.d."]
        factor = "–" if needed is None or needed > 1e6 else f"{needed:.1f}"
        print(
            f"  {row['method']:<24}{shown(row['error'], '.2g'):>9}{ratios}"
            f"{shown(row['error ratio to systematic'], '.3f'):>14}{factor:>17}{row['values read']:>13.1f}"
            f"{shown(row['bias share'], '.0%'):>7}{row['microseconds a row']:>10.1f}"
            f"{shown(row['ratio'], '.2f'):>7}  {row['check']}"
        )


def shown(x: float | None, form: str) -> str:
    """A number in the given format, or a dash where there is none."""
    return "–" if x is None else format(x, form)


def print_targets(case: Case, found: dict[int, dict[str, Measured]], chi_square: tuple[float, float]) -> None:
    """What the lab promises of its estimators, at n / 4 draws, beside what was measured."""
    most, few = max(found), min(found)
    at = found[most]

    def ratio(a: Measured, b: Measured) -> float:
        return geometric(a.square / b.square)

    # The error of i.i.d. draws falls as the root of their number.
    lines: list[tuple[str, float, str, float]] = [
        ("head-tail over i.i.d.", ratio(at["head-tail"], at[BASELINE]), "<=", 0.28),
        ("head-tail over systematic", ratio(at["head-tail"], at["systematic"]), "<=", 0.5),
        (
            "head-tail over i.i.d. at 8 times its draws",
            8**0.5 * ratio(at["head-tail"], at[BASELINE]),
            "<=",
            1.0,
        ),
        (f"head-tail at {few} draws over i.i.d.", ratio(found[few]["head-tail"], at[BASELINE]), "<=", 1.0),
        (
            f"head-tail + {ALL} at {few} draws over i.i.d.",
            ratio(found[few][f"head-tail + {ALL}"], at[BASELINE]),
            "<=",
            1.0,
        ),
        *several_controls(at),
        ("learned over systematic", ratio(at["learned"], at["systematic"]), "<=", 1.1),
        ("learned over i.i.d., i.i.d. points", ratio(at["learned, i.i.d. points"], at[BASELINE]), "<=", 1.1),
        ("chi^2 of random projections over fitted", chi_square[1] / chi_square[0], ">=", 2.0),
    ]
    print(f"\n  {case.name}, {most} draws, errors over errors")
    for label, value, sign, limit in lines:
        met: Callable[[float, float], bool] = float.__le__ if sign == "<=" else float.__ge__
        print(f"    {label:<52}{value:>8.3f}  {sign} {limit:<5}{'met' if met(value, limit) else 'missed'}")


def several_controls(at: dict[str, Measured]) -> list[tuple[str, float, str, float]]:
    """Variance times time of all controls together over the best single one's."""
    lines = []
    for sampler in (BASELINE, "head-tail"):
        all_, *single = (at[f"{sampler} + {c}"] for c in (ALL, *CONTROLS))
        best = min(
            geometric(x.square / all_.square) ** 2 * median(x.seconds) / median(all_.seconds) for x in single
        )
        lines.append((f"{sampler} + {ALL} over the best one, equal time", 1 / best, "<=", 1.0))
    return lines
