"""`MeasuredTable`: what notebooks measured, a row for each combination of what they differ in."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import special

from ..errors import StorageError
from ..storage import read_frame
from ..theme import quantity, with_error
from .manifest import spec_values

MAX_ROWS_OF_A_RUN = 100
"""Rows of a run's metrics with one number; of more rows, as the steps of a training, the last one counts."""

MAX_MEASURES = 6
"""Numbers that a table has columns for, where the notebooks declare none."""

NUM_RUNS = "number of runs"
"""The column of a `MeasuredTable` that holds how many runs a row is the mean of."""

VALUE_COLUMNS = ("run", "value", "half_width", NUM_RUNS)
"""Columns of the frames below that hold no key."""

OF_ONE_RUN = ("run", "path", "started", "seconds", "seed", "sweep")
"""Logged columns that tell runs apart and not what they measured, so that means are taken over them."""


@dataclass(frozen=True)
class MeasuredTable:
    """What notebooks measured, a row for each combination of what they differ in.

    Parameters
    ----------
    frame : DataFrame
        The columns of `keys`, `NUM_RUNS`, and for each measure its mean and, as "half_width NAME", half of
        its 95 % interval: the t-interval over several runs, what a single run declares of itself, or NaN.
    keys : tuple of str
        Parameters of the notebooks, and columns of their metrics, such as a sampler and its number of draws,
        that tell the rows apart; see `parameter_key` for a name that both have.
    measures : mapping of str to str
        The unit of each number; the main one is the first.
    """

    frame: pd.DataFrame
    keys: tuple[str, ...]
    measures: Mapping[str, str]

    def texts(self) -> list[dict[str, str]]:
        """The rows as text: numbers with as many digits as their intervals allow."""
        words = {name: quantity(name) for name in self.measures}
        titles = {
            name: f"{words[name]} ({unit})" if unit and unit not in words[name].split() else words[name]
            for name, unit in self.measures.items()
        }
        repeated = len(self.frame) > 0 and bool((self.frame[NUM_RUNS] > 1).any())
        others = {*map(quantity, self.keys), *(["runs"] if repeated else [])}
        titles = {name: f"{title} (measured)" if title in others else title for name, title in titles.items()}
        rows = []
        for _, row in self.frame.iterrows():
            texts = {quantity(name): _text(row[name]) for name in self.keys}
            texts |= {"runs": str(row[NUM_RUNS])} if repeated else {}
            for name, title in titles.items():
                texts[title] = "" if pd.isna(row[name]) else with_error(row[name], row[f"half_width {name}"])
            rows.append(texts)
        return rows

    def finding(self) -> str:
        """Where the main number is smallest, as a sentence; empty where there is nothing to compare."""
        if not self.keys or not self.measures:
            return ""
        name = next(iter(self.measures))
        best = self.frame.loc[self.frame[name].idxmin()]
        setting = ", ".join(f"{quantity(key)} {_text(best[key])}" for key in self.keys)
        return (
            f"{quantity(name)} is smallest at {setting}: {with_error(best[name], best[f'half_width {name}'])}"
        )

    def axes(self) -> tuple[str | None, list[str]]:
        """The key along the horizontal axis of a figure, where one holds numbers, and the other keys."""
        numeric = [name for name in self.keys if self.frame[name].map(_is_number).all()]
        x = max(numeric, key=lambda name: self.frame[name].nunique(), default=None)
        return x, [name for name in self.keys if name != x]

    def of_figure(self, measure: str) -> tuple[pd.DataFrame, str | None, str | None]:
        """The rows of a measure as `figures.comparison` takes them, and what its `x` and `by` are."""
        x, others = self.axes()
        frame = self.frame[self.frame[measure].notna()]
        data = pd.DataFrame({"mean": frame[measure], "runs": frame[NUM_RUNS]})
        data["half_width"] = frame[f"half_width {measure}"]
        if x is not None or not others:
            data.insert(0, "x", "" if x is None else pd.to_numeric(frame[x]))
        if others:
            joined = frame[others].map(_text).agg(", ".join, axis=1) if len(others) > 1 else frame[others[0]]
            data.insert(0, "by", joined)
        return data.reset_index(drop=True), x, ", ".join(others) or None


@dataclass(frozen=True)
class MeasuredRows:
    """The values of one number, run by run.

    Parameters
    ----------
    frame : DataFrame
        Columns `run`, `value`, `half_width` (what the run declares of it, or NaN) and those of `keys`.
    keys : tuple of str
        Parameters and columns of the metrics that tell values apart, without the seed and without those that
        follow from others. Where both have a name, see `parameter_key`.
    unit : str
        Of the number.
    """

    frame: pd.DataFrame
    keys: tuple[str, ...]
    unit: str


