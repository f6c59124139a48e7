"""The kernels that plan the draws of a group by guessed logits and locate the keys: see `launch.plan_draws`.

A group is the G query heads of a key head at one of L positions: row g L + l of M.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import (
    KEYS,
    PAGE_KEYS,
    SUBPAGES,
    comb_offset,
    count_visible,
    find_place,
    is_visible,
    max_exponent,
    search_starts,
    sum_before,
    unit_shifts,
    visible_range,
)
from ..launches import tuned
from .reference import SEARCHED_PAGES

MOST_SEARCHED = tl.constexpr(SEARCHED_PAGES)
BLOCK_PAGES = 128
"""Pages whose capped masses are summed at a time."""
PAGES_OF_BLOCK = tl.constexpr(BLOCK_PAGES)


@triton.jit
def binary_exponent(b_whole):
    """The exponents of whole numbers as float64, as by frexp: int64."""
    return (b_whole.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022


@triton.jit
def raise_pages(b_mass, b_exponent, row_exponent, fraction_bits, page_floor, all_drawn):
    """How pages of these masses [k] are raised, and whether each key is drawn with certainty: see `Proposal`.

    Returns the bits by which they are shifted up, int64, and the mass that each key gets besides, int32.
    """
    b_up, _ = unit_shifts(b_exponent, row_exponent, fraction_bits)  # [k]
    b_whole = b_mass.to(tl.int64)  # [k]
    b_missing = tl.maximum(binary_exponent(b_whole * 0 + page_floor) - binary_exponent(b_whole), 0)  # [k]
    b_missing += ((b_whole << b_missing) < page_floor).to(tl.int64)
    b_up = tl.maximum(b_up, b_missing)
    b_extra = tl.maximum((page_floor >> b_up) // PAGE_KEYS, 1).to(tl.int32)  # [k]
    return tl.where(all_drawn, b_up * 0, b_up), b_extra


@triton.jit
def load_raised_masses(
    mass_ptr,
    page_mass_ptr,
    page_exponent_ptr,
    b_page,  # [k]
    m_page,  # [k]
    row_exponent,
    page_floor,
    fraction_bits,
    low,
    high,
    BANDED: tl.constexpr,
    PAGE: tl.constexpr,
    MASS_MASK: tl.constexpr,
):
    """The raised masses of all keys of k pages of a group, in the group's unit: int64, [k, PAGE]."""
    b_mass = tl.load(page_mass_ptr + b_page, mask=m_page, other=1)  # [k]
    b_exponent = tl.load(page_exponent_ptr + b_page, mask=m_page, other=float("-inf"))  # [k]
    b_up, b_extra = raise_pages(b_mass, b_exponent, row_exponent, fraction_bits, page_floor, False)  # [k]
    o_key = b_page[:, None] * PAGE + tl.arange(0, PAGE)[None, :]  # [k, PAGE]
    m_key = m_page[:, None] & is_visible(o_key, low, high, BANDED)  # [k, PAGE]
    b_own = tl.load(mass_ptr + o_key, mask=m_key, other=0).to(tl.int32) & MASS_MASK  # [k, PAGE]
    return tl.where(m_key, (b_own + b_extra[:, None]).to(tl.int64) << b_up[:, None], 0)


