"""The dashboard's figures in HoloViews: each draws a data frame in a theme. Bars are 95 % intervals."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import holoviews as hv
import holoviews.plotting.bokeh  # registers the renderer
import numpy as np
import pandas as pd
from bokeh.core.properties import value
from bokeh.models import BasicTickFormatter
from bokeh.models.annotations import ColorBar, TeeHead

from ... import theme as look
from . import frames

hv.Store.set_current_backend("bokeh")

HEIGHT = 430
"""Height of a figure in pixels."""

LIVE_HEIGHT = 280
"""Height of a figure of the view Live in pixels."""

MARKERS = {"o": "circle", "^": "triangle", "s": "square", "D": "diamond", "v": "inverted_triangle"}
MARKERS |= {"P": "square_cross", "X": "x", "*": "star", "h": "hex", "": "circle"}
"""What Bokeh calls the theme's markers."""

UNITS = {
    "step": "optimiser step",
    "epoch": "epoch",
    "loss": "loss, nats per byte",
    "error": "relative output error, ‖ô − o‖ / ‖o‖",
    "bits_per_byte": "bits per byte",
    "bits": "bits per byte",
    "variance": "relative variance, E‖ô − o‖² / ‖o‖²",
    "num_samples": "draws per row, S",
    "shots": "shots a row",
    "distance": "total variation from the row, mean",
    "fidelity": "state fidelity ⟨ψ|ρ|ψ⟩",
    "m": "qubits, m",
    "seconds": "seconds",
    "lr": "learning rate",
    "learning_rate": "learning rate",
    "grad_norm": "norm of the gradient",
}
"""Axis labels of metrics that the lab writes; others are shown by their name."""

LOADERS = ("dynamic", "tree", "unary", "mps")
"""The order of loaders, by which they have the same colours in every figure."""

TITLE_WIDTH = 42
"""Characters of a line of a title, at most."""

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif'


def label(metric: str) -> str:
    """A metric's name on an axis, with its unit where it is known."""
    return UNITS.get(metric, metric.replace("_", " "))


def curve_colours(theme: str, count: int) -> list[str]:
    """Colours of `count` runs or loaders; up to seven can be distinguished by colour-blind people, too."""
    c = look.colours_of(theme)
    named = [c["accent"], "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442", c["baseline"]]
    return [named[i % len(named)] for i in range(count)]


def _dressed(theme: str) -> Callable[[Any, Any], None]:
    """A hook that gives a Bokeh figure the colours and fonts of the project."""
    c = look.colours_of(theme)

    def dress(plot: Any, element: Any) -> None:
        figure = plot.handles["plot"]
        if "dressed" in figure.tags:
            return  # hooks run at every update
        figure.tags = [*figure.tags, "dressed"]
        figure.background_fill_color = figure.border_fill_color = c["background"]
        figure.outline_line_color = None
        figure.title.text_color = c["text"]
        figure.title.text_font, figure.title.text_font_size = FONT, "15px"
        for axis in figure.axis:
            axis.axis_line_color = axis.major_tick_line_color = c["muted"]
            axis.axis_line_alpha = axis.major_tick_line_alpha = 1.0  # Panel's dark theme hides them
            axis.minor_tick_line_color = None
            if isinstance(axis.formatter, BasicTickFormatter):
                axis.formatter.power_limit_low = -4  # 0.0002, not 2.000e−4
            axis.axis_label_text_color = axis.major_label_text_color = c["text"]
            axis.axis_label_text_font = axis.major_label_text_font = FONT
            axis.axis_label_text_font_size, axis.major_label_text_font_size = "13px", "12px"
            axis.axis_label_text_font_style = "normal"
        if plot.show_grid:
            figure.grid.grid_line_color, figure.grid.grid_line_alpha = c["line"], 1.0
        figure.toolbar.logo, figure.toolbar.autohide = None, True
        for bar in figure.select({"type": ColorBar}):
            bar.background_fill_color = c["background"]
            bar.bar_line_color = bar.major_tick_line_color = c["muted"]
            bar.title_text_color = bar.major_label_text_color = c["text"]
            bar.title_text_font = bar.major_label_text_font = FONT
            bar.title_text_font_style, bar.title_standoff = "normal", 8

    return dress


