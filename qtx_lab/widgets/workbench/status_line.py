"""`StatusLine`: the line at the bottom of a tab, which also gives what is shown as code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from ...errors import QtxError
from ..comms import hear_while_busy

STATIC = Path(__file__).parents[1] / "static"


class StatusLine(anywidget.AnyWidget):
    """State, progress, time left, cost and the run, with buttons that copy code.

    Parameters
    ----------
    codes : mapping of str to callable
        The code to copy by its kind, "python" or "command"; asked for when its button is pressed.
    """

    _esm = STATIC / "widgets.js"
    _css = STATIC / "widgets.css"
    kind = traitlets.Unicode("status", read_only=True).tag(sync=True)
    line = traitlets.Dict().tag(sync=True)
    codes = traitlets.List(traitlets.Unicode(), read_only=True).tag(sync=True)

    def __init__(self, codes: Mapping[str, Callable[[], str]]):
        self._codes = dict(codes)
        super().__init__(line=_line())
        self.set_trait("codes", list(self._codes))
        hear_while_busy(self)
        self.on_msg(lambda _, content, buffers: self._receive(content))

    def show(self, **parts: Any) -> None:
        """Draw the line: `state`, `fraction`, `label`, `cost`, `saved`, `place` and `problem`."""
        self.line = _line(**parts)

    def _receive(self, content: Mapping[str, Any]) -> None:
        code = self._codes.get(content.get("as", "")) if content.get("kind") == "code" else None
        if code is not None:
            try:
                text = code()
            except QtxError as error:
                text = f"# {error}"
            self.send({"kind": "code", "as": content["as"], "text": text})


def _line(
    state: str = "",
    fraction: float | None = None,
    label: str = "",
    cost: str = "",
    saved: str = "",
    place: str = "",
    problem: bool = False,
) -> dict[str, Any]:
    """What the browser draws."""
    return {
        "state": state,
        "fraction": fraction,
        "label": label,
        "cost": cost,
        "saved": saved,
        "place": place,
        "problem": problem,
    }
