"""What kernels of several operations share: masses in fixed point, combs along them, and sums of blocks."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

from .inputs import LOG2_E
from .masses import GROUP, PAGE
from .philox import uniform, words
from .philox_reference import OFFSETS, ROUNDING, ROUNDING_ROUNDS

STREAM_OFFSETS, STREAM_ROUNDING, FEW_ROUNDS = (
    tl.constexpr(OFFSETS),
    tl.constexpr(ROUNDING),
    tl.constexpr(ROUNDING_ROUNDS),
)


LOG2, KEYS, GROUPS = tl.constexpr(LOG2_E), tl.constexpr(GROUP), tl.constexpr(PAGE // GROUP)


@triton.jit
def store_masses(
    b_l,  # [NP * PAGE, BM], base 2, -inf where masked
    mass_ptr,
    part_ptr,
    sum_ptr,
    top_ptr,
    seed,
    i_n,
    o_m,
    m_m,
    i_page,
    rows,
    pages,
    BM: tl.constexpr,
    NP: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Round the masses of NP pages to whole units and store them, with their sums and exponents."""
    b_l = tl.reshape(b_l, [NP, PAGE, BM])
    b_top = tl.ceil(tl.max(b_l, axis=1))  # [NP, BM]
    b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_x = tl.exp2(b_l - b_shift[:, None, :]) * UNITS  # [NP, PAGE, BM]

    # One counter for four keys; the rows of a group share their rounding.
    b_quarter = i_page * (PAGE // 4) + tl.arange(0, NP * PAGE // 4)
    b_w0, b_w1, b_w2, b_w3 = words(seed, b_quarter, i_n, 0, STREAM_ROUNDING, FEW_ROUNDS)
    b_w = tl.join(tl.join(b_w0, b_w2), tl.join(b_w1, b_w3))  # [NP * PAGE / 4, 2, 2]
    b_u = uniform(tl.reshape(b_w, [NP, PAGE, 1]))
    b_mass = (b_x + b_u).to(tl.int32)  # [NP, PAGE, BM]

    o_page = i_page + tl.arange(0, NP)
    o_row = i_n.to(tl.int64) * rows + o_m
    o_at = o_row[None, :] * pages + o_page[:, None]  # [NP, BM]
    m_at = m_m[None, :] & (o_page[:, None] < pages)
    b_part = tl.sum(tl.reshape(b_mass, [NP, GROUPS, KEYS, BM]), axis=2)  # [NP, GROUPS, BM]
    o_part = o_at[:, None, :] * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    tl.store(part_ptr + o_part, b_part, mask=m_at[:, None, :])
    tl.store(sum_ptr + o_at, tl.sum(b_part, axis=1), mask=m_at)
    tl.store(top_ptr + o_at, b_top, mask=m_at)
    o_key = o_at[:, None, :] * PAGE + tl.arange(0, PAGE)[None, :, None]
    tl.store(mass_ptr + o_key, b_mass.to(mass_ptr.dtype.element_ty), mask=m_at[:, None, :])


@triton.jit
def shifts(b_top, highest, fine):
    """Bits by which a page's units are shifted up and down to the row's common ones, int64."""
    b_known = b_top > float("-inf")
    b_apart = tl.where(b_known, highest - tl.where(b_known, b_top, 0.0), 100.0)
    b_apart = tl.minimum(b_apart, 100.0).to(tl.int64)
    return tl.maximum(fine - b_apart, 0), tl.maximum(b_apart - fine, 0)


@triton.jit
def highest_of(top_ptr, pages, BP: tl.constexpr):
    """The largest exponent of a row's pages."""
    o_p = tl.arange(0, BP)
    b_high = tl.full([BP], float("-inf"), tl.float32)
    for i in range(0, pages, BP):
        b_top = tl.load(top_ptr + i + o_p, mask=i + o_p < pages, other=float("-inf"))
        b_high = tl.maximum(b_high, b_top)
    return tl.max(b_high, axis=0)


@triton.jit
def comb_offset(seed, i_replicate, i_l, i_n):
    """Where a comb starts, in parts of the distance of its points: float64, [1]."""
    b_word, _, _, _ = words(seed, tl.zeros([1], tl.int32) + i_replicate, i_l, i_n, STREAM_OFFSETS)
    return b_word.to(tl.float64) * (2.0**-32)


@triton.jit
def sum_up(start_ptr, b_w, carry, o_p, m_p):
    """Store where pages of these masses start, behind what is carried, and return what is carried on."""
    tl.store(start_ptr + o_p, carry + tl.cumsum(b_w, axis=0) - b_w, mask=m_p)
    return carry + tl.sum(b_w, axis=0)


@triton.jit
def clear(page_ptr, size, BP: tl.constexpr):
    """Zeros, before pages are counted."""
    o_s = tl.arange(0, BP)
    for i in range(0, size, BP):
        tl.store(page_ptr + i + o_s, tl.zeros([BP], tl.int32), mask=i + o_s < size)


@triton.jit
def count_up(page_ptr, num_samples, BP: tl.constexpr):
    """From how many pages start between a point and the next, the page of each point."""
    o_s = tl.arange(0, BP)
    carry = tl.zeros([], tl.int32)
    for i in range(0, num_samples, BP):
        m_s = i + o_s < num_samples
        b_new = tl.load(page_ptr + i + o_s, mask=m_s, other=0)
        tl.store(page_ptr + i + o_s, carry + tl.cumsum(b_new, axis=0), mask=m_s)
        carry += tl.sum(b_new, axis=0)


@triton.jit
def place_of(b_run, b_unit):
    """How many of the sums [BS, k] that run along are not above a unit [BS], at most k - 1: int32."""
    return tl.minimum(tl.sum((b_run <= b_unit[:, None]).to(tl.int32), axis=1), b_run.shape[1] - 1)


@triton.jit
def before(b_mass, b_place):
    """The sum of the masses [BS, k] before a place [BS]."""
    return tl.sum(tl.where(tl.arange(0, b_mass.shape[1])[None, :] < b_place[:, None], b_mass, 0), axis=1)


@triton.jit
def folded(b_x, FOLD: tl.constexpr):
    """The sum of every FOLD-th line of b_x [BS, k], [FOLD, k]: by each thread of its own lines, as they lie."""
    return tl.sum(tl.reshape(b_x, [b_x.shape[0] // FOLD, FOLD, b_x.shape[1]]), axis=0)
