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
import ipywidgets
import matplotlib as mpl
import traitlets
from IPython.display import display

from ... import theme as look
from ...errors import QtxError, unknown_name
from ...storage import database, parquet_bytes, write_atomic

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

_drawing = threading.RLock()
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
        self._worker = Worker(self.fail)
        self._handle: Any = None
        super().__init__(**traits)
        heard_while_busy(self)
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
        data["image/png"] = base64.b64encode(drawn(self.figure)).decode()
        return data, metadata

    def _ipython_display_(self, **kwargs: Any) -> None:
        data, metadata = self._repr_mimebundle_()
        self._handle = display(data, metadata=metadata, raw=True, display_id=True)

    def _content(self, kind: str, theme: str) -> bytes:
        if kind in ("png", "svg"):
            return drawn(self.figure, kind, theme, None)
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


def drawn(
    figure: Callable[[str], Figure], kind: str = "png", theme: str = "light", dpi: float | None = PICTURE_DPI
) -> bytes:
    """What `figure(theme)` gives, as a PNG or SVG file."""
    style: Any = look.matplotlib_style(theme)
    content = io.BytesIO()
    with _drawing, mpl.rc_context(style):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure(theme).savefig(content, format=kind, dpi=dpi or "figure", metadata=metadata)
    return content.getvalue()


def heard_while_busy(*widgets: ipywidgets.Widget) -> None:
    """Have what the browser tells widgets handled while a cell is busy.

    JupyterLab sends it to a subshell for that. ipykernel 7.4 sends it on to where the widget last spoke: the main shell,
    if a cell made it, and there it waits for the cell to end.
    """
    for widget in widgets:
        if hasattr(widget.comm, "_reply_subshell_for"):
            widget.comm._reply_subshell_for = None  # then the message's own header says where it goes


class Worker:
    """A thread that does what is asked one after the other, and only the newest of what has the same name.

    It ends when nothing waits, and is started anew.

    Parameters
    ----------
    fail : callable
        Told the exception of a task that raises.
    """

    def __init__(self, fail: Callable[[BaseException], None]):
        self._fail = fail
        self._turn = threading.Lock()
        self._waiting: dict[str, tuple[int, Callable[[], None]]] = {}
        self._thread: threading.Thread | None = None

    def put(self, name: str, task: Callable[[], None], *, rank: int = 0) -> None:
        """Do a task, in place of one of the same name that has not begun; those of lower rank come first."""
        with self._turn:
            self._waiting[name] = (rank, task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="qtx-lab-view", daemon=True)
                self._thread.start()

    def join(self, seconds: float) -> bool:
        """Wait until nothing is to be done; whether that came."""
        with self._turn:
            thread = self._thread
        if thread is not None:
            thread.join(seconds)
        with self._turn:
            return self._thread is None

    def _work(self) -> None:
        while True:
            with self._turn:
                if not self._waiting:
                    self._thread = None
                    return
                name = min(self._waiting, key=lambda name: self._waiting[name][0])
                _, task = self._waiting.pop(name)
            try:
                task()
            except Exception as error:
                self._fail(error)
