"""The process of a `ProcessWorker`: it runs tasks from standard input, and answers on standard output."""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ...errors import QtxError, RunFailed
from ..throttle import REPORT_INTERVAL_S

Send = Callable[[str, Any], None]
"""`send(kind, content)`: kinds are "progress", "warning", "data", "done" and "failed"."""


class TaskReport:
    """How a task reports: `report(0.5, "half of it")` its progress, and `report.send(data)` data."""

    def __init__(self, send: Send):
        self._send = send
        self._last_report = 0.0

    def __call__(self, fraction: float, text: str = "") -> None:
        """Report the share that is done, 0 to 1, and what is being done; frequent reports are thinned."""
        if time.monotonic() - self._last_report >= REPORT_INTERVAL_S or fraction >= 1:
            self._last_report = time.monotonic()
            self._send("progress", (min(max(float(fraction), 0.0), 1.0), text))

    def send(self, data: Any) -> None:
        """Pass data on to whoever started the task."""
        self._send("data", data)


def serve() -> None:
    """Run the tasks of the module `sys.argv[1]` as they come, until whoever started this process is gone."""
    orders, messages = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task prints must not stand between the messages
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    tasks: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
    lock = threading.Lock()

    def read_orders() -> None:
        while True:
            try:
                tasks.put(pickle.load(orders))
            except EOFError:  # whoever started this process is gone
                with suppress(OSError):
                    os.killpg(0, signal.SIGKILL)
                os._exit(1)

    def send(kind: str, content: Any) -> None:
        message = pickle.dumps((kind, content), protocol=pickle.HIGHEST_PROTOCOL)
        with lock:
            messages.write(message)
            messages.flush()

    threading.Thread(target=read_orders, daemon=True).start()
    functions = vars(importlib.import_module(sys.argv[1]))
    _send_warnings(send)
    while True:
        task, arguments = tasks.get()
        try:
            send("done", functions[task](TaskReport(send), **arguments))
        except BaseException as error:
            traceback.print_exc()
            send("failed", _portable_error(error))


def _send_warnings(send: Send) -> None:
    """Send our own warnings as messages; others are printed as usual."""
    usual = warnings.showwarning

    def showwarning(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__module__.startswith("qtx_lab"):
            send("warning", str(message))
        else:
            usual(message, category, *where, **more)

    warnings.showwarning = showwarning
    warnings.simplefilter("always", append=True)


def _portable_error(error: BaseException) -> Exception:
    """The error as another process can load it: ours as they are, others as a `RunFailed` with their text."""
    if isinstance(error, QtxError):
        with suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
    text = " ".join(str(error).split())
    return RunFailed(f"{type(error).__name__}: {text}" if text else type(error).__name__)
