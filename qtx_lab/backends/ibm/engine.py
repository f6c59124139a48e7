"""`IBMEngine`: IBM's devices as an engine, all rows in one PUB, each job recorded before it is submitted."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError
from qiskit import QuantumCircuit
from qiskit.transpiler import Target, generate_preset_pass_manager
from qiskit.transpiler.exceptions import TranspilerError
from qiskit_ibm_runtime import QiskitRuntimeService
from qiskit_ibm_runtime.options_models.sampler import SamplerOptions

from ...checks import check_number
from ...circuits.resources import resources
from ...errors import ArgumentError, BackendUnavailable, CalibrationWarning, StorageError, unknown_name
from ...storage import runs_home
from ..base import Engine, JobStatus
from ..costs import Bill, Cost, RowPlan, RunCost
from ..exact import Noise
from ..noise import instruction_errors, median_errors, on_used_qubits
from ..requests import CalibrationRequest, MitigatedRowRequest, PlannedRun, Request
from ..waiting import shot_duration
from .budget import Confirm, CostGuard, billed_job
from .jobs import DeviceJob, find_jobs
from .ledger import Block, record_job
from .records import PartRecord
from .remote import DeviceAccess, IBMRemote, offline_problems
from .submission import PATIENCE_S, check_waiting, post_part, submit_parts

MAX_EXECUTIONS_PER_JOB = 10_000_000
"""Rows times shots of one job. From "Job limits" in IBM's documentation."""

SECONDS_PER_JOB, SECONDS_PER_EXECUTION = 2.0, 0.00035
"""Quantum time of a job without error mitigation. From "Workload usage" in IBM's documentation."""

REPETITION_DELAY_S = 0.00025
"""Wait between two shots on IBM's devices, which the seconds per execution contain."""

MAX_CALIBRATION_AGE_S = 3600.0
"""A device's calibration is read again after this time, and before each submission, seconds."""

