"""A circuit as columns of boxes, and the qubits of a device that it runs on, for the browser to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit import CircuitInstruction, ControlFlowOp, ParameterExpression
from qiskit.transpiler import Target

from ...backends import QiskitQuantumBackend
from ...backends.aer import AerEngine
from ...backends.noise import fake_device, reduced_target
from ...circuits import DynamicLoader, Loader, MpsLoader, SoftmaxLoader, TreeLoader, UnaryLoader
from ...circuits.base import num_bits

MAX_COLUMNS = 240
"""Columns of gates that are drawn."""


def circuit_drawing(circuit: QuantumCircuit) -> dict[str, Any]:
    """A circuit as columns of boxes.

    Neighbouring conditional gates on the same qubit are one box, with their number.

    Returns
    -------
    dict
        `qubits`, `columns` (of the whole circuit) and `gates` (of the first `MAX_COLUMNS` columns): of each
        its `name`, `qubits`, `column`, `count`, whether it is `conditional`, and its `angles`, as pairs of a
        parameter's number and its factor.
    """
    gates: list[dict[str, Any]] = []
    number = {parameter: i for i, parameter in enumerate(circuit.parameters)}
    first_free = [0] * circuit.num_qubits
    first_after_measurement = 0
    for instruction in circuit.data:
        qubits = [circuit.find_bit(q).index for q in instruction.qubits]
        if instruction.operation.name == "barrier" or not qubits:
            continue
        conditional = isinstance(instruction.operation, ControlFlowOp)
        name, angles = _gate_name(instruction), _angles(instruction, number)
        last = gates[-1] if gates else None
        if last and conditional and last["conditional"] and last["qubits"] == qubits and last["name"] == name:
            last["count"] += 1
            last["angles"] += angles
            continue
        span = range(min(qubits), max(qubits) + 1)
        column = max([first_free[q] for q in span] + [first_after_measurement if conditional else 0])
        for q in span:
            first_free[q] = column + 1
        if name == "measure":
            first_after_measurement = max(first_after_measurement, column + 1)
        gates.append(
            {"name": name, "qubits": qubits, "column": column, "count": 1, "conditional": conditional,
             "angles": angles}
        )  # fmt: skip
    return {
        "qubits": circuit.num_qubits,
        "columns": max(first_free, default=0),
        "gates": [gate for gate in gates if gate["column"] < MAX_COLUMNS],
    }


def _gate_name(instruction: CircuitInstruction) -> str:
    """A gate's name; of a conditional one, that of the gate inside."""
    operation = instruction.operation
    if isinstance(operation, ControlFlowOp) and operation.blocks[0].data:
        return str(operation.blocks[0].data[0].operation.name)
    return str(operation.name)


def _angles(
    instruction: CircuitInstruction, number: Mapping[ParameterExpression, int]
) -> list[tuple[int, float]]:
    """The numbers and factors of the parameters in a gate's angle; of a conditional, those of its gates."""
    operation = instruction.operation
    if isinstance(operation, ControlFlowOp):
        return [x for block in operation.blocks for inner in block.data for x in _angles(inner, number)]
    return [
        (number[parameter], float(angle.gradient(parameter)))
        for angle in operation.params
        if isinstance(angle, ParameterExpression)
        for parameter in angle.parameters
    ]


SOFTMAX_ROLES = {
    "k": "one of the rotations that load and unload all logits, as keys",
    "phase": "a phase of the polynomial of the exponential",
    "q": "one of the rotations that load the query",
    "weight": "weighs the even part of the polynomial against the odd one",
}
"""What the angles of a softmax circuit are for, by the names of its parameters."""


def angle_roles(loader: Loader, n: int) -> list[dict[str, Any]]:
    """What each angle of a loader's circuit for rows of n keys is for, in the order of its parameters.

    Returns
    -------
    list of dict
        `text`, and where the angle alone splits a range of keys in two, `split`: the first key of the range,
        that of its second half, and the one after its end.
    """
    bits, size = num_bits(n), loader.size(n)
    nodes = [(level, x) for level in range(bits) for x in range(1 << level)]
    splits = [
        (x << (bits - level), (2 * x + 1) << (bits - level - 1), (x + 1) << (bits - level))
        for level, x in nodes
    ]
    if isinstance(loader, DynamicLoader):
        return [_split_role(split, n) for split in splits]
    if isinstance(loader, UnaryLoader):
        return [_split_role(split, n) for split in splits if split[1] < n]
    if isinstance(loader, TreeLoader):
        return [{"text": _multiplexed_text(bits, level), "split": None} for level, _ in nodes]
    if isinstance(loader, MpsLoader) and size > 1:
        pairs = [(layer, low) for layer in range(loader.layers) for low in range(size - 1) for _ in range(6)]
        return [
            {"text": f"one of six angles of the gate on q{low + 1} and q{low} in layer {layer + 1}",
             "split": None}
            for layer, low in pairs
        ]  # fmt: skip
    if isinstance(loader, SoftmaxLoader):
        return [
            {"text": SOFTMAX_ROLES[parameter.name.partition("[")[0]], "split": None}
            for parameter in loader.circuit(size).parameters
        ]
    count = loader.circuit(size).num_parameters
    return [{"text": f"angle {i + 1} of {count}", "split": None} for i in range(count)]


