"""The figures of runs, each drawn from one data frame in one theme, so that a run's files suffice to redraw
it.

Every function takes `(data, theme)` and returns a matplotlib `Figure`; `functools.partial` fixes its other
arguments.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, Locator, NullFormatter

from .. import theme as look
from .attention_maps import attention_panels, draw_attention_maps

WIDE = (8.4, 4.4)
"""Width and height in inches."""

LABEL_HEIGHT_PT = 13.0
"""The least distance between two labels of lines."""


@dataclass(frozen=True)
class LineEnd:
    """The right end of a line, in data coordinates, and the line's name."""

    name: str
    x: float
    y: float


@contextmanager
def themed_figure(theme: str, size: tuple[float, float] = WIDE) -> Iterator[Figure]:
    """A new figure of a size in inches, drawn in the style of a theme inside the block."""
    style: Any = look.matplotlib_style(theme)
    with mpl.rc_context(style):
        yield Figure(figsize=size, layout="constrained")


def _label_lines(figure: Figure, ax: Axes, ends: list[LineEnd]) -> None:
    """Write each line's name at its right end; names that would overlap are moved apart, up and down alike.

    A thin line leads from the end of a line to a name that was moved.
    """
    figure.draw_without_rendering()  # fixes the layout and the scales
    pixel = figure.dpi / 72
    ends = sorted(ends, key=lambda end: end.y)
    places = [ax.transData.transform((end.x, end.y))[1] for end in ends]
    muted = mpl.rcParams["axes.edgecolor"]
    spread = _spread(places, LABEL_HEIGHT_PT * pixel)
    shifts = [(moved - place) / pixel for place, moved in zip(places, spread, strict=True)]
    leads = any(abs(shift) > LABEL_HEIGHT_PT / 3 for shift in shifts)
    for end, shift in zip(ends, shifts, strict=True):
        ax.annotate(
            end.name,
            (float(end.x), float(end.y)),
            (20 if leads else 8, shift),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": muted, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
            if leads
            else None,
        )


def _spread(places: list[float], distance: float) -> list[float]:
    """Rising places moved apart to a distance of at least `distance`, with the least sum of squared moves.

    >>> _spread([0.0, 1.0, 10.0], 4.0)
    [-1.5, 2.5, 10.0]
    """
    groups: list[list[float]] = []  # of places that touch, each less its rank times the distance
    for rank, place in enumerate(places):
        groups.append([place - rank * distance])
        while len(groups) > 1 and np.mean(groups[-2]) >= np.mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    means = [float(np.mean(group)) for group in groups for _ in group]
    return [mean + rank * distance for rank, mean in enumerate(means)]


