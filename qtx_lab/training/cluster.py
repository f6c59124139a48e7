"""Dask clusters, of processes or of GPUs, on this machine or elsewhere, for training and for sweeps."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checks import check_count
from ..errors import ArgumentError, BackendUnavailable, unknown_name

if TYPE_CHECKING:
    from distributed import Client

CLUSTERS = ("auto", "local", "cuda", "address")


@dataclass(frozen=True)
class Cluster:
    """An open cluster.

    Parameters
    ----------
    kind : str
        "local", "cuda" or "address".
    client : distributed.Client
        What submits: `cluster.client.submit(function, ...)`.
    chosen : str
        What was chosen, and why: one sentence.
    dashboard_link : str or None
        Dask's dashboard, where its scheduler has one.
    num_workers : int
        Workers that there were when it was opened; `workers` are those that are there now.
    timeout : float
        Seconds after which what does not answer is given up.
    """

    kind: str
    client: Client
    chosen: str
    dashboard_link: str | None
    num_workers: int
    timeout: float

    @property
    def workers(self) -> tuple[str, ...]:
        """Addresses of the workers that are there now, in their order.

        Raises
        ------
        OSError
            If the scheduler does not answer.
        """
        # Not scheduler_info: the client's own look, every two seconds, replaces what it returns by one without workers.
        if self.client.scheduler is None:
            raise ConnectionError("the client has lost its scheduler")
        return tuple(sorted(self.client.nthreads()))


@contextmanager
def open_cluster(
    kind: str = "auto",
    *,
    num_workers: int | None = None,
    threads_per_worker: int = 1,
    address: str | None = None,
    rmm_pool_bytes: int | None = None,
    devices: Sequence[int] = (),
    timeout: float = 60.0,
) -> Iterator[Cluster]:
    """A Dask cluster with its workers, closed at the end of the `with` block; one at an address is only left.

    Parameters
    ----------
    kind : str
        "local": processes on this machine (`distributed.LocalCluster`). "cuda": a worker a GPU of this machine
        (`dask_cuda.LocalCUDACluster`). "address": a running scheduler, as Dask's own tools start them on Kubernetes,
        SLURM or in a cloud. "auto": "cuda" where NVML finds GPUs that can be used, else "local"; `Cluster.chosen`
        says which and why.
    num_workers : int, optional
        One a usable core (over `threads_per_worker`) or GPU, or those that the scheduler has, where None.
    threads_per_worker : int
        Of a local worker: tasks at a time, and threads of torch in training.
    address : str, optional
        Of the scheduler, with kind "address".
    rmm_pool_bytes : int, optional
        GPU memory that each worker of "cuda" takes beforehand, bytes.
    devices : sequence of int
        GPUs that "cuda" uses, by number; all where empty.
    timeout : float
        Seconds to wait for the scheduler and for all workers.

    Raises
    ------
    ArgumentError
        If an argument is not allowed, or belongs to another kind.
    BackendUnavailable
        If "cuda" finds no GPU, or no scheduler or too few workers answer in time.

    Examples
    --------
    >>> with open_cluster("local", num_workers=1) as cluster:
    ...     cluster.client.submit(sum, [1, 2]).result(), len(cluster.workers)
    (3, 1)
    """
    _check(kind, num_workers, threads_per_worker, address, rmm_pool_bytes, devices, timeout)
    gpus, why = find_gpus(devices) if kind in ("auto", "cuda") else (0, "")
    if kind == "cuda" and (not gpus or (num_workers or 0) > gpus):
        there = f"there are {gpus}: one worker a GPU" if gpus else f"{why}; kind='local' works on any machine"
        raise BackendUnavailable(f"kind='cuda' with num_workers={num_workers} cannot be opened: {there}.")
    if kind == "auto":
        kind = "cuda" if gpus else "local"
        reason = f"auto took {kind!r}: {f'NVML finds {gpus} GPU(s)' if gpus else why}"
    else:
        reason = f"{kind!r} was asked for"
    with ExitStack() as stack:
        client = _connect(
            stack, kind, num_workers or gpus, threads_per_worker, address, rmm_pool_bytes, devices, timeout
        )
        if client.cluster is None and num_workers is not None:
            try:
                client.wait_for_workers(num_workers, timeout=timeout)
            except TimeoutError:
                found = len(client.nthreads())
                raise BackendUnavailable(
                    f"num_workers={num_workers}: the scheduler at {address} has {found} workers after {timeout:g} s."
                ) from None
        count = len(client.nthreads())
        chosen = f"{count} worker(s) of {address or 'this machine'}; {reason}."
        yield Cluster(kind, client, chosen, client.dashboard_link, count, timeout)


def find_gpus(devices: Sequence[int] = ()) -> tuple[int, str]:
    """How many GPUs a "cuda" cluster can use here, asked of NVML, and why none where it is 0.

    No CUDA context is made: dask-cuda needs to be the first.

    Raises
    ------
    ArgumentError
        If one of `devices` is not among them.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except ImportError:
        return 0, "pynvml, which asks for GPUs, is not installed (pip install qtx-lab[gpu])"
    except pynvml.NVMLError as error:
        return 0, f"NVML finds no GPU ({error})"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([x for x in visible.split(",") if x.strip()])
    if count == 0:
        return 0, f"NVML finds no GPU (CUDA_VISIBLE_DEVICES={visible!r})"
    import torch

    if torch.version.cuda is None:
        return 0, f"NVML finds {count} GPU(s), but this torch {torch.__version__} is built without CUDA"
    if importlib.util.find_spec("dask_cuda") is None:
        return 0, f"NVML finds {count} GPU(s), but dask-cuda is not installed (pip install qtx-lab[gpu])"
    missing = [x for x in devices if x >= count]
    if missing:
        raise ArgumentError(f"devices={list(devices)} is not allowed: there are {count} GPUs, from 0.")
    return len(devices) or count, ""


