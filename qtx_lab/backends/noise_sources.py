"""Noise of one's own: T1, T2 and gate times, an Aer `NoiseModel`, or a device's calibration of some date."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from qiskit.circuit import Gate, Measure, Parameter
from qiskit.circuit.controlflow import IfElseOp
from qiskit.circuit.library import CZGate, RZGate, SXGate, XGate, get_standard_gate_name_mapping
from qiskit.quantum_info import Choi, Kraus, SuperOp
from qiskit.transpiler import InstructionProperties, QubitProperties, Target
from qiskit_aer.noise import NoiseModel, QuantumError, thermal_relaxation_error
from qiskit_ibm_runtime.models import BackendProperties
from qiskit_ibm_runtime.models.exceptions import BackendPropertyError
from qiskit_ibm_runtime.utils.backend_decoder import properties_from_server_data

from ..checks import check_number
from ..errors import ArgumentError
from .exact import Noise
from .noise import (
    MAX_READOUT_ERROR,
    SimulatorNoise,
    best_line,
    best_region,
    channel_infidelity,
    device_noise,
    fake_device,
    reduced_target,
)

FRACTIONAL_GATES = ("rx", "rzz")
"""Gates that IBM's devices have only where they are asked for."""

NEVER_RUN = ("id", "delay", "reset", "measure", "barrier")
"""Instructions that no transpiled loader has, or whose errors are those of the readout."""

NoiseSource = SimulatorNoise | NoiseModel | BackendProperties | Mapping[str, Any] | os.PathLike[str] | str
"""What describes noise: see `make_noise`."""


@dataclass(frozen=True)
class ThermalNoise(SimulatorNoise):
    """Qubits that relax while their gates last, on a device with rz, sx, x and cz between all pairs.

    Parameters
    ----------
    t1, t2 : float
        Relaxation and dephasing times of every qubit, seconds; t2 <= 2 t1.
    one_qubit_time, two_qubit_time : float
        How long sx and x, and cz, last, seconds. rz is done in software and takes no time.
    readout_time : float
        How long a measurement lasts, seconds. It acts on qubits that wait for it; see `feed_forward_latency`
        of `QiskitQuantumBackend`.
    readout : float
        Probability that a bit is read wrongly, at most 0.5.

    Raises
    ------
    ArgumentError
        If a number is out of its bounds.

    Source: the thermal relaxation channel of Aer, `qiskit_aer.noise.thermal_relaxation_error`.

    Examples
    --------
    >>> noise = ThermalNoise(t1=150e-6, t2=100e-6, one_qubit_time=32e-9, two_qubit_time=68e-9, readout=0.01)
    >>> round(noise.target(2)["cz"][(0, 1)].error, 6)
    0.000725
    """

    t1: float
    t2: float
    one_qubit_time: float
    two_qubit_time: float
    readout_time: float = 0.0
    readout: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("t1", "t2"):
                number = check_number(name, value, above=0)
            else:
                most = MAX_READOUT_ERROR if name == "readout" else math.inf
                number = check_number(name, value, least=0, most=most)
            object.__setattr__(self, name, number)
        if self.t2 > 2 * self.t1:
            raise ArgumentError(f"t2={self.t2:g} is not allowed: it must be at most 2 t1 = {2 * self.t1:g}.")

    def scaled(self, factor: float) -> SimulatorNoise:
        """Noise with 1/T1, 1/T2 and the readout error multiplied by `factor`."""
        factor = max(check_number("factor", factor, least=0), 1e-12)
        readout = min(self.readout * factor, MAX_READOUT_ERROR)
        return replace(self, t1=self.t1 / factor, t2=self.t2 / factor, readout=readout)

    def target(self, num_qubits: int) -> Target:
        qubits = range(num_qubits)
        properties = [QubitProperties(t1=self.t1, t2=self.t2) for _ in qubits]
        target = Target(num_qubits=num_qubits, qubit_properties=properties)
        single, double = (
            InstructionProperties(duration=time, error=channel_infidelity(self._channel(time, k)))
            for time, k in ((self.one_qubit_time, 1), (self.two_qubit_time, 2))
        )
        for gate, given in ((SXGate(), single), (XGate(), single), (RZGate(Parameter("a")), None)):
            target.add_instruction(gate, {(q,): given for q in qubits})
        if num_qubits > 1:
            target.add_instruction(CZGate(), {(a, b): double for a in qubits for b in qubits if a != b})
        measured = InstructionProperties(duration=self.readout_time, error=self.readout)
        target.add_instruction(Measure(), {(q,): measured for q in qubits})
        target.add_instruction(IfElseOp, name="if_else")
        return target

    def noise(self, num_qubits: int) -> Noise:
        single, double = self._channel(self.one_qubit_time, 1), self._channel(self.two_qubit_time, 2)
        qubits, e = range(num_qubits), self.readout
        gates: dict[tuple[str, tuple[int, ...]], object] = {}
        gates |= {(name, (q,)): single for name in ("sx", "x") for q in qubits if single is not None}
        gates |= {("cz", (a, b)): double for a in qubits for b in qubits if a != b and double is not None}
        return Noise(gates, {q: np.array([[1 - e, e], [e, 1 - e]]) for q in qubits} if e else {})

    def _channel(self, time: float, qubits: int) -> QuantumError | None:
        """The relaxation of each of one qubit or two; None where it takes no time."""
        if not time:
            return None
        one = thermal_relaxation_error(self.t1, self.t2, time)
        return one if qubits == 1 else one.tensor(one)


