"""Simulators have Aer's distribution, with a twin's noise or noise by numbers; broken caches do no harm."""

import pickle
import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
from qiskit import QuantumCircuit, transpile
from qiskit.circuit import ParameterVector
from qiskit_aer import AerSimulator
from qiskit_aer.noise import NoiseModel
from scipy import stats

import qtx_lab as qtx
from qtx_lab.backends import aer
from qtx_lab.backends import counts as counting
from qtx_lab.backends.aer import AerEngine, _aer_model
from qtx_lab.backends.base import Engine
from qtx_lab.backends.counts import draw_outcomes
from qtx_lab.backends.exact import Noise, compile_steps, density_matrices, outcome_probabilities
from qtx_lab.backends.noise import best_region, device_noise, fake_device, reduced_target
from qtx_lab.backends.requests import RowRequest
from qtx_lab.circuits.fidelity import state_fidelity, total_variation
from qtx_lab.circuits.resources import resources

FALSE_ALARM = 1e-6
TWINS = ["fake_fez", "fake_sherbrooke", "fake_torino"]
NOISE = qtx.ParametricNoise(
    one_qubit=0.01, two_qubit=0.03, amplitude_damping=0.02, phase_damping=0.03, readout=0.04
)


def rows(count, n, generator, spread=2.0):
    return (spread * torch.randn(count, n, generator=generator, dtype=torch.float64)).softmax(-1)


def chi_squared(counts, p):
    """p-value of counts (n,) for probabilities (n,); rare keys are pooled, impossible keys have no counts."""
    counts, p = counts.double().numpy(), p.double().numpy()
    assert counts[p == 0].sum() == 0
    order = np.argsort(-p)
    counts, expected = counts[order], p[order] * counts.sum()
    some = max(1, int((expected >= 5).sum()))
    groups = [np.append(x[:some], x[some:].sum()) for x in (counts, expected)]
    used = groups[1] > 0
    statistic = ((groups[0] - groups[1])[used] ** 2 / groups[1][used]).sum()
    return stats.chi2.sf(statistic, max(1, used.sum() - 1))


# --- Ideal ----------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("loader", ["tree", "dynamic", "unary"])
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_ideal_counts_pass_a_chi_squared_test(loader, n, generator):
    """Four rows of 20,000 shots; false alarms once in a million."""
    p = rows(4, n, generator)
    p[0, 0] = 0 if n > 1 else 1
    p /= p.sum(-1, keepdim=True)
    result = qtx.QiskitQuantumBackend("aer", loader=loader).sample_rows(p, 20_000, generator=generator)
    for counts, baseline, row in zip(result.counts, result.classical.counts, p, strict=True):
        assert counts.sum() == baseline.sum() == 20_000
        assert chi_squared(counts, row) > FALSE_ALARM
        assert chi_squared(baseline, row) > FALSE_ALARM
    biased = p[-1] * (1 + 0.1 * (-1.0) ** torch.arange(n))
    assert n < 3 or chi_squared(result.counts[-1], biased / biased.sum()) < FALSE_ALARM
    assert result.discarded.eq(0).all()


def test_twins_without_noise_are_ideal(generator):
    """Whatever the order that the transpiler gives the qubits; false alarms once in a million."""
    p = rows(2, 13, generator)
    for loader in ("tree", "dynamic"):
        backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader=loader, noise_scale=0)
        for method in ("auto", "aer") if loader == "tree" else ("auto",):
            backend.engine.method = method
            result = backend.sample_rows(p, 20_000, generator=generator)
            assert chi_squared(result.counts[0], p[0]) > FALSE_ALARM
            assert result.discarded.eq(0).all()


def test_a_wide_unary_row_runs_as_matrix_products(generator):
    p = rows(2, 40, generator)
    result = qtx.QiskitQuantumBackend("aer", loader="unary").sample_rows(p, 300, generator=generator)
    assert result.counts.sum(-1).tolist() == [300, 300]
    assert "Aer, shot by shot" in result.diagnostics["method"]


