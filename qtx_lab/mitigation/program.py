"""`LoaderProgram`: a loader as a boxed circuit of IBM's stack, whose layers' noise is learned and cancelled.

Boxes, random Paulis and their signs are made by samplomatic, and noise is learned by qiskit-noise-learning.
IBM's executor runs the programs, on a device or, for simulators, on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from qiskit import QuantumCircuit
from qiskit.circuit import CircuitInstruction
from qiskit.quantum_info import PauliLindbladMap
from qiskit_ibm_runtime import QuantumProgram
from samplomatic import InjectNoise, build
from samplomatic.transpiler import generate_boxing_pass_manager
from samplomatic.utils import find_unique_box_instructions, get_annotation
from torch import Tensor

from ..backends import QiskitQuantumBackend
from ..checks import check_count
from ..circuits import check_rows
from ..circuits.resources import resources
from ..errors import ArgumentError, DtypeError, ShapeError
from .register import LoaderRegister
from .results import MitigatedRows, check_backend
from .scaling import is_static
from .signed_shots import combine_signed


@dataclass(frozen=True, eq=False)
class LoaderProgram:
    """A loader's circuit for rows of n keys, in boxes whose gates and measurements are twirled.

    The noise of each layer of two-qubit gates is a sparse Pauli-Lindblad model: exp of a sum of Pauli errors
    on neighbouring qubits. Error cancellation draws the errors of the inverse model, some of which have
    negative probabilities, anew for each randomization.

    Source: van den Berg, Minev, Kandala and Temme, Probabilistic error cancellation with sparse
    Pauli-Lindblad models on noisy quantum processors (2023).

    Parameters
    ----------
    backend : QiskitQuantumBackend
        Whose loader and transpiler made the circuit.
    boxed : QuantumCircuit
        The circuit in boxes.
    n : int
        Number of keys.

    Examples
    --------
    >>> program = LoaderProgram.of(QiskitQuantumBackend("aer", "fake_fez", loader="tree"), 8)
    >>> len(program.layers), program.boxed.count_ops()["box"]
    (2, 8)
    """

    backend: QiskitQuantumBackend
    boxed: QuantumCircuit
    n: int

    @classmethod
    def of(cls, backend: QiskitQuantumBackend, n: int) -> LoaderProgram:
        """Put the gates and the measurement of a backend's circuit in boxes.

        Raises
        ------
        DtypeError
            If backend is not a QiskitQuantumBackend.
        ArgumentError
            If the circuit measures before its end, or has no two-qubit gates.
        """
        check_backend(backend)
        n = check_count("n", n)
        circuit = backend.transpiled(n)
        if not is_static(circuit):
            raise ArgumentError(f"{circuit.name} measures before its end: use another loader, as 'tree'.")
        if not resources(circuit).two_qubit_gates:
            raise ArgumentError(
                f"n={n} is not allowed: {circuit.name} has no two-qubit gates, whose noise is cancelled."
            )
        boxing = generate_boxing_pass_manager(
            inject_noise_targets="gates", inject_noise_strategy="uniform_modification"
        )
        return cls(backend, boxing.run(circuit), n)

    @property
    def layers(self) -> dict[str, CircuitInstruction]:
        """The boxes with two-qubit gates that differ, without their one-qubit gates, by their names."""
        boxes = find_unique_box_instructions(self.boxed.data)
        named = ((get_annotation(box.operation, InjectNoise), box) for box in boxes)
        return {annotation.ref: box for annotation, box in named if annotation is not None}

    def learning_program(
        self,
        device: Any,
        *,
        randomizations: int = 32,
        shots: int = 128,
        depths: tuple[int, ...] = (0, 2, 8, 24),
    ) -> QuantumProgram:
        """Make the program from whose result `learned_noise` learns the noise of the layers.

        Parameters
        ----------
        device : BackendV2
            What it will run on: a device, or `AerEngine.simulator`.
        randomizations, shots : int
            Random Paulis of each circuit, and shots of each of them.
        depths : tuple of int
            How often a layer is repeated; two or more different numbers.

        Raises
        ------
        ArgumentError, NumberError
            If a number is not allowed.
        """
        randomizations = check_count("randomizations", randomizations)
        shots = check_count("shots", shots)
        if not isinstance(depths, Sequence):
            raise DtypeError(f"depths={depths!r} is not allowed: it must be a tuple of whole numbers.")
        depths = tuple(check_count("depths", depth, 0) for depth in depths)
        if len(set(depths)) < 2:
            raise ArgumentError(
                f"depths={depths} is not allowed: a decay is learned from two or more different numbers."
            )
        from qiskit_noise_learning.protocols import prepare_vanilla_program

        return QuantumProgram.from_(
            prepare_vanilla_program(device, list(self.layers.values()), randomizations, shots, depths)
        )

    def learned_noise(self, result: Any) -> dict[str, PauliLindbladMap]:
        """Fit a Pauli-Lindblad model to each layer, from the result of `learning_program`."""
        from qiskit_noise_learning.protocols import process_vanilla_result

        maps, names, _ = process_vanilla_result(result)
        return dict(zip(names, maps, strict=True))

    def overhead(self, noise: Mapping[str, PauliLindbladMap]) -> float:
        """Compute gamma² of the circuit: how many times the shots it takes to cancel this noise.

        Raises
        ------
        ArgumentError
            If the noise of a layer is missing.
        """
        self._check_noise(noise)
        annotations = (get_annotation(box.operation, InjectNoise) for box in self.boxed.data)
        return float(np.prod([noise[x.ref].inverse().gamma() for x in annotations if x is not None])) ** 2

    def cancelling_program(
        self, p: Tensor, noise: Mapping[str, PauliLindbladMap], randomizations: int, *, shots: int = 1
    ) -> QuantumProgram:
        """Make the program that measures rows with the inverse of this noise.

        Parameters
        ----------
        p : Tensor, (R, n)
            Rows of probabilities, each with a key above 0.
        noise : mapping
            The model of each layer.
        randomizations : int
            Draws of all Paulis for each row. One shot of each is best.
        shots : int
            Shots of each draw.

        Raises
        ------
        ArgumentError, ShapeError
            If a number is not allowed, p has other than n keys or a row of zeros, or the noise of a layer is
            missing.
        """
        self._check_noise(noise)
        p = self._checked_rows(p)
        randomizations = check_count("randomizations", randomizations)
        template, samplex = build(self.boxed)
        program = QuantumProgram(shots=check_count("shots", shots))
        rows = self.backend.loader.angles(p)
        arguments: dict[str, Any] = {
            "parameter_values": rows,
            "pauli_lindblad_maps": {ref: noise[ref] for ref in self.layers},
            **{f"noise_scales.{ref}": -1.0 for ref in self.layers},
        }
        program.append_samplex_item(
            template, samplex=samplex, samplex_arguments=arguments, shape=(randomizations, len(rows))
        )
        return program

    def rows_of(
        self,
        result: Any,
        p: Tensor,
        noise: Mapping[str, PauliLindbladMap],
        errors: Tensor | None = None,
    ) -> MitigatedRows:
        """Estimate rows from the result of `cancelling_program`.

        Parameters
        ----------
        result : QuantumProgramResult
        p : Tensor, (R, n)
            The rows that were measured; only which keys are masked is used.
        noise : mapping
            The model that was cancelled.
        errors : Tensor, (bits, 2, 2), optional
            Readout errors to be undone. Twirled measurements misread 0 and 1 equally often, so that their
            mean is undone.

        Raises
        ------
        ArgumentError, ShapeError
            If p is not of the shape that was measured, or has a row of zeros.
        """
        p = self._checked_rows(p)
        item, register = result[0], LoaderRegister.of(self.backend, self.n)
        bits = item["c"] ^ item["measurement_flips.c"]  # [randomizations, R, shots, bits]
        if bits.shape[1] != len(p):
            raise ShapeError(f"p has {len(p)} rows, and {bits.shape[1]} were measured.")
        values = (bits * (1 << np.arange(register.bits))).sum(-1)
        negative = item["pauli_signs"].sum(-1) % 2  # [randomizations, R]
        cells = values + (negative[..., None] << register.bits)
        by_row = np.moveaxis(cells, 1, 0).reshape(len(p), -1)
        counts = torch.from_numpy(np.stack([np.bincount(x, minlength=2 << register.bits) for x in by_row]))
        if errors is not None:
            misread = (errors[:, 0, 1] + errors[:, 1, 0]) / 2
            errors = torch.stack((1 - misread, misread, misread, 1 - misread), -1).view(-1, 2, 2)
        return combine_signed(p, counts, self.overhead(noise) ** 0.5, register.keys, errors)

    def _checked_rows(self, p: Tensor) -> Tensor:
        """Rows of n keys, each with one above 0, float64."""
        p = check_rows(p)
        if p.shape[-1] != self.n:
            raise ShapeError(f"p has {p.shape[-1]} keys; the program's circuit is for {self.n}.")
        empty = (p.sum(-1) == 0).nonzero().flatten().tolist()
        if empty:
            raise ArgumentError(
                f"p has rows of zeros ({empty[0]} is one), in which there is nothing to measure."
            )
        return p

    def _check_noise(self, noise: Mapping[str, PauliLindbladMap]) -> None:
        """Refuse noise of other layers than there are."""
        if not isinstance(noise, Mapping):
            raise DtypeError(
                f"noise is a {type(noise).__name__}; it must be a mapping, which `learned_noise` returns."
            )
        missing = sorted(set(self.layers) - set(noise))
        if missing:
            raise ArgumentError(
                f"noise has nothing of the layers {', '.join(missing)}: give what `learned_noise` returns."
            )
