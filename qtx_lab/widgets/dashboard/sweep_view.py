"""The view Sweeps: which parameters of a sweep its result depends on, and how."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from ...errors import QtxError
from ...experiments.manifest import read_manifest
from ...experiments.measured_table import MeasuredTable, measured_rows, measured_table
from ...theme import with_error
from . import frames
from .elements import empty_note, html_table, late_select, offer
from .figure_views import FigureView, Finding
from .importance import Importance, importance
from .records import Records
from .settings import RESULT, SPEC, differing, metric_columns, short_name, value_text
from .sweep_figures import MAX_LINES, importance_bars, means_against, parallel_coordinates
from .view_host import ViewHost

MAX_SWEEPS = 50
"""Sweeps that are offered: the newest."""

MAX_FACETS = 6
"""Figures of means, one for each combination of the parameters that have no axis."""

MAX_ROWS = 200
"""Rows of the table of what was measured."""

MAX_OPEN_ROWS = 24
"""Rows up to which the table is open at first."""

MIN_NAMED_SHARE = 0.005
"""Share of the variance from which on a parameter is named in the title."""

MAX_AXES = 7
"""Parameters that have an axis among the parallel coordinates: the most important."""

NO_SWEEPS = empty_note(
    "No sweep with a result yet",
    "A sweep runs a notebook for every combination of values: <code>qtx-lab sweep NOTEBOOK -g NAME=1,2,3 "
    "--repeats 3</code>. What its notebooks put into <code>run.update(results={…})</code> as numbers is "
    "compared here.",
)


@dataclass(frozen=True)
class SweepData:
    """What the runs of a sweep measured, and the parameters in which they differ.

    Parameters
    ----------
    frame : DataFrame
        A row for each value of the metric: `run`, the parameters, the metric and its own `half_width`.
    parameters : list of str
        Columns that tell the rows apart: of the specs, and of the metrics, as a sampler.
    metric : str
        The column of the metric: "results." and its name.
    importance : Importance or None
    table : MeasuredTable
        The means over runs that differ in nothing but the seed.
    """

    frame: pd.DataFrame
    parameters: list[str]
    metric: str
    importance: Importance | None
    table: MeasuredTable


def sweep_view(page: ViewHost) -> FigureView:
    """Which parameters of a sweep matter, and how."""
    sweep, metric = late_select("Sweep"), late_select("Result")

    def gather(table: pd.DataFrame) -> Any:
        members = _members(page.records, table)
        chosen = sweep.value if sweep.value in members else next(iter(members), "")
        runs = table[table["run"].isin(members.get(chosen, set()))]
        sweeps = {
            f"{name.partition('-')[2] or name} ({len(runs)} runs)": name for name, runs in members.items()
        }
        return sweeps, runs, _manifests(runs)

    def draw(data: Any) -> Finding:
        sweeps, runs, manifests = data
        offer(sweep, sweeps)
        names = list(measured_rows(manifests))
        others = [short_name(c) for c in metric_columns(runs)]
        offer(metric, {name: name for name in dict.fromkeys([*names, *others])})
        shown = _sweep_data(manifests, runs, metric.value) if metric.value else None
        if shown is None:
            return Finding("", "", [], ())
        pictures: list[Any] = []
        axes = _by_importance(shown)[:MAX_AXES]
        if axes:
            pictures.append(parallel_coordinates(shown.frame, axes[::-1], shown.metric, page.theme))
        if shown.importance is not None:
            pictures.append(importance_bars(shown.importance.table, page.theme))
        facets, left_out = _facets(shown, page.theme)
        pictures += facets
        return Finding(
            _title(shown), _note(shown, left_out), pictures, (), wide=1, table=_measured_table(shown.table)
        )

    controls = {"sweep": sweep, "result": metric}
    return FigureView(page, controls, gather, draw, NO_SWEEPS)


def _members(records: Records, table: pd.DataFrame) -> dict[str, set[str]]:
    """The runs of each sweep, its own and those that it has taken over; the newest sweep first."""
    if "sweep" not in table or table.empty:
        return {}
    own = table["sweep"].dropna()
    members = {name: set(table.loc[part.index, "run"]) for name, part in own.groupby(own, sort=False)}
    listed = set(table["run"])
    for name in table["run"][table["kind"].isin(("SweepSpec", "SearchSpec"))]:
        with suppress(QtxError):
            metrics = records.metrics(name)
            runs = set(metrics["run"]) & listed if "run" in metrics else set()
            if runs:
                members[name] = members.get(name, set()) | runs
    return {name: members[name] for name in sorted(members, reverse=True)[:MAX_SWEEPS]}


def _manifests(runs: pd.DataFrame) -> list[tuple[Path, dict[str, Any]]]:
    """The folders of runs and their manifests, as far as they can be read."""
    listed = []
    for path in map(Path, runs["path"]):
        with suppress(QtxError):
            listed.append((path, read_manifest(path)))
    return listed


def _sweep_data(
    manifests: list[tuple[Path, dict[str, Any]]], runs: pd.DataFrame, metric: str
) -> SweepData | None:
    """What the runs measured of a metric; None where none has it."""
    measured = measured_rows(manifests, metric).get(metric)
    if measured is None:
        return None
    names = {key: f"{SPEC}{key}" for key in measured.keys}
    values = measured.frame[["run", "value", "half_width", *measured.keys]]
    column = f"{RESULT}{metric}"
    values = values.rename(columns={**names, "value": column})
    of_runs = runs[[c for c in ("run", "kind", "code", "seed") if c in runs]]
    frame = frames.numbers(values.merge(of_runs, on="run"), column)
    parameters = differing(frame, names.values())
    table = measured_table(manifests, metric)
    return SweepData(frame, parameters, column, importance(frame, parameters, column), table)


def _measured_table(table: MeasuredTable) -> str:
    """What was measured by each combination, as HTML."""
    rows = table.texts()
    if not rows:
        return ""
    columns = {escape(name): "" if i < len(table.keys) else "number" for i, name in enumerate(rows[0])}
    lines = [
        "<tr>"
        + "".join(
            f"<td class='{css}'>{escape(text)}</td>"
            for css, text in zip(columns.values(), row.values(), strict=True)
        )
        + "</tr>"
        for row in rows[:MAX_ROWS]
    ]
    more = f"<p class='note'>{len(rows) - MAX_ROWS} more rows: the run of the sweep has all.</p>"
    shown = html_table(columns, lines) + (more if len(rows) > MAX_ROWS else "")
    is_open = " open" if len(rows) <= MAX_OPEN_ROWS else ""
    return f"<details{is_open}><summary>What was measured: {len(rows)} rows</summary>{shown}</details>"


def _by_importance(data: SweepData) -> list[str]:
    """The parameters, the most important first."""
    if data.importance is None:
        return data.parameters
    return [name for name in data.importance.table["name"] if name in data.parameters]


def _that_matter(data: SweepData) -> list[str]:
    """The parameters that the result depends on, the most important first; all where that is not known."""
    ordered = _by_importance(data)
    if data.importance is None:
        return ordered
    shares = data.importance.table.set_index("name")["share"]
    return [name for name in ordered if shares[name] >= MIN_NAMED_SHARE] or ordered


def _title(data: SweepData) -> str:
    """The most important parameter, and the combination with the smallest result."""
    name = short_name(data.metric)
    best, width, row, count = _smallest(data)
    setting = ", ".join(f"{short_name(c)} = {value_text(row[c])}" for c in _that_matter(data)[:4])
    seeds = f" over {count} runs" if count > 1 else ""
    smallest = f"smallest {name} {with_error(best, width)}{seeds}" + (f" at {setting}" if setting else "")
    if data.importance is None:
        return smallest[0].upper() + smallest[1:]
    first = data.importance.table.iloc[0]
    return f"{short_name(first['name'])} explains {100 * first['share']:.0f} % of the variance; {smallest}"


def _smallest(data: SweepData) -> tuple[float, float, Any, int]:
    """Mean, half width, a run and the number of runs of the combination with the smallest mean."""
    keys = data.parameters or ["kind"]
    codes = pd.factorize(pd.MultiIndex.from_frame(data.frame[keys].map(value_text)))[0]
    means = data.frame[data.metric].groupby(codes).mean()
    part = data.frame[codes == means.idxmin()]
    table = frames.over_runs(part.assign(all="x"), ("all",), data.metric)
    return float(table[data.metric][0]), float(table["half_width"][0]), part.iloc[0], len(part)


def _note(data: SweepData, left_out: int) -> str:
    runs, rows = data.frame["run"].nunique(), len(data.frame)
    line = "a run" if rows == runs else "a value that a run measured"
    parts = [f"{runs} runs. A line is {line}, and its colour the result at the right."]
    shares = data.importance
    if shares is not None:
        scale = f"log {short_name(data.metric)}" if shares.log else short_name(data.metric)
        parts.append(
            f"Shares are of the variance of {escape(scale)} over the sweep: main effects "
            "Σ n<sub>v</sub>(ȳ<sub>v</sub> − ȳ)² / Σ(y − ȳ)², less what chance gives (ε²). Bars: 95 % "
            "intervals by the jackknife over seeds, for three seeds or more."
        )
        if not shares.balanced:
            parts.append("Not every combination has as many runs: the shares of parameters overlap.")
    parts.append("Means are over runs that differ in nothing but the seed, with their 95 % intervals.")
    if left_out:
        parts.append(f"{left_out} more combinations are not drawn: narrow the filter.")
    return " ".join(parts)


def _facets(data: SweepData, theme: str) -> tuple[list[Any], int]:
    """Means against a parameter, a figure for each combination of what has no axis; how many are left out."""
    frame = data.frame
    ordered = _by_importance(data)
    numeric = [c for c in ordered if pd.to_numeric(frame[c], errors="coerce").notna().all()]
    x = max(numeric, key=lambda c: frame[c].nunique(), default=None)
    if x is None:
        return [], 0
    frame = frame.assign(**{x: pd.to_numeric(frame[x]).astype("float64")})
    others = [c for c in ordered if c != x]
    by = next((c for c in others if frame[c].astype(str).nunique() <= MAX_LINES), None)
    faceted = [c for c in others if c != by]
    if not faceted and frame["code"].nunique() > 1:
        faceted = ["code"]
    elif frame["code"].nunique() > 1:
        faceted.append("code")
    names = frame[faceted].map(value_text).agg(", ".join, axis=1) if faceted else pd.Series("", frame.index)
    keys = list(dict.fromkeys(names))
    words = [
        ", ".join(f"{short_name(c)} = {value_text(frame.loc[(names == key).idxmax(), c])}" for c in faceted)
        for key in keys[:MAX_FACETS]
    ]
    pictures = [
        means_against(frame[names == key], x, by, data.metric, title, theme)
        for key, title in zip(keys[:MAX_FACETS], words, strict=True)
    ]
    return pictures, max(0, len(keys) - MAX_FACETS)
