"""Control variates in `sampled_attention`: unbiased, never harmful, with intervals that cover."""

import functools
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import qtx_lab as qtx
from qtx_lab.attention import corrections
from qtx_lab.controls import (
    CONTROLS,
    LinformerControl,
    MultilevelControlVariate,
    PerformerControl,
    TopKControl,
)
from qtx_lab.samplers import SAMPLERS

CAUSAL = {"is_causal": True, "enable_gqa": True}
SURROGATES = sorted(set(CONTROLS) - {"exact"})
SINGLE = ["head-tail", "monte-carlo", "stratified", "systematic"]


@functools.cache
def learned_attention(heads=tuple(range(8))):
    """(q, k, v, exact output) of all layers of the reference model over 512 held-out bytes."""
    tokens = qtx.encode(qtx.reference_text())[None, 20_000:20_512]
    q, k, v = (torch.cat(x) for x in zip(*qtx.load_reference_model().attention_inputs(tokens), strict=True))
    q = q[:, heads]
    return q, k, v, F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **CAUSAL)


def learned_estimate(seed, heads=tuple(range(8)), **options):
    q, k, v, exact = learned_attention(heads)
    g = torch.Generator().manual_seed(seed)
    return qtx.sampled_attention(q, k, v, generator=g, **options, **CAUSAL), exact


@pytest.mark.statistical
@pytest.mark.parametrize("control", SURROGATES)
@pytest.mark.parametrize(
    ("name", "num_samples", "replicates"),
    [("monte-carlo", 16, 1), ("monte-carlo", 64, 1), *((name, 16, 8) for name in SINGLE)],
)
def test_intervals_cover_every_layer(name, num_samples, replicates, control, seed):
    """65,536 coordinates a layer, of the first and the last of the heads that share keys.

    With top-k intervals are wider: what it leaves is not in random order.
    """
    options = {"sampler": name, "num_samples": num_samples, "replicates": replicates}
    est, exact = learned_estimate(seed, (0, 3, 4, 7), control_variate=control, **options)
    low, high = est.confidence_interval(0.95)
    slack = 1e-5 * exact.abs().max()
    share = ((low - slack <= exact) & (exact <= high + slack)).double().mean((1, 2, 3))
    most = 0.98 if control == "topk" else 0.97
    assert bool(((share >= 0.93) & (share <= most)).all()), share


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("name", "replicates", "control", "gain"),
    [
        ("monte-carlo", 1, "linformer", 0.9),
        ("monte-carlo", 1, "topk", 0.3),
        ("systematic", 1, "linformer", 0.9),
        ("sobol", 2, "linformer", 0.9),
        ("head-tail", 1, ["performer", "linformer", "topk"], 0.6),
    ],
)
def test_no_head_is_harmed_and_most_gain(name, replicates, control, gain, seed):
    """Square error of each of 48 heads, with the control and without, of the same draws.

    1.02 is the promise, on average over draws; beside it stand three standard errors of the repetitions.
    """
    ratios = []
    for repeat in range(24 if "QTX_LAB_SOAK" in os.environ else 3):
        errors = []
        for chosen in (None, control):
            options = {"sampler": name, "num_samples": 16, "replicates": replicates}
            est, exact = learned_estimate(seed + repeat, control_variate=chosen, **options)
            errors.append((est.output - exact).square().mean((2, 3)))
        ratios.append(torch.stack(errors))
    before, after = torch.stack(ratios).unbind(1)  # [repetitions, layers, heads]
    ratio = after.mean(0) / before.mean(0)
    error = (after - before).std(0) / len(ratios) ** 0.5 / before.mean(0)
    assert bool((ratio <= 1.02 + 3 * error).all()), ratio
    assert ratio.median() < gain


