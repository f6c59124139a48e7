"""A run again: by what it kept of itself, with every metric compared."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checks import check_flags, check_functions
from ..errors import ArgumentError, BackendUnavailable, RunFailed
from ..specs import SPECS, SearchSpec, Spec, SweepSpec, TrainSpec
from . import provenance
from .notebook_code import without_outputs
from .notebooks import run_notebook
from .run_comparison import Difference, RunComparison, compare_runs, environment_of, notebook_of
from .runs import Run, find_run
from .search import search
from .sweeps import sweep
from .training_run import train_run


def replay(
    run: Run | str | Path,
    *,
    home: str | Path | None = None,
    install: bool = False,
    progress: bool = True,
    stop: Callable[[], bool] | None = None,
) -> RunComparison:
    """Run again what a run did, in a new run, and compare every metric.

    The notebook is the one that the run's folder holds, so that its code is that of the original run; this
    package's code and environment are the present ones, and the comparison says where they differ. A training
    is repeated in this process, a sweep or a search on this machine.

    Parameters
    ----------
    run : Run, str or path
        The run, by its folder or a part of its name.
    home : path, optional
        Folder of runs, also for the new one; see `runs_home`.
    install : bool
        Run in a new virtual environment, in which the distributions that differ have the versions of the
        original run. pip fetches them from the index that it is configured for.
    progress : bool
        Show a progress bar on stderr.
    stop : callable, optional
        See `run_notebook`.

    Returns
    -------
    RunComparison
        Of the run (a) and the new one (b). Its `reproduced` says whether both ended alike and all metrics are
        equal bit for bit, or within their intervals.

    Raises
    ------
    ArgumentError
        If no run fits, it is still running, or it is of a kind that cannot be run again.
    BackendUnavailable
        If `install` is asked for and pip cannot install a distribution.
    RunFailed
        If the new run failed.

    Examples
    --------
    >>> import nbformat, tempfile
    >>> from pathlib import Path
    >>> from qtx_lab import run_notebook
    >>> cells = [nbformat.v4.new_code_cell("print(6 * 7)")]
    >>> with tempfile.TemporaryDirectory() as home:
    ...     path = Path(home, "answer.ipynb")
    ...     nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    ...     run = run_notebook(path, home=home, progress=False)
    ...     comparison = replay(run, progress=False)
    >>> comparison.reproduced, comparison.code, comparison.environment
    (True, (), ())
    """
    check_flags(install=install, progress=progress)
    check_functions(stop=stop)
    original = run if isinstance(run, Run) else find_run(run, home)
    if original.status == "running":
        raise ArgumentError(
            f"{original.path.name} is still running: only a run that has ended is compared with its replay."
        )
    where = original.path.parent
    spec = spec_of(original)
    if install and (differing := environment_differences(original)):
        return _replay_elsewhere(original, differing)
    name = f"{original.manifest['name'][:72]}-replay"
    command = f"qtx-lab replay {original.path.name}"
    if isinstance(spec, TrainSpec):
        again = train_run(spec, home=where, name=name, progress=progress)
    else:
        source = notebook_of(original)
        if source is None:
            raise ArgumentError(
                f"{original.path.name} holds no notebook: only notebooks, sweeps and trainings run again."
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / source.name
            path.write_bytes(without_outputs(source))
            if isinstance(spec, SearchSpec):
                again = search(
                    path, _space_of(spec), str(spec.objective), maximize=spec.maximize, trials=spec.trials,
                    repeats=spec.repeats, parameters=spec.parameters, seed=spec.seed, home=where,
                    progress=progress, stop=stop,
                )  # fmt: skip
            elif isinstance(spec, SweepSpec):
                again = sweep(
                    path, spec.grid, parameters=spec.parameters, repeats=spec.repeats, seed=spec.seed,
                    home=where, fresh=True, progress=progress, stop=stop,
                )  # fmt: skip
            else:
                again = run_notebook(
                    path, spec, home=where, name=name, command=command, progress=progress, stop=stop,
                    fresh=True, threads=original.manifest.get("threads"),
                )  # fmt: skip
    again.update(replay_of=original.path.name)
    return compare_runs(original, again)


def _space_of(spec: SearchSpec) -> dict[str, str | list[Any]]:
    """What each parameter of a search may be, as `search` takes it."""
    return {name: given if isinstance(given, str) else list(given) for name, given in spec.space.items()}  # type: ignore[arg-type]  # a list


def spec_of(run: Run) -> Spec:
    """The spec of a run, from its `spec.yaml`.

    Raises
    ------
    ArgumentError
        If there is no such kind of spec any more.
    SpecError
        If it cannot be read.
    """
    name = (run.manifest.get("spec") or {}).get("kind")
    kind = next((kind for kind in SPECS.values() if kind.__name__ == name), None)
    if kind is None:
        raise ArgumentError(f"{run.path.name} was made by a spec of the kind {name!r}, which does not exist.")
    return kind.from_yaml(run.path / "spec.yaml")


def environment_differences(run: Run) -> tuple[Difference, ...]:
    """The distributions, and Python, whose versions differ between a run and this process."""
    then, now = environment_of(run), dict(provenance.distributions())
    names = sorted({*then, *now}) if len(then) > len(run.manifest.get("versions") or {}) else sorted(then)
    return tuple(
        Difference(name, then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)
    )


def _replay_elsewhere(original: Run, differing: tuple[Difference, ...]) -> RunComparison:
    """Replay in a new virtual environment that takes all but the differing distributions from this one."""
    requirements = [
        f"{difference.name}=={difference.a}"
        for difference in differing
        if difference.a is not None and difference.name not in ("python", "qtx-lab")
    ]
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        # Without pip, with which setuptools would come too, in another version than then or here.
        _call([sys.executable, "-m", "venv", "--without-pip", folder], "A virtual environment cannot be made")
        shown = [path for path in sys.path if path and Path(path).is_dir()]
        code = "import json, site, sys; print(site.getsitepackages()[0])"
        site = _call([str(python), "-c", code], "The virtual environment does not start").strip()
        # A line for each: `site` runs them in a function, where the scope of a comprehension has no names.
        pth = "".join(f"import site; site.addsitedir({path!r})\n" for path in shown)
        Path(site, "of-this-environment.pth").write_text(pth, encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        if requirements:
            _call([*pip, *requirements], f"pip cannot install {', '.join(requirements)}")
        command = ["-m", "qtx_lab.cli", "replay", str(original.path), "--json"]
        process = subprocess.run([str(python), *command], capture_output=True, text=True, check=False)
        try:
            new = json.loads(process.stdout)["b"]
        except (ValueError, KeyError):
            lines = process.stderr.strip().splitlines() or ["it printed nothing"]
            raise RunFailed(f"The replay in a new environment failed: {lines[-1]}") from None
    return compare_runs(original, find_run(original.path.parent / new))


def _call(command: list[str], problem: str) -> str:
    """What a program prints; its failure is a BackendUnavailable with the last line of its errors."""
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        lines: list[Any] = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise BackendUnavailable(f"{problem}: {lines[-1]}")
    return process.stdout