@dataclass(frozen=True)
class DeviceNoise(SimulatorNoise):
    """The calibrated noise of a device: Aer's model of it, on the qubits that suit a circuit best.

    Make one by `of_twin` or `of_properties`. Qubits that a circuit does not use are left out, which changes
    nothing.

    Attributes
    ----------
    device : str
        The device's name.
    calibration : str or None
        When it was calibrated, ISO time.
    digest : str
        Of a calibration's numbers; "" for a twin, which is known by its name.
    """

    device: str
    calibration: str | None
    digest: str
    whole: Target = field(repr=False, compare=False)
    qubits: tuple[int, ...] | None = None
    scale: float = 1.0

    @classmethod
    def of_twin(cls, name: str) -> DeviceNoise:
        """The noise of a device in `fake_devices()`, by its name."""
        device = fake_device(name)
        properties = device.properties()
        time = None if properties is None else properties.last_update_date.isoformat()
        return cls(name, time, "", device.target)

    @classmethod
    def of_properties(
        cls, properties: str | os.PathLike[str] | Mapping[str, Any] | BackendProperties
    ) -> DeviceNoise:
        """The noise of a device by its calibration of some date.

        Parameters
        ----------
        properties : path, mapping or BackendProperties
            What `backend.properties(datetime=...)` of IBM's client gives, its `to_dict()`, or a JSON file of
            that, as the server sends it and as IBM's fake devices keep it.

        Raises
        ------
        ArgumentError
            If it is no calibration.
        """
        where = "noise"
        try:
            if isinstance(properties, str | os.PathLike):
                where = f"noise={os.fspath(properties)!r}"
                properties = json.loads(Path(properties).read_bytes())
            if isinstance(properties, BackendProperties):
                properties = properties.to_dict()
            content = json.dumps(properties, sort_keys=True, default=str)
            given = json.loads(content)
            properties_from_server_data(given)  # reads its dates
            read = BackendProperties.from_dict(given)
            target = _target_of(read)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, BackendPropertyError) as error:
            raise ArgumentError(
                f"{where} cannot be read as a device's calibration: it must be what IBM's "
                f"`backend.properties(datetime=...).to_dict()` gives, as JSON ({error})."
            ) from error
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return cls(str(read.backend_name), read.last_update_date.isoformat(), digest, target)

    @property
    def num_qubits(self) -> int:
        return int(self.whole.num_qubits)

    def scaled(self, factor: float) -> DeviceNoise:
        """Noise with every error, 1/T1 and 1/T2 multiplied by `factor`."""
        return replace(self, scale=self.scale * check_number("factor", factor, least=0))

    def best_qubits(self, num_qubits: int, two_qubit_gates: int) -> list[int]:
        return best_region(self.whole, num_qubits, two_qubit_gates)

    def best_line(self, two_qubit_gates: Sequence[int]) -> list[int]:
        return best_line(self.whole, two_qubit_gates)

    def on(self, qubits: Sequence[int]) -> DeviceNoise:
        return replace(self, qubits=tuple(qubits))

    def target(self, num_qubits: int) -> Target:
        return _target_on(self)

    def noise(self, num_qubits: int) -> Noise:
        return _noise_on(self)


