"""`AerEngine`: simulators without noise, with a real device's noise, or with noise given by a few numbers."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from qiskit import QuantumCircuit, transpile
from qiskit.circuit import ControlFlowOp
from qiskit.exceptions import QiskitError
from qiskit_aer import AerSimulator
from qiskit_aer.noise import NoiseModel, ReadoutError

from ..checks import check_flags, check_number
from ..circuits.base import pack_values
from ..circuits.resources import resources
from ..errors import ArgumentError, BackendUnavailable, FallbackWarning, unknown_name
from .base import Engine
from .counts import draw_outcomes
from .exact import Noise, Step, compile_steps, density_matrices, outcome_probabilities
from .noise import SimulatorNoise, channel_infidelity, fake_devices, instruction_errors
from .noise_sources import DeviceNoise, NoiseSource, make_noise
from .requests import Request
from .waiting import TYPICAL_FEED_FORWARD_LATENCY_S, WaitingCircuit, with_waits

IDEAL = ("aer", "aer_simulator")
"""Names of the simulator that is no device's twin."""

MAX_STATEVECTOR_QUBITS = 16
"""Up to here the probabilities of all outcomes of an ideal circuit are computed from its state vector."""

MAX_NOISY_QUBITS = 24
"""Up to here noisy circuits are simulated shot by shot; larger ones do not fit into memory."""

AMPLITUDES_PER_S = 1e6
"""Measured speed of shot-by-shot simulation, in amplitudes a second."""

LONG_SIMULATION_S = 30.0
"""A simulation shot by shot that is expected to take longer, in seconds, is announced by a warning."""

MAX_NOISE_SCALE = 1e6
"""Largest factor on error probabilities: every error is at its upper bound before."""

FEED_FORWARD = (
    "the time that feeding forward takes, and the decoherence of qubits that wait for it, is not modelled"
)


