"""Dask clusters, of processes or of GPUs, on this machine or elsewhere, for training and for sweeps."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, BackendUnavailable
from ..specs import ClusterSpec

if TYPE_CHECKING:
    from distributed import Client, LocalCluster


@dataclass(frozen=True)
class Cluster:
    """An open cluster.

    Parameters
    ----------
    kind : str
        "local", "cuda" or "address".
    client : distributed.Client
        Submits work: `cluster.client.submit(function, ...)`.
    chosen : str
        One sentence that says what was chosen, and why.
    dashboard_link : str or None
        Address of Dask's dashboard, where the scheduler has one.
    num_workers : int
        Number of workers when the cluster was opened; `workers` are those that are there now.
    timeout : float
        How long to wait for an answer of the scheduler or of a worker, seconds.

    Examples
    --------
    A scheduler that runs already, here with a worker in this process:

    >>> from distributed import LocalCluster
    >>> with LocalCluster(n_workers=1, processes=False, dashboard_address=None) as running:
    ...     with open_cluster("address", address=running.scheduler_address) as cluster:
    ...         cluster.kind, cluster.num_workers, cluster.client.submit(pow, 3, 2).result()
    ('address', 1, 9)
    """

    kind: str
    client: Client
    chosen: str
    dashboard_link: str | None
    num_workers: int
    timeout: float

    @property
    def workers(self) -> tuple[str, ...]:
        """Addresses of the workers that are there now, sorted.

        Raises
        ------
        OSError
            If the scheduler does not answer.
        """
        # Not client.scheduler_info(): every two seconds the client replaces what that returns by a copy
        # without workers.
        self._scheduler()
        return tuple(sorted(self.client.nthreads()))

    @property
    def ready_workers(self) -> tuple[str, ...]:
        """Addresses of the workers that take new tasks, sorted: those that are leaving are not among them.

        Raises
        ------
        OSError
            If the scheduler does not answer.
        """
        return tuple(sorted(self.client.sync(self._scheduler().ncores_running)))

    def _scheduler(self) -> Any:
        """The client's connection to the scheduler; ConnectionError where it is lost."""
        if self.client.scheduler is None:
            raise ConnectionError("the client has lost its scheduler")
        return self.client.scheduler


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
    """Open a Dask cluster with its workers, and close it at the end of the `with` block.

    A cluster at an address goes on without us. The arguments are the fields of `ClusterSpec`, with its
    bounds: `open_cluster(**spec.arguments())` opens the cluster that a spec describes.

    Parameters
    ----------
    kind : str
        "local": processes on this machine (`distributed.LocalCluster`). "cuda": one worker for each GPU of
        this machine (`dask_cuda.LocalCUDACluster`). "address": a running scheduler, as Dask's own tools start
        them on Kubernetes, SLURM or in a cloud. "auto": "cuda" where NVML finds GPUs that can be used, else
        "local"; `Cluster.chosen` says which and why.
    num_workers : int, optional
        Where None, one for each usable core (over `threads_per_worker`) or GPU, or as many as the scheduler
        has.
    threads_per_worker : int
        Of a local worker: tasks at a time, and threads of torch in training.
    address : str, optional
        Address of the scheduler, with kind "address" only.
    rmm_pool_bytes : int, optional
        GPU memory that each worker of "cuda" reserves at its start, bytes.
    devices : sequence of int
        Numbers of the GPUs that "cuda" uses; all of them where empty.
    timeout : float
        How long to wait for the scheduler and for all workers, seconds. A training over the cluster counts as
        hung after as long without a step: give more on a busy machine.

    Raises
    ------
    SpecError
        If an argument is not allowed, or belongs to another kind.
    BackendUnavailable
        If "cuda" finds too few GPUs, or no scheduler or too few workers answer in time.

    Examples
    --------
    >>> with open_cluster("local", num_workers=1) as cluster:
    ...     cluster.client.submit(sum, [1, 2]).result(), len(cluster.workers)
    (3, 1)
    """
    spec = ClusterSpec(
        kind=kind,
        num_workers=num_workers,
        threads_per_worker=threads_per_worker,
        address=address,
        rmm_pool_bytes=rmm_pool_bytes,
        devices=devices,
        timeout=timeout,
    )
    gpus, why_none = find_gpus(spec.devices) if spec.kind in ("auto", "cuda") else (0, "")
    opened, reason = spec.kind, f"{spec.kind!r} was asked for"
    if spec.kind == "cuda" and (not gpus or (spec.num_workers or 0) > gpus):
        limit = (
            f"there are {gpus}, one worker each" if gpus else f"{why_none}; kind='local' works on any machine"
        )
        raise BackendUnavailable(
            f"kind='cuda' with num_workers={spec.num_workers} cannot be opened: {limit}."
        )
    if spec.kind == "auto":
        opened = "cuda" if gpus else "local"
        reason = f"auto took {opened!r}: {f'NVML finds {gpus} GPU(s)' if gpus else why_none}"
    with ExitStack() as stack:
        if opened == "address":
            client = _connect(stack, spec)
        else:
            client = _start(stack, spec, opened, spec.num_workers or gpus)
        count = len(client.nthreads())
        chosen = f"{count} worker(s) of {spec.address or 'this machine'}; {reason}."
        yield Cluster(opened, client, chosen, client.dashboard_link, count, spec.timeout)