def test_same_seed_same_counts_on_any_number_of_threads():
    p = rows(20, 16, torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()

    def counts(options, seed=5, count=threads):
        torch.set_num_threads(count)
        backend = qtx.QiskitQuantumBackend("aer", **options)
        return backend.sample_rows(p, 200, generator=torch.Generator().manual_seed(seed)).counts

    try:
        for options in (
            {"loader": "tree"},
            {"loader": "dynamic", "backend_name": "fake_fez"},
            {"loader": "tree", "noise": NOISE},
            {"loader": "dynamic", "method": "aer"},
        ):
            first = counts(options, count=1)
            assert torch.equal(first, counts(options, count=4))
            assert not torch.equal(first, counts(options, seed=6))
    finally:
        torch.set_num_threads(threads)


# --- Against Aer itself ---------------------------------------------------------------------------


def random_circuit(qubits, generator):
    """A circuit with rotations by sums of parameters, fixed gates, and pairs in both directions."""
    angle = ParameterVector("a", 6)
    circuit = QuantumCircuit(qubits, qubits)
    for i in torch.randint(0, 6, (40,), generator=generator).tolist():
        a, b = torch.randperm(qubits, generator=generator)[:2].tolist()
        getattr(circuit, ["rz", "ry", "rx"][i % 3])(angle[i] - 2 * angle[5 - i] + 0.3, a)
        circuit.sx(b)
        if i % 2:
            circuit.cz(a, b)
        else:
            circuit.cx(b, a)
        if i == 3:
            circuit.rzz(angle[2], a, b)
    return circuit


def test_density_matrices_agree_with_aer(generator):
    """For random circuits, with noise that differs between qubits and between their orders."""
    target = reduced_target(fake_device("fake_sherbrooke").target, [41, 53, 60, 59])
    noise = device_noise(target)
    circuit = transpile(random_circuit(4, generator), target=target, seed_transpiler=1)
    measured = circuit.copy()
    measured.measure(range(4), range(4))
    bindings = torch.rand(3, 6, generator=generator, dtype=torch.float64).numpy() * 6
    mine = density_matrices(compile_steps(measured, noise), bindings).numpy()

    simulator = AerSimulator(method="density_matrix", noise_model=_aer_model(noise))
    saved = circuit.copy()
    saved.save_density_matrix()
    for row, angles in zip(mine, bindings, strict=True):
        rho = simulator.run(saved.assign_parameters(angles)).result().data()["density_matrix"].data
        assert np.abs(row - rho).max() < 1e-12


def test_probabilities_agree_with_aer_with_readout_errors(generator):
    """Some 10,000 shots of Aer for each of two rows; false alarms once in a million."""
    p = rows(2, 8, generator)
    for loader, options in (
        ("tree", {"backend_name": "fake_torino", "noise_scale": 3.0}),
        ("tree", {"noise": NOISE}),
        ("dynamic", {"noise": NOISE}),
    ):
        backend = qtx.QiskitQuantumBackend("aer", loader=loader, **options)
        circuit = backend.transpiled(8)
        steps = compile_steps(*backend.engine.calibrated(circuit))
        exact, values = outcome_probabilities(steps, backend.loader.angles(p))
        assert values.tolist() == list(range(8))
        assert torch.allclose(exact.sum(-1), torch.ones(2, dtype=torch.float64))
        by_shots = qtx.QiskitQuantumBackend("aer", loader=loader, method="aer", **options)
        shots = 10_000 if loader == "dynamic" else 40_000
        result = by_shots.sample_rows(p, shots, generator=generator)
        assert "Aer, shot by shot" in result.diagnostics["method"]
        for counts, row, ideal in zip(result.counts, exact, p, strict=True):
            assert chi_squared(counts, row) > FALSE_ALARM
            assert chi_squared(counts, ideal) < FALSE_ALARM  # the noise shows


def test_the_noise_of_a_region_is_that_of_the_whole_device():
    """Errors on the region are those that Aer derives from the whole device."""
    device = fake_device("fake_manila")
    whole = NoiseModel.from_backend(device)
    region = best_region(device.target, 3, 5)
    noise = device_noise(reduced_target(device.target, region))
    for (name, qubits), error in noise.gates.items():
        original = whole._local_quantum_errors[name][tuple(region[q] for q in qubits)]
        assert original == error
    for qubit, matrix in noise.readout.items():
        assert np.allclose(whole._local_readout_errors[(region[qubit],)].probabilities, matrix)


def test_circuits_that_are_not_supported_are_left_to_aer():
    circuit = QuantumCircuit(1, 1)
    circuit.measure(0, 0)
    circuit.reset(0)
    circuit.measure(0, 0)
    assert compile_steps(circuit, Noise({}, {})) is None
    wide = QuantumCircuit(12, 12)
    wide.h(range(12))
    for q in range(11):
        wide.cx(q, q + 1)
    wide.measure(range(12), range(12))
    assert compile_steps(wide, Noise({}, {})) is None  # 4^12 numbers a row


# --- Twins and noise ------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("device", TWINS)
def test_dynamic_loader_is_near_the_shot_noise_floor(device, generator, soak):
    """At most .004 above what as many ideal shots give: mean over 64 rows, softmax of standard normal logits.

    Rows that are more peaked lose more to readout errors: with logits twice as wide, .004 (Fez) to .011
    (Torino).
    """
    backend = qtx.QiskitQuantumBackend("aer", device, loader="dynamic")
    for m in range(1, 7) if soak else (2, 6):
        for shots in (1024, 65_536):
            p = rows(64, 2**m, generator, spread=1.0)
            result = backend.sample_rows(p, shots, generator=generator)
            measure = total_variation(result.counts, p, resamples=50, generator=generator)
            assert (measure.value - measure.floor).mean() < 0.004
            assert m == 1 or "feeding forward" in result.diagnostics["not_modelled"][0]
            assert result.diagnostics["two_qubit_gates"] == 0


@pytest.mark.statistical
def test_the_tree_suffers_more_than_the_dynamic_loader(generator):
    p = rows(16, 64, generator)
    distance = {}
    for loader in ("tree", "dynamic"):
        backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader=loader)
        result = backend.sample_rows(p, 50_000, generator=generator)
        distance[loader] = total_variation(result.counts, p, resamples=20, generator=generator).value.mean()
        assert result.diagnostics["calibration"].startswith("20")
        assert len(result.diagnostics["physical_qubits"]) == 6
    assert distance["tree"] > 5 * distance["dynamic"]


