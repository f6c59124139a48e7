"""Errors of single rows: what they are, and methods at equal reads."""

import pytest
import torch
import torch.nn.functional as F

from qtx_lab.bench.llm_rows import (
    NO_WORSE_THAN_SYSTEMATIC,
    LayerRows,
    bench_row,
    decode,
    matched,
    policies,
    row_errors,
    with_worst_rows_checked,
)
from qtx_lab.cache.policies import make_policy


@pytest.fixture
def layer(generator):
    """Six query heads on two key heads, 300 tokens, rows from diffuse to peaked."""
    q, k, v = (torch.randn(1, heads, 300, 64, generator=generator) for heads in (6, 2, 2))
    return LayerRows(1, q * torch.linspace(0.5, 4, 6)[:, None, None], k, v)


def test_exact_decoding_has_no_error_and_reads_all(layer):
    errors = row_errors([layer, layer], make_policy("exact"), rows=9, seeds=2)
    assert errors.errors.shape == (2, 2, 54)
    assert float(errors.errors.max()) < 1e-5
    assert (errors.mean_reads.keys, errors.mean_reads.values, errors.mean_reads.bytes) == (1, 1, 1)


def test_errors_are_relative_lengths_of_causal_rows(layer):
    policy = make_policy("sink-window", budget=30)
    errors = row_errors([layer], policy, rows=5, seeds=1)
    output, _, seconds = decode(layer, policy, 5)
    exact = F.scaled_dot_product_attention(layer.q, layer.k, layer.v, is_causal=True, enable_gqa=True)
    exact = exact[:, :, -5:]
    expected = (output - exact).norm(dim=-1) / exact.norm(dim=-1)
    torch.testing.assert_close(errors.errors.flatten(), expected.double().flatten(), rtol=1e-4, atol=1e-5)
    assert errors.geometric_mean == pytest.approx(float(expected.log().mean().exp()), rel=1e-4)
    assert errors.worst_tenth[0] == pytest.approx(float(expected.flatten().quantile(0.9)), rel=1e-3)
    assert len(seconds) == 5


@pytest.mark.parametrize(
    "settings", [{"name": "sampled", "adaptive": True}, {"name": "sampler", "sampler": "systematic"}]
)
def test_a_method_is_matched_to_the_values_that_another_reads(layer, settings):
    like = row_errors([layer], make_policy("sampled", budget=0.1), rows=6, seeds=1)
    policy = make_policy(**settings)
    errors = row_errors([layer], policy, rows=6, seeds=1, values_like=like)
    assert errors.reads[0].values == pytest.approx(like.reads[0].values, rel=0.07)
    assert matched(policy, layer, 6, like.reads[0].values).budget > 30


def test_every_method_runs_and_a_large_error_fails(layer):
    for name, policy in policies().items():
        errors = row_errors([layer], policy, rows=1, seeds=1)
        assert bench_row("case", name, errors, {name: 10.0}).passed
        row = bench_row("case", name, errors, {name: 1e-6})
        assert not row.passed
        assert row.details["bytes"] == errors.mean_reads.bytes


def test_worst_rows_are_checked_beside_systematic_sampling(layer):
    good = row_errors([layer], make_policy("sampled", budget=100, adaptive=True), rows=8, seeds=2)
    bad = row_errors([layer], make_policy("sampler", sampler="monte-carlo", budget=20), rows=8, seeds=2)
    for errors, systematic, passes in ((good, bad, True), (bad, good, False)):
        row = bench_row("case", NO_WORSE_THAN_SYSTEMATIC, errors, {})
        assert with_worst_rows_checked(row, systematic).passed == passes
        assert with_worst_rows_checked(bench_row("case", "other", errors, {}), systematic).passed
