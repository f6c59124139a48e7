"""Amplitude estimation of a row's mean value: planes of signs, and circuits of Grover iterates on a line.

A mean value sum_j p_j v_j is a weighted sum of differences P(s = 1) - P(s = -1), one for each plane of
signs s_j (`sign_planes`). For each of them, a circuit loads the row as |p> = sum_j sqrt(p_j) |j> and
applies k Grover iterates: the signs D = diag(s), then the reflection about |p>, that is the inverse of
the loader, a reflection about the state 0, and the loader. A measured key has the sign -1 with the
probability sin²((2k + 1) theta), where sin² theta = P(s = -1).

Signs need no ancilla, while a value that is rotated into one makes all circuits a qubit wider, and the
reflection about 0 the more costly. Only the loader depends on the row, and only the signs depend on the
values: no circuit knows the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from qiskit import QuantumCircuit
from qiskit.circuit import ParameterExpression, ParameterVector
from torch import Tensor

from ..checks import check_count
from .base import blank_circuit, check_num_qubits, node_angles, num_bits, walsh_hadamard

NUM_LOAD_ANGLES = {1: 1, 2: 3, 3: 8, 4: 15}
"""Number of angles of the loader, by the number of qubits."""

MAX_QUBITS = 4
"""Most qubits of these circuits: sixteen keys. A device's noise leaves no advantage at more keys."""

PARITY_NETWORKS: dict[int, tuple[tuple[int, int], ...]] = {
    1: (),
    2: ((1, 0), (1, 0)),
    3: ((1, 2), (0, 1), (1, 2), (0, 1)) * 2,
    4: (
        *((0, 1), (2, 1), (1, 0), (3, 2), (2, 1), (0, 1), (3, 2), (2, 1), (1, 0)),
        *((3, 2), (2, 1), (0, 1), (3, 2), (2, 1), (1, 0), (3, 2), (2, 1), (3, 2)),
    ),
}
"""(control, target) of CNOT gates between neighbours on a line of qubits, by the number of qubits.

While they run, every parity of the qubits stands on a qubit once at least; at the end, each qubit is as
it was. The shortest ones for up to three qubits, and the shortest that a beam search found for four.
"""


@dataclass(frozen=True, eq=False)
class SignPlanes:
    """Values v_j = centre + sum_t weights_t signs_tj + residual_j.

    Parameters
    ----------
    centre : Tensor, float64, (..., 1)
        The middle between the values of the lowest and the highest level.
    weights : Tensor, float64, (..., T)
        Weights >= 0. Their sum is the scale of the planes: half of the difference between those two values.
    signs : Tensor, int8, (..., T, n)
        1 or -1 for each plane and key.
    residual : Tensor, float64, (..., n)
        What the planes leave of the values; 0 if there is a plane for each gap.
    """

    centre: Tensor
    weights: Tensor
    signs: Tensor
    residual: Tensor


def sign_planes(v: Tensor, planes: int | None = None) -> SignPlanes:
    """Write values as a weighted sum of signs, with a plane for each of the widest gaps between them.

    A plane has the sign 1 at the keys whose values are above its gap. Gaps divide the values into levels,
    each of which stands for the middle of its values. With a plane for each gap nothing is left, and of
    all ways to write values by signs this one has the least possible sum of weights.

    Parameters
    ----------
    v : Tensor, float64, (..., n)
        Values of n >= 2 keys.
    planes : int, optional
        The number of planes T, from 1 to n - 1; n - 1 where None.

    Returns
    -------
    SignPlanes
        Where keys have equal values, planes have the weight 0.

    Raises
    ------
    ArgumentError
        If planes is not from 1 to n - 1.

    Examples
    --------
    >>> planes = sign_planes(torch.tensor([0.0, 3.0, 1.0]))
    >>> planes.centre, planes.weights
    (tensor([1.5000]), tensor([0.5000, 1.0000]))
    >>> planes.signs
    tensor([[-1,  1,  1],
            [-1,  1, -1]], dtype=torch.int8)
    >>> sign_planes(torch.tensor([0.0, 3.0, 1.0]), planes=1).residual
    tensor([-0.5000,  0.0000,  0.5000])
    """
    n = v.shape[-1]
    planes = check_count("planes", n - 1 if planes is None else planes, 1, n - 1)
    order = v.argsort(dim=-1, stable=True)
    rank = order.argsort(dim=-1)
    ascending = v.gather(-1, order)
    gaps = ascending.diff(dim=-1).topk(planes, dim=-1).indices.sort(dim=-1).values  # [..., T]
    one = torch.ones_like(gaps[..., :1])
    first = torch.cat([0 * one, gaps + 1], -1)  # of each level, in ascending order
    last = torch.cat([gaps, (n - 1) * one], -1)
    middle = (ascending.gather(-1, first) + ascending.gather(-1, last)) / 2  # [..., T + 1]
    above = rank[..., None, :] > gaps[..., None]  # [..., T, n]
    return SignPlanes(
        (middle[..., :1] + middle[..., -1:]) / 2,
        middle.diff(dim=-1) / 2,
        torch.where(above, 1, -1).to(torch.int8),
        v - middle.gather(-1, above.sum(-2)),
    )


