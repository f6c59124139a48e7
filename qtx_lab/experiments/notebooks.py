"""Notebooks executed by papermill, each in a run folder of its own."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

from ..errors import ArgumentError, QtxError, RunFailed, SpecError, TextError
from ..models.reference import read_text
from ..specs import SPECS, ExperimentSpec, NotebookSpec, Spec, nearest
from ..storage import storage_error, sync_file
from .report import write_report
from .runs import Run

PACKAGE = Path(__file__).parent.parent

QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
"""Set in the kernel's environment: no telemetry, no downloads, no debugger's warning."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""What tells numerical libraries how many threads to start."""


def notebooks_folder() -> Path:
    """Where the shipped notebooks are: in the package (a wheel) or beside it (a checkout).

    Raises
    ------
    ArgumentError
        If this installation holds none.
    """
    beside = PACKAGE.parent / "notebooks"
    if (PACKAGE / "notebooks").is_dir():
        return PACKAGE / "notebooks"
    if beside.is_dir() and (PACKAGE.parent / "pyproject.toml").is_file():
        return beside
    raise ArgumentError("This installation of qtx_lab holds no notebooks: give the path of one.")


def notebook_path(notebook: str | Path) -> Path:
    """The file at that path, or the shipped notebook of that name, with or without its ending.

    Raises
    ------
    ArgumentError
        If there is none; names the nearest shipped one.
    """
    if os.path.isfile(notebook):  # False also for a name that no file can have
        return Path(notebook)
    name = Path(notebook).name.removesuffix(".ipynb")
    shipped = {path.stem: path for path in sorted(notebooks_folder().glob("*.ipynb"))}
    if str(notebook).removesuffix(".ipynb") in shipped:
        return shipped[name]
    raise ArgumentError(
        f"notebook={str(notebook)!r} is neither a file nor a shipped notebook.{nearest(name, shipped)} "
        f"Shipped: {', '.join(shipped) or 'none'}."
    )


def run_notebook(
    notebook: str | Path,
    parameters: Mapping[str, Any] | Spec | None = None,
    *,
    home: str | Path | None = None,
    name: str | None = None,
    command: str | None = None,
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
) -> Run:
    """Execute a notebook in a new run folder, with this very interpreter as its kernel.

    The kernel's working directory is the current one. The folder gets the executed notebook, saved whole
    after every cell, and `report.html`. A notebook that declares the parameter `run_dir` receives the
    folder and writes figures and metrics there through `Run.open(run_dir)`.

    Parameters
    ----------
    notebook : str or path
        See `notebook_path`.
    parameters : mapping or Spec, optional
        Values for the notebook's cell tagged `parameters`, checked as the kind of spec that the notebook's
        metadata names; see `notebook_kind`.
    home : path, optional
        See `runs_home`.
    name : str, optional
        Of the run; the notebook's where None.
    command : str, optional
        What a person types to do this again, for the record.
    progress : bool
        Show a bar, a step a cell, on stderr.
    stop : callable, optional
        Asked twice a second; once it says True the kernel is killed and the run ends as `interrupted`.

    Returns
    -------
    Run
        Ended, as `done`.

    Raises
    ------
    ArgumentError, SpecError, TextError
        Before any work: no such notebook, not a Python notebook, an unknown parameter, a value not allowed,
        a text that cannot be read.
    StorageError
        If the run cannot be written.
    RunFailed
        If a cell raised an error. The run is kept, marked as failed.
    KeyboardInterrupt
        On Ctrl-C, or once `stop` says so. The run is kept, marked as interrupted.
    """
    path = notebook_path(notebook)
    declared = declared_parameters(path)
    spec = notebook_spec(path, declared, parameters)
    run = Run.create(spec, name or run_name(path), home, command=command or _command(notebook, parameters))
    execute(run, path, spec, progress=progress, stop=stop)
    return run


def execute(
    run: Run,
    path: Path,
    spec: Spec,
    *,
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
    threads: int | None = None,
) -> None:
    """Execute a notebook in a run that has begun, as `run_notebook` does, and end the run.

    Parameters
    ----------
    run : Run
    path : path
    spec : Spec
        From `notebook_spec`.
    progress, stop
        See `run_notebook`, also for what is raised.
    threads : int, optional
        Of the kernel's numerical libraries (`OMP_NUM_THREADS` and its like); theirs to choose where None.
    """
    try:
        with run:
            given = spec.parameters if isinstance(spec, NotebookSpec) else spec.to_parameters()
            declared = declared_parameters(path)
            folder = {"run_dir": str(run.path.resolve())} if "run_dir" in declared else {}
            _execute(path, run, {**given, **folder}, progress, stop, threads)
    except BaseException as error:
        with suppress(QtxError):  # the first error is the one to hear about
            write_report(run)
        if isinstance(error, RunFailed):
            error.add_note(f"kept in {run.path}")
        raise
    write_report(run)


