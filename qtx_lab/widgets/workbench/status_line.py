"""`StatusLine`: the line at the bottom of a tab, which also gives what is shown as code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from ...errors import QtxError
from ..comms import hear_while_busy

STATIC = Path(__file__).parents[1] / "static"


class StatusLine(anywidget.AnyWidget):
    """State, progress, time left, cost and the run, with buttons that copy code and that make a report.

    Parameters
    ----------
    codes : mapping of str to callable
        The code to copy by its kind, "python" or "command"; asked for when its button is pressed.
    report : callable, optional
        Makes a report, and returns its path; called by a thread when its button is pressed. There is no such
        button if None.
    """

    _esm = STATIC / "status.js"
    line = traitlets.Dict().tag(sync=True)
    codes = traitlets.List(traitlets.Unicode(), read_only=True).tag(sync=True)
    reports = traitlets.Bool(read_only=True).tag(sync=True)

    def __init__(self, codes: Mapping[str, Callable[[], str]], report: Callable[[], Path] | None = None):
        self._codes, self._report = dict(codes), report
        super().__init__(line=_line())
        hear_while_busy(self)
        self.on_msg(lambda _, content, buffers: self._receive(content))

    def open(self) -> None:
        """Tell the browser of the line; it may be drawn before the browser hears of anything later."""
        self.set_trait("codes", list(self._codes))
        self.set_trait("reports", self._report is not None)
        super().open()

    def show(self, **parts: Any) -> None:
        """Draw the line: `state`, `fraction`, `label`, `cost`, `saved`, `run`, `place` and the others."""
        self.line = _line(**parts)

    def _receive(self, content: Mapping[str, Any]) -> None:
        code = self._codes.get(content.get("as", "")) if content.get("kind") == "code" else None
        if code is not None:
            try:
                text = code()
            except QtxError as error:
                text = f"# {error}"
            self.send({"kind": "code", "as": content["as"], "text": text})
        elif content.get("kind") == "report" and self._report is not None:
            threading.Thread(target=self._send_report, args=(self._report,), daemon=True).start()

    def _send_report(self, make: Callable[[], Path]) -> None:
        try:
            path = make()
            page = path.read_bytes()
        except (QtxError, OSError) as error:
            self.send({"kind": "problem", "text": str(error)})
        else:
            name = f"{path.parent.name}.html"
            self.send({"kind": "file", "name": name, "type": "text/html", "text": str(path)}, [page])


def _line(
    state: str = "",
    fraction: float | None = None,
    label: str = "",
    cost: str = "",
    saved: str = "",
    run: str = "",
    place: str = "",
    problem: bool = False,
    report: bool = False,
) -> dict[str, Any]:
    """What the browser draws."""
    return {
        "state": state,
        "fraction": fraction,
        "label": label,
        "cost": cost,
        "saved": saved,
        "run": run,
        "place": place,
        "problem": problem,
        "report": report,
    }
