"""Rows measured in parts: the parts add up, go on with new random numbers, and come nearer to the rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtx_lab.backends import RowCounts
from qtx_lab.widgets.measurement import Measurement, growing_parts, measure_in_parts

P = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


def multinomial(p: torch.Tensor, shots: int, *, generator: torch.Generator | None = None) -> RowCounts:
    """A backend without noise, which discards nothing."""

    def draw() -> RowCounts:
        keys = torch.multinomial(p, shots, replacement=True, generator=generator)
        counts = torch.zeros(p.shape, dtype=torch.int64).scatter_add_(1, keys, torch.ones_like(keys))
        return RowCounts(counts, torch.zeros(len(p), dtype=torch.int64), shots)

    measured = draw()
    diagnostics = {"device": "multinomial", "fallbacks": (f"part of {shots} shots",)}
    return RowCounts(measured.counts, measured.discarded, shots, draw(), diagnostics)


@given(st.integers(1, 100_000), st.integers(1, 40))
def test_parts_grow_and_add_up(shots: int, num_parts: int) -> None:
    parts = growing_parts(shots, num_parts)
    assert sum(parts) == shots
    assert min(parts) >= 1
    assert len(parts) <= num_parts
    assert len(parts) == 1 or parts[0] <= 16


def test_every_part_adds_to_the_ones_before_it() -> None:
    parts = [10, 20, 30]
    steps = list(measure_in_parts(multinomial, P, parts, seed=0))
    assert [step.counts.shots for step in steps] == [10, 30, 60]
    for step in steps:
        assert step.counts.counts.sum(-1).tolist() == [step.counts.shots] * 2
        assert step.baseline.counts.sum(-1).tolist() == [step.counts.shots] * 2
        assert step.curve[-1].shots == step.counts.shots
    assert len(steps[-1].curve) == 3
    assert steps[-1].counts.diagnostics["fallbacks"] == tuple(f"part of {n} shots" for n in parts)
    again = list(measure_in_parts(multinomial, P, parts, seed=0))[-1]
    assert torch.equal(again.counts.counts, steps[-1].counts.counts)


def test_a_measurement_that_goes_on_has_new_random_numbers() -> None:
    (first,) = measure_in_parts(multinomial, P, [500], seed=3)
    (both,) = measure_in_parts(multinomial, P, [500], seed=3, start=first)
    assert both.counts.shots == 1000
    assert not torch.equal(both.counts.counts - first.counts.counts, first.counts.counts)
    (whole,) = measure_in_parts(multinomial, P, [500], seed=3, start=Measurement.empty(*P.shape))
    assert torch.equal(whole.counts.counts, first.counts.counts)


def test_the_fidelity_grows_with_the_shots() -> None:
    curve = list(measure_in_parts(multinomial, P, growing_parts(20_000), seed=1))[-1].curve
    for row in range(2):
        point = curve[-1].of_row(row)
        assert point["fidelity"] == pytest.approx(1, abs=0.002)
        assert point["error"] < curve[0].error[row]
        assert point["classical"] == pytest.approx(1, abs=0.002)
