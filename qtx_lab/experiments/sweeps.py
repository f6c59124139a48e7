"""Sweeps: a notebook for every combination of values, on a Dask cluster; each notebook is a run."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ..checks import MAX_SEED, check_count, check_flags, check_functions
from ..errors import (
    ArgumentError,
    BackendUnavailable,
    DtypeError,
    QtxError,
    RunFailed,
    SpecError,
    StorageError,
)
from ..specs import ClusterSpec, NotebookSpec, Spec, SweepSpec, Word, listed_word, value_of
from ..storage import runs_home, write_atomic
from ..training.cluster import Cluster, open_cluster
from . import provenance
from .notebook_code import canonical, cell_key, code_hash
from .notebook_execution import NO_LIMITS, ExecutionLimits
from .notebooks import (
    declared_parameters,
    execute,
    notebook_kind,
    notebook_path,
    notebook_spec,
    parameter_schema,
    parameter_words,
    result_facts,
    run_name,
)
from .parameters import Parameter
from .report import write_report
from .runs import Run, read_manifests
from .sweep_results import write_results

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
class PlannedNotebook:
    """One notebook of a sweep.

    Parameters
    ----------
    spec : Spec
        The spec of its run.
    repeat : int
        The number of the repeat, from 0.
    key : str
        A hash of the notebook's code cells, their tags and its parameters, equal in all sweeps.
    """

    spec: Spec
    repeat: int
    key: str


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will run: its spec, and each notebook."""

    spec: SweepSpec
    notebooks: list[PlannedNotebook]


@dataclass(frozen=True)
class NotebookEnd:
    """How a notebook of a sweep ended: the folder of its run, and the run's status."""

    folder: str
    status: str


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
        done, or that another sweep is running now, and run only the others. They may have been done by
        another version of qtx_lab; how many were is said on stderr and in the summary.
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
    _check_kinds(grid, parameters, cluster)
    check_flags(resume=resume, fresh=fresh, progress=progress)
    check_functions(stop=stop)
    path = notebook_path(notebook).resolve()
    planned = plan(path, grid, parameters=parameters, repeats=repeats, seed=seed)
    workers = _checked_workers(workers, cluster)
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
    try:
        # All notebooks execute this copy: the file that was checked, whatever happens to the original.
        copied = run.path / path.name
        write_atomic(copied, path.read_bytes())
        if missing:
            with (
                _client(workers and min(workers, len(missing)), cluster) as client,
                client.as_current(),  # another thread's sweep may have set another default client
                tqdm(
                    total=len(planned.notebooks),
                    initial=len(earlier),
                    desc=f"sweep {path.stem}",
                    unit="notebook",
                    disable=not progress,
                ) as bar,
            ):
                _run_notebooks(client, run, copied, missing, folders, stop, bar, limits)
        problem = _write_results(run, planned, folders, measure)
        run.finish("failed" if problem else "done", problem)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            done = f"{len(folders)} of {len(planned.notebooks)} notebooks"
            error.add_note(f"{done} have ended and are kept in {home}; --resume runs the others.")
        with suppress(QtxError):  # the first error is the one to report
            _mark_ended(run, error)
            _write_results(run, planned, {**_mark_interrupted(run), **folders}, measure)
            write_report(run)
        raise
    write_report(run)
    return run


def _check_kinds(grid: object, parameters: object, cluster: object, name_of_grid: str = "grid") -> None:
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


def _checked_workers(workers: int | None, cluster: object) -> int | None:
    """The number of workers, where there is one; it is no number for a cluster, which has its own."""
    if workers is None:
        return None
    workers = check_count("workers", workers)
    if cluster is not None:
        raise ArgumentError(f"workers={workers} and a cluster exclude each other: the cluster has its own.")
    return workers


