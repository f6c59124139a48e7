"""The seven tabs of the workbench, in the order of the work."""

from __future__ import annotations

import base64
import html
import threading
from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import torch
from pydantic import Field
from torch import Tensor

from ...specs.base import (
    MAX_SEED,
    CircuitSpec,
    ClusterSpec,
    ControlSpec,
    MitigationSpec,
    SamplerSpec,
    Spec,
    SweepSpec,
    Switch,
    TrainSpec,
    Whole,
)
from ..forms import TURN, SpecForm
from ..views.base import heard_while_busy
from ..views.lens import AttentionLens
from ..views.stream import MetricStream
from .process import Work
from .tab import Page

if TYPE_CHECKING:
    from ..views.circuit import CircuitView
    from .workbench import Workbench

MOST_ROWS = 16
"""Rows that are sent to a circuit at a time."""

NO_ADVANTAGE = (
    "Loading a row that is known into a circuit gives no advantage over drawing from it: as many pseudo-random draws "
    "stand beside, as <em>classical</em>."
)

TWIN = CircuitSpec.model_construct(device="fake_fez")
"""A device to begin with. Not checked: that would load qiskit, which takes seconds, in the cell that makes a workbench."""

MITIGATION = MitigationSpec.model_construct(
    method="zne", readout=True, noise_levels=(1.0, 3.0), scaling="model"
)

CURVES = {
    "bits_per_byte": "training",
    "held_out_bits_per_byte_exact": "held out, exact",
    "held_out_bits_per_byte_sampled": "held out, sampled",
}
"""Of a training's metrics, and how they are named in the picture."""

AGAIN = 0.3
"""Seconds of quiet after which a draw that is quick is made again."""

QUICK = 3.0
"""Seconds that it may take."""


def _field(default: Any, text: str, unit: str, group: str, **bounds: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"unit": unit, "group": group}, **bounds)


class SourceSpec(Spec):
    """Whose attention is looked at."""

    layer: Whole = _field(3, "Layer whose attention is shown.", "index", "attention", ge=0, le=4095)
    head: Whole = _field(0, "Query head whose attention is shown.", "index", "attention", ge=0, le=4095)
    seed: Whole = _field(0, "Seed of every random number.", "number", "attention", ge=0, le=MAX_SEED)
    model: str = _field(
        "reference", '"reference" for the shipped model, or the folder of a Hugging Face model.', "path",
        "model and text", min_length=1,
    )  # fmt: skip
    text: str = _field(
        "reference", '"reference" for the shipped text, or the path of a UTF-8 file.', "path", "model and text",
        min_length=1,
    )  # fmt: skip
    num_tokens: Whole = _field(
        512, "Length of the text's beginning that is used.", "tokens", "model and text", ge=2, le=4096
    )

    def inputs(self) -> dict[str, Any]:
        """What the workers load."""
        return {"model": self.model, "text": self.text, "num_tokens": self.num_tokens}


class RowsSpec(Spec):
    """Which rows of the head are measured."""

    rows: tuple[Whole, ...] = _field(
        (15, 31),
        "Queries whose rows are measured, counted from 0.",
        "",
        "rows",
        min_length=1,
        max_length=MOST_ROWS,
    )


class WhereSpec(Spec):
    """Where a model is trained."""

    distributed: Switch = _field(
        False, "Over the workers of the cluster below; otherwise in one process.", "yes or no", "where"
    )


