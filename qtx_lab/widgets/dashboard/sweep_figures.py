"""Figures of sweeps: parallel coordinates, importance of parameters, and means that are faceted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import holoviews as hv
import numpy as np
import pandas as pd
from bokeh.core.properties import value

from ... import theme as look
from . import frames
from .figures import FONT, axes, curve_colours, label, names_at_ends
from .settings import SPEC, short_name, value_text

MAX_TICKS = 12
"""Values of a parameter that are written on its axis."""

SHADES = {"light": (-0.1, 1.3), "dark": (-0.5, 1.05)}
"""Ends of the colour map, of which the results take 0 to 1, so that no line is lost on the background."""

MAX_LINES = 8
"""Lines of a figure."""


def parallel_coordinates(frame: pd.DataFrame, columns: Sequence[str], metric: str, theme: str) -> hv.Overlay:
    """A line for each run through its values of parameters, and of the metric at the right, which colours it.

    Parameters
    ----------
    frame : DataFrame
        One row a run: `run`, the columns and the metric, without missing values.
    columns : sequence of str
        Parameters, from left to right.
    """
    c = look.colours_of(theme)
    all_columns = [*columns, metric]
    places = {column: _places(frame[column]) for column in all_columns}
    y = np.array([places[column].heights for column in all_columns])  # (axes, runs)
    last = y[-1]
    order = np.argsort(-last)  # low values, which are mostly the good ones, are drawn on top
    rng = np.random.default_rng(0)
    jitter = np.where([[places[column].numeric] for column in all_columns], 0.0, 0.012)
    y = y + jitter * rng.uniform(-1, 1, y.shape)
    names = [short_name(column) for column in all_columns]
    steps = len(names) - 1
    facts = {name: np.repeat(frame[c].map(value_text).iloc[order], steps) for name, c in
             zip(names, all_columns, strict=True)}  # fmt: skip
    segments = {
        "x0": np.tile(np.arange(steps), len(order)), "y0": y[:-1, order].T.ravel(),
        "x1": np.tile(np.arange(1, steps + 1), len(order)), "y1": y[1:, order].T.ravel(),
        "shade": np.repeat(last[order], steps), "run": np.repeat(frame["run"].iloc[order], steps), **facts,
    }  # fmt: skip
    lines = hv.Segments(segments, ["x0", "y0", "x1", "y1"], ["shade", "run", *names]).opts(
        color="shade", cmap=look.SEQUENTIAL, clim=SHADES[theme], line_width=1.6, alpha=0.75, tools=["hover"],
    )  # fmt: skip
    rulers = hv.Segments([(i, 0, i, 1) for i in range(len(names))], ["x0", "y0", "x1", "y1"]).opts(
        color=c["muted"], line_width=1
    )
    ticks = [
        (i, height, f" {text}", c["text"])
        for i, column in enumerate(all_columns)
        for height, text in places[column].ticks
    ]
    texts = hv.Labels(ticks, ["x", "y"], ["text", "colour"]).opts(
        text_color="colour", text_align="left", text_font_size="12px", text_font=value(FONT),
        hooks=[partial(_legible, colour=c["background"])],
    )  # fmt: skip
    return (rulers * lines * texts).opts(
        **axes(
            theme, show_grid=False, xlim=(-0.15, len(names) - 0.55), ylim=(-0.06, 1.06), xlabel="", ylabel="",
            yaxis=None, xticks=[(i, label(name)) for i, name in enumerate(names)],
        )
    )  # fmt: skip


def _legible(plot: Any, element: Any, *, colour: str) -> None:
    """Give texts a ground of their own, so that the lines behind do not cross them."""
    plot.handles["glyph"].update(background_fill_color=colour, background_fill_alpha=0.8, padding=2)


class _Places:
    """Where the values of a column stand on an axis from 0 to 1, and what is written there."""

    def __init__(self, heights: np.ndarray, ticks: list[tuple[float, str]], numeric: bool):
        self.heights, self.ticks, self.numeric = heights, ticks, numeric


def _places(column: pd.Series) -> _Places:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy("float64", na_value=np.nan)
    boolean = pd.api.types.is_bool_dtype(column)
    if not boolean and np.isfinite(numbers).all():
        log = numbers.min() > 0 and numbers.max() / numbers.min() >= 8
        scaled = np.log(numbers) if log else numbers
        low, spread = scaled.min(), np.ptp(scaled) or 1.0
        distinct = np.unique(numbers)
        if len(distinct) > MAX_TICKS:
            distinct = np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1.0], method="nearest")
            distinct = np.unique(distinct)
        at = (np.log(distinct) if log else distinct) - low
        ticks = [(float(a / spread), look.digits(x, 3)) for a, x in zip(at, distinct, strict=True)]
        return _Places((scaled - low) / spread, _apart(ticks), True)
    texts = column.map(value_text)
    names = sorted(texts.unique())
    heights = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
    ticks = [(heights[name], name[:18]) for name in names[:MAX_TICKS]]
    return _Places(texts.map(heights).to_numpy("float64"), ticks, False)


def _apart(ticks: list[tuple[float, str]], room: float = 0.045) -> list[tuple[float, str]]:
    """Rising ticks without those that would be written over another; the ends of the axis have theirs.

    >>> _apart([(0.0, "a"), (0.01, "b"), (0.5, "c"), (0.97, "d"), (1.0, "e")])
    [(0.0, 'a'), (0.5, 'c'), (1.0, 'e')]
    """
    apart = ticks[:1]
    for height, text in ticks[1:-1]:
        if min(height - apart[-1][0], ticks[-1][0] - height) >= room:
            apart.append((height, text))
    return apart + ticks[1:][-1:]


def importance_bars(table: pd.DataFrame, theme: str) -> hv.Overlay:
    """Shares of variance, per cent, with 95 % intervals; the largest parameter on top."""
    c = look.colours_of(theme)
    table = table[::-1].reset_index(drop=True)
    rows = np.arange(len(table))
    is_parameter = table["name"].str.startswith(SPEC)
    share = 100 * table["share"]
    bars = hv.Rectangles(
        {
            "x0": np.zeros(len(table)), "y0": rows - 0.32, "x1": share, "y1": rows + 0.32,
            "colour": np.where(is_parameter, c["accent"], c["baseline"]), "name": table["name"],
        },
        ["x0", "y0", "x1", "y1"], ["colour", "name"],
    ).opts(color="colour", line_width=0)  # fmt: skip
    width = 100 * table["half_width"].fillna(0)
    ends = np.clip(share - width, 0, 100), np.clip(share + width, 0, 100)
    known = (width > 0).to_numpy()
    segments = hv.Segments(
        (ends[0][known], rows[known], ends[1][known], rows[known]), ["x0", "y0", "x1", "y1"]
    ).opts(color=c["text"], line_width=1.5)
    texts = hv.Labels(
        [(max(e, s) + 1.5, r, f"{s:.0f} %", c["text"]) for s, e, r in zip(share, ends[1], rows, strict=True)],
        ["x", "y"], ["text", "colour"],
    ).opts(text_color="colour", text_align="left", text_font_size="12px", text_font=value(FONT))  # fmt: skip
    names = [short_name(name) for name in table["name"]]
    return (bars * segments * texts).opts(
        **axes(
            theme, xlim=(0, 115), ylim=(-0.6, len(table) - 0.4), ylabel="",
            xlabel="share of the variance over the sweep, %",
            yticks=list(zip(rows.tolist(), names, strict=True)),
        )
    )  # fmt: skip


def means_against(
    frame: pd.DataFrame, x: str, by: str | None, metric: str, title: str, theme: str
) -> hv.Overlay:
    """Means of a metric over seeds against a parameter, a line for each value of another one.

    frame: columns `run`, x, by and the metric; runs of equal x and by differ in nothing but the seed.
    """
    frame = frame.assign(line=frame[by].map(value_text) if by else "")
    mean = frames.over_runs(frame, ("line", x), metric)
    values = mean[metric].to_numpy("float64")
    log_y = bool((values > 0).all() and values.max() / values.min() > 4)
    across = np.sort(mean[x].to_numpy("float64"))
    log_x = bool(across[0] > 0 and across[-1] / across[0] >= 8)
    low, high = (values - mean["half_width"]).min(), (values + mean["half_width"]).max()
    low, high = (values.min() / 1.35, values.max() * 1.35) if log_y else (low, high + 0.05 * (high - low))
    colours = _line_colours(by, list(dict.fromkeys(mean["line"])), theme)
    layers: list[Any] = []
    ends = {}
    for name, part in mean.groupby("line", sort=False):
        colour, part = colours[str(name)], part.sort_values(x)
        bars = part.assign(below=np.minimum(part["half_width"], part[metric] * (1 - 1e-9)) if log_y else
                           part["half_width"])  # fmt: skip
        layers.append(hv.Curve(part, x, metric).opts(color=colour, line_width=2))
        layers.append(hv.ErrorBars(bars, x, [metric, "below", "half_width"]).opts(line_color=colour))
        points = hv.Scatter(part, x, [metric, "half_width", "runs", "line"])
        layers.append(points.opts(color=colour, size=8, tools=["hover"]))
        ends[str(name)] = (part[x].iloc[-1], part[metric].iloc[-1], colour)
    layers.append(names_at_ends(ends, low, high, log=log_y))
    spread = across[-1] / across[0] if log_x else across[-1] - across[0] or 1.0
    right = across[-1] * spread**0.3 * 1.2 if log_x else across[-1] + 0.35 * spread
    left = across[0] / 1.15 if log_x else across[0] - 0.05 * spread
    ticks = np.unique(across)
    options: dict[str, Any] = {"xticks": [(t, f"{t:g}") for t in ticks]} if len(ticks) <= MAX_TICKS else {}
    if log_y:
        options["yticks"] = look.log_ticks(low, high)
    return hv.Overlay(layers).opts(
        **axes(
            theme, logx=log_x, logy=log_y, xlim=(left, right), ylim=(low, high), title=title,
            xlabel=label(short_name(x)), ylabel=label(short_name(metric)), **options,
        )
    )  # fmt: skip


def _line_colours(by: str | None, names: list[str], theme: str) -> dict[str, str]:
    """The colours of lines: samplers have their own."""
    if by and short_name(by) == "sampler":
        return {name: look.sampler_style(name, theme)["color"] for name in names}
    return dict(zip(names, curve_colours(theme, len(names)), strict=True))
