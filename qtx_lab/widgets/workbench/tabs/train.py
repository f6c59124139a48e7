"""The tab Train: training with sampled attention."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets

from ....specs import ClusterSpec, Spec, Switch, TrainSpec, field
from ...forms import SpecForm
from ...views.stream import MetricStream
from ..process import Work
from ..tab import WorkbenchTab
from ..tab_host import TabHost
from .code_parts import Code, call, changed_fields, shell
from .html_parts import notes_list, spaced

CURVES = {
    "bits_per_byte": "training",
    "held_out_bits_per_byte_exact": "held out, exact",
    "held_out_bits_per_byte_sampled": "held out, sampled",
}
"""The metrics of a training that are drawn as curves, and how they are called in the picture."""

LAST_STEP = {
    "step": "step",
    "loss": "loss, nats a token",
    "bits_per_byte": "bits per byte",
    "draws": "draws a row",
    "gradient_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
"""The metrics of the last step that are listed, and how they are called."""


class WhereSpec(Spec):
    """Where a model is trained."""

    distributed: Switch = field(
        False, "Over the workers of the cluster below; otherwise in one process.", "yes or no", "where"
    )


class TrainTab(WorkbenchTab):
    """Training with sampled attention."""

    name, title, button, task = "train", "Train", "Train", "train"
    codes = ("python", "command")
    first_step = "Press <b>Train</b> to train the reference model with sampled attention."

    def __init__(self, bench: TabHost):
        forms = {
            "training": SpecForm(TrainSpec(steps=100)),
            "where": SpecForm(WhereSpec),
            "cluster": SpecForm(ClusterSpec),
        }
        self._summary, self._curve_box = widgets.HTML(), widgets.VBox()
        self._work_of_curves: Work | None = None
        super().__init__(bench, forms, self._curve_box, self._summary)

    def show_saved(self, result: dict[str, Any], forms: Mapping[str, Any] | None = None) -> None:
        """Show a training that was saved."""
        self._new_curves()
        self._push(result["rows"])
        super().show_saved(result, forms)

    def _new_curves(self) -> None:
        self.curves = MetricStream("Loss of each step", x_label="step", y_label="bits per byte")
        self._curve_box.children = (self.curves,)

    def _show_part(self, data: Any) -> None:
        with self._lock:  # not before `start` has set `self.work`
            work = self.work
        if work is not self._work_of_curves:
            self._new_curves()
            self._work_of_curves = work
        self._push(data["rows"])
        super()._show_part(data)

    def _push(self, rows: list[dict[str, Any]]) -> None:
        for metric, curve in CURVES.items():
            measured = [row for row in rows if row.get(metric) is not None]
            if measured:
                self.curves.push(curve, [row["step"] for row in measured], [row[metric] for row in measured])

    def arguments(self) -> dict[str, Any]:
        """The arguments of the task."""
        state = self.state()
        return {
            "home": self.bench.runs_folder(),
            "training": state["training"],
            "cluster": state["cluster"],
            **state["where"],
        }

    def python_code(self) -> str:
        """Python that trains in the same way."""
        state = self.shown_state()
        spec = call("qtx.TrainSpec", **changed_fields(TrainSpec(**state["training"])))
        lines = ["import qtx_lab as qtx", "", f"spec = {spec}"]
        more: dict[str, Any] = {}
        if state["where"]["distributed"]:
            cluster = call("qtx.ClusterSpec", **changed_fields(ClusterSpec(**state["cluster"])))
            lines.append(f"cluster = qtx.open_cluster(**{cluster}.arguments())")
            more = {"distributed": True, "cluster": Code("cluster")}
        trainer = call("qtx.QuantumTrainer", Code("**spec.arguments()"), **more)
        lines += [f"result = {trainer}.train()", 'print(f"loss {result.loss:.6f} nats a token")', ""]
        return "\n".join(lines)

    def command(self) -> str:
        """The line of a shell that trains in the same way."""
        state = self.shown_state()
        words = ["qtx-lab", "train"]
        for name, value in changed_fields(TrainSpec(**state["training"])).items():
            text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
            words += [f"--{name.replace('_', '-')}", text]
        if state["where"]["distributed"]:
            cluster = state["cluster"]
            words += ["--cluster", cluster["kind"]]
            words += ["--num-workers", str(cluster["num_workers"])] if cluster["num_workers"] else []
            words += ["--address", cluster["address"]] if cluster["address"] else []
        return shell(*words)

    def show(self, result: dict[str, Any]) -> None:
        """List the metrics of the last step."""
        last = result["rows"][-1]
        cells = "".join(
            f"<tr><th scope='row'>{label}</th><td>{last[metric]:.4g}</td></tr>"
            for metric, label in LAST_STEP.items()
            if last.get(metric) is not None
        )
        saved = f"Saved in the run <code>{html.escape(result['run'])}</code>."
        notes = notes_list([*result.get("faults", []), *result.get("notes", [])], saved)
        self._summary.value = f"<table class='qtx-wb-table'><tbody>{cells}</tbody></table>{notes}"

    def cost(self) -> str:
        """Steps and tokens of the next training."""
        spec = self.form.spec
        assert isinstance(spec, TrainSpec)
        return f"{spaced(spec.steps)} steps × {spaced(spec.batch_size * spec.num_tokens)} tokens"
