"""Overlaps by circuits: the circuits give what the formulae say, with the error that they say."""

import pytest
import torch
from qiskit.quantum_info import Statevector

import qtx_lab as qtx
from qtx_lab.circuits.overlaps import hadamard_test, hadamard_test_circuit, swap_test, swap_test_circuit

TESTS = [(hadamard_test, hadamard_test_circuit, 1), (swap_test, swap_test_circuit, 2)]


def pair(features, generator):
    return torch.randn(2, features, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("features", [1, 2, 3, 5, 8])
def test_the_ancilla_of_the_circuit_knows_the_overlap(test, features, generator):
    _, make, power = test
    q, k = pair(features, generator)
    circuit = make(q, k)
    ancilla = circuit.num_qubits - 1
    state = Statevector(circuit.remove_final_measurements(inplace=False))
    zero = state.probabilities([ancilla])[0]
    overlap = (q @ k / q.norm() / k.norm()).item()
    assert zero == pytest.approx((1 + overlap**power) / 2, abs=1e-9)


@pytest.mark.statistical
@pytest.mark.parametrize("test", TESTS)
def test_estimates_are_unbiased_with_the_stated_error(test, generator):
    """20,000 repetitions: the mean within five standard errors, the spread within 5 %."""
    estimate, _, power = test
    q, k = pair(8, generator).view(2, 1, 1, 8).expand(-1, 20_000, -1, -1)
    result = estimate(q, k, 50, generator=generator)
    z = (q[0, 0] @ k[0, 0] / q[0, 0].norm() / k[0, 0].norm()) ** power
    value = result.value.flatten()
    assert abs(value.mean() - z) < 5 * result.std_error[0, 0, 0] / 20_000**0.5
    assert value.std() == pytest.approx(result.std_error[0, 0, 0].item(), rel=0.05)
    exact = (q[0] @ k[0].mT) ** power / 8**0.5
    assert result.logits.mean().item() == pytest.approx(exact.item(), abs=0.05)


def test_many_shots_give_attention(generator):
    q, k = torch.randn(2, 3, 5, 16, generator=generator)
    exact = (q.double() @ k.double().mT / 4).softmax(-1)
    result = hadamard_test(q, k, 10**8, generator=generator)
    assert torch.allclose(result.logits.softmax(-1), exact, atol=5e-3)
    assert result.std_error.isfinite().all()


def test_zero_vectors_and_bad_input():
    q = torch.zeros(2, 4)
    assert hadamard_test(q, torch.ones(3, 4), 10).logits.eq(0).all()
    for bad, error in (
        ((q, torch.ones(3, 5), 10), qtx.ShapeError),
        ((q, q * torch.nan, 10), qtx.ArgumentError),
        ((q, q.int(), 10), qtx.DtypeError),
        ((q, q, 0), qtx.ArgumentError),
    ):
        with pytest.raises(error):
            swap_test(*bad)
    with pytest.raises(qtx.ArgumentError, match="not zero"):
        swap_test_circuit(torch.zeros(4), torch.ones(4))
