"""The approximate loader: layers of two-qubit gates that prepare states of bond dimension 2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterVector
from qiskit.quantum_info import Operator
from torch import Tensor

from ..checks import check_count, check_number
from ..errors import ArgumentError
from .base import MAX_QUBITS, Loader, blank_circuit, check_num_qubits, check_rows, num_bits

MAX_LAYERS = 16
"""Most layers of two-qubit gates."""


@dataclass(frozen=True)
class MpsLoader(Loader):
    """Prepares the row approximately, by layers of two-qubit gates between neighbours on a line.

    Each layer prepares the state of bond dimension 2 that is nearest, by singular values, to what the other
    layers have left of the row. A layer takes 2 (m - 1) two-qubit gates, where a tree takes 2^m - m - 1
    between all qubits: that saves gates from m = 6 on. For m <= 2 one layer is exact. A row that is smooth in
    its keys needs few layers. `fidelities` gives the fidelity of each row, and `for_fidelity` chooses the
    number of layers. The circuit may give a masked key some probability; shots that measure it are discarded.

    Sources: Ran, Encoding of matrix product states into quantum circuits of one- and two-qubit gates (2020),
    for the layers; Vatan and Williams, Optimal quantum circuits for general two-qubit gates (2004), for real
    gates by two CNOTs: in the magic basis they are a product of two one-qubit gates.

    Parameters
    ----------
    layers : int
        Number of layers, from 1 to 16.

    Raises
    ------
    ArgumentError
        If layers is not a whole number from 1 to 16.

    Examples
    --------
    >>> MpsLoader(layers=2).circuit(6).num_nonlocal_gates()
    20
    >>> round(float(MpsLoader(layers=1).fidelities(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))), 9)
    1.0
    """

    name = "mps"
    exact = False

    layers: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_count("layers", self.layers, most=MAX_LAYERS))

    @classmethod
    def for_fidelity(cls, p: Tensor, fidelity: float, max_layers: int = 8) -> MpsLoader:
        """Make the loader with the fewest layers that reaches a state fidelity in every row.

        Parameters
        ----------
        p : Tensor, (R, n)
            Rows of probabilities. Rows of all zeros are never run and do not count.
        fidelity : float
            Least fidelity without noise, above 0 and at most 1.
        max_layers : int
            Most layers to try.

        Raises
        ------
        ArgumentError
            If fidelity is not allowed, or if `max_layers` layers do not reach it. The message says what they
            reach.
        """
        fidelity = check_number("fidelity", fidelity, above=0, most=1)
        deepest, p = cls(max_layers), check_rows(p)
        p = p[p.sum(-1) > 0]
        if not len(p):
            return cls(1)
        worst = deepest._fit(p).fidelities.amin(0)  # [layers]
        enough = (worst >= fidelity - 1e-12).nonzero()
        if not len(enough):
            raise ArgumentError(
                f"fidelity={fidelity:g} is not reached: max_layers={max_layers} reach {float(worst[-1]):.4f} "
                "in the worst row. Allow more layers, or use the loader 'tree'."
            )
        return cls(int(enough[0]) + 1)

    def fidelities(self, p: Tensor) -> Tensor:
        """Compute the fidelity |<psi|circuit>|² without noise, with psi = sum_j sqrt(p_j) |j>.

        Parameters
        ----------
        p : Tensor, (R, n)
            Rows of probabilities.

        Returns
        -------
        Tensor, float64, (R,)
        """
        return self._fit(check_rows(p)).fidelities[:, -1]

    def circuit(self, size: int) -> QuantumCircuit:
        """Build the circuit of `size` qubits; see `Loader.circuit`."""
        check_num_qubits(size, MAX_QUBITS)
        circuit = blank_circuit(size, self.name)
        if size == 1:
            circuit.ry(ParameterVector("a", 1)[0], 0)
        else:
            angle = iter(ParameterVector("a", 6 * (size - 1) * self.layers))
            for _ in range(self.layers):
                for low in range(size - 1):  # the pair (low + 1, low), least significant pair first
                    circuit.compose(_magic_basis(), [low, low + 1], inplace=True)
                    for qubit in (low + 1, low):
                        circuit.rz(next(angle), qubit)
                        circuit.ry(next(angle), qubit)
                        circuit.rz(next(angle), qubit)
                    circuit.compose(_magic_basis().inverse(), [low, low + 1], inplace=True)
        circuit.measure(range(size), range(size))
        return circuit

    def angles(self, p: Tensor) -> np.ndarray:
        """Fit the layers to the rows; see `Loader.angles`."""
        return self._fit(p).angles.numpy()

    def _fit(self, p: Tensor) -> _Fit:
        """Fit the layers one after the other to rows (R, n) that `check_rows` returned."""
        rows, m = len(p), num_bits(p.shape[-1])
        remaining = F.pad(p, (0, (1 << m) - p.shape[-1])).sqrt()  # what is still to be prepared, [R, 2^m]
        if m == 1:
            angle = 2 * torch.atan2(remaining[:, 1:], remaining[:, :1])
            return _Fit(angle, torch.ones(rows, self.layers, dtype=torch.float64))
        angles, fidelities = [], []
        for _ in range(self.layers):
            gates = _staircase(remaining, m)  # m - 1 gates [R, 4, 4], least significant pair first
            for low in reversed(range(m - 1)):  # apply the inverse of the layer
                pair = remaining.unflatten(1, (-1, 4, 1 << low))  # [R, higher bits, pair, lower bits]
                remaining = torch.einsum("rji,rhjl->rhil", gates[low], pair).flatten(1)
            angles.append(torch.cat([_euler_angles(gate) for gate in gates], -1))
            fidelities.append(remaining[:, 0].square())
        # The circuit runs the last layer first.
        return _Fit(torch.cat(angles[::-1], -1), torch.stack(fidelities, -1))


@dataclass(frozen=True, eq=False)
class _Fit:
    """Angles of fitted rows, (R, P) in radians, and the fidelity reached after each layer, (R, layers)."""

    angles: Tensor
    fidelities: Tensor


def _staircase(state: Tensor, m: int) -> list[Tensor]:
    """Compute the gates that prepare the approximation of bond dimension 2 of states (R, 2^m) from |0...0>.

    Returns m - 1 real gates (R, 4, 4), the first of which acts first. Gate k acts on the qubits (k + 1, k).
    Qubit k + 1 was 0 until then and takes over the correlations with the qubits above it; qubit k is in its
    final state.
    """
    rows = len(state)
    tensors, rest, bond = [], state, 1
    for _ in range(m - 1):  # from the most significant qubit
        u, s, v = torch.linalg.svd(rest.flatten(1).unflatten(1, (bond * 2, -1)), full_matrices=False)
        next_bond = min(2, s.shape[-1])
        tensors.append(u[..., :next_bond])  # [R, bond * 2, next_bond]
        rest, bond = s[:, :next_bond, None] * v[:, :next_bond], next_bond
    last = rest.reshape(rows, 4)  # the bond and the least significant qubit
    last = last / last.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    first = tensors[0]
    if m == 2:  # the rotation of the most significant qubit is part of the only gate
        both = torch.einsum("rsb,rbt->rst", first, last.view(rows, 2, 2))
        return [_complete(both.reshape(rows, 4, 1))]
    both = torch.einsum("rsb,rbtc->rstc", first, tensors[1].view(rows, 2, 2, 2))
    middle = [_complete(tensors[k]) for k in range(m - 2, 1, -1)]
    return [_complete(last[..., None]), *middle, _complete(both.reshape(rows, 4, 2))]


def _complete(columns: Tensor) -> Tensor:
    """Complete orthonormal columns (R, 4, c), c < 4, to orthogonal matrices (R, 4, 4) of determinant 1."""
    q, r = torch.linalg.qr(columns, mode="complete")
    signs = torch.ones(len(q), 4, dtype=q.dtype)
    signs[:, : columns.shape[-1]] = torch.where(torch.diagonal(r, dim1=1, dim2=2) < 0, -1.0, 1.0)
    q = q * signs[:, None]
    orientation = torch.ones_like(signs)
    orientation[:, 3] = torch.linalg.det(q).sign()
    return q * orientation[:, None]


def _magic_basis() -> QuantumCircuit:
    """Build the change to the basis in which real gates of determinant 1 are two one-qubit gates."""
    circuit = QuantumCircuit(2)
    circuit.s([0, 1])
    circuit.h(1)
    circuit.cx(1, 0)
    return circuit


def _euler_angles(gate: Tensor) -> Tensor:
    """Compute the angles (R, 6) of the one-qubit rotations that real gates (R, 4, 4) are in the magic basis.

    The gates have determinant 1. The angles are those of rz, ry and rz on the higher qubit, then on the lower
    one.
    """
    rows = len(gate)
    e = torch.from_numpy(Operator(_magic_basis()).data)
    product = e @ gate.to(e.dtype) @ e.conj().T  # A kron B
    pairs = product.view(rows, 2, 2, 2, 2).permute(0, 1, 3, 2, 4).reshape(rows, 4, 4)
    u, _, v = torch.linalg.svd(pairs)
    parts = []
    for x in (u[:, :, 0].reshape(rows, 2, 2), v[:, 0].reshape(rows, 2, 2)):
        x = x / torch.linalg.det(x).sqrt()[:, None, None]
        y = 2 * torch.atan2(x[:, 1, 0].abs(), x[:, 0, 0].abs())
        half_sum, half_difference = x[:, 1, 1].angle(), x[:, 1, 0].angle()  # of the two rz angles
        parts += [half_sum - half_difference, y, half_sum + half_difference]
    return torch.stack(parts, -1)
