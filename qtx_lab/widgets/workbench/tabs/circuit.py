"""The tab Circuit: rows as circuits, on a simulator or on the twin of a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import ipywidgets as widgets
import torch
from torch import Tensor

from ....errors import ArgumentError
from ....specs import CircuitSpec, MitigationSpec, Spec, Whole
from ...forms import FORM_LOCK, SpecForm
from ...numbers import spaced
from ...views.base import View
from ...views.outputs import OutputsView
from ..process import Work
from ..tab import WorkbenchTab
from ..tab_host import TabHost
from ..tasks.circuits import CircuitRows
from .circuit_code import measurement_code
from .html_parts import field_groups, form_field, rows_table, rows_text
from .outputs_parts import outputs_code, outputs_headline, outputs_table
from .sample import MAX_ROWS, SampleTab

if TYPE_CHECKING:
    from ...views.circuit import CircuitView

TWIN = CircuitSpec.model_construct(device="fake_boston")
"""The device at first. It is not checked, because that would load qiskit when a workbench is made."""

PLANNER = MitigationSpec.model_construct(
    method="planner", readout=False, noise_levels=(1.0, 3.0), scaling="model"
)
"""The mitigation at first; its noise levels are those of zero-noise extrapolation, where that is chosen."""


class RowsSpec(Spec):
    """Which rows of the head are measured."""

    rows: tuple[Whole, ...] = form_field(
        (15, 31),
        "Queries whose rows are measured, counted from 0.",
        "",
        "rows",
        min_length=1,
        max_length=MAX_ROWS,
    )


class OutputSpec(Spec):
    """What circuits give: draws from the rows, or one coordinate of what attention makes of them."""

    gives: Literal["rows", "output"] = form_field(
        "rows",
        "rows: the circuit draws keys. output: amplitude estimation of a coordinate of the row's output.",
        "name",
        "output",
    )
    coordinate: Whole = form_field(
        0, "Which coordinate of the output is estimated, counted from 0.", "", "output", ge=0
    )
    loads: Whole = form_field(
        4096,
        "Uses of the row's loader or its inverse, at most; as many shots and classical draws are compared.",
        "loads",
        "output",
        ge=64,
        le=16_777_216,
    )
    keys: Whole = form_field(
        8,
        "So many of a row's largest weights are estimated, and the rest is summed exactly.",
        "keys",
        "output",
        ge=2,
        le=16,
    )


BUTTONS = {"rows": "Measure rows", "output": "Estimate outputs"}
"""The label of the primary button, by what the circuits give."""


class CircuitTab(WorkbenchTab):
    """Rows as circuits, on a simulator or on the twin of a device.

    Attributes
    ----------
    mitigation_form : SpecForm
        The form of the Mitigate tab, whose noise levels and extrapolation the view's zero-noise fit shows.
    view_box : VBox
        Holds the view; it stands in the Mitigate tab, too.
    outputs_view : OutputsView
        Shows estimated outputs in its place.
    """

    name, title, button, task = "circuit", "Circuit", "Measure rows", "measure"
    codes = ("python",)
    first_step = "Press <b>Measure rows</b> to load rows of the head into a circuit and measure it."

    def __init__(self, bench: TabHost, sample: SampleTab):
        self._sample = sample
        groups = field_groups(CircuitSpec)
        fields = [name for name, group in groups.items() if group != "IBM" and name != "provider"]
        forms = {
            "circuit": SpecForm(TWIN, fields),
            "rows": SpecForm(RowsSpec),
            "output": SpecForm(OutputSpec),
        }
        self._table, self._rows_note, self.view_box = widgets.HTML(), widgets.HTML(), widgets.VBox()
        self._headline, self.outputs_view = widgets.HTML(), OutputsView()
        self._rows_box = widgets.VBox([self.view_box])  # hidden here, while the view stands in Mitigate, too
        self._outputs_box = widgets.VBox([self.outputs_view])
        self._selected: tuple[int, ...] = ()  # all rows of which those of the form were taken
        self.view: CircuitView | None = None
        self._view_inputs: Any = None
        views = (self._rows_note, self._headline, self._rows_box, self._outputs_box, self._table)
        super().__init__(bench, forms, *views, shared={"source": sample.forms["source"]})
        self.forms["output"].observe(lambda _: self._name_button(), "spec")
        self.forms["rows"].observe(lambda _: self._say_which_rows(), "spec")
        self.mitigation_form = SpecForm(PLANNER)
        self.mitigation_form.observe(lambda _: self._fit_follows_form(), "spec")

    @property
    def rows(self) -> tuple[int, ...]:
        """The queries whose rows are measured."""
        spec = self.forms["rows"].spec
        assert isinstance(spec, RowsSpec)
        return spec.rows

    def take_rows(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Enter queries as the rows to measure; of more than `MAX_ROWS`, as many that are spread evenly.

        The tab says which ones were taken, where those are not all.

        Parameters
        ----------
        rows : sequence of int
            Queries, counted from 0; each counts once.

        Returns
        -------
        tuple of int
            Those that were taken, in rising order.

        Raises
        ------
        ArgumentError
            If there are none.
        """
        selected = tuple(sorted(set(rows)))
        if not selected:
            raise ArgumentError("rows is empty: at least one row is needed.")
        taken = spread_rows(selected)
        self._selected = selected
        self.forms["rows"].change(rows=taken)
        self._say_which_rows()
        return taken

    def _say_which_rows(self) -> None:
        """Say which rows of a selection are measured, unless those are all, or others were entered."""
        selected, rows = self._selected, self.rows
        note = ""
        if len(selected) > len(rows) and set(rows) <= set(selected):
            note = f"{len(rows)} of {len(selected)} selected rows are measured: {', '.join(map(str, rows))}."
        self._rows_note.value = note and f"<p role='status'>{note}</p>"
        self.first_step = f"{note} {type(self).first_step}".strip()
        if self.result is None and self.work is None:
            self._show_message()

    @property
    def _mitigation(self) -> MitigationSpec:
        spec = self.mitigation_form.spec
        assert isinstance(spec, MitigationSpec)
        return spec

    @property
    def row_forms(self) -> dict[str, SpecForm]:
        """The forms that say which rows are measured by which circuits: all but that of the output."""
        return {name: form for name, form in self.forms.items() if name != "output"}

    @property
    def _output(self) -> OutputSpec:
        spec = self.forms["output"].spec
        assert isinstance(spec, OutputSpec)
        return spec

    def _name_button(self) -> None:
        """Let the primary button say what it does."""
        self._start_button.description = BUTTONS[self._output.gives]

    def start(self, **changes: Any) -> Work:
        """Measure the rows or estimate their outputs, as the form says; see `WorkbenchTab.start`."""
        self.task = "measure" if self._output.gives == "rows" else "estimate"
        return super().start(**changes)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the task."""
        output = self._output.to_parameters()
        if output.pop("gives") == "rows":
            return self.row_arguments()
        return {**self.row_arguments(), "output": output}

    def row_arguments(self) -> dict[str, Any]:
        """The arguments of a task that measures the rows."""
        sample = self._sample.arguments()
        selection = CircuitRows(
            **{name: sample[name] for name in ("source", "layer", "head", "seed")},
            rows=tuple(self.rows),
            circuit=self.form.spec.to_parameters(),
        )
        return {"selection": selection, "home": self.bench.runs_folder()}

    def show(self, result: dict[str, Any]) -> None:
        """Show the table of the rows, and the measurement of one of them, or the estimates, in the view."""
        estimated = result.get("kind") == "outputs"
        for box, shown in ((self._rows_box, not estimated), (self._outputs_box, estimated)):
            box.layout.display = None if shown else "none"
        if estimated:
            self._show_outputs(result)
            return
        self._headline.value = ""
        self._table.value = rows_table(result)
        spec = CircuitSpec(**(self._forms_of_result or self.state())["circuit"])
        inputs = (spec.model_copy(update={"shots": 1}), result["p"].tobytes())
        if self.view is None or inputs != self._view_inputs:
            self.view = self._make_view(spec, torch.from_numpy(result["p"]), result["rows"])
            self._view_inputs = inputs
        self.view.shots = spec.shots
        self._fill_view()

    def _show_outputs(self, result: dict[str, Any]) -> None:
        """Show the estimates of the outputs beside the exact ones."""
        self._headline.value, self._table.value = outputs_headline(result), outputs_table(result)
        title = (
            f"Coordinate {result['coordinate']} of outputs on {result['facts']['device_label']}, "
            f"{spaced(result['asked_loads'])} loads a row"
        )
        self.outputs_view.show(result["rows"], result["exact"], result["methods"], title)

    def shown_views(self) -> list[View]:
        """The view of the rows, or that of their outputs."""
        if (self.result or {}).get("kind") == "outputs":
            return [self.outputs_view]
        return [] if self.view is None else [self.view]

    def _make_view(self, spec: CircuitSpec, p: Tensor, queries: Iterable[int]) -> CircuitView:
        """A view of the circuit of these rows; its zero-noise fit is that of the Mitigate tab."""
        # This loads qiskit, as the check of a circuit's form does, and two threads must not do so at the same
        # time.
        with FORM_LOCK:
            from ...views.circuit import CircuitView
        form, mitigation = self.mitigation_form, self._mitigation
        levels = mitigation.noise_levels if len(mitigation.noise_levels) > 1 else PLANNER.noise_levels
        method = mitigation.extrapolation
        view = CircuitView(spec.build(), shots=spec.shots, noise_levels=levels, method=method, seed=0)
        view.show_rows(p, names=[f"query {i}" for i in queries])
        view.observe(lambda _: self._fill_view(), "row")
        view.observe(lambda change: form.enter(noise_levels=[f"{x:g}" for x in change.new]), "noise_levels")
        view.observe(lambda change: form.enter(extrapolation=change.new), "method")
        self.view_box.children = (view,)
        return view

    def _fit_follows_form(self) -> None:
        """Show the noise levels and the extrapolation of the Mitigate tab in the view's zero-noise fit."""
        view, mitigation = self.view, self._mitigation
        if view is not None and len(mitigation.noise_levels) > 1:
            if list(mitigation.noise_levels) != sorted(view.noise_levels):
                view.noise_levels = list(mitigation.noise_levels)
            view.method = mitigation.extrapolation

    def _fill_view(self) -> None:
        """Show what was measured of the row that the view shows."""
        view, result = self.view, self.result
        if view is None or result is None or result.get("kind") == "outputs":
            return
        if view.num_rows != len(result["rows"]):
            return
        from ....backends import RowCounts  # loads qiskit, as the view has

        one, shots = slice(view.row, view.row + 1), int(result["shots"])
        counts, classical, discarded = (
            torch.from_numpy(result[name])[one] for name in ("counts", "classical", "discarded")
        )
        diagnostics = {
            "fallbacks": result["fallbacks"],
            "not_modelled": result["facts"].get("not_modelled", ()),
        }
        baseline = RowCounts(classical, torch.zeros_like(discarded), shots)
        curve = [
            {name: x if name == "shots" else x[view.row] for name, x in point.items()}
            for point in result["curve"]
        ]
        view.fill(RowCounts(counts, discarded, shots, baseline, diagnostics), curve)

    def cost(self) -> str:
        """Rows and shots, or loads, of what the button starts."""
        if self._output.gives == "output":
            return f"{rows_text(len(self.rows))} × {spaced(self._output.loads)} loads"
        return self.rows_cost()

    def rows_cost(self) -> str:
        """Rows and shots of the next measurement."""
        spec = self.form.spec
        assert isinstance(spec, CircuitSpec)
        return f"{rows_text(len(self.rows))} × {spaced(spec.shots)} shots"

    def python_code(self) -> str:
        """Python that measures the same rows, or estimates the same outputs, by the same circuits."""
        state = self.shown_state()
        if state.get("output", {}).get("gives") == "output":
            return outputs_code(state["source"], state["rows"], state["circuit"], state["output"])
        return measurement_code(state["source"], state["rows"], state["circuit"])


def spread_rows(rows: Sequence[int]) -> tuple[int, ...]:
    """Those of some queries that the Circuit tab takes: all up to `MAX_ROWS`, of more as many, spread evenly.

    Parameters
    ----------
    rows : sequence of int
        Queries, counted from 0; each counts once.
    """
    selected = sorted(set(rows))
    count = min(MAX_ROWS, len(selected))
    return tuple(selected[i * (len(selected) - 1) // max(1, count - 1)] for i in range(count))