class SamplePage(Page):
    """Sampled attention of one head beside the exact one."""

    name, title, button, task = "sample", "Sample", "Draw", "sample"
    first = "Press <b>Draw</b> to see a head's exact and sampled attention side by side."

    def __init__(self, bench: Workbench, source: SourceSpec):
        self.lens: AttentionLens | None = None
        self._lens_of: Any = None
        self._later: threading.Timer | None = None
        self._summary = widgets.HTML()
        self._send = widgets.Button(description="Send rows to Circuit", disabled=True)
        heard_while_busy(self._send)
        self._send.on_click(lambda _: self.send_rows())
        self._place = widgets.VBox()
        forms = {
            "sampler": SpecForm(SamplerSpec),
            "control variates": SpecForm(ControlSpec),
            "source": SpecForm(source),
        }
        super().__init__(bench, forms, self._summary, self._place, widgets.HBox([self._send]))

    @property
    def source(self) -> SourceSpec:
        spec = self.forms["source"].spec
        assert isinstance(spec, SourceSpec)
        return spec

    def arguments(self) -> dict[str, Any]:
        source = self.source
        return {
            "source": source.inputs(),
            "layer": source.layer,
            "head": source.head,
            "seed": source.seed,
            "sampler": self.form.spec.to_parameters(),
            "control": self.forms["control variates"].spec.to_parameters(),
        }

    def send_rows(self) -> None:
        """Let the Circuit tab measure the rows that are brushed, and open it."""
        if self.lens is not None and self.lens.selected_rows:
            self.bench.circuit.forms["rows"].change(rows=self.lens.selected_rows[:MOST_ROWS])
            self.bench.tabs.selected_index = list(self.bench.pages).index("circuit")

    def show(self, result: dict[str, Any]) -> None:
        made_by = self._made_by or self.state()
        sampler, source = SamplerSpec(**made_by["sampler"]), SourceSpec(**made_by["source"])
        layer = result["layers"].index(source.layer)
        what = (sampler.name, source.inputs(), source.seed, tuple(result["layers"]), result["q"].shape)
        if self.lens is None or what != self._lens_of:
            q, k, v = (list(torch.from_numpy(result[name])) for name in "qkv")
            self.lens = AttentionLens(
                q, k, v,
                tokens=result["tokens"] or None, sampler=sampler.name, num_samples=sampler.num_samples or 64,
                is_causal=result["is_causal"], seed=source.seed % 2**31, layer=layer, head=source.head,
            )  # fmt: skip
            self._lens_of = what
            self.lens.observe(lambda _: self._lens_moved(), ["num_samples", "layer", "head"])
            self.lens.observe(self._brushed, "selected_rows")
            self._place.children = (self.lens,)
        self._summary.value = self._sentence(result, sampler, source)

    def cost(self) -> str:
        if self.result is None:
            return ""
        return f"{spaced(self.result['draws'])} draws in {self.result['seconds']:.2g} s"

    def _sentence(self, result: Mapping[str, Any], sampler: SamplerSpec, source: SourceSpec) -> str:
        error, sure = result["error"], result["std_error"]
        found = f"{error:.2g}" if sure is None else f"{error:.2g} (standard error {sure:.2g})"
        drawn = (
            f"{sampler.num_samples} draws a row"
            if sampler.tolerance is None
            else f"tolerance {sampler.tolerance:g}"
        )
        control = self.forms["control variates"].spec.to_parameters()["names"]
        corrected = (
            f", corrected by {', '.join(control)}; {result['plain_error']:.2g} without" if control else ""
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in result["fallbacks"])
        return (
            f"<p><b>Layer {source.layer}, head {source.head}: {html.escape(sampler.name)} is off by {found} of the output</b> "
            f"({drawn}{corrected}).</p>" + (f"<ul class='qtx-wb-notes'>{notes}</ul>" if notes else "")
        )

    def _lens_moved(self) -> None:
        lens, result = self.lens, self.result
        if lens is None or result is None:
            return
        sampler, source = self.form.spec, self.source
        assert isinstance(sampler, SamplerSpec)
        if sampler.tolerance is None and sampler.num_samples != lens.num_samples:
            self.form.change(num_samples=lens.num_samples)
        layer = result["layers"][lens.layer]
        if (source.layer, source.head) != (layer, lens.head):
            self.forms["source"].change(layer=layer, head=lens.head)

    def _move_lens(self) -> None:
        """What forms and picture both have follows the forms at once, where no other inputs are asked for."""
        lens, result = self.lens, self.result
        if lens is None or result is None:
            return
        sampler, source = self.form.spec, self.source
        assert isinstance(sampler, SamplerSpec)
        if sampler.num_samples is not None and lens.num_samples != sampler.num_samples:
            lens.num_samples = sampler.num_samples
        if source.layer in result["layers"] and source.head < lens.heads:
            lens.layer, lens.head = result["layers"].index(source.layer), source.head

    def _brushed(self, change: Any) -> None:
        self._send.disabled = not change.new
        count = min(len(change.new), MOST_ROWS)
        self._send.description = (
            f"Send {count} row{'s' * (count != 1)} to Circuit" if count else "Send rows to Circuit"
        )

    def _changed(self) -> None:
        super()._changed()
        self._move_lens()
        if self.result is not None and self.result["seconds"] < QUICK and not self.bench.restoring:
            if self._later is not None:
                self._later.cancel()
            self._later = threading.Timer(AGAIN, self._redraw)
            self._later.daemon = True
            self._later.start()

    def _redraw(self) -> None:
        if self.busy:
            self._changed()
        elif self._stale() and all(form.valid for form in self.forms.values()):
            self._begin()


