"""The baselines do what their papers say, bias included, and keep the interface of a sampler."""

import pytest
import torch
import torch.nn.functional as F

import qtx_lab as qtx
from qtx_lab.samplers import BASELINES, SantaSampler, TopKSampler, VAttentionSampler


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=sorted(BASELINES))
def sampler(request):
    return qtx.make_sampler(request.param)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 0, 7), (2, 3, 5, 600)])
def test_shapes_and_weights(sampler, shape):
    logits = torch.randn(shape, generator=seeded(1))
    draws = sampler.draw(logits, 9, generator=seeded(0), replicates=3)
    assert draws.indices.shape == draws.weights.shape == draws.probabilities.shape == (*shape[:-1], 27)
    assert draws.indices.dtype == torch.int64
    assert draws.weights.dtype == logits.dtype
    assert draws.replicates == 3
    assert torch.allclose(draws.weights.sum(-1), torch.ones(shape[:-1]), atol=1e-6)
    assert torch.allclose(draws.probabilities, logits.softmax(-1).gather(-1, draws.indices), atol=1e-6)


def test_masked_keys_and_rows_have_no_weight(sampler):
    logits = torch.randn(50, 700, generator=seeded(2))
    logits[:, 300:600] = -torch.inf
    logits[3] = -torch.inf
    draws = sampler.draw(logits, 40, generator=seeded(0), replicates=2)
    assert draws.dense(700)[:, 300:600].eq(0).all()
    assert draws.weights[3].eq(0).all()
    assert not draws.probabilities.isnan().any()


def test_same_seed_same_bits(sampler):
    logits = torch.randn(20, 600, generator=seeded(3))
    first, again, other = (sampler.draw(logits, 32, generator=seeded(s)).indices for s in (7, 7, 8))
    assert torch.equal(first, again)
    assert sampler.name == "oracle-top-k" or not torch.equal(first, other)


def test_attention_takes_it_by_name(sampler, generator):
    q, k, v = (torch.randn(2, 4, 90, 8, generator=generator) for _ in range(3))
    est = qtx.sampled_attention(q, k, v, sampler=sampler.name, num_samples=64, is_causal=True, replicates=2)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (est.output - exact).norm() < 0.4 * exact.norm()
    assert torch.allclose(est.output[..., 0, :], exact[..., 0, :], atol=1e-6)


def test_an_unknown_name_lists_them_too():
    with pytest.raises(qtx.ArgumentError, match="Did you mean 'vattention'"):
        qtx.make_sampler("vatention")


def test_the_same_bad_input_is_refused(sampler):
    with pytest.raises(qtx.ArgumentError, match="num_samples=0"):
        sampler.draw(torch.zeros(4), 0)
    with pytest.raises(qtx.ArgumentError, match="NaN"):
        sampler.draw(torch.tensor([0.0, torch.nan]), 4)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SantaSampler("even"), "budgets='even'"),
        (lambda: SantaSampler(points="random"), "points='random'"),
        (lambda: SantaSampler(tile=0), "tile=0"),
        (lambda: VAttentionSampler(heavy=1.5), r"heavy=1\.5"),
        (lambda: VAttentionSampler(sink=float("nan")), "sink=nan"),
    ],
)
def test_bad_settings_are_one_clear_error(make, match):
    with pytest.raises(qtx.ArgumentError, match=match):
        make()


# --- S²ANTA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", ["systematic", "stratified"])
def test_one_tile_is_the_sampler_without_tiles(points):
    """A tile that holds all keys: the same points, so the same draws, whatever the rule."""
    logits = torch.randn(30, 200, generator=seeded(1))
    expected = qtx.make_sampler(points).draw(logits, 16, generator=seeded(5)).dense(200)
    fixed = SantaSampler("fixed", points).draw(logits, 16, generator=seeded(5))
    assert torch.allclose(fixed.dense(200), expected, atol=1e-6)


def largest_remainder(share, num_samples):
    """Hamilton's apportionment, one seat at a time."""
    seats = [int(num_samples * p) for p in share]
    for _ in range(num_samples - sum(seats)):
        seats[max(range(len(share)), key=lambda t: num_samples * share[t] - seats[t])] += 1
    return seats


