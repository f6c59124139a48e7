"""What two runs have in common and where they differ: spec, code, environment, inputs and metrics."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from . import provenance
from .manifest import spec_values
from .notebook_code import code_cells
from .runs import PATCH, REQUIREMENTS, Run, find_run

SUMMARY = "summary"
"""The result that tells the others in sentences, with the seconds that they took."""

MAX_SHOWN = 20
"""Lines of each part that the text of a comparison shows."""


@dataclass(frozen=True)
class Difference:
    """What one name stands for in each of two runs; None where a run does not have it."""

    name: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.a)} → {_shown(self.b)}"


@dataclass(frozen=True)
class CodeDifference:
    """The lines of a file, or of a notebook's cells, that differ: `-` stands before those of a, `+` of b."""

    file: str
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([self.file, *(f"  {line}" for line in self.lines)])


@dataclass(frozen=True)
class MetricDifference:
    """The first place where a metric differs between two runs.

    Parameters
    ----------
    name : str
        A result, or a column of the metrics.
    row : int or None
        The row of the metrics, from 0; None for a result.
    a, b : object
        Its values.
    count : int
        How many of its values differ.
    half_width : float or None
        Half of the 95 % interval of the difference, √(half width of a² + half width of b²), where the run
        declares one.
    within : bool
        Whether each difference is within its interval.
    """

    name: str
    row: int | None
    a: Any
    b: Any
    count: int
    half_width: float | None
    within: bool

    def __str__(self) -> str:
        place = "" if self.row is None else f" in row {self.row}"
        bound = "" if self.half_width is None else f" (± {self.half_width:.2g})"
        verdict = "within its interval" if self.within else "differs"
        more = f"; {self.count} values differ" if self.count > 1 else ""
        return f"{self.name}{place}: {_shown(self.a)} → {_shown(self.b)}{bound}, {verdict}{more}"


@dataclass(frozen=True)
class RunComparison:
    """What two runs differ in; see `compare_runs`.

    Parameters
    ----------
    a, b : str
        Names of the runs' folders.
    status_a, status_b : str
        How the runs ended: "done", "failed", "interrupted" or "cancelled"; "running" of one that goes on.
    spec : tuple of Difference
        Fields of the specs, and parameters of notebooks, by name.
    code : tuple of CodeDifference
        Cells of the notebook, and files of this package.
    environment : tuple of Difference
        Python and all installed distributions, by name.
    inputs : tuple of Difference
        SHA-256 of the files that parameters name.
    metrics : tuple of MetricDifference
        Results and metrics that are not equal bit for bit; times are left out.
    compared : int
        How many values were compared: numbers, texts and lists.
    not_compared : tuple of str
        Numbers that the runs declare to be times.

    Examples
    --------
    >>> comparison = RunComparison("one", "two", "done", "failed", compared=3)
    >>> comparison.metrics, comparison.reproduced
    ((), False)
    """

    a: str
    b: str
    status_a: str
    status_b: str
    spec: tuple[Difference, ...] = ()
    code: tuple[CodeDifference, ...] = ()
    environment: tuple[Difference, ...] = ()
    inputs: tuple[Difference, ...] = ()
    metrics: tuple[MetricDifference, ...] = ()
    compared: int = 0
    not_compared: tuple[str, ...] = ()

    @property
    def reproduced(self) -> bool:
        """Whether both runs ended alike, and all metrics are equal bit for bit or within their intervals."""
        ended_alike = self.status_a == self.status_b != "running"
        return ended_alike and all(difference.within for difference in self.metrics)

    @property
    def same_setup(self) -> bool:
        """Whether spec, code, environment and inputs are the same."""
        return not (self.spec or self.code or self.environment or self.inputs)

    def __str__(self) -> str:
        lines = [f"a: {self.a} ({self.status_a})", f"b: {self.b} ({self.status_b})"]
        parts = {"spec": self.spec, "code": self.code, "environment": self.environment, "inputs": self.inputs}
        for title, differences in parts.items():
            lines += [title, *_listed(differences)] if differences else [f"{title}: the same"]
        what = f"metrics ({self.compared} values compared"
        what += f"; {', '.join(self.not_compared)} tell time)" if self.not_compared else ")"
        lines += [what, *_listed(self.metrics)] if self.metrics else [f"{what}: the same, bit for bit"]
        return "\n".join(lines)


