"""Specs: frozen, checked descriptions of what to do, which travel as YAML and as notebook parameters."""

from __future__ import annotations

import difflib
import hashlib
import json
import operator
import re
import reprlib
from collections.abc import Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from ..controls import CONTROLS, Control, make_control
from ..errors import ArgumentError, SpecError, unknown_name
from ..samplers import BASELINES, SAMPLERS, Sampler, make_sampler

if TYPE_CHECKING:
    from ..backends import HybridPolicy, QiskitQuantumBackend
    from ..mitigation import CircuitMitigation, MitigationPlanner, ProbabilisticErrorCancellation
    from ..training import QuantumTrainer
    from ..training.cluster import Cluster

MAX_SEED = 2**63 - 1

Value = TypeVar("Value", bound=Hashable)

_SHORT = reprlib.Repr()
"""Shows what was given, of what is long or nested (YAML's aliases can make much of a little) only the ends."""
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 20, 20, 20
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200


def _whole(value: object) -> object:
    """Numpy's whole numbers become int; True, 3.0 and "3" are left for the strict check to refuse."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def _real(value: object) -> object:
    """NumPy's numbers become float, and whole numbers too, so that equal specs are equal YAML; -0.0 becomes 0.0."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    return float(value) + 0.0 if isinstance(value, int | float) and not isinstance(value, bool) else value


def _sampler_name(value: str) -> str:
    return make_sampler(value).name


def _drawing_name(value: str) -> str:
    if value == "exact":
        raise ValueError("exact attention is always shown: name a sampler that draws")
    return _sampler_name(value)


def _control_name(value: str) -> str:
    make_control(value)
    return value


Whole = Annotated[int, Field(strict=True), BeforeValidator(_whole)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False), BeforeValidator(_real)]
Count = Annotated[int, Field(strict=True, ge=1, le=65_536), BeforeValidator(_whole)]
Switch = Annotated[bool, Field(strict=True)]
SamplerName = Annotated[
    str, AfterValidator(_sampler_name), Field(json_schema_extra={"enum": [*SAMPLERS, *BASELINES]})
]
DrawingName = Annotated[
    str,
    AfterValidator(_drawing_name),
    Field(json_schema_extra={"enum": [name for name in SAMPLERS | BASELINES if name != "exact"]}),
]
ControlName = Annotated[str, AfterValidator(_control_name), Field(json_schema_extra={"enum": list(CONTROLS)})]


def _field(default: Any, text: str, unit: str, group: str, **bounds: Any) -> Any:
    """A field of a form: what it is, in which unit, under which heading, and what is allowed."""
    return Field(default, description=text, json_schema_extra={"unit": unit, "group": group}, **bounds)