@tuned([triton.Config({}, num_warps=warps) for warps in (8, 4, 16)], ["BP", "BS"])
@triton.jit(do_not_specialize=["window_first", "window_last"])  # every token has others
def plan_kernel(
    mass_ptr,  # (N L, T * PAGE)
    subpage_mass_ptr,  # (N L, T * SUBPAGES), replaced in pages where a key may be above the cap
    page_mass_ptr,  # (N L, T)
    page_exponent_ptr,  # (N L, T)
    page_start_ptr,  # (N L, T), int64: the capped masses of all pages before
    row_mass_ptr,  # (N L,), int64: those of all pages; -1 where a sequence has tokens that are not there
    row_exponent_ptr,  # (N L,), float32
    page_floor_ptr,  # (N L,), int64: the mass that every page gets at least
    certain_mass_ptr,  # (N L,), int64: the mass from which a key is drawn with certainty
    searched_ptr,  # (N L, BS), int32: pages that are searched key by key
    finished_ptr,  # (N L,), int32: set to 0 for `weigh_kernel`
    lengths_ptr,  # (B,), where HAS_LENGTHS
    window_first,  # see `Inputs.band`
    window_last,
    kv_heads,
    length,
    n,
    pages,
    fraction_bits,
    inverse_share,  # see `reference.inverse_page_share`
    num_samples,
    BP: tl.constexpr,
    BS: tl.constexpr,
    PAGE: tl.constexpr,
    MASS_MASK: tl.constexpr,  # the bits of a mass when it is read as int32
    MIN_BITS: tl.constexpr,
    GROUP_UNITS: tl.constexpr,  # the largest mass of a key
    STEPS: tl.constexpr,
    BANDED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):
    """Plan the draws of a group: see `Proposal.certain_mass`.

    Stores its exponent, the least mass of a page, the certain mass, and where each page starts in the sum of
    the masses, in which no key counts for more than the certain one. Of T pages those with a visible key are
    read, from the first one on.
    """
    i_u = tl.program_id(0).to(tl.int64)
    _, low, high = visible_range(
        lengths_ptr,
        i_u // length // kv_heads,
        i_u % length,
        length,
        n,
        window_first,
        window_last,
        BANDED,
        HAS_LENGTHS,
    )
    seen_pages = pages
    if BANDED:
        seen_pages = tl.cdiv(high, PAGE)
    p_mass, p_page = mass_ptr + i_u * pages * PAGE, page_mass_ptr + i_u * pages
    p_exponent, p_searched = page_exponent_ptr + i_u * pages, searched_ptr + i_u * BS
    o_p = tl.arange(0, BP)  # [BP]
    o_s = tl.arange(0, BS)  # [BS]
    row_exponent = max_exponent(p_exponent, seen_pages, BP)
    b_total = tl.zeros([BP], tl.int64)  # [BP]
    b_count = tl.zeros([128], tl.int32)  # [128], pages by how far their exponent is below the largest
    for i in range(0, seen_pages, BP):
        m_p = i + o_p < seen_pages  # [BP]
        b_exponent = tl.load(p_exponent + i + o_p, mask=m_p, other=float("-inf"))  # [BP]
        b_up, b_down = unit_shifts(b_exponent, row_exponent, fraction_bits)  # [BP]
        b_mass = tl.load(p_page + i + o_p, mask=m_p, other=0).to(tl.int64)  # [BP]
        b_total += tl.where(b_down == 0, b_mass << b_up, 0)
        b_below = tl.where(m_p, tl.minimum(row_exponent - b_exponent, 127.0), 127.0).to(tl.int32)  # [BP]
        b_count += tl.histogram(b_below, 128)
    share = tl.maximum(
        tl.floor((tl.zeros([], tl.int32) + seen_pages).to(tl.float64) * inverse_share + 0.5), 1.0
    )
    page_floor = tl.maximum((tl.sum(b_total, axis=0).to(tl.float64) / share).to(tl.int64), 1)
    tl.store(row_exponent_ptr + i_u, row_exponent)
    tl.store(page_floor_ptr + i_u, page_floor)
    tl.store(finished_ptr + i_u, 0)

    # The least exponent such that at most BS pages have it or a larger one.
    b_few = (tl.cumsum(b_count, axis=0) <= BS) & (tl.arange(0, 128) < 127)  # [128]
    searched_exponent = row_exponent + 1 - tl.sum(b_few.to(tl.int32), axis=0)

    # Those pages; the mass of all pages, of all others, and of the others that are sampled.
    stride = tl.cdiv(seen_pages, MOST_SEARCHED)
    tl.store(p_searched + o_s, tl.zeros([BS], tl.int32) - 1)
    tl.debug_barrier()
    count = tl.zeros([], tl.int32)
    b_whole, b_rest, b_sampled = (
        tl.zeros([BP], tl.int64),
        tl.zeros([BP], tl.int64),
        tl.zeros([BP], tl.int64),
    )
    for i in range(0, seen_pages, BP):
        m_p = i + o_p < seen_pages  # [BP]
        b_exponent = tl.load(p_exponent + i + o_p, mask=m_p, other=float("-inf"))  # [BP]
        b_mass = tl.load(p_page + i + o_p, mask=m_p, other=1)  # [BP]
        b_up, b_extra = raise_pages(
            b_mass, b_exponent, row_exponent, fraction_bits, page_floor, False
        )  # [BP]
        b_keys = count_visible((i + o_p) * PAGE, PAGE, low, high, BANDED)  # [BP]
        b_raised = tl.where(m_p, (b_mass + b_keys * b_extra).to(tl.int64) << b_up, 0)  # [BP]
        m_searched = m_p & (b_exponent >= searched_exponent)  # [BP]
        b_whole += b_raised
        b_rest += tl.where(m_searched, 0, b_raised)
        b_sampled += tl.where(m_searched | ((i + o_p) % stride != 0), 0, b_raised)
        b_one = m_searched.to(tl.int32)  # [BP]
        tl.store(p_searched + count + tl.cumsum(b_one, axis=0) - b_one, i + o_p, mask=m_searched)
        count += tl.sum(b_one, axis=0)
    tl.debug_barrier()
    total, rest, sampled = tl.sum(b_whole, axis=0), tl.sum(b_rest, axis=0), tl.sum(b_sampled, axis=0)
    ratio = tl.where(sampled > 0, rest.to(tl.float64) / tl.maximum(sampled, 1).to(tl.float64), 0.0)
    b_page = tl.load(p_searched + o_s)  # [BS]
    b_own = load_raised_masses(
        p_mass,
        p_page,
        p_exponent,
        b_page,
        b_page >= 0,
        row_exponent,
        page_floor,
        fraction_bits,
        low,
        high,
        BANDED,
        PAGE,
        MASS_MASK,
    )  # [BS, PAGE]
    b_page = o_s * stride  # [BS]
    m_page = b_page < seen_pages  # [BS]
    m_page = m_page & (tl.load(p_exponent + b_page, mask=m_page, other=float("inf")) < searched_exponent)
    b_other = load_raised_masses(
        p_mass,
        p_page,
        p_exponent,
        b_page,
        m_page,
        row_exponent,
        page_floor,
        fraction_bits,
        low,
        high,
        BANDED,
        PAGE,
        MASS_MASK,
    )  # [BS, PAGE]
    b_both = tl.reshape(tl.join(b_own, b_other), [BS * PAGE, 2])  # [BS * PAGE, 2]

    certain = tl.ceil(total.to(tl.float64) / num_samples).to(tl.int64)
    some = tl.zeros([], tl.int32)
    for _ in range(STEPS):
        m_both = b_both >= certain  # [BS * PAGE, 2]
        own, some = tl.split(tl.sum(m_both.to(tl.int32), axis=0))
        own_mass, other_mass = tl.split(tl.sum(tl.where(m_both, b_both, 0), axis=0))
        left = num_samples - own.to(tl.float64) - some.to(tl.float64) * ratio
        light = total.to(tl.float64) - own_mass.to(tl.float64) - other_mass.to(tl.float64) * ratio
        closer = tl.minimum(certain, tl.ceil(light / tl.maximum(left, 0.5)).to(tl.int64))
        certain = tl.maximum(tl.where(left > 0.5, closer, certain), 1)
    certain = tl.where(some > 0, certain + (certain >> 4), certain)
    max_up = tl.maximum(binary_exponent(page_floor) - MIN_BITS + 1, fraction_bits)
    certain = ((certain + (certain * 0 + 1 << max_up) - 1) >> max_up) << max_up
    all_drawn = high - low <= num_samples
    certain = tl.where(all_drawn, certain * 0 + 1, certain)
    tl.store(certain_mass_ptr + i_u, certain)

    o_b = tl.arange(0, PAGES_OF_BLOCK)  # [BB]
    carry = tl.zeros([], tl.int64)
    if BANDED:  # where no key is seen, `locate_sketch_kernel` searches there
        tl.store(page_start_ptr + i_u * pages, carry, mask=high == 0)
    for i in range(0, seen_pages, PAGES_OF_BLOCK):
        m_p = i + o_b < seen_pages  # [BB]
        b_mass = tl.load(p_page + i + o_b, mask=m_p, other=1)  # [BB]
        b_exponent = tl.load(p_exponent + i + o_b, mask=m_p, other=float("-inf"))  # [BB]
        b_up, b_extra = raise_pages(
            b_mass, b_exponent, row_exponent, fraction_bits, page_floor, all_drawn
        )  # [BB]
        b_cap = key_cap(certain, b_up)  # [BB]
        b_keys = count_visible((i + o_b) * PAGE, PAGE, low, high, BANDED)  # [BB]
        b_raised = b_mass + b_keys * b_extra  # [BB]
        m_heavy = m_p & (b_extra + GROUP_UNITS > b_cap)  # [BB], where a key may be above the cap
        if tl.sum(m_heavy.to(tl.int32), axis=0) > 0:
            o_key = (i + o_b)[:, None] * PAGE + tl.arange(0, PAGE)[None, :]  # [BB, PAGE]
            m_key = m_heavy[:, None] & is_visible(o_key, low, high, BANDED)  # [BB, PAGE]
            b_capped = tl.load(p_mass + o_key, mask=m_key, other=0).to(tl.int32) & MASS_MASK  # [BB, PAGE]
            b_capped = tl.where(
                m_key, tl.minimum(b_capped + b_extra[:, None], b_cap[:, None]), 0
            )  # [BB, PAGE]
            b_sub = tl.sum(tl.reshape(b_capped, [PAGES_OF_BLOCK, SUBPAGES, KEYS]), axis=2)  # [BB, SUBPAGES]
            o_sub = (i_u * pages + i + o_b)[:, None] * SUBPAGES + tl.arange(0, SUBPAGES)[None, :]
            tl.store(subpage_mass_ptr + o_sub, b_sub, mask=m_heavy[:, None])
            b_raised = tl.where(m_heavy, tl.sum(b_sub, axis=1), b_raised)
        b_raised = tl.where(m_p, b_raised.to(tl.int64) << b_up, 0)  # [BB]
        p_start = page_start_ptr + i_u * pages + i + o_b  # [BB]
        tl.store(p_start, carry + tl.cumsum(b_raised, axis=0) - b_raised, mask=m_p)
        carry += tl.sum(b_raised, axis=0)
    if HAS_LENGTHS:  # the row is NaN
        carry = tl.where(tl.load(lengths_ptr + i_u // length // kv_heads) > n, carry * 0 - 1, carry)
    tl.store(row_mass_ptr + i_u, carry)


@triton.jit
def key_cap(certain_mass, b_up):
    """The certain mass in the units of pages, int32; 2^30 at most, which no key's mass reaches."""
    return tl.minimum(certain_mass >> b_up, 0x3FFFFFFF).to(tl.int32)


@triton.jit
def first_point(step, b_u):
    """The first point of a comb with offset u [1]: int64, [1]."""
    return tl.minimum((b_u * step.to(tl.float64)).to(tl.int64), step - 1)


@triton.jit(do_not_specialize=["window_first", "window_last"])  # every token has others
def locate_sketch_kernel(
    order_ptr,  # (N, n), int64: the key at each place
    mass_ptr,
    subpage_mass_ptr,
    page_mass_ptr,
    page_exponent_ptr,
    page_start_ptr,
    row_mass_ptr,
    row_exponent_ptr,
    page_floor_ptr,
    certain_mass_ptr,
    stream_key_ptr,
    head_group_ptr,
    position_ptr,  # (L,) or (N, L), int64
    position_stride,
    purpose,
    first_replicate,
    index_ptr,  # (N L, R, S), int64
    inclusion_ptr,  # (N L, R, S), float32: pi; 0 where a point lies past the last key
    lengths_ptr,  # (B,), where HAS_LENGTHS
    window_first,  # see `Inputs.band`
    window_last,
    kv_heads,
    length,
    n,
    pages,
    num_samples,
    replicates,
    fraction_bits,
    order_stride_h,
    order_stride_n,
    HAS_ORDER: tl.constexpr,
    PAGE: tl.constexpr,
    LEVELS: tl.constexpr,  # 8^LEVELS pages are all or more
    MASS_MASK: tl.constexpr,
    GROUP_UNITS: tl.constexpr,
    BANDED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BS: tl.constexpr,
):
    """Store the keys at BS points of a group, and the probability with which each is drawn."""
    i_u = tl.program_id(0).to(tl.int64)
    i_replicate = tl.program_id(1)
    i_n, i_l = i_u // length, i_u % length
    first_page, low, high = visible_range(
        lengths_ptr, i_n // kv_heads, i_l, length, n, window_first, window_last, BANDED, HAS_LENGTHS
    )
    seen_pages = pages
    if BANDED:
        seen_pages = tl.maximum(tl.cdiv(high, PAGE), 1)
    i_out = (i_u * replicates + i_replicate) * num_samples
    certain_mass, row_mass = tl.load(certain_mass_ptr + i_u), tl.load(row_mass_ptr + i_u)
    step = tl.maximum(certain_mass, (row_mass + num_samples - 1) // num_samples)
    stream_key, head_group = tl.load(stream_key_ptr + i_n), tl.load(head_group_ptr + i_n)
    position = tl.load(position_ptr + i_n * position_stride + i_l)
    b_u = comb_offset(stream_key, head_group, position, first_replicate + i_replicate, purpose)  # [1]
    b_s = tl.program_id(2) * BS + tl.arange(0, BS)  # [BS]
    m_s = b_s < num_samples  # [BS]
    b_point = b_s.to(tl.int64) * step + first_point(step, b_u)  # [BS]
    m_drawn = m_s & (b_point < row_mass)  # [BS]
    b_point = tl.where(m_drawn, b_point, 0)
    p_start = page_start_ptr + i_u * pages
    b_page, b_rest = search_starts(p_start, b_s * 0, b_point, seen_pages, LEVELS)  # [BS] each
    o_page = i_u * pages + b_page  # [BS]
    b_page_mass, b_exponent = tl.load(page_mass_ptr + o_page), tl.load(page_exponent_ptr + o_page)  # [BS]
    row_exponent, page_floor = tl.load(row_exponent_ptr + i_u), tl.load(page_floor_ptr + i_u)
    all_drawn = high - low <= num_samples
    b_up, b_extra = raise_pages(b_page_mass, b_exponent, row_exponent, fraction_bits, page_floor, all_drawn)
    b_cap = key_cap(certain_mass, b_up)  # [BS]
    b_unit = (b_rest >> b_up).to(tl.int32)  # [BS]
    o_sub = tl.arange(0, SUBPAGES)[None, :]  # [1, SUBPAGES]
    b_sub = tl.load(subpage_mass_ptr + o_page[:, None] * SUBPAGES + o_sub)  # [BS, SUBPAGES]
    b_keys = count_visible(b_page[:, None] * PAGE + o_sub * KEYS, KEYS, low, high, BANDED)  # [BS, SUBPAGES]
    # `plan_kernel` has raised the pages in which a key may be above the cap.
    b_sub += tl.where((b_extra + GROUP_UNITS > b_cap)[:, None], 0, b_keys * b_extra[:, None])
    b_place = find_place(tl.cumsum(b_sub, axis=1), b_unit)  # [BS]
    b_unit -= sum_before(b_sub, b_place)
    o_key = b_place[:, None] * KEYS + tl.arange(0, KEYS)[None, :]  # [BS, KEYS]
    b_mass = tl.load(mass_ptr + o_page[:, None] * PAGE + o_key).to(tl.int32) & MASS_MASK  # [BS, KEYS]
    b_mass = tl.minimum(b_mass + b_extra[:, None], b_cap[:, None])
    m_key = is_visible(b_page[:, None] * PAGE + o_key, low, high, BANDED)  # [BS, KEYS]
    b_mass = tl.where(m_key, b_mass, 0)
    b_key = find_place(tl.cumsum(b_mass, axis=1), b_unit)  # [BS]
    b_own = sum_before(b_mass, b_key + 1) - sum_before(b_mass, b_key)  # [BS]
    b_pi = (b_own.to(tl.int64) << b_up).to(tl.float64) / (b_point * 0 + step).to(tl.float64)  # [BS]
    b_index = b_page.to(tl.int64) * PAGE + b_place * KEYS + b_key  # [BS]
    if BANDED:
        b_index = tl.where(high > 0, b_index + first_page * PAGE, 0)
    if HAS_ORDER:
        b_index = tl.load(order_ptr + i_n * order_stride_h + b_index * order_stride_n, mask=m_s, other=0)
    tl.store(index_ptr + i_out + b_s, b_index, mask=m_s)
    tl.store(inclusion_ptr + i_out + b_s, tl.where(m_drawn, b_pi.to(tl.float32), 0.0), mask=m_s)
