"""Random numbers depend on what they are for, and on nothing beside it."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from qtx_lab.streams import Purpose, Stream, philox, sequence_keys


def test_known_answers() -> None:
    ones = [0xFFFFFFFF] * 4
    assert [int(x) for x in philox(-1, *ones)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    key = 0xA4093822 | 0x299F31D0 << 32
    assert [int(x) for x in philox(key, *pi)] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_a_row_has_its_numbers_alone_and_beside_others() -> None:
    stream = Stream.of(7, sequences=torch.tensor([3, 11]), groups=4, length=50)
    numbers = stream.uniform(3, 5)
    assert numbers.shape == (8, 50, 3, 5)
    assert numbers.dtype == torch.float64
    alone = Stream.of(7, sequences=torch.tensor([11]), groups=4, length=1, first_position=20)
    assert torch.equal(alone.uniform(3, 5)[:, 0], numbers[4:, 20])
    assert torch.equal(
        stream.uniform(1, 2), numbers[:, :, :1, :2]
    )  # more replicates and draws change no earlier one
    later = stream.of_purpose(Purpose.POINTS, first_replicate=2)
    assert torch.equal(later.uniform(1, 5), numbers[:, :, 2:])


def test_rows_at_positions_of_their_own() -> None:
    stream = Stream.of(7, sequences=1, groups=2, length=9)
    positions = torch.tensor([[0, 3], [8, 1]])
    numbers = stream.uniform(1, 4)
    here = stream.of_block(slice(None), positions).uniform(1, 4)
    assert torch.equal(here, torch.stack((numbers[0, [0, 3]], numbers[1, [8, 1]])))


@pytest.mark.parametrize("what", ["seed", "sequence", "group", "position", "replicate", "draw", "purpose"])
def test_everything_that_a_number_depends_on_changes_it(what: str) -> None:
    def number(seed=1, sequence=2, group=3, position=4, replicate=5, draw=6, purpose=Purpose.POINTS):  # type: ignore[no-untyped-def]
        stream = Stream.of(seed, torch.tensor([sequence]), group + 1, 1, position).of_purpose(
            purpose, replicate
        )
        return float(stream.uniform(1, draw + 1)[group, 0, 0, draw])

    changed = Purpose.PILOT if what == "purpose" else 9
    assert number() != number(**{what: changed})


def test_names_of_sequences_may_be_large_or_negative() -> None:
    keys = sequence_keys(0, torch.tensor([0, -1, 1 << 40, (1 << 40) + 1]))
    assert len(set(keys.tolist())) == 4


@pytest.mark.statistical
def test_numbers_are_uniform_and_rows_independent() -> None:
    """False alarms: 1e-3 for each of the three tests."""
    numbers = Stream.of(3, sequences=2, groups=5, length=1000).uniform(2, 10)
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    for a, b in (
        (numbers[..., :-1], numbers[..., 1:]),
        (numbers[:, :-1], numbers[:, 1:]),
    ):
        assert abs(stats.pearsonr(a.flatten().numpy(), b.flatten().numpy()).statistic) < 0.01
