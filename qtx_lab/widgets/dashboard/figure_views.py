"""The views Error, Heads and Devices: each states a finding, and draws the figures behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn

from ...theme import with_error
from . import figures, frames
from .elements import (
    DRAWING,
    DashboardView,
    empty_note,
    html_pane,
    late_select,
    multi_select,
    offer,
    select,
    skipped_list,
)
from .records import Listing, Rows, Skipped
from .view_host import ViewHost

PICTURE_WIDTH = 460
"""Width of a figure in pixels, at least, where two stand side by side."""


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
    width : int
        The least width in pixels of a figure that stands beside another.
    wide : int
        How many of the first pictures have a line of their own.
    table : str
        What stands below the pictures; HTML.
    """

    title: str
    note: str
    pictures: Sequence[Any]
    skipped: Skipped
    width: int = PICTURE_WIDTH
    wide: int = 0
    table: str = ""


class FigureView(DashboardView):
    """A finding, figures and a caption.

    Parameters
    ----------
    page : ViewHost
    controls : mapping
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
        controls: Mapping[str, Any],
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

    def show(self, data: Any) -> None:
        """Show the finding, or what to do where there is none."""
        finding = self._draw(data)
        skipped = skipped_list(finding.skipped)
        if not finding.pictures:
            self._title.object, self._plots.objects, self._caption.object = self._empty, [], skipped
            return
        self._title.object = f"<h2>{escape(finding.title)}</h2>"
        self._plots.objects = [
            picture_pane(picture, figures.HEIGHT, "100%" if i < finding.wide else f"{finding.width}px")
            for i, picture in enumerate(finding.pictures)
        ]
        self._caption.object = f"<p class='note'>{finding.note}</p>{finding.table}{skipped}"


def picture_pane(picture: Any, height: int, room: str) -> Any:
    """A pane that shares a line with others where there is as much room, in CSS, for each of them."""
    return pn.pane.HoloViews(
        picture,
        height=height,
        min_width=420,
        sizing_mode="stretch_width",
        styles={"flex": f"1 1 {room}"},
        linked_axes=False,
    )


def drawn_runs(rows: Rows) -> str:
    """How many runs a figure shows, and how many it leaves out."""
    count = rows.frame["run"].nunique()
    left_out = f" {rows.left_out} older runs are not drawn: narrow the filters." if rows.left_out else ""
    return f"{count} run{'s' if count != 1 else ''}.{left_out}"


MAX_FACETS = 6
"""Figures for runs that differ in more than the seed."""


def facets_left_out(facets: int) -> str:
    """What is said where not all settings are drawn."""
    hidden = facets - MAX_FACETS
    return f" {hidden} more settings are not drawn: narrow the filters." if hidden > 0 else ""


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
        parts = dict(list(frame.groupby("facet", sort=False)))
        pictures = [
            figures.error_against_draws(part, measured, page.theme, name)
            for name, part in list(parts.items())[:MAX_FACETS]
        ]
        note = (
            f"Mean of {drawn_runs(replace(rows, frame=frame))} A figure has runs that differ in nothing but "
            "the seed. Bars: 95 % intervals, over runs where there are several, else the run's own."
            f"{facets_left_out(len(parts))}"
        )
        title = _best_sampler(next(iter(parts.values())), measured)
        if len(parts) > 1:
            title += f" (first of {len(parts)} settings)"
        return Finding(title, note, pictures, rows.skipped)

    return FigureView(page, {"measured": metric, "samplers": samplers}, gather, draw, NO_ERRORS)


def _best_sampler(frame: pd.DataFrame, metric: str) -> str:
    """The best sampler at the largest number of draws that most samplers have."""
    mean = frames.over_runs(frame, ("sampler", "num_samples"), metric)
    num_samplers = mean.groupby("num_samples")["sampler"].nunique()
    draws = num_samplers[num_samplers == num_samplers.max()].index.max()
    best = mean[mean["num_samples"] == draws].sort_values(metric).iloc[0]
    value = with_error(best[metric], best["half_width"])
    return f"With {draws:g} draws a row {best['sampler']} is best: {value}"


# --- Heads --------------------------------------------------------------------------------------------

NO_VARIANCES = empty_note(
    "No variance by head yet",
    "Runs that measure it log <code>layer</code>, <code>head</code> and <code>variance</code>: "
    "<code>qtx-lab demo</code> makes the first.",
)


def heads_view(page: ViewHost) -> FigureView:
    """Which head is the hardest to sample."""
    run = late_select("Run")
    setting = late_select("Sampler and draws")

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

    return FigureView(page, {"of": run, "setting": setting}, gather, draw, NO_VARIANCES)


def _settings(frame: pd.DataFrame) -> list[str]:
    """Sampler and draws of each row, as far as they are known."""
    samplers = frame.get("sampler", pd.Series("", frame.index))
    draws = pd.to_numeric(frame.get("num_samples", pd.Series(np.nan, frame.index)), errors="coerce")
    names = []
    for sampler, count in zip(samplers, draws, strict=True):
        known = "" if pd.isna(sampler) else str(sampler)
        names.append(" ".join(filter(None, (known, f"S = {count:g}" if count == count else ""))))
    return names
