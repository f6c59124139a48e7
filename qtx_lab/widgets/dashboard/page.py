"""The dashboard's page: one for each session, with views, filters and an address that says which."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

import pandas as pd
import panel as pn
from panel.io.resources import LOCAL_DIST

from ... import theme as look
from ...experiments.manifest import STATUSES
from . import figures
from .compare_view import CompareView
from .devices_view import devices_view
from .elements import CONTROL_WIDTH, DashboardView, html_pane, select
from .figure_views import FigureView, error_view, heads_view
from .jobs_view import JobsView
from .live_view import LiveView
from .maps_view import MapsView
from .records import RUNNING_POLL_S, Listing, Records
from .run_view import RunView
from .runs_view import RunsView
from .settings import passes
from .sweep_view import sweep_view

DIMMING_DELAY_S = 0.3
"""Seconds after which the last picture is dimmed while the next one is prepared."""

WINDOWS_S = {"any time": None, "last hour": 3600, "last day": 86_400, "last week": 604_800}
"""Seconds since the start of a run, for the filter."""

WINDOW_STEP_S = 30
"""Seconds after which runs that have become too old leave the page."""

NAV_CSS = """
.bk-btn-group { border: 0; } .bk-btn { font: 500 14px var(--house-font); border: 0; background: transparent;
  color: var(--house-text); padding: 6px 12px; }
