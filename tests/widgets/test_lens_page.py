"""A lens as a page of its own and in a report: what it holds, how large it is, and who can use it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtx_lab.errors import ArgumentError
from qtx_lab.experiments.report import write_report
from qtx_lab.experiments.runs import Run
from qtx_lab.samplers import HeadTailSampler, make_sampler
from qtx_lab.specs import ExperimentSpec
from qtx_lab.widgets.views.lens import AttentionLens
from qtx_lab.widgets.views.lens_page import SAMPLERS_IN_PAGES


def make_lens(n: int = 64, sampler: object = "systematic", layers: int = 2) -> AttentionLens:
    g = torch.Generator().manual_seed(0)
    q = [torch.randn(4, n, 16, generator=g) for _ in range(layers)]
    k, v = ([torch.randn(2, n, 16, generator=g) for _ in range(layers)] for _ in range(2))
    return AttentionLens(
        q, k, v, tokens="<" * n, sampler=sampler, num_samples=8, is_causal=True, layer=1, head=3
    )


def held(live: str) -> dict:
    """The data of a live lens."""
    match = re.search(r'<script type="application/json">(.*?)</script>', live, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_a_page_holds_the_heads_next_to_the_shown_one_that_fit() -> None:
    lens = make_lens()
    data = held(lens.live_html())
    assert sorted((x["layer"], x["head"]) for x in data["heads"]) == [
        (i, j) for i in (0, 1) for j in range(4)
    ]
    assert (data["heads"][0]["layer"], data["heads"][0]["head"]) == (1, 3)
    assert len(data["kv"]) == 4
    assert data["state"]["tokens"] == ["<"] * 64
    assert len(data["thumbnails"]) == 2
    whole = len(lens.live_html())
    fewer = lens.live_html(whole - 1)
    assert 0 < len(held(fewer)["heads"]) < 8
    assert len(fewer) < whole
    with pytest.raises(ArgumentError, match=r"max_bytes=1000 .* layer 1, head 3 .* bytes"):
        lens.live_html(1000)


def test_a_page_of_2048_keys_stays_below_three_megabytes(tmp_path: Path) -> None:
    q, k, v = torch.randn(3, 1, 2048, 64, generator=torch.Generator().manual_seed(0))
    path = AttentionLens(q, k, v, is_causal=True).to_html(tmp_path / "lens.html")
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 3_000_000
    assert text.count("<img") == 1
    assert not re.search(r'(src|href)="(?!data:)|@import', text.partition("<style>.qtx")[0])


@pytest.mark.parametrize(
    "sampler", [make_sampler("sobol"), HeadTailSampler(head=2), HeadTailSampler(head="adaptive")]
)
def test_a_sampler_that_pages_do_not_have_is_refused(sampler: object) -> None:
    with pytest.raises(ArgumentError, match="monte-carlo, stratified, systematic, head-tail"):
        make_lens(sampler=sampler).live_html()


def test_pages_have_the_samplers_of_the_script() -> None:
    source = Path(__file__).parents[2] / "widgets" / "src" / "samplers.ts"
    listed = re.search(r"SAMPLERS = \[(.*?)\]", source.read_text(encoding="utf-8"))
    assert listed is not None
    assert tuple(json.loads(f"[{listed[1]}]")) == SAMPLERS_IN_PAGES


FOCUSED = """() => {
  const [element, look] = [document.activeElement, getComputedStyle(document.activeElement)];
  const { top, bottom, left, right } = element.getBoundingClientRect();
  const seen = bottom > 0 && top < innerHeight && right > 0 && left < innerWidth;
  const ringed = look.outlineStyle !== "none" && parseFloat(look.outlineWidth) >= 1;
  const name = element.ariaLabel ?? element.labels?.[0]?.innerText ?? element.innerText;
  return { tag: element.tagName, name: name.trim(), seen, ringed };
}"""
"""What has the focus, whether it is in the window, and whether that is to be seen."""


def walk(page: Any, steps: int = 80) -> list[dict[str, Any]]:
    """What is reached by Tab, from the beginning of a page to its end."""
    stops = []
    for _ in range(steps):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(FOCUSED))
        if stops[-1]["tag"] == "BODY":
            return stops[:-1]
    return stops


@pytest.mark.ui
@pytest.mark.parametrize("kind", ["page", "report"])
@pytest.mark.parametrize(("size", "theme"), [((1280, 800), "light"), ((1920, 1080), "dark")])
def test_whoever_has_no_mouse_or_no_network_can_use_it(
    page: Any, axe: Callable[..., list[str]], tmp_path: Path, kind: str, size: tuple[int, int], theme: str
) -> None:
    lens = make_lens()
    if kind == "page":
        path = lens.to_html(tmp_path / "lens.html")
    else:
        with Run.create(ExperimentSpec(), "lens", tmp_path) as run:
            draw = lambda frame, theme: lens.figure(theme)  # noqa: E731
            run.save_figure("lens", draw, lens.frame(), "A lens.", live=lens.live_html())
        path = write_report(run)
    page.set_viewport_size(dict(zip(("width", "height"), size, strict=True)))
    page.emulate_media(color_scheme=theme)
    page.context.set_offline(True)
    page.goto(path.as_uri())
    page.locator(".qtx[data-draws='8']").wait_for()
    page.wait_for_function("() => !document.querySelector('.qtx-strip')?.innerText.includes('Still to come')")
    assert axe(page, "body") == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    stops = walk(page)
    assert [stop for stop in stops if not (stop["seen"] and stop["ringed"])] == []
    names = " ".join(stop["name"] for stop in stops)
    for name in ("Sampler", "draws per row", "log colours", "64 queries by 64 keys", "layer 1, head 3"):
        assert name in names, stops

    heading = page.locator(".qtx h2")
    seen = heading.inner_text()
    page.get_by_role("slider", name="draws per row").press("ArrowRight")
    page.wait_for_function("([e, t]) => e.innerText !== t", arg=[heading.element_handle(), seen])
    page.get_by_role("application").first.focus()
    for key in ("ArrowDown", "Shift+ArrowDown", "Enter"):
        page.keyboard.press(key)
    page.get_by_text("2 rows selected").wait_for()
    assert page.locator(".qtx-maps[data-alone]").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".qtx-maps[data-alone]").count() == 0
    page.keyboard.press("Escape")
    page.get_by_text("no rows selected").wait_for()