@pytest.mark.parametrize("control", [*sorted(CONTROLS), SURROGATES])
@pytest.mark.parametrize("name", ["systematic", "monte-carlo", "sobol", "head-tail", "learned"])
def test_later_tokens_change_no_corrected_causal_row(name, control, generator):
    """Neither what they are nor how many there are."""
    q = 2 * torch.randn(2, 4, 300, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, 300, 16, generator=generator)

    def output(q, k, v):
        g = torch.Generator().manual_seed(1)
        options = {"sampler": name, "num_samples": 8, "replicates": 2, "control_variate": control}
        return qtx.sampled_attention(q, k, v, generator=g, **options, **CAUSAL).output[..., :180, :]

    before = output(q, k, v)
    q2, k2, v2 = q.clone(), k.clone(), v.clone()
    q2[..., 180:, :] *= -2
    k2[..., 180:, :] += 1
    v2[..., 180:, :] -= 1
    for length in (300, 260, 180):
        after = output(*(x[..., :length, :] for x in (q2, k2, v2)))
        assert torch.allclose(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("control", SURROGATES)
def test_rows_that_a_control_knows_exactly_are_exact(control, generator):
    """Causal rows that see few keys have themselves as surrogate, and their error is rounding."""
    q, k, v = (torch.randn(2, 200, 8, generator=generator) for _ in range(3))
    est = qtx.sampled_attention(
        q, k, v, num_samples=4, replicates=2, control_variate=control, is_causal=True, generator=generator
    )
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    known = 32 if control == "topk" else 64
    assert torch.allclose(est.output[:, :known], exact[:, :known], atol=1e-5)
    assert bool((est.std_error[:, :known] < 1e-4).all())
    assert bool(((est.output - exact).abs().amax((0, 2)) > 1e-3)[known:].all())


SMALL = {"linformer": LinformerControl(3), "performer": PerformerControl(8), "topk": TopKControl(3)}


def corrected_mean(name, replicates, control, plant, monkeypatch):
    """Hotelling's T^2 of 20,000 independent estimates against the exact output, and its limit."""
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(*shape, generator=g) for shape in ((6, 4), (10, 4), (10, 2)))
    many = 20_000
    q, k, v = (x.expand(many, *x.shape) for x in (q, k, v))
    if plant:  # coefficients of the very draws that they correct: the bias that cross-fitting avoids
        honest = corrections.regress

        def in_sample(estimates, noise, centre, **options):
            fit = honest(estimates, noise, centre, **options)
            x = estimates - centre[:, :, None]
            beta = (noise * x).sum((2, 3, 4)) / noise.square().sum((2, 3, 4))  # [C, N]
            return replace(fit, coefficients=beta.mT[:, None].expand_as(fit.coefficients).double())

        monkeypatch.setattr(corrections, "regress", in_sample)
    est = qtx.sampled_attention(
        q,
        k,
        v,
        sampler=name,
        num_samples=4,
        replicates=replicates,
        control_variate=SMALL[control],
        generator=g,
    )
    off = (est.output - F.scaled_dot_product_attention(q[:1], k[:1], v[:1])).flatten(1).double()
    mean, covariance = off.mean(0), off.T.cov() / many
    return float(mean @ torch.linalg.solve(covariance, mean)), float(stats.chi2.isf(1e-6, len(mean)))


@pytest.mark.statistical
@pytest.mark.parametrize("control", sorted(SMALL))
@pytest.mark.parametrize(
    ("name", "replicates"), [("monte-carlo", 1), ("systematic", 1), ("head-tail", 2), ("sobol", 2)]
)
def test_corrected_estimates_are_unbiased(name, replicates, control, monkeypatch):
    t2, limit = corrected_mean(name, replicates, control, False, monkeypatch)
    assert t2 < limit


@pytest.mark.statistical
def test_coefficients_of_the_same_draws_would_be_caught(monkeypatch):
    """Of draws that lie evenly: the weights of independent ones come from no draws at all."""
    t2, limit = corrected_mean("stratified", 1, "linformer", True, monkeypatch)
    assert t2 > limit


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("control", sorted(CONTROLS))
def test_every_sampler_goes_with_every_control(name, control, generator):
    q, k, v = (torch.randn(2, m, 8, generator=generator) for m in (5, 20, 20))
    est = qtx.sampled_attention(
        q, k, v, sampler=name, num_samples=8, replicates=2, control_variate=control, generator=generator
    )
    exact = F.scaled_dot_product_attention(q, k, v)
    assert est.output.shape == est.std_error.shape == exact.shape
    assert bool(((est.output - exact).abs() <= 8 * est.std_error + 0.5).all())
    if control == "exact" or name == "exact":
        assert torch.allclose(est.output, exact, atol=1e-5)
        assert bool(est.std_error.lt(1e-5).all())


