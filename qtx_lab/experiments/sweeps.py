"""Sweeps: a notebook for every combination of values, on a Dask cluster; each notebook is a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..checks import check_count, check_flags, check_functions
from ..errors import ArgumentError, DtypeError, QtxError, StorageError
from ..specs import ClusterSpec, SweepSpec
from ..storage import runs_home, write_atomic
from ..training.cluster import Cluster
from . import provenance
from .notebook_execution import NO_LIMITS, ExecutionLimits
from .notebooks import notebook_path, result_facts, run_name
from .report import write_report
from .runs import Run, oldest_first, read_manifests
from .sweep_execution import cluster_client, mark_ended, mark_interrupted, run_notebooks
from .sweep_plan import PlannedNotebook, SweepPlan, plan, sweep_command
from .sweep_results import write_results

if TYPE_CHECKING:
    from distributed import Client

OTHER_SWEEPS_POLL_S = 0.5
"""Seconds between two looks at notebooks that another sweep is running."""


def sweep(
    notebook: str | Path,
    grid: Mapping[str, Sequence[Any]],
    *,
    parameters: Mapping[str, Any] | None = None,
    repeats: int = 1,
    seed: int = 0,
    workers: int | None = None,
    cluster: ClusterSpec | Cluster | str | Client | None = None,
    home: str | Path | None = None,
    resume: bool = False,
    fresh: bool = False,
    measure: str | None = None,
    limits: ExecutionLimits = NO_LIMITS,
    stop: Callable[[], bool] | None = None,
    progress: bool = True,
) -> Run:
    """Run a notebook for every combination of values, in processes of one thread each.

    Each notebook is a run of its own, as `run_notebook` makes it, whose manifest names the sweep. The sweep
    is a run too: its metrics are the table of all notebooks, and its figure shows what they measured. If a
    notebook fails, its run is left with the traceback, and the others go on. Notebooks that have ended are on
    disk: a sweep that is killed loses only those that are running, and `resume` runs what is missing. A
    worker that dies is replaced, and its notebook begins again, at most three times.

    Parameters
    ----------
    notebook : str or path
        See `notebook_path`.
    grid : mapping
        A list of values for each parameter that varies. Of a parameter that is a list itself, as the sample
        counts of the quickstart, a value that is no list stands for a list with this value: [16, 64] runs the
        notebook with [16] and with [64].
    parameters : mapping, optional
        Parameters that are the same in all notebooks.
    repeats : int
        Number of notebooks for each combination. Each has its own seed, in the parameter `seed`. Repeat r has
        the same seed in all combinations, so that combinations are compared on the same random numbers.
    seed : int
        The seed from which the repeats' seeds are derived.
    workers : int, optional
        Number of processes on this machine; one for each core if None.
    cluster : ClusterSpec, Cluster, str or distributed.Client, optional
        Where to run instead: a cluster to open, an open cluster, the address of a scheduler, or a client. Its
        workers must have this version of qtx_lab and see the same files.
    home : path, optional
        Folder of runs; see `runs_home`.
    resume : bool
        Take from `home` the notebooks of the same code cells, tags and parameters that an earlier sweep has
        done, or that another sweep is running now, and run only the others, and what the other sweep did not
        bring to its end. They may have been done by another version of qtx_lab; how many were is said on
        stderr and in the summary.
    fresh : bool
        Run all notebooks. Otherwise those that are done in `home` with the same spec, code, distributions and
        input files are taken from there, and the summary says so. 1 and 1.0 are the same there, 0 and -0.0
        are not.
    measure : str, optional
        The number in the runs' results that the figure shows. If None, it is the one that the notebook
        declares as its main one (see `Run.declare`), else the first one.
    limits : ExecutionLimits
        What each notebook may take; one that takes longer is a failed run, and the others go on.
    stop : callable, optional
        Called twice a second. Once it returns True, running notebooks are stopped and marked as interrupted.
    progress : bool
        Show a progress bar with the time left on stderr.

    Returns
    -------
    Run
        The run of the sweep: `done`, or `failed` if a notebook failed. Its `metrics()` are the table.

    Raises
    ------
    ArgumentError, DtypeError, SpecError, TextError
        Before any work, if `run_notebook` would refuse any of the combinations, the grid is empty, or several
        repeats are requested of a notebook without the parameter `seed`.
    StorageError
        If home cannot be written or has no room.
    BackendUnavailable
        If the cluster cannot be reached or opened.
    KeyboardInterrupt
        On Ctrl-C, or once `stop` returns True. The sweep's run is marked as interrupted.

    Examples
    --------
    A notebook for two values of x, by a Dask client whose only worker is a thread of this process:

    >>> import nbformat, tempfile
    >>> from distributed import Client
    >>> parameters = nbformat.v4.new_code_cell("x = 2", metadata={"tags": ["parameters"]})
    >>> work = nbformat.v4.new_code_cell("print(x**2)")
    >>> client = Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None)
    >>> with client, tempfile.TemporaryDirectory() as home:
    ...     path = Path(home, "square.ipynb")
    ...     nbformat.write(nbformat.v4.new_notebook(cells=[parameters, work]), path)
    ...     run = sweep(path, {"x": [1, 3]}, home=home, cluster=client, progress=False)
    ...     run.metrics()[["status", "spec.x"]].values.tolist()
    [['done', 1], ['done', 3]]
    """
    check_kinds(grid, parameters, cluster)
    check_flags(resume=resume, fresh=fresh, progress=progress)
    check_functions(stop=stop)
    path = notebook_path(notebook).resolve()
    planned = plan(path, grid, parameters=parameters, repeats=repeats, seed=seed)
    workers = checked_workers(workers, cluster)
    home = runs_home(home).resolve()
    if resume and fresh:
        raise ArgumentError("resume=True and fresh=True exclude each other.")
    earlier = {} if fresh else find_results(home, path, planned)
    older = ""
    if resume:
        earlier = find_done(home, {notebook.key for notebook in planned.notebooks})
        older = _of_other_code(earlier.values()) if earlier else _of_other_cells(home, planned.spec)
    if older:
        tqdm.write(older, file=sys.stderr)
    missing = [notebook for notebook in planned.notebooks if notebook.key not in earlier]
    run = Run.create(
        planned.spec,
        f"sweep-{run_name(path)}",
        home,
        title=f"A sweep of {path.name}",
        command=sweep_command(notebook, path, planned.spec),
        results={
            "notebooks": len(planned.notebooks),
            "kept": len(earlier),
            **({"note": older} if older else {}),
        },
    )
    folders = dict(earlier)
    # All notebooks execute this copy: the file that was checked, whatever happens to the original.
    copied = run.path / path.name

    def run_here(notebooks: Sequence[PlannedNotebook], bar: tqdm) -> None:
        if notebooks:
            with (
                cluster_client(workers and min(workers, len(notebooks)), cluster) as client,
                client.as_current(),  # another thread's sweep may have set another default client
            ):
                run_notebooks(client, run, copied, notebooks, folders, stop, bar, limits)

    try:
        write_atomic(copied, path.read_bytes())
        with tqdm(
            total=len(planned.notebooks),
            initial=len(earlier),
            desc=f"sweep {path.stem}",
            unit="notebook",
            disable=not (progress and missing),
        ) as bar:
            run_here(missing, bar)
            if left := _left_by_other_sweeps(earlier, stop):
                for key in left:
                    del folders[key]
                bar.update(-len(left))
                run.update(results={"kept": len(earlier) - len(left)})
                run_here([notebook for notebook in planned.notebooks if notebook.key in left], bar)
        problem = write_results(run, planned, folders, measure)
        run.finish("failed" if problem else "done", problem)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            ended = sum(not _is_running(folder) for folder in folders.values())
            done = f"{ended} of {len(planned.notebooks)} notebooks"
            error.add_note(f"{done} have ended and are kept in {home}; --resume runs the others.")
        with suppress(QtxError):  # the first error is the one to report
            mark_ended(run, error)
            write_results(run, planned, {**mark_interrupted(run), **folders}, measure)
            write_report(run)
        raise
    write_report(run)
    return run


def check_kinds(grid: object, parameters: object, cluster: object, name_of_grid: str = "grid") -> None:
    """Refuse arguments of another type."""
    if not isinstance(cluster, ClusterSpec | Cluster | str | None):
        from distributed import Client

        if not isinstance(cluster, Client):
            raise DtypeError(
                f"cluster={cluster!r} is not allowed: it must be a ClusterSpec, a Cluster, an address or a "
                "distributed.Client."
            )
    for name, value in ((name_of_grid, grid), ("parameters", parameters or {})):
        if not isinstance(value, Mapping):
            raise DtypeError(f"{name}={value!r} is not allowed: it must be a mapping by parameter.")


def checked_workers(workers: int | None, cluster: object) -> int | None:
    """The number of workers, where there is one; it is no number for a cluster, which has its own."""
    if workers is None:
        return None
    workers = check_count("workers", workers)
    if cluster is not None:
        raise ArgumentError(f"workers={workers} and a cluster exclude each other: the cluster has its own.")
    return workers


def find_results(home: Path, path: Path, planned: SweepPlan) -> dict[str, Path]:
    """The run folders, by key, of notebooks that are done with the same spec, code and inputs."""
    done = {
        (manifest.get("code") or {}).get("result"): folder
        for folder, manifest in oldest_first(home)
        if manifest["status"] == "done" and (manifest.get("sweep") or {}).get("cell")
    }
    if not done:
        return {}
    keys = {
        notebook.key: result_facts(path, notebook.spec)["code"]["result"] for notebook in planned.notebooks
    }
    return {key: done[result] for key, result in keys.items() if result in done}


def _of_other_code(folders: Iterable[Path]) -> str:
    """How many of these runs were done by other code of this package, in a sentence; "" if none was."""
    count = 0
    for folder in folders:
        with suppress(StorageError):
            code = (Run(folder).manifest.get("code") or {}).get("package")
            count += code != provenance.source_hash()
    return (
        f"{count} of the notebooks that --resume takes were done by other code of qtx_lab than this; --fresh "
        "runs them again."
        if count
        else ""
    )


def _of_other_cells(home: Path, spec: SweepSpec) -> str:
    """That nothing is taken because the notebook's cells have changed, in a sentence; "" if they have not."""
    specs = [manifest.get("spec") or {} for _, manifest in read_manifests(home)]
    sweeps = [of.get("fields") or {} for of in specs if of.get("kind") in ("SweepSpec", "SearchSpec")]
    hashes = {fields.get("sha256") for fields in sweeps if fields.get("notebook") == spec.notebook}
    if not hashes or spec.sha256 in hashes:
        return ""
    return (
        f"--resume takes nothing: the code cells of {spec.notebook}, or their tags, are not those of any "
        "earlier sweep."
    )