def amplitude_circuit(size: int, iterates: int) -> QuantumCircuit:
    """Build the circuit of `size` qubits that loads a row, applies Grover iterates, and measures the key.

    It uses the loader and its inverse 2 k + 1 times together. All two-qubit gates are between neighbours
    on a line of qubits. An iterate of 1, 2, 3 or 4 qubits has 0, 5, 22 or 54 of them.

    Parameters
    ----------
    size : int
        Number of qubits, from 1 to 4.
    iterates : int
        The number k >= 0 of Grover iterates.

    Returns
    -------
    QuantumCircuit
        Its parameters are what `amplitude_angles` computes. Those of the signs are missing where k is 0.

    Raises
    ------
    ArgumentError
        If size is not from 1 to 4, or iterates is below 0.

    Source: Brassard, Høyer, Mosca and Tapp, Quantum amplitude amplification and estimation (2002).

    Examples
    --------
    >>> [amplitude_circuit(3, k).num_nonlocal_gates() for k in (0, 1, 2)]
    [3, 25, 47]
    """
    check_num_qubits(size, MAX_QUBITS)
    iterates = check_count("iterates", iterates, 0)
    count = NUM_LOAD_ANGLES[size]
    angle = list(ParameterVector("a", count + ((1 << size) - 1 if iterates else 0)))
    load = _load(size, angle[:count])
    unload = [(name, qubits, -turn) for name, qubits, turn in reversed(load)]
    signs = _diagonal(size, angle[count:])
    gates = [*load, *iterates * [*signs, *unload, *_reflection(size), *load]] if iterates else load
    circuit = blank_circuit(size, f"amplitude-{iterates}")
    _append(circuit, gates)
    circuit.measure(range(size), range(size))
    return circuit


def amplitude_angles(p: Tensor, signs: Tensor) -> np.ndarray:
    """Compute the parameters of `amplitude_circuit` for rows and their signs.

    Parameters
    ----------
    p : Tensor, float64, (R, n)
        Rows of probabilities that `check_rows` returned.
    signs : Tensor, (R, n)
        1 or -1 for each key.

    Returns
    -------
    ndarray, float64, (R, P)
        Angles in radians, first those of the loader and then those of the signs.
    """
    size = num_bits(p.shape[-1])
    padded = F.pad(signs.double(), (0, (1 << size) - p.shape[-1]), value=1.0)
    return torch.cat([load_angles(p), diagonal_angles(padded)], -1).numpy()


def diagonal_angles(signs: Tensor) -> Tensor:
    """Compute the angles of rz gates on parities whose product is diag(signs), up to a common phase.

    Parameters
    ----------
    signs : Tensor, float64, (R, 2^m)
        1 or -1.

    Returns
    -------
    Tensor, float64, (R, 2^m - 1)
        Angles in radians of the parities 1, 2, ..., 2^m - 1, each a mask of qubits.
    """
    phases = torch.pi * (1 - signs) / 2
    return -2 * walsh_hadamard(phases)[..., 1:] / signs.shape[-1]