@lru_cache(maxsize=64)
def _target_on(noise: DeviceNoise) -> Target:
    qubits = range(noise.num_qubits) if noise.qubits is None else noise.qubits
    return reduced_target(noise.whole, qubits, noise.scale)


@lru_cache(maxsize=64)
def _noise_on(noise: DeviceNoise) -> Noise:
    return device_noise(_target_on(noise))


def _target_of(properties: BackendProperties) -> Target:
    """The gates of a calibrated device, and their errors, durations and qubits."""
    count = len(properties.qubits)
    working = [q for q in range(count) if properties.is_qubit_operational(q)]
    qubits = [
        QubitProperties(t1=_read(properties.t1, q), t2=_read(properties.t2, q), frequency=None)
        for q in range(count)
    ]
    target = Target(num_qubits=count, qubit_properties=qubits)
    gates: dict[str, dict[tuple[int, ...], InstructionProperties]] = {}
    for gate in properties.gates:
        name, at = gate.gate, tuple(gate.qubits)
        if name in FRACTIONAL_GATES or name in NEVER_RUN or name not in _standard_gates():
            continue
        if set(at) <= set(working) and properties.is_gate_operational(name, list(at)):
            gates.setdefault(name, {})[at] = InstructionProperties(
                duration=_read(properties.gate_length, name, list(at)),
                error=_read(properties.gate_error, name, list(at)),
            )
    for name, places in gates.items():
        target.add_instruction(_standard_gates()[name], places)
    measured = {
        (q,): InstructionProperties(
            duration=_read(properties.readout_length, q), error=properties.readout_error(q)
        )
        for q in working
    }
    if not measured or not gates:
        raise ValueError("it has no gates, or no measurements")
    target.add_instruction(Measure(), measured)
    target.add_instruction(IfElseOp, name="if_else")
    return target


def _read(ask: Any, *which: Any) -> float | None:
    """A property that a calibration may lack."""
    try:
        return float(ask(*which))
    except BackendPropertyError:
        return None


@dataclass(frozen=True, eq=False)
class _GateError:
    """An error as `NoiseModel.to_dict` has it. Channels are slow to make: only those in use are."""

    content: Mapping[str, Any]

    @cached_property
    def channel(self) -> QuantumError:
        return QuantumError.from_dict(self.content)

    @cached_property
    def num_qubits(self) -> int:
        return 1 + max(q for term in self.content["instructions"] for i in term for q in i["qubits"])

    @cached_property
    def infidelity(self) -> float:
        """The mean over its terms of `channel_infidelity`; the errors of a device share these terms."""
        terms = [repr(term) for term in self.content["instructions"]]
        for key, term in zip(terms, self.content["instructions"], strict=True):
            if (key, self.num_qubits) not in _TERM_INFIDELITIES:
                alone = {**self.content, "instructions": [term], "probabilities": [1.0]}
                identity = [{"name": "id", "qubits": [q]} for q in range(self.num_qubits)]
                alone["instructions"] = [[*identity, *term]]  # so that a term has all qubits
                error = channel_infidelity(QuantumError.from_dict(alone))
                _TERM_INFIDELITIES[key, self.num_qubits] = error
        errors = [_TERM_INFIDELITIES[key, self.num_qubits] for key in terms]
        return math.fsum(p * e for p, e in zip(self.content["probabilities"], errors, strict=True))


_TERM_INFIDELITIES: dict[tuple[str, int], float] = {}


@dataclass(frozen=True)
class _ModelErrors:
    """Errors of a `NoiseModel`: by gate and qubits, None for all qubits; readout by qubits, () for all."""

    gates: Mapping[tuple[str, tuple[int, ...] | None], _GateError]
    readout: Mapping[tuple[int, ...], np.ndarray]


