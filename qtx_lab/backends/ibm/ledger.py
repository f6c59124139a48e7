"""Records of jobs on disk: each has all that is needed to find the job and to rebuild what it measures."""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    model_validator,
)
from qiskit import QuantumCircuit, qpy

from ...circuits import Loader, make_loader
from ...errors import StorageError
from ...storage import json_bytes, runs_home, storage_error, write_atomic
from ..base import JobState, JobStatus, combined_status
from ..requests import CalibrationRequest, MitigatedRowRequest, Request, RowRequest

SCHEMA_VERSION: Literal[1] = 1
"""The version of records that are written. Records without one, which are older than it, are read too."""

MAX_RECORD_BYTES = 1 << 26
"""A larger file is not read: it is no record of a job."""

# --- What a record holds -------------------------------------------------------------------------


class Record(BaseModel):
    """Keeps fields that it does not know, so that writing a record again loses nothing."""

    model_config = ConfigDict(extra="allow", validate_assignment=True)


class TaggedRecord(Record):
    """A record whose tag is the name of its file."""

    tag: str


T = TypeVar("T", bound=TaggedRecord)


class RowsRecord(Record):
    """Rows that are measured. Their probabilities are in `<tag>.rows.npz` beside the record.

    Parameters
    ----------
    rows, keys : int
        Shape of the probabilities.
    loader : str
        Name of the loader.
    shots : int
        Shots of each row.
    seed : int
        Seed of the classical baseline.
    diagnostics : dict
        Those of the result.
    digest : str or None
        SHA-256 of the probabilities; None in records that are older than it.
    """

    kind: Literal["rows"] = "rows"
    rows: int = Field(ge=1)
    keys: int = Field(ge=1)
    loader: str
    shots: int = Field(ge=1)
    seed: int
    diagnostics: dict[str, Any]
    digest: str | None = None

    @classmethod
    def from_request(cls, request: RowRequest) -> RowsRecord:
        """The record of a request; `p` is kept elsewhere."""
        rows, keys = request.p.shape
        return cls(
            rows=rows,
            keys=keys,
            loader=request.loader.name,
            shots=request.shots,
            seed=request.seed,
            diagnostics=dict(request.diagnostics),
            digest=_digest(request.p),
        )

    def to_request(self, p: torch.Tensor, loader: Loader | None) -> RowRequest:
        """The request that was recorded; the loader is made by its name where None."""
        diagnostics = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.diagnostics.items()
        }
        return RowRequest(p, make_loader(loader or self.loader), self.shots, self.seed, diagnostics)


class MitigatedRowsRecord(Record):
    """One circuit of rows that a mitigation measures with several; see `MitigatedRowRequest`.

    Parameters
    ----------
    rows : RowsRecord
        The rows; `rows.shots` is the whole budget of a row.
    mitigation : dict
        Name and settings of the mitigation.
    noise_level : float
        Noise of this circuit, as a multiple of the device's own.
    shots : int
        Shots of each row with this circuit.
    batch : str
        The same for all circuits of one call.
    """

    kind: Literal["mitigated-rows"] = "mitigated-rows"
    rows: RowsRecord
    mitigation: dict[str, Any]
    noise_level: float
    shots: int
    batch: str

    def to_request(self, p: torch.Tensor, loader: Loader | None) -> MitigatedRowRequest:
        """The request that was recorded; the loader is made by its name where None."""
        rows = self.rows.to_request(p, loader)
        return MitigatedRowRequest(rows, self.mitigation, self.noise_level, self.shots, self.batch)


class CalibrationRecord(Record):
    """A state that is prepared to see how its bits are misread; see `CalibrationRequest`.

    Parameters
    ----------
    qubits : list of int
        The device's qubit of each bit of the register, lowest bit first.
    prepared : list of int
        The prepared state of each.
    shots : int
        Shots of the state.
    seed : int
        Seed of a simulation.
    """

    kind: Literal["calibration"] = "calibration"
    qubits: list[int]
    prepared: list[int]
    shots: int
    seed: int

    def to_request(self) -> CalibrationRequest:
        """The request that was recorded."""
        return CalibrationRequest(tuple(self.qubits), tuple(self.prepared), self.shots, self.seed)


