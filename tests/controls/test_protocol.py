"""Every control keeps the interface of `Control`: its weights and sums are known, and they agree."""

import math

import pytest
import torch

import qtx_lab as qtx
from qtx_lab.controls import (
    CONTROLS,
    Control,
    LinformerControl,
    PerformerControl,
    RowVariance,
    TopKControl,
    make_control,
    mix_controls,
    value_spread,
)
from qtx_lab.controls.base import dense_weights, masked_logits

NAMES = sorted(CONTROLS)


def mixed_control(prepared, q, positions, k, v, draws, *, scale, causal, heads=slice(None)):
    """A single control at the draws of rows, weighed in each."""
    log_p = masked_logits(q, k, positions, scale, causal).log_softmax(-1)
    return mix_controls([prepared], q, positions, draws, RowVariance(log_p, value_spread(v)), heads=heads)


@pytest.fixture(params=NAMES)
def control(request):
    return make_control(request.param)


def problem(n, seed=1, heads=3, rows=7, width=8, d=5, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    q, k = (spread * torch.randn(heads, m, width, generator=g, dtype=torch.float64) for m in (rows, n))
    v = 3 + torch.randn(heads, n, d, generator=g, dtype=torch.float64)
    return q, k, v, torch.randint(0, n + 3, (rows,), generator=g)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 2, 63, 130, 300])
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_sums_are_those_of_the_weights(control, n, causal, spread):
    q, k, v, positions = problem(n, spread=spread)
    prepared = control.prepare(k, v, scale=0.35, causal=causal, generator=torch.Generator().manual_seed(0))
    p = dense_weights(prepared, q, positions, n)
    assert torch.allclose(prepared.sums(q, positions), p @ v, atol=1e-10)
    assert bool((p >= 0).all())
    assert torch.allclose(p.sum(-1), torch.ones(3, 7, dtype=p.dtype), atol=1e-12)
    if causal:
        assert p[:, torch.arange(n) > positions[:, None]].eq(0).all()
    few = torch.randint(0, n, (3, 7, 2), generator=torch.Generator().manual_seed(2))
    assert torch.allclose(prepared.weights_at(q, positions, few), p.gather(-1, few), atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_some_heads_of_many(control, causal):
    q, k, v, positions = problem(90)
    prepared = control.prepare(k, v, scale=0.35, causal=causal, generator=torch.Generator().manual_seed(0))
    part, indices = slice(1, 3), torch.randint(0, 90, (3, 7, 4))
    some = prepared.sums(q[part], positions, heads=part)
    assert torch.allclose(some, prepared.sums(q, positions)[part], atol=1e-12)
    some = prepared.weights_at(q[part], positions, indices[part], heads=part)
    assert torch.allclose(some, prepared.weights_at(q, positions, indices)[part], atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [40, 160])
@pytest.mark.parametrize("scale", [0.35, -0.35])
def test_controls_approach_the_row_as_they_grow(scale, n, causal):
    """All landmarks or all keys give the row itself; many features on small logits nearly do."""
    q, k, v, positions = problem(n, spread=0.7)
    p = masked_logits(q, k, positions, scale, causal).softmax(-1)
    grown = ((LinformerControl(n), 1e-12), (TopKControl(2 * n), 1e-12), (PerformerControl(8192), 0.1))
    for control, tolerance in grown:
        prepared = control.prepare(
            k, v, scale=scale, causal=causal, generator=torch.Generator().manual_seed(0)
        )
        assert (dense_weights(prepared, q, positions, n) - p).abs().sum(-1).max() < tolerance, control.name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [20, 200])
def test_the_surrogate_is_the_row_where_a_control_says_so(control, n, causal):
    q, k, v, _ = problem(n, rows=n)
    positions = torch.arange(n)
    prepared = control.prepare(k, v, scale=0.35, causal=causal, generator=torch.Generator().manual_seed(0))
    exact = prepared.exact_rows(positions)
    p = masked_logits(q, k, positions, 0.35, causal).softmax(-1)
    away = (dense_weights(prepared, q, positions, n) - p).abs().sum(-1).amax(0)  # [n]
    assert bool((away[exact] < 1e-12).all())
    assert bool((away[~exact] > 1e-3).all())


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_later_keys_change_no_causal_surrogate(control, size):
    """Neither their values, nor how large they are, nor how many there are."""
    g = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 400, 8, generator=g, dtype=torch.float64)
    other_k, other_v = k.clone(), v.clone()
    other_k[:, 150:] *= -size
    other_v[:, 150:] += size
    positions, here = torch.arange(400), slice(0, 150)

    def surrogate(k, v, n):
        g = torch.Generator().manual_seed(0)
        prepared = control.prepare(k[:, :n], v[:, :n], scale=0.35, causal=True, q=q[:, :64], generator=g)
        weights = dense_weights(prepared, q[:, here], positions[here], 150)
        return weights, prepared.sums(q[:, here], positions[here])

    expected = surrogate(k, v, 400)
    for n in (400, 290, 150):
        for actual, want in zip(surrogate(other_k, other_v, n), expected, strict=True):
            assert torch.allclose(actual, want, atol=1e-12)


def test_a_causal_row_has_half_to_all_of_the_landmarks():
    """Segments double where more of them would be needed, and the row is exact before."""
    _, k, v, _ = problem(1000)
    prepared = LinformerControl(48).prepare(k, v, scale=1.0, causal=True)
    assert [(s.size, s.start, s.end) for s in prepared.segments] == [
        (1, 0, 48),
        (2, 48, 96),
        (4, 96, 192),
        (8, 192, 384),
        (16, 384, 768),
        (32, 768, 1000),
    ]
    assert prepared.cost(1000) == (32 + 1) * (8 + 5)


