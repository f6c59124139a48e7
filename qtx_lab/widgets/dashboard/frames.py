"""Data frames of metrics: their numbers, their means over runs, and curves thinned for the screen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import special

MAX_POINTS = 2000
"""Points from which on a curve is thinned for the screen, to the extremes of every stretch."""


def numbers(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows with a finite number, or a text that can be read as one, in each of these columns."""
    frame = frame.assign(
        **{c: pd.to_numeric(frame[c], errors="coerce").astype("Float64").astype("float64") for c in columns}
    )
    return frame[np.isfinite(frame[list(columns)]).all(axis=1)]


def positive(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows with a positive finite number in each of these columns."""
    frame = numbers(frame, *columns)
    return frame[(frame[list(columns)] > 0).all(axis=1)]


def over_runs(frame: pd.DataFrame, by: Sequence[str], metric: str) -> pd.DataFrame:
    """Mean of a metric over runs, with half of its 95 % interval.

    Where there are several runs the interval is Student's, over the runs; for one run it is the run's own, if
    it has one.

    Returns
    -------
    DataFrame
        Columns `by`, the metric, `half_width` and `runs`, their number.
    """
    own = frame["half_width"] if "half_width" in frame else pd.Series(np.nan, frame.index)
    frame = frame.assign(half_width=pd.to_numeric(own, errors="coerce"))
    single = frame.groupby([*by, "run"], as_index=False)[[metric, "half_width"]].mean()
    rows = []
    for key, part in single.groupby(list(by)):
        n = len(part)
        width = (
            special.stdtrit(n - 1, 0.975) * part[metric].std() / np.sqrt(n)
            if n > 1
            else part["half_width"].iloc[0]
        )
        rows.append((*key, part[metric].mean(), np.nan_to_num(width), n))
    return pd.DataFrame(rows, columns=[*by, metric, "half_width", "runs"])


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """About `MAX_POINTS` of a curve's points, at most: the extremes of every stretch, and the last one."""
    if len(x) <= MAX_POINTS:
        return x, y
    size = -(-2 * len(x) // MAX_POINTS)
    starts = np.arange(0, len(x) - size + 1, size)
    blocks = y[: len(starts) * size].reshape(-1, size)
    filled = np.where(np.isnan(blocks), np.inf, blocks), np.where(np.isnan(blocks), -np.inf, blocks)
    keep = np.unique(
        np.concatenate((starts + filled[0].argmin(1), starts + filled[1].argmax(1), [0, len(x) - 1]))
    )
    return x[keep], y[keep]