def _draws_axis(ax: Axes, counts: np.ndarray) -> None:
    """Make x an axis of numbers of draws, logarithmic to base 2."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [f"{int(c)}" for c in counts])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("draws per row, S")


def attention_maps(
    data: pd.DataFrame, theme: str, *, title: str, tokens: str | None = None, sampler: str = "sampled"
) -> Figure:
    """Exact, sampled and difference maps of one causal head.

    Parameters
    ----------
    data : DataFrame
        One row for each cell of the map, with columns `query`, `key` (positions), `exact` and `sampled`
        (probabilities).
    theme : str
        "light" or "dark".
    title, sampler : str
        Title of the figure, and the sampler's name.
    tokens : str, optional
        One character for each position, shown along the axes.
    """
    exact, sampled = (
        data.pivot(index="query", columns="key", values=name).to_numpy() for name in ("exact", "sampled")
    )
    panels = attention_panels(
        exact, sampled, sampler=sampler, visible=np.tril(np.ones_like(exact, dtype=bool))
    )
    keys, queries = data["key"], data["query"]
    extent = (keys.min() - 0.5, keys.max() + 0.5, queries.max() + 0.5, queries.min() - 0.5)
    return draw_attention_maps(panels, theme, title=title, extent=extent, tokens=tokens)


def error_against_draws(data: pd.DataFrame, theme: str, *, title: str) -> Figure:
    """Relative output error against draws, log-log, with error bars and the slope of independent draws.

    Parameters
    ----------
    data : DataFrame
        Columns `sampler`, `num_samples`, `error` (relative, root mean square) and `half_width` (of its 95 %
        interval).
    theme : str
        "light" or "dark".
    title : str
        Title of the figure.
    """
    counts = np.sort(data["num_samples"].unique())
    with themed_figure(theme) as figure:
        ax = figure.subplots()
        ax.set_yscale("log")
        _draws_axis(ax, counts)
        ax.set_ylabel("relative output error, ‖ô − o‖ / ‖o‖")
        ends = []
        for sampler, part in data.groupby("sampler", sort=False):
            part = part.sort_values("num_samples")
            style = look.sampler_style(str(sampler), theme)
            ax.errorbar(part["num_samples"], part["error"], part["half_width"], capsize=2.5, **style)
            last = part.iloc[-1]
            ends.append(LineEnd(str(sampler), last["num_samples"], last["error"]))
        if "monte-carlo" in set(data["sampler"]):
            first = data[data["sampler"] == "monte-carlo"].sort_values("num_samples").iloc[0]
            start = first["error"] * 1.25
            guide = start * np.sqrt(counts[0] / counts)
            muted = look.colours_of(theme)["muted"]
            ax.plot(counts, guide, color=muted, linewidth=1, linestyle=":")
            middle = len(counts) // 2
            ax.annotate(
                "slope −1/2",
                (counts[middle], guide[middle]),
                xytext=(4, 6),
                textcoords="offset points",
                color=muted,
                fontsize=9.5,
            )
        plain_log_labels(ax.yaxis)
        _label_lines(figure, ax, ends)
        ax.set_title(textwrap.fill(title, 72))
    return figure


def variance_map(data: pd.DataFrame, theme: str, *, title: str) -> Figure:
    """The variance of every head, with layers down and heads across.

    Parameters
    ----------
    data : DataFrame
        Columns `layer`, `head` and `variance` (relative: E‖ô − o‖² / ‖o‖²).
    theme : str
        "light" or "dark".
    title : str
        Title of the figure.
    """
    table = data.pivot(index="layer", columns="head", values="variance")
    values = table.to_numpy()
    with themed_figure(theme, (8.4, 4.6)) as figure:
        ax = figure.subplots()
        positive = values[values > 0]
        low, high = (positive.min(), positive.max()) if positive.size else (1e-6, 1.0)
        norm = LogNorm(low, max(high, low * 1.01))
        image = ax.imshow(np.clip(values, low, None), norm=norm, cmap=look.SEQUENTIAL, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            bright = norm(max(value, low)) > 0.55
            colour = look.COLOURS["light" if bright else "dark"]["exact"]  # black on bright cells, else white
            number = f"{value:#.2g}".rstrip(".")  # two digits in each cell, as in 0.010
            ax.text(column, row, number, ha="center", va="center", fontsize=9, color=colour)
        ax.set_xticks(range(len(table.columns)), [str(h) for h in table.columns])
        ax.set_yticks(range(len(table.index)), [str(i) for i in table.index])
        ax.set_xlabel("query head")
        ax.set_ylabel("layer")
        ax.grid(False)
        bar = figure.colorbar(image, label="relative variance, E‖ô − o‖² / ‖o‖² (log scale)")
        plain_log_labels(bar.ax.yaxis)
        ax.set_title(textwrap.fill(title, 72))
    return figure


def bits_against_draws(data: pd.DataFrame, theme: str, *, title: str, exact: float) -> Figure:
    """Bits per byte of the whole model against draws, with those of the exact model as a line.

    Parameters
    ----------
    data : DataFrame
        Columns `sampler`, `num_samples`, `bits_per_byte` and `half_width` (of the 95 % interval of its
        difference from exact).
    theme : str
        "light" or "dark".
    title : str
        Title of the figure.
    exact : float
        Bits per byte of the exact model.
    """
    counts = np.sort(data["num_samples"].unique())
    with themed_figure(theme) as figure:
        ax = figure.subplots()
        _draws_axis(ax, counts)
        ax.set_ylabel("bits per byte")
        style = look.sampler_style("exact", theme)
        ax.plot(counts, np.full(len(counts), exact), **style)
        ends = [LineEnd("exact", float(counts[-1]), exact)]
        for place, (sampler, part) in enumerate(data.groupby("sampler", sort=False)):
            part = part.sort_values("num_samples")
            style = look.sampler_style(str(sampler), theme)
            # Shifted, so that the error bars stand side by side.
            x = part["num_samples"] * 1.04 ** (place - (data["sampler"].nunique() - 1) / 2)
            ax.errorbar(x, part["bits_per_byte"], part["half_width"], capsize=2.5, **style)
            last = part.iloc[-1]
            ends.append(LineEnd(str(sampler), last["num_samples"], last["bits_per_byte"]))
        _label_lines(figure, ax, ends)
        ax.set_title(textwrap.fill(title, 72))
    return figure


def time_per_token(data: pd.DataFrame, theme: str, *, title: str) -> Figure:
    """Milliseconds per token of the whole model, with a point for each method.

    There are no bars, because a log axis has no zero on which they could stand.


    Parameters
    ----------
    data : DataFrame
        Columns `method`, `sampler`, `milliseconds` (median), `low` and `high` (the fastest and slowest
        repeat).
    theme : str
        "light" or "dark".
    title : str
        Title of the figure.
    """
    with themed_figure(theme, (8.4, 0.55 * len(data) + 1.4)) as figure:
        ax = figure.subplots()
        y = np.arange(len(data))[::-1]
        colours = [look.sampler_style(s, theme)["color"] for s in data["sampler"]]
        spread = np.stack((data["milliseconds"] - data["low"], data["high"] - data["milliseconds"]))
        ax.set_xscale("log")
        for position, colour, (_, row), low_high in zip(y, colours, data.iterrows(), spread.T, strict=True):
            error = low_high[:, None]
            style: dict[str, Any] = {"fmt": "o", "markersize": 8, "capsize": 2.5, "elinewidth": 1.2}
            ax.errorbar(row["milliseconds"], position, xerr=error, color=colour, **style)
        for position, value, high in zip(y, data["milliseconds"], data["high"], strict=True):
            ax.annotate(
                look.digits(value, 3),
                (high, position),
                xytext=(10, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
            )
        ax.set_yticks(y, data["method"])
        ax.set_xlabel("milliseconds per token, whole model, log scale (median; whiskers: fastest to slowest)")
        ax.set_xlim(0.7 * data["low"].min(), 1.8 * data["high"].max())
        ax.set_ylim(-0.6, len(data) - 0.4)
        plain_log_labels(ax.xaxis)
        ax.set_title(textwrap.fill(title, 72))
    return figure


def comparison(
    data: pd.DataFrame,
    theme: str,
    *,
    y: str,
    x: str | None = None,
    by: str | None = None,
    title: str | None = None,
) -> Figure:
    """Means over runs with 95 % intervals: lines against a number, or rows of points against names.

    Parameters
    ----------
    data : DataFrame
        From `RunTable.summary`: `mean`, `half_width`, `runs`, and the columns `x` and `by` if those are
        named.
    theme : str
        "light" or "dark".
    y : str
        What the means are of.
    x, by : str, optional
        What the columns `x` and `by` hold.
    title : str, optional
        Title of the figure; the question that it answers if None.
    """
    numeric = x is not None and pd.api.types.is_numeric_dtype(data["x"])
    if by is not None and x is None:
        data, x, by = data.rename(columns={"by": "x"}), by, None
    groups = dict(list(data.groupby("by", sort=False))) if by is not None else {"": data}
    num_points = len(groups) * data["x"].nunique()
    with themed_figure(theme, WIDE if numeric else (8.4, 0.42 * num_points + 1.5)) as figure:
        ax = figure.subplots()
        value_axis = ax.yaxis if numeric else ax.xaxis
        mean = data["mean"]
        if bool((mean > 0).all()) and mean.max() >= 10 * mean.min():
            (ax.set_yscale if numeric else ax.set_xscale)("log")
            plain_log_labels(value_axis)
        if numeric:
            ends = _draw_lines(ax, groups, theme)
            _number_axis(ax, np.sort(data["x"].unique()))
            ax.set_xlabel(str(x))
            ax.set_ylabel(y)
            if by is not None:
                _label_lines(figure, ax, ends)
        else:
            _draw_points(ax, groups, list(dict.fromkeys(data["x"].astype(str))), theme)
            ax.set_xlabel(y)
            ax.set_ylabel("" if x is None else str(x))
            if by is not None:
                ax.legend(title=by, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        muted = look.colours_of(theme)["muted"]
        figure.text(0.99, 0.005, _runs_note(data["runs"]), ha="right", va="bottom", fontsize=8.5, color=muted)
        question = f"{y} over all runs"
        if x:
            question = f"How does {y} depend on {' and '.join(str(name) for name in (x, by) if name)}?"
        ax.set_title(textwrap.fill(title or question, 72))
    return figure


def _draw_lines(ax: Axes, groups: dict[Any, pd.DataFrame], theme: str) -> list[LineEnd]:
    """Draw a line with error bars for each group against a numeric `x`; return the lines' ends."""
    ends = []
    for place, (name, part) in enumerate(groups.items()):
        part = part.sort_values("x")
        style = _group_style(str(name), place, theme, plain=len(groups) == 1)
        ax.errorbar(part["x"], part["mean"], part["half_width"].fillna(0), capsize=2.5, **style)
        last = part.iloc[-1]
        ends.append(LineEnd(str(name), float(last["x"]), float(last["mean"])))
    return ends


