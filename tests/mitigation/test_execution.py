"""A user's own executor and observable are extrapolated, whatever the executor returns."""

import numpy as np
import pytest
import torch
from qiskit import QuantumCircuit
from qiskit.quantum_info import DensityMatrix, SparsePauliOp, Statevector

import qtx_lab as qtx
from qtx_lab.mitigation import execute_with_zne

SURVIVAL = 0.97
"""What a two-qubit gate of `noisy_state` leaves of the state."""


def circuit_of_pairs():
    circuit = QuantumCircuit(2)
    circuit.h(0)
    for angle in (0.3, 0.5, 0.2):
        circuit.cx(0, 1)
        circuit.rz(angle, 1)
        circuit.ry(angle, 0)
    return circuit


def noisy_state(circuit):
    """The state after the circuit, depolarised as a whole by each of its two-qubit gates."""
    bare = circuit.remove_final_measurements(inplace=False)
    pure = DensityMatrix(Statevector(bare)).data
    left = SURVIVAL ** sum(len(i.qubits) == 2 for i in bare.data if i.operation.name != "barrier")
    return left * pure + (1 - left) * np.eye(4) / 4


def z_of_first(circuit):
    return float(np.real(np.trace(noisy_state(circuit) @ np.diag([1, -1, 1, -1]))))


EXACT = float(np.real(Statevector(circuit_of_pairs()).expectation_value(SparsePauliOp("IZ"))))


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (float, float),
        (np.float64, float),
        (lambda x: np.array([x, -x]), np.ndarray),
        (lambda x: torch.tensor([x, -x], dtype=torch.float64), torch.Tensor),
    ],
)
def test_results_are_of_the_kind_that_the_executor_returns(wrap, kind):
    circuit = circuit_of_pairs()
    zne = qtx.ZeroNoiseExtrapolation([1, 2, 3], "exponential")
    result = execute_with_zne(circuit, lambda x: wrap(z_of_first(x)), zne=zne, how="two-qubit")
    assert isinstance(result, kind)
    first = float(result if kind is float else result[0])
    assert first == pytest.approx(EXACT, abs=1e-9)
    line = execute_with_zne(circuit, lambda x: wrap(z_of_first(x)))
    noisy = z_of_first(circuit)
    assert abs(float(line if kind is float else line[0]) - EXACT) < 0.3 * abs(noisy - EXACT)


@pytest.mark.statistical
@pytest.mark.parametrize(
    "terms", [{"IZ": 1.0}, {"XX": 0.5, "YY": -0.3, "ZI": 0.7, "II": 2.0}, {"YI": 1, "XZ": 1}]
)
def test_an_observable_is_measured_in_the_bases_that_it_needs(terms):
    """The mean of 20 repetitions is within 4 standard errors of the exact expectation, and these are right to
    half; the raw one is far off.
    """
    rng, circuit, asked = np.random.default_rng(0), circuit_of_pairs(), []

    def executor(measured):
        asked.append(measured)
        p = np.real(np.diag(noisy_state(measured)))
        counts = rng.multinomial(20_000, p / p.sum())
        return {f"{value:02b}": int(count) for value, count in enumerate(counts) if count}

    observable = SparsePauliOp(list(terms), list(terms.values()))
    zne = qtx.ZeroNoiseExtrapolation([1, 3, 5], "polynomial")
    results = [execute_with_zne(circuit, executor, observable, zne=zne, how="two-qubit") for _ in range(20)]
    exact = float(np.real(Statevector(circuit).expectation_value(observable)))
    values = np.array([float(x.output) for x in results])
    error = np.mean([float(x.std_error) for x in results])
    assert abs(values.mean() - exact) < 4 * error / 20**0.5 + 0.01 * abs(exact)
    assert 0.5 * error < values.std() < 1.7 * error
    raw = float(np.real(np.trace(noisy_state(circuit) @ observable.to_matrix())))
    assert abs(raw - exact) > 3 * abs(values.mean() - exact)
    assert len(asked) == 20 * 3 * len(observable.group_commuting(qubit_wise=True))


def test_plain_floats_of_attention_are_extrapolated():
    """`mitigate_attention_errors` returns what the user's function returns."""
    zne = qtx.ZeroNoiseExtrapolation([0.1, 0.2])
    result = zne.mitigate_attention_errors(lambda q, k, v, noise_level: 1 - noise_level, None, None, None)
    assert isinstance(result, float)
    assert result == pytest.approx(1)
    array = zne.mitigate_attention_errors(
        lambda q, k, v, noise_level: np.ones(3) * noise_level, None, None, None
    )
    assert isinstance(array, np.ndarray)
    assert array == pytest.approx([0, 0, 0], abs=1e-12)


def test_what_cannot_be_executed_is_refused():
    circuit, zz = circuit_of_pairs(), SparsePauliOp("ZZ")
    measured = circuit.copy()
    measured.measure_all()
    for arguments, error in (
        (("circuit", z_of_first), "circuit is a str"),
        ((circuit, 0.5), "executor is a float"),
        ((circuit, z_of_first, "ZZ"), "observable is a str"),
        ((circuit, z_of_first, SparsePauliOp("Z")), "observable has 1 qubits"),
        ((circuit, z_of_first, SparsePauliOp("ZZ", 1j)), "Hermitian"),
        ((measured, z_of_first, zz), "circuit measures"),
        ((circuit, z_of_first, zz), "must return counts"),
        ((circuit, lambda x: {"00": 0}, zz), "sum to 0"),
        ((circuit, lambda x: {"0": 1}, zz), "must be 2 bits"),
        ((circuit, lambda x: None), "values holds NoneType"),
        ((circuit, lambda x: float("nan")), "NaN"),
        ((QuantumCircuit(1), z_of_first), "too few gates"),
    ):
        with pytest.raises(qtx.QtxError, match=error):
            execute_with_zne(*arguments)
    with pytest.raises(qtx.DtypeError, match="zne is a str"):
        execute_with_zne(circuit, z_of_first, zne="linear")


def test_shots_that_agree_are_no_certainty():
    """With a single shot, or few that all read the same, an interval must still hold the expectation."""
    circuit = circuit_of_pairs()
    zne = qtx.ZeroNoiseExtrapolation([1, 3])
    for shots in (1, 10):
        estimate = execute_with_zne(circuit, lambda x, n=shots: {"00": n}, SparsePauliOp("IZ"), zne=zne)
        low, high = estimate.confidence_interval()
        assert low < 1 - 1 / shots < high
    constant = execute_with_zne(circuit, lambda x: {"00": 1}, SparsePauliOp("II", 3.0), zne=zne)
    assert float(constant.output) == pytest.approx(3.0)
    assert float(constant.std_error) == 0.0
