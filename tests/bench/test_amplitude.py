"""`qtx-lab bench amplitude`: repetitions give errors and coverage, and intervals too narrow are seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qtx_lab.backends import AmplitudeEstimator, ParametricNoise, QiskitQuantumBackend
from qtx_lab.bench.amplitude import problem, repeated_estimates, shot_errors


@pytest.mark.statistical
def test_repetitions_give_the_error_and_the_coverage_of_each_row() -> None:
    p, v = problem(4, 2)
    noise = ParametricNoise(two_qubit=2e-3, readout=0.01)
    estimator = AmplitudeEstimator(QiskitQuantumBackend("aer", noise=noise))
    result = repeated_estimates(estimator, p, v, loads=1024, repetitions=100)
    assert result.details["repetitions"] == 100
    assert result.details["used"] <= 1024
    assert result.details["coverage_of_worst_row"] <= result.details["coverage"]
    assert result.coverage_problems() == []
    ancilla, key = shot_errors(p, v, 1024)
    assert result.error < 0.7 * ancilla
    assert key < ancilla
    narrow = {**result.details, "coverage": 0.92, "coverage_of_worst_row": 0.8}
    assert replace(result, details=narrow).coverage_problems() == [
        "coverage 92.0%",
        "coverage of the worst row 80.0%",
    ]


def test_errors_of_shots_are_those_of_the_binomial_and_of_the_drawn_keys() -> None:
    p, v = torch.tensor([[0.25, 0.75]]).double(), torch.tensor([[[0.0], [1.0]]]).double()
    expected = (0.25 * 0.75 / 100) ** 0.5
    assert shot_errors(p, v, 100) == pytest.approx((expected, expected))
