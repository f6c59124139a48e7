"""The figures of the lab: each draws one data frame in one theme, so that a run can redraw them from its files.

Every function takes `(data, theme)` and returns a matplotlib `Figure`; `functools.partial` fixes the rest.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .. import theme as look
from .attention_maps import attention_panels, draw_attention_maps

WIDE = (8.4, 4.4)
"""Inches."""


@contextmanager
def _figure(theme: str, size: tuple[float, float] = WIDE) -> Iterator[Figure]:
    style: Any = look.matplotlib_style(theme)
    with mpl.rc_context(style):
        yield Figure(figsize=size, layout="constrained")


def _direct_labels(figure: Figure, ax: Axes, labels: list[tuple[str, float, float]]) -> None:
    """Name each line at its right end (name, x, y), pushed apart where they would overlap."""
    figure.draw_without_rendering()  # fixes the layout and the scales
    room = 13.0 * figure.dpi / 72  # pixels between two labels
    placed = -np.inf
    for name, x, y in sorted(labels, key=lambda label: label[2]):
        across, up = ax.transData.transform((x, y))
        placed = max(up, placed + room)
        x, y = ax.transData.inverted().transform((across, placed))
        ax.annotate(
            name, (float(x), float(y)), (8, 0), textcoords="offset points", va="center",
            fontsize=9.5, annotation_clip=False,
        )  # fmt: skip


def _draws_axis(ax: Axes, counts: np.ndarray) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(counts, [f"{int(c)}" for c in counts])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("draws per row, S")


def attention_maps(
    data: pd.DataFrame, theme: str, *, title: str, tokens: str | None = None, sampler: str = "sampled"
) -> Figure:
    """Exact, sampled and difference maps of one causal head.

    data: columns `query`, `key` (positions), `exact`, `sampled` (probabilities), one row a cell of the map.
    tokens: one character a position, shown along the axes.
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
    """Relative output error against draws, log-log, with error bars and the Monte-Carlo slope.

    data: columns `sampler`, `num_samples`, `error` (relative, root mean square) and the `half_width` of
    its 95 % interval.
    """
    counts = np.sort(data["num_samples"].unique())
    with _figure(theme) as figure:
        ax = figure.subplots()
        ax.set_yscale("log")
        _draws_axis(ax, counts)
        ax.set_ylabel("relative output error, ‖ô − o‖ / ‖o‖")
        labels = []
        for sampler, part in data.groupby("sampler", sort=False):
            part = part.sort_values("num_samples")
            style = look.sampler_style(str(sampler), theme)
            ax.errorbar(part["num_samples"], part["error"], part["half_width"], capsize=2.5, **style)
            last = part.iloc[-1]
            labels.append((str(sampler), last["num_samples"], last["error"]))
        if "monte-carlo" in set(data["sampler"]):
            first = data[data["sampler"] == "monte-carlo"].sort_values("num_samples").iloc[0]
            start = first["error"] * 1.25
            guide = start * np.sqrt(counts[0] / counts)
            muted = look.colours_of(theme)["muted"]
            ax.plot(counts, guide, color=muted, linewidth=1, linestyle=":")
            middle = len(counts) // 2
            ax.annotate(
                "slope −1/2", (counts[middle], guide[middle]), xytext=(4, 6), textcoords="offset points",
                color=muted, fontsize=9.5,
            )  # fmt: skip
        _plain_log(ax)
        _direct_labels(figure, ax, labels)
        ax.set_title(textwrap.fill(title, 72))
    return figure


