"""`TabHost`: what a tab may ask of the workbench that it stands in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ipywidgets as widgets

from .process import Work


class TabHost(Protocol):
    """What a tab may ask of the workbench that it stands in; `Workbench` offers it."""

    home: Path
    """Folder of all runs."""

    job_box: widgets.VBox
    """The table of jobs, which the Hardware and the Runs tab share."""

    restoring: bool
    """Whether saved forms and results are being put back, so that no tab should start work of its own."""

    def start_task(
        self,
        task: str,
        arguments: Mapping[str, Any],
        on_change: Callable[[Work], object],
        on_data: Callable[[Any], object],
    ) -> Work:
        """Start a function of `tasks.registry` in an idle worker; see `ProcessWorker.start`."""

    def mark_cancelled(self, work: Work) -> None:
        """Record soon that the runs of this work were cancelled."""

    def request_save(self) -> None:
        """Save the state of all forms soon."""

    def save_result(self, name: str, result: Mapping[str, Any], forms: Mapping[str, Any]) -> None:
        """Save what came of a tab's work, and the forms that led to it, in the run."""

    def request_picture(self) -> None:
        """Renew soon the picture that a saved notebook shows in place of the workbench."""

    def runs_folder(self) -> str:
        """The folder in which the tasks make their runs."""

    def storage_note(self) -> str:
        """A text for the status line: the run in which everything is saved."""

    def storage_place(self) -> str:
        """The path of that run; empty before there is one."""

    def list_jobs(self) -> None:
        """List the jobs and the runs as they are now."""

    def measure_rows(self, rows: tuple[int, ...]) -> None:
        """Enter these queries in the Circuit tab as the rows to measure, and open that tab."""

    def choose_rows(self, rows: tuple[int, ...]) -> tuple[int, ...]:
        """Enter these queries in the Circuit tab as the rows to measure; those that it takes."""

    def fit_rows(self, num_queries: int) -> None:
        """Leave out of the rows to measure those that there are not."""
