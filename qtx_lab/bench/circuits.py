"""`qtx-lab bench circuits`: rows measured on a device's twin as one circuit with bindings, and as a circuit a row.

Beside them stands a pseudo-random draw of the same number of shots, which is faster than any simulation and has no
noise: loading a row that is known into a circuit has no advantage over it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from qiskit import transpile
from qiskit_aer import AerSimulator
from torch import Tensor

from ..backends import QiskitQuantumBackend
from ..backends.counts import draw_counts
from ..backends.noise import fake_device
from ..circuits import make_loader
from .base import Method, compare

DEVICE = "fake_fez"
ROWS, SHOTS = 64, 1024


def bench_circuits(quick: bool, copy: float) -> list[dict[str, Any]]:
    """64 rows × 1,024 shots on the twin of Fez, m = 4 and 6 qubits, loaders `dynamic` and `tree`.

    Errors are relative to the rows themselves, and allowed to be what shots and the twin's noise make of them: noise
    from a million shots a row of the backend's circuit, twice that for circuits that are laid out otherwise.

    "a circuit a row" transpiles 64 circuits for the whole device and runs them shot by shot, each time; "bindings" is the
    one circuit, transpiled before, its probabilities computed exactly and shots drawn from them; "bindings, Aer" is the
    same circuit shot by shot, so that the gain of the engine can be told from that of the bindings.
    """
    simulator = AerSimulator.from_backend(fake_device(DEVICE))
    generator = torch.Generator().manual_seed(0)
    rows = []
    for m in (4,) if quick else (4, 6):
        p = torch.randn(ROWS, 1 << m, generator=generator, dtype=torch.float64).softmax(-1)
        shot_noise = math.sqrt((p * (1 - p)).sum() / SHOTS / p.square().sum())
        for loader in ("dynamic", "tree"):
            backend = QiskitQuantumBackend("aer", DEVICE, SHOTS, loader=loader)
            many = backend.sample_rows(p, 1000 * SHOTS, generator=generator).probabilities()
            noise = ((many - p).norm() / p.norm()).item()
            moved = 8 * p.numel() * 2
            allowed = 1.1 * math.hypot(shot_noise, noise)
            methods = [
                Method(
                    "a circuit a row",
                    partial(circuit_a_row, simulator, loader, p),
                    moved,
                    1.1 * math.hypot(shot_noise, 2 * noise),
                ),
                Method("bindings", partial(probabilities, backend, p, generator), moved, allowed),
                Method("classical draw", partial(classical, p, generator), moved, 1.1 * shot_noise),
            ]
            if loader == "tree":  # shot by shot, conditions take a minute
                plain = QiskitQuantumBackend("aer", DEVICE, SHOTS, loader=loader, method="aer")
                aer = Method("bindings, Aer", partial(probabilities, plain, p, generator), moved, allowed)
                methods.insert(2, aer)
            case = f"{DEVICE} {loader} m={m} R={ROWS} shots={SHOTS}"
            rows += compare(case, methods, p, ("a circuit a row",), 1 if quick else 2, copy)
    return rows


def probabilities(backend: QiskitQuantumBackend, p: Tensor, generator: torch.Generator) -> Tensor:
    """Measured shares of the keys, (R, n)."""
    return backend.sample_rows(p, generator=generator).probabilities()


def circuit_a_row(simulator: AerSimulator, loader: str, p: Tensor) -> Tensor:
    """Each row bound and transpiled by itself for the whole device, as circuit code is usually written."""
    made = make_loader(loader)
    n = p.shape[-1]
    circuit = made.circuit(made.size(n))
    isa = [
        transpile(circuit.assign_parameters(angles), simulator, optimization_level=3, seed_transpiler=0)
        for angles in made.angles(p)
    ]
    result = simulator.run(isa, shots=SHOTS, seed_simulator=0).result()
    out = torch.zeros_like(p)
    for row in range(len(p)):
        for key, count in result.get_counts(row).items():
            out[row, int(key, 2)] = count / SHOTS
    return out


def classical(p: Tensor, generator: torch.Generator) -> Tensor:
    """The same shots by pseudo-random numbers."""
    return draw_counts(p, SHOTS, generator) / SHOTS
