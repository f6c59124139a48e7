"""Attention maps at coarser levels: means over rectangles of cells, of exact weights and of draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...estimates import AttentionEstimate

TILE = 256
"""Cells of a side of what is sent at a time."""


@dataclass(frozen=True)
class MapLevel:
    """How coarse a map is: a cell is the mean of 2^rows × 2^columns cells of the map itself."""

    rows: int
    columns: int


def overview_level(rows: int, columns: int, max_cells: int) -> MapLevel:
    """The finest level at which a map has at most `max_cells` cells a side.

    >>> overview_level(4096, 1000, 512)
    MapLevel(rows=3, columns=1)
    """
    return MapLevel(*(max(0, math.ceil(math.log2(size / max_cells))) for size in (rows, columns)))


def pool_map(x: np.ndarray, level: MapLevel) -> np.ndarray:
    """The means of x (L, n) over the cells of a level."""
    for axis, by in enumerate((level.rows, level.columns)):
        counts = positions_per_cell(x.shape[axis], by)
        for _ in range(by):  # in halves: for cells of a few positions this is ten times as fast as reduceat
            if x.shape[axis] % 2:
                x = np.concatenate((x, np.zeros_like(x[:1] if axis == 0 else x[:, :1])), axis)
            x = x[::2] + x[1::2] if axis == 0 else x[:, ::2] + x[:, 1::2]
        if by:
            x = x / (counts[:, None] if axis == 0 else counts)
    return x


def pool_draws(
    estimate: AttentionEstimate,
    level: MapLevel,
    rows: tuple[int, int],
    columns: tuple[int, int],
    shape: Sequence[int],
) -> np.ndarray:
    """The means of the estimated weights over a part of a level's cells, without forming all weights.

    Parameters
    ----------
    estimate : AttentionEstimate
        Of one head.
    level : MapLevel
    rows, columns : (int, int)
        First cell and the one after the last, of the level.
    shape : (L, n)
        Of the whole map.
    """
    (first_row, end_row), (first_column, end_column) = rows, columns
    size = (end_row - first_row, end_column - first_column)
    queries = slice(first_row << level.rows, min(end_row << level.rows, shape[0]))
    column = estimate.draws.indices[queries].numpy() >> level.columns
    weights = estimate.draws.weights[queries].numpy()
    row = np.broadcast_to((np.arange(queries.start, queries.stop) >> level.rows)[:, None], column.shape)
    inside = (column >= first_column) & (column < end_column)
    cell = (row[inside] - first_row) * size[1] + (column[inside] - first_column)
    sums = np.bincount(cell, weights[inside], size[0] * size[1]).reshape(size)
    heights = positions_per_cell(shape[0], level.rows)[first_row:end_row]
    widths = positions_per_cell(shape[1], level.columns)[first_column:end_column]
    return sums / np.outer(heights, widths)


def cumulative_cells(p: Tensor, level: MapLevel) -> Tensor:
    """The share of each row's weight, of p (R, n), up to the end of each of a level's cells.

    float32, (R, cells).

    >>> cumulative_cells(torch.tensor([[0.5, 0.0, 0.25, 0.125, 0.125]]), MapLevel(0, 1))
    tensor([[0.5000, 0.8750, 1.0000]])
    """
    width = 1 << level.columns
    cells = F.pad(p, (0, -p.shape[-1] % width)).unflatten(-1, (-1, width)).sum(-1, dtype=torch.float64)
    return (cells.cumsum(-1) / cells.sum(-1, keepdim=True)).float()


def exact_tiles(
    p: np.ndarray, level: MapLevel, tiles: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """The tiles (i, j) of a level of the map p (L, n)."""
    tall, wide = TILE << level.rows, TILE << level.columns
    for i, j in tiles:
        yield i, j, pool_map(p[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide], level)


def sampled_tiles(
    estimate: AttentionEstimate, level: MapLevel, tiles: Sequence[tuple[int, int]], shape: Sequence[int]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """The tiles (i, j) of a level of the estimated weights, whose whole map has `shape` (L, n)."""
    if not tiles:
        return
    corners = np.array(tiles)
    (top, left), (bottom, right) = corners.min(0) * TILE, (corners.max(0) + 1) * TILE
    cells = (-(-shape[0] >> level.rows), -(-shape[1] >> level.columns))
    rows, columns = (top, min(bottom, cells[0])), (left, min(right, cells[1]))
    block = pool_draws(estimate, level, rows, columns, shape)
    for i, j in tiles:
        yield i, j, block[i * TILE - top :, j * TILE - left :][:TILE, :TILE]


def positions_per_cell(count: int, level: int) -> np.ndarray:
    """How many of `count` positions lie under each cell of a level."""
    side = 1 << level
    return np.minimum(side, count - np.arange(0, count, side))
