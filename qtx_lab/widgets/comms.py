"""How widgets hear the browser while the kernel is busy with a cell."""

from __future__ import annotations

import ipywidgets


def hear_while_busy(*widgets: ipywidgets.Widget) -> None:
    """Handle what the browser sends to these widgets even while a cell is running.

    JupyterLab sends such messages to a subshell for this purpose. But ipykernel 7.4 passes them on to the
    shell in which the widget spoke last; if a cell made the widget, that is the main shell, where they would
    wait for the end of the cell.
    """
    for widget in widgets:
        if widget.comm is not None:
            widget.comm._reply_subshell_for = None  # then the header of each message says where it goes
