"""Calls the compiled pass from torch."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import cfunc, types
from torch import Tensor

from .reference import DrawnRows, DrawRule
from .rows import EXACT, INT4, INT8, MIXED, TASK, TILE, attend_task
from .threads import run_on_threads

ALONE = 1 << 18
"""Numbers of a sketch below which a second thread takes longer to wake than it saves."""

TASK_AS_BYTES = struct.Struct(
    "=" + "".join("d" if TASK[name] == np.float64 else "q" for name in TASK.names or ())
)
"""A task's fields, packed in a quarter of the time that NumPy takes."""
TaskBytes = ctypes.c_char * TASK.itemsize
NOT_FINITE = struct.Struct("=qq")
"""The first fields, the second of which says whether a number was not finite."""

READ_COST = 0.25
"""The time to read a head's sketch once, in units of the time that a row takes besides."""

_COMPILING = threading.Lock()


@dataclass(frozen=True)
class Scanned:
    """What the pass reads of a cache, contiguous: float32, but for the table, which may be bfloat16.

    Parameters
    ----------
    length : int
        n, the tokens that are held.
    table : Tensor, (N, C, E + Ev)
        Keys and values, side by side, in the order of arrival; room for C >= n.
    order : Tensor, int64, (N, C)
        The token at each place.
    lines : Tensor, int8 (N, r, capacity) or uint8 (N, lines, capacity), optional
        The keys' components in the order of the places; the keys themselves are scanned where None. A
        uint8 holds 8 + component i in its lower four bits and 8 + component ceil(r / 2) + i in the upper
        ones. Where lines are `mixed`, so do the first ones of the first ceil(r / 3) components; the others
        hold four components of 2 bits, the lowest bits first: see `rows._in_levels`.
    weight : Tensor, (N, E, r), optional
        Takes queries to components.
    exact_keys : Tensor, (N, T, E), optional
        Centred keys of the first T places, whose logits are exact.
    mixed : bool
        Whether components have 4 and 2 bits.
    """

    length: int
    table: Tensor
    order: Tensor
    lines: Tensor | None = None
    weight: Tensor | None = None
    exact_keys: Tensor | None = None
    mixed: bool = False

    @property
    def kind(self) -> int:
        """What `rows` calls it."""
        if self.lines is None:
            return EXACT
        if self.mixed:
            return MIXED
        return INT8 if self.lines.dtype == torch.int8 else INT4


@dataclass(frozen=True)
class RowNames:
    """What the random numbers of some rows depend on: see `qtx_lab.streams`.

    Parameters
    ----------
    seed : int
    sequences : Tensor, int64, (B,)
        Names of the sequences, N / B key heads of each.
    positions : int
        L, the positions of the queries: row m of M is at `first_position` + m % L.
    first_position : int
    """

    seed: int
    sequences: Tensor
    positions: int
    first_position: int


@functools.cache
def compiled() -> Any:
    """`attend_task` in machine code, kept on disk where there is a place for it."""
    with _COMPILING:
        for keep in (True, False):
            try:
                return cfunc(types.void(types.int64), cache=keep, error_model="numpy")(attend_task)
            except (OSError, RuntimeError):  # no folder to write to, a full disk
                if not keep:
                    raise
    raise AssertionError