def find_gpus(devices: Sequence[int] = ()) -> tuple[int, str]:
    """How many GPUs a "cuda" cluster can use on this machine, and why there is none where the number is 0.

    It asks NVML and makes no CUDA context: dask-cuda has to make the first one.

    Raises
    ------
    ArgumentError
        If one of `devices` is not among the GPUs.
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
        count = _visible_count(visible, count)
    if count == 0:
        return 0, f"NVML finds no GPU (CUDA_VISIBLE_DEVICES={visible!r})"
    import torch

    if torch.version.cuda is None:
        return 0, f"NVML finds {count} GPU(s), but this torch {torch.__version__} is built without CUDA"
    if importlib.util.find_spec("dask_cuda") is None:
        return 0, f"NVML finds {count} GPU(s), but dask-cuda is not installed (pip install qtx-lab[gpu])"
    if any(device >= count for device in devices):
        raise ArgumentError(
            f"devices={list(devices)} is not allowed: this machine has {count} GPUs, numbered from 0."
        )
    return len(devices) or count, ""


def _visible_count(visible: str, count: int) -> int:
    """How many of `count` GPUs a value of CUDA_VISIBLE_DEVICES shows: those before the first that is none.

    >>> [_visible_count(visible, 4) for visible in ("0,2", "-1", "1,-1,2", "7", "GPU-8932f937", "")]
    [2, 0, 1, 0, 1, 0]
    """
    names = [name.strip() for name in visible.split(",")]
    valid = [
        int(name) in range(count) if re.fullmatch(r"[+-]?\d+", name) else name.startswith(("GPU-", "MIG-"))
        for name in names
    ]
    return [*valid, False].index(False)


def _connect(stack: ExitStack, spec: ClusterSpec) -> Client:
    """A client of the scheduler at an address, once that has enough workers; the stack closes it."""
    from distributed import Client

    try:
        client = Client(spec.address, timeout=spec.timeout)
    except (OSError, TimeoutError, ValueError) as error:
        raise BackendUnavailable(
            f"address={spec.address!r}: no Dask scheduler answers in {spec.timeout:g} s ({error})."
        ) from error
    except TypeError as error:
        raise BackendUnavailable(
            f"address={spec.address!r}: a scheduler behind TLS needs certificates; name them in Dask's "
            "configuration (distributed.comm.tls.ca-file and distributed.comm.tls.client), or give a "
            "distributed.Client that has them."
        ) from error
    stack.callback(client.close)
    if spec.num_workers is not None:
        try:
            client.wait_for_workers(spec.num_workers, timeout=spec.timeout)
        except TimeoutError:
            raise BackendUnavailable(
                f"num_workers={spec.num_workers}: the scheduler at {spec.address} has "
                f"{len(client.nthreads())} workers after {spec.timeout:g} s."
            ) from None
    return client


def _start(stack: ExitStack, spec: ClusterSpec, kind: str, num_workers: int) -> Client:
    """A client of a new cluster on this machine; the stack closes both."""
    import logging

    import dask
    from distributed.gc import disable_gc_diagnosis

    options: dict[str, Any] = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    options["silence_logs"] = logging.CRITICAL  # of a lost worker, whoever needed it tells the user
    stack.enter_context(_main_is_not_run_again())
    # That long after a worker went, its nanny is closed for good if the worker is not there at that moment: a
    # second fault would then cost a worker. Nannies replace lost workers; none is closed before the cluster
    # is.
    stack.enter_context(dask.config.set({"distributed.deploy.lost-worker-timeout": "365 days"}))
    with _ctrl_c_waits():
        client = _started(stack, spec, kind, num_workers, options)
    # A Ctrl-C that comes during garbage collection would be raised in Dask's callback after it, and lost.
    disable_gc_diagnosis(force=True)
    return client


def _started(
    stack: ExitStack, spec: ClusterSpec, kind: str, num_workers: int, options: dict[str, Any]
) -> Client:
    """The cluster with its client, whose workers leave Ctrl-C to the caller."""
    from distributed import Client, LocalCluster

    if kind == "cuda":
        from dask_cuda import LocalCUDACluster

        if spec.devices:
            options["CUDA_VISIBLE_DEVICES"] = list(spec.devices)
        if spec.rmm_pool_bytes is not None:
            options["rmm_pool_size"] = spec.rmm_pool_bytes
        cluster = LocalCUDACluster(n_workers=num_workers, **options)
    else:
        count = num_workers or max(1, _usable_cores() // spec.threads_per_worker)
        # memory_limit 0: a rank's memory is no cache that Dask could empty, and a pause would look like a
        # hang.
        cluster = LocalCluster(
            n_workers=count, threads_per_worker=spec.threads_per_worker, memory_limit=0, **options
        )
    stack.callback(_close, cluster)
    client = Client(cluster, timeout=spec.timeout)
    stack.callback(client.close)
    client.register_worker_callbacks(_leave_signals_to_the_caller)
    return client


def _close(cluster: LocalCluster) -> None:
    """Close a cluster of this machine.

    On a busy machine Dask gives up waiting for a worker less than a second after it has killed it.
    """
    with suppress(TimeoutError):
        cluster.close(timeout=60)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _leave_signals_to_the_caller() -> None:
    """Let a worker ignore the signals that end a training: the caller ends it in order, after its step.

    A terminal and a batch system send them to the workers too. A handler that does nothing, and not SIG_IGN,
    which the programs that a worker starts would inherit.
    """
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            if name in signal.Signals.__members__:
                signal.signal(signal.Signals[name], lambda number, frame: None)
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Raise a Ctrl-C at the end of the block only.

    Processes that are started here begin with the signal blocked, as their first thread inherits it: one that
    a terminal sends to all of them would otherwise end each of them with a traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
    if pressed.is_set():
        raise KeyboardInterrupt


@contextmanager
def _main_is_not_run_again() -> Iterator[None]:
    """Keep workers, also those that later replace dead ones, from running the caller's script again.

    Processes that Python spawns import the main script, which they find by its `__file__`; a script without
    an `if __name__ == "__main__"` would train in each of them. Workers get its functions by value
    (cloudpickle).
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {n: main.__dict__.pop(n) for n in ("__file__", "__spec__") if n in main.__dict__}
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(hidden)