def load_angles(p: Tensor) -> Tensor:
    """Compute the angles of a loader on a line of qubits, which prepares sum_j ± sqrt(p_j) |j>.

    One and two qubits are loaded as a tree. Three and four are split into two halves by the singular
    values s_i of the amplitudes, sum_i s_i |u_i>|v_i>: the coefficients s are loaded, copied into both
    halves, and each half is turned to its vectors by a real gate. Signs do not matter, because they
    commute with the planes of signs.

    Source: Plesch and Brukner, Quantum-state preparation with universal gate decompositions (2011).

    Parameters
    ----------
    p : Tensor, float64, (R, n)
        Rows of probabilities, n <= 16.

    Returns
    -------
    Tensor, float64, (R, P)
        Angles in radians: 1, 3, 8 or 15 of them.
    """
    size = num_bits(p.shape[-1])
    if size == 1:
        return node_angles(p)
    if size == 2:
        return _two_qubit_angles(F.pad(p, (0, 4 - p.shape[-1])).sqrt())
    amplitudes = F.pad(p, (0, (1 << size) - p.shape[-1])).sqrt().view(len(p), -1, 4)
    u, s, vh = torch.linalg.svd(amplitudes)
    v = vh.mT.clone()
    if size == 3:
        s[:, 1] *= torch.linalg.det(u).sign()
        u[:, :, 1] *= torch.linalg.det(u).sign()[:, None]
        coefficient = 2 * torch.atan2(s[:, 1:], s[:, :1])
        turn = 2 * torch.atan2(u[:, 1, :1], u[:, :1, 0].view(-1, 1))
        gate = v[:, :, [0, 2, 1, 3]]  # the vectors stand where the lower qubit is 0
        gate[:, :, 3] *= torch.linalg.det(gate).sign()[:, None]
        return torch.cat([coefficient, turn, _real_gate_angles(gate)], -1)
    left, right = u[:, :, [0, 1, 3, 2]], v  # the left half holds (A, A xor B), the right one (A, B)
    s[:, 3] *= torch.linalg.det(left).sign() * torch.linalg.det(right).sign()
    left[:, :, 2] *= torch.linalg.det(left).sign()[:, None]
    right[:, :, 3] *= torch.linalg.det(right).sign()[:, None]
    s[:, 3] *= -1  # the tree of two qubits leaves this sign
    return torch.cat([_two_qubit_angles(s), _real_gate_angles(left), _real_gate_angles(right)], -1)


def _two_qubit_angles(amplitudes: Tensor) -> Tensor:
    """Angles (R, 3) of the tree of real amplitudes (R, 4), which comes out with the last one negated."""
    pairs = amplitudes.view(-1, 2, 2)
    first = 2 * torch.atan2(pairs[:, 1].norm(dim=-1), pairs[:, 0].norm(dim=-1))
    low, high = (2 * torch.atan2(pairs[:, :, 1], pairs[:, :, 0])).unbind(-1)
    return torch.stack([first, (low + high) / 2, (low - high) / 2], -1)


def _real_gate_angles(gate: Tensor) -> Tensor:
    """Angles (R, 6) of the ry gates that, with two CZ gates between them, make real gates (R, 4, 4).

    A real gate of determinant 1 is a product of two commuting factors, each of them a rotation of three
    angles: one about YI, ZY and YI, the other about IY, YZ and IY. ZY and YZ are ry gates between two CZ
    gates.

    Source: Vatan and Williams, Optimal quantum circuits for general two-qubit gates (2004).

    Returns
    -------
    Tensor, float64, (R, 6)
        Of the higher and the lower qubit, before, between and after the CZ gates.
    """
    one, x = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64).flip(0)
    z = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    y = x @ z  # -i Y
    first = torch.stack([torch.kron(a, b) for a, b in ((one, one), (y, one), (z, y), (x, y))])
    second = torch.stack([torch.kron(a, b) for a, b in ((one, one), (one, y), (y, z), (y, x))])
    products = torch.einsum("iab,jbc->ijac", first, second)
    u, _, vh = torch.linalg.svd(torch.einsum("ijac,rac->rij", products, gate) / 4)  # of rank 1
    before_high, between_low, after_high = _euler_angles(u[:, :, 0])
    before_low, between_high, after_low = _euler_angles(vh[:, 0])
    return torch.stack([before_high, before_low, between_high, between_low, after_high, after_low], -1)


