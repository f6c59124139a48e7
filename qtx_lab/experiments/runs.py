"""Runs: folders that hold a spec, what was measured, figures, and how it ended."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ..checks import check_flags
from ..errors import ArgumentError, StorageError
from ..storage import (
    append_rows,
    folder_lock,
    json_bytes,
    read_frame,
    runs_home,
    storage_error,
    sync_folder,
    write_atomic,
    write_frame,
)
from . import provenance
from .manifest import MANIFEST, STATUSES, creation_order, manifest_problem, merge, read_manifest
from .saved_figure import SavedFigure, rendered, with_palette

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ..backends import QiskitQuantumBackend
    from ..specs import Spec
    from .listing import RunTable

MIN_FREE_BYTES = 64 << 20
"""Free space that a run needs to start. A run of the demo with its figures takes about a tenth of it."""

REQUIREMENTS = "requirements.txt"
"""The file of a run that holds all distributions that were installed, as pip reads them."""

PATCH = "code.patch"
"""The file of a run that holds what its package's code had that its commit has not."""

SEQUENCE = ".sequence"
"""The file of a folder of runs that holds the sequence number of the run that was created last."""

THEMES = ("light", "dark")
"""The themes in which figures are drawn."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
"""What the name of a run or of a figure may be."""


class ListedRun(NamedTuple):
    """A run folder and what its manifest says."""

    folder: Path
    manifest: dict[str, Any]


class SkippedFolder(NamedTuple):
    """The name of a folder that is not a readable run, and why."""

    folder: str
    reason: str


class Run:
    """A run folder. The object holds only the path: every call reads and writes the files.

    As a context manager it ends the run: as `done`, as `failed` on an exception, as `interrupted` on Ctrl-C.
    Several threads may use it at once, and so may a process and those that it started, such as the kernel of
    a notebook. While a run is `running`, every other process that writes to it is refused.

    Parameters
    ----------
    path : path
        The folder, which is not checked; see `Run.open` and `Run.create`.

    Examples
    --------
    >>> import tempfile
    >>> from qtx_lab import ExperimentSpec, Run
    >>> with tempfile.TemporaryDirectory() as home:
    ...     with Run.create(ExperimentSpec(seed=7), "trial", home) as run:
    ...         run.log(sampler="systematic", draws=64, error=0.01)
    ...     run.status, run.manifest["seed"], len(run.metrics())
    ('done', 7, 1)
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.RLock()
        self._is_locked = self._is_ours = False

    @classmethod
    def create(cls, spec: Spec, name: str, home: str | Path | None = None, **facts: Any) -> Self:
        """Start a run in a new folder `<UTC stamp>-<name>-<random>` of `home`.

        Parameters
        ----------
        spec : Spec
            What is to be done. It is written to `spec.yaml`, and its hash to the manifest.
        name : str
            At most 80 letters, digits, '.', '_' and '-'.
        home : path, optional
            Folder of runs; see `runs_home`. It is created if it does not exist.
        **facts
            Further entries of the manifest, merged into it as by `update`.

        Returns
        -------
        Run
            The run, `running`.

        Raises
        ------
        ArgumentError
            If the name cannot be part of a folder's name, or a text is not valid Unicode.
        StorageError
            If home cannot be written or has less than 64 MiB free. Nothing is left behind then.
        """
        _check_name("name", name)
        home = _prepared(runs_home(home))
        started = datetime.now(UTC)
        first = _first_manifest(spec, name, started)
        path = home / f"{started:%Y%m%dT%H%M%SZ}-{name}-{secrets.token_hex(3)}"
        # Filled under a hidden name, so that every folder that can be seen has its spec and manifest.
        hidden = home / f".{path.name}.tmp"
        try:
            hidden.mkdir()
            (hidden / "figures").mkdir()
            write_atomic(hidden / "spec.yaml", spec.to_yaml().encode())
            write_atomic(hidden / REQUIREMENTS, provenance.requirements())
            patch = provenance.uncommitted() if first.get("git", {}).get("dirty") else None
            if patch is not None:
                write_atomic(hidden / PATCH, patch)
            manifest = merge(first, facts)
            json_bytes(manifest)  # refuses what is not Unicode before anything is left in home
            manifest.setdefault("sequence", _next_sequence(home, first))
            write_atomic(hidden / MANIFEST, json_bytes(manifest))
            hidden.rename(path)
            sync_folder(home)
        except BaseException as error:
            shutil.rmtree(hidden, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise storage_error(path, error) from error
            if isinstance(error, UnicodeEncodeError):  # as bytes on a command line that are not UTF-8
                raise _not_unicode(error) from None
            raise
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The run in an existing folder.

        Parameters
        ----------
        path : path
            The folder.

        Raises
        ------
        StorageError
            If the folder holds no readable manifest.
        """
        run = cls(Path(path))
        _ = run.manifest
        return run

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of `manifest.json`; its status is `interrupted` if a running run's process is gone."""
        manifest = read_manifest(self.path)
        if manifest["status"] == "running" and provenance.is_gone(manifest.get("process") or {}):
            manifest["status"] = "interrupted"
        return manifest

    @property
    def status(self) -> str:
        """ "running", "done", "failed", "interrupted" or "cancelled"."""
        return str(self.manifest["status"])

    def update(self, **facts: Any) -> None:
        """Merge facts into the manifest, mappings key by key.

        Parameters
        ----------
        **facts
            Entries of the manifest. The most important numbers belong into `results`; in it, `summary` (a
            list of sentences) and `table` (a list of rows) are shown at the top of the report.

        Raises
        ------
        ArgumentError
            If the manifest would not be valid any more.
        StorageError
            If the manifest cannot be read or written.
        """
        with self._writing():
            merged = merge(read_manifest(self.path), facts)
            try:
                problem = manifest_problem(json.loads(json_bytes(merged)))
            except UnicodeEncodeError as error:
                raise _not_unicode(error) from None
            if problem:
                raise ArgumentError(f"The run cannot be updated: {problem} would not be readable.")
            write_atomic(self.path / MANIFEST, json_bytes(merged))

    def declare(
        self,
        name: str,
        *,
        unit: str = "",
        half_width: str | None = None,
        timing: bool = False,
        main: bool = False,
    ) -> None:
        """Say what a number in the metrics or results means to those who compare runs.

        Parameters
        ----------
        name : str
            The number's column in the metrics, or its name in the results.
        unit : str
            Its unit, as "bits".
        half_width : str, optional
            The column or result that is half of its 95 % interval.
        timing : bool
            Whether it is a time or a speed, which another run is not expected to repeat.
        main : bool
            Whether it is what the run is about, which a sweep's figure then shows.

        Raises
        ------
        StorageError
            If the manifest cannot be read or written.
        """
        check_flags(timing=timing, main=main)
        facts = {"unit": unit, "half_width": half_width, "timing": timing, "main": main}
        self.update(measures={name: facts})

    def used(self, backend: QiskitQuantumBackend) -> None:
        """Record a device's name and the time of its calibration, or None if that is not known.

        Parameters
        ----------
        backend : QiskitQuantumBackend
            The backend whose device was used.

        Raises
        ------
        StorageError
            If the manifest cannot be read or written.
        """
        self.update(devices={backend.engine.name: backend.engine.facts().get("calibration")})

    def log(self, **row: object) -> None:
        """Append one row to the metrics. Each call writes the whole file: use `log_many` for many rows.

        Parameters
        ----------
        **row
            A number, text, truth value or None for each column.

        Raises
        ------
        ArgumentError
            If a value is not a scalar, or a column would mix types of values.
        StorageError
            If the file cannot be written.
        """
        self.log_many([row])

    def log_many(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append rows to the metrics, one observation each; new keys become new columns.

        Parameters
        ----------
        rows : iterable of mappings
            Values by column; see `log`, also for the errors.
        """
        with self._writing():
            append_rows(self.path / "metrics.parquet", rows)

    def metrics(self) -> pd.DataFrame:
        """The metrics logged so far, as a DataFrame; empty if there are none."""
        import pandas as pd

        path = self.path / "metrics.parquet"
        return read_frame(path) if path.exists() else pd.DataFrame()

    def save_figure(
        self,
        name: str,
        draw: Callable[[pd.DataFrame, str], Figure],
        data: pd.DataFrame,
        caption: str,
        title: str | None = None,
        live: str | None = None,
    ) -> SavedFigure:
        """Draw a figure in both themes and save it with its data and caption.

        Parameters
        ----------
        name : str
            Name of the files `<name>.png`, `<name>-dark.png`, `<name>.svg`, `<name>.parquet` and
            `<name>.json` in `figures/`. If a figure of that name exists, the new one takes its place in the
            report.
        draw : callable
            `draw(data, theme)` returns a matplotlib figure for the theme "light" or "dark".
        data : DataFrame
            Everything that is drawn.
        caption, title : str
            Shown with the figure in the report.
        live : str, optional
            HTML that the report shows in place of the picture where scripts run, such as that of
            `AttentionLens.live_html`. It is trusted, and saved as `<name>.html`.

        Returns
        -------
        SavedFigure
            As the last expression of a cell it is shown in the notebook's theme, with its caption.

        Raises
        ------
        ArgumentError
            If the name cannot be a file's name.
        StorageError
            If a file cannot be written.
        """
        import matplotlib as mpl
        import matplotlib.pyplot as plt

        _check_name("name", name)
        folder = self.path / "figures"
        figures: dict[str, Figure] = {}
        pictures: dict[str, bytes] = {}
        with self._lock, mpl.rc_context({"svg.hashsalt": name}):
            self._check_owner()
            write_frame(folder / f"{name}.parquet", data)
            for theme, suffix in zip(THEMES, ("", "-dark"), strict=True):
                figures[theme] = draw(data, theme)
                plt.close(figures[theme])
                pictures[theme] = rendered(figures[theme], "png")
                write_atomic(folder / f"{name}{suffix}.png", pictures[theme])
            write_atomic(folder / f"{name}.svg", rendered(figures["light"], "svg"))
            page = folder / f"{name}.html"
            if live is None:
                page.unlink(missing_ok=True)
            else:
                write_atomic(page, live.encode(errors="xmlcharrefreplace"))
            facts = {
                "name": name,
                "title": title,
                "caption": caption,
                "rows": len(data),
                "order": self._order(name),
            }
            write_atomic(folder / f"{name}.json", json_bytes(facts))
        return SavedFigure(with_palette(pictures["light"]), with_palette(pictures["dark"]), caption)

    def figures(self) -> list[dict[str, Any]]:
        """The `name`, `title`, `caption`, `rows` and `order` of each figure, in the order of saving."""
        figures = []
        for path in (self.path / "figures").glob("*.json"):
            with suppress(OSError, ValueError):  # a broken file hides only its own figure
                facts = json.loads(path.read_text(encoding="utf-8"))
                if (
                    isinstance(facts, dict)
                    and facts.get("name") == path.stem
                    and isinstance(facts.get("order"), int)
                ):
                    figures.append(facts)
        return sorted(figures, key=lambda facts: facts["order"])

    def finish(self, status: str, error: str | None = None) -> None:
        """Record how the run ended.

        Parameters
        ----------
        status : str
            "done", "failed", "interrupted", or "cancelled" by the person or program that started it.
        error : str, optional
            Text of the error that ended it.

        Raises
        ------
        ArgumentError
            If there is no such status.
        StorageError
            If the manifest cannot be written.
        """
        ended = [name for name in STATUSES if name != "running"]
        if status not in ended:
            raise ArgumentError(f"status={status!r} is not allowed: it must be one of {', '.join(ended)}.")
        finished = datetime.now(UTC)
        with self._writing():
            manifest = read_manifest(self.path)
            seconds = provenance.seconds_since(manifest.get("clock"))
            if seconds is None:  # begun elsewhere, or before a restart: all that is left is the wall's clock
                started = datetime.fromisoformat(manifest["started"])
                seconds = max(0.0, (finished - started).total_seconds())
            end = {"status": status, "finished": finished.isoformat(timespec="milliseconds")}
            # An error may name a file whose name is not Unicode.
            error = error and error.encode(errors="backslashreplace").decode()
            self.update(**end, seconds=round(seconds, 3), **({"error": error} if error else {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish("done")
            return
        last_line = "".join(traceback.format_exception_only(error)).strip()
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        if status == "interrupted":
            error.add_note(f"What was written until then is kept in {self.path}.")
        try:
            self.finish(status, None if status == "interrupted" else last_line)
        except StorageError as second:  # the first error is the one to report
            error.add_note(f"The run could not be marked as {status}: {second}")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Keep everybody else from writing at the same time, and for good if the run is another process's."""
        with self._lock:
            self._check_owner()
            if self._is_locked:
                yield
                return
            with folder_lock(self.path):
                self._is_locked = True
                try:
                    yield
                finally:
                    self._is_locked = False

    def _check_owner(self) -> None:
        """Refuse to write to a run that another process, which did not start this one, is running."""
        if self._is_ours:
            return
        manifest = read_manifest(self.path)
        owner = manifest.get("process") or {}
        is_running = manifest["status"] == "running"
        is_ours = "pid" not in owner or provenance.is_this_process_or_its_parent(owner)
        if is_running and not is_ours and not provenance.is_gone(owner):
            raise StorageError(
                f"Cannot write {self.path}: process {owner['pid']} on {owner.get('hostname')} is writing "
                "this run; wait for its end, or stop it."
            )
        self._is_ours = is_running and is_ours  # it stays so, and need not be asked again

    def _order(self, name: str) -> int:
        """The place of a figure in the report: its own if it has one, else the last."""
        places = {facts["name"]: facts["order"] for facts in self.figures()}
        return places.get(name, max(places.values(), default=-1) + 1)


def runs(home: str | Path | None = None, *, where: str | None = None) -> RunTable:
    """All runs in a folder, newest first, as a DataFrame that can also compare them (`RunTable.compare`).

    The columns are run, name, status, started, seconds, seed, spec (its hash), kind, sweep, error and path;
    then each field of the specs as `spec.NAME`, and each number, text or truth value in the results as
    `results.NAME`. `attrs["skipped"]` lists the (folder name, reason) of what is not a readable run. Each
    manifest is read separately: one that is broken, vanishes or must not be read hides only its own run.
    The newest run is the one that was created last, also where the clock was set back in the meantime.

    Parameters
    ----------
    home : path, optional
        Folder of runs; see `runs_home`.
    where : str, optional
        A condition in SQL, such as "status = 'done' and results.coverage > 0.9"; see `RunTable.select`.

    Returns
    -------
    RunTable
        One row a run.

    Raises
    ------
    ArgumentError
        If the condition is not valid.
    StorageError
        If the folder itself exists but cannot be listed.

    Examples
    --------
    >>> import tempfile
    >>> from qtx_lab import ExperimentSpec
    >>> with tempfile.TemporaryDirectory() as home:
    ...     for seed in (1, 2):
    ...         with Run.create(ExperimentSpec(seed=seed), "trial", home) as run:
    ...             run.update(results={"error": seed / 10})
    ...     runs(home, where="results.error < 0.15")["seed"].tolist()
    [1]
    """
    from .listing import run_table

    skipped: list[SkippedFolder] = []
    table = run_table(read_manifests(home, skipped))
    table.attrs["skipped"] = skipped
    return table if where is None else table.select(where)


def read_manifests(
    home: str | Path | None = None, skipped: list[SkippedFolder] | None = None
) -> Iterator[ListedRun]:
    """Each run in a folder; what is not a readable run is appended to `skipped`."""
    # Python reads 10,000 manifests in a third of the time of DuckDB's read_blob, and DuckDB's read_json
    # cannot skip broken ones.
    for folder in _folders(runs_home(home)):
        try:
            folder.name.encode()
            manifest = Run(folder).manifest
        except UnicodeEncodeError:  # no file that lists it could hold its name
            if skipped is not None:
                name = folder.name.encode(errors="backslashreplace").decode()
                skipped.append(SkippedFolder(name, "its name is not Unicode; rename it"))
        except StorageError as error:
            if skipped is not None:
                skipped.append(SkippedFolder(folder.name, str(error).removeprefix(f"{folder} is ")))
        else:
            yield ListedRun(folder, manifest)


def oldest_first(home: str | Path | None) -> list[ListedRun]:
    """The readable runs of `home` in the order in which they were created, whatever the clock said."""
    return sorted(read_manifests(home), key=lambda run: creation_order(run.manifest))


def find_run(run: str | Path, home: str | Path | None = None) -> Run:
    """The run at a path, or the run in `home` whose folder name is or contains the text.

    Parameters
    ----------
    run : str or path
        A path, or a text.
    home : path, optional
        Folder of runs; see `runs_home`.

    Returns
    -------
    Run

    Raises
    ------
    ArgumentError
        If no run fits, or more than one.
    StorageError
        If its manifest cannot be read.
    """
    if os.path.isdir(expanded := os.path.expanduser(run)):  # unlike Path.is_dir, False for what is no name
        return Run.open(expanded)
    home, text = runs_home(home), str(run)
    names = [folder.name for folder in _folders(home)]
    matches = [text] if text in names else [name for name in names if text and text in name]
    if len(matches) != 1:
        what = f"could be {len(matches)} runs" if matches else f"is none of the {len(names)} runs"
        raise ArgumentError(f"run={text!r} {what} in {home}; `qtx-lab runs` lists them.")
    return Run.open(home / matches[0])


def _folders(home: Path) -> list[Path]:
    """Folders that may be runs, sorted by name."""
    try:
        # The folder `jobs` holds device jobs that belong to no run.
        return [home / name for name in sorted(os.listdir(home)) if name[0] != "." and name != "jobs"]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"Cannot list runs in {home}: {error.strerror or error}.") from error


def _prepared(home: Path) -> Path:
    """Create the home if it does not exist; raise StorageError unless that can be done and it has room."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(home).free
    except OSError as error:
        raise storage_error(home, error) from error
    if free < MIN_FREE_BYTES:
        raise StorageError(
            f"Cannot start a run in {home}: {free / 2**20:.0f} MiB free, a run needs "
            f"{MIN_FREE_BYTES >> 20} MiB; free some space, or choose another folder with --home or "
            "QTX_LAB_HOME."
        )
    return home


def _not_unicode(error: UnicodeEncodeError) -> ArgumentError:
    """The error for a text that no file can hold."""
    given = error.object[error.start : error.end]
    return ArgumentError(f"A text with {given!r} is not allowed: it is not Unicode.")


def _check_name(argument: str, given: str) -> None:
    """Refuse what cannot be part of a file's name."""
    if not NAME.fullmatch(given):
        raise ArgumentError(
            f"{argument}={given!r} is not allowed: it must be up to 80 letters, digits, '.', '_' and '-', "
            "and begin with a letter or digit."
        )


def _first_manifest(spec: Spec, name: str, started: datetime) -> dict[str, Any]:
    """What is known of a run when it starts."""
    parameters = spec.to_parameters()
    manifest = {
        "status": "running",
        "name": name,
        # The fields of spec.yaml again, so that a listing reads one file of each run.
        "spec": {"kind": type(spec).__name__, "identity": spec.identity, "fields": _storable(parameters)},
        "seed": _seed({**parameters.get("parameters", {}), **parameters}),
        "started": started.isoformat(timespec="milliseconds"),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "git": provenance.commit(),
        "code": {"package": provenance.source_hash()},
        "inputs": provenance.input_hashes(parameters),
        "process": provenance.this_process(),
        "clock": provenance.clock(),
        "results": {},
    }
    # Outside of a checkout there is no commit, and some specs have no seed.
    return {key: value for key, value in manifest.items() if value is not None}


def _storable(value: Any) -> Any:
    """A value of a spec with texts in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _storable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_storable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _next_sequence(home: Path, manifest: Mapping[str, Any]) -> int:
    """The milliseconds since 1970, but more than any earlier run of this home has: the clock may step back.

    This is a hybrid logical clock (Kulkarni et al., Logical physical clocks, OPODIS 2014), so that runs that
    were copied from another home are sorted in by the clock.
    """
    with folder_lock(home):
        try:
            last = int((home / SEQUENCE).read_bytes())
        except (OSError, ValueError):  # the first run here since there are sequence numbers
            last = max((creation_order(run.manifest)[0] for run in read_manifests(home)), default=0)
        sequence = max(creation_order(manifest)[0], last + 1)
        with suppress(StorageError):  # in a shared folder it may be another's file
            write_atomic(home / SEQUENCE, str(sequence).encode())
    return sequence


def _seed(parameters: Mapping[str, Any]) -> int | None:
    """The parameter `seed`, if it is one that every reader of the manifest can hold."""
    seed = parameters.get("seed")
    return seed if isinstance(seed, int) and 0 <= seed < 2**63 else None
