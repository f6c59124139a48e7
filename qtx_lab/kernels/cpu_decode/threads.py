"""Starts a compiled function on torch's own threads.

A decoding step alternates between torch's matrix products and this pass. torch's threads belong to the
OpenMP library that it is linked with; after a product they wait, awake, on their cores. So the pass is
started by the function that starts those threads, `GOMP_parallel` of GNU's OpenMP, through ctypes, which
lets other Python threads go on meanwhile.

Measured between products of torch, on two cores that nothing else used, 8 heads × 2,048 (8,192) tokens:
.27 (.39) ms, by `numba.prange` .28 (.39) ms, by a pool of Python threads .47 (.68) ms. So it is as fast
as `numba.prange`, and unlike that it works in a process that was forked, which numba's OpenMP layer ends,
and in several Python threads at once, which numba's layer without OpenMP does not allow. `qtx-lab bench
decode` has a row for `numba.prange` beside it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_FORKED = threading.Event()


def run_on_threads(function: Any, address: int, threads: int, keep_alive: object) -> None:
    """Call a compiled function (a `cfunc` of one int64) with the address on this many threads.

    Returns when all have ended.
    `keep_alive` holds what the function writes to, for as long as any thread may.
    """
    start = None if threads == 1 or _FORKED.is_set() else _openmp_start()
    if start is not None:
        start(function.address, address, threads, 0)
        return
    # A Ctrl-C ends the waiting here, but not the work of the others.
    others = [
        _pool(threads - 1).submit(lambda _: function.ctypes(address), keep_alive) for _ in range(1, threads)
    ]
    function.ctypes(address)
    for other in others:
        other.result()


@functools.cache
def _openmp_start() -> Any:
    """`GOMP_parallel` of the library that torch is linked with; None where that is another OpenMP."""
    start = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    if start is not None:
        start.argtypes, start.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint, ctypes.c_uint), None
    return start


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "qtx-lab-decode")


def _after_fork() -> None:
    """Threads are not copied with a process, nor does OpenMP learn that its own are gone."""
    _FORKED.set()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
