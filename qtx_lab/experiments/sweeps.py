"""Sweeps: a notebook for every combination of values, on a Dask cluster, one run a notebook."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ..checks import check_count
from ..errors import (
    ArgumentError,
    BackendUnavailable,
    DtypeError,
    QtxError,
    RunFailed,
    SpecError,
    StorageError,
)
from ..specs import ClusterSpec, Spec, SweepSpec
from ..storage import runs_home, write_atomic, write_frame
from ..training.cluster import Cluster, open_cluster
from .figures import comparison
from .listing import RunTable, run_table
from .notebooks import as_word, declared_parameters, execute, notebook_path, notebook_spec, run_name
from .report import write_report
from .runs import Run, read_manifests

if TYPE_CHECKING:
    from distributed import Client, Future

PATIENCE = 20.0
"""Seconds that notebooks in flight get to end, once the sweep is stopped."""

_TURN = threading.Lock()
"""papermill's working directory is the process's: a worker with several threads runs one notebook at a time."""


@dataclass(frozen=True)
class Cell:
    """One notebook of a sweep.

    Parameters
    ----------
    spec : Spec
        Of its run.
    repeat : int
        From 0.
    key : str
        Equal exactly where the same notebook was asked for with the same parameters, in any sweep.
    """

    spec: Spec
    repeat: int
    key: str


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
    measure: str | None = None,
    stop: Callable[[], bool] | None = None,
    progress: bool = True,
) -> Run:
    """Run a notebook for every combination of values, in processes of one thread each.

    Each notebook is a run of its own, which `run_notebook` makes; its manifest names the sweep. The sweep is a run too:
    its metrics are the table of all notebooks, its figure shows what they measured. A notebook that fails is kept with
    its traceback, and the others go on. What has ended is on disk: a sweep that is killed loses the notebooks in flight,
    and `resume` runs what is missing. A worker that dies is replaced, and its notebook begins again, at most three times.

    Parameters
    ----------
    notebook : str or path
        See `notebook_path`.
    grid : mapping
        Values by parameter.
    parameters : mapping, optional
        Parameters that are the same in all notebooks.
    repeats : int
        Notebooks of each combination. Each has its own seed, in the parameter `seed`; repeat r has the same one whatever
        the combination, so that combinations are compared on the same random numbers.
    seed : int
        What these seeds are derived from.
    workers : int, optional
        Processes on this machine; one a core where None.
    cluster : ClusterSpec, Cluster, str or distributed.Client, optional
        In place of them: a cluster to open, an open one, the address of a scheduler, or its client. Its workers have this version of qtx_lab,
        and see the same files.
    home : path, optional
        See `runs_home`.
    resume : bool
        Take from `home` the notebooks that an earlier sweep has done, or another is doing now, of the same file and
        parameters, and run the others.
    measure : str, optional
        The number in the runs' results that the figure shows; the first where None.
    stop : callable, optional
        Asked twice a second; once it says True, notebooks in flight are stopped and marked as interrupted.
    progress : bool
        Show a bar, a step a notebook, with the time left, on stderr.

    Returns
    -------
    Run
        Of the sweep: `done`, or `failed` if a notebook did. `metrics()` is the table.

    Raises
    ------
    ArgumentError, DtypeError, SpecError, TextError
        Before any work: whatever `run_notebook` would refuse in any combination; an empty grid; repeats without a `seed`.
    StorageError
        If home cannot be written or has no room.
    BackendUnavailable
        If the cluster cannot be had.
    KeyboardInterrupt
        On Ctrl-C, or once `stop` says so; the sweep is kept, marked as interrupted.
    """
    kinds = ClusterSpec | Cluster | str | None
    if not isinstance(cluster, kinds) and not hasattr(cluster, "submit"):
        raise DtypeError(
            f"cluster={cluster!r} is not allowed: it must be a ClusterSpec, a Cluster, an address or a client."
        )
    for name, value in (("grid", grid), ("parameters", parameters or {})):
        if not isinstance(value, Mapping):
            raise DtypeError(f"{name}={value!r} is not allowed: it must be a mapping by parameter.")
    path = notebook_path(notebook).resolve()
    spec, cells = plan(path, grid, parameters=parameters, repeats=repeats, seed=seed)
    if workers is not None:
        check_count("workers", workers)
        if cluster is not None:
            raise ArgumentError(
                f"workers={workers} and a cluster exclude each other: the cluster has its own."
            )
    home = runs_home(home).resolve()
    earlier = find_done(home, {cell.key for cell in cells}) if resume else {}
    run = Run.create(
        spec,
        f"sweep-{run_name(path)}",
        home,
        title=f"A sweep of {path.name}",
        command=_command(notebook, spec),
        results={"notebooks": len(cells), "kept": len(earlier)},
    )
    folders = dict(earlier)
    try:
        copied = run.path / path.name  # what is swept stays as it was checked, and is kept
        write_atomic(copied, path.read_bytes())
        missing = [cell for cell in cells if cell.key not in earlier]
        if missing:
            with (
                _client(workers and min(workers, len(missing)), cluster) as client,
                client.as_current(),  # another thread may have another sweep, whose client would be the default
                _bar(path, cells, missing, progress) as bar,
            ):
                _run_cells(client, run, copied, missing, folders, stop, bar)
        trouble = _gather(run, spec, cells, folders, measure)
        run.finish("failed" if trouble else "done", trouble)
    except BaseException as error:
        with suppress(QtxError):  # the first error is the one to hear about
            _end(run, error)
            _gather(run, spec, cells, {**_interrupted(run), **folders}, measure)
            write_report(run)
        raise
    write_report(run)
    return run


def plan(
    path: Path,
    grid: Mapping[str, Sequence[Any]],
    *,
    parameters: Mapping[str, Any] | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> tuple[SweepSpec, list[Cell]]:
    """What a sweep will run, checked as a whole; see `sweep`."""
    check_count("repeats", repeats)
    given = dict(parameters or {})
    declared = declared_parameters(path)
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ArgumentError(f"grid[{name!r}]={values!r} is not allowed: it must be a list of values.")
        if name in given:
            raise ArgumentError(f"{name!r} is in the grid and in the parameters: give it once.")
        texts = [json.dumps(value, sort_keys=True, default=str) for value in values]
        twice = next(
            (value for value, text in zip(values, texts, strict=True) if texts.count(text) > 1), None
        )
        if len(set(texts)) < len(texts):
            raise ArgumentError(
                f"grid[{name!r}]={list(values)!r} is not allowed: {twice!r} is named more than once."
            )
    seeded = "seed" in declared and "seed" not in grid and "seed" not in given
    if repeats > 1 and not seeded:
        why = "has no parameter `seed`" if "seed" not in declared else "is given its seed"
        raise ArgumentError(f"repeats={repeats} is not allowed: {path.name} {why}, so all would be the same.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    spec = SweepSpec(
        notebook=path.stem, sha256=digest, grid=dict(grid), parameters=given, repeats=repeats, seed=seed
    )
    cells = []
    for repeat in range(repeats):  # all combinations once, then again: an early figure shows all of them
        for values in itertools.product(*spec.grid.values()):
            cell = {**spec.parameters, **dict(zip(spec.grid, values, strict=True))}
            if seeded:
                cell["seed"] = repeat_seed(seed, repeat)
            try:
                asked = notebook_spec(path, declared, cell)
            except SpecError as error:
                shown = ", ".join(f"{name}={value!r}" for name, value in cell.items() if name in spec.grid)
                raise SpecError(f"{error} (at {shown or 'the only combination'})") from None
            key = hashlib.sha256(f"{digest} {asked.identity}".encode()).hexdigest()
            cells.append(Cell(asked, repeat, key))
    return spec, cells


def repeat_seed(seed: int, repeat: int) -> int:
    """The seed of a repeat: 52 bits, so that JavaScript and floats hold it.

    >>> repeat_seed(0, 0) == repeat_seed(0, 0) != repeat_seed(0, 1)
    True
    """
    return int(
        np.random.SeedSequence(seed, spawn_key=(repeat,)).generate_state(1, np.uint64)[0] >> np.uint64(12)
    )


def find_done(home: Path, keys: set[str]) -> dict[str, Path]:
    """Folder by key of what earlier sweeps have done, or others are doing now."""
    sweeping, done, doing = set(), {}, []
    for folder, facts in read_manifests(home):
        about = facts.get("sweep") or {}
        if facts["status"] == "running" and "cell" not in about:
            sweeping.add(folder.name)
        elif about.get("cell") in keys and facts["status"] == "done":
            done[about["cell"]] = folder
        elif about.get("cell") in keys and facts["status"] == "running":
            doing.append((about["cell"], about.get("name"), folder))
    # One on another machine reads as running for ever: it is not, once its sweep is over.
    return {cell: folder for cell, name, folder in doing if name in sweeping} | done


def _run_cells(
    client: Client,
    run: Run,
    path: Path,
    cells: Sequence[Cell],
    folders: dict[str, Path],
    stop: Callable[[], bool] | None,
    bar: tqdm,
) -> None:
    """Run the cells, and put the folder of each among the folders as it ends."""
    from distributed import wait

    futures: dict[Future, Cell] = {}
    failed = 0
    try:
        for cell in cells:
            task = client.submit(run_cell, str(path), cell, str(run.path), os.getcwd(), pure=False)
            futures[task] = cell
        while futures:
            if stop is not None and stop():
                raise KeyboardInterrupt("The sweep was stopped.")
            try:
                ended = wait(list(futures), timeout=0.5, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                if sys.stderr.isatty():
                    bar.refresh()  # the time left goes on
                continue
            for future in ended:
                cell = futures.pop(future)
                status = "failed"
                if future.status == "finished":
                    folder, status = future.result()
                    folders[cell.key] = Path(folder)
                elif future.status == "cancelled":
                    raise BackendUnavailable("The cluster went away; --resume runs what is missing.")
                elif isinstance(
                    future.exception(), QtxError
                ):  # no room for a run: nothing else will go better
                    raise future.exception()
                else:
                    tqdm.write(f"A notebook was lost: {future.exception()}", file=sys.stderr)
                failed += status != "done"
                bar.set_postfix(failed=failed, refresh=False)
                bar.update()
    except BaseException as error:
        with suppress(QtxError):
            _end(run, error)  # notebooks in flight see that, and stop; those that wait do not begin
        with suppress(TimeoutError):
            wait(list(futures), timeout=PATIENCE)
        client.cancel(list(futures))
        raise


def run_cell(path: str, cell: Cell, sweep_folder: str, folder: str) -> tuple[str, str]:
    """Run one notebook of a sweep in this process, with `folder` as its working directory; its run's folder and status."""
    sweep_run, file = Run(Path(sweep_folder)), Path(path)

    def over() -> bool:
        try:
            return sweep_run.status != "running"
        except StorageError:  # the folder is gone
            return True

    with _TURN, chdir(folder):
        if over():
            raise RunFailed(f"{sweep_run.path.name} is over.")
        name = f"{run_name(file)}-{cell.key[:8]}"
        for other in sweep_run.path.parent.glob(f"*-{name}-*"):  # whose worker died before it could say so
            with suppress(StorageError):
                facts = Run(other).manifest
                if facts["status"] == "done" and facts.get("sweep", {}).get("name") == sweep_run.path.name:
                    return str(other), "done"
        about = {"name": sweep_run.path.name, "cell": cell.key, "repeat": cell.repeat}
        run = Run.create(cell.spec, name, sweep_run.path.parent, sweep=about)
        with suppress(QtxError, KeyboardInterrupt):  # the run tells
            execute(run, file, cell.spec, progress=False, stop=over, threads=1)
        return str(run.path), run.status


