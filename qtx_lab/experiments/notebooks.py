"""Notebooks as runs: how they are found, how their parameters are checked, and their execution."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ..errors import ArgumentError, QtxError, RunFailed, SpecError, TextError
from ..models.text import read_text
from ..specs import SPECS, ExperimentSpec, NotebookSpec, Spec, nearest
from .notebook_execution import execute_notebook
from .report import write_report
from .runs import Run

PACKAGE = Path(__file__).parent.parent


def notebooks_folder() -> Path:
    """The folder of the shipped notebooks: in the package (a wheel) or beside it (a checkout).

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
    """The file at a path, or the shipped notebook of a name, with or without its ending.

    Parameters
    ----------
    notebook : str or path
        A path, or a name such as "00_quickstart".

    Raises
    ------
    ArgumentError
        If there is none. The message names the most similar shipped one.
    """
    if os.path.isfile(notebook):  # unlike Path.is_file, False for a name that no file can have
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

    The kernel's working directory is the current one. The executed notebook is saved to the folder after
    every cell, and `report.html` is written at the end. A notebook that declares the parameter `run_dir`
    receives the folder in it, and writes figures and metrics there through `Run.open(run_dir)`.

    Parameters
    ----------
    notebook : str or path
        See `notebook_path`.
    parameters : mapping or Spec, optional
        Values for the notebook's cell tagged `parameters`, checked as the kind of spec that the notebook's
        metadata names; see `notebook_kind`.
    home : path, optional
        Folder of runs; see `runs_home`.
    name : str, optional
        Name of the run; the notebook's name if None.
    command : str, optional
        What a person would type to run this again, for the record.
    progress : bool
        Show a progress bar on stderr, with a step for each cell.
    stop : callable, optional
        Called twice a second. Once it returns True, the kernel is killed and the run ends as `interrupted`.

    Returns
    -------
    Run
        The run, which is `done`.

    Raises
    ------
    ArgumentError, SpecError, TextError
        Before any work, if there is no such notebook, it is not a Python notebook, a parameter is unknown or
        has a value that is not allowed, or a text cannot be read.
    StorageError
        If the run cannot be written.
    RunFailed
        If a cell raised an error. The run is marked as failed.
    KeyboardInterrupt
        On Ctrl-C, or once `stop` returns True. The run is marked as interrupted.
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
    """Execute a notebook in a run that was created for it, and end the run; errors as of `run_notebook`.

    Parameters
    ----------
    run : Run
        The run, `running`.
    path : path
        The notebook.
    spec : Spec
        Its parameters, from `notebook_spec`.
    progress, stop
        See `run_notebook`.
    threads : int, optional
        Number of threads for the kernel's numerical libraries (`OMP_NUM_THREADS` and similar variables); they
        choose it themselves if None.
    """
    try:
        with run:
            parameters = spec.parameters if isinstance(spec, NotebookSpec) else spec.to_parameters()
            if "run_dir" in declared_parameters(path):
                parameters = {**parameters, "run_dir": str(run.path.resolve())}
            execute_notebook(path, run, parameters, progress=progress, stop=stop, threads=threads)
    except BaseException as error:
        with suppress(QtxError):  # the first error is the one to report
            write_report(run)
        if isinstance(error, RunFailed):
            error.add_note(f"kept in {run.path}")
        raise
    write_report(run)


def run_name(path: Path) -> str:
    """The name that a notebook's runs have unless another is given."""
    return re.sub("[^A-Za-z0-9]+", "-", path.stem).strip("-")[:60] or "notebook"


def declared_parameters(path: Path) -> dict[str, str]:
    """The names that a notebook's cell tagged `parameters` declares, with the source text of their defaults.

    Raises
    ------
    ArgumentError
        If the file cannot be read as a notebook, or is not a Python notebook.
    """
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
    parameters = papermill.inspect_notebook(content)
    return {name: facts["default"] for name, facts in parameters.items()}


def notebook_kind(path: Path) -> type[Spec]:
    """The kind of spec that a notebook is run by: the one that its metadata names.

    The metadata `{"qtx_lab": {"spec": "experiment"}}` says that the cell tagged `parameters` declares fields
    of `ExperimentSpec`, and any name in `SPECS` is allowed. A notebook that names none has parameters of its
    own: it is run by a `NotebookSpec`.

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
    """The spec of a run of a notebook: parameters that are checked against what the notebook declares.

    Parameters
    ----------
    path : path
        The notebook.
    declared : mapping
        What it declares, from `declared_parameters`.
    parameters : mapping, Spec or None
        See `run_notebook`.

    Raises
    ------
    SpecError, TextError
        If the notebook's metadata names an unknown or another kind of spec, a parameter is unknown, a value
        is not allowed or of another type than the default, or a text cannot be read.
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
            expected, given_kind = _kind(defaults.get(key)), _kind(value)
            if expected and given_kind and expected != given_kind:
                raise SpecError(
                    f"{key}={value!r} is not allowed: {path.name} declares {expected}, "
                    f"{key} = {declared[key]}."
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
    """The kind of a parameter's value, in words; "" if any kind is allowed."""
    if isinstance(value, bool):
        return "yes or no"
    kinds = {"a number": int | float, "a text": str, "a list": list | tuple}
    return next((name for name, kind in kinds.items() if isinstance(value, kind)), "")


def _command(notebook: str | Path, parameters: Mapping[str, Any] | Spec | None) -> str:
    """What to type to run this notebook again."""
    given = parameters.to_parameters() if isinstance(parameters, Spec) else parameters or {}
    words = ["qtx-lab", "run", str(notebook)]
    for name, value in given.items():
        words += ["-p", name, as_word(value)]
    return shlex.join(words)


def as_word(value: Any) -> str:
    """A value as YAML in one word, which the command line reads back as the same value."""
    plain = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and yaml.safe_load(value) == value
    return value if plain else json.dumps(value)


def _literals(declared: Mapping[str, str], names: list[str]) -> dict[str, Any]:
    """The values of the defaults that are literals."""
    values = {}
    for name in names:
        with suppress(ValueError, SyntaxError):
            values[name] = ast.literal_eval(declared[name])
    return values