:host .bk-btn-group .bk-btn.bk-active { background: var(--house-accent); color: var(--house-background); }
:host .bk-btn-group { gap: 2px; }
:host .bk-btn { border-radius: 6px !important; margin: 0 !important; box-shadow: none !important; }
:host .bk-btn-group .bk-btn:focus { outline: none; }
:host .bk-btn-group .bk-btn:focus-visible { outline: 2px solid var(--house-accent); outline-offset: 2px; }
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
    writable : bool
        Whether tags and notes of runs can be written.
    search : str
        The query of the address at first, such as "?view=Run&run=…".
    """

    records: Records
    theme: str
    prefix: str = ""
    writable: bool = False
    search: str = ""

    def __post_init__(self) -> None:
        self.runs = RunsView(self)
        self.views: dict[str, DashboardView] = {
            "Runs": self.runs,
            "Sweeps": sweep_view(self),
            "Live": LiveView(self),
            "Error": error_view(self),
            "Heads": heads_view(self),
            "Devices": devices_view(self),
            "Maps": MapsView(self),
            "Jobs": JobsView(self),
            "Run": RunView(self),
            "Compare": CompareView(self),
        }
        self.open_name = "Runs"
        offered = [name for name, view in self.views.items() if not view.parent]
        self.nav = pn.widgets.RadioButtonGroup(options=offered, value="Runs", stylesheets=[NAV_CSS])
        self.text = pn.widgets.TextInput(
            label="Run contains",
            placeholder="name, tag, error<0.1",
            description="Words that the run's name, tags or note contain, and conditions such as "
            "num_samples>=64, error<0.1 or sweep=NAME.",
            width=CONTROL_WIDTH,
        )
        self.status = pn.widgets.CheckBoxGroup(options=list(STATUSES), value=list(STATUSES))
        self.since = select(label="Started", options=list(WINDOWS_S))
        status_label = pn.widgets.StaticText(value="Status", margin=(10, 10, 0, 10))
        # All are there from the beginning, and shown or hidden, because what Panel puts back after taking it
        # away has lost its style.
        self._filters = pn.Column(self.text, status_label, self.status, self.since, margin=0)
        self._boxes = {
            name: pn.Column(*view.controls.values(), *view.side, margin=0)
            for name, view in self.views.items()
        }
        self.controls = pn.Column(self._filters, *self._boxes.values(), width=CONTROL_WIDTH + 4)
        self.picture = pn.Column(*(view.body for view in self.views.values()), sizing_mode="stretch_width")
        # The browser shows another view at once, even while the server is still drawing the one before.
        bodies = {f"view{i}": view.body for i, view in enumerate(self.views.values())}
        show = "".join(f"view{i}.visible = cb_obj.active == {i};" for i in range(len(offered)))
        hide = "".join(f"view{i}.visible = false;" for i in range(len(offered), len(bodies)))
        self.nav.jscallback(args=bodies, value=show + hide)
        self.foot = html_pane()
        self.presses = pn.widgets.TextAreaInput(css_classes=["presses"], visible=False)
        self.presses.param.watch(self.follow_presses, "value")
        self._followed_presses = 0
        self._shown_state: Any = None
        self._refreshing = self._applying = False
        self._latest_query: dict[str, str] = {}
        self._search_theme: dict[str, str] = {}
        for widget in (self.nav, self.status, self.since):
            widget.param.watch(self.on_change, "value")
        self.text.param.watch(self.on_change, "value_input")
        self.apply(self.search)
        self._first_picture()

    @property
    def view(self) -> DashboardView:
        """The view that is open."""
        return self.views[self.open_name]

    def open(self, name: str) -> None:
        """Open a view."""
        self.open_name = name
        self.nav.value = self.view.parent or name
        self._show_open_view()

    async def on_change(self, event: Any) -> None:
        """Follow a control that was changed."""
        if self._applying:
            return
        if event.obj is self.nav:
            self.open(self.nav.value)
        await self.refresh()

    def filtered(self, listing: Listing) -> pd.DataFrame:
        """The runs that pass the filters, newest first."""
        table = listing.table
        if table.empty:
            return table
        passing = table["status"].isin(self.status.value) & passes(table, self.text.value_input or "")
        if (window_s := WINDOWS_S[self.since.value]) is not None:
            passing &= (pd.Timestamp.now(tz="UTC") - table["started"]).dt.total_seconds() <= window_s
        return table[passing]

    # --- The address ----------------------------------------------------------------------------------

    def query(self, **changes: str | None) -> dict[str, str]:
        """What the address says: theme, open view, filters and the view's own state, with changes to it."""
        view = self.view
        given: dict[str, str | None] = {**self._search_theme}
        given["view"] = self.open_name if self.open_name != "Runs" else None
        given["contains"] = (self.text.value_input or "").strip() or None
        if self.status.value != list(STATUSES):
            given["status"] = "/".join(self.status.value) or "none"
        given["started"] = self.since.value if WINDOWS_S[self.since.value] else None
        if view.parent:
            given |= self.views[view.parent].query()
        given |= view.query() | changes
        return {name: value for name, value in given.items() if value is not None}

    def link(self, **changes: str | None) -> str:
        """The address of this view with changes to its query; None takes a part of it away."""
        return "?" + urlencode(self.query(**changes))

    def apply(self, search: str) -> None:
        """Show what an address says; parts of it that are not allowed are ignored."""
        query = dict(parse_qsl(search.removeprefix("?")))
        self._search_theme = {"theme": query["theme"]} if "theme" in query else {}
        self._applying = True
        try:
            text = query.get("contains", "")
            self.text.param.update(value=text, value_input=text)
            statuses = query.get("status", "/".join(STATUSES)).split("/")
            self.status.value = [name for name in STATUSES if name in statuses]
            since = query.get("started", "")
            self.since.value = since if since in WINDOWS_S else next(iter(WINDOWS_S))
            name = query.get("view", "Runs")
            self.open(name if name in self.views else "Runs")
            for part in filter(None, (self.view.parent, self.open_name)):
                self.views[part].apply(query)
        finally:
            self._applying = False
        self._latest_query = self.query()

    async def follow_presses(self, event: Any) -> None:
        """Do what was pressed in the picture: open the address of a link, tick the run of a box.

        Only the server writes the address, so that no change of it can cross another on its way.
        """
        for press in event.new.splitlines():
            number, what = press.split(" ", 1)
            if int(number) > self._followed_presses:
                self._followed_presses = int(number)
                if what.startswith("?"):
                    self.apply(what)
                else:
                    self.runs.toggle(what)
        self._show_address()
        await self.refresh()

    async def tick(self) -> None:
        """Renew the view, and give the browser an address of it once nobody changes controls any more."""
        await self.refresh()
        query = self.query()
        settled, self._latest_query = query == self._latest_query, query
        if settled:
            self._show_address()

    def _show_address(self) -> None:
        """Let the browser show the address of what is open."""
        location, query = pn.state.location, self.query()
        if location is not None and query != dict(parse_qsl(location.search.removeprefix("?"))):
            location.search = "?" + urlencode(query) if query else ""

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

    def notebook_link(self, run: str) -> str:
        """Where the server gives a run's executed notebook."""
        return f"{self.prefix}/notebook/{quote(run, safe='')}"

    def _first_picture(self) -> None:
        """Draw the open view before the page is sent, if it is quickly drawn; `tick` draws the others."""
        if isinstance(self.view, FigureView | MapsView | CompareView):
            return
        state, view, listing, problem = self._state(), self.view, self.records.listing, ""
        try:
            view.show(view.prepare(listing, self.filtered(listing)))
        except Exception as error:  # a run folder may hold anything: the page opens
            logging.getLogger(__name__).exception("A view could not be drawn")
            problem = f"This view could not be drawn: {type(error).__name__}: {error}."
        self._show_foot(listing, problem)
        self._shown_state = state

    def _show_open_view(self) -> None:
        self._filters.visible = self.view.uses_run_filters
        self.controls.css_classes = (
            [] if self._filters.visible or self.view.controls or self.view.side else ["empty"]
        )
        for name, view in self.views.items():
            self._boxes[name].visible = view.body.visible = name == self.open_name

    def _state(self) -> tuple[Any, ...]:
        """Everything that the open view depends on."""
        listing = self.records.listing
        now = int(time.time() / WINDOW_STEP_S) if WINDOWS_S[self.since.value] else None
        filters = (self.text.value_input, tuple(self.status.value), self.since.value, now)
        return (self.open_name, listing.number, filters, self.view.state())

    def _show_foot(self, listing: Listing, problem: str = "") -> None:
        table = listing.table
        running = int((table["status"] == "running").sum()) if len(table) else 0
        parts = [
            f"<code>{escape(str(self.records.home))}</code>",
            f"{len(table)} runs, {running} running",
            f"{len(listing.skipped)} skipped" if listing.skipped else "",
            "only tags and notes can be written" if self.writable else "read only",
        ]
        if listing.trouble:
            problem = f"{listing.trouble} Shown is what was read before."
        warning = f"<p class='warning' role='alert'>{escape(problem)}</p>" if problem else ""
        self.foot.object = warning + " · ".join(filter(None, parts))