def _split_role(split: tuple[int, int, int], n: int) -> dict[str, Any]:
    first, middle, end = split
    if first >= n:
        return {"text": "belongs to padding", "split": None}
    left, right = (
        _range_text(first, min(middle, n)),
        _range_text(middle, min(end, n)) if middle < n else "padding",
    )
    return {"text": f"splits {left} from {right}", "split": [first, middle, end]}


def _range_text(first: int, end: int) -> str:
    return f"key {first}" if end - first == 1 else f"keys {first}–{end - 1}"


def _multiplexed_text(bits: int, level: int) -> str:
    groups, bit = 1 << level, bits - 1 - level
    if groups == 1:
        return f"splits the keys in two by bit {bit}"
    return (
        f"one of {groups} rotations that together split each of {groups} groups of {1 << (bits - level)} "
        f"keys in two by bit {bit}"
    )


def gate_errors(backend: QiskitQuantumBackend, num_keys: int) -> dict[str, Any] | None:
    """The errors of the device where the qubits of a loader's circuit are placed.

    Returns
    -------
    dict or None
        `wires`: of each qubit of the circuit its `physical` number, the error of one `sx` there and its
        `readout` error; `pairs`: `a`, `b` and two-qubit `error` of those of its qubits that are coupled.
        Qubits may be exchanged while the circuit runs: places are those at its start, and for `readout` those
        at its end. None where there is no device.
    """
    engine = backend.engine
    if not isinstance(engine, AerEngine) or engine.name == "aer":
        return None
    circuit = backend.transpiled(num_keys)
    region = list(circuit.metadata["region"])
    target = reduced_target(fake_device(engine.name).target, region)
    start, end = list(range(len(region))), list(range(len(region)))
    if circuit.layout is not None:
        start = circuit.layout.initial_index_layout(filter_ancillas=True)
        end = circuit.layout.final_index_layout()
    place = {position: wire for wire, position in enumerate(start)}
    wires = [
        {
            "physical": region[position],
            "one_qubit": _error_of(target, "sx", (position,)),
            "readout": _error_of(target, "measure", (end[wire],)),
        }
        for wire, position in enumerate(start)
    ]
    pairs = [{"a": place[a], "b": place[b], "error": error} for (a, b), error in _pair_errors(target).items()]
    return {"wires": wires, "pairs": pairs}


def _error_of(target: Target, name: str, qubits: tuple[int, ...]) -> float | None:
    properties = target[name].get(qubits) if name in target.operation_names else None
    return None if properties is None else properties.error


def _pair_errors(target: Target) -> dict[tuple[int, int], float]:
    """The least error of a two-qubit gate on each coupled pair."""
    errors: dict[tuple[int, int], float] = {}
    for name in target.operation_names:
        for pair, properties in (target[name] or {}).items():
            if pair is None or len(pair) != 2 or properties is None or properties.error is None:
                continue
            key = (min(pair), max(pair))
            errors[key] = min(errors.get(key, 1.0), properties.error)
    return errors


def device_region(backend: QiskitQuantumBackend, num_keys: int) -> dict[str, Any] | None:
    """The physical qubits that rows of `num_keys` keys run on.

    Returns
    -------
    dict or None
        `nodes` (`qubit`, `readout` error or None, place `x`, `y` in 0 to 1) and `edges` (positions `a`, `b`
        of two nodes, two-qubit `error`); None where there is no device.
    """
    engine = backend.engine
    if not isinstance(engine, AerEngine) or engine.name == "aer":
        return None
    qubits = list(backend.transpiled(num_keys).metadata["region"])
    target = reduced_target(fake_device(engine.name).target, qubits)
    readout = [_error_of(target, "measure", (i,)) for i in range(len(qubits))]
    edges = _pair_errors(target)
    places = _places(len(qubits), list(edges))
    return {
        "nodes": [
            {"qubit": q, "readout": e, "x": float(x), "y": float(y)}
            for q, e, (x, y) in zip(qubits, readout, places, strict=True)
        ],
        "edges": [{"a": a, "b": b, "error": error} for (a, b), error in edges.items()],
    }


def _places(count: int, edges: Sequence[tuple[int, int]]) -> np.ndarray:
    """Where to draw the nodes of a graph, (count, 2) in [0, 1], by classical scaling of their distances."""
    hops = np.full((count, count), np.inf)
    np.fill_diagonal(hops, 0)
    for a, b in edges:
        hops[a, b] = hops[b, a] = 1
    for middle in range(count):
        hops = np.minimum(hops, hops[:, middle, None] + hops[None, middle])
    if not np.isfinite(hops).all() or count < 2:  # unconnected qubits stand in rows of five
        row, column = np.divmod(np.arange(count), 5)
        return np.stack((column, row), -1) / 4
    centred = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(-0.5 * centred @ hops**2 @ centred)
    places = vectors[:, -2:][:, ::-1] * np.sqrt(np.maximum(values[-2:][::-1], 0))
    size = np.ptp(places[:, 0]) or 1.0
    return (places - places.min(0)) / size