def test_extreme_logits_give_finite_weights(control):
    q, k, v, positions = (x.float() if x.is_floating_point() else x for x in problem(50, spread=60.0))
    prepared = control.prepare(k, v, scale=1.0, causal=True, generator=torch.Generator().manual_seed(0))
    p = dense_weights(prepared, q, positions, 50)
    assert p.isfinite().all()
    assert torch.allclose(p.sum(-1), torch.ones(3, 7), atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_noise_does_not_depend_on_how_rows_are_cut(control, causal):
    q, k, v, positions = problem(60)
    positions = positions.clamp_max(59)
    logits = masked_logits(q, k, positions, 0.35, causal)
    draws = qtx.make_sampler("monte-carlo").draw(
        logits, 8, replicates=3, generator=torch.Generator().manual_seed(0)
    )
    prepared = control.prepare(k, v, scale=0.35, causal=causal, generator=torch.Generator().manual_seed(0))
    options = {"scale": 0.35, "causal": causal}
    mixed = mixed_control(prepared, q, positions, k, v, draws, **options)
    noise, mean = mixed.noise(draws, v), mixed.means[0]
    assert noise.shape == (3, 7, 3, 5)
    one = slice(2, 3)
    own = draws[one, slice(None)]
    part = mixed_control(prepared, q[one], positions, k[one], v[one], own, heads=one, **options)
    assert torch.allclose(part.noise(own, v[one]), noise[one])
    assert torch.allclose(mean, dense_weights(prepared, q, positions, 60) @ v)


def test_performer_needs_no_more_memory_than_its_chunks():
    """Causal states are kept a chunk, not a key: 4096 keys keep 64, where (n, r, d) would be 17 million."""
    k = torch.randn(1, 4096, 16)
    prepared = PerformerControl(64).prepare(k, torch.randn(1, 4096, 64), scale=0.25, causal=True)
    assert prepared.states.shape == (1, 65, 64, 65)


def test_costs_are_those_of_the_docstrings():
    _, k, v, _ = problem(1000)
    cost = {n: make_control(n).prepare(k, v, scale=1.0, causal=False).cost(1000) for n in NAMES}
    assert cost["exact"] == 1000 * (8 + 5)
    assert cost["topk"] == 1000 * 8 + 32 * 5
    assert cost["performer"] == 128 * (8 + 5 + 1)
    assert cost["linformer"] <= 64 * (8 + 5)


def test_bad_names_and_objects_are_one_clear_error():
    with pytest.raises(qtx.ArgumentError, match=r"control='performr'.*Did you mean 'performer'"):
        make_control("performr")
    for other in (3, TopKControl):
        with pytest.raises(qtx.DtypeError, match="prepare method"):
            make_control(other)
    mine = TopKControl(4)
    assert make_control(mine) is mine


def test_a_control_need_not_derive_from_the_base_class():
    class Mine:
        name = "mine"

        def prepare(self, k, v, **options):
            return TopKControl(4).prepare(k, v, **options)

    control = make_control(Mine())
    assert isinstance(control, Control)
    assert (control.name, control.oracle) == ("mine", False)
    _, k, v, _ = problem(20)
    assert control.prepare(k, v, scale=1.0, causal=True).keys == 4


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PerformerControl(0), "features=0"),
        (lambda: PerformerControl(7), "features=7.*even"),
        (lambda: LinformerControl(-1), "landmarks=-1"),
        (lambda: TopKControl(2.0), r"keys=2\.0"),
    ],
)
def test_bad_sizes_are_one_clear_error(make, match):
    with pytest.raises(qtx.ArgumentError, match=match):
        make()


@pytest.mark.parametrize(
    ("k", "v", "scale", "error", "match"),
    [
        (torch.zeros(4, 3), torch.zeros(1, 4, 3), 1.0, qtx.ShapeError, "k has shape"),
        (torch.zeros(1, 0, 3), torch.zeros(1, 0, 3), 1.0, qtx.ShapeError, "n, E >= 1"),
        (torch.zeros(1, 4, 3), torch.zeros(1, 5, 3), 1.0, qtx.ShapeError, "v "),
        (torch.zeros(1, 4, 3).half(), torch.zeros(1, 4, 3), 1.0, qtx.DtypeError, "k is torch.float16"),
        (torch.zeros(1, 4, 3), torch.zeros(1, 4, 3).double(), 1.0, qtx.DtypeError, "agree"),
        (torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), math.nan, qtx.ArgumentError, "scale=nan"),
    ],
)
def test_bad_keys_are_one_clear_error(control, k, v, scale, error, match):
    with pytest.raises(error, match=match):
        control.prepare(k, v, scale=scale, causal=False)


def test_bad_queries_are_one_clear_error(control):
    q, k, v, positions = problem(20)
    prepared = control.prepare(k, v, scale=1.0, causal=True)
    with pytest.raises(qtx.ShapeError, match="q has shape"):
        prepared.sums(q[:2], positions)
    with pytest.raises(qtx.ShapeError, match="positions has shape"):
        prepared.sums(q, positions[:3])


def test_draws_of_unknown_probability_are_one_clear_error(control):
    q, k, v, positions = problem(20)
    prepared = control.prepare(k, v, scale=1.0, causal=False)
    draws = qtx.Draws(torch.zeros(3, 7, 2, dtype=torch.int64), torch.full((3, 7, 2), 0.5))
    with pytest.raises(qtx.ArgumentError, match="no probabilities"):
        mixed_control(prepared, q, positions, k, v, draws, scale=1.0, causal=False)
