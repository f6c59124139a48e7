"""What a circuit takes, in qubits, depth and two-qubit gates, and a picture of it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from qiskit import QuantumCircuit
from qiskit.circuit import ControlFlowOp


@dataclass(frozen=True)
class Resources:
    """What a circuit takes.

    Gates in the branches of conditions all count, although a shot runs only some of them.

    Parameters
    ----------
    qubits : int
    parameters : int
        Free angles.
    depth : int
        Length of the longest chain of gates and measurements. A condition with its branches counts as one
        gate.
    gates : int
        Gates of any number of qubits.
    two_qubit_gates : int
    conditions : int
        Instructions that depend on measured bits.
    measurements : int
    """

    qubits: int
    parameters: int
    depth: int
    gates: int
    two_qubit_gates: int
    conditions: int
    measurements: int


def resources(circuit: QuantumCircuit) -> Resources:
    """Count what a circuit takes, before or after it is transpiled.

    Examples
    --------
    >>> from qtx_lab.circuits import make_loader
    >>> resources(make_loader("tree").circuit(6)).two_qubit_gates
    57
    """
    gates = two_qubit_gates = conditions = measurements = 0
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
                two_qubit_gates += len(instruction.qubits) == 2
    return Resources(
        qubits=circuit.num_qubits,
        parameters=circuit.num_parameters,
        depth=circuit.depth(),
        gates=gates,
        two_qubit_gates=two_qubit_gates,
        conditions=conditions,
        measurements=measurements,
    )


def draw(circuit: QuantumCircuit, **options: Any) -> Any:
    """Draw a circuit as a matplotlib Figure, or as text if `pylatexenc` is not installed.

    Parameters
    ----------
    circuit : QuantumCircuit
    **options
        Options of `QuantumCircuit.draw`, as `output`, `fold`, `scale` and `idle_wires`.
    """
    output = "mpl" if find_spec("pylatexenc") else "text"
    return circuit.draw(**{"output": output, **options})
