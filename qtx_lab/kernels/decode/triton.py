"""The kernels that decode by systematic draws from exact logits: see `launch.decode`."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import (
    KEYS,
    SUBPAGES,
    TO_BASE_2,
    capped,
    comb_offset,
    find_blocks,
    find_place,
    fold,
    max_exponent,
    search_starts,
    store_masses,
    sum_before,
    unit_shifts,
)
from ..launches import GATHER_CONFIGS, tuned


@tuned(
    [
        triton.Config({"NP": pages, "LOOP": 8}, num_warps=4, num_stages=stages)
        for pages, stages in ((1, 4), (2, 3), (2, 2))
    ],
    ["BD", "BM", "SIZE", "HAS_MASK"],
)
@triton.jit(do_not_specialize=["window_first", "window_last"])  # every token has others
def scan_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E), or (blocks, Hkv, T, E)
    block_table_ptr,  # (B, C), where PAGED
    mask_ptr,  # (B, H, L, n)
    lengths_ptr,  # (B,), where HAS_LENGTHS
    mass_ptr,  # (N, M, T * PAGE), int16 or int32
    subpage_mass_ptr,  # (N, M, T * SUBPAGES), int32
    page_mass_ptr,  # (N, M, T), int32
    page_exponent_ptr,  # (N, M, T), float32
    stream_key_ptr,  # (N,), int64
    head_group_ptr,  # (N,), int64
    logit_scale,  # of base-2 logits
    softcap,  # in base 2
    window_first,  # see `Inputs.band`
    window_last,
    kv_heads,
    rows,
    length,
    n,
    pages,
    features,
    blocks,
    block_size,
    columns,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    mask_stride_b,
    mask_stride_h,
    mask_stride_l,
    mask_stride_n,
    BM: tl.constexpr,
    BD: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    HAS_MASK: tl.constexpr,  # 0: none, 1: boolean, 2: to add
    HAS_SOFTCAP: tl.constexpr,
    BANDED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    PAGED: tl.constexpr,
    DOT: tl.constexpr,
    SIZE: tl.constexpr,
    NP: tl.constexpr,
    LOOP: tl.constexpr,
):
    """Store the masses of LOOP times NP pages.

    Keys are the rows of the product, so that little of it is wasted on few queries. A page of which a row
    sees a token that is not there has the exponent inf.
    """
    tiles = tl.cdiv(rows, BM)
    i_n = tl.program_id(0) // tiles
    o_m = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)  # [BM]
    m_m = o_m < rows  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    m_d = o_d < features  # [BD]
    i_b = (i_n // kv_heads).to(tl.int64)
    i_h = (i_n % kv_heads).to(tl.int64)
    stream_key, head_group = tl.load(stream_key_ptr + i_n), tl.load(head_group_ptr + i_n)
    if HAS_LENGTHS:
        tokens = tl.load(lengths_ptr + i_b).to(tl.int32)
        own = tokens - length
        window_first += own
        window_last += own

    p_q = q_ptr + (i_n.to(tl.int64) * rows + o_m[None, :]) * features + o_d[:, None]  # [BD, BM]
    b_q = tl.load(p_q, mask=m_m[None, :] & m_d[:, None], other=0.0).to(DOT)  # [BD, BM]
    p_k = k_ptr + i_h * k_stride_h + o_d[None, :].to(tl.int64) * k_stride_d  # [1, BD]
    if not PAGED:
        p_k += i_b * k_stride_b
    i_head = i_h * (rows // length) + o_m // length  # [BM]
    p_m = (
        mask_ptr
        + i_b * mask_stride_b
        + i_head.to(tl.int64) * mask_stride_h
        + (o_m % length).to(tl.int64) * mask_stride_l
    )  # [BM]

    for i in range(LOOP):
        i_page = (tl.program_id(1) * LOOP + i) * NP
        o_n = i_page * PAGE + tl.arange(0, NP * PAGE)  # [NP * PAGE]
        m_n = o_n < n  # [NP * PAGE]
        if BANDED:  # what no row sees is not read
            m_n = m_n & (o_n >= window_first) & (o_n < window_last + length)
        m_read = m_n  # [NP * PAGE]
        if PAGED:
            b_block, b_slot, m_known = find_blocks(
                block_table_ptr, i_b, o_n, m_n, blocks, block_size, columns
            )  # [NP * PAGE] each
            p = p_k + (b_block * k_stride_b + b_slot * k_stride_n)[:, None]  # [NP * PAGE, BD]
            m_read = m_n & m_known
        else:
            p = p_k + o_n[:, None].to(tl.int64) * k_stride_n  # [NP * PAGE, BD]
        b_k = tl.load(p, mask=m_read[:, None] & m_d[None, :], other=0.0).to(DOT)  # [NP * PAGE, BD]
        b_l = tl.dot(b_k, b_q, input_precision="ieee") * logit_scale  # [NP * PAGE, BM]
        if HAS_SOFTCAP:
            b_l = capped(b_l, softcap)
        m_l = m_n[:, None] & m_m[None, :]  # [NP * PAGE, BM]
        if BANDED:
            b_key = o_n[:, None] - o_m[None, :] % length  # [NP * PAGE, BM], as query 0 would see it
            m_l = m_l & (b_key >= window_first) & (b_key <= window_last)
        if HAS_MASK > 0:
            p = p_m[None, :] + o_n[:, None].to(tl.int64) * mask_stride_n  # [NP * PAGE, BM]
            b_m = tl.load(p, mask=m_l, other=0)  # [NP * PAGE, BM]
            if HAS_MASK == 1:
                m_l = m_l & (b_m != 0)
            else:
                b_l += b_m.to(tl.float32) * TO_BASE_2
        if PAGED:
            b_l = tl.where(m_known[:, None], b_l, float("inf"))
        if HAS_LENGTHS:
            b_l = tl.where(tokens > n, float("inf"), b_l)
        b_l = tl.where(m_l, b_l, float("-inf"))
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
def comb_points(b_s, b_u, row_mass, num_samples):
    """The points s of a row's comb with offset u, in the row's unit: int64, below its mass, as b_s."""
    b_zero = b_s * 0
    b_step = (b_zero + row_mass).to(tl.float64) / (b_zero + num_samples).to(tl.float64)
    b_point = ((b_s.to(tl.float64) + b_u) * b_step).to(tl.int64)
    return tl.minimum(b_point, row_mass - 1)


@triton.jit
def prefix_kernel(
    page_mass_ptr,  # (N M, T)
    page_exponent_ptr,  # (N M, T)
    page_start_ptr,  # (N M, T), int64: the mass of all pages before
    row_mass_ptr,  # (N M,), int64
    row_exponent_ptr,  # (N M,), float32
    pages,
    fraction_bits,
    PAGED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BP: tl.constexpr,
):
    """Store where each page of a row starts, in the row's unit.

    A row that sees a token that is not there has the mass -1.
    """
    i_r = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BP)  # [BP]
    row_exponent = max_exponent(page_exponent_ptr + i_r * pages, pages, BP)
    carry = tl.zeros([], tl.int64)
    for i in range(0, pages, BP):
        m_p = i + o_p < pages  # [BP]
        p = page_exponent_ptr + i_r * pages + i + o_p  # [BP]
        b_exponent = tl.load(p, mask=m_p, other=float("-inf"))  # [BP]
        b_up, b_down = unit_shifts(b_exponent, row_exponent, fraction_bits)  # [BP]
        b_mass = tl.load(page_mass_ptr + i_r * pages + i + o_p, mask=m_p, other=0).to(tl.int64)  # [BP]
        b_mass = (b_mass << b_up) >> b_down
        if PAGED or HAS_LENGTHS:
            b_mass = tl.where(row_exponent == float("inf"), 0, b_mass)
        p_start = page_start_ptr + i_r * pages + i + o_p  # [BP]
        tl.store(p_start, carry + tl.cumsum(b_mass, axis=0) - b_mass, mask=m_p)
        carry += tl.sum(b_mass, axis=0)
    if PAGED or HAS_LENGTHS:
        carry = tl.where(row_exponent == float("inf"), carry * 0 - 1, carry)
    tl.store(row_mass_ptr + i_r, carry)
    tl.store(row_exponent_ptr + i_r, row_exponent)


@tuned(GATHER_CONFIGS, ["BV", "SIZE", "CHUNK"])
@triton.jit
def mean_kernel(
    v_ptr,  # (B, Hkv, n, Ev), or (blocks, Hkv, T, Ev)
    block_table_ptr,  # (B, C), where PAGED
    sinks_ptr,  # (N M,), where HAS_SINKS
    mass_ptr,
    subpage_mass_ptr,
    page_exponent_ptr,
    page_start_ptr,
    row_mass_ptr,
    row_exponent_ptr,
    stream_key_ptr,
    head_group_ptr,
    position_ptr,  # (L,) or (N, L), int64
    position_stride,
    purpose,
    first_replicate,
    index_ptr,  # (N, M, R * S), int64
    part_ptr,  # (N, M, R, chunks, Ev), float32
    value_weight,  # v_scale / S
    mass_bits,  # see `DecodeResult`
    kv_heads,
    rows,
    length,
    width,
    blocks,
    block_size,
    columns,
    pages,
    num_samples,
    replicates,
    fraction_bits,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    PAGE: tl.constexpr,
    MASS_MASK: tl.constexpr,  # the bits of a mass
    LEVELS: tl.constexpr,  # 8^LEVELS pages are all or more
    PAGED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BV: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Store the keys at up to CHUNK points of a row, and what their values add to the mean.

    A sink takes its share of it.
    """
    i_r = tl.program_id(0).to(tl.int64)
    i_replicate = tl.program_id(1)
    i_chunk = tl.program_id(2)
    i_n = i_r // rows
    i_out = i_r * replicates + i_replicate
    row_mass = tl.load(row_mass_ptr + i_r)
    position = tl.load(position_ptr + i_n * position_stride + (i_r % rows) % length)
    stream_key, head_group = tl.load(stream_key_ptr + i_n), tl.load(head_group_ptr + i_n)
    b_u = comb_offset(stream_key, head_group, position, first_replicate + i_replicate, purpose)  # [1]
    o_s = i_chunk * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    b_point = tl.maximum(comb_points(o_s, b_u, row_mass, num_samples), 0)  # [CHUNK]
    b_page, b_rest = search_starts(
        page_start_ptr + i_r * pages, o_s * 0, b_point, pages, LEVELS
    )  # [CHUNK] each
    o_page = i_r * pages + b_page  # [CHUNK]
    b_exponent = tl.load(page_exponent_ptr + o_page)  # [CHUNK]
    b_up, b_down = unit_shifts(b_exponent, tl.load(row_exponent_ptr + i_r), fraction_bits)  # [CHUNK]
    b_unit = ((b_rest << b_down) >> b_up).to(tl.int32)  # [CHUNK]
    o_sub = o_page[:, None] * SUBPAGES + tl.arange(0, SUBPAGES)[None, :]  # [CHUNK, SUBPAGES]
    b_sub = tl.load(subpage_mass_ptr + o_sub)  # [CHUNK, SUBPAGES]
    b_place = find_place(tl.cumsum(b_sub, axis=1), b_unit)  # [CHUNK]
    b_unit -= sum_before(b_sub, b_place)
    o_key = b_place[:, None] * KEYS + tl.arange(0, KEYS)[None, :]  # [CHUNK, KEYS]
    b_mass = tl.load(mass_ptr + o_page[:, None] * PAGE + o_key).to(tl.int32) & MASS_MASK  # [CHUNK, KEYS]
    b_key = b_place * KEYS + find_place(tl.cumsum(b_mass, axis=1), b_unit)  # [CHUNK]
    b_found = tl.where(row_mass > 0, b_page.to(tl.int64) * PAGE + b_key, 0)  # [CHUNK]
    tl.store(index_ptr + i_out * num_samples + o_s, b_found, mask=o_s < num_samples)
    tl.debug_barrier()

    o_v = tl.arange(0, BV)  # [BV]
    m_v = o_v < width  # [BV]
    i_b = i_n // kv_heads
    p_v = v_ptr + (i_n % kv_heads) * v_stride_h
    if not PAGED:
        p_v = v_ptr + i_b * v_stride_b + (i_n % kv_heads) * v_stride_h
    p_v = p_v + o_v[None, :].to(tl.int64) * v_stride_d  # [1, BV]
    b_sum = tl.zeros([FOLD, BV], tl.float32)  # [FOLD, BV]
    for i in range(0, CHUNK, BS):
        b_s = i_chunk * CHUNK + i + tl.arange(0, BS)  # [BS]
        m_s = (b_s < num_samples) & (row_mass > 0)  # [BS]
        b_index = tl.load(index_ptr + i_out * num_samples + b_s, mask=m_s, other=0)  # [BS]
        if PAGED:
            b_block, b_slot, m_known = find_blocks(
                block_table_ptr, i_b, b_index, m_s, blocks, block_size, columns
            )  # [BS] each
            p = p_v + (b_block * v_stride_b + b_slot * v_stride_n)[:, None]  # [BS, BV]
            m_s = m_s & m_known
        else:
            p = p_v + b_index[:, None] * v_stride_n  # [BS, BV]
        b_v = tl.load(p, mask=m_s[:, None] & m_v[None, :], other=0.0)  # [BS, BV]
        b_sum += fold(b_v.to(tl.float32), FOLD)
    p_part = part_ptr + (i_out * tl.num_programs(2) + i_chunk) * width + o_v  # [BV]
    b_part = tl.sum(b_sum, axis=0) * value_weight  # [BV]
    if HAS_SINKS:
        log_sum = tl.log2(row_mass.to(tl.float32)) + tl.load(row_exponent_ptr + i_r) - mass_bits
        b_part /= 1 + tl.exp2(tl.load(sinks_ptr + i_r) * TO_BASE_2 - log_sum)
    if PAGED or HAS_LENGTHS:
        b_part = tl.where(row_mass < 0, float("nan"), b_part)
    tl.store(p_part, b_part, mask=m_v)
