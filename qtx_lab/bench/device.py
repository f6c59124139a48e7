"""`python -m qtx_lab.bench.device --json FILE`: all that needs a GPU, in one run of eight minutes.

A GPU is at hand only at times, and briefly. So this runs in steps: first whether the kernels are right, then
how fast they are. FILE is written after each step, and a step that FILE holds is not run again. The steps of
a stage run in a process of their own, so that a kernel that crashes or hangs costs its step alone. `--quick`
runs every stage on small sizes; without a GPU the kernels then run in Triton's interpreter, whose times say
nothing.

`--tables FOLDER` writes what FILE holds as the tables that the notebooks read.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from ..errors import ArgumentError, BackendUnavailable, unknown_name
from ..experiments.provenance import commit, machine, versions
from ..kernels.inputs import Inputs
from ..models.reference import ReferenceConfig
from ..storage import json_bytes, write_atomic
from .base import BenchRow, measure_copy_bandwidth
from .device_profile import counters, kernel_times
from .kernels import (
    Case,
    baselines,
    competitors,
    describe,
    device_copy_bandwidth,
    exact_calls,
    exact_output,
    make_inputs,
    print_rows,
    rows_of,
    sets_of_inputs,
    time_methods,
)
from .kernels_verify import measure_verifying
from .model_speed import bench_generation, bench_model_speed
from .training import bench_large

SECONDS = 470.0
"""How long all stages may take."""

GRACE_SECONDS = 5.0
"""How much longer a process may take than the time that it was given."""

LONG = (Case(8, 1 << 17), Case(8, 1 << 18))
"""The cases that are measured first."""

OTHERS = tuple(Case(batch, n << 10) for batch, n in ((8, 32), (8, 8), (1, 128), (1, 256), (1, 32), (1, 8)))
"""The cases that are measured in the time that is left."""

SLOW_TO_COMPILE = ("FlexAttention",)
"""Exact methods that are compared last, and once: their first call takes half a minute."""

QUICK_CASE = Case(1, 128, 16, 1)
QUICK_MODEL = ReferenceConfig(
    vocab_size=64, context=128, layers=1, width=32, heads=3, kv_heads=1, head_dim=32, mlp_width=32
)
QUICK_TRAINING = ReferenceConfig(
    context=8, layers=1, width=16, heads=1, kv_heads=1, head_dim=16, mlp_width=16
)

Result = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A part of a stage, whose result is kept by its name."""

    name: str
    run: Callable[[], Result]


@dataclass(frozen=True)
class Stage:
    """Steps that run in one process, one after another."""

    name: str
    steps: tuple[Step, ...]
    seconds: float
    """How long they may take, beside the limit of all stages."""