def _check(
    kind: str,
    num_workers: int | None,
    threads_per_worker: int,
    address: str | None,
    rmm_pool_bytes: int | None,
    devices: Sequence[int],
    timeout: float,
) -> None:
    if kind not in CLUSTERS:
        raise unknown_name("kind", kind, CLUSTERS)
    check_count("threads_per_worker", threads_per_worker)
    if num_workers is not None:
        check_count("num_workers", num_workers)
    if not timeout > 0:
        raise ArgumentError(f"timeout={timeout!r} is not allowed: it must be above 0 seconds.")
    if (kind == "address") != (address is not None):
        raise ArgumentError(
            f"address={address!r} is not allowed with kind={kind!r}: kind 'address', and no other, has one."
        )
    if kind in ("local", "address") and (rmm_pool_bytes is not None or devices):
        raise ArgumentError(f"rmm_pool_bytes and devices are not for kind={kind!r}: only 'cuda' takes them.")
    if len(set(devices)) < len(devices) or any(x < 0 for x in devices):
        raise ArgumentError(f"devices={list(devices)} is not allowed: each number from 0, once.")


def _connect(
    stack: ExitStack,
    kind: str,
    num_workers: int,
    threads_per_worker: int,
    address: str | None,
    rmm_pool_bytes: int | None,
    devices: Sequence[int],
    timeout: float,
) -> Client:
    """The client, and on the stack what closes it."""
    import logging

    import dask
    from distributed import Client, LocalCluster
    from distributed.gc import disable_gc_diagnosis

    made: dict[str, Any] = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    made["silence_logs"] = logging.CRITICAL  # of a worker that went, whoever needed it tells
    if kind == "address":
        try:
            client = Client(address, timeout=timeout)
        except (OSError, TimeoutError, ValueError) as error:
            raise BackendUnavailable(
                f"address={address!r}: no Dask scheduler answers in {timeout:g} s ({error})."
            ) from error
        stack.callback(client.close)
        return client
    stack.enter_context(_main_is_not_run_again())
    # That long after a worker went, its nanny is closed for good if the worker is not there at that moment: a second
    # fault would then cost a worker. Nannies start anew what went; none is closed before the cluster is.
    stack.enter_context(dask.config.set({"distributed.deploy.lost-worker-timeout": "365 days"}))
    if kind == "cuda":
        from dask_cuda import LocalCUDACluster

        made |= {"CUDA_VISIBLE_DEVICES": list(devices) or None, "rmm_pool_size": rmm_pool_bytes}
        made = {key: value for key, value in made.items() if value is not None}
        cluster = LocalCUDACluster(n_workers=num_workers, **made)
    else:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = num_workers or max(1, usable // threads_per_worker)
        # memory_limit 0: a rank's memory is no cache that Dask could empty, and a pause would look like a hang.
        cluster = LocalCluster(n_workers=count, threads_per_worker=threads_per_worker, memory_limit=0, **made)
    stack.callback(cluster.close, timeout=60)
    client = Client(cluster, timeout=timeout)
    stack.callback(client.close)
    client.register_worker_callbacks(_leave_ctrl_c_to_the_caller)
    # A Ctrl-C that comes while garbage is collected would be raised in Dask's callback after it, and lost.
    disable_gc_diagnosis(force=True)
    return client


def _leave_ctrl_c_to_the_caller() -> None:
    """A terminal sends Ctrl-C to the workers too; they end when they are told to.

    A handler that does nothing, and not SIG_IGN, which programs that a worker starts would inherit.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda number, frame: None)


@contextmanager
def _main_is_not_run_again() -> Iterator[None]:
    """Workers, also those that are started later in place of dead ones, do not run the caller's script again.

    Processes that Python spawns import the main script, found by its `__file__`; a script without an
    `if __name__ == "__main__"` would train in each of them. What workers get from it comes by value (cloudpickle).
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {n: main.__dict__.pop(n) for n in ("__file__", "__spec__") if n in main.__dict__}
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(hidden)
