"""The order of keys by their values: close values are neighbours, and later values change nothing that
came before.
"""

from __future__ import annotations

import pytest
import torch

from qtx_lab.samplers.value_order import (
    FIRST_VALUES,
    RowOrders,
    ValueOrder,
    cached_order,
    first_whole_blocks,
    hilbert_index,
)


def test_neighbours_on_the_curve_share_a_face() -> None:
    for dimensions, bits in ((1, 5), (2, 4), (3, 3), (4, 2)):
        axis = torch.arange(1 << bits, dtype=torch.int32)
        cells = torch.cartesian_prod(*[axis] * dimensions).view(-1, dimensions)
        index = hilbert_index(cells, bits)
        assert torch.equal(index.sort().values, torch.arange(len(cells)))
        along = cells[index.argsort()]
        assert bool(((along[1:] - along[:-1]).abs().sum(-1) == 1).all())


def test_an_order_key_does_not_depend_on_later_values(generator: torch.Generator) -> None:
    values = torch.randn(3, 500, 20, generator=generator)
    other = values.clone()
    other[:, FIRST_VALUES:] = 5 + torch.randn(3, 500 - FIRST_VALUES, 20, generator=generator)
    keys = ValueOrder.fit(values).keys(values)
    assert torch.equal(ValueOrder.fit(other).keys(values), keys)
    alone = ValueOrder.fit(values).keys(values[:, 400:])
    assert (alone == keys[:, 400:]).float().mean() > 0.999  # but for a rounding at a cell's edge


def test_the_order_brings_similar_values_together(generator: torch.Generator) -> None:
    centres = 5 * torch.randn(8, 6, generator=generator)
    kind = torch.randint(8, (1, 800), generator=generator)
    values = centres[kind] + 0.1 * torch.randn(1, 800, 6, generator=generator)
    along = kind[0, ValueOrder.fit(values).order(values)[0]]
    assert int((along[1:] != along[:-1]).sum()) < 20  # of 700 where keys lie as they come


def test_values_of_any_size_and_kind_have_an_order() -> None:
    values = torch.randn(2, 100, 3)
    order = ValueOrder.fit(values).order(values)
    for scale in (1e-30, 1e30):
        assert (ValueOrder.fit(values * scale).order(values * scale) == order).float().mean() > 0.95
    assert torch.equal(ValueOrder.fit(torch.ones(1, 9, 4)).order(torch.ones(1, 9, 4)), torch.arange(9)[None])
    for shape in ((2, 0, 4), (0, 5, 4), (1, 1, 1)):
        assert ValueOrder.fit(torch.zeros(shape)).order(torch.zeros(shape)).shape == shape[:2]


def test_hidden_values_do_not_count(generator: torch.Generator) -> None:
    values = torch.randn(1, 300, 4, generator=generator)
    values[:, :128] = torch.nan
    seen = torch.arange(300) >= torch.tensor([[[100], [128], [200]]])
    rows = RowOrders.of(values, first_whole_blocks(seen))
    assert torch.equal(rows.which, torch.tensor([[0, 0, -1]]))  # the last one sees 192 … 255 only in part
    expected = ValueOrder.fit(values[:, 128:192]).order(values)
    assert torch.equal(rows.orders[0], expected)


@pytest.mark.parametrize("shape", [(1, 3), (2, 5), (7, 1), (3, 4, 100, 6), (0, 4, 2), (1000, 2)])
def test_an_order_is_a_permutation(shape: tuple[int, ...], generator: torch.Generator) -> None:
    order = cached_order(torch.randn(shape, generator=generator))
    assert torch.equal(order.sort(-1).values, torch.arange(shape[-2]).expand(shape[:-1]))


def test_neighbours_have_similar_values(generator: torch.Generator) -> None:
    values = torch.randn(1000, 4, generator=generator)

    def jumps(order: torch.Tensor) -> torch.Tensor:
        return values[order].diff(dim=0).norm(dim=-1).mean()

    assert jumps(cached_order(values)) < 0.4 * jumps(torch.arange(1000))


@pytest.mark.parametrize("power", [-100, 100, 120])
def test_values_have_the_same_order_at_any_size(power: int, generator: torch.Generator) -> None:
    values = torch.randn(2, 200, 5, generator=generator).clamp(-3.9, 3.9)
    expected = ValueOrder.fit(values).order(values)
    scaled = values * 2.0**power
    assert torch.equal(ValueOrder.fit(scaled).order(scaled), expected)
    largest = values.sign() * torch.finfo(values.dtype).max  # its sums are no numbers
    assert torch.equal(ValueOrder.fit(largest).order(largest).sort().values[0], torch.arange(200))
