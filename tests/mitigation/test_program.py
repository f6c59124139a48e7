"""A loader in boxes of IBM's stack: its layers' noise is learned and cancelled by IBM's local executor."""

import numpy as np
import pytest
import torch
from qiskit.quantum_info import PauliLindbladMap
from qiskit_ibm_runtime import Executor

import qtx_lab as qtx
from qtx_lab.bench.mitigation import synthetic_rows
from qtx_lab.mitigation.program import LoaderProgram

pytest.importorskip("qiskit_noise_learning")


@pytest.mark.statistical
def test_learned_noise_is_that_of_the_simulator_and_is_cancelled():
    """Depolarizing noise of 5 % after each CZ has gamma² = 1.21 a gate; what is learned of it from 16 × 256
    shots a circuit is within 5 %, and rows of 1,500 randomizations are within their intervals.
    """
    backend = qtx.QiskitQuantumBackend(
        "aer", noise=qtx.ParametricNoise(two_qubit=0.05, readout=0.02), loader="tree"
    )
    device = backend.engine.simulator(backend.transpiled(4))
    program = LoaderProgram.of(backend, 4)
    executor = Executor(device)
    executor.options.simulator.seed_simulator = 1
    learning = program.learning_program(device, randomizations=16, shots=256)
    noise = program.learned_noise(executor.run(learning).result())
    assert noise.keys() == program.layers.keys()
    known = qtx.ProbabilisticErrorCancellation().overhead(backend, 4)
    assert program.overhead(noise) == pytest.approx(known, rel=0.05)
    p = synthetic_rows(2)[::8]
    result = executor.run(program.cancelling_program(p, noise, 1500)).result()
    misread = torch.tensor([[0.98, 0.02], [0.02, 0.98]], dtype=torch.float64).expand(2, 2, 2)
    rows = program.rows_of(result, p, noise, misread)
    assert ((rows.p - p).abs() <= 3.3 * rows.std_error).all()
    variance = program.overhead(noise) * float((p * (1 - p)).mean()) / 1500
    assert float(rows.std_error.square().mean()) == pytest.approx(variance, rel=0.3)


def test_a_program_with_no_noise_to_cancel_has_one_sign():
    backend = qtx.QiskitQuantumBackend("aer", noise=qtx.ParametricNoise(two_qubit=1e-6), loader="tree")
    program = LoaderProgram.of(backend, 4)
    (name,) = program.layers
    noise = {name: PauliLindbladMap.identity(2)}
    assert program.overhead(noise) == pytest.approx(1)
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    result = Executor(backend.engine.simulator(backend.transpiled(4))).run(
        program.cancelling_program(p, noise, 40, shots=10)
    )
    assert not np.any(result.result()[0]["pauli_signs"])
    rows = program.rows_of(result.result(), p, noise)
    assert rows.mass.tolist() == pytest.approx([1])
    assert (rows.p[0] - p[0]).abs().max() < 0.15


def test_what_is_not_measured_is_refused_by_name():
    """Rows of other shapes gave numbers, rows of zeros NaN, and one depth leaves nothing to learn from."""
    backend = qtx.QiskitQuantumBackend("aer", noise=qtx.ParametricNoise(two_qubit=0.01), loader="tree")
    program = LoaderProgram.of(backend, 4)
    noise = {name: PauliLindbladMap.identity(len(x.qubits)) for name, x in program.layers.items()}
    p = torch.full((2, 4), 0.25)
    device = backend.engine.simulator(backend.transpiled(4))
    result = Executor(device).run(program.cancelling_program(p, noise, 5)).result()
    for rows, match in (
        (torch.full((4, 4), 0.25), "p has 4 rows, and 2 were measured"),
        (torch.full((2, 3), 1 / 3), "p has 3 keys; the program's circuit is for 4"),
        (torch.zeros(2, 4), "rows of zeros"),
    ):
        with pytest.raises(qtx.QtxError, match=match):
            program.rows_of(result, rows, noise)
        if "measured" not in match:
            with pytest.raises(qtx.QtxError, match=match):
                program.cancelling_program(rows, noise, 5)
    for use in (program.overhead, lambda noise: program.cancelling_program(p, noise, 5)):
        with pytest.raises(qtx.ArgumentError, match="noise has nothing of the layers"):
            use({})
    for wrong in (
        {"randomizations": 0},
        {"shots": True},
        {"depths": ()},
        {"depths": (4, 4)},
        {"depths": (-1, 2)},
    ):
        (name,) = wrong
        with pytest.raises(qtx.QtxError, match=f"{name}="):
            program.learning_program(device, **wrong)


def test_depths_and_noise_of_the_wrong_type_are_refused_by_name():
    program = LoaderProgram.of(qtx.QiskitQuantumBackend("aer", loader="tree"), 4)
    with pytest.raises(qtx.DtypeError, match="depths=5 is not allowed"):
        program.learning_program(None, depths=5)
    with pytest.raises(qtx.DtypeError, match="noise is a NoneType"):
        program.overhead(None)


@pytest.mark.parametrize(("loader", "n"), [("tree", 1), ("unary", 1), ("mps", 1), ("mps", 2)])
def test_a_circuit_without_two_qubit_gates_is_refused(loader, n):
    backend = qtx.QiskitQuantumBackend("aer", noise=qtx.ParametricNoise(two_qubit=0.01), loader=loader)
    with pytest.raises(qtx.ArgumentError, match=f"n={n} is not allowed: .* has no two-qubit gates"):
        LoaderProgram.of(backend, n)


def test_what_cannot_be_boxed_is_refused():
    noise = qtx.ParametricNoise(two_qubit=0.01)
    with pytest.raises(qtx.ArgumentError, match="measures before its end"):
        LoaderProgram.of(qtx.QiskitQuantumBackend("aer", noise=noise, loader="dynamic"), 8)
    ideal = qtx.QiskitQuantumBackend("aer", loader="tree")
    circuit = ideal.transpiled(4)
    with pytest.raises(qtx.ArgumentError, match="has no noise"):
        ideal.engine.simulator(circuit)
