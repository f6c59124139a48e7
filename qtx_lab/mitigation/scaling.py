"""How noise is scaled: by a simulator's noise model, or on circuits by gates that are undone and done again.

`qiskit_mitigation.zne.GateFoldingPass` folds two-qubit gates too, but without barriers, so that a later
transpile undoes it. That is why circuits are folded here.
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
"""Ways to fold the gates of a circuit; see `fold`."""

SCALINGS = ("model", *FOLDINGS)
"""Ways to scale the noise of a backend; see `scale_noise`."""

SELF_INVERSE_GATES = ("x", "y", "z", "h", "cx", "cy", "cz", "ecr", "swap", "id")
ROTATION_GATES = ("rx", "ry", "rz", "p", "rxx", "ryy", "rzz")
NOISELESS_GATES = ("rz", "p", "z", "barrier", "delay", "id")
"""Instructions that are not folded, because they are done in software or do nothing."""


def scale_noise(backend: QiskitQuantumBackend, level: float, how: str = "two-qubit") -> QiskitQuantumBackend:
    """Make a backend with `level` times the noise.

    Parameters
    ----------
    backend : QiskitQuantumBackend
    level : float
        1 is the backend's own noise.
    how : str
        "model" multiplies the noise of a simulator's model, also its readout errors; level 0 is no noise. One
        of `FOLDINGS` folds circuits after they are transpiled, to the level >= 1 nearest to `level` that they
        allow; see `fold`.

    Returns
    -------
    QiskitQuantumBackend

    Raises
    ------
    ArgumentError
        If `how` is unknown, if level is negative or below 1 for folding, or if "model" is asked of a device.

    Examples
    --------
    >>> noisy = QiskitQuantumBackend("aer", "fake_fez", loader="tree")
    >>> scale_noise(noisy, 2, "model").engine.noise_scale
    2.0
    """
    if how not in SCALINGS:
        raise unknown_name("how", how, SCALINGS)
    if how != "model":
        return backend.with_engine(FoldedEngine(backend.engine, level, how))
    engine = backend.engine
    if not isinstance(engine, AerEngine):
        raise ArgumentError(
            f"how='model' is not allowed on {engine.name}: only a simulator's noise can be scaled. Fold "
            "gates instead."
        )
    _check_level(level, 0.0)
    scale = engine.noise_scale * level
    return backend.with_engine(
        AerEngine(engine.name, noise=engine.noise, noise_scale=scale, method=engine.method)
    )


class FoldedEngine(Engine):
    """An engine whose circuits are folded after they are transpiled; all else is left to the engine inside.

    Parameters
    ----------
    engine : Engine
    level : float
        Noise level, >= 1.
    how : str
        One of `FOLDINGS`.

    Raises
    ------
    ArgumentError
        If `how` is unknown, or level is below 1.
    """

    def __init__(self, engine: Engine, level: float, how: str):
        if how not in FOLDINGS:
            raise unknown_name("how", how, FOLDINGS)
        _check_level(level, 1.0)
        self._engine, self._level, self._how = engine, float(level), how
        self.name, self.ideal, self.queues = engine.name, engine.ideal, engine.queues

    def identity(self) -> str:
        """Return what a transpiled circuit depends on, with the folding; see `Engine.identity`."""
        return f"{self._engine.identity()} folded {self._how} {self._level!r}"

    def facts(self) -> dict[str, Any]:
        """Return the diagnostics of the engine and of the folding; see `Engine.facts`."""
        return {**self._engine.facts(), "folding": self._how, "noise_level": self._level}

    def transpile(self, circuit: QuantumCircuit, level: int) -> QuantumCircuit:
        """Transpile a circuit, then fold it; `level` is the optimisation level. See `Engine.transpile`."""
        return fold(self._engine.transpile(circuit, level), self._level, self._how)

    def errors(self, circuit: QuantumCircuit) -> list[float]:
        """Return the calibrated errors of a circuit; see `Engine.errors`."""
        return self._engine.errors(circuit)

    def calibrated(self, circuit: QuantumCircuit) -> tuple[QuantumCircuit, Noise]:
        """Return a circuit on the qubits that it uses, and their noise; see `Engine.calibrated`."""
        return self._engine.calibrated(circuit)

    def run(
        self,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        seed: int,
        request: Request | None = None,
    ) -> np.ndarray:
        """Measure a circuit that `transpile` folded; see `Engine.run`."""
        return self._engine.run(circuit, bindings, shots, seed, request)

    def how(self, circuit: QuantumCircuit) -> dict[str, Any]:
        """Say how a circuit is run; see `Engine.how`."""
        return self._engine.how(circuit)

    def problems(self) -> tuple[str, ...]:
        """Say why nothing can be run now; see `Engine.problems`."""
        return self._engine.problems()

    def pending_jobs(self) -> int:
        """Return the number of jobs in the queue; see `Engine.pending_jobs`."""
        return self._engine.pending_jobs()

    def submit(
        self,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        request: Request | None = None,
        **options: Any,
    ) -> RowJob:
        """Hand over a circuit as a job; see `Engine.submit`."""
        return self._engine.submit(circuit, bindings, shots, request, **options)

    def jobs(self) -> Sequence[RowJob]:
        """Return the recorded jobs of the device; see `Engine.jobs`."""
        return self._engine.jobs()


def fold(circuit: QuantumCircuit, level: float, how: str = "two-qubit") -> QuantumCircuit:
    """Build a circuit that does the same with `level` times the gates.

    Barriers keep the added gates apart, so that no compiler undoes them. For a level between two odd numbers
    some gates are folded once more than others, evenly spread over the circuit. The level that is attained, 1
    + 2 folds / gates, is in the result's `metadata["noise_level"]`.

    Parameters
    ----------
    circuit : QuantumCircuit
        A transpiled circuit that is measured at its end only.
    level : float
        Noise level, >= 1.
    how : str
        "two-qubit" replaces two-qubit gates G, which have most of the errors, by G (G⁻¹ G)^k. "local" does so
        for all gates but those that are done in software. "global" replaces the whole circuit U by U (U⁻¹
        U)^k, and folds its last gates for what is left of the level.

    Returns
    -------
    QuantumCircuit

    Raises
    ------
    ArgumentError
        If `how` is unknown; if level is below 1; if the circuit measures, resets or tests bits before its
        end, which cannot be undone; if it has a gate whose inverse may be no gate of the device.
    DtypeError
        If circuit is not a QuantumCircuit, or level is not a number.

    Source: Giurgica-Tiron et al., Digital zero noise extrapolation for quantum error mitigation (2020),
    section II.

    Examples
    --------
    >>> from qtx_lab.circuits import make_loader
    >>> fold(make_loader("tree").circuit(3), 2).count_ops()["cz"]
    8
    """
    if not isinstance(circuit, QuantumCircuit):
        raise DtypeError(f"circuit is a {type(circuit).__name__}; it must be a QuantumCircuit.")
    if how not in FOLDINGS:
        raise unknown_name("how", how, FOLDINGS)
    _check_level(level, 1.0)
    if not is_static(circuit):
        raise ArgumentError(
            f"{circuit.name} measures or tests bits before its end, which cannot be undone, so it is not "
            "folded: use another loader, as 'tree', or scale the noise model of a simulator (how='model')."
        )
    body = [i for i in circuit.data if i.operation.name != "measure"]
    measurements = [i for i in circuit.data if i.operation.name == "measure"]
    foldable = [
        place
        for place, i in enumerate(body)
        if i.operation.name not in NOISELESS_GATES and (how != "two-qubit" or len(i.qubits) == 2)
    ]
    folds = round(len(foldable) * (level - 1) / 2)
    folded = circuit.copy_empty_like()
    if how == "global":
        _fold_whole(folded, body, foldable, folds)
    else:
        _fold_gates(folded, body, foldable, folds)
    for instruction in measurements:
        folded.append(instruction)
    attained = 1 + 2 * folds / len(foldable) if foldable else 1.0
    folded.metadata = {**(circuit.metadata or {}), "noise_level": attained}
    return folded


def is_static(circuit: QuantumCircuit) -> bool:
    """Whether all measurements of a circuit come last, and nothing depends on them.

    Examples
    --------
    >>> from qtx_lab.circuits import make_loader
    >>> is_static(make_loader("tree").circuit(3)), is_static(make_loader("dynamic").circuit(3))
    (True, False)
    """
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


def _fold_gates(
    folded: QuantumCircuit, body: list[CircuitInstruction], foldable: list[int], folds: int
) -> None:
    """Append the instructions, with `folds` foldings spread evenly over those at the foldable places."""
    count = len(foldable)
    # Gate i of G is folded floor((i + 1) F / G) - floor(i F / G) times, which is F times in all.
    times = {place: (i + 1) * folds // count - i * folds // count for i, place in enumerate(foldable)}
    for place, instruction in enumerate(body):
        folded.append(instruction)
        for _ in range(times.get(place, 0)):
            for gates in (list(_inverse(instruction)), [instruction]):
                folded.barrier(instruction.qubits)
                for gate in gates:
                    folded.append(gate)
        if times.get(place, 0):
            folded.barrier(instruction.qubits)


def _fold_whole(
    folded: QuantumCircuit, body: list[CircuitInstruction], foldable: list[int], folds: int
) -> None:
    """Append the instructions, then fold all of them, and the last ones for what is left of `folds`."""
    whole, rest = divmod(folds, len(foldable)) if foldable else (0, 0)
    starts = [0] * whole + ([foldable[-rest]] if rest else [])
    for instruction in body:
        folded.append(instruction)
    for start in starts:
        folded.barrier()
        for instruction in reversed(body[start:]):
            for gate in _inverse(instruction):
                folded.append(gate)
        folded.barrier()
        for instruction in body[start:]:
            folded.append(instruction)
    if starts:
        folded.barrier()


def _inverse(instruction: CircuitInstruction) -> Iterator[CircuitInstruction]:
    """Yield the inverse in gates that the device has, up to a phase: SX⁻¹ = Z SX Z, with Z = RZ(π)."""
    operation = instruction.operation
    if operation.name in SELF_INVERSE_GATES or operation.name == "barrier":
        yield instruction
    elif operation.name == "sx":
        for gate in (RZGate(math.pi), SXGate(), RZGate(math.pi)):
            yield CircuitInstruction(gate, instruction.qubits)
    elif operation.name in ROTATION_GATES:
        yield CircuitInstruction(operation.inverse(), instruction.qubits)
    else:
        raise ArgumentError(
            f"The gate {operation.name!r} is not folded, because its inverse may be no gate of the device."
        )


def _check_level(level: float, least: float) -> None:
    if isinstance(level, bool) or not isinstance(level, int | float | np.floating):
        raise DtypeError(f"level={level!r} is not allowed: it must be a number.")
    if not math.isfinite(level) or level < least:
        raise ArgumentError(f"level={level!r} is not allowed: it must be finite and >= {least:g}.")
