"""The tab Hardware: rows on a device, as a job that is recorded before it is submitted."""

from __future__ import annotations

import html
from dataclasses import replace
from typing import Any

import ipywidgets as widgets

from ....experiments.runs import Run
from ....specs import CircuitSpec
from ...forms import SpecForm
from ...numbers import spaced
from ..tab import WorkbenchTab
from ..tab_host import TabHost
from .circuit import TWIN, CircuitTab
from .circuit_code import measurement_code
from .html_parts import field_groups, measured_headline, rows_table, rows_text


class HardwareTab(WorkbenchTab):
    """Rows on a device or on its twin, as a job that is recorded before it is submitted."""

    name, title, button, task = "hardware", "Hardware", "Submit rows", "submit"
    codes = ("python",)
    first_step = (
        "Press <b>Submit rows</b> to run the rows of the Circuit tab as a job; a twin needs no account."
    )

    def __init__(self, bench: TabHost, circuit: CircuitTab):
        self._circuit = circuit
        groups = field_groups(CircuitSpec)
        fields = [name for name, group in groups.items() if group not in ("noise", "hybrid")]
        self._table = widgets.HTML()
        forms = {"device": SpecForm(TWIN, fields)}
        shared = {name: circuit.forms[name] for name in ("rows", "source")}
        super().__init__(bench, forms, self._table, bench.job_box, shared=shared)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the task."""
        arguments = self._circuit.row_arguments()
        selection = replace(arguments["selection"], circuit=self.form.spec.to_parameters())
        return {**arguments, "selection": selection}

    def fill_report(self, run: Run) -> None:
        """Nothing beside the run's own results: the table of jobs is of all runs."""

    def show(self, result: dict[str, Any]) -> None:
        """Show the table of the rows, and the jobs."""
        saved = (
            f"<p>Saved in the run <code>{html.escape(result['run'])}</code>.</p>" if "run" in result else ""
        )
        self._table.value = measured_headline(result) + saved + rows_table(result)
        self.bench.list_jobs()

    def cost(self) -> str:
        """Rows and shots of the next job."""
        spec = self.form.spec
        assert isinstance(spec, CircuitSpec)
        return f"{rows_text(len(self._circuit.rows))} × {spaced(spec.shots)} shots"

    def python_code(self) -> str:
        """Python that measures the same rows on the same device."""
        state = self.shown_state()
        return measurement_code(state["source"], state["rows"], state["device"])
