"""The tab Mitigate: what can be done about the noise of a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from ....specs import MitigationSpec
from ...forms import SpecForm
from ..tab import WorkbenchTab
from .html_parts import rows_table

if TYPE_CHECKING:
    from ..workbench import Workbench

ZERO_NOISE = MitigationSpec.model_construct(
    method="zne", readout=True, noise_levels=(1.0, 3.0), scaling="model"
)
"""The mitigation at first."""


class MitigateTab(WorkbenchTab):
    """What can be done about the noise of a device, for the rows and the circuit of the Circuit tab."""

    name, title, button, task = "mitigate", "Mitigate", "Mitigate rows", "measure"
    first_step = (
        "Press <b>Mitigate rows</b> to measure the rows of the Circuit tab again, with their noise reduced."
    )

    def __init__(self, bench: Workbench):
        self._table, self.view_box = widgets.HTML(), widgets.VBox()
        super().__init__(bench, {"mitigation": SpecForm(ZERO_NOISE)}, self._table, self.view_box)
        self.form.observe(lambda _: self._view_follows_form(), "spec")

    @property
    def mitigation(self) -> MitigationSpec:
        """What the form says."""
        spec = self.form.spec
        assert isinstance(spec, MitigationSpec)
        return spec

    def fit_settings(self) -> tuple[tuple[float, ...], str]:
        """Noise levels, at least two, and method of the zero-noise fit."""
        levels = self.mitigation.noise_levels
        return (levels if len(levels) > 1 else ZERO_NOISE.noise_levels), self.mitigation.extrapolation

    def arguments(self) -> dict[str, Any]:
        """The arguments of the task."""
        return {**self.bench.circuit.arguments(), "mitigation": self.form.spec.to_parameters()}

    def state(self) -> dict[str, Any]:
        """The fields of the forms, with those of the Circuit tab: other rows make this picture stale, too."""
        return {**super().state(), "circuit tab": self.bench.circuit.state()}

    def show(self, result: dict[str, Any]) -> None:
        """Show the table of the rows."""
        self._table.value = rows_table(result)

    def _view_follows_form(self) -> None:
        """Show the form's noise levels and method in the zero-noise fit."""
        view, spec = self.bench.circuit.view, self.mitigation
        if view is not None and len(spec.noise_levels) > 1:
            if list(spec.noise_levels) != sorted(view.noise_levels):
                view.noise_levels = list(spec.noise_levels)
            view.method = spec.extrapolation

    def cost(self) -> str:
        """Rows and shots of the next measurement."""
        return self.bench.circuit.cost()
