"""Folded circuits do the same with more gates, and no compiler undoes the folding."""

import pytest
import torch
from qiskit import QuantumCircuit, transpile
from qiskit.circuit import Instruction
from qiskit.circuit.library import get_standard_gate_name_mapping
from qiskit.quantum_info import Operator

import qtx_lab as qtx
from qtx_lab.backends.exact import Noise, compile_steps, outcome_probabilities
from qtx_lab.backends.noise import fake_device, reduced_target
from qtx_lab.mitigation import FOLDINGS, scale_noise
from qtx_lab.mitigation.scaling import NOISELESS_GATES

DEVICES = {"fake_fez": "cz", "fake_sherbrooke": "ecr"}


def gates(circuit, two_qubit):
    counted = [i for i in circuit.data if i.operation.name not in ("rz", "barrier", "measure")]
    return sum(len(i.qubits) == 2 for i in counted) if two_qubit else len(counted)


def target_of(device, circuit):
    """The part of the device that a transpiled circuit uses."""
    return reduced_target(fake_device(device).target, circuit.metadata["region"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", FOLDINGS)
@pytest.mark.parametrize("level", [1, 1.5, 2, 3, 4.2])
def test_folding_keeps_the_distribution_and_survives_another_transpile(device, how, level, generator):
    p = torch.randn(3, 8, generator=generator, dtype=torch.float64).softmax(-1)
    backend = qtx.QiskitQuantumBackend("aer", device, loader="tree")
    circuit = backend.transpiled(8)
    folded = qtx.fold(circuit, level, how)
    # What the device would be sent if someone transpiled the folded circuit again, as hard as possible.
    retranspiled = transpile(
        folded,
        target=target_of(device, circuit),
        optimization_level=3,
        initial_layout=list(range(3)),
        seed_transpiler=0,
    )
    for same in (folded, retranspiled):
        ideal, _ = outcome_probabilities(compile_steps(same, Noise({}, {})), backend.loader.angles(p))
        assert torch.allclose(ideal, p, atol=1e-12)
    count = gates(circuit, how == "two-qubit")
    attained = folded.metadata["noise_level"]
    assert abs(attained - level) <= 1 / count + 1e-12
    assert gates(folded, how == "two-qubit") == pytest.approx(attained * count)
    if how == "two-qubit" and level > 1:
        assert folded.count_ops()["sx"] == circuit.count_ops()["sx"]
    assert gates(retranspiled, True) == gates(folded, True), "the compiler undid two-qubit gates"
    assert gates(retranspiled, False) >= gates(folded, False) - (gates(circuit, False) - gates(circuit, True))


def test_without_barriers_the_compiler_undoes_the_folding(generator):
    """This shows that the test above can fail."""
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="tree")
    folded = qtx.fold(backend.transpiled(8), 3)
    bare = folded.copy_empty_like()
    for instruction in folded.data:
        if instruction.operation.name != "barrier":
            bare.append(instruction)
    target = target_of("fake_fez", folded)
    assert gates(transpile(bare, target=target, optimization_level=3), True) < gates(folded, True)


STANDARD_GATES = {
    name: gate
    for name, gate in get_standard_gate_name_mapping().items()
    if name not in ("measure", "reset", "delay")
}


@pytest.mark.parametrize("how", FOLDINGS)
@pytest.mark.parametrize("name", STANDARD_GATES)
def test_every_standard_gate_is_folded(name, how):
    """Twice the gate, so that "global" has a part to fold too; all of qiskit's gates have an inverse."""
    gate = STANDARD_GATES[name]
    circuit = QuantumCircuit(max(gate.num_qubits, 1))
    circuit.append(gate, range(gate.num_qubits))
    circuit.append(gate, range(gate.num_qubits))
    values = {parameter: 0.3 + 0.2 * i for i, parameter in enumerate(circuit.parameters)}
    before = Operator(circuit.assign_parameters(values))
    for level in (2, 3):
        folded = qtx.fold(circuit, level, how)
        assert Operator(folded.assign_parameters(values)).equiv(before)
        attained = folded.metadata["noise_level"]
        noiseless = name in NOISELESS_GATES or (how == "two-qubit" and gate.num_qubits < 2)
        assert attained == (1 if noiseless else level)
        if attained == 3:  # the added gates are there, by the name of the gate or of its inverse
            names = {name, gate.inverse().name}
            assert sum(count for x, count in folded.count_ops().items() if x in names) == 6


def test_waiting_is_folded_with_the_whole_circuit_alone():
    circuit = QuantumCircuit(2, 2)
    circuit.x(0)
    circuit.delay(100, 1)
    circuit.cx(0, 1)
    circuit.measure([0, 1], [0, 1])
    for how, delays in (("global", 3), ("local", 1), ("two-qubit", 1)):
        folded = qtx.fold(circuit, 3, how)
        assert folded.count_ops()["delay"] == delays
        assert folded.count_ops()["cx"] == 3
        assert folded.count_ops()["measure"] == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", FOLDINGS)
@pytest.mark.parametrize("level", [1.3, 1.5, 2, 2.6, 4.2])
def test_the_recorded_level_is_that_of_the_calibrated_errors(device, how, level):
    """Folded engines record the ratio of the sums of the gates' calibrated errors. Both kinds of gates are
    folded alike: no level is reached by one-qubit gates, which have a tenth of the errors.
    """
    backend = qtx.QiskitQuantumBackend("aer", device, loader="tree")
    for n in (8, 16):
        circuit, folded = backend.transpiled(n), scale_noise(backend, level, how).transpiled(n)
        recorded = folded.metadata["noise_level"]

        def error_of(x):
            of_gates = x.copy_empty_like()
            for i in x.data:
                counts = len(i.qubits) > 1 or how != "two-qubit"
                if counts and i.operation.name not in ("measure", *NOISELESS_GATES):
                    of_gates.append(i)
            return sum(backend.engine.errors(of_gates))

        assert recorded == pytest.approx(error_of(folded) / error_of(circuit))
        assert recorded == pytest.approx(level, abs=2 / gates(circuit, True))
        if how == "local":
            before, after = gates(circuit, True), gates(folded, True)
            assert abs(after / before - level) <= 1 / before + 1e-9
            one_before, one_after = (gates(x, False) - gates(x, True) for x in (circuit, folded))
            # Each inverse of an sx is one sx too.
            assert abs(one_after / one_before - level) <= 2 / one_before + 1e-9


def test_a_circuit_that_was_folded_for_another_strength_of_noise_is_not_taken():
    levels = {}
    for strength in (0.0, 1.0):
        backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="tree", noise_scale=strength)
        levels[strength] = scale_noise(backend, 2, "local").transpiled(4).metadata["noise_level"]
    assert levels[0.0] != pytest.approx(levels[1.0]), "without noise all gates count alike"


