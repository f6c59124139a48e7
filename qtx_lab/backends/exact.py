"""Outcome probabilities of noisy circuits for all rows at once, from density matrices in the Pauli basis.

These are the probabilities that a simulation of single shots converges to, also for circuits that measure and
branch on the way: the state is split into one branch for each value of the classical register, and a qubit is
traced out after its last use. Rows share everything but the angles, so that each fused pair of qubits is one
batched product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import product

import numpy as np
import torch
from qiskit import QuantumCircuit
from qiskit.circuit import ClassicalRegister, Clbit, Gate, Instruction, ParameterExpression, Reset
from qiskit.circuit.library import IGate, PauliGate, UnitaryGate, XGate, YGate, ZGate
from qiskit.quantum_info import PTM, Pauli
from qiskit_aer.noise import QuantumError
from torch import Tensor

GENERATORS = {"rx": "X", "ry": "Y", "rz": "Z", "p": "Z", "rxx": "XX", "ryy": "YY", "rzz": "ZZ"}
"""Gates exp(-i angle G / 2), up to a phase, and their G."""

MAX_STATE_NUMBERS = 4**8
"""Size of the largest state of a row that is computed here, in numbers: eight qubits at a time."""

WORKSPACE_NUMBERS = 1 << 19
"""Size of the states of the rows that are computed together, in numbers: 4 MiB stay in the cache."""

MAX_REGISTER_BITS = 62
"""A value of the register is kept in an int64."""

FIXED_OPERATIONS = {"id": IGate, "x": XGate, "y": YGate, "z": ZGate, "pauli": PauliGate, "reset": Reset}
"""Operations of a device's errors that have no numbers: their matrices are computed once."""


@dataclass(frozen=True)
class Noise:
    """The errors of a device: a channel after each gate, and wrong readings of measurements.

    Parameters
    ----------
    gates : mapping
        From (name of the gate, qubits) to its error channel: a `qiskit_aer.noise.QuantumError`, or another of
        Qiskit's channels.
    readout : mapping
        From a qubit to the 2 × 2 matrix P(read column | true row).
    """

    gates: Mapping[tuple[str, tuple[int, ...]], object]
    readout: Mapping[int, np.ndarray]
    _channels: dict[object, Tensor] = field(default_factory=dict, repr=False)

    def channel(self, gate: str, qubits: tuple[int, ...]) -> Tensor | None:
        """The error after a gate of k qubits in the Pauli basis, (4^k, 4^k); None where there is none."""
        key = (gate, qubits)
        if key in self.gates and key not in self._channels:
            self._channels[key] = torch.from_numpy(pauli_transfer_matrix(self.gates[key]))
        return self._channels.get(key)


def pauli_transfer_matrix(channel: object) -> np.ndarray:
    """A channel of k qubits in the Pauli basis, float64 (4^k, 4^k), as `qiskit.quantum_info.PTM` gives it.

    A `QuantumError` is a mixture of some 80 circuits of the same few operations. `PTM` turns every one of
    them into a superoperator; here Paulis and resets become matrices once, and Kraus operators once an error.
    """
    if not isinstance(channel, QuantumError):
        return PTM(channel).data.real.copy()
    k, kraus = channel.num_qubits, dict[tuple[object, ...], np.ndarray]()
    total = np.zeros((4**k, 4**k))
    for circuit, probability in zip(channel.circuits, channel.probabilities, strict=True):
        of_circuit = np.eye(4**k)
        for instruction in circuit.data:
            operation = instruction.operation
            qubits = tuple(circuit.find_bit(q).index for q in instruction.qubits)
            if operation.name in FIXED_OPERATIONS:
                matrix = _fixed_matrix(operation.name, tuple(operation.params), qubits, k)
            elif operation.name == "kraus":  # of one qubit's relaxation, in every circuit
                key = (qubits, *(x.tobytes() for x in operation.params))
                if key not in kraus:
                    kraus[key] = _matrix_on(operation, qubits, k)
                matrix = kraus[key]
            else:
                matrix = _matrix_on(operation, qubits, k)
            of_circuit = matrix @ of_circuit
        total += probability * of_circuit
    return total


