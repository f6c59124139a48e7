"""The view Live: curves of the runs that are being written, and how far sweeps are."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from html import escape
from typing import Any

import holoviews as hv
import numpy as np
import pandas as pd
import panel as pn

from ...errors import QtxError
from ...experiments.manifest import STATUSES
from . import figures, frames
from .elements import DashboardView, empty_note, html_pane, html_table, status_mark
from .records import Listing
from .view_host import ViewHost

MAX_FOLLOWED = 8
"""Runs whose curves are drawn while they are written: as many as there are colours."""

MAX_CHARTS = 6
"""Metrics that are drawn."""

X_COLUMNS = ("step", "epoch", "shots", "num_samples")
"""What a live curve is drawn against: the first of these that a run has, else the number of the row."""

NOT_DRAWN = {*X_COLUMNS, "layer", "head", "seed", "half_width", "row", "run", "name", "time"}

COLUMNS = {"status": "", "name": "", "seconds": "number", "measured": "", "folder": ""}

NOTHING_RUNS = empty_note(
    "Nothing is running",
    "Runs that are being written show their curves here, twice a second: start one with "
    "<code>qtx-lab run</code>, <code>qtx-lab sweep</code> or <code>qtx-lab train</code>.",
)

Curves = dict[tuple[str, str], dict[str, tuple[np.ndarray, np.ndarray]]]
"""{(metric, what it is drawn against): {run: (x, y)}}"""


@dataclass(frozen=True)
class LiveRun:
    """A run that is followed: its row of the listing, and its metrics or why they cannot be read."""

    row: Any
    metrics: pd.DataFrame | QtxError


@dataclass(frozen=True)
class LiveData:
    """What the view shows: how far the sweeps are, as HTML, and the runs that are followed, by name."""

    sweeps: str
    runs: dict[str, LiveRun]


class LiveView(DashboardView):
    """Curves of the runs that are being written; a run stays on the page when it ends."""

    def __init__(self, page: ViewHost):
        self._table, self._charts = html_pane(), pn.FlexBox(sizing_mode="stretch_width")
        self._followed: dict[str, None] = {}  # seen running: they stay on the page when they end
        self._layout: Any = None  # the runs and charts that are on the page
        self._pipes: dict[tuple[str, str], hv.streams.Pipe] = {}
        super().__init__(page, [self._table, self._charts])

    def state(self) -> Any:
        """Changes whenever the metrics of a followed run do."""
        table = self.page.filtered(self.page.records.listing)
        if table.empty:
            return ()
        self._followed |= dict.fromkeys(table["run"][table["status"] == "running"])
        followed = [run for run in table["run"] if run in self._followed][:MAX_FOLLOWED]
        return tuple((run, self.page.records.mark(run)) for run in followed)

    def prepare(self, listing: Listing, rows: pd.DataFrame) -> LiveData:
        """Read the metrics of the followed runs."""
        names = set(rows["run"])
        sweeps = _sweep_progress(listing.table, [run for run in self._followed if run in names])
        followed: dict[str, LiveRun] = {}
        for row in rows.itertuples():
            if row.run in self._followed and len(followed) < MAX_FOLLOWED:
                try:
                    followed[row.run] = LiveRun(row, self.page.records.metrics(row.run))
                except QtxError as error:
                    followed[row.run] = LiveRun(row, error)
        return LiveData(sweeps, followed)

    def show(self, data: LiveData) -> None:
        """Show the curves; those that are on the page already only get their new points."""
        if not data.runs:
            self._table.object, self._charts.objects, self._layout = NOTHING_RUNS, [], None
            return
        palette = figures.curve_colours(self.page.theme, len(data.runs))
        colours = dict(zip(data.runs, palette, strict=True))
        lines = [_line(name, run, colours[name]) for name, run in data.runs.items()]
        self._table.object = data.sweeps + html_table(COLUMNS, lines)
        curves = _curves(data.runs)
        layout = (tuple(data.runs), {chart: tuple(lines) for chart, lines in curves.items()})
        if layout == self._layout:
            for chart, points in curves.items():
                self._pipes[chart].send(points)
            return
        self._layout = layout
        self._pipes = {chart: hv.streams.Pipe(data=points) for chart, points in curves.items()}
        self._charts.objects = [self._chart(*chart, colours) for chart in curves]

    def _chart(self, metric: str, x: str, colours: dict[str, str]) -> Any:
        draw = partial(figures.live_curves, colours=colours, x=x, metric=metric, theme=self.page.theme)
        picture = hv.DynamicMap(lambda data: draw(data), streams=[self._pipes[metric, x]])
        return pn.pane.HoloViews(picture, margin=(6, 12, 6, 0), linked_axes=False)


def _sweep_progress(table: pd.DataFrame, followed: list[str]) -> str:
    """How far the sweeps among the followed runs are, as HTML."""
    lines = []
    for _, row in table[table["run"].isin(followed) & (table["kind"] == "SweepSpec")].iterrows():
        planned, earlier = (
            pd.to_numeric(row.get(f"results.{name}"), errors="coerce") for name in ("notebooks", "kept")
        )
        if not planned > 0:  # the sweep has not said yet, or what it says is no number
            continue
        earlier = 0 if pd.isna(earlier) else int(earlier)
        counts = table["status"][table["sweep"] == row["run"]].value_counts()
        ended = counts.sum() - counts.get("running", 0)
        details = ", ".join(f"{counts[status]} {status}" for status in STATUSES if status in counts)
        details += f", {earlier} from earlier sweeps" if earlier else ""
        left = ""
        if row["status"] == "running" and ended:
            seconds = (datetime.now(UTC) - row["started"]).total_seconds()
            left = f"; about {seconds / ended * (planned - earlier - ended):.0f} s left"
        lines.append(
            f"<p><b>{escape(str(row['name']))}</b>: {earlier + ended:.0f} of {planned:.0f} notebooks have "
            f"ended ({escape(details)}){left} <progress max='{planned:.0f}' value='{earlier + ended:.0f}' "
            f"aria-label='Progress of {escape(row['run'])}'></progress></p>"
        )
    return "".join(lines)


def _curves(runs: dict[str, LiveRun]) -> Curves:
    """The curves of at most `MAX_CHARTS` metrics; rows with the same x are averaged."""
    curves: Curves = {}
    for name, run in runs.items():
        if not isinstance(run.metrics, pd.DataFrame):
            continue
        frame = run.metrics
        x = next((x for x in X_COLUMNS if x in frame and len(frames.numbers(frame, x))), "row")
        frame = frame.assign(row=np.arange(len(frame))) if x == "row" else frame
        for metric in frame.columns:
            types = pd.api.types
            numeric = types.is_numeric_dtype(frame[metric]) and not types.is_bool_dtype(frame[metric])
            if metric in NOT_DRAWN or not numeric:
                continue
            mean = frames.numbers(frame[[x, metric]], x, metric).groupby(x)[metric].mean()
            if len(mean) and ((metric, x) in curves or len(curves) < MAX_CHARTS):
                curves.setdefault((metric, x), {})[name] = (mean.index.to_numpy(), mean.to_numpy())
    return curves


def _line(name: str, run: LiveRun, colour: str) -> str:
    """A line of the table of followed runs."""
    row = run.row
    seconds = row.seconds
    if row.status == "running":
        seconds = (datetime.now(UTC) - row.started.to_pydatetime()).total_seconds()
    return (
        f"<tr><td>{status_mark(row.status)}</td><td><b style='color:{colour}'>━</b> {escape(row.name)}</td>"
        f"<td class='number'>{seconds:.0f}</td><td>{_last_metrics(run.metrics)}</td>"
        f"<td class='folder note'>{escape(name)}</td></tr>"
    )


def _last_metrics(metrics: pd.DataFrame | QtxError) -> str:
    """The last row of the metrics in words."""
    if isinstance(metrics, QtxError):
        return f"<span class='why'>metrics cannot be read: {escape(str(metrics))}</span>"
    if metrics.empty:
        return "nothing measured yet"
    last = metrics.iloc[-1].dropna()
    numbers = [
        f"{key} {value:.4g}" for key, value in last.items() if isinstance(value, int | float | np.number)
    ]
    return f"{len(metrics)} rows; last: {escape(', '.join(numbers[:6]))}"
