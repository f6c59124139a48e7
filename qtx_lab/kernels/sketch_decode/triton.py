"""The kernels that decode by draws from a sketch of the keys: see `launch.sketch_decode`.

A group is the G query heads of a key head at one of L positions: row g L + l of M.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import (
    KEYS,
    SUBPAGES,
    capped,
    comb_offset,
    find_place,
    max_exponent,
    search_starts,
    sum_before,
    unit_shifts,
)
from ..launches import tuned
from ..masses import PAGE
from ..philox import INTERPRETED
from .reference import LOWER, SMALLEST, STEPS_PER_BIT, UPPER

UPPER_DIGITS, LOWER_DIGITS, MIN_COMPONENT = tl.constexpr(UPPER), tl.constexpr(LOWER), tl.constexpr(SMALLEST)
PAGE_KEYS, IN_INTERPRETER = tl.constexpr(PAGE), tl.constexpr(INTERPRETED)
BLOCK_PAGES = 128
"""Pages whose capped masses are summed at a time."""
PAGES_OF_BLOCK = tl.constexpr(BLOCK_PAGES)
NORMALISER_STEPS = tl.constexpr(STEPS_PER_BIT)
MAGIC, MAGIC_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)
"""1.5 * 2^23, whose last bit counts ones, and the same as int32."""


@tuned([triton.Config({}, num_warps=warps) for warps in (4, 8)], ["BD", "BR", "HALVES"])
@triton.jit
def prepare_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E)
    weight_ptr,  # (N, E, r)
    centre_ptr,  # (N, E), float32
    order_ptr,  # (N, n), int64: the key at each place
    digit_ptr,  # (N L, G, 2, HALVES * BR), int8: upper and lower digits
    unit_ptr,  # (N L, G), float32
    exact_logit_ptr,  # (N L, G, num_exact), float32
    largest_ptr,  # (N L, G, chunks), float32
    total_ptr,  # (N L, G, chunks), float32
    logit_scale,  # of base-2 logits
    kv_heads,
    rows,
    length,
    features,
    rank,
    columns,  # r, or the components of one half of the table's nibbles
    num_exact,
    num_sampled,
    sample_step,
    sample_weight,  # the keys for which each sampled one stands
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    order_stride_h,
    order_stride_n,
    HAS_ORDER: tl.constexpr,
    GROUP: tl.constexpr,
    BG: tl.constexpr,
    DOT: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Store what the scan needs of a group's queries.

    The first programs store the digits of a query each (`SketchTable.digits`); each of the others the logits
    of BP keys that are read themselves, and what these add to the normalisers
    (`SketchTable.log_normalisers`).
    """
    i_u = tl.program_id(0).to(tl.int64)
    i_n, i_l = i_u // length, i_u % length
    p_q = q_ptr + (i_n * rows + i_l) * features  # of the group's first row
    if tl.program_id(1) < GROUP:
        i_g = tl.program_id(1)
        o_r = tl.arange(0, BR)  # [BR]
        m_r = o_r < columns  # [BR]
        p_query = p_q + i_g * length * features
        b_x = query_components(p_query, weight_ptr, i_n, features, rank, o_r, m_r, BD)  # [BR]
        largest = tl.max(tl.abs(b_x), axis=0)
        if HALVES == 2:
            o_c = columns + o_r  # [BR]
            b_y = query_components(p_query, weight_ptr, i_n, features, rank, o_c, m_r, BD)  # [BR]
            largest = tl.maximum(largest, tl.max(tl.abs(b_y), axis=0))
        largest = tl.maximum(largest, MIN_COMPONENT)
        p_digit = digit_ptr + (i_u * GROUP + i_g) * 2 * HALVES * BR + o_r  # [BR]
        store_digits(p_digit, b_x / largest, HALVES * BR)
        if HALVES == 2:
            store_digits(p_digit + BR, b_y / largest, HALVES * BR)
        unit = (largest / (UPPER_DIGITS * LOWER_DIGITS)).to(tl.float32) * logit_scale
        tl.store(unit_ptr + i_u * GROUP + i_g, unit)
    else:
        i_chunk = tl.program_id(1) - GROUP
        o_i = i_chunk * BP + tl.arange(0, BP)  # [BP]
        m_i = o_i < num_exact + num_sampled  # [BP]
        m_exact = o_i < num_exact  # [BP]
        b_place = tl.where(m_exact, o_i, num_exact + (o_i - num_exact) * sample_step).to(tl.int64)  # [BP]
        if HAS_ORDER:
            b_place = tl.load(order_ptr + i_n * order_stride_h + b_place * order_stride_n, mask=m_i, other=0)
        o_d = tl.arange(0, BD)  # [BD]
        m_d = o_d < features  # [BD]
        o_g = tl.arange(0, BG)  # [BG]
        m_g = o_g < GROUP  # [BG]
        p_k = k_ptr + (i_n // kv_heads) * k_stride_b + (i_n % kv_heads) * k_stride_h
        p_key = p_k + b_place[:, None] * k_stride_n + o_d[None, :] * k_stride_d  # [BP, BD]
        b_k = tl.load(p_key, mask=m_i[:, None] & m_d[None, :], other=0.0).to(DOT)  # [BP, BD]
        p_row = p_q + o_g[None, :] * length * features + o_d[:, None]  # [BD, BG]
        b_q = tl.load(p_row, mask=m_d[:, None] & m_g[None, :], other=0.0).to(DOT)  # [BD, BG]
        b_centre = tl.load(centre_ptr + i_n * features + o_d, mask=m_d, other=0.0)  # [BD]
        b_shift = tl.sum(b_q.to(tl.float64) * b_centre.to(tl.float64)[:, None], axis=0).to(tl.float32)  # [BG]
        b_l = (tl.dot(b_k, b_q, input_precision="ieee") - b_shift[None, :]) * logit_scale  # [BP, BG]
        o_row = i_u * GROUP + o_g  # [BG]
        p_exact = exact_logit_ptr + o_row[None, :] * num_exact + o_i[:, None]  # [BP, BG]
        tl.store(p_exact, b_l, mask=m_exact[:, None] & m_g[None, :])
        b_l = tl.where(m_i[:, None], b_l, float("-inf"))
        b_largest = tl.max(b_l, axis=0)  # [BG]
        b_weight = tl.where(m_exact, 1.0, sample_weight)  # [BP]
        b_total = tl.sum(tl.exp2(b_l - b_largest[None, :]) * b_weight[:, None], axis=0)  # [BG]
        o_part = o_row * (tl.num_programs(1) - GROUP) + i_chunk  # [BG]
        tl.store(largest_ptr + o_part, b_largest, mask=m_g)
        tl.store(total_ptr + o_part, b_total, mask=m_g)


@triton.jit
def query_components(p_q, weight_ptr, i_n, features, rank, o_c, m_c, BD: tl.constexpr):
    """Components o_c [BR] of a query: float64, [BR]. In float64 the order of a sum changes no digit."""
    o_d = tl.arange(0, BD)  # [BD]
    m_d = o_d < features  # [BD]
    m_c = m_c & (o_c < rank)  # [BR]
    b_q = tl.load(p_q + o_d, mask=m_d, other=0.0).to(tl.float64)  # [BD]
    p_w = weight_ptr + (i_n * features + o_d[:, None]) * rank + o_c[None, :]  # [BD, BR]
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
        triton.Config({"NP": pages, "LOOP": loop}, num_warps=warps, num_stages=stages)
        for pages, loop, warps, stages in ((4, 8, 2, 2), (4, 4, 2, 2), (4, 8, 1, 2), (8, 4, 4, 3))
    ],
    ["BG", "BR", "HALVES", "SIZE"],
)
@triton.jit
def scan_sketch_kernel(
    digit_ptr,  # (N L, G, 2, HALVES * BR)
    unit_ptr,  # (N L, G)
    table_ptr,  # (N, n, r), of nibbles (N, n, r / 2)
    mass_ptr,  # (N L, T * PAGE), int16 or int32
    subpage_mass_ptr,  # (N L, T * SUBPAGES), int32
    page_mass_ptr,  # (N L, T), int32
    page_exponent_ptr,  # (N L, T), float32
    exact_logit_ptr,  # (N L, G, num_exact)
    largest_ptr,  # (N L, G, chunks)
    total_ptr,  # (N L, G, chunks)
    length,
    n,
    pages,
    columns,
    num_exact,
    chunks,
    table_stride_h,
    table_stride_n,
    GROUP: tl.constexpr,
    BG: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    HALVES: tl.constexpr,  # 1: bytes, 2: nibbles
    SIZE: tl.constexpr,
    NP: tl.constexpr,
    LOOP: tl.constexpr,
):
    """Store the masses of LOOP times NP pages by guessed logits, summed over a group's rows.

    The two digits of a query are two columns of the product.
    """
    i_u = tl.program_id(0).to(tl.int64)
    i_n = i_u // length
    o_g = tl.arange(0, BG)  # [BG]
    m_g = o_g < GROUP  # [BG]
    o_r = tl.arange(0, BR)  # [BR]
    WIDE: tl.constexpr = HALVES * BR
    o_x = tl.arange(0, 2 * BG)  # [2 BG], the two digits of a row side by side
    p_x = digit_ptr + (i_u * GROUP * 2 + o_x[None, :]) * WIDE + o_r[:, None]  # [BR, 2 BG]
    b_x = tl.load(p_x, mask=(o_x < GROUP * 2)[None, :], other=0)  # [BR, 2 BG]
    # Products that start here are small whole numbers of float32, without a conversion.
    b_first = tl.full([2 * BG], MAGIC_BITS, tl.int32)  # [2 BG]
    b_y = b_x  # [BR, 2 BG]
    if HALVES == 2:
        b_y = tl.load(p_x + BR, mask=(o_x < GROUP * 2)[None, :], other=0)  # [BR, 2 BG]
        # A nibble holds 8 more than its level.
        b_first -= 8 * (tl.sum(b_x.to(tl.int32), axis=0) + tl.sum(b_y.to(tl.int32), axis=0))
    b_unit = tl.load(unit_ptr + i_u * GROUP + o_g, mask=m_g, other=0.0)  # [BG]
    b_start = tl.zeros([NP * PAGE, 2 * BG], tl.int32) + b_first[None, :]  # [NP * PAGE, 2 BG]
    b_normaliser = log_normalisers(largest_ptr, total_ptr, i_u, chunks, GROUP, BG, BC)  # [BG]

    # Tiles of keys that are all there need no masks, which are a third of the instructions of a tile.
    first = tl.program_id(1) * LOOP
    whole = tl.minimum(tl.maximum(n // (NP * PAGE) - first, 0), LOOP)
    for MASKED in tl.static_range(2):
        for i in range(whole * MASKED, whole + (LOOP - whole) * MASKED):
            scan_tile(
                (first + i) * NP,
                table_ptr,
                mass_ptr,
                subpage_mass_ptr,
                page_mass_ptr,
                page_exponent_ptr,
                exact_logit_ptr,
                b_x,
                b_y,
                b_start,
                b_unit,
                b_normaliser,
                i_u,
                i_n,
                n,
                pages,
                columns,
                num_exact,
                table_stride_h,
                table_stride_n,
                GROUP,
                BG,
                BR,
                PAGE,
                UNITS,
                HALVES,
                NP,
                MASKED,
            )


@triton.jit
def scan_tile(
    i_page,
    table_ptr,
    mass_ptr,
    subpage_mass_ptr,
    page_mass_ptr,
    page_exponent_ptr,
    exact_logit_ptr,
    b_x,  # [BR, 2 BG]
    b_y,  # [BR, 2 BG], of nibbles
    b_start,  # [NP * PAGE, 2 BG]
    b_unit,  # [BG]
    b_normaliser,  # [BG]
    i_u,
    i_n,
    n,
    pages,
    columns,
    num_exact,
    table_stride_h,
    table_stride_n,
    GROUP: tl.constexpr,
    BG: tl.constexpr,
    BR: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    HALVES: tl.constexpr,
    NP: tl.constexpr,
    MASKED: tl.constexpr,  # 1 where some of the keys may not be there
):
    """Store the masses of NP pages."""
    o_g = tl.arange(0, BG)  # [BG]
    m_g = o_g < GROUP  # [BG]
    o_r = tl.arange(0, BR)  # [BR]
    o_n = i_page * PAGE + tl.arange(0, NP * PAGE)  # [NP * PAGE]
    p_t = table_ptr + i_n * table_stride_h + o_r[None, :]  # [1, BR]
    p = p_t + o_n[:, None].to(tl.int64) * table_stride_n  # [NP * PAGE, BR]
    m_t = (o_r < columns)[None, :]  # [1, BR]
    if MASKED:
        m_t = m_t & (o_n < n)[:, None]  # [NP * PAGE, BR]
    b_t = tl.load(p, mask=m_t, other=0)  # [NP * PAGE, BR]
    if HALVES == 2:
        b_low, b_high = split_nibbles(b_t)  # [NP * PAGE, BR] each
        b_l = tl.dot(b_low, b_x, b_start, out_dtype=tl.int32)  # [NP * PAGE, 2 BG]
        b_l = tl.dot(b_high, b_y, b_l, out_dtype=tl.int32)
    else:
        b_l = tl.dot(b_t, b_x, b_start, out_dtype=tl.int32)  # [NP * PAGE, 2 BG]
    b_upper, b_lower = tl.split(
        tl.reshape(b_l.to(tl.float32, bitcast=True) - MAGIC, [NP * PAGE, BG, 2])
    )  # [NP * PAGE, BG] each
    b_l = (b_upper * LOWER_DIGITS + b_lower) * b_unit[None, :] - b_normaliser[None, :]  # [NP * PAGE, BG]
    if i_page * PAGE < num_exact:
        m_exact = (o_n < num_exact)[:, None] & m_g[None, :]  # [NP * PAGE, BG]
        p_exact = exact_logit_ptr + (i_u * GROUP + o_g[None, :]) * num_exact + o_n[:, None]
        b_own = tl.load(p_exact, mask=m_exact, other=0.0) - b_normaliser[None, :]  # [NP * PAGE, BG]
        b_l = tl.where(m_exact, b_own, b_l)
    if MASKED:
        b_l = tl.where((o_n < n)[:, None], b_l, float("-inf"))
    if GROUP < BG:
        b_l = tl.where(m_g[None, :], b_l, float("-inf"))

    b_l = tl.reshape(b_l, [NP, PAGE, BG])
    b_exponent = tl.ceil(tl.max(tl.max(b_l, axis=2), axis=1))  # [NP]
    b_shift_page = b_exponent  # [NP]
    if MASKED:
        b_shift_page = tl.where(b_exponent == float("-inf"), 0.0, b_exponent)
    b_mass = rounded(tl.exp2(b_l - b_shift_page[:, None, None]) * UNITS)  # [NP, PAGE, BG]
    b_mass = tl.sum(b_mass, axis=2)  # [NP, PAGE]
    b_sub = tl.sum(tl.reshape(b_mass, [NP, SUBPAGES, KEYS]), axis=2)  # [NP, SUBPAGES]
    o_page = i_page + tl.arange(0, NP)  # [NP]
    m_page = o_page < pages if MASKED else o_page >= 0  # [NP]
    o_at = i_u * pages + o_page  # [NP]
    o_sub = o_at[:, None] * SUBPAGES + tl.arange(0, SUBPAGES)[None, :]  # [NP, SUBPAGES]
    tl.store(subpage_mass_ptr + o_sub, b_sub, mask=m_page[:, None])
    tl.store(page_mass_ptr + o_at, tl.sum(b_sub, axis=1), mask=m_page)
    tl.store(page_exponent_ptr + o_at, b_exponent, mask=m_page)
    p = mass_ptr + o_at[:, None] * PAGE + tl.arange(0, PAGE)[None, :]  # [NP, PAGE]
    tl.store(p, b_mass.to(mass_ptr.dtype.element_ty), mask=m_page[:, None])


@triton.jit
def rounded(b_x):
    """The nearest whole numbers to numbers from 0 to 2^22, an even one where two are as near: int32."""
    return (b_x + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS


@triton.jit
def log_normalisers(
    largest_ptr, total_ptr, i_u, chunks, GROUP: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr
):
    """The rows' normalisers from the sums of their parts: whole numbers of steps, [BG]."""
    o_g = tl.arange(0, BG)  # [BG]
    o_c = tl.arange(0, BC)  # [BC]
    o_part = (i_u * GROUP + o_g[None, :]) * chunks + o_c[:, None]  # [BC, BG]
    m_part = (o_c < chunks)[:, None] & (o_g < GROUP)[None, :]  # [BC, BG]
    b_largest = tl.load(largest_ptr + o_part, mask=m_part, other=float("-inf"))  # [BC, BG]
    b_total = tl.load(total_ptr + o_part, mask=m_part, other=0.0)  # [BC, BG]
    b_max = tl.max(b_largest, axis=0)  # [BG]
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.sum(tl.exp2(b_largest - b_max[None, :]) * b_total, axis=0)  # [BG]
    b_log = b_max + tl.log2(tl.where(o_g < GROUP, b_sum, 1.0))  # [BG]
    return tl.floor(b_log * NORMALISER_STEPS + 0.5) / NORMALISER_STEPS


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
    """The raised masses of all keys of k pages of a group, in the group's unit: int64, [k, PAGE]."""
    b_mass = tl.load(page_mass_ptr + b_page, mask=m_page, other=1)  # [k]
    b_exponent = tl.load(page_exponent_ptr + b_page, mask=m_page, other=float("-inf"))  # [k]
    b_up, b_extra = raise_pages(b_mass, b_exponent, row_exponent, fraction_bits, page_floor, False)  # [k]
    o_key = b_page[:, None] * PAGE + tl.arange(0, PAGE)[None, :]  # [k, PAGE]
    m_key = m_page[:, None] & (o_key < n)  # [k, PAGE]
    b_own = tl.load(mass_ptr + o_key, mask=m_key, other=0).to(tl.int32) & MASS_MASK  # [k, PAGE]
    return tl.where(m_key, (b_own + b_extra[:, None]).to(tl.int64) << b_up[:, None], 0)


@tuned([triton.Config({}, num_warps=warps) for warps in (8, 4, 16)], ["BP", "BS"])
@triton.jit
def plan_kernel(
    mass_ptr,  # (N L, T * PAGE)
    subpage_mass_ptr,  # (N L, T * SUBPAGES), replaced in pages where a key may be above the cap
    page_mass_ptr,  # (N L, T)
    page_exponent_ptr,  # (N L, T)
    page_start_ptr,  # (N L, T), int64: the capped masses of all pages before
    row_mass_ptr,  # (N L,), int64: those of all pages
    row_exponent_ptr,  # (N L,), float32
    page_floor_ptr,  # (N L,), int64: the mass that every page gets at least
    certain_mass_ptr,  # (N L,), int64: the mass from which a key is drawn with certainty
    searched_ptr,  # (N L, BS), int32: pages that are searched key by key
    finished_ptr,  # (N L,), int32: set to 0 for `weigh_kernel`
    n,
    pages,
    fraction_bits,
    inverse_share,
    num_samples,
    stride,
    BP: tl.constexpr,
    BS: tl.constexpr,
    PAGE: tl.constexpr,
    MASS_MASK: tl.constexpr,  # the bits of a mass when it is read as int32
    MIN_BITS: tl.constexpr,
    UNITS: tl.constexpr,  # the largest mass of a key
    STEPS: tl.constexpr,
    ALL: tl.constexpr,
):
    """Plan the draws of a group: see `Proposal.certain_mass`.

    Stores its exponent, the least mass of a page, the certain mass, and where each page starts in the sum of
    the masses, in which no key counts for more than the certain one.
    """
    i_u = tl.program_id(0).to(tl.int64)
    p_mass, p_page = mass_ptr + i_u * pages * PAGE, page_mass_ptr + i_u * pages
    p_exponent, p_searched = page_exponent_ptr + i_u * pages, searched_ptr + i_u * BS
    o_p = tl.arange(0, BP)  # [BP]
    o_s = tl.arange(0, BS)  # [BS]
    row_exponent = max_exponent(p_exponent, pages, BP)
    b_total = tl.zeros([BP], tl.int64)  # [BP]
    b_count = tl.zeros([128], tl.int32)  # [128], pages by how far their exponent is below the largest
    for i in range(0, pages, BP):
        m_p = i + o_p < pages  # [BP]
        b_exponent = tl.load(p_exponent + i + o_p, mask=m_p, other=float("-inf"))  # [BP]
        b_up, b_down = unit_shifts(b_exponent, row_exponent, fraction_bits)  # [BP]
        b_mass = tl.load(p_page + i + o_p, mask=m_p, other=0).to(tl.int64)  # [BP]
        b_total += tl.where(b_down == 0, b_mass << b_up, 0)
        b_below = tl.where(m_p, tl.minimum(row_exponent - b_exponent, 127.0), 127.0).to(tl.int32)  # [BP]
        b_count += tl.histogram(b_below, 128)
    page_floor = tl.maximum((tl.sum(b_total, axis=0).to(tl.float64) / inverse_share).to(tl.int64), 1)
    tl.store(row_exponent_ptr + i_u, row_exponent)
    tl.store(page_floor_ptr + i_u, page_floor)
    tl.store(finished_ptr + i_u, 0)

    # The least exponent such that at most BS pages have it or a larger one.
    b_few = (tl.cumsum(b_count, axis=0) <= BS) & (tl.arange(0, 128) < 127)  # [128]
    searched_exponent = row_exponent + 1 - tl.sum(b_few.to(tl.int32), axis=0)

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
    if ALL:
        certain = certain * 0 + 1
    tl.store(certain_mass_ptr + i_u, certain)

    o_b = tl.arange(0, PAGES_OF_BLOCK)  # [BB]
    carry = tl.zeros([], tl.int64)
    for i in range(0, pages, PAGES_OF_BLOCK):
        m_p = i + o_b < pages  # [BB]
        b_mass = tl.load(p_page + i + o_b, mask=m_p, other=1)  # [BB]
        b_exponent = tl.load(p_exponent + i + o_b, mask=m_p, other=float("-inf"))  # [BB]
        b_up, b_extra = raise_pages(b_mass, b_exponent, row_exponent, fraction_bits, page_floor, ALL)  # [BB]
        b_cap = key_cap(certain, b_up)  # [BB]
        b_keys = tl.minimum(tl.maximum(n - (i + o_b) * PAGE, 0), PAGE)  # [BB]
        b_raised = b_mass + b_keys * b_extra  # [BB]
        m_heavy = m_p & (b_extra + UNITS > b_cap)  # [BB], where a key may be above the cap
        if tl.sum(m_heavy.to(tl.int32), axis=0) > 0:
            o_key = (i + o_b)[:, None] * PAGE + tl.arange(0, PAGE)[None, :]  # [BB, PAGE]
            m_key = m_heavy[:, None] & (o_key < n)  # [BB, PAGE]
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
    tl.store(row_mass_ptr + i_u, carry)


@triton.jit
def key_cap(certain_mass, b_up):
    """The certain mass in the units of pages, int32; 2^30 at most, which no key's mass reaches."""
    return tl.minimum(certain_mass >> b_up, 0x3FFFFFFF).to(tl.int32)


@triton.jit
def first_point(step, b_u):
    """The first point of a comb with offset u [1]: int64, [1]."""
    return tl.minimum((b_u * step.to(tl.float64)).to(tl.int64), step - 1)


@triton.jit
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
    UNITS: tl.constexpr,
    ALL: tl.constexpr,
    BS: tl.constexpr,
):
    """Store the keys at BS points of a group, and the probability with which each is drawn."""
    i_u = tl.program_id(0).to(tl.int64)
    i_replicate = tl.program_id(1)
    i_n, i_l = i_u // length, i_u % length
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
    b_page, b_rest = search_starts(p_start, b_s * 0, b_point, pages, LEVELS)  # [BS] each
    o_page = i_u * pages + b_page  # [BS]
    b_page_mass, b_exponent = tl.load(page_mass_ptr + o_page), tl.load(page_exponent_ptr + o_page)  # [BS]
    row_exponent, page_floor = tl.load(row_exponent_ptr + i_u), tl.load(page_floor_ptr + i_u)
    b_up, b_extra = raise_pages(b_page_mass, b_exponent, row_exponent, fraction_bits, page_floor, ALL)
    b_cap = key_cap(certain_mass, b_up)  # [BS]
    b_unit = (b_rest >> b_up).to(tl.int32)  # [BS]
    o_sub = tl.arange(0, SUBPAGES)[None, :]  # [1, SUBPAGES]
    b_sub = tl.load(subpage_mass_ptr + o_page[:, None] * SUBPAGES + o_sub)  # [BS, SUBPAGES]
    b_keys = tl.minimum(tl.maximum(n - b_page[:, None] * PAGE - o_sub * KEYS, 0), KEYS)  # [BS, SUBPAGES]
    # `plan_kernel` has raised the pages in which a key may be above the cap.
    b_sub += tl.where((b_extra + UNITS > b_cap)[:, None], 0, b_keys * b_extra[:, None])
    b_place = find_place(tl.cumsum(b_sub, axis=1), b_unit)  # [BS]
    b_unit -= sum_before(b_sub, b_place)
    o_key = b_place[:, None] * KEYS + tl.arange(0, KEYS)[None, :]  # [BS, KEYS]
    b_mass = tl.load(mass_ptr + o_page[:, None] * PAGE + o_key).to(tl.int32) & MASS_MASK  # [BS, KEYS]
    b_mass = tl.minimum(b_mass + b_extra[:, None], b_cap[:, None])
    b_mass = tl.where(b_page[:, None] * PAGE + o_key < n, b_mass, 0)
    b_key = find_place(tl.cumsum(b_mass, axis=1), b_unit)  # [BS]
    b_own = sum_before(b_mass, b_key + 1) - sum_before(b_mass, b_key)  # [BS]
    b_pi = (b_own.to(tl.int64) << b_up).to(tl.float64) / (b_point * 0 + step).to(tl.float64)  # [BS]
    b_index = b_page.to(tl.int64) * PAGE + b_place * KEYS + b_key  # [BS]
    if HAS_ORDER:
        b_index = tl.load(order_ptr + i_n * order_stride_h + b_index * order_stride_n, mask=m_s, other=0)
    tl.store(index_ptr + i_out + b_s, b_index, mask=m_s)
    tl.store(inclusion_ptr + i_out + b_s, tl.where(m_drawn, b_pi.to(tl.float32), 0.0), mask=m_s)


@tuned(
    [
        triton.Config({"BS": size}, num_warps=warps, num_stages=stages)
        for size, warps, stages in ((64, 4, 2), (64, 4, 3), (32, 2, 2))
    ],
    ["BD", "BV", "BG", "SIZE", "CHUNK"],
)
@triton.jit
def weigh_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E)
    v_ptr,  # (B, Hkv, n, Ev)
    index_ptr,  # (N L, R, S), int64
    inclusion_ptr,  # (N L, R, S), float32: pi; 0 where a point lies past the last key
    log_weight_ptr,  # (N M, R, S), float32
    largest_ptr,  # (N M, R, chunks), float32: the largest log w
    total_ptr,  # (N M, R, chunks), float32: sum of w
    vector_ptr,  # (N M, R, chunks, Ev), float32: sum of w v
    finished_ptr,  # (N L,), int32: programs that have finished; 0 before and afterwards
    output_ptr,  # (N M, Ev)
    log_normaliser_ptr,  # (N M, R), float32
    logit_scale,  # of base-2 logits
    softcap,  # in base 2
    kv_heads,
    rows,
    length,
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
    GROUP: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """Weigh up to CHUNK draws of a group by their exact logits in each row, and sum their values.

    A draw past the last key adds nothing. The last program of a group combines the sums of all of them.
    """
    i_u = tl.program_id(0).to(tl.int64)
    i_replicate = tl.program_id(1)
    i_chunk = tl.program_id(2)
    i_n, i_l = i_u // length, i_u % length
    i_out = (i_u * replicates + i_replicate) * num_samples
    o_g = tl.arange(0, BG)  # [BG]
    m_g = o_g < GROUP  # [BG]
    o_row = i_n * rows + o_g * length + i_l  # [BG]
    o_d = tl.arange(0, BD)  # [BD]
    m_d = o_d < features  # [BD]
    o_v = tl.arange(0, BV)  # [BV]
    m_v = o_v < width  # [BV]
    i_b = i_n // kv_heads
    i_h = i_n % kv_heads
    p_k = k_ptr + i_b * k_stride_b + i_h * k_stride_h + o_d[None, :].to(tl.int64) * k_stride_d  # [1, BD]
    p_v = v_ptr + i_b * v_stride_b + i_h * v_stride_h + o_v[None, :].to(tl.int64) * v_stride_d  # [1, BV]
    p_q = q_ptr + o_row[None, :] * features + o_d[:, None]  # [BD, BG]
    b_q = tl.load(p_q, mask=m_g[None, :] & m_d[:, None], other=0.0).to(DOT)  # [BD, BG]
    o_out = (o_row * replicates + i_replicate) * num_samples  # [BG]

    b_largest = tl.full([BG], float("-inf"), tl.float32)  # [BG]
    b_total = tl.zeros([BG], tl.float32)  # [BG]
    b_sum = tl.zeros([BV, BG], tl.float32)  # [BV, BG]
    for i in range(0, CHUNK, BS):
        b_s = i_chunk * CHUNK + i + tl.arange(0, BS)  # [BS]
        m_s = b_s < num_samples  # [BS]
        b_index = tl.load(index_ptr + i_out + b_s, mask=m_s, other=0)  # [BS]
        b_pi = tl.load(inclusion_ptr + i_out + b_s, mask=m_s, other=0.0)  # [BS]
        m_drawn = b_pi > 0  # [BS]
        p_key = p_k + b_index[:, None] * k_stride_n  # [BS, BD]
        b_k = tl.load(p_key, mask=m_drawn[:, None] & m_d[None, :], other=0.0).to(DOT)  # [BS, BD]
        p_value = p_v + b_index[:, None] * v_stride_n  # [BS, BV]
        b_v = tl.load(p_value, mask=m_drawn[:, None] & m_v[None, :], other=0.0).to(DOT)  # [BS, BV]
        b_l = tl.dot(b_k, b_q, input_precision="ieee") * logit_scale  # [BS, BG]
        if HAS_SOFTCAP:
            b_l = capped(b_l, softcap)
        b_lw = b_l - tl.log2(tl.where(m_drawn, b_pi, 1.0))[:, None]  # [BS, BG]
        b_lw = tl.where(m_drawn[:, None], b_lw, float("-inf"))
        p_log = log_weight_ptr + o_out[None, :] + b_s[:, None]  # [BS, BG]
        tl.store(p_log, b_lw, mask=m_s[:, None] & m_g[None, :])

        b_new = tl.maximum(b_largest, tl.max(b_lw, axis=0))  # [BG]
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # [BG]
        b_shrink = tl.exp2(b_largest - b_shift)  # [BG]
        b_largest = b_new
        b_w = tl.exp2(b_lw - b_shift[None, :])  # [BS, BG]
        b_total = b_total * b_shrink + tl.sum(b_w, axis=0)
        b_sum = tl.dot(tl.trans(b_v), b_w.to(DOT), b_sum * b_shrink[None, :], input_precision="ieee")
    o_part = (o_row * replicates + i_replicate) * tl.num_programs(2) + i_chunk  # [BG]
    tl.store(largest_ptr + o_part, b_largest, mask=m_g)
    tl.store(total_ptr + o_part, b_total, mask=m_g)
    p_vector = vector_ptr + o_part[None, :] * width + o_v[:, None]  # [BV, BG]
    tl.store(p_vector, b_sum, mask=m_v[:, None] & m_g[None, :])

    chunks = tl.num_programs(2)
    tl.debug_barrier()
    if tl.atomic_add(finished_ptr + i_u, 1, sem="acq_rel") == replicates * chunks - 1:
        tl.store(finished_ptr + i_u, 0)
        for i_g in range(GROUP):
            combine_row(
                i_n * rows + i_g * length + i_l,
                largest_ptr,
                total_ptr,
                vector_ptr,
                output_ptr,
                log_normaliser_ptr,
                replicates,
                chunks,
                width,
                BC,
                BV,
            )


@triton.jit
def combine_row(
    i_r,
    largest_ptr,
    total_ptr,
    vector_ptr,
    output_ptr,
    log_normaliser_ptr,
    replicates,
    chunks,
    width,
    BC: tl.constexpr,
    BV: tl.constexpr,
):
    """Store a row's output from the parts of its draws, which other programs have written."""
    o_v = tl.arange(0, BV)  # [BV]
    m_v = o_v < width  # [BV]
    o_c = tl.arange(0, BC)  # [BC]
    b_mean = tl.zeros([BV], tl.float32)  # [BV]
    for i_replicate in range(replicates):
        o_part = (i_r * replicates + i_replicate) * chunks + o_c  # [BC]
        b_max = tl.full([BC], float("-inf"), tl.float32)  # [BC]
        for i in range(0, chunks, BC):
            p, m_c = largest_ptr + o_part + i, i + o_c < chunks  # [BC] each
            b_max = tl.maximum(b_max, tl.load(p, mask=m_c, other=float("-inf"), cache_modifier=".cg"))
        largest = tl.max(b_max, axis=0)
        b_total = tl.zeros([BC], tl.float32)  # [BC]
        b_sum = tl.zeros([BV], tl.float32)  # [BV]
        for i in range(0, chunks, BC):
            m_c = i + o_c < chunks  # [BC]
            p = largest_ptr + o_part + i  # [BC]
            b_largest = tl.load(p, mask=m_c, other=float("-inf"), cache_modifier=".cg")  # [BC]
            b_f = tl.exp2(b_largest - largest)  # [BC]
            b_total += b_f * tl.load(total_ptr + o_part + i, mask=m_c, other=0.0, cache_modifier=".cg")
            p, m_part = vector_ptr + (o_part + i)[:, None] * width + o_v[None, :], m_c[:, None] & m_v[None, :]
            b_part = tl.load(p, mask=m_part, other=0.0, cache_modifier=".cg")  # [BC, BV]
            b_sum += tl.sum(b_f[:, None] * b_part, axis=0)
        total = tl.sum(b_total, axis=0)
        b_mean += b_sum / total
        tl.store(log_normaliser_ptr + i_r * replicates + i_replicate, largest + tl.log2(total))
    tl.store(output_ptr + i_r * width + o_v, b_mean / replicates, mask=m_v)
