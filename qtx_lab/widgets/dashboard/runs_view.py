"""The view Runs: a table of all runs, page by page, with links to their reports."""

from __future__ import annotations

from functools import partial
from html import escape
from typing import Any

import pandas as pd
import panel as pn

from .elements import TABLE_ROWS, DashboardView, empty_note, html_pane, html_table, skipped_list, status_mark
from .records import Listing
from .view_host import ViewHost

NO_RUNS = """<div class="empty"><h2>No runs yet in <code>{home}</code></h2>
<p>Make the first one: type</p><p><code>qtx-lab demo --home {home}</code></p>
<p>in a terminal, or run the notebook <code>00_quickstart</code> in JupyterLab. It takes less than a minute,
and shows up here by itself.</p></div>"""

COLUMNS = {
    "started (UTC)": "",
    "name": "",
    "status": "",
    "seconds": "number",
    "seed": "number",
    "report": "",
    "folder": "",
}


class RunsView(DashboardView):
    """A table of all runs that pass the filters, newest first."""

    def __init__(self, page: ViewHost):
        self._first_row = 0
        self._table, self._range = html_pane(), html_pane()
        self._newer, self._older = (
            pn.widgets.Button(label=name, width=110) for name in ("◀ Newer", "Older ▶")
        )
        self._newer.on_click(partial(self._turn_page, -TABLE_ROWS))
        self._older.on_click(partial(self._turn_page, TABLE_ROWS))
        self._pages = pn.Row(self._newer, self._older, self._range, align="center")
        super().__init__(page, [self._table, self._pages])

    def prepare(self, listing: Listing, rows: pd.DataFrame) -> tuple[Listing, pd.DataFrame]:
        """The listing and its rows are all that is shown."""
        return listing, rows

    def state(self) -> int:
        """The first row that is shown."""
        return self._first_row

    def show(self, data: tuple[Listing, pd.DataFrame]) -> None:
        """Show one page of the table, or what to do where it is empty."""
        listing, rows = data
        if listing.table.empty:
            empty = NO_RUNS.format(home=escape(str(self.page.records.home)))
            self._table.object = empty + skipped_list(listing.skipped)
        elif rows.empty:
            self._table.object = empty_note("No run passes the filters", "Loosen them on the left.")
        else:
            start = self._first_row = min(self._first_row, (len(rows) - 1) // TABLE_ROWS * TABLE_ROWS)
            shown = rows.iloc[start : start + TABLE_ROWS]
            lines = [self._line(row) for row in shown.itertuples()]
            self._table.object = html_table(COLUMNS, lines) + skipped_list(listing.skipped)
            self._range.object = f"{start + 1}–{start + len(shown)} of {len(rows)}"
            self._newer.disabled, self._older.disabled = start == 0, start + TABLE_ROWS >= len(rows)
        self._pages.visible = len(rows) > TABLE_ROWS

    async def _turn_page(self, step: int, event: Any) -> None:
        self._first_row = max(0, self._first_row + step)
        await self.page.on_change(event)

    def _line(self, row: Any) -> str:
        error = (
            f"<span class='why'>{escape(str(row.error)[:300])}</span>" if isinstance(row.error, str) else ""
        )
        seconds = "" if row.seconds != row.seconds else f"{row.seconds:.1f}"
        report = "<span class='note'>none yet</span>"
        if row.report:
            report = (
                f"<a href='{escape(self.page.report_link(row.run))}' target='_blank' rel='noopener' "
                f"aria-label='Report of {escape(row.run)}'>report</a>"
            )
        started = "" if pd.isna(row.started) else f"{row.started:%Y-%m-%d %H:%M:%S}"
        seed = "" if pd.isna(row.seed) else str(row.seed)
        return (
            f"<tr><td>{started}</td><td>{escape(row.name)}</td><td>{status_mark(row.status)}{error}</td>"
            f"<td class='number'>{seconds}</td><td class='number'>{seed}</td><td>{report}</td>"
            f"<td class='folder note'>{escape(row.run)}</td></tr>"
        )
