"""Samplers have the distribution that they promise: unbiased, and no noisier than independent draws."""

import pytest
import torch
from scipy import stats

import qtx_lab as qtx
from qtx_lab.samplers import SAMPLERS, SantaSampler

pytestmark = pytest.mark.statistical

FALSE_ALARM = 1e-6
RANDOM = sorted(set(SAMPLERS) - {"exact"})


def rows():
    """24 keys: one row in which all matter, one in which a single key and two masked ones do not."""
    u = torch.rand(24, generator=torch.Generator().manual_seed(1))
    diffuse = (0.5 + u) / (0.5 + u).sum()
    peaked = u**4
    peaked[[3, 17]] = 0
    peaked *= 0.1 / peaked.sum()
    peaked[9] += 1 - peaked.sum()
    return {"diffuse": diffuse, "peaked": peaked}


ROWS = rows()
REPETITIONS = {"diffuse": 400_000, "peaked": 1_000_000}
"""They catch independent draws whose probabilities are off by 0.5 % with power .9999 and .92."""


def bias_p_value(sampler, p, generator, repetitions, num_samples=12):
    """p-value of Hotelling's T^2 for E[dense weights] = p.

    Where the sampler leaves no freedom (systematic counts can be tied to each other), float32's is granted.
    """
    logits = p.log().expand(repetitions // 8, 1, -1)  # heads: rows of one may share their points
    weights = torch.cat(
        [sampler.draw(logits, num_samples, generator=generator).dense(len(p)).squeeze(1) for _ in range(8)]
    )
    assert weights[:, p == 0].eq(0).all()
    free = p.nonzero().squeeze(1)[:-1]  # they sum to one, so one is not free
    difference = weights.double().mean(0)[free] - p[free].double()
    covariance = weights[:, free].double().T.cov() / repetitions + 1e-7**2 * torch.eye(len(free))
    value = difference @ torch.linalg.solve(covariance, difference)
    return stats.chi2.sf(value.item(), len(free))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", RANDOM)
def test_unbiased(name, row, seed):
    """400,000 repetitions of 12 draws or more; false alarms once in a million."""
    g = torch.Generator().manual_seed(seed)
    assert bias_p_value(qtx.make_sampler(name), ROWS[row], g, REPETITIONS[row]) > FALSE_ALARM


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", RANDOM)
def test_a_planted_bias_of_half_a_percent_is_caught(name, row, seed):
    """The same test fails a sampler whose probabilities are off by 0.5 %."""

    class Biased:
        def __init__(self, inner):
            self.inner = inner

        def draw(self, logits, num_samples, **options):
            sign = torch.tensor([1.0, -1.0]).repeat(logits.shape[-1] // 2)
            return self.inner.draw(logits + (1 + 0.005 * sign).log(), num_samples, **options)

    g = torch.Generator().manual_seed(seed)
    assert bias_p_value(Biased(qtx.make_sampler(name)), ROWS[row], g, REPETITIONS[row]) < FALSE_ALARM


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("points", ["systematic", "stratified"])
def test_tile_budgets_that_are_rounded_are_caught(points, row, seed):
    """S²ANTA's proportional rule, in three tiles of eight keys, fails the test; its fixed rule passes it."""
    p_value = {}
    for budgets in ("proportional", "fixed"):
        sampler, g = SantaSampler(budgets, points, tile=8), torch.Generator().manual_seed(seed)
        p_value[budgets] = bias_p_value(sampler, ROWS[row], g, 100_000)
    assert p_value["proportional"] < FALSE_ALARM < p_value["fixed"]


@pytest.mark.parametrize("name", RANDOM)
def test_each_replicate_is_unbiased(name, seed):
    """Replicates are independent repetitions: the variance of their mean is 1/R of one's."""
    p = ROWS["diffuse"]
    logits, f = p.log().expand(40_000, 1, -1), torch.arange(24.0)
    g = torch.Generator().manual_seed(seed)
    one = qtx.make_sampler(name).draw(logits, 8, generator=g)
    four = qtx.make_sampler(name).draw(logits, 8, generator=g, replicates=4)
    mean = [(d.weights * f[d.indices]).sum(-1).double() for d in (one, four)]
    se = mean[0].std() / 40_000**0.5
    assert abs(mean[0].mean() - (p * f).sum()) < 5 * se
    assert 0.22 < (mean[1].var() / mean[0].var()).item() < 0.28


def test_systematic_draws_each_key_its_share_rounded(seed):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(5000, 37, generator=g)
    share = 16 * logits.double().softmax(-1)
    counts = 16 * qtx.make_sampler("systematic").draw(logits, 16, generator=g).dense(37)
    assert bool(((counts >= share.floor() - 1e-3) & (counts <= share.ceil() + 1e-3)).all())


def test_stratified_has_one_draw_in_each_stratum(seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2000, 50, generator=g)
    indices = qtx.make_sampler("stratified").draw(logits, 8, generator=g).indices
    upper = logits.double().softmax(-1).cumsum(-1)
    lower = torch.cat((torch.zeros(2000, 1), upper[:, :-1]), -1)
    stratum = torch.arange(8)
    assert bool((upper.gather(-1, indices) >= stratum / 8 - 1e-6).all())
    assert bool((lower.gather(-1, indices) <= (stratum + 1) / 8 + 1e-6).all())


@pytest.mark.parametrize("name", RANDOM)
def test_rare_keys_are_drawn_as_often_as_they_should(name, seed):
    """10^6 equal keys: 24-bit random numbers or float32 sums would leave some of them out."""
    n, g = 1 << 20, torch.Generator().manual_seed(seed)
    indices = qtx.make_sampler(name).draw(torch.zeros(n), n, generator=g).indices
    thirds = torch.bincount(indices % 3)  # neighbours: sensitive to how the row's sums are rounded
    expected = torch.bincount(torch.arange(n) % 3)
    assert ((thirds - expected).abs() < 5 * (n / 3) ** 0.5).all()
    if name == "systematic":
        assert torch.equal(indices, torch.arange(n))