def _draw_points(ax: Axes, groups: dict[Any, pd.DataFrame], names: list[str], theme: str) -> None:
    """Draw points with error bars, a row for each name; the groups stand side by side in it."""
    for place, (name, part) in enumerate(groups.items()):
        style = _group_style(str(name), place, theme, plain=len(groups) == 1) | {"linestyle": "none"}
        shift = 0.6 * ((place + 0.5) / len(groups) - 0.5)
        heights = [names.index(str(value)) + shift for value in part["x"]]
        bars = part["half_width"].fillna(0)
        ax.errorbar(part["mean"], heights, xerr=bars, capsize=2.5, label=str(name), **style)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)


def _number_axis(ax: Axes, values: np.ndarray) -> None:
    """Make x logarithmic to base 2, with a tick for each value, if the values spread widely."""
    if values[0] > 0 and values[-1] >= 4 * values[0]:
        ax.set_xscale("log", base=2)
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.xaxis.set_minor_formatter(NullFormatter())


def _runs_note(runs: pd.Series) -> str:
    """How many runs a mean is of, in words."""
    each = f"{runs.min()}" if runs.min() == runs.max() else f"{runs.min()} to {runs.max()}"
    if runs.max() == 1:
        return f"means of {each} run each"
    return f"means of {each} runs each; bars: 95 % intervals"


