"""The figure of `CircuitView`: distribution, fidelity against shots and the zero-noise fit, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ... import theme as look
from ..numbers import Z95
from .zero_noise import ZeroNoiseFit

MAX_KEYS = 24
"""Keys that are drawn by themselves, where there are more than twice as many."""


def circuit_figure(
    frame: pd.DataFrame,
    curve: Sequence[dict[str, float]],
    fit: ZeroNoiseFit | None,
    theme: str,
    *,
    shots: int,
    title: str,
    note: str,
) -> Figure:
    """Distribution, fidelity against shots and, where there is one, the zero-noise fit.

    Parameters
    ----------
    frame : DataFrame
        Of each key `exact`, `count`, `classical` (counts), `mitigated` and `mitigated_error`.
    curve : sequence of dict
        `shots`, `fidelity`, `error` (standard error) and `classical` after each part.
    fit : ZeroNoiseFit, optional
    theme : str
        "light" or "dark".
    shots : int
        Measured so far.
    title, note : str
        Above and below the figure.
    """
    colours = look.colours_of(theme)
    style: Any = look.matplotlib_style(theme)
    with mpl.rc_context(style):
        figure = Figure(figsize=(12.4, 4.6), layout="constrained")
        axes = figure.subplots(1, 3 if fit else 2, width_ratios=[1.6, 1, 1] if fit else [1.6, 1])
        _draw_distribution(axes[0], frame, fit, theme, shots)
        _draw_fidelity(axes[1], curve, theme)
        if fit:
            _draw_fit(axes[2], fit, theme)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
        figure.supxlabel(note, fontsize=8.5, color=colours["muted"])
    return figure


def empty_figure(theme: str, text: str) -> Figure:
    """A figure that only says why there is nothing to see."""
    style: Any = look.matplotlib_style(theme)
    with mpl.rc_context(style):
        figure = Figure(figsize=(12.4, 4.6), layout="constrained")
        figure.text(0.5, 0.5, text, ha="center")
    return figure


def _measured_colour(theme: str) -> str:
    return look.SAMPLER_COLOURS["systematic"] if theme == "light" else look.colours_of(theme)["accent"]


def _draw_distribution(
    ax: Axes, frame: pd.DataFrame, fit: ZeroNoiseFit | None, theme: str, shots: int
) -> None:
    colours, measured = look.colours_of(theme), _measured_colour(theme)
    visible = top_keys(frame[(frame["exact"] > 0) | (frame["count"] > 0)])
    at = np.arange(len(visible)) if visible["rest"].any() else visible["key"].to_numpy()
    ax.stem(at, visible["exact"], linefmt=colours["exact"], markerfmt=" ", basefmt=" ", label="exact")
    drawn = visible["classical"] / max(1, shots)
    ax.plot(at, drawn, "_", color=colours["baseline"], markersize=9, label=f"{shots} classical draws")
    total = max(1, frame["count"].sum())
    share = visible["count"] / total
    half_width = Z95 * np.sqrt(share * (1 - share) / total)
    ax.errorbar(
        at, share, half_width, fmt="o", mfc="none", color=measured, markersize=5, capsize=2,
        label="measured (bars: 95 %)",
    )  # fmt: skip
    if fit:
        ax.errorbar(
            at + 0.2, visible["mitigated"], Z95 * visible["mitigated_error"], fmt="o", color=measured,
            markersize=5, capsize=2, label="extrapolated to no noise",
        )  # fmt: skip
    if visible["rest"].any():
        rest = len(frame[(frame["exact"] > 0) | (frame["count"] > 0)]) - len(visible) + 1
        names = [*visible["key"][:-1].astype(str), f"rest\n({rest} keys)"]
        ax.set_xticks(at, names, fontsize=7)
    ax.set_xlabel("key")
    ax.set_ylabel("probability")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=9)


def top_keys(frame: pd.DataFrame, count: int = MAX_KEYS) -> pd.DataFrame:
    """All keys if they are few, else the most likely ones in their order, and the sum of the rest.

    Parameters
    ----------
    frame : DataFrame
        As for `circuit_figure`.
    count : int
        Keys that are shown by themselves, where there are more than twice as many.

    Returns
    -------
    DataFrame
        With the column `rest`, True in the line that is a sum; its `mitigated_error` is that of the sum.
    """
    if len(frame) <= 2 * count:
        return frame.assign(rest=False)
    first = frame.nlargest(count, "exact").sort_values("key")
    others = frame.drop(first.index)
    line = others.sum(numeric_only=True)
    if "mitigated_error" in frame:
        line["mitigated_error"] = float(np.hypot.reduce(others["mitigated_error"].to_numpy()))
    rest = pd.DataFrame([line]).assign(key=-1, rest=True)
    return pd.concat([first.assign(rest=False), rest], ignore_index=True).astype({"key": int})


def _draw_fidelity(ax: Axes, curve: Sequence[dict[str, float]], theme: str) -> None:
    shots = [point["shots"] for point in curve]
    baseline = look.colours_of(theme)["baseline"]
    ax.plot(shots, [point["classical"] for point in curve], "--", color=baseline, label="classical draws")
    ax.errorbar(
        shots, [point["fidelity"] for point in curve], [Z95 * point["error"] for point in curve], fmt="o",
        mfc="none", color=_measured_colour(theme), capsize=2, label="measured",
    )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlabel("shots")
    ax.set_ylabel("Hellinger fidelity")
    if curve:
        ax.legend(fontsize=9, loc="lower right")


def _draw_fit(ax: Axes, fit: ZeroNoiseFit, theme: str) -> None:
    measured = _measured_colour(theme)
    ax.plot(*np.array(fit.fit).T, color=measured, linewidth=1.2)
    ax.errorbar(
        fit.levels, fit.values, Z95 * np.array(fit.errors), fmt="o", mfc="none", color=measured, capsize=2
    )
    ax.errorbar([0], [fit.answer], [Z95 * fit.answer_error], fmt="o", color=measured, capsize=2)
    ax.axhline(fit.exact, color=look.colours_of(theme)["exact"], linewidth=1.2)
    ax.set_xlabel("noise level (1: the device's own)")
    ax.set_ylabel(f"probability of key {fit.key}")