def axes(theme: str, **options: Any) -> dict[str, Any]:
    """The options that every figure has, together with its own; a long title is broken at its commas."""
    if "title" in options:
        title = re.sub("(?<!,) ", "\N{NO-BREAK SPACE}", options["title"])
        options["title"] = textwrap.fill(title, TITLE_WIDTH)
    common = {"responsive": True, "height": HEIGHT, "show_legend": False, "show_grid": True}
    return {**common, "active_tools": [], "hooks": [_dressed(theme)], **options}


def names_at_ends(
    ends: Mapping[str, tuple[float, float, str]],
    low: float,
    high: float,
    log: bool = True,
    height: int = HEIGHT,
) -> hv.Labels:
    """Names behind the last points of lines, {name: (x, y, colour)}, apart on an axis from low to high."""
    scale: Callable[[float], float] = np.log if log else float
    room = 16 / (height - 90) * (scale(high) - scale(low))
    placed, rows = -np.inf, []
    for name, (x, y, colour) in sorted(ends.items(), key=lambda end: end[1][1]):
        placed = max(scale(y), placed + room)
        rows.append((x, float(np.exp(placed)) if log else placed, f"  {name}", colour))
    return hv.Labels(rows, ["x", "y"], ["name", "colour"]).opts(
        text_color="colour", text_align="left", text_font_size="12px", text_font=value(FONT)
    )


def _bars(part: pd.DataFrame, x: str, y: str, colour: str) -> hv.ErrorBars:
    below = np.minimum(
        part["half_width"], part[y] * (1 - 1e-9)
    )  # a bar to zero leaves a log axis at the bottom
    data = (part[x], part[y], below, part["half_width"])
    lower, upper = (TeeHead(line_color=colour, size=7) for _ in range(2))
    return hv.ErrorBars(data, x, [y, "below", "above"]).opts(
        line_color=colour, line_width=1.3, lower_head=lower, upper_head=upper
    )


def _limits(values: pd.Series, spread: float = 1.35) -> tuple[float, float]:
    values = values[values > 0]
    return (values.min() / spread, values.max() * spread) if len(values) else (1e-3, 1.0)


def error_against_draws(frame: pd.DataFrame, metric: str, theme: str, title: str = "") -> hv.Overlay:
    """A metric against draws, one line a sampler: means over runs with their 95 % intervals.

    Single runs are faint dots.

    frame: columns `run`, `sampler`, `num_samples`, the metric, and `half_width` where there is one.
    """
    mean = frames.over_runs(frame, ("sampler", "num_samples"), metric)
    low, high = _limits(mean[metric])
    counts = np.sort(mean["num_samples"].unique())
    layers: list[Any] = []
    ends = {}
    for sampler, part in mean.groupby("sampler", sort=False):
        style = look.sampler_style(str(sampler), theme)
        colour, marker = style["color"], MARKERS[style["marker"]]
        dashes = "dashed" if style["linestyle"] == "--" else "solid"
        part = part.sort_values("num_samples")
        if part["runs"].max() > 1:
            single = frame[frame["sampler"] == sampler]
            layers.append(
                hv.Scatter(single, "num_samples", [metric, "run"]).opts(
                    color=colour, marker=marker, alpha=0.3, size=5, tools=["hover"]
                )
            )
        layers.append(
            hv.Curve(part, "num_samples", metric).opts(color=colour, line_dash=dashes, line_width=2)
        )
        layers.append(_bars(part, "num_samples", metric, colour))
        layers.append(
            hv.Scatter(part, "num_samples", [metric, "half_width", "runs", "sampler"]).opts(
                color=colour, marker=marker, size=8, tools=["hover"]
            )
        )
        ends[str(sampler)] = (part["num_samples"].iloc[-1], part[metric].iloc[-1], colour)
    if metric == "error" and "monte-carlo" in ends and len(counts) > 1:
        first = mean[mean["sampler"] == "monte-carlo"].sort_values("num_samples").iloc[0]
        guide = first[metric] * 1.2 * np.sqrt(first["num_samples"] / counts)
        muted = look.colours_of(theme)["muted"]
        layers.append(
            hv.Curve((counts, guide), "num_samples", metric).opts(
                color=muted, line_dash="dotted", line_width=1
            )
        )
        middle = len(counts) // 2
        layers.append(
            hv.Text(counts[middle] * 1.03, guide[middle], "slope −1/2", halign="left", valign="bottom").opts(
                color=muted, text_font_size="12px", text_font=value(FONT)
            )
        )
        high = max(high, guide.max() * 1.1)
    layers.append(names_at_ends(ends, low, high, log=True))
    right = counts.max() * (counts.max() / counts.min()) ** 0.25 * 1.3
    return hv.Overlay(layers).opts(
        **axes(
            theme,
            title=title,
            logx=True,
            logy=True,
            xlim=(counts.min() / 1.15, right),
            ylim=(low, high),
            xlabel=label("num_samples"),
            ylabel=label(metric),
            xticks=[(c, f"{c:g}") for c in counts],
            yticks=look.log_ticks(low, high),
        )
    )


