"""Sketches: what grows is what was fitted, and what a kernel scans has the same scores."""

import pytest
import torch

from qtx_lab.cache.sketches import Int4Sketch, LowRankSketch, MixedSketch, QueryMoment
from qtx_lab.kernels.inputs import Inputs


def keys(generator, n):
    """Keys (2, n, 16) near a few directions, some far out."""
    k = torch.randn(2, n, 16, generator=generator) * torch.linspace(2, 0.1, 16) + 3
    k[:, ::100] *= 4
    return k


@pytest.mark.parametrize("sketch", [LowRankSketch(5), Int4Sketch(16), Int4Sketch(7), MixedSketch(9)])
def test_lines_of_appended_keys_are_those_of_the_same_maps(sketch, generator):
    k = keys(generator, 900)
    order = sketch.fit_in_order(k[:, :300])
    assert torch.equal(order.sort(-1).values, torch.arange(300).expand(2, -1))
    for start, end in ((300, 301), (301, 800), (800, 900)):
        sketch.extend(k[:, start:end])
    assert sketch.length == 900
    order = torch.cat((order, torch.arange(300, 900).expand(2, -1)), 1)
    by_place = k.gather(1, order[..., None].expand_as(k))
    levels = (by_place - sketch.centre) @ sketch.key_map
    if sketch.mixed:  # two bits: -3, -1, 1 and 3
        levels[..., 3:] = ((levels[..., 3:] - 1) / 2).round().mul(2).add(1).clamp(-3, 3)
    expected = sketch.pack(levels.round().clamp(-sketch.levels, sketch.levels))
    assert torch.equal(sketch.lines, expected)
    index = torch.stack([torch.randperm(900, generator=generator) for _ in range(2)])
    sketch.reorder(index)
    assert torch.equal(sketch.lines, expected.gather(1, index[..., None].expand_as(expected)))


@pytest.mark.parametrize("kind", [LowRankSketch, Int4Sketch])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_numbers_survive_packing(kind, rank, generator):
    levels = torch.randint(-kind.levels, kind.levels + 1, (2, 50, rank), generator=generator)
    assert torch.equal(kind.unpack(kind.pack(levels.float()), rank), levels)


@pytest.mark.parametrize(("rank", "columns"), [(1, 1), (2, 2), (5, 2), (24, 8), (25, 9), (64, 22)])
def test_numbers_of_four_and_two_bits_survive_packing(rank, columns, generator):
    levels = torch.randint(-7, 8, (2, 50, rank), generator=generator)
    lower = levels[..., MixedSketch.upper(rank) :]
    lower.copy_(2 * (lower % 4) - 3)
    packed = MixedSketch.pack(levels.float())
    assert packed.shape == (2, 50, columns)
    assert torch.equal(MixedSketch.unpack(packed, rank), levels)


def test_bits_are_spent_where_they_tell_most(generator):
    """At equal bytes, on keys whose variances fall as 1 / i, the logits' errors are .8 times as large."""
    spectrum = torch.arange(1, 33).rsqrt()
    k, q = (torch.randn(2, n, 32, generator=generator) * spectrum**0.5 for n in (2000, 50))
    error = {}
    for sketch in (MixedSketch(24), Int4Sketch(16), LowRankSketch(8)):
        order = sketch.fit_in_order(k, q)
        logits = (q @ (k - sketch.centre).mT).gather(-1, order[:, None].expand(-1, 50, -1))
        assert sketch.lines.shape[-1] == 8
        error[sketch.proposal] = float((sketch.score(q) - logits).std())
    assert error["mixed"] < 0.8 * error["int4"] < 0.8 * error["low-rank"]


@pytest.mark.parametrize("sketch", [LowRankSketch(5), Int4Sketch(16)])
def test_a_kernel_scans_the_same_sketch(sketch, generator):
    """Scores of the cache and of the kernels' reference, in base 2, up to rounding."""
    k, q = keys(generator, 400), torch.randn(2, 3, 16, generator=generator)
    order = sketch.fit_in_order(k)
    x = Inputs(q, k[None], k[None], None, 3, 0.25)
    expected = sketch.score(q * 0.25) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(sketch.scanned(order).scores(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sketch", [LowRankSketch(15), Int4Sketch(16), MixedSketch(16)])
def test_the_keys_represented_worst_have_exact_logits(sketch, generator):
    """Three outliers and one other key of each head stand at the first places, with exact logits."""
    k, q = torch.randn(2, 500, 16, generator=generator), torch.randn(2, 9, 16, generator=generator)
    k[:, [7, 400, 499]] *= 30
    order = sketch.fit_in_order(k)
    assert bool((order[:, :4, None] == torch.tensor([7, 400, 499])).any(1).all())
    logits = q @ k.gather(1, order[..., None].expand_as(k)).mT - q @ sketch.centre.mT
    torch.testing.assert_close(sketch.score(q)[..., :4], logits[..., :4], rtol=1e-4, atol=1e-3)


def test_the_moment_of_queries_is_that_of_all_however_they_came(generator):
    q = torch.randn(2, 100, 8, generator=generator)
    moment = QueryMoment(2, 8, q.device)
    for part in q.split((1, 1, 60, 3, 35), 1):
        moment.add(part)
    root = moment.root()
    assert moment.count == 100
    expected = q.double().mT @ q.double() / 100
    torch.testing.assert_close(root.mT @ root / 8, expected, rtol=1e-2, atol=1e-2)
