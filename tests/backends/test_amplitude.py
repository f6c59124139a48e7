"""Amplitude estimation: errors fall as 1 / loads, intervals cover, loads are counted, noise is fitted."""

import math
from types import SimpleNamespace

import pytest
import torch

import qtx_lab as qtx
from qtx_lab.backends import ParametricNoise
from qtx_lab.backends.amplitude import AmplitudeEstimator, _residual
from qtx_lab.backends.amplitude_fit import FittedDecay, Hits, fit_angles, sum_of_estimates
from qtx_lab.errors import ArgumentError, DtypeError, ShapeError

IDEAL = AmplitudeEstimator(qtx.QiskitQuantumBackend("aer"))


def rows(n, generator, count=4):
    p = torch.randn(count, n, generator=generator, dtype=torch.float64).softmax(-1)
    return p, torch.randn(count, n, 1, generator=generator, dtype=torch.float64)


@pytest.mark.statistical
def test_errors_fall_as_one_over_loads_without_noise(generator):
    """The slope over four decades, of 60 repetitions of two rows, has a standard error of about .02."""
    p, v = rows(4, generator, 2)
    exact, budgets = torch.einsum("rn,rnd->rd", p, v), (300, 30_000, 3_000_000)
    errors = []
    for loads in budgets:
        plan = IDEAL.plan(p, v, loads, most_iterates=loads)
        measured = plan.ideal_probabilities().draw(plan, 60, generator)
        errors.append((IDEAL.fit(plan, measured)[0] - exact).square().mean().sqrt())
        assert all((plan.loads(shots) <= loads).all() for shots in measured.shots)
    slope = math.log(errors[-1] / errors[0]) / math.log(budgets[-1] / budgets[0])
    assert slope <= -0.9


@pytest.mark.statistical
@pytest.mark.parametrize("method", ["bayes", "mle"])
def test_noise_is_fitted_and_intervals_cover(method, generator):
    """95 % intervals of two rows in 80 calls: below 90 % or above 99 % by chance in 1 of 300 runs."""
    noise = ParametricNoise(one_qubit=2e-4, two_qubit=2e-3, readout=0.01)
    estimator = AmplitudeEstimator(qtx.QiskitQuantumBackend("aer", noise=noise), method=method)
    p, v = rows(4, generator, 2)
    exact = torch.einsum("rn,rnd->rd", p, v)
    plan = estimator.plan(p, v, 2048)
    measured = estimator.probabilities(plan).draw(plan, 80, generator)
    values, lower, upper, decay = estimator.fit(plan, measured)
    covered = ((lower <= exact) & (exact <= upper)).double().mean()
    assert 0.9 < covered < 0.99
    assert 0.003 < decay.per_iterate < 0.03
    assert decay.contrast < 0.995
    shots = ((v.amax(1) - exact) * (exact - v.amin(1)) / 2048).mean().sqrt()
    assert (values - exact).square().mean().sqrt() < 0.5 * shots


@pytest.mark.statistical
def test_few_shots_of_many_amplitudes_do_not_make_the_contrast_larger(generator):
    """60 calls: means have standard errors of .002 and .001. At the likeliest angles they are .959, .025."""
    truth, k = FittedDecay(0.95, 0.03), torch.tensor([0, 1, 2])
    theta = torch.linspace(0.1, 1.47, 40, dtype=torch.float64)
    faded = truth.contrast * (-truth.per_iterate * k).exp()
    chance = 0.5 + faded * (((2 * k + 1) * theta[:, None]).sin().square() - 0.5)
    shots = torch.tensor([24, 26, 30], dtype=torch.float64).expand(60, 40, 3).contiguous()
    hits = torch.binomial(shots, chance.expand(60, 40, 3).contiguous(), generator=generator)
    data = Hits((0, 1, 2), hits, shots, torch.full((40,), 0.5, dtype=torch.float64))
    contrast, per_iterate, _ = fit_angles(data, expected=truth, confidence=0.95).decay.mean(0).tolist()
    assert contrast == pytest.approx(0.95, abs=0.006)
    assert per_iterate == pytest.approx(0.0325, abs=0.004)  # the mean of a skewed distribution