def measured_rows(
    notebooks: Iterable[tuple[Path, Mapping[str, Any]]], measure: str | None = None
) -> dict[str, MeasuredRows]:
    """The values of each number that the notebooks that are done measured, the main one first.

    Arguments are those of `measured_table`.
    """
    done = [(folder, manifest) for folder, manifest in notebooks if manifest["status"] == "done"]
    parameters = differing_parameters(
        [(manifest.get("spec") or {}).get("fields") or {} for _, manifest in done]
    )
    declared = _declared(done, measure, parameters)
    measures = {}
    for name, facts in declared.items():
        frame = _rows_of(name, facts, declared, done, parameters)
        if not frame.empty:
            keys = [c for c in frame if c not in VALUE_COLUMNS and frame[c].notna().all()]
            keys = [c for c in keys if frame[c].map(_text).nunique() > 1]
            varying = tuple(_without_copies(frame, keys))
            measures[name] = MeasuredRows(frame, varying, str(facts.get("unit") or ""))
    return measures


def measured_table(
    notebooks: Iterable[tuple[Path, Mapping[str, Any]]], measure: str | None = None
) -> MeasuredTable:
    """What the notebooks that are done measured.

    A number is a column of the metrics or one of the results. Where the notebooks declare numbers (see
    `Run.declare`), those are meant, else the first numbers of their results. Numbers whose values are told
    apart by more than those of the main one, as by the head, have no column.

    Parameters
    ----------
    notebooks : iterable of (path, mapping)
        The folder and the manifest of each notebook's run.
    measure : str, optional
        The number that is the main one; what the notebooks declare as such, or else the first one, if None.
    """
    measures = measured_rows(notebooks, measure)
    if not measures:
        return MeasuredTable(pd.DataFrame({NUM_RUNS: []}), (), {})
    main = next(iter(measures))
    frame, keys = _means(main, measures[main]), measures[main].keys
    for name, rows in measures.items():
        if name != main and set(rows.keys) <= set(keys):
            part = _means(name, rows).drop(columns=NUM_RUNS)
            own = list(rows.keys)
            frame = frame.merge(part, "left", own) if own else frame.merge(part, "cross")
    units = {name: rows.unit for name, rows in measures.items() if name in frame}
    columns = [*keys, NUM_RUNS, *(column for name in units for column in (name, f"half_width {name}"))]
    return MeasuredTable(frame[columns], keys, units)


def parameter_key(name: str) -> str:
    """The key of a parameter whose name is also that of a number, or of a logged column with other values.

    Where a notebook logs its parameter as it is, the two are one key, by the plain name.

    >>> parameter_key("sampler")
    'sampler (parameter)'
    """
    return f"{name} (parameter)"


def _declared(
    done: Sequence[tuple[Path, Mapping[str, Any]]],
    measure: str | None,
    parameters: Sequence[Mapping[str, Any]],
) -> dict[str, Mapping[str, Any]]:
    """What is known of each number, the main one first; a result that repeats a parameter is none."""
    declared: dict[str, Mapping[str, Any]] = {}
    for _, manifest in done:
        for name, facts in (manifest.get("measures") or {}).items():
            if isinstance(facts, dict) and not facts.get("timing"):
                declared.setdefault(name, facts)
    if not declared:
        results = [manifest.get("results") or {} for _, manifest in done]
        pairs = list(zip(results, parameters, strict=True))
        numbers = dict.fromkeys(name for each in results for name, x in each.items() if _is_number(x))
        numbers = {n: None for n in numbers if any(given.get(n) != each.get(n) for each, given in pairs)}
        declared = {name: {} for name in itertools.islice(numbers, MAX_MEASURES)}
    if measure is not None:
        return {measure: declared.pop(measure, {}), **declared}
    return dict(sorted(declared.items(), key=lambda item: not item[1].get("main")))