class Spec(BaseModel):
    """Base of every spec: immutable, refuses unknown keys, and says in one error all that is wrong.

    Raises
    ------
    SpecError
        On making one, naming each bad field, what was given and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise SpecError(" ".join(text for _, text in _problems(type(self), error))) from None

    @classmethod
    def problems(cls, parameters: Mapping[str, Any]) -> dict[str, str]:
        """What is wrong with these fields, one text a field: what a form shows beside each; empty where all is well."""
        found: dict[str, str] = {}
        try:
            cls.__pydantic_validator__.validate_python(dict(parameters), self_instance=cls.__new__(cls))
        except ValidationError as error:
            for field, text in _problems(cls, error):
                found[field] = f"{found[field]} {text}" if field in found else text
        return found

    @property
    def identity(self) -> str:
        """Hex SHA-256 of the kind of spec and its fields: equal exactly where the same was asked."""
        content = {"kind": type(self).__name__, **self.to_parameters()}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_parameters(self) -> dict[str, Any]:
        """The fields as plain JSON types, one notebook parameter each."""
        return self.model_dump(mode="json")

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Self:
        """The spec with these fields, the rest at their defaults.

        Raises
        ------
        SpecError
            If a key is unknown or a value is not allowed.
        """
        odd = [key for key in parameters if not isinstance(key, str)]
        if odd:
            raise SpecError(f"{cls.__name__} has the key {odd[0]!r}; keys must be names.")
        return cls(**parameters)

    def to_yaml(self) -> str:
        """The fields as YAML, in the order in which they are declared."""
        parameters = self.to_parameters()
        text = yaml.safe_dump(parameters, sort_keys=False, allow_unicode=True)
        if (
            not text.isascii() and yaml.safe_load(text) != parameters
        ):  # line breaks of Unicode's own are folded
            text = yaml.safe_dump(parameters, sort_keys=False)
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """The spec that a YAML text, or the file at a `Path` or a name ending in .yaml or .yml, describes.

        Raises
        ------
        SpecError
            If the file cannot be read, is not YAML, names a key twice, or is not such a spec.
        """
        where = "The YAML text"
        if isinstance(source, Path) or source.endswith((".yaml", ".yml")):
            where = str(source)
            try:
                source = Path(source).read_text(encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise SpecError(f"{where} cannot be read as a spec: {error}.") from error
        try:
            content = read_yaml(source)
        except ValueError as error:
            raise SpecError(f"{where} is not valid YAML: {error}.") from None
        if not isinstance(content, dict):
            raise SpecError(f"{where} holds a {type(content).__name__}; it must be `field: value` lines.")
        return cls.from_parameters(content)


class SamplerSpec(Spec):
    """Which sampler draws, how much, and how often."""

    name: SamplerName = _field(
        "systematic", "The method that turns a row of logits into draws.", "name", "sampler"
    )
    num_samples: Count | None = _field(
        64,
        "Draws of each row and replicate; none where a tolerance is given in their place.",
        "draws",
        "draws",
    )
    tolerance: (
        Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=10), BeforeValidator(_real)] | None
    ) = _field(
        None,
        "In place of a count: each row gets as many draws as keep its output's relative error below this.",
        "relative error",
        "draws",
    )
    confidence: Real = _field(
        0.95, "Probability with which the tolerance is kept.", "probability", "draws", ge=0.5, lt=1
    )
    replicates: Whole = _field(
        1,
        "Independent repetitions; 2 or more give every sampler error bars.",
        "repetitions",
        "draws",
        ge=1,
        le=1024,
    )

    @model_validator(mode="before")
    @classmethod
    def _count_or_tolerance(cls, fields: Any) -> Any:
        if isinstance(fields, Mapping) and fields.get("tolerance") is not None:
            count = fields.get("num_samples")
            if count is not None:
                raise ValueError(
                    f"tolerance={fields['tolerance']!r} and num_samples={count!r} exclude each other: give one of them."
                )
            return {**fields, "num_samples": None}
        if isinstance(fields, Mapping) and "num_samples" in fields and fields["num_samples"] is None:
            raise ValueError("num_samples=None is not allowed without a tolerance: give one of them.")
        return fields

    def build(self) -> Sampler:
        """The sampler of that name."""
        return make_sampler(self.name)

    def arguments(self) -> dict[str, Any]:
        """What `sampled_attention` takes: the sampler and its draws."""
        spent = (
            {"num_samples": self.num_samples}
            if self.tolerance is None
            else {"tolerance": self.tolerance, "confidence": self.confidence}
        )
        return {"sampler": self.build(), **spent, "replicates": self.replicates}


class ControlSpec(Spec):
    """Which control variates correct the estimate."""

    names: tuple[ControlName, ...] = _field(
        (),
        "Surrogates whose sums are known, each named once; none: the estimate is not corrected.",
        "name",
        "controls",
    )

    @field_validator("names")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _once("names", names)

    def build(self) -> list[Control] | None:
        """What `sampled_attention` takes as its `control_variate`."""
        return [make_control(name) for name in self.names] or None


class CircuitSpec(Spec):
    """How rows become circuits, and where those run."""

    provider: Annotated[
        Literal["aer", "ibm"], BeforeValidator(lambda name: "ibm" if name == "ibm-q" else name)
    ] = _field("aer", "aer: simulators and twins of devices; ibm: IBM's devices.", "name", "device")
    device: str | None = _field(
        None,
        "A twin, as fake_fez (see qtx_lab.fake_devices()), or a device, as ibm_fez; none: a simulator.",
        "name",
        "device",
        min_length=1,
    )
    loader: Literal["tree", "dynamic", "unary", "mps"] = _field(
        "dynamic", "How a row becomes a circuit.", "name", "circuit"
    )
    shots: Whole = _field(1024, "Measurements of each row.", "shots", "circuit", ge=1, le=16_777_216)
    optimization_level: Whole = _field(
        3, "How hard the transpiler tries to shorten circuits.", "level", "circuit", ge=0, le=3
    )
    hybrid_mode: Switch = _field(
        False,
        "Rows that the device cannot run, or not within the limits, are drawn classically, and reported.",
        "yes or no",
        "hybrid",
    )
    max_qubits: Whole = _field(
        10, "Limit of the hybrid mode: rows that need more are drawn classically.", "qubits", "hybrid",
        ge=1, le=64,
    )  # fmt: skip
    min_fidelity: Real = _field(
        0.0, "Limit of the hybrid mode: the least predicted fidelity of a circuit.", "probability", "hybrid",
        ge=0, le=1,
    )  # fmt: skip
    max_pending: Annotated[int, Field(strict=True, ge=0, le=1_000_000), BeforeValidator(_whole)] | None = _field(
        None, "Limit of the hybrid mode: the most jobs that may wait for the device; none: any.", "jobs",
        "hybrid",
    )  # fmt: skip
    noise_scale: Real = _field(
        1.0, "Times all errors of a simulator or twin; 0 has no noise.", "factor", "noise", ge=0, lt=1e6
    )
    one_qubit: Real = _field(
        0.0, "Depolarising probability after sx and x, without a twin.", "probability", "noise", ge=0, le=1
    )
    two_qubit: Real = _field(
        0.0, "Depolarising probability after cz, without a twin.", "probability", "noise", ge=0, le=1
    )
    amplitude_damping: Real = _field(
        0.0, "Probability that 1 decays to 0 in a gate, without a twin.", "probability", "noise", ge=0, le=1
    )
    phase_damping: Real = _field(
        0.0, "Probability that the phase is lost in a gate, without a twin.", "probability", "noise",
        ge=0, le=1,
    )  # fmt: skip
    readout: Real = _field(
        0.0, "Probability that a bit is read wrongly, without a twin.", "probability", "noise", ge=0, le=0.5
    )
    instance: str | None = _field(
        None, "IBM instance, by CRN or name; none: the account's own.", "name", "IBM", min_length=1
    )
    region: Literal["us-east", "eu-de"] | None = _field(
        None, "Region of an instance that is chosen for you.", "name", "IBM"
    )
    mode: Literal["job", "batch", "session"] = _field(
        "job", "How jobs are run: each by itself, or in one Batch or Session.", "name", "IBM"
    )
    fractional_gates: Switch = _field(
        False, "Transpile to rx and rzz too, on devices that have them.", "yes or no", "IBM"
    )
    twirling: Switch = _field(False, "Twirl gates and measurements at random.", "yes or no", "IBM")
    dynamical_decoupling: Switch = _field(False, "Keep idle qubits busy with pulses.", "yes or no", "IBM")
    max_quantum_seconds: Real = _field(
        60.0, "A submission that is estimated to take longer is asked about.", "s", "IBM", gt=0, le=86_400
    )

    @model_validator(mode="after")
    def _fit_the_provider(self) -> Self:
        groups = _groups(type(self))
        changed = {
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default and name not in ("provider", "device")
        }
        if self.provider == "ibm":
            if self.device is None:
                raise ValueError("device=None is not allowed with provider 'ibm': name one, as 'ibm_fez'.")
            wrong, why = {"noise"}, "with provider 'ibm', which has noise of its own"
        else:
            wrong, why = {"IBM"}, "with provider 'aer': it is for IBM's devices"
            if self.device is not None:
                from ..backends.aer import IDEAL
                from ..backends.noise import fake_devices

                if self.device not in (*IDEAL, *fake_devices()):
                    raise unknown_name("device", self.device, ["aer", *fake_devices()])
                if self.device not in IDEAL:
                    own = changed & set(_NOISE)
                    if own:
                        name = min(own)
                        raise ValueError(
                            f"{name}={getattr(self, name)!r} is not allowed with device={self.device!r}, which has noise of "
                            "its own: noise_scale makes it more or less."
                        )
        for name in sorted(changed):
            if groups[name] in wrong:
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed {why}.")
        return self

    def build(self, **options: Any) -> QiskitQuantumBackend:
        """The backend; `options` go to it too, as `service`, `confirm` and `run_dir` for IBM's devices."""
        from ..backends import ParametricNoise, QiskitQuantumBackend

        if self.provider == "aer":
            noise = {name: getattr(self, name) for name in _NOISE}
            settings: dict[str, Any] = {"noise_scale": self.noise_scale}
            if any(noise.values()):
                settings["noise"] = ParametricNoise(**noise)
        else:
            names = ("instance", "region", "mode", "fractional_gates", "max_quantum_seconds")
            settings = {name: getattr(self, name) for name in names}
            if self.twirling:
                settings["twirling"] = {"enable_gates": True, "enable_measure": True}
            if self.dynamical_decoupling:
                settings["dynamical_decoupling"] = {"enable": True}
        return QiskitQuantumBackend(
            self.provider,
            self.device,
            self.shots,
            self.optimization_level,
            loader=self.loader,
            **settings,
            **options,
        )

    def policy(self) -> HybridPolicy | bool:
        """What `CircuitSampler` takes as its `hybrid_mode`."""
        from ..backends import HybridPolicy

        return self.hybrid_mode and HybridPolicy(self.max_qubits, self.min_fidelity, self.max_pending)