class CircuitPage(Page):
    """Rows as circuits, on a simulator or the twin of a device."""

    name, title, button, task = "circuit", "Circuit", "Measure rows", "measure"
    first = "Press <b>Measure rows</b> to load rows of the head into a circuit and measure it."

    def __init__(self, bench: Workbench):
        fields = [
            name for name, group in _groups(CircuitSpec).items() if group != "IBM" and name != "provider"
        ]
        forms = {"circuit": SpecForm(TWIN, fields), "rows": SpecForm(RowsSpec)}
        self._picture, self.place = widgets.HTML(), widgets.VBox()
        self.view: CircuitView | None = None
        self._view_of: Any = None
        super().__init__(bench, forms, self.place, self._picture)

    def arguments(self) -> dict[str, Any]:
        sample = self.bench.sample.arguments()
        rows = self.forms["rows"].spec
        assert isinstance(rows, RowsSpec)
        return {
            **{name: sample[name] for name in ("source", "layer", "head", "seed")},
            "rows": list(rows.rows),
            "circuit": self.form.spec.to_parameters(),
        }

    def show(self, result: dict[str, Any]) -> None:
        self._picture.value = rows_table(result)
        spec = CircuitSpec(**(self._made_by or self.state())["circuit"])
        what = (spec.model_copy(update={"shots": 1}), result["p"].tobytes())
        if self.view is None or what != self._view_of:
            self.view = self._make_view(spec, torch.from_numpy(result["p"]), result["rows"])
            self._view_of = what
        self.view.shots = spec.shots
        self._fill_view()

    def _make_view(self, spec: CircuitSpec, p: Tensor, queries: Iterable[int]) -> CircuitView:
        """A view of these rows' circuit; the zero-noise fit in it has the levels of the Mitigate tab."""
        with (
            TURN
        ):  # it loads qiskit, as the checks of a circuit's form do, and two threads must not do so at once
            from ..views.circuit import CircuitView
        mitigation = self.bench.mitigate.form
        kept = mitigation.spec
        assert isinstance(kept, MitigationSpec)
        levels = kept.noise_levels if len(kept.noise_levels) > 1 else (1.0, 3.0)
        view = CircuitView(
            spec.build(), shots=spec.shots, noise_levels=levels, method=kept.extrapolation, seed=0
        )
        view.show_rows(p, names=[f"query {i}" for i in queries])
        view.observe(lambda _: self._fill_view(), "row")
        view.observe(
            lambda change: mitigation.enter(noise_levels=[f"{x:g}" for x in change.new]), "noise_levels"
        )
        view.observe(lambda change: mitigation.enter(extrapolation=change.new), "method")
        self.place.children = self.bench.mitigate.place.children = (view,)
        return view

    def _fill_view(self) -> None:
        """Show what was measured of the view's row."""
        view, result = self.view, self.result
        if view is not None and result is not None and view.num_rows == len(result["rows"]):
            from ...backends import RowCounts  # loads qiskit, as the view has

            one, shots = slice(view.row, view.row + 1), int(result["shots"])
            counts, classical, discarded = (
                torch.from_numpy(result[name])[one] for name in ("counts", "classical", "discarded")
            )
            told = {
                "fallbacks": result["fallbacks"],
                "not_modelled": result["facts"].get("not_modelled", ()),
            }
            baseline = RowCounts(classical, torch.zeros_like(discarded), shots)
            curve = [
                {name: x if name == "shots" else x[view.row] for name, x in point.items()}
                for point in result["curve"]
            ]
            view.fill(RowCounts(counts, discarded, shots, baseline, told), curve)

    def cost(self) -> str:
        spec, rows = self.form.spec, self.forms["rows"].spec
        assert isinstance(spec, CircuitSpec)
        assert isinstance(rows, RowsSpec)
        return f"{len(rows.rows)} rows × {spaced(spec.shots)} shots"