class Record:
    """The file of results: the machine, and each step's status, seconds and result."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, Any]:
        """What the file holds; an empty record where there is none."""
        if not self.path.exists():
            return {"bench": "device", "machine": {}, "steps": {}}
        content: dict[str, Any] = json.loads(self.path.read_bytes())
        if content.get("bench") != "device":
            raise ArgumentError(f"--json {self.path} holds something else than results of this benchmark.")
        return content

    def put(self, step: str, status: str, **result: Any) -> None:
        """Keep what is known of a step: "done", "failed", "left out" or "running"."""
        content = self.read()
        content["steps"][step] = {"status": status, **result}
        write_atomic(self.path, json_bytes(content))

    def forget(self, steps: Collection[str]) -> None:
        """Forget earlier attempts at these steps."""
        content = self.read()
        content["steps"] = {name: x for name, x in content["steps"].items() if name not in steps}
        write_atomic(self.path, json_bytes(content))

    def put_machine(self, facts: Mapping[str, Any]) -> None:
        """Keep facts about the machine."""
        content = self.read()
        content["machine"] |= facts
        write_atomic(self.path, json_bytes(content))

    def status(self, step: str) -> str | None:
        """The status of a step, None where nothing is known of it."""
        return self.read()["steps"].get(step, {}).get("status")


# --- The stages -----------------------------------------------------------------------------------


def stages(quick: bool, device: torch.device, record: Record) -> tuple[Stage, ...]:
    """All stages for this device, in their order.

    The limits of all but the last two sum to less than `SECONDS`, so that none of these takes the time of
    another; the last two have what the others leave.
    """
    first, others = ((QUICK_CASE,), ()) if quick else (LONG, OTHERS)
    model = partial(model_speed, device, quick)
    return (
        Stage("correctness", (Step("correctness", partial(correctness, device)),), 120),
        Stage(
            "kernels", (*(kernel_step(case, device) for case in first), verify_step(first[0], device)), 140
        ),
        Stage(
            "model",
            (
                Step("model", partial(model, bench_model_speed)),
                Step("model from Python", partial(model, bench_generation)),
            ),
            80,
        ),
        Stage("training", (Step("training", partial(training, device, quick)),), 60),
        Stage("profile", (Step("profile", partial(profile_slowest, first[0], device, record)),), 45),
        Stage("more kernels", tuple(kernel_step(case, device) for case in others), 150),
        Stage("slow to compile", (Step("slow to compile", partial(slow_to_compile, first[0], device)),), 80),
    )


STAGES = ("correctness", "kernels", "model", "training", "profile", "more kernels", "slow to compile")
"""The names of the stages."""


def correctness(device: torch.device) -> Result:
    """Run the tests of the kernels; counts, and the names and messages of those that failed.

    Where there is no GPU only the quickest of them run, in the interpreter. Notebooks are left out where
    papermill is missing.
    """
    tests = Path(__file__).parents[2] / "tests" / "kernels"
    if not tests.is_dir():
        raise BackendUnavailable("only a checkout has the tests; this is an installed package.")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-rfE", "--tb=short"]
    if device.type == "cuda":
        command += ["-m", "gpu", str(tests)]
        if importlib.util.find_spec("papermill") is None:
            command += [f"--ignore={tests / 'test_notebook.py'}"]
        if importlib.util.find_spec("xdist") is not None:
            # Most of the time goes by in compiling.
            command += ["-n", str(max(1, min(12, (os.cpu_count() or 1) * 3 // 4)))]
    else:
        command += [str(tests / "test_philox.py")]
    process = subprocess.Popen(
        command, cwd=tests.parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    counts: Counter[str] = Counter()
    for line in process.stdout:  # what was printed counts even if this process is ended at its limit
        lines.append(line)
        if verdict := re.search(r"(?:^| )(PASSED|FAILED|ERROR|SKIPPED|XFAIL)(?: |$)", line.strip()):
            counts[verdict[1].lower()] += "::" in line and not line.startswith(("FAILED", "ERROR"))
    text = "".join(lines)
    print(text[-6000:])
    code = process.wait()
    return {
        "counts": dict(counts),
        "exit_code": code,
        "failures": re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE),
        "output": text[-8000:] if code else "",
    }


def kernel_step(case: Case, device: torch.device) -> Step:
    """Times, errors and kernels of all methods of a case, but for exact ones that are slow to compile."""

    def run() -> Result:
        bandwidth = copy_bandwidth(device)
        methods = competitors(case, inputs_of(case, device), SLOW_TO_COMPILE)
        timings = time_methods(methods, device, 15 if device.type == "cuda" else 1)
        rows = rows_of(case, methods, timings, device, bandwidth, describe(device, bandwidth))
        print_rows(case, rows)
        kernels = {m.name: kernel_times(m.calls, 10) for m in methods}
        print_kernels(kernels)
        return {"rows": rows_to_json(rows), "kernels": kernels, "copy_bytes_per_second": bandwidth}

    return Step(f"kernels {case}", run)


def verify_step(case: Case, device: torch.device) -> Step:
    """Times and kernels of the exact pass that verifies drafted tokens, beside SDPA."""

    def run() -> Result:
        bandwidth, turns = copy_bandwidth(device), 15 if device.type == "cuda" else 1
        rows = measure_verifying(case, inputs_of(case, device), device, turns, bandwidth)
        return {"rows": rows_to_json(rows)}

    return Step(f"verify {case}", run)


def profile_slowest(case: Case, device: torch.device, record: Record) -> Result:
    """Counters of the longest kernel of the method that is farthest from the speed of the memory.

    Raises
    ------
    BackendUnavailable
        Where kernels cannot be profiled.
    """
    if device.type != "cuda":
        raise BackendUnavailable("there is no CUDA device, so no kernel has counters.")
    measured = record.read()["steps"].get(f"kernels {case}", {})
    rows = [row for row in measured.get("rows", ()) if row["reference_error"] is not None]
    if not rows:
        raise BackendUnavailable("the slowest kernel is unknown: no times were measured.")
    method = min(rows, key=lambda row: row["bandwidth"])["method"]
    ours = [x["name"] for x in measured["kernels"][method] if x["name"].endswith("_kernel")]
    values = counters(case, method, ours[0], 38)
    print(f"{method}, {ours[0]}")
    for name, value in values.items():
        print(f"  {name}: {value}")
    return {"case": str(case), "method": method, "kernel": ours[0], "counters": values}


def training(device: torch.device, quick: bool) -> Result:
    """Training of the model of 104 M parameters in this process, or of a tiny one."""
    if quick or device.type != "cuda":
        tiny = {"steps": 6, "batch_size": 1, "precision": "fp32"}
        return {"rows": rows_to_json(bench_large(True, None, QUICK_TRAINING, **tiny))}
    return {"rows": rows_to_json(bench_large(False, None))}


def model_speed(device: torch.device, quick: bool, bench: Callable[..., Sequence[BenchRow]]) -> Result:
    """Tokens a second of a whole model."""
    bandwidth = copy_bandwidth(device)
    options = {"config": QUICK_MODEL, "batch": 1, "draws": 16, "turns": 1} if quick else {}
    return {"rows": rows_to_json(bench(device, bandwidth, **options))}


def slow_to_compile(case: Case, device: torch.device) -> Result:
    """Exact methods that are slow to compile beside SDPA."""
    bandwidth = copy_bandwidth(device)
    inputs = inputs_of(case, device)
    everything = [name for name, _ in exact_calls(device.type)]
    others = [name for name in everything if not name.startswith(("SDPA", *SLOW_TO_COMPILE))]
    methods = list(baselines(case, inputs, exact_output(inputs[0]), others))
    timings = time_methods(methods, device, 9 if device.type == "cuda" else 1)
    rows = rows_of(case, methods, timings, device, bandwidth, describe(device, bandwidth))
    print_rows(case, rows)
    return {"rows": rows_to_json(rows)}


def inputs_of(case: Case, device: torch.device) -> list[Inputs]:
    """Sets of inputs that take turns on a GPU, and a single one in the interpreter, which is slow."""
    return sets_of_inputs(case, device) if device.type == "cuda" else [make_inputs(case, device, 0)]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that the device copies."""
    return device_copy_bandwidth(device) if device.type == "cuda" else measure_copy_bandwidth()


