"""`ProcessWorker`: long tasks in another process, which can be killed at any time; `Work` is one task."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from ...errors import ArgumentError, JobTimeout, RunFailed
from ..throttle import ThrottledCall

MIN_FRACTION = 0.03
"""The share of work that is done before its end is estimated: preparations have another speed."""

SERVE = "from qtx_lab.widgets.workbench.process_server import serve; serve()"


class Work:
    """One task in a worker process: how far it is, and what came of it. Any thread may ask, wait or cancel.

    Attributes
    ----------
    state : str
        "running", "done", "failed" or "cancelled".
    fraction : float
        The share that is done, 0 to 1; 0 where the task does not report any progress.
    text : str
        What the task is doing.
    warnings : list of str
        What was done in another way than requested, and why.
    result : object
        What the task returned.
    error : Exception or None
    process_id : int
        Of the process that does it.
    """

    def __init__(
        self, worker: ProcessWorker, on_change: Callable[[Work], object], on_data: Callable[[Any], object]
    ):
        self.state, self.fraction, self.text = "running", 0.0, ""
        self.warnings: list[str] = []
        self.result: Any = None
        self.error: Exception | None = None
        self.process_id = 0
        self.started = time.monotonic()
        self.ended: float | None = None
        self._worker, self._on_change, self._on_data = worker, on_change, on_data
        self._announce_progress = ThrottledCall(lambda: self.state == "running" and on_change(self))
        self._lock, self._over = threading.RLock(), threading.Event()

    def __repr__(self) -> str:
        return f"Work({self.state}, {self.fraction:.0%}, {self.seconds:.1f} s)"

    @property
    def seconds(self) -> float:
        """Seconds since the start, until the end if the work has ended."""
        return (self.ended or time.monotonic()) - self.started

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at the speed so far; None after the end and before `MIN_FRACTION` of it."""
        if self.fraction < MIN_FRACTION or self.state != "running":
            return None
        return self.seconds * (1 / self.fraction - 1)

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for the end, and return the result.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait; without end where None.

        Raises
        ------
        JobTimeout
            If the work takes longer than that; it goes on.
        RunFailed
            If it was cancelled, if its process died, or if the task raised an error that is not ours.
        QtxError
            What the task raised.
        """
        if not self._over.wait(timeout):
            raise JobTimeout(f"The work is at {self.fraction:.0%} after {timeout:g} s; it goes on.")
        if self.error is not None:
            raise self.error
        return self.result

    def cancel(self) -> None:
        """Kill the process of the task, whatever it is doing; does nothing after the end."""
        with self._worker.lock:  # nobody may start work in a process that is about to be killed
            if self.state != "running":
                return
            self._worker.kill()
            self._set_end("cancelled", error=RunFailed("The work was cancelled."))
        self._announce_end()

    def end(self, state: str, result: Any = None, error: Exception | None = None) -> None:
        """Note the end, unless the work has ended already, and tell those who follow it."""
        if self._set_end(state, result, error):
            self._announce_end()

    def receive(self, kind: str, content: Any) -> None:
        """Take in a message of the task; see `process_server`."""
        if kind == "progress" and self.state == "running":
            self.fraction, self.text = content
            self._announce_progress.request()
        elif kind == "warning":
            self.warnings.append(content)
            self._announce_progress.request()
        elif kind == "data" and self.state == "running":
            self._on_data(content)
        elif kind == "done":
            self.end("done", content)
        elif kind == "failed":
            self.end("failed", error=content)

    def _set_end(self, state: str, result: Any = None, error: Exception | None = None) -> bool:
        with self._lock:
            if self.state != "running":
                return False
            self.state, self.result, self.error = state, result, error
            self.ended = time.monotonic()
            self.fraction = 1.0 if state == "done" else self.fraction
            return True

    def _announce_end(self) -> None:
        """Tell those who follow the work. No lock is held, because they may start other work."""
        try:
            self._on_change(self)
        finally:
            self._over.set()


class ProcessWorker:
    """A process that runs one task after the other, and has imported what they need before the first one.

    It ends with this process, however this process ends. Any thread may start work; a busy worker refuses it.

    Notes
    -----
    We tried two libraries in its place (measured in November 2026) and kept ours, because with either of
    them most of this module would remain. `pebble.ProcessPool` 5.2 cancels a native loop within .6 s and a
    Python loop within .05 s. But the processes that a task has started live on (the kernels of a sweep, the
    workers of a cluster); a busy worker outlives its parent if that is killed; and there is no channel for
    progress: a pipe that is handed to the pool stays blocked for ever once a worker is killed in the middle
    of a message. `distributed` cannot stop a running task: restarting its worker takes 5.9 s, and the
    processes that the task has started live on there, too.

    Parameters
    ----------
    module : str
        Name of the module whose functions are the tasks; the process imports it at its start.
    """

    def __init__(self, module: str = "qtx_lab.widgets.workbench.tasks.registry"):
        self.module = module
        self.lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._work: Work | None = None

    @property
    def busy(self) -> bool:
        """Whether a task is running."""
        return self._work is not None and self._work.state == "running"

    def start_process(self) -> None:
        """Start the process if there is none; returns at once, before the process has imported its module."""
        with self.lock:
            if self._process is not None and self._process.poll() is None:
                return
            stderr = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process lives
            self._process = process = subprocess.Popen(
                [sys.executable, "-c", SERVE, self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # so that the processes it starts are killed with it
            )
            weakref.finalize(self, _kill_group, process)
            reader = threading.Thread(
                target=_pass_on_messages, args=(weakref.ref(self), process, stderr), daemon=True
            )
            reader.start()

    def start(
        self,
        task: str,
        *,
        on_change: Callable[[Work], object] = lambda work: None,
        on_data: Callable[[Any], object] = lambda data: None,
        **arguments: Any,
    ) -> Work:
        """Begin `module.task(report, **arguments)`; see `process_server.TaskReport`.

        Parameters
        ----------
        task : str
            Name of a function of the module.
        on_change : callable
            Called by another thread with the work: a few times a second while it makes progress, and at its
            end.
        on_data : callable
            Called by another thread with each thing that the task sends, in order.
        **arguments
            Of the task; they are pickled.

        Raises
        ------
        ArgumentError
            If the worker is busy.
        """
        with self.lock:
            if self.busy:
                raise ArgumentError("The worker is busy: cancel its work, or wait for its end.")
            self.start_process()
            assert self._process is not None
            assert self._process.stdin is not None
            work = self._work = Work(self, on_change, on_data)
            work.process_id = self._process.pid
            # Where the process has died, the thread that reads its messages says why.
            with suppress(OSError):
                pickle.dump((task, arguments), self._process.stdin)
                self._process.stdin.flush()
        return work

    def kill(self) -> None:
        """Kill the process, and start another one in its place."""
        with self.lock:
            if self._process is not None:
                _kill_group(self._process)
                self._process = None
        # In a thread, so that whoever cancels does not wait for the start.
        threading.Thread(target=self.start_process, daemon=True).start()

    def close(self) -> None:
        """Kill the process; its work, if any, is cancelled."""
        with self.lock:
            work, process, self._process = self._work, self._process, None
            if process is not None:
                _kill_group(process)
        if work is not None:
            work.end("cancelled", error=RunFailed("The work was cancelled."))

    def work_of(self, process: subprocess.Popen[bytes]) -> Work | None:
        """The work that a process does for this worker; None if the process was replaced, or has none."""
        return self._work if self._process is process else None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker's process and all processes that it has started."""
    if process.poll() is None:
        with suppress(OSError):
            if sys.platform == "win32":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)


def _pass_on_messages(
    worker_reference: weakref.ref[ProcessWorker], process: subprocess.Popen[bytes], stderr: IO[bytes]
) -> None:
    """Hand each message of a process to the work that it belongs to, until the process ends."""
    assert process.stdout is not None
    while True:
        try:
            kind, content = pickle.load(process.stdout)
        except Exception:  # the process has ended, perhaps in the middle of a message
            break
        worker = worker_reference()
        if worker is None:
            return
        if (work := worker.work_of(process)) is not None:
            work.receive(kind, content)
        del worker
    exit_code = process.wait()
    worker = worker_reference()
    if worker is not None and (work := worker.work_of(process)) is not None:
        work.end("failed", error=RunFailed(_cause_of_death(exit_code, stderr)))


def _cause_of_death(exit_code: int, stderr: IO[bytes]) -> str:
    """Why a process died, with the last line that it printed."""
    stderr.seek(0)
    last_line = stderr.read().decode(errors="replace").strip().splitlines()[-1:]
    reason = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    hint = " Was the memory exhausted?" if exit_code == -signal.SIGKILL else ""
    return " ".join([f"The worker's process died of {reason}.{hint}", *last_line])
