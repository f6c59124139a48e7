"""IBM's devices: the account as IBM's own tools keep it, one PUB for all rows, and jobs that are posted once."""

from __future__ import annotations

import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import requests
from pydantic import ValidationError
from qiskit import QuantumCircuit
from qiskit.primitives.containers.sampler_pub import SamplerPub
from qiskit.providers.exceptions import QiskitBackendNotFoundError
from qiskit.transpiler import generate_preset_pass_manager
from qiskit.transpiler.exceptions import TranspilerError
from qiskit_ibm_runtime import Batch, QiskitRuntimeService, Session
from qiskit_ibm_runtime.exceptions import IBMError, IBMInputValueError
from qiskit_ibm_runtime.executor_sampler import Sampler
from qiskit_ibm_runtime.options_models.sampler import SamplerOptions
from qiskit_ibm_runtime.utils import validate_rzz_pubs
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError
from urllib3.util.retry import Retry

from ...errors import ArgumentError, BackendUnavailable, unknown_name
from ...storage import runs_home
from ..counts import RowRequest
from ..exact import Noise
from ..noise import instruction_errors, on_used_qubits
from .ledger import Job, JobStatus, Refused, Unreachable, find_jobs, record_job, submit_parts

RETIRED = re.compile(r"ibmq_.+|ibmqx\d+|simulator_(statevector|mps|stabilizer|extended_stabilizer)")
"""IBM's first devices and all its simulators in the cloud: none is left."""

MAX_EXECUTIONS = 10_000_000
"""Of one job: rows times shots. From "Job limits" in IBM's documentation."""

SECONDS_PER_JOB, SECONDS_PER_EXECUTION = 2.0, 0.00035
"""Quantum time of a job without error mitigation: the quick formula of "Workload usage" in IBM's documentation."""

STATES = {"INITIALIZING": "queued", "QUEUED": "queued", "RUNNING": "running", "DONE": "done"}
STATES |= {"CANCELLED": "cancelled", "ERROR": "failed"}
RETRIED = (500, 502, 503, 504, 520, 521, 522, 524)
"""Status codes at which a GET is sent again: those of IBM's own client."""

NO_ACCOUNT = (
    "No IBM Quantum account is saved on this machine, and QISKIT_IBM_TOKEN is not set: save one with "
    "`QiskitRuntimeService.save_account(token=...)` of qiskit_ibm_runtime, or hand in service=."
)


