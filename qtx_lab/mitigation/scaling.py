"""How noise is scaled: by a simulator's noise model, or on circuits by gates that are undone and done again.

`qiskit_mitigation.zne.GateFoldingPass` folds two-qubit gates too, but without barriers, so that a later
transpile undoes it. That is why circuits are folded here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit import CircuitError, CircuitInstruction, ControlFlowOp
from qiskit.circuit.library import RZGate

from ..backends import QiskitQuantumBackend
from ..backends.aer import AerEngine
from ..backends.base import Engine, RowJob
from ..backends.costs import Bill, Cost, RowPlan
from ..backends.exact import Noise
from ..backends.requests import PlannedRun, Request
from ..checks import check_number
from ..errors import ArgumentError, DtypeError, unknown_name
from .pauli import TwirledEngine
from .results import check_backend

FOLDINGS = ("two-qubit", "local", "global")
"""Ways to fold the gates of a circuit; see `fold`."""

SCALINGS = ("model", "pauli", *FOLDINGS)
"""Ways to scale the noise of a backend; see `scale_noise`."""

INVERSE_BETWEEN_Z = ("sx", "sxdg")
"""Gates G with G⁻¹ = Z G Z up to a phase."""

INVERSE_BEFORE_ZZ = ("iswap",)
"""Gates G with G⁻¹ = (Z ⊗ Z) G."""

NOISELESS_GATES = ("rz", "p", "z", "barrier", "delay", "id", "global_phase")
"""Instructions that are not folded, because they are done in software or do nothing."""


def scale_noise(backend: QiskitQuantumBackend, level: float, how: str = "two-qubit") -> QiskitQuantumBackend:
    """Make a backend with `level` times the noise.

    Parameters
    ----------
    backend : QiskitQuantumBackend
    level : float
        1 is the backend's own noise.
    how : str
        "model" multiplies the noise of a simulator's model, also its readout errors; level 0 is no noise.
        "pauli" twirls the two-qubit gates of a simulator and adds Pauli errors; see `TwirledEngine`. One of
        `FOLDINGS` folds circuits after they are transpiled, to the level >= 1 nearest to `level` that they
        allow; see `fold`.

    Returns
    -------
    QiskitQuantumBackend

    Raises
    ------
    DtypeError
        If backend is not a QiskitQuantumBackend.
    ArgumentError
        If `how` is unknown, if level is negative, or below 1 for another way than "model", or if "model" or
        "pauli" is asked of a device.

    Examples
    --------
    >>> noisy = QiskitQuantumBackend("aer", "fake_boston", loader="tree")
    >>> scale_noise(noisy, 2, "model").engine.noise_scale
    2.0
    """
    check_backend(backend)
    if how not in SCALINGS:
        raise unknown_name("how", how, SCALINGS)
    if how in FOLDINGS:
        return backend.with_engine(FoldedEngine(backend.engine, level, how))
    engine = backend.engine
    if not isinstance(engine, AerEngine):
        raise ArgumentError(
            f"how={how!r} is not allowed on {engine.name}: only a simulator's noise can be scaled. Fold "
            "gates instead."
        )
    if how == "pauli":
        return backend.with_engine(TwirledEngine(engine, level))
    level = check_number("level", level, least=0)
    return backend.with_engine(engine.scaled(level))


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
        self._engine, self._level, self._how = engine, check_number("level", level, least=1), how
        self.name, self.ideal, self.queues = engine.name, engine.ideal, engine.queues

    def refresh(self, max_age: float = 0.0) -> bool:
        """Look at the device's calibration again; see `Engine.refresh`."""
        return self._engine.refresh(max_age)

    def identity(self) -> str:
        """Return what a transpiled circuit depends on, with the folding; see `Engine.identity`."""
        folding = f"folded by calibrated errors {self._how} {self._level!r}"
        # A circuit is transpiled alike for noise of any strength, but folded by the errors at this one.
        return f"{self._engine.identity()} × {self._engine.facts().get('noise_scale', 1)} {folding}"

    def facts(self) -> dict[str, Any]:
        """Return the diagnostics of the engine and of the folding; see `Engine.facts`."""
        return {**self._engine.facts(), "folding": self._how, "noise_level": self._level}

    def transpile(self, circuit: QuantumCircuit, level: int) -> QuantumCircuit:
        """Transpile a circuit, then fold it; `level` is the optimisation level. See `Engine.transpile`."""
        transpiled = self._engine.transpile(circuit, level)
        return fold(transpiled, self._level, self._how, errors=_gate_errors(self._engine, transpiled))

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

    def cost(self, runs: Sequence[PlannedRun]) -> Cost:
        """Estimate what some runs take; see `Engine.cost`."""
        return self._engine.cost(runs)

    def reserved(self, runs: Sequence[PlannedRun], confirm: Any = None) -> AbstractContextManager[object]:
        """Give a call leave for all that it runs; see `Engine.reserved`."""
        return self._engine.reserved(runs, confirm)

    def plan(self, runs: Sequence[PlannedRun], shots: int, planned_on: Engine | None = None) -> RowPlan:
        """Plan a call; see `Engine.plan`."""
        return self._engine.plan(runs, shots, planned_on)

    def bill(self, *, ask: bool = True) -> Bill:
        """Tell what was sent and what it cost; see `Engine.bill`."""
        return self._engine.bill(ask=ask)

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


