"""Intervals that hold without asymptotics, and rows whose error bars can be trusted."""

import math

import pytest
import torch
import torch.nn.functional as F

import qtx_lab as qtx
from qtx_lab.estimates import RELIABLE
from qtx_lab.samplers import SAMPLERS

NAMES = sorted(set(SAMPLERS) - {"exact", "learned"})
UNIFORM = {"sampler": "monte-carlo", "num_samples": 16, "replicates": 4}


def inputs(seed=0, rows=40, n=96, d=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, d, generator=g), *(torch.randn(2, n, d, generator=g) for _ in range(2))


def with_outlier(seeds, mass):
    """(q, k, v, exact) of `seeds` equal rows in which one key of 256, of that mass, has a value of 100."""
    v = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    v[7] = 100.0
    logits = torch.zeros(256)
    logits[7] = math.log(255 * mass / (1 - mass))
    q, k = logits.expand(seeds, 1, 256), torch.eye(256).expand(seeds, -1, -1)
    return q, k, v.expand(seeds, -1, -1), logits.softmax(-1) @ v


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"sinks": torch.zeros(2)}, {"window": 9}])
def test_bernstein_covers_every_row(name, options):
    """2 × 40 rows × 8 coordinates of 95 %: that one is missed would be news, as the bounds are wide."""
    q, k, v = inputs()
    if "window" in options or "is_causal" in options:
        k, v = k[:, :40], v[:, :40]
    g = torch.Generator().manual_seed(1)
    est = qtx.sampled_attention(q, k, v, sampler=name, num_samples=8, replicates=2, generator=g, **options)
    exact = qtx.sampled_attention(q, k, v, sampler="exact", **options).output
    low, high = est.confidence_interval(0.95, method="bernstein")
    assert low.shape == high.shape == est.output.shape
    assert bool(((low <= exact) & (exact <= high)).all())


def test_bernstein_narrows_with_independent_draws():
    q, k, v = inputs(n=512)
    widths = []
    for count in (64, 1024):
        est = qtx.sampled_attention(
            q, k, v, sampler="monte-carlo", num_samples=count, generator=torch.Generator().manual_seed(1)
        )
        low, high = est.confidence_interval(0.95, method="bernstein")
        t_low, t_high = est.confidence_interval(0.95)
        assert (high - low).mean() > (t_high - t_low).mean()
        widths.append(float((high - low).mean()))
    assert widths[1] < widths[0] / 3


def test_bernstein_is_sure_of_what_is_drawn_whole():
    """With every key drawn nothing is left to chance: the interval is the output, up to rounding."""
    q, k, v = inputs(n=16)
    est = qtx.sampled_attention(q, k, v, sampler="head-tail", num_samples=16, replicates=2)
    low, high = est.confidence_interval(0.95, method="bernstein")
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert bool(((low <= exact) & (exact <= high)).all())
    assert (high - low).max() < 1e-4
    assert bool(est.reliable.all())


def test_a_biased_method_is_sure_of_no_more_than_it_knows():
    """Oracle top-k leaves keys out: its interval has the room for what they may hold."""
    q, k, v = inputs()
    est = qtx.sampled_attention(q, k, v, sampler="oracle-top-k", num_samples=16, replicates=2)
    low, high = est.confidence_interval(0.95, method="bernstein")
    exact = F.scaled_dot_product_attention(q, k, v)
    assert bool(((low <= exact) & (exact <= high)).all())
    assert est.std_error.amin() > 1e-4  # no row is exact


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["monte-carlo", "systematic", "head-tail"])
@pytest.mark.parametrize("replicates", [2, 4])
def test_a_row_whose_outlier_was_missed_or_drawn_too_often_is_flagged(name, replicates):
    """600 draws of one row: of those beyond their half-width 95 % are flagged, of all at most 20 %."""
    q, k, v, exact = with_outlier(600, mass=0.01)
    est = qtx.sampled_attention(
        q, k, v, sampler=name, num_samples=32, replicates=replicates, scale=1.0,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    low, high = est.confidence_interval()
    beyond = (est.output - exact).norm(dim=-1) > ((high - low) / 2).norm(dim=-1)
    assert est.reliability.shape == (600, 1)
    assert beyond.float().mean() < 0.1
    assert not beyond.any() or (~est.reliable)[beyond].float().mean() >= 0.95
    assert (~est.reliable).float().mean() <= 0.2
    # A quarter as wide, the intervals miss far more and the flag is up where they do: the planted fault.
    narrow = (est.output - exact).norm(dim=-1) > ((high - low) / 8).norm(dim=-1)
    assert narrow.float().mean() > 0.3
    assert bool((est.reliability / 4 < RELIABLE)[narrow].all())


def test_most_rows_of_plain_values_are_reliable():
    q, k, v = inputs(n=256)
    for name in NAMES:
        est = qtx.sampled_attention(
            q, k, v, sampler=name, num_samples=32, replicates=4, generator=torch.Generator().manual_seed(3)
        )
        assert est.reliable.float().mean() > 0.8, name


def test_exact_and_empty_rows_are_reliable():
    q, k, v = inputs()
    exact = qtx.sampled_attention(q, k, v, sampler="exact")
    assert bool((exact.reliability == math.inf).all())
    low, high = exact.confidence_interval(0.95, method="bernstein")
    assert torch.equal(low, high)
    mask = torch.ones(40, 96, dtype=torch.bool)
    mask[3] = False
    est = qtx.sampled_attention(q, k, v, attn_mask=mask, **UNIFORM)
    assert bool((est.reliability[:, 3] == math.inf).all())
    low, high = est.confidence_interval(0.95, method="bernstein")
    assert bool((low[:, 3] == 0).all() and (high[:, 3] == 0).all())


def test_what_nobody_sees_does_not_widen_a_bound():
    q, k, v = inputs()
    mask = torch.arange(96) < 60
    junk = v.clone()
    junk[:, 60:] = 1e15
    ends = []
    for x in (v, junk):
        est = qtx.sampled_attention(
            q, k, x, attn_mask=mask, generator=torch.Generator().manual_seed(1), **UNIFORM
        )
        ends.append(torch.stack(est.confidence_interval(0.95, method="bernstein")))
    torch.testing.assert_close(*ends)


def test_bad_arguments_are_one_clear_error():
    q, k, v = inputs()
    est = qtx.sampled_attention(q, k, v, **UNIFORM)
    with pytest.raises(qtx.ArgumentError, match="method='bernstien' is unknown"):
        est.confidence_interval(0.95, method="bernstien")
    one = qtx.sampled_attention(q, k, v, sampler="systematic", num_samples=4)
    assert one.reliability is None
    assert one.reliable is None
    with pytest.raises(qtx.ArgumentError, match="replicates >= 2"):
        one.confidence_interval(0.95, method="bernstein")
    learned = qtx.sampled_attention(q, k, v, sampler="learned", num_samples=8)
    with pytest.raises(qtx.ArgumentError, match="use method='t'"):
        learned.confidence_interval(0.95, method="bernstein")