Mode = Literal["job", "batch", "session"]
MODES = ("job", "batch", "session")


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
    account : str, optional
        Name of a saved account; where None, the account in the environment, or else the default one on disk.
    plans_preference, instance_tags : sequence of str, optional
        Of an instance that is chosen for you: names of plans, as "open", the most preferred first; tags that
        it must have. Not together with `instance`.
    max_quantum_seconds : float
        A call that is estimated to take longer, with all that it sends, needs `confirm`.
    budget : str or float, optional
        Quantum time that all jobs recorded in the folder of runs may take, in any process: seconds, or a text
        as "10 min" or "10 min per 28 days". The folder is that of `run_dir`, or else `runs_home`. See
        `CostGuard`.
    confirm : bool or callable
        A function is called with the `Cost` of a call that exceeds the limit or the budget, and decides. True
        allows calls above `max_quantum_seconds`, but none above the budget.
    run_dir : path, optional
        Folder of the run whose `jobs` gets the records; where None, that of all runs (see `runs_home`).
    patience : float
        Seconds to wait at most while IBM takes no more jobs, because of its limits of requests and of pending
        jobs, or gives no answer.

    Raises
    ------
    ArgumentError, DtypeError
        If the mode or an option is unknown; if the limit, the budget or `confirm` is not allowed; if the
        service is a local one, or is given together with options of an account.
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
        account: str | None = None,
        plans_preference: Sequence[str] | None = None,
        instance_tags: Sequence[str] | None = None,
        max_quantum_seconds: float = 60.0,
        budget: str | float | None = None,
        confirm: Confirm = False,
        run_dir: str | Path | None = None,
        patience: float = PATIENCE_S,
    ):
        if mode not in MODES:
            raise unknown_name("mode", mode, MODES)
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
        self.run_dir = Path(run_dir) if run_dir else None
        self._guard = CostGuard(name, max_quantum_seconds, budget, confirm, self.run_dir, self._settle)
        self._access = DeviceAccess(name, fractional_gates, mode)
        self._remote = IBMRemote(
            service,
            account=account,
            instance=instance,
            region=region,
            plans_preference=plans_preference,
            instance_tags=instance_tags,
        )
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
            "options": {name: given for name, given in self.options.items() if given},
        }

    def problems(self) -> tuple[str, ...]:
        offline = offline_problems(self.name, self._remote)
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
        return transpile_for(self._device.target, self.name, circuit, level)

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
        return self.submit(circuit, bindings, shots, request).outcomes()

    def cost(self, runs: Sequence[PlannedRun]) -> Cost:
        return estimated_cost(runs, self._device.target, self._device.max_shots, self.mode)

    def reserved(
        self, runs: Sequence[PlannedRun], confirm: Confirm | None = None
    ) -> AbstractContextManager[object]:
        return self._guard.allow(self.cost(runs) if runs else Cost(()), confirm)

    def plan(self, runs: Sequence[PlannedRun], shots: int, planned_on: Engine | None = None) -> RowPlan:
        if planned_on is None:
            cost, target = self.cost(runs), f"{self.name}, calibrated {self._device.calibration()}"
        else:
            cost, target = planned_on.cost(runs), planned_on.name
        guard = self._guard
        return RowPlan(
            self.name,
            target,
            cost,
            shots,
            max_quantum_seconds=guard.max_quantum_seconds,
            budget=str(guard.budget) if guard.budget else None,
            budget_left=guard.left(),
            problems=guard.exceeded(cost),
        )

    def bill(self, *, ask: bool = True) -> Bill:
        if ask:
            self._settle()
        records = (job.record for job in find_jobs(self._guard.home(), service=self._remote.given))
        jobs = tuple(billed_job(record) for record in records if record.provider == "ibm")
        guard = self._guard
        return Bill(jobs, None, str(guard.budget) if guard.budget else None, guard.left())

    def _settle(self) -> None:
        """Ask IBM what it charged for recorded jobs, as far as it answers."""
        for job in find_jobs(self._guard.home(), service=self._remote.given):
            try:
                if job.record.provider == "ibm":
                    job.settle()
            except StorageError:
                continue
            except BackendUnavailable:
                return  # each further question would take as long

    def submit(  # type: ignore[override]  # its options by name
        self,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        request: Request | None = None,
        *,
        confirm: Confirm | None = None,
        patience: float | None = None,
        progress: bool | Callable[[JobStatus], None] = True,
        send: bool = True,
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
            For this submission, in place of the engine's: True sends it, whatever limit it exceeds.
        patience : float, optional
            Seconds, in place of the engine's.
        progress : bool or callable
            Whether to show on stderr that IBM takes no more jobs just now; or a function that is called with
            a `JobStatus`.
        send : bool
            False only records the job: its `send_rest` sends it.

        Returns
        -------
        DeviceJob
            At once; `job.counts()` waits.

        Raises
        ------
        CostError
            If it is estimated to take longer than `max_quantum_seconds`, or than is left of the budget, and
            is not confirmed. Nothing is recorded or submitted.
        ArgumentError
            If the options do not go with the circuit, or `confirm` is no answer. Nothing is recorded or
            submitted.
        BackendUnavailable
            If the device is retired or unknown, the account is missing or has no access, or the server
            refused; if it is not known whether the server accepted; if it took no more jobs for longer than
            `patience`. The message names the tag once there is one, and `DeviceJob.send_rest` sends the rest.
        StorageError
            If the job cannot be recorded. Then nothing is submitted.
        """
        check_waiting(None, patience, progress)
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
        cost = self.cost([PlannedRun(circuit, len(bindings), shots, _purpose(request))])
        with self._guard.allow(cost, confirm) as leave, leave.recorded(cost.quantum_seconds):
            path = record_job(
                (self.run_dir or runs_home()) / "jobs",
                request,
                split_into_jobs(len(bindings), shots, self._device.max_shots),
                circuit=circuit,
                bindings=bindings,
                provider="ibm",
                device=self.name,
                account=self._remote.account,
                instance=instance,
                region=self._remote.region,
                mode=self.mode,
                circuits=len(bindings),
                shots=shots,
                quantum_seconds=cost.quantum_seconds,
                **self._guard.facts(),
                fractional_gates=self.fractional_gates,
                options=self.options,
            )
        print(f"{self.name}: {cost}; job {path.stem}", file=sys.stderr)
        job = DeviceJob(path, lambda: self._remote, request, self.patience)
        if not send:
            return job

        def post(part: PartRecord) -> str:
            return post_part(self._remote, job.record, part, circuit, bindings)

        patience = self.patience if patience is None else patience
        submit_parts(path, job.remote, post, patience=patience, progress=progress)
        return job

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


def split_into_jobs(circuits: int, shots: int, max_shots: int) -> list[Block]:
    """Rows and shots of each job: shots are split evenly by the device's limit, then rows by a job's."""
    pieces = math.ceil(shots / max_shots)
    shots_of_piece = [shots // pieces + (i < shots % pieces) for i in range(pieces)]
    rows = max(1, MAX_EXECUTIONS_PER_JOB // shots_of_piece[0])
    return [
        Block(start, min(start + rows, circuits), count)
        for start in range(0, circuits, rows)
        for count in shots_of_piece
    ]


def transpile_for(target: Target, name: str, circuit: QuantumCircuit, level: int) -> QuantumCircuit:
    """The circuit in the gates of a device's target, as `Engine.transpile`."""
    try:
        return generate_preset_pass_manager(level, target=target, seed_transpiler=0).run(circuit)
    except TranspilerError as error:
        raise BackendUnavailable(f"{circuit.name} cannot be transpiled for {name}: {error}") from error


def estimated_cost(runs: Sequence[PlannedRun], target: Target, max_shots: int, mode: Mode = "job") -> Cost:
    """What some runs take on a device, by IBM's rule and by the durations of its gates.

    Parameters
    ----------
    runs : sequence of PlannedRun
    target : Target
        Has the durations of the device's gates.
    max_shots : int
        Most shots of a circuit in one job.
    mode : {"job", "batch", "session"}
        How jobs are run.
    """
    costs, longest = [], SECONDS_PER_EXECUTION
    for run in runs:
        blocks = split_into_jobs(run.rows, run.shots, max_shots)
        duration = shot_duration(run.circuit, target)
        # The rule leaves 100 µs for the circuit, which few circuits need.
        per_execution = max(SECONDS_PER_EXECUTION, REPETITION_DELAY_S + duration)
        longest = max(longest, per_execution)
        seconds = SECONDS_PER_JOB * len(blocks) + per_execution * run.rows * run.shots
        size = resources(run.circuit)
        costs.append(
            RunCost(
                run.purpose,
                run.rows,
                run.shots,
                len(blocks),
                seconds,
                len({q for i in run.circuit.data if i.operation.name != "barrier" for q in i.qubits}),
                size.depth,
                size.two_qubit_gates,
                duration,
            )
        )
    how = f"IBM's rule of {SECONDS_PER_JOB:g} s a job and {1e3 * SECONDS_PER_EXECUTION:g} ms an execution"
    if longest > SECONDS_PER_EXECUTION:
        how += f", or up to {1e3 * longest:.2g} ms where the circuit takes longer"
    elif costs:
        how += (
            f", which counts circuits of up to {1e6 * (SECONDS_PER_EXECUTION - REPETITION_DELAY_S):.0f} µs "
            "alike: between two shots the device waits longer than these last"
        )
    if mode == "session":
        how += "; a session is billed from its first job until it is closed, also while it waits"
    return Cost(tuple(costs), how)


def _purpose(request: Request | None) -> str:
    """What a request is for, as a cost names it."""
    match request:
        case MitigatedRowRequest():
            return f"noise level {request.noise_level:g}"
        case CalibrationRequest():
            return "readout calibration"
    return "rows"


def _percent(error: float | None) -> str:
    return "unknown" if error is None else f"{error:.2%}"