def test_noise_scale_scales(generator):
    """State fidelity falls with the noise, and is 1 without; a loader that keeps phases really does."""
    p = rows(3, 8, generator)
    loader = qtx.TreeLoader(phase=True)
    for name, noise in (("fake_fez", None), (None, NOISE)):
        loss = []
        for scale in (0.0, 0.5, 1.0):
            engine = AerEngine(name, noise=noise, noise_scale=scale)
            circuit = engine.transpile(loader.circuit(3), 3)
            fidelity = state_fidelity(engine.density_matrices(circuit, loader.angles(p)), p).value
            loss.append(1 - fidelity.mean().item())
        assert loss[0] == pytest.approx(0, abs=1e-9)
        assert 1.6 < loss[2] / loss[1] < 2.1
    assert resources(loader.circuit(3)).two_qubit_gates == 6


def test_a_masked_key_is_never_counted(generator):
    """Outcomes on masked keys and padding are discarded, whatever the noise does."""
    p = rows(20, 13, generator)
    p[:, ::3] = 0
    p /= p.sum(-1, keepdim=True)
    for loader in ("tree", "dynamic", "unary", "mps"):
        noise = NOISE.scaled(0.2 if loader == "unary" else 3)
        keep = 5 if loader == "unary" else 13
        part = p[:, :keep] / p[:, :keep].sum(-1, keepdim=True)
        result = qtx.QiskitQuantumBackend("aer", loader=loader, noise=noise).sample_rows(
            part, 500, generator=generator
        )
        assert result.counts[part == 0].eq(0).all()
        assert result.discarded.sum() > 0
        assert (result.counts.sum(-1) + result.discarded).eq(500).all()
        assert result.probabilities().sum(-1).allclose(torch.ones(20, dtype=torch.float64))