@pytest.mark.statistical
@pytest.mark.parametrize("method", ["bayes", "mle"])
def test_the_interval_of_a_sum_covers_where_each_part_has_few_shots(method, generator):
    """Around the sum of posterior means, each drawn to the middle, 72 % of 1,000 intervals cover."""
    shots = torch.full((1000, 12, 1), 20.0, dtype=torch.float64)
    hits = torch.binomial(shots, torch.full_like(shots, 0.1), generator=generator)
    half = torch.full((12,), 0.5, dtype=torch.float64)
    x = fit_angles(Hits((0,), hits, shots, half), expected=None, confidence=0.95, method=method)
    value, lower, upper = sum_of_estimates(x.value, x.lower, x.upper, x.likeliest, torch.ones_like(half))
    exact = torch.tensor(12 * 0.8, dtype=torch.float64)
    covered = ((lower <= exact) & (exact <= upper)).double().mean()
    assert covered > 0.9
    assert ((lower <= value) & (value <= upper)).all()


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("noise", "keys"),
    [
        (ParametricNoise(readout=0.1), 8),
        (ParametricNoise(readout=0.3), 4),
        (ParametricNoise(two_qubit=0.02), 8),
        (ParametricNoise(phase_damping=0.01), 8),
    ],
)
def test_intervals_cover_where_noise_is_strong(noise, keys):
    """100 repetitions of 6 rows: with priors as narrow as those of weak noise 80 to 90 % are covered."""
    estimator = AmplitudeEstimator(qtx.QiskitQuantumBackend("aer", noise=noise))
    p, v = rows(keys, torch.Generator().manual_seed(keys), 6)
    exact = torch.einsum("rn,rnd->rd", p, v)
    plan = estimator.plan(p, v, 4096)
    measured = estimator.probabilities(plan).draw(plan, 100, torch.Generator().manual_seed(3))
    _, lower, upper, _ = estimator.fit(plan, measured)
    assert ((lower <= exact) & (exact <= upper)).double().mean() > 0.91


def test_noise_too_strong_to_be_modelled_is_said():
    p, v = torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([1.0, 0.0, -1.0, 2.0])
    noise = ParametricNoise(one_qubit=1.0, two_qubit=1.0, readout=0.5)
    estimator = AmplitudeEstimator(qtx.QiskitQuantumBackend("aer", noise=noise))
    with pytest.warns(UserWarning, match="intervals of amplitude estimation may be too short"):
        result = estimator.estimate(p, v, 1024, generator=torch.Generator().manual_seed(0))
    assert "may be too short" in result.diagnostics["not_modelled"][-1]
    assert result.upper - result.lower > 0.5 * result.scale  # the hits say nothing
    assert v.min() <= result.values.min() <= result.values.max() <= v.max()


def test_what_is_run_has_the_probabilities_that_repetitions_are_drawn_from(generator):
    noise = ParametricNoise(two_qubit=0.01, readout=0.02)
    estimator = AmplitudeEstimator(qtx.QiskitQuantumBackend("aer", noise=noise))
    p, v = rows(4, generator, 2)
    plan = estimator.plan(p, v, 4096)
    p_hit, n = estimator.probabilities(plan).hits, 4000
    shots = torch.full_like(plan.shots, n)
    hits = estimator._hits(plan, shots, 0) / n
    assert ((hits - p_hit).abs() < 5 * (p_hit * (1 - p_hit) / n).sqrt() + 1e-3).all()


def test_one_call_estimates_many_rows_and_coordinates(generator):
    p, _ = rows(4, generator, 3)
    p[1] = 0  # attends to nothing
    p[2] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    v = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    v[2:] *= 100  # masked in the last row
    result = IDEAL.estimate(p, v, loads=2000, generator=generator)
    assert result.values.shape == (3, 2)
    assert (result.values[1] == 0).all()
    assert (result.loads <= 2000).all()
    assert (result.loads[1] == 0).all()
    torch.testing.assert_close(result.exact, p.double() @ v)
    assert ((result.values - result.exact).abs() < 0.1 * result.scale + 1e-12).all()
    assert (result.scale[2] < 10).all()
    assert ((result.lower <= result.values) & (result.values <= result.upper)).all()
    assert result.schedule.keys() == result.two_qubit_gates.keys()
    again = IDEAL.estimate(p, v, loads=2000, generator=torch.Generator().manual_seed(5))
    same = IDEAL.estimate(p, v, loads=2000, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again.values, same.values)


def test_equal_values_take_no_loads(generator):
    result = IDEAL.estimate(torch.tensor([[0.3, 0.7]]), torch.tensor([2.0, 2.0]), generator=generator)
    assert result.values.tolist() == [2.0]
    assert result.loads.tolist() == [0]


