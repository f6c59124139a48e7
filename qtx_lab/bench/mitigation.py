"""`qtx-lab bench mitigation`: how wrong measured rows are, by each way to mitigate and by the planner, at equal shots.

Outcomes are drawn from exact probabilities of the twins' noisy circuits, so that many shots cost little time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..backends import QiskitQuantumBackend
from ..mitigation import MitigationPlanner
from ..mitigation.planner import Plan, Prediction, Rehearsal, default_options
from ..mitigation.readout import readout_errors
from ..models.reference import encode, load_reference_model, reference_text

DEVICES = ("fake_fez", "fake_sherbrooke", "fake_torino")
"""The last was not looked at while the planner was written."""

BUDGETS = (1_000, 4_000, 16_000, 64_000, 256_000)
ROWS, REPEATS = 24, 8
WRONG = 0.7
"""Noise of the calibration that the misinformed planner sees, over the device's."""

PLANNER, TREE, MISINFORMED = "planner", "planner, tree only", "planner, tree only, calibration 30 % low"


@dataclass(frozen=True)
class Case:
    """Rows (R, n) on a device's twin."""

    device: str
    m: int
    kind: str
    p: Tensor

    def __str__(self) -> str:
        return f"{self.device} m={self.m} {self.kind} rows"


def bench_mitigation(quick: bool, copy: float) -> list[dict[str, Any]]:
    """Total variation between mitigated and true rows; rows as in `run_bench`, and with

    - `error`: total variation, mean over 24 rows and 8 repetitions; `raw ratio`, `best ratio`: over that of the tree's
      own counts, and of the best option in hindsight (for "tree only", of those on the tree);
    - `expected`: what was predicted; `choice`: what the planner picked;
    - `seconds`: of planning, or of simulating and mitigating a repetition of all rows; other people's load is in it.

    A planner passes where it is at most 5 % worse than the raw counts.
    """
    del copy
    rows: list[dict[str, Any]] = []
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
                found = stage.measure(shots)
                print_table(f"{case}, {shots:,} shots", found)
                rows += found
                bar.update()
    print_summary(rows)
    return rows


def reference_rows(m: int) -> Tensor:
    """Rows of 2^m keys of the reference model, float64 (24, 2^m): all heads of three layers, causally masked."""
    model, tokens = load_reference_model(), encode(reference_text())
    parts = []
    for layer, (q, k, _) in enumerate(model.attention_inputs(tokens[None, : 1 << m])):
        if layer % 2:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            logits = (q @ k.mT)[0].double() / q.shape[-1] ** 0.5  # [H, L, n]
            future = torch.ones(1 << m, 1 << m, dtype=torch.bool).triu(1)
            last = (1 << m) - 1 - layer  # some keys are masked
            parts.append(logits.masked_fill(future, -torch.inf).softmax(-1)[:, last])
    return torch.cat(parts)[:ROWS]


def synthetic_rows(m: int) -> Tensor:
    """Softmax of normal logits of standard deviations 0.5 to 2, float64 (24, 2^m)."""
    g = torch.Generator().manual_seed(m)
    logits = torch.randn(ROWS, 1 << m, generator=g, dtype=torch.float64)
    return (logits * torch.linspace(0.5, 2, ROWS)[:, None]).softmax(-1)


class Stage:
    """All options and planners on the rows of a case."""

    def __init__(self, case: Case):
        self.case = case
        self.backend = QiskitQuantumBackend("aer", case.device, loader="tree")
        wrong = QiskitQuantumBackend("aer", case.device, loader="tree", noise_scale=WRONG)
        n = case.p.shape[-1]
        self.options = default_options(self.backend, n)
        tree = [option for option in self.options if option.loader is None]
        self.planners = {
            PLANNER: MitigationPlanner(),
            TREE: MitigationPlanner(tree),
            MISINFORMED: MitigationPlanner(tree, model=wrong),
        }
        self.truth = Rehearsal(self.backend, case.p, readout_errors)

    def measure(self, shots: int) -> list[dict[str, Any]]:
        """Rows of the result at one budget."""
        rng = np.random.default_rng([self.case.m, shots])
        generator = torch.Generator().manual_seed(shots)
        found: list[tuple[str, Prediction, float, Plan | None]] = []
        for option in self.options:
            start = time.perf_counter()
            got = self.truth.predict(option, shots, REPEATS, rng)
            if not got.trouble:
                found.append((option.name, got, (time.perf_counter() - start) / REPEATS, None))
        for name, planner in self.planners.items():
            start = time.perf_counter()
            plan = planner.plan(self.backend, self.case.p, shots, generator=generator)
            seconds = time.perf_counter() - start
            got = self.truth.predict(plan.choice.option, shots, REPEATS, rng)
            found.append((name, got, seconds, plan))
        raw = found[0][1].error
        best = min(got.error for _, got, _, plan in found if plan is None)
        best_tree = min(got.error for _, got, _, plan in found if plan is None and got.option.loader is None)
        return [
            {
                "case": f"{self.case}, {shots:,} shots",
                "device": self.case.device,
                "m": self.case.m,
                "kind": self.case.kind,
                "shots": shots,
                "method": name,
                "seconds": seconds,
                "baseline": "raw",
                "ratio": found[0][2] / seconds,
                "error": got.error,
                "bias": got.bias,
                "expected": None if plan is None else plan.choice.error,
                "choice": None if plan is None else plan.choice.option.name,
                "raw ratio": got.error / raw,
                "best ratio": got.error / (best_tree if name in (TREE, MISINFORMED) else best),
                "check": "pass"
                if plan is None or got.error <= 1.05 * raw
                else f"{got.error / raw:.2f} times the raw error",
            }
            for name, got, seconds, plan in found
        ]


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Options best first, then the planners."""
    print(f"\n{title}")
    print(f"  {'option':<42}{'error':>8}{'bias':>8}{'× raw':>7}{'× best':>8}  check")
    for row in sorted(rows, key=lambda row: (row["choice"] is not None, row["error"])):
        picked = f"  took {row['choice']}, expected {row['expected']:.4f}" if row["choice"] else ""
        print(
            f"  {row['method']:<42}{row['error']:>8.4f}{row['bias']:>8.4f}{row['raw ratio']:>7.2f}"
            f"{row['best ratio']:>8.2f}  {row['check']}{picked}"
        )


def print_summary(rows: list[dict[str, Any]]) -> None:
    """What the lab promises of its planner, beside what was measured."""
    print()
    for name in (PLANNER, TREE, MISINFORMED):
        part = [row for row in rows if row["method"] == name]
        print(
            f"{name}: at most {max(row['raw ratio'] for row in part):.3f} times the raw error (<= 1.05), on average "
            f"{fmean(row['best ratio'] for row in part):.3f} times that of the best option in hindsight (<= 1.10), "
            f"{fmean(row['raw ratio'] for row in part):.2f} times the raw error on average"
        )
    for m, limit in ((4, 0.008), (6, 0.025)):
        errors = [
            row["error"]
            for row in rows
            if (row["method"], row["device"], row["m"], row["shots"]) == (TREE, "fake_fez", m, 256_000)
        ]
        if errors:
            print(f"fake_fez, m={m}, 256,000 shots, tree: {fmean(errors):.4f} (<= {limit})")
