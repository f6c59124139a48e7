"""The execution of a notebook by papermill, in a kernel that runs this interpreter and can be stopped."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from ..errors import ArgumentError, QtxError, RunFailed
from ..storage import storage_error, sync_file
from .runs import Run

KERNEL_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
"""Variables of the kernel's environment: no telemetry, no downloads, no warning of the debugger."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Variables that tell numerical libraries how many threads to start."""

STOP_POLL_S = 0.5
"""Seconds between two calls of `stop`."""


LANGUAGE = "qtx-lab-python"
"""The name under which papermill knows how we write parameters as Python."""

MAX_MESSAGE_LENGTH = 500
"""Characters of the first line of a cell's error that a message quotes."""


@dataclass(frozen=True)
class ExecutionLimits:
    """What a notebook may take, and what happens when a cell fails.

    Parameters
    ----------
    cell_seconds : float, optional
        How long a cell may take, s; no limit if None.
    seconds : float, optional
        How long the notebook may take, s; no limit if None.
    output_bytes : int
        Bytes of a cell's output that are kept in the executed notebook; a line says where more was left out.
    keep_going : bool
        Go on with the next cell after one that failed. The run is still marked as failed at the end.

    Raises
    ------
    ArgumentError
        If a limit is not above 0 and finite.
    """

    cell_seconds: float | None = None
    seconds: float | None = None
    output_bytes: int = 16 << 20
    keep_going: bool = False

    def __post_init__(self) -> None:
        for name in ("cell_seconds", "seconds", "output_bytes"):
            value = vars(self)[name]
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ArgumentError(f"{name}={value!r} is not allowed: it must be above 0 and finite.")


NO_LIMITS = ExecutionLimits()
"""No limit of time, and 16 MiB of output for each cell."""


def execute_notebook(
    path: Path,
    run: Run,
    parameters: Mapping[str, Any],
    *,
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
    threads: int | None = None,
    limits: ExecutionLimits = NO_LIMITS,
) -> str | None:
    """Execute a notebook into the folder of a run.

    A cell that is tagged `raises-exception` may raise one. `sys.exit()`, `quit()` or `exit()` in a cell ends
    the notebook early, and well; any other exit code of `sys.exit` is a failure.

    Parameters
    ----------
    path : path
        The notebook.
    run : Run
        Its run, which is not ended.
    parameters : mapping
        Values for the cell tagged `parameters`.
    progress : bool
        Show a progress bar on stderr.
    stop : callable, optional
        Called twice a second. Once it returns True, the kernel is killed.
    threads : int, optional
        Number of threads for the kernel's numerical libraries.
    limits : ExecutionLimits
        How long cells and the notebook may take, and how much output is kept.

    Returns
    -------
    str or None
        A sentence that says which cell ended the notebook early; None if all cells ran.

    Raises
    ------
    RunFailed
        If a cell raised an error or took too long, or the kernel died.
    StorageError
        If the executed notebook cannot be written.
    KeyboardInterrupt
        Once `stop` returns True.
    """
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.execute import prepare_notebook_metadata, remove_error_markers
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    target = run.path.resolve() / path.with_suffix(".ipynb").name
    output_path = f"{RunFiles.scheme}{target}"
    _register_run_files()
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it does not know all parameters that we do
    notebook = load_notebook_node(str(path.resolve()))
    if parameters:
        _register_translator()
        notebook = parameterize_notebook(
            notebook, dict(parameters), kernel_name="python3", language=LANGUAGE, engine_name=None
        )
    notebook = remove_error_markers(prepare_notebook_metadata(notebook, str(path), output_path))
    with tempfile.TemporaryFile() as stderr, _stopping(stop, limits.seconds, path) as kernel_pids:
        engine = _engine(limits, _kernel_manager(stderr, kernel_pids, threads))
        execute = partial(
            engine.execute_notebook,
            notebook,
            "python3",
            output_path=output_path,
            progress_bar={"desc": path.stem} if progress else False,
        )
        try:
            try:
                executed = execute()
            except RuntimeError:  # a kernel dies at its start where another process takes one of its ports
                if any(_papermill(cell).get("start_time") for cell in notebook.cells):
                    raise
                executed = execute()
        except CellTimeoutError:
            running = next((cell for cell in notebook.cells if _papermill(cell).get("too_long")), None)
            where = "" if running is None else f" in {_cell_name(running)}"
            raise RunFailed(
                f"{path.name} stopped{where}: it took longer than the {limits.cell_seconds:g} s that a cell "
                "may take"
            ) from None
        except (DeadKernelError, RuntimeError) as error:
            if isinstance(error, QtxError):
                raise
            reason = _last_line(stderr) or str(error)
            raise RunFailed(f"{path.name} stopped: its kernel died (out of memory?): {reason}") from error
        finally:
            with suppress(OSError):  # an error in writing was raised when it happened
                sync_file(target)
    return _checked(path, executed, output_path)


