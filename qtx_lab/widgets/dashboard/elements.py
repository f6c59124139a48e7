"""What the dashboard's views are made of: their base class, panes of HTML, controls, and their style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
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
a { color: var(--house-accent); }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--house-accent); }
.empty { padding: 28px 0; max-width: 62ch; }
.warning { border-left: 4px solid #E69F00; padding: 6px 12px; }
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

DRAWING = "<p class='note' role='status'>Reading and drawing …</p>"
"""Shown before the first picture."""


class DashboardView:
    """A question that the dashboard answers. A view overrides `prepare`, `show` and, where needed, `state`.

    Parameters
    ----------
    page : ViewHost
    body : list
        What stands on the right, from top to bottom.
    controls : list
        What stands in the left column, below the filters of runs.
    """

    uses_run_filters = True
    """Whether the filters of runs are shown above the controls."""

    def __init__(self, page: ViewHost, body: Sequence[Any], controls: Sequence[Any] = ()):
        self.page, self.controls = page, list(controls)
        self.body = pn.Column(*body, sizing_mode="stretch_width")
        for control in self.controls:
            control.param.watch(page.on_change, "value")

    def prepare(self, listing: Listing, rows: pd.DataFrame) -> Any:
        """Read what is shown, in a thread, so that a slow disk stops nobody.

        Parameters
        ----------
        listing : Listing
            The folder as it is now.
        rows : DataFrame
            The runs that pass the filters, newest first.
        """
        raise NotImplementedError

    def show(self, data: Any) -> None:
        """Put on the page what `prepare` returned."""
        raise NotImplementedError

    def state(self) -> Any:
        """What `prepare` depends on besides folder and filters: it is called again when this changes."""
        return tuple(control.value for control in self.controls)


def html_pane(text: str = "") -> Any:
    """A pane of HTML in the page's style."""
    return pn.pane.HTML(text, stylesheets=[CSS], sizing_mode="stretch_width", margin=0)


def select(**options: Any) -> Any:
    """A control that chooses one of several."""
    return pn.widgets.Select(width=CONTROL_WIDTH, stylesheets=[SELECT_CSS], **options)


def multi_select(name: str) -> Any:
    """A control that chooses any number of several; none stands for all."""
    return pn.widgets.MultiSelect(
        label=f"{name} (none chosen: all)", options=[], size=5, width=CONTROL_WIDTH, stylesheets=[SELECT_CSS]
    )


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


def plus_minus(value: float, half_width: float) -> str:
    """A number and half of its 95 % interval, with as many digits as the interval allows.

    >>> plus_minus(0.08312, 0.0041)
    '0.083 ± 0.004'
    """
    if not half_width > 0:
        return f"{value:.3g}"
    digits = max(0, int(np.ceil(-np.log10(half_width))))
    return f"{value:.{digits}f} ± {half_width:.{digits}f}"
