"""Where a method's time on a GPU goes: each kernel's by torch's profiler, and Nsight Compute's counters."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..errors import BackendUnavailable
from .kernels import Case, exact_output, kernel_methods, make_inputs

NAME_LENGTH = 80
"""Longer names of kernels, as C++ templates have them, are cut off."""

NSIGHT_FOLDERS = ("/opt/nvidia/nsight-compute", "/usr/local/cuda/bin")
"""Where `ncu` is where the PATH does not name it."""

SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
"""What Nsight Compute is asked for."""


def kernel_times(calls: Sequence[Callable[[], object]], rounds: int) -> list[dict[str, Any]]:
    """What a call launches, from the longest kernel to the shortest; empty where nothing runs on a GPU.

    Each has its `name`, the `launches` of a call, the median `microseconds` of a launch, and `share`, its
    part of the time of all.

    Parameters
    ----------
    calls : sequence of callables
        They take turns, so that none finds its data in the device's cache.
    rounds : int
        How often each is called.
    """
    if not torch.cuda.is_available():
        return []
    for call in calls:
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            for call in calls:
                call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            times[event.name[:NAME_LENGTH]].append(event.time_range.elapsed_us())
    total = sum(map(sum, times.values()))
    number = rounds * len(calls)
    kernels = [
        {
            "name": name,
            "launches": len(measured) / number,
            "microseconds": median(measured),
            "share": sum(measured) / total,
        }
        for name, measured in times.items()
    ]
    return sorted(kernels, key=lambda kernel: -kernel["share"])


def counters(case: Case, method: str, kernel: str, seconds: float) -> dict[str, str]:
    """What Nsight Compute reads of one launch of a kernel: values with their units by section and metric.

    The method runs in a process of its own, `profiled_call`.

    Parameters
    ----------
    case : Case
    method : str
        As the rows of `qtx-lab bench kernels` call it.
    kernel : str
        Name of the kernel.
    seconds : float
        How long it may take.

    Raises
    ------
    BackendUnavailable
        If there is no `ncu`, or if it reads nothing.
    """
    program = nsight()
    if program is None:
        raise BackendUnavailable("ncu, which reads the counters, is not installed.")
    code = (
        "from qtx_lab.bench.device_profile import Case, profiled_call; "
        f"profiled_call(Case({case.batch}, {case.keys}, {case.draws}, {case.kv_heads}), {method!r})"
    )
    command = [
        program,
        "--csv",
        "--page",
        "details",
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
    ]
    command += ["--kernel-name", kernel, "--launch-count", "1", "--target-processes", "all"]
    for section in SECTIONS:
        command += ["--section", section]
    process = subprocess.run(
        [*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, check=False
    )
    values = dict(metrics(process.stdout))
    if not values:
        printed = " ".join((process.stdout + process.stderr).split())
        raise BackendUnavailable(f"ncu read nothing of {kernel}: {printed[-500:]}")
    return values


def nsight() -> str | None:
    """The path of `ncu`, None where there is none."""
    if path := shutil.which("ncu"):
        return path
    return next((str(path) for folder in NSIGHT_FOLDERS for path in sorted(Path(folder).rglob("ncu"))), None)


def metrics(output: str) -> Iterator[tuple[str, str]]:
    """Section and name of each metric with its value and unit, from what `ncu --csv` prints.

    >>> text = 'hello\\n"ID","Section Name","Metric Name","Metric Unit","Metric Value"\\n'
    >>> dict(metrics(text + '"0","Occupancy","Registers","register/thread","64"\\n'))
    {'Occupancy: Registers': '64 register/thread'}
    """
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name"):
            value = f"{row['Metric Value']} {row['Metric Unit']}".strip()
            yield f"{row['Section Name']}: {row['Metric Name']}", value


def profiled_call(case: Case, method: str) -> None:
    """Call a method once between the marks that a profiler waits for, after a call that compiles it."""
    device = torch.device("cuda")
    inputs = [make_inputs(case, device, 0)]
    profiled = next(m for m in kernel_methods(case, inputs, exact_output(inputs[0])) if m.name == method)
    profiled.calls[0]()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    profiled.calls[0]()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
