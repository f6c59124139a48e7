"""The last tables of `bench estimators`: the error that sets of controls leave, by class of rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import sampled_attention
from ..controls import Control, LinformerControl, TopKControl, make_control
from .base import BenchRow, shown

NO_CONTROL = "no control"
SAMPLERS = ("monte-carlo", "systematic", "head-tail")
ALLOWED = 1.05
"""A set of controls may have this many times the error of the best control in it."""

LEAST = 1e-3
"""A head that is left less than this share of its error, which is all but exact, counts as if left that."""

SETS = (
    ("topk",),
    ("linformer",),
    ("performer",),
    ("topk-8",),
    ("linformer-16",),
    ("topk", "linformer"),
    ("topk", "performer"),
    ("linformer", "performer"),
    ("topk", "linformer", "performer"),
    ("topk", "linformer", "performer", "topk-8"),
    ("topk", "linformer", "performer", "topk-8", "linformer-16"),
)


@dataclass(frozen=True)
class RowClass:
    """Rows of one kind: q (H, L, E), k and v (H, n, E)."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    is_causal: bool = False


def bench_control_sets(quick: bool) -> list[BenchRow]:
    """Sets of one to five controls against no control and against the best single one of the set.

    `error` is the root mean squared error over the exact output's root mean square, as the geometric mean
    over heads, `ratio` is of the time. Details: `error ratio` over no control, `ratio to best single`. A set
    fails its check if its error is more than `ALLOWED` times that of the best control in it.
    """
    rows: list[BenchRow] = []
    for row_class in row_classes(n=192 if quick else 384, length=32 if quick else 64):
        for sampler in SAMPLERS:
            rows += _compare(row_class, sampler, repetitions=4 if quick else 8)
    return rows


def row_classes(n: int, length: int, heads: int = 4) -> list[RowClass]:
    """Peaked, diffuse, skewed and causal rows, and rows with RoPE, a sink and uneven values."""
    g = torch.Generator().manual_seed(0)

    def gaussian(spread: float, rows: int = length) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (torch.randn(heads, m, 32, generator=g) for m in (rows, n, n))
        return spread * q, k, v

    q, k, v = gaussian(1.0)
    bias = -torch.rand(heads, n, 1, generator=g).log().neg().log()  # a Gumbel variable for each key
    skewed = torch.cat((q, torch.ones(heads, length, 1)), -1), torch.cat((k, 12 * bias), -1), v
    return [
        RowClass("peaked", *gaussian(2.5)),
        RowClass("diffuse", *gaussian(0.5)),
        RowClass("skewed", *skewed),
        RowClass("causal", *gaussian(1.2, n), is_causal=True),
        RowClass("LLM-like", *_llm_like(n, length, heads, g)),
    ]


def _llm_like(n: int, length: int, heads: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    width = 32
    common = torch.randn(heads, 1, width, generator=g)
    q = 1.5 * common + torch.randn(heads, length, width, generator=g)
    k = 0.8 * common + torch.randn(heads, n, width, generator=g)
    v = torch.randn(heads, n, width, generator=g) * torch.randn(heads, n, 1, generator=g).mul(0.5).exp()
    q, k = _with_rope(q, torch.arange(n - length, n)), _with_rope(k, torch.arange(n))
    k[:, 0] = 1.6 * q.mean(1)  # about half of the probability, and a value of nearly nothing
    v[:, 0] *= 0.01
    return q, k, v


def _with_rope(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = positions[:, None] * 100.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


def _controls(names: Sequence[str]) -> list[Control]:
    """Controls by name; a number in the name is their size."""
    sized: dict[str, Callable[[int], Control]] = {"topk": TopKControl, "linformer": LinformerControl}
    controls: list[Control] = []
    for name in names:
        kind, _, size = name.partition("-")
        control = sized[kind](int(size)) if size else make_control(kind)
        control.name = name
        controls.append(control)
    return controls


@dataclass(frozen=True)
class _Measured:
    """Mean squared errors of heads (H,), and the median of the seconds of a call."""

    square: Tensor
    seconds: float


def _measure(row_class: RowClass, sampler: str, names: Sequence[str], repetitions: int) -> _Measured:
    q, k, v = row_class.q, row_class.k, row_class.v
    exact = _exact(row_class)
    first = 64 if row_class.is_causal else 0  # the rows before are known to some controls
    squares, seconds = [], []
    for repetition in range(repetitions):
        start = time.perf_counter()
        estimate = sampled_attention(
            q,
            k,
            v,
            sampler=sampler,
            num_samples=16,
            is_causal=row_class.is_causal,
            control_variate=_controls(names) or None,
            generator=torch.Generator().manual_seed(repetition),
        )
        seconds.append(time.perf_counter() - start)
        squares.append((estimate.output - exact)[:, first:].square().mean((1, 2)))
    return _Measured(torch.stack(squares).mean(0), median(seconds))


def _exact(row_class: RowClass) -> Tensor:
    q, k, v = (x.double() for x in (row_class.q, row_class.k, row_class.v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=row_class.is_causal)


def _compare(row_class: RowClass, sampler: str, repetitions: int) -> list[BenchRow]:
    case = f"{row_class.name} rows, {sampler}, n={row_class.k.shape[1]}, 16 draws"
    plain = _measure(row_class, sampler, (), repetitions)
    size = _exact(row_class).square().mean((1, 2))
    single: dict[str, float] = {}
    rows = []
    print(f"\n{case}\n  {'controls':<52}{'error':>9}{'× none':>9}{'× best single':>15}  check")
    for names in ((), *SETS):
        measured = _measure(row_class, sampler, names, repetitions) if names else plain
        ratio = _root_mean((measured.square / plain.square).clamp_min(LEAST**2))
        if len(names) == 1:
            single[names[0]] = ratio
        over_best = ratio / min(single[x] for x in names) if len(names) > 1 else None
        check = "pass"
        if not math.isfinite(ratio):
            check = "its output is not finite"
        elif over_best is not None and over_best > ALLOWED:
            check = f"error {over_best:.2f} times that of its best control"
        row = BenchRow(
            case=case,
            method=" + ".join(names) or NO_CONTROL,
            seconds=measured.seconds,
            baseline=NO_CONTROL,
            ratio=plain.seconds / measured.seconds if check == "pass" else None,
            error=_root_mean(measured.square / size),
            check=check,
            details={"error ratio": ratio, "ratio to best single": over_best},
        )
        rows.append(row)
        print(
            f"  {row.method:<52}{row.error:>9.2g}{shown(ratio, '.3f'):>9}{shown(over_best, '.3f'):>15}  "
            f"{check}"
        )
    return rows


def _root_mean(square: Tensor) -> float:
    """The root of the geometric mean."""
    return math.exp(float(square.log().mean()) / 2)
