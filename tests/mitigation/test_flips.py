"""Random flips and repeated readings of fed-forward circuits undo planted, drifting errors of readings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from qiskit.transpiler import Target
from torch import Tensor

from qtx_lab.backends import CircuitSampler, Noise, ParametricNoise, QiskitQuantumBackend, SimulatorNoise
from qtx_lab.circuits import DynamicLoader, TreeLoader
from qtx_lab.errors import ArgumentError
from qtx_lab.mitigation import CircuitMitigation, RandomFlips


@dataclass(frozen=True)
class Misreading(SimulatorNoise):
    """Reads 0 as 1, and 1 as 0, with probabilities of their own."""

    zero: float
    one: float

    def scaled(self, factor: float) -> Misreading:
        return Misreading(self.zero * factor, self.one * factor)

    def target(self, num_qubits: int) -> Target:
        return ParametricNoise(readout=(self.zero + self.one) / 2).target(num_qubits)

    def noise(self, num_qubits: int) -> Noise:
        matrix = np.array([[1 - self.zero, self.zero], [self.one, 1 - self.one]])
        return Noise({}, dict.fromkeys(range(num_qubits), matrix))


DRIFT = tuple(Misreading(0.01 + 0.02 * t, 0.03 + 0.08 * t) for t in (0.0, 0.25, 0.5, 0.75, 1.0))
"""What a device does while it is measured: 1 is misread three to four times as often as 0, more and more."""


def random_rows(count: int, n: int, generator: torch.Generator) -> Tensor:
    p = torch.rand(count, n, generator=generator, dtype=torch.float64).pow(3)
    return p / p.sum(-1, keepdim=True)


def measured(p: Tensor, reads: int, flips: int, shots: int, generator: torch.Generator) -> Tensor:
    """Shares of the keys over the whole drift."""
    counts = torch.zeros_like(p)
    for noise in DRIFT:
        backend = QiskitQuantumBackend("aer", noise=noise, loader=DynamicLoader(reads=reads))
        sampler = CircuitSampler(backend, mitigation=RandomFlips(flips) if flips else None)
        counts += sampler.measure(p, shots // len(DRIFT), generator=generator).counts
    return counts / counts.sum(-1, keepdim=True)


@pytest.mark.statistical
def test_flips_and_two_readings_undo_a_drift_that_no_calibration_follows(generator: torch.Generator) -> None:
    """The planted bias: raw counts have some .1 fewer ones in a key, with a standard error below .003."""
    p = random_rows(16, 16, generator)
    ones = torch.tensor([bin(key).count("1") for key in range(16)], dtype=torch.float64)
    error, lean = {}, {}
    for reads, flips in ((1, 0), (1, 16), (2, 0), (2, 16)):
        share = measured(p, reads, flips, 20_000, generator)
        error[reads, flips] = ((share - p).abs().sum(-1) / 2).mean().item()
        lean[reads, flips] = ((share - p) @ ones).mean().item()
    assert lean[1, 0] < -0.05  # what is planted is there,
    assert lean[2, 0] < -0.03  # and two readings alone do not take it away: they discard more ones
    assert abs(lean[1, 16]) < 0.03
    assert abs(lean[2, 16]) < 0.012
    assert error[2, 16] < 0.35 * error[1, 0], error
    assert error[2, 16] < 0.6 * min(error[1, 16], error[2, 0]), error


def test_without_noise_nothing_is_lost_and_masked_keys_stay_masked(generator: torch.Generator) -> None:
    p = random_rows(3, 5, generator)
    p[1] = 0  # attends to nothing
    p[2] = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.5])
    for loader in (DynamicLoader(reads=2), TreeLoader()):
        backend = QiskitQuantumBackend("aer", loader=loader)
        counts = RandomFlips(8).sample_rows(backend, p, 1003, generator=generator)
        assert counts.counts.sum(-1).tolist() == [1003, 0, 1003]
        assert counts.discarded.tolist() == [0, 0, 0]
        assert counts.counts[2, [0, 2, 3]].sum() == 0
        assert counts.classical is not None
        assert counts.classical.counts.sum(-1).tolist() == [1003, 0, 1003]
        torch.testing.assert_close(counts.probabilities(), p, atol=0.08, rtol=0)
        planned = RandomFlips(8).planned_runs(backend, p[[0, 2]], 1003)
        assert sum(run.rows * run.shots for run in planned) == 2 * 1003
    plan = QiskitQuantumBackend("aer", "fake_fez", loader=DynamicLoader(reads=2)).plan_rows(
        p, 1003, mitigation=RandomFlips(8)
    )
    assert plan.executions == 2 * 1003
    assert plan.jobs == 2  # the flips that have a shot more are a job of their own


def test_a_shot_whose_readings_differ_feeds_nothing_forward() -> None:
    """With a bit that is misread half of the time, half of the shots are left, and all of them are right."""
    p = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    backend = QiskitQuantumBackend("aer", noise=Misreading(0.0, 0.5), loader=DynamicLoader(reads=2))
    counts = backend.sample_rows(p, 4000, generator=torch.Generator().manual_seed(0))
    # Both bits are 1, and each is read as 1 twice with the probability 1/4, and as 0 twice, too.
    assert abs(int(counts.counts[0, 3]) - 4000 / 16) < 5 * (4000 / 16) ** 0.5
    assert int(counts.discarded) == 4000 - int(counts.counts[0, 3])


def test_bad_input_and_what_does_not_go_together_are_refused() -> None:
    with pytest.raises(ArgumentError, match="reads=3 is not allowed"):
        DynamicLoader(reads=3)
    for odd in (1, 3, 255):  # an odd one out would leave a lean
        with pytest.raises(ArgumentError, match=f"instances={odd} is not allowed"):
            RandomFlips(odd)
    backend = QiskitQuantumBackend("aer", noise=Misreading(0.01, 0.02), loader=DynamicLoader(reads=2))
    with pytest.raises(ArgumentError, match="measures before the end"):
        CircuitMitigation(readout=True).sample_rows(backend, torch.full((1, 4), 0.25), 100)


def test_no_rows_are_no_counts() -> None:
    backend = QiskitQuantumBackend("aer", loader=DynamicLoader(reads=2))
    assert RandomFlips(4).sample_rows(backend, torch.zeros(0, 4), 20).counts.shape == (0, 4)