def find_done(home: Path, keys: set[str]) -> dict[str, Path]:
    """The run folders, by key, of notebooks that other sweeps have done or are running now."""
    running_sweeps, done, running = set(), {}, []
    for folder, manifest in oldest_first(home):
        of_sweep = manifest.get("sweep") or {}
        if manifest["status"] == "running" and "cell" not in of_sweep:
            running_sweeps.add(folder.name)
        elif of_sweep.get("cell") in keys and manifest["status"] == "done":
            done[of_sweep["cell"]] = folder
        elif of_sweep.get("cell") in keys and manifest["status"] == "running":
            running.append((of_sweep["cell"], of_sweep.get("name"), folder))
    # A notebook that died on another machine reads as running for ever: it counts only while its sweep runs.
    return {key: folder for key, name, folder in running if name in running_sweeps} | done


def _left_by_other_sweeps(folders: Mapping[str, Path], stop: Callable[[], bool] | None) -> set[str]:
    """Wait until no other sweep runs these notebooks any more; the keys of those that are not done then."""
    running = {key for key, folder in folders.items() if _is_running(folder)}
    if running:
        tqdm.write(f"Waits for {len(running)} notebook(s) that another sweep is running.", file=sys.stderr)
    while running:
        if stop is not None and stop():
            raise KeyboardInterrupt("The sweep was stopped.")
        time.sleep(OTHER_SWEEPS_POLL_S)
        running = {key for key in running if _is_running(folders[key])}
    return {key for key, folder in folders.items() if _status(folder) != "done"}


def _is_running(folder: Path) -> bool:
    """Whether a notebook of a sweep is running: on another machine that shows only in the sweep's own run."""
    with suppress(StorageError):
        manifest = Run(folder).manifest
        of_sweep = manifest.get("sweep") or {}
        return manifest["status"] == "running" == _status(folder.with_name(str(of_sweep.get("name"))))
    return False


def _status(folder: Path) -> str | None:
    """The status of a run; None where it cannot be read."""
    with suppress(StorageError):
        return Run(folder).status
    return None
