"""What a circuit takes: qubits, depth, two-qubit gates; and how it looks."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from qiskit import QuantumCircuit
from qiskit.circuit import ControlFlowOp


@dataclass(frozen=True)
class Resources:
    """What a circuit takes. Gates in the bodies of conditions are all counted, though few of them are run."""

    qubits: int
    parameters: int
    depth: int
    """Longest chain of gates and measurements; a condition with its body is one."""
    gates: int
    two_qubit_gates: int
    conditions: int
    measurements: int


def resources(circuit: QuantumCircuit) -> Resources:
    """Count what a circuit takes, before or after transpiling.

    >>> from qtx_lab.circuits import make_loader
    >>> resources(make_loader("tree").circuit(6)).two_qubit_gates
    57
    """
    gates = two = conditions = measurements = 0
    bodies = [circuit]
    while bodies:
        for instruction in bodies.pop().data:
            operation = instruction.operation
            if isinstance(operation, ControlFlowOp):
                conditions += 1
                bodies += operation.blocks
            elif operation.name == "measure":
                measurements += 1
            elif operation.name not in ("barrier", "delay"):
                gates += 1
                two += len(instruction.qubits) == 2
    return Resources(
        qubits=circuit.num_qubits,
        parameters=circuit.num_parameters,
        depth=circuit.depth(),
        gates=gates,
        two_qubit_gates=two,
        conditions=conditions,
        measurements=measurements,
    )


def draw(circuit: QuantumCircuit, **options: Any) -> Any:
    """The circuit as a matplotlib Figure; as text where `pylatexenc`, which qiskit's drawer needs, is not installed.

    Parameters
    ----------
    circuit : QuantumCircuit
    **options
        Of `QuantumCircuit.draw`: `output`, `fold`, `scale`, `idle_wires`, ...
    """
    output = "mpl" if find_spec("pylatexenc") else "text"
    return circuit.draw(**{"output": output, **options})
