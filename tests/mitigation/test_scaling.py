"""Folded circuits do the same with more gates, and no compiler undoes it."""

import pytest
import torch
from qiskit import QuantumCircuit, transpile

import qtx_lab as qtx
from qtx_lab.backends.aer import _part
from qtx_lab.backends.exact import Noise, compile_steps, outcome_probabilities
from qtx_lab.mitigation import FOLDINGS, scale_noise

DEVICES = {"fake_fez": "cz", "fake_sherbrooke": "ecr"}


def gates(circuit, two):
    counted = [i for i in circuit.data if i.operation.name not in ("rz", "barrier", "measure")]
    return sum(len(i.qubits) == 2 for i in counted) if two else len(counted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", FOLDINGS)
@pytest.mark.parametrize("level", [1, 1.5, 2, 3, 4.2])
def test_folding_keeps_the_distribution_and_survives_another_transpile(device, how, level, generator):
    p = torch.randn(3, 8, generator=generator, dtype=torch.float64).softmax(-1)
    backend = qtx.QiskitQuantumBackend("aer", device, loader="tree")
    circuit = backend.transpiled(8)
    folded = qtx.fold(circuit, level, how)
    target = _part(device, tuple(circuit.metadata["region"]), 1.0)
    # What the device would be sent if someone transpiled again, as hard as possible.
    again = transpile(
        folded, target=target, optimization_level=3, initial_layout=list(range(3)), seed_transpiler=0
    )
    for made in (folded, again):
        ideal, _ = outcome_probabilities(compile_steps(made, Noise({}, {})), backend.loader.angles(p))
        assert torch.allclose(ideal, p, atol=1e-12)
    count = gates(circuit, how == "two-qubit")
    attained = folded.metadata["noise_level"]
    assert abs(attained - level) <= 1 / count + 1e-12
    assert gates(folded, how == "two-qubit") == pytest.approx(attained * count)
    if how == "two-qubit" and level > 1:
        assert folded.count_ops()["sx"] == circuit.count_ops()["sx"]
    assert gates(again, True) == gates(folded, True), "the compiler undid two-qubit gates"
    assert gates(again, False) >= gates(folded, False) - (gates(circuit, False) - gates(circuit, True))


def test_without_barriers_the_compiler_would_undo_it(generator):
    """That the test above can fail."""
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="tree")
    folded = qtx.fold(backend.transpiled(8), 3)
    bare = folded.copy_empty_like()
    for instruction in folded.data:
        if instruction.operation.name != "barrier":
            bare.append(instruction)
    target = _part("fake_fez", tuple(folded.metadata["region"]), 1.0)
    assert gates(transpile(bare, target=target, optimization_level=3), True) < gates(folded, True)


def test_noise_grows_with_the_level(generator):
    p = torch.randn(8, 8, generator=generator, dtype=torch.float64).softmax(-1)
    backend = qtx.QiskitQuantumBackend("aer", "fake_sherbrooke", loader="tree")
    for how in ("model", *FOLDINGS):
        misses = [
            (scale_noise(backend, x, how).sample_rows(p, 200_000, generator=generator).probabilities() - p)
            .abs()
            .sum(-1)
            .mean()
            for x in (1, 3, 9)
        ]
        assert misses[0] * 1.3 < misses[1] < misses[2]


def test_a_scaled_model_knows_no_noise_at_0(generator):
    backend = scale_noise(qtx.QiskitQuantumBackend("aer", "fake_fez", loader="tree"), 0, "model")
    assert backend.engine.ideal
    half = scale_noise(scale_noise(qtx.QiskitQuantumBackend("aer", "fake_fez"), 2, "model"), 0.25, "model")
    assert half.engine.noise_scale == 0.5


def test_what_cannot_be_folded_is_one_clear_error():
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="dynamic")
    with pytest.raises(qtx.ArgumentError, match="conditions on the way"):
        qtx.fold(backend.transpiled(8), 3)
    with pytest.raises(qtx.ArgumentError, match="conditions on the way"):
        scale_noise(backend, 3).sample_rows(torch.ones(1, 4) / 4)
    circuit = QuantumCircuit(1)
    for level in (0, 0.5, float("nan")):
        with pytest.raises(qtx.ArgumentError, match="level"):
            qtx.fold(circuit, level)
    with pytest.raises(qtx.ArgumentError, match="how"):
        qtx.fold(circuit, 3, "globl")
    with pytest.raises(qtx.DtypeError):
        qtx.fold("circuit", 3)
    circuit.t(0)
    with pytest.raises(qtx.ArgumentError, match="'t'"):
        qtx.fold(circuit, 3, "local")
    with pytest.raises(qtx.ArgumentError, match="level"):
        scale_noise(backend, -1, "model")
