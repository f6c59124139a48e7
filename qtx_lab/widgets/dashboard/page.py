"""The dashboard's page: one for each session, with a view for each question; it reads and never writes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import holoviews as hv
import numpy as np
import pandas as pd
import panel as pn

from ... import theme as look
from ...errors import QtxError
from ...experiments.runs import STATUSES
from . import figures, maps
from .records import PERIOD, Listing, Records, Rows

PAGE = 20
"""Rows of a table shown at once."""

SOON = 0.3
"""Seconds after which a picture that is being prepared is shown to be."""

FOLLOWED = 8
"""Runs whose curves are drawn while they are written: as many as there are colours."""

SLIDER = """
.noUi-target { background: var(--house-line); border-color: var(--house-line); }
:host .noUi-connects .noUi-connect { background: var(--house-accent); } .noUi-handle { background: var(--house-background); }
.noUi-handle:focus-visible { outline: 2px solid var(--house-accent); outline-offset: 2px; }
"""

SELECT = """
select:not([multiple]).bk-input { appearance: auto; background-image: none; } select[multiple].bk-input { padding: 0; }
select[multiple].bk-input option { padding: 1px 10px; }
"""

WIDTH = 196
"""Pixels of a control."""

WINDOWS = {"any time": None, "last hour": 3600, "last day": 86_400, "last week": 604_800}

Skipped = tuple[tuple[str, str], ...]
"""(folder, why) of what could not be read."""

CSS = """
:host, :host * { font-family: var(--house-font); }
:host { font-size: 14px; line-height: 1.45; color: var(--house-text); }
h2 { font-size: 16px; margin: 0 0 4px; } p { margin: 0 0 8px; } .note { color: var(--house-muted); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--house-muted); }
th, td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--house-line); vertical-align: top; }
td.number, th.number { text-align: right; } td.folder { overflow-wrap: anywhere; }
.status::before { content: "●"; margin-right: 6px; color: var(--mark); }
.done { --mark: #009E73; } .running { --mark: var(--house-accent); } .failed { --mark: #D55E00; }
.interrupted { --mark: #E69F00; }
.why { display: block; color: var(--house-muted); font-size: 13px; overflow-wrap: anywhere; }
code { background: var(--house-panel); padding: 2px 6px; border-radius: 4px; overflow-wrap: anywhere; }
a { color: var(--house-accent); } a:focus-visible, summary:focus-visible { outline: 2px solid var(--house-accent); }
.empty { padding: 28px 0; max-width: 62ch; } .warning { border-left: 4px solid #E69F00; padding: 6px 12px; }
"""
"""Of the HTML parts, which live in shadow roots; variables come from the page."""

NAV = """
.bk-btn-group { border: 0; } .bk-btn { font: 500 14px var(--house-font); border: 0; background: transparent;
  color: var(--house-text); border-radius: 6px; padding: 6px 12px; box-shadow: none; }
:host .bk-btn-group .bk-btn.bk-active { background: var(--house-accent); color: var(--house-background); box-shadow: none; }
.bk-btn:focus-visible { outline: 2px solid var(--house-accent); outline-offset: 2px; }
"""

NO_RUNS = """<div class="empty"><h2>No runs yet in <code>{home}</code></h2>
<p>Make the first one: type</p><p><code>qtx-lab demo --home {home}</code></p>
<p>in a terminal, or run the notebook <code>00_quickstart</code> in JupyterLab. It takes less than a minute, and
shows up here by itself.</p></div>"""


DRAWING = "<p class='note' role='status'>Reading and drawing …</p>"
"""Before the first picture."""


@dataclass
class View:
    """A question that the dashboard answers.

    Parameters
    ----------
    controls : list
        What stands in the left column, below the filters of runs where `of_runs`.
    body : pn.Column
    prepare : callable
        (listing, filtered table) -> data, in a thread, so that a slow disk stops nobody.
    show : callable
        Puts the data on the page.
    state : callable
        What else the data hang on; they are prepared anew when it changes.
    """

    controls: list[Any]
    body: Any
    prepare: Callable[[Listing, pd.DataFrame], Any]
    show: Callable[[Any], None]
    state: Callable[[], Any] = lambda: None
    of_runs: bool = True


@dataclass
class Page:
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
    followed: dict[str, None] = field(default_factory=dict)
    """Runs that were seen running, which stay on the page when they end."""

    def __post_init__(self) -> None:
        self.views = {
            "Runs": _runs_view(self),
            "Live": _live_view(self),
            "Error": _error_view(self),
            "Heads": _heads_view(self),
            "Devices": _devices_view(self),
            "Maps": _maps_view(self),
            "Jobs": _jobs_view(self),
        }
        self.nav = pn.widgets.RadioButtonGroup(options=list(self.views), value="Runs", stylesheets=[NAV])
        self.text = pn.widgets.TextInput(label="Run contains", placeholder="part of its name", width=WIDTH)
        self.status = pn.widgets.CheckBoxGroup(options=list(STATUSES), value=list(STATUSES))
        self.since = _select(label="Started", options=list(WINDOWS))
        filters = [
            self.text,
            pn.widgets.StaticText(value="Status", margin=(10, 10, 0, 10)),
            self.status,
            self.since,
        ]
        # All are made at once, and shown or hidden: what Panel puts back after taking it away has lost its style.
        self.boxes = {name: pn.Column(*view.controls, margin=0) for name, view in self.views.items()}
        self.of_runs = pn.Column(*filters, margin=0)
        self.controls = pn.Column(self.of_runs, *self.boxes.values(), width=WIDTH + 4)
        self.picture = pn.Column(*(view.body for view in self.views.values()), sizing_mode="stretch_width")
        self.foot = _html("")
        self._shown: Any = None
        self._busy = False
        for widget in (self.nav, self.status, self.since):
            widget.param.watch(self._touched, "value")
        self.text.param.watch(self._touched, "value_input")
        self._place()
        self._refresh_now()

    # --- What keeps it fresh ---------------------------------------------------------------------

    async def _touched(self, event: Any) -> None:
        if event.obj is self.nav:
            self._place()
        await self.refresh()

    def _place(self) -> None:
        self.of_runs.visible = self.view.of_runs
        for name, view in self.views.items():
            self.boxes[name].visible = view.body.visible = name == self.nav.value

    @property
    def view(self) -> View:
        """The one that is open."""
        return self.views[self.nav.value]

    def _asked(self) -> tuple[Any, ...]:
        """All that the open view hangs on."""
        listing = self.records.listing
        window = WINDOWS[self.since.value]
        moving = int(time.time() / 30) if window else None
        chosen = (self.text.value_input, tuple(self.status.value), self.since.value, moving)
        return (self.nav.value, listing.number, chosen, self.view.state())

    def filtered(self, listing: Listing) -> pd.DataFrame:
        """The runs that the filters leave, newest first."""
        table = listing.table
        if table.empty:
            return table
        text = (self.text.value_input or "").strip().lower()
        keep = table["status"].isin(self.status.value)
        keep &= table["run"].str.lower().str.contains(text, regex=False)
        if (window := WINDOWS[self.since.value]) is not None:
            keep &= (pd.Timestamp.now(tz="UTC") - table["started"]).dt.total_seconds() <= window
        return table[keep]

    async def refresh(self) -> None:
        """Prepare and show the open view anew, if anything that it hangs on has changed."""
        if self._busy:
            return
        self._busy = True
        try:
            while (asked := self._asked()) != self._shown:
                view, listing, trouble = self.view, self.records.listing, ""
                try:
                    reading = asyncio.create_task(
                        asyncio.to_thread(view.prepare, listing, self.filtered(listing))
                    )
                    await asyncio.wait({reading}, timeout=SOON)
                    self.picture.loading = not reading.done()  # the last picture, dimmed
                    data = await reading
                    if view is self.view:
                        view.show(data)
                except Exception as error:  # a run folder may hold anything: the other views go on
                    logging.getLogger(__name__).exception("A view could not be drawn")
                    trouble = f"This view could not be drawn: {type(error).__name__}: {error}. The picture is an older one."
                self.picture.loading = False
                self._say(listing, trouble)
                self._shown = asked
        finally:
            self._busy = False

    def _refresh_now(self) -> None:
        """The first picture, before the page is sent."""
        asked, view, listing = self._asked(), self.view, self.records.listing
        view.show(view.prepare(listing, self.filtered(listing)))
        self._say(listing)
        self._shown = asked

    def _say(self, listing: Listing, trouble: str = "") -> None:
        table = listing.table
        running = int((table["status"] == "running").sum()) if len(table) else 0
        parts = [
            f"<code>{escape(str(self.records.home))}</code>",
            f"{len(table)} runs, {running} running",
            f"{len(listing.skipped)} skipped" if listing.skipped else "",
            "read only",
        ]
        if listing.trouble:
            trouble = f"{listing.trouble} Shown is what was read before."
        warning = f"<p class='warning' role='alert'>{escape(trouble)}</p>" if trouble else ""
        self.foot.object = warning + " · ".join(filter(None, parts))

    def report_link(self, run: str) -> str:
        """Where the server shows a run's report."""
        return f"{self.prefix}/report/{quote(run, safe='')}"


def _html(text: str) -> Any:
    return pn.pane.HTML(text, stylesheets=[CSS], sizing_mode="stretch_width", margin=0)


def page(records: Records, prefix: str = "") -> Any:
    """The page of a new session: what `panel.serve` calls."""
    theme = _asked_theme()
    made = Page(records, theme, prefix)
    colours = look.colours_of(theme)
    other = "dark" if theme == "light" else "light"
    design = {"primary-color": "accent", "primary-text-color": "background", "background-color": "background"}
    design |= {"background-text-color": "text", "surface-color": "panel", "surface-text-color": "text"}
    variables = {f"--house-{key}": value for key, value in colours.items()}
    variables["--house-font"] = figures.FONT
    variables |= {f"--design-{key}": colours[value] for key, value in design.items()}
    template = pn.Template(
        Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"),
        theme=pn.theme.DarkTheme if theme == "dark" else pn.theme.DefaultTheme,
    )
    for name in ("nav", "controls", "picture", "foot"):
        template.add_panel(name, getattr(made, name))
    template.add_variable("heading", "qtx_lab dashboard")
    template.add_variable("variables", " ".join(f"{key}: {value};" for key, value in variables.items()))
    template.add_variable("theme_word", theme)
    template.add_variable("other_theme", other.capitalize())
    template.add_variable("other_theme_url", f"?theme={other}")
    pn.state.add_periodic_callback(made.refresh, period=int(1000 * PERIOD))  # type: ignore[arg-type]  # may be async
    return template


def _asked_theme() -> str:
    given = (pn.state.session_args or {}).get("theme", [b"light"])[0].decode(errors="replace")
    return given if given in look.COLOURS else "light"


# --- Runs -------------------------------------------------------------------------------------------


def _runs_view(page: Page) -> View:
    table, first = _html(""), {"row": 0}
    back, on = (pn.widgets.Button(label=name, width=110) for name in ("◀ Newer", "Older ▶"))
    place = _html("")

    async def turn(step: int, event: Any) -> None:
        first["row"] = max(0, first["row"] + step * PAGE)
        await page._touched(event)

    back.on_click(partial(turn, -1))
    on.on_click(partial(turn, 1))

    def show(data: tuple[Listing, pd.DataFrame]) -> None:
        listing, rows = data
        if listing.table.empty:
            table.object = NO_RUNS.format(home=escape(str(page.records.home))) + _skipped(listing.skipped)
        elif rows.empty:
            table.object = (
                "<div class='empty'><h2>No run passes the filters</h2><p>Loosen them on the left.</p></div>"
            )
        else:
            start = first["row"] = min(first["row"], (len(rows) - 1) // PAGE * PAGE)
            shown = rows.iloc[start : start + PAGE]
            table.object = _runs_table(page, shown) + _skipped(listing.skipped)
            place.object = f"{start + 1}–{start + len(shown)} of {len(rows)}"
            back.disabled, on.disabled = start == 0, start + PAGE >= len(rows)
        pages.visible = len(rows) > PAGE

    pages = pn.Row(back, on, place, align="center")
    body = pn.Column(table, pages, sizing_mode="stretch_width")
    return View([], body, lambda listing, rows: (listing, rows), show, lambda: first["row"])


def _runs_table(page: Page, rows: pd.DataFrame) -> str:
    lines = []
    for row in rows.itertuples():
        why = f"<span class='why'>{escape(str(row.error)[:300])}</span>" if isinstance(row.error, str) else ""
        seconds = "" if row.seconds != row.seconds else f"{row.seconds:.1f}"
        report = (
            f"<a href='{escape(page.report_link(row.run))}' target='_blank' rel='noopener' "
            f"aria-label='Report of {escape(row.run)}'>report</a>"
            if row.report
            else "<span class='note'>none yet</span>"
        )
        started = "" if pd.isna(row.started) else f"{row.started:%Y-%m-%d %H:%M:%S}"
        seed = "" if pd.isna(row.seed) else str(row.seed)
        lines.append(
            f"<tr><td>{started}</td><td>{escape(row.name)}</td>"
            f"<td><span class='status {escape(row.status)}'>{escape(row.status)}</span>{why}</td>"
            f"<td class='number'>{seconds}</td><td class='number'>{seed}</td><td>{report}</td>"
            f"<td class='folder note'>{escape(row.run)}</td></tr>"
        )
    return (
        "<table><thead><tr><th>started (UTC)</th><th>name</th><th>status</th><th class='number'>seconds</th>"
        f"<th class='number'>seed</th><th>report</th><th>folder</th></tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _skipped(skipped: Skipped) -> str:
    if not skipped:
        return ""
    lines = "".join(
        f"<li><code>{escape(name)}</code>: {escape(why)}</li>" for name, why in skipped[: 5 * PAGE]
    )
    return f"<details class='note'><summary>{len(skipped)} skipped: not readable</summary><ul>{lines}</ul></details>"


# --- Live -------------------------------------------------------------------------------------------

ACROSS = ("step", "epoch", "shots", "num_samples")
"""What a live curve is drawn against: the first of these that a run has, else the number of the row."""

NOT_DRAWN = {*ACROSS, "layer", "head", "seed", "half_width", "row", "run", "name", "time"}


def _live_view(page: Page) -> View:
    top, charts = _html(""), pn.FlexBox(sizing_mode="stretch_width")
    drawn: dict[str, Any] = {"key": None, "pipes": {}}

    def runs_now() -> list[str]:
        table = page.filtered(page.records.listing)
        if table.empty:
            return []
        page.followed |= dict.fromkeys(table["run"][table["status"] == "running"])
        return [run for run in table["run"] if run in page.followed][:FOLLOWED]

    def state() -> Any:
        return tuple((run, page.records.mark(run)) for run in runs_now())

    def prepare(listing: Listing, rows: pd.DataFrame) -> Any:
        sweeps = _sweeps_told(listing.table, [run for run in page.followed if run in set(rows["run"])])
        found: dict[str, tuple[Any, Any]] = {}
        for row in rows.itertuples():
            if row.run in page.followed and len(found) < FOLLOWED:
                try:
                    found[row.run] = (row, page.records.metrics(row.run))
                except QtxError as error:
                    found[row.run] = (row, error)
        return sweeps, found

    def show(data: tuple[str, dict[str, tuple[Any, Any]]]) -> None:
        sweeps, found = data
        if not found:
            top.object = (
                "<div class='empty'><h2>Nothing is running</h2><p>Runs that are being written show their curves here, "
                "twice a second: start one with <code>qtx-lab run</code>, <code>qtx-lab sweep</code> or "
                "<code>qtx-lab train</code>.</p></div>"
            )
            charts.objects, drawn["key"] = [], None
            return
        colours = dict(zip(found, figures.curve_colours(page.theme, len(found)), strict=True))
        top.object = sweeps + _running_table(found, colours)
        frames = {run: frame for run, (_, frame) in found.items() if isinstance(frame, pd.DataFrame)}
        curves = _curves(frames)
        key = (tuple(found), {chart: tuple(lines) for chart, lines in curves.items()})
        if key != drawn["key"]:
            drawn.update(key=key, pipes={})
            panes = []
            for (metric, across), lines in curves.items():
                pipe = drawn["pipes"][metric, across] = hv.streams.Pipe(data=lines)
                draw = partial(
                    figures.live_curves, colours=colours, x=across, metric=metric, theme=page.theme
                )
                picture = hv.DynamicMap(lambda data, draw=draw: draw(data), streams=[pipe])
                panes.append(pn.pane.HoloViews(picture, margin=(6, 12, 6, 0), linked_axes=False))
            charts.objects = panes
        else:
            for chart, lines in curves.items():
                drawn["pipes"][chart].send(lines)

    body = pn.Column(top, charts, sizing_mode="stretch_width")
    return View([], body, prepare, show, state)


def _sweeps_told(table: pd.DataFrame, followed: list[str]) -> str:
    """How far the sweeps among these runs are."""
    lines = []
    for _, row in table[table["run"].isin(followed) & (table["kind"] == "SweepSpec")].iterrows():
        asked, kept = (
            pd.to_numeric(row.get(f"results.{name}"), errors="coerce") for name in ("notebooks", "kept")
        )
        counts = table["status"][table["sweep"] == row["run"]].value_counts()
        ended = counts.sum() - counts.get("running", 0)
        if not asked > 0:  # before it has said, or what it says is no number
            continue
        left, kept = "", 0 if pd.isna(kept) else int(kept)
        if row["status"] == "running" and ended:
            since = (datetime.now(UTC) - row["started"]).total_seconds()
            left = f"; about {since / ended * (asked - kept - ended):.0f} s left"
        told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if status in counts)
        lines.append(
            f"<p><b>{escape(str(row['name']))}</b>: {kept + ended:.0f} of {asked:.0f} notebooks have ended ({escape(told)}"
            f"{f', {kept} from earlier sweeps' if kept else ''}){left} <progress max='{asked:.0f}' value='{kept + ended:.0f}' "
            f"aria-label='Progress of {escape(row['run'])}'></progress></p>"
        )
    return "".join(lines)


def _curves(frames: dict[str, pd.DataFrame]) -> dict[tuple[str, str], dict[str, Any]]:
    """{(metric, against): {run: (x, y)}}, rows with the same x averaged, of at most six metrics."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for run, frame in frames.items():
        across = next((x for x in ACROSS if x in frame and len(figures.numbers(frame, x))), "row")
        frame = frame.assign(row=np.arange(len(frame))) if across == "row" else frame
        for metric in frame.columns:
            numeric = pd.api.types.is_numeric_dtype(frame[metric]) and not pd.api.types.is_bool_dtype(
                frame[metric]
            )
            if metric in NOT_DRAWN or not numeric:
                continue
            mean = figures.numbers(frame[[across, metric]], across, metric).groupby(across)[metric].mean()
            if len(mean) and ((metric, across) in found or len(found) < 6):
                found.setdefault((metric, across), {})[run] = (mean.index.to_numpy(), mean.to_numpy())
    return found


def _running_table(found: dict[str, tuple[Any, Any]], colours: dict[str, str]) -> str:
    lines = []
    for run, (row, frame) in found.items():
        if isinstance(frame, Exception):
            told = f"<span class='why'>metrics cannot be read: {escape(str(frame))}</span>"
        elif frame.empty:
            told = "nothing measured yet"
        else:
            last = frame.iloc[-1].dropna()
            numbers = [
                f"{key} {value:.4g}"
                for key, value in last.items()
                if isinstance(value, int | float | np.number)
            ]
            told = f"{len(frame)} rows; last: {escape(', '.join(numbers[:6]))}"
        since = (
            (datetime.now(UTC) - row.started.to_pydatetime()).total_seconds()
            if row.status == "running"
            else row.seconds
        )
        lines.append(
            f"<tr><td><span class='status {escape(row.status)}'>{escape(row.status)}</span></td>"
            f"<td><b style='color:{colours[run]}'>━</b> {escape(row.name)}</td>"
            f"<td class='number'>{since:.0f}</td><td>{told}</td><td class='folder note'>{escape(run)}</td></tr>"
        )
    return (
        "<table><thead><tr><th>status</th><th>name</th><th class='number'>seconds</th><th>measured</th><th>folder</th></tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


# --- Comparisons ------------------------------------------------------------------------------------


def _figure_view(
    page: Page,
    controls: list[Any],
    gather: Callable[[pd.DataFrame], Any],
    draw: Callable[[Any], tuple[str, str, list[Any], Skipped]],
    empty: str,
    state: Callable[[], Any] = lambda: None,
) -> View:
    """A view of a finding, a caption and figures; `draw` gives nothing where there is nothing to draw."""
    finding, plots, caption = _html(DRAWING), pn.FlexBox(sizing_mode="stretch_width"), _html("")

    def show(data: Any) -> None:
        title, note, pictures, skipped = draw(data)
        if not pictures:
            finding.object, caption.object, plots.objects = (
                f"<div class='empty'>{empty}</div>",
                _skipped(skipped),
                [],
            )
            return
        finding.object = f"<h2>{escape(title)}</h2>"
        plots.objects = [
            pn.pane.HoloViews(
                picture, height=figures.HEIGHT, min_width=420, sizing_mode="stretch_width", linked_axes=False
            )
            for picture in pictures
        ]
        caption.object = f"<p class='note'>{note}</p>{_skipped(skipped)}"

    body = pn.Column(finding, plots, caption, sizing_mode="stretch_width")
    for control in controls:
        control.param.watch(page._touched, "value")
    return View(controls, body, lambda listing, rows: gather(rows), show, state)


def _of(rows: Rows) -> str:
    """What is in a figure, and what is not."""
    runs = rows.frame["run"].nunique()
    left = f" {rows.left_out} older runs are not drawn: narrow the filters." if rows.left_out else ""
    return f"{runs} run{'s' if runs != 1 else ''}.{left}"


def plus_minus(value: float, half_width: float) -> str:
    """With as many digits as the 95 % interval allows."""
    if not half_width > 0:
        return f"{value:.3g}"
    digits = max(0, int(np.ceil(-np.log10(half_width))))
    return f"{value:.{digits}f} ± {half_width:.{digits}f}"


def _select(**options: Any) -> pn.widgets.Select:
    return pn.widgets.Select(width=WIDTH, stylesheets=[SELECT], **options)


def _several(name: str) -> Any:
    return pn.widgets.MultiSelect(
        label=f"{name} (none chosen: all)", options=[], size=5, width=WIDTH, stylesheets=[SELECT]
    )


def _error_view(page: Page) -> View:
    metric = _select(label="Measured", options={"relative error": "error", "bits per byte": "bits_per_byte"})
    samplers = _several("Samplers")

    def gather(table: pd.DataFrame) -> tuple[Rows, str]:
        return page.records.rows(table, "sampler", "num_samples", metric.value), metric.value

    def draw(data: tuple[Rows, str]) -> tuple[str, str, list[Any], Skipped]:
        rows, measured = data
        frame = rows.frame.astype({"sampler": str})
        samplers.options = sorted(set(frame["sampler"]) | set(samplers.value))
        if samplers.value:
            frame = frame[frame["sampler"].isin(samplers.value)]
        frame = figures.positive(frame, "num_samples", measured)
        if frame.empty:
            return "", "", [], rows.skipped
        mean = figures.over_runs(frame, ("sampler", "num_samples"), measured)
        common = mean.groupby("num_samples")["sampler"].nunique()
        at = common[common == common.max()].index.max()
        best = mean[mean["num_samples"] == at].sort_values(measured).iloc[0]
        title = f"With {at:g} draws a row {best['sampler']} is best: {plus_minus(best[measured], best['half_width'])}"
        note = f"Mean of {_of(Rows(frame, (), rows.left_out))} Bars: 95 % intervals, over runs where there are several, else the run's own."
        return title, note, [figures.error_against_draws(frame, measured, page.theme)], rows.skipped

    empty = (
        "<h2>No error against draws yet</h2><p>Runs that measure one log <code>sampler</code>, <code>num_samples</code> and "
        "<code>error</code>: <code>qtx-lab demo</code> makes the first, <code>qtx-lab run 01_estimators</code> a larger one.</p>"
    )
    return _figure_view(
        page, [metric, samplers], gather, draw, empty, lambda: (metric.value, tuple(samplers.value))
    )


def _heads_view(page: Page) -> View:
    run = _select(label="Run", options=[])
    how = _select(label="Sampler and draws", options=[])

    def gather(table: pd.DataFrame) -> Rows:
        return page.records.rows(table, "layer", "head", "variance")

    def draw(rows: Rows) -> tuple[str, str, list[Any], Skipped]:
        frame = figures.numbers(figures.positive(rows.frame, "variance"), "layer", "head")
        _offer(run, {name.partition("-")[2] or name: name for name in dict.fromkeys(frame["run"])})
        frame = frame[frame["run"] == run.value]
        if frame.empty:
            return "", "", [], rows.skipped
        kind = [
            " ".join(
                filter(None, (str(s) if s == s and s is not None else "", f"S = {n:g}" if n == n else ""))
            )
            for s, n in zip(
                frame.get("sampler", pd.Series("", frame.index)),
                pd.to_numeric(frame.get("num_samples", pd.Series(np.nan, frame.index)), errors="coerce"),
                strict=True,
            )
        ]
        frame = frame.assign(kind=kind)
        _offer(how, {kind: kind for kind in frame["kind"]})
        frame = frame[frame["kind"] == how.value]
        step = ""
        if "step" in frame and len(steps := figures.numbers(frame, "step")):
            frame = steps[steps["step"] == steps["step"].max()]
            step = f", step {frame['step'].iloc[0]:.0f}"
        worst = frame.loc[frame["variance"].idxmax()]
        ratio = worst["variance"] / frame["variance"].median()
        title = f"Layer {worst['layer']:.0f}, head {worst['head']:.0f} is the hardest: {ratio:.2g}× the median variance"
        note = f"Run {escape(str(run.value))}{', ' + escape(str(how.value)) if how.value else ''}{step}. {len(frame)} heads."
        return title, note, [figures.variance_by_head(frame, page.theme)], rows.skipped

    empty = (
        "<h2>No variance by head yet</h2><p>Runs that measure it log <code>layer</code>, <code>head</code> and "
        "<code>variance</code>: <code>qtx-lab demo</code> makes the first.</p>"
    )
    return _figure_view(page, [run, how], gather, draw, empty, lambda: (run.value, how.value))


def _offer(select: Any, options: dict[str, str]) -> None:
    """New options of a select, values by what they are called; what was chosen stays where it still is one."""
    if select.options != options:
        values = list(options.values())
        chosen = select.value if select.value in values else (values[0] if values else None)
        select.param.update(options=options, value=chosen)


def _devices_view(page: Page) -> View:
    device = _several("Devices")
    loader = _several("Loaders")

    def gather(table: pd.DataFrame) -> tuple[Rows, Rows]:
        near = page.records.rows(table, "loader", "shots", "distance")
        return near, page.records.rows(table, "loader", "m", "fidelity")

    def chosen(frame: pd.DataFrame) -> pd.DataFrame:
        known = frame["device"] if "device" in frame else pd.Series(np.nan, frame.index)
        frame = frame.assign(
            device=known.astype(object).where(known.notna(), "device not recorded").astype(str),
            loader=frame["loader"].astype(str),
        )
        for widget, column in ((device, "device"), (loader, "loader")):
            widget.options = sorted(set(widget.options) | set(frame[column]))
            if widget.value:
                frame = frame[frame[column].isin(widget.value)]
        return frame

    def draw(data: tuple[Rows, Rows]) -> tuple[str, str, list[Any], Skipped]:
        near = figures.positive(chosen(data[0].frame), "shots", "distance")
        states = figures.positive(chosen(data[1].frame), "m", "fidelity")
        pictures = []
        title = "State fidelity by device and loader"
        if len(near):
            mean = figures.over_runs(near, ("device", "loader", "shots"), "distance")
            best = mean.sort_values("distance").iloc[0]
            title = (
                f"Closest to the row: {best['loader']} on {best['device']}, total variation "
                f"{plus_minus(best['distance'], best['half_width'])} with {best['shots']:,.0f} shots"
            )
            pictures.append(figures.distance_against_shots(near, page.theme))
        if len(states):
            pictures.append(figures.fidelity_against_qubits(states, page.theme))
        note = (
            f"{_of(data[0])} Hollow points: raw counts; bars: 95 % intervals, over runs where there are several. Dashed: as many "
            "pseudo-random draws, which loading a known row has no advantage over."
        )
        return title, note, pictures, data[0].skipped

    empty = (
        "<h2>No circuits measured yet</h2><p>Runs that measure them log <code>loader</code>, <code>shots</code> and "
        "<code>distance</code>: start with <code>qtx-lab run 02_circuits</code>.</p>"
    )
    return _figure_view(
        page, [device, loader], gather, draw, empty, lambda: (tuple(device.value), tuple(loader.value))
    )


# --- Maps -------------------------------------------------------------------------------------------


def _maps_view(page: Page) -> View:
    draws = pn.widgets.IntSlider(
        label="Draws per row, S", start=1, end=512, value=32, width=WIDTH, stylesheets=[SLIDER]
    )
    sampler = _select(label="Sampler", options=maps.SAMPLER_NAMES, value="systematic")
    layer = _select(label="Layer", options=list(range(6)), value=3)
    head = _select(label="Query head", options=list(range(8)), value=0)
    length = _select(label="Window, bytes", options=list(maps.LENGTHS), value=512)
    controls = [draws, sampler, layer, head, length]
    finding, panes = _html(DRAWING), pn.FlexBox(sizing_mode="stretch_width")
    kept: dict[str, Any] = {"head": None, "canvas": None}

    def state() -> tuple[Any, ...]:
        return (length.value, layer.value, head.value, sampler.value, draws.value)

    def prepare(listing: Listing, rows: pd.DataFrame) -> Any:
        asked = state()
        return asked, maps.attention_maps(*asked)

    def show(data: Any) -> None:
        (size, i, h, name, s), found = data
        if kept["canvas"] is None or kept["head"][0] != size:
            kept["canvas"] = maps.canvas(found, page.theme)
            panes.objects = [
                pn.pane.HoloViews(picture, margin=(0, 6, 0, 0)) for picture in kept["canvas"].pictures
            ]
        else:
            kept["canvas"].show(found, exact=kept["head"] != (size, i, h))
        kept["head"] = (size, i, h)
        finding.object = (
            f"<h2>Layer {i}, head {h}: {s} {escape(name)} draws lie {found.distance:.3f} from the exact row in total variation</h2>"
            f"<p class='note'>Mean over {size} rows of the shipped model on held-out text, causal, seed 0; the head's output is off "
            f"by {found.error:.1%}. A pixel is the mean of the cells under it: zoom in for single ones.</p>"
        )

    body = pn.Column(finding, panes, sizing_mode="stretch_width")
    for control in controls:
        control.param.watch(page._touched, "value")
    return View(controls, body, prepare, show, state, of_runs=False)


# --- Jobs -------------------------------------------------------------------------------------------


def _jobs_view(page: Page) -> View:
    table = _html("")

    def show(jobs: pd.DataFrame) -> None:
        if jobs.empty:
            table.object = (
                "<div class='empty'><h2>No jobs on devices</h2><p>Rows sent to hardware are written down before they are "
                "submitted, and appear here: see the notebook <code>03_hardware</code>.</p></div>"
            )
            return
        lines = "".join(
            f"<tr><td><code>{escape(j.tag)}</code></td><td>{escape(j.run)}</td><td>{escape(j.device)}</td>"
            f"<td>{escape(j.state)}</td><td class='number'>{j.rows:,} × {j.shots:,}</td>"
            f"<td>{escape(j.recorded[:19].replace('T', ' '))}</td></tr>"
            for j in jobs.head(10 * PAGE).itertuples()
        )
        table.object = (
            "<table><thead><tr><th>tag</th><th>run</th><th>device</th><th>state, last known</th>"
            f"<th class='number'>rows × shots</th><th>recorded (UTC)</th></tr></thead><tbody>{lines}</tbody></table>"
            "<p class='note'>No server is asked from here: <code>qtx-lab jobs</code> asks, fetches and cancels.</p>"
        )

    return View(
        [],
        pn.Column(table, sizing_mode="stretch_width"),
        lambda listing, rows: listing.jobs,
        show,
        of_runs=False,
    )
