"""What a sweep's run shows: the table of its notebooks, a figure of what they measured, and a summary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from ..specs import SweepSpec
from ..storage import write_frame
from .figures import comparison
from .listing import RunTable, run_table
from .runs import Run

MAX_ERRORS = 20
"""Errors of failed notebooks that the summary quotes."""


def write_results(
    run: Run,
    spec: SweepSpec,
    notebooks: Sequence[tuple[Path, Mapping[str, Any]]],
    measure: str | None,
    taken: int = 0,
) -> str | None:
    """Write the table of all notebooks, the figure and the summary into the sweep's run.

    Parameters
    ----------
    run : Run
        The run of the sweep.
    spec : SweepSpec
        Its spec.
    notebooks : sequence of (path, mapping)
        The folder and the manifest of each notebook's run.
    measure : str or None
        The number in the runs' results that the figure shows; if None, the main one of the notebooks (see
        `Run.declare`), else the first one.
    taken : int
        How many of the notebooks are taken from earlier runs.

    Returns
    -------
    str or None
        How many notebooks are not done, in words; None if all are done.
    """
    table = run_table(notebooks)
    place = {str(folder): i for i, (folder, _) in enumerate(notebooks)}  # as planned, whichever ended first
    table = RunTable(table.sort_values("path", key=lambda paths: paths.map(place), ignore_index=True))
    run.declare("seconds", unit="s", timing=True)
    # Written as text, which every reader of parquet knows.
    started = table["started"].dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    columns = table.drop(columns=["spec", "kind"]).assign(started=started).dropna(axis=1, how="all")
    write_frame(run.path / "metrics.parquet", columns)
    counts = table["status"].value_counts()
    by_status = ", ".join(f"{count} {status}" for status, count in counts.items())
    failed = table[table["status"] == "failed"]
    summary = [f"{len(notebooks)} notebooks: {by_status}."]
    if taken:
        summary.append(f"{taken} of them are taken from earlier runs with the same spec and code.")
    note = run.manifest["results"].get("note")
    summary += [note] if note else []
    summary += [f"{row.run}: {row.error}" for row in failed.itertuples()][:MAX_ERRORS]
    rows: list[dict[str, Any]] = []
    y = measure or _main_measure(notebooks) or _first_number(notebooks)
    if y is not None:
        done = table[table["status"] == "done"]
        try:
            rows = _draw(run, spec, done, y, len(notebooks))
        except ArgumentError as error:  # there is no such number, or no notebook that is done has it
            summary.append(str(error))
    run.update(results={**dict(counts), "summary": summary, "table": rows})
    others = ", ".join(f"{count} {status}" for status, count in counts.items() if status != "done")
    return f"Of {len(notebooks)} notebooks not all are done: {others}." if others else None


def _main_measure(notebooks: Sequence[tuple[Path, Mapping[str, Any]]]) -> str | None:
    """The number that a notebook that is done declares as its main one."""
    for _, manifest in notebooks:
        for name, facts in (manifest.get("measures") or {}).items():
            if manifest["status"] == "done" and isinstance(facts, dict) and facts.get("main"):
                return str(name)
    return None


def _first_number(notebooks: Sequence[tuple[Path, Mapping[str, Any]]]) -> str | None:
    """The name of the first number in the results of a notebook that is done."""
    for _, manifest in notebooks:
        if manifest["status"] == "done":
            for name, value in (manifest.get("results") or {}).items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    return str(name)
    return None


def _draw(run: Run, spec: SweepSpec, done: RunTable, y: str, total: int) -> list[dict[str, Any]]:
    """Draw what the notebooks measured against the grid; return the rows that are drawn."""
    varying = [name for name, values in spec.grid.items() if len(values) > 1]
    numeric = [name for name in varying if all(_is_number(value) for value in spec.grid[name])]
    x = max(numeric, key=lambda name: len(spec.grid[name]), default=None)
    others = [name for name in varying if name != x]
    by = ", ".join(others) or None
    if len(others) > 1:
        joined = [", ".join(str(row[f"spec.{name}"]) for name in others) for _, row in done.iterrows()]
        done = done.assign(**{str(by): joined})
    data = done.summary(y, x, by)
    run.save_figure(
        "results",
        partial(comparison, y=y, x=x, by=by),
        data,
        caption=(
            f"Means over the {len(done)} of {total} runs of {spec.notebook} that are done, {spec.repeats} of "
            "each combination; bars: 95 % t-intervals over repeats; seeds derived from "
            f"{spec.seed}, the same for each combination."
        ),
    )
    intervals = zip(data.pop("mean"), data.pop("half_width"), strict=True)
    data[y] = [_plus_minus(mean, half_width) for mean, half_width in intervals]
    return data.rename(columns={"by": by or "", "x": x or ""}).to_dict("records")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plus_minus(mean: float, half_width: float) -> str:
    """A mean with as many digits as its 95 % interval allows.

    >>> _plus_minus(0.12345, 0.0021)
    '0.1235 ± 0.0021'
    """
    if not half_width > 0:  # NaN for a single run
        return f"{mean:.4g}"
    digits = max(0, 1 - math.floor(math.log10(half_width)))
    return f"{mean:.{digits}f} ± {half_width:.{digits}f}"
