"""What of the workbench is in sight at once, at common sizes, and that it scrolls as the notebook does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

CELL = "import qtx_lab as qtx\nwb = qtx.Workbench()\nwb"

MIN_MAP = 380
"""Pixels of a side of a map, at least."""

IN_SIGHT = """() => {
  const box = (selector) => document.querySelector(selector)?.getBoundingClientRect();
  const end = box(".qtx-wb-bar").top; // what is below it is hidden by it
  const pictures = [...document.querySelectorAll(".qtx-strip svg")].map((e) => e.getBoundingClientRect());
  const seen = pictures.filter((b) => b.width > 0);
  const map = box("figure[data-main] .qtx-map canvas");
  return {
    map: map.width - 46, // without the axis
    mapHidden: Math.max(0, map.bottom - 33 - end),
    strips: seen.length,
    stripHidden: Math.max(...seen.map((b) => b.bottom - end), 0),
    level: document.querySelector(".qtx-lens").dataset.level,
  };
}"""

SCROLLED = "() => document.querySelector('.qtx-lens').getBoundingClientRect().top"


@pytest.mark.ui
def test_map_and_strip_are_in_sight_together(
    page: Any, open_notebook: Callable[..., Any], run_all: Callable[..., None],
    set_theme: Callable[..., None], shoot: Callable[..., Any],
) -> None:  # fmt: skip
    open_notebook(page, [CELL])
    run_all(page)
    page.locator(".qtx-lens[data-confirmed]").wait_for()
    for theme in ("light", "dark"):
        set_theme(page, theme)
        for size in ((1280, 800), (1440, 900), (1920, 1080)):
            page.set_viewport_size({"width": size[0], "height": size[1]})
            page.locator(".qtx-strip svg:visible circle").first.wait_for()
            strips = 2 if size[0] > 1600 else 1
            page.wait_for_function(  # the parts of the view are laid out one after the other
                f"""([strips, side]) => {{ const x = ({IN_SIGHT})();
                return x.strips === strips && x.map >= side && x.level === "0 0" && x.mapHidden <= 1
                && x.stripHidden <= 1; }}""",
                arg=[strips, MIN_MAP],
            )
            page.wait_for_timeout(500)
            shoot(page, f"layout-{size[0]}-{theme}")
            seen = page.evaluate(IN_SIGHT)
            assert seen["map"] >= MIN_MAP, (size, theme, seen)
            assert seen["mapHidden"] <= 1, (size, theme, seen)
            assert seen["strips"] == strips, (size, theme, seen)
            assert seen["stripHidden"] <= 1, (size, theme, seen)
            # While JupyterLab changes its theme a map has no size for a moment, in which no level is chosen.
            assert seen["level"] == "0 0", (size, theme, seen)
    page.set_viewport_size({"width": 1280, "height": 800})
    page.locator(".qtx-strip").get_by_role("radio", name="variance").check()
    page.locator(".qtx-strip-variance svg[aria-label^='Var']").wait_for()
    # The wheel scrolls the notebook, wherever the pointer is.
    for where in (".qtx-lens figure[data-main] .qtx-map", ".qtx-strip", ".qtx-wb-controls"):
        box = page.locator(where).first.bounding_box()
        page.mouse.move(box["x"] + 60, box["y"] + 60)
        before = page.evaluate(SCROLLED)
        page.mouse.wheel(0, 120)
        page.wait_for_function(f"([top]) => ({SCROLLED})() < top - 100", arg=[before])
        page.mouse.wheel(0, -1000)
        page.wait_for_function(f"([top]) => ({SCROLLED})() === top", arg=[before])
