"""`WorkbenchTab`: forms on the left, a picture on the right, and the state of the work along the bottom."""

from __future__ import annotations

import html
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from ...errors import ArgumentError, QtxError, SpecError
from ...experiments.runs import Run
from ..comms import hear_while_busy
from ..forms import FORM_LOCK, SpecForm
from ..throttle import ThrottledCall
from ..views.base import DRAWING_LOCK, View, render_figure
from .process import Work
from .status_line import StatusLine
from .tab_host import TabHost

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATUS_INTERVAL_S = 0.1
"""Seconds between two drawings of the status line, at least."""


class WorkbenchTab:
    """One tab of the workbench. `start()` does what its primary button does.

    A tab overrides what it needs: `arguments` for its `task`, `show` for the picture, and `python_code` and
    `command` for what its buttons copy.

    Attributes
    ----------
    work : Work or None
        What was started last.
    result : dict or None
        What came of it, or the part of it that has arrived.

    Parameters
    ----------
    bench : TabHost
    forms : mapping
        Forms by name; the first one is `form`. Their changes are saved in the run, and mark the picture as
        stale.
    *views : widgets
        The picture; it is shown as soon as there is a result.
    shared : mapping, optional
        Forms by name that stand elsewhere in the workbench, and whose fields decide the result, too.
    """

    name = title = ""
    button = ""
    """The label of the primary button."""
    first_step = ""
    """What to do first, shown (as HTML) while there is no picture."""
    task = ""
    """Name of a function of `tasks.registry`."""
    reports = True
    """Whether a report of what is shown can be made."""
    codes: tuple[str, ...] = ()
    """Which of "python" (`python_code`) and "command" (`command`) the tab offers to copy."""

    def __init__(
        self,
        bench: TabHost,
        forms: Mapping[str, SpecForm],
        *views: widgets.Widget,
        shared: Mapping[str, SpecForm] | None = None,
    ):
        self.bench, self.forms = bench, {**forms, **(shared or {})}
        self._own_forms = dict(forms)
        self.work: Work | None = None
        self.result: dict[str, Any] | None = None
        self._forms_of_result: dict[str, Any] | None = None
        self._forms_of_work: dict[str, Any] = {}
        self._lock, self._status_lock = threading.RLock(), threading.RLock()
        self._status_call = ThrottledCall(self._draw_status, STATUS_INTERVAL_S)

        self._start_button = widgets.Button(description=self.button, button_style="primary")
        self._cancel_button = widgets.Button(description="Cancel", disabled=True)
        codes = {"python": self.python_code, "command": self.command}
        self._status = StatusLine(
            {kind: codes[kind] for kind in self.codes}, self.report if self.reports else None
        )
        self._message = widgets.HTML()
        self.views = widgets.VBox(views).add_class("qtx-wb-views")
        hear_while_busy(self._start_button, self._cancel_button)
        self._start_button.on_click(lambda _: self._start_or_explain())
        self._cancel_button.on_click(lambda _: self.cancel())
        for form in self.forms.values():
            form.observe(lambda _: self._form_changed(), "spec")
        accordion = f"qtx-wb-{self.name}-{id(self)}"  # other workbenches on the page keep their groups open
        for i, form in enumerate(forms.values()):
            form.arrange("column", accordion=accordion, open_first=i == 0)
        buttons = widgets.HBox([self._start_button, self._cancel_button]).add_class("qtx-wb-act")
        controls = widgets.VBox([buttons, *forms.values()]).add_class("qtx-wb-controls")
        picture = widgets.VBox([self._message, self.views]).add_class("qtx-wb-picture")
        body = widgets.Box([controls, picture]).add_class("qtx-wb-body")
        self.widget = (
            widgets.VBox([body, self._status]).add_class("qtx-wb-page").add_class(f"qtx-wb-of-{self.name}")
        )
        self._show_message()
        self._draw_status()

    @property
    def form(self) -> SpecForm:
        """The first form of the tab."""
        return next(iter(self.forms.values()))

    @property
    def busy(self) -> bool:
        """Whether its work is running."""
        return self.work is not None and self.work.state == "running"

    def opened(self) -> None:
        """Do what has to be done when somebody opens the tab."""

    def state(self) -> dict[str, Any]:
        """The fields of all forms."""
        return {title: form.spec.to_parameters() for title, form in self.forms.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Show saved fields of the tab's own forms; where they do not fit this version, the tab says so."""
        for title, form in self._own_forms.items():
            if title in state:
                try:
                    form.spec = type(form.spec).from_parameters(state[title])
                except SpecError as error:
                    self._show_message(f"The form {title!r} could not be restored: {error}")

    def arguments(self) -> dict[str, Any]:
        """The arguments of the task."""
        return {}

    def show(self, result: dict[str, Any]) -> None:
        """Draw what came of the task, or a part of it."""

    def picture(self) -> bytes | None:
        """What is shown, as PNG; None where there is nothing to show."""
        views = self.shown_views()
        return render_figure(views[0].figure) if views and self.result is not None else None

    def shown_views(self) -> list[View]:
        """The views of the picture."""
        boxes = [box for box in self.views.children if isinstance(box, widgets.Box)]
        return [view for box in boxes for view in box.children if isinstance(view, View)]

    def shown_run(self) -> Path | None:
        """The folder of the run that holds what is shown; None where there is none yet."""
        name = (self.result or {}).get("run")
        place = self.bench.storage_place()
        # Without the lock of the workbench: whoever restores it holds that one, and waits for the status.
        return self.bench.home.resolve() / name if name else Path(place) if place else None

    def report(self) -> Path:
        """Write the report of what is shown, a page that needs no kernel and no network; its path.

        Raises
        ------
        ArgumentError
            If nothing is shown yet.
        StorageError
            If it cannot be written.
        """
        from ...experiments.report import write_report

        if self.result is None:
            raise ArgumentError(f"There is nothing to report yet: press {self.button} first.")
        self.bench.runs_folder()  # makes the workbench's own run, where there is none yet
        folder = self.shown_run()
        assert folder is not None
        run = Run.open(folder)
        self.fill_report(run)
        path = write_report(run, stays_open=True)
        self.request_status()
        return path

    def fill_report(self, run: Run) -> None:
        """Save in the run what the report shows beside the run's own results: the picture of the tab."""
        for view in self.shown_views()[:1]:
            self.save_picture(run, view, f"{self.title}: the picture of the workbench.")

    def save_picture(self, run: Run, view: View, caption: str, live: str | None = None) -> None:
        """Save a view's picture and data as a figure of the run; see `Run.save_figure`."""
        with DRAWING_LOCK:
            run.save_figure(self.name, partial(_figure_of, view), view.frame(), caption, live=live)

    def cancelled_note(self) -> str:
        """What is said after the work was cancelled: what is kept, and how to go on; HTML."""
        what_is_shown = "What is shown had come in until then." if self.result else "Nothing had come in yet."
        return f"Cancelled. {what_is_shown} Press <b>{self.button}</b> to start again."

    def cost(self) -> str:
        """What the work costs, for the status line."""
        return ""

    def python_code(self) -> str:
        """Python that gives the numbers that are shown, by the public names of `qtx_lab`.

        It follows `shown_state`: the fields that led to the picture, or those of the forms where there is
        none yet. Its last lines print the numbers.
        """
        raise NotImplementedError

    def command(self) -> str:
        """The line of a shell that does the same as `python_code`."""
        raise NotImplementedError

    def shown_state(self) -> dict[str, Any]:
        """The fields of all forms that led to the picture; those of now where there is none."""
        return self._forms_of_result if self.result and self._forms_of_result else self.state()

    def start(self, **changes: Any) -> Work:
        """Start the work, and return it while it runs.

        Parameters
        ----------
        **changes
            Arguments of the task in place of the tab's own.

        Raises
        ------
        SpecError
            If a form holds something that is not allowed.
        ArgumentError
            If the work is running already.
        """
        for form in self.forms.values():
            if not form.valid:
                raise SpecError(" ".join(form.problems.values()))
        with FORM_LOCK:
            forms, arguments = self.state(), {**self.arguments(), **changes}
        with self._lock:
            if self.busy:
                raise ArgumentError(f"{self.name} is running: cancel it, or wait for its end.")
            self.work = self.bench.start_task(self.task, arguments, self._work_changed, self._show_part)
            self._forms_of_work = forms
            self._show_message()
        self.bench.request_save()
        self.request_status()
        return self.work

    def cancel(self) -> None:
        """Stop what is running, at once; the last picture stays."""
        if self.work is not None:
            self.work.cancel()

    def show_saved(self, result: dict[str, Any], forms: Mapping[str, Any] | None = None) -> None:
        """Show a result that was saved, and that these forms led to."""
        self.result, self._forms_of_result = result, dict(forms or self.state())
        self.show(result)
        self._show_message()
        self._draw_status()

    def show_problem(self, problem: str) -> None:
        """Say in the tab what went wrong."""
        self._show_message(problem)

    def request_status(self) -> None:
        """Draw the status line soon."""
        self._status_call.request()

    def _start_or_explain(self) -> None:
        """Start, or say in the tab why not: what the button does."""
        try:
            self.start()
        except QtxError as error:
            self._show_message(str(error))

    def _show_part(self, data: Any) -> None:
        """Show a part of a result that the worker sends."""
        self.result, self._forms_of_result = data, self._forms_of_work
        self.show(data)
        self._show_message()

    def _work_changed(self, work: Work) -> None:
        """Follow the work; called by the thread that reads the worker's messages, or that cancels."""
        with self._lock:  # not before `start` has set `self.work`
            if work is not self.work:
                return
        if work.state == "done":
            self.result, self._forms_of_result = work.result, self._forms_of_work
            try:
                self.show(work.result)
                self.bench.save_result(self.name, work.result, self._forms_of_work)
            except QtxError as error:
                self._show_message(str(error))
            else:
                self._show_message()
        elif work.state == "failed":
            self._show_message(f"{work.error}{' The last picture is kept.' if self.result else ''}")
        elif work.state == "cancelled":
            self.bench.mark_cancelled(work)
            self._show_message()
            kind = "note" if self.result else "empty"
            self._message.value = f'<div class="qtx-wb-{kind}" role="status">{self.cancelled_note()}</div>'
        if work.state == "running":
            self.request_status()
        else:
            self._draw_status()

    def _form_changed(self) -> None:
        self.bench.request_save()
        self.request_status()

    def _is_stale(self) -> bool:
        return self.result is not None and not self.busy and self._forms_of_result != self.state()

    def _show_message(self, problem: str = "") -> None:
        """Say what went wrong, or what to do first, in the place of the picture."""
        if problem:
            self._message.value = f'<div class="qtx-wb-error" role="alert">{html.escape(problem)}</div>'
        elif self.result is None:
            text = "The first result comes here in a moment." if self.busy else self.first_step
            self._message.value = f'<div class="qtx-wb-empty">{text}</div>'
        else:
            self._message.value = ""
        self.views.layout.display = None if self.result is not None else "none"

    def _draw_status(self) -> None:
        """The status line: state, progress and time left, cost, and the run."""
        with self._status_lock:  # so that an older state is never drawn over a newer one
            work, busy, stale = self.work, self.busy, self._is_stale()
            self._start_button.disabled, self._cancel_button.disabled = busy, not busy
            for css_class, active in (("qtx-wb-busy", busy), ("qtx-wb-stale", stale)):
                self.views.add_class(css_class) if active else self.views.remove_class(css_class)
            note, folder = self.bench.storage_note(), self.shown_run()
            problem = note.startswith("not saved:")
            linked = folder is not None and not problem
            self._status.show(
                state=_state_text(work, stale),
                fraction=work.fraction if busy and work is not None else None,
                label=f"{self.name}: progress",
                cost=self.cost(),
                saved="saved in" if linked else note,
                run=folder.name if folder is not None and linked else "",
                place=str(folder or ""),
                problem=problem,
                report=self.result is not None and not busy and self.reports,
            )


def _figure_of(view: View, data: Any, theme: str) -> Figure:
    """The figure of a view, whose data are those that it shows."""
    return view.figure(theme)


def _state_text(work: Work | None, stale: bool) -> str:
    """The state of the work in words."""
    if work is None:
        text = "ready"
    elif work.state == "running":
        left = work.seconds_left
        text = f"{work.text or 'starting'}, {work.fraction:.0%}"
        text += "" if left is None else f", about {_duration(left)} left"
    elif work.state == "done":
        text = f"done in {work.seconds:.1f} s"
    else:
        text = f"{work.state} after {work.seconds:.1f} s"
    if stale:
        text += "; the form has changed since"
    if work is not None and work.warnings:
        text += f"; {len(work.warnings)} warning{'s' * (len(work.warnings) > 1)}"
    return text


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
