"""Low-discrepancy points: even within a row, and over the rows of a head together."""

import pytest
import torch
import torch.nn.functional as F

import qtx_lab as qtx
from qtx_lab.samplers.quasi_monte_carlo import SEQUENCES
from qtx_lab.streams import Stream


def points(name, rows, num_samples, replicates=1, seed=0):
    stream = Stream.of(seed, 1, *rows)
    return qtx.QuasiMonteCarloSampler(name).points(stream, num_samples, replicates)


@pytest.mark.parametrize("name", SEQUENCES)
def test_points_lie_in_the_unit_interval_and_never_at_one(name):
    u = points(name, (3, 1000), 37, 2)
    assert u.shape == (3, 1000, 2, 37)
    assert u.dtype == torch.float64
    assert bool(((u >= 0) & (u < 1)).all())


def test_sobol_points_are_a_net():
    """Every dyadic box of area 1 / (L S) over (query, key) holds exactly one point, in each randomisation."""
    rows, s = 32, 8
    u = points("sobol", (4, rows), s, 3).movedim(2, 1)  # [4, 3, 32, 8]
    x = torch.arange(rows * s).view(rows, s) / (rows * s)
    for k in range(9):
        box = (x * 2**k).long() * 2 ** (8 - k) + (u * 2 ** (8 - k)).long()
        counts = torch.nn.functional.one_hot(box.flatten(2), 256).sum(2)
        assert bool((counts == 1).all()), k


@pytest.mark.parametrize("name", SEQUENCES)
def test_heads_and_replicates_have_their_own_randomisation(name):
    u = points(name, (4, 16), 8, 3).movedim(2, 1).flatten(0, 1).flatten(1)
    assert len(u.unique(dim=0)) == 12
    assert torch.equal(points(name, (4, 16), 8, 3), points(name, (4, 16), 8, 3))


@pytest.mark.statistical
@pytest.mark.parametrize("name", SEQUENCES)
def test_each_point_is_uniform(name, seed):
    """Each of 24 points over 20,000 randomisations, Kolmogorov-Smirnov at 1e-5 each."""
    from scipy import stats

    u = points(name, (20_000, 4), 6, seed=seed)
    u = ((u * 6).frac() if name == "lattice" else u).flatten(1)  # a comb is uniform as a whole
    assert min(stats.kstest(u[:, i].numpy(), "uniform").pvalue for i in range(24)) > 1e-5


def pooled_slope(sampler, q, k, v, counts, g, **options):
    """Log-log slope in S of the error of the mean output over the queries of a head."""
    exact = F.scaled_dot_product_attention(q, k, v, **options).mean(-2)
    errors = []
    for s in counts:
        est = qtx.sampled_attention(q, k, v, sampler=sampler, num_samples=s, generator=g, **options)
        errors.append((est.output.mean(-2) - exact).square().mean().sqrt())
    x, y = torch.tensor(counts).double().log(), torch.stack(errors).double().log()
    return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("name", "limit"), [("sobol", -0.9), ("halton", -0.8), ("lattice", -0.8), ("monte-carlo", 0)]
)
def test_a_mean_over_queries_that_attend_alike_converges_faster(name, limit, seed):
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(100, 256, 8, generator=g), torch.randn(100, 256, 8, generator=g)
    q = torch.randn(100, 1, 8, generator=g).expand(100, 64, 8)
    slope = pooled_slope(name, q, k, v, [4, 8, 16, 32, 64], g)
    assert slope <= limit
    assert name != "monte-carlo" or abs(slope + 0.5) < 0.05


@pytest.mark.statistical
@pytest.mark.parametrize("name", SEQUENCES)
def test_a_mean_over_learned_attention_converges_faster(name, seed):
    tokens = qtx.encode(qtx.reference_text())[None, :512]
    q, k, v = (torch.cat(x) for x in zip(*qtx.load_reference_model().attention_inputs(tokens), strict=True))
    mask = torch.ones(512, 512, dtype=torch.bool).tril()[384:]
    g = torch.Generator().manual_seed(seed)
    slope = pooled_slope(name, q[:, :, 384:], k, v, [8, 16, 32, 64, 128], g, attn_mask=mask, enable_gqa=True)
    assert slope <= -0.65


def test_an_unknown_sequence_offers_the_nearest():
    with pytest.raises(qtx.ArgumentError, match="Did you mean 'sobol'"):
        qtx.QuasiMonteCarloSampler("sobl")
    with pytest.raises(qtx.ArgumentError, match="sequence_type"):
        qtx.QuasiMonteCarloSampler("faure")


def test_the_seed_document_example_runs():
    logits = torch.randn(2, 4, 10, 50, generator=torch.Generator().manual_seed(0))
    sampler = qtx.QuasiMonteCarloSampler(sequence_type="sobol")
    weights = sampler.sample_attention_weights(logits, num_samples=32)
    assert weights.shape == logits.shape
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 10), atol=1e-5)
