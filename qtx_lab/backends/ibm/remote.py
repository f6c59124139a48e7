"""Everything that asks IBM's client: the jobs of an account (`IBMRemote`) and a device (`IBMDevice`)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

import numpy as np
import requests
from qiskit import QuantumCircuit
from qiskit.primitives.containers.sampler_pub import SamplerPub
from qiskit.providers.exceptions import QiskitBackendNotFoundError
from qiskit.transpiler import Target
from qiskit.transpiler.exceptions import TranspilerError
from qiskit_ibm_runtime import Batch, QiskitRuntimeService, RuntimeInvalidStateError, Session
from qiskit_ibm_runtime.api.exceptions import RequestsApiError
from qiskit_ibm_runtime.exceptions import IBMError, IBMInputValueError, RuntimeJobNotFound
from qiskit_ibm_runtime.executor_sampler import Sampler
from qiskit_ibm_runtime.utils import validate_rzz_pubs

from ...errors import ArgumentError, BackendUnavailable
from ..base import JobState, JobStatus
from .accounts import account_problem, check_account_options, listed_instances
from .client_internals import SinglePost, device_names, posting_by

RETIRED = re.compile(r"ibmq_.+|ibmqx\d+|simulator_(statevector|mps|stabilizer|extended_stabilizer)")
"""Names of IBM's first devices and of all its simulators in the cloud, none of which is left."""

IBM_JOB_STATES = {
    "INITIALIZING": JobState.QUEUED,
    "QUEUED": JobState.QUEUED,
    "RUNNING": JobState.RUNNING,
    "DONE": JobState.DONE,
    "CANCELLED": JobState.CANCELLED,
    "ERROR": JobState.FAILED,
}

HTTP_STATUS = re.compile(r"(\d{3}) (?:Client|Server) Error|too many (\d{3}) error|Status code: (\d{3})")
"""How the messages of requests, urllib3 and IBM's login name an HTTP status."""


class Unreachable(BackendUnavailable):
    """The server gave no usable answer; it may give one later."""


class Gone(BackendUnavailable):
    """The server has no such job, or no longer."""


class Refused(Exception):
    """There is certainly no job: the server said no, or the request never left."""


class Busy(Refused):
    """The server takes no job now, because of a limit of requests or of pending jobs, which may pass."""


class SessionClosed(Refused):
    """The Batch or Session takes no more jobs; the next post opens another."""


PENDING_JOBS = re.compile(r"\b3458\b|(limit|number)\b.{0,20}\b(pending|concurrent) jobs")
"""How IBM's messages name its limit of pending jobs. From "Error code registry" in IBM's documentation."""


class Remote(Protocol):
    """The machine that holds the jobs. Every method may raise BackendUnavailable."""

    def lookup(self, tag: str) -> list[str]:
        """Ids of the jobs with this tag, oldest first."""

    def status(self, id: str) -> JobStatus:
        """Where the job is: queued, running or ended. Raises Gone where there is no such job."""

    def outcomes(self, id: str) -> np.ndarray:
        """Measured bits of a job that is done, uint8 (rows, shots, B), packed as in `BitArray`.

        Raises Gone where there is no such job.
        """

    def cancel(self, id: str) -> None:
        """Cancel the job; no error where it has ended already. Raises Gone where there is no such job."""

    def post(
        self,
        device: DeviceAccess,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        *,
        tags: list[str],
        options: Mapping[str, Any],
    ) -> str:
        """Post a job, a single time, and return its id; see `IBMDevice.post`."""


@dataclass(frozen=True)
class DeviceAccess:
    """A device, and how jobs are run there, as `IBMEngine` takes them."""

    name: str
    fractional_gates: bool = False
    mode: Literal["job", "batch", "session"] = "job"


