"""What scales noise: a simulator's noise model, or gates that are undone and done again on a circuit.

`qiskit_mitigation.zne.GateFoldingPass` folds two-qubit gates, without barriers, so that a later transpile undoes it;
hence the folding here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit import CircuitInstruction, ControlFlowOp
from qiskit.circuit.library import RZGate, SXGate

from ..backends import QiskitQuantumBackend
from ..backends.aer import AerEngine
from ..backends.base import Engine, RowJob
from ..backends.exact import Noise
from ..backends.requests import Request
from ..errors import ArgumentError, DtypeError, unknown_name

FOLDINGS = ("two-qubit", "local", "global")

SELF_INVERSE = ("x", "y", "z", "h", "cx", "cy", "cz", "ecr", "swap", "id")
ROTATIONS = ("rx", "ry", "rz", "p", "rxx", "ryy", "rzz")
NOISELESS = ("rz", "p", "z", "barrier", "delay", "id")
"""Not folded by themselves: done in software, or nothing."""


def scale_noise(backend: QiskitQuantumBackend, level: float, how: str = "two-qubit") -> QiskitQuantumBackend:
    """The backend with `level` times its noise.

    Parameters
    ----------
    backend : QiskitQuantumBackend
    level : float
    how : str
        "model": a simulator's noise model is scaled, readout too; 0 is no noise. Or one of `FOLDINGS`: circuits are
        folded after they are transpiled, by the attainable level next to `level` >= 1; see `fold`.

    Raises
    ------
    ArgumentError
        Unknown names; a level that cannot be: below 1 for folding; "model" on a device.
    """
    if how not in ("model", *FOLDINGS):
        raise unknown_name("how", how, ("model", *FOLDINGS))
    if how != "model":
        return backend.with_engine(FoldedEngine(backend.engine, level, how))
    engine = backend.engine
    if not isinstance(engine, AerEngine):
        raise ArgumentError(
            f"how='model' is not allowed on {engine.name}: only a simulator's noise is in a model; fold gates instead."
        )
    _check_level(level, 0.0)
    scale = engine.noise_scale * level
    return backend.with_engine(
        AerEngine(engine.name, noise=engine.noise, noise_scale=scale, method=engine.method)
    )


class FoldedEngine(Engine):
    """An engine whose circuits are folded after they are transpiled; everything else is the engine's own."""

    def __init__(self, engine: Engine, level: float, how: str):
        if how not in FOLDINGS:
            raise unknown_name("how", how, FOLDINGS)
        _check_level(level, 1.0)
        self._engine, self._level, self._how = engine, float(level), how
        self.name, self.ideal, self.queues = engine.name, engine.ideal, engine.queues

    def identity(self) -> str:
        return f"{self._engine.identity()} folded {self._how} {self._level!r}"

    def facts(self) -> dict[str, Any]:
        return {**self._engine.facts(), "folding": self._how, "noise_level": self._level}

    def transpile(self, circuit: QuantumCircuit, level: int) -> QuantumCircuit:
        return fold(self._engine.transpile(circuit, level), self._level, self._how)

    def errors(self, circuit: QuantumCircuit) -> list[float]:
        return self._engine.errors(circuit)

    def calibrated(self, circuit: QuantumCircuit) -> tuple[QuantumCircuit, Noise]:
        return self._engine.calibrated(circuit)

    def run(
        self,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        seed: int,
        request: Request | None = None,
    ) -> np.ndarray:
        return self._engine.run(circuit, bindings, shots, seed, request)

    def how(self, circuit: QuantumCircuit) -> dict[str, Any]:
        return self._engine.how(circuit)

    def problems(self) -> tuple[str, ...]:
        return self._engine.problems()

    def pending_jobs(self) -> int:
        return self._engine.pending_jobs()

    def submit(
        self,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        request: Request | None = None,
        **options: Any,
    ) -> RowJob:
        return self._engine.submit(circuit, bindings, shots, request, **options)

    def jobs(self) -> Sequence[RowJob]:
        return self._engine.jobs()


