"""The kernels that decode by draws from a sketch of the keys: see `launch.sketch_decode`."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import (
    KEYS,
    SUBPAGES,
    accumulate,
    comb_offset,
    find_place,
    fold,
    max_exponent,
    store_masses,
    store_starts,
    store_zeros,
    sum_before,
    unit_shifts,
)
from ..launches import GATHER_CONFIGS, tuned
from ..masses import PAGE
from ..philox import INTERPRETED
from .reference import LOWER, SMALLEST, UPPER

UPPER_DIGITS, LOWER_DIGITS, MIN_COMPONENT = tl.constexpr(UPPER), tl.constexpr(LOWER), tl.constexpr(SMALLEST)
PAGE_KEYS, IN_INTERPRETER = tl.constexpr(PAGE), tl.constexpr(INTERPRETED)
WARP_CONFIGS = [triton.Config({}, num_warps=warps) for warps in (4, 8)]


@tuned(WARP_CONFIGS, ["BD", "BR", "HALVES"])
@triton.jit
def digits_kernel(
    q_ptr,  # (N, M, E)
    weight_ptr,  # (N, E, r)
    digit_ptr,  # (N, M, 2, HALVES * BR), int8: upper and lower digits
    unit_ptr,  # (N, M), float32
    logit_scale,  # of base-2 logits
    rows,
    features,
    rank,
    columns,  # r, or the components of one half of the table's nibbles
    BD: tl.constexpr,
    BR: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Store the components of a query in two digits: `SketchTable.digits`."""
    i_r = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BR)  # [BR]
    m_r = o_r < columns  # [BR]
    b_x = query_components(q_ptr, weight_ptr, i_r, rows, features, rank, o_r, m_r, BD) * logit_scale  # [BR]
    largest = tl.max(tl.abs(b_x), axis=0)
    if HALVES == 2:
        o_c = columns + o_r  # [BR]
        b_y = (
            query_components(q_ptr, weight_ptr, i_r, rows, features, rank, o_c, m_r, BD) * logit_scale
        )  # [BR]
        largest = tl.maximum(largest, tl.max(tl.abs(b_y), axis=0))
    largest = tl.maximum(largest, MIN_COMPONENT)
    p = digit_ptr + i_r * 2 * HALVES * BR + o_r  # [BR]
    store_digits(p, b_x / largest, HALVES * BR)
    if HALVES == 2:
        store_digits(p + BR, b_y / largest, HALVES * BR)
    tl.store(unit_ptr + i_r, (largest / (UPPER_DIGITS * LOWER_DIGITS)).to(tl.float32))