def test_bad_input_is_refused():
    p, v = torch.tensor([[0.25, 0.75]]), torch.tensor([1.0, 2.0])
    with pytest.raises(ShapeError, match=r"v has shape \(3,\)"):
        IDEAL.estimate(p, torch.ones(3))
    with pytest.raises(ArgumentError, match="NaN"):
        IDEAL.estimate(p, torch.tensor([1.0, math.nan]))
    with pytest.raises(ArgumentError, match="beyond 1e\\+150"):
        IDEAL.estimate(p, torch.tensor([1e300, -1e300], dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"p has shape \(0, 2\)"):
        IDEAL.estimate(p[:0], v)
    for wrong in ((p.to("meta"), v), (p, v.to("meta"))):
        with pytest.raises(DtypeError, match="on the device meta"):
            IDEAL.estimate(*wrong)
    with pytest.raises(ArgumentError, match="17 keys"):
        IDEAL.estimate(torch.full((1, 17), 1 / 17), torch.ones(17))
    with pytest.raises(ArgumentError, match="loads=3"):
        IDEAL.estimate(p, v, loads=3)
    with pytest.raises(ArgumentError, match="loads=1000000000"):  # would need more memory than there is
        IDEAL.estimate(p, v, loads=10**9)
    with pytest.raises(ArgumentError, match="confidence"):
        IDEAL.estimate(p, v, confidence=1.0)
    with pytest.raises(ArgumentError, match="method"):
        AmplitudeEstimator(IDEAL.backend, method="map")
    with pytest.raises(DtypeError, match="backend"):
        AmplitudeEstimator("aer")


def test_qubits_that_wait_decohere():
    errors = {}
    for idling in (False, True):
        backend = qtx.QiskitQuantumBackend("aer", "fake_boston", idling=idling)
        estimator = AmplitudeEstimator(backend)
        errors[idling] = sum(backend.engine.errors(estimator.circuit(8, 1)))
        line = estimator.circuit(8, 1).count_ops()["cz"]
        assert line == 25  # no swaps: the qubits are in a line
    assert errors[True] > errors[False] * 1.01
    with pytest.raises(ArgumentError, match="idling"):
        qtx.QiskitQuantumBackend("aer", idling=True)


def test_shots_of_the_residual_that_agree_are_no_certainty():
    """All of the residual's shots gave one value: the others may be elsewhere all the same."""
    p = torch.tensor([[0.9, 0.05, 0.03, 0.02]], dtype=torch.float64)
    residual = torch.tensor([[[0.0, 1.0, -1.0, 0.0]]], dtype=torch.float64)
    plan = SimpleNamespace(residual=residual, expected=None)
    certain, sure = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    for keys in ([20.0, 0.0, 0.0, 0.0], [19.0, 0.0, 0.0, 1.0]):  # the last key has the value of the first
        counts = torch.tensor([[keys]], dtype=torch.float64)
        mean, half = _residual(plan, counts, certain, sure, 0.95)
        assert (mean - (p * residual[0]).sum()).abs() < half < 0.5
    counts = torch.tensor([[[10.0, 5.0, 5.0, 0.0]]], dtype=torch.float64)
    half = _residual(plan, counts, certain, sure, 0.95)[1]
    assert float(half) == pytest.approx(1.959964 * (0.5 / 20) ** 0.5)


def test_no_two_runs_have_the_same_seed(monkeypatch):
    """Where a binding's shots are run in parts: runs of one seed would share their random numbers."""
    monkeypatch.setattr("qtx_lab.backends.amplitude.rows_at_once", lambda unit: 1)
    backend = qtx.QiskitQuantumBackend("aer")
    seeds, run = [], backend.engine.run

    def recorded(circuit, bindings, shots, seed, request=None):
        seeds.append(seed)
        return run(circuit, bindings, shots, seed, request)

    monkeypatch.setattr(backend.engine, "run", recorded)
    p, v = torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([1.0, 0.0, -1.0, 2.0])
    AmplitudeEstimator(backend).estimate(p, v, 512, generator=torch.Generator().manual_seed(0))
    assert len(seeds) == len(set(seeds)) > 6


@pytest.mark.statistical
@pytest.mark.parametrize("method", ["bayes", "mle"])
@pytest.mark.parametrize("least", [1e-9, 1e-4, 0.01, 0.3])
def test_intervals_cover_rows_of_nearly_one_key(method, least):
    """400 repetitions; hardly a shot misses a key of nearly all mass: its interval must reach up to 1."""
    estimator = AmplitudeEstimator(qtx.QiskitQuantumBackend("aer"), method=method)
    for p in ([1 - least, least], [least, 1 - least]):
        p = torch.tensor([p], dtype=torch.float64)
        plan = estimator.plan(p, torch.tensor([1.0, -1.0]), 256)
        measured = plan.ideal_probabilities().draw(plan, 400, torch.Generator().manual_seed(1))
        _, lower, upper, _ = estimator.fit(plan, measured)
        exact = float(p[0, 0] - p[0, 1])
        covered = float(((lower <= exact) & (exact <= upper)).double().mean())
        assert covered > 0.95 - 4 * (0.95 * 0.05 / 400) ** 0.5
