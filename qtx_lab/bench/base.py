"""`qtx-lab bench`: what things cost, side by side with what a user would pick instead, in one process.

Methods of a case take turns, so that a slow minute of the machine hits all of them alike; medians and the
fastest and slowest turn are kept. A method that fails its error check gets no ratio.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import sampled_attention
from ..errors import unknown_name
from ..experiments.provenance import machine
from ..samplers import SAMPLERS
from ..storage import json_bytes, write_atomic

Result = TypeVar("Result")


@dataclass(frozen=True)
class Method:
    """One competitor of a case."""

    name: str
    call: Callable[[], Tensor]
    num_bytes: int
    """What it has to read and write at the least, bytes."""
    allowed_error: float
    """Relative output error above which its time does not count."""
    error: float | None = None
    """Its relative error, where that was measured elsewhere; of its first output's where None."""


def run_bench(name: str, *, quick: bool = False, json_path: str | Path | None = None) -> dict[str, Any]:
    """Run a benchmark, print its table, and write it as JSON where `json_path` says.

    Parameters
    ----------
    name : str
        One of `BENCHES`.
    quick : bool
        Fewer cases and turns.
    json_path : path, optional

    Returns
    -------
    dict
        `bench`, `machine`, `rows`. A row has `case`, `method`, `seconds` (median), `low` and `high` (s),
        `baseline` (a method of the case), `ratio` (baseline's seconds over the method's, None where the check
        fails), `error` (relative), `check` ("pass" or why not), `bytes` (least traffic), `bandwidth` (fraction
        of the machine's copy bandwidth that this traffic makes) and `peak_bytes` (memory above the start).

    Raises
    ------
    ArgumentError
        If there is no such benchmark.
    StorageError
        If the JSON cannot be written.
    """
    if name not in BENCHES:
        raise unknown_name("name", name, BENCHES)
    if json_path is not None:
        write_atomic(Path(json_path), b"{}\n")  # refused now rather than after the work
    copy = copy_bandwidth()
    facts = {**machine(), "threads": torch.get_num_threads(), "copy_bytes_per_second": copy}
    print(
        f"{facts.get('cpu', 'unknown processor')}, {facts['threads']} threads, copies {copy / 1e9:.1f} GB/s"
    )
    rows = BENCHES[name](quick, copy)
    result = {"bench": name, "machine": facts, "rows": rows}
    if json_path is not None:
        write_atomic(Path(json_path), json_bytes(result))
    return result


def bench_samplers(quick: bool, copy: float) -> list[dict[str, Any]]:
    """Every sampler against exact SDPA and against a row-by-row loop, on rows of moderate peakedness."""
    cases = [(1024, 64)] if quick else [(256, 64), (1024, 16), (1024, 64), (1024, 256), (4096, 64)]
    rows = []
    for n, draws in cases:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 8, n, 64, generator=generator) for _ in range(3))
        q *= 1.5  # an effective number of keys of about n / 9
        p = (q.double() @ k.double().mT / 8).softmax(-1)
        exact = p @ v.double()
        # What independent draws miss by on average (the variance of the estimate, summed over all outputs).
        spread = (p @ v.double().square()).sum() - exact.square().sum()
        independent = math.sqrt(spread / draws / exact.square().sum())
        streamed = sum(x.numel() * x.element_size() for x in (q, k, v, q))
        touched = streamed - v.numel() * 4 + 8 * n * draws * 64 * 4
        methods = [
            Method("sdpa", partial(F.scaled_dot_product_attention, q, k, v), streamed, 1e-5),
            Method(
                "row-by-row loop",
                partial(row_by_row, q, k, v, draws, generator),
                touched,
                1.1 * independent,
            ),
            *(
                Method(
                    name, partial(sampled_output, q, k, v, name, draws, generator), touched, 1.1 * independent
                )
                for name in SAMPLERS
                if name != "exact"
            ),
        ]
        case = f"B=1 H=8 L=n={n} d=64 S={draws}"
        turns = 5 if quick else 9
        rows += compare(case, methods, exact, ("sdpa", "row-by-row loop"), turns, copy)
    return rows


def sampled_output(
    q: Tensor, k: Tensor, v: Tensor, sampler: str, draws: int, generator: torch.Generator
) -> Tensor:
    """The output of `sampled_attention` alone."""
    return sampled_attention(q, k, v, sampler=sampler, num_samples=draws, generator=generator).output


