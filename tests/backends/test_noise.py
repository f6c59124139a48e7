"""Noise of one's own: Aer's noise models, T1 and T2, calibrations of devices, and qubits that wait."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from qiskit import QuantumCircuit
from qiskit.quantum_info import PTM, average_gate_fidelity
from qiskit_aer.noise import (
    NoiseModel,
    ReadoutError,
    amplitude_damping_error,
    coherent_unitary_error,
    depolarizing_error,
    pauli_error,
    reset_error,
    thermal_relaxation_error,
)

import qtx_lab as qtx
from qtx_lab.backends import DeviceNoise, ParametricNoise, ThermalNoise, predicted_fidelity
from qtx_lab.backends.exact import pauli_transfer_matrix
from qtx_lab.backends.noise import channel_infidelity, fake_device
from qtx_lab.backends.waiting import with_waits
from qtx_lab.circuits.fidelity import total_variation_distance
from qtx_lab.mitigation.register import register_probabilities

THERMAL = ThermalNoise(
    t1=150e-6, t2=100e-6, one_qubit_time=32e-9, two_qubit_time=68e-9, readout_time=1.5e-6, readout=0.01
)


def rows(n=8, count=2):
    p = torch.rand(count, n, generator=torch.Generator().manual_seed(3)).double().square() + 0.01
    return p / p.sum(-1, keepdim=True)


def probabilities(**options):
    """What the rows become, without shots; "aer" only."""
    return register_probabilities(qtx.QiskitQuantumBackend("aer", **options), rows())


def model(**places):
    noise = NoiseModel(basis_gates=["cz", "rz", "sx", "x", "id"])
    one, two = depolarizing_error(0.01, 1), depolarizing_error(0.05, 2)
    readout = ReadoutError([[0.98, 0.02], [0.02, 0.98]])
    noise.add_all_qubit_quantum_error(one, ["sx", "x"])
    noise.add_all_qubit_quantum_error(two, "cz")
    noise.add_all_qubit_readout_error(readout)
    return noise


@pytest.mark.parametrize("loader", ["tree", "dynamic"])
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.5])
def test_a_noise_model_does_what_the_same_parametric_noise_does(loader, scale):
    ours = ParametricNoise(one_qubit=0.01, two_qubit=0.05, readout=0.02)
    mine = probabilities(noise=model(), loader=loader, noise_scale=scale)
    theirs = probabilities(noise=ours, loader=loader, noise_scale=scale)
    # Depolarising twice is depolarising with 2 p - p², so that only the first order of a scale is the same.
    assert (mine - theirs).abs().max() < (1e-9 if scale == 1 else 5e-3)
    assert total_variation_distance(mine, rows()).min() > 0.003


def test_local_errors_of_a_noise_model_are_the_devices_gates():
    noise = NoiseModel(basis_gates=["cz", "rz", "sx", "x"])
    for q in range(4):
        noise.add_quantum_error(depolarizing_error(0.001, 1), ["sx", "x"], [q])
        noise.add_readout_error(ReadoutError([[0.99, 0.01], [0.03, 0.97]]), [q])
    for a, b, error in ((0, 1, 0.3), (1, 2, 0.01), (2, 3, 0.01)):
        for pair in ((a, b), (b, a)):
            noise.add_quantum_error(depolarizing_error(error, 2), "cz", pair)
    backend = qtx.QiskitQuantumBackend("aer", noise=noise, loader="tree")
    result = backend.sample_rows(rows(), 100)
    assert result.diagnostics["physical_qubits"] == (1, 2, 3)  # the bad pair is left alone
    with pytest.raises(qtx.BackendUnavailable, match="5 connected qubits"):
        backend.sample_rows(rows(32), 10)
    simulated = qtx.QiskitQuantumBackend("aer", noise=noise, loader="tree", method="aer")
    counts = simulated.sample_rows(rows(), 20_000, generator=torch.Generator().manual_seed(0))
    expected = register_probabilities(backend, rows())
    assert total_variation_distance(counts.probabilities(), expected).max() < 0.02


def test_models_that_cannot_act_are_refused():
    strange = NoiseModel()
    strange.add_all_qubit_quantum_error(depolarizing_error(0.1, 1), "my_gate")
    joint = NoiseModel()
    joint.add_readout_error(ReadoutError(np.eye(4) * 0.96 + 0.01), [0, 1])
    for noise, message in ((strange, "my_gate"), (joint, "joint readout")):
        with pytest.raises(qtx.ArgumentError, match=message):
            qtx.QiskitQuantumBackend("aer", noise=noise)
    with pytest.raises(qtx.ArgumentError, match="NoiseModel"):
        qtx.QiskitQuantumBackend("aer", noise=0.1)
    assert probabilities(noise=NoiseModel()).allclose(rows())


def test_a_calibration_of_some_date_is_the_twins_noise(tmp_path):
    device = fake_device("fake_jakarta")
    properties = device.properties()
    file = tmp_path / "ibm_jakarta.json"
    file.write_text(json.dumps(properties.to_dict(), default=str))
    twin = probabilities(backend_name="fake_jakarta", loader="tree")
    for noise in (file, str(file), properties, properties.to_dict()):
        assert probabilities(noise=noise, loader="tree").allclose(twin, atol=1e-9)
    backend = qtx.QiskitQuantumBackend("aer", noise=file)
    facts = backend.engine.facts()
    assert facts["calibration"] == properties.last_update_date.isoformat()
    assert properties.backend_name in facts["noise"]
    assert facts["num_qubits"] == 7
    worse = json.loads(file.read_text())
    for qubit in worse["qubits"]:
        for value in qubit:
            if value["name"] == "readout_error":
                value["value"] = min(2 * value["value"], 1)
    assert DeviceNoise.of_properties(worse) != DeviceNoise.of_properties(properties)
    with pytest.raises(qtx.ArgumentError, match="calibration"):
        qtx.QiskitQuantumBackend("aer", noise=tmp_path / "missing.json")
    for broken in ("", "[]", "{}", '{"qubits": []}', json.dumps({**worse, "gates": []})):
        file.write_text(broken)
        with pytest.raises(qtx.ArgumentError, match="as JSON"):
            qtx.QiskitQuantumBackend("aer", noise=file)
    with pytest.raises(qtx.ArgumentError, match="noise of its own"):
        qtx.QiskitQuantumBackend("aer", "fake_jakarta", noise=properties)


def test_thermal_noise_relaxes_qubits_while_gates_last():
    target = THERMAL.target(2)
    one = thermal_relaxation_error(150e-6, 100e-6, 68e-9)
    expected = 1 - average_gate_fidelity(one.tensor(one))
    assert target["cz"][(0, 1)].error == pytest.approx(expected)
    assert target["measure"][(0,)].duration == 1.5e-6
    slow = ThermalNoise(t1=150e-6, t2=100e-6, one_qubit_time=32e-9, two_qubit_time=680e-9)
    errors = [total_variation_distance(probabilities(noise=x, loader="tree"), rows()).mean() for x in (
        ThermalNoise(t1=150e-6, t2=100e-6, one_qubit_time=32e-9, two_qubit_time=68e-9), slow)]  # fmt: skip
    assert 5 * errors[0] < errors[1]
    assert probabilities(noise=slow, noise_scale=0).allclose(rows())
    for wrong in ({"t1": 0}, {"t2": 301e-6}, {"readout": 0.6}, {"one_qubit_time": -1}, {"t1": "1 ms"}):
        with pytest.raises(qtx.ArgumentError):
            ThermalNoise(**{**vars(THERMAL), **wrong})


@pytest.mark.parametrize("channel", [depolarizing_error(0.1, 2), amplitude_damping_error(0.2), None])
def test_the_infidelity_of_a_channel(channel):
    expected = 0 if channel is None else 1 - average_gate_fidelity(channel)
    assert channel_infidelity(channel) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "error",
    [
        depolarizing_error(0.02, 2).compose(
            thermal_relaxation_error(50, 30, 1).expand(thermal_relaxation_error(40, 70, 2))
        ),
        depolarizing_error(0.02, 1).compose(amplitude_damping_error(0.1)),
        coherent_unitary_error(np.array([[0.8, -0.6], [0.6, 0.8]])).expand(amplitude_damping_error(0.2)),
        pauli_error([("XZ", 0.1), ("YI", 0.05), ("II", 0.85)]),
        reset_error(0.1, 0.2),
    ],
)
def test_an_error_in_the_pauli_basis_is_that_of_qiskit(error):
    assert pauli_transfer_matrix(error) == pytest.approx(PTM(error).data.real, abs=1e-14)


# --- Waiting ------------------------------------------------------------------------------------------------


def test_qubits_that_wait_for_a_condition_decay_by_the_time_that_they_wait():
    """Of two bits, the second qubit is rotated by the first condition, or not, and waits for the other."""
    latency, t1 = 20e-6, 150e-6
    noise = ThermalNoise(t1=t1, t2=t1, one_qubit_time=0, two_qubit_time=0)
    backend = qtx.QiskitQuantumBackend("aer", noise=noise, feed_forward_latency=latency)
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    after = register_probabilities(backend, p)
    # Only a qubit that was rotated on reading 0 waits for the condition on 1: key 1 becomes key 0.
    decayed = 0.4 * (1 - np.exp(-latency / t1))
    expected = torch.tensor([[0.1 + decayed, 0.4 - decayed, 0.2, 0.3]], dtype=torch.float64)
    assert after.allclose(expected, atol=1e-9)
    result = backend.sample_rows(p, 100)
    assert "not_modelled" not in result.diagnostics
    assert result.diagnostics["feed_forward_latency_s"] == latency
    assert predicted_fidelity(backend, 4) < 1


@pytest.mark.parametrize("noise", [{"backend_name": "fake_boston"}, {"noise": THERMAL}])
def test_waiting_costs_more_the_longer_it_takes(noise):
    errors = [
        float(total_variation_distance(probabilities(**noise, feed_forward_latency=latency), rows()).mean())
        for latency in (None, 0, "typical", 3e-6)
    ]
    assert errors[0] == pytest.approx(errors[1], abs=1e-6)  # the bits are read one after the other
    assert errors[1] + 0.001 < errors[2] < errors[3] - 0.01
    fidelities = [
        predicted_fidelity(qtx.QiskitQuantumBackend("aer", **noise, feed_forward_latency=x), 8)
        for x in (None, "typical", 3e-6)
    ]
    assert fidelities == sorted(fidelities, reverse=True)


def test_waiting_is_the_same_shot_by_shot():
    """6,000 shots of Aer: the total variation of two rows of 8 keys has a mean of .013 without any bias."""
    options = {"noise": THERMAL, "feed_forward_latency": 10e-6}
    expected = probabilities(**options)
    backend = qtx.QiskitQuantumBackend("aer", method="aer", **options)
    result = backend.sample_rows(rows(), 6_000, generator=torch.Generator().manual_seed(1))
    assert total_variation_distance(result.probabilities(), expected).max() < 0.03
    assert total_variation_distance(expected, rows()).max() > 0.05


def test_waiting_needs_noise_that_tells_durations():
    for options, error, message in (
        ({}, qtx.ArgumentError, "T1, T2"),
        ({"feed_forward_latency": "fast", "noise": THERMAL}, qtx.ArgumentError, "typical"),
        ({"feed_forward_latency": -1, "noise": THERMAL}, qtx.ArgumentError, "feed_forward_latency=-1"),
        ({"feed_forward_latency": True, "noise": THERMAL}, qtx.NumberError, "feed_forward_latency=True"),
    ):
        with pytest.raises(error, match=message):
            qtx.QiskitQuantumBackend("aer", **{"feed_forward_latency": 1e-6, **options})
    backend = qtx.QiskitQuantumBackend("aer", noise=ParametricNoise(readout=0.1), feed_forward_latency=1e-6)
    with pytest.raises(qtx.BackendUnavailable, match="how long measurements last"):
        backend.sample_rows(rows(), 10)
    nested = QuantumCircuit(2, 2)
    nested.measure(0, 0)
    with nested.if_test((nested.clbits[0], 1)), nested.if_test((nested.clbits[0], 1)):
        nested.x(1)
    with pytest.raises(qtx.BackendUnavailable, match="conditions inside"):
        with_waits(nested, THERMAL.target(2), 1e-6)
    tree = qtx.QiskitQuantumBackend("aer", noise=THERMAL, feed_forward_latency=1e-6, loader="tree")
    assert "feed_forward_latency_s" not in tree.sample_rows(rows(), 10).diagnostics
    policy = qtx.HybridPolicy()
    sampler = qtx.CircuitSampler(backend, hybrid_mode=policy)
    with pytest.warns(qtx.FallbackWarning, match="how long measurements last"):
        sampler.measure(rows(), 10)
    assert sampler.diagnostics["classical_rows"] == 2


# --- Twins of today's devices -----------------------------------------------------------------------------


def test_todays_twins_are_listed_by_their_errors():
    listed = qtx.device_errors()
    errors = [x.two_qubit for x in listed.values()]
    assert errors == sorted(errors)
    assert next(iter(listed)) == "fake_boston"
    assert all(x.calibration.startswith("2026") and x.qubits >= 120 for x in listed.values())
    assert listed["fake_boston"].two_qubit == pytest.approx(1.3e-3, rel=0.05)
    assert listed["fake_boston"].feeds_forward
    assert not listed["fake_miami"].feeds_forward
    assert qtx.device_errors(["fake_armonk"])["fake_armonk"].two_qubit is None
    with pytest.raises(qtx.ArgumentError, match="fake_boston"):
        qtx.device_errors(["fake_bostn"])


@pytest.mark.parametrize("name", ["fake_miami", "fake_armonk", "fake_kyoto"])
def test_twins_that_cannot_run_a_circuit_say_so_and_hybrid_rows_are_classical(name, monkeypatch):
    from qiskit.transpiler.exceptions import TranspilerError

    loader = "tree" if name == "fake_kyoto" else "dynamic"  # no two-qubit gate of it works
    backend = qtx.QiskitQuantumBackend("aer", name, loader=loader)
    with pytest.raises(qtx.BackendUnavailable):
        backend.sample_rows(rows(), 10)

    def refuse(*arguments, **options):
        raise TranspilerError("no translation")

    monkeypatch.setattr("qtx_lab.backends.aer.transpile", refuse)
    broken = qtx.QiskitQuantumBackend("aer", "fake_boston", loader="tree", optimization_level=0)
    for twin in (backend, broken):
        sampler = qtx.CircuitSampler(twin, hybrid_mode=True)
        with pytest.warns(qtx.FallbackWarning, match="2 of 2 rows drawn classically"):
            sampler.measure(rows(11), 10)
        assert sampler.diagnostics["classical_rows"] == 2
