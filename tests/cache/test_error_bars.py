"""Error bars of a cache: coverage and width by class of rows, and rows whose error bars cannot be trusted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import qtx_lab as qtx
from qtx_lab.cache import attend as cache_attend

HEADS, N, FEATURES, WIDTH, ROWS, REPEATS = 3, 700, 32, 8, 5, 60
FALSE_ALARM = 1e-4
"""Of one class, proposal and number of draws."""


def rotated(x, position):
    """Rotary embedding of x (H, L, E) at positions (L,)."""
    half = x.shape[-1] // 2
    angle = position[:, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


def problem(name, g):
    """Queries (H, L, E), keys (H, n, E) and values (H, n, d) of a class of rows."""

    def normal(*shape):
        return torch.randn(HEADS, *shape, generator=g)

    q, k, v = normal(ROWS, FEATURES), normal(N, FEATURES), normal(N, WIDTH)
    if name == "peaked":
        q = 4 * q
    elif name == "diffuse":
        q = 0.3 * q
    elif name == "skewed":
        v = v.mul(1.3).exp()
    elif name == "one-hot":
        v = F.one_hot(torch.randint(WIDTH, (HEADS, N), generator=g), WIDTH).float()
    elif name == "one key":  # each feature has one key
        v = torch.zeros_like(v).scatter_(1, torch.randint(N, (HEADS, 1, WIDTH), generator=g), 1.0)
    elif name == "outlier":
        v[:, 100] = 60.0
    elif name == "clustered":
        which = torch.randint(8, (HEADS, N, 1), generator=g)
        k = normal(8, FEATURES).gather(1, which.expand_as(k)) + 0.3 * k
        v = 2 * normal(8, WIDTH).gather(1, which.expand_as(v)) + 0.2 * v
    elif name == "sink":
        direction = F.normalize(normal(1, FEATURES), dim=-1)
        q, k[:, :1], v[:, :1] = q + 4 * direction, 8 * direction, 0.02 * v[:, :1]
    elif name == "rotary":  # as in language models: slow rotations, a sink, values of unequal size
        k = rotated(2 * normal(1, FEATURES) + 0.5 * k, torch.arange(N))
        q = rotated(1.5 * normal(1, FEATURES) + 0.7 * q, N + torch.arange(ROWS))
        k[:, 0] *= 4
        v = v * torch.linspace(0.1, 2, WIDTH)
        v[:, 0] *= 0.02
    return q, k, v


CLASSES = ("peaked", "diffuse", "skewed", "one-hot", "one key", "outlier", "clustered", "sink", "rotary")


def measured(name, proposal, num_samples, replicates=1, dtype=torch.float32, rank=24, **options):
    """Errors of an estimate, and the estimate, (H, L * REPEATS, d), of each row many times."""
    q, k, v = (x.to(dtype) for x in problem(name, torch.Generator().manual_seed(1)))
    if "share_keys" in options:  # with two query heads a key head
        q = torch.stack((q, q.flip(1)), 1).flatten(0, 1)
    ranks = {"rank": rank} if proposal in ("low-rank", "mixed") else {}
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal, **ranks)
    est = cache.attend(
        q.repeat_interleave(REPEATS, 1),
        num_samples,
        replicates=replicates,
        generator=torch.Generator().manual_seed(2),
        **options,
    )
    exact = F.scaled_dot_product_attention(*(x.double()[None] for x in (q, k, v)), enable_gqa=True)[0]
    return est.output.double() - exact.repeat_interleave(REPEATS, 1), est


def covers_too_little(error, est, level=0.95, short_of=0.92):
    """Whether intervals cover less than `short_of`, by the exact interval of Clopper and Pearson (1934).

    A trial is one coordinate of each row, which one changes from row to row: coordinates share the draws.
    """
    low, high = est.confidence_interval(level)
    exact = est.output.double() - error
    hit = ((low <= exact) & (exact <= high)).flatten(0, 1)
    row = torch.arange(len(hit))
    hits, trials = int(hit[row, row % hit.shape[1]].sum()), len(hit)
    return stats.beta.ppf(1 - FALSE_ALARM, hits + 1, trials - hits) < short_of if hits < trials else False


def width_over_error(error, est):
    """The standard error over the root mean squared error of each row, (H, L)."""
    squares = [x.double().square().unflatten(1, (ROWS, -1)).mean((2, 3)) for x in (est.std_error, error)]
    return (squares[0] / squares[1]).sqrt()


@pytest.mark.statistical
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("proposal", "num_samples", "replicates"),
    [("exact", 16, 1), ("exact", 128, 1), ("low-rank", 64, 1), ("int4", 64, 1), ("int4", 24, 4)],
)
def test_intervals_cover_each_class_of_rows(name, proposal, num_samples, replicates):
    """95 % intervals cover 92 % or more of 900 rows of a class, or the class is flagged."""
    error, est = measured(name, proposal, num_samples, replicates)
    trusted = float(est.reliable.float().mean())
    assert not covers_too_little(error, est) or trusted < 0.05
    width = width_over_error(error, est)
    assert float(width.quantile(0.5)) < 2.8
    assert float(width.quantile(0.1)) > 0.8


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["peaked", "one key", "sink", "rotary"])
@pytest.mark.parametrize("options", [{"adaptive": True}, {"share_keys": True}])
def test_intervals_cover_where_rows_draw_unequally_or_together(name, options):
    error, est = measured(name, "int4", 64, **options)
    assert not covers_too_little(error, est)
    width = width_over_error(error, est)
    assert 0.9 < float(width.quantile(0.5)) < 2.8


@pytest.mark.statistical
@pytest.mark.parametrize(("fault", "is_wide"), [(0.6, False), (3.0, True)])
def test_wrong_error_bars_are_found(fault, is_wide, monkeypatch):
    """With standard errors .6 and 3 times what they are, the test above fails in every class."""
    right = cache_attend.row_errors

    def wrong(*args):
        errors = right(*args)
        return dataclasses.replace(errors, variance=errors.variance * fault**2)

    monkeypatch.setattr(cache_attend, "row_errors", wrong)
    for name in ("peaked", "diffuse", "sink", "rotary"):
        error, est = measured(name, "int4", 64)
        if is_wide:
            assert float(width_over_error(error, est).quantile(0.5)) > 2.8
        else:
            assert covers_too_little(error, est)


@pytest.mark.statistical
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_same_error_bars(dtype):
    for name in ("peaked", "rotary"):
        error, est = measured(name, "exact", 64, dtype=dtype)
        assert not covers_too_little(error, est)
        assert 0.8 < float(width_over_error(error, est).quantile(0.5)) < 2.5


@pytest.mark.statistical
def test_rows_that_cannot_be_trusted_are_flagged():
    """Of rows that err by more than their error bars, as their sketch is too coarse, 95 % are flagged.

    Rows of good sketches are not.
    """
    error, est = measured("peaked", "low-rank", 64, rank=14)
    missed = error.norm(dim=-1) > 1.96 * est.std_error.double().norm(dim=-1)
    assert float(missed.float().mean()) > 0.1
    assert float((~est.reliable)[missed].float().mean()) > 0.95
    for name in ("diffuse", "sink", "rotary"):
        assert float(measured(name, "exact", 64)[1].reliable.float().mean()) > 0.9
    assert float(measured("outlier", "exact", 64)[1].reliable.float().mean()) < 0.2


@pytest.mark.parametrize("proposal", ["exact", "low-rank", "int4"])
def test_only_exact_rows_have_errors_of_mere_rounding(proposal):
    """Where all keys are drawn the reliability is infinite; a draw that is sure still has an error bar."""
    assert bool(measured("rotary", proposal, 700)[1].reliability.isinf().all())
    for num_samples in (1, 2, 699):
        est = measured("sink", proposal, num_samples)[1]
        assert bool((est.std_error.norm(dim=-1) > (1e-7 if num_samples == 699 else 1e-3)).all())
        assert bool(est.reliability.isfinite().all())


def test_draws_without_a_key_of_their_own_are_not_seen(generator):
    """Draws of weight 0 change neither the error bars nor the reliability, whatever keys they name."""
    q, k, v = problem("peaked", generator)
    cache = qtx.SampledKVCache.build(k, v, proposal="exact")
    seen = []
    original = cache_attend.row_errors

    def changed(table, features, drawn, moments, replicates):
        errors = original(table, features, drawn, moments, replicates)
        idle = drawn.weights == 0
        seen.append(float(idle.float().mean()))
        index = torch.where(idle, (drawn.indices + 7) % N, drawn.indices)
        proposed = torch.where(idle, 0.3, drawn.proposed)
        other = dataclasses.replace(drawn, indices=index, proposed=proposed)
        again = original(table, features, other, moments, replicates)
        assert torch.equal(errors.variance, again.variance)
        torch.testing.assert_close(errors.hidden, again.hidden, atol=0, rtol=0, equal_nan=True)
        return errors

    cache_attend.row_errors = changed
    try:
        _ = cache.attend(q, 300, replicates=2, generator=generator).std_error
    finally:
        cache_attend.row_errors = original
    assert seen[0] > 0
