"""The view Runs: a table of runs with the settings in which they differ and what they measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import panel as pn
from scipy import special

from ...theme import digits, with_error
from .elements import (
    DRAWING,
    TABLE_ROWS,
    DashboardView,
    empty_note,
    html_pane,
    html_table,
    multi_select,
    select,
    skipped_list,
    status_mark,
)
from .records import Listing
from .settings import RESULT, SPEC, differing, half_width, metric_columns, short_names, value_text
from .view_host import ViewHost

NO_RUNS = """<div class="empty"><h2>No runs yet in <code>{home}</code></h2>
<p>Make the first one: type</p><p><code>qtx-lab demo --home {home}</code></p>
<p>in a terminal, or run the notebook <code>00_quickstart</code> in JupyterLab. It takes less than a minute,
and shows up here by itself.</p></div>"""

MAX_SETTINGS, MAX_METRICS = 4, 2
"""Columns that are shown where none are chosen."""

GROUPS = {"sweeps folded": "sweep", "seeds averaged": "settings", "every run": "run"}
"""How runs are put together in a row, by the words for it."""


@dataclass(frozen=True)
class RunGroup:
    """A row of the table: one run, or several that are put together."""

    leader: Any
    """The run that the row shows: a sweep's own run, else the newest."""
    members: pd.DataFrame
    """All runs of the row, without a sweep's own."""


@dataclass(frozen=True)
class RunsPage:
    """What one page of the table shows."""

    listing: Listing
    count: int
    """Number of rows on all pages."""
    start: int
    groups: Sequence[RunGroup]
    columns: Sequence[str]
    """Settings and metrics that are shown."""
    offered: Mapping[str, str]
    """Columns that can be chosen, by their labels."""


