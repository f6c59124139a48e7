"""`IBMEngine`: IBM's devices as an engine, all rows in one PUB, each job recorded before it is submitted."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError
from qiskit import QuantumCircuit
from qiskit.transpiler import generate_preset_pass_manager
from qiskit.transpiler.exceptions import TranspilerError
from qiskit_ibm_runtime import QiskitRuntimeService
from qiskit_ibm_runtime.options_models.sampler import SamplerOptions

from ...checks import check_number
from ...errors import ArgumentError, BackendUnavailable, CalibrationWarning, unknown_name
from ...storage import runs_home
from ..base import Engine, JobStatus
from ..exact import Noise
from ..noise import instruction_errors, median_errors, on_used_qubits
from ..requests import Request
from .jobs import DeviceJob, find_jobs, post_part, submit_parts
from .ledger import Block, record_job
from .remote import DeviceAccess, IBMRemote, offline_problems

MAX_EXECUTIONS_PER_JOB = 10_000_000
"""Rows times shots of one job. From "Job limits" in IBM's documentation."""

SECONDS_PER_JOB, SECONDS_PER_EXECUTION = 2.0, 0.00035
"""Quantum time of a job without error mitigation. From "Workload usage" in IBM's documentation."""

MAX_CALIBRATION_AGE_S = 3600.0
"""A device's calibration is read again after this time, and before each submission, seconds."""

Mode = Literal["job", "batch", "session"]
MODES = ("job", "batch", "session")


@dataclass(frozen=True)
class Cost:
    """What a submission would take.

    Parameters
    ----------
    circuits, shots : int
        Number of rows bound into the circuit, and the shots of each.
    executions : int
        Their product.
    jobs : int
        Number of jobs that it is split into.
    quantum_seconds : float
        Estimated time on the device that IBM would bill, without queueing.
    """

    circuits: int
    shots: int
    executions: int
    jobs: int
    quantum_seconds: float

    def __str__(self) -> str:
        split = f" in {self.jobs} jobs" if self.jobs > 1 else ""
        return (
            f"{self.circuits:,} circuits × {self.shots:,} shots = {self.executions:,} executions{split}, "
            f"about {self.quantum_seconds:.0f} s of quantum time"
        )


