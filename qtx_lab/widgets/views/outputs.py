"""`OutputsView`: how far estimates of attention outputs are from the exact ones, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ... import theme as look
from ...theme import with_error
from .base import View

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUTPUTS_NOTE = (
    "0 is the exact output, which a classical computer sums with a multiplication for each key. All three "
    "ways use the row equally often. Bars: 95 % intervals."
)


class OutputsView(View):
    """Errors of one coordinate of the outputs of some rows, by amplitude estimation, shots and draws.

    Examples
    --------
    >>> view = OutputsView()
    >>> estimate = {"name": "shots", "value": [0.5], "lower": [0.4], "upper": [0.6]}
    >>> view.show([15], [0.45], [estimate], "Coordinate 0 on fake_boston, 1024 loads a row")
    >>> view.frame().round(2).values.tolist()
    [[15, 'shots', 0.5, 0.4, 0.6, 0.45]]
    """

    def __init__(self) -> None:
        self._shown: dict[str, Any] | None = None
        super().__init__("outputs")

    def show(
        self,
        queries: Sequence[int],
        exact: Sequence[float],
        methods: Sequence[Mapping[str, Any]],
        title: str,
    ) -> None:
        """Show other estimates.

        Parameters
        ----------
        queries : sequence of int, (R,)
            Those whose outputs are estimated, counted from 0.
        exact : sequence of float, (R,)
            The exact outputs.
        methods : sequence of mapping
            Of each method its `name`, and for each row its `value` and the ends `lower` and `upper` of its
            95 % interval.
        title : str
        """
        shown = [
            {"name": x["name"], **{part: list(x[part]) for part in ("value", "lower", "upper")}}
            for x in methods
        ]
        self._shown = {
            "queries": [int(x) for x in queries],
            "exact": list(exact),
            "methods": shown,
            "title": title,
        }
        self._send_estimates()

    def frame(self) -> pd.DataFrame:
        """A row for each query and method: `query`, `method`, `value`, `lower`, `upper` and `exact`."""
        import pandas as pd

        shown = self._shown or {"queries": [], "exact": [], "methods": []}
        lines = [
            (query, x["name"], x["value"][i], x["lower"][i], x["upper"][i], shown["exact"][i])
            for i, query in enumerate(shown["queries"])
            for x in shown["methods"]
        ]
        return pd.DataFrame(lines, columns=["query", "method", "value", "lower", "upper", "exact"])

    def figure(self, theme: str = "light") -> Figure:
        """The errors of all rows side by side."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        style: Any = look.matplotlib_style(theme)
        with mpl.rc_context(style):
            figure = Figure(figsize=(12.4, 4.2), layout="constrained")
            if self._shown is None:
                figure.text(0.5, 0.5, "Nothing is estimated yet", ha="center")
                return figure
            _draw(figure.subplots(), self._shown, theme)
            figure.supxlabel(OUTPUTS_NOTE, fontsize=8.5, color=look.colours_of(theme)["muted"])
        return figure

    def _on_message(self, content: Mapping[str, Any]) -> None:
        if content["kind"] == "ready":
            self._send_estimates()

    def _send_estimates(self) -> None:
        if self._shown is not None:
            self.send({"kind": "estimates", "note": OUTPUTS_NOTE, **self._shown})


def _draw(ax: Axes, shown: Mapping[str, Any], theme: str) -> None:
    colours = look.colours_of(theme)
    ax.axhline(0, color=colours["exact"], linewidth=1.2)
    exact, count = shown["exact"], len(shown["methods"])
    for j, method in enumerate(shown["methods"]):
        classical, filled = method["name"] == "classical draws", method["name"] == "amplitude estimation"
        colour = colours["baseline"] if classical else colours["accent"]
        error = [x - e for x, e in zip(method["value"], exact, strict=True)]
        ends = [
            [x - low for x, low in zip(method["value"], method["lower"], strict=True)],
            [high - x for x, high in zip(method["value"], method["upper"], strict=True)],
        ]
        half = sum(map(sum, ends)) / (2 * len(exact))
        place = [i + 0.18 * (j - (count - 1) / 2) for i in range(len(exact))]
        ax.errorbar(
            place, error, ends, fmt="o", capsize=2, color=colour, mfc=colour if filled else "none",
            label=f"{method['name']}, ± {with_error(half, None)} in the mean",
        )  # fmt: skip
    names = [f"{query}\n{with_error(x, None)}" for query, x in zip(shown["queries"], exact, strict=True)]
    ax.set_xticks(range(len(exact)), names)
    ax.set_xlim(-0.6, len(exact) - 0.4)
    ax.set_xlabel("query, and its exact output")
    ax.set_ylabel("estimate − exact output")
    ax.set_title(shown["title"])
    ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