class RunsView(DashboardView):
    """A table of all runs that pass the filters, newest first unless a column is chosen to sort by."""

    def __init__(self, page: ViewHost):
        self._first_row, self._sort, self._ticked = 0, "", list[str]()
        self._opened, self._clock = "", ""
        self._group = select(label="Rows", options=GROUPS)
        self._columns = multi_select("Columns", none="automatic")
        self._table, self._range, self._tools = html_pane(DRAWING), html_pane(), html_pane()
        self._newer, self._older = (
            pn.widgets.Button(label=name, width=110) for name in ("◀ Newer", "Older ▶")
        )
        self._newer.on_click(partial(self._turn_page, -TABLE_ROWS))
        self._older.on_click(partial(self._turn_page, TABLE_ROWS))
        self._pages = pn.Row(self._newer, self._older, self._range, align="center")
        controls = {"rows": self._group, "columns": self._columns}
        super().__init__(page, [self._tools, self._table, self._pages], controls)

    # --- State ----------------------------------------------------------------------------------------

    def state(self) -> Any:
        """The controls, the order, the page, and what is ticked and opened."""
        return super().state(), self._first_row, self._sort, tuple(self._ticked), self._opened

    def query(self) -> dict[str, str]:
        """The state, as the address has it."""
        own = {
            "from": str(self._first_row) if self._first_row else "",
            "sort": self._sort,
            "ticked": "/".join(self._ticked),
            "opened": self._opened,
        }
        return super().query() | {name: text for name, text in own.items() if text}

    def apply(self, query: Mapping[str, str]) -> None:
        """Take the state from an address."""
        super().apply(query)
        first = query.get("from", "0")
        self._first_row = int(first[:9]) // TABLE_ROWS * TABLE_ROWS if first.isdecimal() else 0
        self._sort, self._opened = query.get("sort", ""), query.get("opened", "")
        self._ticked = [run for run in query.get("ticked", "").split("/") if run]

    def toggle(self, run: str) -> None:
        """Tick a run, or untick it if it is ticked."""
        if run in self._ticked:
            self._ticked.remove(run)
        else:
            self._ticked.append(run)

    async def _turn_page(self, step: int, event: Any) -> None:
        self._first_row = max(0, self._first_row + step)
        await self.page.on_change(event)

    # --- What is shown --------------------------------------------------------------------------------

    def prepare(self, listing: Listing, rows: pd.DataFrame) -> RunsPage:
        """Put runs together, sort them, and take the page that is shown."""
        settings, metrics = differing(rows), metric_columns(rows)
        offered = {name: c for c, name in short_names([*metrics, *settings]).items()}
        chosen = [c for c in self._columns.value if c in offered.values()]
        automatic = [c for c in settings if c != f"{SPEC}notebook"]  # the run's name says it
        columns = chosen or [*automatic[:MAX_SETTINGS], *metrics[:MAX_METRICS]]
        if rows.empty:
            return RunsPage(listing, 0, 0, [], columns, offered)
        keys = _group_keys(rows, self._group.value)
        codes, names = pd.factorize(keys)
        order = _order(rows, codes, len(names), self._sort)
        start = min(self._first_row, (len(names) - 1) // TABLE_ROWS * TABLE_ROWS)
        groups = []
        for code in order[start : start + TABLE_ROWS]:
            members = rows.iloc[np.flatnonzero(codes == code)]
            own = members[members["run"] == names[code]] if self._group.value == "sweep" else members[:0]
            leader = members.iloc[0] if own.empty else own.iloc[0]
            rest = members.drop(own.index)
            groups.append(RunGroup(leader, members if rest.empty else rest))
        return RunsPage(listing, len(names), start, groups, columns, offered)

    def show(self, data: RunsPage) -> None:
        """Show one page of the table, or what to do where it is empty."""
        if self._columns.options != data.offered:
            self._columns.options = dict(data.offered)
        self._pages.visible = data.count > TABLE_ROWS
        self._tools.object = self._tick_line() if len(data.listing.table) else ""
        skipped = skipped_list(data.listing.skipped)
        if data.listing.table.empty:
            self._table.object = NO_RUNS.format(home=escape(str(self.page.records.home))) + skipped
        elif not data.count:
            self._table.object = empty_note("No run passes the filters", "Loosen them on the left.")
        else:
            self._first_row = data.start
            several_years = data.listing.table["started"].dt.year.nunique() > 1
            self._clock = "%Y-%m-%d<br>%H:%M" if several_years else "%m-%d %H:%M"
            lines = [line for group in data.groups for line in self._lines(group, data.columns)]
            table = html_table(self._headings(data.columns), lines)
            self._table.object = f"<div class='wide' tabindex='0'>{table}</div>{skipped}"
            shown = f"{data.start + 1}–{data.start + len(data.groups)} of {data.count}"
            self._range.object = shown
            self._newer.disabled = data.start == 0
            self._older.disabled = data.start + TABLE_ROWS >= data.count

    def _tick_line(self) -> str:
        """What can be done with the runs that are ticked."""
        count = len(self._ticked)
        if not count:
            return "<p class='note'>Tick two runs to see them side by side.</p>"
        none = f"<a href='{escape(self.page.link(ticked=None))}'>untick all</a>"
        if count != 2:
            hint = "tick one more" if count == 1 else "leave two"
            return f"<p class='note'>{count} ticked: {hint} to see them side by side, or {none}.</p>"
        link = self.page.link(view="Compare")
        return f"<p><a href='{escape(link)}'><b>Compare the two ticked runs</b></a>, or {none}.</p>"

    def _headings(self, columns: Sequence[str]) -> dict[str, str]:
        """The headings of the table, each a link that sorts by it."""
        names = {"": ("<span class='note'>✓</span>", "")}
        known = [("started", "started (UTC)", ""), ("name", "name", ""), ("status", "status", "")]
        short = short_names(columns)
        known += [(c, short[c], "number" if c.startswith(RESULT) else "") for c in columns]
        known += [("seconds", "seconds", "number"), ("seed", "seed", "number")]
        headings = dict(names.values())
        for column, name, css_class in known:
            now = self._sort.removeprefix("-") == column
            down = self._sort.startswith("-")
            turned = f"-{column}" if now and not down else column
            link = self.page.link(sort=turned, **{"from": None})
            arrow = (" ▼" if down else " ▲") if now else ""
            key = escape(f"sort {column}")
            words = f"title='Sort by {escape(name)}'>{escape(name).replace('_', '_<wbr>')}{arrow}"
            headings[f"<a href='{escape(link)}' data-key='{key}' {words}</a>"] = css_class
        return headings | {"report": ""}

    def _lines(self, group: RunGroup, columns: Sequence[str]) -> list[str]:
        """The row of a group, and those of its members where it is opened."""
        lines = [self._line(group.leader, group, columns)]
        if self._opened and group.leader["run"] == self._opened and len(group.members) > 1:
            lines += [
                self._line(row, RunGroup(row, row.to_frame().T), columns, member=True)
                for _, row in group.members.iterrows()
            ]
        return lines

    def _line(self, row: Any, group: RunGroup, columns: Sequence[str], member: bool = False) -> str:
        run, error = str(row["run"]), row.get("error")
        why = f"<span class='why'>{escape(error[:300])}</span>" if isinstance(error, str) else ""
        several = len(group.members) > 1 or (len(group.members) == 1 and group.members.index[0] != row.name)
        started = "" if pd.isna(row["started"]) else row["started"].strftime(self._clock)
        cells = [
            f"<td>{self._tick(run)}</td>",
            f"<td class='time'>{started}</td>",
            f"<td>{self._name(row)}{self._count(group) if several else ''}</td>",
            f"<td>{status_mark(row['status'])}{_ends(group) if several else why}</td>",
            *(_cell(group, column, several) for column in columns),
            _number_cell(group, "seconds", several),
            f"<td class='number'>{_seeds(group, row)}</td>",
            f"<td>{self._report(row)}</td>",
        ]
        return f"<tr{' class=member' if member else ''}>{''.join(cells)}</tr>"

    def _tick(self, run: str) -> str:
        checked = " checked" if run in self._ticked else ""
        name = escape(run)
        return (
            f"<input type='checkbox'{checked} data-run='{name}' data-key='tick {name}' "
            f"aria-label='Compare {name}'>"
        )

    def _name(self, row: Any) -> str:
        link = self.page.link(view="Run", run=row["run"])
        tags = "".join(f" <span class='tag'>{escape(tag)}</span>" for tag in row.get("tags") or ())
        note = row.get("note") or ""
        note = f"<span class='why'>{escape(note[:80])}{'…' if len(note) > 80 else ''}</span>" if note else ""
        name, run = escape(str(row["name"])), escape(str(row["run"]))
        return f"<a href='{escape(link)}' title='{run}'>{name}</a>{tags}{note}"

    def _count(self, group: RunGroup) -> str:
        """How many runs a row stands for, as a link that shows them."""
        count, run = len(group.members), str(group.leader["run"])
        if self._group.value == "sweep":
            link = self.page.link(contains=f"sweep={run}", rows="settings", **{"from": None})
        else:
            link = self.page.link(opened=None if run == self._opened else run)
        return f" <a href='{escape(link)}' data-key='{escape(f'open {run}')}'>{count} runs</a>"

    def _report(self, row: Any) -> str:
        if not row["report"]:
            return "<span class='note' title='none yet'>–</span>"
        return (
            f"<a href='{escape(self.page.report_link(row['run']))}' target='_blank' rel='noopener' "
            f"aria-label='Report of {escape(row['run'])}'>report</a>"
        )


def _group_keys(rows: pd.DataFrame, group: str) -> pd.Series:
    """What the runs of a row have in common: a sweep's name, settings, or nothing but the run itself."""
    if group == "sweep" and "sweep" in rows:
        return rows["sweep"].where(rows["sweep"].notna(), rows["run"])
    return rows[group if group in rows else "run"]


def _order(rows: pd.DataFrame, codes: np.ndarray, count: int, sort: str) -> np.ndarray:
    """The groups in the order of a column: by the mean of numbers, else by the newest run's text."""
    column = sort.removeprefix("-")
    if column not in rows:
        return np.arange(count)
    numeric = pd.api.types.is_numeric_dtype(rows[column])
    values = rows[column].astype("float64") if numeric else rows[column]
    if not numeric and column != "started":
        numbers = pd.to_numeric(rows[column], errors="coerce")
        numeric = bool((numbers.notna() == rows[column].notna()).all())
        values = numbers if numeric else rows[column].map(value_text).replace("", None)
    grouped = values.groupby(codes)
    keys = grouped.mean() if numeric else grouped.first()
    return keys.sort_values(ascending=not sort.startswith("-"), kind="stable", na_position="last").index


def _seeds(group: RunGroup, row: Any) -> str:
    seeds = group.members["seed"].dropna().unique() if "seed" in group.members else []
    if len(seeds) > 1:
        return f"{len(seeds)} seeds"
    return "" if pd.isna(row["seed"]) else str(row["seed"])


def _ends(group: RunGroup) -> str:
    counts = group.members["status"].value_counts()
    if len(counts) == 1 and counts.index[0] == group.leader["status"]:
        return ""
    return f"<span class='why'>{', '.join(f'{n} {escape(str(name))}' for name, n in counts.items())}</span>"


def _cell(group: RunGroup, column: str, several: bool) -> str:
    """A setting or a metric of a group."""
    if column.startswith(RESULT) and pd.api.types.is_numeric_dtype(group.members[column].infer_objects()):
        return _number_cell(group, column, several)
    values = group.members[column].dropna().map(value_text)
    texts = list(dict.fromkeys(values)) or [value_text(group.leader.get(column))]
    text = texts[0] if len(texts) == 1 else f"{len(texts)} values"
    return f"<td title='{escape(', '.join(texts)[:300])}'>{escape(text)}</td>"


def _number_cell(group: RunGroup, column: str, several: bool) -> str:
    """A number: of one run with its own interval, of runs that differ in the seed with that of their mean."""
    values = pd.to_numeric(group.members[column], errors="coerce").dropna().astype("float64")
    if values.empty:
        values = pd.Series([pd.to_numeric(group.leader.get(column), errors="coerce")]).dropna()
    if values.empty:
        return "<td class='number'></td>"

    def number(value: float) -> str:
        return digits(value, 3 if column == "seconds" else 4)

    if not several or len(values) == 1:
        width = half_width(group.members.iloc[0], column) if len(values) == 1 else np.nan
        text = with_error(values.iloc[0], width) if width > 0 else number(values.iloc[0])
        return f"<td class='number'>{text}</td>"
    if "settings" in group.members and group.members["settings"].nunique() == 1:
        width = special.stdtrit(len(values) - 1, 0.975) * values.std() / np.sqrt(len(values))
        title = f"Mean of {len(values)} runs that differ in nothing but the seed, with its 95 % interval"
        text = with_error(values.mean(), width) if width > 0 else f"{number(values.mean())} ± 0"
        return f"<td class='number' title='{title}'>{text}</td>"
    low, high = number(values.min()), number(values.max())
    title = f"Smallest and largest of {len(values)} runs"
    text = low if low == high else f"{low}&nbsp;– {high}"
    return f"<td class='number range' title='{title}'>{text}</td>"
