"""`ThrottledCall`: an action that is requested often, and called only so often."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

REPORT_INTERVAL_S = 0.05
"""Seconds between two reports of the same progress, at least."""


class ThrottledCall:
    """Calls an action soon after a request, at most once in an interval, and once after the last request.

    Parameters
    ----------
    action : callable
        Called without arguments, by the thread that made the request or by a timer.
    interval_s : float
        Seconds between two calls, at least.

    Examples
    --------
    >>> calls = []
    >>> throttled = ThrottledCall(lambda: calls.append(len(calls)), 0.01)
    >>> for _ in range(1000):
    ...     throttled.request()
    >>> throttled.flush()
    >>> 1 <= len(calls) < 1000
    True
    """

    def __init__(self, action: Callable[[], object], interval_s: float = REPORT_INTERVAL_S):
        self._action, self._interval_s = action, interval_s
        self._last_call, self._pending = -interval_s, False
        self._callers: list[int] = []  # the threads that are at the action
        self._lock = threading.Lock()

    def request(self) -> None:
        """Call the action now, or at the end of the interval if the last call was a moment ago."""
        with self._lock:
            if self._pending:
                return
            wait_s = self._last_call + self._interval_s - time.monotonic()
            if wait_s > 0:
                self._pending = True
                timer = threading.Timer(wait_s, self._call_if_pending)
                timer.daemon = True
                timer.start()
                return
            self._begin()
        self._call()

    def flush(self) -> None:
        """Call the action now if a request is waiting, or if another thread has not finished its own call.

        So what was requested is done at the return, whichever thread has taken it on.
        """
        with self._lock:
            if not self._pending and set(self._callers) <= {threading.get_ident()}:
                return
            self._begin()
        self._call()

    def _call_if_pending(self) -> None:
        with self._lock:
            if not self._pending:
                return
            self._begin()
        self._call()

    def _begin(self) -> None:
        self._pending, self._last_call = False, time.monotonic()
        self._callers.append(threading.get_ident())

    def _call(self) -> None:
        try:
            self._action()
        finally:
            with self._lock:
                self._callers.remove(threading.get_ident())
