"""The kernels of exact attention of few queries: see `launch.exact_decode`."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import TO_BASE_2, capped, find_blocks
from ..launches import tuned


@tuned(
    [
        triton.Config({}, num_warps=warps, num_stages=stages)
        for warps, stages in ((8, 2), (4, 2), (8, 3), (4, 3))
    ],
    ["BM", "BD", "BV", "BN", "PAGED"],
)
@triton.jit
def split_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E), or (blocks, Hkv, T, E)
    v_ptr,  # the same of values, Ev
    block_table_ptr,  # (B, C), where PAGED
    lengths_ptr,  # (B,), where HAS_LENGTHS
    largest_ptr,  # (N, M, splits), float32: the largest base-2 logit
    total_ptr,  # (N, M, splits), float32: sum of 2^(logit - largest)
    vector_ptr,  # (N, M, splits, Ev), float32: sum of that times the value
    logit_scale,  # of base-2 logits
    softcap,  # in base 2
    window,
    kv_heads,
    rows,
    length,
    n,
    features,
    width,
    blocks,
    block_size,
    columns,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    PAGED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Attend to SPLIT keys of a key head, for a tile of its rows.

    Keys are the rows of the product, so that little of it is wasted on few queries.
    """
    tiles = tl.cdiv(rows, BM)
    i_n = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)  # [BM]
    m_m = o_m < rows  # [BM]
    i_b, i_h = i_n // kv_heads, i_n % kv_heads
    o_d = tl.arange(0, BD)  # [BD]
    m_d = o_d < features  # [BD]
    o_v = tl.arange(0, BV)  # [BV]
    m_v = o_v < width  # [BV]
    tokens = n
    if HAS_LENGTHS:
        tokens = tl.load(lengths_ptr + i_b).to(tl.int32)
    b_position = tokens - length + o_m % length  # [BM], -1 or less for tokens that are not there
    first = tl.program_id(1) * SPLIT
    end = tl.minimum(first + SPLIT, tokens)
    if HAS_WINDOW:  # what all rows have left behind is not read
        first = tl.maximum(first, (tokens - length - window) // BN * BN)
    p_q = q_ptr + (i_n * rows + o_m[None, :]) * features + o_d[:, None]  # [BD, BM]
    b_q = tl.load(p_q, mask=m_m[None, :] & m_d[:, None], other=0.0).to(DOT)  # [BD, BM]
    p_k = k_ptr + i_h * k_stride_h + o_d[None, :].to(tl.int64) * k_stride_d  # [1, BD]
    p_v = v_ptr + i_h * v_stride_h + o_v[None, :].to(tl.int64) * v_stride_d  # [1, BV]

    b_largest = tl.full([BM], float("-inf"), tl.float32)  # [BM]
    b_total = tl.zeros([BM], tl.float32)  # [BM]
    b_sum = tl.zeros([BV, BM], tl.float32)  # [BV, BM]
    for i in range(first, end, BN):
        o_n = i + tl.arange(0, BN)  # [BN]
        m_n = o_n < end  # [BN]
        if PAGED:
            b_block, b_slot, m_known = find_blocks(
                block_table_ptr, i_b, o_n, m_n, blocks, block_size, columns
            )  # [BN] each
        else:
            b_block, b_slot, m_known = o_n.to(tl.int64) * 0 + i_b, o_n.to(tl.int64), o_n < n  # [BN] each
        p = p_k + (b_block * k_stride_b + b_slot * k_stride_n)[:, None]  # [BN, BD]
        b_k = tl.load(p, mask=(m_n & m_known)[:, None] & m_d[None, :], other=0.0).to(DOT)  # [BN, BD]
        p = p_v + (b_block * v_stride_b + b_slot * v_stride_n)[:, None]  # [BN, BV]
        b_v = tl.load(p, mask=(m_n & m_known)[:, None] & m_v[None, :], other=0.0).to(DOT)  # [BN, BV]
        b_l = tl.dot(b_k, b_q, input_precision="ieee") * logit_scale  # [BN, BM]
        if HAS_SOFTCAP:
            b_l = capped(b_l, softcap)
        # A token that neither the table nor n has: the rows that see it become NaN, which nobody overlooks.
        b_l = tl.where(m_known[:, None], b_l, float("nan"))
        m_l = m_n[:, None] & (o_n[:, None] <= b_position[None, :])  # [BN, BM]
        if HAS_WINDOW:
            m_l = m_l & (o_n[:, None] >= b_position[None, :] - window)
        b_l = tl.where(m_l, b_l, float("-inf"))

        b_new = tl.maximum(b_largest, tl.max(b_l, axis=0))  # [BM]
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # [BM]
        b_shrink = tl.exp2(b_largest - b_shift)  # [BM]
        b_largest = b_new
        b_w = tl.exp2(b_l - b_shift[None, :])  # [BN, BM]
        b_total = b_total * b_shrink + tl.sum(b_w, axis=0)
        b_sum = tl.dot(tl.trans(b_v), b_w.to(DOT), b_sum * b_shrink[None, :], input_precision="ieee")
    o_part = (i_n * rows + o_m) * tl.num_programs(1) + tl.program_id(1)  # [BM]
    tl.store(largest_ptr + o_part, b_largest, mask=m_m)
    tl.store(total_ptr + o_part, b_total, mask=m_m)
    p_vector = vector_ptr + o_part[None, :] * width + o_v[:, None]  # [BV, BM]
    tl.store(p_vector, b_sum, mask=m_v[:, None] & m_m[None, :])


@triton.jit
def merge_kernel(
    largest_ptr,  # (N M, splits)
    total_ptr,  # (N M, splits)
    vector_ptr,  # (N M, splits, Ev)
    sinks_ptr,  # (N M,), where HAS_SINKS
    output_ptr,  # (N M, Ev)
    log_sum_exp_ptr,  # (N M,), float32
    v_scale,
    splits,
    width,
    HAS_SINKS: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
):
    """Store the output and the log-sum-exp of a row from those of its splits."""
    i_r = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)  # [BV]
    m_v = o_v < width  # [BV]
    o_c = tl.arange(0, BC)  # [BC]
    b_max = tl.full([BC], float("-inf"), tl.float32)  # [BC]
    for i in range(0, splits, BC):
        p = largest_ptr + i_r * splits + i + o_c  # [BC]
        b_max = tl.maximum(b_max, tl.load(p, mask=i + o_c < splits, other=float("-inf")))
    largest = tl.max(b_max, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + i_r) * TO_BASE_2
        largest = tl.maximum(largest, sink)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    b_total = tl.zeros([BC], tl.float32)  # [BC]
    b_sum = tl.zeros([BV], tl.float32)  # [BV]
    for i in range(0, splits, BC):
        o_part = i_r * splits + i + o_c  # [BC]
        m_c = i + o_c < splits  # [BC]
        b_f = tl.exp2(tl.load(largest_ptr + o_part, mask=m_c, other=float("-inf")) - shift)  # [BC]
        b_total += b_f * tl.load(total_ptr + o_part, mask=m_c, other=0.0)
        p = vector_ptr + o_part[:, None] * width + o_v[None, :]  # [BC, BV]
        b_sum += tl.sum(b_f[:, None] * tl.load(p, mask=m_c[:, None] & m_v[None, :], other=0.0), axis=0)
    total = tl.sum(b_total, axis=0)
    if HAS_SINKS:
        total += tl.exp2(sink - shift)
    b_mean = b_sum * v_scale / tl.where(total == 0, 1.0, total)  # [BV]
    tl.store(output_ptr + i_r * width + o_v, b_mean, mask=m_v)
    tl.store(log_sum_exp_ptr + i_r, (shift + tl.log2(total)) / TO_BASE_2)
