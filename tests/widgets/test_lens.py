"""`AttentionLens`: its numbers against plain torch, and in a real browser."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qtx_lab as qtx
from qtx_lab import sampled_attention
from qtx_lab.errors import ArgumentError, ShapeError
from qtx_lab.samplers import SAMPLERS, HeadTailSampler, SystematicSampler
from qtx_lab.widgets.views import lens as lens_module
from qtx_lab.widgets.views.lens import AttentionLens
from qtx_lab.widgets.views.lens_maps import TILE
from qtx_lab.widgets.workbench.status_line import StatusLine

CELL = """
import qtx_lab as qtx
from qtx_lab.widgets.views.lens import AttentionLens
text = qtx.reference_text()[:512]
layers = qtx.load_reference_model().attention_inputs(qtx.encode(text)[None, :512])
lens = AttentionLens(*zip(*layers), tokens=text, is_causal=True, layer=3, head=2)
lens
"""

LARGE_CELL = """
import torch
q, k, v = torch.randn(3, 65536, 64, generator=torch.Generator().manual_seed(0))
large = AttentionLens(1.5 * q, k, v, is_causal=True)
large
"""

MAX_GESTURE_BYTES = 2_000_000
"""Bytes that the kernel may send for a movement of the slider."""


class Traffic:
    """Messages and bytes that came through the websockets of a page."""

    def __init__(self, page: Any):
        self.messages = self.received = 0
        page.on("websocket", lambda socket: socket.on("framereceived", self._take))

    def _take(self, frame: Any) -> None:
        content = frame if isinstance(frame, str | bytes) else frame.body
        self.messages += 1
        self.received += len(content)


def move_slider(page: Any, lens: Any, steps: int, traffic: Traffic, what: str) -> None:
    """Move the slider of a lens to the left, and print how long repaints took and what was sent."""
    slider = lens.get_by_role("slider", name="draws per row")
    slider.focus()
    messages, received = traffic.messages, traffic.received
    for _ in range(steps):
        slider.press("ArrowLeft")
        page.wait_for_timeout(150)
    page.wait_for_function(
        "([lens, draws]) => lens.dataset.draws === draws && lens.hasAttribute('data-confirmed')",
        arg=[lens.element_handle(), slider.get_attribute("aria-valuetext").removesuffix(" draws")],
    )
    waits = json.loads(lens.get_attribute("data-latencies"))
    p50, p95 = np.quantile(waits, [0.5, 0.95])
    messages, received = (traffic.messages - messages) / steps, (traffic.received - received) / steps
    print(
        f"slider to repaint, {what}: {len(waits)} steps, p50 {p50:.0f} ms, p95 {p95:.0f} ms; "
        f"{messages:.1f} messages and {received / 1000:.0f} kB a step"
    )
    assert received < MAX_GESTURE_BYTES


def recorded_messages(lens: AttentionLens) -> list[tuple[dict[str, Any], list[bytes]]]:
    """What the lens sends from now on."""
    sent: list[tuple[dict[str, Any], list[bytes]]] = []
    lens.send = (  # type: ignore[method-assign]
        lambda content, buffers=None: sent.append((content, buffers or []))
    )
    return sent


def ask(lens: AttentionLens, level: int, tiles: list[list[int]], draws: int = 16) -> None:
    where = {"layer": 0, "head": lens.head, "level": level, "exact": tiles, "sampled": tiles}
    lens._receive({"kind": "maps", "view": "a", "seq": 1, "draws": draws, **where})
    assert lens._worker.join(60)


def inputs(length: int, n: int, generator: torch.Generator, heads: int = 2) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(heads, size, 8, generator=generator) for size in (length, n, n))


@pytest.mark.parametrize(("length", "n", "level"), [(5, 7, 0), (300, 520, 0), (300, 520, 1), (513, 700, 2)])
def test_tiles_are_the_means_of_the_maps(length: int, n: int, level: int, generator: torch.Generator) -> None:
    q, k, v = inputs(length, n, generator)
    lens = AttentionLens(q, k, v, head=1)
    sent = recorded_messages(lens)
    side = TILE << level
    tiles = [[i, j] for i in range(-(-length // side)) for j in range(-(-n // side))]
    ask(lens, level, tiles)
    (content, buffers) = sent[0]
    exact = torch.softmax(q[1] @ k[1].mT / 8**0.5, -1)
    est = sampled_attention(q, k, v, num_samples=16, generator=torch.Generator().manual_seed(0))
    for name, whole in (("exact", exact), ("sampled", est.attention_weights()[1])):
        pooled = np.full((-(-length // (1 << level)), -(-n // (1 << level))), np.nan)
        for tile, buffer in zip(content["tiles"], buffers, strict=False):
            if tile["map"] == name:
                part = np.frombuffer(buffer, np.float16).reshape(tile["rows"], tile["columns"])
                i, j = tile["i"] * TILE, tile["j"] * TILE
                pooled[i : i + tile["rows"], j : j + tile["columns"]] = part
        x = np.pad(
            whole.numpy().astype(float),
            ((0, -length % (1 << level)), (0, -n % (1 << level))),
            constant_values=np.nan,
        )
        x = x.reshape(pooled.shape[0], 1 << level, pooled.shape[1], 1 << level)
        np.testing.assert_allclose(pooled, np.nanmean(x, (1, 3)), rtol=1e-3, atol=1e-6)
    facts = np.frombuffer(buffers[-1], np.float32).reshape(4, length)
    off = (est.output[1] - exact @ v[1]).norm(dim=-1) / (exact @ v[1]).norm(dim=-1)
    np.testing.assert_allclose(facts[2], off, rtol=1e-4)
    np.testing.assert_allclose(facts[1], [len(row.unique()) for row in est.draws.indices[1]])


@pytest.mark.parametrize(("length", "n", "row_level", "level"), [(300, 65_536, 3, 10), (2000, 10_000, 5, 8)])
def test_of_large_maps_only_the_rows_in_view_are_computed(
    length: int, n: int, row_level: int, level: int, generator: torch.Generator
) -> None:  # fmt: skip
    q, k, v = (torch.randn(size, 4, generator=generator) for size in (length, n, n))
    lens = AttentionLens(q, k, v, num_samples=16)
    sent = recorded_messages(lens)
    lens._receive({"kind": "maps", "view": "a", "seq": 1, "layer": 0, "head": 0, "draws": 16, "level": level,
                   "row_level": row_level, "exact": [[0, 0]], "sampled": [[0, 0]]})  # fmt: skip
    assert lens._worker.join(60)
    content, buffers = sent[0]
    cells = -(-length >> row_level)
    rows = np.frombuffer(buffers[-2], np.int32)
    assert len(rows) == content["measured_rows"] == cells
    assert sum(len(buffer) for buffer in buffers) < 50_000
    picked = torch.tensor(rows.astype(np.int64))
    exact = torch.softmax(q[picked] @ k.mT / 2, -1)
    est = sampled_attention(q, k, v, num_samples=16, generator=torch.Generator().manual_seed(0))
    for buffer, weights in zip(buffers, (exact, est.attention_weights()[picked]), strict=False):
        tile = np.frombuffer(buffer, np.float16).reshape(cells, -1)
        means = torch.stack([part.mean(-1) for part in weights.split(1 << level, -1)], -1)
        np.testing.assert_allclose(tile, means, rtol=0.01, atol=1e-7)
    # The browser draws the overview by itself: which cells the points of a row lie in.
    lens._receive({"kind": "inputs", "view": "a", "layer": 0, "head": 0})
    assert lens._worker.join(60)
    about, (row_bytes, shares) = sent[-1]
    at = np.frombuffer(row_bytes, "<i4")
    ends = np.frombuffer(shares, "<f4").reshape(len(at), -1)
    points = SystematicSampler().points(lens._heads.stream(0, torch.tensor(at)), 16, 1)[0, :, 0]
    drawn = est.draws.indices[at.astype(int)].numpy() >> about["level"]
    cells = [np.searchsorted(row, u, side="right") for row, u in zip(ends, points.numpy(), strict=True)]
    np.testing.assert_array_equal(cells, drawn)
    assert "head-tail" not in about["samplers"]
    error = float((est.output[picked] - exact @ v).norm() / (exact @ v).norm())
    assert lens.finding().error == content["error"] == pytest.approx(error, rel=1e-3)
    lens.selected_rows = [2, 1]
    torch.testing.assert_close(lens.rows(), torch.softmax(q[1:3] @ k.mT / 2, -1))
    assert max(part.p.shape[0] for part in lens._heads._cache.values()) <= TILE


def test_the_browser_hears_of_a_lens_with_all_that_it_needs_to_draw_it(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, Any]] = []

    def opened(widget: Any) -> None:
        states.append(widget.get_state(set(widget.keys) - {"layout"}))  # which no browser has heard of here

    monkeypatch.setattr("ipywidgets.Widget.open", opened)
    AttentionLens(*inputs(5, 7, generator), is_causal=False, num_samples=3)
    StatusLine({"python": str}, lambda: Path())
    lens, line = (state for state in states if state["_model_module"] == "anywidget")
    expected = {"kind": "lens", "num_queries": 5, "num_keys": 7, "heads": 2, "layers": 1, "num_samples": 3}
    assert {name: lens[name] for name in expected} == expected
    assert 3 in lens["draw_counts"]
    assert (line["codes"], line["reports"]) == (["python"], True)


def test_only_the_newest_request_is_answered(generator: torch.Generator) -> None:
    lens = AttentionLens(*inputs(64, 64, generator))
    sent = recorded_messages(lens)
    for draws in range(1, 101):
        lens._receive({"kind": "maps", "view": "a", "seq": draws, "layer": 0, "head": 0, "draws": draws,
                     "level": 0, "exact": [], "sampled": [[0, 0]]})  # fmt: skip
    assert lens._worker.join(60)
    assert sent[-1][0]["seq"] == 100
    assert len(sent) < 100
    assert [content["seq"] for content, _ in sent] == sorted({content["seq"] for content, _ in sent})


def test_variances_are_those_of_the_heads(generator: torch.Generator) -> None:
    q, k, v = inputs(200, 200, generator, heads=4)
    k[0] *= 30  # a head that looks at single keys is sampled without error
    lens = AttentionLens(q, k, v, sampler="head-tail", is_causal=True)
    sent = recorded_messages(lens)
    lens._receive({"kind": "thumbnails", "draws": 16})
    assert lens._worker.join(60)
    variance = np.frombuffer(sent[0][1][0], np.float32)
    assert len(variance) == 4
    assert variance[0] < 0.05 * variance[1:].min()


def given_maps(lens: AttentionLens, sent: list[tuple[dict[str, Any], list[bytes]]]) -> dict[str, Any]:
    """The reply to a request for the shown head's maps by the estimate that was given; with its row facts."""
    lens._receive({
        "kind": "maps", "view": "a", "seq": 1, "layer": lens.layer, "head": lens.head, "draws": None,
        "given": lens.given["number"], "drawing": "given", "level": 0, "exact": [], "sampled": [[0, 0]],
    })  # fmt: skip
    assert lens._worker.join(60)
    content, buffers = sent[-1]
    tile = content["tiles"][0]
    weights = np.frombuffer(buffers[0], np.float16).reshape(tile["rows"], tile["columns"])
    facts = np.frombuffer(buffers[-1], np.float32).reshape(4, -1)
    return {**content, "weights": weights, "facts": facts}


