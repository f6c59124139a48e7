"""What the dashboard's views are made of: their base class, panes of HTML, controls, and their style."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pandas as pd
import panel as pn

from .records import Listing, Skipped
from .view_host import ViewHost

TABLE_ROWS = 20
"""Rows of a table that are shown at once."""

MAX_SKIPPED = 100
"""Folders that could not be read and are named, at most."""

CONTROL_WIDTH = 196
"""Pixels of a control."""

CSS = """
:host, :host * { font-family: var(--house-font); }
:host { font-size: 14px; line-height: 1.45; color: var(--house-text); accent-color: var(--house-accent); }
h2 { font-size: 16px; margin: 0 0 4px; } p { margin: 0 0 8px; } .note { color: var(--house-muted); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--house-muted); }
th, td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--house-line); vertical-align: top; }
td.number, th.number { text-align: right; } .number + :is(td, th):not(.number) { padding-left: 12px; }
td.number, td.time { white-space: nowrap; } td.time { width: 1%; } td.folder { overflow-wrap: anywhere; }
.status::before { content: "●"; margin-right: 6px; color: var(--mark); }
.done { --mark: #009E73; } .running { --mark: var(--house-accent); } .failed { --mark: #D55E00; }
.interrupted { --mark: #E69F00; }
.why { display: block; min-width: 16ch; color: var(--house-muted); font-size: 13px; overflow-wrap: anywhere; }
code { background: var(--house-panel); padding: 2px 6px; border-radius: 4px; overflow-wrap: anywhere; }
a { color: var(--house-accent); }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--house-accent); }
.empty { padding: 28px 0; max-width: 62ch; }
.warning { border-left: 4px solid #E69F00; padding: 6px 12px; }
.narrow table { width: auto; min-width: min(100%, 480px); }
.wide { overflow-x: auto; } .wide td, .wide th { max-width: 24ch; overflow: hidden; text-overflow: ellipsis; }
.wide td.range { white-space: normal; } .wide :is(td, th) { padding-right: 8px; }
th a { color: inherit; text-decoration: none; white-space: nowrap; }
.wide th a { white-space: normal; }
th a:hover { text-decoration: underline; }
tr.member td { background: var(--house-panel); }
.tag { background: var(--house-panel); border: 1px solid var(--house-line); border-radius: 9px;
  padding: 0 7px;  margin-right: 3px; white-space: nowrap; }
h3 { font-size: 14px; margin: 18px 0 4px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px;
  margin: 0; } dt { color: var(--house-muted); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: 8px 0; } summary { cursor: pointer; }
figure { margin: 8px 0 16px; } figure img { max-width: min(100%, 720px); height: auto; display: block; }
.pair table { table-layout: fixed; } .pair :is(td, th) { overflow-wrap: anywhere; }
.pair th:first-child { width: 20%; } .pair th:not(:first-child, :last-child) { width: 28%; }
table + p { margin-top: 8px; }
td code { white-space: nowrap; }
td.differs { font-weight: 600; } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
"""
"""Style of the HTML panes, which live in shadow roots; the variables come from the page."""

SELECT_CSS = """
select:not([multiple]).bk-input { appearance: auto; background-image: none; }
select[multiple].bk-input { padding: 0; }
select[multiple].bk-input option { padding: 1px 10px; }
"""

SLIDER_CSS = """
.noUi-target { background: var(--house-line); border-color: var(--house-line); }
:host .noUi-connects .noUi-connect { background: var(--house-accent); }
.noUi-handle { background: var(--house-background); }
.noUi-handle:focus-visible { outline: 2px solid var(--house-accent); outline-offset: 2px; }
"""

LATE_OPTIONS = "options come with the data"
"""The tag of a select whose options are known once the data are read."""

DRAWING = "<p class='note' role='status'>Reading and drawing …</p>"
"""Shown before the first picture."""


class DashboardView(ABC):
    """A question that the dashboard answers. A view overrides `prepare`, `show` and, where needed, `state`.

    Parameters
    ----------
    page : ViewHost
    body : list
        What stands on the right, from top to bottom.
    controls : mapping
        What stands in the left column, below the filters of runs, by names that the page's address has.
    """

    uses_run_filters = True
    """Whether the filters of runs are shown above the controls."""

    parent = ""
    """The view that one comes from and goes back to; "" for a view that the navigation offers."""

    def __init__(self, page: ViewHost, body: Sequence[Any], controls: Mapping[str, Any] | None = None):
        self.page, self.controls = page, dict(controls or {})
        self.body = pn.Column(*body, sizing_mode="stretch_width")
        self.side: list[Any] = []
        """What stands below the controls."""
        self._defaults = {name: control.value for name, control in self.controls.items()}
        for control in self.controls.values():
            control.param.watch(page.on_change, "value")

    def query(self) -> dict[str, str]:
        """What the page's address says of this view: the controls that are not as they were at first."""
        values = {name: control.value for name, control in self.controls.items()}
        changed = {name: x for name, x in values.items() if x is not None and x != self._defaults[name]}
        return {name: "/".join(map(str, x)) if isinstance(x, list) else str(x) for name, x in changed.items()}

    def apply(self, query: Mapping[str, str]) -> None:
        """Set the view to what an address says; what is not allowed is left at its default."""
        for name, control in self.controls.items():
            set_control(control, query.get(name), self._defaults[name])

    @abstractmethod
    def prepare(self, listing: Listing, rows: pd.DataFrame) -> Any:
        """Read what is shown, in a thread, so that a slow disk stops nobody.

        Parameters
        ----------
        listing : Listing
            The folder as it is now.
        rows : DataFrame
            The runs that pass the filters, newest first.
        """

    @abstractmethod
    def show(self, data: Any) -> None:
        """Put on the page what `prepare` returned."""

    def state(self) -> Any:
        """What `prepare` depends on besides folder and filters: it is called again when this changes."""
        return tuple(
            tuple(control.value) if isinstance(control.value, list) else control.value
            for control in self.controls.values()
        )


def set_control(control: Any, text: str | None, default: Any) -> None:
    """Give a control the value that an address names, or its default where the address names none.

    A choice that is not offered yet is added: `offer` takes it away again if the data do not have it.
    """
    value: Any = default
    if text is not None and isinstance(control, pn.widgets.MultiSelect):
        value = [word for word in text.split("/") if word]
        control.options = [*control.options, *(word for word in value if word not in control.options)]
    elif text is not None and isinstance(control, pn.widgets.Select):
        options = control.options
        values = list(options.values()) if isinstance(options, Mapping) else list(options)
        value = next((x for x in values if str(x) == text), default)
        if value is default and control.tags == [LATE_OPTIONS]:
            control.options = {**dict(options), text: text}
            value = text
    elif text is not None and text.isdecimal():
        value = min(max(int(text[:9]), control.start), control.end)
    if control.value != value:
        control.value = value


def html_pane(text: str = "") -> Any:
    """A pane of HTML in the page's style."""
    return pn.pane.HTML(text, stylesheets=[CSS], sizing_mode="stretch_width", margin=0)


def select(**options: Any) -> Any:
    """A control that chooses one of several."""
    return pn.widgets.Select(width=CONTROL_WIDTH, stylesheets=[SELECT_CSS], **options)


def multi_select(name: str, none: str = "all") -> Any:
    """A control that chooses any number of several; `none` says what it means to choose none."""
    return pn.widgets.MultiSelect(
        label=f"{name} (none: {none})",
        options=[],
        size=5,
        width=CONTROL_WIDTH,
        stylesheets=[SELECT_CSS],
    )


def late_select(label: str) -> Any:
    """A control that chooses one of several, which `offer` gives once the data are read."""
    return select(label=label, options={}, tags=[LATE_OPTIONS])


def offer(control: Any, options: Mapping[str, str]) -> None:
    """Give a select new options, {label: value}; what was chosen stays where it still is among them."""
    if control.options != options:
        values = list(options.values())
        chosen = control.value if control.value in values else (values[0] if values else None)
        control.param.update(options=dict(options), value=chosen)


def empty_note(title: str, text: str) -> str:
    """What to do where there is nothing to see; `title` and `text` are HTML."""
    return f"<div class='empty'><h2>{title}</h2><p>{text}</p></div>"


def status_mark(status: str) -> str:
    """The status of a run with its colour."""
    return f"<span class='status {escape(status)}'>{escape(status)}</span>"


def html_table(columns: Mapping[str, str], lines: Sequence[str]) -> str:
    """A table; `columns` are headings with their CSS class, `lines` are rows of HTML."""
    head = "".join(
        f"<th class='{css_class}'>{name}</th>" if css_class else f"<th>{name}</th>"
        for name, css_class in columns.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def skipped_list(skipped: Skipped) -> str:
    """What could not be read, and why, folded to a line."""
    if not skipped:
        return ""
    lines = "".join(
        f"<li><code>{escape(name)}</code>: {escape(reason)}</li>" for name, reason in skipped[:MAX_SKIPPED]
    )
    summary = f"{len(skipped)} skipped: not readable"
    return f"<details class='note'><summary>{summary}</summary><ul>{lines}</ul></details>"
