"""Where extrapolation begins to help: the closed form of weak noise, the exact one, and what draws show."""

import numpy as np
import pytest
import torch

import qtx_lab as qtx
from qtx_lab.bench.mitigation import synthetic_rows
from qtx_lab.mitigation import HelpBoundary, rows_boundary, shots_that_extrapolation_needs, zne_boundary
from qtx_lab.mitigation.rehearsal import Rehearsal

ZNE = qtx.ZeroNoiseExtrapolation


def drawn_gain(zne, mean, noise, shots, rng, repeats=200_000):
    """Mean squared error of raw counts less that of the extrapolation, of an observable ±1, and its error."""

    def measured(level, n):
        return 2 * rng.binomial(n, (1 + mean(level * noise)) / 2, repeats) / n - 1

    halves = shots // 2
    raw = measured(1, shots)
    w = zne.weights.numpy()
    zero = w[0] * measured(zne.noise_levels[0], halves) + w[1] * measured(zne.noise_levels[1], halves)
    gains = (raw - mean(0)) ** 2 - (zero - mean(0)) ** 2
    return gains.mean(), gains.std() / repeats**0.5


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("mean", "power", "variance", "slope"),
    [
        (lambda x: (1 - x) ** 20, 1, 40.0, 20.0),  # certain without noise: q = 1, v = 2 |a|
        (lambda x: 0.3 * (1 - x) ** 20, 0, 1 - 0.09, 6.0),
    ],
    ids=["certain", "uncertain"],
)
def test_the_closed_form_is_where_draws_cross(mean, power, variance, slope):
    """Draws help 15 % beyond the boundary and harm 15 % before it, by more than five standard errors; the
    expansion in the noise is then good to less than that.
    """
    zne, rng = ZNE([1, 3]), np.random.default_rng(0)
    boundary = zne_boundary(zne, slope=slope, variance=variance, variance_power=power, shares=[0.5, 0.5])
    assert boundary.penalty == pytest.approx((5 if power else 4) * variance)  # the paper's constants
    for shots in (20_000, 200_000):
        noise = boundary.noise(shots)
        assert boundary.shots(noise) == pytest.approx(shots)
        for factor in (0.85, 1.15):
            gain, error = drawn_gain(zne, mean, factor * noise, shots, rng)
            assert np.sign(factor - 1) * gain > 5 * error
    assert boundary.noise(80_000) / boundary.noise(20_000) == pytest.approx(4 ** (-1 / (2 - power)))


def test_a_variance_that_falls_as_fast_as_the_bias_leaves_a_number_of_shots():
    boundary = zne_boundary(ZNE([1, 3]), slope=1.0, variance=1.0, variance_power=2, shares=[0.5, 0.5])
    assert boundary.shots(0.01) == boundary.shots(0.5) == pytest.approx(8)
    assert (boundary.noise(7.9), boundary.noise(8.1)) == (np.inf, 0)
    assert HelpBoundary(1.0, 1.0, variance_power=3.0).noise(10) == 0  # helps however weak the noise is
    assert HelpBoundary(1.0, -1.0).shots(0.1) == 0  # all levels together may vary less than raw counts


@pytest.mark.statistical
def test_the_planners_rehearsals_cross_at_its_boundary():
    """With a tenth of the noise the expansion is 5 % off the exact boundary at most; there the rehearsed gain
    is within 4 standard errors of 0, and 40 % of shots away more than 5 from it (480 rows, 24 times).
    """
    zne, p, weak = ZNE([1, 3]), (0.5 / 8 + 0.5 * synthetic_rows(3)).repeat(20, 1), 0.1
    noise = qtx.ParametricNoise(two_qubit=0.03, one_qubit=0.003)
    device, backend = (
        qtx.QiskitQuantumBackend("aer", noise=noise, loader="tree", noise_scale=x) for x in (1.0, weak)
    )
    boundary = qtx.MitigationPlanner().help_boundary(device, p[:24], zne)
    option, raw = qtx.CircuitMitigation(zne, False, scaling="model"), qtx.CircuitMitigation(readout=False)
    exact = shots_that_extrapolation_needs(backend, p[:24], option)
    assert boundary.shots(weak) == pytest.approx(exact, rel=0.05)
    rehearsal, rng = Rehearsal(backend, p), np.random.default_rng(0)
    for factor, low, high in ((1.0, -4, 4), (0.6, -np.inf, -5), (1.4, 5, np.inf)):
        of_raw, mitigated = (rehearsal.predict(x, round(factor * exact), 24, rng) for x in (raw, option))
        gain = of_raw.mean_square - mitigated.mean_square
        error = np.hypot(of_raw.mean_square_std_error, mitigated.mean_square_std_error)
        assert low < gain / error < high


def test_an_extrapolation_from_far_levels_needs_more_shots_or_never_helps():
    noise = qtx.ParametricNoise(two_qubit=0.01, one_qubit=0.001)
    backend = qtx.QiskitQuantumBackend("aer", noise=noise, loader="tree")
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    near, far = (
        shots_that_extrapolation_needs(backend, p, qtx.CircuitMitigation(ZNE(x), False, scaling=how))
        for x, how in (([1, 3], "local"), ([1, 2, 3], "model"))
    )
    assert 0 < near < far < np.inf
    strong = qtx.QiskitQuantumBackend("aer", noise=qtx.ParametricNoise(two_qubit=0.4), loader="tree")
    useless = qtx.CircuitMitigation(ZNE([3, 9]), False, scaling="model")
    assert shots_that_extrapolation_needs(strong, p, useless) == np.inf
    with pytest.raises(qtx.ArgumentError, match="no row that the noise"):
        rows_boundary(qtx.QiskitQuantumBackend("aer"), p, ZNE([1, 3]))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: zne_boundary(ZNE([1, 3], "exponential"), slope=1.0, variance=1.0), "no weighted sum"),
        (lambda: zne_boundary(ZNE([0, 3]), slope=1.0, variance=1.0), "the answer itself"),
        (lambda: zne_boundary(ZNE([1, 3]), slope=0.0, variance=1.0), "no bias to remove"),
        (lambda: zne_boundary(ZNE([1, 3]), slope=1.0, variance=-1.0), "variance"),
        (lambda: zne_boundary(ZNE([1, 3]), slope=1.0, variance=1.0, shares=[1.0]), "2 positive numbers"),
        (lambda: zne_boundary(qtx.SharedDecay(), slope=1.0, variance=1.0), "SharedDecay"),
        (lambda: HelpBoundary(0.0, 1.0), "improvement"),
        (lambda: HelpBoundary(1.0, 1.0).noise(0), "shots"),
        (
            lambda: shots_that_extrapolation_needs(
                qtx.QiskitQuantumBackend("aer"), torch.ones(1, 2) / 2, qtx.CircuitMitigation(ZNE([1, 3]))
            ),
            "readout",
        ),
        (
            lambda: rows_boundary(qtx.QiskitQuantumBackend("aer"), torch.zeros(1, 2), ZNE([1, 3])),
            "without a key",
        ),
    ],
)
def test_what_has_no_boundary_is_refused(call, error):
    with pytest.raises(qtx.QtxError, match=error):
        call()
