"""The kernels of decoding by draws from exact logits."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import (
    GROUPS,
    KEYS,
    LOG2,
    before,
    clear,
    comb_offset,
    count_up,
    folded,
    highest_of,
    place_of,
    shifts,
    store_masses,
    sum_up,
)
from ..launches import GATHER, tuned


@tuned(
    [
        triton.Config({"NP": pages, "LOOP": 8}, num_warps=4, num_stages=stages)
        for pages, stages in ((1, 4), (2, 3), (2, 2))
    ],
    ["BD", "BM", "SIZE", "HAS_MASK"],
)
@triton.jit
def scan_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E)
    mask_ptr,  # (B, H, L, n)
    mass_ptr,  # (N, M, pages * PAGE)
    part_ptr,  # (N, M, pages * GROUPS)
    sum_ptr,  # (N, M, pages)
    top_ptr,  # (N, M, pages)
    seed_ptr,
    scale,
    kv_heads,
    rows,
    length,
    n,
    pages,
    features,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    m_stride_b,
    m_stride_h,
    m_stride_l,
    m_stride_n,
    BM: tl.constexpr,
    BD: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    HAS_MASK: tl.constexpr,  # 0: none, 1: of bytes, 2: to add
    DOT: tl.constexpr,
    SIZE: tl.constexpr,
    NP: tl.constexpr,
    LOOP: tl.constexpr,
):
    """Logits of NP pages at a time, kept as masses. Keys are the rows of the product, so that few queries waste little of it."""
    tiles = tl.cdiv(rows, BM)
    i_n = tl.program_id(0) // tiles
    o_m = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_d = tl.arange(0, BD)
    m_d = o_d < features
    i_b = (i_n // kv_heads).to(tl.int64)
    i_h = (i_n % kv_heads).to(tl.int64)
    seed = tl.load(seed_ptr)

    p_q = q_ptr + (i_n.to(tl.int64) * rows + o_m[None, :]) * features + o_d[:, None]
    b_q = tl.load(p_q, mask=m_m[None, :] & m_d[:, None], other=0.0).to(DOT)  # [BD, BM]
    p_k = k_ptr + i_b * k_stride_b + i_h * k_stride_h + o_d[None, :].to(tl.int64) * k_stride_d
    i_head = i_h * (rows // length) + o_m // length
    p_m = (
        mask_ptr
        + i_b * m_stride_b
        + i_head.to(tl.int64) * m_stride_h
        + (o_m % length).to(tl.int64) * m_stride_l
    )

    for i in range(LOOP):
        i_page = (tl.program_id(1) * LOOP + i) * NP
        o_n = i_page * PAGE + tl.arange(0, NP * PAGE)
        m_n = o_n < n
        p = p_k + o_n[:, None].to(tl.int64) * k_stride_n
        b_k = tl.load(p, mask=m_n[:, None] & m_d[None, :], other=0.0).to(DOT)  # [NP * PAGE, BD]
        b_l = tl.dot(b_k, b_q, input_precision="ieee") * scale  # [NP * PAGE, BM]
        m_l = m_n[:, None] & m_m[None, :]
        if HAS_MASK > 0:
            p = p_m[None, :] + o_n[:, None].to(tl.int64) * m_stride_n
            b_m = tl.load(p, mask=m_l, other=0)
            if HAS_MASK == 1:
                m_l = m_l & (b_m != 0)
            else:
                b_l += b_m.to(tl.float32) * LOG2
        b_l = tl.where(m_l, b_l, float("-inf"))
        store_masses(
            b_l,
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
            BM,
            NP,
            PAGE,
            UNITS,
        )


@triton.jit
def comb(b_s, b_u, total, num_samples):
    """Points s of the comb of a row, in its units: int64, below its total."""
    b_zero = b_s * 0
    b_step = (b_zero + total).to(tl.float64) / (b_zero + num_samples).to(tl.float64)
    b_point = ((b_s.to(tl.float64) + b_u) * b_step).to(tl.int64)
    return tl.minimum(b_point, total - 1)


@triton.jit
def points_before(b_start, b_u, total, num_samples):
    """How many points of the comb lie before positions of the row: int32."""
    b_step = (b_start * 0 + tl.maximum(total, 1)).to(tl.float64) / (b_start * 0 + num_samples).to(tl.float64)
    b_near = tl.maximum((b_start.to(tl.float64) / b_step - b_u).to(tl.int64) - 1, 0)  # within one of it
    b_count = b_near
    for i in tl.static_range(3):
        b_count += (comb(b_near + i, b_u, total, num_samples) < b_start).to(tl.int64)
    return tl.minimum(b_count, num_samples).to(tl.int32)


@triton.jit
def prefix_kernel(
    sum_ptr,  # (N M, pages)
    top_ptr,  # (N M, pages)
    start_ptr,  # (N M, pages), int64: the mass of all pages before
    total_ptr,  # (N M,), int64
    highest_ptr,  # (N M,)
    page_ptr,  # (N M, R, S), int32: the page in which a point lies
    seed_ptr,
    rows,
    length,
    pages,
    fine,
    num_samples,
    replicates,
    BP: tl.constexpr,
):
    """Where each page of a row starts, in the row's common units, and in which page each point of its combs lies."""
    i_r = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BP)
    seed = tl.load(seed_ptr)
    p_start, p_page = start_ptr + i_r * pages, page_ptr + i_r * replicates * num_samples
    highest = highest_of(top_ptr + i_r * pages, pages, BP)
    carry = tl.zeros([], tl.int64)
    for i in range(0, pages, BP):
        m_p = i + o_p < pages
        b_top = tl.load(top_ptr + i_r * pages + i + o_p, mask=m_p, other=float("-inf"))
        b_up, b_down = shifts(b_top, highest, fine)
        b_w = tl.load(sum_ptr + i_r * pages + i + o_p, mask=m_p, other=0).to(tl.int64)
        carry = sum_up(p_start, (b_w << b_up) >> b_down, carry, i + o_p, m_p)
    tl.store(total_ptr + i_r, carry)
    tl.store(highest_ptr + i_r, highest)
    clear(p_page, replicates * num_samples, BP)
    tl.debug_barrier()
    for i_replicate in range(replicates):
        b_u = comb_offset(seed, i_replicate, (i_r % rows) % length, i_r // rows)
        for i in range(0, pages, BP):
            m_p = (i + o_p < pages) & (i + o_p > 0)
            b_first = points_before(tl.load(p_start + i + o_p, mask=m_p, other=0), b_u, carry, num_samples)
            p = p_page + i_replicate * num_samples + b_first
            tl.atomic_add(p, 1, mask=m_p & (b_first < num_samples), sem="relaxed")
    tl.debug_barrier()
    for i_replicate in range(replicates):
        count_up(p_page + i_replicate * num_samples, num_samples, BP)


@triton.jit
def locate_kernel(
    mass_ptr,
    part_ptr,
    top_ptr,
    start_ptr,
    total_ptr,
    highest_ptr,
    page_ptr,
    seed_ptr,
    index_ptr,  # (N, M, R * S), int64
    rows,
    length,
    pages,
    num_samples,
    replicates,
    fine,
    PAGE: tl.constexpr,
    WORD: tl.constexpr,
    BS: tl.constexpr,
):
    """The keys at BS points of a row."""
    i_r = tl.program_id(0).to(tl.int64)
    i_replicate = tl.program_id(1)
    total = tl.load(total_ptr + i_r)
    b_u = comb_offset(tl.load(seed_ptr), i_replicate, (i_r % rows) % length, i_r // rows)
    b_s = tl.program_id(2) * BS + tl.arange(0, BS)
    o_s = (i_r * replicates + i_replicate) * num_samples + b_s
    m_in = b_s < num_samples
    m_s = m_in & (total > 0)
    b_page = tl.load(page_ptr + o_s, mask=m_s, other=0)
    o_page = i_r * pages + b_page
    b_up, b_down = shifts(tl.load(top_ptr + o_page), tl.load(highest_ptr + i_r), fine)
    b_rest = comb(b_s, b_u, total, num_samples) - tl.load(start_ptr + o_page)
    b_unit = ((b_rest << b_down) >> b_up).to(tl.int32)
    b_part = tl.load(part_ptr + o_page[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :])
    b_group = place_of(tl.cumsum(b_part, axis=1), b_unit)
    b_unit -= before(b_part, b_group)
    o_key = b_group[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    b_mass = tl.load(mass_ptr + o_page[:, None] * PAGE + o_key).to(tl.int32) & WORD  # [BS, KEYS]
    b_index = b_page.to(tl.int64) * PAGE + b_group * KEYS + place_of(tl.cumsum(b_mass, axis=1), b_unit)
    tl.store(index_ptr + o_s, tl.where(m_s, b_index, 0), mask=m_in)


@tuned(GATHER, ["BV", "SIZE", "CHUNK"])
@triton.jit
def mean_kernel(
    v_ptr,  # (B, Hkv, n, Ev)
    index_ptr,  # (N, M, R * S), int64
    total_ptr,
    sum_ptr,  # (N, M, R, chunks, Ev), float32
    kv_heads,
    rows,
    width,
    num_samples,
    replicates,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    BV: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """The mean of the values at a row's draws, the part of up to CHUNK of them."""
    i_r = tl.program_id(0).to(tl.int64)
    i_chunk = tl.program_id(2)
    i_n = i_r // rows
    i_out = i_r * replicates + tl.program_id(1)
    seen = tl.load(total_ptr + i_r) > 0
    o_v = tl.arange(0, BV)
    m_v = o_v < width
    p_v = v_ptr + (i_n // kv_heads) * v_stride_b + (i_n % kv_heads) * v_stride_h
    p_v = p_v + o_v[None, :].to(tl.int64) * v_stride_d
    b_acc = tl.zeros([FOLD, BV], tl.float32)
    for i in range(0, CHUNK, BS):
        b_s = i_chunk * CHUNK + i + tl.arange(0, BS)
        m_s = (b_s < num_samples) & seen
        b_index = tl.load(index_ptr + i_out * num_samples + b_s, mask=m_s, other=0)
        p = p_v + b_index[:, None] * v_stride_n
        b_v = tl.load(p, mask=m_s[:, None] & m_v[None, :], other=0.0)  # [BS, BV]
        b_acc += folded(b_v.to(tl.float32), FOLD)
    p_sum = sum_ptr + (i_out * tl.num_programs(2) + i_chunk) * width + o_v
    tl.store(p_sum, tl.sum(b_acc, axis=0) / num_samples, mask=m_v)