@dataclass(frozen=True)
class AerModelNoise(SimulatorNoise):
    """An Aer `NoiseModel`: circuits are transpiled for its basis gates, and it acts after each of them.

    Where a gate has errors on some qubits only, the device is taken to have the gate on these alone, as a
    model of `NoiseModel.from_backend` means it; where it has the same error on all qubits, between all pairs.

    Parameters
    ----------
    model : NoiseModel
        Errors of standard gates and of the readout of single qubits.

    Raises
    ------
    ArgumentError
        If it has errors of other instructions, or of the readout of several qubits together.
    """

    model: NoiseModel = field(repr=False, compare=False)
    qubits: tuple[int, ...] | None = None
    scale: float = 1.0
    digest: str = ""
    errors: _ModelErrors | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", check_number("scale", self.scale, least=0))
        if self.errors is not None:  # a copy
            return
        content = self.model.to_dict()["errors"]
        text = repr([{k: x for k, x in error.items() if k != "id"} for error in content])  # ids are random
        object.__setattr__(self, "digest", hashlib.sha256(text.encode()).hexdigest()[:16])
        object.__setattr__(self, "errors", _read_errors(content))
        strange = {name for name, _ in self.of.gates} - set(_standard_gates()) - set(NEVER_RUN)
        if strange or any(len(at) > 1 for at in self.of.readout):
            raise ArgumentError(
                f"noise is a NoiseModel with errors of {', '.join(sorted(strange)) or 'joint readout'}: only "
                "errors of standard gates and of the readout of single qubits can act here."
            )

    @property
    def of(self) -> _ModelErrors:
        """The errors of the model."""
        assert self.errors is not None
        return self.errors

    @property
    def num_qubits(self) -> int | None:
        places = [at for _, at in self.of.gates if at is not None]
        return 1 + max((q for at in places for q in at), default=-1) or None

    def scaled(self, factor: float) -> AerModelNoise:
        """The channels applied `factor` times: a broken number of times as a mixture with the identity."""
        return replace(self, scale=self.scale * check_number("factor", factor, least=0))

    def best_qubits(self, num_qubits: int, two_qubit_gates: int) -> list[int]:
        if self.num_qubits is None:
            return list(range(num_qubits))
        return best_region(replace(self, qubits=None).target(self.num_qubits), num_qubits, two_qubit_gates)

    def best_line(self, two_qubit_gates: Sequence[int]) -> list[int]:
        if self.num_qubits is None:
            return list(range(len(two_qubit_gates) + 1))
        return best_line(replace(self, qubits=None).target(self.num_qubits), two_qubit_gates)

    def on(self, qubits: Sequence[int]) -> AerModelNoise:
        return replace(self, qubits=tuple(qubits))

    def target(self, num_qubits: int) -> Target:
        return _model_target(self, num_qubits)

    def noise(self, num_qubits: int) -> Noise:
        return _model_noise(self, num_qubits)


def _read_errors(content: Sequence[Mapping[str, Any]]) -> _ModelErrors:
    """The errors of what `NoiseModel.to_dict` gives."""
    gates: dict[tuple[str, tuple[int, ...] | None], _GateError] = {}
    readout: dict[tuple[int, ...], np.ndarray] = {}
    for error in content:
        places: list[tuple[int, ...] | None] = [tuple(qubits) for qubits in error.get("gate_qubits", [])]
        for at in places or [None]:
            if error["type"] == "roerror":
                readout[at or ()] = np.array(error["probabilities"], dtype=float)
            elif not set(error["operations"]) <= set(NEVER_RUN):
                gates |= dict.fromkeys(((x, at) for x in error["operations"]), _GateError(error))
    return _ModelErrors(gates, readout)


@cache
def _standard_gates() -> dict[str, Gate]:
    """The gates that qiskit knows by name."""
    return {name: gate for name, gate in get_standard_gate_name_mapping().items() if isinstance(gate, Gate)}