@cache
def _fixed_matrix(name: str, parameters: tuple[str, ...], qubits: tuple[int, ...], k: int) -> np.ndarray:
    return _matrix_on(FIXED_OPERATIONS[name](*parameters), qubits, k)


def _matrix_on(operation: Instruction, qubits: tuple[int, ...], k: int) -> np.ndarray:
    """An operation on some of k qubits, in the Pauli basis."""
    circuit = QuantumCircuit(k)
    circuit.append(operation, qubits)
    matrix: np.ndarray = PTM(circuit).data.real
    return matrix


@dataclass(frozen=True)
class Step:
    """One instruction of a compiled circuit, on numbered qubits and bits."""

    name: str
    qubits: tuple[int, ...]
    clbits: tuple[int, ...] = ()
    matrix: Tensor | None = None
    """A fixed gate with its error, or the error of a rotation, in the Pauli basis: (4^k, 4^k)."""
    angle: tuple[float, np.ndarray] | None = None
    """A rotation's angle: the constant, and the coefficients of the parameters."""
    condition: tuple[int, int] | None = None
    """(mask, value): the first of `bodies` is run where register & mask == value, the second elsewhere."""
    bodies: tuple[tuple[Step, ...], ...] = ()


class _TooGeneral(Exception):
    """Only `AerSimulator` runs the circuit: measurements in a branch, large gates, nonlinear angles."""


def compile_steps(circuit: QuantumCircuit, noise: Noise) -> tuple[Step, ...] | None:
    """The circuit's instructions, ready to run.

    Parameters
    ----------
    circuit : QuantumCircuit
        Transpiled.
    noise : Noise
        Errors of its gates and measurements.

    Returns
    -------
    tuple of Step or None
        None where the circuit is too large, or has instructions that are not supported here.
    """
    index = {parameter: i for i, parameter in enumerate(circuit.parameters)}
    clbit = {bit: i for i, bit in enumerate(circuit.clbits)}
    try:
        steps = tuple(_steps(circuit, circuit, list(range(circuit.num_qubits)), clbit, index, noise))
    except _TooGeneral:
        return None
    measured = [step.clbits[0] for step in steps if step.name == "measure"]
    if len(set(measured)) < len(measured) or len(clbit) > MAX_REGISTER_BITS:
        return None
    return steps if _largest_state(steps) <= MAX_STATE_NUMBERS else None


def _steps(
    circuit: QuantumCircuit,
    body: QuantumCircuit,
    wires: list[int],
    clbit: Mapping[Clbit, int],
    index: Mapping[ParameterExpression, int],
    noise: Noise,
) -> Iterator[Step]:
    for instruction in body.data:
        operation = instruction.operation
        name = operation.name
        qubits = tuple(wires[body.find_bit(q).index] for q in instruction.qubits)
        if name == "barrier":
            continue
        if name == "measure":
            if body is not circuit:
                raise _TooGeneral
            yield Step(name, qubits, (clbit[instruction.clbits[0]],), _measurement(noise, qubits[0]))
        elif name == "if_else":
            # Blocks have bits of their own, in the instruction's order; conditions name those outside.
            inner = [
                tuple(_steps(circuit, block, list(qubits), clbit, index, noise))
                for block in operation.blocks
                if block is not None
            ]
            used = tuple(sorted({q for steps in inner for step in steps for q in step.qubits}))
            mask_value = _condition(operation.condition, clbit)
            yield Step(name, used, condition=mask_value, bodies=tuple(inner))
        elif not isinstance(operation, Gate) or len(qubits) > 2:
            raise _TooGeneral
        else:
            # A wait is an identity gate whose label says how long it lasts.
            labelled = operation.label is not None and (operation.label, qubits) in noise.gates
            after = noise.channel(operation.label if labelled else name, qubits)
            angles = [x for x in operation.params if isinstance(x, ParameterExpression)]
            if not angles:
                gate = _gate(operation)
                yield Step(name, qubits, matrix=gate if after is None else after @ gate)
            elif name in GENERATORS and len(operation.params) == 1:
                yield Step(name, qubits, matrix=after, angle=_linear(angles[0], index))
            else:
                raise _TooGeneral


