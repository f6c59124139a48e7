"""The execution of a notebook by papermill, in a kernel that runs this interpreter and can be stopped."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..errors import QtxError, RunFailed
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


def execute_notebook(
    path: Path,
    run: Run,
    parameters: Mapping[str, Any],
    *,
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
    threads: int | None = None,
) -> None:
    """Execute a notebook into the folder of a run.

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

    Raises
    ------
    RunFailed
        If a cell raised an error, or the kernel died.
    StorageError
        If the executed notebook cannot be written.
    KeyboardInterrupt
        Once `stop` returns True.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target = run.path.resolve() / path.with_suffix(".ipynb").name
    _register_run_files()
    with tempfile.TemporaryFile() as stderr, _stopping(stop) as kernel_pids:
        try:
            papermill.execute_notebook(
                _escape_braces(path.resolve()),
                f"{RunFiles.scheme}{_escape_braces(target)}",
                dict(parameters),
                kernel_name="python3",
                language="python",
                kernel_manager_class=_kernel_manager(stderr, kernel_pids, threads),
                progress_bar={"desc": path.stem} if progress else False,
            )
        except PapermillExecutionError as error:
            last_line = f"{error.ename}: {error.evalue}".strip().splitlines()[-1]
            first = next((line.strip() for line in error.source.splitlines() if line.strip()), "")
            cell = f"cell [{error.exec_count}] ({first[:60]})"
            raise RunFailed(f"{path.name} stopped in {cell} with {last_line}") from error
        except (DeadKernelError, RuntimeError) as error:
            if isinstance(error, QtxError):
                raise
            reason = _last_line(stderr) or str(error)
            raise RunFailed(f"{path.name} stopped: its kernel died (out of memory?): {reason}") from error
        finally:
            with suppress(OSError):  # an error in writing was raised when it happened
                sync_file(target)


def _last_line(stderr: IO[bytes]) -> str:
    """The last line that the kernel wrote to stderr, apart from warnings; "" if there is none."""
    stderr.seek(0)
    lines = stderr.read().decode(errors="replace").strip().splitlines()
    return next((line for line in reversed(lines) if "WARNING" not in line), "")


@contextmanager
def _stopping(stop: Callable[[], bool] | None) -> Iterator[list[int]]:
    """Yield a list for the process ids of kernels, which are killed once `stop` returns True.

    The block then ends in KeyboardInterrupt.
    """
    kernel_pids: list[int] = []
    stopped, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while stop is not None and not ended.wait(STOP_POLL_S):
            if stopped.is_set() or stop():
                stopped.set()
                for pid in kernel_pids:
                    with suppress(OSError):
                        os.killpg(pid, signal.SIGKILL)  # the kernel leads a session of its own

    watcher = threading.Thread(target=watch, name="qtx-lab-stop", daemon=True)
    if stop is not None:
        watcher.start()
    try:
        yield kernel_pids
    except Exception:  # any error: it came from the kernel being killed
        if stopped.is_set():
            raise KeyboardInterrupt("The notebook was stopped.") from None
        raise
    finally:
        ended.set()


def _escape_braces(path: Path) -> str:
    """A path in which braces stay braces when papermill formats it with the parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


class RunFiles:
    """papermill's access to notebooks in a run folder, which are written whole, without widget state or
    paths.

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
