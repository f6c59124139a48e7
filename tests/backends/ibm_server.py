"""A loopback server with the REST API of IBM's cloud: it runs circuits on Aer, and fails on request."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import signal
import socket
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt
import qiskit_ibm_runtime
from ibm_quantum_schemas.common import CompressedTensorModel
from ibm_quantum_schemas.executor.version_2_0.models import (
    ItemMetadataModel,
    MetadataModel,
    QuantumProgramResultItemModel,
    QuantumProgramResultModel,
)
from qiskit_aer import AerSimulator
from qiskit_ibm_runtime.fake_provider.executor.run_quantum_program import run_quantum_program
from qiskit_ibm_runtime.options_models.simulator import SimulatorOptions
from qiskit_ibm_runtime.quantum_program.converters.converters_2_0 import passthrough_data_to_2_0
from qiskit_ibm_runtime.quantum_program.params_converters import QUANTUM_PROGRAM_PARAMS_CONVERTERS
from samplomatic.quantum_program import CircuitItem, SamplexItem

TOKEN = "an-api-key-of-the-loopback-server"
CRN = "crn:v1:bluemix:public:quantum-computing:us-east:a/0123456789abcdef:loopback::"
SNAPSHOTS = Path(qiskit_ibm_runtime.__file__).parent / "fake_provider" / "backends"


@dataclass
class Fault:
    """A fault of the next requests that match.

    Parameters
    ----------
    request : str
        Regular expression that has to match "METHOD /path" as a whole.
    what : int or str
        An HTTP status; "cut", which closes the connection without an answer; "truncate", which closes it
        after half the answer; "nonsense", a status 200 whose content is no JSON; or "kill", which sends
        SIGKILL to the process.
    when : {"before", "after"}
        Whether the fault comes before the request has its effect, or after.
    times : int
        How many requests fail.
    skip : int
        How many matching requests pass before that.
    pid : int or None
        The process that "kill" ends.
    answered : bool
        Whether "kill" comes after the answer, by `delay` seconds.
    delay : float
        See `answered`.
    headers : dict
        Headers of an answer with an HTTP status.
    """

    request: str
    what: int | str
    when: str = "before"
    times: int = 1
    skip: int = 0
    pid: int | None = None
    answered: bool = False
    delay: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class ServerJob:
    """A job that the server accepted."""

    id: str
    tags: list[str]
    backend: str
    params: dict[str, Any]
    session_id: str | None
    created: str
    polls_left: int
    status: str = "Queued"
    reason: str | None = None
    result: str = ""


class IBMServer:
    """A loopback server with a few devices; use it as a context manager.

    Attributes
    ----------
    jobs : dict
        Accepted jobs by id, in their order.
    requests : list of str
        "METHOD /path" of every request that arrived.
    faults : list of Fault
        Faults to come; each is used up as often as it says.
    polls_in_queue : int
        How many questions about a new job find it in the queue.
    job_error : str or None
        If set, jobs end with this error instead of a result.
    hidden_lookups : int
        How many listings of jobs come back empty, as from a replica that lags behind.
    listing_lag : float
        For how many seconds a new job is not listed.
    pending_limit : int or None
        A job is refused while this many wait or run, as on IBM's Open Plan.
    deleted : dict
        Jobs that were accepted and then deleted, by id.
    charge : callable
        Quantum seconds that a completed job is charged; None while that is not known.
    """

    def __init__(self, devices: tuple[str, ...] = ("lagos",), noise: bool = False, seed: int = 7):
        self.devices = {}
        for device in devices:
            folder = SNAPSHOTS / device
            configuration = json.loads((folder / f"conf_{device}.json").read_bytes())
            properties = json.loads((folder / f"props_{device}.json").read_bytes())
            self.devices[configuration["backend_name"]] = (configuration, properties)
        self.noise = noise
        self._noisy: dict[str, AerSimulator] = {}
        self.seed = seed
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forget all jobs, requests and faults."""
        self.jobs: dict[str, ServerJob] = {}
        self.sessions: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.polls_in_queue = 0
        self.job_error: str | None = None
        self.hidden_lookups = 0
        self.listing_lag = 0.0
        self.pending_limit: int | None = None
        self.deleted: dict[str, ServerJob] = {}
        self.charge: Callable[[ServerJob], float | None] = lambda job: 2.0
        self._ids = itertools.count(1)

    def __enter__(self) -> IBMServer:
        server = self

        class Handler(_Handler):
            cloud = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def environment(self) -> dict[str, str]:
        """Environment variables by which IBM's own client takes this server for its account."""
        return {
            "QISKIT_IBM_TOKEN": TOKEN,
            # The client leaves a URL alone that has "experimental" in it; others it rewrites to IBM's hosts.
            "QISKIT_IBM_URL": f"{self.url}/experimental/api/v1",
            "QISKIT_IBM_INSTANCE": CRN,
            "IAM_URL": self.url,
            "GLOBAL_SEARCH_URL": f"{self.url}/search",
            "GLOBAL_CATALOG_URL": f"{self.url}/catalog",
            # Otherwise the client looks through the whole stack, and all modules, at each request.
            "USAGE_DATA_OPT_OUT": "True",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def accepted(self, tag: str) -> list[ServerJob]:
        """The accepted jobs that carry a tag."""
        return [job for job in self.jobs.values() if tag in job.tags]

    def delete(self, id: str) -> None:
        """Delete a job, as a user or IBM may do."""
        with self._lock:
            self.deleted[id] = self.jobs.pop(id)

    def close_sessions(self) -> None:
        """Close all sessions and batches, as IBM does after their longest time."""
        with self._lock:
            for session in self.sessions.values():
                session.update(accepting_jobs=False, state="closed")

    def recalibrate(self, device: str, time: str) -> None:
        """Give a device a calibration of another time, with readout errors of 3 %."""
        with self._lock:
            configuration, properties = self.devices[device]
            properties = {**json.loads(json.dumps(properties)), "last_update_date": time}
            for qubit in properties["qubits"]:
                for value in qubit:
                    if value["name"] in ("readout_error", "prob_meas0_prep1", "prob_meas1_prep0"):
                        value["value"] = 0.03
            self.devices[device] = (configuration, properties)

    def posts(self) -> int:
        """Number of submissions that arrived, accepted or not."""
        return self.requests.count("POST /jobs")

    def strike(self, request: str, when: str) -> Fault | None:
        """The fault that hits this request now, if there is one; it is used up."""
        with self._lock:
            for fault in self.faults:
                if fault.when == when and fault.times and re.fullmatch(fault.request, request):
                    if not fault.skip:
                        fault.times -= 1
                        return fault
                    fault.skip -= 1
        return None

    # --- What the requests do; each returns (status, JSON content or text) ----------------------

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any]:
        with self._lock:
            parts = path.strip("/").split("/")
            match method, parts:
                case "POST", ["jobs"]:
                    return self._accept(json.loads(body))
                case "GET", ["jobs"]:
                    return self._list(query)
                case "GET", ["jobs", id]:
                    return self._job(id)
                case "GET", ["jobs", id, "results"]:
                    return (200, self.jobs[id].result) if id in self.jobs else _error(404, "Job not found")
                case "GET", ["jobs", id, "metrics"]:
                    return self._metrics(id)
                case "POST", ["jobs", id, "cancel"]:
                    return self._cancel(id)
                case "GET", ["backends"]:
                    return 200, {"devices": [self._device(name) for name in self.devices]}
                case "GET", ["backends", name, what] if name in self.devices:
                    configuration, properties = self.devices[name]
                    status = {"state": True, "status": "active", "length_queue": self._waiting(name)}
                    return 200, {
                        "configuration": configuration,
                        "properties": properties,
                        "status": {**status, "backend_version": configuration["backend_version"]},
                    }[what]
                case "GET", ["instances", "usage"]:
                    return 200, {"instance_id": CRN, "usage_consumed_seconds": 1, "usage_limit_seconds": 600}
                case "POST", ["sessions"]:
                    return self._open_session(json.loads(body))
                case (("GET" | "PATCH" | "DELETE"), ["sessions", id, *_]) if id in self.sessions:
                    if method != "GET":
                        self.sessions[id].update(accepting_jobs=False, state="closed")
                    return 200, self.sessions[id]
        return _error(404, f"{method} {path} is not here")

    def _device(self, name: str) -> dict[str, Any]:
        configuration, _ = self.devices[name]
        return {
            "name": name,
            "status": {"name": "online"},
            "qubits": configuration["n_qubits"],
            "queue_length": self._waiting(name),
        }

    def _waiting(self, name: str) -> int:
        return sum(job.backend == name and job.status == "Queued" for job in self.jobs.values())

    def _open_session(self, payload: dict[str, Any]) -> tuple[int, Any]:
        id = f"session-{next(self._ids)}"
        self.sessions[id] = {
            "id": id,
            "backend_name": payload["backend"],
            "mode": payload["mode"],
            "max_ttl": payload.get("max_ttl"),
            "state": "open",
            "accepting_jobs": True,
        }
        return 200, self.sessions[id]

    def _accept(self, payload: dict[str, Any]) -> tuple[int, Any]:
        session = payload.get("session_id")
        if session and not self.sessions.get(session, {}).get("accepting_jobs"):
            return _error(409, "The session is closed.")
        waiting = sum(job.status in ("Queued", "Running") for job in self.jobs.values())
        if self.pending_limit is not None and waiting >= self.pending_limit:
            return _error(
                400, f"You have reached the limit of {self.pending_limit} pending jobs. Please wait."
            )
        if payload["backend"] not in self.devices:
            return _error(404, f"Backend {payload['backend']} not found")
        job = ServerJob(
            id=f"job-{next(self._ids)}",
            tags=payload.get("tags", []),
            backend=payload["backend"],
            params=payload["params"],
            session_id=session,
            created=datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            polls_left=self.polls_in_queue,
        )
        self.jobs[job.id] = job
        return 200, {"id": job.id, "backend": job.backend, "session_id": session}

    def _list(self, query: dict[str, list[str]]) -> tuple[int, Any]:
        tags = query.get("tags", [])
        jobs = [job for job in self.jobs.values() if set(tags) <= set(job.tags)][::-1]
        now = datetime.now(UTC)
        ages = {job.id: (now - datetime.fromisoformat(job.created)).total_seconds() for job in jobs}
        jobs = [job for job in jobs if ages[job.id] >= self.listing_lag]
        if self.hidden_lookups:
            self.hidden_lookups -= 1
            jobs = []
        start = int(query.get("offset", ["0"])[0])
        page = jobs[start : start + int(query.get("limit", ["10"])[0])]
        return 200, {"jobs": [self._describe(job) for job in page], "count": len(jobs)}

    def _job(self, id: str) -> tuple[int, Any]:
        if id not in self.jobs:
            return _error(404, "Job not found")
        job = self.jobs[id]
        if job.status == "Queued":
            if job.polls_left:
                job.polls_left -= 1
            else:
                self._run(job)
        return 200, self._describe(job)

    def _describe(self, job: ServerJob) -> dict[str, Any]:
        return {
            "id": job.id,
            "backend": job.backend,
            "program": {"id": "executor"},
            "tags": job.tags,
            "created": job.created,
            "session_id": job.session_id,
            "state": {"status": job.status, **({"reason": job.reason} if job.reason else {})},
            "estimated_running_time_seconds": 2.0,
        }

    def _metrics(self, id: str) -> tuple[int, Any]:
        if id not in self.jobs:
            return _error(404, "Job not found")
        job = self.jobs[id]
        charge = self.charge(job) if job.status == "Completed" else None
        usage = {
            "status": "pending" if charge is None else "completed",
            "qpu_charge_time_seconds": charge or 0,
        }
        queued = {"position_in_queue": job.polls_left + 1} if job.status == "Queued" else {}
        return 200, {"timestamps": {"created": job.created}, "usage": usage, **queued}

    def _cancel(self, id: str) -> tuple[int, Any]:
        if id not in self.jobs:
            return _error(404, "Job not found")
        if self.jobs[id].status not in ("Queued", "Running"):
            return _error(409, "The job has ended and cannot be cancelled.")
        self.jobs[id].status = "Cancelled"
        return 204, ""

    def _run(self, job: ServerJob) -> None:
        try:
            if self.job_error:
                raise RuntimeError(self.job_error)
            job.status, job.result = "Completed", self._execute(job)
        except Exception as error:
            job.status, job.reason, job.result = "Failed", str(error), traceback.format_exc()

    def executions(self, job: ServerJob) -> int:
        """Bound circuits times shots of a job that was accepted."""
        converter = QUANTUM_PROGRAM_PARAMS_CONVERTERS[job.params["schema_version"]]
        program, _ = converter.decoder(converter.model.model_validate(job.params))
        return sum(math.prod(item.shape) for item in program.items) * program.shots

    def _execute(self, job: ServerJob) -> str:
        converter = QUANTUM_PROGRAM_PARAMS_CONVERTERS[job.params["schema_version"]]
        program, _ = converter.decoder(converter.model.model_validate(job.params))
        for item in program.items:
            if isinstance(item, SamplexItem):
                item.samplex.finalize()  # as IBM's server does after it read one
        options = SimulatorOptions(seed_simulator=self._seed_of(job, program))
        result = run_quantum_program(self._simulator(job.backend), program, options)
        model = QuantumProgramResultModel(
            data=[
                QuantumProgramResultItemModel(
                    results={name: CompressedTensorModel.from_numpy(array) for name, array in item.items()},
                    metadata=ItemMetadataModel(),
                )
                for item in result
            ],
            metadata=MetadataModel(chunk_timing=[]),
            passthrough_data=passthrough_data_to_2_0(result.passthrough_data),
            semantic_role=result._semantic_role,
        )
        return model.model_dump_json()

    def _seed_of(self, job: ServerJob, program: Any) -> int:
        """A seed by which a part of a job gives the same outcomes, in whatever order jobs run."""
        part = (*job.tags[-1].split("."), "")[1]  # the same when it is sent again
        content = [repr((self.seed, part, program.shots))]
        for item in program.items:
            circuit = item.circuit if isinstance(item, CircuitItem) else None
            if circuit is not None:
                content += [
                    f"{x.operation.name} {[circuit.find_bit(qubit).index for qubit in x.qubits]}"
                    for x in circuit.data
                ]
                content.append(repr(item.circuit_arguments.tolist()))
        return zlib.crc32("\n".join(content).encode()) >> 1

    def _simulator(self, name: str) -> AerSimulator:
        if not self.noise:
            return AerSimulator()
        if name in self._noisy:
            return self._noisy[name]
        fakes = {b.name: b for b in qiskit_ibm_runtime.fake_provider.FakeProviderForBackendV2().backends()}
        self._noisy[name] = AerSimulator.from_backend(fakes[f"fake_{name.partition('_')[2]}"])
        return self._noisy[name]


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"code": 1000 + status, "message": message}}


