"""`ParametricNoise`, given by a few numbers, and the noise of a real device on the qubits that are used."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import qiskit_ibm_runtime.fake_provider as fake_provider
from qiskit import QuantumCircuit
from qiskit.circuit import ControlFlowOp, Gate, Measure, Parameter, Qubit
from qiskit.circuit.controlflow import IfElseOp
from qiskit.circuit.library import CZGate, RZGate, SXGate, XGate
from qiskit.quantum_info import SuperOp
from qiskit.transpiler import InstructionProperties, QubitProperties, Target
from qiskit_aer.noise import (
    QuantumError,
    amplitude_damping_error,
    depolarizing_error,
    phase_damping_error,
)
from qiskit_aer.noise.device import basic_device_gate_errors, basic_device_readout_errors
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path

from ..checks import check_number
from ..errors import BackendUnavailable, DtypeError, unknown_name
from .exact import Noise

BROKEN_ERROR = 0.5
"""A gate or a measurement with at least this error is not used."""

MAX_READOUT_ERROR = 0.5
"""Above this a bit would rather be read as its opposite."""


class SimulatorNoise(ABC):
    """Noise of a simulator: the gates that it has, and what goes wrong after each.

    To add a noise model, write a frozen dataclass that derives from this one: its `repr` is shown in results
    and is part of the key under which transpiled circuits are cached. `QiskitQuantumBackend("aer",
    noise=...)` takes it.

    Examples
    --------
    Noise of measurements alone, on a device that has no other errors:

    >>> from dataclasses import dataclass
    >>> import numpy as np
    >>> from qtx_lab.backends import Noise, ParametricNoise, SimulatorNoise
    >>> @dataclass(frozen=True)
    ... class MisreadOnes(SimulatorNoise):
    ...     probability: float
    ...
    ...     def scaled(self, factor):
    ...         return MisreadOnes(min(1.0, self.probability * factor))
    ...
    ...     def target(self, num_qubits):
    ...         return ParametricNoise(readout=self.probability / 2).target(num_qubits)
    ...
    ...     def noise(self, num_qubits):
    ...         p = self.probability
    ...         return Noise({}, {q: np.array([[1, 0], [p, 1 - p]]) for q in range(num_qubits)})

    >>> import torch
    >>> from qtx_lab import QiskitQuantumBackend
    >>> backend = QiskitQuantumBackend("aer", noise=MisreadOnes(1.0))
    >>> backend.sample_rows(torch.tensor([[0.0, 1.0]]), 10).counts  # key 1 is always read as the masked key 0
    tensor([[0, 0]])
    """

    @property
    def num_qubits(self) -> int | None:
        """Number of the device's qubits; None for as many as a circuit needs."""
        return None

    def best_qubits(self, num_qubits: int, two_qubit_gates: int) -> list[int]:
        """The qubits, ascending, that a circuit of so many qubits and two-qubit gates runs on.

        By default the first ones: a device of a few numbers has the same noise everywhere.
        """
        return list(range(num_qubits))

    def best_line(self, two_qubit_gates: Sequence[int]) -> list[int]:
        """The qubits, in their order along a line, that a circuit runs on whose gates are between neighbours.

        By default the first ones. `two_qubit_gates` are the numbers of gates between each two neighbours.
        """
        return list(range(len(two_qubit_gates) + 1))

    def on(self, qubits: Sequence[int]) -> SimulatorNoise:
        """The noise of some of the qubits, which are then numbered 0, 1, ... in their order."""
        return self

    @abstractmethod
    def scaled(self, factor: float) -> SimulatorNoise:
        """The same noise, `factor` >= 0 times as strong."""

    @abstractmethod
    def target(self, num_qubits: int) -> Target:
        """The gates of a device with this noise, and their average errors.

        The transpiler and `predicted_fidelity` judge by these errors: they should agree with `noise`.
        """

    @abstractmethod
    def noise(self, num_qubits: int) -> Noise:
        """The error channel of each gate and the readout error of each qubit of that device."""