def test_masked_rows_and_no_rows_have_no_counts():
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez")
    p = torch.zeros(3, 4)
    p[1, 2] = 1
    result = backend.sample_rows(p, 10)
    assert result.counts.sum(-1).tolist() == [0, int(result.counts[1, 2]), 0]
    assert result.probabilities().isfinite().all()
    nothing = backend.sample_rows(torch.zeros(2, 4), 10)
    assert nothing.counts.eq(0).all()
    assert nothing.discarded.eq(0).all()
    assert "no row has mass" in nothing.diagnostics["method"]
    assert backend.sample_rows(torch.zeros(0, 4)).counts.shape == (0, 4)


@pytest.mark.parametrize("device", TWINS)
def test_the_best_region_is_connected_and_works(device):
    target = fake_device(device).target
    region = best_region(target, 6, 50)
    part = reduced_target(target, region)
    assert part.build_coupling_map().is_connected()
    assert len(set(region)) == 6
    readout = [target["measure"][(q,)].error for q in region]
    assert max(readout) < 0.1
    alone = best_region(target, 6, 0)
    assert sum(target["measure"][(q,)].error for q in alone) <= sum(readout)


def test_a_long_simulation_is_announced(monkeypatch, generator):
    """A long simulation shot by shot is announced beforehand, but not where matrix products make it quick."""
    monkeypatch.setattr(aer, "LONG_SIMULATION_S", 0.0)
    slow = qtx.QiskitQuantumBackend("aer", noise=NOISE, method="aer")
    with pytest.warns(qtx.FallbackWarning, match="3 qubits is simulated shot by shot"):
        slow.sample_rows(rows(2, 8, generator), 10, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = qtx.QiskitQuantumBackend("aer", loader="unary")
        wide.sample_rows(rows(2, 40, generator), 10, generator=generator)


def test_a_circuit_that_is_too_large_is_refused():
    with pytest.raises(qtx.BackendUnavailable, match="40 connected qubits"):
        qtx.QiskitQuantumBackend("aer", "fake_manila", loader="unary").sample_rows(
            torch.full((1, 40), 1 / 40)
        )
    wide = qtx.QiskitQuantumBackend("aer", loader="unary", noise=NOISE)
    with pytest.raises(qtx.BackendUnavailable, match="30 noisy qubits"):
        wide.sample_rows(torch.full((1, 30), 1 / 30))


# --- The backend ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"backend_name": "fake_fes"}, qtx.ArgumentError, "Did you mean 'fake_fez'"),
        ({"provider": "azure"}, qtx.ArgumentError, "Allowed: aer, ibm, ibm-q"),
        ({"shots": 0}, qtx.ArgumentError, "shots=0"),
        ({"optimization_level": 4}, qtx.ArgumentError, "optimization_level=4"),
        ({"loader": "treee"}, qtx.ArgumentError, "Did you mean 'tree'"),
        ({"nois": 3}, TypeError, "unexpected keyword argument 'nois'"),
        ({"region": "us-east"}, qtx.ArgumentError, "region='us-east' is not allowed with provider='aer'"),
        (
            {"provider": "ibm", "backend_name": "ibm_fez", "noise": NOISE},
            qtx.ArgumentError,
            "Allowed: service",
        ),
        ({"noise_scale": -1}, qtx.ArgumentError, "noise_scale=-1"),
        ({"noise": 0.1}, qtx.ArgumentError, "ParametricNoise"),
        ({"noise": NOISE, "backend_name": "fake_fez"}, qtx.ArgumentError, "noise of its own"),
        ({"method": "magic"}, qtx.ArgumentError, "method='magic'"),
        ({"backend_name": 3}, qtx.DtypeError, "backend_name"),
        ({"provider": "ibm"}, qtx.ArgumentError, "backend_name=None"),
    ],
)
def test_bad_backends_are_one_clear_error(arguments, error, match):
    with pytest.raises(error, match=match):
        qtx.QiskitQuantumBackend(**{"provider": "aer", **arguments})


