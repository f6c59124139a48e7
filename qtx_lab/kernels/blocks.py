"""What the Triton kernels of several operations share: masses, combs along them, and sums of blocks.

See `masses` for the words. Prefixes in kernels: i_ an index, o_ offsets, p_ pointers, b_ a block, m_ a mask;
the shape of each block stands behind it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

from ..streams import Purpose
from .inputs import LOG2_E
from .masses import PAGE, ROUNDING_ROUNDS, SUBPAGE
from .philox import uniform24, uniform53, words

MASS_ROUNDING = tl.constexpr(int(Purpose.MASS_ROUNDING))
FEW_ROUNDS = tl.constexpr(ROUNDING_ROUNDS)
TO_BASE_2 = tl.constexpr(LOG2_E)
KEYS = tl.constexpr(SUBPAGE)
SUBPAGES = tl.constexpr(PAGE // SUBPAGE)
PAGE_KEYS = tl.constexpr(PAGE)


@triton.jit
def store_masses(
    b_l,  # [NP * PAGE, BM], base-2 logits, -inf where masked
    mass_ptr,
    subpage_mass_ptr,
    page_mass_ptr,
    page_exponent_ptr,
    stream_key,
    head_group,
    i_n,
    o_m,  # [BM]
    m_m,  # [BM]
    i_page,
    rows,
    pages,
    BM: tl.constexpr,
    NP: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Store the masses of NP pages, rounded to whole units, with their sums and exponents."""
    b_l = tl.reshape(b_l, [NP, PAGE, BM])
    b_exponent = tl.ceil(tl.max(b_l, axis=1))  # [NP, BM]
    b_shift = tl.where(b_exponent == float("-inf"), 0.0, b_exponent)  # [NP, BM]
    b_x = tl.exp2(b_l - b_shift[:, None, :]) * UNITS  # [NP, PAGE, BM]

    # One counter for four keys; the rows of a head share their rounding.
    b_quad = i_page * (PAGE // 4) + tl.arange(0, NP * PAGE // 4)  # [NP * PAGE / 4]
    b_w0, b_w1, b_w2, b_w3 = words(stream_key, b_quad, 0, head_group, MASS_ROUNDING, FEW_ROUNDS)
    b_w = tl.join(tl.join(b_w0, b_w2), tl.join(b_w1, b_w3))  # [NP * PAGE / 4, 2, 2]
    b_u = uniform24(tl.reshape(b_w, [NP, PAGE, 1]))  # [NP, PAGE, 1]
    b_mass = (b_x + b_u).to(tl.int32)  # [NP, PAGE, BM]

    o_page = i_page + tl.arange(0, NP)  # [NP]
    o_row = i_n.to(tl.int64) * rows + o_m  # [BM]
    o_at = o_row[None, :] * pages + o_page[:, None]  # [NP, BM]
    m_at = m_m[None, :] & (o_page[:, None] < pages)  # [NP, BM]
    b_sub = tl.sum(tl.reshape(b_mass, [NP, SUBPAGES, KEYS, BM]), axis=2)  # [NP, SUBPAGES, BM]
    o_sub = o_at[:, None, :] * SUBPAGES + tl.arange(0, SUBPAGES)[None, :, None]  # [NP, SUBPAGES, BM]
    tl.store(subpage_mass_ptr + o_sub, b_sub, mask=m_at[:, None, :])
    tl.store(page_mass_ptr + o_at, tl.sum(b_sub, axis=1), mask=m_at)
    tl.store(page_exponent_ptr + o_at, b_exponent, mask=m_at)
    o_key = o_at[:, None, :] * PAGE + tl.arange(0, PAGE)[None, :, None]  # [NP, PAGE, BM]
    tl.store(mass_ptr + o_key, b_mass.to(mass_ptr.dtype.element_ty), mask=m_at[:, None, :])


@triton.jit
def capped(b_l, softcap):
    """softcap tanh(b_l / softcap), as b_l.

    tanh x = 1 - 2 / (e^2x + 1), and by its series near 0, where little of that difference would be left.
    """
    b_x = b_l / softcap
    b_y = b_x * b_x
    b_series = 1 + b_y * (-1 / 3 + b_y * (2 / 15 + b_y * (-17 / 315 + b_y * (62 / 2835))))
    b_tanh = 1 - 2 / (tl.exp2(b_x * (2 * TO_BASE_2)) + 1)
    return softcap * tl.where(tl.abs(b_x) < 0.25, b_x * b_series, b_tanh)


@triton.jit
def find_blocks(block_table_ptr, i_b, b_token, m_token, blocks, block_size, columns):
    """The blocks that hold tokens [k] of a sequence and their places there, int64; whether they are there.

    Each is [k]. A token is there if the table has a block for it which exists.
    """
    b_column = b_token // block_size  # [k]
    p = block_table_ptr + i_b * columns + b_column  # [k]
    b_block = tl.load(p, mask=m_token & (b_column < columns), other=-1).to(tl.int64)  # [k]
    m_known = (b_block >= 0) & (b_block < blocks)  # [k]
    return tl.where(m_known, b_block, 0), (b_token % block_size).to(tl.int64), m_known


@triton.jit
def visible_range(
    lengths_ptr,
    i_b,
    i_l,
    length,
    n,
    window_first,
    window_last,
    BANDED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):
    """The page with the first key that query i_l of a head sees, that key, and the one behind the last.

    Both keys are counted from the first one of the page, and are 0 where the query sees none. See
    `Inputs.visible_range`.
    """
    first_page, low, high = 0, 0, n
    if BANDED:
        own = i_l.to(tl.int32)
        if HAS_LENGTHS:
            own += tl.load(lengths_ptr + i_b).to(tl.int32) - length
        start = tl.maximum(window_first + own, 0)
        end = tl.minimum(window_last + own + 1, n)
        first_page = tl.where(start < end, start // PAGE_KEYS, 0)
        low = tl.where(start < end, start - first_page * PAGE_KEYS, 0)
        high = tl.where(start < end, end - first_page * PAGE_KEYS, 0)
    return first_page, low, high


@triton.jit
def is_visible(o_key, low, high, BANDED: tl.constexpr):
    """Whether keys are from low on and before high, where low is 0 unless BANDED."""
    m_key = o_key < high
    if BANDED:
        m_key = m_key & (o_key >= low)
    return m_key


@triton.jit
def count_visible(o_first, COUNT: tl.constexpr, low, high, BANDED: tl.constexpr):
    """How many of the COUNT keys from o_first on are visible."""
    b_keys = tl.minimum(tl.maximum(high - o_first, 0), COUNT)
    if BANDED:
        b_keys -= tl.minimum(tl.maximum(low - o_first, 0), COUNT)
    return b_keys


@triton.jit
def unit_shifts(b_exponent, row_exponent, fraction_bits):
    """Bits by which the masses of pages are shifted up and down to be in the row's unit.

    Two blocks of int64 of the shape of b_exponent.
    """
    b_visible = b_exponent > float("-inf")
    b_below = tl.where(b_visible, row_exponent - tl.where(b_visible, b_exponent, 0.0), 100.0)
    b_below = tl.minimum(b_below, 100.0).to(tl.int64)
    return tl.maximum(fraction_bits - b_below, 0), tl.maximum(b_below - fraction_bits, 0)


@triton.jit
def max_exponent(page_exponent_ptr, pages, BP: tl.constexpr):
    """The largest exponent of a row's pages."""
    o_p = tl.arange(0, BP)  # [BP]
    b_max = tl.full([BP], float("-inf"), tl.float32)  # [BP]
    for i in range(0, pages, BP):
        b_max = tl.maximum(
            b_max, tl.load(page_exponent_ptr + i + o_p, mask=i + o_p < pages, other=float("-inf"))
        )
    return tl.max(b_max, axis=0)


@triton.jit
def comb_offset(stream_key, head_group, position, replicate, purpose):
    """Where the comb of a row starts, in units of the distance of its points: float64, [1]."""
    b_zero = tl.zeros([1], tl.int32)  # [1]
    b_w0, b_w1, _, _ = words(stream_key, b_zero, position, head_group, (replicate << 8) | purpose)
    return uniform53(b_w0, b_w1)


@triton.jit
def search_starts(start_ptr, b_at, b_rest, count, LEVELS: tl.constexpr):
    """The last of 8^LEVELS starts, int64, from place b_at [BS] on, that are b_rest [BS] or less.

    The first one is. Returns their places and how far b_rest is behind them. Eight starts are loaded at a
    time, so that few loads wait for each other.
    """
    b_start = tl.load(start_ptr + b_at)  # [BS]
    for i in tl.static_range(LEVELS):
        step = 8 ** (LEVELS - 1 - i)
        o_s = b_at[:, None] + step * tl.arange(0, 8)[None, :]  # [BS, 8]
        b_s = tl.load(start_ptr + o_s, mask=o_s < count, other=0x7FFFFFFFFFFFFFFF)  # [BS, 8]
        m_passed = b_s <= b_rest[:, None]  # [BS, 8]
        b_at += step * (tl.sum(m_passed.to(tl.int32), axis=1) - 1)
        b_start = tl.max(tl.where(m_passed, b_s, 0), axis=1)
    return b_at, b_rest - b_start


@triton.jit
def find_place(b_sums, b_unit):
    """How many of the running sums [BS, k] are at most a unit [BS], and k - 1 at most: int32, [BS]."""
    b_place = tl.sum((b_sums <= b_unit[:, None]).to(tl.int32), axis=1)  # [BS]
    return tl.minimum(b_place, b_sums.shape[1] - 1)


@triton.jit
def sum_before(b_mass, b_place):
    """The sum of the masses [BS, k] before a place [BS]: [BS]."""
    o_k = tl.arange(0, b_mass.shape[1])  # [k]
    return tl.sum(tl.where(o_k[None, :] < b_place[:, None], b_mass, 0), axis=1)


@triton.jit
def fold(b_x, FOLD: tl.constexpr):
    """The sums of every FOLD-th line of b_x [BS, k]: [FOLD, k].

    Each thread sums the lines that it holds, and threads exchange nothing.
    """
    return tl.sum(tl.reshape(b_x, [b_x.shape[0] // FOLD, FOLD, b_x.shape[1]]), axis=0)
