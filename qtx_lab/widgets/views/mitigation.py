"""`MitigationView`: the expected error of ways to measure rows against shots, with what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ... import theme as look
from ..numbers import Z95
from .base import View

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXPECTED_NOTE = (
    "Lines: what each way is expected to give, rehearsed on the device's calibration; points: what was "
    "measured. Bars and bands: 95 % intervals."
)


class MitigationView(View):
    """Error against total shots a row, of ways to measure rows, with the chosen one marked.

    Examples
    --------
    >>> view = MitigationView()
    >>> way = {"name": "raw", "kind": "raw", "shots": [64, 256], "error": [0.1, 0.05]}
    >>> way["std_error"] = [0.01, 0.01]
    >>> view.show([way], 256, {"measured": (0.06, 0.01)}, "fake_boston")
    >>> view.frame()["way"].tolist()
    ['raw', 'raw', 'measured']
    """

    def __init__(self) -> None:
        self._shown: dict[str, Any] | None = None
        super().__init__("mitigation")

    def show(
        self,
        ways: Sequence[Mapping[str, Any]],
        shots: int,
        measured: Mapping[str, tuple[float, float]],
        device: str,
    ) -> None:
        """Show other errors.

        Parameters
        ----------
        ways : sequence of mapping
            Of each way its `name`, its `kind` ("classical", "raw", "chosen" or "other"), and against `shots`
            its expected `error`, total variation from the rows, with the `std_error`.
        shots : int
            Shots of each row with which was measured.
        measured : mapping
            What was measured, mean over rows and standard error, by name: "mitigated", "measured" without
            mitigation, "classical".
        device : str
            For the title.
        """
        points = [{"name": name, "error": x, "std_error": error} for name, (x, error) in measured.items()]
        self._shown = {"ways": [dict(x) for x in ways], "shots": shots, "points": points, "device": device}
        self._send_errors()

    def frame(self) -> pd.DataFrame:
        """Rows for each way and for what was measured: `way`, `kind`, `shots`, `error` and `half_width`."""
        import pandas as pd

        shown = self._shown or {"ways": [], "points": [], "shots": 0}
        lines = [
            (way["name"], "expected", shots, error, Z95 * std_error)
            for way in shown["ways"]
            for shots, error, std_error in zip(way["shots"], way["error"], way["std_error"], strict=True)
        ]
        lines += [
            (x["name"], "measured", shown["shots"], x["error"], Z95 * x["std_error"]) for x in shown["points"]
        ]
        return pd.DataFrame(lines, columns=["way", "kind", "shots", "error", "half_width"])

    def figure(self, theme: str = "light") -> Figure:
        """The errors against shots on two log axes."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        style: Any = look.matplotlib_style(theme)
        with mpl.rc_context(style):
            figure = Figure(figsize=(12.4, 4.2), layout="constrained")
            if self._shown is None:
                figure.text(0.5, 0.5, "Nothing is measured yet", ha="center")
                return figure
            ax = figure.subplots()
            _draw(ax, self._shown, theme)
            figure.supxlabel(EXPECTED_NOTE, fontsize=8.5, color=look.colours_of(theme)["muted"])
        return figure

    def _on_message(self, content: Mapping[str, Any]) -> None:
        if content["kind"] == "ready":
            self._send_errors()

    def _send_errors(self) -> None:
        if self._shown is not None:
            self.send({"kind": "errors", "note": EXPECTED_NOTE, **self._shown})


def _draw(ax: Axes, shown: Mapping[str, Any], theme: str) -> None:
    import numpy as np

    colours = look.colours_of(theme)
    by_kind = {"classical": colours["baseline"], "other": colours["muted"]}
    for way in shown["ways"]:
        error, half_width = np.array(way["error"]), Z95 * np.array(way["std_error"])
        colour = by_kind.get(way["kind"], colours["accent"])
        dashes = {"classical": "--", "raw": ":"}.get(way["kind"], "-")
        width = 2 if way["kind"] == "chosen" else 1
        ax.plot(way["shots"], error, dashes, color=colour, linewidth=width)
        ax.fill_between(
            way["shots"], np.maximum(error - half_width, error / 10), error + half_width, color=colour,
            alpha=0.15, linewidth=0,
        )  # fmt: skip
        ax.annotate(
            way["name"], (way["shots"][-1], error[-1]), (4, 0), textcoords="offset points", fontsize=8
        )
    for point in shown["points"]:
        colour = colours["baseline"] if point["name"] == "classical" else colours["accent"]
        filled = colour if point["name"] == "mitigated" else "none"
        ax.errorbar(
            [shown["shots"]], [point["error"]], [Z95 * point["std_error"]], fmt="o", mfc=filled, color=colour,
            capsize=2, label=point["name"],
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("total shots of a row")
    ax.set_ylabel("total variation from the row, mean")
    ax.set_title(f"Error against shots on {shown['device']}")
    ax.legend(fontsize=9)