def test_proportional_budgets_are_the_largest_remainders():
    logits = 2 * torch.randn(200, 50, generator=seeded(1), dtype=torch.float64)
    counts = 24 * SantaSampler(tile=8).draw(logits, 24, generator=seeded(0)).dense(50)
    tiles = F.pad(counts, (0, 6)).unflatten(-1, (7, 8)).sum(-1).round().int().tolist()
    share = F.pad(logits.softmax(-1), (0, 6)).unflatten(-1, (7, 8)).sum(-1).tolist()
    assert tiles == [largest_remainder(p, 24) for p in share]


def test_fixed_budgets_weigh_tiles_exactly():
    logits = 2 * torch.randn(200, 50, generator=seeded(1))
    logits[:, 24:32] = -torch.inf
    draws = SantaSampler("fixed", tile=8).draw(logits, 26, generator=seeded(0))
    tile = F.one_hot(draws.indices // 8, 7).sum(-2)
    assert bool((tile == torch.tensor([5, 5, 4, 0, 4, 4, 4])).all())
    share = F.pad(logits.softmax(-1), (0, 6)).unflatten(-1, (7, 8)).sum(-1)
    held = F.pad(draws.dense(50), (0, 6)).unflatten(-1, (7, 8)).sum(-1)
    assert torch.allclose(held, share, atol=1e-5)


def test_never_more_tiles_than_draws(generator):
    draws = SantaSampler("fixed", tile=2).draw(torch.zeros(100, 64), 4, generator=generator)
    assert bool((draws.indices // 16 == torch.arange(4)).all())


# --- vAttention -----------------------------------------------------------------------------------


def test_what_vattention_keeps_is_exact_and_the_tail_uniform():
    n, s = 100, 50
    logits = 2 * torch.randn(n, generator=seeded(4))
    logits[80:] = -torch.inf  # the last visible key is 79
    draws = VAttentionSampler().draw(logits.expand(4000, n), s, generator=seeded(0))
    drawn = draws.dense(n) > 0
    middle = logits.clone()
    middle[:2], middle[78:] = -torch.inf, -torch.inf
    kept = [0, 1, 78, 79, *middle.topk(25).indices.tolist()]
    assert bool(drawn[:, kept].all())
    rest = sorted(set(range(80)) - set(kept))
    assert bool(drawn.sum(-1).eq(s).all())  # without replacement
    often = drawn[:, rest].double().mean(0)
    assert torch.allclose(often, torch.full_like(often, (s - 29) / 51), atol=5 * (0.25 / 4000) ** 0.5)
    p = logits.softmax(-1)
    assert torch.allclose(draws.dense(n).mean(0), p, atol=2e-3)  # self-normalised: nearly unbiased
    assert not torch.allclose(draws.dense(n)[0], p, atol=2e-3)


def test_vattention_is_exact_where_it_may_read_all():
    logits = torch.randn(30, 40, generator=seeded(1))
    draws = VAttentionSampler().draw(logits, 64, generator=seeded(0), replicates=2)
    assert torch.allclose(draws.dense(40), logits.softmax(-1), atol=1e-6)


# --- Top-k ----------------------------------------------------------------------------------------


def test_top_k_is_a_softmax_over_the_heaviest():
    logits = torch.randn(20, 40, generator=seeded(1))
    threshold = logits.sort(-1, descending=True).values[:, 9:10]
    expected = logits.masked_fill(logits < threshold, -torch.inf).softmax(-1)
    assert torch.allclose(TopKSampler().draw(logits, 10, replicates=3).dense(40), expected, atol=1e-6)


def test_vattention_weighs_keys_whose_probabilities_are_below_all_numbers(generator):
    logits = torch.zeros(100, 50).index_fill(1, torch.tensor(7), 500.0)
    draws = VAttentionSampler(heavy=0).draw(logits, 4, generator=generator)
    assert torch.allclose(draws.weights.sum(-1), torch.ones(100))
    q, k = torch.full((1, 1, 1), 500.0), torch.zeros(1, 50, 1).index_fill(1, torch.tensor(7), 1.0)
    v = torch.randn(1, 50, 3, generator=generator)
    est = qtx.sampled_attention(
        q, k, v, sampler=VAttentionSampler(heavy=0), num_samples=1, replicates=2, generator=generator
    )
    low, high = est.confidence_interval(0.95)
    assert not bool(est.reliable) or bool(((low < v[:, 7]) & (v[:, 7] < high)).all())
