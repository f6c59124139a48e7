"""Corrections of samples by several levels, and the telescoping sum over them."""

import pytest
import torch
import torch.nn.functional as F

import qtx_lab as qtx
from qtx_lab.controls import LinformerControl, MultilevelControlVariate, allocate, multilevel_attention


def rows(generator, heads=(2, 3), length=48, keys=64, spread=0.8):
    q, k = (spread * torch.randn(*heads, m, 16, generator=generator) for m in (length, keys))
    v = 2 + torch.randn(*heads, keys, 4, generator=generator)
    return q, k, v


def drawn(q, k, generator, count=16, replicates=1, sampler="monte-carlo"):
    return qtx.make_sampler(sampler).draw(q @ k.mT / 4, count, generator=generator, replicates=replicates)


def test_the_seed_documents_example(generator):
    """["exact", "linformer", "performer"]: with the oracle among the levels, the exact output."""
    q, k, v = rows(generator)
    draws = drawn(q, k, generator)
    control = MultilevelControlVariate(["exact", "linformer", "performer"])
    controls = control.evaluate(q, k, v, draws, generator=generator, independent=True)
    quantum_samples = (
        16
        * draws.weights.movedim(-1, 0)[..., None]
        * v[torch.arange(2)[:, None, None, None], torch.arange(3)[:, None, None], draws.indices].movedim(
            -2, 0
        )
    )
    assert torch.allclose(quantum_samples, controls.target)
    output = control.variance_reduced_estimate(quantum_samples, controls)
    assert torch.allclose(output, F.scaled_dot_product_attention(q, k, v), atol=1e-5)
    assert control.variance_after.eq(0).all()
    assert control.variance_before.shape == (2, 3)
    assert control.coefficients["exact"].eq(1).all()
    assert control.costs["exact"] > 0


@pytest.mark.parametrize(
    ("replicates", "independent", "sampler"),
    [(1, True, "monte-carlo"), (4, False, "systematic"), (1, False, "stratified")],
)
@pytest.mark.parametrize("causal", [False, True])
def test_levels_cut_the_error(replicates, independent, sampler, causal, generator):
    q, k, v = rows(generator, length=64, spread=0.6)
    logits = q @ k.mT / 4
    if causal:
        logits = logits.masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf)
    draws = qtx.make_sampler(sampler).draw(logits, 16, generator=generator, replicates=replicates)
    control = MultilevelControlVariate(["linformer", "performer", "topk"])
    control.controls[0] = LinformerControl(16)
    controls = control.evaluate(
        q, k, v, draws, is_causal=causal, generator=generator, independent=independent
    )
    output = control.variance_reduced_estimate(controls.target, controls)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    before, after = ((x - exact).square().mean() for x in (controls.target.mean(0), output))
    assert after < 0.5 * before
    assert "variance" in control.report()
    if independent or replicates > 1:
        assert bool((control.variance_after < control.variance_before).all())
    else:
        assert control.variance_before is None


def test_plain_pairs_need_no_draws_of_ours(generator):
    noise = torch.randn(256, 2, 10, 3, generator=generator)
    x = 1 + noise + 0.1 * torch.randn(256, 2, 10, 3, generator=generator)
    pair = (5 + 2 * noise, torch.full((2, 10, 3), 5.0))
    control = MultilevelControlVariate(["performer"])
    for controls in ({"mine": pair}, [pair]):
        output = control.variance_reduced_estimate(x, controls)
        assert (output - 1).abs().max() < 0.04 < (x.mean(0) - 1).abs().max()
        assert next(iter(control.coefficients.values())).tolist() == pytest.approx([0.5] * 2, abs=0.01)
    assert control.variance_after.mean() < 0.02 * control.variance_before.mean()
    # one row, no heads
    assert control.variance_reduced_estimate(x[:, 0, 0], [(pair[0][:, 0, 0], pair[1][0, 0])]).shape == (3,)


def test_a_single_row_of_one_replicate_is_left_alone_and_says_so(generator):
    q, k, v = rows(generator, heads=(), length=1)
    draws = drawn(q, k, generator, sampler="systematic")
    control = MultilevelControlVariate(["linformer"])
    controls = control.evaluate(q, k, v, draws)
    assert torch.allclose(
        control.variance_reduced_estimate(controls.target, controls), controls.target.mean(0)
    )
    assert "Not corrected" in control.report()


