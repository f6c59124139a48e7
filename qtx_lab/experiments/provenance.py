"""What a run records about its origin: versions, machine, commit and process."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from contextlib import suppress
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
"""Distributions whose version can change a number or a picture."""


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the installed distributions in `RECORDED`."""
    return dict(_versions())


@cache  # the versions that a process has loaded do not change
def _versions() -> dict[str, str]:
    installed = {"python": platform.python_version(), "qtx_lab": __version__}
    for name in RECORDED:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def machine() -> dict[str, Any]:
    """The platform, the processor, the number of cores that this process may use, and the memory in GiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def _cpu_model() -> str:
    """The processor's name, as Linux knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> dict[str, Any] | None:
    """The commit of the checkout that tracks this package, and whether its source differs; else None."""
    package = Path(__file__).parent.parent
    # A site-packages folder may lie inside a foreign checkout: it counts only if it tracks this file.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    status = _git(package, "status", "--porcelain=v2", "--branch", "--", ".")
    lines = (status or "").splitlines()
    heads = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")]
    if not heads or heads[0] == "(initial)":
        return None
    return {"commit": heads[0], "dirty": any(not line.startswith("#") for line in lines)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, without white space at the ends; None if it fails or is not installed."""
    try:
        process = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()


def this_process() -> dict[str, Any]:
    """Host, process id and start time, which tell later whether this very process is still running."""
    started = psutil.Process().create_time()
    return {"hostname": socket.gethostname(), "pid": os.getpid(), "process_started": started}


def is_gone(process: dict[str, Any]) -> bool:
    """Whether a process is known to have ended; False where this host cannot know."""
    if process.get("hostname") != socket.gethostname():
        return False
    try:
        started = psutil.Process(process["pid"]).create_time()
        return (
            abs(started - process["process_started"]) > 2
        )  # seconds; another process has the same id by now
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        return False
