"""The tab Runs: all runs and jobs, newest first."""

from __future__ import annotations

import html
from typing import Any

import ipywidgets as widgets

from ...numbers import spaced
from ..tab import WorkbenchTab
from ..tab_host import TabHost


class RunsTab(WorkbenchTab):
    """All runs and jobs, newest first."""

    name, title, button, task = "runs", "Runs", "Refresh", "list_runs"
    reports = False
    first_step = "Press <b>Refresh</b> to list the runs."

    def __init__(self, bench: TabHost):
        self._heading = widgets.HTML()
        super().__init__(bench, {}, self._heading, bench.job_box)

    def opened(self) -> None:
        """List the runs that there are now."""
        if not self.busy and not self.bench.restoring:
            self._start_or_explain()

    def arguments(self) -> dict[str, Any]:
        """The arguments of the task."""
        return {"home": str(self.bench.home)}

    def show(self, result: dict[str, Any]) -> None:
        """Show how many runs there are, and list them."""
        self.bench.list_jobs()
        home = html.escape(result["home"])
        self._heading.value = f"<p><b>{spaced(result['all'])} runs in {home}</b></p>"
