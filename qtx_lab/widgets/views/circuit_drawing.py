"""A circuit as columns of boxes, and the qubits of a device that it runs on, for the browser to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit import CircuitInstruction, ControlFlowOp

from ...backends import QiskitQuantumBackend
from ...backends.aer import AerEngine
from ...backends.noise import fake_device, reduced_target

MAX_COLUMNS = 240
"""Columns of gates that are drawn."""


def circuit_drawing(circuit: QuantumCircuit) -> dict[str, Any]:
    """A circuit as columns of boxes.

    Neighbouring conditional gates on the same qubit are one box, with their number.

    Returns
    -------
    dict
        `qubits`, `columns` (of the whole circuit) and `gates` (of the first `MAX_COLUMNS` columns): of each
        its `name`, `qubits`, `column`, `count`, and whether it is `conditional`.
    """
    gates: list[dict[str, Any]] = []
    first_free = [0] * circuit.num_qubits
    first_after_measurement = 0
    for instruction in circuit.data:
        qubits = [circuit.find_bit(q).index for q in instruction.qubits]
        if instruction.operation.name == "barrier" or not qubits:
            continue
        conditional = isinstance(instruction.operation, ControlFlowOp)
        name = _gate_name(instruction)
        last = gates[-1] if gates else None
        if last and conditional and last["conditional"] and last["qubits"] == qubits and last["name"] == name:
            last["count"] += 1
            continue
        span = range(min(qubits), max(qubits) + 1)
        column = max([first_free[q] for q in span] + [first_after_measurement if conditional else 0])
        for q in span:
            first_free[q] = column + 1
        if name == "measure":
            first_after_measurement = max(first_after_measurement, column + 1)
        gates.append(
            {"name": name, "qubits": qubits, "column": column, "count": 1, "conditional": conditional}
        )
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
    measured = target["measure"]
    readout = [measured[(i,)].error if (i,) in measured else None for i in range(len(qubits))]
    edges: dict[tuple[int, int], float] = {}
    for name in target.operation_names:
        for pair, properties in (target[name] or {}).items():
            if pair is None or len(pair) != 2 or properties is None or properties.error is None:
                continue
            key = (min(pair), max(pair))
            edges[key] = min(edges.get(key, 1.0), properties.error)
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
