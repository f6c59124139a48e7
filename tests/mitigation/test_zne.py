"""Zero-noise extrapolation agrees with NumPy's fits, has the right error bars, and refuses bad arguments."""

import warnings

import numpy as np
import pytest
import torch

import qtx_lab as qtx
from qtx_lab.mitigation.zne import METHODS

LEVELS = {
    "two": [1.0, 3.0],
    "three": [1.0, 1.7, 3.0],
    "four": [0.5, 1.0, 2.0, 4.5],
    "zero": [0.0, 0.01, 0.02],
}


def by_numpy(levels, values, method, degree, asymptote):
    """The value of one number at noise 0, by NumPy's fits."""
    if method == "exponential":
        intercept = np.polyfit(levels, np.log(np.abs(np.array(values) - asymptote)), 1)[-1]
        return asymptote + np.sign(values[0] - asymptote) * np.exp(intercept)
    degree = {"richardson": len(levels) - 1, "linear": 1, "polynomial": degree}[method]
    return np.polyfit(levels, values, degree)[-1]


@pytest.mark.parametrize(
    ("method", "levels"),
    [(m, x) for m in METHODS for x in LEVELS.values() if m != "polynomial" or len(x) > 2],
)
def test_every_method_agrees_with_numpy_on_scalars(method, levels, generator):
    zne = qtx.ZeroNoiseExtrapolation(levels, method, asymptote=0.1 if method == "exponential" else 0.0)
    values = 0.2 + torch.rand(len(levels), 5, 3, generator=generator, dtype=torch.float64)
    got = zne.extrapolate(values).output
    for index in np.ndindex(5, 3):
        y = values[(slice(None), *index)].numpy()
        assert abs(got[index].item() - by_numpy(levels, y, method, 2, 0.1)) < 1e-9


@pytest.mark.parametrize("method", ["richardson", "linear", "polynomial"])
def test_the_estimate_is_the_weighted_sum(method, generator):
    levels = [1.0, 1.5, 2.0, 4.0]
    zne = qtx.ZeroNoiseExtrapolation(levels, method)
    values = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    assert torch.allclose(zne.extrapolate(values).output, zne.weights @ values, atol=1e-12)
    assert abs(zne.weights.sum() - 1) < 1e-12
    # It is exact for polynomials of its degree.
    degree = {"richardson": 3, "linear": 1, "polynomial": 2}[method]
    x = torch.tensor(levels, dtype=torch.float64)
    y = sum((c + 1) * x**c for c in range(degree + 1))
    assert abs(zne.extrapolate(y[:, None]).output.item() - 1) < 1e-10


@pytest.mark.statistical
@pytest.mark.parametrize("method", METHODS)
def test_error_bars_cover(method, generator):
    """95 % intervals of 20,000 numbers cover 95 ± 0.5 %: three standard deviations, false alarm 0.3 %.

    A standard error that is 5 % too small would cover 93.7 %.
    """
    levels = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    zne = qtx.ZeroNoiseExtrapolation(levels, method, asymptote=0.1 if method == "exponential" else 0.0)
    truth = {
        "richardson": 1 - 0.1 * levels + 0.01 * levels**2,
        "polynomial": 1 - 0.1 * levels + 0.01 * levels**2,
        "linear": 1 - 0.1 * levels,
        "exponential": 0.1 + 0.9 * (-0.1 * levels).exp(),
    }[method]
    sigma = torch.tensor([1e-3, 2e-3, 1e-3, 3e-3], dtype=torch.float64)[:, None].expand(4, 20_000)
    noise = torch.randn(4, 20_000, generator=generator, dtype=torch.float64) * sigma
    got = zne.extrapolate(truth[:, None] + noise, sigma)
    covered = ((got.output - 1).abs() < 1.96 * got.std_error).double().mean()
    assert abs(covered - 0.95) < 0.005


def test_shots_are_spread_so_that_the_error_is_least(generator):
    zne = qtx.ZeroNoiseExtrapolation([1, 3, 5])
    spread = [1.0, 2.0, 0.5]
    each = zne.allocate(10_000, spread)
    assert sum(each) == 10_000
    w, s = zne.weights, torch.tensor(spread, dtype=torch.float64)

    def variance(n):
        return float((w**2 * s**2 / torch.tensor(n, dtype=torch.float64)).sum())

    best = variance(each)
    assert best <= variance([3334, 3333, 3333])
    for a, b in ((0, 1), (1, 2), (2, 0)):  # to move shots from any level to any other makes it worse
        for sign in (-300, 300):
            moved = list(each)
            moved[a] += sign
            moved[b] -= sign
            assert best < variance(moved)
    assert best == pytest.approx(float((w.abs() * s).sum()) ** 2 / 10_000, rel=1e-3)
    assert zne.allocate(3) == [1, 1, 1]
    assert qtx.ZeroNoiseExtrapolation([1, 3]).variance_factor == pytest.approx(4.0)


def noisy_attention(q, k, v, *, noise_level):
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return exact * (1 - noise_level) + noise_level**2


