"""`View`, the base of the views: one bundle, a picture in every saved notebook, and files to save."""

from __future__ import annotations

import base64
import io
import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets
from IPython.display import DisplayHandle, display

from ... import theme as look
from ...errors import QtxError, unknown_name
from ...storage import database, parquet_bytes, write_atomic
from ..comms import hear_while_busy
from .thread_worker import ThreadWorker

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STATIC = Path(__file__).parents[1] / "static"

EXPORTS = {
    "png": "image/png",
    "svg": "image/svg+xml",
    "parquet": "application/vnd.apache.parquet",
    "csv": "text/csv",
}
"""The kinds of files that a view can be saved as, with their media types."""

PICTURE_DPI = 110
"""Pixels an inch of the picture in a saved notebook."""

ONE_OUTPUT_HOSTS = ("VSCODE_PID", "VSCODE_CWD", "COLAB_RELEASE_TAG")
"""Variables of the environments whose notebooks show the picture of an output when its view is missing."""

_CHILD = ".jp-OutputArea-child"
_FIRST = f"{_CHILD}:has(style.qtx-saved)"
SAVED_STYLE = (
    f"<style class='qtx-saved'>{_FIRST}, "
    f"{_FIRST} + {_CHILD}:has(+ {_CHILD} > .jp-OutputArea-output *), "
    f"{_FIRST} + {_CHILD} + {_CHILD}:not(:has(> .jp-OutputArea-output *, .qtx-closed))"
    " {display: none}</style>"
)
"""An output before a picture and its widget: JupyterLab shows the widget where it is live, else the picture.

Without a kernel it would show "model not found" below the picture. In a notebook that is not trusted,
JupyterLab leaves the style out, and the two stand there together.
"""

DRAWING_LOCK = threading.RLock()
"""matplotlib's style is global, so that only one thread may draw at a time."""


class View(anywidget.AnyWidget):
    """Base of the views: an anywidget whose browser side is in the one bundle.

    Data go to the browser in messages that the browser asks for, never as traits: people set traits, in a
    cell or in the browser, and ipywidgets does not guard them against threads.

    Parameters
    ----------
    kind : str
        Which view of the bundle shows it.
    **traits
        Values of its traits, of those that are read only too. They are set before the browser hears of the
        view, because it may draw the view before it hears of anything later.
    """

    _esm = STATIC / "widgets.js"
    _css = STATIC / "widgets.css"
    kind = traitlets.Unicode(read_only=True).tag(sync=True)
    """Which view of the bundle this is."""
    has_picture = traitlets.Bool(False, read_only=True).tag(sync=True)
    """Whether a picture stands before the view as an output of its own, which the live view hides."""

    def __init__(self, kind: str, **traits: Any):
        self._worker = ThreadWorker(self.fail)
        self._display_handle: Any = None
        read_only = {name for name in traits if self.traits()[name].read_only}
        self._first_traits = {"kind": kind, **{name: traits.pop(name) for name in read_only}}
        super().__init__(**traits)
        hear_while_busy(self)
        self.on_msg(lambda _, content, buffers: self._receive(content))

    def open(self) -> None:
        """Tell the browser of the view; called by ipywidgets once, at the end of its constructor."""
        for name, value in self._first_traits.items():
            self.set_trait(name, value)
        super().open()

    def figure(self, theme: str = "light") -> Figure:
        """What is shown, as a matplotlib figure."""
        raise NotImplementedError

    def frame(self) -> pd.DataFrame:
        """The data behind what is shown."""
        raise NotImplementedError

    def save(self, path: str | Path, *, theme: str = "light") -> Path:
        """Write what is shown to a file: `.png` or `.svg` the figure, `.parquet` or `.csv` the data.

        Raises
        ------
        ArgumentError
            If the file has another ending.
        StorageError
            If it cannot be written.
        """
        path = Path(path)
        kind = path.suffix.removeprefix(".").lower()
        if kind not in EXPORTS:
            raise unknown_name("the ending of path", kind, EXPORTS)
        write_atomic(path, self._content(kind, theme))
        return path

    def refresh_picture(self) -> None:
        """Renew the picture that a saved notebook shows in place of the view."""
        if self._display_handle is None:
            return
        if self.has_picture:
            self._display_handle.update(self._picture(), raw=True)
            return
        data, metadata = self._repr_mimebundle_()
        self._display_handle.update(data, metadata=metadata, raw=True)

    def fail(self, error: BaseException) -> None:
        """Show an error in the view."""
        text = str(error) if isinstance(error, QtxError) else f"{type(error).__name__}: {error}"
        self.send({"kind": "error", "text": text})

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return {**data, **self._picture()}, metadata

    def _picture(self) -> dict[str, str]:
        """The output that stands for the view where there is no kernel."""
        picture = base64.b64encode(render_figure(self.figure)).decode()
        return {"image/png": picture, "text/plain": repr(self)}

    def _ipython_display_(self, **kwargs: Any) -> None:
        if any(name in os.environ for name in ONE_OUTPUT_HOSTS):
            data, metadata = self._repr_mimebundle_()
            self._display_handle = display(data, metadata=metadata, raw=True, display_id=True)
            return
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        self._display_handle = display_with_picture(self._picture(), data, metadata)
        self.set_trait("has_picture", True)

    def _content(self, kind: str, theme: str) -> bytes:
        if kind in ("png", "svg"):
            return render_figure(self.figure, kind, theme, None)
        frame = self.frame()
        if kind == "csv":
            return frame.to_csv(index=False).encode()
        with database() as connection:
            connection.register("frame", frame)
            return parquet_bytes(connection, "FROM frame")

    def _receive(self, content: Mapping[str, Any]) -> None:
        """Take in a message of the browser. Any thread may call this, so that nothing here may take long."""
        if content.get("kind") == "export" and content.get("as") in EXPORTS:
            self._worker.put("export", partial(self._export, content["as"]), rank=1)
        else:
            self._on_message(content)

    def _on_message(self, content: Mapping[str, Any]) -> None:
        """Take in a message that only this kind of view has."""

    def _export(self, kind: str) -> None:
        name = f"{type(self).__name__.lower()}.{kind}"
        self.send({"kind": "file", "name": name, "type": EXPORTS[kind]}, [self._content(kind, "light")])


def display_with_picture(
    picture: Mapping[str, str], widget: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
) -> DisplayHandle:
    """Display a widget after the picture that stands for it without a kernel; the handle renews the picture.

    Of one output with both, JupyterLab without a kernel shows "model not found", and not the picture.

    Parameters
    ----------
    picture, widget : mapping of str to object
        The outputs by media type.
    metadata : mapping, optional
        Of the widget's output.
    """
    display({"text/html": SAVED_STYLE, "text/plain": ""}, raw=True)
    handle = display(dict(picture), raw=True, display_id=True)
    display(dict(widget), metadata=dict(metadata or {}), raw=True)
    return handle


def render_figure(
    figure: Callable[[str], Figure], kind: str = "png", theme: str = "light", dpi: float | None = PICTURE_DPI
) -> bytes:
    """Draw `figure(theme)` as a PNG or SVG file; `dpi` None is that of the figure."""
    import matplotlib as mpl

    style: Any = look.matplotlib_style(theme)
    content = io.BytesIO()
    with DRAWING_LOCK, mpl.rc_context(style):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure(theme).savefig(content, format=kind, dpi=dpi or "figure", metadata=metadata)
    return content.getvalue()