def test_what_was_done_is_reported(generator):
    q, k, v = (0.5 * torch.randn(2, 4, 64, 16, generator=generator) for _ in range(3))
    control = MultilevelControlVariate([PerformerControl(64), "linformer"])
    est = qtx.sampled_attention(q, k, v, replicates=4, control_variate=control, generator=generator)
    report = est.diagnostics["control_variate"]
    assert set(report["coefficients"]) == set(report["costs"]) == {"performer", "linformer"}
    assert report["coefficients"]["linformer"].shape == report["variance_before"].shape == (2, 4)
    assert bool((report["variance_after"] < report["variance_before"]).all())
    one = qtx.sampled_attention(q[..., :1, :], k, v, control_variate="performer", generator=generator)
    (costly,) = one.diagnostics["fallbacks"]
    assert "cost as much as the exact output" in costly
    assert not torch.equal(one.draws.average(v), one.output)  # a single row of one replicate is corrected


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"control_variate": "performr"}, qtx.ArgumentError, r"control='performr'.*performer"),
        ({"control_variate": []}, qtx.ArgumentError, "at least one control"),
        ({"control_variate": 3}, qtx.DtypeError, "prepare method"),
        ({"control_variate": "topk", "attn_mask": torch.ones(4, 4).bool()}, qtx.ArgumentError, "attn_mask"),
        ({"control_variate": "topk", "sampler": "sobol"}, qtx.ArgumentError, "replicates >= 2"),
    ],
)
def test_bad_input_is_one_clear_error(options, error, match):
    x = torch.randn(4, 8)
    with pytest.raises(error, match=match):
        qtx.sampled_attention(x, x, x, **options)


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["monte-carlo", "stratified"])
def test_a_control_that_does_nothing_leaves_the_error_bars(name, generator):
    """One key in 24 is drawn seldom and all that matters: its noise must stay in the interval."""
    q = torch.ones(3000, 3, 1)
    k, v = torch.zeros(24, 1), torch.zeros(24, 1)
    k[0], v[0] = -5.0, 100.0
    k, v = (x.expand(3000, 24, 1) for x in (k, v))
    options = {"sampler": name, "num_samples": 4, "replicates": 8, "scale": 1.0, "generator": generator}
    plain, corrected = (
        qtx.sampled_attention(q, k, v, control_variate=c, **options) for c in (None, TopKControl(23))
    )
    exact = F.scaled_dot_product_attention(q[:1], k[:1], v[:1], scale=1.0)
    cover = [((e.output - exact).abs() <= 2.4 * e.std_error).double().mean() for e in (plain, corrected)]
    assert cover[1] > min(0.93, cover[0] - 0.05), cover


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_nothing_to_attend_is_nothing_to_correct(shape):
    q, k, v = (torch.zeros(shape[0], m, 4) for m in (shape[1], 6, 6))
    for control in sorted(CONTROLS):
        est = qtx.sampled_attention(q, k, v, replicates=2, control_variate=control)
        assert est.output.shape == est.std_error.shape == q.shape


def llm_like(length=40, keys=200):
    """Rows of 4 heads with RoPE, a sink and values of very different size: (q, k, v), not causal."""
    g = torch.Generator().manual_seed(11)
    width, half = 32, 16
    base = torch.randn(4, 1, width, generator=g)
    q = 1.5 * base + torch.randn(4, length, width, generator=g)
    k = 0.8 * base + torch.randn(4, keys, width, generator=g)
    speed = 100.0 ** (-torch.arange(half) / half)

    def turned(x, positions):
        angle = positions[:, None] * speed
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)

    q, k = turned(q, torch.arange(keys - length, keys)), turned(k, torch.arange(keys))
    v = torch.randn(4, keys, 8, generator=g) * torch.randn(4, keys, 1, generator=g).mul(0.5).exp()
    k[:, 0] = 1.6 * q.mean(1)  # the sink: most rows look at it, and it says nothing
    v[:, 0] *= 0.01
    return q, k, v