def rows_table(result: Mapping[str, Any]) -> str:
    """How far each row's measured distribution is off, beside as many classical draws."""
    facts = result["facts"]
    head = "".join(
        f"<th scope='col'>{name}</th>"
        for name in (
            "row",
            "keys",
            *(["mitigated"] if result["estimate"] is not None else []),
            "measured",
            "classical",
        )
    )
    body = ""
    for i, row in enumerate(result["rows"]):
        keys = int((result["p"][i] > 0).sum())
        cells = [result["error"][i]] if result["estimate"] is not None else []
        cells += [result["raw_error"][i], result["classical_error"][i]]
        body += (
            f"<tr><th scope='row'>{row}</th><td>{keys}</td>"
            + "".join(f"<td>{x:.3f}</td>" for x in cells)
            + "</tr>"
        )
    told = ", ".join(
        f"{label} {html.escape(str(facts[name]))}"
        for name, label in (
            ("device", "device"), ("loader", "loader"), ("qubits", "qubits"), ("depth", "depth"),
            ("two_qubit_gates", "two-qubit gates"), ("calibration", "calibrated"), ("mitigation", "mitigation"),
        )
        if facts.get(name) is not None
    )  # fmt: skip
    notes = "".join(
        f"<li>{html.escape(note)}</li>" for note in [*result["fallbacks"], *facts.get("not_modelled", [])]
    )
    return (
        f"<p><b>Total variation from the exact row after {spaced(result['shots'])} shots</b></p>"
        f"<table class='qtx-wb-table'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>{told}; {spaced(int(result['discarded'].sum()))} shots discarded.</p><ul class='qtx-wb-notes'>{notes}<li>{NO_ADVANTAGE}</li></ul>"
    )


class MitigatePage(Page):
    """What can be done about the device's noise, on the rows and the circuit of the Circuit tab."""

    name, title, button, task = "mitigate", "Mitigate", "Mitigate rows", "measure"
    first = (
        "Press <b>Mitigate rows</b> to measure the rows of the Circuit tab again, with their noise reduced."
    )

    def __init__(self, bench: Workbench):
        forms = {"mitigation": SpecForm(MITIGATION)}
        self._picture, self.place = widgets.HTML(), widgets.VBox()
        super().__init__(bench, forms, self._picture, self.place)
        self.form.observe(lambda _: self._move_view(), "spec")

    def arguments(self) -> dict[str, Any]:
        return {**self.bench.circuit.arguments(), "mitigation": self.form.spec.to_parameters()}

    def state(self) -> dict[str, Any]:
        # What is measured stands in the Circuit tab: other rows make this picture stale too.
        return {
            **super().state(),
            **({"circuit tab": self.bench.circuit.state()} if hasattr(self.bench, "circuit") else {}),
        }

    def show(self, result: dict[str, Any]) -> None:
        self._picture.value = rows_table(result)

    def _move_view(self) -> None:
        """The zero-noise fit of the Circuit tab's view follows the form."""
        view, spec = self.bench.circuit.view, self.form.spec
        assert isinstance(spec, MitigationSpec)
        if view is not None and len(spec.noise_levels) > 1:
            if list(spec.noise_levels) != sorted(view.noise_levels):
                view.noise_levels = list(spec.noise_levels)
            view.method = spec.extrapolation

    def cost(self) -> str:
        return self.bench.circuit.cost()


