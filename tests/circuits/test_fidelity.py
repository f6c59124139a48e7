"""Measures of rows: the floor is what an ideal device gives, the error bar is the spread of repetitions."""

import numpy as np
import pytest
import torch
from scipy import stats

import qtx_lab as qtx
from qtx_lab.backends.counts import draw_counts
from qtx_lab.circuits.fidelity import (
    hellinger_distance,
    hellinger_fidelity,
    state_fidelity,
    total_variation,
)

MEASURES = [total_variation, hellinger_distance, hellinger_fidelity]


def row(n=20):
    u = torch.rand(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (u**2 / (u**2).sum())[None]


def test_values_computed_by_hand():
    p, counts = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[90, 0, 10]])
    overlap = (0.5 * 0.9) ** 0.5
    assert total_variation(counts, p).value.item() == pytest.approx(0.5)
    assert hellinger_distance(counts, p).value.item() == pytest.approx((1 - overlap) ** 0.5)
    assert hellinger_fidelity(counts, p).value.item() == pytest.approx(overlap**2)


def test_the_floor_of_total_variation_is_the_closed_form(generator):
    """E|k - Sp| of a binomial k has a closed form (De Moivre, 1730)."""
    p, shots = row(), 300
    q = p.numpy()[0]
    j = np.floor(shots * q)
    mean = 2 * (j + 1) * (1 - q) * stats.binom.pmf(j + 1, shots, q)
    floor = 0.5 * mean.sum() / shots
    counts = draw_counts(p, shots, generator)
    estimate = total_variation(counts, p, resamples=4000, generator=generator).floor.item()
    assert estimate == pytest.approx(floor, rel=0.01)


@pytest.mark.statistical
@pytest.mark.parametrize("measure", MEASURES)
def test_floors_and_error_bars_are_those_of_repetitions(measure, generator):
    """2,000 repetitions of an ideal device, then of a noisy one; within five standard errors each."""
    p, shots = row(), 500
    noisy = 0.8 * p + 0.2 / p.shape[-1]
    for source in (p, noisy):
        counts = draw_counts(source.expand(2000, -1), shots, generator)
        m = measure(counts, p.expand(2000, -1), resamples=100, generator=generator)
        if source is p:
            error = m.value.std() / 2000**0.5
            assert abs(m.value.mean() - m.floor.mean()) < 5 * error
            low, high = m.floor_range
            inside = ((m.value >= low) & (m.value <= high)).double().mean().item()
            assert (
                0.90 < inside < 0.96
            )  # 0.931 is expected: quantiles of 100 resamples are a little too narrow
        # The bootstrap's error is too large near the edge, where the ideal device is.
        largest_ratio = 1.6 if source is p else 1.2
        assert 0.8 < (m.std_error.mean() / m.value.std()).item() < largest_ratio
        if source is noisy:
            inside = (m.value - m.value.mean()).abs() < 1.96 * m.std_error
            assert 0.90 < inside.double().mean().item() < 0.98


def test_state_fidelity_of_known_states():
    p = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    psi = p.sqrt().to(torch.complex128)[0]
    pure = torch.outer(psi, psi)
    mixed = torch.eye(2, dtype=torch.complex128) / 2
    flipped = torch.outer(psi * torch.tensor([1, -1]), psi * torch.tensor([1, -1]))
    fidelity = [state_fidelity(rho[None], p).value.item() for rho in (pure, mixed, flipped)]
    assert fidelity == pytest.approx([1, 0.5, 0.25])
    m = state_fidelity(mixed[None], p, shots=100)
    assert (m.floor.item(), m.std_error.item()) == pytest.approx((1, 0.05))


def test_counts_may_have_any_integer_dtype():
    p, counts = torch.tensor([[0.5, 0.5]]), torch.tensor([[200, 250]])
    expected = total_variation(counts, p, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.uint8, torch.int16, torch.int32):
        m = total_variation(counts.to(dtype), p, generator=torch.Generator().manual_seed(0))
        assert (m.value.item(), m.floor.item()) == (expected.value.item(), expected.floor.item())


def test_rows_without_counts_are_nan():
    m = total_variation(torch.tensor([[0, 0], [1, 0]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    assert m.value.isnan().tolist() == [True, False]


def test_bad_input_is_refused():
    p = torch.tensor([[0.5, 0.5]])
    with pytest.raises(qtx.ShapeError, match="counts has shape"):
        total_variation(torch.tensor([[1, 2, 3]]), p)
    with pytest.raises(qtx.ArgumentError, match="whole numbers"):
        total_variation(torch.tensor([[0.5, 0.5]]), p)
    with pytest.raises(qtx.ArgumentError, match="whole numbers"):
        total_variation(torch.tensor([[-1, 2]]), p)
    with pytest.raises(qtx.ArgumentError, match="resamples=0"):
        total_variation(torch.tensor([[1, 2]]), p, resamples=0)
    for given in ([[1, 2]], qtx.RowCounts(torch.tensor([[1, 2]]), torch.zeros(1), 3)):
        with pytest.raises(qtx.DtypeError, match=f"counts is a {type(given).__name__}"):
            total_variation(given, p)
    with pytest.raises(qtx.ArgumentError, match="2\\^53"):
        total_variation(torch.full((1, 2), 2**62), p)
    with pytest.raises(qtx.DtypeError, match="rho is list"):
        state_fidelity([[1.0]], p)
    with pytest.raises(qtx.ShapeError, match="rho has shape"):
        state_fidelity(torch.eye(3)[None].expand(2, -1, -1), p)


@pytest.mark.parametrize("measure", MEASURES)
def test_shots_that_all_gave_one_key_are_no_certainty(measure, generator):
    """A bootstrap of them knows of no other key; a row that has no other key leaves nothing to err about."""
    p = torch.tensor([[0.9, 0.1], [0.7, 0.3], [1.0, 0.0]])
    counts = torch.tensor([[10, 0], [1, 0], [10, 0]])
    std_error = measure(counts, p, generator=generator).std_error
    assert (std_error[:2] > 0.005).all()
    assert std_error[2] == 0
    assert measure(counts, p, resamples=1, generator=generator).std_error.isnan().all()