def _group_style(name: str, place: int, theme: str, *, plain: bool) -> dict[str, Any]:
    """A sampler's own style, or a colour and a marker by the place of the group."""
    if name in look.SAMPLER_MARKERS or plain:
        return look.sampler_style(name, theme)
    # Yellow lines would be hard to see.
    colours = [colour for sampler, colour in look.SAMPLER_COLOURS.items() if sampler != "lattice"]
    markers = [marker for marker in look.SAMPLER_MARKERS.values() if marker]
    return {
        "color": colours[place % len(colours)],
        "marker": markers[place % len(markers)],
        "linestyle": "-",
    }


class LogTicks(Locator):
    """Ticks of a logarithmic axis where `theme.log_ticks` has them."""

    def __call__(self) -> Any:
        """The ticks between the ends of the axis."""
        assert self.axis is not None  # a locator without an axis has no ends
        low, high = sorted(self.axis.get_view_interval())
        return [tick for tick, _ in look.log_ticks(low, high)]


class LogLabels(Formatter):
    """Labels of `LogTicks`."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of one tick."""
        return look.tick_labels([x])[0]

    def format_ticks(self, values: Any) -> list[str]:
        """The labels of all ticks, which are written alike."""
        return look.tick_labels(values)


def plain_log_labels(axis: Axis) -> None:
    """Give a logarithmic axis the ticks and labels of the lab."""
    axis.set_major_locator(LogTicks())
    axis.set_major_formatter(LogLabels())
    axis.set_minor_formatter(NullFormatter())