class AerEngine(Engine):
    """Runs circuits on this machine.

    Where it fits (eight entangled qubits at a time), the probabilities of all outcomes are computed for all
    rows at once from the errors of Aer's noise model, and shots are drawn from them (`exact.py`). This gives
    the same distribution as Aer without simulating every shot. Larger circuits are run by `AerSimulator`.

    Parameters
    ----------
    backend_name : str, optional
        None or "aer" for a simulator. Or a name in `fake_devices()` for the twin of that device: circuits run
        with its calibrated errors, on the connected qubits that suit them best. Qubits that a circuit does
        not use are left out, which changes nothing.
    noise : SimulatorNoise, NoiseModel, path or BackendProperties, optional
        Noise of the simulator, not together with a twin: `ParametricNoise`, `ThermalNoise` (T1, T2 and gate
        times) or one of your own; a `NoiseModel` of Aer; a device's calibration of some date, as IBM's client
        gives it or as a JSON file (see `DeviceNoise.of_properties`).
    noise_scale : float
        Factor >= 0 on all error probabilities, and on 1/T1 and 1/T2; 0 is no noise.
    method : {"auto", "aer"}
        "auto" as described above; "aer" simulates every shot with `AerSimulator`, however long it takes.
    feed_forward_latency : float or "typical", optional
        How long it takes from a measurement to a gate that depends on its bit, seconds. Qubits that wait for
        it, and for measurements, then decohere by T1 and T2. "typical" is `TYPICAL_FEED_FORWARD_LATENCY_S`.
        Where None, waiting costs nothing, and the diagnostics say so. Needs noise that tells T1, T2 and how
        long measurements last: a twin, a calibration or `ThermalNoise`.
    idling : bool
        Whether qubits that wait for the gates of others decohere by T1 and T2, also in circuits that feed
        nothing forward. Gates' own errors have the decoherence of their duration already. Needs the same.

    Raises
    ------
    ArgumentError
        If a name is unknown, noise and a twin are given together, or the scale is negative.

    Examples
    --------
    >>> AerEngine("fake_fez").facts()["num_qubits"]
    156
    """

    def __init__(
        self,
        backend_name: str | None = None,
        *,
        noise: NoiseSource | None = None,
        noise_scale: float = 1.0,
        method: str = "auto",
        feed_forward_latency: float | Literal["typical"] | None = None,
        idling: bool = False,
    ):
        name = backend_name or "aer"
        if name not in (*IDEAL, *fake_devices()):
            raise unknown_name("backend_name", name, ["aer", *fake_devices()])
        self.name = "aer" if name in IDEAL else name
        if noise is not None and self.name != "aer":
            raise ArgumentError(
                f"noise is not allowed with backend_name={name!r}, which has noise of its own."
            )
        noise_scale = check_number("noise_scale", noise_scale, least=0, most=MAX_NOISE_SCALE)
        if method not in ("auto", "aer"):
            raise unknown_name("method", method, ("auto", "aer"))
        self.noise = None if noise is None else make_noise(noise)
        self.noise_scale, self.method = noise_scale, method
        self.feed_forward_latency = _latency(feed_forward_latency)
        check_flags(idling=idling)
        self.idling = idling
        # A twin's device is made when it is first needed, which takes a while.
        self._twin: DeviceNoise | None = None
        self._compiled: dict[int, tuple[QuantumCircuit, tuple[Step, ...] | None]] = {}
        self.ideal = (self.name == "aer" and noise is None) or noise_scale == 0
        waits = self.feed_forward_latency is not None or self.idling
        if waits and self.name == "aer" and self.noise is None:
            option = "idling" if self.idling else "feed_forward_latency"
            raise ArgumentError(
                f"{option} needs noise that has T1, T2 and how long measurements last: name a "
                "twin, or give noise= a calibration or ThermalNoise."
            )

    def scaled(self, level: float) -> AerEngine:
        """The same simulator with noise `level` times as strong."""
        name = None if self.name == "aer" else self.name
        return AerEngine(
            name,
            noise=self.noise,
            noise_scale=self.noise_scale * level,
            method=self.method,
            feed_forward_latency=self.feed_forward_latency,
            idling=self.idling,
        )

    def identity(self) -> str:
        if self.name == "aer":
            return f"aer {self.noise!r}"
        return f"{self.name} {self._calibration()}"

    def _model(self) -> SimulatorNoise | None:
        """The noise, of a twin too, at its own strength; None for a simulator without noise."""
        if self.name == "aer":
            return self.noise
        if self._twin is None:
            self._twin = twin_noise(self.name)
        return self._twin

    def _calibration(self) -> str | None:
        """When the device was calibrated, ISO time; None where the noise is no device's."""
        model = self._model()
        return model.calibration if isinstance(model, DeviceNoise) else None

    def _noise_of(self, circuit: QuantumCircuit) -> SimulatorNoise:
        """The noise of the qubits that a transpiled circuit runs on."""
        model = self._model()
        assert model is not None
        region = (circuit.metadata or {}).get("region") or range(circuit.num_qubits)
        return model.on(region).scaled(self.noise_scale)

    def facts(self) -> dict[str, Any]:
        noise: str = "none"
        if self.name != "aer":
            noise = f"Aer's model of {self.name}, on the qubits in use"
        elif self.noise is not None:
            noise = repr(self.noise)
        return {
            "device": self.name,
            "calibration": self._calibration(),
            "noise": noise if self.noise_scale else "none",
            "noise_scale": self.noise_scale,
            "num_qubits": model.num_qubits if (model := self._model()) else None,
        }

    def problems(self) -> tuple[str, ...]:
        return ()

    def pending_jobs(self) -> int:
        return 0

    def errors(self, circuit: QuantumCircuit) -> list[float]:
        if self.ideal:
            return []
        errors = instruction_errors(circuit, self._noise_of(circuit).target(circuit.num_qubits))
        waiting = self._waiting(circuit)
        if waiting is None:
            return errors
        for instruction in waiting.circuit.data:
            wires = tuple(waiting.circuit.find_bit(q).index for q in instruction.qubits)
            channel = waiting.errors.get((str(instruction.operation.label), wires))
            errors += [] if channel is None else [channel_infidelity(channel)]
        return errors

    def transpile(self, circuit: QuantumCircuit, level: int) -> QuantumCircuit:
        model = self._model()
        if model is None:
            return circuit
        line = _gates_along_line(circuit)
        if line is not None:
            region = model.best_line(line)
        else:
            region = model.best_qubits(circuit.num_qubits, resources(circuit).two_qubit_gates)
        target = model.on(region).target(circuit.num_qubits)
        conditional = any(isinstance(i.operation, ControlFlowOp) for i in circuit.data)
        if conditional and "if_else" not in target.operation_names:
            raise BackendUnavailable(f"{self.name} has no conditions (if_else), which this circuit needs.")
        try:
            isa = transpile(circuit, target=target, optimization_level=level, seed_transpiler=0)
        except QiskitError as error:
            raise BackendUnavailable(
                f"{circuit.name} cannot be transpiled for {self.name}: {error.message}"
            ) from error
        isa.metadata = {**(isa.metadata or {}), "region": region}
        return isa

    def run(
        self,
        circuit: QuantumCircuit,
        bindings: np.ndarray,
        shots: int,
        seed: int,
        request: Request | None = None,
    ) -> np.ndarray:
        steps = self._steps(circuit)
        if steps is not None:
            p, values = outcome_probabilities(steps, bindings)
        elif self._is_static(circuit):
            p = self._statevector(circuit, bindings)
            values = np.arange(1 << circuit.num_clbits)
        else:
            return self._shots(circuit, bindings, shots, seed)
        drawn = draw_outcomes(p, shots, torch.Generator().manual_seed(seed))
        return pack_values(values[drawn.numpy()], circuit.num_clbits)

    def density_matrices(self, circuit: QuantumCircuit, bindings: np.ndarray) -> torch.Tensor:
        """The states of a transpiled circuit just before they are measured.

        Parameters
        ----------
        circuit : QuantumCircuit
            As `transpile` returns it.
        bindings : ndarray, float64, (R, P)
            Values of `circuit.parameters`.

        Returns
        -------
        Tensor, complex128, (R, 2^m, 2^m)
            A density matrix for each row.

        Raises
        ------
        BackendUnavailable
            If the circuit measures before its end, or has more than eight qubits.
        """
        steps = compile_steps(*self.calibrated(circuit))
        if steps is None or any(step.condition for step in steps):
            raise BackendUnavailable(f"{circuit.name} has no single final state, or one that is too large.")
        return density_matrices(steps, bindings)

    def simulator(self, circuit: QuantumCircuit) -> AerSimulator:
        """Aer's simulator with the gates and the noise of the qubits that a transpiled circuit runs on.

        Raises
        ------
        ArgumentError
            If this engine has no noise.
        """
        if self.ideal:
            raise ArgumentError(f"{self.name} has no noise: name a twin, or give noise=.")
        target = self._noise_of(circuit).target(circuit.num_qubits)
        return AerSimulator(target=target, noise_model=_aer_model(self.calibrated(circuit)[1]))

    def how(self, circuit: QuantumCircuit) -> dict[str, Any]:
        if self._steps(circuit) is not None:
            method = "exact probabilities from density matrices, shots drawn from them"
        elif self._is_static(circuit):
            method = "exact probabilities from Aer's state vector, shots drawn from them"
        else:
            method = "Aer, shot by shot"
        facts: dict[str, Any] = {"method": method}
        model = self._model()
        if model is not None and model.num_qubits is not None:
            facts["physical_qubits"] = tuple(circuit.metadata["region"])
        if any(isinstance(i.operation, ControlFlowOp) for i in circuit.data):
            if self.feed_forward_latency is None:
                facts["not_modelled"] = (FEED_FORWARD,)
            else:
                facts["feed_forward_latency_s"] = self.feed_forward_latency
        return facts

    def calibrated(self, circuit: QuantumCircuit) -> tuple[QuantumCircuit, Noise]:
        if self.ideal:
            return circuit, Noise({}, {})
        noise = self._noise_of(circuit).noise(circuit.num_qubits)
        waiting = self._waiting(circuit)
        if waiting is None:
            return circuit, noise
        return waiting.circuit, Noise({**noise.gates, **waiting.errors}, noise.readout)

    def _waiting(self, circuit: QuantumCircuit) -> WaitingCircuit | None:
        """The circuit with its waits, where it feeds forward and they are modelled."""
        latency = self.feed_forward_latency
        if self.ideal or (latency is None and not self.idling):
            return None
        if not self.idling and not any(isinstance(i.operation, ControlFlowOp) for i in circuit.data):
            return None
        target = self._noise_of(circuit).target(circuit.num_qubits)
        return with_waits(circuit, target, latency or 0.0)

    def probabilities(self, circuit: QuantumCircuit, bindings: np.ndarray) -> torch.Tensor:
        """Probabilities of the values of the register `c`, from which `run` draws shots.

        Parameters
        ----------
        circuit : QuantumCircuit
            As `transpile` returns it.
        bindings : ndarray, float64, (R, P)
            Values of `circuit.parameters`.

        Returns
        -------
        Tensor, float64, (R, 2^bits)

        Raises
        ------
        BackendUnavailable
            If the circuit is too large for exact probabilities, and `run` simulates its shots.
        """
        steps = self._steps(circuit)
        if steps is not None:
            p, values = outcome_probabilities(steps, bindings)
            full = torch.zeros(len(p), 1 << circuit.num_clbits, dtype=p.dtype)
            full[:, values] = p
            return full
        if self._is_static(circuit):
            return self._statevector(circuit, bindings)
        raise BackendUnavailable(
            f"{circuit.name} is simulated shot by shot: it has no exact probabilities here."
        )

    def _steps(self, circuit: QuantumCircuit) -> tuple[Step, ...] | None:
        """The circuit for `exact.py`, compiled once; None where `AerSimulator` runs it."""
        known, steps = self._compiled.get(id(circuit), (None, None))
        if known is not circuit:  # in a copy of the engine, or after pickling, the id is another circuit's
            direct = self.method != "aer" and not self._is_static(circuit)
            steps = compile_steps(*self.calibrated(circuit)) if direct else None
            self._compiled[id(circuit)] = circuit, steps  # keeping it, its id stays taken
        return steps

    def _is_static(self, circuit: QuantumCircuit) -> bool:
        """Whether a circuit is ideal, small, and measured at its end only."""
        return (
            self.ideal
            and self.method != "aer"
            and circuit.num_qubits <= MAX_STATEVECTOR_QUBITS
            and not any(isinstance(i.operation, ControlFlowOp) for i in circuit.data)
            and circuit.count_ops().get("measure", 0) == circuit.num_clbits
        )

    def _statevector(self, circuit: QuantumCircuit, bindings: np.ndarray) -> torch.Tensor:
        """Probabilities of all outcomes of a static circuit, float64 (R, 2^bits)."""
        measured = [i for i in circuit.data if i.operation.name == "measure"]
        measured.sort(key=lambda i: circuit.find_bit(i.clbits[0]).index)
        bare = circuit.copy_empty_like()
        for instruction in circuit.data:
            if instruction.operation.name != "measure":
                bare.append(instruction)
        bare.save_probabilities([circuit.find_bit(i.qubits[0]).index for i in measured])
        simulator = AerSimulator(method="statevector")
        result = _run(simulator, bare, bindings, shots=1)
        p = np.stack([result.data(i)["probabilities"] for i in range(len(bindings))])
        return torch.from_numpy(p)

    def _shots(self, circuit: QuantumCircuit, bindings: np.ndarray, shots: int, seed: int) -> np.ndarray:
        """Outcomes of `AerSimulator`, as `run` returns them."""
        width = circuit.num_qubits
        if not self.ideal and width > MAX_NOISY_QUBITS:
            raise BackendUnavailable(
                f"{width} noisy qubits do not fit into this machine; at most {MAX_NOISY_QUBITS} are "
                "simulated."
            )
        # Ideal circuits that are too wide for a state vector run as matrix products: their time depends on
        # the entanglement.
        products = self.ideal and width > MAX_NOISY_QUBITS
        seconds = len(bindings) * shots * 2.0**width / AMPLITUDES_PER_S
        if seconds > LONG_SIMULATION_S and not products:
            warnings.warn(
                f"{circuit.name} on {width} qubits is simulated shot by shot, which may take "
                f"{seconds / 60:.0f} minutes: fewer rows, shots or keys, another loader or noise_scale=0 "
                "take less.",
                FallbackWarning,
                stacklevel=2,
            )
        circuit, noise = self.calibrated(circuit)
        simulator = AerSimulator(
            method="matrix_product_state" if products else "automatic",
            noise_model=None if self.ideal else _aer_model(noise),
            max_parallel_shots=1,  # so that the same seed gives the same outcomes on any number of threads
        )
        result = _run(simulator, circuit, bindings, shots=shots, seed_simulator=seed % 2**31)
        num_bytes = -(-circuit.num_clbits // 8)
        out = np.empty((len(bindings), shots, num_bytes), dtype=np.uint8)
        for row in range(len(bindings)):
            counts = result.data(row)["counts"]
            patterns = [int(key, 16).to_bytes(num_bytes, "big") for key in counts]
            table = np.frombuffer(b"".join(patterns), dtype=np.uint8).reshape(-1, num_bytes)
            in_order = np.repeat(table, list(counts.values()), axis=0)
            out[row] = np.random.default_rng([seed, row]).permutation(in_order)
        return out


@cache
def twin_noise(name: str) -> DeviceNoise:
    """The noise of a twin, made once."""
    return DeviceNoise.of_twin(name)


def _gates_along_line(circuit: QuantumCircuit) -> list[int] | None:
    """Number of gates between each two neighbours, where all gates of two qubits are between neighbours."""
    gates = [0] * (circuit.num_qubits - 1)
    for instruction in circuit.data:
        if isinstance(instruction.operation, ControlFlowOp):
            return None
        if len(instruction.qubits) > 1 and instruction.operation.name != "barrier":
            at = sorted(circuit.find_bit(q).index for q in instruction.qubits)
            low = at[0]
            if at != [low, low + 1]:
                return None
            gates[low] += 1
    return gates if gates and all(gates) else None


def _latency(given: float | str | None) -> float | None:
    """The latency in seconds that a caller means."""
    if given is None:
        return None
    if isinstance(given, str):
        if given != "typical":
            raise unknown_name("feed_forward_latency", given, ("typical", "a number of seconds"))
        return TYPICAL_FEED_FORWARD_LATENCY_S
    return check_number("feed_forward_latency", given, least=0)


def _aer_model(noise: Noise) -> NoiseModel:
    """The same noise for AerSimulator."""
    model = NoiseModel(
        basis_gates=sorted({name for name, _ in noise.gates} | {"rz", "sx", "x", "cz", "if_else"})
    )
    for (name, qubits), error in noise.gates.items():
        model.add_quantum_error(error, name, list(qubits))
    for qubit, matrix in noise.readout.items():
        model.add_readout_error(ReadoutError(matrix), [qubit])
    return model


def _run(simulator: AerSimulator, circuit: QuantumCircuit, bindings: np.ndarray, **options: int) -> Any:
    """Aer's result, with an experiment for each row of bindings."""
    binds = [{parameter: bindings[:, i].tolist() for i, parameter in enumerate(circuit.parameters)}]
    if circuit.num_parameters:
        result = simulator.run(circuit, parameter_binds=binds, **options).result()
    else:
        result = simulator.run([circuit] * len(bindings), **options).result()
    if not result.success:
        raise BackendUnavailable(f"Aer could not run the circuit: {result.status}")
    return result
