"""What runs were set to, in which they differ, and which of them differ in nothing but the seed."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ...experiments.measured_table import parameter_key

SPEC, RESULT = "spec.", "results."
"""What columns of the listing begin with: fields of specs, and numbers that were measured."""

HALF_WIDTHS = ("_half_width",)
STD_ERRORS = ("_std_error", "_error_bar")
"""Endings of results that are the half width of a 95 % interval, or a standard error, of another result."""

Z = 1.959964
"""Half of a normal 95 % interval in standard errors."""


def code_of(manifest: Mapping[str, Any]) -> str:
    """The version of qtx_lab and the commit that a run was made with."""
    git, version = manifest.get("git") or {}, (manifest.get("versions") or {}).get("qtx_lab", "")
    commit = str(git.get("commit") or "")[:10]
    if git.get("dirty"):  # the hash of the files tells one state of a changed checkout from another
        package = (manifest.get("code") or {}).get("package") or ""
        commit += f", changed {str(package)[:8]}".rstrip()
    return " ".join(filter(None, (str(version), commit)))


def declared_half_widths(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of which a run has declared the half width of their interval, and the half width's name."""
    measures = manifest.get("measures") or {}
    return {
        str(name): str(facts["half_width"])
        for name, facts in measures.items()
        if isinstance(facts, Mapping) and facts.get("half_width")
    }


def _unique(table: pd.DataFrame, column: str) -> list[str]:
    """The distinct texts of a column; none where the table lacks it."""
    return list(table[column].dropna().unique()) if column in table else []


def settings_of(manifest: Mapping[str, Any], code: str) -> str:
    """Kind, fields and code of a run without its seed: equal for runs that differ in nothing but the seed."""
    spec = manifest.get("spec") or {}
    fields = dict(spec.get("fields") or {})
    parameters = fields.pop("parameters", None)
    if isinstance(parameters, Mapping):
        fields["parameters"] = {name: x for name, x in parameters.items() if name != "seed"}
    fields.pop("seed", None)
    return json.dumps([spec.get("kind"), fields, code], sort_keys=True, default=str)


def short_name(column: str) -> str:
    """A column's name on the page: without `spec.` or `results.`.

    >>> short_name("spec.num_samples")
    'num_samples'
    """
    return column.removeprefix(SPEC).removeprefix(RESULT)


def short_names(columns: Iterable[str]) -> dict[str, str]:
    """The short name of each column; that of a parameter says so where a result has the same name.

    >>> short_names(["results.error", "spec.error", "spec.layer"])
    {'results.error': 'error', 'spec.error': 'error (parameter)', 'spec.layer': 'layer'}
    """
    all_columns = list(columns)
    results = {short_name(c) for c in all_columns if not c.startswith(SPEC)}
    return {
        c: parameter_key(short_name(c)) if c.startswith(SPEC) and short_name(c) in results else short_name(c)
        for c in all_columns
    }


def differing(table: pd.DataFrame, columns: Iterable[str] | None = None) -> list[str]:
    """The fields of specs that differ between runs of a table, those that most runs have first.

    A run that lacks a field does not differ in it: runs of several kinds have other fields.
    """
    candidates = [c for c in table.columns if c.startswith(SPEC)] if columns is None else columns
    ranked: list[tuple[int, int, str]] = []
    for column in candidates:
        values = table[column].dropna()
        if column not in (f"{SPEC}seed", f"{SPEC}sha256") and values.astype(str).nunique() > 1:
            ranked.append((-len(values), len(ranked), column))
    return [column for *_, column in sorted(ranked)]


def metric_columns(table: pd.DataFrame) -> list[str]:
    """The results that are numbers, those that most runs have first; half widths belong to their numbers."""
    ranked: list[tuple[int, int, str]] = []
    declared = {x for text in _unique(table, "half_widths") for x in json.loads(text).values()}
    for column in table.columns:
        if short_name(column) in declared:
            continue
        numeric = pd.api.types.is_numeric_dtype(table[column])
        if not column.startswith(RESULT) or not numeric or pd.api.types.is_bool_dtype(table[column]):
            continue
        if column.endswith((*HALF_WIDTHS, *STD_ERRORS)) and _owner(column) in table.columns:
            continue
        count = int(table[column].notna().sum())
        if count:
            ranked.append((-count, len(ranked), column))
    return [column for *_, column in sorted(ranked)]


def _owner(column: str) -> str:
    """The result whose half width or standard error a column is."""
    for ending in (*HALF_WIDTHS, *STD_ERRORS):
        column = column.removesuffix(ending)
    return column


def half_width(row: Mapping[str, Any] | pd.Series, column: str) -> float:
    """Half of the 95 % interval of a run's own result; NaN where the run has recorded none."""
    declared = row.get("half_widths")
    name = json.loads(declared).get(short_name(column)) if isinstance(declared, str) else None
    declared_value = pd.to_numeric(row.get(f"{RESULT}{name}"), errors="coerce") if name else None
    if declared_value is not None and not pd.isna(declared_value):
        return float(declared_value)
    for endings, factor in ((HALF_WIDTHS, 1.0), (STD_ERRORS, Z)):
        for ending in endings:
            value = pd.to_numeric(row.get(f"{column}{ending}"), errors="coerce")
            if value == value and value is not None:
                return factor * float(value)
    return float("nan")


