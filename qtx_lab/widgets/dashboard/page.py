"""The dashboard's page: one for each session, with a view for each question; it reads and never writes."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import panel as pn

from ... import theme as look
from ...experiments.manifest import STATUSES
from . import figures
from .elements import CONTROL_WIDTH, DashboardView, html_pane, select
from .figure_views import devices_view, error_view, heads_view
from .jobs_view import JobsView
from .live_view import LiveView
from .maps_view import MapsView
from .records import RUNNING_POLL_S, Listing, Records
from .runs_view import RunsView

DIMMING_DELAY_S = 0.3
"""Seconds after which the last picture is dimmed while the next one is prepared."""

WINDOWS_S = {"any time": None, "last hour": 3600, "last day": 86_400, "last week": 604_800}
"""Seconds since the start of a run, for the filter."""

WINDOW_STEP_S = 30
"""Seconds after which runs that have become too old leave the page."""

NAV_CSS = """
.bk-btn-group { border: 0; } .bk-btn { font: 500 14px var(--house-font); border: 0; background: transparent;
  color: var(--house-text); border-radius: 6px; padding: 6px 12px; box-shadow: none; }
:host .bk-btn-group .bk-btn.bk-active { background: var(--house-accent); color: var(--house-background);
  box-shadow: none; }
.bk-btn:focus-visible { outline: 2px solid var(--house-accent); outline-offset: 2px; }
"""

DESIGN_COLOURS = {
    "primary-color": "accent",
    "primary-text-color": "background",
    "background-color": "background",
    "background-text-color": "text",
    "surface-color": "panel",
    "surface-text-color": "text",
}
"""Panel's variables, and which of the house's colours they have."""


@dataclass
class DashboardPage:
    """One session's page.

    Parameters
    ----------
    records : Records
        Shared by all sessions.
    theme : str
        "light" or "dark".
    prefix : str
        Path under which the server is seen, without a slash at its end.
    """

    records: Records
    theme: str
    prefix: str = ""

    def __post_init__(self) -> None:
        self.views: dict[str, DashboardView] = {
            "Runs": RunsView(self),
            "Live": LiveView(self),
            "Error": error_view(self),
            "Heads": heads_view(self),
            "Devices": devices_view(self),
            "Maps": MapsView(self),
            "Jobs": JobsView(self),
        }
        self.nav = pn.widgets.RadioButtonGroup(options=list(self.views), value="Runs", stylesheets=[NAV_CSS])
        self.text = pn.widgets.TextInput(
            label="Run contains", placeholder="part of its name", width=CONTROL_WIDTH
        )
        self.status = pn.widgets.CheckBoxGroup(options=list(STATUSES), value=list(STATUSES))
        self.since = select(label="Started", options=list(WINDOWS_S))
        status_label = pn.widgets.StaticText(value="Status", margin=(10, 10, 0, 10))
        # All are there from the beginning, and shown or hidden, because what Panel puts back after taking it
        # away has lost its style.
        self._filters = pn.Column(self.text, status_label, self.status, self.since, margin=0)
        self._boxes = {name: pn.Column(*view.controls, margin=0) for name, view in self.views.items()}
        self.controls = pn.Column(self._filters, *self._boxes.values(), width=CONTROL_WIDTH + 4)
        self.picture = pn.Column(*(view.body for view in self.views.values()), sizing_mode="stretch_width")
        self.foot = html_pane()
        self._shown_state: Any = None
        self._refreshing = False
        for widget in (self.nav, self.status, self.since):
            widget.param.watch(self.on_change, "value")
        self.text.param.watch(self.on_change, "value_input")
        self._show_open_view()
        self._first_picture()

    @property
    def view(self) -> DashboardView:
        """The view that is open."""
        return self.views[self.nav.value]

    async def on_change(self, event: Any) -> None:
        """Follow a control that was changed."""
        if event.obj is self.nav:
            self._show_open_view()
        await self.refresh()

    def filtered(self, listing: Listing) -> pd.DataFrame:
        """The runs that pass the filters, newest first."""
        table = listing.table
        if table.empty:
            return table
        text = (self.text.value_input or "").strip().lower()
        passes = table["status"].isin(self.status.value)
        passes &= table["run"].str.lower().str.contains(text, regex=False)
        if (window_s := WINDOWS_S[self.since.value]) is not None:
            passes &= (pd.Timestamp.now(tz="UTC") - table["started"]).dt.total_seconds() <= window_s
        return table[passes]

    async def refresh(self) -> None:
        """Prepare and show the open view anew, if anything that it depends on has changed."""
        if self._refreshing:
            return
        self._refreshing = True
        try:
            while (state := self._state()) != self._shown_state:
                view, listing, problem = self.view, self.records.listing, ""
                try:
                    reading = asyncio.create_task(
                        asyncio.to_thread(view.prepare, listing, self.filtered(listing))
                    )
                    await asyncio.wait({reading}, timeout=DIMMING_DELAY_S)
                    self.picture.loading = not reading.done()
                    data = await reading
                    if view is self.view:
                        view.show(data)
                except Exception as error:  # a run folder may hold anything: the other views go on
                    logging.getLogger(__name__).exception("A view could not be drawn")
                    reason = f"{type(error).__name__}: {error}"
                    problem = f"This view could not be drawn: {reason}. The picture is an older one."
                self.picture.loading = False
                self._show_foot(listing, problem)
                self._shown_state = state
        finally:
            self._refreshing = False

    def report_link(self, run: str) -> str:
        """Where the server shows a run's report."""
        return f"{self.prefix}/report/{quote(run, safe='')}"

    def _first_picture(self) -> None:
        """Draw the open view before the page is sent."""
        state, view, listing = self._state(), self.view, self.records.listing
        view.show(view.prepare(listing, self.filtered(listing)))
        self._show_foot(listing)
        self._shown_state = state

    def _show_open_view(self) -> None:
        self._filters.visible = self.view.uses_run_filters
        for name, view in self.views.items():
            self._boxes[name].visible = view.body.visible = name == self.nav.value

    def _state(self) -> tuple[Any, ...]:
        """Everything that the open view depends on."""
        listing = self.records.listing
        now = int(time.time() / WINDOW_STEP_S) if WINDOWS_S[self.since.value] else None
        filters = (self.text.value_input, tuple(self.status.value), self.since.value, now)
        return (self.nav.value, listing.number, filters, self.view.state())

    def _show_foot(self, listing: Listing, problem: str = "") -> None:
        table = listing.table
        running = int((table["status"] == "running").sum()) if len(table) else 0
        parts = [
            f"<code>{escape(str(self.records.home))}</code>",
            f"{len(table)} runs, {running} running",
            f"{len(listing.skipped)} skipped" if listing.skipped else "",
            "read only",
        ]
        if listing.trouble:
            problem = f"{listing.trouble} Shown is what was read before."
        warning = f"<p class='warning' role='alert'>{escape(problem)}</p>" if problem else ""
        self.foot.object = warning + " · ".join(filter(None, parts))


