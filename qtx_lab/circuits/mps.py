"""The approximate loader: staircases of two-qubit gates that make matrix product states of bond dimension 2."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from qiskit.circuit import ParameterVector
from qiskit.quantum_info import Operator
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError
from .base import MOST_QUBITS, binary_keys, check_rows, check_size, num_bits

MOST_LAYERS = 16


class MpsLoader:
    """Each layer undoes the best-by-SVD state of bond dimension 2 in what the layers so far have left of the row.

    2 (m - 1) two-qubit gates a layer between neighbours on a line, where a tree needs 2^m - m - 1 between all: few
    enough for m >= 6, and exact for m <= 2. A row that is smooth in its keys needs few layers; `fidelities` says how
    close each row comes, and `for_fidelity` chooses the layers. Amplitudes of masked keys may not be 0: such shots
    are discarded.

    Sources: Ran, Encoding of matrix product states into quantum circuits of one- and two-qubit gates (2020), for
    the layers; Vatan and Williams, Optimal quantum circuits for general two-qubit gates (2004), for real gates by
    two CNOTs: in the magic basis they are a product of two one-qubit gates.

    Parameters
    ----------
    layers : int
        1 to 16.

    >>> MpsLoader(layers=2).circuit(6).num_nonlocal_gates()
    20
    """

    name = "mps"
    exact = False

    def __init__(self, layers: int = 2):
        check_count("layers", layers)
        if layers > MOST_LAYERS:
            raise ArgumentError(f"layers={layers} is not allowed: at most {MOST_LAYERS}.")
        self.layers = layers

    @classmethod
    def for_fidelity(cls, p: Tensor, fidelity: float, max_layers: int = 8) -> MpsLoader:
        """The loader with the fewest layers that load each row of p (R, n) with at least this ideal state fidelity.

        Rows of all zeros are not run, and do not count.

        Raises
        ------
        ArgumentError
            If `max_layers` are not enough; says what they reach.
        """
        if isinstance(fidelity, bool) or not isinstance(fidelity, int | float) or not 0 < fidelity <= 1:
            raise ArgumentError(f"fidelity={fidelity!r} is not allowed: it must be above 0 and at most 1.")
        most, p = cls(max_layers), check_rows(p)
        p = p[p.sum(-1) > 0]
        if not len(p):
            return cls(1)
        reached = most._fit(p)[1].amin(0)  # [layers]
        enough = (reached >= fidelity - 1e-12).nonzero()
        if not len(enough):
            raise ArgumentError(
                f"max_layers={max_layers} reach a fidelity of {float(reached[-1]):.4f} in the worst row, "
                f"fidelity={fidelity:g} was asked: allow more layers, or take the loader 'tree'."
            )
        return cls(int(enough[0]) + 1)

    def fidelities(self, p: Tensor) -> Tensor:
        """Ideal |<psi|circuit>|^2 of rows p (R, n) with psi = sum_j sqrt(p_j) |j>, float64, (R,)."""
        return self._fit(check_rows(p))[1][:, -1]

    def size(self, n: int) -> int:
        return num_bits(n)

    def circuit(self, size: int) -> QuantumCircuit:
        check_size(size, MOST_QUBITS)
        circuit = QuantumCircuit(QuantumRegister(size, "q"), ClassicalRegister(size, "c"), name=self.name)
        if size == 1:
            circuit.ry(ParameterVector("a", 1)[0], 0)
        else:
            angle = iter(ParameterVector("a", 6 * (size - 1) * self.layers))
            for _ in range(self.layers):
                for low in range(size - 1):  # the pair (low + 1, low), least significant first
                    circuit.compose(_magic(), [low, low + 1], inplace=True)
                    for qubit in (low + 1, low):
                        circuit.rz(next(angle), qubit)
                        circuit.ry(next(angle), qubit)
                        circuit.rz(next(angle), qubit)
                    circuit.compose(_magic().inverse(), [low, low + 1], inplace=True)
        circuit.measure(range(size), range(size))
        return circuit

    def angles(self, p: Tensor) -> np.ndarray:
        return self._fit(p)[0].numpy()

    def keys(self, outcomes: np.ndarray, n: int) -> np.ndarray:
        return binary_keys(outcomes, n)

    def _fit(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Angles (R, P), and the fidelity after each layer (R, layers)."""
        rows, m = len(p), num_bits(p.shape[-1])
        left = F.pad(p, (0, (1 << m) - p.shape[-1])).sqrt()  # what is still to be loaded, [R, 2^m]
        if m == 1:
            angle = 2 * torch.atan2(left[:, 1:], left[:, :1])
            return angle, torch.ones(rows, self.layers, dtype=torch.float64)
        layers, reached = [], []
        for _ in range(self.layers):
            gates = _staircase(left, m)  # [m - 1] of [R, 4, 4], least significant pair first
            for low in reversed(range(m - 1)):  # the inverse of the layer
                pair = left.view(rows, -1, 4, 1 << low)  # [R, higher, pair, lower]
                left = torch.einsum("rji,rhjl->rhil", gates[low], pair).reshape(rows, -1)
            layers.append(torch.cat([_euler(gate) for gate in gates], -1))
            reached.append(left[:, 0].square())
        return torch.cat(layers[::-1], -1), torch.stack(reached, -1)  # the circuit runs the last layer first


