"""The view Live: how far runs and sweeps are, and curves of what they have measured so far."""

from __future__ import annotations

from collections.abc import Mapping
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
from ...theme import SAMPLER_MARKERS, digits, sampler_style
from . import figures, frames
from .cells import Cell, seconds_since
from .elements import DRAWING, DashboardView, empty_note, html_pane, html_table, status_mark
from .figure_views import PICTURE_WIDTH, picture_pane
from .records import Listing
from .settings import RESULT, SPEC, metric_columns, short_name, value_text
from .view_host import ViewHost

MAX_FOLLOWED = 8
"""Runs whose curves are drawn while they are written: as many as there are colours."""

MAX_CHARTS = 6
"""Metrics that are drawn."""

X_COLUMNS = ("step", "epoch", "shots", "num_samples")
"""What a live curve is drawn against: the first of these that a run has, else the number of the row."""

LOG_COLUMNS = ("shots", "num_samples")
"""Those against which a curve is drawn on logarithmic axes."""

NOT_DRAWN = {*X_COLUMNS, "layer", "head", "seed", "half_width", "row", "run", "name", "time"}

MAX_LABELS = 8
"""Lines of one run in a chart: one for each sampler, loader or other word that its rows have."""

COLUMNS = {"status": "", "name": "", "seconds": "number", "progress": "", "measured": ""}

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
    cells: tuple[Cell, ...] = ()
    settings: frozenset[str] = frozenset()
    """Names of the fields of its spec, without those whose column in the metrics has other values."""


@dataclass(frozen=True)
class LiveData:
    """What the view shows: how far the sweeps are, as HTML, and the runs that are followed, by name."""

    sweeps: str
    runs: dict[str, LiveRun]


class LiveView(DashboardView):
    """Curves of the runs that are being written; a run stays on the page when it ends."""

    def __init__(self, page: ViewHost):
        self._table, self._charts = html_pane(DRAWING), pn.FlexBox(sizing_mode="stretch_width")
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
        records = self.page.records
        return tuple((run, records.mark(run), records.notebook_mark(run)) for run in followed)

    def prepare(self, listing: Listing, rows: pd.DataFrame) -> LiveData:
        """Read the metrics of the followed runs."""
        names = set(rows["run"])
        sweeps = _sweep_progress(listing.table, [run for run in self._followed if run in names])
        followed: dict[str, LiveRun] = {}
        for row in rows.itertuples():
            if row.run in self._followed and len(followed) < MAX_FOLLOWED:
                metrics: pd.DataFrame | QtxError
                try:
                    metrics = self.page.records.metrics(row.run)
                except QtxError as error:
                    metrics = error
                own = rows.loc[row.Index]
                fields = [c for c in rows.columns if c.startswith(SPEC)]
                fields = [c for c in fields if pd.notna(own[c]) and not _is_measured(c, own[c], metrics)]
                settings = frozenset(map(short_name, fields))
                cells = self.page.records.cells(row.run) or ()
                followed[row.run] = LiveRun(own, metrics, cells, settings)
        return LiveData(sweeps, followed)

    def show(self, data: LiveData) -> None:
        """Show the curves; those that are on the page already only get their new points."""
        if not data.runs:
            self._table.object, self._charts.objects, self._layout = NOTHING_RUNS, [], None
            return
        palette = figures.curve_colours(self.page.theme, len(data.runs))
        colours = dict(zip(data.runs, palette, strict=True))
        lines = [self._line(name, run, colours[name]) for name, run in data.runs.items()]
        self._table.object = data.sweeps + html_table(COLUMNS, lines)
        curves = _curves(data.runs)
        logs = {chart: _log_axes(chart[1], lines) for chart, lines in curves.items()}
        layout = (tuple(data.runs), logs, {chart: tuple(lines) for chart, lines in curves.items()})
        if layout == self._layout:
            for chart, points in curves.items():
                self._pipes[chart].send(points)
            return
        self._layout = layout
        self._pipes = {chart: hv.streams.Pipe(data=points) for chart, points in curves.items()}
        self._charts.objects = [
            self._chart(*chart, logs[chart], colours, list(curves[chart])) for chart in curves
        ]

    def _chart(
        self, metric: str, x: str, log: tuple[bool, bool], of_runs: dict[str, str], labels: list[str]
    ) -> Any:
        colours = {label: of_runs[label.split("/")[0]] for label in labels}
        if len({label.split("/")[0] for label in labels}) == 1:  # then colours tell the run's lines apart
            colours = _line_colours(labels, self.page.theme)
        draw = partial(
            figures.live_curves, colours=colours, x=x, metric=metric, theme=self.page.theme, log=log
        )
        picture = hv.DynamicMap(lambda data: draw(data), streams=[self._pipes[metric, x]])
        return picture_pane(picture, figures.LIVE_HEIGHT, f"{PICTURE_WIDTH}px")

    def _line(self, name: str, run: LiveRun, colour: str) -> str:
        """A line of the table of followed runs."""
        row, now = run.row, datetime.now(UTC)
        running = row["status"] == "running"
        seconds = (now - row["started"].to_pydatetime()).total_seconds() if running else row["seconds"]
        link = escape(self.page.link(view="Run", run=name))
        return (
            f"<tr><td>{status_mark(row['status'])}</td><td><b style='color:{colour}'>━</b> "
            f"<a href='{link}' title='{escape(name)}'>{escape(row['name'])}</a></td>"
            f"<td class='number'>{seconds:.0f}</td><td>{_progress(run.cells, now)}</td>"
            f"<td>{_measured(run)}</td></tr>"
        )


