"""`bench circuits`: all methods that it compares measure the same rows."""

import torch
from qiskit_aer import AerSimulator

from qtx_lab.backends import QiskitQuantumBackend
from qtx_lab.backends.noise import fake_device
from qtx_lab.bench import circuits as bench_circuits


def test_all_methods_measure_the_rows(monkeypatch, generator):
    monkeypatch.setattr(bench_circuits, "SHOTS", 2000)
    p = torch.randn(2, 4, generator=generator, dtype=torch.float64).softmax(-1)
    simulator = AerSimulator.from_backend(fake_device("fake_manila"))
    backend = QiskitQuantumBackend("aer", "fake_manila", 2000, loader="tree")
    for measured in (
        bench_circuits.circuit_a_row(simulator, "tree", p),
        bench_circuits.probabilities(backend, p, generator),
        bench_circuits.classical(p, generator),
    ):
        assert 0.5 * (measured - p).abs().sum(-1).max() < 0.1
