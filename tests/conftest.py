"""What all tests share: a fixed seed, a home of their own for runs, and no network."""

from __future__ import annotations

import atexit
import gc
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One thread, as in `make test`, unless time is long: where cores are busy, threads of small operations wait
# for each other. It is said before torch is imported.
if os.environ.get("QTX_LAB_SOAK", "0") in ("", "0"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
import pytest
import torch
from hypothesis import HealthCheck, settings

SEED = int(os.environ.get("QTX_LAB_SEED", "20261123"))
SOAK = os.environ.get("QTX_LAB_SOAK", "0") not in ("", "0")
THREADS = torch.get_num_threads()

LONG_MARKS = ("notebooks", "ui", "chaos", "slow")
"""Marks of tests that start kernels, browsers or processes."""

# No test asserts on seconds, which `too_slow` would on a busy machine.
settings.register_profile(
    "house", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("soak", parent=settings.get_profile("house"), max_examples=2000)

# Hooks instead of fixtures, so that they also apply to the examples in qtx_lab's docstrings.

_connect = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex")}


def _is_local(address: object) -> bool:
    """Whether a socket address stays on this machine: a Unix path, or a loopback host."""
    if not isinstance(address, tuple):
        return True
    host = str(address[0])
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _guarded(name: str) -> Any:
    def connect(self: socket.socket, address: Any) -> Any:
        # Connecting a datagram socket sends nothing: Dask does it to learn the machine's own address.
        if self.type != socket.SOCK_DGRAM and not _is_local(address):
            raise RuntimeError(f"A test reached for the network, {address!r}: only loopback is allowed.")
        return _connect[name](self, address)

    return connect


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background job ignores Ctrl-C, and so would every process that a test starts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not by MPLBACKEND, which notebook kernels would inherit and then show no figures.
    matplotlib.use("agg")
    settings.load_profile("soak" if SOAK else "house")
    os.environ["QTX_LAB_HOME"] = tempfile.mkdtemp(prefix="qtx-lab-tests-")
    for name in _connect:
        setattr(socket.socket, name, _guarded(name))


def pytest_unconfigure(config: pytest.Config) -> None:
    for name, original in _connect.items():
        setattr(socket.socket, name, original)
    shutil.rmtree(os.environ.pop("QTX_LAB_HOME", ""), ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Whatever test ran before: for code without a generator; and OpenMP, of which numba and torch share the
    # number of threads. More threads than cores wait for each other ten times as long as they work.
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)


def pytest_report_header(config: pytest.Config) -> str:
    machine = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    return f"QTX_LAB_SEED={SEED} QTX_LAB_SOAK={int(SOAK)} {machine}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with long tests first, so that no process is left alone with one at the end.
    long = {item.path for item in items if any(map(item.get_closest_marker, LONG_MARKS))}
    items.sort(key=lambda item: item.path not in long)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    # Some libraries collect garbage by themselves, and so does pytest at its end. These million objects stay,
    # and to look at them takes a second each time.
    gc.freeze()
    atexit.register(gc.unfreeze)


@pytest.fixture
def seed() -> int:
    """The session's random seed: QTX_LAB_SEED, printed in the header."""
    return SEED


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A new CPU generator with the session's seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def soak() -> bool:
    """Whether the long schedule runs (`make soak`)."""
    return SOAK


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that is a file system of its own with 80 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)
