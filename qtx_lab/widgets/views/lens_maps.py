"""Attention maps at a coarser level: means over squares of cells, of exact weights and of draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ...estimates import AttentionEstimate

TILE = 256
"""Cells of a side of what is sent at a time."""


def overview_level(rows: int, columns: int, max_cells: int) -> int:
    """The finest level at which a map has at most `max_cells` cells a side.

    At level i a cell is the mean of 2^i × 2^i cells of the map.

    >>> overview_level(4096, 1000, 512)
    3
    """
    return max(0, math.ceil(math.log2(max(rows, columns) / max_cells)))


def pool_map(x: np.ndarray, level: int) -> np.ndarray:
    """The means of x (L, n) over the cells of a level."""
    if level == 0:
        return x
    starts = [np.arange(0, size, 1 << level) for size in x.shape]
    sums = np.add.reduceat(np.add.reduceat(x, starts[0], axis=0), starts[1], axis=1)
    return sums / np.outer(_positions_per_cell(x.shape[0], level), _positions_per_cell(x.shape[1], level))


def pool_draws(
    estimate: AttentionEstimate,
    level: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    shape: Sequence[int],
) -> np.ndarray:
    """The means of the estimated weights over a part of a level's cells, without forming all weights.

    Parameters
    ----------
    estimate : AttentionEstimate
        Of one head.
    level : int
    rows, columns : (int, int)
        First cell and the one after the last, of the level.
    shape : (L, n)
        Of the whole map.
    """
    (first_row, end_row), (first_column, end_column) = rows, columns
    size = (end_row - first_row, end_column - first_column)
    queries = slice(first_row << level, min(end_row << level, shape[0]))
    column = estimate.draws.indices[queries].numpy() >> level
    weights = estimate.draws.weights[queries].numpy()
    row = np.broadcast_to((np.arange(queries.start, queries.stop) >> level)[:, None], column.shape)
    inside = (column >= first_column) & (column < end_column)
    cell = (row[inside] - first_row) * size[1] + (column[inside] - first_column)
    sums = np.bincount(cell, weights[inside], size[0] * size[1]).reshape(size)
    heights = _positions_per_cell(shape[0], level)[first_row:end_row]
    widths = _positions_per_cell(shape[1], level)[first_column:end_column]
    return sums / np.outer(heights, widths)


def exact_tiles(
    level_map: np.ndarray, tiles: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """The tiles (i, j) of a map at some level."""
    for i, j in tiles:
        yield i, j, level_map[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]


def sampled_tiles(
    estimate: AttentionEstimate,
    level: int,
    tiles: Sequence[tuple[int, int]],
    level_shape: Sequence[int],
    shape: Sequence[int],
) -> Iterator[tuple[int, int, np.ndarray]]:
    """The tiles (i, j) of the estimated weights at a level.

    Parameters
    ----------
    level_shape : (int, int)
        Of the map at this level.
    shape : (L, n)
        Of the whole map.
    """
    if not tiles:
        return
    corners = np.array(tiles)
    (top, left), (bottom, right) = corners.min(0) * TILE, (corners.max(0) + 1) * TILE
    rows, columns = (top, min(bottom, level_shape[0])), (left, min(right, level_shape[1]))
    block = pool_draws(estimate, level, rows, columns, shape)
    for i, j in tiles:
        yield i, j, block[i * TILE - top :, j * TILE - left :][:TILE, :TILE]


def _positions_per_cell(count: int, level: int) -> np.ndarray:
    """How many of `count` positions lie under each cell of a level."""
    side = 1 << level
    return np.minimum(side, count - np.arange(0, count, side))