def _staircase(state: Tensor, m: int) -> list[Tensor]:
    """Real gates (R, 4, 4) that make the state's approximation of bond dimension 2 from |0...0>.

    Gate k acts on qubits (k + 1, k), gate 0 first: qubit k + 1, still 0, takes over what is to be correlated with the
    qubits above, qubit k is done.
    """
    rows = len(state)
    tensors, rest, bond = [], state, 1
    for _ in range(m - 1):  # from the most significant qubit
        u, s, v = torch.linalg.svd(rest.reshape(rows, bond * 2, -1), full_matrices=False)
        kept = min(2, s.shape[-1])
        tensors.append(u[..., :kept])  # [R, bond * 2, kept]
        rest, bond = s[:, :kept, None] * v[:, :kept], kept
    last = rest.reshape(rows, 4)  # bond and the least significant qubit
    last = last / last.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    gates = [_complete(last[..., None])]
    if m > 2:
        gates += [_complete(tensors[k]) for k in range(m - 2, 1, -1)]
        both = torch.einsum("rsb,rbtc->rstc", tensors[0], tensors[1].view(rows, 2, 2, 2))
        gates.append(_complete(both.reshape(rows, 4, 2)))
    else:  # the most significant qubit's own rotation goes into the only gate
        first = tensors[0]
        gates = [_complete(torch.einsum("rsb,rbt->rst", first, last.view(rows, 2, 2)).reshape(rows, 4, 1))]
    return gates


def _complete(columns: Tensor) -> Tensor:
    """An orthogonal matrix of determinant 1 (R, 4, 4) that begins with these orthonormal columns (R, 4, c < 4)."""
    q, r = torch.linalg.qr(columns, mode="complete")
    signs = torch.ones(len(q), 4, dtype=q.dtype)
    signs[:, : columns.shape[-1]] = torch.where(torch.diagonal(r, dim1=1, dim2=2) < 0, -1.0, 1.0)
    q = q * signs[:, None]
    turn = torch.ones_like(signs)
    turn[:, 3] = torch.linalg.det(q).sign()
    return q * turn[:, None]


def _magic() -> QuantumCircuit:
    """A basis in which real gates of determinant 1 are products of two one-qubit gates."""
    circuit = QuantumCircuit(2)
    circuit.s([0, 1])
    circuit.h(1)
    circuit.cx(1, 0)
    return circuit


def _euler(gate: Tensor) -> Tensor:
    """Angles (R, 6) of rz, ry, rz on the higher qubit, then on the lower, that are the gate in the magic basis."""
    e = torch.from_numpy(Operator(_magic()).data)
    product = e @ gate.to(e.dtype) @ e.conj().T  # A kron B
    pairs = product.view(-1, 2, 2, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 4, 4)
    u, _, v = torch.linalg.svd(pairs)
    parts = []
    for x in (u[:, :, 0].reshape(-1, 2, 2), v[:, 0].reshape(-1, 2, 2)):
        x = x / torch.linalg.det(x).sqrt()[:, None, None]
        y = 2 * torch.atan2(x[:, 1, 0].abs(), x[:, 0, 0].abs())
        plus, minus = x[:, 1, 1].angle(), x[:, 1, 0].angle()  # half the sum and half the difference
        parts += [plus - minus, y, plus + minus]
    return torch.stack(parts, -1)
