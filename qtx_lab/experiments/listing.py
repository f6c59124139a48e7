"""`RunTable`: runs as a DataFrame that can be filtered by SQL, collects metrics and draws comparisons."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import special

from ..errors import ArgumentError, StorageError, unknown_name
from ..storage import database, parquet_bytes, read_frame
from .manifest import creation_order, spec_values

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
"""Columns that every listing has."""

PLACE = "place of the run in the table"
"""A column that conditions in SQL do not need; a parameter may be named `row`, but hardly this."""

SPEC, METRICS = "spec.", "metrics."
"""What may stand before the name of a parameter, and of a column of the metrics."""


class RunTable(pd.DataFrame):
    """A DataFrame of runs, one a row; see `qtx_lab.runs`. If pandas filters it, the result is a RunTable too.

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
        """The runs that fulfil a condition in DuckDB's SQL.

        Parameters
        ----------
        where : str
            The condition, in terms of the columns. `spec.NAME` and `results.NAME` may be shortened to NAME if
            only one column has that name.

        Returns
        -------
        RunTable

        Raises
        ------
        ArgumentError
            If the condition is not valid; the message quotes DuckDB. SQL does not tell names apart that
            differ in case only: no condition is in terms of those.
        """
        import duckdb

        parts: dict[str, dict[str, str]] = {"runs": {}, "spec": {}, "results": {}}
        hidden: list[str] = []
        for column in self.columns:
            if column == "seed" and "spec.seed" in self.columns:
                continue  # it has the same value, and `seed` alone would be ambiguous
            part, dot, name = str(column).partition(".")
            prefixed = dot and part in ("spec", "results")
            parts[part if prefixed else "runs"][name if prefixed else str(column)] = column
        with database() as connection:
            tables = []
            for part, names in parts.items():
                count = Counter(name.lower() for name in names)
                one_case = [name for name in names if count[name.lower()] == 1]
                hidden += [column for name, column in names.items() if name not in one_case]
                if one_case:
                    frame = pd.DataFrame({name: self[names[name]] for name in one_case})
                    if part == "runs":
                        frame[PLACE] = np.arange(len(self))
                    connection.register(part, frame)
                    tables.append(part)
            # In two pairs of parentheses nothing but one expression can stand, such as no UNION.
            joined = " POSITIONAL JOIN ".join(tables)
            query = f'SELECT runs."{PLACE}" FROM {joined} WHERE CAST(({where}\n) AS BOOLEAN)'
            try:
                statements = connection.extract_statements(query)
                if len(statements) != 1:
                    raise ArgumentError(f"where={where!r} is not allowed: it must be one condition.")
                rows = connection.execute(query).fetchnumpy()[PLACE]
            except duckdb.Error as error:
                reason = str(error).splitlines()[0]
                if isinstance(error, duckdb.BinderException):
                    reason += f". There are {', '.join(map(str, self.columns))}."
                if hidden:
                    reason += f" These differ in case only, which SQL does not see: {', '.join(hidden)}."
                raise ArgumentError(f"where={where!r} is not a condition on the runs: {reason}") from None
        return self.iloc[np.sort(np.asarray(rows))].reset_index(drop=True)

    def export(self, kind: str) -> bytes:
        """All columns as the content of a file.

        Parameters
        ----------
        kind : str
            "csv" or "parquet".

        Raises
        ------
        ArgumentError
            If there is no such kind.
        """
        if kind not in ("csv", "parquet"):
            raise unknown_name("kind", kind, ("csv", "parquet"))
        if kind == "csv":
            return self.to_csv(index=False).encode()
        with database() as connection:
            connection.register("frame", pd.DataFrame(self))
            return parquet_bytes(connection, "FROM frame")

    def metrics(self) -> pd.DataFrame:
        """The metrics of all these runs, each row with its `run` and the run's other columns.

        If metrics and runs both have a column, it is taken from the metrics; parameters keep their names
        `spec.NAME`. `attrs["skipped"]` lists the (run, reason) of metrics that cannot be read.
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
            of_runs = pd.DataFrame(self).drop(columns=list(rows.columns), errors="ignore")
            joined = pd.concat([of_runs.iloc[place].reset_index(drop=True), rows], axis=1)
        else:
            rows, joined = pd.DataFrame(), pd.DataFrame(self).iloc[:0].copy()
        joined.attrs |= {"skipped": skipped, METRICS: list(rows.columns)}
        return joined

    def summary(self, y: str, x: str | None = None, by: str | None = None) -> pd.DataFrame:
        """Mean of `y` over the runs that have the same `x` and `by`, with its 95 % interval.

        Parameters
        ----------
        y : str
            A number: a column, its NAME in the results, a column of the runs' metrics, or a NAME in the spec.
        x, by : str, optional
            What distinguishes groups of runs: columns, their NAMEs in the spec, or columns of the metrics. A
            name that means both a parameter and a column of the metrics with other values must be written as
            `spec.NAME` or `metrics.NAME`.

        Returns
        -------
        DataFrame
            Columns `by` and `x` (texts or numbers), `mean`, `runs` (how many) and `half_width` (of the
            t-interval over the runs; NaN for a single run).

        Raises
        ------
        ArgumentError
            If there is no such column, or no number in it; or if `x` or `by` means a parameter and a column
            of the metrics whose values differ.
        """
        groups = {"by": by, "x": x}
        frame = pd.DataFrame(self)
        columns = _columns_of(frame, y, groups)
        if None in columns.values():
            runs, frame = frame, self.metrics()
            ways = [
                (frame, y),
                (runs, f"{SPEC}{y}"),
                (frame, f"{SPEC}{y}"),
            ]  # a measured y before a parameter
            tried = [(way, _columns_of(way, name, groups)) for way, name in ways]
            frame, columns = next((x for x in tried if None not in x[1].values()), tried[0])
            _refuse_two_meanings(frame, columns, groups)
        for argument, column in columns.items():
            if column is None:
                known = [c for c in frame.columns if argument != "y" or _is_number(frame[c])]
                raise unknown_name(argument, y if argument == "y" else groups[argument], map(str, known))
        value = columns.pop("y")
        keys = {argument: frame[column] for argument, column in columns.items()}
        data = pd.DataFrame({**keys, "y": frame[value].astype("float64")}).dropna()
        if data.empty:
            raise ArgumentError(f"y={y!r}: none of the {len(self)} runs has it.")
        grouped = data.groupby(list(keys), sort=True)["y"] if keys else data.assign(x="").groupby("x")["y"]
        table = grouped.agg(["mean", "std", "count"]).reset_index()
        t = special.stdtrit(np.maximum(table["count"] - 1, 1), 0.975)
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
        """A figure of the means of `y` against `x`, with a line for each `by` and 95 % intervals.

        Parameters
        ----------
        y, x, by : str
            See `summary`.
        title : str, optional
            Title of the figure; the question that it answers if None.
        theme : str
            "light" or "dark".

        Returns
        -------
        matplotlib.figure.Figure
        """
        import matplotlib.pyplot as plt

        from .figures import comparison

        plt.get_backend()  # so that a notebook shows a figure that is the last expression of a cell
        return comparison(self.summary(y, x, by), theme, y=y, x=x, by=by, title=title)


def run_table(listed: Iterable[tuple[Path, Mapping[str, Any]]]) -> RunTable:
    """Folders and their manifests as a table, newest first."""
    rows: list[dict[str, Any]] = []
    specs: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    order = []
    for folder, manifest in listed:
        order.append((creation_order(manifest), folder.name))
        spec = manifest.get("spec") or {}
        row = {key: manifest.get(key) for key in ("name", "status", "started", "seconds", "seed", "error")}
        row |= {"run": folder.name, "path": str(folder), "sweep": (manifest.get("sweep") or {}).get("name")}
        rows.append({**row, "spec": spec.get("identity"), "kind": spec.get("kind")})
        of_notebook = spec.get("kind") == "NotebookSpec"  # its parameters are columns of their own
        specs.append(spec_values(spec) if of_notebook else spec.get("fields") or {})
        results = manifest.get("results") or {}  # without tables and summaries, which are for the report
        measured.append({name: x for name, x in results.items() if isinstance(x, str | int | float)})
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    parts = [_columns("spec.", specs, table.index), _columns("results.", measured, table.index)]
    table = pd.concat([table, *parts], axis=1)
    table["started"] = pd.to_datetime(table["started"], utc=True, format="ISO8601", errors="coerce")
    table["seconds"] = table["seconds"].astype("float64")
    table["seed"] = table["seed"].astype("Int64")
    newest_first = sorted(range(len(order)), key=order.__getitem__, reverse=True)
    return RunTable(table.iloc[newest_first].reset_index(drop=True))


def _columns(prefix: str, rows: list[dict[str, Any]], index: pd.Index) -> pd.DataFrame:
    """A column for each name: integers, floats, truth values, or texts if kinds are mixed or nested."""
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
            column = column.map(_as_text, na_action="ignore")
        try:
            columns[f"{prefix}{name}"] = column.astype(dtype or "object")
        except (OverflowError, TypeError, ValueError):  # integers of more than 64 bits
            try:
                columns[f"{prefix}{name}"] = column.astype("float64")
            except (OverflowError, TypeError, ValueError):  # or of more than a float holds
                columns[f"{prefix}{name}"] = column.map(_as_text, na_action="ignore")
    return pd.DataFrame(columns, index=index)


def _as_text(value: Any) -> str:
    """A value as text, and numbers that are too long for Python to write as their size."""
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except ValueError:
        return f"a number of {value.bit_length():,} bits" if isinstance(value, int) else "a value too long"
    except RecursionError:
        return "a value in too many brackets"


def _columns_of(frame: pd.DataFrame, y: str, groups: Mapping[str, str | None]) -> dict[str, str | None]:
    """The column that each name means, or None if there is none; that of `y` must hold numbers."""

    def column(name: str, prefixes: Iterable[str], number: bool) -> str | None:
        names = [f"{prefix}{name}" for prefix in prefixes]
        logged = name.removeprefix(METRICS)
        names += [logged] if logged != name and logged in frame.attrs.get(METRICS, ()) else []
        return next((c for c in names if c in frame.columns and (not number or _is_number(frame[c]))), None)

    return {
        "y": column(y, ("", "results."), True),
        **{
            key: column(name, (SPEC, "", "results."), False)
            for key, name in groups.items()
            if name is not None
        },
    }


def _refuse_two_meanings(
    frame: pd.DataFrame, columns: Mapping[str, str | None], groups: Mapping[str, str | None]
) -> None:
    """Refuse names of groups that mean a parameter and a column of the metrics with other values."""
    for argument, name in groups.items():
        if name is not None and columns[argument] == f"{SPEC}{name}" and name in frame.attrs.get(METRICS, ()):
            rows = frame if columns["y"] is None else frame[frame[columns["y"]].notna()]
            both = rows[[f"{SPEC}{name}", name]].dropna()
            if any(a != b and str(a) != str(b) for a, b in both.itertuples(index=False)):
                raise ArgumentError(
                    f"{argument}={name!r} has two meanings: it is a parameter of these runs and a column of "
                    f"their metrics, with other values. Write '{SPEC}{name}' or '{METRICS}{name}'."
                )


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


__all__ = ["COLUMNS", "RunTable", "run_table"]