def value_text(value: Any) -> str:
    """A value of a spec as the page shows it; "" where there is none.

    >>> value_text(0.30000000000000004), value_text("[8, 16]"), value_text(None)
    ('0.3', '[8, 16]', '')
    """
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def calibrations_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The time of the calibration of each device that a run has used, where it is known."""
    results = manifest.get("results") or {}
    facts = results.get("facts")
    named = dict(manifest.get("devices") or {})
    if isinstance(facts, Mapping) and facts.get("device"):
        named.setdefault(str(facts["device"]), facts.get("calibration"))
    return {str(name): str(time) for name, time in named.items() if time}


def facets(table: pd.DataFrame, metrics: pd.DataFrame, axes: Sequence[str]) -> dict[str, str]:
    """A name for each run, equal for runs whose metrics may be averaged.

    Those are runs that differ in nothing but the seed and in columns of the metrics that the figure tells
    apart: a sweep over samplers is one figure, with a line for each.

    Parameters
    ----------
    table : DataFrame
        The listing.
    metrics : DataFrame
        Metrics of some of its runs, with the column `run`.
    axes : sequence of str
        Columns that a figure tells apart.

    Returns
    -------
    dict
        By run, the settings in which the runs differ, in words; "" where there is one kind only.
    """
    runs = table[table["run"].isin(metrics["run"].unique())].drop_duplicates("run").set_index("run")
    fields = [c for c in runs.columns if c.startswith(SPEC) and short_name(c) not in ("seed", *axes)]
    fields += [
        f"{SPEC}{x}" for x in axes if f"{SPEC}{x}" in runs and not _is_axis(runs[f"{SPEC}{x}"], metrics, x)
    ]
    columns = [*(c for c in ("kind", "code") if c in runs), *fields]
    texts = runs[columns].map(value_text)
    keys = dict(zip(runs.index, map(tuple, texts.to_numpy()), strict=True))
    several = [c for c in columns if runs[c].dropna().astype(str).nunique() > 1]
    names: dict[tuple[str, ...], str] = {}
    for run, key in keys.items():
        if key not in names:
            words = [f"{short_name(c)} = {texts.loc[run, c]}" for c in several if texts.loc[run, c]]
            name = ", ".join(words[:4])
            taken = sum(name == other.partition(" (")[0] for other in names.values())
            names[key] = f"{name} ({taken + 1})" if taken else name
    return {run: names[key] for run, key in keys.items()}


def _is_axis(values: pd.Series, metrics: pd.DataFrame, axis: str) -> bool:
    """Whether the metrics of each run hold the value of its parameter, and no other."""
    if axis not in metrics:
        return False
    values_by_run = metrics.groupby("run")[axis].agg(lambda x: set(x.dropna().map(value_text)))
    known = values.dropna().map(value_text)
    return all(values_by_run.get(run, set()) <= {value} for run, value in known.items())


# --- The filter ---------------------------------------------------------------------------------------

CONDITION = re.compile(r"([\w. -]+?)\s*(<=|>=|!=|=|<|>)\s*(.+)")


def passes(table: pd.DataFrame, text: str) -> pd.Series:
    """Which runs a filter lets pass: those that have all its words.

    A word is a part of the run's name, of a tag or of the note; or a condition on a parameter, a metric or a
    column of the listing, such as `sampler=head-tail`, `num_samples>=64` or `sweep=NAME`. Of a name that is
    a parameter and a metric, such as `error`, either may fulfil it; `spec.error` is the parameter alone.
    """
    try:
        words = shlex.split(text)
    except ValueError:  # a quotation mark that is not closed yet
        words = text.split()
    result = pd.Series(True, table.index)
    for word in words:
        match = CONDITION.fullmatch(word)
        columns = _columns(table, match[1]) if match else []
        result &= _hold(table[columns], match[2], match[3]) if match and columns else _contains(table, word)
    return result


def _columns(table: pd.DataFrame, name: str) -> list[str]:
    """The columns that a name may mean."""
    return [c for c in (name, f"{SPEC}{name}", f"{RESULT}{name}") if c in table.columns]


def _hold(columns: pd.DataFrame, operator: str, text: str) -> pd.Series:
    """Whether any of the columns fulfils a condition; for !=, whether none of those with a value is equal."""
    if operator == "!=":
        return columns.notna().any(axis=1) & ~_hold(columns, "=", text)
    return pd.concat([_holds(columns[c], operator, text) for c in columns], axis=1).any(axis=1)


def _contains(table: pd.DataFrame, word: str) -> pd.Series:
    matches = table["run"].str.lower().str.contains(word.lower(), regex=False)
    if "tags" in table:
        texts = table["tags"].map(" ".join) + " " + table["note"]
        matches |= texts.str.lower().str.contains(word.lower(), regex=False)
    return matches


def _holds(column: pd.Series, operator: str, text: str) -> pd.Series:
    compare = {"=": np.equal, "<": np.less, ">": np.greater, "<=": np.less_equal}.get(
        operator, np.greater_equal
    )
    numbers = pd.to_numeric(column, errors="coerce").astype("Float64").to_numpy("float64", na_value=np.nan)
    try:
        value = float(text)
    except ValueError:
        words = column.map(lambda x: " ".join(x) if isinstance(x, tuple) else value_text(x)).str.lower()
        matches = words == text.lower() if operator == "=" else pd.Series(False, column.index)
        return matches & column.notna()
    return pd.Series(compare(numbers, value) & ~np.isnan(numbers), column.index)
