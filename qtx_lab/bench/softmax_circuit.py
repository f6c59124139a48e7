"""`qtx-lab bench softmax_circuit`: circuits that compute the softmax of 4 and 8 keys, and what that takes.

A classical computer makes the same softmax, exactly, and draws from it, in less time than a device needs for
its first shot; that line stands first in every table. The circuits are measured to know their cost.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import QiskitQuantumBackend, SoftmaxCircuitSampler
from ..backends.counts import draw_counts
from ..circuits.fidelity import total_variation
from .base import BenchRow, Timing, shown

MAX_LOGIT = 2.0
FEATURES = 4
ROWS, SHOTS = 16, 40_000
TOLERANCE = 0.02
"""Largest total variation between softmax and a circuit without noise."""
DEGREES = (4, 6, 8, 12)
DEVICES = ("fake_boston", "fake_fez")
CASES = ((4, 1), (4, 2), (4, FEATURES), (8, FEATURES))
"""Numbers of keys and of components."""


def bench_softmax_circuit(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Measure 16 rows of random queries and keys, whose largest |logit| is 2, with 40,000 shots each.

    Methods are "classical": the exact softmax and as many draws by pseudo-random numbers; "degree D": the
    circuit without noise; "degree D, amplified": the same with the number of rounds that suits most rows;
    "degree D, NAME": the circuit of the lowest degree on the twin of a device.

    `error` is the mean over rows of the total variation between the accepted shots and softmax. The check
    allows the shot noise of the accepted shots (its 97.5 % quantile, on average), the tolerance of .02 and,
    on a twin, the probability of an error by the device's calibration. It fails too where the share of
    accepted shots is further than five standard errors from theory, without noise.

    Seconds are those of a simulation; only the device seconds tell what a device would take.

    Details: `degree`, `rounds`; `polynomial_error`: largest total variation by theory; `success`,
    `success_by_theory` and `success_std_error`: shares of accepted shots, averaged over rows;
    `key_loads_a_draw`: how often all keys are loaded for an accepted shot, median row; `two_qubit_gates`,
    `depth` and `error_free_probability` of the transpiled circuit; `shot_noise`: total variation of as many
    ideal draws; `device_seconds`, as `plan_rows` estimates.
    """
    rows = []
    for keys, features in CASES[1:2] if quick else CASES:
        problem = SoftmaxProblem.random(keys, features, 4 if quick else ROWS, seed=keys)
        shots = SHOTS // 10 if quick else SHOTS
        here = [classical_row(problem, shots)]
        for degree in (6,) if quick else DEGREES:
            here.append(circuit_row(problem, degree, shots))
        plain = here[-1].details["success_by_theory"]
        rounds = max(0, round(math.pi / (4 * math.asin(math.sqrt(plain))) - 0.5))
        last = int(here[-1].details["degree"])
        here.append(circuit_row(problem, last, shots, rounds=max(1, rounds)))
        for device in DEVICES[:1] if quick else DEVICES:
            here.append(circuit_row(problem, 6 if features > 1 else 4, shots, device=device))
        print_table(problem.case, here)
        rows += here
    return rows


@dataclass(frozen=True, eq=False)
class SoftmaxProblem:
    """Queries (R, d) and keys (R, n, d), whose largest |logit| is `MAX_LOGIT` in each row, and softmax."""

    q: Tensor
    k: Tensor
    p: Tensor

    @classmethod
    def random(cls, keys: int, features: int, rows: int, seed: int) -> SoftmaxProblem:
        """Normal queries and keys, the queries scaled."""
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(rows, features, generator=generator, dtype=torch.float64)
        k = torch.randn(rows, keys, features, generator=generator, dtype=torch.float64)
        logits = (k @ q[..., None]).squeeze(-1) * features**-0.5
        factor = MAX_LOGIT / logits.abs().amax(-1, keepdim=True)
        return cls(q * factor, k, (logits * factor).softmax(-1))

    @property
    def case(self) -> str:
        """What the tables call it."""
        rows, keys, features = self.k.shape
        return f"{keys} keys, {features} components, {rows} rows, |logits| <= {MAX_LOGIT:g}"


