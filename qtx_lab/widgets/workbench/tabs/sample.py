"""The tab Sample: sampled attention of one head beside the exact one."""

from __future__ import annotations

import html
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch
from pydantic import model_validator
from traitlets import TraitError

from ....errors import ArgumentError, JobTimeout, QtxError
from ....experiments.runs import Run
from ....models.language_model import language_models
from ....specs import (
    MAX_SEED,
    ControlSpec,
    DrawnHeads,
    SamplerSpec,
    Spec,
    Whole,
    heads_text,
    places_of,
    read_heads,
)
from ...comms import hear_while_busy
from ...forms import SpecForm
from ...numbers import spaced
from ...views.lens import AttentionLens
from ...views.lens_estimates import percent_text
from ..process import Work
from ..process_server import TaskReport
from ..tab import WorkbenchTab
from ..tab_host import TabHost
from ..tasks.sampling import head_estimate, sample
from .code_parts import IMPORTS, Code, call, inputs_code
from .html_parts import form_field, ranges_text

MAX_ROWS = 16
"""Rows that are sent to the Circuit tab at a time."""

MAX_LIVE_BYTES = 1_750_000
"""Bytes of the maps that redraw in a report, which stays below 3 MB with its pictures."""

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


class HeadsSpec(Spec):
    """Which layers and heads draw; they can be picked in the lens, too."""

    drawn_heads: DrawnHeads | None = form_field(
        None, "Layers and heads that draw, as 0-2, 3:0, 3:5; the rest is exact. None: all draw.",
        "layers and heads", "heads", label="drawn heads", min_length=1,
    )  # fmt: skip