def test_attention_as_in_the_advanced_features_document(generator):
    q, k, v = (torch.randn(2, 5, 8, generator=generator) for _ in range(3))
    zne = qtx.ZeroNoiseExtrapolation(noise_levels=[0.0, 0.01, 0.02])
    with pytest.warns(qtx.FallbackWarning, match="the answer itself"):
        out = zne.mitigate_attention_errors(noisy_attention, q, k, v)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == v.dtype
    assert torch.allclose(out, exact, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = qtx.ZeroNoiseExtrapolation([0.01, 0.02, 0.05]).mitigate_attention_errors(
            noisy_attention, q, k, v
        )
    assert torch.allclose(out, exact, atol=1e-5)


def test_error_bars_of_attention_are_propagated(generator):
    q, k, v = (torch.randn(1, 6, 8, generator=generator, dtype=torch.float64) for _ in range(3))

    def estimate(q, k, v, *, noise_level):
        return qtx.sampled_attention(
            (1 - noise_level) * q, k, v, sampler="monte-carlo", num_samples=64, generator=generator
        )

    zne = qtx.ZeroNoiseExtrapolation([0.1, 0.2])
    state = generator.get_state()
    got = zne.mitigate_attention_errors(estimate, q, k, v)
    generator.set_state(state)
    near, far = (estimate(q, k, v, noise_level=x) for x in (0.1, 0.2))
    assert torch.allclose(got.output, 2 * near.output - far.output)
    assert torch.allclose(got.std_error, (4 * near.std_error**2 + far.std_error**2).sqrt())


def test_values_on_both_sides_of_the_asymptote_are_reported(generator):
    zne = qtx.ZeroNoiseExtrapolation([1, 2], "exponential", asymptote=0.5)
    got = zne.extrapolate(torch.tensor([[0.6, 0.9], [0.4, 0.7]], dtype=torch.float64))
    assert got.fallbacks[0].startswith("1 of 2 values")
    assert torch.allclose(got.output, torch.tensor([0.8, 0.5 + 0.4**2 / 0.2], dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"noise_levels": [1, 1]}, "twice"),
        ({"noise_levels": [1]}, "at least 2"),
        ({"noise_levels": []}, "at least 2"),
        ({"noise_levels": [-1, 1]}, ">= 0"),
        ({"noise_levels": [1, float("nan")]}, "finite"),
        ({"noise_levels": [1, float("inf")]}, "finite"),
        ({"noise_levels": "12"}, "sequence"),
        ({"noise_levels": 3}, "sequence"),
        ({"noise_levels": [1, True]}, "numbers"),
        ({"noise_levels": [1, 2], "method": "polynomial"}, "at least 3"),
        ({"method": "richardsn"}, "Did you mean"),
        ({"degree": 0}, "degree"),
        ({"asymptote": float("nan")}, "finite"),
        ({"asymptote": "0"}, "number"),
    ],
)
def test_bad_levels_and_methods_are_refused(arguments, error):
    with pytest.raises(qtx.QtxError, match=error):
        qtx.ZeroNoiseExtrapolation(**arguments)


def test_bad_values_are_refused():
    zne = qtx.ZeroNoiseExtrapolation([1, 2])
    good = torch.zeros(2, 3)
    for values, kind in (
        ([good[0]], qtx.ShapeError),
        ([good[0], torch.zeros(4)], qtx.ShapeError),
        (good.long(), qtx.DtypeError),
        ("values", qtx.DtypeError),
        (good / 0, qtx.ArgumentError),
    ):
        with pytest.raises(kind, match="values"):
            zne.extrapolate(values)
    with pytest.raises(qtx.ShapeError, match="std_errors"):
        zne.extrapolate(good, torch.zeros(2, 4))
    with pytest.raises(qtx.DtypeError, match="noisy_attention_fn"):
        zne.mitigate_attention_errors(None, good, good, good)
    with pytest.raises(qtx.ArgumentError, match="shots"):
        zne.allocate(1)
    with pytest.raises(qtx.ArgumentError, match="spread"):
        zne.allocate(10, [1.0])


def test_weights_of_close_levels_still_sum_to_one():
    zne = qtx.ZeroNoiseExtrapolation([1 + 1e-3 * i for i in range(6)], "polynomial", degree=2)
    x = torch.tensor(zne.noise_levels, dtype=torch.float64)
    for power, at_zero in ((0, 1.0), (1, 0.0), (2, 0.0)):
        assert float((zne.weights * x**power).sum()) == pytest.approx(at_zero, abs=1e-5)


def test_an_asymptote_that_does_not_fit_is_refused():
    zne = qtx.ZeroNoiseExtrapolation([1, 2, 3], "exponential", asymptote=torch.zeros(3, 1))
    with pytest.raises(qtx.ShapeError, match="asymptote has shape"):
        zne.extrapolate([torch.ones(4)] * 3)


@pytest.mark.parametrize("levels", [[3, 1], [5, 3, 1], [1, 0.5]])
def test_a_shared_decay_does_not_depend_on_the_order_of_levels(levels):
    p = torch.rand(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = p / p.sum(-1, keepdim=True)
    values = [0.25 + (p - 0.25) * 0.9**x for x in levels]
    assert torch.allclose(qtx.SharedDecay(levels).extrapolate(values).output, p, atol=1e-9)


@pytest.mark.parametrize("row", [[1e8, 0.0, 3.0], [-1e9, -2e9, -3e9], [3000.0, 0.0, 0.0]])
def test_projections_of_large_numbers_are_distributions(row):
    projected = qtx.project_to_simplex(torch.tensor([row]))
    assert projected.tolist() == [[1.0, 0.0, 0.0]]
