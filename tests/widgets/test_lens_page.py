"""A lens as a page of its own: what it holds, how large it is, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from qtx_lab.errors import ArgumentError
from qtx_lab.samplers import HeadTailSampler, make_sampler
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