def make_page(records: Records, prefix: str = "", writable: bool = False) -> Any:
    """The page of a new session: what `panel.serve` calls."""
    document = pn.state.curdoc
    if document is not None:
        # Panel sets this when it renders the page. A browser whose session has expired while it loaded comes
        # back without a page, and would be sent to Panel's servers for the style sheets.
        document.template_variables.setdefault("dist_url", LOCAL_DIST)
    theme = _requested_theme()
    search = "" if pn.state.location is None else pn.state.location.search
    session = DashboardPage(records, theme, prefix, writable, search)
    colours = look.colours_of(theme)
    variables = {f"--house-{name}": colour for name, colour in colours.items()}
    variables["--house-font"] = figures.FONT
    variables |= {f"--design-{name}": colours[colour] for name, colour in DESIGN_COLOURS.items()}
    template = pn.Template(
        Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"),
        theme=pn.theme.DarkTheme if theme == "dark" else pn.theme.DefaultTheme,
        location=True,
    )
    template.add_panel("nav", session.nav)
    template.add_panel("controls", session.controls)
    template.add_panel("picture", session.picture)
    template.add_panel("foot", session.foot)
    template.add_panel("presses", session.presses)
    other = "dark" if theme == "light" else "light"
    template.add_variable("heading", "qtx_lab dashboard")
    template.add_variable("variables", " ".join(f"{name}: {value};" for name, value in variables.items()))
    template.add_variable("theme_word", theme)
    template.add_variable("other_theme", other.capitalize())
    template.add_variable("other_theme_word", other)
    pn.state.add_periodic_callback(
        session.tick,  # type: ignore[arg-type]  # it may be a coroutine function
        period=int(1000 * RUNNING_POLL_S),
    )
    return template


def _requested_theme() -> str:
    requested = (pn.state.session_args or {}).get("theme", [b"light"])[0].decode(errors="replace")
    return requested if requested in look.COLOURS else "light"
