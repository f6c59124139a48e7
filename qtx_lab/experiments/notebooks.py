"""Notebooks as runs: how they are found, how their parameters are checked, and their execution."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..checks import check_flags, check_functions
from ..errors import ArgumentError, QtxError, RunFailed, SpecError, TextError
from ..models.text import read_text
from ..specs import SPECS, ExperimentSpec, NotebookSpec, Spec, nearest, word_of
from .manifest import creation_order
from .notebook_code import local_modules, result_key
from .notebook_execution import NO_LIMITS, ExecutionLimits, execute_notebook
from .parameters import UNKNOWN, Parameter, parameters_of
from .provenance import input_hashes
from .report import write_report
from .runs import Run, read_manifests

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
    if os.path.isfile(expanded := os.path.expanduser(notebook)):  # unlike Path.is_file, False for no name
        return Path(expanded)
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
    limits: ExecutionLimits = NO_LIMITS,
    fresh: bool = False,
    threads: int | None = None,
) -> Run:
    """Execute a notebook in a new run folder, with this very interpreter as its kernel.

    The kernel's working directory is the current one. The executed notebook is saved to the folder after
    every cell, and `report.html` is written at the end. A notebook that declares the parameter `run_dir`
    receives the folder in it, and writes figures and metrics there through `Run.open(run_dir)`.

    If `home` has a run of this name that is done with the same spec, code, distributions and input files,
    that run is returned, and a line on stderr says so.

    Parameters
    ----------
    notebook : str or path
        See `notebook_path`.
    parameters : mapping or Spec, optional
        Values for the notebook's cell tagged `parameters`, checked as the kind of spec that the notebook's
        metadata names; see `notebook_kind`. A `Word` is a value as a person typed it; see `value_of`.
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
    limits : ExecutionLimits
        How long a cell and the notebook may take, how much output of a cell is kept, and whether cells after
        a failed one run.
    fresh : bool
        Execute it even if `home` has the result already.
    threads : int, optional
        Number of threads for the kernel's numerical libraries; they choose it themselves if None.

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

    Examples
    --------
    >>> import nbformat, tempfile
    >>> parameters = nbformat.v4.new_code_cell("x = 2", metadata={"tags": ["parameters"]})
    >>> work = nbformat.v4.new_code_cell("print(x**2)")
    >>> with tempfile.TemporaryDirectory() as home:
    ...     path = Path(home, "square.ipynb")
    ...     nbformat.write(nbformat.v4.new_notebook(cells=[parameters, work]), path)
    ...     run = run_notebook(path, {"x": 3}, home=home, progress=False)
    ...     executed = nbformat.read(run.path / "square.ipynb", as_version=4)
    ...     run.status, executed.cells[-1].outputs[0].text.strip()
    ('done', '9')
    """
    check_flags(fresh=fresh, progress=progress)
    check_functions(stop=stop)
    path = notebook_path(notebook)
    declared = declared_parameters(path)
    spec = notebook_spec(path, declared, parameters)
    given = spec.parameters if isinstance(spec, NotebookSpec) else spec.to_parameters()
    command = command or _command(notebook, path, declared, {} if parameters is None else given)
    name, facts = name or run_name(path), result_facts(path, spec)
    earlier = None if fresh else find_result(home, facts["code"]["result"], name)
    if earlier is not None:
        tqdm.write(
            f"Taken from {earlier.path.name}, with the same spec, code and inputs; fresh=True or --fresh "
            "runs it again.",
            file=sys.stderr,
        )
        return earlier
    run = Run.create(spec, name, home, command=command, **facts)
    execute(run, path, spec, progress=progress, stop=stop, limits=limits, threads=threads)
    return run


def result_facts(path: Path, spec: Spec) -> dict[str, Any]:
    """What a run of a notebook records so that its result is found again: `code` and `inputs`."""
    inputs = {**input_hashes(spec.to_parameters()), **local_modules(path, Path.cwd())}
    return {"code": {"result": result_key(path, spec, inputs)}, "inputs": inputs}


def find_result(home: str | Path | None, key: str, name: str | None = None) -> Run | None:
    """The run created last in `home` that is done with a result of this key, and has this name."""
    fitting = [
        (creation_order(manifest), folder)
        for folder, manifest in read_manifests(home)
        if manifest["status"] == "done"
        and (manifest.get("code") or {}).get("result") == key
        and name in (None, manifest["name"])
    ]
    return Run(max(fitting)[1]) if fitting else None


def execute(
    run: Run,
    path: Path,
    spec: Spec,
    *,
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
    threads: int | None = None,
    limits: ExecutionLimits = NO_LIMITS,
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
    progress, stop, limits
        See `run_notebook`.
    threads : int, optional
        Number of threads for the kernel's numerical libraries (`OMP_NUM_THREADS` and similar variables); they
        choose it themselves if None.
    """
    try:
        with run:
            if threads is not None:
                run.update(threads=threads)
            parameters = spec.parameters if isinstance(spec, NotebookSpec) else spec.to_parameters()
            declared = declared_parameters(path)
            parameters = {
                name: declared[name].injected(value) if name in declared else value
                for name, value in parameters.items()
            }
            if "run_dir" in declared:
                parameters = {**parameters, "run_dir": str(run.path.resolve())}
            left_early = execute_notebook(
                path, run, parameters, progress=progress, stop=stop, threads=threads, limits=limits
            )
            if left_early is not None:
                summary = (run.manifest.get("results") or {}).get("summary") or []
                sentences = summary if isinstance(summary, list) else [summary]
                run.update(results={"summary": [*sentences, left_early]})
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