def _euler_angles(quaternion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Angles (R,) of rotations about Y, then Z, then Y, whose product is 1, -iY, -iZ, -iX times (R, 4)."""
    one, y, z, x = quaternion.unbind(-1)
    half_sum, half_difference = torch.atan2(y, one), torch.atan2(x, z)
    middle = 2 * torch.atan2(torch.hypot(z, x), torch.hypot(one, y))
    return half_sum - half_difference, middle, half_sum + half_difference


Gate = tuple[str, tuple[int, ...], Any]
"""Name (ry, rz, cz), qubits, and the angle in radians, a number or a parameter; 0 for cz."""


def _load(size: int, angle: Sequence[Any]) -> list[Gate]:
    """Gates of the loader; see `load_angles`."""
    if size == 1:
        return [("ry", (0,), angle[0])]
    if size == 2:
        return _tree(1, 0, angle)
    if size == 3:
        turned = ("ry", (2,), angle[1])
        return [("ry", (2,), angle[0]), *_cx(2, 1), turned, *_real_gate(1, 0, angle[2:])]
    return [
        *_tree(2, 1, angle[:3]),
        *(gate for pair in ((2, 3), (1, 2), (1, 0), (2, 1)) for gate in _cx(*pair)),
        *_real_gate(3, 2, angle[3:9]),
        *_real_gate(1, 0, angle[9:]),
    ]


def _tree(high: int, low: int, angle: Sequence[Any]) -> list[Gate]:
    turns: list[Gate] = [("ry", (q,), a) for q, a in zip((high, low, low), angle, strict=True)]
    return [*turns[:2], ("cz", (high, low), 0.0), turns[2]]


def _real_gate(high: int, low: int, angle: Sequence[Any]) -> list[Gate]:
    turns: list[Gate] = [("ry", (q,), a) for q, a in zip((high, low) * 3, angle, strict=True)]
    entangle: Gate = ("cz", (high, low), 0.0)
    return [*turns[:2], entangle, *turns[2:4], entangle, *turns[4:]]


def _cx(control: int, target: int) -> list[Gate]:
    half = np.pi / 2
    return [("ry", (target,), -half), ("cz", (control, target), 0.0), ("ry", (target,), half)]


def _diagonal(size: int, angle: Sequence[Any]) -> list[Gate]:
    """rz gates of all parities 1, 2, ..., 2^m - 1, each where a qubit first holds the parity."""
    if not angle:
        return []
    held = [1 << q for q in range(size)]
    gates: list[Gate] = [("rz", (q,), angle[parity - 1]) for q, parity in enumerate(held)]
    turned = set(held)
    for control, target in PARITY_NETWORKS[size]:
        gates += _cx(control, target)
        held[target] ^= held[control]
        if held[target] not in turned:
            turned.add(held[target])
            gates.append(("rz", (target,), angle[held[target] - 1]))
    return gates


def _reflection(size: int) -> list[Gate]:
    """The reflection about the state 0, up to its sign."""
    if size == 2:
        return [("rz", (0,), np.pi), ("rz", (1,), np.pi), ("cz", (1, 0), 0.0)]
    signs = torch.ones(1, 1 << size, dtype=torch.float64)
    signs[0, 0] = -1
    return _diagonal(size, diagonal_angles(signs)[0].tolist())


def _append(circuit: QuantumCircuit, gates: Sequence[Gate]) -> None:
    """Append gates; rotations of a qubit by ry that follow each other become one."""
    pending: dict[int, Any] = {}

    def flush(qubits: Sequence[int]) -> None:
        for qubit in qubits:
            turn = pending.pop(qubit, 0.0)
            if isinstance(turn, ParameterExpression) or abs(turn) > 1e-12:
                circuit.ry(turn, qubit)

    for name, qubits, turn in gates:
        if name == "ry":
            pending[qubits[0]] = pending.get(qubits[0], 0.0) + turn
            continue
        flush(qubits)
        if name == "rz":
            circuit.rz(turn, qubits[0])
        else:
            circuit.cz(*qubits)
    flush(sorted(pending))
