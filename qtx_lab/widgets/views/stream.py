"""`MetricStream`: live curves with bands, fed from any thread; every point arrives, in order."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import traitlets
from numpy.typing import ArrayLike, NDArray

from ... import theme as look
from ...checks import check_count
from ...errors import ArgumentError, DtypeError, ShapeError
from .base import View

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

BLOCK_POINTS = 1 << 16
"""Points that are stored together, and sent together at most."""

DEFAULT_CAPACITY = 1 << 21
"""Points that stay for views that open later, 26 bytes each."""

SEND_INTERVAL_S = 0.05
"""Seconds between two messages, at least."""

MAX_UNACKNOWLEDGED = 4
"""Messages that may be on their way before the browser has acknowledged them."""

ACKNOWLEDGE_TIMEOUT_S = 1.0
"""Seconds to wait for an acknowledgement; there is none where comms wait for the end of the cell."""

IDLE_TIMEOUT_S = 2.0
"""Seconds without new points after which the thread that sends them ends."""

COLUMNS = {"series": "<u2", "x": "<f8", "y": "<f8", "low": "<f4", "high": "<f4"}


@dataclass
class _Block:
    """Consecutive points, from number `first` on, in the order in which they came."""

    first: int
    count: int = 0
    columns: dict[str, NDArray[Any]] = field(
        default_factory=lambda: {name: np.empty(BLOCK_POINTS, dtype) for name, dtype in COLUMNS.items()}
    )


class MetricStream(View):
    """Live curves: loss, variance of a head, fidelity against shots, with 95 % bands.

    `push` may be called from any thread. Every point gets a number; about 20 times a second the new ones are
    sent in one message, from the oldest that the browser has not got on. A view that finds a number missing,
    or opens late, asks for what it lacks. The newest `capacity` points stay here for that; the run's
    files are the record.

    Parameters
    ----------
    title : str
    x_label, y_label : str
        Names of the axes, with units.
    log_x, log_y : bool
    capacity : int
        Points that stay here; rounded up to a multiple of 65,536.

    Examples
    --------
    >>> stream = MetricStream("Loss", x_label="step", y_label="bits per byte")
    >>> stream.push("train", 0, 2.5)
    >>> stream.push("held out", [0, 100], [2.6, 2.1], low=[2.5, 2.0], high=[2.7, 2.2])
    >>> stream.frame()
         series      x    y  low  high
    0     train    0.0  2.5  NaN   NaN
    1  held out    0.0  2.6  2.5   2.7
    2  held out  100.0  2.1  2.0   2.2
    """

    title = traitlets.Unicode().tag(sync=True)
    x_label = traitlets.Unicode().tag(sync=True)
    y_label = traitlets.Unicode().tag(sync=True)
    log_x = traitlets.Bool().tag(sync=True)
    log_y = traitlets.Bool().tag(sync=True)

    def __init__(
        self,
        title: str = "",
        *,
        x_label: str = "step",
        y_label: str = "value",
        log_x: bool = False,
        log_y: bool = False,
        capacity: int = DEFAULT_CAPACITY,
    ):
        capacity = check_count("capacity", capacity)
        self._blocks: deque[_Block] = deque(maxlen=-(-capacity // BLOCK_POINTS))
        self._series: dict[str, int] = {}
        self._num_points = 0  # also the number of the next one
        self._cursor: int | None = None  # number of the next point to be sent; None until a view asks
        self._unacknowledged: deque[tuple[int, float]] = deque()  # (number after the last point, time)
        self._displayed = 0.0  # when it was displayed
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        super().__init__("stream", title=title, x_label=x_label, y_label=y_label, log_x=log_x, log_y=log_y)

    def push(
        self,
        series: str,
        x: ArrayLike,
        y: ArrayLike,
        low: ArrayLike | None = None,
        high: ArrayLike | None = None,
    ) -> None:
        """Add points to a curve; any thread may call it, and it returns at once.

        Parameters
        ----------
        series : str
            Name of the curve. A sampler's name gives the sampler's colour.
        x, y : float or array (N,)
            x is finite; where y is NaN the curve has a gap.
        low, high : the same, optional
            Ends of the 95 % interval.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            Different lengths; what is no real number; an x that is not finite; one end of an interval without
            the other.
        """
        if (low is None) != (high is None):
            raise ArgumentError("low and high go together: give both or neither.")
        given = {"x": x, "y": y} | ({} if low is None or high is None else {"low": low, "high": high})
        points = {name: _numbers(name, value) for name, value in given.items()}
        shapes = {name: value.shape for name, value in points.items()}
        if len(set(shapes.values())) > 1 or points["x"].ndim != 1:
            raise ShapeError(f"push was given {shapes}; all must be (N,), or numbers.")
        if not np.isfinite(points["x"]).all():
            raise ArgumentError("x holds NaN or infinity; it must be finite.")
        with self._changed:
            number = self._series.setdefault(str(series), len(self._series))
            done, size = 0, len(points["x"])
            while done < size:
                block = self._open_block()
                part = min(size - done, BLOCK_POINTS - block.count)
                at, of = slice(block.count, block.count + part), slice(done, done + part)
                block.columns["series"][at] = number
                for name in ("x", "y", "low", "high"):
                    block.columns[name][at] = points[name][of] if name in points else np.nan
                block.count += part
                done += part
            self._num_points += size
            self._wake()

    def finish(self) -> None:
        """Send what is waiting, and renew the picture that a saved notebook shows."""
        with self._changed:
            end = time.monotonic() + 2 * ACKNOWLEDGE_TIMEOUT_S
            while self._thread is not None and self._cursor != self._num_points and time.monotonic() < end:
                self._changed.wait(SEND_INTERVAL_S)
        self.refresh_picture()

    def frame(self) -> pd.DataFrame:
        """The points that are still here, in their order: `series`, `x`, `y`, `low`, `high`."""
        import pandas as pd

        with self._changed:
            names = list(self._series)
            columns = {
                name: np.concatenate(
                    [b.columns[name][: b.count] for b in self._blocks] or [np.empty(0, dtype)]
                )
                for name, dtype in COLUMNS.items()
            }
        series = np.array(names, dtype=object)[columns.pop("series")] if names else []
        return pd.DataFrame({"series": series, **columns})

    def figure(self, theme: str = "light") -> Figure:
        """The curves with their bands."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        frame = self.frame()
        style: Any = look.matplotlib_style(theme)
        with mpl.rc_context(style):
            figure = Figure(figsize=(8.4, 4.0), layout="constrained")
            ax = figure.subplots()
            for number, (name, part) in enumerate(frame.groupby("series", sort=False)):
                colour = _colour(str(name), number, theme)
                part = part.iloc[:: max(1, len(part) // 4000)]
                ax.plot(part["x"], part["y"], color=colour, label=str(name))
                if part["low"].notna().any():
                    ax.fill_between(
                        part["x"], part["low"], part["high"], color=colour, alpha=0.2, linewidth=0
                    )
            if frame.empty:
                ax.text(0.5, 0.5, "No points yet", transform=ax.transAxes, ha="center", va="center")
            else:
                ax.legend(loc="best")
            ax.set_xscale("log" if self.log_x else "linear")
            ax.set_yscale("log" if self.log_y else "linear")
            ax.set_xlabel(self.x_label)
            bands = frame["low"].notna().any()
            ax.set_ylabel(f"{self.y_label}{' (bands: 95 %)' if bands else ''}")
            ax.set_title(self.title)
        return figure

    def _open_block(self) -> _Block:
        """The block that has room, or a new one, for which the oldest may be dropped."""
        if not self._blocks or self._blocks[-1].count == BLOCK_POINTS:
            first = self._blocks[-1].first + BLOCK_POINTS if self._blocks else 0
            self._blocks.append(_Block(first))
        return self._blocks[-1]

    def _on_message(self, content: Mapping[str, Any]) -> None:
        with self._changed:
            if content["kind"] == "want":  # a view that was opened, or that lacks a number
                start = int(content["next"])
                self._cursor = start if self._cursor is None else min(self._cursor, start)
                self._unacknowledged.clear()
                self._wake()
            elif content["kind"] == "got":
                while self._unacknowledged and self._unacknowledged[0][0] <= int(content["next"]):
                    self._unacknowledged.popleft()
                self._changed.notify_all()

    def _wake(self) -> None:
        """Start the thread that sends new points, if needed; called with the lock held."""
        if (
            self._cursor is None
            and self._displayed
            and time.monotonic() - self._displayed > 2 * ACKNOWLEDGE_TIMEOUT_S
        ):
            self._cursor = 0  # displayed, but its request waits for the end of the cell
        if self._cursor is None or self._cursor >= self._num_points:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_all, name="qtx-lab-stream", daemon=True)
            self._thread.start()
        else:
            self._changed.notify_all()

    def _ipython_display_(self, **kwargs: Any) -> None:
        super()._ipython_display_(**kwargs)
        self._displayed = time.monotonic()

    def _send_all(self) -> None:
        """Send batches until nothing has come for `IDLE_TIMEOUT_S`."""
        while True:
            with self._changed:
                if self._cursor == self._num_points:
                    if not self._changed.wait(IDLE_TIMEOUT_S):
                        self._thread = None
                        return
                    continue
                if (
                    len(self._unacknowledged) >= MAX_UNACKNOWLEDGED
                    and time.monotonic() - self._unacknowledged[-1][1] < ACKNOWLEDGE_TIMEOUT_S
                ):
                    self._changed.wait(SEND_INTERVAL_S)
                    continue
                message, buffers = self._batch()
                self._unacknowledged.append((self._cursor or 0, time.monotonic()))
                if len(self._unacknowledged) > MAX_UNACKNOWLEDGED:
                    self._unacknowledged.popleft()
            self.send(message, buffers)
            time.sleep(SEND_INTERVAL_S)

    def _batch(self) -> tuple[dict[str, Any], list[bytes]]:
        """The next points to be sent; called with the lock held, moves the cursor."""
        assert self._cursor is not None
        oldest = self._blocks[0].first if self._blocks else 0
        self._cursor = max(self._cursor, oldest)
        message = {
            "kind": "points",
            "first": self._cursor,
            "oldest": oldest,
            "total": self._num_points,
            "names": list(self._series),
        }
        block = self._blocks[(self._cursor - oldest) // BLOCK_POINTS]
        part = slice(self._cursor - block.first, block.count)
        columns = {name: block.columns[name][part] for name in COLUMNS}
        self._cursor += block.count - (part.start or 0)
        if np.isnan(columns["low"]).all():
            columns["low"] = columns["high"] = np.empty(0, "<f4")
        return {**message, "count": len(columns["x"])}, [x.tobytes() for x in columns.values()]


def _numbers(name: str, value: Any) -> NDArray[np.float64]:
    """What was pushed as an array (N,); of a tensor that is being trained, the values."""
    value = value.detach().cpu() if isinstance(value, torch.Tensor) else value
    try:
        return np.atleast_1d(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtypeError(f"{name} is no array of real numbers: {error}.") from error


def _colour(name: str, number: int, theme: str) -> str:
    """The colour of the sampler, or of the exact attention, after which the curve is named, or the next one.

    That is the next of `CYCLE`.
    """
    if name.endswith("exact attention"):
        return look.colours_of(theme)["exact"]
    if name in look.SAMPLER_MARKERS:
        return str(look.sampler_style(name, theme)["color"])
    return CYCLE[number % len(CYCLE)]


CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Those of Okabe and Ito's colours that stand out on both backgrounds."""