def rows_to_json(rows: Sequence[BenchRow]) -> list[dict[str, Any]]:
    """The rows as the file holds them."""
    return [row.to_json() for row in rows]


def print_kernels(kernels: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print what the methods launch, the longest kernels first."""
    for method, launched in kernels.items():
        parts = [
            f"{x['name'][:40]} {x['microseconds']:.1f}"
            + (f" × {x['launches']:g}" if x["launches"] != 1 else "")
            for x in launched[:12]
        ]
        if parts:
            print(f"  {method}, µs a launch: {', '.join(parts)}")


# --- Processes, limits and the command ------------------------------------------------------------


def run_steps(steps: Sequence[Step], record: Record, seconds: float) -> bool:
    """Run steps in this process; False where one failed, after which CUDA may be unusable."""
    start = time.monotonic()
    for step in steps:
        began = time.monotonic()
        if began - start > seconds:
            record.put(step.name, "left out", reason="the stage had no time left")
            continue
        record.put(step.name, "running")
        try:
            result = step.run()
        except BackendUnavailable as problem:
            record.put(step.name, "left out", reason=str(problem))
            continue
        except Exception as problem:  # whatever a kernel, a compiler or a library raises
            traceback.print_exc()
            reason = f"{type(problem).__name__}: {problem}"[:2000]
            record.put(step.name, "failed", reason=reason, seconds=time.monotonic() - began)
            return False
        record.put(step.name, "done", seconds=time.monotonic() - began, **result)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True


def run_stage(
    stage: Stage, record: Record, command: Sequence[str], environment: Mapping[str, str], seconds: float
) -> None:
    """Run the steps that are not done, in a process for all and in another one after each that fails."""
    end = time.monotonic() + seconds
    todo = [step.name for step in stage.steps if record.status(step.name) != "done"]
    record.forget(todo)
    while todo:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            for name in todo:
                record.put(name, "left out", reason="no time was left")
            return
        arguments = ["--seconds", f"{left:.1f}", "--steps", json.dumps(todo)]
        process = subprocess.Popen([*command, *arguments], env=environment, start_new_session=True)
        try:
            reason = f"its process ended with code {process.wait(left + GRACE_SECONDS)}"
        except subprocess.TimeoutExpired:
            reason = f"it took longer than the {left:.0f} s that were left"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever it has started, too
            process.wait()
        for name in todo:
            if record.status(name) == "running":
                record.put(name, "failed", reason=reason)
        if record.status(todo[0]) is None:  # it did not even begin
            record.put(todo[0], "failed", reason=reason)
        todo = [name for name in todo if record.status(name) is None]


LEAST_SECONDS = 8.0
"""No process is started where less time than this is left."""


def run_all(
    record: Record, quick: bool, only: Sequence[str], seconds: float, commit_name: str | None
) -> None:
    """Run all stages that are asked for, and print what was left out."""
    start = time.monotonic()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not quick:
        raise BackendUnavailable(
            "this needs a CUDA device, and torch sees none here. --quick runs small sizes on the CPU."
        )
    record.put_machine(describe_machine(commit_name))
    command = [sys.executable, "-m", "qtx_lab.bench.device", "--json", str(record.path)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not on_gpu:
        environment |= {"TRITON_INTERPRET": "1", "QTX_LAB_KERNELS": "triton"}
    chosen = [x for x in stages(quick, torch.device("cuda" if on_gpu else "cpu"), record) if x.name in only]
    if quick:  # nothing is lost if a small step fails, and processes take long to start
        command.append("--quick")
        chosen = [Stage("quick", tuple(step for x in chosen for step in x.steps), seconds)]
    for stage in chosen:
        print(f"--- {stage.name}, {time.monotonic() - start:.0f} s after the start", flush=True)
        left = seconds - (time.monotonic() - start)
        run_stage(stage, record, command, environment, min(stage.seconds, left))
    print(f"--- all that there was time for, after {time.monotonic() - start:.0f} s")
    for name, step in record.read()["steps"].items():
        took = f" in {step['seconds']:.0f} s" if "seconds" in step else ""
        print(f"  {name}: {step['status']}{took}{': ' + step['reason'] if 'reason' in step else ''}")


def describe_machine(commit_name: str | None) -> dict[str, Any]:
    """The machine, its GPU and driver, the versions, and the commit that is measured."""
    facts: dict[str, Any] = {**machine(), "threads": torch.get_num_threads(), **versions()}
    tracked = commit()
    facts["commit"] = commit_name or (tracked["commit"] if tracked else None)
    facts["dirty"] = tracked["dirty"] if tracked and commit_name is None else None
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": driver()}
    return facts


def driver() -> str | None:
    """The version of NVIDIA's driver; None where it is not known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return answer.stdout.strip() or None
    return None


TABLES = {
    "gpu_kernels": ("kernels", "kernels "),
    "gpu_verify": ("verify", "verify "),
    "gpu_training": ("training", "training"),
    "gpu_model": ("model", "model"),
}
"""Files that `--tables` writes: the benchmark's name, and how the names of its steps begin."""


def write_tables(record: Record, folder: Path) -> None:
    """Write the rows of the steps that are done as `qtx-lab bench` would."""
    content = record.read()
    for name, (bench, prefix) in TABLES.items():
        done = [x for key, x in content["steps"].items() if key.startswith(prefix) and x["status"] == "done"]
        rows = [row for step in done for row in step["rows"]]
        if rows:
            facts = dict(content["machine"])
            facts |= {key: x[key] for x in done for key in ("copy_bytes_per_second",) if key in x}
            result = {"bench": bench, "machine": facts, "rows": rows}
            write_atomic(folder / f"{name}.json", json_bytes(result))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "json_path", type=click.Path(path_type=Path), required=True, help="File of results.")
