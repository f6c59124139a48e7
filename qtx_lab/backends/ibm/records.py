"""What is written down of a job on a device: fields, and how they become a request again."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Annotated, Any, Literal

import torch
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_serializer, model_validator

from ...circuits import Loader, make_loader
from ..base import JobState, JobStatus, combined_status
from ..requests import CalibrationRequest, MitigatedRowRequest, Request, RowRequest

SCHEMA_VERSION: Literal[1] = 1
"""The version of records that are written. Records without one, which are older than it, are read too."""


class Record(BaseModel):
    """Keeps fields that it does not know, so that writing a record again loses nothing."""

    model_config = ConfigDict(extra="allow", validate_assignment=True)


class TaggedRecord(Record):
    """A record whose tag is the name of its file."""

    tag: str


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
            digest=digest_of(request.p),
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


def request_record(
    request: Request | None,
) -> RowsRecord | MitigatedRowsRecord | CalibrationRecord | CircuitsRecord:
    """The record of what circuits are run for; None for another purpose."""
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


def digest_of(p: torch.Tensor) -> str:
    """SHA-256 of probabilities."""
    return hashlib.sha256(p.contiguous().numpy().tobytes()).hexdigest()
