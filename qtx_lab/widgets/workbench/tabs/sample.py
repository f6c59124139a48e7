"""The tab Sample: sampled attention of one head beside the exact one."""

from __future__ import annotations

import html
import threading
from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets
import torch
from pydantic import model_validator

from ....models.language_model import language_models
from ....specs import MAX_SEED, ControlSpec, SamplerSpec, Spec, Whole
from ...comms import hear_while_busy
from ...forms import SpecForm
from ...views.lens import AttentionLens
from ..tab import WorkbenchTab
from ..tab_host import TabHost
from .code_parts import IMPORTS, Code, call, inputs_code
from .html_parts import form_field, notes_list, spaced

MAX_ROWS = 16
"""Rows that are sent to the Circuit tab at a time."""

REDRAW_DELAY_S = 0.3
"""Seconds without a change of the form after which a quick draw is made again."""

QUICK_DRAW_S = 3.0
"""Seconds that a draw may take to count as quick."""


class SourceSpec(Spec):
    """Whose attention is looked at; the workbench shows it in the bar at its top."""

    model: str = form_field(
        "reference", "A model's name, which is fetched when it is first used, or the folder of a Hugging "
        "Face model.", "path", "model and text", min_length=1, examples=list(language_models()),
    )  # fmt: skip
    text: str | None = form_field(
        "reference", '"reference" for the shipped text, or the path of a UTF-8 file.', "path",
        "model and text", min_length=1, examples=["reference"],
    )  # fmt: skip
    prompt: str | None = form_field(
        None, "A text of your own, in place of a file.", "text", "model and text",
        min_length=1, instead_of="text", start="The import statement combines two operations; it searches",
    )  # fmt: skip
    num_tokens: Whole = form_field(
        512, "Length of the text's beginning that is used.", "tokens", "model and text",
        label="tokens", ge=2, le=4096,
    )  # fmt: skip
    layer: Whole = form_field(3, "Layer whose attention is shown.", "index", "attention", ge=0, le=4095)
    head: Whole = form_field(0, "Query head whose attention is shown.", "index", "attention", ge=0, le=4095)
    seed: Whole = form_field(0, "Seed of every random number.", "number", "attention", ge=0, le=MAX_SEED)

    @model_validator(mode="before")
    @classmethod
    def _text_or_prompt(cls, fields: Any) -> Any:
        """A prompt takes the place of the text; one of the two is needed."""
        if not isinstance(fields, Mapping):
            return fields
        text, prompt = fields.get("text"), fields.get("prompt")
        if text is not None and prompt is not None:
            raise ValueError(f"prompt={prompt!r} and text={text!r} exclude each other: give one.")
        if prompt is not None:
            return {**fields, "text": None}
        if "text" in fields and text is None:
            raise ValueError("text=None is not allowed without a prompt: give one of them.")
        return fields

    def inputs(self) -> dict[str, Any]:
        """What the workers load: the arguments of `load_inputs`."""
        return {
            "model": self.model,
            "text": self.text,
            "num_tokens": self.num_tokens,
            "prompt": self.prompt,
        }


