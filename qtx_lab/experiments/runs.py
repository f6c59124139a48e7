"""The run folder: what was asked, what was measured, how it ended; one folder a run, and nothing else."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..errors import ArgumentError, StorageError
from ..storage import (
    append_rows,
    json_bytes,
    read_frame,
    runs_home,
    storage_error,
    sync_folder,
    write_atomic,
    write_frame,
)
from . import provenance

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Image
    from matplotlib.figure import Figure

    from ..backends import QiskitQuantumBackend
    from ..specs import Spec
    from .listing import RunTable

STATUSES = ("running", "done", "failed", "interrupted")
FREE_BYTES = 64 << 20
"""Free space below which no run is started: a demo run with its figures takes about a tenth of it."""
THEMES = ("light", "dark")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


class Run:
    """A run folder. The object holds no state but the path: every call reads and writes the files.

    As a context manager it ends the run: `done`, `failed` on an exception, `interrupted` on Ctrl-C.
    Calls from several threads of one process take turns; a run has one writing process at a time.

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
        self._turn = threading.RLock()

    @classmethod
    def create(cls, spec: Spec, name: str, home: str | Path | None = None, **facts: Any) -> Self:
        """Start a run in a new folder `<UTC stamp>-<name>-<random>` of `home`.

        Parameters
        ----------
        spec : Spec
            What is asked; kept as `spec.yaml`, its hash in the manifest.
        name : str
            Letters, digits, '.', '_' and '-', at most 80.
        home : path, optional
            See `runs_home`. Made if missing.
        **facts
            Merged into the manifest from the start, as `update` would.

        Raises
        ------
        ArgumentError
            If the name cannot be part of a folder's name.
        StorageError
            If home cannot be written or has less than 64 MiB free. Nothing is left behind.
        """
        _check_name("name", name)
        home = _ready(runs_home(home))
        started = datetime.now(UTC)
        parameters = spec.to_parameters()
        manifest = {
            "status": "running",
            "name": name,
            # The fields are those of spec.yaml, here so that a listing reads one file a run.
            "spec": {"kind": type(spec).__name__, "identity": spec.identity, "fields": parameters},
            "seed": _seed({**parameters.get("parameters", {}), **parameters}),
            "started": started.isoformat(timespec="milliseconds"),
            "versions": provenance.versions(),
            "machine": provenance.machine(),
            "git": provenance.commit(),
            "process": provenance.this_process(),
            "results": {},
        }
        manifest = _merged({k: v for k, v in manifest.items() if v is not None}, facts)  # no git, no seed
        path = home / f"{started:%Y%m%dT%H%M%SZ}-{name}-{secrets.token_hex(3)}"
        # Filled under a hidden name: a folder that can be seen has its spec and manifest.
        hidden = home / f".{path.name}.tmp"
        try:
            hidden.mkdir()
            (hidden / "figures").mkdir()
            write_atomic(hidden / "spec.yaml", spec.to_yaml().encode())
            write_atomic(hidden / "manifest.json", json_bytes(manifest))
            hidden.rename(path)
            sync_folder(home)
        except BaseException as error:
            shutil.rmtree(hidden, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise storage_error(path, error) from error
            raise
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The run in an existing folder.

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
        """What `manifest.json` says, but `interrupted` for a run whose process is gone."""
        manifest = self._stored()
        if manifest["status"] == "running" and provenance.is_gone(manifest.get("process") or {}):
            manifest["status"] = "interrupted"
        return manifest

    @property
    def status(self) -> str:
        """running, done, failed or interrupted."""
        return str(self.manifest["status"])

    def update(self, **facts: Any) -> None:
        """Merge facts into the manifest, mappings key by key.

        `results` is for headline numbers; in it, `summary` (a list of sentences) and `table` (a list of
        rows) are shown at the top of the report.

        Raises
        ------
        ArgumentError
            If the manifest would no longer be one.
        StorageError
            If the manifest cannot be read or written.
        """
        with self._turn:
            merged = _merged(self._stored(), facts)
            reason = _invalid(json.loads(json_bytes(merged)))
            if reason:
                raise ArgumentError(f"The run cannot be updated: {reason} would not be readable.")
            write_atomic(self.path / "manifest.json", json_bytes(merged))

    def used(self, backend: QiskitQuantumBackend) -> None:
        """Record a device: its name, and when it was calibrated (None where that is not known, as of a simulator).

        Raises
        ------
        StorageError
            If the manifest cannot be read or written.
        """
        self.update(devices={backend.engine.name: backend.engine.facts().get("calibration")})

    def log(self, **row: object) -> None:
        """Append one row to the metrics. The file is rewritten at each call: use `log_many` for many rows.

        Raises
        ------
        ArgumentError
            If a value is no scalar, or a column would mix kinds of values.
        StorageError
            If the file cannot be written.
        """
        self.log_many([row])

    def log_many(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append rows to the metrics, one observation each; new keys become new columns (see `log`)."""
        with self._turn:
            append_rows(self.path / "metrics.parquet", rows)

    def metrics(self) -> pd.DataFrame:
        """The metrics logged so far; empty where there are none."""
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
    ) -> Image:
        """Draw a figure in both themes and keep it with its data and caption.

        Parameters
        ----------
        name : str
            Name of the files: `<name>.png`, `.svg`, `-dark.png`, `.parquet` and `.json` in `figures/`.
            A name saved before keeps its place in the report.
        draw : callable
            `draw(data, theme)` with theme "light" or "dark" gives a matplotlib figure.
        data : DataFrame
            All that is drawn.
        caption, title : str
            Shown with the figure in the report.

        Returns
        -------
        IPython.display.Image
            The light picture: as the last expression of a cell it is shown, and kept in the saved notebook.

        Raises
        ------
        ArgumentError, StorageError
            If the name is not usable, if a file cannot be written.
        """
        import matplotlib as mpl
        import matplotlib.pyplot as plt
        from IPython.display import Image

        _check_name("name", name)
        folder = self.path / "figures"
        figures: dict[str, Figure] = {}
        pictures: dict[str, bytes] = {}
        with self._turn, mpl.rc_context({"svg.hashsalt": name}):
            write_frame(folder / f"{name}.parquet", data)
            for theme, suffix in zip(THEMES, ("", "-dark"), strict=True):
                figures[theme] = draw(data, theme)
                plt.close(figures[theme])
                pictures[theme] = _rendered(figures[theme], "png")
                write_atomic(folder / f"{name}{suffix}.png", pictures[theme])
            write_atomic(folder / f"{name}.svg", _rendered(figures["light"], "svg"))
            facts = {
                "name": name,
                "title": title,
                "caption": caption,
                "rows": len(data),
                "order": self._place(name),
            }
            write_atomic(folder / f"{name}.json", json_bytes(facts))
        return Image(pictures["light"], retina=True, alt=caption)

    def figures(self) -> list[dict[str, Any]]:
        """Name, title, caption, rows and order of each figure, in the order in which they were saved."""
        found = []
        for path in (self.path / "figures").glob("*.json"):
            with suppress(OSError, ValueError):  # a broken one costs only itself
                facts = json.loads(path.read_text(encoding="utf-8"))
                if (
                    isinstance(facts, dict)
                    and facts.get("name") == path.stem
                    and isinstance(facts.get("order"), int)
                ):
                    found.append(facts)
        return sorted(found, key=lambda facts: facts["order"])

    def finish(self, status: str, error: str | None = None) -> None:
        """Say how the run ended: `done`, `failed` or `interrupted`, with an error's text.

        Raises
        ------
        ArgumentError, StorageError
            If the status is another, if the manifest cannot be written.
        """
        if status not in STATUSES[1:]:
            raise ArgumentError(
                f"status={status!r} is not allowed: it must be one of {', '.join(STATUSES[1:])}."
            )
        finished = datetime.now(UTC)
        with self._turn:
            seconds = finished.timestamp() - datetime.fromisoformat(self._stored()["started"]).timestamp()
            end = {"status": status, "finished": finished.isoformat(timespec="milliseconds")}
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
        try:
            self.finish(status, None if status == "interrupted" else last_line)
        except StorageError as second:  # the first error is the one to hear about
            error.add_note(f"The run could not be marked as {status}: {second}")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _stored(self) -> dict[str, Any]:
        path = self.path / "manifest.json"
        try:
            content = path.read_bytes()
            manifest = json.loads(content)
            if rb"\ud" in content.lower():  # half a pair of UTF-16 is a text that no file can hold
                json.dumps(manifest, ensure_ascii=False).encode()
        except OSError as error:
            raise StorageError(
                f"{self.path} is not a run: {path.name}: {error.strerror or error}."
            ) from error
        except (ValueError, RecursionError) as error:
            raise StorageError(
                f"{self.path} is not a readable run: manifest.json is not valid JSON."
            ) from error
        reason = _invalid(manifest)
        if reason:
            raise StorageError(f"{self.path} is not a readable run: {reason}.")
        return dict(manifest)

    def _place(self, name: str) -> int:
        places = {facts["name"]: facts["order"] for facts in self.figures()}
        return places.get(name, max(places.values(), default=-1) + 1)


def runs(home: str | Path | None = None, *, where: str | None = None) -> RunTable:
    """All runs in a folder, newest first, as a DataFrame that also compares them (`RunTable.compare`).

    Columns: run, name, status, started, seconds, seed, spec (its hash), kind, sweep, error, path; then each field of
    the specs as `spec.NAME`, and each number, text or truth value in the results as `results.NAME`.
    `attrs["skipped"]` lists (folder name, reason) of what is not a readable run. Each manifest is read by
    itself, so that one that is broken, vanishes or may not be read costs only itself.

    Parameters
    ----------
    home : path, optional
        See `runs_home`.
    where : str, optional
        A condition in SQL, as "status = 'done' and results.coverage > 0.9"; see `RunTable.select`.

    Raises
    ------
    ArgumentError
        If the condition is not one.
    StorageError
        If the folder itself exists but cannot be listed.
    """
    from .listing import run_table

    skipped: list[tuple[str, str]] = []
    table = run_table(read_manifests(home, skipped))
    table.attrs["skipped"] = skipped
    return table if where is None else table.select(where)


def read_manifests(
    home: str | Path | None = None, skipped: list[tuple[str, str]] | None = None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, manifest) of each run in a folder; (folder name, reason) of what is not a readable run goes to `skipped`."""
    # Python reads 10,000 manifests in a third of the time of DuckDB's read_blob; its read_json cannot skip broken ones.
    for folder in _folders(runs_home(home)):
        try:
            manifest = Run(folder).manifest
        except StorageError as error:
            if skipped is not None:
                skipped.append((folder.name, str(error).removeprefix(f"{folder} is ")))
        else:
            yield folder, manifest


def find_run(run: str | Path, home: str | Path | None = None) -> Run:
    """The run at a path, or the one in `home` with that folder name or a part of it.

    Raises
    ------
    ArgumentError
        If no run, or more than one, is meant.
    StorageError
        If its manifest cannot be read.
    """
    if os.path.isdir(run):  # False also for a name that no file can have
        return Run.open(run)
    home, text = runs_home(home), str(run)
    names = [folder.name for folder in _folders(home)]
    meant = [name for name in names if text and text in name]
    if text in names:
        meant = [text]
    if len(meant) != 1:
        what = f"is none of the {len(names)} runs" if not meant else f"could be {len(meant)} runs"
        raise ArgumentError(f"run={text!r} {what} in {home}; `qtx-lab runs` lists them.")
    return Run.open(home / meant[0])


def _folders(home: Path) -> list[Path]:
    try:
        # `jobs` holds the device jobs of no run.
        return [home / name for name in sorted(os.listdir(home)) if name[0] != "." and name != "jobs"]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"Cannot list runs in {home}: {error.strerror or error}.") from error


def _ready(home: Path) -> Path:
    """The home, made if missing, writable and with room; else StorageError."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(home).free
        if not os.access(home, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write in this folder")
    except OSError as error:
        raise storage_error(home, error) from error
    if free < FREE_BYTES:
        raise StorageError(
            f"Cannot start a run in {home}: {free / 2**20:.0f} MiB free, a run needs {FREE_BYTES >> 20} MiB; "
            "free some space, or choose another folder with --home or QTX_LAB_HOME."
        )
    return home


def _check_name(argument: str, given: str) -> None:
    if not NAME.fullmatch(given):
        raise ArgumentError(
            f"{argument}={given!r} is not allowed: it must be up to 80 letters, digits, '.', '_' and '-', "
            "and begin with a letter or digit."
        )


def _invalid(manifest: object) -> str | None:
    """Why this is no manifest of ours; None where it is one."""
    if not isinstance(manifest, dict):
        return "manifest.json holds no object"
    if manifest.get("status") not in STATUSES:
        return f"manifest.json has the status {manifest.get('status')!r}"
    try:
        if datetime.fromisoformat(manifest["started"]).tzinfo is None:
            return "manifest.json has a start without a time zone"
    except (KeyError, TypeError, ValueError):
        return "manifest.json has no start"
    if not isinstance(manifest.get("name"), str):
        return "manifest.json has no name"
    parts = ("spec", "process", "results", "versions", "machine", "git", "devices", "sweep")
    kinds: dict[str, Any] = dict.fromkeys(parts, dict)
    kinds |= {"seconds": int | float, "seed": int}
    wrong = [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind | None)]
    if not wrong and not 0 <= (manifest.get("seed") or 0) < 2**63:
        wrong = ["seed"]
    if not wrong and not 0 <= (manifest.get("seconds") or 0) < 1e15:
        wrong = ["seconds"]
    return f"manifest.json has {wrong[0]}={manifest[wrong[0]]!r}" if wrong else None


def _seed(parameters: Mapping[str, Any]) -> int | None:
    seed = parameters.get("seed")
    return seed if isinstance(seed, int) and 0 <= seed < 2**63 else None


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _rendered(figure: Figure, kind: str) -> bytes:
    content = BytesIO()
    # Without dates and versions, so that equal figures are equal files.
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    figure.savefig(content, format=kind, dpi=144, metadata=metadata, facecolor=figure.get_facecolor())
    return content.getvalue()
