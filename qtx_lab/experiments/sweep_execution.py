"""Runs the notebooks of a sweep on a Dask cluster, each as a run, and marks what did not end."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ..errors import BackendUnavailable, QtxError, RunFailed, StorageError
from ..specs import ClusterSpec
from ..training.cluster import Cluster, open_cluster
from .notebook_execution import ExecutionLimits
from .notebooks import execute, result_facts, run_name
from .runs import Run, read_manifests
from .sweep_plan import PlannedNotebook

if TYPE_CHECKING:
    from distributed import Client, Future

NO_WORKERS_TIMEOUT_S = 60.0
"""Seconds without any worker after which a sweep gives up."""

LOST_CLUSTER = "The scheduler of the cluster went away; --resume runs what is missing."

STOP_TIMEOUT_S = 20.0
"""Seconds that running notebooks get to end after the sweep was stopped."""

_NOTEBOOK_LOCK = threading.Lock()
"""Held while a notebook runs: a worker's threads share one working directory, which papermill changes."""


@dataclass(frozen=True)
class NotebookEnd:
    """How a notebook of a sweep ended: the folder of its run, and the run's status."""

    folder: str
    status: str


def run_notebooks(
    client: Client,
    run: Run,
    path: Path,
    notebooks: Sequence[PlannedNotebook],
    folders: dict[str, Path],
    stop: Callable[[], bool] | None,
    bar: tqdm,
    limits: ExecutionLimits,
) -> None:
    """Run the notebooks, and add the folder of each to `folders` as soon as it ends."""
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what is lost is told in a sentence
    from distributed import wait
    from distributed.client import FuturesCancelledError

    futures: dict[Future, PlannedNotebook] = {}
    num_failed = 0
    last_seen = time.monotonic()  # of a worker
    try:
        common = str(run.path), os.getcwd(), limits
        for notebook in notebooks:
            future = client.submit(run_planned, str(path), notebook, *common, pure=False)
            futures[future] = notebook
        while futures:
            if stop is not None and stop():
                raise KeyboardInterrupt("The sweep was stopped.")
            try:
                ended = wait(list(futures), timeout=0.5, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                if sys.stderr.isatty():
                    bar.refresh()  # so that the time left counts down
                last_seen = time.monotonic() if _has_workers(client) else last_seen
                if time.monotonic() - last_seen > NO_WORKERS_TIMEOUT_S:
                    raise BackendUnavailable(
                        f"The scheduler at {client.scheduler.address} has had no workers for "
                        f"{NO_WORKERS_TIMEOUT_S:.0f} s: start some, as `dask worker ADDRESS`; --resume runs "
                        "what is missing."
                    ) from None
                continue
            except FuturesCancelledError:
                raise BackendUnavailable(LOST_CLUSTER) from None
            for future in ended:
                notebook = futures.pop(future)
                end = _end_of(future)
                if end is not None:
                    folders[notebook.key] = Path(end.folder)
                num_failed += end is None or end.status != "done"
                bar.set_postfix(failed=num_failed, refresh=False)
                bar.update()
    except BaseException as error:
        with suppress(QtxError):
            # Running notebooks see the sweep's status and stop, and those that wait for a worker do not
            # begin.
            mark_ended(run, error)
        with suppress(TimeoutError, FuturesCancelledError):
            wait(list(futures), timeout=STOP_TIMEOUT_S)
        client.cancel(list(futures))
        raise


def _has_workers(client: Client) -> bool:
    """Whether the scheduler has workers; True while it does not answer, which is another problem."""
    try:
        return bool(client.nthreads())
    except (OSError, TimeoutError, ValueError):
        return True


def _end_of(future: Future) -> NotebookEnd | None:
    """How a notebook ended, or None if its worker died too often; other errors end the sweep."""
    if future.status == "finished":
        return future.result()
    if future.status == "cancelled":
        raise BackendUnavailable(LOST_CLUSTER)
    error = future.exception()
    if isinstance(error, QtxError):  # such as no room for a run: the other notebooks would fail too
        raise error
    tqdm.write(f"A notebook was lost: {error}", file=sys.stderr)
    return None


def run_planned(
    path: str, notebook: PlannedNotebook, sweep_folder: str, folder: str, limits: ExecutionLimits
) -> NotebookEnd:
    """Run one notebook of a sweep in this process, with `folder` as the working directory."""
    sweep_run, file = Run(Path(sweep_folder)), Path(path)

    def sweep_ended() -> bool:
        try:
            return sweep_run.status != "running"
        except StorageError:  # the folder was deleted
            return True

    with _NOTEBOOK_LOCK, chdir(folder):
        if sweep_ended():
            raise RunFailed(f"{sweep_run.path.name} is over.")
        name = f"{run_name(file)}-{notebook.key[:8]}"
        # An earlier worker may have finished this very notebook and died before it could report that.
        for earlier in sweep_run.path.parent.glob(f"*-{name}-*"):
            with suppress(StorageError):
                manifest = Run(earlier).manifest
                same_sweep = manifest.get("sweep", {}).get("name") == sweep_run.path.name
                if manifest["status"] == "done" and same_sweep:
                    return NotebookEnd(str(earlier), "done")
        of_sweep = {"name": sweep_run.path.name, "cell": notebook.key, "repeat": notebook.repeat}
        facts = result_facts(file, notebook.spec)
        run = Run.create(notebook.spec, name, sweep_run.path.parent, sweep=of_sweep, **facts)
        with suppress(QtxError, KeyboardInterrupt):  # the run's manifest records them
            execute(run, file, notebook.spec, progress=False, stop=sweep_ended, threads=1, limits=limits)
        return NotebookEnd(str(run.path), run.status)


def mark_ended(run: Run, error: BaseException) -> None:
    """Mark a sweep that an error or Ctrl-C ended, unless it is marked already."""
    if run.status == "running":
        interrupted = isinstance(error, KeyboardInterrupt)
        run.finish("interrupted" if interrupted else "failed", None if interrupted else str(error))


def mark_interrupted(run: Run) -> dict[str, Path]:
    """Mark the notebooks of a sweep whose processes are gone as interrupted; return their folders by key."""
    folders = {}
    for folder, manifest in read_manifests(run.path.parent):
        of_sweep = manifest.get("sweep") or {}
        if of_sweep.get("name") == run.path.name and manifest["status"] == "interrupted":
            folders[str(of_sweep.get("cell"))] = folder
            if "finished" not in manifest:
                Run(folder).finish("interrupted")
    return folders


@contextmanager
def cluster_client(
    workers: int | None, cluster: ClusterSpec | Cluster | str | Client | None
) -> Iterator[Client]:
    """A client of the cluster; a cluster that is opened here is closed at the end."""
    if cluster is None:
        cluster = ClusterSpec(kind="local", num_workers=workers)
    elif isinstance(cluster, str):
        cluster = ClusterSpec(kind="address", address=cluster)
    if not isinstance(cluster, ClusterSpec):
        yield cluster.client if isinstance(cluster, Cluster) else cluster
        return
    with open_cluster(**cluster.arguments()) as opened:
        if opened.kind != "address":
            opened.client.register_worker_callbacks(_ignore_ctrl_c)
        yield opened.client


def _ignore_ctrl_c() -> None:
    """Leave Ctrl-C to the sweep, which receives it on the same terminal and ends its workers in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
