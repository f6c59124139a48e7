"""Circuits of amplitude estimation give sin²((2k + 1) theta), and planes of signs are the values."""

import numpy as np
import pytest
import torch
from qiskit.quantum_info import Statevector

from qtx_lab.circuits.amplitude import amplitude_angles, amplitude_circuit, sign_planes
from qtx_lab.circuits.base import num_bits
from qtx_lab.errors import ArgumentError


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 13, 16])
def test_the_circuit_gives_the_amplified_probability(n, generator):
    p = torch.randn(4, n, generator=generator, dtype=torch.float64).softmax(-1)
    p[0] = torch.eye(n, dtype=torch.float64)[n - 1]
    p[1, : n // 2] = 0  # masked
    p /= p.sum(-1, keepdim=True)
    signs = torch.randint(0, 2, (4, n), generator=generator) * 2 - 1
    theta = (p * (signs < 0)).sum(-1).clamp(0, 1).sqrt().asin()
    for k in (0, 1, 3):
        circuit = amplitude_circuit(num_bits(n), k)
        angles = amplitude_angles(p, signs)[:, : circuit.num_parameters]
        circuit.remove_final_measurements()
        states = [Statevector(circuit.assign_parameters(x)).probabilities()[:n] for x in angles]
        measured = torch.from_numpy(np.stack(states))
        torch.testing.assert_close((measured * (signs < 0)).sum(-1), (theta * (2 * k + 1)).sin().square())
        if k == 0:
            torch.testing.assert_close(measured, p)


@pytest.mark.parametrize(("size", "gates"), [(1, 0), (2, 5), (3, 22), (4, 54)])
def test_an_iterate_has_few_gates_which_are_between_neighbours(size, gates):
    one, two = amplitude_circuit(size, 1), amplitude_circuit(size, 2)
    assert two.num_nonlocal_gates() - one.num_nonlocal_gates() == gates
    for instruction in two.data:
        at = [two.find_bit(q).index for q in instruction.qubits]
        assert len(at) == 1 or abs(at[0] - at[1]) == 1
    with pytest.raises(ArgumentError, match="size=5"):
        amplitude_circuit(5, 1)


@pytest.mark.parametrize("planes", [1, 3, 7])
def test_planes_and_residual_are_the_values(planes, generator):
    v = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    v[0, :4] = 0.5  # equal values
    parts = sign_planes(v, planes)
    whole = parts.centre + (parts.weights[..., None] * parts.signs).sum(-2) + parts.residual
    torch.testing.assert_close(whole, v)
    assert (parts.weights >= 0).all()
    if planes == 7:
        torch.testing.assert_close(parts.residual, torch.zeros_like(v))
        torch.testing.assert_close(2 * parts.weights.sum(-1), v.amax(-1) - v.amin(-1))


def test_numbers_of_iterates_and_planes_that_are_none_are_refused():
    with pytest.raises(ArgumentError, match="iterates=-1"):
        amplitude_circuit(2, -1)
    for planes in (0, 3):
        with pytest.raises(ArgumentError, match=f"planes={planes}"):
            sign_planes(torch.tensor([0.0, 3.0, 1.0]), planes)