def _sweep_progress(table: pd.DataFrame, followed: list[str]) -> str:
    """How far the sweeps among the followed runs are, as HTML."""
    lines = []
    kinds = ("SweepSpec", "SearchSpec")
    for _, row in table[table["run"].isin(followed) & table["kind"].isin(kinds)].iterrows():
        planned, earlier, trials, repeats = (
            pd.to_numeric(row.get(name), errors="coerce")
            for name in ("results.notebooks", "results.kept", "spec.trials", "spec.repeats")
        )
        at_most = ""
        if row["kind"] == "SearchSpec":  # which leaves out repeats of what cannot be the best
            planned, at_most = trials * repeats, "at most "
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
            left = f"; about {_in_words(seconds / ended * (planned - earlier - ended))} left"
        so_far = earlier + ended
        lines.append(
            f"<p><b>{escape(str(row['name']))}</b>: {so_far:.0f} of {at_most}{planned:.0f} notebooks have "
            f"ended ({escape(details)}){left} <progress max='{planned:.0f}' value='{so_far:.0f}' "
            f"aria-label='Progress of {escape(row['run'])}'></progress></p>"
        )
    return "".join(lines)


def _in_words(seconds: float) -> str:
    """A time to wait, roughly.

    >>> _in_words(80), _in_words(683), _in_words(9000)
    ('80 s', '11 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _curves(runs: dict[str, LiveRun]) -> Curves:
    """The curves of at most `MAX_CHARTS` results; a line is named "run/words" where rows have words.

    Rows of a line with the same x, such as those of several heads, are averaged.
    """
    curves: Curves = {}
    for name, run in runs.items():
        if not isinstance(run.metrics, pd.DataFrame):
            continue
        frame = run.metrics.assign(row=np.arange(len(run.metrics)))
        labels = _labels(frame, name)
        known = [x for x in X_COLUMNS if x in frame]
        for metric in _results(frame, run.settings):
            x = next((x for x in known if len(frames.numbers(frame[[x, metric]], x, metric))), "row")
            points = frames.numbers(frame[[x, metric]].assign(label=labels), x, metric)
            for label, part in list(points.groupby("label", sort=False))[:MAX_LABELS]:
                mean = part.groupby(x)[metric].mean()
                if (metric, x) in curves or len(curves) < MAX_CHARTS:
                    line = (mean.index.to_numpy(), mean.to_numpy())
                    curves.setdefault((metric, x), {})[str(label)] = line
    return curves


def _log_axes(x: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[bool, bool]:
    """Whether the axes of a chart are logarithmic: against draws or shots, where all numbers are positive."""
    log_x, log_y = (x in LOG_COLUMNS and all((line[i] > 0).all() for line in lines.values()) for i in (0, 1))
    return log_x, log_y


def _line_colours(labels: list[str], theme: str) -> dict[str, str]:
    """Colours of the lines of one run: samplers have their own, if no two lines are of the same one."""
    words = [label.partition("/")[2].split(", ") for label in labels]
    samplers = [next((word for word in line if word in SAMPLER_MARKERS), "") for line in words]
    if "" not in samplers and len(set(samplers)) == len(samplers):
        shades = [sampler_style(sampler, theme)["color"] for sampler in samplers]
    else:
        shades = figures.curve_colours(theme, len(labels))
    return dict(zip(labels, shades, strict=True))


def _is_measured(field: str, value: Any, metrics: pd.DataFrame | QtxError) -> bool:
    """Whether the metrics have a column with the name of a field, and other values in it."""
    if not isinstance(metrics, pd.DataFrame) or short_name(field) not in metrics:
        return False
    logged = metrics[short_name(field)].dropna()
    return bool((logged.map(value_text) != value_text(value)).any())


def _results(frame: pd.DataFrame, settings: frozenset[str]) -> list[str]:
    """The columns of metrics that are numbers and were measured, not set."""
    types = pd.api.types
    return [
        column
        for column in frame.columns
        if column not in NOT_DRAWN
        and column not in settings
        and not column.endswith(("half_width", "std_error"))
        and types.is_numeric_dtype(frame[column])
        and not types.is_bool_dtype(frame[column])
    ]


def _labels(frame: pd.DataFrame, run: str) -> pd.Series:
    """The line that each row belongs to: the run, and the words in which its rows differ."""
    words = [
        column
        for column in frame.columns
        if not pd.api.types.is_numeric_dtype(frame[column]) and frame[column].astype(str).nunique() > 1
    ]
    if not words:
        return pd.Series(run, frame.index)
    return f"{run}/" + frame[words].fillna("").astype(str).agg(", ".join, axis=1)


def _progress(cells: tuple[Cell, ...], now: datetime) -> str:
    """How many cells of the notebook have ended, and which one runs for how long."""
    if not cells:
        return ""
    ended = sum(cell.status in ("completed", "failed") for cell in cells)
    running = next((cell for cell in cells if cell.status == "running"), None)
    at = ""
    if running is not None:
        seconds = seconds_since(running.started, now)
        duration = f"for {seconds:.0f} s" if seconds == seconds else ""
        at = f"<span class='why'>cell {running.number} {duration}: {escape(running.first_line)}</span>"
    return (
        f"<progress max='{len(cells)}' value='{ended}' aria-label='Cells that have ended'></progress> "
        f"{ended} of {len(cells)} cells{at}"
    )


def _measured(run: LiveRun) -> str:
    """The results so far, and the last row of the metrics without what was set, in words."""
    metrics = run.metrics
    if isinstance(metrics, QtxError):
        return f"<span class='why'>metrics cannot be read: {escape(str(metrics))}</span>"
    columns = metric_columns(run.row.to_frame().T.infer_objects())
    results = [f"{c.removeprefix(RESULT)} {digits(run.row[c], 4)}" for c in columns if c != "results.kept"]
    result_line = f"<b>{escape(', '.join(results[:6]))}</b> " if results else ""
    if metrics.empty:
        return result_line or "nothing measured yet"
    last = metrics.iloc[-1].dropna()
    shown = [c for c in X_COLUMNS if c in last.index and c not in run.settings]
    shown += [c for c in last.index if c in _results(metrics, run.settings)]
    numbers = [
        f"{key} {digits(last[key], 4)}" for key in shown if isinstance(last[key], int | float | np.number)
    ]
    return f"{result_line}{len(metrics)} rows; last: {escape(', '.join(numbers[:6]))}"
