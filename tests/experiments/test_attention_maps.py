"""The three maps of a head: what they show, and that their scales and labels belong together."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from qtx_lab.experiments.attention_maps import WEIGHT_FLOOR, attention_panels, draw_attention_maps

EXACT = np.array([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.5, 0.25, 0.25]])
SAMPLED = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.75, 0.0, 0.25]])
VISIBLE = np.tril(np.ones((3, 3), dtype=bool))


def test_masked_cells_are_empty_and_the_difference_is_centred_on_zero() -> None:
    exact, sampled, difference = attention_panels(EXACT, SAMPLED, sampler="sobol", visible=VISIBLE)
    for panel in (exact, sampled, difference):
        assert np.array_equal(np.isnan(panel.values), ~VISIBLE)
    np.testing.assert_allclose(difference.values[VISIBLE], (SAMPLED - EXACT)[VISIBLE])
    assert (difference.low, difference.high) == (-0.25, 0.25)
    assert (exact.low, exact.high, exact.colours) == (sampled.low, sampled.high, sampled.colours)
    assert np.nanmin(sampled.values) == WEIGHT_FLOOR


def test_a_linear_scale_ends_at_the_largest_weight_and_a_limit_is_named() -> None:
    panels = attention_panels(EXACT / 2, SAMPLED / 2, visible=VISIBLE, log_scale=False, difference_limit=0.02)
    assert (panels[0].low, panels[0].high) == (0.0, 0.5)
    assert "log" not in panels[0].label
    assert panels[2].high == 0.02
    assert "0.02" in panels[2].label


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_figure_has_three_maps_that_share_their_axes(theme: str) -> None:
    panels = attention_panels(EXACT, SAMPLED, visible=VISIBLE)
    before = plt.rcParams["axes.facecolor"]
    extent = (-0.5, 2.5, 2.5, -0.5)
    figure = draw_attention_maps(panels, theme, title="a head", extent=extent, tokens=["a", " ", "b"])
    assert [ax.get_title(loc="left") for ax in figure.axes[:3]] == ["exact", "sampled", "sampled − exact"]
    assert len({ax.get_xlim() for ax in figure.axes[:3]}) == 1
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "·", "b"]
    assert plt.rcParams["axes.facecolor"] == before