_NOISE = ("one_qubit", "two_qubit", "amplitude_damping", "phase_damping", "readout")


class MitigationSpec(Spec):
    """What is done about a device's noise.

    Outcomes on masked keys and padding are always thrown away: that symmetry costs nothing and has no switch.
    """

    method: Literal["none", "planner", "zne", "shared-decay", "corrected-decay", "distillation", "pec"] = (
        _field(
            "none",
            "planner: rehearse every way on the device's calibration and take the best for the shots at hand.",
            "name",
            "method",
        )
    )
    readout: Switch = _field(
        False, "Undo readout errors, by a calibration of their own; the planner decides it itself.",
        "yes or no", "method",
    )  # fmt: skip
    noise_levels: tuple[Real, ...] = _field(
        (1.0, 3.0, 5.0),
        "Of zne and the decays, kept in rising order: 1 is the device's own noise.",
        "times the device's noise",
        "noise levels",
        min_length=1,
        max_length=16,
    )
    extrapolation: Literal["richardson", "linear", "polynomial", "exponential"] = _field(
        "richardson", "Of zne: what is fitted through the levels.", "name", "noise levels"
    )
    degree: Whole = _field(2, "Of the polynomial.", "degree", "noise levels", ge=1, le=8)
    scaling: Literal["local", "two-qubit", "global", "model"] = _field(
        "local",
        "What makes the levels: folded gates, or a simulator's scaled noise model.",
        "name",
        "noise levels",
    )
    instances: Whole = _field(
        256, "Of pec: circuits with random Paulis.", "circuits", "cancellation", ge=1, le=65_536
    )

    @field_validator("noise_levels")
    @classmethod
    def _rising_levels(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        low = [x for x in levels if not 0 <= x <= 1000]
        if low:
            raise ValueError(f"noise_levels={list(levels)} is not allowed: {low[0]:g} is not from 0 to 1000.")
        return tuple(sorted(_once("noise_levels", levels)))

    @model_validator(mode="after")
    def _buildable(self) -> Self:
        if self.method in ("zne", "shared-decay", "corrected-decay"):
            try:
                self.build(num_keys=2)
            except ArgumentError as error:  # about noise_levels, by that name
                raise ValueError(str(error)) from None
        return self

    def build(
        self, num_keys: int | None = None
    ) -> CircuitMitigation | MitigationPlanner | ProbabilisticErrorCancellation | None:
        """What `CircuitSampler` takes as its `mitigation`; None where nothing is done.

        Parameters
        ----------
        num_keys : int, optional
            Length of the rows: the exponential fit ends at 1 / num_keys, and needs it.

        Raises
        ------
        ArgumentError
            If the exponential fit is not told.
        """
        from ..mitigation import (
            CircuitMitigation,
            MitigationPlanner,
            ProbabilisticErrorCancellation,
            SharedDecay,
            TwoCopyLoader,
            ZeroNoiseExtrapolation,
        )

        if self.method == "none":
            return CircuitMitigation(readout=True) if self.readout else None
        if self.method == "planner":
            return MitigationPlanner()
        if self.method == "pec":
            return ProbabilisticErrorCancellation(self.instances, readout=self.readout)
        if self.method == "distillation":
            return CircuitMitigation(readout=self.readout, loader=TwoCopyLoader())
        zne: ZeroNoiseExtrapolation | SharedDecay
        if self.method == "zne":
            asymptote = 0.0
            if self.extrapolation == "exponential":
                if num_keys is None:
                    raise ArgumentError(
                        "num_keys=None is not allowed: the exponential fit ends at 1 / num_keys."
                    )
                asymptote = 1 / num_keys
            zne = ZeroNoiseExtrapolation(
                self.noise_levels, self.extrapolation, degree=self.degree, asymptote=asymptote
            )
        else:
            zne = SharedDecay(self.noise_levels, corrected=self.method == "corrected-decay")
        return CircuitMitigation(zne, self.readout, scaling=self.scaling)


class TrainSpec(Spec):
    """How a language model is trained with sampled attention."""

    model: Literal["reference", "reference-untrained", "small", "100m"] = _field(
        "reference",
        "The shipped model, or one of another shape with random weights.",
        "name",
        "model and text",
    )
    text: str = _field(
        "reference", '"reference" for Python\'s manual, or the path of a UTF-8 file or of tokens in a .npy file.',
        "path", "model and text", min_length=1,
    )  # fmt: skip
    num_tokens: Whole = _field(256, "Length of a sequence.", "tokens", "model and text", ge=16, le=1_048_576)
    sampler: SamplerName = _field(
        "systematic", 'Sampler of the attention rows; "exact" trains without sampling.', "name", "attention"
    )
    num_samples: Whole = _field(64, "Draws of each row at the start.", "draws", "attention", ge=1, le=65_536)
    control_variate: ControlName | None = _field(
        None, "What corrects the estimate; none: nothing.", "name", "attention"
    )
    draws_schedule: Literal["constant", "linear", "cosine", "signal-to-noise"] = _field(
        "constant",
        "How the draws go to their final number; signal-to-noise: as the gradient asks for it.",
        "name",
        "attention",
    )
    final_num_samples: Count | None = _field(
        None, "Draws of each row at the end, the most of signal-to-noise; none: as at the start.", "draws",
        "attention",
    )  # fmt: skip
    noise: Real = _field(
        0.0, "Part of each row that is replaced by the uniform distribution, as a noisy device does.",
        "probability", "attention", ge=0, le=1,
    )  # fmt: skip
    noise_schedule: Literal["constant", "linear"] = _field(
        "constant", "Whether the noise stays, or rises from 0.", "name", "attention"
    )
    steps: Whole = _field(200, "Steps of the optimizer.", "steps", "optimizer", ge=1, le=100_000_000)
    batch_size: Whole = _field(
        8, "Sequences of a step, all ranks together.", "sequences", "optimizer", ge=1, le=1_048_576
    )
    accumulation: Whole = _field(
        1, "Parts in which a rank's share of a batch is worked off.", "parts", "optimizer", ge=1, le=65_536
    )
    learning_rate: Real = _field(1e-3, "Of AdamW, at its peak.", "a step", "optimizer", gt=0, le=10)
    warmup_steps: Whole = _field(
        50, "Steps in which the learning rate rises; then it falls as a cosine.", "steps", "optimizer",
        ge=0, le=100_000_000,
    )  # fmt: skip
    weight_decay: Real = _field(0.1, "Of AdamW, for matrices.", "a step and rate", "optimizer", ge=0, le=10)
    clip_norm: Real = _field(
        1.0, "Longer gradients are shortened to this; 0: never.", "norm", "optimizer", ge=0, le=1e6
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "mixed"] = _field(
        "auto", "mixed: bf16, fp16 on a GPU without it; auto: mixed on GPUs, fp32 on CPUs.", "name", "speed"
    )
    compile: Switch = _field(False, "Compile the model.", "yes or no", "speed")
    parallel: Literal["ddp", "fsdp"] = _field(
        "ddp", "ddp: every rank holds the model; fsdp: a part of it.", "name", "speed"
    )
    validate_every: Whole = _field(
        100, "Steps between validations with exact attention; 0: only at the end.", "steps", "record",
        ge=0, le=100_000_000,
    )  # fmt: skip
    checkpoint_every: Whole = _field(
        100, "Steps between checkpoints; 0: only at the end.", "steps", "record", ge=0, le=100_000_000
    )
    keep_checkpoints: Whole = _field(
        2, "Checkpoints that are kept, the latest.", "checkpoints", "record", ge=1, le=1000
    )
    seed: Whole = _field(0, "Seed of every random number.", "number", "record", ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        from ..training.recipe import Recipe

        Recipe(**self._recipe())
        return self

    def _recipe(self) -> dict[str, Any]:
        return {name: value for name, value in self if name not in ("model", "text")}

    def build(self, **options: Any) -> QuantumTrainer:
        """The trainer; options are those arguments of `QuantumTrainer` that no spec has (cluster, folder, ...)."""
        from ..training import QuantumTrainer

        return QuantumTrainer(self.model, text=self.text, **self._recipe(), **options)


class ClusterSpec(Spec):
    """Which Dask cluster sweeps and training run on."""

    kind: Literal["auto", "local", "cuda", "address"] = _field(
        "auto", "local: processes; cuda: a worker a GPU; address: a running scheduler; auto: GPUs if any.",
        "name", "cluster",
    )  # fmt: skip
    num_workers: Annotated[int, Field(strict=True, ge=1, le=4096), BeforeValidator(_whole)] | None = _field(
        None, "Workers; none: one a core or GPU, or all that the scheduler has.", "workers", "cluster",
    )  # fmt: skip
    threads_per_worker: Whole = _field(1, "Of a local worker.", "threads", "cluster", ge=1, le=1024)
    address: str | None = _field(
        None,
        "Of the scheduler, as tcp://host:8786; with kind address only.",
        "address",
        "cluster",
        min_length=1,
    )
    rmm_pool_bytes: Annotated[int, Field(strict=True, ge=0, le=2**50), BeforeValidator(_whole)] | None = (
        _field(None, "GPU memory that each worker takes beforehand; none: nothing.", "bytes", "GPUs")
    )
    devices: tuple[Whole, ...] = _field(
        (), "GPUs that are used, by number; none named: all.", "number", "GPUs", max_length=1024
    )
    timeout: Real = _field(
        60.0, "How long to wait for the scheduler and its workers.", "s", "cluster", gt=0, le=86_400
    )

    @field_validator("devices")
    @classmethod
    def _each_once(cls, devices: tuple[int, ...]) -> tuple[int, ...]:
        low = [x for x in devices if not 0 <= x < 1024]
        if low:
            raise ValueError(f"devices={list(devices)} is not allowed: {low[0]} is not from 0 to 1023.")
        return _once("devices", devices)

    @model_validator(mode="after")
    def _fit_the_kind(self) -> Self:
        if (self.kind == "address") != (self.address is not None):
            raise ValueError(
                f"address={self.address!r} is not allowed with kind={self.kind!r}: kind 'address', and no other, has one."
            )
        if self.kind in ("local", "address") and (self.devices or self.rmm_pool_bytes is not None):
            name = "devices" if self.devices else "rmm_pool_bytes"
            raise ValueError(
                f"{name}={getattr(self, name)!r} is not allowed with kind={self.kind!r}: it is for GPUs of this machine."
            )
        return self

    def build(self) -> AbstractContextManager[Cluster]:
        """The cluster, open within a `with`: `with spec.build() as cluster: cluster.client.submit(...)`."""
        from ..training.cluster import open_cluster

        return open_cluster(**{name: getattr(self, name) for name in type(self).model_fields})


class ExperimentSpec(Spec):
    """What the quickstart notebook does: which text, which head, which samplers, how many draws."""

    text: str = _field(
        "reference",
        '"reference" for the held-out text shipped with the model, or the path of a UTF-8 file.',
        "path",
        "model and text",
        min_length=1,
    )
    layer: Whole = _field(3, "Layer whose attention is shown.", "index", "attention", ge=0, le=5)
    head: Whole = _field(0, "Query head whose attention is shown.", "index", "attention", ge=0, le=7)
    sampler: DrawingName = _field("systematic", "Sampler of the attention maps.", "name", "attention")
    samplers: tuple[DrawingName, ...] = _field(
        ("monte-carlo", "stratified", "systematic", "head-tail"),
        "Samplers compared, each named once.",
        "name",
        "comparison",
        min_length=1,
    )
    sample_counts: tuple[Count, ...] = _field(
        (8, 32, 128),
        "Draws a row at which the samplers are compared; kept in rising order, each once.",
        "draws",
        "comparison",
        min_length=1,
    )
    seed: Whole = _field(0, "Seed of every random number.", "number", "record", ge=0, le=MAX_SEED)
    num_tokens: Whole = _field(512, "Length of a window of text.", "bytes", "model and text", ge=16, le=1024)
    num_windows: Whole = _field(
        4,
        "Held-out windows over which bits per byte are averaged.",
        "windows",
        "model and text",
        ge=1,
        le=1024,
    )

    @field_validator("samplers")
    @classmethod
    def _named_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _once("samplers", names)

    @field_validator("sample_counts")
    @classmethod
    def _rising_once(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(_once("sample_counts", counts)))


class NotebookSpec(Spec):
    """A notebook and the parameters it was given."""

    notebook: str = Field(min_length=1, description="The notebook's name, without its folder and ending.")
    parameters: dict[str, JsonValue] = Field(default={}, description="Parameters given, by name.")


class SweepSpec(Spec):
    """A notebook run for every combination of values, several times."""

    notebook: str = _field(
        ..., "The notebook's name, without its folder and ending.", "name", "notebook", min_length=1
    )
    sha256: str = _field(..., "Of the notebook's file: another content is another sweep.", "hash", "notebook",
        pattern="[0-9a-f]{64}")  # fmt: skip
    grid: dict[str, tuple[JsonValue, ...]] = _field(
        {}, "Values by parameter; every combination is run.", "values", "grid"
    )
    parameters: dict[str, JsonValue] = _field(
        {}, "Parameters that are the same everywhere.", "values", "grid"
    )
    repeats: Whole = _field(
        1, "Runs of each combination, each with a seed of its own.", "runs", "grid", ge=1, le=65_536
    )
    seed: Whole = _field(0, "What the repeats' seeds are derived from.", "number", "grid", ge=0, le=MAX_SEED)


SPECS: dict[str, type[Spec]] = {
    "experiment": ExperimentSpec,
    "sampler": SamplerSpec,
    "control": ControlSpec,
    "circuit": CircuitSpec,
    "mitigation": MitigationSpec,
    "train": TrainSpec,
    "cluster": ClusterSpec,
    "notebook": NotebookSpec,
    "sweep": SweepSpec,
}
"""Every kind of spec by name."""


def nearest(given: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' with the known name closest to the given one, or nothing."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _once(field: str, values: tuple[Value, ...]) -> tuple[Value, ...]:
    twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
    if twice:
        raise ValueError(f"{field}={list(values)} is not allowed: {twice[0]!r} is named more than once.")
    return values


@cache
def _groups(cls: type[Spec]) -> dict[str, str]:
    """The heading of each field."""
    return {name: field["group"] for name, field in cls.model_json_schema()["properties"].items()}


def _problems(cls: type[Spec], error: ValidationError) -> list[tuple[str, str]]:
    """Field and sentence of each thing that is wrong; the field is "" where it is none in particular."""
    properties = cls.model_json_schema()["properties"]
    problems = error.errors(include_url=False)
    bad_items = {problem["loc"][0] for problem in problems if len(problem["loc"]) > 1}
    found = []
    for problem in problems:
        field, *inside = problem["loc"] or ("",)
        given = problem["input"]
        if problem["type"] == "too_short" and field in bad_items:  # short only because items were refused
            continue
        if problem["type"] == "extra_forbidden":
            hint = nearest(str(field), properties)
            text = f"{cls.__name__} has no field {field!r}.{hint} Allowed: {', '.join(properties)}."
        elif problem["type"] == "missing":
            text = f"{field} is missing: {cls.__name__} needs it."
        elif problem["type"] == "value_error":  # from a validator of ours
            text = str(problem["ctx"]["error"])
            if not field:  # of several fields: the one that is named first
                field = next((name for name in re.findall(r"\w+", text)[:1] if name in properties), "")
            text = text if text.startswith(str(field)) else f"{field}: {text}"
        else:
            schema = properties.get(field, {})
            if inside:
                schema = schema.get("items", {})
            place = str(field) + "".join(f"[{part!r}]" for part in inside)
            names = [str(name) for name in _plain(schema).get("enum", ())]
            near = nearest(given, names) if isinstance(given, str) else ""
            text = f"{place}={_SHORT.repr(given)} is not allowed: {_allowed(schema, problem['msg'])}.{near}"
        found.append((str(field), text))
    return found


def _plain(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a value that is not None."""
    return next((kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"), schema)


def _allowed(schema: Mapping[str, Any], message: str) -> str:
    if "anyOf" in schema:
        return f"{_allowed(_plain(schema), message)}, or None"
    if "enum" in schema:
        return f"it must be one of {', '.join(map(str, schema['enum']))}"
    if schema.get("type") == "boolean":
        return "it must be True or False"
    kind = {"integer": "a whole number", "number": "a number"}.get(schema.get("type", ""))
    bounds = [
        f"{word} {schema[key]:g}" if isinstance(schema[key], float) else f"{word} {schema[key]}"
        for key, word in (
            ("minimum", "from"),
            ("exclusiveMinimum", "above"),
            ("maximum", "to"),
            ("exclusiveMaximum", "to below"),
        )
        if key in schema
    ]
    if kind and bounds:
        return f"it must be {kind} {' '.join(bounds)}"
    if schema.get("type") == "array":
        return (
            f"it must be a list of at least {schema['minItems']}"
            if "minItems" in schema
            else "it must be a list"
        )
    return message.replace("Input should", "it must").replace("String should", "it must")


def read_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises
    ------
    ValueError
        With what is wrong, in one line: no YAML, a key that is named twice, a tag that its value does not fit.
    """
    try:
        return yaml.load(text, _UniqueKeys)
    # PyYAML's constructors raise whatever they stumble over: `!!int ''` an IndexError, `!!bool x` a KeyError.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        ours = isinstance(error, yaml.YAMLError | ValueError | RecursionError)
        said = str(error) if ours else "a tag's value does not fit it"
        raise ValueError(" ".join(said.split())) from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which naming a key twice is an error instead of a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key.value, list):  # a key that is a list or a mapping: refused below
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is named twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


__all__ = [
    "MAX_SEED",
    "SPECS",
    "CircuitSpec",
    "ClusterSpec",
    "ControlSpec",
    "ExperimentSpec",
    "MitigationSpec",
    "NotebookSpec",
    "SamplerSpec",
    "Spec",
    "SweepSpec",
    "TrainSpec",
]