class _Handler(BaseHTTPRequestHandler):
    """Answers one request, or fails as a fault says."""

    cloud: IBMServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        parts = urlsplit(self.path)
        path = parts.path.replace("/experimental/api/v1", "").replace("/api/v1", "")
        request = f"{self.command} {path}"
        self.cloud.requests.append(request)
        fault = self.cloud.strike(request, "before")
        if fault:
            self._suffer(fault, 0, "")
            return
        status, content = self._answer(path, parse_qs(parts.query), body)
        fault = self.cloud.strike(request, "after")
        if fault:
            self._suffer(fault, status, content)
        else:
            self._send(status, content)

    do_POST = do_PATCH = do_DELETE = do_PUT = do_GET

    def _answer(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any]:
        if path == "/identity/token":
            if TOKEN not in body.decode():
                return 400, {
                    "errorCode": "BXNIM0415E",
                    "errorMessage": "Provided API key could not be found.",
                }
            now = int(time.time())
            bearer = jwt.encode({"iat": now, "exp": now + 3600}, TOKEN, algorithm="HS256")
            return 200, {"access_token": bearer, "expires_in": 3600, "expiration": now + 3600}
        if not self._authorised():
            return _error(401, "Login failed. Invalid token.")
        if path == "/search/v3/resources/search":
            item = {"crn": CRN, "name": "loopback", "tags": [], "service_plan_unique_id": "plan"}
            return 200, {"items": [{**item, "doc": {"extensions": {"backends": ["all"]}}}]}
        if path == "/catalog/plan":
            plan = {"overview_ui": {"en": {"display_name": "Open"}}}
            return 200, {**plan, "metadata": {"pricing": {"type": "free"}}}
        if self.headers.get("Service-CRN") != CRN:
            return _error(403, "No access to this instance.")
        return self.cloud.answer(self.command, path, query, body)

    def _authorised(self) -> bool:
        bearer = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        try:
            return bool(jwt.decode(bearer, TOKEN, algorithms=["HS256"]))
        except jwt.InvalidTokenError:
            return False

    def _suffer(self, fault: Fault, status: int, content: Any) -> None:
        if fault.what == "kill":
            if fault.answered:  # then a delay decides how far the process comes with the answer
                with contextlib.suppress(OSError):
                    self._send(status, content)
                time.sleep(fault.delay)
            while fault.pid is None:
                time.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):
                os.kill(fault.pid, signal.SIGKILL)
            self._cut()
        elif fault.what == "cut":
            self._cut()
        elif fault.what == "truncate":
            self._send(status, content, share=0.5)
            self._cut()
        elif fault.what == "nonsense":
            self._send(200, "this is not JSON {")
        else:
            self._send(int(fault.what), _error(int(fault.what), "ordered fault")[1], headers=fault.headers)

    def _send(
        self, status: int, content: Any, share: float = 1.0, headers: dict[str, str] | None = None
    ) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if status != 204:
            self.wfile.write(data[: int(len(data) * share)])

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # a killed client
            super().handle()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables while this lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