@triton.jit
def query_components(q_ptr, weight_ptr, i_r, rows, features, rank, o_c, m_c, BD: tl.constexpr):
    """Components o_c [BR] of a query: float64, [BR]. In float64 the order of a sum changes no digit."""
    o_d = tl.arange(0, BD)  # [BD]
    m_d = o_d < features  # [BD]
    m_c = m_c & (o_c < rank)  # [BR]
    b_q = tl.load(q_ptr + i_r * features + o_d, mask=m_d, other=0.0).to(tl.float64)  # [BD]
    p_w = weight_ptr + ((i_r // rows) * features + o_d[:, None]) * rank + o_c[None, :]  # [BD, BR]
    b_w = tl.load(p_w, mask=m_d[:, None] & m_c[None, :], other=0.0).to(tl.float64)  # [BD, BR]
    return tl.sum(b_q[:, None] * b_w, axis=0)


@triton.jit
def store_digits(p, b_x, lower_offset):
    """Store numbers from -1 to 1, float64 [BR]: upper digits at p [BR], lower ones `lower_offset` behind."""
    b_level = tl.floor(b_x * (UPPER_DIGITS * LOWER_DIGITS) + 0.5)  # [BR]
    b_upper = tl.floor((b_level + LOWER_DIGITS // 2) / LOWER_DIGITS)  # [BR]
    tl.store(p, b_upper.to(tl.int8))
    tl.store(p + lower_offset, (b_level - b_upper * LOWER_DIGITS).to(tl.int8))


@triton.jit
def split_nibbles(b_t):
    """The numbers from 0 to 15 in the lower and in the upper four bits of bytes, as int8."""
    if IN_INTERPRETER:
        b_low, b_high = (b_t & 15).to(tl.int8), (b_t >> 4).to(tl.int8)
    else:  # four bytes at a time
        b_low, b_high = tl.inline_asm_elementwise(
            "and.b32 $0, $2, 0x0F0F0F0F; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F;",
            "=r,=r,r",
            [b_t],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return b_low, b_high


@tuned(
    [
        triton.Config({"NP": pages, "LOOP": loop}, num_warps=warps, num_stages=stages, maxnreg=registers)
        for pages, loop, warps, stages, registers in (
            (4, 8, 1, 2, None),
            (4, 4, 1, 2, None),
            (4, 16, 1, 2, 96),
            (2, 16, 1, 4, None),
            (2, 8, 1, 2, 64),
            (4, 16, 4, 4, None),
        )
    ],
    ["BM", "BR", "HALVES", "SIZE"],
)
@triton.jit
def scan_sketch_kernel(
    digit_ptr,  # (N, M, 2, HALVES * BR)
    unit_ptr,  # (N, M)
    table_ptr,  # (N, n, r), of nibbles (N, n, r / 2)
    mass_ptr,  # (N, M, T * PAGE)
    subpage_mass_ptr,  # (N, M, T * SUBPAGES)
    page_mass_ptr,  # (N, M, T)
    page_exponent_ptr,  # (N, M, T)
    stream_key_ptr,  # (N,), int64
    head_group_ptr,  # (N,), int64
    rows,
    n,
    pages,
    columns,
    table_stride_h,
    table_stride_n,
    exact_logit_ptr,  # (N, M, exact_keys)
    exact_keys,
    BM: tl.constexpr,
    BR: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    HALVES: tl.constexpr,  # 1: bytes, 2: nibbles
    SIZE: tl.constexpr,
    NP: tl.constexpr,
    LOOP: tl.constexpr,
):
    """Store the masses of LOOP times NP pages by guessed logits.

    The two digits of a query are two columns of the product.
    """
    tiles = tl.cdiv(rows, BM)
    i_n = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    o_m = i_tile * BM + tl.arange(0, BM)  # [BM]
    m_m = o_m < rows  # [BM]
    o_r = tl.arange(0, BR)  # [BR]
    m_r = o_r < columns  # [BR]
    stream_key, head_group = tl.load(stream_key_ptr + i_n), tl.load(head_group_ptr + i_n)
    WIDE: tl.constexpr = HALVES * BR
    o_x = i_tile * BM * 2 + tl.arange(0, 2 * BM)  # [2 BM], the two digits of a row side by side
    p_x = digit_ptr + (i_n * rows * 2 + o_x[None, :]) * WIDE + o_r[:, None]  # [BR, 2 BM]
    b_x = tl.load(p_x, mask=(o_x < rows * 2)[None, :], other=0.0)  # [BR, 2 BM]
    if HALVES == 2:
        b_y = tl.load(p_x + BR, mask=(o_x < rows * 2)[None, :], other=0.0)  # [BR, 2 BM]
        # A nibble holds 8 more than its level.
        b_shift = 8 * (tl.sum(b_x.to(tl.int32), axis=0) + tl.sum(b_y.to(tl.int32), axis=0))  # [2 BM]
    b_unit = tl.load(unit_ptr + i_n * rows + o_m, mask=m_m, other=0.0)  # [BM]
    p_t = table_ptr + i_n * table_stride_h + o_r[None, :]  # [1, BR]

    for i in range(LOOP):
        i_page = (tl.program_id(1) * LOOP + i) * NP
        o_n = i_page * PAGE + tl.arange(0, NP * PAGE)  # [NP * PAGE]
        m_n = o_n < n  # [NP * PAGE]
        p = p_t + o_n[:, None].to(tl.int64) * table_stride_n  # [NP * PAGE, BR]
        b_t = tl.load(p, mask=m_n[:, None] & m_r[None, :], other=0)  # [NP * PAGE, BR]
        if HALVES == 2:
            b_low, b_high = split_nibbles(b_t)  # [NP * PAGE, BR] each
            b_l = tl.dot(b_low, b_x, out_dtype=tl.int32)  # [NP * PAGE, 2 BM]
            b_l = tl.dot(b_high, b_y, b_l, out_dtype=tl.int32) - b_shift[None, :]
        else:
            b_l = tl.dot(b_t, b_x, out_dtype=tl.int32)  # [NP * PAGE, 2 BM]
        b_upper, b_lower = tl.split(tl.reshape(b_l, [NP * PAGE, BM, 2]))  # [NP * PAGE, BM] each
        b_l = (b_upper * LOWER_DIGITS + b_lower).to(tl.float32) * b_unit[None, :]  # [NP * PAGE, BM]
        m_exact = (o_n < exact_keys)[:, None] & m_m[None, :]  # [NP * PAGE, BM], of the first pages
        p = exact_logit_ptr + (i_n * rows + o_m[None, :]) * exact_keys + o_n[:, None]  # [NP * PAGE, BM]
        b_l = tl.where(m_exact, tl.load(p, mask=m_exact, other=0.0), b_l)
        b_l = tl.where(m_n[:, None] & m_m[None, :], b_l, float("-inf"))
        store_masses(
            b_l,
            mass_ptr,
            subpage_mass_ptr,
            page_mass_ptr,
            page_exponent_ptr,
            stream_key,
            head_group,
            i_n,
            o_m,
            m_m,
            i_page,
            rows,
            pages,
            BM,
            NP,
            PAGE,
            UNITS,
        )


@triton.jit
def binary_exponent(b_whole):
    """The exponents of whole numbers as float64, as by frexp: int64."""
    return (b_whole.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022


@triton.jit
def raise_pages(b_mass, b_exponent, row_exponent, fraction_bits, page_floor, ALL: tl.constexpr):
    """How pages of these masses [k] are raised: see `Proposal`.

    Returns the bits by which they are shifted up, int64, and the mass that each key gets besides, int32.
    """
    b_up, _ = unit_shifts(b_exponent, row_exponent, fraction_bits)  # [k]
    b_whole = b_mass.to(tl.int64)  # [k]
    b_missing = tl.maximum(binary_exponent(b_whole * 0 + page_floor) - binary_exponent(b_whole), 0)  # [k]
    b_missing += ((b_whole << b_missing) < page_floor).to(tl.int64)
    b_up = tl.maximum(b_up, b_missing)
    b_extra = tl.maximum((page_floor >> b_up) // PAGE_KEYS, 1).to(tl.int32)  # [k]
    if ALL:  # every key is drawn with certainty
        b_up = b_up * 0
    return b_up, b_extra


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
    n,
    PAGE: tl.constexpr,
    MASS_MASK: tl.constexpr,
):
    """The raised masses of all keys of k pages of a row, in the row's unit: int64, [k, PAGE]."""
    b_mass = tl.load(page_mass_ptr + b_page, mask=m_page, other=1)  # [k]
    b_exponent = tl.load(page_exponent_ptr + b_page, mask=m_page, other=float("-inf"))  # [k]
    b_up, b_extra = raise_pages(b_mass, b_exponent, row_exponent, fraction_bits, page_floor, False)  # [k]
    o_key = b_page[:, None] * PAGE + tl.arange(0, PAGE)[None, :]  # [k, PAGE]
    m_key = m_page[:, None] & (o_key < n)  # [k, PAGE]
    b_own = tl.load(mass_ptr + o_key, mask=m_key, other=0).to(tl.int32) & MASS_MASK  # [k, PAGE]
    return tl.where(m_key, (b_own + b_extra[:, None]).to(tl.int64) << b_up[:, None], 0)


@triton.jit
def sum_all(b_x):
    """The sum of a block [k, PAGE]."""
    return tl.sum(tl.sum(b_x, axis=1), axis=0)


@tuned(WARP_CONFIGS, ["BP", "BS"])
@triton.jit
def plan_kernel(
    mass_ptr,  # (N M, T * PAGE)
    page_mass_ptr,  # (N M, T)
    page_exponent_ptr,  # (N M, T)
    row_exponent_ptr,  # (N M,), float32
    page_floor_ptr,  # (N M,), int64: the mass that every page gets at least
    certain_mass_ptr,  # (N M,), int64: the mass from which a key is drawn with certainty
    searched_ptr,  # (N M, BS), int32: pages that are searched key by key
    n,
    pages,
    fraction_bits,
    inverse_share,
    num_samples,
    stride,
    BP: tl.constexpr,
    BS: tl.constexpr,
    PAGE: tl.constexpr,
    MASS_MASK: tl.constexpr,
    MIN_BITS: tl.constexpr,
    STEPS: tl.constexpr,
    ALL: tl.constexpr,
):
    """Store a row's exponent, the least mass of its pages, and its certain mass: `Proposal.certain_mass`."""
    i_r = tl.program_id(0).to(tl.int64)
    p_mass, p_page = mass_ptr + i_r * pages * PAGE, page_mass_ptr + i_r * pages
    p_exponent, p_searched = page_exponent_ptr + i_r * pages, searched_ptr + i_r * BS
    o_p = tl.arange(0, BP)  # [BP]
    o_s = tl.arange(0, BS)  # [BS]
    row_exponent = max_exponent(p_exponent, pages, BP)
    b_total = tl.zeros([BP], tl.int64)  # [BP]
    for i in range(0, pages, BP):
        m_p = i + o_p < pages  # [BP]
        b_exponent = tl.load(p_exponent + i + o_p, mask=m_p, other=float("-inf"))  # [BP]
        b_up, b_down = unit_shifts(b_exponent, row_exponent, fraction_bits)  # [BP]
        b_mass = tl.load(p_page + i + o_p, mask=m_p, other=0).to(tl.int64)  # [BP]
        b_total += tl.where(b_down == 0, b_mass << b_up, 0)
    page_floor = tl.maximum((tl.sum(b_total, axis=0).to(tl.float64) / inverse_share).to(tl.int64), 1)
    tl.store(row_exponent_ptr + i_r, row_exponent)
    tl.store(page_floor_ptr + i_r, page_floor)

    # The least exponent such that at most BS pages have it or a larger one.
    below = -1
    bit = 64
    for _ in range(7):
        b_few = tl.zeros([BP], tl.int32)  # [BP]
        for i in range(0, pages, BP):
            b_exponent = tl.load(p_exponent + i + o_p, mask=i + o_p < pages, other=float("-inf"))  # [BP]
            b_few += (b_exponent >= row_exponent - (below + bit)).to(tl.int32)
        below = tl.where(tl.sum(b_few, axis=0) <= BS, below + bit, below)
        bit = bit // 2
    searched_exponent = row_exponent - below

    # Those pages; the mass of all pages, of all others, and of the others that are sampled.
    tl.store(p_searched + o_s, tl.zeros([BS], tl.int32) - 1)
    tl.debug_barrier()
    count = tl.zeros([], tl.int32)
    b_whole, b_rest, b_sampled = (
        tl.zeros([BP], tl.int64),
        tl.zeros([BP], tl.int64),
        tl.zeros([BP], tl.int64),
    )
    for i in range(0, pages, BP):
        m_p = i + o_p < pages  # [BP]
        b_exponent = tl.load(p_exponent + i + o_p, mask=m_p, other=float("-inf"))  # [BP]
        b_mass = tl.load(p_page + i + o_p, mask=m_p, other=1)  # [BP]
        b_up, b_extra = raise_pages(
            b_mass, b_exponent, row_exponent, fraction_bits, page_floor, False
        )  # [BP]
        b_keys = tl.minimum(tl.maximum(n - (i + o_p) * PAGE, 0), PAGE)  # [BP]
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
        n,
        PAGE,
        MASS_MASK,
    )  # [BS, PAGE]
    b_page = o_s * stride  # [BS]
    m_page = b_page < pages  # [BS]
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
        n,
        PAGE,
        MASS_MASK,
    )  # [BS, PAGE]

    certain = tl.ceil(total.to(tl.float64) / num_samples).to(tl.int64)
    some = tl.zeros([], tl.int32)
    for _ in range(STEPS):
        m_own, m_other = b_own >= certain, b_other >= certain  # [BS, PAGE] each
        some = sum_all(m_other.to(tl.int32))
        left = num_samples - sum_all(m_own.to(tl.int32)).to(tl.float64) - some.to(tl.float64) * ratio
        light = total.to(tl.float64) - sum_all(tl.where(m_own, b_own, 0)).to(tl.float64)
        light -= sum_all(tl.where(m_other, b_other, 0)).to(tl.float64) * ratio
        closer = tl.minimum(certain, tl.ceil(light / tl.maximum(left, 0.5)).to(tl.int64))
        certain = tl.maximum(tl.where(left > 0.5, closer, certain), 1)
    certain = tl.where(some > 0, certain + (certain >> 4), certain)
    max_up = tl.maximum(binary_exponent(page_floor) - MIN_BITS + 1, fraction_bits)
    certain = ((certain + (certain * 0 + 1 << max_up) - 1) >> max_up) << max_up
    if ALL:
        certain = certain * 0 + 1
    tl.store(certain_mass_ptr + i_r, certain)


@tuned(
    [triton.Config({"BP": pages}, num_warps=warps) for pages, warps in ((16, 1), (32, 1), (32, 2), (64, 4))],
    ["SIZE"],
)
@triton.jit
def cap_kernel(
    mass_ptr,
    subpage_mass_ptr,  # replaced in pages where a key may be above the cap
    page_mass_ptr,
    page_exponent_ptr,
    page_start_ptr,  # (N M, T), int64: the capped masses of the pages
    row_exponent_ptr,
    page_floor_ptr,
    certain_mass_ptr,
    n,
    pages,
    fraction_bits,
    SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    MASS_MASK: tl.constexpr,
    ALL: tl.constexpr,
    BP: tl.constexpr,
):
    """Store the masses of BP pages, in which no key counts for more than the certain mass."""
    i_r = tl.program_id(0).to(tl.int64)
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)  # [BP]
    m_p = o_p < pages  # [BP]
    b_mass = tl.load(page_mass_ptr + i_r * pages + o_p, mask=m_p, other=1)  # [BP]
    b_exponent = tl.load(page_exponent_ptr + i_r * pages + o_p, mask=m_p, other=float("-inf"))  # [BP]
    row_exponent, page_floor = tl.load(row_exponent_ptr + i_r), tl.load(page_floor_ptr + i_r)
    b_up, b_extra = raise_pages(b_mass, b_exponent, row_exponent, fraction_bits, page_floor, ALL)  # [BP]
    b_cap = key_cap(tl.load(certain_mass_ptr + i_r), b_up)  # [BP]
    b_keys = tl.minimum(tl.maximum(n - o_p * PAGE, 0), PAGE)  # [BP]
    b_raised = b_mass + b_keys * b_extra  # [BP]

    # Only a page whose largest mass may be above the cap is read.
    m_heavy = m_p & (b_extra + UNITS > b_cap)  # [BP]
    o_key = o_p[:, None] * PAGE + tl.arange(0, PAGE)[None, :]  # [BP, PAGE]
    m_key = m_heavy[:, None] & (o_key < n)  # [BP, PAGE]
    p = mass_ptr + i_r * pages * PAGE + o_key  # [BP, PAGE]
    b_own = tl.load(p, mask=m_key, other=0).to(tl.int32) & MASS_MASK  # [BP, PAGE]
    b_own = tl.where(m_key, tl.minimum(b_own + b_extra[:, None], b_cap[:, None]), 0)  # [BP, PAGE]
    b_sub = tl.sum(tl.reshape(b_own, [BP, SUBPAGES, KEYS]), axis=2)  # [BP, SUBPAGES]
    o_sub = (i_r * pages + o_p)[:, None] * SUBPAGES + tl.arange(0, SUBPAGES)[None, :]  # [BP, SUBPAGES]
    tl.store(subpage_mass_ptr + o_sub, b_sub, mask=m_heavy[:, None])
    b_raised = tl.where(m_heavy, tl.sum(b_sub, axis=1), b_raised)
    tl.store(page_start_ptr + i_r * pages + o_p, b_raised.to(tl.int64) << b_up, mask=m_p)


@triton.jit
def key_cap(certain_mass, b_up):
    """The certain mass in the units of pages, int32; 2^30 at most, which no key's mass reaches."""
    return tl.minimum(certain_mass >> b_up, 0x3FFFFFFF).to(tl.int32)


@triton.jit
def step_kernel(
    page_start_ptr,  # (N M, T), int64: the masses of the pages, replaced by the mass of all pages before
    row_mass_ptr,  # (N M,), int64
    certain_mass_ptr,
    step_ptr,  # (N M,), int64: the distance of the points
    point_page_ptr,  # (N M, R, S), int32
    stream_key_ptr,
    head_group_ptr,
    position_ptr,  # (L,) or (N, L), int64
    position_stride,
    purpose,
    first_replicate,
    rows,
    length,
    pages,
    num_samples,
    replicates,
    BP: tl.constexpr,
):
    """Store where pages start, how far apart points are, and in which page each lies."""
    i_r = tl.program_id(0).to(tl.int64)
    i_n = i_r // rows
    o_p = tl.arange(0, BP)  # [BP]
    stream_key, head_group = tl.load(stream_key_ptr + i_n), tl.load(head_group_ptr + i_n)
    position = tl.load(position_ptr + i_n * position_stride + (i_r % rows) % length)
    p_start, p_page = page_start_ptr + i_r * pages, point_page_ptr + i_r * replicates * num_samples
    carry = tl.zeros([], tl.int64)
    for i in range(0, pages, BP):
        m_p = i + o_p < pages  # [BP]
        b_mass = tl.load(p_start + i + o_p, mask=m_p, other=0)  # [BP]
        carry = store_starts(p_start, b_mass, carry, i + o_p, m_p)
    step = tl.maximum(tl.load(certain_mass_ptr + i_r), (carry + num_samples - 1) // num_samples)
    tl.store(row_mass_ptr + i_r, carry)
    tl.store(step_ptr + i_r, step)
    store_zeros(p_page, replicates * num_samples, BP)
    tl.debug_barrier()
    for i_replicate in range(replicates):
        b_u = comb_offset(stream_key, head_group, position, first_replicate + i_replicate, purpose)  # [1]
        b_first_point = first_point(step, b_u)  # [1]
        for i in range(0, pages, BP):
            m_p = (i + o_p < pages) & (i + o_p > 0)  # [BP]
            b_start = tl.load(p_start + i + o_p, mask=m_p, other=0)  # [BP]
            b_first = multiples_before(b_start - b_first_point, step, num_samples)  # [BP]
            p = p_page + i_replicate * num_samples + b_first  # [BP]
            tl.atomic_add(p, 1, mask=m_p & (b_first < num_samples), sem="relaxed")
    tl.debug_barrier()
    for i_replicate in range(replicates):
        accumulate(p_page + i_replicate * num_samples, num_samples, BP)


@triton.jit
def multiples_before(b_x, step, num_samples):
    """How many of 0, step, 2 step, … lie before b_x: int32, as b_x.

    A division of whole numbers would take ten times as long.
    """
    # Rounding leaves this count within one of the right one.
    b_near = tl.maximum((b_x.to(tl.float64) / (b_x * 0 + step).to(tl.float64)).to(tl.int64) - 1, 0)
    b_count = b_near
    for i in tl.static_range(3):
        b_count += ((b_near + i) * step < b_x).to(tl.int64)
    return tl.minimum(b_count, num_samples).to(tl.int32)


@triton.jit
def first_point(step, b_u):
    """The first point of a comb with offset u [1]: int64, [1]."""
    return tl.minimum((b_u * step.to(tl.float64)).to(tl.int64), step - 1)


@triton.jit
def locate_sketch_kernel(
    mass_ptr,
    subpage_mass_ptr,
    page_mass_ptr,
    page_exponent_ptr,
    page_start_ptr,
    row_mass_ptr,
    row_exponent_ptr,
    page_floor_ptr,
    certain_mass_ptr,
    step_ptr,
    point_page_ptr,
    stream_key_ptr,
    head_group_ptr,
    position_ptr,
    position_stride,
    purpose,
    first_replicate,
    order_ptr,  # (N, n), int64: the key at each place
    index_ptr,  # (N, M, R, S), int64
    inclusion_ptr,  # (N, M, R, S), float32: pi; 0 where a point lies past the last key
    rows,
    length,
    n,
    pages,
    num_samples,
    replicates,
    fraction_bits,
    order_stride_h,
    order_stride_n,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    MASS_MASK: tl.constexpr,
    ALL: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BS: tl.constexpr,
):
    """Store the keys at BS points of a row, and the probability with which each is drawn."""
    i_r = tl.program_id(0).to(tl.int64)
    i_replicate = tl.program_id(1)
    i_n = i_r // rows
    step, certain_mass = tl.load(step_ptr + i_r), tl.load(certain_mass_ptr + i_r)
    position = tl.load(position_ptr + i_n * position_stride + (i_r % rows) % length)
    b_u = comb_offset(
        tl.load(stream_key_ptr + i_n),
        tl.load(head_group_ptr + i_n),
        position,
        first_replicate + i_replicate,
        purpose,
    )  # [1]
    b_s = tl.program_id(2) * BS + tl.arange(0, BS)  # [BS]
    o_s = (i_r * replicates + i_replicate) * num_samples + b_s  # [BS]
    m_s = b_s < num_samples  # [BS]
    b_point = b_s.to(tl.int64) * step + first_point(step, b_u)  # [BS]
    m_drawn = m_s & (b_point < tl.load(row_mass_ptr + i_r))  # [BS]
    b_point = tl.where(m_drawn, b_point, 0)
    b_page = tl.load(point_page_ptr + o_s, mask=m_drawn, other=0)  # [BS]
    o_page = i_r * pages + b_page  # [BS]
    b_page_mass, b_exponent = tl.load(page_mass_ptr + o_page), tl.load(page_exponent_ptr + o_page)  # [BS]
    row_exponent, page_floor = tl.load(row_exponent_ptr + i_r), tl.load(page_floor_ptr + i_r)
    b_up, b_extra = raise_pages(b_page_mass, b_exponent, row_exponent, fraction_bits, page_floor, ALL)  # [BS]
    b_cap = key_cap(certain_mass, b_up)  # [BS]
    b_unit = ((b_point - tl.load(page_start_ptr + o_page)) >> b_up).to(tl.int32)  # [BS]

    o_sub = tl.arange(0, SUBPAGES)[None, :]  # [1, SUBPAGES]
    b_sub = tl.load(subpage_mass_ptr + o_page[:, None] * SUBPAGES + o_sub)  # [BS, SUBPAGES]
    b_keys = tl.minimum(tl.maximum(n - b_page[:, None] * PAGE - o_sub * KEYS, 0), KEYS)  # [BS, SUBPAGES]
    # `cap_kernel` has raised the pages in which a key may be above the cap.
    b_sub += tl.where((b_extra + UNITS > b_cap)[:, None], 0, b_keys * b_extra[:, None])
    b_place = find_place(tl.cumsum(b_sub, axis=1), b_unit)  # [BS]
    b_unit -= sum_before(b_sub, b_place)
    o_key = b_place[:, None] * KEYS + tl.arange(0, KEYS)[None, :]  # [BS, KEYS]
    b_mass = tl.load(mass_ptr + o_page[:, None] * PAGE + o_key).to(tl.int32) & MASS_MASK  # [BS, KEYS]
    b_mass = tl.minimum(b_mass + b_extra[:, None], b_cap[:, None])
    b_mass = tl.where(b_page[:, None] * PAGE + o_key < n, b_mass, 0)
    b_key = find_place(tl.cumsum(b_mass, axis=1), b_unit)  # [BS]
    b_own = sum_before(b_mass, b_key + 1) - sum_before(b_mass, b_key)  # [BS]
    b_inclusion = (b_own.to(tl.int64) << b_up).to(tl.float64) / (b_point * 0 + step).to(tl.float64)  # [BS]
    b_index = b_page.to(tl.int64) * PAGE + b_place * KEYS + b_key  # [BS]
    if HAS_ORDER:
        b_index = tl.load(order_ptr + i_n * order_stride_h + b_index * order_stride_n, mask=m_s)  # [BS]
    tl.store(index_ptr + o_s, b_index, mask=m_s)
    tl.store(inclusion_ptr + o_s, tl.where(m_drawn, b_inclusion.to(tl.float32), 0.0), mask=m_s)


@tuned(GATHER_CONFIGS, ["BD", "BV", "SIZE", "CHUNK"])
@triton.jit
def weigh_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E)
    v_ptr,  # (B, Hkv, n, Ev)
    index_ptr,  # (N, M, R, S), int64
    inclusion_ptr,  # (N, M, R, S), float32
    log_weight_ptr,  # (N, M, R, S), float32
    scalar_ptr,  # (N, M, R, chunks, 3), float32: the largest log w, sum of w, sum of a = (1 - pi) w^2
    vector_ptr,  # (N, M, R, chunks, 3, Ev), float32: sums of w v, a v and a v^2
    logit_scale,  # of base-2 logits
    kv_heads,
    rows,
    features,
    width,
    num_samples,
    replicates,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    BD: tl.constexpr,
    BV: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Weigh up to CHUNK draws of a row by their exact logits, and sum their values.

    A draw past the last key adds nothing.
    """
    i_r = tl.program_id(0).to(tl.int64)
    i_chunk = tl.program_id(2)
    i_n = i_r // rows
    o_d = tl.arange(0, BD)  # [BD]
    m_d = o_d < features  # [BD]
    o_v = tl.arange(0, BV)  # [BV]
    m_v = o_v < width  # [BV]
    i_b = i_n // kv_heads
    i_h = i_n % kv_heads
    p_k = k_ptr + i_b * k_stride_b + i_h * k_stride_h + o_d[None, :].to(tl.int64) * k_stride_d  # [1, BD]
    p_v = v_ptr + i_b * v_stride_b + i_h * v_stride_h + o_v[None, :].to(tl.int64) * v_stride_d  # [1, BV]
    i_out = i_r * replicates + tl.program_id(1)
    b_q = tl.load(q_ptr + i_r * features + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]

    largest = tl.full([], float("-inf"), tl.float32)
    sum_w = tl.zeros([], tl.float32)
    sum_a = tl.zeros([], tl.float32)
    b_wv = tl.zeros([FOLD, BV], tl.float32)  # [FOLD, BV]
    b_av = tl.zeros([FOLD, BV], tl.float32)  # [FOLD, BV]
    b_avv = tl.zeros([FOLD, BV], tl.float32)  # [FOLD, BV]
    for i in range(0, CHUNK, BS):
        b_s = i_chunk * CHUNK + i + tl.arange(0, BS)  # [BS]
        m_s = b_s < num_samples  # [BS]
        b_index = tl.load(index_ptr + i_out * num_samples + b_s, mask=m_s, other=0)  # [BS]
        b_pi = tl.load(inclusion_ptr + i_out * num_samples + b_s, mask=m_s, other=0.0)  # [BS]
        m_drawn = b_pi > 0  # [BS]
        p = p_k + b_index[:, None] * k_stride_n  # [BS, BD]
        b_k = tl.load(p, mask=m_drawn[:, None] & m_d[None, :], other=0.0)  # [BS, BD]
        p = p_v + b_index[:, None] * v_stride_n  # [BS, BV]
        b_v = tl.load(p, mask=m_drawn[:, None] & m_v[None, :], other=0.0)  # [BS, BV]
        b_l = tl.sum(b_k.to(tl.float32) * b_q[None, :], axis=1) * logit_scale  # [BS]
        b_lw = tl.where(m_drawn, b_l - tl.log2(tl.where(m_drawn, b_pi, 1.0)), float("-inf"))  # [BS]
        tl.store(log_weight_ptr + i_out * num_samples + b_s, b_lw, mask=m_s)

        new = tl.maximum(largest, tl.max(b_lw, axis=0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(largest - shift)
        largest = new
        b_w = tl.exp2(b_lw - shift)  # [BS]
        b_a = (1.0 - b_pi) * b_w * b_w  # [BS]
        b_v = b_v.to(tl.float32)
        b_x = b_a[:, None] * b_v  # [BS, BV]
        sum_w = sum_w * shrink + tl.sum(b_w, axis=0)
        b_wv = b_wv * shrink + fold(b_w[:, None] * b_v, FOLD)
        sum_a = sum_a * shrink * shrink + tl.sum(b_a, axis=0)
        b_av = b_av * shrink * shrink + fold(b_x, FOLD)
        b_avv = b_avv * shrink * shrink + fold(b_x * b_v, FOLD)
    i_part = i_out * tl.num_programs(2) + i_chunk
    tl.store(scalar_ptr + i_part * 3, largest)
    tl.store(scalar_ptr + i_part * 3 + 1, sum_w)
    tl.store(scalar_ptr + i_part * 3 + 2, sum_a)
    p_vector = vector_ptr + i_part * 3 * width + o_v  # [BV]
    tl.store(p_vector, tl.sum(b_wv, axis=0), mask=m_v)
    tl.store(p_vector + width, tl.sum(b_av, axis=0), mask=m_v)
    tl.store(p_vector + 2 * width, tl.sum(b_avv, axis=0), mask=m_v)


@triton.jit
def combine_kernel(
    scalar_ptr,  # (N M, R, chunks, 3)
    vector_ptr,  # (N M, R, chunks, 3, Ev)
    output_ptr,  # (N M, Ev)
    std_error_ptr,  # (N M, Ev), float32
    log_normaliser_ptr,  # (N M, R), float32
    replicates,
    chunks,
    width,
    BC: tl.constexpr,
    BV: tl.constexpr,
):
    """Store a row's output and standard error, from the parts of its draws."""
    i_r = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)  # [BV]
    m_v = o_v < width  # [BV]
    o_c = tl.arange(0, BC)  # [BC]
    m_c = o_c < chunks  # [BC]
    m_cv = m_c[:, None] & m_v[None, :]  # [BC, BV]
    b_mean = tl.zeros([BV], tl.float32)  # [BV]
    b_variance = tl.zeros([BV], tl.float32)  # [BV]
    for i in range(replicates):
        o_part = (i_r * replicates + i) * chunks + o_c  # [BC]
        b_largest = tl.load(scalar_ptr + o_part * 3, mask=m_c, other=float("-inf"))  # [BC]
        largest = tl.max(b_largest, axis=0)
        b_f = tl.exp2(b_largest - largest)  # [BC]
        sum_w = tl.sum(b_f * tl.load(scalar_ptr + o_part * 3 + 1, mask=m_c, other=0.0), axis=0)
        b_f2 = b_f * b_f  # [BC]
        sum_a = tl.sum(b_f2 * tl.load(scalar_ptr + o_part * 3 + 2, mask=m_c, other=0.0), axis=0)
        p = vector_ptr + o_part[:, None] * 3 * width + o_v[None, :]  # [BC, BV]
        b_wv = tl.sum(b_f[:, None] * tl.load(p, mask=m_cv, other=0.0), axis=0)  # [BV]
        b_av = tl.sum(b_f2[:, None] * tl.load(p + width, mask=m_cv, other=0.0), axis=0)  # [BV]
        b_avv = tl.sum(b_f2[:, None] * tl.load(p + 2 * width, mask=m_cv, other=0.0), axis=0)  # [BV]
        b_o = b_wv / sum_w  # [BV]
        b_mean += b_o
        b_variance += tl.maximum(b_avv - 2 * b_o * b_av + b_o * b_o * sum_a, 0.0) / (sum_w * sum_w)
        tl.store(log_normaliser_ptr + i_r * replicates + i, largest + tl.log2(sum_w))
    tl.store(output_ptr + i_r * width + o_v, b_mean / replicates, mask=m_v)
    tl.store(std_error_ptr + i_r * width + o_v, tl.sqrt(b_variance) / replicates, mask=m_v)
