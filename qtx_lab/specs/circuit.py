"""`CircuitSpec`: how rows become circuits, and on which device or simulator those run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ..errors import unknown_name
from .base import Spec
from .fields import AnyOf, Real, Suggested, Switch, Whole, field, python_number

if TYPE_CHECKING:
    from ..backends import HybridPolicy, QiskitQuantumBackend

NOISE_FIELDS = ("one_qubit", "two_qubit", "amplitude_damping", "phase_damping", "readout")
"""The fields that describe the noise of a simulator without a twin; they are those of `ParametricNoise`."""

IBM_FIELDS = (
    "account",
    "instance",
    "region",
    "mode",
    "fractional_gates",
    "max_quantum_seconds",
    "budget",
)
"""The fields that go to the backend of an IBM device as they are."""

HYBRID_LIMITS = ("max_qubits", "min_fidelity", "max_pending")
"""The fields of `HybridPolicy`."""


def _loader_name(name: str) -> str:
    from ..circuits import make_loader  # loads qiskit

    make_loader(name)
    return name


def _loader_names() -> Iterable[str]:
    from ..circuits import LOADERS

    return LOADERS


def _device_names() -> Iterable[str]:
    """The twins that ship with qiskit-ibm-runtime, by its folders, so that qiskit need not be loaded."""
    package = importlib.util.find_spec("qiskit_ibm_runtime")
    if package is None or package.origin is None:
        return []
    folders = (Path(package.origin).parent / "fake_provider" / "backends").glob("*/__init__.py")
    return sorted(f"fake_{path.parent.name}" for path in folders)


def _budget_text(text: str) -> str:
    from ..backends.ibm.budget import Budget  # loads qiskit

    Budget.of(text)
    return text


LoaderName = Annotated[str, AfterValidator(_loader_name), AnyOf(_loader_names)]
"""The name of a loader."""


class CircuitSpec(Spec):
    """How rows become circuits, and on which device or simulator those run.

    Limits of the hybrid mode are refused without it, unless all fields are given, as by a form or by YAML.

    Examples
    --------
    >>> CircuitSpec(device="fake_boston", loader="tree", shots=4096).loader
    'tree'
    """

    provider: Annotated[
        Literal["aer", "ibm"], BeforeValidator(lambda name: "ibm" if name == "ibm-q" else name)
    ] = field("aer", "aer: simulators and twins of devices; ibm: IBM's devices.", "name", "device")
    device: Annotated[str, Suggested(_device_names)] | None = field(
        None,
        "A twin, as fake_boston (see qtx_lab.device_errors()), or a device, as ibm_fez; none: a simulator.",
        "name",
        "device",
        min_length=1,
    )
    loader: LoaderName = field(
        "dynamic", "How a row becomes a circuit; softmax computes it from its logits.", "name", "circuit"
    )
    shots: Whole = field(1024, "Measurements of each row.", "shots", "circuit", ge=1, le=16_777_216)
    optimization_level: Whole = field(
        3,
        "How hard the transpiler tries to shorten circuits.",
        "level",
        "circuit",
        label="optimization",
        ge=0,
        le=3,
    )
    hybrid_mode: Switch = field(
        False,
        "Rows that the device cannot run, or not within the limits, are drawn classically and reported.",
        "yes or no",
        "hybrid",
    )
    max_qubits: Whole = field(
        10,
        "Limit of the hybrid mode: rows that need more qubits are drawn classically.",
        "qubits",
        "hybrid",
        ge=1,
        le=64,
    )
    min_fidelity: Real = field(
        0.0,
        "Limit of the hybrid mode: the lowest predicted fidelity of a circuit that still runs on the device.",
        "probability",
        "hybrid",
        ge=0,
        le=1,
    )
    max_pending: (
        Annotated[int, Field(strict=True, ge=0, le=1_000_000), BeforeValidator(python_number)] | None
    ) = field(
        None,
        "Limit of the hybrid mode: the largest number of jobs that may wait for the device; none: no limit.",
        "jobs",
        "hybrid",
    )
    noise_scale: Real = field(
        1.0,
        "Factor of all error rates of a simulator or twin; 0 switches its noise off.",
        "factor",
        "noise",
        ge=0,
        lt=1e6,
    )
    one_qubit: Real = field(
        0.0,
        "Depolarising probability after each sx and x gate, on a simulator without a twin.",
        "probability",
        "noise",
        ge=0,
        le=1,
    )
    two_qubit: Real = field(
        0.0,
        "Depolarising probability after each cz gate, on a simulator without a twin.",
        "probability",
        "noise",
        ge=0,
        le=1,
    )
    amplitude_damping: Real = field(
        0.0,
        "Probability that 1 decays to 0 during a gate, on a simulator without a twin.",
        "probability",
        "noise",
        ge=0,
        le=1,
    )
    phase_damping: Real = field(
        0.0,
        "Probability that the phase is lost during a gate, on a simulator without a twin.",
        "probability",
        "noise",
        ge=0,
        le=1,
    )
    readout: Real = field(
        0.0,
        "Probability that a bit is read wrongly, on a simulator without a twin.",
        "probability",
        "noise",
        ge=0,
        le=0.5,
    )
    account: str | None = field(
        None, "Name of a saved IBM account; none: the default one.", "name", "IBM", min_length=1
    )
    instance: str | None = field(
        None, "IBM instance, by CRN or by name; none: the account's own.", "name", "IBM", min_length=1
    )
    region: Literal["us-east", "eu-de"] | None = field(
        None, "Region of an instance that is chosen for you.", "name", "IBM"
    )
    mode: Literal["job", "batch", "session"] = field(
        "job", "How jobs are run: each by itself, or together in a Batch or a Session.", "name", "IBM"
    )
    fractional_gates: Switch = field(
        False, "Use rx and rzz gates too, on devices that have them.", "yes or no", "IBM"
    )
    twirling: Switch = field(False, "Twirl gates and measurements at random.", "yes or no", "IBM")
    dynamical_decoupling: Switch = field(False, "Keep idle qubits busy with pulses.", "yes or no", "IBM")
    max_quantum_seconds: Real = field(
        60.0,
        "A call whose estimate, of all that it sends, is longer than this is confirmed by you first.",
        "s",
        "IBM",
        gt=0,
        le=86_400,
    )
    budget: Annotated[str, AfterValidator(_budget_text)] | None = field(
        None,
        "Quantum time of all jobs in the folder of runs together, as 10 min per 28 days; none: no budget.",
        "duration",
        "IBM",
    )

    @model_validator(mode="after")
    def _check_the_provider(self) -> Self:
        """Fields of another provider, and noise on top of a device's own, are refused."""
        if self.provider == "ibm":
            if self.device is None:
                raise ValueError("device=None is not allowed with provider 'ibm': name one, as 'ibm_fez'.")
            self._refuse_changes_of("noise", "with provider 'ibm', whose devices have noise of their own")
        else:
            self._check_the_twin()
            self._refuse_changes_of("IBM", "with provider 'aer': it is for IBM's devices")
        return self

    def _check_the_twin(self) -> None:
        if self.device is None:
            return
        from ..backends.aer import IDEAL
        from ..backends.noise import fake_devices

        if self.device in IDEAL:
            return
        twins = fake_devices()
        if self.device not in twins:
            raise unknown_name("device", self.device, ["aer", *twins])
        changed = self._changed_fields() & set(NOISE_FIELDS)
        if changed:
            name = min(changed)
            raise ValueError(
                f"{name}={dict(self)[name]!r} is not allowed with device={self.device!r}, which has noise of "
                "its own: noise_scale makes it more or less."
            )

    def _refuse_changes_of(self, group: str, reason: str) -> None:
        """Refuse fields of this heading that are not at their defaults."""
        for name in sorted(self._changed_fields()):
            if self.groups()[name] == group:
                raise ValueError(f"{name}={dict(self)[name]!r} is not allowed {reason}.")

    def _changed_fields(self) -> set[str]:
        return {name for name, value in self if value != type(self).model_fields[name].default}

    def unused_fields(self) -> dict[str, str]:
        """The limits of the hybrid mode where that is off; see `Spec.unused_fields`."""
        if self.hybrid_mode:
            return {}
        return dict.fromkeys(HYBRID_LIMITS, "with hybrid_mode=False: it is a limit of the hybrid mode")

    def build(self, **options: Any) -> QiskitQuantumBackend:
        """The backend; `options` go to it too, as `service`, `confirm` and `run_dir` for IBM's devices."""
        from ..backends import ParametricNoise, QiskitQuantumBackend

        fields = dict(self)
        settings: dict[str, Any]
        if self.provider == "aer":
            settings = {"noise_scale": self.noise_scale}
            noise = {name: fields[name] for name in NOISE_FIELDS}
            if any(noise.values()):
                settings["noise"] = ParametricNoise(**noise)
        else:
            settings = {name: fields[name] for name in IBM_FIELDS}
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
        """The `hybrid_mode` of `CircuitSampler`."""
        from ..backends import HybridPolicy

        return self.hybrid_mode and HybridPolicy(self.max_qubits, self.min_fidelity, self.max_pending)
