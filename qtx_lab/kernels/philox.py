"""Counter-based random numbers inside the kernels: see `philox_reference`."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 was set when they were loaded."""


@triton.jit
def words(seed, b_0, b_1, b_2, b_3, ROUNDS: tl.constexpr = 10):
    """Four blocks of random words for a block b_0 of counters and scalars or blocks b_1, b_2, b_3 beside it."""
    b_0 = b_0.to(tl.uint32)
    b_zero = b_0 * 0
    return tl.philox(
        seed,
        b_0,
        (b_zero + b_1).to(tl.uint32),
        (b_zero + b_2).to(tl.uint32),
        (b_zero + b_3).to(tl.uint32),
        ROUNDS,
    )


@triton.jit
def uniform(b_word):
    """A number in [0, 1) from the upper 24 bits of each word."""
    return (b_word >> 8).to(tl.float32) * (2.0**-24)
