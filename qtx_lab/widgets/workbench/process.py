"""Long work in processes that can be killed at any moment: progress, time left, results, and a word when they die."""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ...errors import ArgumentError, JobTimeout, QtxError, RunFailed

SERVE = "from qtx_lab.widgets.workbench.process import serve; serve()"

REPORTS = 0.05
"""Least seconds between two reports of a task's progress."""


class Pace:
    """Does something soon after it was asked for, at most every `least` seconds, and once more after the last time.

    >>> done = []
    >>> pace = Pace(lambda: done.append(len(done)), 0.01)
    >>> for _ in range(1000):
    ...     pace.ask()
    >>> pace.flush()
    >>> 1 <= len(done) < 1000
    True
    """

    def __init__(self, act: Callable[[], object], least: float = REPORTS):
        self._act, self._least = act, least
        self._last, self._due = -least, False
        self._turn = threading.Lock()

    def ask(self) -> None:
        with self._turn:
            if self._due:
                return
            wait = self._last + self._least - time.monotonic()
            if wait > 0:
                self._due = True
                timer = threading.Timer(wait, self.flush)
                timer.daemon = True
                timer.start()
                return
            self._last = time.monotonic()
        self._act()

    def flush(self) -> None:
        """Do it now if it was asked for and is not done."""
        with self._turn:
            if not self._due:
                return
            self._due, self._last = False, time.monotonic()
        self._act()


class Work:
    """One task in a worker: where it is, and what came of it. Any thread may ask, wait or cancel.

    Attributes
    ----------
    state : str
        running, done, failed or cancelled.
    fraction : float
        Done so far, 0 to 1; 0 where the task does not say.
    text : str
        What is being done.
    warned : list of str
        What was done in another way than asked, and why.
    result : object
        What the task returned.
    error : Exception or None
    """

    def __init__(self, worker: Worker, follow: Callable[[Work], object], take: Callable[[Any], object]):
        self.state, self.fraction, self.text = "running", 0.0, ""
        self.warned: list[str] = []
        self.result: Any = None
        self.error: Exception | None = None
        self.started = time.monotonic()
        self.ended: float | None = None
        self._worker, self._follow, self._take = worker, follow, take
        self._pace = Pace(lambda: self.state == "running" and follow(self))
        self._turn, self._over = threading.RLock(), threading.Event()

    def __repr__(self) -> str:
        return f"Work({self.state}, {self.fraction:.0%}, {self.seconds:.1f} s)"

    @property
    def seconds(self) -> float:
        """How long it has worked."""
        return (self.ended or time.monotonic()) - self.started

    @property
    def seconds_left(self) -> float | None:
        """How long it will go on at the pace so far; None before it has told of any progress."""
        return (
            self.seconds * (1 / self.fraction - 1) if self.fraction > 0 and self.state == "running" else None
        )

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for the end, and give the result.

        Raises
        ------
        JobTimeout
            If it takes longer than `timeout` seconds; it goes on.
        RunFailed
            If it was cancelled, or if its process died.
        QtxError
            What the task raised; errors that are not ours as RunFailed.
        """
        if not self._over.wait(timeout):
            raise JobTimeout(f"The work is at {self.fraction:.0%} after {timeout:g} s; it goes on.")
        if self.error is not None:
            raise self.error
        return self.result

    def cancel(self) -> None:
        """Kill its process, whatever it is in; nothing where it has ended."""
        with self._worker._turn:  # nobody may start work in a process that is about to be killed
            if self.state != "running":
                return
            self._worker.kill()
            self._settle("cancelled", error=RunFailed("The work was cancelled."))
        self._announce()

    def _end(self, state: str, result: Any = None, error: Exception | None = None) -> None:
        if self._settle(state, result, error):
            self._announce()

    def _settle(self, state: str, result: Any = None, error: Exception | None = None) -> bool:
        with self._turn:
            if self.state != "running":
                return False
            self.state, self.result, self.error = state, result, error
            self.ended = time.monotonic()
            self.fraction = 1.0 if state == "done" else self.fraction
            return True

    def _announce(self) -> None:
        """Tell of the end; holding no lock, for who is told may start other work."""
        try:
            self._follow(self)
        finally:
            self._over.set()

    def _hear(self, kind: str, content: Any) -> None:
        if kind == "progress" and self.state == "running":
            self.fraction, self.text = content
            self._pace.ask()
        elif kind == "warned":
            self.warned.append(content)
            self._pace.ask()
        elif kind == "data" and self.state == "running":
            self._take(content)
        elif kind == "done":
            self._end("done", content)
        elif kind == "failed":
            self._end("failed", error=content)


class Worker:
    """A process that runs one task after the other, and that has loaded what they need before the first.

    It ends with this process, however that ends. Work is started by any thread; a worker that is busy refuses.

    Parameters
    ----------
    module : str
        Imported by the process at its start.
    """

    def __init__(self, module: str = "qtx_lab.widgets.workbench.tasks"):
        self.module = module
        self._turn = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._current: Work | None = None
        self._said: Any = None

    @property
    def busy(self) -> bool:
        return self._current is not None and self._current.state == "running"

    def warm(self) -> None:
        """Start the process, if there is none; returns at once."""
        with self._turn:
            if self._process is not None and self._process.poll() is None:
                return
            self._said = tempfile.TemporaryFile()  # noqa: SIM115  # the process writes to it as long as it lives
            self._process = process = subprocess.Popen(
                [sys.executable, "-c", SERVE, self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                start_new_session=True,  # so that its own processes are killed with it
            )
            weakref.finalize(self, _kill, process)
            reader = threading.Thread(
                target=_listen, args=(weakref.ref(self), process, self._said), daemon=True
            )
            reader.start()

    def start(
        self,
        task: str,
        *,
        follow: Callable[[Work], object] = lambda work: None,
        take: Callable[[Any], object] = lambda data: None,
        **arguments: Any,
    ) -> Work:
        """Begin `module.task(report, **arguments)`; see `Report`.

        Parameters
        ----------
        task : str
            Name of a function of the module.
        follow : callable
            Told, by another thread, that the work has changed, a few times a second and at its end.
        take : callable
            Given, by another thread, each thing that the task sends, in order.

        Raises
        ------
        ArgumentError
            If it is busy.
        """
        with self._turn:
            if self.busy:
                raise ArgumentError("The worker is busy: cancel its work, or wait for its end.")
            self.warm()
            assert self._process is not None
            assert self._process.stdin is not None
            work = self._current = Work(self, follow, take)
            try:
                pickle.dump((task, arguments), self._process.stdin)
                self._process.stdin.flush()
            except OSError:  # its reader says why
                pass
        return work

    def kill(self) -> None:
        """Kill the process, and start another in its place."""
        with self._turn:
            if self._process is not None:
                _kill(self._process)
                self._process = None
        # Not by who cancels, who is to be back at once.
        threading.Thread(target=self.warm, daemon=True).start()

    def close(self) -> None:
        """Kill the process; the work, if any, is cancelled."""
        with self._turn:
            work, process, self._process = self._current, self._process, None
            if process is not None:
                _kill(process)
        if work is not None:
            work._end("cancelled", error=RunFailed("The work was cancelled."))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker and all that it started."""
    if process.poll() is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()


