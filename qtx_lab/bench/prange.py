"""The pass compiled for the CPU, started by `numba.prange`: what `bench decode` compares our start with."""

from __future__ import annotations

from typing import Any

from numba import njit, prange, set_num_threads

from ..kernels.cpu_decode.rows import attend_task

_attend = njit(error_model="numpy")(attend_task)


@njit(parallel=True, error_model="numpy", cache=True)
def _start(address: Any, threads: Any) -> None:
    for _ in prange(threads):
        _attend(address)


def run_by_prange(function: Any, address: int, threads: int, keep_alive: object) -> None:
    """Do as `threads.run_on_threads` does, but for the pass alone: `function` is not called."""
    del function, keep_alive
    set_num_threads(threads)
    _start(address, threads)
