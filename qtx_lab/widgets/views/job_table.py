"""`JobTable`: the jobs on devices and the runs of a folder, to refresh, cancel and open."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import traitlets

from ... import theme as look
from ...backends.ibm.jobs import DeviceJob, find_jobs
from ...backends.ibm.remote import Unreachable
from ...errors import ArgumentError, BackendUnavailable, StorageError
from ...experiments.runs import Run, runs
from ...storage import json_bytes, runs_home
from .base import View

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS = 500
"""Jobs, and runs, that are listed at most: the newest."""

MAX_FIGURE_ROWS = 12
"""Jobs, and runs, in the figure: the newest."""

JOB_COLUMNS = ("tag", "run", "device", "state", "rows", "shots", "recorded")
RUN_COLUMNS = ("run", "name", "status", "started", "seconds")


class JobTable(View):
    """Jobs over all runs, and the runs themselves: what is queued, running, done or failed.

    States are those last known until Refresh asks the servers. Cancel asks twice. Open shows a record and
    sets `opened`.

    Parameters
    ----------
    home : path, optional
        The folder of runs; see `runs_home`.
    service : QiskitRuntimeService, optional
        Asked about the jobs; see `find_jobs`.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     JobTable(home).frame().empty
    True
    """

    home = traitlets.Unicode(read_only=True).tag(sync=True)
    opened = traitlets.Unicode(read_only=True)
    """The file or folder of the job or run that was opened last."""

    def __init__(self, home: str | Path | None = None, *, service: Any = None):
        self._service = service
        self._lock = threading.Lock()
        self._problems: list[str] = []
        super().__init__("jobs", home=str(runs_home(home).absolute()))

    def frame(self) -> pd.DataFrame:
        """The jobs, newest first, their states as last known."""
        import pandas as pd

        return pd.DataFrame([self._facts(job) for job in self._jobs()], columns=[*JOB_COLUMNS, "path"])

    def figure(self, theme: str = "light") -> Figure:
        """The newest jobs and runs as a picture of two tables."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        style: Any = look.matplotlib_style(theme)
        jobs = [[str(row[name]) for name in JOB_COLUMNS] for row in map(self._facts, self._jobs())][
            :MAX_FIGURE_ROWS
        ]
        listed = [[str(row[name]) for name in RUN_COLUMNS] for row in self._runs()[:MAX_FIGURE_ROWS]]
        with mpl.rc_context(style):
            figure = Figure(figsize=(12.4, 1.6 + 0.26 * (len(jobs) + len(listed))), layout="constrained")
            axes = figure.subplots(2, 1, height_ratios=[len(jobs) + 2, len(listed) + 2])
            _draw_table(axes[0], "Jobs on devices", JOB_COLUMNS, jobs, theme)
            _draw_table(axes[1], "Runs", RUN_COLUMNS, listed, theme)
        return figure

    def refresh(self) -> None:
        """Ask the servers for the states of the jobs, wait for the answers, and list everything again."""
        self._refresh(True)

    def cancel(self, tag: str) -> None:
        """Cancel the job with this tag.

        Raises
        ------
        ArgumentError
            If there is none.
        BackendUnavailable
            If the job has ended, or if the server cannot be asked.
        """
        self._job(tag).cancel()

    def _jobs(self) -> list[DeviceJob]:
        """The newest jobs. What could not be read is noted as a problem, with the reason."""
        with self._lock, warnings.catch_warnings(record=True) as skipped:
            warnings.simplefilter("always")
            jobs = find_jobs(self.home, service=self._service)[:MAX_ROWS]
            self._problems = [f"Left out: {warning.message}" for warning in skipped]
        return jobs

    def _job(self, tag: str) -> DeviceJob:
        for job in find_jobs(self.home, tag=tag, service=self._service):
            if job.tag == tag:
                return job
        raise ArgumentError(f"tag={tag!r} is not allowed: no job has it.")

    def _facts(self, job: DeviceJob) -> dict[str, Any]:
        record, status = job.record, job.last_known
        folder = job.path.parent.parent
        return {
            "tag": job.tag,
            "run": "" if folder == Path(self.home) else folder.name,
            "device": record.device,
            "state": str(status.state),
            "ended": status.state.ended,
            "reason": status.reason or "",
            "rows": record.circuits,
            "shots": record.shots,
            "recorded": f"{record.recorded:%Y-%m-%d %H:%M:%S}",
            "path": str(job.path),
        }

    def _runs(self) -> list[dict[str, Any]]:
        table = runs(self.home)
        self._problems += [f"Left out {folder}: {reason}." for folder, reason in table.attrs["skipped"]]
        return [
            {
                "run": row["run"],
                "name": row["name"],
                "status": row["status"],
                "started": f"{row['started']:%Y-%m-%d %H:%M:%S}",
                "seconds": f"{row['seconds']:.1f}" if row["seconds"] == row["seconds"] else "",
                "path": str(row["path"]),
            }
            for row in table.head(MAX_ROWS).to_dict("records")
        ]

    def _on_message(self, content: Mapping[str, Any]) -> None:
        kind = content["kind"]
        if kind == "list":
            self._worker.put("list", partial(self._refresh, bool(content.get("ask"))))
        elif kind == "cancel":
            self._worker.put(f"cancel {content['tag']}", partial(self._cancel_and_list, str(content["tag"])))
        elif kind == "open":
            self._worker.put("open", partial(self._open, content.get("tag"), content.get("run")))

    def _refresh(self, ask: bool) -> None:
        jobs, answered, server_silent, rows, problems = self._jobs(), ask, False, [], []
        for job in jobs:
            try:
                facts = self._facts(job)
                if ask and not server_silent and not facts["ended"]:
                    job.status()
                    facts = self._facts(job)
            except BackendUnavailable as error:
                answered = False
                server_silent = isinstance(error, Unreachable)  # each question to a silent server takes long
                problems.append(f"The server could not be asked; states are those last known. {error}")
            except StorageError as error:  # deleted, or broken, since it was listed
                problems.append(str(error))
                continue
            rows.append(facts)
        listed = self._runs()
        problems = list(dict.fromkeys([*self._problems, *problems]))
        table = {"jobs": rows, "runs": listed, "from_servers": answered, "problems": problems}
        self.send({"kind": "table", **table})

    def _cancel_and_list(self, tag: str) -> None:
        try:
            self.cancel(tag)
        finally:
            self._refresh(False)

    def _open(self, tag: str | None, run: str | None) -> None:
        if tag is not None:
            job = self._job(tag)
            path, facts = job.path, job.record.model_dump()
        else:
            folder = Path(self.home) / Path(str(run)).name
            path, facts = folder, Run.open(folder).manifest
        self.set_trait("opened", str(path))
        text = json_bytes(facts).decode()
        self.send({"kind": "details", "name": tag or str(run), "path": str(path), "text": text})


def _draw_table(ax: Axes, title: str, columns: Sequence[str], rows: list[list[str]], theme: str) -> None:
    colours = look.colours_of(theme)
    ax.axis("off")
    ax.set_title(title if rows else f"{title}: none yet")
    if not rows:
        return
    table = ax.table(rows, colLabels=columns, loc="upper center", cellLoc="left", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.auto_set_column_width(range(len(columns)))
    for cell in table.get_celld().values():
        cell.set_edgecolor(colours["line"])
        cell.get_text().set_color(colours["text"])