def row_by_row(q: Tensor, k: Tensor, v: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Sampled attention as existing quantum-attention code writes it: a loop over rows (B, H, L)."""
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                p = torch.softmax(k[b, h] @ q[b, h, i] / math.sqrt(q.shape[-1]), dim=0)
                keys = torch.multinomial(p, draws, replacement=True, generator=generator)
                out[b, h, i] = v[b, h, keys].mean(0)
    return out


def compare(
    case: str,
    methods: Sequence[Method],
    exact: Tensor,
    baselines: tuple[str, ...],
    turns: int,
    copy: float,
) -> list[dict[str, Any]]:
    """Time the methods in turns, check each against `exact` (float64), print and return one row a method.

    The first baseline gives `ratio`, each further one `ratio to NAME`. Several joined by "/" in the first mean the fastest of
    them.
    """
    seconds: dict[str, list[float]] = {m.name: [] for m in methods}
    errors: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    for m in methods:  # first call: warm up, check, measure memory
        output, peaks[m.name] = peak_memory(m.call)
        found = ((output.double() - exact).norm() / exact.norm()).item()
        errors[m.name] = found if m.error is None else m.error
    for _ in range(turns):
        for m in methods:
            start = time.perf_counter()
            m.call()
            seconds[m.name].append(time.perf_counter() - start)
    middle = {name: median(times) for name, times in seconds.items()}
    baselines = (min(baselines[0].split("/"), key=middle.__getitem__), *baselines[1:])
    rows = []
    for m in methods:
        error, limit = errors[m.name], m.allowed_error
        passed = error <= limit  # False for NaN too
        row = {
            "case": case,
            "method": m.name,
            "seconds": middle[m.name],
            "low": min(seconds[m.name]),
            "high": max(seconds[m.name]),
            "baseline": baselines[0],
            "ratio": middle[baselines[0]] / middle[m.name] if passed else None,
            **{
                f"ratio to {name}": middle[name] / middle[m.name] if passed else None
                for name in baselines[1:]
            },
            "error": error,
            "check": "pass" if passed else f"error {error:.2g} is above {limit:.2g}",
            "bytes": m.num_bytes,
            "bandwidth": m.num_bytes / middle[m.name] / copy,
            "peak_bytes": peaks[m.name],
        }
        rows.append(row)
    print_rows(case, rows, baselines)
    return rows


def print_rows(case: str, rows: Sequence[dict[str, Any]], baselines: tuple[str, ...]) -> None:
    """The table of a case."""
    keys = ["ratio", *(f"ratio to {name}" for name in baselines[1:])]
    print(f"\n{case}")
    print(
        f"  {'method':<18}{'ms':>9}{'(low–high)':>18}"
        + "".join(f"{'× ' + name:>18}" for name in baselines)
        + f"{'error':>10}{'MB moved':>10}{'of copy':>9}{'peak MB':>9}  check"
    )
    for row in rows:
        low_high = (
            f"({1e3 * row['low']:.1f}–{1e3 * row['high']:.1f})" if row["low"] < row["high"] else "(once)"
        )
        ratios = "".join(f"{'–' if row[key] is None else f'{row[key]:.2f}':>18}" for key in keys)
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        print(
            f"  {row['method']:<18}{1e3 * row['seconds']:>9.1f}{low_high:>18}{ratios}{row['error']:>10.2g}"
            f"{row['bytes'] / 1e6:>10.1f}{row['bandwidth']:>9.1%}{peak:>9}  {row['check']}"
        )
    print(
        "  ms: median (lowest–highest); × name: name's time over the method's, nothing where the check failed; error: of the\n"
        "  output, relative; MB moved: inputs and outputs once; of copy: that a second, over what this machine copies."
    )


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes on this machine, best of five."""
    source = torch.rand(1 << 25)  # 128 MiB
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best


def peak_memory(call: Callable[[], Result]) -> tuple[Result, int | None]:
    """What a call returns, and the bytes by which the process's resident memory rose during it at the most.

    None in place of the bytes where the machine does not run Linux.
    """
    if sys.platform != "linux":
        return call(), None
    ctypes.CDLL(None).malloc_trim(0)  # memory that is kept for reuse would hide the rise
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    before = _status("VmRSS")
    result = call()
    return result, max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _loaded_when_asked(name: str) -> Callable[[bool, float], list[dict[str, Any]]]:
    """`bench_<name>` of the module of that name: some need qiskit, Dask or a GPU, and all time by this one."""

    def bench(quick: bool, copy: float) -> list[dict[str, Any]]:
        return getattr(import_module(f".{name}", __package__), f"bench_{name}")(quick, copy)

    return bench


MODULES = ("estimators", "decode", "model", "circuits", "mitigation", "sweep", "training", "kernels")
BENCHES = {"samplers": bench_samplers} | {name: _loaded_when_asked(name) for name in MODULES}
"""Benchmark by name."""