@lru_cache(maxsize=64)
def _model_noise(noise: AerModelNoise, num_qubits: int) -> Noise:
    region = range(num_qubits) if noise.qubits is None else noise.qubits
    index = {q: i for i, q in enumerate(region)}
    gates: dict[tuple[str, tuple[int, ...]], object] = {}
    for (name, at), error in sorted(noise.of.gates.items(), key=lambda x: x[0][1] is not None):
        if at is None:
            scaled = _power(error.channel, noise.scale)
            gates |= {(name, pair): scaled for pair in _places(len(index), error.num_qubits)}
        elif set(at) <= set(index):
            gates[name, tuple(index[q] for q in at)] = _power(error.channel, noise.scale)
    return Noise(gates, _readout(noise, list(region)))


@lru_cache(maxsize=64)
def _model_target(noise: AerModelNoise, num_qubits: int) -> Target:
    gates = noise.of.gates
    region = list(range(num_qubits) if noise.qubits is None else noise.qubits)
    index = {q: i for i, q in enumerate(region)}
    target = Target(num_qubits=len(index))
    names = {*noise.model.basis_gates, *(name for name, _ in gates)} - set(NEVER_RUN)
    for name in sorted(names & set(_standard_gates())):
        gate = _standard_gates()[name]
        local = [at for other, at in gates if other == name and at is not None]
        if local and (name, None) not in gates:
            places = [tuple(index[q] for q in at) for at in local if set(at) <= set(index)]
        else:
            places = _places(len(index), gate.num_qubits)
        properties = {}
        for place in places:
            error = gates.get((name, tuple(region[i] for i in place)), gates.get((name, None)))
            properties[place] = InstructionProperties(error=_scaled_infidelity(error, noise.scale))
        if properties:
            target.add_instruction(gate, properties)
    matrices = _readout(noise, region)
    misread = {(q,): float(matrix[0, 1] + matrix[1, 0]) / 2 for q, matrix in matrices.items()}
    target.add_instruction(Measure(), {at: InstructionProperties(error=e) for at, e in misread.items()})
    target.add_instruction(IfElseOp, name="if_else")
    return target


def _scaled_infidelity(error: _GateError | None, scale: float) -> float:
    if error is None:
        return 0.0
    return error.infidelity if scale == 1 else channel_infidelity(_power(error.channel, scale))


def _readout(noise: AerModelNoise, region: Sequence[int]) -> dict[int, np.ndarray]:
    """P(read column | true row) of each qubit of a region."""
    general = noise.of.readout.get((), np.eye(2))
    matrices = (noise.of.readout.get((q,), general) for q in region)
    return {i: _matrix_power(matrix, noise.scale) for i, matrix in enumerate(matrices)}


def _places(count: int, size: int) -> list[tuple[int, ...]]:
    """All qubits, or all pairs of different qubits in both orders."""
    if size == 1:
        return [(q,) for q in range(count)]
    return [(a, b) for a in range(count) for b in range(count) if a != b] if size == 2 else []


def _power(error: QuantumError, times: float) -> QuantumError:
    """A channel applied `times` times: the broken part is a mixture of the identity and the channel."""
    if times == 1:
        return error
    channel = SuperOp(error)
    return QuantumError(Kraus(Choi(SuperOp(_matrix_power(channel.data, times)))))


def _matrix_power(matrix: np.ndarray, times: float) -> np.ndarray:
    whole = math.floor(times)
    eye = np.eye(len(matrix))
    return np.linalg.matrix_power(matrix, whole) @ (eye + (times - whole) * (matrix - eye))


def make_noise(given: object) -> SimulatorNoise:
    """The noise that a caller means by an object: see `noise` of `QiskitQuantumBackend`.

    Raises
    ------
    ArgumentError
        If it describes no noise, or noise that cannot be simulated here; if a file cannot be read.
    """
    if isinstance(given, SimulatorNoise):
        return given
    if isinstance(given, NoiseModel):
        return AerModelNoise(given)
    if isinstance(given, str | os.PathLike | Mapping | BackendProperties):
        return DeviceNoise.of_properties(given)
    raise ArgumentError(
        f"noise={given!r} is not allowed: it must be a SimulatorNoise, as ParametricNoise or ThermalNoise, "
        "an Aer NoiseModel, or a device's calibration, as a path to its JSON."
    )
