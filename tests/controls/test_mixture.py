"""Rows weigh controls by what is known before the draws: small weights, never worse than the best one."""

import pytest
import torch

import qtx_lab as qtx
from qtx_lab.controls import RowVariance, mix_controls, row_weights, value_spread
from qtx_lab.controls.base import dense_weights, masked_logits
from qtx_lab.controls.registry import make_control

SIZES = {"diffuse": 0.5, "peaked": 3.0, "one-key": 40.0}


def rows(kind, dtype=torch.float64, n=70, causal=False):
    """log p of 6 rows of 2 heads, values, and the surrogates of three controls."""
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, m, 8, generator=g, dtype=torch.float64).to(dtype) for m in (6, n, n))
    q, positions = SIZES[kind] * q, torch.tensor([0, 1, 5, 40, n - 1, n - 1])
    log_p = masked_logits(q, k, positions, 0.35, causal).log_softmax(-1)
    surrogates = []
    for name in ("linformer", "performer", "topk"):
        prepared = make_control(name).prepare(k, v, scale=0.35, causal=causal, q=q, generator=g)
        surrogates.append(dense_weights(prepared, q, positions, n))
    return log_p, v, surrogates


def left(log_p, spread, surrogates, weights, a):
    """sum_j a_j s_j (1 - sum_c β_c p̂_cj / p_j)^2, (N, M)."""
    p = log_p.double().exp()
    x = sum(
        w.double()[..., None] * s.double() / p.clamp_min(1e-300)
        for w, s in zip(weights, surrogates, strict=True)
    )
    return (a(p) * spread.double()[:, None] * (1 - x).square()).sum(-1)


@pytest.mark.parametrize("kind", sorted(SIZES))
@pytest.mark.parametrize("a", [lambda p: p, lambda p: p * (1 - p).square()], ids=["independent", "even"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_controls_leave_no_more_than_the_best_one(kind, a, dtype):
    """Nor do copies, near copies, constants and controls that are likely where the row is not."""
    log_p, v, surrogates = rows(kind, dtype)
    n = log_p.shape[-1]
    flat = torch.full_like(log_p, 1 / n)
    surrogates += [
        surrogates[2].clone(),
        (surrogates[2] * (1 + 1e-4 * torch.sin(torch.arange(n)))).to(dtype),
        flat,
        log_p.neg().softmax(-1),
        torch.zeros_like(flat).index_fill(-1, torch.tensor([3]), 1.0),
    ]
    spread = value_spread(v)
    variance = RowVariance(log_p, spread, None if a(torch.tensor(0.5)) == 0.5 else a)
    alone = [row_weights(variance, [x]) for x in surrogates]
    best = torch.stack([left(log_p, spread, [x], w, a) for x, w in zip(surrogates, alone, strict=True)]).amin(
        0
    )
    plain = left(log_p, spread, surrogates[:1], torch.zeros_like(alone[0]), a)
    for count in range(2, len(surrogates) + 1):
        weights = row_weights(variance, surrogates[-count:])
        assert bool((weights >= 0).all())
        assert bool((weights <= 1).all())
        mixed = left(log_p, spread, surrogates[-count:], weights, a)
        of_these = torch.stack(
            [left(log_p, spread, [x], w, a) for x, w in zip(surrogates[-count:], alone[-count:], strict=True)]
        ).amin(0)
        assert bool((mixed <= of_these + 1e-5 * plain).all())
    assert bool((best <= plain * (1 + 1e-6)).all())


def test_the_weight_of_one_control_is_that_of_least_variance():
    log_p, v, surrogates = rows("diffuse")
    p, s = log_p.exp(), value_spread(v)[:, None]
    for variance_weights in (None, lambda p: p * (1 - p).square()):
        a = (p if variance_weights is None else variance_weights(p)) * s
        for x in surrogates:
            result = row_weights(RowVariance(log_p, value_spread(v), variance_weights), [x])[0]
            best = (a * x / p).sum(-1) / (a * (x / p).square()).sum(-1)
            assert torch.allclose(result, best.clamp_max(1))


def test_the_mixture_is_nearly_the_best_that_there_is():
    """Three controls that are as good together as alone they are bad: disjoint thirds of the row."""
    p = torch.rand(1, 4, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    thirds = [p * (torch.arange(90) % 3 == i) for i in range(3)]
    thirds = [x / x.sum(-1, keepdim=True) for x in thirds]
    weights = row_weights(RowVariance(p.log(), torch.ones(1, 90, dtype=p.dtype)), thirds)
    assert torch.allclose(sum(w[..., None] * x for w, x in zip(weights, thirds, strict=True)), p, atol=1e-8)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_scale_of_values_does_not_matter(size):
    """As long as squares stay inside float64; `AttentionProblem.unit` sees to that."""
    log_p, v, surrogates = rows("diffuse")
    expected = row_weights(RowVariance(log_p, value_spread(v)), surrogates)
    actual = row_weights(RowVariance(log_p, value_spread(size * v)), surrogates)
    assert torch.allclose(actual, expected, atol=1e-9)


def test_values_that_are_all_alike_leave_nothing_to_weigh():
    log_p, v, surrogates = rows("diffuse")
    weights = row_weights(RowVariance(log_p, value_spread(torch.zeros_like(v))), surrogates)
    assert weights.eq(0).all()
    weights = row_weights(RowVariance(log_p, value_spread(torch.ones_like(v))), surrogates)
    assert weights.isfinite().all()


def test_later_keys_change_no_causal_weight():
    log_p, v, surrogates = rows("diffuse", causal=True)
    other = torch.cat((v[:, :41], 5 - 3 * v[:, 41:]), 1)
    expected = row_weights(RowVariance(log_p, value_spread(v)), surrogates)
    actual = row_weights(RowVariance(log_p, value_spread(other)), surrogates)
    assert torch.allclose(actual[..., :4], expected[..., :4], atol=1e-12)
    assert not torch.allclose(actual[..., 4:], expected[..., 4:], atol=1e-3)
    fewer = [x[..., :41] for x in surrogates]
    actual = row_weights(RowVariance(log_p[..., :41], value_spread(v[:, :41])), fewer)
    assert torch.allclose(actual[..., :4], expected[..., :4], atol=1e-12)


def test_a_control_that_is_the_row_itself_gets_all_the_weight(generator):
    q, k, v = torch.randn(3, 2, 20, 8, generator=generator)
    positions = torch.arange(20)
    log_p = masked_logits(q, k, positions, 0.35, False).log_softmax(-1)
    prepared = [
        make_control(name).prepare(k, v, scale=0.35, causal=False, generator=generator)
        for name in ("performer", "topk", "exact")
    ]
    draws = qtx.make_sampler("monte-carlo").draw(log_p, 4, generator=generator)
    mixed = mix_controls(prepared, q, positions, draws, RowVariance(log_p, value_spread(v)))
    assert mixed.weights[:, 0, 0].tolist() == [0, 1, 0]  # 20 keys: top-k holds all of them
    assert torch.allclose(draws.average(v) - mixed.noise(draws, v).mean(2), log_p.exp() @ v, atol=1e-5)
