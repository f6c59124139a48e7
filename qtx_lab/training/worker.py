"""What a Dask worker does for a training: it is one of the ranks, and answers questions about it."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ..errors import ArgumentError, RunFailed
from .rank import RankEnd, forget_progress, progress_of, train_rank

LEAVE_DELAY_S = 5.0
"""How long after the last exchange the destructor of a process group runs: see `leave_group`."""

LOST_RANK_WORDS = (
    "gloo",
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "NCCL",
    "timed out",
    "Timed out",
)
"""How torch's RuntimeErrors say that another rank does not answer; they have no type of their own."""

LEAVING_STATUSES = ("closing", "closing_gracefully", "closed", "failed")
"""Dask's words for a worker that is on its way out."""

_STOPPING: set[str] = set()
"""Names of the attempts that are to stop."""
_STORES: dict[str, dist.TCPStore] = {}
"""Where the ranks of an attempt meet, in the process of rank 0."""


def worker_facts() -> dict[str, Any]:
    """What must be the same on all workers, and whether a rank can use a GPU."""
    from .. import __version__

    return {"torch": torch.__version__, "qtx_lab": __version__, "cuda": torch.cuda.is_available()}


def open_store(attempt: str, host: str, timeout: float) -> int:
    """Open the store in which the ranks of an attempt meet, in the worker of rank 0; its port."""
    _STORES.clear()
    _STORES[attempt] = dist.TCPStore(
        host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )
    return _STORES[attempt].port


def ask_to_stop(attempt: str) -> None:
    """Let the attempt's rank in this worker stop after the step that it is at."""
    _STOPPING.add(attempt)


def run_in_worker(
    folder: Path, attempt: str, rank: int, world: int, host: str, port: int, timeout: float
) -> RankEnd:
    """Be rank `rank` of `world` in a Dask worker; an error is part of what is returned, and never raised."""
    from distributed import get_worker
    from distributed.protocol.pickle import loads

    worker = get_worker()
    threads = torch.get_num_threads()
    try:
        try:
            job = loads((folder / "job.pickle").read_bytes())
        except FileNotFoundError:
            raise ArgumentError(
                f"folder={str(folder)!r} is not there for rank {rank} at {worker.address}: workers on other "
                "machines need a folder that all of them share."
            ) from None
        torch.set_num_threads(worker.state.nthreads)
        device = _device()
        interface = _interface(worker.address)
        if interface is not None:
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, interface)
        if dist.is_initialized():
            raise RunFailed(f"The worker {worker.address} is already training something else.")
        if world > 1:
            patience = timedelta(seconds=timeout)
            store = dist.TCPStore(host, port, is_master=False, timeout=patience)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore(attempt, store),
                rank=rank,
                world_size=world,
                timeout=patience,
            )

        def must_stop() -> bool:
            # A worker that is told to leave, or has lost its scheduler, waits a few seconds for its rank.
            return attempt in _STOPPING or worker.status.name in LEAVING_STATUSES

        end = train_rank(job, attempt, rank, world, device, partial(worker.log_event, attempt), must_stop)
        leave_group()
        return end
    except Exception as error:
        # The process group stays: taking one down whose ranks wait for each other can take the process along.
        # Whoever reads this restarts the worker.
        return RankEnd(_how_it_ended(error), progress_of(attempt).step, _portable(error))
    finally:
        torch.set_num_threads(threads)
        forget_progress(attempt)


def leave_group() -> None:
    """Leave the default process group after a training that ended well.

    Its last reference is dropped a while later. The group's destructor joins gloo's threads with Python's
    lock held, and a thread that just then lets go of the last exchange's tensor waits for this lock: that
    would be a deadlock.
    """
    if dist.is_initialized():
        last_reference = [dist.group.WORLD]
        dist.destroy_process_group()
        timer = threading.Timer(LEAVE_DELAY_S, last_reference.clear)
        timer.daemon = True
        timer.start()


def _device() -> torch.device:
    """The worker's own GPU, which dask-cuda makes its first one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


def _how_it_ended(error: BaseException | None) -> str:
    """ "lost" if the error, or one that caused it, means that other ranks did not answer; else "failed"."""
    while error is not None:
        if isinstance(error, dist.DistError | ConnectionError):
            return "lost"
        of_torch = isinstance(error, RuntimeError) and not isinstance(error, RunFailed)
        if of_torch and any(words in str(error) for words in LOST_RANK_WORDS):
            return "lost"
        error = error.__cause__
    return "failed"


def _portable(error: Exception) -> Exception:
    """The error itself if it can be sent to another process, else one with its words."""
    from distributed.protocol.pickle import dumps, loads

    try:
        return loads(dumps(error))
    except Exception:
        return RunFailed(f"{type(error).__name__}: {error}")


def _interface(address: str) -> str | None:
    """The network interface with a worker's address; gloo's own choice may not reach the other workers."""
    ip = address.split("://")[-1].rpartition(":")[0].strip("[]")
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == ip for a in addresses):
            return name
    return None