@click.option("--quick", is_flag=True, help="Small sizes, which run on a CPU, too.")
@click.option("--only", multiple=True, metavar="STAGE", help=f"One of: {', '.join(STAGES)}. [default: all]")
@click.option("--seconds", type=float, default=SECONDS, show_default=True, help="How long it may take.")
@click.option("--commit", "commit_name", help="The commit that is measured, where git does not tell it.")
@click.option(
    "--tables", type=click.Path(path_type=Path), help="Measure nothing; write tables to this folder."
)
@click.option("--steps", hidden=True, help="Run these steps in this process, a JSON list of names.")
def main(
    json_path: Path,
    quick: bool,
    only: tuple[str, ...],
    seconds: float,
    commit_name: str | None,
    tables: Path | None,
    steps: str | None,
) -> None:
    """Run all that needs a GPU, and keep the results in a file as they come."""
    record = Record(json_path)
    if tables is not None:
        write_tables(record, tables)
    elif steps is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        known = {step.name: step for stage in stages(quick, device, record) for step in stage.steps}
        sys.exit(0 if run_steps([known[name] for name in json.loads(steps)], record, seconds) else 1)
    else:
        for name in only:
            if name not in STAGES:
                raise unknown_name("--only", name, STAGES)
        run_all(record, quick, only or STAGES, seconds, commit_name)


if __name__ == "__main__":
    main()