def synthetic(spread):
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(4, m, 32, generator=g) for m in (40, 200, 200))
    return spread * q, k, v


def skewed():
    """A few keys draw all rows, by as much as a Gumbel variable says."""
    g = torch.Generator().manual_seed(7)
    q, k, v = synthetic(1.0)
    k = torch.cat((k, -torch.rand(4, 200, 1, generator=g).log().neg().log() * 12), -1)
    return torch.cat((q, torch.ones(4, 40, 1)), -1), k, v


ROWS = {
    "diffuse": lambda: synthetic(0.5),
    "peaked": lambda: synthetic(2.5),
    "skewed": skewed,
    "LLM-like": llm_like,
}


@pytest.mark.statistical
@pytest.mark.parametrize("replicates", [1, 4])
@pytest.mark.parametrize("name", ["monte-carlo", "systematic", "head-tail"])
@pytest.mark.parametrize("rows", sorted(ROWS))
def test_more_controls_do_not_lose_what_one_gains(rows, name, replicates):
    """Root mean squared errors, in the geometric mean over heads: at most 5 % above the best single control.

    A head whose error is below a thousandth counts as a thousandth. Draws in value order are corrected only
    where that helps beyond doubt, which 40 rows of one replicate leave open more often for a mixture.
    """
    limit = 1.15 if (name, replicates) == ("head-tail", 1) else 1.05
    q, k, v = ROWS[rows]()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())

    def error(control):
        squares = []
        for seed in range(8):
            est = qtx.sampled_attention(
                q,
                k,
                v,
                sampler=name,
                num_samples=16,
                replicates=replicates,
                control_variate=control,
                generator=torch.Generator().manual_seed(seed),
            )
            squares.append((est.output - exact).square().mean((1, 2)))
        return torch.stack(squares).mean(0)

    plain = error(None)
    errors = {c: error(c).div(plain).clamp_min(1e-6).log().mean().div(2).exp().item() for c in SURROGATES}
    best = min(errors.values())
    for several in (["topk", "performer"], SURROGATES):
        together = error(several).div(plain).clamp_min(1e-6).log().mean().div(2).exp().item()
        assert together < limit * min(errors[c] for c in several), (several, together, errors)
    assert best < 1.02


