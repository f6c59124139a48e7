"""Records of mitigated calls on disk: what each of a call's jobs is for, and how they make a result."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import AwareDatetime, Field, field_serializer

from ...circuits import Loader
from ...errors import StorageError
from ...storage import runs_home, storage_error
from ..requests import RowRequest
from .ledger import read_model, read_rows_of, save_rows, write_record
from .records import SCHEMA_VERSION, Record, RowsRecord, TaggedRecord


class CalibrationsRecord(Record):
    """The readout errors of some qubits: known, or to be had from jobs.

    Parameters
    ----------
    qubits : list of int
        The device's qubit of each bit of the register, lowest bit first.
    errors : list or None
        P(read column | true row) of each bit, (bits, 2, 2), once they are known.
    jobs : list of str
        Tags of the jobs that measure them; none where they were known before.
    kept_in : str or None
        The file that keeps them for other calls.
    """

    qubits: list[int]
    errors: list[list[list[float]]] | None
    jobs: list[str]
    kept_in: str | None


class LevelRecord(Record):
    """One noise level of a call.

    Parameters
    ----------
    noise_level : float
        As it was asked for, as a multiple of the device's own noise.
    attained : float
        As its circuit has it.
    shots : int
        Shots of each row.
    job : str
        Tag of the job that measures all rows at this level.
    calibration : int or None
        Which of the call's calibrations belongs to it.
    """

    noise_level: float
    attained: float
    shots: int = Field(ge=1)
    job: str
    calibration: int | None


class CallRecord(TaggedRecord):
    """A mitigated measurement. It is written after the records of its jobs, and before the first is sent.

    Parameters
    ----------
    schema_version : int
        See `SCHEMA_VERSION` of the jobs' records.
    tag : str
        Unique name of the call, also the name of the record's file, and the `batch` of its jobs' requests.
    recorded : datetime
        When the record was made.
    device : str
        The device's name.
    rows : RowsRecord
        All rows, also those that are not run. Their probabilities are in `<tag>.rows.npz` beside the record.
    loader : str
        Name of the loader whose circuits are run.
    bits : int
        Bits of the register.
    mitigation : dict
        Settings of the mitigation, from which it is made again.
    calibrations : list of CalibrationsRecord
        Readout errors; none where they are not undone.
    levels : list of LevelRecord
        The noise levels, in the order of the mitigation.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    tag: str
    recorded: AwareDatetime
    device: str
    rows: RowsRecord
    loader: str
    bits: int = Field(ge=1, le=64)
    mitigation: dict[str, Any]
    calibrations: list[CalibrationsRecord]
    levels: list[LevelRecord] = Field(min_length=1)

    @field_serializer("recorded")
    def _iso(self, recorded: datetime) -> str:
        return recorded.isoformat(timespec="milliseconds")

    @property
    def job_tags(self) -> list[str]:
        """Tags of all jobs, those of the calibrations first."""
        calibrations = [tag for calibration in self.calibrations for tag in calibration.jobs]
        return calibrations + [level.job for level in self.levels]


def new_call_tag() -> str:
    """A unique name for a call."""
    return f"call-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(6)}"


def record_call(
    folder: Path,
    tag: str,
    request: RowRequest,
    *,
    device: str,
    loader: Loader,
    bits: int,
    mitigation: dict[str, Any],
    calibrations: Sequence[CalibrationsRecord],
    levels: Sequence[LevelRecord],
) -> Path:
    """Write a call down, durably, before any of its jobs is sent.

    Parameters
    ----------
    folder : Path
        The folder of the jobs' records.
    tag : str
        See `new_call_tag`.
    request : RowRequest
        All rows.
    device, loader, bits, mitigation, calibrations, levels
        Fields of `CallRecord`.

    Returns
    -------
    Path
        `<folder>/calls/<tag>.json`.

    Raises
    ------
    StorageError
        If it cannot be written. Then nothing may be sent.
    """
    path = folder / "calls" / f"{tag}.json"
    record = CallRecord(
        tag=tag,
        recorded=datetime.now(UTC),
        device=device,
        rows=RowsRecord.from_request(request),
        loader=loader.name,
        bits=bits,
        mitigation=mitigation,
        calibrations=list(calibrations),
        levels=list(levels),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(path.parent, error) from error
    save_rows(path, request.p)
    write_record(path, record)
    return path


def find_call_records(
    home: str | Path | None = None, tag: str | None = None
) -> Iterator[tuple[Path, CallRecord]]:
    """Paths and contents of all records of calls under a folder of runs, in no particular order.

    A file that is no such record is skipped, with a warning that says why. Arguments are those of
    `find_records`.
    """
    home = runs_home(home)
    for path in {*home.glob("jobs/calls/*.json"), *home.glob("*/jobs/calls/*.json")}:
        if tag is None or tag in path.stem:
            try:
                yield path, read_call(path)
            except StorageError as error:
                warnings.warn(str(error), stacklevel=3)


def read_call(path: Path) -> CallRecord:
    """The record of a call in a file.

    Raises
    ------
    StorageError
        If the file cannot be read, or is not the record of the call that has its name. The message says why.
    """
    return read_model(path, CallRecord, "call")


def read_call_rows(path: Path, record: CallRecord) -> torch.Tensor:
    """The probabilities of all rows of a call, float64 (R, n).

    Raises
    ------
    StorageError
        If they, kept beside the record, cannot be read.
    """
    return read_rows_of(path, record.rows)


def write_call(path: Path, record: CallRecord) -> None:
    """Write a record of a call whole or not at all; StorageError where that fails."""
    write_record(path, record)
