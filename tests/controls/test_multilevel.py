"""Samples are corrected by several levels at once: without bias, and by none that does not help."""

import pytest
import torch
import torch.nn.functional as F

import qtx_lab as qtx
from qtx_lab.controls import LinformerControl, MultilevelControlVariate
from qtx_lab.samplers import MonteCarloSampler


def rows(generator, heads=(2, 3), length=48, keys=64, spread=0.8):
    q, k = (spread * torch.randn(*heads, m, 16, generator=generator) for m in (length, keys))
    v = 2 + torch.randn(*heads, keys, 4, generator=generator)
    return q, k, v


def drawn(q, k, generator, count=16, replicates=1, sampler="monte-carlo"):
    return qtx.make_sampler(sampler).draw(q @ k.mT / 4, count, generator=generator, replicates=replicates)


def test_the_example_of_the_advanced_features_document(generator):
    """With the oracle among the levels, ["exact", "linformer", "performer"], the output is exact."""
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
def test_levels_reduce_the_error(replicates, independent, sampler, causal, generator):
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


def test_controls_may_be_pairs_of_samples_and_mean(generator):
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


def test_a_single_row_of_one_replicate_is_not_corrected_and_says_so(generator):
    q, k, v = rows(generator, heads=(), length=1)
    draws = drawn(q, k, generator, sampler="systematic")
    control = MultilevelControlVariate(["linformer"])
    controls = control.evaluate(q, k, v, draws)
    assert torch.allclose(
        control.variance_reduced_estimate(controls.target, controls), controls.target.mean(0)
    )
    assert "Not corrected" in control.report()


def test_bad_input_is_refused(generator):
    q, k, v = rows(generator)
    draws = drawn(q, k, generator)
    for levels in ("exact", [], ["exact", "exact"], ["exakt"]):
        with pytest.raises(qtx.ArgumentError, match=r"levels=|control="):
            MultilevelControlVariate(levels)
    control = MultilevelControlVariate(["linformer"])
    with pytest.raises(qtx.ArgumentError, match="no estimate to report"):
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


@pytest.mark.parametrize(("replicates", "independent"), [(1, True), (4, False), (1, False)])
def test_later_rows_change_no_corrected_causal_row(replicates, independent, generator):
    """Neither what they are nor how many there are: weights and coefficients are of what came before."""
    q, k, v = torch.randn(3, 2, 100, 8, generator=generator, dtype=torch.float64)
    mask = torch.ones(100, 100).triu(1).bool()
    whole = drawn_causally(q, k, mask, replicates)
    q2, k2, v2 = q.clone(), k.clone(), v.clone()
    q2[:, 70:] *= -2
    k2[:, 70:] += 1
    v2[:, 70:] -= 3
    names = ["linformer", "topk", "performer"]
    outputs = []
    for queries, keys, values, n in ((q, k, v, 100), (q2, k2, v2, 100), (q2, k2, v2, 70)):
        control = MultilevelControlVariate(names)
        levels = control.evaluate(
            queries[:, :n],
            keys[:, :n],
            values[:, :n],
            whole[slice(None), slice(0, n)],
            is_causal=True,
            generator=torch.Generator().manual_seed(0),
            independent=independent,
        )
        outputs.append(control.variance_reduced_estimate(levels.target, levels)[:, :70])
    for output in outputs[1:]:
        assert torch.allclose(output, outputs[0], atol=1e-9)


def drawn_causally(q, k, mask, replicates):
    """Draws of causal rows that see later ones nowhere: each row's own 16 keys, from its own stream."""
    logits = (q @ k.mT / 8**0.5).masked_fill(mask, -torch.inf)
    draws = qtx.make_sampler("monte-carlo").draw(
        logits, 16, replicates=replicates, generator=torch.Generator().manual_seed(0)
    )
    later = draws.indices >= 70
    later[:, 70:] = False
    assert not later.any()
    return draws


def test_pairs_that_are_nearly_the_same_get_small_coefficients(generator):
    """Their difference is noise: coefficients that blow it up would be thousands."""
    noise = torch.randn(64, 3, 8, 2, generator=generator)
    x = noise + 0.5 * torch.randn(64, 3, 8, 2, generator=generator)
    nearly = noise + 1e-4 * torch.randn(64, 3, 8, 2, generator=generator)
    zero = torch.zeros(3, 8, 2)
    control = MultilevelControlVariate(["topk"])
    pairs = {
        "one": (noise, zero),
        "nearly": (nearly, zero),
        "constant": (torch.ones_like(noise), torch.ones_like(zero)),
        "huge": (1e12 * noise, zero),
        "tiny": (1e-12 * noise, zero),
    }
    for chosen in (["one", "nearly"], ["nearly", "constant", "one"], list(pairs)):
        output = control.variance_reduced_estimate(x, {name: pairs[name] for name in chosen})
        assert output.square().mean() < 0.5 * x.mean(0).square().mean()
        used = sum(control.coefficients[name].abs() * pairs[name][0].std() for name in chosen)
        assert used.max() < 1.5  # how much noise of all of them a head takes in


def test_tensors_that_do_not_fit_are_refused_by_name():
    q, k, v = (torch.randn(2, 8, 4) for _ in range(3))
    draws = MonteCarloSampler().draw(q @ k.mT / 2, 4)
    control = MultilevelControlVariate(["topk"])
    with pytest.raises(qtx.DtypeError, match="Q is"):
        control.evaluate(q.double(), k, v, draws)
    with pytest.raises(qtx.DtypeError, match="Q is list"):
        control.evaluate(q.tolist(), k, v, draws)
    with pytest.raises(qtx.ShapeError, match="Q "):
        control.evaluate(q[..., :3], k, v, draws)
    with pytest.raises(qtx.NumberError, match="scale"):
        control.evaluate(q, k, v, draws, scale=True)
