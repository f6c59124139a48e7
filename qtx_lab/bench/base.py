"""What the benchmarks share: the machine, competitors that take turns, rows of results, printing and JSON.

The competitors of a case take turns, so that a slow minute of the machine hits all of them equally. The
median, the fastest and the slowest turn are reported. A method that fails its error check gets no ratio.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from ..errors import unknown_name
from ..experiments.provenance import machine
from ..storage import json_bytes, write_atomic

Result = TypeVar("Result")


@dataclass(frozen=True)
class BenchRow:
    """One method in one case of a benchmark."""

    case: str
    method: str
    seconds: float
    """Median over the turns."""
    baseline: str
    """The method of the same case that `ratio` compares with."""
    ratio: float | None
    """The baseline's seconds over this method's; None where the check failed."""
    error: float
    """Relative error, or what the benchmark's docstring says instead."""
    check: str
    """ "pass", or why the check failed."""
    low: float | None = None
    """Seconds of the fastest turn, where there were several."""
    high: float | None = None
    """Seconds of the slowest turn, where there were several."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further results that only this benchmark has; its docstring explains them."""

    @property
    def passed(self) -> bool:
        """Whether the check passed."""
        return self.check == "pass"

    def to_json(self) -> dict[str, Any]:
        """The row as one flat mapping, in which the details stand beside the other fields."""
        fields = asdict(self)
        details = fields.pop("details")
        if self.low is None:
            del fields["low"], fields["high"]
        return {**fields, **details}


@dataclass(frozen=True)
class Timing:
    """Seconds of a call over several turns."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        """The median, the lowest and the highest of measured seconds."""
        return cls(median(seconds), min(seconds), max(seconds))


@dataclass(frozen=True)
class Method:
    """One competitor of a case."""

    name: str
    call: Callable[[], Tensor]
    num_bytes: int
    """The least number of bytes that it has to read and write."""
    allowed_error: float
    """Relative error above which its time does not count."""
    error: float | None = None
    """Its relative error if that was measured elsewhere; None to measure the error of its first output."""


def run_bench(name: str, *, quick: bool = False, json_path: str | Path | None = None) -> dict[str, Any]:
    """Run a benchmark, print its tables, and write the result as JSON if `json_path` is given.

    Parameters
    ----------
    name : str
        One of `BENCHES`.
    quick : bool
        Measure fewer and smaller cases in fewer turns.
    json_path : path, optional
        File to write.

    Returns
    -------
    dict
        `bench` (the name), `machine` and `rows`, each of which is `BenchRow.to_json()`.

    Raises
    ------
    ArgumentError
        If there is no benchmark of that name.
    StorageError
        If the JSON file cannot be written.
    """
    if name not in BENCHES:
        raise unknown_name("name", name, BENCHES)
    if json_path is not None:
        write_atomic(Path(json_path), b"{}\n")  # a path that cannot be written is refused before the work
    copy_bandwidth = measure_copy_bandwidth()
    facts = {**machine(), "threads": torch.get_num_threads(), "copy_bytes_per_second": copy_bandwidth}
    processor = facts.get("cpu", "unknown processor")
    print(f"{processor}, {facts['threads']} threads, copies {copy_bandwidth / 1e9:.1f} GB/s")
    rows = BENCHES[name](quick, copy_bandwidth)
    result = {"bench": name, "machine": facts, "rows": [row.to_json() for row in rows]}
    if json_path is not None:
        write_atomic(Path(json_path), json_bytes(result))
    return result


def time_in_turns(calls: Mapping[str, Callable[[], object]], turns: int) -> dict[str, Timing]:
    """Seconds of each call; the calls take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(measured) for name, measured in seconds.items()}


