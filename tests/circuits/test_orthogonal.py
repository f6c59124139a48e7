"""Orthogonal layers are what their circuits do, and shift rules give the derivatives of circuits."""

import numpy as np
import pytest
import torch
from qiskit.quantum_info import Statevector

import qtx_lab as qtx
from qtx_lab.circuits.orthogonal import (
    FOUR_TERMS,
    TWO_TERMS,
    kernel_features,
    num_rotations,
    orthogonal_circuit,
    rbs_layers,
    rotate,
    shifted_gradient,
    unary_angles,
)

CASES = [(2, "pyramid"), (5, "pyramid"), (4, "butterfly"), (8, "butterfly")]


def case(n, layout, generator):
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    angles = torch.randn(num_rotations(n, layout), generator=generator, dtype=torch.float64)
    return x / x.norm(), angles


def finite_differences(function, angles, step=1e-5):
    moves = torch.eye(len(angles), dtype=torch.float64) * step
    return torch.stack([(function(angles + m) - function(angles - m)) / (2 * step) for m in moves])


@pytest.mark.parametrize(("n", "layout"), CASES)
def test_the_circuit_holds_the_rotated_vector_on_its_unary_states(n, layout, generator):
    x, angles = case(n, layout, generator)
    circuit = orthogonal_circuit(n, layout).remove_final_measurements(inplace=False)
    state = Statevector(circuit.assign_parameters(np.concatenate([unary_angles(x), angles]))).data
    unary = torch.from_numpy(state[1 << np.arange(n)])
    assert torch.allclose(unary, rotate(x, angles, layout).to(unary), atol=1e-9)
    matrix = rotate(torch.eye(n, dtype=torch.float64), angles, layout)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(n, dtype=torch.float64), atol=1e-12)


def test_layers_act_on_disjoint_pairs():
    for n, layout in CASES:
        for layer in rbs_layers(n, layout):
            assert len({i for pair in layer for i in pair}) == 2 * len(layer)
    assert num_rotations(8) == 28
    assert num_rotations(8, "butterfly") == 12


@pytest.mark.parametrize(("n", "layout"), CASES)
def test_shift_rules_give_the_derivative(n, layout, generator):
    """Squares of amplitudes, what a device counts, need four terms; amplitudes need two."""
    x, angles = case(n, layout, generator)
    weights = torch.randn(n, generator=generator, dtype=torch.float64)

    def squares(a):
        return rotate(x, a, layout).square()

    exact = finite_differences(lambda a: weights @ squares(a), angles)
    four = shifted_gradient(squares, angles, weights, FOUR_TERMS, shared=True)
    assert torch.allclose(four, exact, atol=1e-8)
    two = shifted_gradient(squares, angles, weights, TWO_TERMS, shared=True)
    assert (two - exact).abs().max() > 0.01
    exact = finite_differences(lambda a: weights @ rotate(x, a, layout), angles)
    for rule in (TWO_TERMS, FOUR_TERMS):
        result = shifted_gradient(lambda a: rotate(x, a, layout), angles, weights, rule, shared=True)
        assert torch.allclose(result, exact, atol=1e-8)


@pytest.mark.statistical
def test_gradients_of_shots_are_unbiased(generator):
    """Counts in place of probabilities: the mean of 100 gradients is within five standard errors."""
    x, angles = case(4, "pyramid", generator)
    weights = torch.randn(4, generator=generator, dtype=torch.float64)

    def counted(a):
        p = rotate(x, a).square()
        return torch.multinomial(p, 200, replacement=True, generator=generator).bincount(minlength=4) / 200

    many = torch.stack(
        [shifted_gradient(counted, angles, weights, FOUR_TERMS, shared=True) for _ in range(100)]
    )
    exact = finite_differences(lambda a: weights @ rotate(x, a).square(), angles)
    assert ((many.mean(0) - exact).abs() < 5 * many.std(0) / 10).all()
    assert many.std(0).max() > 0.01


def test_products_of_kernel_features_are_fidelities(generator):
    angles = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    from qiskit import QuantumCircuit

    states = []
    for layers in angles:
        circuit = QuantumCircuit(3)
        for layer in layers.tolist():
            for qubit, angle in enumerate(layer):
                circuit.ry(angle, qubit)
            for qubit in range(3):
                circuit.cz(qubit, (qubit + 1) % 3)
        states.append(Statevector(circuit).data)
    a, b = kernel_features(angles)
    assert float(a @ b) == pytest.approx(abs(np.vdot(*states)) ** 2, abs=1e-12)
    assert float(a @ a) == pytest.approx(1)


def test_what_cannot_be_rotated_is_refused():
    with pytest.raises(qtx.ShapeError, match=r"a pyramid of 4 components has \(6,\)"):
        rotate(torch.ones(4), torch.ones(5))
    with pytest.raises(qtx.ArgumentError, match="power of two"):
        rbs_layers(6, "butterfly")
    with pytest.raises(qtx.ArgumentError, match="layout"):
        rbs_layers(6, "piramid")
    with pytest.raises(qtx.ArgumentError, match="n=1"):
        rbs_layers(1)
    with pytest.raises(qtx.ArgumentError, match="qubits"):
        kernel_features(torch.zeros(1, 7))
    with pytest.raises(qtx.ShapeError, match="layers"):
        kernel_features(torch.zeros(3))
