"""`ThreadWorker`: a thread that does one thing after the other, and drops what has become stale."""

from __future__ import annotations

import threading
from collections.abc import Callable


class ThreadWorker:
    """A thread that runs tasks one after the other; of waiting tasks of the same name only the newest.

    The thread ends when nothing is waiting, and is started again for the next task.

    Parameters
    ----------
    on_error : callable
        Called with the exception of a task that raises.
    """

    def __init__(self, on_error: Callable[[BaseException], None]):
        self._on_error = on_error
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[int, Callable[[], None]]] = {}
        self._thread: threading.Thread | None = None

    def put(self, name: str, task: Callable[[], None], *, rank: int = 0) -> None:
        """Run a task soon, in place of a waiting one with the same name; tasks of lower rank go first."""
        with self._lock:
            self._waiting[name] = (rank, task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="qtx-lab-view", daemon=True)
                self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait until nothing is left to do, and return whether that happened within `timeout_s` seconds."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        with self._lock:
            return self._thread is None

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                name = min(self._waiting, key=lambda name: self._waiting[name][0])
                _, task = self._waiting.pop(name)
            try:
                task()
            except Exception as error:
                self._on_error(error)
