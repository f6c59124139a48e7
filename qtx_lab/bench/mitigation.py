"""`qtx-lab bench mitigation`: the error of measured rows by each way to mitigate and by the planner, at equal
shots, and by what a user gets who turns mitigation on.

Outcomes are drawn from the exact probabilities of the twins' noisy circuits, so that many shots cost little
time.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..backends import QiskitQuantumBackend
from ..circuits.fidelity import total_variation_distance
from ..mitigation import (
    CircuitMitigation,
    MitigationPlanner,
    ProbabilisticErrorCancellation,
    SharedDecay,
    ZeroNoiseExtrapolation,
)
from ..mitigation.planner import Plan, Prediction, Rehearsal, default_options
from ..mitigation.readout import readout_errors
from ..models.reference import load_reference_model
from ..models.text import encode, reference_text
from ..specs import MitigationSpec
from .base import BenchRow

DEVICES = ("fake_fez", "fake_boston", "fake_torino")
"""The last one was not looked at while the planner was written."""

DEFAULTS_DEVICES, DEFAULTS_BUDGETS = ("fake_fez", "fake_boston"), (64_000, 1_000)
"""Where the defaults are compared: an older device and one of today, with many shots and with few."""

BUDGETS = (1_000, 4_000, 16_000, 64_000, 256_000)
"""Shots a row."""
ROWS, REPEATS = 24, 8
MISINFORMED_NOISE = 0.7
"""Noise in the calibration that the misinformed planner sees, as a fraction of the device's."""
ALLOWED = 1.05
"""The planner may have this many times the error of the raw counts."""

FORMER = " (the default once)"
"""Marks the defaults that were replaced."""

SHOTS_OF_ALL_ROWS, FEW_REPEATS = 4_000, 4
"""With fewer shots, error cancellation measures all rows so many times; with more, half of the rows, once."""

PLANNER, TREE, MISINFORMED = "planner", "planner, tree only", "planner, tree only, calibration 30 % low"


@dataclass(frozen=True)
class Case:
    """Rows of probabilities (R, 2^m) on a device's twin."""

    device: str
    m: int
    kind: str
    p: Tensor

    def __str__(self) -> str:
        return f"{self.device} m={self.m} {self.kind} rows"


@dataclass(frozen=True)
class Measured:
    """One option's result, or one planner's with its plan."""

    name: str
    prediction: Prediction
    seconds: float
    plan: Plan | None = None


