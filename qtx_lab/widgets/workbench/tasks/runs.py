"""The tasks `list_runs` and `sweep`: the runs of a folder, and a notebook that makes many of them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ....experiments.manifest import read_manifest
from ....experiments.measured_table import differing_parameters, measured_table, parameter_key
from ....experiments.notebooks import notebook_path
from ....experiments.runs import Run, oldest_first, read_manifests, runs
from ....specs import ClusterSpec
from ..process_server import TaskReport

if TYPE_CHECKING:
    from ....experiments.sweep_plan import PlannedNotebook

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
    """Run a notebook for every combination of values, each a run; what has come in so far is sent.

    Returns
    -------
    dict
        `run` of the sweep, its `status`; `notebooks`, how many there are, and how many of them were `taken`
        from earlier runs and are `done`; `finding`, a sentence; `measured`, a row of texts for each
        combination; `rows`, one for each notebook; and its figure as PNG, `light` and `dark`, uint8, with a
        `caption`, where it has one.
    """
    from ....experiments.sweep_plan import plan as plan_sweep
    from ....experiments.sweeps import find_results
    from ....experiments.sweeps import sweep as run_sweep

    settings = {name: plan[name] for name in ("parameters", "repeats", "seed")}
    path = notebook_path(plan["notebook"]).resolve()
    planned = plan_sweep(path, plan["grid"], **settings)
    progress = SweepProgress(report, Path(home).resolve(), planned.notebooks)
    progress.taken = find_results(progress.home, path, planned)
    with progress.followed():
        run = run_sweep(
            plan["notebook"], plan["grid"], **settings, cluster=ClusterSpec(**cluster), home=home,
            progress=False,
        )  # fmt: skip
    return {**progress.result(), **_figure_of(run), "run": run.path.name, "status": run.status}


class SweepProgress:
    """How far a sweep is, and what its notebooks have measured so far.

    Parameters
    ----------
    report : TaskReport
    home : Path
        The folder of runs.
    notebooks : sequence of PlannedNotebook
    """

    def __init__(self, report: TaskReport, home: Path, notebooks: Sequence[PlannedNotebook]):
        self.report, self.home, self.notebooks = report, home, notebooks
        self.taken: dict[str, Path] = {}
        self._earlier = {folder for folder, _ in read_manifests(home)}

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Report and send, while the sweep inside runs, what there is."""
        over = threading.Event()

        def watch() -> None:
            sent = None
            while not over.is_set():
                result = self.result()
                ended, total, taken = result["ended"], result["notebooks"], result["taken"]
                earlier = f", {taken} of them taken from earlier runs" if taken else ""
                self.report(ended / total, f"{ended} of {total} notebooks have ended{earlier}")
                if result != sent:
                    self.report.send(result)
                    sent = result
                over.wait(PROGRESS_POLL_S)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def result(self) -> dict[str, Any]:
        """What `sweep` returns, as far as it is known, without the figure."""
        runs_of_sweep = self._runs()
        taken = {key: (folder, read_manifest(folder)) for key, folder in self.taken.items()}
        by_key = {**runs_of_sweep, **taken}
        listed = [by_key[notebook.key] for notebook in self.notebooks if notebook.key in by_key]
        measured = measured_table(listed)
        statuses = [manifest["status"] for _, manifest in listed]
        return {
            "run": "",
            "status": "running",
            "notebooks": len(self.notebooks),
            "taken": len(taken),
            "done": statuses.count("done"),
            "ended": sum(status != "running" for status in statuses),
            "finding": measured.finding(),
            "measured": measured.texts()[:MAX_LISTED_RUNS],
            "rows": [self._row(*each, by_key) for each in self._described()][:MAX_LISTED_RUNS],
        }

    def _described(self) -> list[tuple[PlannedNotebook, dict[str, Any]]]:
        """The notebooks, and the parameters in which they differ."""
        parameters = differing_parameters([notebook.spec.to_parameters() for notebook in self.notebooks])
        if any(notebook.repeat for notebook in self.notebooks):
            repeats = [notebook.repeat + 1 for notebook in self.notebooks]
            parameters = [
                {**_renamed(x, ("repeat",)), "repeat": repeat}
                for x, repeat in zip(parameters, repeats, strict=True)
            ]
        return list(zip(self.notebooks, parameters, strict=True))

    def _row(
        self,
        notebook: PlannedNotebook,
        parameters: Mapping[str, Any],
        by_key: Mapping[str, tuple[Path, Mapping[str, Any]]],
    ) -> dict[str, str]:
        """A notebook of the sweep: its parameters, how far it is, its seconds and the run that holds it."""
        folder, manifest = by_key.get(notebook.key, (Path(), {"status": "waiting"}))
        status = "taken from an earlier run" if notebook.key in self.taken else manifest["status"]
        seconds = manifest.get("seconds")
        own = {
            "status": status,
            "seconds": "" if seconds is None else f"{seconds:.1f}",
            "run": folder.name,
        }
        return {**{name: str(value) for name, value in _renamed(parameters, own).items()}, **own}

    def _runs(self) -> dict[str, tuple[Path, Mapping[str, Any]]]:
        """The runs of this sweep so far, by the keys of their notebooks."""
        keys = {notebook.key for notebook in self.notebooks}
        by_key: dict[str, tuple[Path, Mapping[str, Any]]] = {}
        for folder, manifest in oldest_first(self.home):  # the last run of a notebook that began again counts
            key = (manifest.get("sweep") or {}).get("cell")
            if key in keys and folder not in self._earlier:
                by_key[key] = folder, manifest
        return by_key


def _renamed(parameters: Mapping[str, Any], columns: Collection[str]) -> dict[str, Any]:
    """Parameters by their names, which say "(parameter)" where the table has a column of that name."""
    return {parameter_key(name) if name in columns else name: x for name, x in parameters.items()}


def _figure_of(run: Run) -> dict[str, Any]:
    """The figure of a sweep, where it has one."""
    result: dict[str, Any] = {}
    for figure in run.figures()[:1]:
        for theme, suffix in (("light", ""), ("dark", "-dark")):
            content = (run.path / "figures" / f"{figure['name']}{suffix}.png").read_bytes()
            result[theme] = np.frombuffer(content, np.uint8)
        result["caption"] = str(figure["caption"])
    return result
