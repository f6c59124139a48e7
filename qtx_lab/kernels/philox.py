"""The random numbers of `qtx_lab.streams` inside the kernels, bit by bit."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter on the CPU: TRITON_INTERPRET=1 was set when triton loaded."""


@triton.jit
def words(stream_key, b_0, b_1, b_2, b_3, ROUNDS: tl.constexpr = 10):
    """Four blocks of random words, uint32, as by `streams.philox`.

    The first word b_0 of the counters is a block; the others are scalars or blocks of its shape.
    """
    b_0 = b_0.to(tl.uint32)
    b_zero = b_0 * 0
    return tl.philox(
        stream_key,
        b_0,
        (b_zero + b_1).to(tl.uint32),
        (b_zero + b_2).to(tl.uint32),
        (b_zero + b_3).to(tl.uint32),
        ROUNDS,
    )


@triton.jit
def uniform24(b_word):
    """A number in [0, 1) from the upper 24 bits of each word, float32."""
    return (b_word >> 8).to(tl.float32) * (2.0**-24)


@triton.jit
def uniform53(b_high, b_low):
    """A number in [0, 1) of 53 bits from two words, float64, as by `streams.uniform`."""
    b_bits = ((b_high >> 5).to(tl.int64) << 26) | (b_low >> 6).to(tl.int64)
    return b_bits.to(tl.float64) * (2.0**-53)
