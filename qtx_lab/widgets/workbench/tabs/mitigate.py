"""The tab Mitigate: what can be done about the noise of a device."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets

from ..tab import WorkbenchTab
from ..tab_host import TabHost
from .circuit import CircuitTab
from .html_parts import rows_table


class MitigateTab(WorkbenchTab):
    """What can be done about the noise of a device, for the rows and the circuit of the Circuit tab."""

    name, title, button, task = "mitigate", "Mitigate", "Mitigate rows", "measure"
    first_step = (
        "Press <b>Mitigate rows</b> to measure the rows of the Circuit tab again, with their noise reduced."
    )

    def __init__(self, bench: TabHost, circuit: CircuitTab):
        self._circuit, self._table = circuit, widgets.HTML()
        forms = {"mitigation": circuit.mitigation_form}
        super().__init__(bench, forms, self._table, circuit.view_box, shared=circuit.forms)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the task."""
        return {**self._circuit.arguments(), "mitigation": self.form.spec.to_parameters()}

    def show(self, result: dict[str, Any]) -> None:
        """Show the table of the rows."""
        self._table.value = rows_table(result)

    def cost(self) -> str:
        """Rows and shots of the next measurement."""
        return self._circuit.cost()
