"""`qtx-lab bench amplitude`: errors of attention outputs by amplitude estimation, and by as many shots.

Outcomes are drawn from the exact probabilities of the twin's noisy circuits, computed once for each row and
number of iterates. Such repetitions have the distribution of those that are simulated shot by shot.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..backends import AmplitudeEstimator, QiskitQuantumBackend
from ..backends.amplitude_plan import AmplitudePlan
from ..circuits.resources import resources
from .base import BenchRow

DEVICE = "fake_boston"
LARGEST_RATIO = {4: 0.35, 8: 0.5, 16: 0.8}
"""The error may be so many times that of shots of an ancilla, by the number of keys."""

LOADS = {4: (1024, 4096, 16384), 8: (1024, 4096, 16384), 16: (1024, 4096, 16384)}
ROWS, REPETITIONS = {4: 12, 8: 8, 16: 4}, 400
TOGETHER = 25
"""Repetitions that are estimated together."""

METHODS: tuple[Literal["bayes", "mle"], ...] = ("bayes", "mle")

IDEAL_LOADS = (256, 2560, 25_600, 256_000, 2_560_000)
"""Loads without noise, over four decades."""


def bench_amplitude(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Estimate outputs of random rows on the twin of Boston, with idling and readout errors.

    Logits and values are normal; there is one coordinate. `error` is the root mean square over rows and
    repetitions, in units of the values' standard deviation. `seconds` is the time of this computer's
    processor for one repetition of all rows. Details of the rows:

    - `keys`, `loads`: the case; `used`: the loads that were used, in the mean;
    - `error ratio`: the error over that of "shots, ancilla";
    - `coverage`: how often the 95 % interval held the exact output; `coverage_of_worst_row`: the least of the
      rows; `repetitions` of each row;
    - `two_qubit_gates`: of the longest circuit; `planes`: amplitudes of an output, in the mean.

    Methods:

    - "amplitude estimation" is `AmplitudeEstimator`, and "…, mle" is that by maximum likelihood. They pass if
      the error ratio is at most .35, .5, .8 at 4, 8 and 16 keys where loads are 4,096 or more, if the
      intervals cover 93 % to 97 %, and if those of the worst row cover 93 % within three standard errors.
    - "shots, ancilla" measures an ancilla into which the values are rotated, and "shots, keys" measures keys
      and averages their values. Their errors are those of as many shots without any noise.
    - "classical draws" has the error of "shots, keys", and needs no device. "exact" takes n multiplications.

    The last case has no noise: `slope` is that of log error against log loads over four decades.
    """
    del copy_bandwidth
    rows: list[BenchRow] = []
    for keys, budgets in LOADS.items():
        for loads in budgets[1:2] if quick else budgets:
            rows += _on_the_twin(keys, loads, REPETITIONS // 4 if quick else REPETITIONS)
    rows.append(_slope(IDEAL_LOADS, 100 if quick else 400))
    print_rows(rows)
    return rows


def problem(keys: int, rows: int) -> tuple[Tensor, Tensor]:
    """Random rows (R, n) and values (R, n, 1)."""
    g = torch.Generator().manual_seed(keys)
    p = torch.randn(rows, keys, generator=g, dtype=torch.float64).softmax(-1)
    return p, torch.randn(rows, keys, 1, generator=g, dtype=torch.float64)


def _on_the_twin(keys: int, loads: int, repetitions: int) -> list[BenchRow]:
    p, v = problem(keys, ROWS[keys])
    ancilla, key = shot_errors(p, v, loads)
    case, baseline = f"{DEVICE} keys={keys} loads={loads}", "shots, ancilla"
    rows = []
    for method in METHODS:
        estimator = AmplitudeEstimator(QiskitQuantumBackend("aer", DEVICE, idling=True), method=method)
        result = repeated_estimates(estimator, p, v, loads, repetitions)
        ratio = result.error / ancilla
        problems = [
            *([f"error ratio {ratio:.2f}"] if loads >= 4096 and ratio > LARGEST_RATIO[keys] else []),
            *result.coverage_problems(),
        ]
        details = {"keys": keys, "loads": loads, **result.details, "error ratio": ratio}
        name = "amplitude estimation" + ("" if method == "bayes" else f", {method}")
        check = ", ".join(problems) or "pass"
        rows.append(
            BenchRow(case, name, result.seconds, baseline, None, result.error, check, details=details)
        )
    for name, error in ((baseline, ancilla), ("shots, keys", key), ("classical draws", key), ("exact", 0.0)):
        details = {"keys": keys, "loads": loads, "error ratio": error / ancilla}
        rows.append(BenchRow(case, name, 0.0, baseline, None, error, "pass", details=details))
    return rows


@dataclass(frozen=True)
class RepeatedEstimates:
    """What repetitions of an estimation came to: root mean square error, seconds of one, and details."""

    error: float
    seconds: float
    details: Mapping[str, Any]

    def coverage_problems(self) -> list[str]:
        """Why the intervals do not cover as they should; empty where they do."""
        coverage, worst = self.details["coverage"], self.details["coverage_of_worst_row"]
        noise = 3 * math.sqrt(0.95 * 0.05 / self.details["repetitions"])
        problems = [] if 0.93 <= coverage <= 0.97 else [f"coverage {coverage:.1%}"]
        return problems + ([] if worst >= 0.93 - noise else [f"coverage of the worst row {worst:.1%}"])


def repeated_estimates(
    estimator: AmplitudeEstimator, p: Tensor, v: Tensor, loads: int, repetitions: int
) -> RepeatedEstimates:
    """Repeat the estimation of the outputs of rows (R, n) with values (R, n, 1)."""
    plan = estimator.plan(p, v, loads)
    probabilities = estimator.probabilities(plan)
    exact = torch.einsum("rn,rnd->rd", p, v)
    generator = torch.Generator().manual_seed(loads)
    start, errors, covered, used = time.process_time(), [], [], []
    for _ in range(math.ceil(repetitions / TOGETHER)):
        measured = probabilities.draw(plan, TOGETHER, generator)
        values, lower, upper, _ = estimator.fit(plan, measured)
        errors.append(values - exact)
        covered.append((lower <= exact) & (exact <= upper))
        used += [plan.loads(shots).double().mean() for shots in measured.shots]
    done = len(errors) * TOGETHER
    of_rows = torch.cat(covered).double().mean((0, 2))
    details = {
        "used": torch.stack(used).mean().item(),
        "repetitions": done,
        "coverage": of_rows.mean().item(),
        "coverage_of_worst_row": of_rows.min().item(),
        "planes": len(plan.p) / len(p),
        "two_qubit_gates": resources(estimator.circuit(p.shape[-1], plan.iterates[-1])).two_qubit_gates,
        "iterates": plan.iterates[-1],
    }
    error = torch.cat(errors).square().mean().sqrt().item()
    return RepeatedEstimates(error, (time.process_time() - start) / done, details)


def shot_errors(p: Tensor, v: Tensor, loads: int) -> tuple[float, float]:
    """Root mean square error of as many shots, of an ancilla that holds the value and of keys."""
    mean = torch.einsum("rn,rnd->rd", p, v)
    ancilla = (v.amax(1) - mean) * (mean - v.amin(1))  # variance of a draw of the least or the largest value
    key = (p[..., None] * (v - mean[:, None]).square()).sum(1)
    return (ancilla.mean() / loads).sqrt().item(), (key.mean() / loads).sqrt().item()


def _slope(budgets: tuple[int, ...], repetitions: int) -> BenchRow:
    """Error against loads without noise, from the probabilities sin²((2k + 1) theta)."""
    p, v = problem(4, 4)
    estimator = AmplitudeEstimator(QiskitQuantumBackend("aer"))
    start, errors = time.process_time(), []
    for loads in budgets:
        plan: AmplitudePlan = estimator.plan(p, v, loads, most_iterates=loads)
        measured = plan.ideal_probabilities().draw(plan, repetitions, torch.Generator().manual_seed(loads))
        values = estimator.fit(plan, measured)[0]
        errors.append((values - torch.einsum("rn,rnd->rd", p, v)).square().mean().sqrt().item())
    x = torch.tensor([math.log(b) for b in budgets])
    y = torch.tensor([math.log(e) for e in errors])
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    check = "pass" if slope <= -0.9 else f"slope {slope:.2f}"
    details = {"slope": slope, "loads": list(budgets), "errors": errors}
    seconds = time.process_time() - start
    return BenchRow(
        "no noise, keys=4", "amplitude estimation", seconds, "", None, errors[-1], check, details=details
    )


def print_rows(rows: list[BenchRow]) -> None:
    """Print a line for each row."""
    print(f"\n  {'case':<34}{'method':<26}{'error':>10}{'ratio':>8}{'covered':>9}{'worst':>8}  check")
    for row in rows:
        ratio, covered = row.details.get("error ratio"), row.details.get("coverage")
        worst = row.details.get("coverage_of_worst_row")
        print(
            f"  {row.case:<34}{row.method:<26}{row.error:>10.2g}"
            f"{'–' if ratio is None else format(ratio, '.2f'):>8}"
            f"{'–' if covered is None else format(covered, '.1%'):>9}"
            f"{'–' if worst is None else format(worst, '.1%'):>8}  {row.check}"
        )
    print("  ratio: the error over that of as many shots of an ancilla without noise.")
