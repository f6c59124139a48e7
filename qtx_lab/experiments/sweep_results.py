"""What a sweep's run shows: the table of its notebooks, a figure of what they measured, and a summary."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, StorageError
from ..specs import SweepSpec
from ..storage import write_frame
from ..theme import quantity
from .figures import comparison
from .listing import RunTable, run_table
from .measured_table import MeasuredTable, measured_table
from .notebooks import run_name
from .runs import Run
from .sweep_plan import SweepPlan

MAX_ERRORS = 20
"""Errors of failed notebooks that the summary quotes."""


def write_results(
    run: Run, planned: SweepPlan, folders: Mapping[str, Path], measure: str | None
) -> str | None:
    """Write the table of all notebooks, the figure and the summary into the sweep's run.

    Parameters
    ----------
    run : Run
        The run of the sweep.
    planned : SweepPlan
        What was planned.
    folders : mapping
        The run folder of each notebook that has one, by the notebook's key.
    measure : str or None
        The number in the runs' results that the figure shows; if None, the main one of the notebooks (see
        `Run.declare`), else the first one.

    Returns
    -------
    str or None
        How many notebooks are not done, in words; None if all are done.
    """
    notebooks = _listed(planned, folders)
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
    if from_earlier_runs := run.manifest["results"].get("kept", 0):
        summary.append(
            f"{from_earlier_runs} of them are taken from earlier runs with the same spec and code."
        )
    note = run.manifest["results"].get("note")
    summary += [note] if note else []
    summary += [f"{row.run}: {row.error}" for row in failed.itertuples()][:MAX_ERRORS]
    try:
        measured = measured_table(notebooks, measure)
        rows = measured.texts()
        if measured.measures:
            summary += [f"{finding}."] if (finding := measured.finding()) else []
            _draw(run, planned.spec, measured, int(counts.get("done", 0)), len(notebooks))
        elif measure is not None:
            table[table["status"] == "done"].summary(measure)  # says which numbers there are
    except ArgumentError as error:  # there is no such number, or no notebook that is done has it
        rows = []
        summary.append(str(error))
    run.update(results={**dict(counts), "summary": summary, "table": rows})
    others = ", ".join(f"{count} {status}" for status, count in counts.items() if status != "done")
    return f"Of {len(notebooks)} notebooks not all are done: {others}." if others else None


def _listed(planned: SweepPlan, folders: Mapping[str, Path]) -> list[tuple[Path, Mapping[str, Any]]]:
    """The folder and the manifest of each notebook's run; of one that is missing, what is known of it."""
    listed: list[tuple[Path, Mapping[str, Any]]] = []
    for notebook in planned.notebooks:
        try:
            listed.append((folders[notebook.key], Run(folders[notebook.key]).manifest))
        except (KeyError, StorageError):
            fields = {"kind": type(notebook.spec).__name__, "fields": notebook.spec.to_parameters()}
            name = run_name(Path(planned.spec.notebook))
            listed.append((Path(), {"name": name, "status": "missing", "spec": fields}))
    return listed


def _draw(run: Run, spec: SweepSpec, measured: MeasuredTable, num_done: int, total: int) -> None:
    """Draw the main number of the notebooks against what they differ in."""
    y = next(iter(measured.measures))
    data, x, by = measured.of_figure(y)
    x_word = None if x is None else quantity(x)
    by_word = None if by is None else ", ".join(map(quantity, measured.axes()[1]))
    run.save_figure(
        "results",
        partial(comparison, y=quantity(y), x=x_word, by=by_word),
        data,
        caption=(
            f"Means over the {num_done} of {total} runs of {spec.notebook} that are done, {spec.repeats} of "
            "each combination; bars: 95 % intervals, over repeats where there are several; seeds derived "
            f"from {spec.seed}, the same for each combination."
        ),
    )
