"""The view Jobs: rows that were sent to devices, in the states last known."""

from __future__ import annotations

from html import escape
from typing import Any

import pandas as pd

from ..numbers import spaced
from .elements import DRAWING, DashboardView, empty_note, html_pane, html_table
from .records import Listing
from .view_host import ViewHost

MAX_JOBS = 200
"""Jobs that are listed: the newest."""

COLUMNS = {
    "tag": "",
    "run": "",
    "device": "",
    "state, last known": "",
    "rows × shots": "number",
    "recorded (UTC)": "",
}

NO_JOBS = empty_note(
    "No jobs on devices",
    "Rows sent to hardware are recorded before they are submitted, and appear here: see the notebook "
    "<code>03_hardware</code>.",
)

NO_SERVER = (
    "<p class='note'>No server is asked from here: <code>qtx-lab jobs</code> asks, fetches and cancels.</p>"
)


class JobsView(DashboardView):
    """Rows that were sent to devices, in the states last known."""

    uses_run_filters = False

    def __init__(self, page: ViewHost):
        self._table = html_pane(DRAWING)
        super().__init__(page, [self._table])

    def prepare(self, listing: Listing, rows: pd.DataFrame) -> pd.DataFrame:
        """The jobs are part of the listing."""
        return listing.jobs

    def show(self, data: pd.DataFrame) -> None:
        """Show the newest jobs, each with a link to its run."""
        if data.empty:
            self._table.object = NO_JOBS
            return
        lines = [self._line(job) for job in data.head(MAX_JOBS).itertuples()]
        self._table.object = html_table(COLUMNS, lines) + NO_SERVER

    def _line(self, job: Any) -> str:
        recorded = escape(job.recorded[:19].replace("T", " "))
        size = f"{spaced(job.rows)} × {spaced(job.shots)}"
        link = escape(self.page.link(view="Run", run=job.run))
        run = f"<a href='{link}'>{escape(job.run)}</a>" if job.run else "<span class='note'>–</span>"
        return (
            f"<tr><td><code>{escape(job.tag)}</code></td><td>{run}</td><td>{escape(job.device)}</td>"
            f"<td>{escape(job.state)}</td><td class='number'>{size}</td><td class='time'>{recorded}</td></tr>"
        )