def draw_rows(
    queries: Tensor,
    scale: float,
    scanned: Scanned,
    names: RowNames,
    rule: DrawRule,
) -> DrawnRows | None:
    """Draw keys and average their values, on `torch.get_num_threads()` threads.

    Any number of calls may go on at once.

    Parameters
    ----------
    queries : Tensor, (N, M, E), float32
    scale : float
    scanned : Scanned
    names : RowNames
    rule : DrawRule

    Returns
    -------
    DrawnRows or None
        None if a query or a score is not finite.
    """
    queries = queries.contiguous()
    drawn = _empty_rows(
        queries, rule.num_samples * rule.replicates, scanned.table.shape[-1] - queries.shape[-1]
    )
    heads, rows, features = queries.shape
    components = features if scanned.weight is None else scanned.weight.shape[-1]
    threads = torch.get_num_threads()
    if heads * rows * scanned.length * components <= ALONE:
        threads = 1
    if rule.grouped:
        tile, units = rows // max(1, names.positions), heads * names.positions
    else:
        tile = tile_rows(heads, rows, threads)
        units = heads * -(-rows // tile)
    task = make_task(queries, scale, scanned, names, rule, drawn, tile, units)
    run_on_threads(compiled(), ctypes.addressof(task), threads, (queries, scanned, names, drawn, task))
    return None if NOT_FINITE.unpack_from(task)[1] else drawn


@functools.lru_cache(maxsize=256)
def tile_rows(heads: int, rows: int, threads: int) -> int:
    """Rows of a head that a thread takes at a time: many, but so few that all threads end together.

    >>> tile_rows(3, 3, 1), tile_rows(3, 3, 2), tile_rows(64, 8, 2)
    (3, 2, 8)
    """
    most = max(1, min(TILE, rows))
    if threads == 1 or heads * rows >= 4 * threads * most:
        return most

    def longest(tile: int) -> float:
        busy = [0.0] * threads  # the next tile goes to the thread that is free first
        for begin in [*range(0, rows, tile)] * heads:
            first = busy.index(min(busy))
            busy[first] += READ_COST + min(tile, rows - begin)
        return max(busy)

    return min(range(most, 0, -1), key=longest)


def _empty_rows(queries: Tensor, draws: int, width: int) -> DrawnRows:
    """Room for what the pass writes."""
    # Between a model's other work, little of what this needs is in the processor's caches: the less, the
    # faster.
    heads, rows, _ = queries.shape
    empty = queries.new_empty
    return DrawnRows(
        indices=empty(heads, rows, draws, dtype=torch.int64),
        weights=empty(heads, rows, draws),
        proposed=empty(heads, rows, draws),
        inclusion=empty(heads, rows, draws),
        rate=empty(heads, rows, 1),
        output=empty(heads, rows, width),
        effective_sample_size=empty(heads, rows),
    )


def make_task(
    queries: Tensor,
    scale: float,
    scanned: Scanned,
    names: RowNames,
    rule: DrawRule,
    drawn: DrawnRows,
    tile: int = 1,
    units: int = 0,
) -> ctypes.Array[ctypes.c_char]:
    """The task of a call, the bytes of one `TASK`; arguments as of `draw_rows`, and where to write.

    `units` tiles of `tile` rows are to be done.
    """
    heads, rows, features = queries.shape
    lines, weight, exact_keys = scanned.lines, scanned.weight, scanned.exact_keys
    task = TaskBytes()
    TASK_AS_BYTES.pack_into(  # in the order of `TASK`: its names would take a third of this call's time
        task,
        0,
        *(0, 0, units, tile, scanned.kind),
        *(heads, heads // max(1, len(names.sequences)), rows, names.positions, names.first_position),
        *(features, drawn.output.shape[-1], scanned.length, scanned.table.shape[1]),
        *((0, 0) if lines is None else (lines.shape[1], lines.shape[-1])),
        0 if weight is None else weight.shape[-1],
        0 if exact_keys is None else exact_keys.shape[1],
        *(rule.replicates, rule.num_samples, names.seed, scale),
        *(rule.defensive, rule.adaptive, rule.grouped, scanned.table.dtype == torch.bfloat16),
        *(names.sequences.data_ptr(), queries.data_ptr(), scanned.table.data_ptr(), scanned.order.data_ptr()),
        *(_address(lines), _address(weight), _address(exact_keys)),
        *(drawn.indices.data_ptr(), drawn.weights.data_ptr(), drawn.proposed.data_ptr()),
        *(drawn.inclusion.data_ptr(), drawn.rate.data_ptr()),
        *(drawn.output.data_ptr(), drawn.effective_sample_size.data_ptr()),
    )
    return task


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