@dataclass(frozen=True)
class ParametricNoise(SimulatorNoise):
    """The same noise on every qubit of a device with gates rz, sx, x and cz between all pairs of qubits.

    Parameters
    ----------
    one_qubit : float
        Depolarising probability after sx and x. rz is done in software and has no error.
    two_qubit : float
        Depolarising probability after cz.
    amplitude_damping, phase_damping : float
        Probability that 1 decays to 0, or that the phase is lost, for each qubit of each sx, x and cz.
    readout : float
        Probability that a bit is read wrongly, at most 0.5.

    Raises
    ------
    ArgumentError
        If a probability is out of its bounds.

    Examples
    --------
    >>> ParametricNoise(two_qubit=0.01, readout=0.3).scaled(2).readout
    0.5
    """

    one_qubit: float = 0.0
    two_qubit: float = 0.0
    amplitude_damping: float = 0.0
    phase_damping: float = 0.0
    readout: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, check_number(name, value, least=0, most=_limit(name)))

    def scaled(self, factor: float) -> ParametricNoise:
        """Noise whose probabilities are multiplied by `factor`, up to their upper bounds."""
        factor = check_number("factor", factor, least=0)
        return ParametricNoise(
            **{name: min(value * factor, _limit(name)) for name, value in vars(self).items()}
        )

    def target(self, num_qubits: int) -> Target:
        target = Target(num_qubits=num_qubits)
        single = InstructionProperties(error=channel_infidelity(self._channel(self.one_qubit, 1)))
        double = InstructionProperties(error=channel_infidelity(self._channel(self.two_qubit, 2)))
        qubits = range(num_qubits)
        for gate, properties in ((SXGate(), single), (XGate(), single), (RZGate(Parameter("a")), None)):
            target.add_instruction(gate, {(q,): properties for q in qubits})
        if num_qubits > 1:
            pairs = {(a, b): double for a in qubits for b in qubits if a != b}
            target.add_instruction(CZGate(), pairs)
        target.add_instruction(Measure(), {(q,): InstructionProperties(error=self.readout) for q in qubits})
        target.add_instruction(IfElseOp, name="if_else")
        return target

    def noise(self, num_qubits: int) -> Noise:
        single, double = self._channel(self.one_qubit, 1), self._channel(self.two_qubit, 2)
        gates: dict[tuple[str, tuple[int, ...]], object] = {}
        qubits = range(num_qubits)
        if single is not None:
            gates |= {(name, (q,)): single for name in ("sx", "x") for q in qubits}
        if double is not None:
            gates |= {("cz", (a, b)): double for a in qubits for b in qubits if a != b}
        e = self.readout
        return Noise(gates, {q: np.array([[1 - e, e], [e, 1 - e]]) for q in qubits} if e else {})

    def _channel(self, depolarising: float, qubits: int) -> QuantumError | None:
        """The error of a gate of one qubit or two; None where there is none."""
        damping = [
            error(p)
            for error, p in (
                (amplitude_damping_error, self.amplitude_damping),
                (phase_damping_error, self.phase_damping),
            )
            if p
        ]
        parts = [depolarizing_error(depolarising, qubits)] if depolarising else []
        parts += [d if qubits == 1 else d.tensor(d) for d in damping]
        if not parts:
            return None
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.compose(part)
        return whole


def _limit(name: str) -> float:
    """Upper bound of a probability of `ParametricNoise`."""
    return MAX_READOUT_ERROR if name == "readout" else 1.0


def channel_infidelity(channel: object | None) -> float:
    """Average error of a gate with channel S of dimension d: 1 - (d F + 1) / (d + 1), with F = Tr(S) / d²."""
    if channel is None:
        return 0.0
    superoperator = SuperOp(channel).data  # [d², d²]
    d = math.isqrt(len(superoperator))
    return float(1 - (np.trace(superoperator).real / d + 1) / (d + 1))


@cache
def fake_devices() -> dict[str, str]:
    """From the name of each device whose calibration ships with qiskit-ibm-runtime to its class there.

    Examples
    --------
    >>> "fake_boston" in fake_devices()
    True
    """
    classes = [name for name in dir(fake_provider) if re.fullmatch(r"Fake[A-Z]\w+", name)]
    classes = [c for c in classes if c not in ("FakeProviderForBackendV2", "FakeFractionalBackend")]
    return {f"fake_{c.removeprefix('Fake').removesuffix('V2').lower()}": c for c in classes}