def fold(
    circuit: QuantumCircuit, level: float, how: str = "two-qubit", *, errors: Sequence[float] | None = None
) -> QuantumCircuit:
    """Build a circuit that does the same with `level` times the gates.

    Barriers keep the added gates apart, so that no compiler undoes them. For a level between two odd numbers
    some gates are folded once more than others. They are spread evenly over the gates of two or more qubits
    and, apart from these, over those of one qubit, so that either kind has `level` times the gates as nearly
    as whole gates allow. The level that is attained is in the result's `metadata["noise_level"]`: the sum of
    the errors of all foldable gates over that before folding, or the ratio of the numbers of gates where
    errors are not given.

    Parameters
    ----------
    circuit : QuantumCircuit
        A transpiled circuit that is measured at its end only.
    level : float
        Noise level, >= 1.
    how : str
        "two-qubit" replaces gates G of two or more qubits, which have most of the errors, by G (G⁻¹ G)^k.
        "local" does so for all gates but those that are done in software. "global" replaces the whole circuit
        U by U (U⁻¹ U)^k, and folds its last gates for what is left of the level.
    errors : sequence of float, optional
        Calibrated error of each instruction in `circuit.data`, as a device reports them: 0 for those without.

    Returns
    -------
    QuantumCircuit

    Raises
    ------
    ArgumentError
        If `how` is unknown; if level is below 1; if the circuit measures, resets or tests bits before its
        end, which cannot be undone; if it has an instruction without a known inverse; if errors are negative
        or not one for each instruction.
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
    level = check_number("level", level, least=1)
    if not is_static(circuit):
        raise ArgumentError(
            f"{circuit.name} measures or tests bits before its end, which cannot be undone, so it is not "
            "folded: use another loader, as 'tree', or scale the noise model of a simulator (how='model')."
        )
    error_of = _checked_errors(circuit, errors)
    body = [(i, e) for i, e in zip(circuit.data, error_of, strict=True) if i.operation.name != "measure"]
    instructions = [i for i, _ in body]
    foldable = [
        place
        for place, i in enumerate(instructions)
        if i.operation.name not in NOISELESS_GATES and (how != "two-qubit" or len(i.qubits) > 1)
    ]
    weights = np.array([body[place][1] for place in foldable])
    if not weights.sum() > 0:  # nothing is known of their errors
        weights = np.ones(len(foldable))
    folded = circuit.copy_empty_like()
    if how == "global":
        times = _fold_whole(folded, instructions, foldable, weights, level)
    else:
        times = _fold_gates(folded, instructions, foldable, level)
    for instruction in circuit.data:
        if instruction.operation.name == "measure":
            folded.append(instruction)
    attained = 1 + 2 * float(weights @ times) / float(weights.sum()) if foldable else 1.0
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


def _checked_errors(circuit: QuantumCircuit, errors: Sequence[float] | None) -> np.ndarray:
    """The error of each instruction of a circuit; zeros where none are given."""
    if errors is None:
        return np.zeros(len(circuit.data))
    try:
        given = np.asarray(errors, dtype=float)
    except (TypeError, ValueError):
        raise DtypeError(f"errors={errors!r} is not allowed: it must be a sequence of numbers.") from None
    if given.shape != (len(circuit.data),) or not np.isfinite(given).all() or (given < 0).any():
        raise ArgumentError(
            f"errors is not allowed: it must hold a finite number >= 0 for each of the {len(circuit.data)} "
            "instructions of the circuit."
        )
    return given


def _gate_errors(engine: Engine, circuit: QuantumCircuit) -> list[float]:
    """Calibrated error of each instruction of a transpiled circuit that is measured at its end; 0 if none."""
    known: dict[tuple[str, tuple[int, ...]], float] = {}
    errors = []
    for instruction in circuit.data if is_static(circuit) else ():
        key = instruction.operation.name, tuple(circuit.find_bit(q).index for q in instruction.qubits)
        if key not in known:
            alone = circuit.copy_empty_like()
            alone.append(instruction)
            known[key] = sum(engine.errors(alone))
        errors.append(known[key])
    return errors


def _fold_gates(
    folded: QuantumCircuit, body: list[CircuitInstruction], foldable: list[int], level: float
) -> np.ndarray:
    """Append the instructions, those at the foldable places folded; return how often each of these was."""
    several = [i for i, place in enumerate(foldable) if len(body[place].qubits) > 1]
    single = [i for i, place in enumerate(foldable) if len(body[place].qubits) == 1]
    of_several = round(len(several) * (level - 1) / 2)
    of_single = round(len(foldable) * (level - 1) / 2) - of_several
    times = np.zeros(len(foldable), dtype=int)
    for gates, folds in ((several, of_several), (single, of_single)):
        # Gate i of G is folded floor((i + 1) F / G) - floor(i F / G) times, which is F times in all.
        ends = np.arange(len(gates) + 1) * folds // max(len(gates), 1)
        times[gates] = np.diff(ends)
    times_at = dict(zip(foldable, times.tolist(), strict=True))
    for place, instruction in enumerate(body):
        folded.append(instruction)
        for _ in range(times_at.get(place, 0)):
            for part in (_inverse(instruction), (instruction,)):
                folded.barrier(instruction.qubits)
                _append(folded, part)
        if times_at.get(place, 0):
            folded.barrier(instruction.qubits)
    return times


def _fold_whole(
    folded: QuantumCircuit,
    body: list[CircuitInstruction],
    foldable: list[int],
    weights: np.ndarray,
    level: float,
) -> np.ndarray:
    """Append the instructions, fold all of them, and the last ones for what is left of the level.

    Returns how often each instruction at the foldable places was folded.
    """
    if not foldable:
        _append(folded, body)
        return np.zeros(0, dtype=int)
    whole = int((level - 1) // 2)
    left = (level - 1) / 2 - whole
    shares = np.append(np.cumsum(weights[::-1])[::-1], 0.0) / weights.sum()  # of the gates from each one on
    first = int(np.abs(shares - left).argmin())
    starts = [0] * whole + ([foldable[first]] if first < len(foldable) else [])
    _append(folded, body)
    for start in starts:
        folded.barrier()
        for instruction in reversed(body[start:]):
            _append(folded, _inverse(instruction))
        folded.barrier()
        _append(folded, body[start:])
    if starts:
        folded.barrier()
    return whole + (np.arange(len(foldable)) >= first).astype(int)


def _append(circuit: QuantumCircuit, instructions: Iterable[CircuitInstruction]) -> None:
    for instruction in instructions:
        circuit.append(instruction)


def _inverse(instruction: CircuitInstruction) -> Iterator[CircuitInstruction]:
    """Yield the inverse, up to a phase, where possible in gates of a device that has the gate itself and RZ.

    These are the gate itself where it is its own inverse; SX⁻¹ = Z SX Z and iSWAP⁻¹ = (Z ⊗ Z) iSWAP, with Z =
    RZ(π); and rotations by the opposite angles. Other gates have the inverse that qiskit knows.
    """
    operation, qubits = instruction.operation, instruction.qubits
    if operation.name in ("barrier", "delay"):
        yield instruction
    elif operation.name in INVERSE_BETWEEN_Z:
        flip = CircuitInstruction(RZGate(math.pi), qubits)
        yield from (flip, instruction, flip)
    elif operation.name in INVERSE_BEFORE_ZZ:
        yield instruction
        for qubit in qubits:
            yield CircuitInstruction(RZGate(math.pi), (qubit,))
    else:
        try:
            inverse = operation.inverse()
        except CircuitError as error:
            raise ArgumentError(
                f"The instruction {operation.name!r} is not folded, because it has no known inverse: {error}"
            ) from None
        yield instruction if inverse == operation else CircuitInstruction(inverse, qubits)