def run_name(path: Path) -> str:
    """The name of a notebook's runs."""
    return re.sub("[^A-Za-z0-9]+", "-", path.stem).strip("-")[:60] or "notebook"


def declared_parameters(path: Path) -> dict[str, str]:
    """Names and defaults, as source, of the cell tagged `parameters`."""
    import nbformat
    import papermill

    if importlib.util.find_spec("ipykernel") is None:
        raise ArgumentError("This Python has no ipykernel to run notebooks with: pip install ipykernel.")
    try:
        with warnings.catch_warnings(action="ignore"):
            content = nbformat.read(path, as_version=4)
            nbformat.validate(content)
    except (OSError, ValueError, AttributeError, KeyError, nbformat.ValidationError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArgumentError(f"notebook={str(path)!r} cannot be read as a notebook: {cause}.") from error
    metadata = content.metadata
    language = metadata.get("kernelspec", {}).get("language") or metadata.get("language_info", {}).get("name")
    kernel = metadata.get("kernelspec", {}).get("name", "python3")
    language = language or ("python" if "python" in kernel else kernel)
    if language != "python":
        raise ArgumentError(f"notebook={str(path)!r} is in {language}; only Python notebooks are run.")
    metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    metadata.setdefault("papermill", {})
    found = papermill.inspect_notebook(content)
    return {name: facts["default"] for name, facts in found.items()}


def notebook_kind(path: Path) -> type[Spec]:
    """The kind of spec that a notebook is run by: the one that its metadata names.

    The metadata `{"qtx_lab": {"spec": "experiment"}}` says that the cell tagged `parameters` declares fields of
    `ExperimentSpec`; any name in `SPECS` will do. A notebook that names none has parameters of its own:
    it is run by a `NotebookSpec`.

    Raises
    ------
    SpecError
        If the metadata names a kind of spec that does not exist.
    """
    metadata = json.loads(path.read_bytes())["metadata"].get("qtx_lab", {})
    kind = metadata.get("spec", "notebook") if isinstance(metadata, dict) else metadata
    if not isinstance(kind, str) or kind not in SPECS:
        raise SpecError(
            f"{path.name} names the spec {kind!r} in its metadata, and there is no such kind."
            f"{nearest(str(kind), SPECS)} Allowed: {', '.join(SPECS)}."
        )
    return SPECS[kind]


def notebook_spec(
    path: Path, declared: Mapping[str, str], parameters: Mapping[str, Any] | Spec | None
) -> Spec:
    """The spec of a run of this notebook: these parameters, checked against what the notebook declares.

    Raises
    ------
    SpecError, TextError
        If the notebook's metadata names an unknown or another kind of spec, a parameter is unknown, a value is not
        allowed or of another type than the default, or a text cannot be read.
    """
    kind = notebook_kind(path)
    if isinstance(parameters, Spec) and kind not in (NotebookSpec, type(parameters)):
        raise SpecError(
            f"{path.name} is run by a {kind.__name__}, as its metadata says; given was a "
            f"{type(parameters).__name__}."
        )
    given = parameters.to_parameters() if isinstance(parameters, Spec) else dict(parameters or {})
    known = [name for name in declared if name != "run_dir"]
    for key in given:
        if key not in known:
            raise SpecError(
                f"{path.name} has no parameter {key!r}.{nearest(str(key), known)} "
                f"Allowed: {', '.join(known) or 'none'}."
            )
    if isinstance(parameters, Spec):
        spec = parameters
    elif kind is not NotebookSpec:
        fields = [name for name in known if name in kind.model_fields]
        spec = kind.from_parameters({**_literals(declared, fields), **given})
    else:
        spec = NotebookSpec(notebook=path.stem, parameters=given)
        defaults = _literals(declared, known)
        for key, value in spec.parameters.items():
            wanted, got = _kind(defaults.get(key)), _kind(value)
            if wanted and got and wanted != got:
                raise SpecError(
                    f"{key}={value!r} is not allowed: {path.name} declares {wanted}, {key} = {declared[key]}."
                )
    if isinstance(spec, ExperimentSpec) and spec.text != "reference":
        size = len(read_text(spec.text).encode())
        if size <= spec.num_tokens:
            raise TextError(
                f"text={spec.text!r} has {size} bytes; a window of num_tokens={spec.num_tokens} needs "
                f"{spec.num_tokens + 1}: give a longer text or fewer num_tokens."
            )
    return spec


def _kind(value: object) -> str:
    """What sort of value a parameter holds; "" where any will do."""
    kinds = ((bool, "yes or no"), (int | float, "a number"), (str, "a text"), (list | tuple, "a list"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "")


def _command(notebook: str | Path, parameters: Mapping[str, Any] | Spec | None) -> str:
    """What to type to run this again."""
    given = parameters.to_parameters() if isinstance(parameters, Spec) else parameters or {}
    words = ["qtx-lab", "run", str(notebook)]
    for name, value in given.items():
        words += ["-p", name, as_word(value)]
    return shlex.join(words)


def as_word(value: Any) -> str:
    """A value as YAML in one word: what the command line reads back."""
    plain = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and yaml.safe_load(value) == value
    return value if plain else json.dumps(value)


def _literals(declared: Mapping[str, str], names: list[str]) -> dict[str, Any]:
    """Defaults that are literals; others stay the spec's."""
    found = {}
    for name in names:
        with suppress(ValueError, SyntaxError):
            found[name] = ast.literal_eval(declared[name])
    return found


def _execute(
    path: Path,
    run: Run,
    parameters: Mapping[str, Any],
    progress: bool,
    stop: Callable[[], bool] | None = None,
    threads: int | None = None,
) -> None:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target = run.path.resolve() / path.with_suffix(".ipynb").name
    _register_run_files()
    with tempfile.TemporaryFile() as stderr, _stopping(stop) as kernels:
        try:
            papermill.execute_notebook(
                _braces(path.resolve()),
                f"{RunFiles.scheme}{_braces(target)}",
                dict(parameters),
                kernel_name="python3",
                language="python",
                kernel_manager_class=_kernel_manager(stderr, kernels, threads),
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
            stderr.seek(0)
            lines = stderr.read().decode(errors="replace").strip().splitlines()
            said = [line for line in lines if "WARNING" not in line] or [str(error)]
            raise RunFailed(f"{path.name} stopped: its kernel died (out of memory?): {said[-1]}") from error
        finally:
            with suppress(OSError):  # that it could not be written was said when it was
                sync_file(target)


@contextmanager
def _stopping(stop: Callable[[], bool] | None) -> Iterator[list[int]]:
    """A list for the process ids of kernels: once `stop` says so they are killed, and the block ends in KeyboardInterrupt."""
    kernels: list[int] = []
    stopped, over = threading.Event(), threading.Event()

    def watch() -> None:
        while stop is not None and not over.wait(0.5):
            if stopped.is_set() or stop():
                stopped.set()
                for pid in kernels:
                    with suppress(OSError):
                        os.killpg(pid, signal.SIGKILL)  # it leads a session of its own

    watcher = threading.Thread(target=watch, name="qtx-lab-stop", daemon=True)
    if stop is not None:
        watcher.start()
    try:
        yield kernels
    except Exception:  # of whatever missed its kernel
        if stopped.is_set():
            raise KeyboardInterrupt("The notebook was stopped.") from None
        raise
    finally:
        over.set()


def _braces(path: Path) -> str:
    """papermill formats paths with the parameters: a brace must stay a brace."""
    return str(path).replace("{", "{{").replace("}", "}}")


class RunFiles:
    """papermill's file access for notebooks in a run folder: written whole, without widget state or paths.

    GitHub and an HTML export show nothing where a notebook holds widget state, instead of the picture.
    """

    scheme = "qtx-run:"

    def read(self, path: str) -> str:
        return Path(path.removeprefix(self.scheme)).read_text(encoding="utf-8")

    def listdir(self, path: str) -> list[str]:
        return os.listdir(path.removeprefix(self.scheme))

    def write(self, text: str, path: str) -> None:
        notebook = json.loads(text)
        metadata = notebook["metadata"]
        metadata.pop("widgets", None)
        for key in ("input_path", "output_path"):
            if metadata.get("papermill", {}).get(key):
                metadata["papermill"][key] = Path(metadata["papermill"][key]).name
        content = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        target = Path(path.removeprefix(self.scheme))
        temporary = target.with_name(f".{target.name}.tmp")
        try:  # not synced: papermill writes twice a cell, and only a power cut would lose the latest
            temporary.write_bytes(content.encode())
            os.replace(temporary, target)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise storage_error(target, error) from error

    def pretty_path(self, path: str) -> str:
        return path.removeprefix(self.scheme)


def _register_run_files() -> None:
    from papermill.iorw import papermill_io

    if not any(scheme == RunFiles.scheme for scheme, _ in papermill_io._handlers):
        papermill_io.register(RunFiles.scheme, RunFiles())


def _kernel_manager(stderr: IO[bytes], kernels: list[int], threads: int | None) -> type:
    """A kernel manager that starts this interpreter, whatever kernels are installed under `python3`.

    What the kernel prints outside its cells, such as a traceback when it is stopped, goes to `stderr`; its process id
    is appended to `kernels`.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    env = QUIET if threads is None else {**QUIET, **dict.fromkeys(THREADS, str(threads))}

    class ThisInterpreter(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(argv=command, env=env, language="python", display_name="Python 3")

        async def start_kernel(self, **options: Any) -> None:  # type: ignore[override]  # typed as blocking
            await super().start_kernel(stderr=stderr, **options)
            if self.provisioner is not None:
                kernels.append(getattr(self.provisioner, "pid"))  # noqa: B009  # of the local provisioner only

    return ThisInterpreter