@cache
def fake_device(name: str) -> Any:
    """The device of that name, with its calibration.

    Raises
    ------
    ArgumentError
        If there is none.
    """
    if name not in fake_devices():
        raise unknown_name("backend_name", name, ["aer", *fake_devices()])
    return getattr(fake_provider, fake_devices()[name])()


CURRENT_DEVICES = (
    "fake_boston",
    "fake_pittsburgh",
    "fake_aachen",
    "fake_kingston",
    "fake_berlin",
    "fake_miami",
)
"""Twins of Heron and Nighthawk processors, calibrated in April 2026, the least two-qubit error first."""


@dataclass(frozen=True)
class MedianErrors:
    """Medians of a device's calibrated errors, and what else tells devices apart.

    Parameters
    ----------
    qubits : int
        Number of qubits.
    two_qubit : float or None
        Median error of the two-qubit gates that work; None where there are none.
    readout : float or None
        Median probability that a bit is read wrongly.
    feeds_forward : bool
        Whether gates can depend on measured bits, which the loader `dynamic` needs.
    calibration : str or None
        When it was calibrated, ISO time.
    """

    qubits: int
    two_qubit: float | None
    readout: float | None
    feeds_forward: bool
    calibration: str | None


def median_errors(target: Target, calibration: str | None = None) -> MedianErrors:
    """The medians of a device's errors; gates and measurements that do not work are left out."""
    readout = [x.error for x in target["measure"].values() if x is not None and x.error is not None]
    readout = [error for error in readout if error < BROKEN_ERROR]
    edges = list(_edges(target).values())
    return MedianErrors(
        target.num_qubits,
        float(np.median(edges)) if edges else None,
        float(np.median(readout)) if readout else None,
        "if_else" in target.operation_names,
        calibration,
    )


def device_errors(names: Sequence[str] | None = None) -> dict[str, MedianErrors]:
    """Median errors of twins, by which to choose one: the least two-qubit error first.

    Parameters
    ----------
    names : sequence of str, optional
        Names in `fake_devices()`; `CURRENT_DEVICES` where None.

    Returns
    -------
    dict
        From the name of each twin to its `MedianErrors`. Reading all of `fake_devices()` takes half a minute.

    Raises
    ------
    ArgumentError
        If there is no twin of a name.

    Examples
    --------
    >>> for name, errors in device_errors(["fake_fez", "fake_boston"]).items():
    ...     print(name, errors.qubits, f"{errors.two_qubit:.2%}", f"{errors.readout:.2%}")
    fake_boston 156 0.13% 0.51%
    fake_fez 156 0.38% 0.76%
    """
    if isinstance(names, str):
        raise DtypeError(f"names={names!r} is a text; it must be a sequence of names, as [{names!r}].")
    medians = {}
    for name in CURRENT_DEVICES if names is None else names:
        device = fake_device(name)
        properties = device.properties()
        time = None if properties is None else properties.last_update_date.isoformat()
        medians[name] = median_errors(device.target, time)
    best_first = sorted(medians.items(), key=lambda x: math.inf if x[1].two_qubit is None else x[1].two_qubit)
    return dict(best_first)


