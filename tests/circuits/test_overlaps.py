"""Overlaps from circuits: the circuits agree with the formulae, and estimates have the stated error."""

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
def test_the_ancilla_has_the_stated_probability(test, features, generator):
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
    """Of 20,000 repetitions the mean is within five standard errors and the spread within 5 %."""
    estimate, _, power = test
    q, k = pair(8, generator).view(2, 1, 1, 8).expand(-1, 20_000, -1, -1)
    result = estimate(q, k, 50, generator=generator)
    z = (q[0, 0] @ k[0, 0] / q[0, 0].norm() / k[0, 0].norm()) ** power
    value = result.value.flatten()
    assert abs(value.mean() - z) < 5 * result.std_error[0, 0, 0] / 20_000**0.5
    assert value.std() == pytest.approx(result.std_error[0, 0, 0].item(), rel=0.05)
    exact = (q[0] @ k[0].mT) ** power / 8**0.5
    assert result.logits.mean().item() == pytest.approx(exact.item(), abs=0.05)


def test_logits_of_many_shots_give_exact_attention(generator):
    q, k = torch.randn(2, 3, 5, 16, generator=generator)
    exact = (q.double() @ k.double().mT / 4).softmax(-1)
    result = hadamard_test(q, k, 10**8, generator=generator)
    assert torch.allclose(result.logits.softmax(-1), exact, atol=5e-3)
    assert result.std_error.isfinite().all()


@pytest.mark.parametrize("factor", [1e-200, 1e-30, 1e140])
def test_tiny_and_huge_vectors_keep_their_overlap(factor, generator):
    q, k = torch.tensor([[[0.6, 0.8]], [[0.8, 0.6]]], dtype=torch.float64) * factor
    result = hadamard_test(q.requires_grad_(), k, 10**6, generator=generator)
    assert result.value.item() == pytest.approx(0.96, abs=0.002)
    assert result.logits.item() == pytest.approx(0.96 * factor**2 / 2**0.5, rel=0.002)
    state = Statevector(swap_test_circuit(q[0], k[0]).remove_final_measurements(inplace=False))
    assert state.probabilities([2])[0] == pytest.approx((1 + 0.96**2) / 2, abs=1e-9)


@pytest.mark.parametrize("test", TESTS)
def test_products_that_float64_holds_are_right_though_their_factors_are_not(test, generator):
    estimate, make, power = test
    q, k = torch.tensor([[0.6, 0.8]]).double(), torch.tensor([[0.8, 0.6]]).double()
    for a, b, scale in ((1e200, 1e-200, 1.0), (1e200, 1e200, 1e-300), (1e-100, 1e-100, 1e300)):
        if power == 2 and a == b:
            continue  # the square of the norms is beyond float64 with any scale
        expected = (a * b * scale) if a != b else 1e100
        logits = estimate(q * a, k * b, 10**6, scale=scale, generator=generator).logits
        assert logits.item() == pytest.approx(0.96**power * expected, rel=0.01)
    tiny = torch.full((1, 3), 5e-324, dtype=torch.float64, requires_grad=True)  # the least that float64 holds
    assert estimate(tiny, tiny, 100).value.item() == 1
    probability = Statevector(make(tiny[0], tiny[0]).remove_final_measurements(inplace=False))
    assert probability.probabilities([probability.num_qubits - 1])[0] == pytest.approx(1)


@pytest.mark.parametrize("make", [hadamard_test_circuit, swap_test_circuit])
def test_circuits_refuse_what_they_cannot_load(make):
    q = torch.ones(4)
    for bad, error in (
        ((q, [1.0, 0.0, 0.0, 0.0]), qtx.DtypeError),
        ((q, q.int()), qtx.DtypeError),
        ((q, q * torch.inf), qtx.ArgumentError),
        ((q, q * torch.nan), qtx.ArgumentError),
        ((q, q[:3]), qtx.ShapeError),
        ((q[:0], q[:0]), qtx.ShapeError),
        ((q[None], q[None]), qtx.ShapeError),
    ):
        with pytest.raises(error):
            make(*bad)


def test_zero_vectors_have_no_overlap_and_bad_input_is_refused():
    q = torch.zeros(2, 4)
    assert hadamard_test(q, torch.ones(3, 4), 10).logits.eq(0).all()
    for bad, error in (
        ((q, torch.ones(3, 5), 10), qtx.ShapeError),
        ((q, q * torch.nan, 10), qtx.ArgumentError),
        ((q, q.int(), 10), qtx.DtypeError),
        ((q, q, 0), qtx.ArgumentError),
        (([[1.0]], q, 10), qtx.DtypeError),
        ((q[:, :0], q[:, :0], 10), qtx.ShapeError),
        ((1e200 * torch.ones(2, 4).double(), 1e200 * torch.ones(2, 4).double(), 10), qtx.ArgumentError),
    ):
        with pytest.raises(error):
            swap_test(*bad)
    with pytest.raises(qtx.ArgumentError, match="not zero"):
        swap_test_circuit(torch.zeros(4), torch.ones(4))
    with pytest.raises(qtx.ShapeError, match="same length"):
        hadamard_test_circuit(torch.ones(4), torch.ones(2))