def distance_against_shots(frame: pd.DataFrame, theme: str, title: str = "") -> hv.Overlay:
    """Total variation against shots by device, loader and mitigation.

    Hollow points are raw counts, filled ones mitigated; the dashed line is as many classical draws.

    frame: columns `run`, `device`, `loader`, `mitigation` ("" for raw counts), `shots`, `distance`, and
    `half_width` and `classical` where there are.
    """
    c = look.colours_of(theme)
    mean = frames.over_runs(frame, ("device", "loader", "mitigation", "shots"), "distance")
    low, high = _limits(mean["distance"])
    layers: list[Any] = []
    ends: dict[str, tuple[float, float, str]] = {}
    if "classical" in frame:
        base = frame.dropna(subset=["classical"]).groupby("shots", as_index=False)["classical"].mean()
        if len(base):
            if len(base) > 1:
                line = hv.Curve(base, "shots", "classical")
                layers.append(line.opts(color=c["baseline"], line_dash="dashed", line_width=2))
            else:  # a line of one point would not be seen
                mark = hv.Scatter(base, "shots", "classical")
                layers.append(mark.opts(color=c["baseline"], marker="dash", size=16, line_width=2))
            low = min(low, base["classical"].min() / 1.3)
            ends["classical draw"] = (base["shots"].iloc[-1], base["classical"].iloc[-1], c["baseline"])
    layers += _points(mean, "shots", "distance", theme, ends)
    layers.append(names_at_ends(ends, low, high))
    shots = np.sort(mean["shots"].unique())
    right = shots.max() * (shots.max() / shots.min()) ** 0.45 * 1.6
    return hv.Overlay(layers).opts(
        **axes(
            theme, logx=True, logy=True, xlim=(shots.min() / 1.3, right), ylim=(low, high),
            title=title, xlabel=label("shots"), ylabel=label("distance"), yticks=look.log_ticks(low, high),
            xticks=[(s, f"{s:,.0f}".replace(",", " ")) for s in shots],
        )
    )  # fmt: skip


def _points(
    mean: pd.DataFrame, x: str, y: str, theme: str, ends: dict[str, tuple[float, float, str]]
) -> list[Any]:
    """Points with bars, a colour for each loader, a marker for each device; adds names to `ends`."""
    devices = sorted(mean["device"].unique())
    loaders = list(dict.fromkeys([*LOADERS, *sorted(mean["loader"].unique())]))
    colours = dict(zip(loaders, curve_colours(theme, len(loaders)), strict=True))
    marks = ("circle", "square", "diamond", "triangle", "inverted_triangle", "star")
    layers = []
    for (device, loader, mitigation), part in mean.groupby(["device", "loader", "mitigation"]):
        part, colour = part.sort_values(x), colours[loader]
        layers.append(_bars(part, x, y, colour))
        layers.append(
            hv.Scatter(part, x, [y, "half_width", "runs", "device", "loader", "mitigation"]).opts(
                line_color=colour,
                fill_color=colour if mitigation else look.colours_of(theme)["background"],
                line_width=2,
                marker=marks[devices.index(device) % len(marks)],
                size=9,
                tools=["hover"],
            )
        )
        name = ", ".join(filter(None, (str(loader), str(device), str(mitigation))))
        ends[name] = (part[x].iloc[-1], part[y].iloc[-1], colour)
    return layers


def fidelity_against_qubits(frame: pd.DataFrame, theme: str) -> hv.Overlay:
    """State fidelity against qubits by device and loader.

    frame: columns `run`, `device`, `loader`, `m`, `fidelity`.
    """
    mean = frames.over_runs(frame.assign(mitigation=""), ("device", "loader", "mitigation", "m"), "fidelity")
    ends: dict[str, tuple[float, float, str]] = {}
    layers = _points(mean, "m", "fidelity", theme, ends)
    low = min(0.9, mean["fidelity"].min()) - 0.03
    layers.append(names_at_ends(ends, low, 1.02, log=False))
    qubits = np.sort(mean["m"].unique())
    return hv.Overlay(layers).opts(
        **axes(
            theme, xlim=(qubits.min() - 0.3, qubits.max() + 0.6 + 0.3 * (qubits.max() - qubits.min())),
            ylim=(low, 1.02), xlabel=label("m"), ylabel=label("fidelity"),
            xticks=[(q, f"{q:g}") for q in qubits],
        )
    )  # fmt: skip