def best_region(target: Target, size: int, two_qubit_gates: int) -> list[int]:
    """The qubits on which a circuit is expected to have the least error.

    They are connected, if the circuit has two-qubit gates.

    A region grows from each qubit in turn, by the neighbour that adds least to this cost: the readout errors,
    plus the errors along the paths between all pairs of qubits, weighted by how often a pair meets in a gate.

    Parameters
    ----------
    target : Target
        The device.
    size : int
        Number of qubits that are needed.
    two_qubit_gates : int
        Number of two-qubit gates of the circuit.

    Returns
    -------
    list of int
        The qubits, ascending.

    Raises
    ------
    BackendUnavailable
        If no region is large enough.
    """
    count = target.num_qubits
    readout = np.full(count, np.inf)
    for (q,), properties in target["measure"].items():
        if properties is not None and properties.error is not None and properties.error < BROKEN_ERROR:
            readout[q] = properties.error
    edges = _edges(target)
    edges = {pair: e for pair, e in edges.items() if np.isfinite(readout[list(pair)]).all()}
    if two_qubit_gates == 0 and np.isfinite(readout).sum() >= size:
        return sorted(int(q) for q in readout.argsort()[:size])
    a, b = np.array(list(edges)).reshape(-1, 2).T
    graph = coo_array((np.maximum(list(edges.values()), 1e-9), (a, b)), shape=(count, count))
    distance = shortest_path(graph.tocsr(), directed=False)  # [count, count], sums of errors
    neighbours: dict[int, set[int]] = {}
    for x, y in edges:
        neighbours.setdefault(x, set()).add(y)
        neighbours.setdefault(y, set()).add(x)
    weight = two_qubit_gates / max(size * (size - 1) / 2, 1)
    best, best_cost = None, np.inf
    for start in neighbours:
        region, cost, border = [start], readout[start], set(neighbours[start])
        while len(region) < size and border:
            added = {q: readout[q] + weight * distance[q, region].sum() for q in border}
            q = min(added, key=lambda q: (added[q], q))
            cost += added[q]
            region.append(q)
            border = (border | neighbours[q]) - set(region)
        if len(region) == size and cost < best_cost:
            best, best_cost = region, cost
    if best is None:
        connected = "connected " if two_qubit_gates else ""
        raise BackendUnavailable(
            f"{size} {connected}qubits are needed; the device of {count} has no such region."
        )
    return sorted(best)


def best_line(target: Target, two_qubit_gates: Sequence[int]) -> list[int]:
    """The qubits, in their order along a line, on which a circuit is expected to have the least error.

    Parameters
    ----------
    target : Target
        The device.
    two_qubit_gates : sequence of int
        Number of gates between each two neighbours of the circuit's own line of qubits.

    Raises
    ------
    BackendUnavailable
        If the device has no such line.
    """
    edges = _edges(target)
    readout = {
        q: properties.error
        for (q,), properties in target["measure"].items()
        if properties is not None and properties.error is not None and properties.error < BROKEN_ERROR
    }
    neighbours: dict[int, list[int]] = {q: [] for q in readout}
    for a, b in edges:
        if a in readout and b in readout:
            neighbours[a].append(b)
            neighbours[b].append(a)
    best, best_cost = None, math.inf
    partial = [(readout[q], [q]) for q in neighbours]
    while partial:
        cost, line = partial.pop()
        if cost >= best_cost:
            continue
        if len(line) == len(two_qubit_gates) + 1:
            best, best_cost = line, cost
            continue
        for q in neighbours[line[-1]]:
            if q not in line:
                pair = (min(q, line[-1]), max(q, line[-1]))
                step = readout[q] + two_qubit_gates[len(line) - 1] * edges[pair]
                partial.append((cost + step, [*line, q]))
    if best is None:
        raise BackendUnavailable(
            f"{len(two_qubit_gates) + 1} qubits in a line are needed; the device of {target.num_qubits} "
            "has no such line."
        )
    return best


def _edges(target: Target) -> dict[tuple[int, int], float]:
    """Pairs of qubits with a two-qubit gate that works, and its error, the least where there are several."""
    edges: dict[tuple[int, int], float] = {}
    for name in target.operation_names:
        for qubits, properties in (target[name] or {}).items():
            if qubits is not None and len(qubits) == 2 and properties is not None:
                if properties.error is None or properties.error >= BROKEN_ERROR:
                    continue
                pair = (min(qubits), max(qubits))
                edges[pair] = min(edges.get(pair, 1.0), properties.error)
    return edges


