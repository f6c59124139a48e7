"""Records of jobs on disk: each has all that is needed to find the job and to rebuild what it measures."""

from __future__ import annotations

import io
import json
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_serializer

from ...circuits import Loader, make_loader
from ...errors import StorageError
from ...storage import json_bytes, runs_home, storage_error, write_atomic
from ..base import JobState, JobStatus
from ..requests import CalibrationRequest, MitigatedRowRequest, Request, RowRequest

SCHEMA_VERSION: Literal[1] = 1
"""Of the records that are written. Records without a version, from before there was one, are read too."""

# --- What a record holds -------------------------------------------------------------------------


class _Record(BaseModel):
    """Keeps fields that it does not know, so that writing a record again loses nothing."""

    model_config = ConfigDict(extra="allow", validate_assignment=True)


class RowsRecord(_Record):
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
    """

    kind: Literal["rows"] = "rows"
    rows: int
    keys: int
    loader: str
    shots: int
    seed: int
    diagnostics: dict[str, Any]

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
        )

    def to_request(self, p: torch.Tensor, loader: Loader | None) -> RowRequest:
        """The request that was recorded; the loader is made by its name where None."""
        diagnostics = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.diagnostics.items()
        }
        return RowRequest(p, make_loader(loader or self.loader), self.shots, self.seed, diagnostics)


class MitigatedRowsRecord(_Record):
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


class CalibrationRecord(_Record):
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


class CircuitsRecord(_Record):
    """Circuits of another purpose, of which only the outcomes can be had."""

    kind: Literal["circuits"] = "circuits"


RequestRecord = Annotated[
    RowsRecord | MitigatedRowsRecord | CalibrationRecord | CircuitsRecord, Field(discriminator="kind")
]


class PartRecord(_Record):
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
        Why it failed.
    """

    tag: str
    start: int
    stop: int
    shots: int
    id: str | None
    state: JobState
    reason: str | None


class JobRecord(_Record):
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
    provider, device, instance, region, mode : str or None
        Where the job is, as `IBMEngine` takes it.
    circuits, shots : int
        Number of bound circuits, and the shots of each.
    quantum_seconds : float or None
        Estimated time on the device.
    request : RowsRecord or MitigatedRowsRecord or CalibrationRecord or CircuitsRecord
        What the circuits are run for.
    parts : list of PartRecord
        The server's jobs that the whole is split into.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    tag: str
    recorded: AwareDatetime
    provider: str | None = None
    device: str
    instance: str | None = None
    region: str | None = None
    mode: str | None = None
    circuits: int
    shots: int
    quantum_seconds: float | None = None
    request: RequestRecord
    parts: list[PartRecord] = Field(min_length=1)

    def __getitem__(self, name: str) -> Any:
        return self.model_dump()[name]

    @field_serializer("recorded")
    def _iso(self, recorded: datetime) -> str:
        return recorded.isoformat(timespec="milliseconds")

    @property
    def status(self) -> JobStatus:
        """Failed or cancelled as soon as one part is, else the state of the part that is furthest behind."""
        states = {part.state for part in self.parts}
        reasons = "; ".join(dict.fromkeys(part.reason for part in self.parts if part.reason))
        order = (JobState.FAILED, JobState.CANCELLED, *JobState)
        return JobStatus(next(state for state in order if state in states), reason=reasons or None)


class Block(NamedTuple):
    """Bound circuits `start` to `stop - 1`, and the shots of each, that one of the server's jobs runs."""

    start: int
    stop: int
    shots: int


# --- Writing -------------------------------------------------------------------------------------


def record_job(folder: Path, request: Request | None, blocks: Sequence[Block], **facts: Any) -> Path:
    """Write a job down, durably, before anything of it is submitted.

    Parameters
    ----------
    folder : Path
        Where the record goes; created if it is missing.
    request : Request or None
        What the circuits are run for, kept whole, so that it can be rebuilt after a restart.
    blocks : sequence of Block
        What each of the server's jobs runs.
    **facts
        Other fields of `JobRecord`: device, circuits, shots, provider, instance, region, mode,
        quantum_seconds.

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
        save_array(_rows_path(path), p=rows.p.numpy())
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


def write_record(path: Path, record: JobRecord) -> None:
    """Write a record whole or not at all.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    write_atomic(path, json_bytes(record.model_dump()))


def save_array(path: Path, **array: np.ndarray) -> None:
    """Write an array by its name, compressed, whole or not at all.

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
    try:
        content = _upgraded(json.loads(path.read_bytes()))
        record = JobRecord.model_validate_json(json.dumps(content), strict=True)
        cause = None if record.tag == path.stem else f"holds the record of another job, {record.tag[:60]!r}"
    except OSError as error:
        cause = f"cannot be read: {error.strerror or error}"
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        cause = f"is not the record of a job: {where} is {str(first['input'])[:60]!r}; {first['msg']}"
        cause = f"is not the record of a job: {where} is missing" if first["type"] == "missing" else cause
    except (ValueError, RecursionError):  # RecursionError: what is nested deeply, and is not ours
        cause = "is not readable JSON"
    if cause:
        raise StorageError(f"The job's record {path} {cause}.")
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
    rows = request if isinstance(request, RowsRecord) else request.rows
    rows_path = _rows_path(path)
    p = torch.from_numpy(load_array(rows_path, "p"))
    if p.shape != (rows.rows, rows.keys) or p.dtype != torch.float64:
        raise StorageError(f"{rows_path} does not hold the {rows.rows} rows of {rows.keys} keys.")
    return request.to_request(p, loader)


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


def _rows_path(path: Path) -> Path:
    return path.with_suffix(".rows.npz")
