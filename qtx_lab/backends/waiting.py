"""Qubits that wait while others are measured and bits are fed forward: how long, and how they decohere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from qiskit import QuantumCircuit
from qiskit.circuit import Clbit, ControlFlowOp, Qubit
from qiskit.circuit.controlflow import IfElseOp, condition_resources
from qiskit.circuit.library import IGate
from qiskit.transpiler import Target
from qiskit_aer.noise import QuantumError, thermal_relaxation_error

from ..errors import BackendUnavailable

TYPICAL_FEED_FORWARD_LATENCY_S = 0.65e-6
"""From a bit that is read to a gate that depends on it, seconds.

An assumption of the order of a microsecond, which was not measured here and which no device's calibration
tells. That qubits idle while others are measured and bits are fed forward is a main source of error of
dynamic circuits on IBM's devices: Bäumer et al., Efficient long-range entanglement using dynamic circuits
(2023, arXiv:2308.13065), who count it in their error budget.
"""


@dataclass(frozen=True)
class WaitingCircuit:
    """A circuit with its waits.

    Parameters
    ----------
    circuit : QuantumCircuit
        As before, with an identity gate for each wait, whose label says how long it lasts.
    errors : dict
        From (label, (qubit,)) to what the wait does to the qubit.
    """

    circuit: QuantumCircuit
    errors: dict[tuple[str, tuple[int, ...]], QuantumError]


def with_waits(circuit: QuantumCircuit, target: Target, latency: float) -> WaitingCircuit:
    """Put thermal relaxation where qubits wait for others.

    Instructions start as early as they can. A condition is evaluated once its bits are read and the condition
    before it is over, and takes the latency: conditions stand one after the other, each takes it anew. Qubits
    that no gate has touched are in their ground state, which relaxation leaves alone.

    Parameters
    ----------
    circuit : QuantumCircuit
        Transpiled, on the qubits of the target.
    target : Target
        Durations of gates and measurements, and T1 and T2 of the qubits.
    latency : float
        Seconds from the end of a measurement to a gate that depends on its bit.

    Raises
    ------
    BackendUnavailable
        If the device does not tell how long a measurement lasts, or T1 and T2; for loops, and conditions
        inside of conditions.
    """
    free = dict.fromkeys(range(circuit.num_qubits), 0.0)  # when each qubit's last instruction is over
    touched: set[int] = set()
    ready: dict[Clbit, float] = {}
    last_condition = 0.0
    out = circuit.copy_empty_like()
    errors: dict[tuple[str, tuple[int, ...]], QuantumError] = {}
    for instruction in circuit.data:
        operation = instruction.operation
        wires = [circuit.find_bit(q).index for q in instruction.qubits]
        start = max((free[q] for q in wires), default=0.0)
        conditional = isinstance(operation, ControlFlowOp)
        if conditional:
            if not isinstance(operation, IfElseOp) or any(
                isinstance(i.operation, ControlFlowOp) for block in operation.blocks if block for i in block
            ):
                raise BackendUnavailable(
                    f"{circuit.name} has loops, or conditions inside of conditions, whose waits are not "
                    "modelled: leave out feed_forward_latency."
                )
            bits = condition_resources(operation.condition).clbits
            evaluated = max([last_condition, *(ready.get(bit, 0.0) for bit in bits)]) + latency
            start = max(start, evaluated)
            duration = max(_block_duration(block, wires, target) for block in operation.blocks if block)
            last_condition = start + duration
        else:
            duration = _duration(target, operation.name, wires)
        for q in wires:
            if q in touched and start > free[q]:
                label = f"wait {(start - free[q]) * 1e9:.1f} ns"
                if (label, (q,)) not in errors:
                    errors[label, (q,)] = _relaxation(target, q, start - free[q])
                out.append(IGate(label=label), [q])
        out.append(operation, instruction.qubits, instruction.clbits)
        if operation.name != "barrier":
            touched |= set(wires)
        for q in wires:
            free[q] = start + duration
        if operation.name == "measure":
            ready[instruction.clbits[0]] = start + duration
    return WaitingCircuit(out, errors)


def shot_duration(
    circuit: QuantumCircuit, target: Target, latency: float = TYPICAL_FEED_FORWARD_LATENCY_S
) -> float:
    """Seconds from the first instruction of a shot to the end of its last one.

    Instructions start as early as they can; of a condition's branches the longest one counts, after the
    latency. An instruction of which the target tells no duration on its qubits takes the median of the
    device. A loop counts once.

    Parameters
    ----------
    circuit : QuantumCircuit
        Transpiled to the gates of the target.
    target : Target
    latency : float
        Seconds from the end of a measurement to a gate that depends on its bit.

    Examples
    --------
    >>> from .noise import fake_device
    >>> circuit = QuantumCircuit(1, 1)
    >>> circuit.measure(0, 0), circuit.measure(0, 0)
    (..., ...)
    >>> f"{1e6 * shot_duration(circuit, fake_device('fake_fez').target):.2f}"
    '3.12'
    """
    return _critical_path(circuit, list(range(circuit.num_qubits)), target, latency)


def _critical_path(circuit: QuantumCircuit, wires: list[int], target: Target, latency: float) -> float:
    """Seconds of a circuit, or of a condition's branch, on these qubits of the target."""
    over: dict[Qubit | Clbit, float] = {}
    for instruction in circuit.data:
        operation, bits = instruction.operation, (*instruction.qubits, *instruction.clbits)
        at = [wires[circuit.find_bit(q).index] for q in instruction.qubits]
        if isinstance(operation, ControlFlowOp):
            branches = (_critical_path(x, at, target, latency) for x in operation.blocks if x)
            duration = latency + max(branches, default=0.0)
        else:
            duration = _known_duration(target, operation.name, tuple(at))
        end = max((over.get(bit, 0.0) for bit in bits), default=0.0) + duration
        over.update(dict.fromkeys(bits, end))
    return max(over.values(), default=0.0)


def _known_duration(target: Target, name: str, wires: tuple[int, ...]) -> float:
    """How long an instruction lasts on its qubits, or else in the median of the device; 0 where unknown."""
    if name not in target.operation_names:
        return 0.0
    table = target[name]
    own = table.get(wires)
    if own is not None and own.duration is not None:
        return float(own.duration)
    known = [x.duration for x in table.values() if x is not None and x.duration is not None]
    return float(median(known)) if known else 0.0


def _block_duration(block: QuantumCircuit, wires: list[int], target: Target) -> float:
    """How long a branch lasts, its gates one after the other."""
    return math.fsum(
        _duration(target, i.operation.name, [wires[block.find_bit(q).index] for q in i.qubits])
        for i in block.data
    )


def _duration(target: Target, name: str, wires: list[int]) -> float:
    """How long an instruction lasts, seconds; 0 for what is done in software."""
    if name == "barrier" or name not in target.operation_names:
        return 0.0
    properties = target[name].get(tuple(wires))
    if properties is not None and properties.duration is not None:
        return float(properties.duration)
    if name == "measure":
        raise BackendUnavailable(
            "This noise does not say how long measurements last, which feed_forward_latency needs."
        )
    return 0.0


def _relaxation(target: Target, qubit: int, time: float) -> QuantumError:
    """What a wait does to a qubit."""
    given = target.qubit_properties[qubit] if target.qubit_properties else None
    if given is None or given.t1 is None or given.t2 is None:
        raise BackendUnavailable(
            f"This noise has no T1 and T2 of qubit {qubit}, which feed_forward_latency needs."
        )
    return thermal_relaxation_error(given.t1, min(given.t2, 2 * given.t1), time)
