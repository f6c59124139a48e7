"""What a run records about where it came from: versions, machine, commit, process."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from .. import __version__

RECORDED = (
    "torch",
    "triton",
    "numpy",
    "scipy",
    "pandas",
    "matplotlib",
    "duckdb",
    "pydantic",
    "papermill",
    "qiskit",
    "qiskit-aer",
    "qiskit-ibm-runtime",
    "transformers",
)
"""Distributions whose versions can change a number or a picture."""


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the installed distributions in `RECORDED`."""
    return dict(_versions())


@cache  # what a process has loaded stays loaded
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "qtx_lab": __version__}
    for name in RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Platform, processor, usable cores and memory."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": usable,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> dict[str, Any] | None:
    """Commit of the checkout that this package is tracked in, and whether its source differs, if any."""
    package = Path(__file__).parent.parent
    # A site-packages folder may lie inside someone else's checkout: only a tracked source counts.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    said = _git(package, "status", "--porcelain=v2", "--branch", "--", ".")
    lines = (said or "").splitlines()
    heads = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")]
    if not heads or heads[0] == "(initial)":
        return None
    return {"commit": heads[0], "dirty": any(not line.startswith("#") for line in lines)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def this_process() -> dict[str, Any]:
    """Host, process id and start time: enough to tell later whether this very process still lives."""
    started = psutil.Process().create_time()
    return {"hostname": socket.gethostname(), "pid": os.getpid(), "process_started": started}


def is_gone(process: dict[str, Any]) -> bool:
    """Whether the process is known to be over; False where this host cannot tell."""
    if process.get("hostname") != socket.gethostname():
        return False
    try:
        started = psutil.Process(process["pid"]).create_time()
        return abs(started - process["process_started"]) > 2  # seconds: the pid was given to another process
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        return False
