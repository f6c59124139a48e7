"""The tab Mitigate: what can be done about the noise of a device, and whether it helps."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets

from ....specs import MitigationSpec
from ....theme import with_error
from ...numbers import Z95, spaced
from ...views.mitigation import MitigationView
from ..tab import WorkbenchTab
from ..tab_host import TabHost
from .circuit import CircuitTab
from .circuit_code import mitigation_code
from .html_parts import distance_columns, headline, opened, rows_table, rows_text


class MitigateTab(WorkbenchTab):
    """What can be done about the noise of a device, for the rows and the circuit of the Circuit tab."""

    name, title, button, task = "mitigate", "Mitigate", "Mitigate rows", "mitigate"
    codes = ("python",)
    first_step = (
        "Press <b>Mitigate rows</b> to measure the rows of the Circuit tab with and without mitigation, with "
        "the same number of shots."
    )

    def __init__(self, bench: TabHost, circuit: CircuitTab):
        self._circuit = circuit
        self._verdict, self._table, self.view = widgets.HTML(), widgets.HTML(), MitigationView()
        self._fit_box = widgets.VBox([circuit.view_box])
        forms = {"mitigation": circuit.mitigation_form}
        views = (self._verdict, widgets.VBox([self.view]), self._table, self._fit_box)
        super().__init__(bench, forms, *views, shared=circuit.row_forms)
        self.form.observe(self._readout_follows_method, "spec")

    def _readout_follows_method(self, change: Any) -> None:
        """Tick "readout" with a method that begins with it, and untick it with one that does without."""
        before, now = (MitigationSpec(method=spec.method).readout for spec in (change.old, change.new))
        if before != now and change.new.readout == before and not self.bench.restoring:
            self.form.change(readout=now)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the task."""
        return {**self._circuit.row_arguments(), "mitigation": self.form.spec.to_parameters()}

    def show(self, result: dict[str, Any]) -> None:
        """Show the verdict, the table of the rows, and the expected error against shots."""
        state = self.shown_state()
        spec, shots = MitigationSpec(**state["mitigation"]), state["circuit"]["shots"]
        if result["shots"] < shots:  # only what has as many shots is compared
            result = {**result, "error": None}
        text, detail = verdict(result, shots)
        warnings = result.get("warnings", [])
        title = f"{len(warnings)} warning{'s' * (len(warnings) != 1)}"
        self._verdict.value = headline(text, detail) + opened(title, warnings)
        self._table.value = rows_table(result)
        self._fit_box.layout.display = None if spec.method == "zne" else "none"
        columns = distance_columns(result)
        means = {name: columns[name].mean for name in columns}
        self.view.show(result.get("ways", []), result["shots"], means, result["facts"]["device_label"])

    def cost(self) -> str:
        """Rows and shots of the next measurement."""
        return f"{self._circuit.rows_cost()}, with and without mitigation"

    def python_code(self) -> str:
        """Python that measures the same rows with and without mitigation."""
        state = self.shown_state()
        forms = (state[name] for name in ("source", "rows", "circuit", "mitigation"))
        return mitigation_code(*forms)


def verdict(result: Mapping[str, Any], shots: int) -> tuple[str, str]:
    """Whether mitigation helped, with intervals, and what was done; HTML.

    There is no verdict before all raw counts are there, because fewer shots alone are further off.

    Parameters
    ----------
    result : mapping
        Of the task `mitigate`, or a part of it.
    shots : int
        That were asked for, of each row.
    """
    columns, plan = distance_columns(result), result.get("plan")
    raw, raw_error = columns["measured"].mean
    classical = with_error(*_half_width(columns["classical"].mean))
    against = f"raw counts {with_error(raw, Z95 * raw_error)}"
    reason = html.escape(plan["reason"]) if plan else ""
    done = html.escape(str(result["facts"].get("mitigation", "")))
    size = f"mean of {rows_text(len(result['rows']))}, {spaced(result['shots'])} shots a row for each"
    what = f"Total variation from the exact row, {size}; ± is half of the 95 % interval."
    baseline = f"As many classical draws: {classical}."
    if result["shots"] < shots:
        so_far = f"{spaced(result['shots'])} of {spaced(shots)} shots a row"
        return f"Provisional, no verdict yet: {against} after {so_far}", f"{what} {baseline}"
    if "mitigated" not in columns:
        text = f"Nothing was mitigated: {against}" if plan else "No row could be mitigated"
        why = reason.removeprefix("Nothing was mitigated: ")
        return text, f"{why[:1].upper()}{why[1:]} {what} {baseline}"
    mitigated, error = columns["mitigated"].mean
    difference, half_width = mitigated - raw, Z95 * (error**2 + raw_error**2) ** 0.5
    with_mitigation, without = with_error(mitigated, Z95 * error), with_error(raw, Z95 * raw_error)
    if abs(difference) <= half_width:
        text = f"No difference that these shots can show: mitigated {with_mitigation}, raw {without}"
    else:
        text = f"Mitigation {'hurt' if difference > 0 else 'helped'}: {with_mitigation} against {without}"
    change = f"Difference {with_error(difference, half_width)}."
    return text, f"{done}. {what} {change} {baseline} {reason}"


def _half_width(mean: tuple[float, float]) -> tuple[float, float]:
    return mean[0], Z95 * mean[1]