def _end(run: Run, error: BaseException) -> None:
    """Mark a sweep that was broken off, once."""
    if run.status == "running":
        interrupted = isinstance(error, KeyboardInterrupt)
        run.finish("interrupted" if interrupted else "failed", None if interrupted else str(error))


def _interrupted(run: Run) -> dict[str, Path]:
    """Mark the notebooks of a sweep that were in flight and are gone; their folders by key."""
    found = {}
    for folder, facts in read_manifests(run.path.parent):
        about = facts.get("sweep") or {}
        if about.get("name") == run.path.name and facts["status"] == "interrupted":
            found[str(about.get("cell"))] = folder
            if "finished" not in facts:
                Run(folder).finish("interrupted")
    return found


def _gather(
    run: Run, spec: SweepSpec, cells: Sequence[Cell], folders: Mapping[str, Path], measure: str | None
) -> str | None:
    """Write the table of all notebooks, the figure and the summary into the sweep's run; what is not done, if anything."""
    found: list[tuple[Path, Mapping[str, Any]]] = []
    for cell in cells:
        with suppress(KeyError, StorageError):
            found.append((folders[cell.key], Run(folders[cell.key]).manifest))
            continue
        parameters = {"kind": type(cell.spec).__name__, "fields": cell.spec.to_parameters()}
        found.append(
            (Path(), {"name": run_name(Path(spec.notebook)), "status": "missing", "spec": parameters})
        )
    table = run_table(found)
    started = table["started"].dt.strftime("%Y-%m-%dT%H:%M:%SZ")  # text: every reader of parquet knows it
    kept = table.drop(columns=["spec", "kind"]).assign(started=started).dropna(axis=1, how="all")
    write_frame(run.path / "metrics.parquet", kept)
    statuses = table["status"].value_counts()
    counts = ", ".join(f"{count} {status}" for status, count in statuses.items())
    summary = [f"{len(cells)} notebooks: {counts}."]
    summary += [f"{row.run}: {row.error}" for row in table[table["status"] == "failed"].itertuples()][:20]
    done = table[table["status"] == "done"]
    numbers = [
        f"results.{name}"
        for _, facts in found
        if facts["status"] == "done"
        for name, value in (facts.get("results") or {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    rows: list[dict[str, Any]] = []
    if measure is not None or numbers:
        y = measure or numbers[0].removeprefix("results.")
        try:
            rows = _figure(run, spec, done, y, len(cells))
        except ArgumentError as error:  # no such measure, or no notebook that is done has it
            summary.append(str(error))
    run.update(results={**dict(statuses), "summary": summary, "table": rows})
    rest = ", ".join(f"{count} {status}" for status, count in statuses.items() if status != "done")
    return f"Of {len(cells)} notebooks not all are done: {rest}." if rest else None


def _figure(run: Run, spec: SweepSpec, done: RunTable, y: str, total: int) -> list[dict[str, Any]]:
    """Draw what the notebooks measured against the grid; the rows that are drawn."""
    varying = [name for name, values in spec.grid.items() if len(values) > 1]
    numeric = [
        name
        for name in varying
        if all(isinstance(x, int | float) and not isinstance(x, bool) for x in spec.grid[name])
    ]
    x = max(numeric, key=lambda name: len(spec.grid[name]), default=None)
    others = [name for name in varying if name != x]
    by = ", ".join(others) or None
    if len(others) > 1:
        joined = [", ".join(str(row[f"spec.{name}"]) for name in others) for _, row in done.iterrows()]
        done = done.assign(**{str(by): joined})
    data = done.summary(y, x, by)
    run.save_figure(
        "results",
        partial(comparison, y=y, x=x, by=by),
        data,
        caption=f"Means over the {len(done)} of {total} runs of {spec.notebook} that are done, {spec.repeats} of each "
        f"combination; bars: 95 % t-intervals over repeats; seeds derived from {spec.seed}, the same for each combination.",
    )
    found = zip(data.pop("mean"), data.pop("half_width"), strict=True)
    data[y] = [_plus_minus(mean, half_width) for mean, half_width in found]
    return data.rename(columns={"by": by or "", "x": x or ""}).to_dict("records")


def _plus_minus(mean: float, half_width: float) -> str:
    """With as many digits as the 95 % interval allows.

    >>> _plus_minus(0.12345, 0.0021)
    '0.1235 ± 0.0021'
    """
    if not half_width > 0:  # of one run there is none
        return f"{mean:.4g}"
    digits = max(0, 1 - math.floor(math.log10(half_width)))
    return f"{mean:.{digits}f} ± {half_width:.{digits}f}"


@contextmanager
def _bar(path: Path, cells: Sequence[Cell], missing: Sequence[Cell], progress: bool) -> Iterator[tqdm]:
    """Progress over all notebooks, those of earlier sweeps already done."""
    start = len(cells) - len(missing)
    with tqdm(
        total=len(cells), initial=start, desc=f"sweep {path.stem}", unit="notebook", disable=not progress
    ) as bar:
        yield bar


@contextmanager
def _client(workers: int | None, cluster: ClusterSpec | Cluster | str | Client | None) -> Iterator[Client]:
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
    """For workers that share the terminal: the sweep hears Ctrl-C, and ends them in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _command(notebook: str | Path, spec: SweepSpec) -> str:
    """What to type to run this again."""
    words = ["qtx-lab", "sweep", str(notebook)]
    for name, values in spec.grid.items():
        words += ["-g", f"{name}={','.join(map(as_word, values))}"]
    for name, value in spec.parameters.items():
        words += ["-p", name, as_word(value)]
    return shlex.join([*words, "--repeats", str(spec.repeats), "--seed", str(spec.seed)])


__all__ = ["Cell", "find_done", "plan", "repeat_seed", "run_cell", "sweep"]
