"""The three maps of an attention head: exact, sampled and their difference, for reports and views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from .. import theme as look

WEIGHT_FLOOR = 1e-4
"""Smaller weights are drawn like this one, because a logarithmic scale needs a lower end."""

VISIBLE_SPACE = {" ": "·", "\n": "¶", "\t": "→"}
"""How white space is shown on an axis of characters."""


@dataclass(frozen=True)
class MapPanel:
    """One of the three maps, with everything that decides how it looks.

    Parameters
    ----------
    title : str
        What is shown.
    values : ndarray, (L, n)
        Clipped to the colour scale at its lower end; NaN where a key is masked.
    colours : str
        Name of a matplotlib colour map.
    low, high : float
        Ends of the colour scale.
    log_scale : bool
        Whether the colour scale is logarithmic.
    label : str
        Name of the colour bar, with its scale.
    """

    title: str
    values: np.ndarray
    colours: str
    low: float
    high: float
    log_scale: bool
    label: str


def attention_panels(
    exact: np.ndarray,
    sampled: np.ndarray,
    *,
    sampler: str = "sampled",
    visible: np.ndarray | None = None,
    log_scale: bool = True,
    difference_limit: float | None = None,
) -> tuple[MapPanel, MapPanel, MapPanel]:
    """The exact, the sampled and the difference map of one head.

    Parameters
    ----------
    exact, sampled : ndarray, (L, n)
        Probabilities, or their means over the cells of a coarser map.
    sampler : str
        Name of the sampler, for the titles.
    visible : bool ndarray, (L, n), optional
        Which cells are shown; where None, those that are not NaN.
    log_scale : bool
        Whether the weights have a logarithmic colour scale.
    difference_limit : float, optional
        End of the symmetric colour scale of the difference; the largest difference where None.

    Examples
    --------
    >>> exact, sampled = np.array([[0.75, 0.25]]), np.array([[0.5, 0.5]])
    >>> [panel.title for panel in attention_panels(exact, sampled, sampler="sobol")]
    ['exact', 'sobol', 'sobol − exact']
    """
    visible = ~np.isnan(exact) if visible is None else visible
    exact, sampled = (np.where(visible, weights, np.nan) for weights in (exact, sampled))
    difference = sampled - exact
    largest = max(float(np.nanmax(np.abs(difference), initial=0.0)), WEIGHT_FLOOR)
    limit = largest if difference_limit is None else difference_limit
    if log_scale:
        low, high = WEIGHT_FLOOR, 1.0
        label = f"attention weight (log; darkest: ≤ {low:g})"
    else:
        low, label = 0.0, "attention weight"
        high = max(*(float(np.nanmax(x, initial=0.0)) for x in (exact, sampled)), 2 * WEIGHT_FLOOR)
    signed = "difference of weights"
    if difference_limit is not None:
        signed = f"difference (deepest: ≥ {difference_limit:g})"
    return (
        MapPanel("exact", np.maximum(exact, low), look.SEQUENTIAL, low, high, log_scale, label),
        MapPanel(sampler, np.maximum(sampled, low), look.SEQUENTIAL, low, high, log_scale, label),
        MapPanel(f"{sampler} − exact", difference, look.DIVERGING, -limit, limit, False, signed),
    )


def draw_attention_maps(
    panels: Sequence[MapPanel],
    theme: str,
    *,
    title: str,
    extent: tuple[float, float, float, float],
    tokens: Sequence[str] | None = None,
) -> Figure:
    """Draw the three maps side by side; they share their axes.

    Parameters
    ----------
    panels : sequence of MapPanel
        See `attention_panels`.
    theme : str
        "light" or "dark".
    title : str
        The finding.
    extent : tuple of float
        First and last key, last and first query, at the outer edges of their cells.
    tokens : sequence of str, optional
        What stands at each key of a square map, shown on both axes.
    """
    style: Any = look.matplotlib_style(theme)
    with mpl.rc_context(style):
        figure = Figure(figsize=(12.4, 5.4), layout="constrained")
        axes = figure.subplots(1, 3, sharex=True, sharey=True)
        images = []
        for ax, panel in zip(axes, panels, strict=True):
            norm = (LogNorm if panel.log_scale else Normalize)(panel.low, panel.high)
            images.append(
                ax.imshow(
                    panel.values, norm=norm, cmap=panel.colours, extent=extent, interpolation="nearest",
                    aspect="auto",
                )
            )  # fmt: skip
            ax.set_title(panel.title, fontsize=11, fontweight="normal")
            ax.set_xlabel("key")
            ax.grid(False)
            if tokens is not None:
                positions = np.arange(extent[0] + 0.5, extent[1])
                letters = [VISIBLE_SPACE.get(token, token) for token in tokens]
                ax.set_xticks(positions, letters, fontsize=8, fontfamily="monospace")
                ax.set_yticks(positions, letters, fontsize=8, fontfamily="monospace")
                ax.tick_params(length=0, pad=2)
        figure.colorbar(images[1], ax=axes[:2], label=panels[1].label, location="bottom", aspect=45)
        figure.colorbar(images[2], ax=axes[2], label=panels[2].label, location="bottom", aspect=22)
        axes[0].set_ylabel("query")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12, wrap=True)
    return figure