def reduced_target(target: Target, region: Sequence[int], scale: float = 1.0) -> Target:
    """The part of a device on some qubits, numbered 0, 1, ... in their order, with errors times `scale`."""
    index = {q: i for i, q in enumerate(region)}
    properties = [target.qubit_properties[q] for q in region] if target.qubit_properties else None
    if properties and scale != 1:
        properties = [
            QubitProperties(
                t1=None if q.t1 is None else q.t1 / max(scale, 1e-12),
                t2=None if q.t2 is None else q.t2 / max(scale, 1e-12),
                frequency=q.frequency,
            )
            for q in properties
        ]
    part = Target(num_qubits=len(region), dt=target.dt, qubit_properties=properties)
    for name in target.operation_names:
        operation = target.operation_from_name(name)
        if isinstance(operation, type):
            if issubclass(operation, ControlFlowOp):
                part.add_instruction(operation, name=name)
            continue
        inside = {
            tuple(index[q] for q in qubits): _scaled(p, scale)
            for qubits, p in target[name].items()
            if qubits is not None and all(q in index for q in qubits) and _works(operation, p)
        }
        if inside:
            part.add_instruction(operation, inside, name=name)
    return part


def _works(operation: Any, properties: InstructionProperties | None) -> bool:
    """Whether a gate can be used: its error is small, or it has parameters and is done in software."""
    if not isinstance(operation, Gate) or operation.params or properties is None:
        return True
    return properties.error is None or properties.error < BROKEN_ERROR


def _scaled(properties: InstructionProperties | None, scale: float) -> InstructionProperties | None:
    """Properties of a gate or a measurement with their error times `scale`."""
    if properties is None or scale == 1:
        return properties
    error = None if properties.error is None else min(properties.error * scale, BROKEN_ERROR)
    return InstructionProperties(duration=properties.duration, error=error)


def device_noise(target: Target) -> Noise:
    """Aer's noise model of a device: depolarising and thermal relaxation after each gate, readout errors."""
    gates = {(name, tuple(qubits)): error for name, qubits, error in basic_device_gate_errors(target=target)}
    readout = {q: error.probabilities for (q,), error in basic_device_readout_errors(target=target)}
    return Noise(gates, readout)


def on_used_qubits(circuit: QuantumCircuit, target: Target) -> tuple[QuantumCircuit, Noise]:
    """A device's circuit without the qubits that it does not use, and the noise of those that it uses."""
    used = sorted(
        {circuit.find_bit(q).index for i in circuit.data for q in i.qubits if i.operation.name != "barrier"}
    )
    small = QuantumCircuit(len(used), name=circuit.name)
    for register in circuit.cregs:
        small.add_register(register)
    small.global_phase = circuit.global_phase
    for i in circuit.data:
        if i.operation.name != "barrier":
            small.append(i.operation, [used.index(circuit.find_bit(q).index) for q in i.qubits], i.clbits)
    return small, device_noise(reduced_target(target, used))


def instruction_errors(circuit: QuantumCircuit, target: Target) -> list[float]:
    """Calibrated error of each gate and measurement of a transpiled circuit.

    Of conditions that stand side by side, on one qubit and on values of one register, only one is met:
    together they count as the one with the largest error.
    """
    errors: list[float] = []
    previous = None  # the qubits of the condition just before
    for instruction in circuit.data:
        operation, qubits = instruction.operation, instruction.qubits
        if not isinstance(operation, ControlFlowOp):
            previous = None
            errors += _error(target, operation.name, circuit, qubits, range(circuit.num_qubits))
            continue
        wires = [circuit.find_bit(q).index for q in qubits]
        worst: float = max(_body_error(target, body, wires) for body in operation.blocks)
        if qubits == previous:
            errors[-1] = max(errors[-1], worst)
        else:
            errors.append(worst)
        previous = qubits
    return errors


def _body_error(target: Target, body: QuantumCircuit, wires: Sequence[int]) -> float:
    """Probability that anything goes wrong in the body of a condition, which stands on `wires`."""
    errors = [e for i in body.data for e in _error(target, i.operation.name, body, i.qubits, wires)]
    return 1 - math.prod(1 - e for e in errors)


def _error(
    target: Target, name: str, body: QuantumCircuit, qubits: Sequence[Qubit], wires: Sequence[int]
) -> list[float]:
    """The calibrated error of one gate or measurement, in a list that is empty where there is none."""
    at = tuple(wires[body.find_bit(q).index] for q in qubits)
    properties = (target[name] or {}).get(at) if name in target.operation_names else None
    return [] if properties is None or properties.error is None else [float(properties.error)]