class CircuitsRecord(Record):
    """Circuits of another purpose, of which only the outcomes can be had."""

    kind: Literal["circuits"] = "circuits"


RequestRecord = Annotated[
    RowsRecord | MitigatedRowsRecord | CalibrationRecord | CircuitsRecord, Field(discriminator="kind")
]


class PartRecord(Record):
    """One of the server's jobs: a block of rows, with some of their shots.

    Parameters
    ----------
    tag : str
        Tag by which the server finds its job.
    start, stop : int
        The bound circuits that it runs, `start` to `stop - 1`.
    shots : int
        Shots of each of them.
    id : str or None
        The server's id of the job, None before it is known.
    state : JobState
        State when the server was last asked.
    reason : str or None
        Why it failed, or why it has not been sent.
    attempted : datetime or None
        When it was last posted; None where it was not, or where the server took no more jobs then. It is
        written down before the post.
    charged_seconds : float or None
        Quantum time that was charged for it; None before the server tells it.
    earlier_ids : list of str
        Ids of jobs of this part that ended without a result, before it was sent again.
    earlier_seconds : float
        Quantum time of those, as charged or else estimated.
    """

    tag: str
    start: int = Field(ge=0)
    stop: int = Field(ge=1)
    shots: int = Field(ge=1)
    id: str | None
    state: JobState
    reason: str | None
    attempted: AwareDatetime | None = None
    charged_seconds: float | None = Field(None, exclude_if=lambda seconds: seconds is None)
    earlier_ids: list[str] = []
    earlier_seconds: float = Field(0.0, ge=0, exclude_if=lambda seconds: seconds == 0)

    @property
    def may_cost(self) -> bool:
        """Whether the server has a job of this part, or may have one, or is to get one."""
        posted = self.attempted is not None and self.state != JobState.FAILED  # a refused one has no job
        return self.id is not None or posted or self.state == JobState.RECORDED

    @field_serializer("attempted")
    def _iso(self, attempted: datetime | None) -> str | None:
        return attempted.isoformat(timespec="milliseconds") if attempted else None


class JobRecord(TaggedRecord):
    """What is written down of a job before it is submitted, and what became of it since.

    `record["device"]` gives a field as JSON holds it.

    Parameters
    ----------
    schema_version : int
        See `SCHEMA_VERSION`.
    tag : str
        Unique name of the job, also the name of the record's file.
    recorded : datetime
        When the record was made.
    provider, device, account, instance, region, mode : str or None
        Where the job is, as `IBMEngine` takes it.
    circuits, shots : int
        Number of bound circuits, and the shots of each.
    quantum_seconds : float or None
        Estimated time on the device.
    max_quantum_seconds, budget : float and str, or None
        The limits that the job was submitted within; those of parts that are sent later, too.
    request : RowsRecord or MitigatedRowsRecord or CalibrationRecord or CircuitsRecord
        What the circuits are run for.
    parts : list of PartRecord
        The server's jobs that the whole is split into.
    fractional_gates : bool
        Whether the circuit has the device's rx and rzz.
    options : dict
        Options of IBM's Sampler.
    submission_notes : list of str
        What was unusual about the submission: waiting for the server, a session that was opened again.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    tag: str
    recorded: AwareDatetime
    provider: str | None = None
    device: str
    account: str | None = None
    instance: str | None = None
    region: str | None = None
    mode: str | None = None
    circuits: int = Field(ge=1)
    shots: int = Field(ge=1)
    quantum_seconds: float | None = Field(None, ge=0, allow_inf_nan=False)
    max_quantum_seconds: float | None = None
    budget: str | None = None
    request: RequestRecord
    parts: list[PartRecord] = Field(min_length=1)
    fractional_gates: bool = False
    options: dict[str, Any] = {}
    submission_notes: list[str] = []

    @model_validator(mode="after")
    def _parts_cover_everything(self) -> JobRecord:
        shots_of: dict[tuple[int, int], int] = {}
        for part in self.parts:
            block = (part.start, part.stop)
            shots_of[block] = shots_of.get(block, 0) + part.shots
        blocks = sorted(shots_of)
        edges = [0, *(stop for _, stop in blocks)]
        starts, grows = [start for start, _ in blocks], all(start < stop for start, stop in blocks)
        if not grows or starts != edges[:-1] or edges[-1] != self.circuits:
            raise ValueError(f"its parts run other circuits than 0 to {self.circuits - 1}, each once")
        if set(shots_of.values()) != {self.shots}:
            raise ValueError(f"its parts do not have {self.shots} shots together")
        if len({part.tag for part in self.parts}) < len(self.parts):
            raise ValueError("two of its parts have the same tag")
        return self

    def __getitem__(self, name: str) -> Any:
        return self.model_dump()[name]

    def estimated_seconds(self, part: PartRecord) -> float:
        """The part's share of the estimated time on the device."""
        executions = [(other.stop - other.start) * other.shots for other in self.parts]
        share = (part.stop - part.start) * part.shots / sum(executions)
        return (self.quantum_seconds or 0.0) * share

    @field_serializer("recorded")
    def _iso(self, recorded: datetime) -> str:
        return recorded.isoformat(timespec="milliseconds")

    @property
    def status(self) -> JobStatus:
        """That of all parts together; see `combined_status`."""
        return combined_status([JobStatus(part.state, reason=part.reason) for part in self.parts], "parts")


