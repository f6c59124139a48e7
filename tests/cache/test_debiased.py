"""`estimator="debiased"` of a cache: its mean is exact, and a planted bias of half a percent is found."""

import pytest
import torch

import qtx_lab as qtx

from .test_guarantee import exact

BATCHES, REPLICATES = 25, 300
"""Calls with numbers of their own, and replicates of each: half a percent is then seven standard errors."""


def bias(cache, q, expected, generator):
    """The mean relative error of rows along the exact output, its standard error, and draws a replicate."""
    size = expected.square().sum(-1)
    along, draws = [], []
    for _ in range(BATCHES):
        est = cache.attend(q, 16, estimator="debiased", replicates=REPLICATES, generator=generator)
        along.append((((est.output.double() - expected) * expected).sum(-1) / size).mean())
        draws.append(est.info.draws_per_row / REPLICATES)
    along = torch.stack(along)
    assert est.info.unbiased
    return float(along.mean()), float(along.std() / BATCHES**0.5), sum(draws) / BATCHES


def rows(generator, proposal):
    k = torch.randn(2, 150, 8, generator=generator)
    v = 1 + 0.3 * torch.randn(2, 150, 4, generator=generator) + 0.3 * k[..., :1]
    q = 1.5 * torch.randn(4, 2, 8, generator=generator)
    rank = 5 if proposal in ("low-rank", "mixed") else None
    return q, k, v, qtx.SampledKVCache.build(k, v, proposal=proposal, rank=rank, defensive=0.2)


@pytest.mark.statistical
@pytest.mark.parametrize("proposal", ["low-rank", "int8"])
def test_the_mean_is_the_exact_output_and_half_a_percent_is_found(proposal, generator):
    q, k, v, cache = rows(generator, proposal)
    wrong, error, draws = bias(cache, q, exact(q, k, v), generator)
    assert abs(wrong) < 3.3 * error
    assert error < 0.005 / 6.6
    assert abs(wrong + 0.005) > 3.3 * error  # a bias of half a percent, either way
    assert abs(wrong - 0.005) > 3.3 * error
    assert 33 < draws < 38  # 2.2 S = 35


@pytest.mark.statistical
def test_the_self_normalised_estimate_has_a_bias_that_this_finds(generator):
    q, k, v, cache = rows(generator, "low-rank")
    expected = exact(q, k, v)
    biases = {}
    for name in ("self-normalised", "debiased"):
        est = cache.attend(q, 4, estimator=name, replicates=4000, generator=generator)
        projection = ((est.output - expected) * expected).sum(-1) / expected.square().sum(-1)
        biases[name] = float(projection.mean())
    assert abs(biases["debiased"]) < 0.005 < abs(biases["self-normalised"])


@pytest.mark.statistical
def test_standard_errors_are_right(generator):
    q, k, v, cache = rows(generator, "int8")
    z = []
    for _ in range(30):
        est = cache.attend(q, 16, estimator="debiased", replicates=40, generator=generator)
        z.append((est.output - exact(q, k, v)) / est.std_error)
    z = torch.stack(z)
    assert 0.85 < float(z.square().mean().sqrt()) < 1.25


def test_sinks_softcap_and_draws(generator):
    q, k, v, cache = rows(generator, "int8")
    sinks = torch.tensor([0.0, 2.0, -torch.inf, 4.0])
    est = cache.attend(
        q, 32, estimator="debiased", replicates=400, sinks=sinks, softcap=2.0, generator=generator
    )
    expected = exact(q, k, v, sinks, 2.0)
    assert bool(((est.output - expected).abs() < 5 * est.std_error + 1e-3).all())
    weights = est.draws.dense(150)
    output = weights @ v.repeat_interleave(2, 0)
    torch.testing.assert_close(output, est.output, atol=1e-4, rtol=1e-4)
    assert cache.attend(q, 8, estimator="debiased", generator=generator).std_error is None


def test_a_row_is_the_same_alone(generator):
    q, _, _, cache = rows(generator, "int4")
    seeded = [torch.Generator().manual_seed(2) for _ in range(2)]
    both = cache.attend(q, 8, estimator="debiased", replicates=3, generator=seeded[0]).output
    last = cache.attend(q[:, 1:], 8, estimator="debiased", replicates=3, generator=seeded[1]).output
    torch.testing.assert_close(both[:, 1:], last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "unbiased"}, "estimator"),
        ({"adaptive": True}, "adaptive=True is not allowed with estimator='debiased'"),
        ({"share_keys": True}, "share_keys=True is not allowed with estimator='debiased'"),
        ({"tolerance": 0.1}, "estimator='debiased' is not allowed with a tolerance"),
    ],
)
def test_what_is_refused(options, message, generator):
    q, _, _, cache = rows(generator, "int8")
    with pytest.raises(qtx.QtxError, match=message):
        cache.attend(q, **({"estimator": "debiased"} | options))


@pytest.mark.statistical
@pytest.mark.parametrize("replicates", [2, 4])
def test_error_bars_know_of_values_that_no_replicate_has_drawn(replicates, generator):
    k, v = torch.randn(1, 300, 8, generator=generator), torch.randn(1, 300, 4, generator=generator)
    q = torch.randn(8, generator=generator)
    k[:, 5], v[:, 9] = 4 * q, 1000.0  # one key has most of the probability, and a rare one a large value
    q = q.expand(1, 300, 8)
    cache = qtx.SampledKVCache.build(k, v, rank=4)
    est = cache.attend(q, 16, estimator="debiased", replicates=replicates, generator=generator)
    expected = exact(q, k, v)
    low, high = est.confidence_interval(0.95)
    covered = ((low <= expected) & (expected <= high)).all(-1)
    assert float((covered | ~est.reliable).double().mean()) > 0.9
    assert bool((est.std_error > 0).all())
    est = cache.attend(q, 16, estimator="debiased", replicates=replicates, generator=generator)
    cache.crop(299)
    with pytest.raises(qtx.ArgumentError, match="not known any more"):
        _ = est.std_error


def test_weights_sum_to_one_beside_huge_logits(generator):
    v = torch.randn(2, 1, 3, generator=generator)
    cache = qtx.SampledKVCache.build(torch.full((2, 1, 4), 5e3), v)
    est = cache.attend(torch.full((2, 9, 4), 1e4), 7, estimator="debiased", replicates=4, generator=generator)
    torch.testing.assert_close(est.output, v.expand(2, 9, 3))