def fold(circuit: QuantumCircuit, level: float, how: str = "two-qubit") -> QuantumCircuit:
    """A circuit that does the same with `level` times the gates, kept apart by barriers so that no compiler undoes it.

    Levels between odd numbers fold some gates once more than others, evenly spread over the circuit; the level that
    is attained, 1 + 2 folds / gates, is in the result's `metadata["noise_level"]`.

    Parameters
    ----------
    circuit : QuantumCircuit
        Transpiled. Measured at its end only.
    level : float
        >= 1.
    how : str
        "two-qubit": G → G (G⁻¹ G)^k for two-qubit gates, where most errors are; "local": for all gates but those done
        in software; "global": U → U (U⁻¹ U)^k for the circuit, what is left of the level folded onto its last gates.

    Raises
    ------
    ArgumentError
        Unknown names; a level below 1; a circuit that measures, resets or asks conditions on the way, which cannot be
        undone; a gate whose inverse is not a gate of the device.

    Source: Giurgica-Tiron et al., Digital zero noise extrapolation for quantum error mitigation (2020), section II.

    >>> from qtx_lab.circuits import make_loader
    >>> fold(make_loader("tree").circuit(3), 2).count_ops()["cz"]
    8
    """
    if not isinstance(circuit, QuantumCircuit):
        raise DtypeError(f"circuit is a {type(circuit).__name__}; it must be a QuantumCircuit.")
    if how not in FOLDINGS:
        raise unknown_name("how", how, FOLDINGS)
    _check_level(level, 1.0)
    _check_static(circuit)
    body = [i for i in circuit.data if i.operation.name != "measure"]
    end = [i for i in circuit.data if i.operation.name == "measure"]
    foldable = [
        at
        for at, i in enumerate(body)
        if i.operation.name not in NOISELESS and (how != "two-qubit" or len(i.qubits) == 2)
    ]
    folds = round(len(foldable) * (level - 1) / 2)
    folded = circuit.copy_empty_like()
    if how == "global":
        _global(folded, body, foldable, folds)
    else:
        _local(folded, body, foldable, folds)
    for instruction in end:
        folded.append(instruction)
    attained = 1 + 2 * folds / len(foldable) if foldable else 1.0
    folded.metadata = {**(circuit.metadata or {}), "noise_level": attained}
    return folded


def _local(folded: QuantumCircuit, body: list[CircuitInstruction], foldable: list[int], folds: int) -> None:
    count = len(foldable)
    # Gate i of G is folded floor((i + 1) F / G) - floor(i F / G) times: F in all, evenly spread.
    times = {at: (i + 1) * folds // count - i * folds // count for i, at in enumerate(foldable)}
    for at, instruction in enumerate(body):
        folded.append(instruction)
        for _ in range(times.get(at, 0)):
            for again in (list(_inverse(instruction)), [instruction]):
                folded.barrier(instruction.qubits)
                for part in again:
                    folded.append(part)
        if times.get(at, 0):
            folded.barrier(instruction.qubits)


def _global(folded: QuantumCircuit, body: list[CircuitInstruction], foldable: list[int], folds: int) -> None:
    whole, rest = divmod(folds, len(foldable)) if foldable else (0, 0)
    starts = [0] * whole + ([foldable[-rest]] if rest else [])
    for instruction in body:
        folded.append(instruction)
    for start in starts:
        folded.barrier()
        for instruction in reversed(body[start:]):
            for part in _inverse(instruction):
                folded.append(part)
        folded.barrier()
        for instruction in body[start:]:
            folded.append(instruction)
    if starts:
        folded.barrier()


def _inverse(instruction: CircuitInstruction) -> Iterator[CircuitInstruction]:
    """The inverse in gates that the device has, up to a phase: SX⁻¹ = Z SX Z, and Z is a turn by π."""
    operation = instruction.operation
    if operation.name in SELF_INVERSE or operation.name == "barrier":
        yield instruction
    elif operation.name == "sx":
        for gate in (RZGate(math.pi), SXGate(), RZGate(math.pi)):
            yield CircuitInstruction(gate, instruction.qubits)
    elif operation.name in ROTATIONS:
        yield CircuitInstruction(operation.inverse(), instruction.qubits)
    else:
        raise ArgumentError(
            f"The gate {operation.name!r} is not folded: its inverse may be no gate of the device."
        )


def is_static(circuit: QuantumCircuit) -> bool:
    """Whether all measurements come last, and nothing depends on them."""
    measured: set[Any] = set()
    for instruction in circuit.data:
        operation = instruction.operation
        if isinstance(operation, ControlFlowOp) or operation.name in ("reset", "initialize"):
            return False
        if operation.name == "barrier":
            continue
        if measured & set(instruction.qubits):
            return False
        if operation.name == "measure":
            measured |= set(instruction.qubits)
    return True


def _check_static(circuit: QuantumCircuit) -> None:
    if not is_static(circuit):
        raise ArgumentError(
            f"{circuit.name} measures or asks conditions on the way, which cannot be undone, so it is not folded: take "
            "another loader, as 'tree', or scale the noise model of a simulator (how='model')."
        )


def _check_level(level: float, least: float) -> None:
    if isinstance(level, bool) or not isinstance(level, int | float | np.floating):
        raise DtypeError(f"level={level!r} is not allowed: it must be a number.")
    if not math.isfinite(level) or level < least:
        raise ArgumentError(f"level={level!r} is not allowed: it must be finite and >= {least:g}.")