class Block(NamedTuple):
    """Bound circuits `start` to `stop - 1`, and the shots of each, that one of the server's jobs runs."""

    start: int
    stop: int
    shots: int


# --- Writing -------------------------------------------------------------------------------------


def record_job(
    folder: Path,
    request: Request | None,
    blocks: Sequence[Block],
    *,
    circuit: QuantumCircuit | None = None,
    bindings: np.ndarray | None = None,
    **facts: Any,
) -> Path:
    """Write a job down, durably, before anything of it is submitted.

    Parameters
    ----------
    folder : Path
        Where the record goes; created if it is missing.
    request : Request or None
        What the circuits are run for, kept whole, so that it can be rebuilt after a restart.
    blocks : sequence of Block
        What each of the server's jobs runs.
    circuit, bindings : QuantumCircuit and ndarray, optional
        What is posted. They are kept, so that parts which were not sent can be sent after a restart.
    **facts
        Other fields of `JobRecord`: device, circuits, shots, provider, account, instance, region, mode,
        quantum_seconds, max_quantum_seconds, budget, fractional_gates, options.

    Returns
    -------
    Path
        `<folder>/<tag>.json`.

    Raises
    ------
    StorageError
        If it cannot be written. Then nothing may be submitted.
    """
    now = datetime.now(UTC)
    tag = f"qtx-{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(6)}"
    parts = [
        PartRecord(tag=f"{tag}.{i}", **block._asdict(), id=None, state=JobState.RECORDED, reason=None)
        for i, block in enumerate(blocks)
    ]
    record = JobRecord(tag=tag, recorded=now, request=_request_record(request), parts=parts, **facts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error
    path = folder / f"{tag}.json"
    if isinstance(request, RowRequest | MitigatedRowRequest):
        rows = request if isinstance(request, RowRequest) else request.rows
        save_rows(path, rows.p)
    if circuit is not None and bindings is not None:
        content = io.BytesIO()
        qpy.dump(circuit, content)
        save_array(
            _program_path(path), circuit=np.frombuffer(content.getvalue(), np.uint8), bindings=bindings
        )
    write_record(path, record)  # last, so that a record that can be seen is whole
    return path


def _request_record(
    request: Request | None,
) -> RowsRecord | MitigatedRowsRecord | CalibrationRecord | CircuitsRecord:
    match request:
        case None:
            return CircuitsRecord()
        case RowRequest():
            return RowsRecord.from_request(request)
        case MitigatedRowRequest():
            return MitigatedRowsRecord(
                rows=RowsRecord.from_request(request.rows),
                mitigation=dict(request.mitigation),
                noise_level=request.noise_level,
                shots=request.shots,
                batch=request.batch,
            )
        case CalibrationRequest():
            return CalibrationRecord(
                qubits=list(request.qubits),
                prepared=list(request.prepared),
                shots=request.shots,
                seed=request.seed,
            )


def write_record(path: Path, record: Record) -> None:
    """Write a record whole or not at all.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    write_atomic(path, json_bytes(record.model_dump()))


def update_record(path: Path, change: Callable[[JobRecord], None]) -> JobRecord:
    """Change a record that other processes may change at the same time, and return what it is then.

    Parameters
    ----------
    path : Path
        The record's file.
    change : callable
        Changes the record that it is given, which has just been read. Nothing is written if it changes
        nothing.

    Raises
    ------
    StorageError
        If the record cannot be read or written.
    """
    try:
        with FileLock(_lock_path(path)):
            record = read_record(path)
            before = record.model_copy(deep=True)
            change(record)
            if record != before:
                write_record(path, record)
            return record
    except (OSError, NotImplementedError) as error:
        raise storage_error(path, error if isinstance(error, OSError) else OSError(str(error))) from error


@contextmanager
def sending(path: Path) -> Iterator[bool]:
    """While this lasts, no other thread or process sends parts of the job.

    Yields
    ------
    bool
        Whether that is so; False where another is sending parts just now. A process that is killed stops
        sending.
    """
    lock = FileLock(_lock_path(path).with_suffix(".sending"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        raise storage_error(path, error if isinstance(error, OSError) else OSError(str(error))) from error
    try:
        yield True
    finally:
        lock.release()


def is_being_sent(path: Path) -> bool:
    """Whether a thread or process sends parts of the job just now."""
    with sending(path) as nobody_else:
        return not nobody_else


def save_array(path: Path, **array: np.ndarray) -> None:
    """Write arrays by their names, compressed, whole or not at all.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    content = io.BytesIO()
    np.savez_compressed(content, **array)  # type: ignore[arg-type]
    write_atomic(path, content.getvalue())


# --- Reading -------------------------------------------------------------------------------------


def find_records(home: str | Path | None = None, tag: str | None = None) -> Iterator[tuple[Path, JobRecord]]:
    """Paths and contents of all records under a folder of runs, in no particular order.

    A file that is not the record of a job is skipped, with a warning that says why.

    Parameters
    ----------
    home : path, optional
        The folder of runs, see `runs_home`: records are in `<home>/jobs` and in each run's `jobs`.
    tag : str, optional
        Only the records whose tag contains this text.
    """
    home = runs_home(home)
    for path in {*home.glob("jobs/*.json"), *home.glob("*/jobs/*.json")}:
        if tag is None or tag in path.stem:
            try:
                yield path, read_record(path)
            except StorageError as error:
                warnings.warn(str(error), stacklevel=3)  # a broken one costs only itself


def read_record(path: Path) -> JobRecord:
    """The record in a file.

    Raises
    ------
    StorageError
        If the file cannot be read, or is not the record of the job that has its name. The message says why.
    """
    return read_model(path, JobRecord, "job", _upgraded)


def read_model(
    path: Path, model: type[T], kind: str, upgraded: Callable[[Any], Any] = lambda content: content
) -> T:
    """The record in a file, which may hold anything.

    Parameters
    ----------
    path : Path
        The file.
    model : type of TaggedRecord
        What it should hold.
    kind : str
        Of what it is the record, for the message: "job".
    upgraded : callable
        Brings content of an older schema into the present one.

    Raises
    ------
    StorageError
        If the file cannot be read, or is not the record that has its name. The message says why.
    """
    try:
        if not path.is_file() and path.exists():  # reading a pipe would never end
            raise OSError("it is no file")
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise OSError("it is too large to be one")
        content = upgraded(json.loads(path.read_bytes()))
        if isinstance(content, Mapping) and content.get("schema_version") != SCHEMA_VERSION:
            version = str(content.get("schema_version"))[:20]
            raise OSError(f"it has schema_version {version}, and this qtx_lab reads {SCHEMA_VERSION}")
        record = model.model_validate_json(json.dumps(content), strict=True)
        cause = (
            None if record.tag == path.stem else f"holds the record of another {kind}, {record.tag[:60]!r}"
        )
    except OSError as error:
        cause = f"cannot be read: {error.strerror or error}"
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        cause = f"is not the record of a {kind}: {where} is {str(first['input'])[:60]!r}; {first['msg']}"
        cause = f"is not the record of a {kind}: {where} is missing" if first["type"] == "missing" else cause
    except (ValueError, RecursionError):  # RecursionError: what is nested deeply, and is not ours
        cause = "is not readable JSON"
    if cause:
        raise StorageError(f"The {kind}'s record {path} {cause}.")
    return record


def _upgraded(content: Any) -> Any:
    """The content of a record in the present schema, if it is in an older one."""
    if not isinstance(content, Mapping) or "schema_version" in content:
        return content
    # Before there was a version, the fields of a request of rows stood beside those of the job.
    content = dict(content)
    request: dict[str, Any] = {"kind": "circuits"}
    if "loader" in content:
        names = ("rows", "keys", "loader", "seed", "diagnostics")
        moved = {name: content.pop(name) for name in names if name in content}
        request = {"kind": "rows", "shots": content.get("shots"), **moved}
    return {**content, "schema_version": SCHEMA_VERSION, "request": request}


def read_request(path: Path, record: JobRecord, loader: Loader | None = None) -> Request | None:
    """What a record's circuits are run for; None where they are of no kind that is known.

    Parameters
    ----------
    path : Path
        The record's file.
    record : JobRecord
        Its content.
    loader : Loader, optional
        The loader of the rows, where the recorded name makes none in this process.

    Raises
    ------
    ArgumentError
        If no loader has the recorded name.
    StorageError
        If the rows, kept beside the record, cannot be read.
    """
    request = record.request
    if isinstance(request, CircuitsRecord):
        return None
    if isinstance(request, CalibrationRecord):
        return request.to_request()
    p = read_rows(path, record)
    assert p is not None
    return request.to_request(p, loader)


def read_rows(path: Path, record: JobRecord) -> torch.Tensor | None:
    """The probabilities of the rows that a job measures, float64 (R, n); None where it measures no rows.

    Raises
    ------
    StorageError
        If they, kept beside the record, cannot be read.
    """
    match record.request:
        case RowsRecord():
            p = read_rows_of(path, record.request)
        case MitigatedRowsRecord():
            p = read_rows_of(path, record.request.rows)
        case _:
            return None
    if int((p.sum(-1) > 0).sum()) != record.circuits:
        raise StorageError(
            f"{_rows_path(path)} does not hold the rows of the job's {record.circuits} circuits."
        )
    return p


def read_rows_of(path: Path, rows: RowsRecord) -> torch.Tensor:
    """The probabilities beside a record, float64 (R, n); StorageError where they cannot be read."""
    rows_path = _rows_path(path)
    p = torch.from_numpy(load_array(rows_path, "p"))
    fits = p.shape == (rows.rows, rows.keys) and p.dtype == torch.float64
    if not fits or (rows.digest and rows.digest != _digest(p)):
        raise StorageError(f"{rows_path} does not hold the {rows.rows} rows of {rows.keys} keys.")
    return p


def save_rows(path: Path, p: torch.Tensor) -> None:
    """Write the probabilities of rows beside a record; StorageError where they cannot be written."""
    save_array(_rows_path(path), p=p.numpy())


def has_program(path: Path) -> bool:
    """Whether the circuit and its bindings are kept beside a record, so that its parts can be sent."""
    return _program_path(path).exists()


def read_program(path: Path) -> tuple[QuantumCircuit, np.ndarray]:
    """The circuit and the bindings that a recorded job runs.

    Raises
    ------
    StorageError
        If they were not kept, or cannot be read.
    """
    program = _program_path(path)
    content, bindings = load_array(program, "circuit"), load_array(program, "bindings")
    try:
        return qpy.load(io.BytesIO(content.tobytes()))[0], bindings
    except Exception as error:  # qpy has many errors of its own for junk
        raise StorageError(f"Cannot read the circuit in {program}: it is damaged.") from error


def load_array(path: Path, name: str) -> np.ndarray:
    """The array that `save_array` wrote.

    Raises
    ------
    StorageError
        If there is none, or the file is damaged.
    """
    try:
        with np.load(path) as content:
            return np.asarray(content[name])
    except Exception as error:  # numpy, zipfile and zlib each have errors of their own for junk
        cause = (error.strerror if isinstance(error, OSError) else None) or "it is damaged, or another file"
        raise StorageError(f"Cannot read {path}: {cause}.") from error


def _digest(p: torch.Tensor) -> str:
    return hashlib.sha256(p.contiguous().numpy().tobytes()).hexdigest()


def _rows_path(path: Path) -> Path:
    return path.with_suffix(".rows.npz")


def _program_path(path: Path) -> Path:
    return path.with_suffix(".program.npz")


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.stem}.lock")
