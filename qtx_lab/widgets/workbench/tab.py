"""`Page`: a tab of the workbench, with forms on the left, a picture on the right, and what runs along the bottom."""

from __future__ import annotations

import html
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from ...errors import ArgumentError, QtxError, SpecError
from ..forms import TURN, SpecForm
from ..views.base import View, drawn, heard_while_busy
from .process import Pace, Work

if TYPE_CHECKING:
    from .workbench import Workbench

FOLLOW = 0.1
"""Least seconds between two pictures of the same progress."""


class Page:
    """One tab. `start()` does what its primary button does, `work` is what runs, `result` what came of it last.

    Each page overrides what it needs: `arguments` of its `task`, and `show` for the picture.

    Parameters
    ----------
    bench : Workbench
    forms : mapping
        By name, the first being `form`. Changes of any are kept in the run, and mark the picture as stale.
    views : widgets
        The picture; shown as soon as there is a result.
    """

    name = title = ""
    button = ""
    """What the primary button says."""
    first = ""
    """What to do first, shown where there is no picture yet."""
    task = ""
    """A function of `tasks`."""

    def __init__(self, bench: Workbench, forms: Mapping[str, SpecForm], *views: widgets.Widget):
        self.bench, self.forms = bench, dict(forms)
        self.work: Work | None = None
        self.result: dict[str, Any] | None = None
        self._made_by: dict[str, Any] | None = None
        self._turn, self._bar_turn = threading.RLock(), threading.RLock()
        self._draw_bar = Pace(self._show_bar, FOLLOW)
        self.redraw_bar = self._draw_bar.ask

        self._run = widgets.Button(description=self.button, button_style="primary")
        self._cancel = widgets.Button(description="Cancel", disabled=True)
        self._bar, self._told = widgets.HTML(), widgets.HTML()
        self.views = widgets.VBox(views).add_class("qtx-wb-views")
        heard_while_busy(self._run, self._cancel)
        self._run.on_click(lambda _: self._begin())
        self._cancel.on_click(lambda _: self.cancel())
        for form in self.forms.values():
            form.observe(lambda _: self._changed(), "spec")
        act = widgets.HBox([self._run, self._cancel]).add_class("qtx-wb-act")
        controls = widgets.VBox([act, *self.forms.values()]).add_class("qtx-wb-controls")
        picture = widgets.VBox([self._told, self.views]).add_class("qtx-wb-picture")
        body = widgets.Box([controls, picture]).add_class("qtx-wb-body")
        self.widget = (
            widgets.VBox([body, self._bar]).add_class("qtx-wb-page").add_class(f"qtx-wb-of-{self.name}")
        )
        self._tell()
        self._show_bar()

    @property
    def form(self) -> SpecForm:
        """The page's first form."""
        return next(iter(self.forms.values()))

    @property
    def busy(self) -> bool:
        return self.work is not None and self.work.state == "running"

    def state(self) -> dict[str, Any]:
        """The fields of all forms."""
        return {title: form.spec.to_parameters() for title, form in self.forms.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Show kept fields; a form of another version that does not fit any more is left at its defaults, and told."""
        for title, form in self.forms.items():
            if title in state:
                try:
                    form.spec = type(form.spec).from_parameters(state[title])
                except SpecError as error:
                    self._tell(f"The form {title!r} could not be restored: {error}")

    def arguments(self) -> dict[str, Any]:
        """What the task is called with."""
        return {}

    def show(self, result: dict[str, Any]) -> None:
        """Draw what came of the task, or of a part of it."""

    def picture(self) -> bytes | None:
        """What is shown, as PNG; None where there is nothing to show."""
        places = [child for place in self.views.children for child in getattr(place, "children", ())]
        views = [view for view in places if isinstance(view, View)]
        return drawn(views[0].figure) if views and self.result is not None else None

    def cost(self) -> str:
        """What it takes, for the line at the bottom."""
        return ""

    def start(self, **changes: Any) -> Work:
        """Begin; the work goes on by itself. `changes` are arguments of the task in place of the page's own.

        Raises
        ------
        ArgumentError
            If it is running already, or (a SpecError) if a form holds something that is not allowed.
        """
        for form in self.forms.values():
            if not form.valid:
                raise SpecError(" ".join(form.problems.values()))
        with TURN:
            made_by, arguments = self.state(), {**self.arguments(), **changes}
        with self._turn:
            if self.busy:
                raise ArgumentError(f"{self.name} is running: cancel it, or wait for its end.")
            self.work = self.bench.begin(self.task, arguments, self._follow, self._take)
            self._made_by = made_by
            self._tell()
        self.bench.remember()
        self._draw_bar.ask()
        return self.work

    def cancel(self) -> None:
        """Stop what is running, at once; the last picture stays."""
        if self.work is not None:
            self.work.cancel()

    def put(self, result: dict[str, Any], made_by: Mapping[str, Any] | None = None) -> None:
        """Show a result that was kept."""
        self.result, self._made_by = result, dict(made_by or self.state())
        self.show(result)
        self._tell()
        self._show_bar()

    def _begin(self) -> None:
        try:
            self.start()
        except QtxError as error:
            self._tell(str(error))

    def _take(self, data: Any) -> None:
        """A part of a result, from the worker."""
        self.result = data
        self.show(data)
        self._tell()

    def _follow(self, work: Work) -> None:
        """The work has changed: called by the thread that listens to the worker, or that cancels."""
        with self._turn:  # not before `start` has said which work it is
            if work is not self.work:
                return
        if work.state == "done":
            self.result = work.result
            try:
                self.show(work.result)
                self.bench.keep(self.name, work.result, self._made_by or {})
            except QtxError as error:
                self._tell(str(error))
            else:
                self._tell()
        elif work.state == "failed":
            self._tell(f"{work.error}{' The last picture is kept.' if self.result else ''}")
        elif work.state == "cancelled":
            self._tell()
        if work.state == "running":
            self._draw_bar.ask()
        else:
            self._show_bar()

    def _changed(self) -> None:
        self.bench.remember()
        self._draw_bar.ask()

    def _stale(self) -> bool:
        return self.result is not None and not self.busy and self._made_by != self.state()

    def _tell(self, problem: str = "") -> None:
        """What went wrong, or what to do first, where the picture is."""
        if problem:
            self._told.value = f'<div class="qtx-wb-error" role="alert">{html.escape(problem)}</div>'
        elif self.result is None:
            first = "The first picture comes here." if self.busy else self.first
            self._told.value = f'<div class="qtx-wb-empty">{first}</div>'
        else:
            self._told.value = ""
        self.views.layout.display = None if self.result is not None else "none"

    def _show_bar(self) -> None:
        with self._bar_turn:  # who comes second must not show what was earlier
            self._make_bar()

    def _make_bar(self) -> None:
        """The line at the bottom: state, progress and time left, cost."""
        work, busy = self.work, self.busy
        self._run.disabled, self._cancel.disabled = busy, not busy
        stale = self._stale()
        for mark, on in (("qtx-wb-busy", busy), ("qtx-wb-stale", stale)):
            self.views.add_class(mark) if on else self.views.remove_class(mark)
        state, meter = "ready", ""
        if work is not None:
            state = {"running": work.text or "starting", "done": f"done in {work.seconds:.1f} s"}.get(
                work.state, f"{work.state} after {work.seconds:.1f} s"
            )
        if busy and work is not None:
            meter = f'<progress max="1" value="{work.fraction:.3f}" aria-label="{self.name}: progress"></progress>'
            left = work.seconds_left
            state += f", {work.fraction:.0%}" + ("" if left is None else f", about {_duration(left)} left")
        elif stale:
            state += "; the form has changed since"
        if work is not None and work.warned:
            state += f"; {len(work.warned)} warning{'s' * (len(work.warned) > 1)}"
        parts = [f'<span class="qtx-wb-state" role="status">{html.escape(state)}</span>', meter]
        parts += [
            f'<span class="qtx-wb-cost">{self.cost()}</span>',
            f'<span class="qtx-wb-run">{self.bench.where()}</span>',
        ]
        self._bar.value = f'<div class="qtx-wb-bar">{"".join(parts)}</div>'


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