class IBMRemote:
    """The jobs of an account at IBM, by id and tag: a `Remote`.

    Parameters
    ----------
    given : QiskitRuntimeService, optional
        A service that is logged in; where None, one is made, and the network used, when it is first needed.
    account : str, optional
        Name of the saved account that the service is made for; where None, the account in the environment,
        or else the default one on disk.
    instance, region : str, optional
        Of the service that is made.
    plans_preference, instance_tags : sequence of str, optional
        Of an instance that is chosen for you: names of plans, the most preferred first; tags that it must
        have.

    Attributes
    ----------
    crn : str or None
        The instance that jobs are looked for in, where it is known.

    Raises
    ------
    ArgumentError, DtypeError
        If the service is a local one, or is given together with options of an account; if an option is no
        name, or no names, or would be of no use.
    """

    def __init__(
        self,
        given: QiskitRuntimeService | None = None,
        *,
        account: str | None = None,
        instance: str | None = None,
        region: str | None = None,
        plans_preference: Sequence[str] | None = None,
        instance_tags: Sequence[str] | None = None,
    ):
        if given is not None and given.is_local:
            raise ArgumentError("service is a local one, which runs no jobs at IBM: use provider='aer'.")
        check_account_options(given, account, instance, plans_preference, instance_tags)
        self.given = given
        self.account = account if given is None else None
        self.plans_preference = None if plans_preference is None else list(plans_preference)
        self.instance_tags = None if instance_tags is None else list(instance_tags)
        self.instance = instance
        self.region = region
        self.crn = instance if instance and instance.startswith("crn:") else None
        self._service: QiskitRuntimeService | None = given
        self._jobs: dict[str, Any] = {}
        self._devices: dict[DeviceAccess, IBMDevice] = {}

    def device(self, access: DeviceAccess) -> IBMDevice:
        """The device, with the Batch or Session that was opened for jobs of this mode."""
        if access not in self._devices:
            self._devices[access] = IBMDevice(self, access)
        return self._devices[access]

    def service(self) -> Any:
        """IBM's service, logged in."""
        if self._service is None:
            problem = account_problem(self.account)
            if problem:
                raise BackendUnavailable(problem)
            with explained("logging in to IBM Quantum"):
                try:
                    self._service = QiskitRuntimeService(
                        name=self.account,
                        instance=self.instance,
                        region=self.region,
                        plans_preference=self.plans_preference,
                        tags=self.instance_tags,
                    )
                except IBMInputValueError as error:
                    raise BackendUnavailable(self._no_instance(error)) from error
                except (ValueError, TypeError, LookupError, AttributeError) as error:
                    raise BackendUnavailable(
                        f"IBM's client cannot log in with this account: {error}"
                    ) from error
        return self._service

    def _no_instance(self, error: IBMInputValueError) -> str:
        """Why no instance of the account could be taken, and which there are."""
        asked = {
            "instance": self.instance or (None if self.account else os.environ.get("QISKIT_IBM_INSTANCE")),
            "region": self.region,
            "plans_preference": self.plans_preference,
            "instance_tags": self.instance_tags,
        }
        given = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value)
        listed = listed_instances(self.account) or " ".join(str(text) for text in error.args)
        return f"No instance of this IBM Quantum account fits {given or 'what is saved with it'}. {listed}"

    def lookup(self, tag: str) -> list[str]:
        service = self.service()
        with explained(f"looking for job {tag}"):
            jobs = service.jobs(job_tags=[tag], limit=10, descending=False, instance=self.crn)
            return [job.job_id() for job in jobs]

    def status(self, id: str) -> JobStatus:
        with explained(f"asking for job {id}", missing=Gone):
            job = self._job(id)
            state = IBM_JOB_STATES.get(job.status(), JobState.RUNNING)
        with explained(f"asking for job {id}"):
            if state == JobState.QUEUED:
                place = job.metrics().get("position_in_queue")
                return JobStatus(state, place, pending=None if place else job.backend().status().pending_jobs)
            message = job.error_message() if state == JobState.FAILED else None
            charged = charged_seconds(job, state) if state.ended else None
            return JobStatus(state, reason=message and " ".join(message.split()), charged_seconds=charged)

    def outcomes(self, id: str) -> np.ndarray:
        with explained(f"fetching the results of job {id}", missing=Gone):
            try:
                arrays = [pub.data.c.array for pub in self._job(id).result()]
                return np.concatenate([array.reshape(-1, *array.shape[-2:]) for array in arrays])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise Unreachable(f"The results of job {id} cannot be read ({error}).") from error

    def cancel(self, id: str) -> None:
        with explained(f"cancelling job {id}", missing=Gone):
            try:
                self._job(id).cancel()
            except RuntimeInvalidStateError:  # it has ended
                return

    def post(
        self,
        device: DeviceAccess,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        *,
        tags: list[str],
        options: Mapping[str, Any],
    ) -> str:
        # Without the engine whose Batch or Session it was, nobody would close another one.
        known = device if device in self._devices else replace(device, mode="job")
        return self.device(known).post(circuit, bindings, shots, tags=tags, options=options)

    def _job(self, id: str) -> Any:
        if id not in self._jobs:
            self._jobs[id] = self.service().job(id)
        return self._jobs[id]


