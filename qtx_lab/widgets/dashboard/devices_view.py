"""The view Devices: how near circuits come to the row, raw and mitigated, and how old calibrations are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from ...theme import digits, with_error
from ..numbers import spaced
from . import figures, frames
from .elements import empty_note, html_table, multi_select
from .figure_views import MAX_FACETS, FigureView, Finding, drawn_runs, facets_left_out
from .records import Rows
from .view_host import ViewHost

NO_CIRCUITS = empty_note(
    "No circuits measured yet",
    "Measure rows in the workbench's tabs Circuit, Mitigate or Hardware, or type "
    "<code>qtx-lab run 02_circuits</code>. Runs of your own are shown if they log <code>loader</code>, "
    "<code>shots</code> and <code>distance</code>.",
)

MAX_LINES = 40
"""Measurements that are listed: those that come nearest to the row."""

DISTANCE = ("device", "loader", "mitigation", "shots")

COLUMNS = {
    "device": "",
    "loader": "",
    "mitigation": "",
    "shots a row": "number",
    "total variation": "number",
    "classical draws": "number",
    "runs": "number",
    "calibrated (UTC)": "",
    "age when measured": "number",
}


FIGURE_WIDTH = 560
"""Width of a figure in pixels, at least, where two stand side by side: names of devices are long."""


def devices_view(page: ViewHost) -> FigureView:
    """Which loader on which device comes nearest to the row."""
    device, loader = multi_select("Devices"), multi_select("Loaders")

    def gather(table: pd.DataFrame) -> tuple[Rows, Rows, pd.DataFrame]:
        distances = page.records.rows(table, "loader", "shots", "distance")
        return distances, page.records.rows(table, "loader", "m", "fidelity"), table

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

    def draw(data: tuple[Rows, Rows, pd.DataFrame]) -> Finding:
        distances = frames.positive(raw_and_mitigated(chosen(data[0].frame)), "shots", "distance")
        states = frames.positive(chosen(data[1].frame), "m", "fidelity")
        pictures: list[Any] = []
        title = "State fidelity by device and loader"
        parts = dict(list(distances.groupby("facet", sort=False)))
        if len(distances):
            title = _closest_device(distances)
            pictures += [
                figures.distance_against_shots(part, page.theme, name)
                for name, part in list(parts.items())[:MAX_FACETS]
            ]
        if len(states):
            pictures.append(figures.fidelity_against_qubits(states, page.theme))
        note = (
            f"{drawn_runs(data[0])} Hollow points: raw counts; filled: mitigated; bars: 95 % intervals, over "
            "runs that differ in nothing but the seed where there are several. Dashed: the same number of "
            "pseudo-random draws, over which loading a known row has no advantage."
            f"{facets_left_out(len(parts))}</p>{_measurements(distances, data[2])}<p>"
        )
        return Finding(title, note, pictures, data[0].skipped, width=FIGURE_WIDTH)

    return FigureView(page, {"devices": device, "loaders": loader}, gather, draw, NO_CIRCUITS)


def raw_and_mitigated(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with a column `mitigation`: "" for raw counts, and once more for what was mitigated.

    A row of metrics may hold `mitigated`, its total variation after the `mitigation`, and
    `mitigated_half_width`.
    """
    raw = frame.assign(mitigation="")
    if "mitigated" not in frame or frame.empty:
        return raw
    done = frame[pd.to_numeric(frame["mitigated"], errors="coerce").notna()]
    names = done["mitigation"] if "mitigation" in done else pd.Series("", done.index)
    mitigated = done.assign(
        distance=done["mitigated"],
        half_width=done.get("mitigated_half_width", np.nan),
        mitigation=names.fillna("").astype(str).replace("", "mitigated"),
    )
    return pd.concat([raw, mitigated], ignore_index=True)


def _closest_device(frame: pd.DataFrame) -> str:
    mean = frames.over_runs(frame, ("facet", *DISTANCE), "distance")
    best = mean.sort_values("distance").iloc[0]
    mitigation = f" with {best['mitigation']}" if best["mitigation"] else ""
    return (
        f"Closest to the row: {best['loader']} on {best['device']}{mitigation}, total variation "
        f"{with_error(best['distance'], best['half_width'])} with {spaced(round(best['shots']))} shots"
    )


def _measurements(frame: pd.DataFrame, table: pd.DataFrame) -> str:
    """A table of the measurements: device, shots, how near, and the age of the calibration."""
    if frame.empty:
        return ""
    listed = table.set_index("run")
    mean = frames.over_runs(frame, ("facet", *DISTANCE), "distance").sort_values("distance")
    lines = []
    for row in mean.head(MAX_LINES).itertuples(index=False):
        same = (frame[list(DISTANCE)] == [row.device, row.loader, row.mitigation, row.shots]).all(axis=1)
        part = frame[same & (frame["facet"] == row.facet)]
        classical = (
            pd.to_numeric(part.get("classical"), errors="coerce") if "classical" in part else np.array([])
        )
        base = np.nanmean(classical) if len(classical) and not np.isnan(classical).all() else np.nan
        calibrated, age = _calibration(listed.loc[part["run"].iloc[0]], str(row.device))
        cells = [
            escape(str(row.device)), escape(str(row.loader)), escape(str(row.mitigation)) or "raw counts",
            f"{row.shots:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}"),
            with_error(row.distance, row.half_width), "" if base != base else digits(base, 3),
            str(row.runs), escape(calibrated) or "not recorded", age,
        ]  # fmt: skip
        classes = COLUMNS.values()
        lines.append(
            "<tr>" + "".join(
                f"<td class='{css_class}'>{cell}</td>"
                for css_class, cell in zip(classes, cells, strict=True)
            ) + "</tr>"
        )  # fmt: skip
    return f"<div class='wide' tabindex='0'>{html_table(COLUMNS, lines)}</div>"


def _calibration(run: Any, device: str) -> tuple[str, str]:
    """When the device of a run was calibrated, and how long before the run; "" where it is not recorded."""
    try:
        times: Mapping[str, str] = json.loads(run["calibrations"])
    except (KeyError, TypeError, ValueError):
        return "", ""
    # A device whose noise was changed has another name in the metrics, which begins with its own.
    time = next(
        (text for name, text in times.items() if device == name or device.startswith(f"{name},")), None
    )
    if time is None:
        return "", ""
    calibrated = pd.to_datetime(time, utc=True, errors="coerce")
    if pd.isna(calibrated) or pd.isna(run["started"]):
        return time[:19], ""
    return f"{calibrated:%Y-%m-%d %H:%M}", age_text((run["started"] - calibrated).total_seconds())


def age_text(seconds: float) -> str:
    """A duration in the unit that suits it.

    >>> age_text(7200), age_text(86400 * 3), age_text(86400 * 800)
    ('2 h', '3 days', '2.2 years')
    """
    hours = seconds / 3600
    if hours < 48:
        return f"{hours:.0f} h"
    return f"{hours / 24:.0f} days" if hours < 24 * 730 else f"{hours / 24 / 365.25:.1f} years"