def declared_parameters(path: Path) -> dict[str, Parameter]:
    """The parameters that a notebook's first cell tagged `parameters` declares, by name.

    Raises
    ------
    ArgumentError
        If the file cannot be read as a notebook, is not a Python notebook, or that cell is not Python.
    """
    import nbformat

    if importlib.util.find_spec("ipykernel") is None:
        raise ArgumentError("This Python has no ipykernel to run notebooks with: pip install ipykernel.")
    try:
        with warnings.catch_warnings(action="ignore"):
            content = nbformat.read(path, as_version=4)
            nbformat.validate(content)
    except (OSError, ValueError, AttributeError, KeyError, nbformat.ValidationError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArgumentError(f"notebook={str(path)!r} cannot be read as a notebook: {cause}.") from error
    language = _language(content.metadata)
    if language.lower() not in ("python", "ipython", "python3"):
        raise ArgumentError(f"notebook={str(path)!r} is in {language}; only Python notebooks are run.")
    for cell in content.cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", ()):
            try:
                return parameters_of(cell.source)
            except ArgumentError as error:
                raise ArgumentError(f"notebook={str(path)!r}: {error}") from None
    return {}


def _language(metadata: Mapping[str, Any]) -> str:
    """The language of a notebook: as it says, else that of its kernel by the kernel's name."""
    kernel = metadata.get("kernelspec", {})
    stated = kernel.get("language") or metadata.get("language_info", {}).get("name")
    name = str(kernel.get("name") or "python3")
    if stated:
        return str(stated)
    # conda's kernels are named as "conda-env-lab-py", and "conda-env-lab-r" for R.
    if conda := re.fullmatch(r"conda-(?:env-.+|root|base)-(\w+)", name):
        return "python" if conda[1].startswith("py") else conda[1]
    if re.search(r"python|(^|[-_.])py([0-9 ]|$)", f"{name} {kernel.get('display_name', '')}".lower()):
        return "python"
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    with suppress(NoSuchKernel):
        return str(KernelSpecManager().get_kernel_spec(name).language or name)
    return name


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
    path: Path, declared: Mapping[str, Parameter], parameters: Mapping[str, Any] | Spec | None
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
        If the notebook's metadata names an unknown or another kind of spec, a parameter is unknown or
        missing, a value is not allowed or of another type than the default, or a text cannot be read.
    """
    kind = notebook_kind(path)
    if isinstance(parameters, Spec) and kind not in (NotebookSpec, type(parameters)):
        raise SpecError(
            f"{path.name} is run by a {kind.__name__}, as its metadata says; given was a "
            f"{type(parameters).__name__}."
        )
    if isinstance(parameters, NotebookSpec):
        parameters = parameters.parameters
    given = parameters.to_parameters() if isinstance(parameters, Spec) else dict(parameters or {})
    known = [name for name in declared if name != "run_dir"]
    _check_names(path, given, known)
    missing = [name for name in known if declared[name].required and name not in given]
    if missing:
        raise SpecError(f"{path.name} declares {missing[0]!r} without a value: give it one.")
    if isinstance(parameters, Spec):
        spec = parameters
    elif kind is not NotebookSpec:
        defaults = {name: declared[name] for name in known if name in kind.model_fields and name not in given}
        for name, parameter in defaults.items():
            if parameter.default is UNKNOWN:
                raise SpecError(
                    f"{path.name} declares {name} = {parameter.source}, whose value is known only when it "
                    f"runs; a field of {kind.__name__} must be a plain value, there or in the parameters."
                )
        spec = kind.from_parameters(
            {**{name: parameter.default for name, parameter in defaults.items()}, **kind.read_fields(given)}
        )
    else:
        spec = NotebookSpec(
            notebook=path.stem, parameters={name: declared[name].taken(x) for name, x in given.items()}
        )
        for name, value in spec.parameters.items():
            expected = declared[name].problem(value)
            if expected is not None:
                raise SpecError(
                    f"{name}={value!r} is not allowed: {path.name} declares {expected}, "
                    f"{name} = {declared[name].source}."
                )
    if isinstance(spec, ExperimentSpec) and spec.text != "reference":
        size = len(read_text(spec.text).encode())
        if size <= spec.num_tokens:
            raise TextError(
                f"text={spec.text!r} has {size} bytes; a window of num_tokens={spec.num_tokens} needs "
                f"{spec.num_tokens + 1}: give a longer text or fewer num_tokens."
            )
    return spec


def _check_names(path: Path, given: Mapping[str, Any], known: list[str]) -> None:
    """Refuse parameters that a notebook does not have, all of them in one error."""
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        named = f"parameter{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}"
        hints = "".join(nearest(name, known) for name in unknown)
        raise SpecError(f"{path.name} has no {named}.{hints} Allowed: {', '.join(known) or 'none'}.")


def parameter_words(path: Path, declared: Mapping[str, Parameter], given: Mapping[str, Any]) -> list[str]:
    """The options of the command line that give a notebook these parameters.

    A text that a word alone would not give is written as `-r NAME TEXT`.
    """
    words = []
    for name, value in given.items():
        word = word_of(value, parameter_schema(path, declared, name))
        words += ["-r", name, value] if word is None else ["-p", name, word]
    return words


def parameter_schema(path: Path, declared: Mapping[str, Parameter], name: str) -> dict[str, Any]:
    """The JSON schema of a parameter: of the field, where the notebook is run by a spec, else as declared."""
    kind = notebook_kind(path)
    if kind is not NotebookSpec and name in kind.model_fields:
        return dict(kind.model_json_schema()["properties"][name])
    return declared[name].schema


def _command(
    notebook: str | Path, path: Path, declared: Mapping[str, Parameter], given: Mapping[str, Any]
) -> str:
    """What to type to run this notebook again."""
    return shlex.join(["qtx-lab", "run", str(notebook), *parameter_words(path, declared, given)])