class SampleTab(WorkbenchTab):
    """Sampled attention of one head beside the exact one."""

    name, title, button, task = "sample", "Sample", "Draw", "sample"
    codes = ("python",)
    first_step = "Press <b>Draw</b> to see a head's exact and sampled attention side by side."

    def __init__(self, bench: TabHost, source: SpecForm):
        self.lens: AttentionLens | None = None
        self._lens_inputs: Any = None
        self._giving = self._automatic = False
        self._first_forms: dict[str, Any] | None = None  # of the first picture, while it is not saved
        self._redraw_timer: threading.Timer | None = None
        self._summary = widgets.HTML()
        self._send_button = widgets.Button(description="Send rows to Circuit", disabled=True)
        self._sent = widgets.HTML()
        hear_while_busy(self._send_button)
        self._send_button.on_click(lambda _: self.send_rows())
        self._lens_box = widgets.VBox()
        forms = {
            "sampler": SpecForm(SamplerSpec),
            "control variates": SpecForm(ControlSpec),
            "heads": SpecForm(HeadsSpec),
        }
        send = widgets.HBox([self._send_button, self._sent])
        views = (self._lens_box, self._summary, send)
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
            **self.forms["heads"].spec.to_parameters(),
        }

    def start(self, **changes: Any) -> Work:
        """Draw, and return the work while it runs; see `WorkbenchTab.start`.

        What draws by itself, as after a change of a setting, does not stand in the way of this.
        """
        if self._automatic and self.busy and self.work is not None:
            try:
                self.work.wait(QUICK_DRAW_S)
            except JobTimeout:
                self.cancel()
            except QtxError:
                pass
        self._automatic = False
        return super().start(**changes)

    def draw_first(self) -> None:
        """Draw the first picture, before anybody asks for it, where that takes a moment.

        It is drawn in this process, because the imports of a worker take longer than the drawing.
        """
        model = self.source.model
        quick = model == "reference" or model.endswith(".safetensors")
        if quick and self.result is None and self.work is None:
            threading.Thread(target=self._draw_here, daemon=True).start()

    def _draw_here(self) -> None:
        """Draw in this thread; what somebody has started in the meantime takes precedence."""
        forms = self.state()
        try:
            result = sample(TaskReport(lambda kind, content: None), **self.arguments())
        except QtxError as error:
            self._show_message(str(error))
            return
        if self.work is None and self.result is None:
            self.show_saved(result, forms)
            self._first_forms = forms
            self.bench.request_picture()
            if self.bench.storage_place():
                self.bench.request_save()

    def save_first_picture(self) -> None:
        """Save the first picture, which nobody asked for, once the workbench has a run."""
        forms, self._first_forms = self._first_forms, None
        if forms is not None and self.work is None and self.result is not None:
            self.bench.save_result(self.name, self.result, forms)

    def send_rows(self) -> None:
        """Open the Circuit tab, which measures the rows that are selected in the lens."""
        if self.lens is not None and self.lens.selected_rows:
            self.bench.measure_rows(tuple(self.lens.selected_rows))

    def show(self, result: dict[str, Any]) -> None:
        """Show the estimate that was asked for: maps, thumbnails and numbers in the lens are of this one."""
        forms = self._forms_of_result or self.state()
        sampler, source = SamplerSpec(**forms["sampler"]), SourceSpec(**forms["source"])
        self.bench.fit_rows(result["q"].shape[-2])
        layer = result["layers"].index(source.layer)
        inputs = (source.inputs(), source.seed, tuple(result["layers"]), result["q"].shape)
        if self.lens is None or inputs != self._lens_inputs:
            q, k, v = (list(torch.from_numpy(result[name])) for name in "qkv")
            lens = AttentionLens(
                q, k, v,
                tokens=result["tokens"] or None, sampler=sampler.name, num_samples=sampler.num_samples or 64,
                is_causal=result["is_causal"], seed=source.seed, layer=layer, head=source.head,
            )  # fmt: skip
            lens.show_estimate(head_estimate(result), layer=layer, head=source.head)
            self.lens, self._lens_inputs = lens, inputs
            lens.observe(lambda _: self._form_follows_lens(), ["num_samples", "layer", "head"])
            lens.observe(self._rows_selected, "selected_rows")
            self._pick_heads()
            lens.observe(lambda _: self._heads_picked(), "drawn_heads")
            self._lens_box.children = (lens,)
        elif forms == self.state() or not self.redraws:
            self._give_estimate(result, layer, source.head, sampler.name)
        self._summary.value = self._summary_html(result)

    def _give_estimate(self, result: Mapping[str, Any], layer: int, head: int, sampler: str) -> None:
        """Show a new estimate in the lens that is there."""
        assert self.lens is not None
        self._giving = True  # the forms have led to this estimate, so that they need not follow it
        try:
            self.lens.sampler = sampler
            self.lens.layer, self.lens.head = layer, head
            self.lens.show_estimate(head_estimate(result), layer=layer, head=head)
        finally:
            self._giving = False

    def fill_report(self, run: Run) -> None:
        """Save the lens, which redraws in the report where the browser can draw by its sampler."""
        lens = self.lens
        if lens is None:
            return
        finding = lens.finding()
        summary = f"{self._looked_at(lens.num_keys)}: {finding.effort}."
        run.update(title=f"Attention lens: {finding.text}", results={"summary": [summary]})
        live = None
        with suppress(ArgumentError):  # the maps are too large, or the sampler draws with Python only
            live = lens.live_html(MAX_LIVE_BYTES)
        self.save_picture(
            run,
            lens,
            "The estimate of the workbench. Maps that redraw show all heads.",
            live,
        )

    def _looked_at(self, num_keys: int) -> str:
        """Whose attention is shown, in words."""
        source = SourceSpec(**self.shown_state()["source"])
        if source.model.endswith(".safetensors"):
            return f"Own q, k and v of {num_keys} keys"
        shipped = "the shipped text" if source.text == "reference" else Path(source.text or "").name
        text = "a typed prompt" if source.prompt is not None else shipped
        return f"Model {source.model} on {num_keys} tokens of {text}, seed {source.seed}"

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
        if not _draws(state):
            settings["sampler"] = "exact"
        else:
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
            'print(f"Layer {layer}, head {head}: off by {100 * error:.3f} % of the exact output\'s norm.")\n'
        )

    def _summary_html(self, result: Mapping[str, Any]) -> str:
        """What the lens does not say: that the head does not draw, or the error without the controls."""
        state = self.shown_state()
        if not _draws(state):
            drawn = html.escape(state["heads"]["drawn_heads"])
            return f"<p>This head is exact: of layers and heads, only {drawn} draw.</p>"
        if not result["control_costs"]:
            return ""
        without = percent_text(result["plain_error"])
        return f"<p>Without {html.escape(', '.join(result['control_costs']))} it is off by {without}.</p>"

    def _form_follows_lens(self) -> None:
        lens, result = self.lens, self.result
        if lens is None or result is None or self._giving:
            return
        sampler, source = self.form.spec, self.source
        assert isinstance(sampler, SamplerSpec)
        if sampler.num_samples != lens.num_samples and (lens.own_draws or sampler.tolerance is None):
            self.form.change(num_samples=lens.num_samples, tolerance=None)
        layer = result["layers"][lens.layer]
        if (source.layer, source.head) != (layer, lens.head):
            self.forms["source"].change(layer=layer, head=lens.head)

    def _lens_follows_form(self) -> None:
        """Show the form's draws, sampler, layer and head in the lens at once, if it has these inputs."""
        lens, result = self.lens, self.result
        if lens is None or result is None or self.bench.restoring:
            return
        sampler, source = self.form.spec, self.source
        assert isinstance(sampler, SamplerSpec)
        self._pick_heads()
        if sampler.num_samples is not None and lens.num_samples != sampler.num_samples:
            lens.num_samples = sampler.num_samples
        if source.layer in result["layers"] and source.head < lens.heads:
            lens.layer, lens.head = result["layers"].index(source.layer), source.head

    def lens_state(self) -> dict[str, Any]:
        """What is marked in the lens: the selected rows."""
        return {} if self.lens is None else {"selected_rows": list(self.lens.selected_rows)}

    def set_lens_state(self, state: Mapping[str, Any]) -> None:
        """Mark in the lens what was marked when `lens_state` gave this."""
        lens = self.lens
        if lens is None:
            return
        with suppress(ArgumentError, TraitError):  # of a file that somebody has changed
            lens.set_trait("selected_rows", state.get("selected_rows", []))

    def _heads_picked(self) -> None:
        """Enter in the form the heads that were picked in the lens."""
        lens, result = self.lens, self.result
        if lens is None or result is None or self._giving:
            return
        picked, text = lens.drawn_heads, None
        if picked is not None:
            text = heads_text((result["layers"][layer], head) for layer, head in picked)
            if not text:  # none is picked, and a form cannot say so: the last change is undone
                self._pick_heads()
                return
        if self._drawn_places() != picked:
            self.forms["heads"].change(drawn_heads=text)

    def _drawn_places(self) -> list[list[int]] | None:
        """The heads that the form names, as the lens counts them; None for all, and where it lacks some."""
        lens, result = self.lens, self.result
        text = self.forms["heads"].spec.to_parameters()["drawn_heads"]
        if lens is None or result is None or text is None:
            return None
        numbers = {layer: i for i, layer in enumerate(result["layers"])}
        try:
            places = places_of(text, max(numbers) + 1, lens.heads)
        except ArgumentError:  # the next draw says so
            return None
        return [[numbers[layer], head] for layer, head in places if layer in numbers]

    def _pick_heads(self) -> None:
        """Mark in the lens the heads that the form names."""
        if self.lens is not None and self.lens.drawn_heads != self._drawn_places():
            self._giving = True
            try:
                self.lens.set_trait("drawn_heads", self._drawn_places())
            finally:
                self._giving = False

    def _rows_selected(self, change: Any) -> None:
        self.bench.request_save()
        rows = tuple(change.new)
        taken = self.bench.choose_rows(rows) if rows else ()
        many = "s" * (len(taken) != 1)
        self._send_button.disabled = not rows
        self._send_button.description = f"Send {len(taken) or ''} row{many} to Circuit".replace("  ", " ")
        of = f"{len(taken)} of the {len(rows)} selected rows" if len(taken) < len(rows) else f"row{many}"
        self._sent.value = f"Circuit measures {of}: {ranges_text(taken)}." if rows else ""

    @property
    def redraws(self) -> bool:
        """Whether a change of a setting draws again by itself, because that takes a moment."""
        return self.result is not None and self.result["seconds"] < QUICK_DRAW_S

    def _form_changed(self) -> None:
        super()._form_changed()
        self._lens_follows_form()
        if self.redraws and not self.bench.restoring:
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
            self._automatic = True


def _draws(state: Mapping[str, Any]) -> bool:
    """Whether the head that these forms show is among those that draw."""
    text, source = state.get("heads", {}).get("drawn_heads"), state["source"]
    if text is None:
        return True
    heads = read_heads(text).get(source["layer"], frozenset())
    return heads is None or source["head"] in heads