class HardwarePage(Page):
    """Rows on a device, or on its twin: a job that is written down before it is submitted."""

    name, title, button, task = "hardware", "Hardware", "Submit rows", "submit"
    first = "Press <b>Submit rows</b> to run the rows of the Circuit tab as a job; a twin needs no account."

    def __init__(self, bench: Workbench):
        fields = [name for name, group in _groups(CircuitSpec).items() if group not in ("noise", "hybrid")]
        self._picture = widgets.HTML()
        super().__init__(bench, {"device": SpecForm(TWIN, fields)}, self._picture, bench.jobs)

    def arguments(self) -> dict[str, Any]:
        home = self.bench.run.path.parent.resolve()
        return {
            **self.bench.circuit.arguments(),
            "circuit": self.form.spec.to_parameters(),
            "home": str(home),
        }

    def show(self, result: dict[str, Any]) -> None:
        kept = f"<p>Kept in the run <code>{html.escape(result['run'])}</code>.</p>" if "run" in result else ""
        self._picture.value = kept + rows_table(result)
        self.bench.list_jobs()

    def cost(self) -> str:
        spec = self.form.spec
        assert isinstance(spec, CircuitSpec)
        rows = (
            len(self.bench.circuit.forms["rows"].spec.to_parameters()["rows"])
            if hasattr(self.bench, "circuit")
            else 0
        )
        return f"{rows} rows × {spaced(spec.shots)} shots"


class TrainPage(Page):
    """Training with sampled attention."""

    name, title, button, task = "train", "Train", "Train", "train"
    first = "Press <b>Train</b> to train the reference model with drawn attention."

    def __init__(self, bench: Workbench):
        forms = {
            "training": SpecForm(TrainSpec(steps=100)),
            "where": SpecForm(WhereSpec),
            "cluster": SpecForm(ClusterSpec),
        }
        self._picture, self._place = widgets.HTML(), widgets.VBox()
        self._curves_of: Work | None = None
        super().__init__(bench, forms, self._place, self._picture)

    def put(self, result: dict[str, Any], made_by: Mapping[str, Any] | None = None) -> None:
        """Show a training that was kept."""
        self._new_curves()
        self._push(result["rows"])
        super().put(result, made_by)

    def _new_curves(self) -> None:
        self.curves = MetricStream("Loss of each step", x_label="step", y_label="bits per byte")
        self._place.children = (self.curves,)

    def _take(self, data: Any) -> None:
        with self._turn:  # not before `start` has said which work it is
            work = self.work
        if work is not self._curves_of:
            self._new_curves()
            self._curves_of = work
        self._push(data["rows"])
        super()._take(data)

    def _push(self, rows: list[dict[str, Any]]) -> None:
        for name, series in CURVES.items():
            told = [row for row in rows if row.get(name) is not None]
            if told:
                self.curves.push(series, [row["step"] for row in told], [row[name] for row in told])

    def arguments(self) -> dict[str, Any]:
        state = self.state()
        return {
            "home": str(self.bench.run.path.parent.resolve()),
            "training": state["training"],
            "cluster": state["cluster"],
            **state["where"],
        }

    def show(self, result: dict[str, Any]) -> None:
        last = result["rows"][-1]
        names = {
            "step": "step", "loss": "loss, nats a token", "bits_per_byte": "bits per byte", "draws": "draws a row",
            "gradient_norm": "gradient norm", "tokens_per_second": "tokens per second",
        }  # fmt: skip
        cells = "".join(
            f"<tr><th scope='row'>{label}</th><td>{last[name]:.4g}</td></tr>"
            for name, label in names.items()
            if last.get(name) is not None
        )
        notes = "".join(
            f"<li>{html.escape(x)}</li>" for x in [*result.get("faults", []), *result.get("notes", [])]
        )
        self._picture.value = (
            f"<table class='qtx-wb-table'><tbody>{cells}</tbody></table><ul class='qtx-wb-notes'>{notes}"
            f"<li>Kept in the run <code>{html.escape(result['run'])}</code>.</li></ul>"
        )

    def cost(self) -> str:
        spec = self.form.spec
        assert isinstance(spec, TrainSpec)
        return f"{spaced(spec.steps)} steps × {spaced(spec.batch_size * spec.num_tokens)} tokens"


