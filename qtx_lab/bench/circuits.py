"""`qtx-lab bench circuits`: rows measured on a device's twin by one circuit with bindings, and by a circuit
for each row.

A pseudo-random draw of the same number of shots is measured beside them. It is faster than any simulation and
has no noise: loading a row that is already known into a circuit has no advantage over drawing from it.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from qiskit import transpile
from qiskit_aer import AerSimulator
from torch import Tensor

from ..backends import QiskitQuantumBackend
from ..backends.counts import draw_counts
from ..backends.noise import fake_device
from ..circuits import make_loader
from .base import BenchRow, Method, compare

DEVICE = "fake_fez"
ROWS, SHOTS = 64, 1024
ALLOWED = 1.1
"""A method may have this many times the error that shots and noise are expected to make."""


def bench_circuits(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Measure 64 rows with 1,024 shots each on the twin of Fez.

    The rows take m = 4 and 6 qubits, and the loaders are `dynamic` and `tree`.

    Rows as of `compare`. Errors are relative to the rows themselves. The allowed error is what the shots and
    the twin's noise are expected to make; the noise is measured with a million shots a row of the backend's
    circuit, and circuits that are laid out otherwise may have twice as much.

    - "a circuit a row" transpiles 64 circuits for the whole device and runs them shot by shot, at each call.
    - "bindings" is one circuit with 64 bindings, transpiled in advance. The probabilities of its outcomes are
      computed exactly, and shots are drawn from them.
    - "bindings, Aer" runs the same circuit shot by shot, so that the gain of the engine can be told from the
      gain of the bindings. Only the tree is run this way: the dynamic loader's conditions would take a
      minute.
    """
    simulator = AerSimulator.from_backend(fake_device(DEVICE))
    generator = torch.Generator().manual_seed(0)
    rows = []
    for m in (4,) if quick else (4, 6):
        p = torch.randn(ROWS, 1 << m, generator=generator, dtype=torch.float64).softmax(-1)
        shot_noise = math.sqrt((p * (1 - p)).sum() / SHOTS / p.square().sum())
        num_bytes = 2 * p.nbytes
        for loader in ("dynamic", "tree"):
            backend = QiskitQuantumBackend("aer", DEVICE, SHOTS, loader=loader)
            many = backend.sample_rows(p, 1000 * SHOTS, generator=generator).probabilities()
            noise = ((many - p).norm() / p.norm()).item()
            allowed = ALLOWED * math.hypot(shot_noise, noise)
            allowed_elsewhere = ALLOWED * math.hypot(shot_noise, 2 * noise)
            each = partial(circuit_a_row, simulator, loader, p)
            bindings = partial(probabilities, backend, p, generator)
            methods = [
                Method("a circuit a row", each, num_bytes, allowed_elsewhere),
                Method("bindings", bindings, num_bytes, allowed),
            ]
            if loader == "tree":
                aer_backend = QiskitQuantumBackend("aer", DEVICE, SHOTS, loader=loader, method="aer")
                aer = partial(probabilities, aer_backend, p, generator)
                methods.append(Method("bindings, Aer", aer, num_bytes, allowed))
            draw = partial(classical, p, generator)
            methods.append(Method("classical draw", draw, num_bytes, ALLOWED * shot_noise))
            case = f"{DEVICE} {loader} m={m} R={ROWS} shots={SHOTS}"
            turns = 1 if quick else 2
            rows += compare(case, methods, p, ("a circuit a row",), turns, copy_bandwidth)
    return rows


def probabilities(backend: QiskitQuantumBackend, p: Tensor, generator: torch.Generator) -> Tensor:
    """The measured share of each key, (R, n)."""
    return backend.sample_rows(p, generator=generator).probabilities()


def circuit_a_row(simulator: AerSimulator, loader_name: str, p: Tensor) -> Tensor:
    """Bind and transpile each row by itself, as circuit code is usually written; shares (R, n)."""
    loader = make_loader(loader_name)
    n = p.shape[-1]
    circuit = loader.circuit(loader.size(n))
    transpiled = [
        transpile(circuit.assign_parameters(angles), simulator, optimization_level=3, seed_transpiler=0)
        for angles in loader.angles(p)
    ]
    result = simulator.run(transpiled, shots=SHOTS, seed_simulator=0).result()
    out = torch.zeros_like(p)
    for row in range(len(p)):
        for key, count in result.get_counts(row).items():
            out[row, int(key, 2)] = count / SHOTS
    return out


def classical(p: Tensor, generator: torch.Generator) -> Tensor:
    """Shares (R, n) of as many shots by pseudo-random numbers."""
    return draw_counts(p, SHOTS, generator) / SHOTS