@pytest.mark.parametrize(
    ("options", "effort"),
    [
        ({"sampler": "monte-carlo", "num_samples": 8}, "monte-carlo, 8 draws a row"),
        ({"sampler": "head-tail", "num_samples": 8, "replicates": 4}, "8 draws a row × 4 replicates"),
        ({"num_samples": 8, "control_variate": "performer", "sampler": "sobol", "replicates": 2}, "by perf"),
        ({"sampler": "systematic", "tolerance": 0.6}, "draws a row on average, tolerance 0.6"),
    ],
)  # fmt: skip
def test_all_that_is_shown_of_a_head_is_the_estimate_that_was_given(
    options: dict[str, Any], effort: str, generator: torch.Generator
) -> None:
    q, k, v = inputs(20, 200, generator)
    est = sampled_attention(q, k, v, generator=generator, **options)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    lens = AttentionLens(q, k, v, num_samples=5, estimate=est, head=1)
    sent = recorded_messages(lens)
    shown = given_maps(lens, sent)
    np.testing.assert_allclose(shown["weights"], est.attention_weights()[1], rtol=1e-3, atol=1e-6)
    error = float((est.output[1] - exact[1]).norm() / exact[1].norm())
    assert shown["error"] == pytest.approx(error, rel=1e-4, abs=1e-6)
    assert shown["sampler"] == options["sampler"]
    assert effort in shown["effort"]
    if est.std_error is not None:
        assert shown["std_error"] == pytest.approx(float(est.std_error[1].norm() / exact[1].norm()), rel=1e-4)
    off = (est.output[1] - exact[1]).norm(dim=-1) / exact[1].norm(dim=-1)
    np.testing.assert_allclose(shown["facts"][2], off, rtol=1e-3, atol=1e-6)
    finding = lens.finding()
    assert (finding.error, finding.effort) == (shown["error"], shown["effort"])
    assert "of the output's norm" in finding.text
    frame = lens.frame().pivot(index="query", columns="key", values="sampled").to_numpy()
    np.testing.assert_array_equal(frame, est.attention_weights()[1])
    lens._receive({"kind": "thumbnails", "draws": 5, "given": True})
    assert lens._worker.join(60)
    variances = (est.output - exact).square().sum((-2, -1)) / exact.square().sum((-2, -1))
    np.testing.assert_allclose(np.frombuffer(sent[-1][1][0], np.float32), variances, rtol=1e-3, atol=1e-9)