def differing_parameters(specs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The parameters of notebooks that are not the same in all of them, but for the seed.

    Parameters
    ----------
    specs : sequence of mapping
        The fields of each notebook's spec.

    Examples
    --------
    >>> differing_parameters([{"layer": 3, "counts": [16]}, {"layer": 3, "counts": [64]}])
    [{'counts': 16}, {'counts': 64}]
    """
    parameters = [spec_values({"fields": fields}) for fields in specs]
    fields_of_runs: list[dict[str, Any]] = [{} for _ in parameters]
    for name in dict.fromkeys(name for fields in parameters for name in fields if name != "seed"):
        values: list[Any] = [fields.get(name) for fields in parameters]
        if len({json.dumps(value, sort_keys=True, default=str) for value in values}) < 2:
            continue
        if all(isinstance(value, list | tuple) and len(value) == 1 for value in values):
            values = [value[0] for value in values]
        for fields, value in zip(fields_of_runs, values, strict=True):
            fields[name] = value if isinstance(value, str | int | float) else json.dumps(value, default=str)
    return fields_of_runs


def _rows_of(
    name: str,
    facts: Mapping[str, Any],
    declared: Mapping[str, Mapping[str, Any]],
    done: Sequence[tuple[Path, Mapping[str, Any]]],
    parameters: Sequence[dict[str, Any]],
) -> pd.DataFrame:
    """A row for each value of a number: `value`, `half_width`, `run`, and what tells the rows apart."""
    half_width = facts.get("half_width")
    numbers = {*declared, *(facts.get("half_width") for facts in declared.values())}
    of_runs: list[list[dict[str, Any]]] = []
    for folder, manifest in done:
        metrics = _metrics(folder, name)
        if metrics is None:
            results = manifest.get("results") or {}
            values = [{"value": results.get(name), "half_width": results.get(half_width)}]
        else:
            widths = metrics.get(half_width, math.nan)
            keys = [c for c in metrics if c not in (*numbers, *OF_ONE_RUN) and _is_key(metrics[c])]
            logged = metrics[keys].rename(columns={c: f"{c} (logged)" for c in VALUE_COLUMNS})
            values = logged.assign(value=metrics[name], half_width=widths).to_dict("records")
        of_runs.append([{**value, "run": folder.name} for value in values if _is_number(value["value"])])
    shared: set[Any] = {
        name
        for values, fields in zip(of_runs, parameters, strict=True)
        for value in values
        for name, x in fields.items()
        if name in value and _text(value[name]) != _text(x)
    }
    shared |= {*numbers, *VALUE_COLUMNS}
    rows = []
    for values, fields in zip(of_runs, parameters, strict=True):
        given = {parameter_key(name) if name in shared else name: x for name, x in fields.items()}
        rows += [{**given, **value} for value in values]
    return pd.DataFrame(rows)


def _metrics(folder: Path, name: str) -> pd.DataFrame | None:
    """The rows of a run's metrics that hold a number; None where there are none."""
    file = folder / "metrics.parquet"
    try:
        metrics = read_frame(file) if file.exists() else pd.DataFrame()
    except StorageError:
        return None
    if name not in metrics or not pd.api.types.is_numeric_dtype(metrics[name]):
        return None
    metrics = metrics[metrics[name].notna()]
    metrics = metrics.dropna(axis=1, how="all")
    return (metrics if len(metrics) <= MAX_ROWS_OF_A_RUN else metrics.tail(1)) if len(metrics) else None


def _is_key(column: pd.Series) -> bool:
    """Whether a column of metrics tells rows apart: it holds a text or a whole number in each of them."""
    return pd.api.types.infer_dtype(column, skipna=False) in ("string", "integer")


def _means(name: str, rows: MeasuredRows) -> pd.DataFrame:
    """The mean of a number over the runs that differ in nothing but the seed."""
    values, keys = rows.frame.assign(value=rows.frame["value"].astype("float64")), list(rows.keys)
    groups = values.groupby(keys if keys else lambda _: "", sort=False)
    means = groups.agg(
        mean=("value", "mean"), std=("value", "std"), count=("value", "count"), runs=("run", "nunique"),
        own=("half_width", "first"),
    )  # fmt: skip
    count = means["count"].clip(lower=2)
    interval = special.stdtrit(count - 1, 0.975) * means["std"] / count**0.5
    own = pd.to_numeric(means["own"], errors="coerce")
    table = means[[]].reset_index(drop=not keys)
    table[NUM_RUNS], table[name] = means["runs"].to_numpy(), means["mean"].to_numpy()
    table[f"half_width {name}"] = interval.where(means["count"] > 1, own).to_numpy()
    return table


def _without_copies(frame: pd.DataFrame, keys: list[str]) -> list[str]:
    """Keys without those that follow from the keys behind them, as the only sampler of a list of them."""
    texts = frame[keys].map(_text)
    distinguishing = list(keys)
    for key in keys:
        others = [other for other in distinguishing if other != key]
        if others and len(texts[others].drop_duplicates()) == len(texts[distinguishing].drop_duplicates()):
            distinguishing = others
    return distinguishing


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


__all__ = ["MeasuredRows", "MeasuredTable", "differing_parameters", "measured_rows", "measured_table"]
