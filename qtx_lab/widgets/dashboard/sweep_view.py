"""The view Sweeps: which parameters of a sweep its result depends on, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from . import frames
from .elements import empty_note, late_select, offer, plus_minus
from .figure_views import FigureView, Finding
from .importance import Importance, importance
from .settings import differing, metric_columns, short_name, value_text
from .sweep_figures import MAX_LINES, importance_bars, means_against, parallel_coordinates
from .view_host import ViewHost

MAX_SWEEPS = 50
"""Sweeps that are offered: the newest."""

MAX_FACETS = 6
"""Figures of means, one for each combination of the parameters that have no axis."""

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
    """The runs of a sweep that have the metric, and the parameters in which they differ."""

    frame: pd.DataFrame
    parameters: list[str]
    metric: str
    importance: Importance | None


def sweep_view(page: ViewHost) -> FigureView:
    """Which parameters of a sweep matter, and how."""
    sweep, metric = late_select("Sweep"), late_select("Result")

    def gather(table: pd.DataFrame) -> Any:
        return table, _sweeps(table)

    def draw(data: Any) -> Finding:
        table, sweeps = data
        offer(sweep, sweeps)
        runs = table[table["sweep"] == sweep.value] if sweep.value else table[:0]
        offer(metric, {short_name(c): c for c in metric_columns(runs)})
        shown = _sweep_data(runs, metric.value) if metric.value else None
        if shown is None:
            return Finding("", "", [], ())
        pictures: list[Any] = []
        axes = _by_importance(shown)[:MAX_AXES]
        if axes:
            pictures.append(parallel_coordinates(shown.frame, axes[::-1], shown.metric, page.theme))
        if shown.importance is not None:
            pictures.append(importance_bars(shown.importance.table, page.theme))
        facets, left_out = _facets(shown, page.theme)
        return Finding(_title(shown), _note(shown, left_out), [*pictures, *facets], (), wide=1)

    controls = {"sweep": sweep, "result": metric}
    return FigureView(page, controls, gather, draw, NO_SWEEPS)


def _sweeps(table: pd.DataFrame) -> dict[str, str]:
    """The sweeps that runs of a table belong to, by their labels."""
    counts = table["sweep"].dropna().value_counts(sort=False) if "sweep" in table else pd.Series(dtype=int)
    names = list(dict.fromkeys(table["sweep"].dropna())) if len(counts) else []
    return {f"{name.partition('-')[2] or name} ({counts[name]} runs)": name for name in names[:MAX_SWEEPS]}


def _sweep_data(runs: pd.DataFrame, metric: str) -> SweepData | None:
    """The runs that have the metric; None where none has."""
    frame = frames.numbers(runs, metric)
    if frame.empty:
        return None
    parameters = [c for c in differing(frame) if frame[c].notna().all()]
    return SweepData(frame, parameters, metric, importance(frame, parameters, metric))


def _by_importance(data: SweepData) -> list[str]:
    """The parameters, the most important first."""
    if data.importance is None:
        return data.parameters
    return [name for name in data.importance.table["name"] if name in data.parameters]


def _title(data: SweepData) -> str:
    """The most important parameter, and the combination with the smallest result."""
    name = short_name(data.metric)
    best, width, row, count = _smallest(data)
    setting = ", ".join(f"{short_name(c)} = {value_text(row[c])}" for c in data.parameters[:4])
    seeds = f" over {count} seeds" if count > 1 else ""
    smallest = f"smallest {name} {plus_minus(best, width)}{seeds}" + (f" at {setting}" if setting else "")
    if data.importance is None:
        return smallest[0].upper() + smallest[1:]
    first = data.importance.table.iloc[0]
    return f"{short_name(first['name'])} explains {first['share']:.0%} of the variance; {smallest}"


def _smallest(data: SweepData) -> tuple[float, float, Any, int]:
    """Mean, half width, a run and the number of runs of the combination with the smallest mean."""
    keys = data.parameters or ["kind"]
    codes = pd.factorize(pd.MultiIndex.from_frame(data.frame[keys].map(value_text)))[0]
    means = data.frame[data.metric].groupby(codes).mean()
    part = data.frame[codes == means.idxmin()]
    table = frames.over_runs(
        part.assign(all="x").drop(columns="half_width", errors="ignore"), ("all",), data.metric
    )
    return float(table[data.metric][0]), float(table["half_width"][0]), part.iloc[0], len(part)


def _note(data: SweepData, left_out: int) -> str:
    parts = [f"{len(data.frame)} runs. A line is a run, and its colour the result at the right."]
    found = data.importance
    if found is not None:
        scale = f"log {short_name(data.metric)}" if found.log else short_name(data.metric)
        parts.append(
            f"Shares are of the variance of {scale} over the sweep: main effects "
            "Σ n<sub>v</sub>(ȳ<sub>v</sub> − ȳ)² / Σ(y − ȳ)², less what chance gives (ε²). Bars: 95 % "
            "intervals by the jackknife over seeds, for three seeds or more."
        )
        if not found.balanced:
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
    # A run's own `half_width` is of another quantity than the spread over seeds.
    frame = frame.drop(columns="half_width", errors="ignore")
    pictures = [
        means_against(frame[names == key], x, by, data.metric, title, theme)
        for key, title in zip(keys[:MAX_FACETS], words, strict=True)
    ]
    return pictures, max(0, len(keys) - MAX_FACETS)
