"""The kernel that weighs drawn keys by exact logits and averages their values: see `launch.draw_and_weigh`.

A group is the G query heads of a key head at one of L positions: row g L + l of M.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import TO_BASE_2, capped, find_blocks
from ..launches import tuned


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
    k_ptr,  # (B, Hkv, n, E), or (blocks, Hkv, T, E)
    v_ptr,  # the same of values, Ev
    block_table_ptr,  # (B, C), where PAGED
    sinks_ptr,  # (N M,), where HAS_SINKS
    index_ptr,  # (N L, R, S), int64
    inclusion_ptr,  # (N L, R, S), float32: pi; 0 where a point lies past the last key
    log_weight_ptr,  # (N M, R, S), float32
    largest_ptr,  # (N M, R, chunks), float32: the largest log w
    total_ptr,  # (N M, R, chunks), float32: sum of w
    vector_ptr,  # (N M, R, chunks, Ev), float32: sum of w v
    row_mass_ptr,  # (N L,), int64, where HAS_LENGTHS: -1 where a sequence has tokens that are not there
    finished_ptr,  # (N L,), int32: programs that have finished; 0 before and afterwards
    output_ptr,  # (N M, Ev)
    log_normaliser_ptr,  # (N M, R), float32
    logit_scale,  # of base-2 logits
    softcap,  # in base 2
    v_scale,
    kv_heads,
    rows,
    length,
    features,
    width,
    blocks,
    block_size,
    columns,
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
    PAGED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    DOT: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    """Weigh up to CHUNK draws of a group by their exact logits in each row, and sum their values.

    A draw past the last key adds nothing; one of a key that the table does not have makes the row NaN. The
    last program of a group combines the sums of all of them.
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
    p_k = k_ptr + i_h * k_stride_h + o_d[None, :].to(tl.int64) * k_stride_d  # [1, BD]
    p_v = v_ptr + i_h * v_stride_h + o_v[None, :].to(tl.int64) * v_stride_d  # [1, BV]
    if not PAGED:
        p_k, p_v = p_k + i_b * k_stride_b, p_v + i_b * v_stride_b
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
        m_read = m_drawn  # [BS]
        if PAGED:
            b_block, b_slot, m_known = find_blocks(
                block_table_ptr, i_b, b_index, m_drawn, blocks, block_size, columns
            )  # [BS] each
            p_key = p_k + (b_block * k_stride_b + b_slot * k_stride_n)[:, None]  # [BS, BD]
            p_value = p_v + (b_block * v_stride_b + b_slot * v_stride_n)[:, None]  # [BS, BV]
            m_read = m_drawn & m_known
        else:
            p_key = p_k + b_index[:, None] * k_stride_n  # [BS, BD]
            p_value = p_v + b_index[:, None] * v_stride_n  # [BS, BV]
        b_k = tl.load(p_key, mask=m_read[:, None] & m_d[None, :], other=0.0).to(DOT)  # [BS, BD]
        b_v = tl.load(p_value, mask=m_read[:, None] & m_v[None, :], other=0.0).to(DOT)  # [BS, BV]
        b_l = tl.dot(b_k, b_q, input_precision="ieee") * logit_scale  # [BS, BG]
        if HAS_SOFTCAP:
            b_l = capped(b_l, softcap)
        if PAGED:
            b_l = tl.where(m_known[:, None], b_l, float("nan"))
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
        poison = 0.0
        if HAS_LENGTHS:
            poison = tl.where(tl.load(row_mass_ptr + i_u) < 0, float("nan"), 0.0)
        for i_g in range(GROUP):
            combine_row(
                i_n * rows + i_g * length + i_l,
                largest_ptr,
                total_ptr,
                vector_ptr,
                sinks_ptr,
                output_ptr,
                log_normaliser_ptr,
                v_scale,
                poison,
                replicates,
                chunks,
                width,
                HAS_SINKS,
                BC,
                BV,
            )


@triton.jit
def combine_row(
    i_r,
    largest_ptr,
    total_ptr,
    vector_ptr,
    sinks_ptr,
    output_ptr,
    log_normaliser_ptr,
    v_scale,
    poison,  # NaN where the group's sequence has tokens that are not there, and otherwise 0
    replicates,
    chunks,
    width,
    HAS_SINKS: tl.constexpr,
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
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + i_r) * TO_BASE_2
            largest = tl.maximum(largest, sink)
        shift = tl.where(largest == float("-inf"), 0.0, largest)  # where no key is seen
        b_total = tl.zeros([BC], tl.float32)  # [BC]
        b_sum = tl.zeros([BV], tl.float32)  # [BV]
        for i in range(0, chunks, BC):
            m_c = i + o_c < chunks  # [BC]
            p = largest_ptr + o_part + i  # [BC]
            b_largest = tl.load(p, mask=m_c, other=float("-inf"), cache_modifier=".cg")  # [BC]
            b_f = tl.exp2(b_largest - shift)  # [BC]
            b_total += b_f * tl.load(total_ptr + o_part + i, mask=m_c, other=0.0, cache_modifier=".cg")
            p, m_part = vector_ptr + (o_part + i)[:, None] * width + o_v[None, :], m_c[:, None] & m_v[None, :]
            b_part = tl.load(p, mask=m_part, other=0.0, cache_modifier=".cg")  # [BC, BV]
            b_sum += tl.sum(b_f[:, None] * b_part, axis=0)
        total = tl.sum(b_total, axis=0) + poison
        if HAS_SINKS:
            total += tl.exp2(sink - shift)
        b_mean += b_sum / tl.where(total == 0, 1.0, total)
        tl.store(log_normaliser_ptr + i_r * replicates + i_replicate, shift + tl.log2(total))
    tl.store(output_ptr + i_r * width + o_v, b_mean * v_scale / replicates, mask=m_v)
