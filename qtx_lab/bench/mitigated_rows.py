"""`qtx-lab bench mitigated_rows`: rows by raw counts, readout, ZNE, PEA, PEC and the planner at equal shots.

The loader is the tree. Outcomes are drawn from the exact probabilities of the twins' noisy
circuits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from ..backends import QiskitQuantumBackend
from ..mitigation import (
    CircuitMitigation,
    MitigationPlanner,
    ProbabilisticErrorCancellation,
    SharedDecay,
    ZeroNoiseExtrapolation,
)
from ..mitigation.planner import Option
from ..mitigation.readout import readout_errors
from ..mitigation.rehearsal import Prediction, Rehearsal
from .base import BenchRow
from .mitigation import ALLOWED, DEVICES, PLANNER, synthetic_rows

SIZES = (4, 5, 6)
"""Qubits: 16, 32 and 64 keys."""

BUDGETS = (1_000, 4_000, 16_000, 64_000, 256_000)
"""Shots a row."""

ROWS, REPEATS = 12, 12

LIMITED_BY_NOISE = 3.0
"""Bias of raw counts over what their shots add, from which they are said to be limited by noise: nine tenths
of their squared error are then bias."""

MAX_RATIO = 0.5
"""Part of the raw error that is left at most where raw counts are limited by noise."""

COVERAGE = (0.93, 0.97)
"""What 95 % intervals may cover."""

PEC = "readout, pec"


def bench_mitigated_rows(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Total variation between measured and true rows of 16, 32 and 64 keys on three devices' twins.

    `error` is the mean of 12 rows and 12 repetitions. Further details of the rows:

    - `device`, `keys`, `shots`: the case;
    - `bias`: the part of the error that more shots would not remove;
    - `raw ratio`: the error over that of raw counts;
    - `limited by noise`: whether the bias of raw counts is three times what their shots add;
    - `coverage`: part of the keys whose true probability is in the 95 % interval;
    - `overhead`: gamma², how many times the shots error cancellation takes;
    - `choice`: what the planner chose.

    The planner passes if its error is at most 5 % above that of raw counts, and at most half of it where
    those are limited by noise, and if its intervals there cover 93 to 97 %. Error cancellation passes if its
    intervals cover as much; where raw counts are not limited by noise they may cover more, because few shots
    leave many keys below 0 and those are set to 0, which brings them nearer.
    """
    del copy_bandwidth
    sizes, budgets = (SIZES[::2], BUDGETS[1::2]) if quick else (SIZES, BUDGETS)
    cases = [(device, m) for device in DEVICES for m in sizes]
    rows: list[BenchRow] = []
    for device, m in tqdm(cases, desc="mitigated rows", leave=False):
        measured = compare_at_equal_shots(device, m, budgets)
        print_case(measured)
        rows += measured
    print_verdict(rows)
    return rows


def options_for(n: int) -> tuple[Option, ...]:
    """The ways that are compared for rows of n keys, raw counts first."""
    fit = ZeroNoiseExtrapolation([1, 3], "exponential", asymptote=1 / n)
    return (
        CircuitMitigation(readout=False),
        CircuitMitigation(),
        CircuitMitigation(ZeroNoiseExtrapolation([1, 3])),
        CircuitMitigation(SharedDecay((1, 5))),
        CircuitMitigation(ZeroNoiseExtrapolation([1, 3]), scaling="pauli"),
        CircuitMitigation(fit, scaling="pauli"),
        CircuitMitigation(SharedDecay((1, 3)), scaling="pauli"),
        ProbabilisticErrorCancellation(),
    )


