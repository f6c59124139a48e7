"""A group of commands that reports an error in one line, and ends by an exit code and not by a traceback."""

from __future__ import annotations

import signal
import threading
from typing import Any

import click

from ..errors import QtxError, RunFailed, StoppedBySignal, naming_the_extra


def one_line(error: BaseException) -> str:
    """An error's message and notes in one line."""
    notes = getattr(error, "__notes__", [])
    text = f"{error} ({'; '.join(notes)})" if notes else str(error)
    return " ".join(text.split())


def _interruption(error: KeyboardInterrupt, command: str | None) -> str:
    """What Ctrl-C left behind, in one sentence: the error's message, or else its first note."""
    note = next((text for text in (str(error), *getattr(error, "__notes__", [])) if text), "")
    if not note and command in ("demo", "run", "sweep", "train", "bench"):
        note = "Nothing had been written yet."
    return " ".join(f"interrupted. {note}".split()) if note else "interrupted"


class EndingSignals:
    """SIGTERM and SIGHUP end what runs inside as Ctrl-C does: runs are marked, and processes are ended.

    A signal that is ignored, as SIGHUP under nohup, stays ignored; after the first, others change nothing.
    """

    def __init__(self) -> None:
        self.received: int = signal.SIGINT
        self._before: dict[int, Any] = {}

    def __enter__(self) -> EndingSignals:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGHUP"):
                number = signal.Signals.__members__.get(name)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                    self._before[number] = signal.signal(number, self._end)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _end(self, number: int, frame: Any) -> None:
        if self.received != signal.SIGINT:
            return
        self.received = number
        on_ctrl_c = signal.getsignal(signal.SIGINT)
        if not callable(on_ctrl_c):  # a shell's background job ignores Ctrl-C
            raise KeyboardInterrupt
        on_ctrl_c(signal.SIGINT, frame)


class Commands(click.Group):
    """Commands that report an error in one line and by an exit code.

    The code is 1 if a run failed, 2 if something was not allowed or not possible, 130 after Ctrl-C, and 128
    plus its number after another signal: 143 after SIGTERM, 129 after SIGHUP, 138 after a training's SIGUSR1.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with EndingSignals() as signals:
            try:
                with naming_the_extra("this command"):
                    return super().invoke(ctx)
            except QtxError as error:
                click.echo(f"error: {one_line(error)}", err=True)
                ctx.exit(1 if isinstance(error, RunFailed) else 2)
            except StoppedBySignal as error:
                click.echo(f"interrupted: {one_line(error)}", err=True)
                ctx.exit(error.exit_code)
            except KeyboardInterrupt as error:
                click.echo(_interruption(error, ctx.invoked_subcommand), err=True)
                ctx.exit(128 + signals.received)