@pytest.mark.parametrize("replicates", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ["monte-carlo", "systematic", "head-tail"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coefficients_stay_small(name, replicates, dtype):
    """For one row, where two controls are nearly the same: their errors explode if coefficients do."""
    q, k, v = (x.to(dtype) for x in llm_like(length=1))
    almost, same = TopKControl(31), TopKControl(32)
    almost.name, same.name = "topk-31", "topk-32"
    controls = ["topk", almost, same, "linformer", "performer"]
    options = {"sampler": name, "num_samples": 16, "replicates": replicates}
    for scale in (0.01, 0.18, 1.0):  # up to rows of one key
        for seed in range(3):
            est = qtx.sampled_attention(
                q,
                k,
                v,
                control_variate=controls,
                scale=scale,
                generator=torch.Generator().manual_seed(seed),
                **options,
            )
            coefficients = torch.stack(list(est.diagnostics["control_variate"]["coefficients"].values()))
            assert bool((coefficients.abs() <= 1 + 1e-6).all())
            assert est.output.isfinite().all()


def test_a_corrected_row_has_nothing_to_do_with_the_rows_beside_it(generator):
    """Its output and its error bar are the same alone, where draws are independent."""
    q, k, v = llm_like()
    options = {"sampler": "monte-carlo", "num_samples": 16, "is_causal": False}
    seed = torch.Generator().manual_seed(1)
    every = qtx.sampled_attention(q, k, v, control_variate=["topk", "linformer"], generator=seed, **options)
    seed = torch.Generator().manual_seed(1)
    some = qtx.sampled_attention(
        q[:, :5], k, v, control_variate=["topk", "linformer"], generator=seed, **options
    )
    assert torch.allclose(some.output, every.output[:, :5], atol=1e-6)
    assert torch.allclose(some.std_error, every.std_error[:, :5], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["systematic", "head-tail"])
def test_error_bars_do_not_depend_on_how_rows_are_cut(name, generator, monkeypatch):
    q, k, v = llm_like()

    def std_error():
        options = {
            "sampler": name,
            "num_samples": 16,
            "replicates": 4,
            "control_variate": ["topk", "linformer"],
        }
        g = torch.Generator().manual_seed(1)
        return qtx.sampled_attention(q, k, v, generator=g, **options).std_error

    whole = std_error()
    monkeypatch.setattr("qtx_lab.problem.BLOCK_ELEMENTS", 2000)
    assert torch.allclose(std_error(), whole, rtol=1e-2, atol=1e-6)


@pytest.mark.statistical
@pytest.mark.parametrize(("plant", "caught"), [(False, False), (True, True)])
def test_several_controls_bring_no_bias(plant, caught, monkeypatch):
    """Weights that look at the draws would: these are planted as a control's share among the drawn keys."""
    if plant:
        honest = corrections.mix_controls

        def looks_at_the_draws(prepared, q, positions, draws, variance, **options):
            mixed = honest(prepared, q, positions, draws, variance, **options)
            seen = mixed.ratios.mean(-1)
            return replace(mixed, weights=mixed.weights * (seen > 1))

        monkeypatch.setattr(corrections, "mix_controls", looks_at_the_draws)
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(*shape, generator=g) for shape in ((6, 4), (10, 4), (10, 2)))
    many = 20_000
    q, k, v = (x.expand(many, *x.shape) for x in (q, k, v))
    est = qtx.sampled_attention(
        q,
        k,
        v,
        sampler="monte-carlo",
        num_samples=4,
        control_variate=list(SMALL.values()),
        generator=g,
    )
    off = (est.output - F.scaled_dot_product_attention(q[:1], k[:1], v[:1])).flatten(1).double()
    mean, covariance = off.mean(0), off.T.cov() / many
    t2 = float(mean @ torch.linalg.solve(covariance, mean))
    assert (t2 > float(stats.chi2.isf(1e-6, len(mean)))) == caught


@pytest.mark.parametrize("name", ["monte-carlo", "systematic", "head-tail"])
@pytest.mark.parametrize("causal", [False, True])
def test_controls_go_with_sinks(name, causal, generator):
    """The keys' estimate is corrected, and then scaled by what the sinks leave to the keys."""
    q, k, v = (torch.randn(4, 100, 16, generator=generator) for _ in range(3))
    sinks = torch.tensor([-1.0, 0.0, 2.0, -torch.inf])
    logits = (q @ k.mT / 4).masked_fill(torch.ones(100, 100).triu(1).bool() & causal, -torch.inf)
    exact = torch.cat((logits, sinks[:, None, None].expand(-1, 100, 1)), -1).softmax(-1)[..., :-1] @ v
    options = {"sampler": name, "num_samples": 16, "replicates": 4, "sinks": sinks, "is_causal": causal}
    errors = []
    for control in (None, ["topk", "linformer"], "exact"):
        g = torch.Generator().manual_seed(1)
        est = qtx.sampled_attention(q, k, v, control_variate=control, generator=g, **options)
        errors.append((est.output - exact).square().mean().item())
        assert bool(((est.output - exact).abs() <= 8 * est.std_error + 1e-4).double().mean() > 0.99)
    plain, corrected, known = errors
    assert corrected < 0.6 * plain
    assert known < 1e-10
    g = torch.Generator().manual_seed(1)
    row = qtx.sampled_attention(q[..., :1, :], k, v, control_variate="topk", generator=g, sinks=sinks)
    assert row.output.isfinite().all()


@pytest.mark.parametrize("num_samples", [1, 4, 16])
def test_replicates_that_agree_by_chance_are_not_exact(num_samples):
    short = 0
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(8, 9, 8, generator=g, dtype=torch.float64) for _ in range(3))
        options = {"num_samples": num_samples, "replicates": 4, "control_variate": "performer"}
        est = qtx.sampled_attention(3 * q, k, v, sampler="learned", generator=g, **options)
        error = (est.output - F.scaled_dot_product_attention(3 * q, k, v)).norm(dim=-1)
        short += int(((error > 1e-3) & (est.std_error.norm(dim=-1) < 1e-9)).sum())
    assert short <= 2  # of 432 rows; 14 to 123 where replicates alone tell
