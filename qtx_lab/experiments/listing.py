"""`RunTable`: runs as a DataFrame that filters by SQL, collects metrics and draws comparisons."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from ..errors import ArgumentError, StorageError, unknown_name
from ..storage import database, parquet_bytes, read_frame

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "run",
    "name",
    "status",
    "started",
    "seconds",
    "seed",
    "spec",
    "kind",
    "sweep",
    "error",
    "path",
)
"""What every listing has."""


class RunTable(pd.DataFrame):
    """A DataFrame of runs, one a row; see `qtx_lab.runs`. What pandas makes of it by filtering is one too.

    Examples
    --------
    >>> import tempfile
    >>> from qtx_lab import ExperimentSpec, Run
    >>> from qtx_lab.experiments.runs import runs
    >>> with tempfile.TemporaryDirectory() as home:
    ...     for seed in (1, 2):
    ...         with Run.create(ExperimentSpec(seed=seed), "trial", home) as run:
    ...             run.update(results={"error": seed / 10})
    ...     runs(home, where="results.error > 0.1")["seed"].tolist()
    [2]
    """

    @property
    def _constructor(self) -> type[RunTable]:
        return RunTable

    def select(self, where: str) -> RunTable:
        """The runs for which a condition in SQL (DuckDB's) holds.

        Columns go by their names. `spec.NAME` and `results.NAME` may be shortened to NAME where only one column has it.

        Raises
        ------
        ArgumentError
            If the condition is not one, with what DuckDB says.
        """
        import duckdb

        parts: dict[str, dict[str, str]] = {"runs": {}, "spec": {}, "results": {}}
        for column in self.columns:
            if (
                column == "seed" and "spec.seed" in self.columns
            ):  # the same, and plain `seed` would mean either
                continue
            part, dot, name = str(column).partition(".")
            known = dot and part in ("spec", "results")
            parts[part if known else "runs"][name if known else str(column)] = column
        with database() as connection:
            tables = []
            for part, names in parts.items():
                if names:
                    frame = pd.DataFrame({name: self[column] for name, column in names.items()})
                    if part == "runs":
                        frame["row"] = np.arange(len(self))
                    connection.register(part, frame)
                    tables.append(part)
            query = f"SELECT runs.row FROM {' POSITIONAL JOIN '.join(tables)} WHERE ({where}\n)"
            try:
                statements = connection.extract_statements(query)
                if len(statements) != 1:
                    raise ArgumentError(f"where={where!r} is not allowed: it must be one condition.")
                rows = connection.execute(query).fetchnumpy()["row"]
            except duckdb.Error as error:
                said = str(error).splitlines()[0]
                if isinstance(error, duckdb.BinderException):
                    said += f". There are {', '.join(map(str, self.columns))}."
                raise ArgumentError(f"where={where!r} is not a condition on the runs: {said}") from None
        kept = self.iloc[np.sort(np.asarray(rows))]
        return kept.reset_index(drop=True)

    def export(self, kind: str) -> bytes:
        """All columns as the content of a file, of kind "csv" or "parquet"."""
        if kind not in ("csv", "parquet"):
            raise unknown_name("kind", kind, ("csv", "parquet"))
        if kind == "csv":
            return self.to_csv(index=False).encode()
        with database() as connection:
            connection.register("frame", pd.DataFrame(self))
            return parquet_bytes(connection, "FROM frame")

    def metrics(self) -> pd.DataFrame:
        """The metrics of all these runs, each row with its `run` and the run's other columns.

        A column that metrics and runs both have is the metrics'. `attrs["skipped"]` lists (run, reason) of metrics that
        cannot be read.
        """
        parts, skipped = [], []
        for place, (run, path) in enumerate(zip(self["run"], self["path"], strict=True)):
            file = Path(path) / "metrics.parquet"
            if not file.exists():
                continue
            try:
                part = read_frame(file)
            except StorageError as error:
                skipped.append((run, str(error)))
                continue
            parts.append(part.assign(**{"": place}))
        if parts:
            rows = pd.concat(parts, ignore_index=True)
            place = rows.pop("").to_numpy()
            about = pd.DataFrame(self).drop(columns=list(rows.columns), errors="ignore")
            joined = pd.concat([about.iloc[place].reset_index(drop=True), rows], axis=1)
        else:
            joined = pd.DataFrame(self).iloc[:0].copy()
        joined.attrs["skipped"] = skipped
        return joined

    def summary(self, y: str, x: str | None = None, by: str | None = None) -> pd.DataFrame:
        """Mean of `y` over runs that are alike in `x` and `by`, with its 95 % interval.

        Parameters
        ----------
        y : str
            A number: a column, or its NAME in the results, or else a column of the runs' metrics.
        x, by : str, optional
            What tells runs apart: columns, or their NAMEs in the spec, or columns of the metrics.

        Returns
        -------
        DataFrame
            Columns `by` and `x` (texts or numbers), `mean`, `half_width` (of the t-interval over `runs`; NaN for one).

        Raises
        ------
        ArgumentError
            If there is no such column, or no number in it.
        """
        asked = {"by": by, "x": x}
        frame = pd.DataFrame(self)
        found = _found(frame, y, asked)
        if None in found.values():
            frame = self.metrics()
            found = _found(frame, y, asked)
        for argument, column in found.items():
            if column is None:
                numbers = [c for c in frame.columns if argument != "y" or _is_number(frame[c])]
                raise unknown_name(argument, y if argument == "y" else asked[argument], map(str, numbers))
        value = found.pop("y")
        keys = {argument: frame[column] for argument, column in found.items()}
        data = pd.DataFrame({**keys, "y": frame[value].astype("float64")}).dropna()
        if data.empty:
            raise ArgumentError(f"y={y!r}: none of the {len(self)} runs has it.")
        grouped = data.groupby(list(keys), sort=True)["y"] if keys else data.assign(x="").groupby("x")["y"]
        table = grouped.agg(["mean", "std", "count"]).reset_index()
        t = stats.t.ppf(0.975, np.maximum(table["count"] - 1, 1))
        half_width = t * table.pop("std") / np.sqrt(table["count"])
        return table.rename(columns={"count": "runs"}).assign(half_width=half_width)

    def compare(
        self,
        y: str,
        x: str | None = None,
        by: str | None = None,
        *,
        title: str | None = None,
        theme: str = "light",
    ) -> Figure:
        """A figure of `y` against `x`, a line for each `by`: means of runs that are alike, with 95 % intervals.

        Arguments as for `summary`; without a title, it asks the question.
        """
        import matplotlib.pyplot as plt

        from .figures import comparison

        plt.get_backend()  # a notebook then shows figures that are the last expression of a cell
        return comparison(self.summary(y, x, by), theme, y=y, x=x, by=by, title=title)


def run_table(found: Iterable[tuple[Path, Mapping[str, Any]]]) -> RunTable:
    """Folders and manifests as a table, newest first."""
    rows: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    for folder, manifest in found:
        spec = manifest.get("spec") or {}
        row = {key: manifest.get(key) for key in ("name", "status", "started", "seconds", "seed", "error")}
        row |= {"run": folder.name, "path": str(folder), "sweep": (manifest.get("sweep") or {}).get("name")}
        rows.append({**row, "spec": spec.get("identity"), "kind": spec.get("kind")})
        fields = spec.get("fields") or {}
        if spec.get("kind") == "NotebookSpec":  # its parameters are what one asks for
            fields = {**fields, **(fields.get("parameters") or {})}
            fields.pop("parameters", None)
        asked.append(fields)
        results = manifest.get("results") or {}  # tables and summaries are for the report
        measured.append({name: x for name, x in results.items() if isinstance(x, str | int | float)})
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    parts = [_columns("spec.", asked, table.index), _columns("results.", measured, table.index)]
    table = pd.concat([table, *parts], axis=1)
    table["started"] = pd.to_datetime(table["started"], utc=True, format="ISO8601", errors="coerce")
    table["seconds"] = table["seconds"].astype("float64")
    table["seed"] = table["seed"].astype("Int64")
    return RunTable(table.sort_values(["started", "run"], ascending=False, ignore_index=True))


def _columns(prefix: str, rows: list[dict[str, Any]], index: pd.Index) -> pd.DataFrame:
    """Each name a column: whole numbers, numbers, truth values, or texts where kinds are mixed or nested."""
    frame = pd.DataFrame(rows, index=index, dtype="object")
    columns = {}
    for name, column in frame.items():
        kind = pd.api.types.infer_dtype(column, skipna=True)
        dtype = {
            "integer": "Int64",
            "floating": "float64",
            "mixed-integer-float": "float64",
            "boolean": "boolean",
            "string": "object",
            "empty": "object",
        }.get(kind)
        if dtype is None:
            column = column.map(lambda x: x if isinstance(x, str) else json.dumps(x), na_action="ignore")
        try:
            columns[f"{prefix}{name}"] = column.astype(dtype or "object")
        except OverflowError:  # more than 64 bits
            columns[f"{prefix}{name}"] = column.astype("float64")
    return pd.DataFrame(columns, index=index)


def _found(frame: pd.DataFrame, y: str, keys: Mapping[str, str | None]) -> dict[str, str | None]:
    """The columns that names mean, None where there is none; `y` has to be one of numbers."""

    def column(name: str, prefixes: Iterable[str], number: bool) -> str | None:
        names = (f"{prefix}{name}" for prefix in prefixes)
        return next((c for c in names if c in frame.columns and (not number or _is_number(frame[c]))), None)

    return {
        "y": column(y, ("", "results.", "spec."), True),
        **{
            key: column(name, ("spec.", "", "results."), False)
            for key, name in keys.items()
            if name is not None
        },
    }


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


__all__ = ["COLUMNS", "RunTable", "run_table"]