def compare_runs(a: Run | str | Path, b: Run | str | Path, home: str | Path | None = None) -> RunComparison:
    """Compare two runs: their settings, their code and environment, and what they measured.

    Metrics are compared bit for bit. Where the runs declare half of a 95 % interval of a number (see
    `Run.declare`), a difference of two independent runs is within it up to √(half width of a² + half width of
    b²). Texts and lists are compared too; a table in the results is compared by its columns. Not compared are
    the numbers that the runs declare to be times, the sentences of the summary, and the columns of a sweep's
    table that name a run.

    Parameters
    ----------
    a, b : Run, str or path
        The runs, by their folders or parts of their names; see `find_run`.
    home : path, optional
        Folder of runs; see `runs_home`.

    Returns
    -------
    RunComparison

    Raises
    ------
    ArgumentError
        If no run fits, or more than one.
    StorageError
        If a run cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from qtx_lab import ExperimentSpec, Run
    >>> with tempfile.TemporaryDirectory() as home:
    ...     with Run.create(ExperimentSpec(seed=1), "one", home) as one:
    ...         one.update(results={"error": 0.25})
    ...     with Run.create(ExperimentSpec(seed=2), "two", home) as two:
    ...         two.update(results={"error": 0.5})
    ...     comparison = compare_runs(one, two)
    >>> print(comparison.spec[0], "|", comparison.metrics[0])
    seed: 1 → 2 | results.error: 0.25 → 0.5, differs
    """
    first, second = (run if isinstance(run, Run) else find_run(run, home) for run in (a, b))
    manifests = first.manifest, second.manifest
    declared = {**(manifests[0].get("measures") or {}), **(manifests[1].get("measures") or {})}
    measures = {name: facts for name, facts in declared.items() if isinstance(facts, dict)}
    numbers = _values(first, manifests[0]), _values(second, manifests[1])
    timing = tuple(name for name, facts in measures.items() if facts.get("timing"))
    metrics = _metric_differences(*numbers, measures)
    compared = [name for name in {**numbers[0], **numbers[1]} if not _facts(name, measures).get("timing")]
    return RunComparison(
        first.path.name,
        second.path.name,
        str(manifests[0]["status"]),
        str(manifests[1]["status"]),
        spec=_differences(_spec_of(manifests[0]), _spec_of(manifests[1])),
        code=(*_notebook_differences(first, second), *_package_differences(first, second)),
        environment=_differences(environment_of(first), environment_of(second)),
        inputs=_differences(*(manifest.get("inputs") or {} for manifest in manifests)),
        metrics=metrics,
        compared=sum(max(len(part.get(name, ())) for part in numbers) for name in compared),
        not_compared=timing,
    )


def environment_of(run: Run) -> dict[str, str]:
    """Versions of Python and of all distributions that a run recorded, by name."""
    try:
        lines = (run.path / REQUIREMENTS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # of an earlier version of this package, or damaged
        return {str(name): str(x) for name, x in (run.manifest.get("versions") or {}).items()}
    pairs = (line.removeprefix("# ").partition("==") for line in lines)
    return {name: version for name, _, version in pairs if version}


def notebook_of(run: Run) -> Path | None:
    """The executed notebook in a run's folder."""
    return next(iter(sorted(run.path.glob("*.ipynb"))), None)


def _spec_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The kind and the fields of a run's spec."""
    spec = manifest.get("spec") or {}
    return {"kind of spec": spec.get("kind"), **spec_values(spec)}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Difference, ...]:
    """The names whose values differ between two mappings."""
    names = [*a, *(name for name in b if name not in a)]
    return tuple(Difference(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name))


def _notebook_differences(a: Run, b: Run) -> Iterator[CodeDifference]:
    """The lines of the notebooks' code cells that differ."""
    paths = notebook_of(a), notebook_of(b)
    first, second = (
        [] if path is None else [line for cell in code_cells(path) for line in cell["source"].splitlines()]
        for path in paths
    )
    changed = list(difflib.unified_diff(first, second, lineterm="", n=0))[2:]
    lines = tuple(line for line in changed if not line.startswith("@@"))
    if lines:
        yield CodeDifference(next(path.name for path in paths if path is not None), lines)


def _package_differences(a: Run, b: Run) -> Iterator[CodeDifference]:
    """The lines of this package's files that differ, by commits and patches where this checkout has them."""
    manifests = a.manifest, b.manifest
    hashes = [(manifest.get("code") or {}).get("package") for manifest in manifests]
    if hashes[0] == hashes[1]:
        return
    states = []
    for run, manifest in zip((a, b), manifests, strict=True):
        commit = (manifest.get("git") or {}).get("commit")
        path = run.path / PATCH
        if isinstance(commit, str):
            states.append((commit, path.read_bytes() if path.exists() else b""))
    text = provenance.code_difference(*states) if len(states) == 2 else None
    if text is None:
        what = "its files differ; no checkout here has both commits, so that the lines are not known"
        yield CodeDifference("qtx_lab", (what,))
        return
    file = ""
    lines: list[str] = []
    for line in [*text.splitlines(), "diff "]:
        if line.startswith("diff "):
            if lines:
                yield CodeDifference(file, tuple(lines))
            lines = []
        elif line.startswith(("--- ", "+++ ")):
            file = line[6:] if "/dev/null" not in line else file
        elif line.startswith(("-", "+")):
            lines.append(line)