def test_bad_calls_are_one_clear_error():
    backend = qtx.QiskitQuantumBackend()
    p = torch.full((1, 2), 0.5)
    with pytest.raises(qtx.ArgumentError, match="shots=0"):
        backend.sample_rows(p, 0)
    with pytest.raises(qtx.ArgumentError, match="at most 16777216 a row"):
        backend.sample_rows(p, 2**31)
    with pytest.raises(qtx.ArgumentError, match="NaN"):
        backend.sample_rows(p * torch.nan)
    with pytest.raises(qtx.DtypeError, match="generator"):
        backend.sample_rows(p, generator=3)
    with pytest.raises(qtx.ArgumentError, match=r"readout=0\.7"):
        qtx.ParametricNoise(readout=0.7)
    with pytest.raises(qtx.ArgumentError, match="take no options"):
        backend.submit_rows(p, confirm=True)


def test_a_submission_and_a_call_that_waits_give_the_same_counts():
    p = rows(3, 5, torch.Generator().manual_seed(1))
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez")
    job = backend.submit_rows(p, generator=torch.Generator().manual_seed(2))
    assert torch.equal(
        job.counts(60).counts, backend.sample_rows(p, generator=torch.Generator().manual_seed(2)).counts
    )
    assert str(job.status()) == "done"
    assert job.tag != backend.submit_rows(p).tag


def test_a_backend_with_a_submission_is_pickled_and_copied(generator):
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez")
    p = rows(3, 5, generator)
    backend.submit_rows(p).counts(60)
    for other in (pickle.loads(pickle.dumps(backend)), deepcopy(backend)):
        first, again = (
            b.submit_rows(p, generator=torch.Generator().manual_seed(2)).counts(60) for b in (backend, other)
        )
        assert torch.equal(first.counts, again.counts)


def test_many_shots_are_run_in_parts(monkeypatch, generator):
    """Outcomes in memory never exceed the limit, and the counts do not depend on it."""
    p = rows(10, 12, generator)
    sizes = []

    def noting(p, shots, generator):
        sizes.append(len(p) * shots)
        return draw_outcomes(p, shots, generator)

    monkeypatch.setattr(counting, "draw_outcomes", noting)
    monkeypatch.setattr(aer, "draw_outcomes", noting)
    for loader in ("dynamic", "unary"):
        backend = qtx.QiskitQuantumBackend("aer", loader=loader)
        backend.transpiled(12)
        results = []
        for limit in (10**6, 400):
            monkeypatch.setattr(counting, "MAX_OUTCOME_BYTES", limit)
            sizes.clear()
            results.append(backend.sample_rows(p, 100, generator=torch.Generator().manual_seed(1)))
            assert max(sizes) == min(limit, 1000)
        assert torch.equal(results[0].classical.counts, results[1].classical.counts)
        for result in results:
            assert result.counts.sum(-1).eq(100).all()
    request = RowRequest(p, qtx.make_loader("dynamic"), 100, 3)
    outcomes = np.random.default_rng(0).integers(0, 16, (10, 120, 1), dtype=np.uint8)
    in_parts = request.finish(outcomes)
    monkeypatch.setattr(counting, "MAX_OUTCOME_BYTES", 10**6)
    assert torch.equal(in_parts.counts, request.finish(outcomes).counts)
    assert in_parts.counts[4, 7] == (outcomes[4, :100] == 7).sum()


