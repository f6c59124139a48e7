"""The tasks `list_runs` and `sweep`: the runs of a folder, and a notebook that makes many of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd

from ....experiments.listing import COLUMNS
from ....experiments.notebooks import notebook_path
from ....experiments.runs import Run, runs
from ....specs import ClusterSpec
from ..process_server import TaskReport

MAX_LISTED_RUNS = 200
"""Runs that are listed: the newest."""

PROGRESS_POLL_S = 0.5
"""Seconds between two counts of the notebooks that have ended."""


def list_runs(report: TaskReport, home: str) -> dict[str, Any]:
    """The newest runs of a folder: `runs`, a list of rows; `all`, how many there are; `home`."""
    table = runs(home)
    shown = table.head(MAX_LISTED_RUNS)[["run", "name", "status", "started", "seconds"]].copy()
    shown["started"] = shown["started"].dt.strftime("%Y-%m-%d %H:%M:%S")
    shown["seconds"] = [f"{seconds:.1f}" if seconds == seconds else "" for seconds in shown["seconds"]]
    return {"runs": shown.to_dict("records"), "all": len(table), "home": home}


def sweep(
    report: TaskReport, home: str, plan: Mapping[str, Any], cluster: Mapping[str, Any]
) -> dict[str, Any]:
    """Run a notebook for every combination of values, each a run.

    Returns
    -------
    dict
        `run` of the sweep, its `status`, `columns` and `rows` of its table, those that differ, and its figure
        as PNG, `light` and `dark`, uint8, with a `caption`, where it has one.
    """
    from ....experiments.sweeps import plan as plan_sweep
    from ....experiments.sweeps import sweep as run_sweep

    settings = {name: plan[name] for name in ("parameters", "repeats", "seed")}
    notebooks = plan_sweep(notebook_path(plan["notebook"]), plan["grid"], **settings).notebooks
    report(0.0, f"starting the workers for {len(notebooks)} notebooks")
    with _reported_progress(report, home, len(notebooks)):
        run = run_sweep(
            plan["notebook"], plan["grid"], **settings, cluster=ClusterSpec(**cluster), home=home,
            progress=False,
        )  # fmt: skip
    return _sweep_result(run)


@contextmanager
def _reported_progress(report: TaskReport, home: str, count: int) -> Iterator[None]:
    """Report how many notebooks of the sweep inside have ended."""
    started, over = pd.Timestamp.now("UTC"), threading.Event()

    def watch() -> None:
        while not over.wait(PROGRESS_POLL_S):
            table = runs(home)
            of_sweep = table[table["sweep"].notna() & (table["started"] >= started)]
            ended = int(of_sweep["status"].isin(["done", "failed"]).sum())
            report(ended / count, f"{ended} of {count} notebooks")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _sweep_result(run: Run) -> dict[str, Any]:
    """The table of a sweep, without the columns that are the same everywhere, and its figure."""
    table = run.metrics()
    first = ("run", "status", "seconds")
    others = [name for name in table.columns if name not in (*first, *COLUMNS)]
    table = table[[*first, *(name for name in others if table[name].astype(str).nunique() > 1)]]
    result: dict[str, Any] = {
        "run": run.path.name,
        "status": run.status,
        "columns": list(table.columns),
        "rows": json.loads(table.head(MAX_LISTED_RUNS).to_json(orient="values")),
    }
    for figure in run.figures()[:1]:
        for theme, suffix in (("light", ""), ("dark", "-dark")):
            content = (run.path / "figures" / f"{figure['name']}{suffix}.png").read_bytes()
            result[theme] = np.frombuffer(content, np.uint8)
        result["caption"] = str(figure["caption"])
    return result
