"""`AerEngine`: simulators without noise, with a real device's noise, or with noise given by a few numbers."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from qiskit import QuantumCircuit, transpile
from qiskit.circuit import ControlFlowOp
from qiskit.transpiler import Target
from qiskit_aer import AerSimulator
from qiskit_aer.noise import NoiseModel, ReadoutError

from ..checks import check_number
from ..circuits.base import pack_values
from ..circuits.resources import resources
from ..errors import ArgumentError, BackendUnavailable, FallbackWarning, unknown_name
from .base import Engine
from .counts import draw_outcomes
from .exact import Noise, Step, compile_steps, density_matrices, outcome_probabilities
from .noise import (
    SimulatorNoise,
    best_region,
    device_noise,
    fake_device,
    fake_devices,
    instruction_errors,
    reduced_target,
)
from .requests import Request

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
    noise : SimulatorNoise, optional
        Noise of the simulator, as `ParametricNoise`. Not together with a twin.
    noise_scale : float
        Factor >= 0 on all error probabilities, and on 1/T1 and 1/T2; 0 is no noise.
    method : {"auto", "aer"}
        "auto" as described above; "aer" simulates every shot with `AerSimulator`, however long it takes.

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
        noise: SimulatorNoise | None = None,
        noise_scale: float = 1.0,
        method: str = "auto",
    ):
        name = backend_name or "aer"
        if name not in (*IDEAL, *fake_devices()):
            raise unknown_name("backend_name", name, ["aer", *fake_devices()])
        self.name = "aer" if name in IDEAL else name
        if noise is not None and not isinstance(noise, SimulatorNoise):
            raise ArgumentError(
                f"noise={noise!r} is not allowed: it must be a SimulatorNoise, as ParametricNoise, or None."
            )
        if noise is not None and self.name != "aer":
            raise ArgumentError(
                f"noise is not allowed with backend_name={name!r}, which has noise of its own."
            )
        noise_scale = check_number("noise_scale", noise_scale, least=0, most=MAX_NOISE_SCALE)
        if method not in ("auto", "aer"):
            raise unknown_name("method", method, ("auto", "aer"))
        self.noise, self.noise_scale, self.method = noise, noise_scale, method
        self._compiled: dict[int, tuple[QuantumCircuit, tuple[Step, ...] | None]] = {}
        self.ideal = (self.name == "aer" and noise is None) or noise_scale == 0

    def identity(self) -> str:
        if self.name == "aer":
            return f"aer {self.noise!r}"
        return f"{self.name} {_calibration(self.name)}"

    def facts(self) -> dict[str, Any]:
        noise: str = "none"
        if self.name != "aer":
            noise = f"Aer's model of {self.name}, on the qubits in use"
        elif self.noise is not None:
            noise = repr(self.noise)
        return {
            "device": self.name,
            "calibration": _calibration(self.name),
            "noise": noise if self.noise_scale else "none",
            "noise_scale": self.noise_scale,
            "num_qubits": None if self.name == "aer" else fake_device(self.name).num_qubits,
        }

    def problems(self) -> tuple[str, ...]:
        return ()

    def pending_jobs(self) -> int:
        return 0

    def errors(self, circuit: QuantumCircuit) -> list[float]:
        if self.ideal:
            return []
        if self.name != "aer":
            return instruction_errors(
                circuit, _region_target(self.name, tuple(circuit.metadata["region"]), self.noise_scale)
            )
        assert self.noise is not None
        return instruction_errors(circuit, self.noise.scaled(self.noise_scale).target(circuit.num_qubits))

    def transpile(self, circuit: QuantumCircuit, level: int) -> QuantumCircuit:
        if self.name == "aer" and self.noise is None:
            return circuit
        if self.name == "aer":
            assert self.noise is not None
            target, region = self.noise.target(circuit.num_qubits), list(range(circuit.num_qubits))
        else:
            device = fake_device(self.name).target
            region = best_region(device, circuit.num_qubits, resources(circuit).two_qubit_gates)
            target = _region_target(self.name, tuple(region), 1.0)
        conditional = any(isinstance(i.operation, ControlFlowOp) for i in circuit.data)
        if conditional and "if_else" not in target.operation_names:
            raise BackendUnavailable(f"{self.name} has no conditions (if_else), which this circuit needs.")
        isa = transpile(circuit, target=target, optimization_level=level, seed_transpiler=0)
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

    def how(self, circuit: QuantumCircuit) -> dict[str, Any]:
        if self._steps(circuit) is not None:
            method = "exact probabilities from density matrices, shots drawn from them"
        elif self._is_static(circuit):
            method = "exact probabilities from Aer's state vector, shots drawn from them"
        else:
            method = "Aer, shot by shot"
        facts: dict[str, Any] = {"method": method}
        if self.name != "aer":
            facts["physical_qubits"] = tuple(circuit.metadata["region"])
        if any(isinstance(i.operation, ControlFlowOp) for i in circuit.data):
            facts["not_modelled"] = (FEED_FORWARD,)
        return facts

    def calibrated(self, circuit: QuantumCircuit) -> tuple[QuantumCircuit, Noise]:
        if self.ideal:
            return circuit, Noise({}, {})
        if self.name == "aer":
            assert self.noise is not None
            return circuit, self.noise.scaled(self.noise_scale).noise(circuit.num_qubits)
        return circuit, _region_noise(self.name, tuple(circuit.metadata["region"]), self.noise_scale)

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
        simulator = AerSimulator(
            method="matrix_product_state" if products else "automatic",
            noise_model=None if self.ideal else _aer_model(self.calibrated(circuit)[1]),
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


@lru_cache(maxsize=64)
def _calibration(name: str) -> str | None:
    """When a twin's device was calibrated, ISO time; None for a simulator."""
    properties = None if name in IDEAL else fake_device(name).properties()
    return None if properties is None else properties.last_update_date.isoformat()


@lru_cache(maxsize=64)
def _region_target(name: str, region: tuple[int, ...], scale: float) -> Target:
    """The part of a twin's device on some of its qubits."""
    return reduced_target(fake_device(name).target, region, scale)


@lru_cache(maxsize=64)
def _region_noise(name: str, region: tuple[int, ...], scale: float) -> Noise:
    """The noise of that part of the device."""
    return device_noise(_region_target(name, region, scale))


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