def _measurement(noise: Noise, qubit: int) -> Tensor:
    """What reading 0, and reading 1, does to a qubit's state in the Pauli basis, (2, 4, 4).

    For a bit r that is read: the sum over the true bits of P(r | true) times the projection on the true bit.
    """
    misread = torch.as_tensor(noise.readout.get(qubit, np.eye(2)), dtype=torch.float64)
    half = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2  # components of I and Z
    out = torch.zeros(2, 4, 4, dtype=torch.float64)
    for true in (0, 1):
        projection = torch.outer(half[true] * 2, half[true])
        out[:, [[0], [3]], [[0, 3]]] += misread[true, :, None, None] * projection
    return out


def _condition(condition: object, clbit: Mapping[Clbit, int]) -> tuple[int, int]:
    """(mask, value) of a condition on bits of the register."""
    if not isinstance(condition, tuple):
        raise _TooGeneral  # a classical expression
    bits, value = condition
    if isinstance(bits, Clbit):
        return 1 << clbit[bits], int(value) << clbit[bits]
    assert isinstance(bits, ClassicalRegister)
    mask = sum(1 << clbit[bit] for bit in bits)
    return mask, sum((int(value) >> i & 1) << clbit[bit] for i, bit in enumerate(bits))


def _linear(angle: ParameterExpression, index: Mapping[ParameterExpression, int]) -> tuple[float, np.ndarray]:
    """(constant, coefficients) of an angle that is linear in the parameters."""
    coefficients = np.zeros(len(index))
    for parameter in angle.parameters:
        slope = angle.gradient(parameter)
        if isinstance(slope, ParameterExpression) and slope.parameters:
            raise _TooGeneral
        coefficients[index[parameter]] = float(slope)
    return float(angle.bind(dict.fromkeys(angle.parameters, 0.0))), coefficients