class IBMDevice:
    """One of IBM's devices, as an account sees it. The network is used when it is first needed.

    Every method raises BackendUnavailable where the account has no such device, or the server gives no
    answer.

    Parameters
    ----------
    remote : IBMRemote
        The account.
    access : DeviceAccess
        The device's name, whether its rx and rzz are used, and whether jobs are run by themselves, or in one
        Batch or Session, which the first opens.
    """

    def __init__(self, remote: IBMRemote, access: DeviceAccess):
        self.remote = remote
        self.name = access.name
        self.fractional_gates = access.fractional_gates
        self.mode = access.mode
        self._backend: Any = None
        self._read_at: datetime | None = None
        self._session: Batch | Session | None = None

    def connect(self) -> Any:
        """IBM's object of the device, asked for once."""
        if self._backend is None:
            problems = offline_problems(self.name, self.remote)
            if problems:
                raise BackendUnavailable(" ".join(problems))
            service = self.remote.service()
            with explained(f"asking for {self.name}"):
                try:
                    self._backend = service.backend(self.name, use_fractional_gates=self.fractional_gates)
                except QiskitBackendNotFoundError:
                    raise self._not_found(service) from None
            self._read_at = datetime.now(UTC)
            self.remote.crn = service.active_instance()  # the one that has the device
        return self._backend

    def _not_found(self, service: Any) -> BackendUnavailable:
        with explained(f"listing the devices of {service.active_instance()}"):
            names = device_names(service)
        if self.name in names:
            return Unreachable(f"IBM Quantum lists {self.name}, but its configuration cannot be read now.")
        return BackendUnavailable(
            f"This account has no device {self.name!r}. It has: {', '.join(names) or 'none'}."
        )

    @property
    def crn(self) -> str | None:
        """The instance that has the device."""
        self.connect()
        return self.remote.crn

    @property
    def target(self) -> Target:
        """The device's gates and their errors."""
        device = self.connect()
        with explained(f"reading the gates of {self.name}"):  # asks IBM where it was not asked before
            return device.target

    @property
    def num_qubits(self) -> int:
        """Number of qubits."""
        device = self.connect()
        with explained(f"reading the configuration of {self.name}"):
            return int(device.num_qubits)

    @property
    def max_shots(self) -> int:
        """Most shots of a circuit in one job."""
        device = self.connect()
        with explained(f"reading the configuration of {self.name}"):
            return int(device.configuration().max_shots)

    def calibration(self) -> str | None:
        """When the device was calibrated, ISO time; None where it does not tell."""
        device = self.connect()
        with explained(f"reading the calibration of {self.name}"):
            properties = device.properties()
        return properties.last_update_date.isoformat() if properties else None

    @property
    def read_at(self) -> datetime:
        """When the calibration was read last, UTC."""
        self.connect()
        assert self._read_at is not None
        return self._read_at

    def refresh(self, max_age: float) -> bool:
        """Read the calibration again, if it was read longer than `max_age` seconds ago.

        Returns
        -------
        bool
            Whether there is a new one, by which the target then is.
        """
        device = self.connect()
        if abs((datetime.now(UTC) - self.read_at).total_seconds()) <= max_age:
            return False
        before = self.calibration()
        with explained(f"reading the calibration of {self.name}"):
            device.properties(refresh=True)
        new = self.calibration() != before
        if new:
            with explained(f"reading the configuration of {self.name}"):
                device.refresh()
        self._read_at = datetime.now(UTC)
        return new

    def status(self) -> Any:
        """IBM's status: `operational`, `status_msg` and `pending_jobs`."""
        device = self.connect()
        with explained(f"asking for the state of {self.name}"):
            return device.status()

    def check_fractional(self, circuit: QuantumCircuit, bindings: np.ndarray) -> None:
        """Refuse angles that the device's rzz does not take."""
        with explained(f"{circuit.name} on {self.name}"):
            validate_rzz_pubs([SamplerPub.coerce((circuit, bindings))])

    def post(
        self,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        *,
        tags: list[str],
        options: Mapping[str, Any],
    ) -> str:
        """Post one job, a single time, and return the server's id of it.

        Parameters
        ----------
        circuit : QuantumCircuit
            Transpiled.
        bindings : ndarray, (R, P)
            Values of its parameters.
        shots : int
            Shots of each row.
        tags : list of str
            What the job is found by.
        options : mapping
            Options of IBM's Sampler.

        Raises
        ------
        Refused
            If there is certainly no job: `Busy` because of a limit that may pass, `SessionClosed` where the
            Batch or Session takes no more.
        BackendUnavailable
            If it is not known whether the server accepted it.
        """
        # IBM's client takes an empty array of parameters for a single circuit.
        pubs = [(circuit, bindings)] if bindings.shape[1] else [(circuit,)] * len(bindings)
        adapter = SinglePost()
        try:
            sampler = Sampler(mode=self._where(), options={**options, "environment": {"job_tags": tags}})
            crn = str(self.crn)
            with posting_by(adapter, self.remote.service(), crn), explained(f"submitting to {self.name}"):
                return str(sampler.run(pubs, shots=shots).job_id())
        except Exception as error:
            if not adapter.sent or 400 <= adapter.status < 500:
                raise self._refusal(error) from error
            raise

    def _refusal(self, error: Exception) -> Refused:
        """What a post was refused for; a Batch or Session that takes no more jobs is forgotten."""
        if _http_status(error) == 429 or PENDING_JOBS.search(str(error)):
            return Busy(str(error))
        if self._session is not None:
            with suppress(BackendUnavailable), explained(f"asking for the {self.mode} on {self.name}"):
                details = self._session.details()
                if details and not details["accepting_jobs"]:
                    self._session = None
                    return SessionClosed(str(error))
        return Refused(str(error))

    def _where(self) -> Any:
        """What IBM's Sampler runs on: the device, or its open Batch or Session."""
        device = self.connect()
        if self.mode == "job":
            return device
        if self._session is None:
            with explained(f"opening a {self.mode} on {self.name}"):
                self._session = (Batch if self.mode == "batch" else Session)(device)
        return self._session

    def close(self) -> None:
        """End the Batch or Session; what it has queued is still run."""
        if self._session:
            with explained(f"closing the batch or session on {self.name}"):
                self._session.close()
            self._session = None