def compare_at_equal_shots(device: str, m: int, budgets: Sequence[int]) -> list[BenchRow]:
    """Measure rows of 2^m keys on a twin, in every way and by the planner, with each budget of shots."""
    backend = QiskitQuantumBackend("aer", device, loader="tree")
    p = synthetic_rows(m)[::2][:ROWS]
    options = options_for(1 << m)
    truth = Rehearsal(backend, p, readout_errors)
    overhead = ProbabilisticErrorCancellation().overhead(backend, 1 << m)
    rows = []
    for shots in budgets:
        rng = np.random.default_rng([m, shots])
        measured: dict[str, tuple[Prediction, float]] = {}
        for option in options:
            start = time.process_time()
            prediction = truth.predict(option, shots, REPEATS, rng)
            measured[option.name] = prediction, (time.process_time() - start) / REPEATS
        start = time.process_time()
        generator = torch.Generator().manual_seed(shots)
        planner = MitigationPlanner(options)
        choice = planner.plan(backend, p, shots, generator=generator).choice.option
        seconds = time.process_time() - start
        bias = None if choice == options[0] else planner.expected_bias(backend, p, choice)
        measured[PLANNER] = truth.predict(choice, shots, REPEATS, rng, bias=bias), seconds
        raw, raw_seconds = measured[options[0].name]
        limited = raw.bias >= LIMITED_BY_NOISE * raw.noise
        for name, (prediction, seconds) in measured.items():
            ratio = prediction.error / raw.error
            details = {
                "device": device,
                "keys": 1 << m,
                "shots": shots,
                "bias": prediction.bias,
                "raw ratio": ratio,
                "limited by noise": limited,
                "coverage": prediction.coverage,
                "overhead": overhead if name == PEC else None,
                "choice": choice.name if name == PLANNER else None,
            }
            rows.append(
                BenchRow(
                    case=f"{device}, {1 << m} keys, {shots:,} shots",
                    method=name,
                    seconds=seconds,
                    baseline="raw",
                    ratio=raw_seconds / seconds if seconds else None,
                    error=prediction.error,
                    check=_check(name, ratio, limited, prediction.coverage),
                    details=details,
                )
            )
    return rows


def _check(name: str, ratio: float, limited: bool, coverage: float) -> str:
    if name == PLANNER and ratio > (MAX_RATIO if limited else ALLOWED):
        return f"{ratio:.2f} times the raw error"
    if name == PLANNER and limited and not COVERAGE[0] <= coverage <= COVERAGE[1]:
        return f"intervals cover {coverage:.1%}"
    if name == PEC and (coverage < COVERAGE[0] or (limited and coverage > COVERAGE[1])):
        return f"intervals cover {coverage:.1%}"
    return "pass"


def print_case(rows: Sequence[BenchRow]) -> None:
    """Print errors over raw counts and coverage by number of shots, for one device and number of keys."""
    cases = list(dict.fromkeys(row.case for row in rows))
    first = rows[0].details
    overhead = next(row.details["overhead"] for row in rows if row.method == PEC)
    print(f"\n{first['device']}, {first['keys']} keys: error / raw error (coverage); gamma² = {overhead:.2f}")
    by_case = {(row.case, row.method): row for row in rows}
    print(f"  {'shots a row':<38}" + "".join(f"{row.details['shots']:>16,}" for row in _raw(rows)))
    print(f"  {'raw error':<38}" + "".join(f"{row.error:>16.4f}" for row in _raw(rows)))
    for method in dict.fromkeys(row.method for row in rows):
        cells = [by_case[case, method] for case in cases]
        numbers = [f"{x.details['raw ratio']:.2f} ({x.details['coverage']:.1%})" for x in cells]
        print(f"  {method:<38}" + "".join(f"{number:>16}" for number in numbers))


def print_verdict(rows: Sequence[BenchRow]) -> None:
    """Print what is promised of the planner and of error cancellation, beside what was measured."""
    planned = [row.details for row in rows if row.method == PLANNER]
    limited = [x["raw ratio"] for x in planned if x["limited by noise"]]
    print(
        f"\nplanner: at most {max(x['raw ratio'] for x in planned):.3f} times the raw error "
        f"(<= {ALLOWED:.2f}) in {len(planned)} cases; where raw counts are limited by noise ({len(limited)} "
        f"cases), at most {max(limited, default=float('nan')):.3f} times (<= {MAX_RATIO})"
    )
    for name in (PEC, PLANNER):
        everywhere = [row.details for row in rows if row.method == name]
        noisy = [x for x in everywhere if x["limited by noise"]]
        for cases, where in ((noisy, "where raw counts are limited by noise"), (everywhere, "in all cases")):
            if cases:
                least, most = (f(x["coverage"] for x in cases) for f in (min, max))
                print(f"{name}: 95 % intervals cover {least:.1%} to {most:.1%} {where}")


def _raw(rows: Sequence[BenchRow]) -> list[BenchRow]:
    return [row for row in rows if row.method == rows[0].method]
