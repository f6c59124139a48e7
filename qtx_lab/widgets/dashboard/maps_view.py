"""The view Maps: one head of a language model, exact and sampled, while a slider moves the draws."""

from __future__ import annotations

from html import escape

import pandas as pd
import panel as pn

from . import maps
from .elements import CONTROL_WIDTH, DRAWING, SLIDER_CSS, DashboardView, html_pane, select
from .records import Listing
from .view_host import ViewHost

Settings = tuple[str, int, int, int, str, int]
"""Model, length of the text in tokens, layer, head, sampler, draws."""

MAX_DRAWS = 512

MAP_STYLES = {"flex": "1 1 300px", "max-width": "660px"}
"""The three maps share the width of the page, and stand below each other where it is narrow."""


class MapsView(DashboardView):
    """One head of a language model, exact and sampled."""

    uses_run_filters = False

    def __init__(self, page: ViewHost):
        self._draws = pn.widgets.IntSlider(
            label="Draws per row, S", start=1, end=MAX_DRAWS, value=32, width=CONTROL_WIDTH,
            stylesheets=[SLIDER_CSS],
        )  # fmt: skip
        self._sampler = select(label="Sampler", options=maps.SAMPLER_NAMES, value="systematic")
        self._model = select(label="Model", options=maps.models(), value=maps.REFERENCE)
        self._model.param.watch(self._offer_layers, "value")
        self._layer = select(label="Layer", options=list(range(6)), value=3)
        self._head = select(label="Query head", options=list(range(8)), value=0)
        self._length = select(label="Window, tokens", options=list(maps.LENGTHS), value=512)
        self._canvas: maps.Canvas | None = None
        self._shown_head: tuple[str, int, int, int] | None = None
        self._title, self._panes = html_pane(DRAWING), pn.FlexBox(sizing_mode="stretch_width")
        controls = {
            "draws": self._draws, "sampler": self._sampler, "model": self._model, "layer": self._layer,
            "head": self._head, "length": self._length,
        }  # fmt: skip
        super().__init__(page, [self._title, self._panes], controls)

    def _offer_layers(self, change: object) -> None:
        """Offer the layers and heads that the chosen model has."""
        sizes = maps.model_called(self._model.value).config
        for control, count in ((self._layer, sizes.layers), (self._head, sizes.heads)):
            value = control.value if control.value < count else 0
            control.param.update(options=list(range(count)), value=value)

    def state(self) -> Settings:
        """The values of the controls."""
        model, length, layer, head, sampler = (
            control.value for control in (self._model, self._length, self._layer, self._head, self._sampler)
        )
        return model, length, layer, head, sampler, int(self._draws.value or 1)

    def prepare(self, listing: Listing, rows: pd.DataFrame) -> tuple[Settings, maps.Maps]:
        """Draw the head."""
        settings = self.state()
        return settings, maps.attention_maps(*settings)

    def show(self, data: tuple[Settings, maps.Maps]) -> None:
        """Repaint the maps; the exact one only where the head is another one."""
        (model, length, layer, head, sampler, draws), drawn = data
        shown, self._shown_head = self._shown_head, (model, length, layer, head)
        if self._canvas is None or shown is None or shown[1] != length:
            self._canvas = maps.canvas(drawn, self.page.theme)
            self._panes.objects = [
                pn.pane.HoloViews(picture, margin=(0, 6, 0, 0), sizing_mode="scale_width", styles=MAP_STYLES)
                for picture in self._canvas.pictures
            ]
        else:
            self._canvas.show(drawn, exact=shown != self._shown_head)
        self._title.object = (
            f"<h2>Layer {layer}, head {head}: {draws} {escape(sampler)} draws lie {drawn.distance:.3f} from "
            "the exact row in total variation</h2>"
            f"<p class='note'>Mean over {length} rows of {escape(model)} on documentation, causal, seed 0; "
            f"the head's output is off by {100 * drawn.error:.1f} %. A pixel is the mean of the cells under "
            "it: zoom in for single ones.</p>"
        )