def classical_row(problem: SoftmaxProblem, shots: int) -> BenchRow:
    """The exact softmax of the same queries and keys, and a draw from it for each shot of the circuits."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        logits = (problem.k @ problem.q[..., None]).squeeze(-1) * problem.q.shape[-1] ** -0.5
        return draw_counts(logits.softmax(-1), shots, generator)

    seconds, counts = [], draw()
    for _ in range(5):
        start = time.perf_counter()
        counts = draw()
        seconds.append(time.perf_counter() - start)
    timing = Timing.of(seconds)
    error = float(total_variation(counts, problem.p, generator=generator).value.mean())
    return BenchRow(
        problem.case, "classical", timing.median, "classical", 1.0, error, "pass", timing.low, timing.high
    )


def circuit_row(
    problem: SoftmaxProblem, degree: int, shots: int, *, rounds: int = 0, device: str = "aer"
) -> BenchRow:
    """Measure the circuit of a degree, on a simulator without noise or on a device's twin."""
    backend = QiskitQuantumBackend("aer", device, shots)
    sampler = SoftmaxCircuitSampler(
        backend, degree=degree, rounds=rounds, max_logit=MAX_LOGIT, tolerance=TOLERANCE
    )
    loader = sampler.loader(problem.q.shape[-1])
    expected = loader.expected(problem.q, problem.k)
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    measured = sampler.measure(problem.q, problem.k, generator=generator)
    seconds = time.perf_counter() - start
    facts = measured.diagnostics
    distance = total_variation(measured.counts, problem.p, generator=generator)
    share = measured.counts.sum(-1) / shots
    theory = expected.amplified
    spread = (theory * (1 - theory) / shots).sqrt()
    error = float(distance.value.mean())
    wrong = 1 - facts["error_free_probability"]
    allowed = float(distance.floor_range[1].mean()) + TOLERANCE + wrong
    check = "pass" if error <= allowed else f"error {error:.2g} is above {allowed:.2g}"
    if backend.engine.ideal and bool(((share - theory).abs() > 5 * spread).any()):
        check = "success differs from theory"
    plan = backend.with_loader(loader).plan_rows(problem.p, shots) if device != "aer" else None
    suffix = ", amplified" if rounds else ""
    suffix += f", {device}" if device != "aer" else ""
    details = {
        "degree": degree,
        "rounds": rounds,
        "polynomial_error": float(expected.total_variation.max()),
        "success": float(share.mean()),
        "success_by_theory": float(theory.mean()),
        "success_std_error": float(spread.square().sum().sqrt() / len(share)),
        "key_loads_a_draw": float(expected.key_loads_a_draw.median()),
        "two_qubit_gates": facts["two_qubit_gates"],
        "depth": facts["depth"],
        "error_free_probability": facts["error_free_probability"],
        "shot_noise": float(distance.floor.mean()),
        "device_seconds": None if plan is None else plan.quantum_seconds,
    }
    method = f"degree {degree}{suffix}"
    return BenchRow(problem.case, method, seconds, "classical", None, error, check, details=details)


def print_table(case: str, rows: list[BenchRow]) -> None:
    """Print the rows of a case."""
    print(f"\n{case}")
    print(
        f"  {'method':<24}{'error':>8}{'floor':>8}{'by theory':>11}{'success':>9}{'theory':>9}"
        f"{'loads/draw':>12}{'2-q gates':>11}{'depth':>8}{'no error':>10}{'device s':>10}  check"
    )
    for row in rows:
        x = row.details.get
        print(
            f"  {row.method:<24}{row.error:>8.4f}{shown(x('shot_noise'), '.4f'):>8}"
            f"{shown(x('polynomial_error'), '.4f'):>11}{shown(x('success'), '.4f'):>9}"
            f"{shown(x('success_by_theory'), '.4f'):>9}{shown(x('key_loads_a_draw'), '.0f'):>12}"
            f"{shown(x('two_qubit_gates'), 'd'):>11}{shown(x('depth'), 'd'):>8}"
            f"{shown(x('error_free_probability'), '.3f'):>10}{shown(x('device_seconds'), '.0f'):>10}"
            f"  {row.check}"
        )
    print(
        f"  error: total variation from softmax; floor: that of as many ideal draws; classical needs "
        f"{1e3 * rows[0].seconds:.1f} ms for everything."
    )
