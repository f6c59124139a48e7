"""`HybridPolicy`: which rows a circuit draws and which a classical computer, decided before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..circuits.base import num_bits
from ..errors import BackendUnavailable
from .qiskit import QiskitQuantumBackend


@dataclass(frozen=True)
class HybridPolicy:
    """Limits within which rows go to a backend. Other rows are drawn by pseudo-random numbers, and reported.

    Parameters
    ----------
    max_qubits : int
        Rows whose last key with mass needs more qubits of a binary loader are drawn classically, one by one.
    min_fidelity : float
        Rows are drawn classically where the circuit's predicted fidelity is lower: the product of 1 - error
        over its gates and measurements, by the device's calibration.
    max_pending : int, optional
        All rows are, while more jobs than that wait for the device.

    Examples
    --------
    >>> HybridPolicy(max_qubits=6).max_qubits
    6
    """

    max_qubits: int = 10
    min_fidelity: float = 0.0
    max_pending: int | None = None

    def __post_init__(self) -> None:
        fidelity = check_number("min_fidelity", self.min_fidelity, least=0, most=1)
        object.__setattr__(self, "max_qubits", check_count("max_qubits", self.max_qubits))
        object.__setattr__(self, "min_fidelity", fidelity)
        if self.max_pending is not None:
            object.__setattr__(self, "max_pending", check_count("max_pending", self.max_pending, 0))

    def decide(self, backend: QiskitQuantumBackend, p: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Which rows go to the backend, and why the others do not.

        Parameters
        ----------
        backend : QiskitQuantumBackend
            Is asked for its state and calibration. Nothing is submitted.
        p : Tensor, (R, n)
            Probabilities of the rows.

        Returns
        -------
        quantum : Tensor, bool, (R,)
            Which rows go to the backend.
        reasons : tuple of str
            A sentence for each reason that keeps rows from the backend.
        """
        none = torch.zeros(len(p), dtype=torch.bool)
        try:
            problems = backend.problems()
            if problems:
                return none, problems
            if self.max_pending is not None:
                pending = backend.engine.pending_jobs()
                if pending > self.max_pending:
                    return none, (
                        f"{pending} jobs wait for {backend.engine.name}, more than {self.max_pending}.",
                    )
            backend.engine.refresh()
            return self._by_size(backend, p)
        except BackendUnavailable as error:
            return none, (str(error),)

    def _by_size(self, backend: QiskitQuantumBackend, p: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Decide as `decide` does, but by qubits and predicted fidelity alone."""
        last = ((p > 0) * torch.arange(1, p.shape[-1] + 1)).amax(-1)  # [R], keys up to the last with mass
        qubits = torch.tensor([num_bits(max(1, n)) for n in last.tolist()])
        quantum = qubits <= self.max_qubits
        reasons = []
        if not bool(quantum.all()):
            reasons.append(
                f"{int((~quantum).sum())} of {len(p)} rows need more than max_qubits={self.max_qubits} "
                "qubits."
            )
        fitting, low = quantum, []  # low: predicted fidelities below the limit, of the widest rows first
        while self.min_fidelity > 0 and bool(quantum.any()):
            widest = int(last[quantum].max())
            fidelity = predicted_fidelity(backend, widest)
            if fidelity >= self.min_fidelity:
                break
            low.append(f"{fidelity:.3f}")
            quantum = quantum & (qubits < num_bits(widest))
        if low:
            span = " to ".join(dict.fromkeys((low[0], low[-1])))
            reasons.append(
                f"{int((fitting & ~quantum).sum())} of {len(p)} rows would be loaded with a predicted "
                f"fidelity of {span}, below min_fidelity={self.min_fidelity:g}."
            )
        return quantum, tuple(reasons)


def predicted_fidelity(backend: QiskitQuantumBackend, n: int) -> float:
    """Product of 1 - error over the gates and measurements of the circuit for n keys; 1 without noise."""
    return float(np.prod([1 - e for e in backend.engine.errors(backend.transpiled(n))]))
