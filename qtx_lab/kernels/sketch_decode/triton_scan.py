"""The kernels that guess the logits of all keys from a sketch: see `launch.scan_sketch`.

A group is the G query heads of a key head at one of L positions: row g L + l of M.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import KEYS, PAGE_KEYS, SUBPAGES, find_blocks, is_visible, visible_range
from ..launches import tuned
from ..philox import INTERPRETED
from .reference import LOWER, SAMPLED_PLACES, SMALLEST, STEPS_PER_BIT, UPPER

UPPER_DIGITS, LOWER_DIGITS, MIN_COMPONENT = tl.constexpr(UPPER), tl.constexpr(LOWER), tl.constexpr(SMALLEST)
MOST_SAMPLED, IN_INTERPRETER = tl.constexpr(SAMPLED_PLACES), tl.constexpr(INTERPRETED)
NORMALISER_STEPS = tl.constexpr(STEPS_PER_BIT)
MAGIC, MAGIC_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)
"""1.5 * 2^23, whose last bit counts ones, and the same as int32."""


@tuned([triton.Config({}, num_warps=warps) for warps in (4, 8)], ["BD", "BR", "HALVES"])
@triton.jit(do_not_specialize=["window_first", "window_last"])  # every token has others
def prepare_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E), or (blocks, Hkv, T, E)
    block_table_ptr,  # (B, C), where PAGED
    lengths_ptr,  # (B,), where HAS_LENGTHS
    weight_ptr,  # (N, E, r)
    centre_ptr,  # (N, E), float32
    order_ptr,  # (N, n), int64: the key at each place
    digit_ptr,  # (N L, G, 2, HALVES * BR), int8: upper and lower digits
    unit_ptr,  # (N L, G), float32
    exact_logit_ptr,  # (N L, G, num_exact), float32
    largest_ptr,  # (N L, G, chunks), float32
    total_ptr,  # (N L, G, chunks), float32
    logit_scale,  # of base-2 logits
    window_first,  # see `Inputs.band`
    window_last,
    kv_heads,
    rows,
    length,
    n,
    features,
    blocks,
    block_size,
    columns,
    rank,
    line_bytes,  # of the table: r, or the components of one half of the nibbles
    num_exact,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    order_stride_h,
    order_stride_n,
    HAS_ORDER: tl.constexpr,
    PAGED: tl.constexpr,
    BANDED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
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
        m_r = o_r < line_bytes  # [BR]
        p_query = p_q + i_g * length * features
        b_x = query_components(p_query, weight_ptr, i_n, features, rank, o_r, m_r, BD)  # [BR]
        largest = tl.max(tl.abs(b_x), axis=0)
        if HALVES == 2:
            o_c = line_bytes + o_r  # [BR]
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
        i_b = i_n // kv_heads
        first_page, low, high = visible_range(
            lengths_ptr, i_b, i_l, length, n, window_first, window_last, BANDED, HAS_LENGTHS
        )
        first, end = low + first_page * PAGE_KEYS, high + first_page * PAGE_KEYS
        # Of the visible places those with exact logits, and some others, as `prepared_places` has them.
        others = tl.maximum(num_exact, first)
        exact = tl.maximum(tl.minimum(num_exact, end) - first, 0)
        left = tl.maximum(end - others, 0)
        step = tl.maximum(tl.cdiv(left, MOST_SAMPLED), 1)
        sampled = tl.cdiv(left, step)
        sample_weight = (left.to(tl.float64) / tl.maximum(sampled, 1).to(tl.float64)).to(tl.float32)
        o_i = i_chunk * BP + tl.arange(0, BP)  # [BP]
        m_i = o_i < exact + sampled  # [BP]
        m_exact = o_i < exact  # [BP]
        o_place = tl.where(m_exact, first + o_i, others + (o_i - exact) * step)  # [BP]
        b_key = o_place.to(tl.int64)  # [BP]
        if HAS_ORDER:
            b_key = tl.load(order_ptr + i_n * order_stride_h + b_key * order_stride_n, mask=m_i, other=0)
        o_d = tl.arange(0, BD)  # [BD]
        m_d = o_d < features  # [BD]
        o_g = tl.arange(0, BG)  # [BG]
        m_g = o_g < GROUP  # [BG]
        p_k = k_ptr + (i_n % kv_heads) * k_stride_h
        m_k = m_i  # [BP]
        if PAGED:  # a key that the table does not have is noticed where it is drawn
            b_block, b_slot, m_known = find_blocks(
                block_table_ptr, i_b, b_key, m_i, blocks, block_size, columns
            )  # [BP] each
            b_offset, m_k = b_block * k_stride_b + b_slot * k_stride_n, m_i & m_known  # [BP] each
        else:
            p_k += i_b * k_stride_b
            b_offset = b_key * k_stride_n  # [BP]
        p_key = p_k + b_offset[:, None] + o_d[None, :] * k_stride_d  # [BP, BD]
        b_k = tl.load(p_key, mask=m_k[:, None] & m_d[None, :], other=0.0).to(DOT)  # [BP, BD]
        p_row = p_q + o_g[None, :] * length * features + o_d[:, None]  # [BD, BG]
        b_q = tl.load(p_row, mask=m_d[:, None] & m_g[None, :], other=0.0).to(DOT)  # [BD, BG]
        b_centre = tl.load(centre_ptr + i_n * features + o_d, mask=m_d, other=0.0)  # [BD]
        b_shift = tl.sum(b_q.to(tl.float64) * b_centre.to(tl.float64)[:, None], axis=0).to(tl.float32)  # [BG]
        b_l = (tl.dot(b_k, b_q, input_precision="ieee") - b_shift[None, :]) * logit_scale  # [BP, BG]
        o_row = i_u * GROUP + o_g  # [BG]
        p_exact = exact_logit_ptr + o_row[None, :] * num_exact + o_place[:, None]  # [BP, BG]
        tl.store(p_exact, b_l, mask=m_exact[:, None] & m_g[None, :])
        b_l = tl.where(m_i[:, None], b_l, float("-inf"))
        b_largest = tl.max(b_l, axis=0)  # [BG]
        b_shift = b_largest  # [BG]
        if BANDED:  # there may be no keys
            b_shift = tl.where(b_largest == float("-inf"), 0.0, b_largest)
        b_weight = tl.where(m_exact, 1.0, sample_weight)  # [BP]
        b_total = tl.sum(tl.exp2(b_l - b_shift[None, :]) * b_weight[:, None], axis=0)  # [BG]
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
@triton.jit(do_not_specialize=["window_first", "window_last"])  # every token has others
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
    lengths_ptr,  # (B,), where HAS_LENGTHS
    window_first,  # see `Inputs.band`
    window_last,
    kv_heads,
    length,
    n,
    pages,
    line_bytes,
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
    BANDED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    SIZE: tl.constexpr,
    NP: tl.constexpr,
    LOOP: tl.constexpr,
):
    """Store the masses of LOOP times NP pages by guessed logits, summed over a group's rows.

    The two digits of a query are two columns of the product. Pages are counted from the first one in which
    the group sees a key; those behind the last such page are left out.
    """
    i_u = tl.program_id(0).to(tl.int64)
    i_n = i_u // length
    first_page, low, high = visible_range(
        lengths_ptr, i_n // kv_heads, i_u % length, length, n, window_first, window_last, BANDED, HAS_LENGTHS
    )
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
    whole = tl.minimum(tl.maximum(high // (NP * PAGE) - first, 0), LOOP)
    tiles = LOOP
    if BANDED:
        tiles = tl.minimum(tl.maximum(tl.cdiv(high, NP * PAGE) - first, 0), LOOP)
        whole = tl.where((first == 0) & (low > 0), 0, whole)
    for MASKED in tl.static_range(2):
        for i in range(whole * MASKED, whole + (tiles - whole) * MASKED):
            scan_tile(
                (first + i) * NP,
                first_page,
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
                low,
                high,
                pages,
                line_bytes,
                num_exact,
                table_stride_h,
                table_stride_n,
                GROUP,
                BG,
                BR,
                PAGE,
                UNITS,
                HALVES,
                BANDED,
                NP,
                MASKED,
            )


@triton.jit
def scan_tile(
    i_page,  # from the first page that the group sees
    first_page,
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
    low,
    high,
    pages,
    line_bytes,
    num_exact,
    table_stride_h,
    table_stride_n,
    GROUP: tl.constexpr,
    BG: tl.constexpr,
    BR: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    HALVES: tl.constexpr,
    BANDED: tl.constexpr,
    NP: tl.constexpr,
    MASKED: tl.constexpr,  # 1 where some of the keys may not be there
):
    """Store the masses of NP pages."""
    o_g = tl.arange(0, BG)  # [BG]
    m_g = o_g < GROUP  # [BG]
    o_r = tl.arange(0, BR)  # [BR]
    o_n = i_page * PAGE + tl.arange(0, NP * PAGE)  # [NP * PAGE]
    m_n = is_visible(o_n, low, high, BANDED)  # [NP * PAGE]
    o_place = o_n  # [NP * PAGE]
    if BANDED:
        o_place += first_page * PAGE
    p_t = table_ptr + i_n * table_stride_h + o_r[None, :]  # [1, BR]
    p = p_t + o_place[:, None].to(tl.int64) * table_stride_n  # [NP * PAGE, BR]
    m_t = (o_r < line_bytes)[None, :]  # [1, BR]
    if MASKED:
        m_t = m_t & m_n[:, None]  # [NP * PAGE, BR]
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
    if (first_page + i_page) * PAGE < num_exact:
        m_exact = (o_place < num_exact)[:, None] & m_g[None, :]  # [NP * PAGE, BG]
        p_exact = exact_logit_ptr + (i_u * GROUP + o_g[None, :]) * num_exact + o_place[:, None]
        b_own = tl.load(p_exact, mask=m_exact, other=0.0) - b_normaliser[None, :]  # [NP * PAGE, BG]
        b_l = tl.where(m_exact, b_own, b_l)
    if MASKED:
        b_l = tl.where(m_n[:, None], b_l, float("-inf"))
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