def test_a_changed_loader_gets_a_new_circuit(monkeypatch, tmp_path):
    """Also one of the same name, as after a cell with its class was edited and run again."""
    monkeypatch.setenv("QTX_LAB_HOME", str(tmp_path))

    def loader(turns):
        class Mine(qtx.TreeLoader):
            def circuit(self, size):
                circuit = QuantumCircuit(1, 1)
                circuit.ry(turns * ParameterVector("a", 1)[0], 0)
                circuit.measure(0, 0)
                return circuit

        return Mine()

    p = torch.tensor([[0.5, 0.5]])

    def share(backend):
        return backend.sample_rows(p, 2000, generator=torch.Generator().manual_seed(1)).counts[0, 1] / 2000

    for turns, expected in ((1, 0.5), (2, 1.0)):
        assert share(qtx.QiskitQuantumBackend("aer", "fake_fez", loader=loader(turns))) == pytest.approx(
            expected, abs=0.06
        )
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader=loader(1))
    for turns, expected in ((1, 0.5), (2, 1.0)):
        backend.loader = loader(turns)
        assert share(backend) == pytest.approx(expected, abs=0.06)
    assert len(list((tmp_path / ".cache" / "circuits").iterdir())) == 2


def test_one_transpile_for_all_rows_of_a_size(monkeypatch, tmp_path, generator):
    monkeypatch.setenv("QTX_LAB_HOME", str(tmp_path))
    calls = []
    original = AerEngine.transpile

    def counting(self, circuit, level):
        calls.append(circuit.name)
        return original(self, circuit, level)

    monkeypatch.setattr(AerEngine, "transpile", counting)

    def sample(n=13, **options):
        backend = qtx.QiskitQuantumBackend("aer", "fake_fez", **options)
        seeded = torch.Generator().manual_seed(3)
        return backend.sample_rows(rows(5, n, torch.Generator().manual_seed(0)), 100, generator=seeded).counts

    first = sample()
    assert len(calls) == 1
    assert torch.equal(first, sample())  # another backend: from the disk
    sample(n=16)
    assert len(calls) == 1
    for options in ({"loader": "tree"}, {"optimization_level": 1}, {"n": 17}):
        sample(**options)
    assert len(calls) == 4

    files = sorted((tmp_path / ".cache" / "circuits").iterdir())
    assert len(files) == 4
    for file in files:  # a truncated, an empty and a foreign file are replaced
        file.write_bytes(
            file.read_bytes()[:100] if file is files[0] else b"" if file is files[1] else b"QISKIT"
        )
    assert torch.equal(first, sample())
    assert len(calls) == 5
    assert torch.equal(first, sample())
    assert len(calls) == 5


def test_a_cache_that_cannot_be_written_is_reported(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QTX_LAB_HOME", str(tmp_path / "file"))
    result = qtx.QiskitQuantumBackend("aer", "fake_fez").sample_rows(torch.full((1, 2), 0.5))
    assert "not kept on disk" in result.diagnostics["fallbacks"][0]


def test_a_simulator_is_an_engine_without_a_queue(generator):
    for engine in (AerEngine(), AerEngine("fake_fez"), AerEngine(noise=NOISE)):
        assert isinstance(engine, Engine)
        assert isinstance(engine.ideal, bool)
        assert not engine.queues
        assert list(engine.jobs()) == []
        with pytest.raises(qtx.ArgumentError, match="queues no jobs"):
            engine.submit(QuantumCircuit(1, 1), np.zeros((1, 0)), 1)
        assert engine.problems() == ()
        assert engine.pending_jobs() == 0
        assert engine.facts()["device"] == engine.name