def _largest_state(steps: tuple[Step, ...]) -> int:
    """Size of a row's largest state while the steps run, in numbers."""
    last = {q: i for i, step in enumerate(steps) for q in step.qubits}
    live: set[int] = set()
    branches, largest = 1, 1
    for i, step in enumerate(steps):
        live |= set(step.qubits)
        branches *= 2 if step.name == "measure" else 1
        largest = max(largest, branches * 4 ** len(live) // (2 if step.name == "measure" else 1))
        live -= {q for q in step.qubits if last[q] == i}
    return largest


def outcome_probabilities(
    steps: tuple[Step, ...], bindings: np.ndarray, *, signed: bool = False
) -> tuple[Tensor, np.ndarray]:
    """Probabilities of the values of the register.

    Parameters
    ----------
    steps : tuple of Step
        As `compile_steps` returns them.
    bindings : ndarray, float64, (R, P)
        Values of the circuit's parameters.
    signed : bool
        Whether channels are quasi-probabilities, so that results below 0 are no rounding errors.

    Returns
    -------
    probabilities : Tensor, float64, (R, V)
        Of each value, for each row.
    values : ndarray, int64, (V,)
        The values of the register, ascending. Others do not occur.
    """
    if bindings.shape[-1]:  # random Paulis, most of which are none, leave few bindings that differ
        distinct, place = np.unique(bindings, axis=0, return_inverse=True)
        if len(distinct) < len(bindings):
            probabilities, values = outcome_probabilities(steps, distinct, signed=signed)
            return probabilities[torch.from_numpy(place.reshape(-1))], values
    together = max(1, WORKSPACE_NUMBERS // _largest_state(steps))
    parts = []
    values = np.zeros(1, dtype=np.int64)
    with _one_thread():
        for start in range(0, len(bindings), together):
            state = _State(torch.from_numpy(np.ascontiguousarray(bindings[start : start + together])))
            state.run(steps)
            probabilities, values = state.probabilities()
            parts.append(probabilities if signed else probabilities.clamp_min(0))
    return torch.cat(parts), values


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: products this small lose more by waiting than they gain.

    On several threads they would also be rounded differently for each number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def density_matrices(steps: tuple[Step, ...], bindings: np.ndarray) -> Tensor:
    """The states before they are measured, of circuits that measure every qubit once, at the end.

    Returns
    -------
    Tensor, complex128, (R, 2^m, 2^m)
        Qubits are in the order of the register's bits.
    """
    measured = sorted((step for step in steps if step.name == "measure"), key=lambda step: step.clbits)
    state = _State(torch.from_numpy(np.ascontiguousarray(bindings)))
    state.run(tuple(step for step in steps if step.name != "measure"))
    qubits = [step.qubits[0] for step in reversed(measured)]  # the highest bit first
    state.prepare(tuple(qubits))
    state.settle(tuple(qubits))
    rho = state.vector[:, 0].permute(0, *(1 + state.live.index(q) for q in qubits)).to(torch.complex128)
    paulis = torch.from_numpy(np.stack([_pauli(x) for x in "IXYZ"]) / 2)
    for _ in qubits:  # each digit in turn becomes a row and a column, at the end
        rho = torch.tensordot(rho, paulis, dims=([1], [0]))
    m = len(qubits)
    rho = rho.permute(0, *range(1, 2 * m, 2), *range(2, 2 * m + 1, 2))
    return rho.reshape(len(bindings), 1 << m, 1 << m)


class _State:
    """States of R rows in B branches of the register's values.

    `vector` (R, B, 4, ..., 4) has Tr(P rho) of each Pauli string P on the live qubits, an axis for each of
    them.
    """

    def __init__(self, bindings: Tensor):
        self.bindings = bindings  # [R, P]
        self.vector = torch.ones(len(bindings), 1, dtype=torch.float64)
        self.values = np.zeros(1, dtype=np.int64)  # [B], the register's value
        self.live: list[int] = []
        self.pending: dict[tuple[int, ...], Tensor] = {}  # by qubits: products of gates not applied yet

    def run(self, steps: tuple[Step, ...]) -> None:
        """Run the steps, in their order."""
        last = {q: i for i, step in enumerate(steps) for q in step.qubits}
        for i, step in enumerate(steps):
            self.prepare(step.qubits)
            if step.name == "measure":
                self.measure(step, last[step.qubits[0]] == i)
            elif step.condition is not None:
                self.branch(step)
            else:
                self.gate(step)

    def prepare(self, qubits: tuple[int, ...]) -> None:
        """Add qubits that are not live yet, in the state 0."""
        for q in qubits:
            if q not in self.live:
                zero = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
                self.vector = self.vector[..., None] * zero
                self.live.append(q)

    def gate(self, step: Step) -> None:
        """Multiply a gate onto what is pending on the same qubits."""
        qubits = step.qubits
        matrix = self._matrix(step)  # [R or 1, 4^k, 4^k]
        holder = next((key for key in self.pending if set(qubits) <= set(key)), None)
        if holder is None:
            inside = [key for key in self.pending if set(key) & set(qubits)]
            if len(qubits) == 2:
                # The second qubit is the higher digit.
                before = _kron(*(self.pending.pop((q,), None) for q in reversed(qubits)))
                inside = [key for key in inside if len(key) == 2]
                matrix = matrix if before is None else matrix @ before
            for key in inside:
                self.flush(key)
            self.pending[qubits] = matrix
            return
        if len(holder) == 2 and len(qubits) == 1:
            widened = _kron(matrix, None) if holder[1] == qubits[0] else _kron(None, matrix)
            assert widened is not None
            matrix = widened
        elif len(holder) == 2 and holder != qubits:  # the same pair the other way round
            matrix = matrix.view(-1, 4, 4, 4, 4).permute(0, 2, 1, 4, 3).reshape(-1, 16, 16)
        self.pending[holder] = matrix @ self.pending[holder]

    def _matrix(self, step: Step) -> Tensor:
        """A gate with its error in the Pauli basis, (R, 4^k, 4^k), or (1, 4^k, 4^k) where rows share it."""
        matrix = step.matrix
        if step.angle is not None:
            constant, coefficients = step.angle
            used = np.flatnonzero(coefficients)
            angle = constant + self.bindings[:, used] @ torch.from_numpy(coefficients[used])
            turn, turn2 = _generator(GENERATORS[step.name])
            rotation = (
                torch.eye(len(turn), dtype=torch.float64)
                + angle.sin()[:, None, None] * turn
                + (1 - angle.cos())[:, None, None] * turn2
            )
            matrix = rotation if matrix is None else matrix @ rotation
        assert matrix is not None
        return matrix.view(-1, *matrix.shape[-2:])

    def flush(self, key: tuple[int, ...]) -> None:
        """Apply what is pending on these qubits."""
        matrix = self.pending.pop(key)
        axes = [2 + self.live.index(q) for q in reversed(key)]
        front = self.vector.movedim(axes, list(range(1, 1 + len(axes))))
        out = torch.matmul(matrix, front.reshape(len(self.vector), 4 ** len(axes), -1))
        self.vector = out.view(front.shape).movedim(list(range(1, 1 + len(axes))), axes)

    def settle(self, qubits: tuple[int, ...]) -> None:
        """Apply everything that is pending on these qubits."""
        for key in [key for key in self.pending if set(key) & set(qubits)]:
            self.flush(key)

    def measure(self, step: Step, last_use: bool) -> None:
        """Split every branch by the bit that is read; trace the qubit out after its last use."""
        q, bit = step.qubits[0], step.clbits[0]
        self.settle((q,))
        assert step.matrix is not None
        axis = 2 + self.live.index(q)
        rows = step.matrix[:, :1] if last_use else step.matrix  # [2, 1 or 4, 4]; I alone is the trace
        split = torch.tensordot(self.vector, rows, dims=([axis], [2]))  # [R, B, ..., 2, 1 or 4]
        split = split.movedim(-2, 2)
        if last_use:
            split = split.squeeze(-1)
            self.live.remove(q)
        else:
            split = split.movedim(-1, axis + 1)
        self.vector = split.flatten(1, 2)
        self.values = (self.values[:, None] | np.array([0, 1 << bit])).reshape(-1)

    def branch(self, step: Step) -> None:
        """Run each body in the branches that meet its condition."""
        self.settle(step.qubits)
        assert step.condition is not None
        mask, value = step.condition
        holds = (self.values & mask) == value
        for body, which in zip(step.bodies, (holds, ~holds), strict=False):
            chosen = torch.from_numpy(np.flatnonzero(which))
            if not body or not len(chosen):
                continue
            inner = _State(self.bindings)
            inner.live, inner.vector = list(self.live), self.vector[:, chosen]
            for part in body:
                inner.branch(part) if part.condition is not None else inner.gate(part)
            inner.settle(tuple(inner.live))
            self.vector = self.vector.index_copy(1, chosen, inner.vector)

    def probabilities(self) -> tuple[Tensor, np.ndarray]:
        """Probabilities (R, V) of the register's values (V,), which ascend."""
        self.settle(tuple(self.live))
        trace = self.vector.reshape(*self.vector.shape[:2], -1)[:, :, 0]
        order = np.argsort(self.values)
        return trace[:, order], self.values[order]


def _kron(high: Tensor | None, low: Tensor | None) -> Tensor | None:
    """Matrices (R or 1, 4, 4) on the higher and lower digit as one (R or 1, 16, 16); None is the identity."""
    if high is None and low is None:
        return None
    eye = torch.eye(4, dtype=torch.float64)[None]
    both = torch.einsum(
        "rab,rcd->racbd", *torch.broadcast_tensors(*(eye if x is None else x for x in (high, low)))
    )
    return both.reshape(-1, 16, 16)


def _gate(operation: Gate) -> Tensor:
    """A fixed gate U of k qubits in the Pauli basis, (4^k, 4^k): 2^-k Tr(P_i U P_j U^+)."""
    u = operation.to_matrix()
    labels = ["".join(x) for x in product("IXYZ", repeat=operation.num_qubits)]
    paulis = np.stack([_pauli(label) for label in labels])
    turned = u @ paulis @ u.conj().T
    return torch.from_numpy(np.einsum("iab,jba->ij", paulis, turned).real / len(u))


@cache
def _pauli(label: str) -> np.ndarray:
    return Pauli(label).to_matrix()


@cache
def _generator(label: str) -> tuple[Tensor, Tensor]:
    """K and K^2 of rho -> -i/2 [G, rho] in the Pauli basis: exp(a K) = 1 + sin(a) K + (1 - cos a) K^2."""
    g = _pauli(label)
    plus = _gate(UnitaryGate((np.eye(len(g)) - 1j * g) / np.sqrt(2)))  # exp(-i pi G / 4): 1 + K + K^2
    turn = (plus - plus.T) / 2  # its transpose is 1 - K + K^2
    return turn, turn @ turn