def test_bad_input_is_one_clear_error(generator):
    q, k, v = rows(generator)
    draws = drawn(q, k, generator)
    for levels in ("exact", [], ["exact", "exact"], ["exakt"]):
        with pytest.raises(qtx.ArgumentError, match=r"levels=|control="):
            MultilevelControlVariate(levels)
    control = MultilevelControlVariate(["linformer"])
    with pytest.raises(qtx.ArgumentError, match="nothing to report"):
        control.report()
    with pytest.raises(qtx.ShapeError, match="leading dimensions"):
        control.evaluate(q, k[0], v[0], draws)
    with pytest.raises(qtx.ShapeError, match="draws has rows"):
        control.evaluate(q[:, :, :5], k, v, draws)
    controls = control.evaluate(q, k, v, draws)
    with pytest.raises(qtx.ShapeError, match="quantum_samples"):
        control.variance_reduced_estimate(controls.target[:3], controls)
    with pytest.raises(qtx.ArgumentError, match="quantum_samples holds NaN"):
        control.variance_reduced_estimate(controls.target * torch.nan, controls)
    with pytest.raises(qtx.DtypeError, match="quantum_samples"):
        control.variance_reduced_estimate(controls.target.half(), controls)
    with pytest.raises(qtx.ArgumentError, match="controls="):
        control.variance_reduced_estimate(controls.target, {})
    with pytest.raises(qtx.ShapeError, match=r"controls\['a'\]"):
        control.variance_reduced_estimate(controls.target, {"a": (controls.target[:2], controls.target[0])})


def test_allocation_is_the_best_there_is():
    variances, costs, budget = [9.0, 1.0, 0.04], [1.0, 8.0, 40.0], 4000
    draws = allocate(variances, costs, budget)
    assert sum(n * c for n, c in zip(draws, costs, strict=True)) <= budget
    best = sum((v * c) ** 0.5 for v, c in zip(variances, costs, strict=True)) ** 2 / budget
    assert sum(v / n for v, n in zip(variances, draws, strict=True)) <= 1.05 * best
    assert allocate([0.0, 1.0], [1.0, 1.0], 10) == [1, 9]
    for bad in (([1.0], [1.0, 2.0], 9), ([-1.0], [1.0], 9), ([1.0], [0.0], 9), ([1.0], [3.0], 2)):
        with pytest.raises(qtx.ArgumentError, match=r"variances|costs|budget"):
            allocate(*bad)


@pytest.mark.statistical
def test_the_telescope_is_unbiased_and_knows_its_error(generator):
    """2,000 repetitions of each row: squared error over squared standard error is near 1, mean error near 0."""
    q, k, v = rows(generator, heads=(3,), length=6)
    many = [x.repeat_interleave(2000, 0) for x in (q, k, v)]
    est = multilevel_attention(
        *many, [LinformerControl(8), "performer", "exact"], budget=4000, generator=generator
    )
    error = est.output.view(3, 2000, 6, 4) - F.scaled_dot_product_attention(q, k, v)[:, None]
    z = error.mean(1) / (error.std(1) / 2000**0.5)
    assert z.abs().max() < 5.5  # of 72: false alarm below 1e-5
    assert error.square().mean().item() == pytest.approx(est.std_error.square().mean().item(), rel=0.05)
    assert error.square().sum(-1).mean().item() == pytest.approx(est.predicted_variance, rel=0.2)
    assert est.spent <= est.budget
    assert est.steps[-1].upper == "exact"
    assert "multiply-adds" in est.report()


@pytest.mark.statistical
def test_the_telescope_beats_every_single_level_at_equal_cost(generator):
    q, k, v = rows(generator, heads=(40,), length=64, keys=256)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=False)
    levels = [LinformerControl(16), "performer", "topk", "exact"]

    def error(levels):
        est = multilevel_attention(q, k, v, levels, budget=6000, generator=generator)
        return (est.output - exact).square().mean().item()

    together = error(levels)
    assert together <= 1.1 * min(error([level, "exact"]) for level in levels[:-1])
    independent = qtx.sampled_attention(
        q, k, v, sampler="monte-carlo", num_samples=6000 // (16 + 4), generator=generator
    )
    assert together < 0.5 * (independent.output - exact).square().mean().item()


def test_bad_telescopes_are_one_clear_error(generator):
    q, k, v = rows(generator)
    for levels, budget, match in (
        (["linformer", "topk"], 1e4, "last must be 'exact'"),
        (["exact"], 1e4, "levels="),
        (["linformer", "exact"], 3, "budget=3"),
    ):
        with pytest.raises(qtx.ArgumentError, match=match):
            multilevel_attention(q, k, v, levels, budget=budget)
    with pytest.raises(qtx.ShapeError, match="leading dimensions"):
        multilevel_attention(q, k[0], v, budget=1e4)