def test_the_lens_draws_itself_once_the_slider_moves_and_goes_back(generator: torch.Generator) -> None:
    q, k, v = inputs(20, 30, generator)
    first, second = (
        sampled_attention(q, k, v, num_samples=8, sampler=name, generator=generator)
        for name in ("monte-carlo", "stratified")
    )
    lens = AttentionLens(q, k, v, num_samples=8, estimate=first, head=1)
    assert not lens.own_draws
    lens.num_samples = 6
    assert lens.own_draws
    assert lens.finding().effort == "systematic, 6 draws a row"
    same = sampled_attention(q, k, v, num_samples=6, generator=torch.Generator().manual_seed(0))
    shown = lens.frame().pivot(index="query", columns="key", values="sampled").to_numpy()
    np.testing.assert_array_equal(shown, same.attention_weights()[1])
    lens.own_draws = False
    assert lens.finding().effort == "monte-carlo, 8 draws a row"
    lens.show_estimate(second)
    assert (lens.given["number"], lens.num_samples) == (2, 8)
    assert lens.finding().effort == "stratified, 8 draws a row"
    one = sampled_attention(q[0], k[0], v[0], num_samples=4, sampler="sobol", generator=generator)
    lens.show_estimate(one, head=0)
    assert lens.finding().effort == "systematic, 4 draws a row"  # of head 1, which was not given
    lens.head = 0
    assert lens.finding().effort == "sobol, 4 draws a row"
    lens.sampler = "stratified"
    assert lens.own_draws
    assert lens.finding().effort == "stratified, 4 draws a row"
    sent = recorded_messages(lens)
    lens._receive({"kind": "maps", "view": "a", "seq": 1, "layer": 0, "head": 0, "draws": None, "given": 2,
                   "level": 0, "exact": [], "sampled": []})  # fmt: skip
    assert lens._worker.join(60)
    assert sent == []  # of an estimate that is no longer there


