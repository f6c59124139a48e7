"""What the views share: one bundle, a picture in every saved notebook, files to take away, a thread that drops stale work."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import matplotlib as mpl
import traitlets
from IPython.display import display

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
"""What a view can be saved as, with the type that a browser knows it by."""

PICTURE_DPI = 110

_DRAWING_LOCK = threading.RLock()
"""matplotlib's style is global: two threads that draw take turns."""


class View(anywidget.AnyWidget):
    """Base of the views: an anywidget whose browser side is in the one bundle.

    Data go to the browser as messages that the browser asks for, never as traits: traits are set by people, here or
    there, and ipywidgets does not guard them against threads.
    """

    _esm = STATIC / "widgets.js"
    _css = STATIC / "widgets.css"
    kind = traitlets.Unicode(read_only=True).tag(sync=True)
    """Which view of the bundle this is."""

    def __init__(self, kind: str, **traits: Any):
        self._worker = ThreadWorker(self.fail)
        self._handle: Any = None
        super().__init__(**traits)
        hear_while_busy(self)
        self.set_trait("kind", kind)
        self.on_msg(lambda _, content, buffers: self._heard(content))

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
        """Put a new picture beside the view where it was displayed: the one that a saved notebook keeps."""
        if self._handle is not None:
            data, metadata = self._repr_mimebundle_()
            self._handle.update(data, metadata=metadata, raw=True)

    def fail(self, error: BaseException) -> None:
        """Say in the view what went wrong."""
        text = str(error) if isinstance(error, QtxError) else f"{type(error).__name__}: {error}"
        self.send({"kind": "error", "text": text})

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        data["image/png"] = base64.b64encode(render_figure(self.figure)).decode()
        return data, metadata

    def _ipython_display_(self, **kwargs: Any) -> None:
        data, metadata = self._repr_mimebundle_()
        self._handle = display(data, metadata=metadata, raw=True, display_id=True)

    def _content(self, kind: str, theme: str) -> bytes:
        if kind in ("png", "svg"):
            return render_figure(self.figure, kind, theme, None)
        frame = self.frame()
        if kind == "csv":
            return frame.to_csv(index=False).encode()
        with database() as connection:
            connection.register("frame", frame)
            return parquet_bytes(connection, "FROM frame")

    def _heard(self, content: Mapping[str, Any]) -> None:
        """A message of the browser, on whichever thread the kernel hears it: nothing long may be done here."""
        if content.get("kind") == "export" and content.get("as") in EXPORTS:
            self._worker.put("export", partial(self._export, content["as"]), rank=1)
        else:
            self._on_message(content)

    def _on_message(self, content: Mapping[str, Any]) -> None:
        """A message of the view's own kind."""

    def _export(self, kind: str) -> None:
        name = f"{type(self).__name__.lower()}.{kind}"
        self.send({"kind": "file", "name": name, "type": EXPORTS[kind]}, [self._content(kind, "light")])


def render_figure(
    figure: Callable[[str], Figure], kind: str = "png", theme: str = "light", dpi: float | None = PICTURE_DPI
) -> bytes:
    """What `figure(theme)` gives, as a PNG or SVG file."""
    style: Any = look.matplotlib_style(theme)
    content = io.BytesIO()
    with _DRAWING_LOCK, mpl.rc_context(style):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure(theme).savefig(content, format=kind, dpi=dpi or "figure", metadata=metadata)
    return content.getvalue()
