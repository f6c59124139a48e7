"""The tab Train: training with sampled attention."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets

from ....specs import ClusterSpec, Spec, Switch, TrainSpec, field
from ....theme import digits
from ...forms import SpecForm
from ...numbers import spaced
from ...views.stream import MetricStream
from ..process import Work
from ..tab import WorkbenchTab
from ..tab_host import TabHost
from ..tasks.training import exact_twin
from .code_parts import Code, call, changed_fields, shell
from .html_parts import notes_list

FIRST = TrainSpec(
    model="small", num_tokens=128, sampler="systematic", num_samples=8, steps=100, learning_rate=1e-2,
    warmup_steps=10, validate_every=50,
)  # fmt: skip
"""The training at first: from scratch, so that in a minute one sees what drawing costs."""

EXACT_CURVE = "training, exact attention"
"""The curve of the same training with exact attention."""

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
    """Where a model is trained, and beside what."""

    compare: Switch = field(
        True, "Train the same model with exact attention, too, and show both curves.", "yes or no",
        "comparison", label="beside exact",
    )  # fmt: skip
    distributed: Switch = field(
        False, "Over the workers of the cluster below; otherwise in one process.", "yes or no", "where"
    )


class TrainTab(WorkbenchTab):
    """Training with sampled attention."""

    name, title, button, task = "train", "Train", "Train", "train"
    codes = ("python", "command")
    first_step = (
        "Press <b>Train</b> to train a small model from scratch, by exact and by sampled attention: what "
        "does drawing cost?"
    )

    def __init__(self, bench: TabHost):
        forms = {
            "training": SpecForm(FIRST),
            "where": SpecForm(WhereSpec),
            "cluster": SpecForm(ClusterSpec),
        }
        self._headline, self._summary, self._curve_box = widgets.HTML(), widgets.HTML(), widgets.VBox()
        self._work_of_curves: Work | None = None
        super().__init__(bench, forms, self._headline, self._curve_box, self._summary)

    def show_saved(self, result: dict[str, Any], forms: Mapping[str, Any] | None = None) -> None:
        """Show a training that was saved."""
        self._new_curves()
        self._push(result.get("exact_rows", []), is_exact=True)
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
        self._push(data["rows"], data["is_exact"])
        super()._show_part(data)

    def _push(self, rows: list[dict[str, Any]], is_exact: bool = False) -> None:
        for metric, curve in ({"bits_per_byte": EXACT_CURVE} if is_exact else CURVES).items():
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
        lines += [f"result = {trainer}.train()", 'print(f"loss {result.loss:.6f} nats a token")']
        if state["where"]["compare"]:
            twin = call("qtx.TrainSpec", **changed_fields(exact_twin(TrainSpec(**state["training"]))))
            trainer = call("qtx.QuantumTrainer", Code(f"**{twin}.arguments()"), **more)
            lines.append(f"exact = {trainer}.train()")
            lines.append('print(f"with exact attention {exact.loss:.6f} nats a token")')
        return "\n".join([*lines, ""])

    def command(self) -> str:
        """The line of a shell that trains in the same way, and one before for exact attention."""
        state = self.shown_state()
        spec = TrainSpec(**state["training"])
        specs = [exact_twin(spec), spec] if state["where"]["compare"] else [spec]
        return "\n".join(self._command_of(each, state) for each in specs)

    def _command_of(self, spec: TrainSpec, state: Mapping[str, Any]) -> str:
        words = ["qtx-lab", "train"]
        for name, value in changed_fields(spec).items():
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
            f"<tr><th scope='row'>{label}</th><td>{digits(last[metric], 4)}</td></tr>"
            for metric, label in LAST_STEP.items()
            if last.get(metric) is not None
        )
        saved = f"Saved in the run <code>{html.escape(result['run'])}</code>."
        notes = notes_list([*result.get("faults", []), *result.get("notes", [])], saved)
        self._headline.value = _verdict(result)
        self._summary.value = f"<table class='qtx-wb-table'><tbody>{cells}</tbody></table>{notes}"

    def cost(self) -> str:
        """Steps and tokens of the next training."""
        spec = self.form.spec
        assert isinstance(spec, TrainSpec)
        return f"{spaced(spec.steps)} steps × {spaced(spec.batch_size * spec.num_tokens)} tokens"


def _verdict(result: Mapping[str, Any]) -> str:
    """What drawing has cost, as a headline; empty before both trainings have ended."""
    exact_rows = result.get("exact_rows")
    if not exact_rows:
        return ""
    exact = exact_rows[-1].get("held_out_bits_per_byte_exact")
    drawn = result["rows"][-1].get("held_out_bits_per_byte_sampled")
    if exact is None or drawn is None:
        return ""
    cost = f"{abs(drawn - exact):.2f} bits per byte {'more' if drawn > exact else 'less'}"
    return (
        f"<h3 class='qtx-wb-headline'>After {result['rows'][-1]['step']} steps, sampled attention needs "
        f"{cost} than exact attention on held-out text ({drawn:.2f} against {exact:.2f}; one seed)</h3>"
    )
