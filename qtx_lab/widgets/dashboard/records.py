"""What the dashboard knows of a folder of runs: a fresh listing, and files that are read on request."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from ...errors import QtxError, StorageError
from ...experiments.annotations import Annotations, read_annotations
from ...experiments.listing import COLUMNS, run_table
from ...experiments.runs import SkippedFolder, read_manifests
from ...storage import database, runs_home
from .cells import Cell, read_cells
from .run_files import find_notebook
from .settings import calibrations_of, code_of, declared_half_widths, facets, settings_of

if TYPE_CHECKING:
    import duckdb

RUNNING_POLL_S = 0.5
"""Seconds between two looks at what is running, however many people watch."""

LISTING_POLL_S = 2.0
"""Seconds between two listings of the folder; four times the duration of a listing, if that is longer."""

MAX_CACHED_FILES = 2000
"""Files whose content is cached until they change."""

MAX_RUNS = 200
"""Runs whose metrics are drawn together: the newest of those that pass the filters."""

PARAMETER_COLUMNS = ("sampler", "num_samples", "device", "loader", "shots")
"""Parameters of a run that are used in place of a column that its metrics lack."""


OWN_COLUMNS = ("report", "title", "code", "settings", "calibrations", "half_widths", "tags", "note")
"""Columns of the listing beside those of `qtx_lab.runs`: whether the run has a report; its title; version and
commit of its code; spec and code without the seed, as one text; the times of its devices' calibrations, as
JSON; the names of the half widths that it declares of numbers, as JSON; its tags, as a tuple; its note."""

YAML_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

Skipped = tuple[tuple[str, str], ...]
"""(folder, reason) of what could not be read."""


@dataclass(frozen=True)
class Listing:
    """The folder at one moment."""

    number: int
    """Number of the listing; it grows by one with every change."""
    table: pd.DataFrame
    """The columns of `qtx_lab.runs` and those of `OWN_COLUMNS`."""
    skipped: Skipped
    """Folders that are no readable runs."""
    jobs: pd.DataFrame
    """Columns tag, run, device, state, rows, shots, recorded, and quantum seconds charged or else estimated.
    States are those last known."""
    trouble: str = ""
    """Why the folder cannot be listed; empty if it can."""


@dataclass(frozen=True)
class Rows:
    """Metrics of several runs, one below the other, with the columns `run`, `name` and `facet`.

    Runs of the same facet differ in nothing but the seed and what their own metrics tell apart.
    """

    frame: pd.DataFrame
    skipped: Skipped = ()
    """(run, reason) of metrics that cannot be read."""
    left_out: int = 0
    """How many older runs there are beyond `MAX_RUNS`."""


@dataclass
class Records:
    """A folder of runs, read only. A server has one, so that all who watch share what it reads.

    Parameters
    ----------
    home : path, optional
        See `runs_home`.
    """

    home: Path
    listing: Listing = field(init=False)
    _files: OrderedDict[Path, tuple[tuple[int, int], Any]] = field(default_factory=OrderedDict)
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _reading: threading.Lock = field(default_factory=threading.Lock)
    _database: duckdb.DuckDBPyConnection | None = None

    def __post_init__(self) -> None:
        connection = database()
        connection.execute("SET enable_external_file_cache = false")  # files change while they are watched
        self._database = connection  # stays open, because opening takes longer than reading
        self.home = runs_home(self.home).resolve()
        self.listing = Listing(0, pd.DataFrame(columns=[*COLUMNS, *OWN_COLUMNS]), (), pd.DataFrame())
        self.look()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Renew `listing` in a thread of its own while the block runs; no metrics are read after it."""
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), name="qtx-lab records")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with self._reading:
                self._database = None  # Panel keeps its pages, and DuckDB lists at the end what is open

    def _watch(self, ended: threading.Event) -> None:
        pause = 0.0
        while not ended.wait(pause):
            start = time.monotonic()
            self.look()
            took = time.monotonic() - start
            pause = max(LISTING_POLL_S - took, 4 * took)

    def look(self) -> None:
        """List the folder now; `listing` is replaced if anything differs."""
        try:
            table, skipped = self._runs()
            jobs, trouble = self._jobs(), ""
        except Exception as error:  # whatever a folder holds, the thread that looks goes on
            table, skipped, jobs, trouble = self.listing.table, (), self.listing.jobs, str(error)
        old = self.listing
        same = (
            (skipped, trouble) == (old.skipped, old.trouble)
            and table.equals(old.table)
            and jobs.equals(old.jobs)
        )
        if not same or old.number == 0:
            self.listing = Listing(old.number + 1, table, skipped, jobs, trouble)

    def _runs(self) -> tuple[pd.DataFrame, Skipped]:
        """The runs, newest first, and the folders that are none."""
        skipped: list[SkippedFolder] = []
        listed = list(read_manifests(self.home, skipped))
        table = pd.DataFrame(run_table(listed))
        own = {folder.name: self._own_columns(folder, manifest) for folder, manifest in listed}
        columns = pd.DataFrame(
            [own[run] for run in table["run"]], table.index, [*OWN_COLUMNS], dtype="object"
        )
        return pd.concat([table, columns.astype({"report": bool})], axis=1), tuple(skipped)

    def _own_columns(self, folder: Path, manifest: dict[str, Any]) -> list[Any]:
        try:
            annotations = self.annotations(folder.name)
        except StorageError:  # the run's page says why
            annotations = Annotations()
        code = code_of(manifest)
        return [
            (folder / "report.html").is_file(), str(manifest.get("title") or ""), code,
            settings_of(manifest, code), json.dumps(calibrations_of(manifest)),
            json.dumps(declared_half_widths(manifest)), annotations.tags,
            annotations.note,
        ]  # fmt: skip

    def annotations(self, run: str | Path) -> Annotations:
        """The tags and the note of a run.

        Raises
        ------
        StorageError
            If they cannot be read.
        """
        return read_annotations(self.home / Path(run).name)

    def _jobs(self) -> pd.DataFrame:
        columns = ["tag", "run", "device", "state", "rows", "shots", "recorded", "seconds"]
        if not (self.home / "jobs").is_dir() and not any(self.home.glob("*/jobs")):
            return pd.DataFrame(columns=columns)  # and the room of backends is not loaded
        from ...backends.ibm.budget import billed_job
        from ...backends.ibm.jobs import find_jobs

        rows = []
        with warnings.catch_warnings(action="ignore"):  # files that are no records: `qtx-lab jobs` names them
            for job in find_jobs(self.home):
                with suppress(QtxError):  # gone meanwhile
                    record, folder = job.record, job.path.parent.parent
                    run = "" if folder == self.home else folder.name
                    size = (record.circuits, record.shots)
                    recorded = record.recorded.isoformat()
                    bill = billed_job(record)
                    seconds = bill.charged_seconds + bill.open_seconds
                    rows.append([job.tag, run, record.device, str(record.status), *size, recorded, seconds])
        return pd.DataFrame(rows, columns=columns)

    def metrics(self, run: str | Path) -> pd.DataFrame:
        """The metrics of a run as they are now; empty where there are none.

        Raises
        ------
        StorageError
            If they cannot be read.
        """
        path = self.home / Path(run).name / "metrics.parquet"
        frame = self._cached(path, self._read_frame)
        return pd.DataFrame() if frame is None else frame

    def _read_frame(self, path: Path) -> pd.DataFrame:
        import duckdb

        with self._reading:
            if self._database is None:
                raise StorageError(f"{path} is not read: the dashboard has been stopped.")
            try:
                return self._database.execute("FROM read_parquet(?)", [str(path)]).df()
            except duckdb.Error as error:
                raise StorageError(f"Cannot read {path}: {str(error).splitlines()[0]}") from error

    def mark(self, run: str) -> tuple[int, int] | None:
        """Changes whenever the metrics of a run do."""
        return _mark(self.home / run / "metrics.parquet")

    def cells(self, run: str | Path) -> tuple[Cell, ...] | None:
        """The cells of a run's executed notebook; None where it has none that can be read."""
        path = find_notebook(self.home, Path(run).name)
        return None if path is None else self._cached(path, read_cells)

    def notebook_mark(self, run: str | Path) -> tuple[int, int] | None:
        """Changes whenever the executed notebook of a run does."""
        path = find_notebook(self.home, Path(run).name)
        return None if path is None else _mark(path)

    def parameters(self, run: str | Path) -> dict[str, Any]:
        """The fields of a run's spec, or the parameters of its notebook."""
        content = self._cached(self.home / Path(run).name / "spec.yaml", _read_yaml)
        content = content if isinstance(content, Mapping) else {}
        parameters = content.get("parameters")
        return dict(parameters) if isinstance(parameters, Mapping) else dict(content)

    def rows(self, table: pd.DataFrame, *needed: str) -> Rows:
        """Metrics of the runs of a table that have all columns `needed`, where they have values.

        A column that a run's metrics lack is filled from its parameters; see `PARAMETER_COLUMNS`.
        """
        frames, skipped = [], []
        for run, name in table[["run", "name"]].head(MAX_RUNS).itertuples(index=False):
            try:
                frame = self.metrics(run)
            except QtxError as error:
                skipped.append((run, str(error)))
                continue
            if frame.empty:
                continue
            parameters = self.parameters(run)
            lacking = {
                key: parameters[key]
                for key in PARAMETER_COLUMNS
                if key not in frame and isinstance(parameters.get(key), str | int | float)
            }
            frame = frame.assign(run=run, name=name, **lacking)
            if set(needed) <= set(frame.columns):
                frame = frame.dropna(subset=list(needed))
                if len(frame):
                    frames.append(frame)
        empty = pd.DataFrame(columns=[*needed, "run", "facet"])
        together = pd.concat(frames, ignore_index=True) if frames else empty
        if frames:
            together["facet"] = together["run"].map(facets(table, together, PARAMETER_COLUMNS))
        return Rows(together, tuple(skipped), max(0, len(table) - MAX_RUNS))

    def _cached(self, path: Path, read: Any) -> Any:
        """The content of a file, read again only if the file has changed; None where there is no file."""
        mark = _mark(path)
        if mark is None:
            return None
        with self._turn:
            known = self._files.get(path)
        if known is not None and known[0] == mark:
            content = known[1]
        else:
            try:
                content = read(path)
            except QtxError as error:
                content = error
            with self._turn:
                self._files[path] = (mark, content)
                self._files.move_to_end(path)
                while len(self._files) > MAX_CACHED_FILES:
                    self._files.popitem(last=False)
        if isinstance(content, QtxError):
            raise content
        return content


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        now = path.stat()
    except OSError:
        return None
    return now.st_mtime_ns, now.st_size


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), YAML_LOADER)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