def _listen(worker: weakref.ref[Worker], process: subprocess.Popen[bytes], said: Any) -> None:
    """Pass on what a worker's process says, until it says no more."""
    assert process.stdout is not None
    while True:
        try:
            kind, content = pickle.load(process.stdout)
        except Exception:  # the end, or cut off in the middle of a word
            break
        owner = worker()
        if owner is None:
            break
        if owner._process is process and owner._current is not None:
            owner._current._hear(kind, content)
        del owner
    ended = process.wait()
    owner = worker()
    if owner is None or owner._process is not process or owner._current is None:
        return
    said.seek(0)
    last = said.read().decode(errors="replace").strip().splitlines()[-1:]
    why = f"signal {-ended}" if ended < 0 else f"exit code {ended}"
    hint = " Out of memory?" if ended == -signal.SIGKILL else ""
    owner._current._end(
        "failed", error=RunFailed(" ".join([f"The worker's process died of {why}.{hint}", *last]))
    )


class Report:
    """How a task tells of itself.

    `report(0.5, "half")` says how far it is; `report.send(data)` passes data on. Warnings of ours are passed on too.
    """

    def __init__(self, say: Callable[[str, Any], None]):
        self._say = say
        self._last = 0.0

    def __call__(self, fraction: float, text: str = "") -> None:
        if time.monotonic() - self._last >= REPORTS or fraction >= 1:
            self._last = time.monotonic()
            self._say("progress", (min(max(float(fraction), 0.0), 1.0), text))

    def send(self, data: Any) -> None:
        self._say("data", data)


def serve() -> None:
    """What a worker's process does: tasks from its standard input, reports to its standard output."""
    orders, reports = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a task prints must not stand between reports
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    tasks: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
    turn = threading.Lock()

    def listen() -> None:
        while True:
            try:
                tasks.put(pickle.load(orders))
            except EOFError:  # who started it is gone
                with suppress(OSError):
                    os.killpg(0, signal.SIGKILL)
                os._exit(1)

    def say(kind: str, content: Any) -> None:
        message = pickle.dumps((kind, content), protocol=pickle.HIGHEST_PROTOCOL)
        with turn:
            reports.write(message)
            reports.flush()

    threading.Thread(target=listen, daemon=True).start()
    module = importlib.import_module(sys.argv[1])
    usual = warnings.showwarning

    def showwarning(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__module__.startswith("qtx_lab"):
            say("warned", str(message))
        else:
            usual(message, category, *where, **more)

    warnings.showwarning = showwarning
    warnings.simplefilter("always", append=True)
    while True:
        task, arguments = tasks.get()
        try:
            say("done", getattr(module, task)(Report(say), **arguments))
        except BaseException as error:
            traceback.print_exc()
            say("failed", _portable(error))


def _portable(error: BaseException) -> Exception:
    """The error as another process can have it: ours as they are, others by their text."""
    if isinstance(error, QtxError):
        with suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
    text = " ".join(str(error).split())
    return RunFailed(f"{type(error).__name__}: {text}" if text else type(error).__name__)