def test_noise_grows_with_the_level(generator):
    p = torch.randn(8, 8, generator=generator, dtype=torch.float64).softmax(-1)
    backend = qtx.QiskitQuantumBackend("aer", "fake_sherbrooke", loader="tree")
    for how in ("model", *FOLDINGS):
        errors = [
            (scale_noise(backend, x, how).sample_rows(p, 200_000, generator=generator).probabilities() - p)
            .abs()
            .sum(-1)
            .mean()
            for x in (1, 3, 9)
        ]
        assert errors[0] * 1.3 < errors[1] < errors[2]


def test_a_noise_model_scaled_by_0_is_ideal(generator):
    backend = scale_noise(qtx.QiskitQuantumBackend("aer", "fake_fez", loader="tree"), 0, "model")
    assert backend.engine.ideal
    half = scale_noise(scale_noise(qtx.QiskitQuantumBackend("aer", "fake_fez"), 2, "model"), 0.25, "model")
    assert half.engine.noise_scale == 0.5


def test_what_cannot_be_folded_is_refused():
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="dynamic")
    with pytest.raises(qtx.ArgumentError, match="before its end"):
        qtx.fold(backend.transpiled(8), 3)
    with pytest.raises(qtx.ArgumentError, match="before its end"):
        scale_noise(backend, 3).sample_rows(torch.ones(1, 4) / 4)
    circuit = QuantumCircuit(1)
    for level in (0, 0.5, float("nan")):
        with pytest.raises(qtx.ArgumentError, match="level"):
            qtx.fold(circuit, level)
    with pytest.raises(qtx.ArgumentError, match="how"):
        qtx.fold(circuit, 3, "globl")
    with pytest.raises(qtx.DtypeError):
        qtx.fold("circuit", 3)
    circuit.append(Instruction("opaque", 1, 0, []), [0])
    for how in ("local", "global"):
        with pytest.raises(qtx.ArgumentError, match="'opaque' is not folded"):
            qtx.fold(circuit, 3, how)
    for errors in ([0.1, 0.1], [-0.1], [float("nan")], 0.1):
        with pytest.raises(qtx.ArgumentError, match="errors"):
            qtx.fold(circuit, 3, "two-qubit", errors=errors)
    with pytest.raises(qtx.DtypeError, match="errors"):
        qtx.fold(circuit, 3, "two-qubit", errors=["a"])
    with pytest.raises(qtx.ArgumentError, match="level"):
        scale_noise(backend, -1, "model")