def _values(run: Run, manifest: Mapping[str, Any]) -> dict[str, list[Any]]:
    """All that a run measured: each column of the metrics, and a list of one value for each result."""
    results = {name: x for name, x in (manifest.get("results") or {}).items() if name != SUMMARY}
    values = {f"results.{name}": value for name, value in _flat(results)}
    frame = run.metrics()
    of_sweep = (manifest.get("spec") or {}).get("kind") in ("SweepSpec", "SearchSpec")
    for name in map(str, frame.columns):
        # Folders and times name the runs of a sweep; what they measured has a prefix.
        measured = name.startswith(("spec.", "results.")) or name == "status"
        if of_sweep and not measured and not pd.api.types.is_numeric_dtype(frame[name]):
            continue
        column = frame[name].tolist()  # whole numbers as they are: a float has 53 bits
        if not pd.api.types.is_float_dtype(frame[name]):  # of a float NaN is a value, else what is missing
            column = [None if pd.api.types.is_scalar(x) and pd.isna(x) else x for x in column]
        values[name] = column
    return values


def _flat(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The values in nested results, by their names with dots between them; of a table its columns."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            for column in dict.fromkeys(column for row in value for column in row):
                yield f"{prefix}{name}.{column}", [row.get(column) for row in value]
        else:
            yield f"{prefix}{name}", [value]


def _facts(name: str, measures: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """What is declared about a metric, or about the column of a table that it is."""
    plain = name.removeprefix("results.")
    return measures.get(plain) or measures.get(plain.rpartition(".")[2]) or {}


def _metric_differences(
    a: Mapping[str, list[Any]], b: Mapping[str, list[Any]], measures: Mapping[str, Mapping[str, Any]]
) -> tuple[MetricDifference, ...]:
    """The metrics that are not equal bit for bit."""
    differences = []
    for name in [*a, *(name for name in b if name not in a)]:
        facts = _facts(name, measures)
        if facts.get("timing"):
            continue
        first, second = a.get(name, []), b.get(name, [])
        if len(first) != len(second):
            lengths = [f"{len(values)} values" if values else None for values in (first, second)]
            count = abs(len(first) - len(second))
            differences.append(MetricDifference(name, None, lengths[0], lengths[1], count, None, False))
            continue
        prefix = "results." if name.startswith("results.") else ""
        half_name = f"{prefix}{facts.get('half_width')}"
        unequal = [i for i, pair in enumerate(zip(first, second, strict=True)) if not _equal(*pair)]
        if unequal:
            bounds = [_bound(a.get(half_name), b.get(half_name), i) for i in unequal]
            within = [
                bound is not None
                and _is_number(first[i])
                and _is_number(second[i])
                and abs(first[i] - second[i]) <= bound
                for i, bound in zip(unequal, bounds, strict=True)
            ]
            at = next((k for k, inside in enumerate(within) if not inside), 0)
            i = unequal[at]
            row = None if name.startswith("results.") and len(first) == 1 else i
            differences.append(
                MetricDifference(name, row, first[i], second[i], len(unequal), bounds[at], all(within))
            )
    return tuple(differences)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are the same: numbers bit for bit, where NaN is NaN, and lists item by item."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return bool(a == b)


def _bound(a: list[Any] | None, b: list[Any] | None, i: int) -> float | None:
    """Half of the interval of the difference of two independent numbers; None where none is known."""
    if a is None or b is None or i >= min(len(a), len(b)):
        return None
    if not (_is_number(a[i]) and _is_number(b[i])) or math.isnan(a[i] + b[i]):
        return None
    return math.hypot(a[i], b[i])


def _shown(value: Any) -> str:
    """A value as a line shows it."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _listed(differences: tuple[Any, ...]) -> list[str]:
    """The lines of some differences, and how many more there are."""
    lines = [f"  {line}" for difference in differences for line in str(difference).splitlines()]
    more = len(lines) - MAX_SHOWN
    return lines if more <= 0 else [*lines[:MAX_SHOWN], f"  and {more} more lines"]