def charged_seconds(job: Any, state: JobState) -> float | None:
    """Quantum seconds that IBM charged for its job, which has ended; None where it does not tell them yet."""
    try:
        with explained("asking what was charged"):
            metrics = job.metrics()
    except BackendUnavailable:
        return None
    if not isinstance(metrics, Mapping):
        return None
    usage, times = (
        x if isinstance(x, Mapping) else {} for x in (metrics.get("usage"), metrics.get("timestamps"))
    )
    if state == JobState.CANCELLED and not times.get("running"):  # it never reached the device
        return 0.0
    seconds = usage.get("qpu_charge_time_seconds", usage.get("quantum_seconds"))
    known = isinstance(seconds, int | float) and usage.get("status", "completed") != "pending"
    return float(seconds) if known and seconds >= 0 else None


def offline_problems(name: str, remote: IBMRemote) -> tuple[str, ...]:
    """What is known to be wrong without asking anybody: a retired name, no account or a wrong one."""
    problems = []
    if RETIRED.fullmatch(name):
        problems.append(
            f"{name!r} is retired: IBM no longer runs it. "
            "Simulate with provider='aer', or name another device."
        )
    problem = account_problem(remote.account) if remote.given is None else None
    if problem:
        problems.append(problem)
    return tuple(problems)


@contextmanager
def explained(doing: str, missing: type[BackendUnavailable] = BackendUnavailable) -> Iterator[None]:
    """Raise errors of IBM's client as ours, with what was being done and what to do about them.

    Parameters
    ----------
    doing : str
        What was being done.
    missing : type of BackendUnavailable
        The error to raise where the server has no such thing.
    """
    try:
        yield
    except (BackendUnavailable, ArgumentError):
        raise
    except (IBMInputValueError, TranspilerError) as error:
        raise BackendUnavailable(f"IBM refused {doing}: {error}") from error
    except (IBMError, QiskitBackendNotFoundError, requests.RequestException, OSError) as error:
        status = 404 if isinstance(error, RuntimeJobNotFound) else _http_status(error)
        if status == 404:
            raise missing(_advice(status, doing, error)) from error
        # A 401 may pass: after a failed login, IBM's client sends what the server then takes for no login at
        # all.
        kind = BackendUnavailable if 400 <= status < 500 and status not in (401, 408, 429) else Unreachable
        raise kind(_advice(status, doing, error)) from error


def _http_status(error: BaseException | None) -> int:
    """The HTTP status that an error of IBM's client, or its cause, names; 0 where there was none."""
    while error is not None:
        match = HTTP_STATUS.search(str(error))
        if match:
            return int(match[match.lastindex or 0])
        if isinstance(error, RequestsApiError) and error.status_code > 0:
            return error.status_code
        error = error.__cause__
    return 0


def _advice(status: int, doing: str, error: Exception) -> str:
    """One sentence for a person."""
    what = {
        400: "the request was not understood; at a login: the API key is not valid",
        401: "the login failed: if it stays so, the API key is no longer valid; save the account again",
        403: "the account may not do this: check instance= and what the account has access to",
        404: "there is no such thing: check the name, and instance=",
        409: "its state does not allow this",
        429: "too many requests, or the limit of jobs is reached: wait, then try again",
    }.get(
        status,
        "IBM's server failed; try again later" if status >= 500 else "no answer came; check the network",
    )
    message = re.sub(r"[\\'\"]+", "", " ".join(str(error).split()))  # quoted as often as it was passed on
    return f"IBM Quantum, {doing}: {what} ({f'status {status}; ' if status else ''}{message[:300]})."
