"""`ViewHost`: what a view of the dashboard may ask of the page that it stands on."""

from __future__ import annotations

from typing import Any, Protocol

import pandas as pd

from .records import Listing, Records


class ViewHost(Protocol):
    """What a view of the dashboard may ask of the page that it stands on; `DashboardPage` offers it."""

    records: Records
    """The runs on disk."""

    theme: str
    """"light" or "dark"."""

    writable: bool
    """Whether tags and notes of runs can be written."""

    async def on_change(self, event: Any) -> None:
        """Prepare and show the open view anew, because a control of it was changed."""

    def filtered(self, listing: Listing) -> pd.DataFrame:
        """The runs that pass the page's filters, newest first."""

    def link(self, **changes: str | None) -> str:
        """The address of the view that is open with changes to its query; None takes a part of it away."""

    def report_link(self, run: str) -> str:
        """Where the server shows a run's report."""

    def notebook_link(self, run: str) -> str:
        """Where the server gives a run's executed notebook."""
