"""The files that hold records of jobs, and what is kept beside them: written whole, found and read again."""

from __future__ import annotations

import io
import json
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from pydantic import ValidationError
from qiskit import QuantumCircuit, qpy

from ...circuits import Loader
from ...errors import StorageError
from ...storage import json_bytes, runs_home, storage_error, write_atomic
from ..base import JobState
from ..requests import MitigatedRowRequest, Request, RowRequest
from .records import (
    SCHEMA_VERSION,
    CalibrationRecord,
    CircuitsRecord,
    JobRecord,
    MitigatedRowsRecord,
    PartRecord,
    Record,
    RowsRecord,
    TaggedRecord,
    digest_of,
    request_record,
)

MAX_RECORD_BYTES = 1 << 26
"""A larger file is not read: it is no record of a job."""

T = TypeVar("T", bound=TaggedRecord)


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
    record = JobRecord(tag=tag, recorded=now, request=request_record(request), parts=parts, **facts)
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
    if not fits or (rows.digest and rows.digest != digest_of(p)):
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


def _rows_path(path: Path) -> Path:
    return path.with_suffix(".rows.npz")


def _program_path(path: Path) -> Path:
    return path.with_suffix(".program.npz")


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.stem}.lock")