def variance_map(data: pd.DataFrame, theme: str, *, title: str) -> Figure:
    """Variance of every head, layers down and heads across.

    data: columns `layer`, `head`, `variance` (relative: E‖ô − o‖² / ‖o‖²).
    """
    table = data.pivot(index="layer", columns="head", values="variance")
    values = table.to_numpy()
    with _figure(theme, (8.4, 4.6)) as figure:
        ax = figure.subplots()
        positive = values[values > 0]
        low, high = (positive.min(), positive.max()) if positive.size else (1e-6, 1.0)
        norm = LogNorm(low, max(high, low * 1.01))
        image = ax.imshow(np.clip(values, low, None), norm=norm, cmap=look.SEQUENTIAL, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            bright = norm(max(value, low)) > 0.55
            ax.text(
                column, row, f"{value:.2g}", ha="center", va="center", fontsize=9,
                color="#111417" if bright else "#f3f4f6",
            )  # fmt: skip
        ax.set_xticks(range(len(table.columns)), [str(h) for h in table.columns])
        ax.set_yticks(range(len(table.index)), [str(i) for i in table.index])
        ax.set_xlabel("query head")
        ax.set_ylabel("layer")
        ax.grid(False)
        figure.colorbar(image, label="relative variance, E‖ô − o‖² / ‖o‖² (log scale)")
        ax.set_title(textwrap.fill(title, 72))
    return figure


def bits_against_draws(data: pd.DataFrame, theme: str, *, title: str, exact: float) -> Figure:
    """Bits per byte of the whole model against draws, with the exact model's as a line.

    data: columns `sampler`, `num_samples`, `bits_per_byte` and the `half_width` of the 95 % interval of its
    distance from exact.
    """
    counts = np.sort(data["num_samples"].unique())
    with _figure(theme) as figure:
        ax = figure.subplots()
        _draws_axis(ax, counts)
        ax.set_ylabel("bits per byte")
        style = look.sampler_style("exact", theme)
        ax.plot(counts, np.full(len(counts), exact), **style)
        labels = [("exact", float(counts[-1]), exact)]
        for place, (sampler, part) in enumerate(data.groupby("sampler", sort=False)):
            part = part.sort_values("num_samples")
            style = look.sampler_style(str(sampler), theme)
            aside = 1.04 ** (place - (data["sampler"].nunique() - 1) / 2)  # so that bars stand side by side
            ax.errorbar(
                part["num_samples"] * aside, part["bits_per_byte"], part["half_width"], capsize=2.5, **style
            )
            last = part.iloc[-1]
            labels.append((str(sampler), last["num_samples"], last["bits_per_byte"]))
        _direct_labels(figure, ax, labels)
        ax.set_title(textwrap.fill(title, 72))
    return figure


def time_per_token(data: pd.DataFrame, theme: str, *, title: str) -> Figure:
    """Milliseconds per token of the whole model: one bar a method.

    data: columns `method`, `sampler`, `milliseconds` (median), `low`, `high` (fastest and slowest repeat).
    """
    with _figure(theme, (8.4, 0.55 * len(data) + 1.4)) as figure:
        ax = figure.subplots()
        y = np.arange(len(data))[::-1]
        colours = [look.sampler_style(s, theme)["color"] for s in data["sampler"]]
        spread = np.stack((data["milliseconds"] - data["low"], data["high"] - data["milliseconds"]))
        ax.set_xscale("log")
        left = 0.5 * data["low"].min()
        ax.barh(y, data["milliseconds"] - left, left=left, color=colours, height=0.62)
        ax.errorbar(
            data["milliseconds"], y, xerr=spread, fmt="none", capsize=2.5,
            ecolor=look.colours_of(theme)["muted"], elinewidth=1.2,
        )  # fmt: skip
        for position, value, high in zip(y, data["milliseconds"], data["high"], strict=True):
            ax.annotate(
                f"{value:.3g}",
                (high, position),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
            )
        ax.set_yticks(y, data["method"])
        ax.set_xlabel("milliseconds per token, whole model, log scale (median; whiskers: fastest to slowest)")
        ax.grid(False, axis="y")
        ax.set_xlim(left, 1.8 * data["high"].max())
        ax.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
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
    """Means over runs with 95 % intervals: lines against a number, rows of points against names.

    data: of `RunTable.summary`: `mean`, `half_width`, `runs`, and columns `x` and `by` where those are named.
    """
    numeric = x is not None and pd.api.types.is_numeric_dtype(data["x"])
    if by is not None and not numeric and x is None:
        data, x, by = data.rename(columns={"by": "x"}), by, None
    groups = list(data.groupby("by", sort=False)) if by is not None else [("", data)]
    many = len(groups) * (1 if numeric else data["x"].nunique())
    with _figure(theme, WIDE if numeric else (8.4, 0.42 * many + 1.5)) as figure:
        ax = figure.subplots()
        value_axis = ax.yaxis if numeric else ax.xaxis
        mean = data["mean"]
        if bool((mean > 0).all()) and mean.max() >= 10 * mean.min():
            (ax.set_yscale if numeric else ax.set_xscale)("log")
        names = list(dict.fromkeys(data["x"].astype(str)))
        labels = []
        for place, (name, part) in enumerate(groups):
            style = _group_style(str(name), place, theme, plain=len(groups) == 1)
            bars = part["half_width"].fillna(0)
            if numeric:
                part = part.sort_values("x")
                ax.errorbar(part["x"], part["mean"], bars.loc[part.index], capsize=2.5, **style)
                labels.append((str(name), float(part["x"].iloc[-1]), float(part["mean"].iloc[-1])))
            else:
                aside = 0.6 * ((place + 0.5) / len(groups) - 0.5)  # so that bars stand side by side
                heights = [names.index(str(value)) + aside for value in part["x"]]
                ax.errorbar(
                    part["mean"], heights, xerr=bars, capsize=2.5, label=str(name),
                    **{**style, "linestyle": "none"},
                )  # fmt: skip
        if numeric:
            counts = np.sort(data["x"].unique())
            if counts[0] > 0 and counts[-1] >= 4 * counts[0]:
                ax.set_xscale("log", base=2)
                ax.set_xticks(counts, [f"{c:g}" for c in counts])
                ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xlabel(str(x))
            ax.set_ylabel(y)
            if by is not None:
                _direct_labels(figure, ax, labels)
        else:
            ax.set_yticks(range(len(names)), names)
            ax.set_ylim(len(names) - 0.5, -0.5)
            ax.set_xlabel(y)
            ax.set_ylabel("" if x is None else str(x))
            if by is not None:
                ax.legend(title=by, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        if value_axis.get_scale() == "log":
            value_axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
            value_axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
            value_axis.set_minor_formatter(NullFormatter())
        runs = data["runs"]
        each = f"{runs.min()}" if runs.min() == runs.max() else f"{runs.min()} to {runs.max()}"
        note = f"means of {each} run{'s' if runs.max() > 1 else ''} each" + (
            "; bars: 95 % intervals" if runs.max() > 1 else ""
        )
        figure.text(
            0.99, 0.005, note, ha="right", va="bottom", fontsize=8.5, color=look.colours_of(theme)["muted"]
        )
        question = (
            f"How does {y} depend on {' and '.join(str(n) for n in (x, by) if n)}?"
            if x
            else f"{y} over all runs"
        )
        ax.set_title(textwrap.fill(title or question, 72))
    return figure


def _group_style(name: str, place: int, theme: str, *, plain: bool) -> dict[str, Any]:
    """A sampler's own style; else a colour and a marker by place."""
    if name in look.SAMPLER_MARKERS or plain:
        return look.sampler_style(name, theme)
    colours = [c for sampler, c in look.SAMPLER_COLOURS.items() if sampler != "lattice"]  # no yellow lines
    markers = [m for m in look.SAMPLER_MARKERS.values() if m]
    return {
        "color": colours[place % len(colours)],
        "marker": markers[place % len(markers)],
        "linestyle": "-",
    }


def _plain_log(ax: Axes) -> None:
    """Plain numbers at 1, 2 and 5 of each decade of the y axis."""
    ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