def _register_translator() -> None:
    """Make known to papermill how tuples and sets are written; its own translator writes them as texts."""
    from papermill.translators import PythonTranslator, papermill_translators

    class Translator(PythonTranslator):
        """papermill's Python, with tuples and sets."""

        @classmethod
        def translate(cls, val: Any) -> str:
            if isinstance(val, tuple):
                return f"({''.join(f'{cls.translate(x)}, ' for x in val).strip()})"
            if isinstance(val, set | frozenset):  # in an order that does not change from run to run
                return f"{type(val).__name__}({cls.translate(sorted(val, key=repr))})"
            return str(super().translate(val))

    papermill_translators.register(LANGUAGE, Translator)


def _papermill(cell: Any) -> dict[str, Any]:
    """What papermill notes about a cell."""
    return dict(cell.metadata.get("papermill", {}))


def _cell_name(cell: Any) -> str:
    """A cell by its number and its first line."""
    first = next((line.strip() for line in cell.source.splitlines() if line.strip()), "")
    return f"cell [{cell.execution_count}] ({first[:60]})"


def _checked(path: Path, executed: Any, output_path: str) -> str | None:
    """Raise RunFailed if cells failed; return a sentence if one called `sys.exit()`."""
    from papermill.exceptions import PapermillExecutionError
    from papermill.execute import raise_for_execution_errors

    failed = [cell for cell in executed.cells if _papermill(cell).get("exception")]
    if not failed:
        return None
    errors = [_error_line(cell) for cell in failed]
    if errors == ["sys.exit()"]:
        return f"{_cell_name(failed[0])} of {path.name} called sys.exit(): the cells after it did not run."
    with suppress(PapermillExecutionError):  # it marks the cell in the notebook
        raise_for_execution_errors(executed, output_path)
    more = f", and {len(failed) - 1} more cell(s) failed" if len(failed) > 1 else ""
    raise RunFailed(f"{path.name} stopped in {_cell_name(failed[0])} with {errors[0]}{more}")


def _error_line(cell: Any) -> str:
    """The type and the first line of the error that a cell raised."""
    for output in reversed(cell.get("outputs", ())):
        if output.output_type == "error":
            lines = [line for line in str(output.evalue).splitlines() if line.strip()]
            if output.ename == "SystemExit":
                code = lines[0] if lines else ""
                return f"sys.exit({'' if code in ('0', 'None') else code})"
            first = f"{output.ename}: {lines[0].strip()}" if lines else str(output.ename)
            return first[:MAX_MESSAGE_LENGTH]
    return "an error without output"


