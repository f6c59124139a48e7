"""The views Error, Heads and Devices: each states a finding, and draws the figures behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn

from . import figures, frames
from .elements import (
    DRAWING,
    DashboardView,
    empty_note,
    html_pane,
    multi_select,
    offer,
    plus_minus,
    select,
    skipped_list,
)
from .records import Listing, Rows, Skipped
from .view_host import ViewHost


@dataclass(frozen=True)
class Finding:
    """What a view shows.

    Parameters
    ----------
    title : str
        The finding.
    note : str
        What it is made of, and how to read the figures; HTML.
    pictures : sequence
        HoloViews elements; none where there is nothing to draw.
    skipped : tuple of (run, reason)
        Metrics that could not be read.
    """

    title: str
    note: str
    pictures: Sequence[Any]
    skipped: Skipped


class FigureView(DashboardView):
    """A finding, figures and a caption.

    Parameters
    ----------
    page : ViewHost
    controls : list
    gather : callable
        From the filtered runs to the data; called in a thread.
    draw : callable
        From the data to a `Finding`.
    empty : str
        What to do where there is nothing to draw; HTML.
    """

    def __init__(
        self,
        page: ViewHost,
        controls: Sequence[Any],
        gather: Callable[[pd.DataFrame], Any],
        draw: Callable[[Any], Finding],
        empty: str,
    ):
        self._gather, self._draw, self._empty = gather, draw, empty
        self._title, self._caption = html_pane(DRAWING), html_pane()
        self._plots = pn.FlexBox(sizing_mode="stretch_width")
        super().__init__(page, [self._title, self._plots, self._caption], controls)

    def prepare(self, listing: Listing, rows: pd.DataFrame) -> Any:
        """Read the metrics of the filtered runs."""
        return self._gather(rows)

    def state(self) -> Any:
        """The values of the controls."""
        return tuple(
            tuple(control.value) if isinstance(control.value, list) else control.value
            for control in self.controls
        )

    def show(self, data: Any) -> None:
        """Show the finding, or what to do where there is none."""
        finding = self._draw(data)
        skipped = skipped_list(finding.skipped)
        if not finding.pictures:
            self._title.object, self._plots.objects, self._caption.object = self._empty, [], skipped
            return
        self._title.object = f"<h2>{escape(finding.title)}</h2>"
        self._plots.objects = [
            pn.pane.HoloViews(
                picture, height=figures.HEIGHT, min_width=420, sizing_mode="stretch_width", linked_axes=False
            )
            for picture in finding.pictures
        ]
        self._caption.object = f"<p class='note'>{finding.note}</p>{skipped}"


def _drawn_runs(rows: Rows) -> str:
    """How many runs a figure shows, and how many it leaves out."""
    count = rows.frame["run"].nunique()
    left_out = f" {rows.left_out} older runs are not drawn: narrow the filters." if rows.left_out else ""
    return f"{count} run{'s' if count != 1 else ''}.{left_out}"


# --- Error --------------------------------------------------------------------------------------------

NO_ERRORS = empty_note(
    "No error against draws yet",
    "Runs that measure one log <code>sampler</code>, <code>num_samples</code> and <code>error</code>: "
    "<code>qtx-lab demo</code> makes the first, <code>qtx-lab run 01_estimators</code> a larger one.",
)


def error_view(page: ViewHost) -> FigureView:
    """Which sampler has the smallest error."""
    metric = select(label="Measured", options={"relative error": "error", "bits per byte": "bits_per_byte"})
    samplers = multi_select("Samplers")

    def gather(table: pd.DataFrame) -> tuple[Rows, str]:
        return page.records.rows(table, "sampler", "num_samples", metric.value), metric.value

    def draw(data: tuple[Rows, str]) -> Finding:
        rows, measured = data
        frame = rows.frame.astype({"sampler": str})
        samplers.options = sorted(set(frame["sampler"]) | set(samplers.value))
        if samplers.value:
            frame = frame[frame["sampler"].isin(samplers.value)]
        frame = frames.positive(frame, "num_samples", measured)
        if frame.empty:
            return Finding("", "", [], rows.skipped)
        note = (
            f"Mean of {_drawn_runs(replace(rows, frame=frame))} Bars: 95 % intervals, over runs where there "
            "are several, else the run's own."
        )
        picture = figures.error_against_draws(frame, measured, page.theme)
        return Finding(_best_sampler(frame, measured), note, [picture], rows.skipped)

    return FigureView(page, [metric, samplers], gather, draw, NO_ERRORS)


def _best_sampler(frame: pd.DataFrame, metric: str) -> str:
    """The best sampler at the largest number of draws that most samplers have."""
    mean = frames.over_runs(frame, ("sampler", "num_samples"), metric)
    num_samplers = mean.groupby("num_samples")["sampler"].nunique()
    draws = num_samplers[num_samplers == num_samplers.max()].index.max()
    best = mean[mean["num_samples"] == draws].sort_values(metric).iloc[0]
    value = plus_minus(best[metric], best["half_width"])
    return f"With {draws:g} draws a row {best['sampler']} is best: {value}"


# --- Heads --------------------------------------------------------------------------------------------

NO_VARIANCES = empty_note(
    "No variance by head yet",
    "Runs that measure it log <code>layer</code>, <code>head</code> and <code>variance</code>: "
    "<code>qtx-lab demo</code> makes the first.",
)


def heads_view(page: ViewHost) -> FigureView:
    """Which head is the hardest to sample."""
    run = select(label="Run", options=[])
    setting = select(label="Sampler and draws", options=[])

    def gather(table: pd.DataFrame) -> Rows:
        return page.records.rows(table, "layer", "head", "variance")

    def draw(rows: Rows) -> Finding:
        frame = frames.numbers(frames.positive(rows.frame, "variance"), "layer", "head")
        offer(run, {name.partition("-")[2] or name: name for name in dict.fromkeys(frame["run"])})
        frame = frame[frame["run"] == run.value]
        if frame.empty:
            return Finding("", "", [], rows.skipped)
        frame = frame.assign(setting=_settings(frame))
        offer(setting, {name: name for name in frame["setting"]})
        frame = frame[frame["setting"] == setting.value]
        step = ""
        if "step" in frame and len(steps := frames.numbers(frame, "step")):
            frame = steps[steps["step"] == steps["step"].max()]
            step = f", step {frame['step'].iloc[0]:.0f}"
        worst = frame.loc[frame["variance"].idxmax()]
        ratio = worst["variance"] / frame["variance"].median()
        title = (
            f"Layer {worst['layer']:.0f}, head {worst['head']:.0f} is the hardest: "
            f"{ratio:.2g}× the median variance"
        )
        chosen = f", {escape(str(setting.value))}" if setting.value else ""
        note = f"Run {escape(str(run.value))}{chosen}{step}. {len(frame)} heads."
        return Finding(title, note, [figures.variance_by_head(frame, page.theme)], rows.skipped)

    return FigureView(page, [run, setting], gather, draw, NO_VARIANCES)


def _settings(frame: pd.DataFrame) -> list[str]:
    """Sampler and draws of each row, as far as they are known."""
    samplers = frame.get("sampler", pd.Series("", frame.index))
    draws = pd.to_numeric(frame.get("num_samples", pd.Series(np.nan, frame.index)), errors="coerce")
    names = []
    for sampler, count in zip(samplers, draws, strict=True):
        known = "" if pd.isna(sampler) else str(sampler)
        names.append(" ".join(filter(None, (known, f"S = {count:g}" if count == count else ""))))
    return names


# --- Devices ------------------------------------------------------------------------------------------

NO_CIRCUITS = empty_note(
    "No circuits measured yet",
    "Runs that measure them log <code>loader</code>, <code>shots</code> and <code>distance</code>: "
    "start with <code>qtx-lab run 02_circuits</code>.",
)


def devices_view(page: ViewHost) -> FigureView:
    """Which loader on which device comes nearest to the row."""
    device = multi_select("Devices")
    loader = multi_select("Loaders")

    def gather(table: pd.DataFrame) -> tuple[Rows, Rows]:
        distances = page.records.rows(table, "loader", "shots", "distance")
        return distances, page.records.rows(table, "loader", "m", "fidelity")

    def chosen(frame: pd.DataFrame) -> pd.DataFrame:
        known = frame["device"] if "device" in frame else pd.Series(np.nan, frame.index)
        frame = frame.assign(
            device=known.astype(object).where(known.notna(), "device not recorded").astype(str),
            loader=frame["loader"].astype(str),
        )
        for control, column in ((device, "device"), (loader, "loader")):
            control.options = sorted(set(control.options) | set(frame[column]))
            if control.value:
                frame = frame[frame[column].isin(control.value)]
        return frame

    def draw(data: tuple[Rows, Rows]) -> Finding:
        distances = frames.positive(chosen(data[0].frame), "shots", "distance")
        states = frames.positive(chosen(data[1].frame), "m", "fidelity")
        pictures = []
        title = "State fidelity by device and loader"
        if len(distances):
            title = _closest_device(distances)
            pictures.append(figures.distance_against_shots(distances, page.theme))
        if len(states):
            pictures.append(figures.fidelity_against_qubits(states, page.theme))
        note = (
            f"{_drawn_runs(data[0])} Hollow points: raw counts; bars: 95 % intervals, over runs where there "
            "are several. Dashed: the same number of pseudo-random draws, over which loading a known row has "
            "no advantage."
        )
        return Finding(title, note, pictures, data[0].skipped)

    return FigureView(page, [device, loader], gather, draw, NO_CIRCUITS)


def _closest_device(frame: pd.DataFrame) -> str:
    mean = frames.over_runs(frame, ("device", "loader", "shots"), "distance")
    best = mean.sort_values("distance").iloc[0]
    return (
        f"Closest to the row: {best['loader']} on {best['device']}, total variation "
        f"{plus_minus(best['distance'], best['half_width'])} with {best['shots']:,.0f} shots"
    )