@dataclass(frozen=True)
class Cost:
    """What a submission would take.

    Attributes
    ----------
    circuits, shots, executions, jobs : int
        Rows bound into the circuit, shots of each, their product, and into how many jobs that is split.
    quantum_seconds : float
        Time on the device that IBM would bill, estimated; queueing not counted.
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


class IBMEngine:
    """A device of IBM's, as an `Engine` that queues jobs. Nothing asks the network before a circuit is run.

    Parameters
    ----------
    name : str
        Of the device, as `ibm_fez`.
    service : QiskitRuntimeService, optional
        A ready one; else the account in the environment (QISKIT_IBM_TOKEN, QISKIT_IBM_INSTANCE) or on disk.
    instance, region : str, optional
        The instance, by CRN or name; the region, us-east or eu-de, of an instance that is chosen for you.
    mode : {"job", "batch", "session"}
        How jobs are run: each by itself, or in one Batch or Session, opened by the first and ended by `close`.
    fractional_gates : bool
        Transpile to rx and rzz too; refused where the device has none.
    twirling, dynamical_decoupling : mapping, optional
        Options of IBM's Sampler by these names; {"enable": True} is enough for the second, and either is refused
        for circuits that feed measurements forward.
    max_quantum_seconds : float
        A submission that is estimated to take longer needs `confirm`.
    confirm : bool or callable
        True allows it; a function is handed the `Cost` and says.
    run_dir : path, optional
        Folder of the run, whose `jobs` holds the ledger; where None, that of all runs (see `runs_home`).

    Raises
    ------
    ArgumentError
        If the mode or an option is unknown, the limit is not positive or the service is a local one.
    """

    ideal = False

    def __init__(
        self,
        name: str,
        *,
        service: QiskitRuntimeService | None = None,
        instance: str | None = None,
        region: str | None = None,
        mode: Literal["job", "batch", "session"] = "job",
        fractional_gates: bool = False,
        twirling: Mapping[str, Any] | None = None,
        dynamical_decoupling: Mapping[str, Any] | None = None,
        max_quantum_seconds: float = 60.0,
        confirm: bool | Callable[[Cost], bool] = False,
        run_dir: str | Path | None = None,
    ):
        if mode not in ("job", "batch", "session"):
            raise unknown_name("mode", mode, ("job", "batch", "session"))
        if not isinstance(max_quantum_seconds, int | float) or not max_quantum_seconds > 0:
            raise ArgumentError(
                f"max_quantum_seconds={max_quantum_seconds!r} is not allowed: it must be positive."
            )
        self.options = {
            "twirling": dict(twirling or {}),
            "dynamical_decoupling": dict(dynamical_decoupling or {}),
        }
        try:
            asked = SamplerOptions(**self.options)
        except ValidationError as error:
            raise ArgumentError(f"An option of IBM's Sampler is not allowed: {error}") from error
        twirled = asked.twirling.enable_gates or asked.twirling.enable_measure
        self._needs_static = twirled or asked.dynamical_decoupling.enable
        self.name = name
        self.mode = mode
        self.fractional_gates = fractional_gates
        self.max_quantum_seconds = max_quantum_seconds
        self.confirm = confirm
        self.run_dir = Path(run_dir) if run_dir else None
        self._remote = IBMRemote(service, instance=instance, region=region)
        self._device: Any = None
        self._opened: Batch | Session | None = None

    def identity(self) -> str:
        return f"ibm {self.name} {self.facts()['calibration']} fractional={self.fractional_gates}"

    def facts(self) -> dict[str, Any]:
        device = self._backend()
        with _explained(f"reading the calibration of {self.name}"):
            properties = device.properties()
        calibrated = properties.last_update_date.isoformat() if properties else None
        return {
            "device": self.name,
            "calibration": calibrated,
            "noise": "device",
            "num_qubits": device.num_qubits,
            "fractional_gates": self.fractional_gates,
        }

    def problems(self) -> tuple[str, ...]:
        offline = offline_problems(self.name, self._remote.given)
        if offline:
            return offline
        try:
            with _explained(f"asking whether {self.name} runs"):
                status = self._backend().status()
        except BackendUnavailable as error:
            return (str(error),)
        if not status.operational:
            return (f"{self.name} is not in operation: {status.status_msg}.",)
        return ()

    def pending_jobs(self) -> int:
        with _explained(f"asking for the queue of {self.name}"):
            return int(self._backend().status().pending_jobs)

    def transpile(self, circuit: QuantumCircuit, level: int) -> QuantumCircuit:
        target = self._backend().target
        try:
            return generate_preset_pass_manager(level, target=target, seed_transpiler=0).run(circuit)
        except TranspilerError as error:
            raise BackendUnavailable(
                f"{circuit.name} cannot be transpiled for {self.name}: {error}"
            ) from error

    def errors(self, circuit: QuantumCircuit) -> list[float]:
        return instruction_errors(circuit, self._backend().target)

    def calibrated(self, circuit: QuantumCircuit) -> tuple[QuantumCircuit, Noise]:
        return on_used_qubits(circuit, self._backend().target)

    def run(self, circuit: QuantumCircuit, bindings: np.ndarray, shots: int, seed: int) -> np.ndarray:
        return self.submit(circuit, bindings, shots).outcomes()

    def cost(self, circuits: int, shots: int) -> Cost:
        """What running one circuit with so many bindings would take."""
        parts = len(self._parts(circuits, shots))
        executions = circuits * shots
        seconds = SECONDS_PER_JOB * parts + SECONDS_PER_EXECUTION * executions
        return Cost(circuits, shots, executions, parts, seconds)

    def submit(
        self,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        request: RowRequest | None = None,
        *,
        confirm: bool | Callable[[Cost], bool] | None = None,
    ) -> Job:
        """Record, then post, one circuit with all its bindings.

        Parameters
        ----------
        circuit : QuantumCircuit
            From `transpile`.
        bindings : ndarray, (R, P), float64
            In the order of `circuit.parameters`.
        shots : int
            Of each row.
        request : RowRequest, optional
            What the bindings are of; kept, so that counts can be made after a restart.
        confirm : bool or callable, optional
            For this submission, in place of the engine's.

        Returns
        -------
        Job
            At once; `job.counts()` waits.

        Raises
        ------
        ArgumentError
            If it is estimated to take longer than `max_quantum_seconds` and is not confirmed; if the options do
            not go with the circuit. Nothing is recorded or submitted.
        BackendUnavailable
            If the device is retired or unknown, the account is missing or has no access, the server refused; if
            it is not known whether the server accepted. The message names the tag once there is one.
        StorageError
            If the job cannot be recorded. Then nothing is submitted.
        """
        if self._needs_static and circuit.has_control_flow_op():
            raise ArgumentError(
                "twirling and dynamical_decoupling are not for circuits that feed measurements forward, as those "
                "of the loader 'dynamic': take another loader, or leave them out."
            )
        self._backend()
        if self.fractional_gates:
            with _explained(f"{circuit.name} on {self.name}"):
                validate_rzz_pubs([SamplerPub.coerce((circuit, bindings))])
        cost = self.cost(len(bindings), shots)
        self._check(cost, self.confirm if confirm is None else confirm)
        path = record_job(
            (self.run_dir or runs_home()) / "jobs",
            request,
            self._parts(len(bindings), shots),
            provider="ibm",
            device=self.name,
            instance=self._device._instance,
            region=self._remote.region,
            mode=self.mode,
            circuits=len(bindings),
            shots=shots,
            quantum_seconds=cost.quantum_seconds,
        )
        print(f"{self.name}: {cost}; job {path.stem}", file=sys.stderr)
        post = partial(self._post, circuit, bindings)
        return submit_parts(Job(path, lambda: self._remote, request), post)

    def jobs(self) -> list[Job]:
        """The recorded jobs of this device, newest first; asks nobody."""
        jobs = {
            job.path.resolve(): job
            for home in (None, self.run_dir)
            for job in find_jobs(home, service=self._remote.given)
            if job.record["device"] == self.name
        }
        return sorted(jobs.values(), key=lambda job: job.record["recorded"], reverse=True)

    def close(self) -> None:
        """End the Batch or Session: what it has queued is still run."""
        if self._opened:
            with _explained(f"closing the {self.mode} on {self.name}"):
                self._opened.close()
            self._opened = None

    def _backend(self) -> Any:
        """IBM's object of the device, asked for once."""
        if self._device is None:
            offline = offline_problems(self.name, self._remote.given)
            if offline:
                raise BackendUnavailable(" ".join(offline))
            service = self._remote.service()
            with _explained(f"asking for {self.name}"):
                try:
                    self._device = service.backend(self.name, use_fractional_gates=self.fractional_gates)
                except QiskitBackendNotFoundError:
                    raise self._not_found(service) from None
            self._remote.crn = self._device._instance
        return self._device

    def _not_found(self, service: Any) -> BackendUnavailable:
        """Why there is no such device. IBM's client hides why it could not list any, so it is asked again."""
        with _explained(f"listing the devices of {service.active_instance()}"):
            devices = [device["name"] for device in service._get_api_client().list_backends()]
        return BackendUnavailable(
            f"This account has no device {self.name!r}. It has: {', '.join(sorted(devices)) or 'none'}."
        )

    def _parts(self, circuits: int, shots: int) -> list[dict[str, Any]]:
        """Rows and shots of each job: shots split evenly by the device's limit, then rows by that of a job."""
        most = self._backend().configuration().max_shots
        pieces = math.ceil(shots / most)
        each = [shots // pieces + (i < shots % pieces) for i in range(pieces)]
        rows = max(1, MAX_EXECUTIONS // each[0])
        return [
            {"start": start, "stop": min(start + rows, circuits), "shots": count}
            for start in range(0, circuits, rows)
            for count in each
        ]

    def _check(self, cost: Cost, confirm: bool | Callable[[Cost], bool]) -> None:
        """Refuse what takes longer than was allowed."""
        if cost.quantum_seconds <= self.max_quantum_seconds:
            return
        if not (confirm(cost) if callable(confirm) else confirm):
            raise ArgumentError(
                f"{self.name}: {cost}, more than max_quantum_seconds={self.max_quantum_seconds:g}: hand in "
                "confirm=True, or a higher limit."
            )

    def _mode(self) -> Any:
        """What IBM's Sampler runs on: the device, or its open Batch or Session."""
        if self.mode == "job":
            return self._device
        if self._opened is None:
            with _explained(f"opening a {self.mode} on {self.name}"):
                self._opened = (Batch if self.mode == "batch" else Session)(self._device)
        return self._opened

    def _post(self, circuit: QuantumCircuit, bindings: np.ndarray, part: Mapping[str, Any]) -> str:
        """Post one part; see `submit_parts`."""
        tags = [part["tag"].rpartition(".")[0], part["tag"]]
        options = {**self.options, "environment": {"job_tags": tags}}
        bound = bindings[part["start"] : part["stop"]]
        # IBM's client takes an empty array of parameters for a single circuit.
        pubs = [(circuit, bound)] if bound.shape[1] else [(circuit,)] * len(bound)
        posted = _OnePost()
        try:
            sampler = Sampler(mode=self._mode(), options=options)
            with _posting_by(posted, self._device), _explained(f"submitting to {self.name}"):
                return str(sampler.run(pubs, shots=part["shots"]).job_id())
        except Exception as error:
            if not posted.sent or 400 <= posted.status < 500:
                raise Refused(str(error)) from error
            raise


class IBMRemote:
    """The jobs of an account at IBM, by id and tag; the `Remote` of the ledger.

    Parameters
    ----------
    given : QiskitRuntimeService, optional
        A ready service; else one is made, and the network asked, when first needed.
    instance, region : str, optional
        Of the service that is made.
    """

    def __init__(
        self,
        given: QiskitRuntimeService | None = None,
        *,
        instance: str | None = None,
        region: str | None = None,
    ):
        if given is not None and given.is_local:
            raise ArgumentError("service is a local one, which runs no jobs at IBM: use provider='aer'.")
        self.given = given
        self.instance = instance
        self.region = region
        self.crn = instance if instance and instance.startswith("crn:") else None
        self._made: QiskitRuntimeService | None = given
        self._jobs: dict[str, Any] = {}

    def service(self) -> Any:
        """IBM's service, logged in."""
        if self._made is None:
            if not has_account():
                raise BackendUnavailable(NO_ACCOUNT)
            with _explained("logging in to IBM Quantum"):
                self._made = QiskitRuntimeService(instance=self.instance, region=self.region)
        return self._made

    def lookup(self, tag: str) -> list[str]:
        service = self.service()
        with _explained(f"looking for job {tag}"):
            found = service.jobs(job_tags=[tag], limit=10, descending=False, instance=self.crn)
            return [job.job_id() for job in found]

    def status(self, id: str) -> JobStatus:
        with _explained(f"asking for job {id}"):
            job = self._job(id)
            state = STATES.get(job.status(), "running")
            if state == "queued":
                place = job.metrics().get("position_in_queue")
                return JobStatus(state, place, pending=None if place else job.backend().status().pending_jobs)
            said = job.error_message() if state == "failed" else None
            return JobStatus(state, reason=said and " ".join(said.split()))

    def outcomes(self, id: str) -> np.ndarray:
        with _explained(f"fetching the results of job {id}"):
            try:
                arrays = [pub.data.c.array for pub in self._job(id).result()]
                return np.concatenate([array.reshape(-1, *array.shape[-2:]) for array in arrays])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise Unreachable(f"The results of job {id} cannot be read ({error}).") from error

    def cancel(self, id: str) -> None:
        from qiskit_ibm_runtime import RuntimeInvalidStateError

        with _explained(f"cancelling job {id}"):
            try:
                self._job(id).cancel()
            except RuntimeInvalidStateError:  # it has ended
                return

    def _job(self, id: str) -> Any:
        if id not in self._jobs:
            self._jobs[id] = self.service().job(id)
        return self._jobs[id]


def offline_problems(name: str, service: object | None) -> tuple[str, ...]:
    """What is known to be wrong without asking anybody: a retired name, no account.

    >>> offline_problems("ibmq_qasm_simulator", service=object())
    ("'ibmq_qasm_simulator' is retired: IBM runs it no more. Simulate with provider='aer', or name a device of today.",)
    """
    problems = []
    if RETIRED.fullmatch(name):
        problems.append(
            f"{name!r} is retired: IBM runs it no more. Simulate with provider='aer', or name a device of today."
        )
    if service is None and not has_account():
        problems.append(NO_ACCOUNT)
    return tuple(problems)


def has_account() -> bool:
    """Whether IBM's tools find an account, in the environment or on disk.

    Raises
    ------
    BackendUnavailable
        If the file of accounts cannot be read.
    """
    if os.environ.get("QISKIT_IBM_TOKEN"):
        return True
    try:
        return bool(QiskitRuntimeService.saved_accounts())
    except (ValueError, OSError, IBMError) as error:
        raise BackendUnavailable(f"IBM's file of saved accounts cannot be read: {error}") from error


_POSTING = threading.Lock()


class _OnePost(HTTPAdapter):
    """Sends `POST .../jobs` a single time, whatever comes back, and remembers what did.

    IBM's client sends a POST again after a 5xx, which may be a second job.
    """

    def __init__(self) -> None:
        super().__init__(max_retries=Retry(total=5, connect=3, backoff_factor=0.5, status_forcelist=RETRIED))
        self.sent = False
        self.status = 0

    def send(self, request: Any, *arguments: Any, **options: Any) -> Any:
        if request.method != "POST" or not request.path_url.partition("?")[0].endswith("/jobs"):
            return super().send(request, *arguments, **options)
        if self.sent:
            raise requests.ConnectionError("a second POST of the same job was stopped", request=request)
        self.sent = True
        try:
            response = super().send(request, *arguments, **options)
        except requests.ConnectionError as error:
            reason = getattr(error.args[0] if error.args else None, "reason", None)
            self.sent = not isinstance(reason, NewConnectionError | ConnectTimeoutError)
            raise
        self.status = response.status_code
        return response


@contextmanager
def _posting_by(adapter: _OnePost, device: Any) -> Iterator[None]:
    """While this lasts, IBM's client posts jobs of the device through this adapter, one thread at a time."""
    session = device.service._get_api_client(device._instance)._session
    url = f"{session.base_url}/jobs"
    with _POSTING:
        session.mount(url, adapter)  # the longest prefix wins
        try:
            if session.get_adapter(url) is not adapter:
                raise BackendUnavailable("This qiskit-ibm-runtime cannot be kept from posting twice.")
            yield
        finally:
            session.adapters.pop(url, None)


@contextmanager
def _explained(doing: str) -> Iterator[None]:
    """Errors of IBM's client as ours, with what to do about them."""
    try:
        yield
    except (BackendUnavailable, ArgumentError):
        raise
    except (IBMInputValueError, TranspilerError) as error:
        raise BackendUnavailable(f"IBM refused {doing}: {error}") from error
    except (IBMError, QiskitBackendNotFoundError, requests.RequestException, OSError) as error:
        status = _status_of(error)
        # A 401 may pass: after a failed login, IBM's client sends what the server then takes for no login at all.
        kind = BackendUnavailable if 400 <= status < 500 and status not in (401, 408, 429) else Unreachable
        raise kind(_advice(status, doing, error)) from error


def _status_of(error: BaseException | None) -> int:
    """The HTTP status that an error of IBM's client, or its cause, speaks of; 0 where there was none."""
    while error is not None:
        found = re.search(r"(\d{3}) (?:Client|Server) Error|too many (\d{3}) error", str(error))
        status = getattr(error, "status_code", 0)
        if found or (isinstance(status, int) and status > 0):
            return int(found[1] or found[2]) if found else status
        error = error.__cause__
    return 0


def _advice(status: int, doing: str, error: Exception) -> str:
    """One sentence for a person."""
    what = {
        400: "it was not understood; at a login: the API key is not valid",
        401: "the login failed: if it stays so, the API key is not valid any more; save the account again",
        403: "the account may not do this: check instance= and what the account has access to",
        404: "it is not there: check the name, and instance=",
        409: "it is in a state that does not allow it",
        429: "too many requests, or the limit of jobs is reached: wait, then try again",
    }.get(
        status,
        "IBM's server failed; try again later" if status >= 500 else "no answer came; check the network",
    )
    said = re.sub(r"[\\'\"]+", "", " ".join(str(error).split()))  # quoted as often as it was passed on
    return f"IBM Quantum, {doing}: {what} ({f'status {status}; ' if status else ''}{said[:300]})."