def variance_by_head(frame: pd.DataFrame, theme: str) -> hv.Overlay:
    """Variance of every head, layers down and heads across, on a log scale.

    frame: columns `layer`, `head` and a positive `variance`.
    """
    frame = frame.groupby(["layer", "head"], as_index=False)["variance"].mean()
    low = frame["variance"].min()
    high = max(frame["variance"].max(), low * 1.01)
    tone = (np.log(frame["variance"]) - np.log(low)) / (np.log(high) - np.log(low))
    frame = frame.assign(
        text=[f"{v:.2g}" for v in frame["variance"]],
        colour=np.where(tone > 0.55, "#111417", "#f3f4f6"),
    )
    heads, layers = np.sort(frame["head"].unique()), np.sort(frame["layer"].unique())
    tiles = hv.HeatMap(frame, ["head", "layer"], "variance").opts(
        cmap=look.SEQUENTIAL,
        logz=True,
        clim=(low, high),
        colorbar=True,
        clabel=label("variance") + ", log scale",
        tools=["hover"],
    )
    texts = hv.Labels(frame, ["head", "layer"], ["text", "colour"]).opts(
        text_color="colour", text_font_size="12px", text_font=value(FONT)
    )
    return (tiles * texts).opts(
        **axes(
            theme, show_grid=False, xlabel="query head", ylabel="layer", invert_yaxis=True,
            xlim=(heads[0] - 0.5, heads[-1] + 0.5), ylim=(layers[0] - 0.5, layers[-1] + 0.5),
            xticks=[(h, f"{h:g}") for h in heads], yticks=[(i, f"{i:g}") for i in layers],
        )
    )  # fmt: skip


def live_curves(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    colours: Mapping[str, str],
    x: str,
    metric: str,
    theme: str,
    log: tuple[bool, bool] = (False, False),
) -> hv.Overlay:
    """A metric of runs that are being written: {"run" or "run/words": (x, y)}; words stand at line ends.

    `log` says which of x and y have a logarithmic axis.
    """
    (left, right), (low, high) = (_ends([line[i] for line in curves.values()], log[i]) for i in (0, 1))
    lines: list[Any] = []
    ends = {}
    for run, (across, up) in curves.items():
        colour = colours[run]
        dashes = "dashed" if "monte-carlo" in run.partition("/")[2].split(", ") else "solid"
        across, up = frames.thinned(np.asarray(across, float), np.asarray(up, float))
        lines.append(
            hv.Curve((across, up), x, metric).opts(
                color=colour, line_dash=dashes, line_width=2, tools=["hover"], framewise=True
            )
        )
        lines.append(hv.Scatter((across[-1:], up[-1:]), x, metric).opts(color=colour, size=7, framewise=True))
        ends[run] = (across[-1], up[-1], colour)
    if any("/" in run for run in curves):
        names = {run.partition("/")[2][:24]: end for run, end in ends.items()}
        lines.append(names_at_ends(names, low, high, log[1], LIVE_HEIGHT).opts(framewise=True))
        right = right * (right**0.3 / left**0.3) if log[0] else right + 0.3 * (right - left)
    sides = (("xticks", log[0], left, right), ("yticks", log[1], low, high))
    ticks = {name: look.log_ticks(start, end) for name, is_log, start, end in sides if is_log}
    return hv.Overlay(lines).opts(
        **axes(
            theme, height=LIVE_HEIGHT, logx=log[0], logy=log[1], xlim=(left, right), ylim=(low, high),
            xlabel=label(x), ylabel=label(metric), framewise=True, **ticks,
        )
    )  # fmt: skip


def _ends(values: list[np.ndarray], log: bool) -> tuple[float, float]:
    """The ends of an axis that holds values, with a margin."""
    together = np.concatenate(values)
    low, high = float(together.min()), float(together.max())
    if log:
        margin = max(high**0.06 / low**0.06, 1.05)  # the quotient itself may overflow
        limits = np.finfo(float)
        return max(low / margin, float(limits.tiny)), min(high * margin, float(limits.max))
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin, high + margin