def compare(
    case: str,
    methods: Sequence[Method],
    exact: Tensor,
    baselines: tuple[str, ...],
    turns: int,
    copy_bandwidth: float,
) -> list[BenchRow]:
    """Time the methods in turns, check their errors, and print and return one row for each.

    Parameters
    ----------
    case : str
        What is computed.
    methods : sequence of Method
        The competitors.
    exact : Tensor
        The exact result, float64, of the shape that each method returns.
    baselines : tuple of str
        Names of methods. The first one gives `ratio`; names joined by "/" mean the fastest of them. Each
        further one gives the detail `ratio to NAME`.
    turns : int
        How often each method is timed.
    copy_bandwidth : float
        Bytes a second that this machine copies.

    Returns
    -------
    list of BenchRow
        Their details are `bytes` (the least traffic), `bandwidth` (the fraction of the machine's copy
        bandwidth that this traffic makes) and `peak_bytes` (memory above that at the start of the call).
    """
    errors: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    for m in methods:  # the first call warms up, and shows the error and the memory
        output, peaks[m.name] = peak_memory(m.call)
        measured = ((output.double() - exact).norm() / exact.norm()).item()
        errors[m.name] = measured if m.error is None else m.error
    timings = time_in_turns({m.name: m.call for m in methods}, turns)
    fastest = min(baselines[0].split("/"), key=lambda name: timings[name].median)
    baselines = (fastest, *baselines[1:])
    rows = []
    for m in methods:
        timing, error, limit = timings[m.name], errors[m.name], m.allowed_error
        passed = error <= limit  # False for NaN too
        ratios = [timings[name].median / timing.median if passed else None for name in baselines]
        details = {f"ratio to {name}": ratio for name, ratio in zip(baselines[1:], ratios[1:], strict=True)}
        details["bytes"] = m.num_bytes
        details["bandwidth"] = m.num_bytes / timing.median / copy_bandwidth
        details["peak_bytes"] = peaks[m.name]
        rows.append(
            BenchRow(
                case,
                m.name,
                timing.median,
                fastest,
                ratios[0],
                error,
                "pass" if passed else f"error {error:.2g} is above {limit:.2g}",
                timing.low,
                timing.high,
                details,
            )
        )
    print_rows(case, rows, baselines)
    return rows


def print_rows(case: str, rows: Sequence[BenchRow], baselines: tuple[str, ...]) -> None:
    """Print the table of a case that `compare` measured."""
    print(f"\n{case}")
    print(
        f"  {'method':<18}{'ms':>9}{'(low–high)':>18}"
        + "".join(f"{'× ' + name:>18}" for name in baselines)
        + f"{'error':>10}{'MB moved':>10}{'of copy':>9}{'peak MB':>9}  check"
    )
    for row in rows:
        details = row.details
        ratios = [row.ratio, *(details[f"ratio to {name}"] for name in baselines[1:])]
        peak = details["peak_bytes"]
        print(
            f"  {row.method:<18}{1e3 * row.seconds:>9.1f}{span(row, 1e3):>18}"
            + "".join(f"{shown(ratio):>18}" for ratio in ratios)
            + f"{row.error:>10.2g}{details['bytes'] / 1e6:>10.1f}{details['bandwidth']:>9.1%}"
            f"{shown(None if peak is None else peak / 1e6, '.0f'):>9}  {row.check}"
        )
    print(
        "  ms: median (lowest–highest); × name: the time of that method over this one's, none where the\n"
        "  check failed; error: of the output, relative; MB moved: inputs and outputs once; of copy: MB\n"
        "  moved a second, as a fraction of what this machine copies a second."
    )


def shown(number: float | None, form: str = ".2f") -> str:
    """A number in a format, or a dash where there is none.

    >>> shown(0.125), shown(None), shown(0.125, ".0%")
    ('0.12', '–', '12%')
    """
    return "–" if number is None else format(number, form)


def span(row: BenchRow, unit: float, form: str = ".1f") -> str:
    """The fastest and the slowest turn, in units of 1 / `unit` seconds."""
    if row.low is None or row.high is None or row.low == row.high:
        return "(once)"
    return f"({unit * row.low:{form}}–{unit * row.high:{form}})"


def measure_copy_bandwidth() -> float:
    """Bytes a second that a copy of 128 MiB reads and writes on this machine, the best of five."""
    source = torch.rand(1 << 25)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def peak_memory(call: Callable[[], Result]) -> tuple[Result, int | None]:
    """Call a function, and measure the most bytes by which the process's memory rose meanwhile.

    Returns the function's result and the bytes, of resident memory.

    The number of bytes is None where the machine does not run Linux.
    """
    if sys.platform != "linux":
        return call(), None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide the rise
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    result = call()
    return result, max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _loaded_on_use(name: str) -> Callable[[bool, float], list[BenchRow]]:
    """`bench_NAME` of the module NAME, which is imported by the call: some need qiskit, Dask or a GPU."""

    def bench(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
        module = import_module(f".{name}", __package__)
        return list(getattr(module, f"bench_{name}")(quick, copy_bandwidth))

    return bench


NAMES = (
    "samplers",
    "estimators",
    "coverage",
    "tolerance",
    "guarantee",
    "decode",
    "model",
    "llm",
    "tasks",
    "circuits",
    "softmax_circuit",
    "orthogonal",
    "amplitude",
    "mitigation",
    "mitigated_rows",
    "sweep",
    "training",
    "kernels",
    "llm_rows",
    "lossless",
)
BENCHES = {name: _loaded_on_use(name) for name in NAMES}
"""Benchmarks by name: functions of `quick` and of the copy bandwidth (bytes a second) that return rows."""
