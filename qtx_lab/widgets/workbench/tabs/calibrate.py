"""The tab Calibrate: the cheapest draws of each layer that keep a language model's loss within a bound."""

from __future__ import annotations

import html
import json
from typing import Any

import ipywidgets as widgets

from ....errors import ArgumentError
from ....experiments.runs import Run
from ....specs import Real, Spec, Whole, field
from ....theme import fixed
from ...forms import SpecForm
from ...numbers import spaced
from ..tab import WorkbenchTab
from ..tab_host import TabHost
from .code_parts import Code, call, shell
from .html_parts import head_row, headline
from .sample import SampleTab


class CalibrationSpec(Spec):
    """What a calibration is to keep, and on how much text it is measured."""

    max_loss: Real = field(
        0.01, "By how much the model's loss may rise, as a share of exact attention's.", "", "bound",
        gt=0, le=1,
    )  # fmt: skip
    length: Whole = field(
        512, "Length of the prompts that the settings are for.", "tokens", "text", ge=32, le=65_536
    )
    windows: Whole = field(
        8, "Stretches of text; a third of them find the settings, the others verify them.", "windows", "text",
        ge=4, le=64,
    )  # fmt: skip


class CalibrateTab(WorkbenchTab):
    """The cheapest draws of each layer of the model that the Sample tab names."""

    name, title, button, task = "calibrate", "Calibrate", "Calibrate", "calibrate"
    codes = ("python", "command")
    first_step = (
        "Press <b>Calibrate</b> to find the draws of each layer of the Sample tab's model that read least "
        "and keep its loss within the bound."
    )

    def __init__(self, bench: TabHost, sample: SampleTab):
        self._sample, self._answer = sample, widgets.HTML()
        forms = {"calibration": SpecForm(CalibrationSpec)}
        super().__init__(bench, forms, self._answer, shared={"source": sample.forms["source"]})

    def arguments(self) -> dict[str, Any]:
        """The arguments of the task."""
        state = self.state()
        if state["source"]["text"] is None:
            raise ArgumentError("A calibration needs a long text: choose a text in place of the prompt.")
        return {**state["source"], **state["calibration"]}

    def state(self) -> dict[str, Any]:
        """The fields of the form, and of the bar those that matter: a head does not make the answer stale."""
        state = super().state()
        return {**state, "source": {name: state["source"][name] for name in ("model", "text", "seed")}}

    def python_code(self) -> str:
        """Python that finds the same settings."""
        state = self.shown_state()
        source, form = state["source"], state["calibration"]
        text = source["text"]
        words = Code("qtx.reference_text()" if text == "reference" else call("qtx.read_text", text))
        best = call(
            "qtx.calibrate", Code("model"), words, form["max_loss"],
            length=form["length"], windows=form["windows"], seed=source["seed"],
        )  # fmt: skip
        return (
            f"import qtx_lab as qtx\n\nmodel = {call('qtx.load_language_model', source['model'])}\n"
            f"best = {best}\nprint(best)\n"
        )

    def command(self) -> str:
        """The line of a shell that finds the same settings."""
        state = self.shown_state()
        source, form = state["source"], state["calibration"]
        return shell(
            "qtx-lab", "calibrate", source["model"], "--text", source["text"],
            "--max-loss", str(form["max_loss"]), "--length", str(form["length"]),
            "--windows", str(form["windows"]), "--seed", str(source["seed"]),
        )  # fmt: skip

    def show(self, result: dict[str, Any]) -> None:
        """Show the answer, what was tried, and the settings to copy."""
        verified = "verified on other text" if result["verified"] else "NOT verified on other text"
        rows = "".join(
            "<tr>" + "".join(f"<td>{cell}</td>" for cell in _cells(candidate)) + "</tr>"
            for candidate in result["candidates"]
        )
        names = ["loss over exact", "95 % interval", "keys read", "values read", "bytes read"]
        settings = html.escape(json.dumps(result["qtx_sampled"], indent=1))
        self._answer.value = (
            headline(f"{html.escape(result['model'])}: {verified}", html.escape(result["summary"]))
            + "<p>What was tried, on the text that the settings were found on:</p>"
            f"<table class='qtx-wb-table'><thead>{head_row(names)}</thead><tbody>{rows}</tbody></table>"
            "<details><summary>The settings, as <code>config.qtx_sampled</code> takes them</summary>"
            f"<pre tabindex='0'>{settings}</pre></details>"
        )

    def fill_report(self, run: Run) -> None:
        """Save the answer, and what was tried."""
        result = self.result
        if result is not None:
            names = ("loss over exact", "95 % interval", "keys read", "values read", "bytes read")
            table = [dict(zip(names, _cells(x), strict=True)) for x in result["candidates"]]
            title = f"Calibration of {result['model']}"
            run.update(title=title, results={"summary": [result["summary"]], "table": table})

    def cost(self) -> str:
        """Tokens that the next calibration reads exactly."""
        spec = self.form.spec
        assert isinstance(spec, CalibrationSpec)
        return f"{spec.windows} × {spaced(spec.length)} tokens"


def _cells(measured: dict[str, Any]) -> list[str]:
    """A row of the table: what some settings cost and read."""
    loss, reads = measured["loss"], measured["reads"]
    mean, low, high = (f"{fixed(100 * loss[x], 2)} %" for x in ("mean", "low", "high"))
    shares = (f"{100 * reads[x]:.1f} %" for x in ("keys", "values", "bytes"))
    return [mean, f"{low} to {high}", *shares]