class IBMEngine(Engine):
    """One of IBM's devices, as an `Engine` that queues jobs. The network is not used before a circuit is run.

    Parameters
    ----------
    name : str
        The device's name, as "ibm_fez".
    service : QiskitRuntimeService, optional
        A service that is logged in. Where None, the account in the environment (QISKIT_IBM_TOKEN,
        QISKIT_IBM_INSTANCE) or on disk is used.
    instance, region : str, optional
        The instance, by CRN or name; the region, us-east or eu-de, of an instance that is chosen for you.
    mode : {"job", "batch", "session"}
        How jobs are run: each by itself, or in one Batch or Session, which the first opens and `close` ends.
    fractional_gates : bool
        Transpile to rx and rzz too. Refused where the device has none.
    twirling, dynamical_decoupling : mapping, optional
        Options of IBM's Sampler by these names; {"enable": True} is enough for the second. Either is refused
        for circuits that feed measurements forward.
    max_quantum_seconds : float
        A submission that is estimated to take longer needs `confirm`.
    confirm : bool or callable
        True allows it; a function is called with the `Cost` and decides.
    run_dir : path, optional
        Folder of the run whose `jobs` gets the records; where None, that of all runs (see `runs_home`).
    patience : float
        Seconds to wait at most while IBM takes no more jobs, because of its limits of requests and of pending
        jobs, or gives no answer.

    Raises
    ------
    ArgumentError
        If the mode or an option is unknown, the limit is not positive, or the service is a local one.
    """

    queues = True
    ideal = False

    def __init__(
        self,
        name: str,
        *,
        service: QiskitRuntimeService | None = None,
        instance: str | None = None,
        region: str | None = None,
        mode: Mode = "job",
        fractional_gates: bool = False,
        twirling: Mapping[str, Any] | None = None,
        dynamical_decoupling: Mapping[str, Any] | None = None,
        max_quantum_seconds: float = 60.0,
        confirm: bool | Callable[[Cost], bool] = False,
        run_dir: str | Path | None = None,
        patience: float = 600.0,
    ):
        if mode not in MODES:
            raise unknown_name("mode", mode, MODES)
        max_quantum_seconds = check_number("max_quantum_seconds", max_quantum_seconds, above=0)
        self.patience = check_number("patience", patience, least=0)
        self.options = {
            "twirling": dict(twirling or {}),
            "dynamical_decoupling": dict(dynamical_decoupling or {}),
        }
        try:
            checked = SamplerOptions(**self.options)
        except ValidationError as error:
            raise ArgumentError(f"An option of IBM's Sampler is not allowed: {error}") from error
        twirled = checked.twirling.enable_gates or checked.twirling.enable_measure
        self._needs_static = twirled or checked.dynamical_decoupling.enable
        self.name = name
        self.mode: Mode = mode
        self.fractional_gates = fractional_gates
        self.max_quantum_seconds = max_quantum_seconds
        self.confirm = confirm
        self.run_dir = Path(run_dir) if run_dir else None
        self._access = DeviceAccess(name, fractional_gates, mode)
        self._remote = IBMRemote(service, instance=instance, region=region)
        self._device = self._remote.device(self._access)
        self.recalibrations: tuple[str, ...] = ()

    def refresh(self, max_age: float = 0.0) -> bool:
        target, calibration = self._device.target, self._device.calibration()
        if not self._device.refresh(max_age):
            return False
        before = median_errors(target, calibration)
        after = median_errors(self._device.target, self._device.calibration())
        changed = (
            f"{self.name} has a new calibration of {after.calibration}, before it was that of "
            f"{before.calibration}: the median readout error went from {_percent(before.readout)} to "
            f"{_percent(after.readout)}, that of two-qubit gates from {_percent(before.two_qubit)} to "
            f"{_percent(after.two_qubit)}. Circuits, readout corrections and predictions are made again."
        )
        self.recalibrations = (*self.recalibrations, changed)
        warnings.warn(changed, CalibrationWarning, stacklevel=2)
        return True

    def identity(self) -> str:
        self.refresh(MAX_CALIBRATION_AGE_S)
        return f"ibm {self.name} {self._device.calibration()} fractional={self.fractional_gates}"

    def facts(self) -> dict[str, Any]:
        return {
            "device": self.name,
            "calibration": self._device.calibration(),
            "calibration_read": self._device.read_at.isoformat(timespec="seconds"),
            "recalibrations": self.recalibrations,
            "noise": "device",
            "num_qubits": self._device.num_qubits,
            "fractional_gates": self.fractional_gates,
        }

    def problems(self) -> tuple[str, ...]:
        offline = offline_problems(self.name, self._remote.given)
        if offline:
            return offline
        try:
            status = self._device.status()
        except BackendUnavailable as error:
            return (str(error),)
        if not status.operational:
            return (f"{self.name} is not in operation: {status.status_msg}.",)
        return ()

    def pending_jobs(self) -> int:
        return int(self._device.status().pending_jobs)

    def transpile(self, circuit: QuantumCircuit, level: int) -> QuantumCircuit:
        target = self._device.target
        try:
            return generate_preset_pass_manager(level, target=target, seed_transpiler=0).run(circuit)
        except TranspilerError as error:
            raise BackendUnavailable(
                f"{circuit.name} cannot be transpiled for {self.name}: {error}"
            ) from error

    def errors(self, circuit: QuantumCircuit) -> list[float]:
        return instruction_errors(circuit, self._device.target)

    def calibrated(self, circuit: QuantumCircuit) -> tuple[QuantumCircuit, Noise]:
        return on_used_qubits(circuit, self._device.target)

    def run(
        self,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        seed: int,
        request: Request | None = None,
    ) -> np.ndarray:
        return self.submit(circuit, bindings, shots, request).outcomes(patience=self.patience)

    def cost(self, circuits: int, shots: int) -> Cost:
        """What it would take to run one circuit with so many bindings, and so many shots of each."""
        jobs = len(self._blocks(circuits, shots))
        executions = circuits * shots
        seconds = SECONDS_PER_JOB * jobs + SECONDS_PER_EXECUTION * executions
        return Cost(circuits, shots, executions, jobs, seconds)

    def submit(  # type: ignore[override]  # its options by name
        self,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        request: Request | None = None,
        *,
        confirm: bool | Callable[[Cost], bool] | None = None,
        patience: float | None = None,
        progress: bool | Callable[[JobStatus], None] = True,
    ) -> DeviceJob:
        """Record one circuit with all its bindings, then post it.

        Parameters
        ----------
        circuit : QuantumCircuit
            As `transpile` returns it.
        bindings : ndarray, float64, (R, P)
            In the order of `circuit.parameters`.
        shots : int
            Shots of each row.
        request : Request, optional
            What the circuit is run for. It is kept, so that counts can be made after a restart.
        confirm : bool or callable, optional
            For this submission, in place of the engine's.
        patience : float, optional
            Seconds, in place of the engine's.
        progress : bool or callable
            Whether to show on stderr that IBM takes no more jobs just now; or a function that is called with
            a `JobStatus`.

        Returns
        -------
        DeviceJob
            At once; `job.counts()` waits.

        Raises
        ------
        ArgumentError
            If it is estimated to take longer than `max_quantum_seconds` and is not confirmed; if the options
            do not go with the circuit. Nothing is recorded or submitted.
        BackendUnavailable
            If the device is retired or unknown, the account is missing or has no access, or the server
            refused; if it is not known whether the server accepted; if it took no more jobs for longer than
            `patience`. The message names the tag once there is one, and `DeviceJob.send_rest` sends the rest.
        StorageError
            If the job cannot be recorded. Then nothing is submitted.
        """
        if self._needs_static and circuit.has_control_flow_op():
            raise ArgumentError(
                "twirling and dynamical_decoupling are not for circuits that feed measurements forward, as "
                "those of the loader 'dynamic': take another loader, or leave them out."
            )
        if [register.name for register in circuit.cregs] != ["c"]:
            raise ArgumentError(
                f"{circuit.name} measures into {', '.join(x.name for x in circuit.cregs) or 'no register'}: "
                "bits come back by the name of one register `c`; see `in_one_register`."
            )
        instance = self._device.crn
        if self.fractional_gates:
            self._device.check_fractional(circuit, bindings)
        cost = self.cost(len(bindings), shots)
        self._check(cost, self.confirm if confirm is None else confirm)
        path = record_job(
            (self.run_dir or runs_home()) / "jobs",
            request,
            self._blocks(len(bindings), shots),
            circuit=circuit,
            bindings=bindings,
            provider="ibm",
            device=self.name,
            instance=instance,
            region=self._remote.region,
            mode=self.mode,
            circuits=len(bindings),
            shots=shots,
            quantum_seconds=cost.quantum_seconds,
            fractional_gates=self.fractional_gates,
            options=self.options,
        )
        print(f"{self.name}: {cost}; job {path.stem}", file=sys.stderr)
        job = DeviceJob(path, lambda: self._remote, request)
        patience = self.patience if patience is None else patience
        return submit_parts(
            job, lambda part: post_part(job, part, circuit, bindings), patience=patience, progress=progress
        )

    def jobs(self) -> list[DeviceJob]:
        jobs = {
            job.path.resolve(): job
            for home in (None, self.run_dir)
            for job in find_jobs(home, service=self._remote.given)
            if job.record.device == self.name
        }
        return sorted(jobs.values(), key=lambda job: job.record.recorded, reverse=True)

    def close(self) -> None:
        """End the Batch or Session; what it has queued is still run."""
        self._device.close()

    def _blocks(self, circuits: int, shots: int) -> list[Block]:
        """Rows and shots of each job: shots are split evenly by the device's limit, then rows by a job's."""
        pieces = math.ceil(shots / self._device.max_shots)
        shots_of_piece = [shots // pieces + (i < shots % pieces) for i in range(pieces)]
        rows = max(1, MAX_EXECUTIONS_PER_JOB // shots_of_piece[0])
        return [
            Block(start, min(start + rows, circuits), count)
            for start in range(0, circuits, rows)
            for count in shots_of_piece
        ]

    def _check(self, cost: Cost, confirm: bool | Callable[[Cost], bool]) -> None:
        """Refuse what takes longer than is allowed."""
        if cost.quantum_seconds <= self.max_quantum_seconds:
            return
        if not (confirm(cost) if callable(confirm) else confirm):
            raise ArgumentError(
                f"{self.name}: {cost}, more than max_quantum_seconds={self.max_quantum_seconds:g}: pass "
                "confirm=True, or a higher limit."
            )


def _percent(error: float | None) -> str:
    return "unknown" if error is None else f"{error:.2%}"