def test_grouped_heads_are_drawn_as_their_whole_layer_is(generator: torch.Generator) -> None:
    q = torch.randn(4, 20, 8, generator=generator)
    k, v = (torch.randn(2, 20, 8, generator=generator) for _ in range(2))
    lens = AttentionLens(q, k, v, head=3, seed=7, num_samples=5, sampler="head-tail", is_causal=True)
    est = sampled_attention(
        q, k, v, num_samples=5, sampler="head-tail", is_causal=True, enable_gqa=True,
        generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    shown = lens._heads.shown(0, 3, lens._heads.measured(0, 3), 5)
    torch.testing.assert_close(shown.attention_weights(), est.attention_weights()[3])


def test_an_estimate_that_does_not_fit_is_refused(generator: torch.Generator) -> None:
    q, k, v = inputs(20, 30, generator)
    lens = AttentionLens(q, k, v)
    est = sampled_attention(q, k, v)
    with pytest.raises(ShapeError, match=r"must be of 2 heads × 20 queries"):
        lens.show_estimate(sampled_attention(q[:, :5], k, v))
    with pytest.raises(ShapeError, match="over 29 keys; the lens shows 30"):
        lens.show_estimate(sampled_attention(q, k[:, :29], v[:, :29]))
    with pytest.raises(ArgumentError, match=r"layer=1 is not allowed"):
        lens.show_estimate(est, layer=1)
    with pytest.raises(ArgumentError, match=r"head=1 is not allowed: the estimate is of 2 heads"):
        lens.show_estimate(est, head=1)
    assert lens.given == {}
    assert lens.own_draws


def test_a_row_is_sent_with_the_lengths_of_its_values(generator: torch.Generator) -> None:
    q, k, v = inputs(20, 30, generator)
    lens = AttentionLens(q, k, v, head=1)
    sent = recorded_messages(lens)
    lens._receive({"kind": "row", "view": "a", "layer": 0, "head": 1, "draws": 16, "given": None, "row": 7,
                   "first": 5, "end": 25})  # fmt: skip
    assert lens._worker.join(60)
    exact, sampled, norms = (torch.frombuffer(bytearray(x), dtype=torch.float32) for x in sent[0][1])
    est = sampled_attention(q, k, v, num_samples=16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(exact, torch.softmax(q[1, 7] @ k[1].mT / 8**0.5, -1)[5:25])
    torch.testing.assert_close(sampled, est.attention_weights()[1, 7, 5:25])
    torch.testing.assert_close(norms, v[1, 5:25].norm(dim=-1))


def test_a_browser_gets_what_it_draws_a_small_head_from(generator: torch.Generator) -> None:
    q, k, v = torch.randn(4, 20, 8, generator=generator), *torch.randn(2, 2, 70, 8, generator=generator)
    lens = AttentionLens(q, k, v, sampler=HeadTailSampler(head=2), seed=7)
    sent = recorded_messages(lens)
    request = {"kind": "inputs", "view": "a", "layer": 0, "head": 3}
    lens._receive(request)
    assert lens._worker.join(60)
    content, buffers = sent[-1]
    assert content["group"] == 1
    assert content["seed"] == "7"
    assert content["samplers"] == ["monte-carlo", "stratified", "systematic"]  # not with these options
    for buffer, x in zip(buffers, (q[3], k[1], v[1]), strict=False):
        torch.testing.assert_close(torch.frombuffer(bytearray(buffer), dtype=torch.float32), x.flatten())
    assert sorted(np.frombuffer(buffers[3], "<u2")) == list(range(70))
    lens.sampler = "systematic"
    lens._receive(request)
    assert lens._worker.join(60)
    assert "head-tail" in sent[-1][0]["samplers"]
    lens = AttentionLens(torch.zeros(1025, 1), *torch.zeros(2, 1025, 1))
    sent = recorded_messages(lens)
    lens._receive({**request, "head": 0})
    assert lens._worker.join(60)
    assert sent == [({"kind": "inputs", "view": "a", "layer": 0, "head": 0}, [])]


def test_the_strip_measures_all_samplers_until_another_head_is_looked_at(generator: torch.Generator) -> None:
    q, k, v = inputs(16, 64, generator)
    lens = AttentionLens(q, k, v)
    sent = recorded_messages(lens)
    for head in range(2):
        lens._receive({"kind": "strip", "view": "a", "seq": head, "layer": 0, "head": head,
                       "sampler": "systematic"})  # fmt: skip
    assert lens._worker.join(60)
    points = [point for content, _ in sent if content["head"] == 1 for point in content["points"]]
    assert sent[-1][0]["left"] == 0
    assert lens._strips == {}
    assert len(points) == len({(point["sampler"], point["draws"]) for point in points})
    assert {point["sampler"] for point in points} == set(SAMPLERS) - {"exact"}
    assert {point["draws"] for point in points} == {4, 8, 16, 32, 64}
    first = sum(len(content["points"]) for content, _ in sent if content["head"] == 0)
    assert first < len(points)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)[1]
    p = torch.softmax(q[1] @ k[1].mT / 8**0.5, -1)
    variance = p @ v[1].square() - exact.square()  # of a single independent draw
    expected = float(variance.sum() / exact.square().sum())
    drawn = {point["draws"]: point for point in points if point["sampler"] == "monte-carlo"}
    for draws, point in drawn.items():  # 8 repetitions of 16 rows of 8 features: σ of the variance below 10 %
        assert point["variance"] == pytest.approx(expected / draws, rel=0.4)
        assert point["error"] == pytest.approx((expected / draws) ** 0.5, rel=0.2)


def test_a_strip_that_is_asked_for_again_does_not_begin_anew(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lens_module, "STRIP_STEP_S", 0)  # a part has one point
    lens = AttentionLens(*inputs(16, 64, generator))
    sent = recorded_messages(lens)
    request = {"kind": "strip", "view": "a", "seq": 1, "layer": 0, "head": 0, "sampler": "systematic"}
    lens._receive(request)
    while not sent:
        time.sleep(0.01)
    lens._receive(request)
    assert lens._worker.join(60)
    points = [(point["sampler"], point["draws"]) for content, _ in sent for point in content["points"]]
    assert len(points) == len(set(points))
    lens._receive(request)  # the last part was lost
    assert lens._worker.join(60)
    again = [(point["sampler"], point["draws"]) for content, _ in sent for point in content["points"]]
    assert again == points * 2


@pytest.mark.parametrize("shape", [(20, 8), (1, 4, 20, 8)])
def test_shapes_and_grouped_queries(shape: tuple[int, ...], generator: torch.Generator) -> None:
    q = torch.randn(shape, generator=generator)
    k = torch.randn((*shape[:-3], 2, *shape[-2:]) if len(shape) > 2 else shape, generator=generator)
    lens = AttentionLens(q, k, k, head=0 if len(shape) == 2 else 3)
    lens.selected_rows = [7, 3, 3]
    assert lens.selected_rows == [3, 7]
    first = q.reshape(-1, *shape[-2:])[lens.head]
    second = k.reshape(-1, *shape[-2:])[-1]
    torch.testing.assert_close(lens.rows(), torch.softmax(first @ second.mT / 8**0.5, -1)[[3, 7]])


def test_what_cannot_be_shown_is_refused(generator: torch.Generator) -> None:
    q, k, v = inputs(4, 4, generator)
    with pytest.raises(ShapeError, match="one text at a time"):
        AttentionLens(q.expand(3, 2, 4, 8), k, v)
    with pytest.raises(ShapeError, match="not empty"):
        AttentionLens(q[:, :0], k, v)
    with pytest.raises(ShapeError, match="3 entries; there are 4 keys"):
        AttentionLens(q, k, v, tokens="abc")
    with pytest.raises(ArgumentError, match="NaN"):
        AttentionLens(q * torch.nan, k, v)
    with pytest.raises(ShapeError, match="1048576"):
        AttentionLens(torch.zeros(1, 1), *torch.zeros(2, (1 << 20) + 1, 1))
    with pytest.raises(ShapeError, match="layers"):
        AttentionLens([q, q], [k], [v])
    with pytest.raises(ArgumentError, match=r"head=2 is not allowed: it must be in 0\.\.1"):
        AttentionLens(q, k, v, head=2)
    lens = AttentionLens(q, k, v)
    for name, value in {"layer": 1, "head": -1, "num_samples": 0, "selected_rows": [4]}.items():
        with pytest.raises(ArgumentError):
            setattr(lens, name, value)
    with pytest.raises(ArgumentError, match="pdf"):
        lens.save("x.pdf")


def test_it_is_saved_as_picture_and_data(tmp_path: Path, generator: torch.Generator) -> None:
    lens = AttentionLens(*inputs(6, 6, generator), tokens="abcdef", is_causal=True)
    data, _ = lens._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json", "text/plain"} <= set(data)
    for name, start in {
        "a.png": b"\x89PNG",
        "a.svg": b"<?xml",
        "a.csv": b"query,key",
        "a.parquet": b"PAR1",
    }.items():
        assert lens.save(tmp_path / name).read_bytes().startswith(start)
    assert len(lens.frame()) == 21


def test_heads_are_picked_to_be_drawn(generator: torch.Generator) -> None:
    q, k, v = inputs(4, 4, generator)
    lens = AttentionLens([q, q], [k, k], [v, v])
    assert lens.drawn_heads is None
    lens.drawn_heads = [[1, 0], [0, 1], [1, 0]]
    assert lens.drawn_heads == [[0, 1], [1, 0]]
    for wrong in ([[2, 0]], [[0, 2]], [[0]], [[0, -1]]):
        with pytest.raises(ArgumentError):
            lens.drawn_heads = wrong
    assert lens.drawn_heads == [[0, 1], [1, 0]]


@pytest.mark.ui
def test_in_jupyterlab(
    page: Any, open_notebook: Callable[..., Any], run_all: Callable[..., None],
    run_python: Callable[..., None], set_theme: Callable[..., None], shoot: Callable[..., Any],
    axe: Callable[..., list[str]],
) -> None:  # fmt: skip
    traffic = Traffic(page)
    path = open_notebook(page, [CELL, LARGE_CELL])
    run_all(page)
    lens, large = page.locator(".qtx-lens").first, page.locator(".qtx-lens").last
    page.wait_for_function("() => document.querySelectorAll('.qtx-lens[data-confirmed]').length === 2")
    page.wait_for_function("() => document.querySelector('.qtx-lens')?.dataset.draws === '64'")
    page.wait_for_selector(".qtx-heads:not([data-stale])")
    shoot(page, "lens-light")
    sampled = lens.locator(".qtx-map canvas:first-child").nth(1)
    before = sampled.evaluate("(canvas) => canvas.toDataURL()")
    move_slider(page, lens, 30, traffic, "512 keys, 48 heads")
    page.wait_for_function("() => document.querySelector('.qtx-lens').dataset.draws === '1'")
    page.wait_for_function(
        "([canvas, old]) => canvas.toDataURL() !== old", arg=[sampled.element_handle(), before]
    )
    move_slider(page, large, 10, traffic, "65,536 keys")
    run_python(page, "assert lens.num_samples == 1")
    # By keyboard: a head, the cross, rows, and out of the view again.
    lens.get_by_role("radio", name="layer 3, head 2").press("ArrowDown")
    page.wait_for_function(
        "() => document.querySelector('.qtx-lens h2').textContent.startsWith('Layer 4, head 2')"
    )
    # A lens that waits for its kernel says so.
    run_python(page, "import os, pathlib; pathlib.Path('kernel').write_text(str(os.getpid()))")
    kernel = int(path.with_name("kernel").read_text())
    os.kill(kernel, signal.SIGSTOP)
    lens.get_by_role("radio", name="layer 4, head 2").press("ArrowLeft")
    waiting = lens.get_by_text(re.compile("The kernel is drawing …|The kernel has not answered yet"))
    waiting.wait_for()
    os.kill(kernel, signal.SIGCONT)
    waiting.wait_for(state="hidden")
    lens.get_by_role("radio", name="layer 4, head 1").press("ArrowRight")
    # Answers that are lost on the way are asked for again.
    run_python(
        page,
        "send, lost = lens.send, []\n"
        "def lose(message, buffers=None):\n"
        "    if message['kind'] == 'maps': lost.append(message['seq'])\n"
        "    else: send(message, buffers)\n"
        "lens.send = lose",
    )
    lens.get_by_role("radio", name="layer 4, head 2").press("ArrowRight")
    lens.get_by_text("The kernel has not answered yet, and was asked again").wait_for()
    run_python(
        page,
        "import time\n"
        "end = time.monotonic() + 60  # the browser asks again after two seconds, busy though the kernel be\n"
        "while not lost and time.monotonic() < end: time.sleep(0.05)\n"
        "assert lost\nlens.send = send",
    )
    page.locator(".qtx-lens:not([data-waiting]) h2", has_text="Layer 4, head 3: off by").first.wait_for()
    lens.get_by_role("radio", name="layer 4, head 3").press("ArrowLeft")
    lens.get_by_label("pick those to draw").check()
    lens.get_by_role("radio", name="layer 0, head 0").click()
    lens.get_by_text("47 of 48 heads drawn, the others exact").wait_for()
    lens.get_by_label("pick those to draw").uncheck()
    grip = lens.get_by_role("application").first
    grip.focus()
    for key in ("ArrowDown", "Shift+ArrowDown", "Shift+ArrowDown"):
        grip.press(key)
    page.wait_for_function(
        "() => document.querySelector('.qtx-lens').textContent.includes('3 rows selected')"
    )
    run_python(
        page,
        "import time\n"
        "end = time.monotonic() + 10  # traits come by the subshell, one after the other\n"
        "while len(lens.selected_rows) < 3 and time.monotonic() < end: time.sleep(0.05)\n"
        "assert lens.selected_rows == [256, 257, 258] and lens.layer == 4, lens.selected_rows",
    )
    lens.locator(".qtx-readout", has_text="query 258").wait_for()
    maps = lens.locator(".qtx-maps figure")
    assert max(box["width"] for box in (figure.bounding_box() for figure in maps.all())) > 380 + 46
    grip.press("Enter")  # alone, over the whole width
    assert maps.nth(0).bounding_box()["width"] > 1000
    assert not maps.nth(1).is_visible()
    grip.press("Escape")
    assert all(figure.is_visible() for figure in maps.all())
    starts = {"PNG": b"\x89PNG", "SVG": b"<?xml", "Data": b"PAR1", "CSV": b"query,", "Page": b"<!doctype"}
    for name, start in starts.items():
        with page.expect_download() as download:
            lens.get_by_role("button", name=name, exact=True).click()
        assert Path(download.value.path()).read_bytes().startswith(start)
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    outputs = [output["data"] for output in json.loads(path.read_text())["cells"][0]["outputs"]]
    (saved,) = (data for data in outputs if "image/png" in data)
    assert saved["image/png"].startswith("iVBOR")  # an output of its own: JupyterLab shows it without kernel
    assert "application/vnd.jupyter.widget-view+json" not in saved
    picture = page.locator(".jp-RenderedImage").first
    assert not picture.is_visible()
    set_theme(page, "dark")
    shoot(page, "lens-dark")
    assert axe(page, ".qtx-lens") == []
    run_python(page, "lens.close()")
    page.get_by_text("This view was closed.").wait_for()
    assert picture.is_visible()


def test_a_model_by_name_shows_its_own_layers():
    lens = qtx.AttentionLens.of_model("reference", "A text of some bytes", num_tokens=12, layer=2)
    tokens = qtx.encode("A text of some bytes")[None, :12]
    q, k, v = qtx.load_reference_model().attention_inputs(tokens)[2]
    same = qtx.AttentionLens(q[0], k[0], v[0], is_causal=True)
    lens.selected_rows = same.selected_rows = [3, 11]
    torch.testing.assert_close(lens.rows(), same.rows())
    assert "".join(lens.tokens) == "A text of so"
    with pytest.raises(qtx.ArgumentError, match="source='smollm'"):
        qtx.AttentionLens.of_model("smollm")
    with pytest.raises(qtx.ArgumentError, match="has no tokens"):
        qtx.AttentionLens.of_model("reference", "")