def _engine(limits: ExecutionLimits, kernel_manager: type) -> Any:
    """papermill's engine, with limits of time and output."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError
    from nbformat.v4 import new_output
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine
    from traitlets import Float

    class LimitedClient(PapermillNotebookClient):
        """A client that keeps a bounded part of each cell's output, and takes parts of seconds."""

        timeout = Float(None, allow_none=True)

        def papermill_execute_cells(self) -> None:
            self.output_bytes: dict[int, int] = {}
            for index, cell in enumerate(self.nb.cells):
                try:
                    self.nb_man.cell_start(cell, index)
                    self.execute_cell(cell, index)
                except CellExecutionError as error:
                    if all(output.output_type != "error" for output in cell.outputs):
                        # IPython prints groups of exceptions itself, and rich does so with all errors.
                        lines, kind = error.traceback.splitlines(), error.ename or "an error"
                        cell.outputs.append(
                            new_output("error", ename=kind, evalue=error.evalue, traceback=lines)
                        )
                    self.nb_man.cell_exception(self.nb.cells[index], cell_index=index, exception=error)
                    if not limits.keep_going or "SystemExit" in str(error.ename):
                        break
                except CellTimeoutError:
                    self.nb.cells[index].metadata.papermill["too_long"] = True
                    raise
                finally:
                    self.nb_man.cell_complete(self.nb.cells[index], cell_index=index)

        def end_if_asked(self, execute_reply: Any, **_: Any) -> None:
            """End at IPython's `quit()` and `exit()` as at `sys.exit()`: the kernel stops in a moment."""
            payload = execute_reply["content"].get("payload") or () if execute_reply else ()
            if any(part.get("source") == "ask_exit" for part in payload):
                raise CellExecutionError("", "SystemExit", "")

        def output(self, outs: Any, msg: Any, display_id: Any, cell_index: int) -> Any:
            before = self.output_bytes.get(cell_index, 0)
            size = 0 if msg["msg_type"] == "error" else len(json.dumps(msg["content"], default=str))
            self.output_bytes[cell_index] = before + size
            if size and before + size > limits.output_bytes:
                if before > limits.output_bytes:
                    return None
                limit = f"{limits.output_bytes:,} bytes"
                text = f"\n[qtx-lab keeps {limit} of a cell's output; the rest was left out.]\n"
                msg = {**msg, "msg_type": "stream", "content": {"name": "stderr", "text": text}}
            return super().output(outs, msg, display_id, cell_index)

    class LimitedEngine(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
            client = LimitedClient(
                nb_man,
                kernel_name=kernel_name,
                kernel_manager_class=kernel_manager,
                timeout=limits.cell_seconds,
                startup_timeout=300,  # a machine may be busy; a kernel that dies is noticed at once
                log=logging.getLogger("papermill"),
            )
            client.on_cell_executed = client.end_if_asked
            client.execute()

    return LimitedEngine


def _last_line(stderr: IO[bytes]) -> str:
    """The last line that the kernel wrote to stderr, apart from warnings; "" if there is none."""
    stderr.seek(0)
    lines = stderr.read().decode(errors="replace").strip().splitlines()
    return next((line for line in reversed(lines) if "WARNING" not in line), "")


@contextmanager
def _stopping(stop: Callable[[], bool] | None, seconds: float | None, path: Path) -> Iterator[list[int]]:
    """Yield a list for the process ids of kernels, which are killed once `stop` returns True or time is up.

    The block then ends in KeyboardInterrupt, or in RunFailed.
    """
    kernel_pids: list[int] = []
    stopped, over_time, ended = threading.Event(), threading.Event(), threading.Event()
    end = None if seconds is None else time.monotonic() + seconds

    def watch() -> None:
        while not ended.wait(STOP_POLL_S):
            if stop is not None and (stopped.is_set() or stop()):
                stopped.set()
            elif end is not None and time.monotonic() > end:
                over_time.set()
            if stopped.is_set() or over_time.is_set():
                for pid in kernel_pids:
                    with suppress(OSError):
                        os.killpg(pid, signal.SIGKILL)  # the kernel leads a session of its own

    watcher = threading.Thread(target=watch, name="qtx-lab-stop", daemon=True)
    if stop is not None or seconds is not None:
        watcher.start()
    try:
        yield kernel_pids
    except Exception:  # any error: it came from the kernel being killed
        if stopped.is_set():
            raise KeyboardInterrupt("The notebook was stopped.") from None
        if over_time.is_set():
            raise RunFailed(
                f"{path.name} stopped: it took longer than the {seconds:g} s that it may take"
            ) from None
        raise
    finally:
        ended.set()


class RunFiles:
    """papermill's access to notebooks in a run folder.

    They are written whole, without the state of widgets and without paths.

    GitHub and an HTML export show nothing, instead of the picture, where a notebook holds widget state.
    """

    scheme = "qtx-run:"

    def read(self, path: str) -> str:
        """The text of a notebook."""
        return Path(path.removeprefix(self.scheme)).read_text(encoding="utf-8")

    def listdir(self, path: str) -> list[str]:
        """The names in a folder."""
        return os.listdir(path.removeprefix(self.scheme))

    def write(self, text: str, path: str) -> None:
        """Replace a notebook by this text, without widget state and with file names in place of paths."""
        notebook = json.loads(text)
        metadata = notebook["metadata"]
        metadata.pop("widgets", None)
        for key in ("input_path", "output_path"):
            if metadata.get("papermill", {}).get(key):
                metadata["papermill"][key] = Path(metadata["papermill"][key]).name
        content = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        target = Path(path.removeprefix(self.scheme))
        temporary = target.with_name(f".{target.name}.tmp")
        try:  # not synced: papermill writes twice for each cell, and only a power cut would lose the latest
            temporary.write_bytes(content.encode())
            os.replace(temporary, target)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise storage_error(target, error) from error

    def pretty_path(self, path: str) -> str:
        """The path as messages show it."""
        return path.removeprefix(self.scheme)


def _register_run_files() -> None:
    """Make `RunFiles` known to papermill, once."""
    from papermill.iorw import papermill_io

    if not any(scheme == RunFiles.scheme for scheme, _ in papermill_io._handlers):
        papermill_io.register(RunFiles.scheme, RunFiles())


def _kernel_manager(stderr: IO[bytes], kernel_pids: list[int], threads: int | None) -> type:
    """A kernel manager that starts this interpreter, whatever kernels are installed under the name `python3`.

    What the kernel prints outside its cells, such as a traceback when it is stopped, goes to `stderr`. The
    kernel's process id is appended to `kernel_pids`.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    environment = dict(KERNEL_ENVIRONMENT)
    if threads is not None:
        environment |= dict.fromkeys(THREADS, str(threads))

    class ThisInterpreter(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(argv=command, env=environment, language="python", display_name="Python 3")

        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]  # typed as blocking
            await super().start_kernel(stderr=stderr, **options)
            if self.provisioner is not None:
                kernel_pids.append(getattr(self.provisioner, "pid"))  # noqa: B009  # only a local one has it

    return ThisInterpreter