def bench_mitigation(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Total variation between mitigated and true rows.

    `error` is the total variation, averaged over 24 rows and 8 repetitions. `seconds` is the time of
    planning, or of simulating and mitigating one repetition of all rows. Further details of the rows:

    - `device`, `m`, `kind`, `shots`: the case;
    - `bias`: the part of the error that more shots would not remove;
    - `raw ratio`, `best ratio`: the error over that of the tree's own counts, and over that of the best
      option in hindsight (for the planners with "tree only", of the options on the tree);
    - `expected`: the error that the planner predicted; `choice`: the option that it chose;
    - `rehearsed on`: the rows that the planner knew.

    A planner passes if its error is at most 5 % above that of the raw counts. The last table compares what a
    user gets who turns mitigation on (`compare_defaults`).
    """
    del copy_bandwidth
    rows: list[BenchRow] = []
    devices = DEVICES[:2] if quick else DEVICES
    sizes = (4,) if quick else (3, 4, 5, 6)
    budgets = BUDGETS[1::2] if quick else BUDGETS
    cases = [
        Case(device, m, kind, p)
        for device in devices
        for m in sizes
        for kind, p in (("reference", reference_rows(m)), ("synthetic", synthetic_rows(m)))
    ]
    with tqdm(total=len(cases) * len(budgets), desc="mitigation", leave=False) as bar:
        for case in cases:
            stage = Stage(case)
            for shots in budgets:
                measured = stage.measure(shots)
                print_table(measured)
                rows += measured
                bar.update()
    print_summary(rows)
    for device in DEFAULTS_DEVICES:
        for shots in DEFAULTS_BUDGETS:
            compared = compare_defaults(device, shots)
            print_defaults(compared)
            rows += compared
    return rows


def reference_rows(m: int) -> Tensor:
    """Causal rows of the reference model, float64 (24, 2^m): all heads of three layers."""
    model, tokens = load_reference_model(), encode(reference_text())
    parts = []
    for layer, (q, k, _) in enumerate(model.attention_inputs(tokens[None, : 1 << m])):
        if layer % 2:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            logits = (q @ k.mT)[0].double() / q.shape[-1] ** 0.5  # [H, L, n]
            future = torch.ones(1 << m, 1 << m, dtype=torch.bool).triu(1)
            query = (1 << m) - 1 - layer  # not the last one, so that some keys are masked
            parts.append(logits.masked_fill(future, -torch.inf).softmax(-1)[:, query])
    return torch.cat(parts)[:ROWS]


def synthetic_rows(m: int, *, seed: int = 0) -> Tensor:
    """Softmax of normal logits of standard deviations 0.5 to 2, float64 (24, 2^m)."""
    g = torch.Generator().manual_seed(m + 1000 * seed)
    logits = torch.randn(ROWS, 1 << m, generator=g, dtype=torch.float64)
    return (logits * torch.linspace(0.5, 2, ROWS)[:, None]).softmax(-1)


class Stage:
    """All options and planners on the rows of a case."""

    def __init__(self, case: Case):
        self.case = case
        self.backend = QiskitQuantumBackend("aer", case.device, loader="tree")
        misinformed = QiskitQuantumBackend("aer", case.device, loader="tree", noise_scale=MISINFORMED_NOISE)
        self.options = default_options(self.backend, case.p.shape[-1])
        tree = [option for option in self.options if option.loader is None]
        self.planners = {
            PLANNER: MitigationPlanner(),
            TREE: MitigationPlanner(tree),
            MISINFORMED: MitigationPlanner(tree, model=misinformed),
        }
        self.truth = Rehearsal(self.backend, case.p, readout_errors)

    def measure(self, shots: int) -> list[BenchRow]:
        """The rows at one budget of shots."""
        rng = np.random.default_rng([self.case.m, shots])
        generator = torch.Generator().manual_seed(shots)
        options, planners = [], []
        for option in self.options:
            start = time.perf_counter()
            prediction = self.truth.predict(option, shots, REPEATS, rng)
            if not prediction.problem:
                seconds = (time.perf_counter() - start) / REPEATS
                options.append(Measured(option.name, prediction, seconds))
        for name, planner in self.planners.items():
            start = time.perf_counter()
            plan = planner.plan(self.backend, self.case.p, shots, generator=generator)
            seconds = time.perf_counter() - start
            prediction = self.truth.predict(plan.choice.option, shots, REPEATS, rng)
            planners.append(Measured(name, prediction, seconds, plan))
        raw = options[0]
        best = min(x.prediction.error for x in options)
        best_tree = min(x.prediction.error for x in options if x.prediction.option.loader is None)
        rows = []
        for x in (*options, *planners):
            error = x.prediction.error
            raw_ratio = error / raw.prediction.error
            passed = x.plan is None or raw_ratio <= ALLOWED
            details = {
                "device": self.case.device,
                "m": self.case.m,
                "kind": self.case.kind,
                "shots": shots,
                "bias": x.prediction.bias,
                "expected": None if x.plan is None else x.plan.choice.error,
                "choice": None if x.plan is None else x.plan.choice.option.name,
                "rehearsed on": None if x.plan is None else x.plan.rehearsed_on,
                "raw ratio": raw_ratio,
                "best ratio": error / (best_tree if x.name in (TREE, MISINFORMED) else best),
            }
            rows.append(
                BenchRow(
                    case=f"{self.case}, {shots:,} shots",
                    method=x.name,
                    seconds=x.seconds,
                    baseline="raw",
                    ratio=raw.seconds / x.seconds,
                    error=error,
                    check="pass" if passed else f"{raw_ratio:.2f} times the raw error",
                    details=details,
                )
            )
        return rows


def compare_defaults(device: str, shots: int) -> list[BenchRow]:
    """What a user gets who turns mitigation on: rows of 16 keys on a twin, m = 4, tree loader.

    A mitigation passes if its error is at most 5 % above that of the raw counts, or if it warned before it
    measured (`warning`). The planner is rehearsed on the rows themselves, and on others of the same kind.
    """
    p, others = synthetic_rows(4), synthetic_rows(4, seed=1)
    backend = QiskitQuantumBackend("aer", device, loader="tree")
    truth, rng = Rehearsal(backend, p, readout_errors), np.random.default_rng(shots)
    raw = truth.predict(CircuitMitigation(readout=False), shots, REPEATS, rng)
    rows = []

    def add(
        method: str,
        error: float,
        seconds: float,
        warning: str = "",
        raw_error: float = raw.error,
        **details: Any,
    ) -> None:
        ratio = error / raw_error
        passed = ratio <= ALLOWED or warning or FORMER in method
        check = "pass" if passed else f"{ratio:.2f} times the raw error, no warning"
        details |= {"device": device, "shots": shots, "raw ratio": ratio, "warning": warning}
        case = f"{device} defaults, {shots:,} shots"
        rows.append(BenchRow(case, method, seconds, "raw", None, error, check, details=details))

    for name, option in _default_options().items():
        start = time.perf_counter()
        error = truth.predict(option, shots, REPEATS, rng).error
        expected = option.expect(backend, p, shots)
        warning = "" if expected is None else expected.warning
        add(name, error, (time.perf_counter() - start) / REPEATS, warning)
    tree = [option for option in default_options(backend, p.shape[-1]) if option.loader is None]
    for known in (None, others):
        start = time.perf_counter()
        plan = MitigationPlanner(tree, rows=known).plan(
            backend, p, shots, generator=torch.Generator().manual_seed(shots)
        )
        seconds = time.perf_counter() - start
        error = truth.predict(plan.choice.option, shots, REPEATS, rng).error
        choice = plan.choice.option.name
        add(f"planner, rehearsed on {plan.rehearsed_on}", error, seconds, choice=choice)
    # Error cancellation runs thousands of circuits for each row.
    some, repeats = (p, FEW_REPEATS) if shots < SHOTS_OF_ALL_ROWS else (p[::2], 1)
    raw_of_some = Rehearsal(backend, some).predict(raw.option, shots, REPEATS, rng).error
    generator = torch.Generator().manual_seed(shots)
    for name, pec in (
        (f"256 draws without readout{FORMER}", ProbabilisticErrorCancellation(256, readout=False)),
        ("ProbabilisticErrorCancellation()", ProbabilisticErrorCancellation()),
    ):
        start, errors = time.perf_counter(), []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(repeats):
                result = pec.sample_rows(backend, some, shots, generator=generator)
                errors.append(float(total_variation_distance(result.probabilities(), some).mean()))
        warning = str(caught[0].message) if caught else ""
        seconds = (time.perf_counter() - start) / repeats
        add(f"error cancellation, {name}", fmean(errors), seconds, warning, raw_of_some)
    return rows


def _default_options() -> dict[str, CircuitMitigation]:
    """Ways to mitigate by the names under which `compare_defaults` shows them."""
    options = {
        "raw": CircuitMitigation(readout=False),
        f"richardson 1 2 3{FORMER}": CircuitMitigation(ZeroNoiseExtrapolation([1, 2, 3]), readout=False),
        f"richardson 1 3 5{FORMER}": CircuitMitigation(ZeroNoiseExtrapolation([1, 3, 5]), readout=False),
        "CircuitMitigation(): readout": CircuitMitigation(),
        "ZeroNoiseExtrapolation(): line 1 5, readout": CircuitMitigation(ZeroNoiseExtrapolation()),
        "shared decay 1 3, readout": CircuitMitigation(SharedDecay([1, 3])),
        "SharedDecay(): 1 5, readout": CircuitMitigation(SharedDecay()),
    }
    zne = MitigationSpec(method="zne").build()
    assert isinstance(zne, CircuitMitigation)
    options["MitigationSpec's zne: linear 1 3 5, readout"] = zne
    return options


def print_defaults(rows: Sequence[BenchRow]) -> None:
    """Print what a user gets who turns mitigation on, at one number of shots on one device."""
    print(f"\n{rows[0].case}: total variation from the row, mean of rows of 16 keys")
    print(f"  {'mitigation':<66}{'error':>8}{'× raw':>7}  check")
    for row in rows:
        details = row.details
        notes = "  warned" if details["warning"] else ""
        notes += f"  chose {details['choice']}" if "choice" in details else ""
        print(f"  {row.method:<66}{row.error:>8.4f}{details['raw ratio']:>7.2f}  {row.check}{notes}")


def print_table(rows: Sequence[BenchRow]) -> None:
    """Print the options of a case, the best first, and then the planners."""
    print(f"\n{rows[0].case}")
    print(f"  {'option':<42}{'error':>8}{'bias':>8}{'× raw':>7}{'× best':>8}  check")
    for row in sorted(rows, key=lambda row: (row.details["choice"] is not None, row.error)):
        details = row.details
        choice = (
            f"  chose {details['choice']}, expected {details['expected']:.4f}" if details["choice"] else ""
        )
        print(
            f"  {row.method:<42}{row.error:>8.4f}{details['bias']:>8.4f}{details['raw ratio']:>7.2f}"
            f"{details['best ratio']:>8.2f}  {row.check}{choice}"
        )


def print_summary(rows: Sequence[BenchRow]) -> None:
    """Print what the lab promises of its planner, beside what was measured."""
    print()
    for name in (PLANNER, TREE, MISINFORMED):
        of_planner = [row.details for row in rows if row.method == name]
        raw_ratios = [x["raw ratio"] for x in of_planner]
        best_ratios = [x["best ratio"] for x in of_planner]
        print(
            f"{name}: at most {max(raw_ratios):.3f} times the raw error (<= {ALLOWED:.2f}), on average "
            f"{fmean(best_ratios):.3f} times that of the best option in hindsight (<= 1.10) and "
            f"{fmean(raw_ratios):.2f} times the raw error"
        )
    for m, limit in ((4, 0.008), (6, 0.025)):
        errors = [
            row.error
            for row in rows
            if (row.method, row.details["device"], row.details["m"], row.details["shots"])
            == (TREE, "fake_fez", m, 256_000)
        ]
        if errors:
            print(f"fake_fez, m={m}, 256,000 shots, tree: {fmean(errors):.4f} (<= {limit})")