class SampleTab(WorkbenchTab):
    """Sampled attention of one head beside the exact one."""

    name, title, button, task = "sample", "Sample", "Draw", "sample"
    codes = ("python",)
    first_step = "Press <b>Draw</b> to see a head's exact and sampled attention side by side."

    def __init__(self, bench: TabHost, source: SpecForm):
        self.lens: AttentionLens | None = None
        self._lens_inputs: Any = None
        self._redraw_timer: threading.Timer | None = None
        self._summary = widgets.HTML()
        self._send_button = widgets.Button(description="Send rows to Circuit", disabled=True)
        hear_while_busy(self._send_button)
        self._send_button.on_click(lambda _: self.send_rows())
        self._lens_box = widgets.VBox()
        forms = {
            "sampler": SpecForm(SamplerSpec),
            "control variates": SpecForm(ControlSpec),
        }
        views = (self._summary, self._lens_box, widgets.HBox([self._send_button]))
        super().__init__(bench, forms, *views, shared={"source": source})

    @property
    def source(self) -> SourceSpec:
        """Whose attention is looked at."""
        spec = self.forms["source"].spec
        assert isinstance(spec, SourceSpec)
        return spec

    def arguments(self) -> dict[str, Any]:
        """The arguments of the task."""
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
        """Let the Circuit tab measure the rows that are selected in the lens, and open it."""
        if self.lens is not None and self.lens.selected_rows:
            self.bench.measure_rows(tuple(self.lens.selected_rows))

    def show(self, result: dict[str, Any]) -> None:
        """Show the inputs in a lens, and how far the head is off."""
        forms = self._forms_of_result or self.state()
        sampler, source = SamplerSpec(**forms["sampler"]), SourceSpec(**forms["source"])
        layer = result["layers"].index(source.layer)
        inputs = (sampler.name, source.inputs(), source.seed, tuple(result["layers"]), result["q"].shape)
        if self.lens is None or inputs != self._lens_inputs:
            q, k, v = (list(torch.from_numpy(result[name])) for name in "qkv")
            self.lens = AttentionLens(
                q, k, v,
                tokens=result["tokens"] or None, sampler=sampler.name, num_samples=sampler.num_samples or 64,
                is_causal=result["is_causal"], seed=source.seed % 2**31, layer=layer, head=source.head,
            )  # fmt: skip
            self._lens_inputs = inputs
            self.lens.observe(lambda _: self._form_follows_lens(), ["num_samples", "layer", "head"])
            self.lens.observe(self._rows_selected, "selected_rows")
            self._lens_box.children = (self.lens,)
        self._summary.value = self._summary_html(result, sampler, source)

    def cost(self) -> str:
        """Draws and seconds of the last result."""
        if self.result is None:
            return ""
        return f"{spaced(self.result['draws'])} draws in {self.result['seconds']:.2g} s"

    def python_code(self) -> str:
        """Python that draws the same estimate, and computes the same error."""
        state = self.shown_state()
        source, sampler = state["source"], SamplerSpec(**state["sampler"])
        settings: dict[str, Any] = {"sampler": sampler.name}
        if sampler.tolerance is None:
            settings["num_samples"] = sampler.num_samples
        else:
            settings |= {"tolerance": sampler.tolerance, "confidence": sampler.confidence}
        if sampler.replicates > 1:
            settings["replicates"] = sampler.replicates
        if state["control variates"]["names"]:
            settings["control_variate"] = list(state["control variates"]["names"])
        estimate = call(
            "qtx.sampled_attention", Code("q"), Code("k"), Code("v"), **settings,
            is_causal=Code("inputs.is_causal"), enable_gqa=Code("q.shape[0] != k.shape[0]"),
            generator=Code(f"torch.Generator().manual_seed({source['seed']})"),
        )  # fmt: skip
        exact = call(
            "torch.nn.functional.scaled_dot_product_attention",
            Code("q[None]"), Code("k[None]"), Code("v[None]"),
            is_causal=Code("inputs.is_causal"), enable_gqa=Code("q.shape[0] != k.shape[0]"),
        )  # fmt: skip
        return (
            f"{IMPORTS}\n{inputs_code(source)}layer, head = {source['layer']}, {source['head']}\n"
            f"q, k, v = inputs.layers[layer]\nestimate = {estimate}\n"
            f"exact = {exact}[0, head].double()\n"
            "error = float((estimate.output[head] - exact).norm() / exact.norm())\n"
            'print(f"Layer {layer}, head {head}: off by {error:.3%} of the exact output\'s norm.")\n'
        )

    def _summary_html(self, result: Mapping[str, Any], sampler: SamplerSpec, source: SourceSpec) -> str:
        error, std_error = result["error"], result["std_error"]
        measured = f"{error:.2g}" if std_error is None else f"{error:.2g} (standard error {std_error:.2g})"
        if sampler.tolerance is None:
            effort = f"{sampler.num_samples} draws a row"
        else:
            effort = f"tolerance {sampler.tolerance:g}"
        controls = self.forms["control variates"].spec.to_parameters()["names"]
        if controls:
            effort += f", corrected by {', '.join(controls)}; {result['plain_error']:.2g} without"
        return (
            f"<p><b>Layer {source.layer}, head {source.head}: {html.escape(sampler.name)} is off by "
            f"{measured} of the output</b> ({effort}).</p>"
            + (notes_list(result["fallbacks"]) if result["fallbacks"] else "")
        )

    def _form_follows_lens(self) -> None:
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

    def _lens_follows_form(self) -> None:
        """Show the form's draws, layer and head in the lens at once, if it has these inputs."""
        lens, result = self.lens, self.result
        if lens is None or result is None:
            return
        sampler, source = self.form.spec, self.source
        assert isinstance(sampler, SamplerSpec)
        if sampler.num_samples is not None and lens.num_samples != sampler.num_samples:
            lens.num_samples = sampler.num_samples
        if source.layer in result["layers"] and source.head < lens.heads:
            lens.layer, lens.head = result["layers"].index(source.layer), source.head

    def _rows_selected(self, change: Any) -> None:
        self._send_button.disabled = not change.new
        count = min(len(change.new), MAX_ROWS)
        self._send_button.description = (
            f"Send {count} row{'s' * (count != 1)} to Circuit" if count else "Send rows to Circuit"
        )

    def _form_changed(self) -> None:
        super()._form_changed()
        self._lens_follows_form()
        if self.result is not None and self.result["seconds"] < QUICK_DRAW_S and not self.bench.restoring:
            if self._redraw_timer is not None:
                self._redraw_timer.cancel()
            self._redraw_timer = threading.Timer(REDRAW_DELAY_S, self._redraw)
            self._redraw_timer.daemon = True
            self._redraw_timer.start()

    def _redraw(self) -> None:
        if self.busy:
            self._form_changed()
        elif self._is_stale() and all(form.valid for form in self.forms.values()):
            self._start_or_explain()