def make_page(records: Records, prefix: str = "") -> Any:
    """The page of a new session: what `panel.serve` calls."""
    theme = _requested_theme()
    session = DashboardPage(records, theme, prefix)
    colours = look.colours_of(theme)
    variables = {f"--house-{name}": colour for name, colour in colours.items()}
    variables["--house-font"] = figures.FONT
    variables |= {f"--design-{name}": colours[colour] for name, colour in DESIGN_COLOURS.items()}
    template = pn.Template(
        Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"),
        theme=pn.theme.DarkTheme if theme == "dark" else pn.theme.DefaultTheme,
    )
    template.add_panel("nav", session.nav)
    template.add_panel("controls", session.controls)
    template.add_panel("picture", session.picture)
    template.add_panel("foot", session.foot)
    other = "dark" if theme == "light" else "light"
    template.add_variable("heading", "qtx_lab dashboard")
    template.add_variable("variables", " ".join(f"{name}: {value};" for name, value in variables.items()))
    template.add_variable("theme_word", theme)
    template.add_variable("other_theme", other.capitalize())
    template.add_variable("other_theme_url", f"?theme={other}")
    pn.state.add_periodic_callback(
        session.refresh,  # type: ignore[arg-type]  # it may be a coroutine function
        period=int(1000 * RUNNING_POLL_S),
    )
    return template


def _requested_theme() -> str:
    requested = (pn.state.session_args or {}).get("theme", [b"light"])[0].decode(errors="replace")
    return requested if requested in look.COLOURS else "light"
