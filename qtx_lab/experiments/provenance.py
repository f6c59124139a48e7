"""What a run records about its origin: versions, machine, commit, inputs and process."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
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

MAX_FILES = 10_000
"""Files of a folder by which it is known as an input of a run."""


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


@cache
def distributions() -> Mapping[str, str]:
    """Versions of all distributions that this Python has installed, by name."""
    installed = {"python": platform.python_version()}
    for distribution in metadata.distributions():  # the first one of a name is the one that is imported
        if distribution.name:
            installed.setdefault(distribution.name.lower().replace("_", "-"), distribution.version)
    return MappingProxyType(dict(sorted(installed.items())))


def requirements() -> bytes:
    """All installed distributions as the lines of a file that `pip install -r` reads."""
    lines = [f"{name}=={version}" for name, version in distributions().items() if name != "python"]
    return "\n".join([f"# python=={platform.python_version()}", *lines, ""]).encode()


@cache
def source_hash() -> str:
    """SHA-256 of all Python files of this package, by their names and contents."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def uncommitted() -> bytes | None:
    """The patch from the commit to this package's files, new ones among them; None without a checkout."""
    package = Path(__file__).parent.parent
    with _scratch_index(package) as environment:
        if _git(package, "read-tree", "HEAD", environment=environment) is None:
            return None
        if _git(package, "add", "--all", "--", ".", environment=environment) is None:
            return None
        patch = _git(package, "diff", "--cached", "--binary", "HEAD", "--", ".", environment=environment)
    return None if patch is None else f"{patch}\n".encode(errors="surrogateescape")


def code_difference(first: tuple[str, bytes], second: tuple[str, bytes]) -> str | None:
    """What differs between two states of this package, each a commit and a patch, as a unified diff.

    None where this checkout does not have both commits.
    """
    package = Path(__file__).parent.parent
    trees = []
    with _scratch_index(package) as environment:
        root = _git(package, "rev-parse", "--show-toplevel")
        for commit_id, patch in (first, second):
            read = _git(package, "read-tree", commit_id, environment=environment)
            if root is None or read is None:
                return None
            if patch.strip():
                applied = _git(
                    Path(root), "apply", "--cached", "--binary", "-", environment=environment, given=patch
                )
                if applied is None:
                    return None
            trees.append(_git(package, "write-tree", environment=environment) or "")
        return _git(package, "diff", "--unified=0", *trees, "--", ".", environment=environment)


@contextmanager
def _scratch_index(package: Path) -> Iterator[dict[str, str]]:
    """An environment in which git writes its index and objects to a folder that is then removed."""
    objects = _git(package, "rev-parse", "--path-format=absolute", "--git-path", "objects")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "objects").mkdir()
        yield {
            **os.environ,
            "GIT_INDEX_FILE": f"{folder}/index",
            "GIT_OBJECT_DIRECTORY": f"{folder}/objects",
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": objects or "",
        }


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


def _git(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, given: bytes | None = None
) -> str | None:
    """What git prints, without white space at the ends; None if it fails or is not installed."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        process = subprocess.run(
            command, capture_output=True, timeout=10, check=True, env=environment, input=given
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.decode(errors="surrogateescape").strip()


def input_hashes(parameters: Any) -> dict[str, str]:
    """SHA-256 of each file or folder that a parameter names, by the parameter's text.

    A folder is known by the names, sizes and times of change of its files, which are quick to read.
    """
    if isinstance(parameters, dict | list):
        inner = parameters.values() if isinstance(parameters, dict) else parameters
        return {name: digest for value in inner for name, digest in input_hashes(value).items()}
    if isinstance(parameters, str) and os.path.isfile(os.path.expanduser(parameters)):
        with suppress(OSError), open(os.path.expanduser(parameters), "rb") as file:
            return {parameters: hashlib.file_digest(file, "sha256").hexdigest()}
    if isinstance(parameters, str) and os.path.isdir(os.path.expanduser(parameters)):
        return {parameters: _folder_digest(Path(parameters).expanduser())}
    return {}


def _folder_digest(folder: Path) -> str:
    """SHA-256 of the names, sizes and times of change of the first `MAX_FILES` files in a folder."""
    digest, left = hashlib.sha256(), MAX_FILES
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names)[:left]:
            path = os.path.join(place, name)
            with suppress(OSError):
                facts = os.stat(path)
                text = f"{os.path.relpath(path, folder)}\0{facts.st_size}\0{facts.st_mtime_ns}\0"
                digest.update(text.encode(errors="surrogateescape"))
        left -= min(left, len(names))
        if not left:
            break
    return digest.hexdigest()


def this_process() -> dict[str, Any]:
    """Host, process id and start, which tell later whether this very process is still running.

    On Linux the start is the boot's id and the ticks since that boot, which no change of the clock moves.
    """
    facts: dict[str, Any] = {"hostname": socket.gethostname(), "pid": os.getpid()}
    boot, ticks = _boot_id(), _start_ticks(os.getpid())
    if boot is None or ticks is None:
        return {**facts, "process_started": psutil.Process().create_time()}
    return {**facts, "boot_id": boot, "start_ticks": ticks}


def is_gone(process: Mapping[str, Any]) -> bool:
    """Whether a process is known to have ended; False where this host cannot know."""
    if process.get("hostname") != socket.gethostname():
        return False
    try:
        pid = int(process["pid"])
        if "start_ticks" in process:
            boot = _boot_id()
            return boot is not None and (
                boot != process.get("boot_id") or _start_ticks(pid) != process["start_ticks"]
            )
        started = psutil.Process(pid).create_time()
        return (
            abs(started - process["process_started"]) > 2
        )  # seconds; another process has the same id by now
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        return False


def is_this_process_or_its_parent(process: Mapping[str, Any]) -> bool:
    """Whether a process is this one, or one that started it, directly or through others."""
    if process.get("hostname") != socket.gethostname() or is_gone(process):
        return False
    try:
        family = psutil.Process().parents()
    except psutil.Error:
        family = []
    return process.get("pid") in (os.getpid(), *(parent.pid for parent in family))


def clock() -> dict[str, Any]:
    """A clock that nobody sets, to measure from: seconds since some moment of this boot of the machine."""
    return {"boot_id": _boot_id(), "seconds": time.monotonic()}


def seconds_since(start: Any) -> float | None:
    """Seconds since a time of `clock`; None if that was on another boot of a machine."""
    if not isinstance(start, dict) or start.get("boot_id") is None or start["boot_id"] != _boot_id():
        return None
    passed = time.monotonic() - start["seconds"] if isinstance(start.get("seconds"), int | float) else -1.0
    return passed if passed >= 0 else None


@cache
def _boot_id() -> str | None:
    """What tells one boot of this machine from another, on Linux."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _start_ticks(pid: int) -> int | None:
    """When a process began, in ticks since the boot; None if there is none, or only what is left of one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # state; starttime, the 22nd field