class SweepPage(Page):
    """The same notebook over many parameters."""

    name, title, button, task = "sweep", "Sweep", "Sweep", "sweep"
    first = "Press <b>Sweep</b> to run a notebook once for every combination of the grid's values."

    def __init__(self, bench: Workbench):
        plan = SweepSpec(
            notebook="00_quickstart",
            sha256="0" * 64,  # of no file: the sweep that is started has the right one
            grid={"sampler": ["systematic", "head-tail"]},
            parameters={"num_tokens": 128, "num_windows": 1, "sample_counts": [8, 32]},
        )
        fields = [name for name in SweepSpec.model_fields if name != "sha256"]
        self._picture = widgets.HTML()
        super().__init__(
            bench,
            {"plan": SpecForm(plan, fields), "cluster": SpecForm(ClusterSpec(kind="local"))},
            self._picture,
        )

    def arguments(self) -> dict[str, Any]:
        return {"home": str(self.bench.run.path.parent.resolve()), **self.state()}

    def show(self, result: dict[str, Any]) -> None:
        pictures = "".join(
            f"<img class='qtx-wb-{theme}' alt='{html.escape(result['caption'])}' "
            f"src='data:image/png;base64,{base64.b64encode(result[theme].tobytes()).decode()}'>"
            for theme in ("light", "dark")
            if theme in result
        )
        head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in result["columns"])
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_short(value))}</td>" for value in row) + "</tr>"
            for row in result["rows"]
        )
        self._picture.value = (
            f"<p><b>{len(result['rows'])} notebooks; the sweep is {html.escape(result['status'])}</b></p>{pictures}"
            f"<div class='qtx-wb-wide' tabindex='0' role='region' aria-label='Table of the sweep'>"
            f"<table class='qtx-wb-table'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
            f"<ul class='qtx-wb-notes'><li>Kept in the run <code>{html.escape(result['run'])}</code>.</li></ul>"
        )

    def picture(self) -> bytes | None:
        return self.result["light"].tobytes() if self.result and "light" in self.result else None

    def cost(self) -> str:
        spec = self.form.spec
        assert isinstance(spec, SweepSpec)
        combinations = prod(len(values) for values in spec.grid.values()) if spec.grid else 0
        return f"{spaced(combinations * spec.repeats)} notebooks"


class RunsPage(Page):
    """All runs, newest first."""

    name, title, button, task = "runs", "Runs", "Refresh", "list_runs"
    first = "Press <b>Refresh</b> to list the runs."

    def __init__(self, bench: Workbench):
        self._told_of = widgets.HTML()
        super().__init__(bench, {}, self._told_of, bench.jobs)

    def arguments(self) -> dict[str, Any]:
        return {"home": str(self.bench.home)}

    def show(self, result: dict[str, Any]) -> None:
        self.bench.list_jobs()
        self._told_of.value = f"<p><b>{spaced(result['all'])} runs in {html.escape(result['home'])}</b></p>"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def spaced(number: int) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{number:,}".replace(",", "\u2009")


def _groups(kind: type[Spec]) -> dict[str, str]:
    return {
        name: str(schema.get("group", "")) for name, schema in kind.model_json_schema()["properties"].items()
    }