def plan(
    path: Path,
    grid: Mapping[str, Sequence[Any]],
    *,
    parameters: Mapping[str, Any] | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> SweepPlan:
    """What a sweep will run, checked as a whole; arguments and errors as of `sweep`."""
    repeats, seed = check_count("repeats", repeats), check_count("seed", seed, 0, MAX_SEED)
    fixed = dict(parameters or {})
    declared = declared_parameters(path)
    checked: dict[str, list[Any]] = {}
    for name, values in grid.items():
        checked[name] = _taken(path, declared, name, values)
        _check_values(name, checked[name])
        if name in fixed:
            raise ArgumentError(f"{name!r} is in the grid and in the parameters: give it once.")
    fixed = {name: _taken(path, declared, name, [value])[0] for name, value in fixed.items()}
    seeded = "seed" in declared and "seed" not in grid and "seed" not in fixed
    if repeats > 1 and not seeded:
        why = "has no parameter `seed`" if "seed" not in declared else "is given its seed"
        raise ArgumentError(f"repeats={repeats} is not allowed: {path.name} {why}, so all would be the same.")
    digest = code_hash(path)
    spec = SweepSpec(
        notebook=path.stem, sha256=digest, grid=checked, parameters=fixed, repeats=repeats, seed=seed
    )
    notebooks = []
    for repeat in range(
        repeats
    ):  # all combinations once, then again, so that an early figure shows all of them
        for values in itertools.product(*spec.grid.values()):
            given = {**spec.parameters, **dict(zip(spec.grid, values, strict=True))}
            if seeded:
                given["seed"] = repeat_seed(seed, repeat)
            try:
                of_notebook = notebook_spec(path, declared, given)
            except SpecError as error:
                shown = ", ".join(f"{name}={value!r}" for name, value in given.items() if name in spec.grid)
                raise SpecError(f"{error} (at {shown or 'the only combination'})") from None
            key = cell_key(path, of_notebook)
            notebooks.append(PlannedNotebook(of_notebook, repeat, key))
    return SweepPlan(spec, notebooks)


def _taken(path: Path, declared: Mapping[str, Parameter], name: str, values: object) -> list[Any]:
    """The values of a parameter as it takes them; they are checked together with all others later."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ArgumentError(f"grid[{name!r}]={values!r} is not allowed: it must be a list of values.")
    if name not in declared:
        return [value_of(value, {}) for value in values]
    schema = parameter_schema(path, declared, name)
    if all(option.get("type") == "array" for option in schema.get("anyOf", [schema])):
        values = [value if _is_list(value) else [value] for value in values]
    if notebook_kind(path) is NotebookSpec:
        return [declared[name].taken(value) for value in values]
    return [value_of(value, schema) for value in values]


def _is_list(value: object) -> bool:
    """Whether a value, or the word that was typed for it, is a list."""
    if isinstance(value, str):
        return isinstance(value, Word) and value.strip().startswith(("[", "!", "-"))
    return isinstance(value, Sequence)


def _check_values(name: str, values: list[Any]) -> None:
    """Refuse values of a grid that are not distinct."""
    texts = [canonical(value) for value in values]
    for value, text in zip(values, texts, strict=True):
        if texts.count(text) > 1:
            raise ArgumentError(
                f"grid[{name!r}]={list(values)!r} is not allowed: {value!r} is named more than once."
            )


def repeat_seed(seed: int, repeat: int) -> int:
    """The seed of a repeat, of 52 bits, so that JavaScript and floats hold it exactly.

    >>> repeat_seed(0, 0) == repeat_seed(0, 0) != repeat_seed(0, 1)
    True
    """
    word = np.random.SeedSequence(seed, spawn_key=(repeat,)).generate_state(1, np.uint64)[0]
    return int(word >> np.uint64(12))


def find_results(home: Path, path: Path, planned: SweepPlan) -> dict[str, Path]:
    """The run folders, by key, of notebooks that are done with the same spec, code and inputs."""
    done = {
        (manifest.get("code") or {}).get("result"): folder
        for folder, manifest in read_manifests(home)
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
    for folder, manifest in read_manifests(home):
        of_sweep = manifest.get("sweep") or {}
        if manifest["status"] == "running" and "cell" not in of_sweep:
            running_sweeps.add(folder.name)
        elif of_sweep.get("cell") in keys and manifest["status"] == "done":
            done[of_sweep["cell"]] = folder
        elif of_sweep.get("cell") in keys and manifest["status"] == "running":
            running.append((of_sweep["cell"], of_sweep.get("name"), folder))
    # A notebook that died on another machine reads as running for ever: it counts only while its sweep runs.
    return {key: folder for key, name, folder in running if name in running_sweeps} | done


def _run_notebooks(
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
        given = str(run.path), os.getcwd(), limits
        for notebook in notebooks:
            future = client.submit(run_planned, str(path), notebook, *given, pure=False)
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
            _mark_ended(run, error)
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


def _mark_ended(run: Run, error: BaseException) -> None:
    """Mark a sweep that an error or Ctrl-C ended, unless it is marked already."""
    if run.status == "running":
        interrupted = isinstance(error, KeyboardInterrupt)
        run.finish("interrupted" if interrupted else "failed", None if interrupted else str(error))


def _mark_interrupted(run: Run) -> dict[str, Path]:
    """Mark the notebooks of a sweep whose processes are gone as interrupted; return their folders by key."""
    folders = {}
    for folder, manifest in read_manifests(run.path.parent):
        of_sweep = manifest.get("sweep") or {}
        if of_sweep.get("name") == run.path.name and manifest["status"] == "interrupted":
            folders[str(of_sweep.get("cell"))] = folder
            if "finished" not in manifest:
                Run(folder).finish("interrupted")
    return folders


def _write_results(
    run: Run, planned: SweepPlan, folders: Mapping[str, Path], measure: str | None
) -> str | None:
    """Write the sweep's table, figure and summary; return which notebooks are not done, if any."""
    listed: list[tuple[Path, Mapping[str, Any]]] = []
    for notebook in planned.notebooks:
        try:
            listed.append((folders[notebook.key], Run(folders[notebook.key]).manifest))
        except (KeyError, StorageError):
            fields = {"kind": type(notebook.spec).__name__, "fields": notebook.spec.to_parameters()}
            name = run_name(Path(planned.spec.notebook))
            listed.append((Path(), {"name": name, "status": "missing", "spec": fields}))
    from_earlier_runs = run.manifest["results"].get("kept", 0)
    return write_results(run, planned.spec, listed, measure, from_earlier_runs)


@contextmanager
def _client(workers: int | None, cluster: ClusterSpec | Cluster | str | Client | None) -> Iterator[Client]:
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


def sweep_command(notebook: str | Path, path: Path, spec: SweepSpec) -> str:
    """What to type to run this sweep again."""
    declared = declared_parameters(path)
    words = ["qtx-lab", "sweep", str(notebook)]
    for name, values in spec.grid.items():
        schema = parameter_schema(path, declared, name)
        words += ["-g", f"{name}={','.join(listed_word(value, schema) for value in values)}"]
    words += parameter_words(path, declared, spec.parameters)
    return shlex.join([*words, "--repeats", str(spec.repeats), "--seed", str(spec.seed)])


__all__ = [
    "NotebookEnd",
    "PlannedNotebook",
    "SweepPlan",
    "find_done",
    "plan",
    "repeat_seed",
    "run_planned",
    "sweep",
]
