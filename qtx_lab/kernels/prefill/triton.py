"""The kernels of sampled attention of many queries and of its gradients."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import LOG2
from ..launches import tuned
from ..philox import uniform, words
from ..philox_reference import PAGES

STREAM_PAGES = tl.constexpr(PAGES)


@triton.jit
def masked(b_l, p_m, o_m, o_n, m_m, n, length, m_stride_n, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Base-2 logits [BM, PAGE] with -inf where a row does not see a key."""
    m_l = m_m[:, None] & (o_n < n)[None, :]
    if CAUSAL:
        m_l = m_l & (o_n[None, :] <= (o_m % length)[:, None])
    if HAS_MASK > 0:
        b_m = tl.load(p_m[:, None] + o_n[None, :].to(tl.int64) * m_stride_n, mask=m_l, other=0)
        if HAS_MASK == 1:
            m_l = m_l & (b_m != 0)
        else:
            b_l += b_m.to(tl.float32) * LOG2
    return tl.where(m_l, b_l, float("-inf"))


@triton.jit
def drawn(b_p, seed, i_page, o_m, i_n, length, num_samples, replicate):
    """Draws c / S and weights w of a page, both [BM, PAGE]."""
    b_word, _, _, _ = words(seed, o_m * 0 + i_page, o_m % length, i_n, STREAM_PAGES + replicate)
    b_u = uniform(b_word)[:, None]
    b_share = b_p * num_samples
    b_run = tl.cumsum(b_share, axis=1)
    b_c = (tl.floor(b_run + b_u) - tl.floor(b_run - b_share + b_u)) / num_samples
    b_missed = tl.sum(b_p, axis=1) - tl.sum(b_c, axis=1)
    b_seen = (b_p > 0).to(tl.float32)
    b_each = b_missed / tl.maximum(tl.sum(b_seen, axis=1), 1.0)
    return b_c, b_c + b_seen * b_each[:, None]


@triton.jit
def drawn_transposed(b_p, seed, i_page, o_m, i_n, length, num_samples, replicate):
    """Those of `drawn`, [PAGE, BM]: no product is transposed, which some compilers get wrong on Hopper."""
    b_word, _, _, _ = words(seed, o_m * 0 + i_page, o_m % length, i_n, STREAM_PAGES + replicate)
    b_u = uniform(b_word)[None, :]
    b_share = b_p * num_samples
    b_run = tl.cumsum(b_share, axis=0)
    b_c = (tl.floor(b_run + b_u) - tl.floor(b_run - b_share + b_u)) / num_samples
    b_missed = tl.sum(b_p, axis=0) - tl.sum(b_c, axis=0)
    b_seen = (b_p > 0).to(tl.float32)
    b_each = b_missed / tl.maximum(tl.sum(b_seen, axis=0), 1.0)
    return b_c, b_c + b_seen * b_each[None, :]


FORWARD = [
    triton.Config({"BM": rows}, num_warps=warps, num_stages=stages)
    for rows, warps, stages in (
        (64, 4, 2),
        (64, 4, 3),
        (128, 8, 2),
        (128, 8, 3),
        (64, 8, 2),
        (32, 4, 2),
        (16, 4, 1),  # fits everywhere
    )
]


BACKWARD = [
    triton.Config({"BM": rows}, num_warps=warps, num_stages=stages)
    for rows, warps, stages in (
        (32, 8, 1),
        (32, 8, 2),
        (32, 4, 1),
        (64, 4, 1),
        (64, 8, 1),
        (64, 8, 2),
        (128, 8, 1),
        (16, 4, 1),  # fits everywhere
    )
]


KEY = ["BD", "BV", "SIZE", "CAUSAL", "HAS_MASK"]


@tuned(FORWARD, KEY)
@triton.jit
def forward_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E)
    v_ptr,  # (B, Hkv, n, Ev)
    mask_ptr,  # (B, H, L, n)
    output_ptr,  # (N, M, Ev)
    normaliser_ptr,  # (N, M), float32, base 2
    seed_ptr,
    scale,
    num_samples,
    replicate,
    kv_heads,
    rows,
    length,
    n,
    features,
    width,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    m_stride_b,
    m_stride_h,
    m_stride_l,
    m_stride_n,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOT: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
):
    """Logits twice: for the rows' sums, then for the draws of a page at a time and their values."""
    tiles = tl.cdiv(rows, BM)
    i_n = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_d = tl.arange(0, BD)
    m_d = o_d < features
    o_v = tl.arange(0, BV)
    m_v = o_v < width
    o_p = tl.arange(0, PAGE)
    i_b = i_n // kv_heads
    i_h = i_n % kv_heads
    seed = tl.load(seed_ptr)
    p_q = q_ptr + (i_n * rows + o_m[:, None]) * features + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0).to(DOT)  # [BM, BD]
    p_k = k_ptr + i_b * k_stride_b + i_h * k_stride_h + o_d[:, None].to(tl.int64) * k_stride_d
    p_v = v_ptr + i_b * v_stride_b + i_h * v_stride_h + o_v[None, :].to(tl.int64) * v_stride_d
    i_head = i_h * (rows // length) + o_m // length
    p_m = mask_ptr + i_b * m_stride_b + i_head * m_stride_h + (o_m % length).to(tl.int64) * m_stride_l
    end = n
    if CAUSAL:
        end = tl.minimum(n, tl.max(tl.where(m_m, o_m % length, 0), axis=0) + 1)

    b_top = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    for i in range(0, end, PAGE):
        o_n = i + o_p
        p = p_k + o_n[None, :].to(tl.int64) * k_stride_n
        b_k = tl.load(p, mask=m_d[:, None] & (o_n < n)[None, :], other=0.0).to(DOT)  # [BD, PAGE]
        b_l = tl.dot(b_q, b_k, input_precision="tf32x3") * scale  # [BM, PAGE]
        b_l = masked(b_l, p_m, o_m, o_n, m_m, n, length, m_stride_n, HAS_MASK, CAUSAL)
        b_new = tl.maximum(b_top, tl.max(b_l, axis=1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_top - b_safe) + tl.sum(tl.exp2(b_l - b_safe[:, None]), axis=1)
        b_top = b_new
    b_norm = tl.where(b_sum > 0, b_top + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), 0.0)  # [BM]
    tl.store(normaliser_ptr + i_n * rows + o_m, b_norm, mask=m_m)

    b_o = tl.zeros([BM, BV], tl.float32)
    for i in range(0, end, PAGE):
        o_n = i + o_p
        m_n = o_n < n
        p = p_k + o_n[None, :].to(tl.int64) * k_stride_n
        b_k = tl.load(p, mask=m_d[:, None] & m_n[None, :], other=0.0).to(DOT)  # [BD, PAGE]
        b_l = tl.dot(b_q, b_k, input_precision="tf32x3") * scale  # [BM, PAGE]
        b_l = masked(b_l, p_m, o_m, o_n, m_m, n, length, m_stride_n, HAS_MASK, CAUSAL)
        b_p = tl.exp2(b_l - b_norm[:, None])
        _, b_w = drawn(b_p, seed, i // PAGE, o_m, i_n, length, num_samples, replicate)
        p = p_v + o_n[:, None].to(tl.int64) * v_stride_n
        b_v = tl.load(p, mask=m_n[:, None] & m_v[None, :], other=0.0).to(DOT)  # [PAGE, BV]
        b_high = b_w.to(DOT)
        b_o = tl.dot(b_high, b_v, b_o, input_precision="tf32x3")
        if (
            tl.float32 != DOT
        ):  # what 16 bits leave of a weight: outputs then miss by the rounding of their own
            b_o = tl.dot((b_w - b_high.to(tl.float32)).to(DOT), b_v, b_o)
    p_o = output_ptr + (i_n * rows + o_m[:, None]) * width + o_v[None, :]
    tl.store(p_o, b_o, mask=m_m[:, None] & m_v[None, :])


@tuned(BACKWARD, KEY)
@triton.jit
def backward_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    g_ptr,  # (N, M, Ev)
    delta_ptr,  # (N, M), float32: g . o
    normaliser_ptr,  # (N, M), float32
    dq_ptr,  # (N, M, E), float32
    seed_ptr,
    scale,
    to_base_2,
    num_samples,
    replicate,
    kv_heads,
    rows,
    length,
    n,
    features,
    width,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    m_stride_b,
    m_stride_h,
    m_stride_l,
    m_stride_n,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOT: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
):
    """The gradient of BM queries, page by page: see `prefill_reference.gradients`."""
    tiles = tl.cdiv(rows, BM)
    i_n = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_d = tl.arange(0, BD)
    m_d = o_d < features
    o_v = tl.arange(0, BV)
    m_v = o_v < width
    o_p = tl.arange(0, PAGE)
    i_b = i_n // kv_heads
    i_h = i_n % kv_heads
    seed = tl.load(seed_ptr)
    o_row = i_n * rows + o_m
    p_q = q_ptr + o_row[:, None] * features + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0).to(DOT)  # [BM, BD]
    p_g = g_ptr + o_row[:, None] * width + o_v[None, :]
    b_g = tl.load(p_g, mask=m_m[:, None] & m_v[None, :], other=0.0).to(DOT)  # [BM, BV]
    b_delta = tl.load(delta_ptr + o_row, mask=m_m, other=0.0)
    b_norm = tl.load(normaliser_ptr + o_row, mask=m_m, other=0.0)
    p_k = k_ptr + i_b * k_stride_b + i_h * k_stride_h
    p_v = v_ptr + i_b * v_stride_b + i_h * v_stride_h
    i_head = i_h * (rows // length) + o_m // length
    p_m = mask_ptr + i_b * m_stride_b + i_head * m_stride_h + (o_m % length).to(tl.int64) * m_stride_l
    end = n
    if CAUSAL:
        end = tl.minimum(n, tl.max(tl.where(m_m, o_m % length, 0), axis=0) + 1)
    b_dq = tl.zeros([BM, BD], tl.float32)
    for i in range(0, end, PAGE):
        o_n = i + o_p
        m_n = o_n < n
        o_k = o_n.to(tl.int64) * k_stride_n
        o_kd = o_d.to(tl.int64) * k_stride_d
        b_kt = tl.load(p_k + o_k[None, :] + o_kd[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0).to(
            DOT
        )
        b_l = tl.dot(b_q, b_kt, input_precision="tf32x3") * to_base_2  # [BM, PAGE]
        b_l = masked(b_l, p_m, o_m, o_n, m_m, n, length, m_stride_n, HAS_MASK, CAUSAL)
        b_p = tl.exp2(b_l - b_norm[:, None])
        b_c, b_w = drawn(b_p, seed, i // PAGE, o_m, i_n, length, num_samples, replicate)
        p = p_v + o_n[None, :].to(tl.int64) * v_stride_n + o_v[:, None].to(tl.int64) * v_stride_d
        b_vt = tl.load(p, mask=m_n[None, :] & m_v[:, None], other=0.0).to(DOT)  # [BV, PAGE]
        b_a = tl.dot(b_g, b_vt, input_precision="tf32x3")  # [BM, PAGE]
        b_base = b_delta - tl.sum(b_w * b_a, axis=1) + tl.sum(b_p * b_a, axis=1)
        b_dl = b_c * (b_a - b_base[:, None]) * scale
        b_k = tl.load(p_k + o_k[:, None] + o_kd[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0).to(DOT)
        b_dq = tl.dot(b_dl.to(DOT), b_k, b_dq, input_precision="tf32x3")
    p_dq = dq_ptr + o_row[:, None] * features + o_d[None, :]
    tl.store(p_dq, b_dq, mask=m_m[:, None] & m_d[None, :])


@tuned(BACKWARD, KEY)
@triton.jit
def backward_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    g_ptr,
    delta_ptr,
    normaliser_ptr,
    dk_ptr,  # (N, n, E), float32
    dv_ptr,  # (N, n, Ev), float32
    seed_ptr,
    scale,
    to_base_2,
    num_samples,
    replicate,
    kv_heads,
    rows,
    length,
    n,
    features,
    width,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    m_stride_b,
    m_stride_h,
    m_stride_l,
    m_stride_n,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOT: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
):
    """The gradients of a page of keys and values, over all rows that share them."""
    i_n = (tl.program_id(0) // tl.cdiv(n, PAGE)).to(tl.int64)
    i_page = tl.program_id(0) % tl.cdiv(n, PAGE)
    o_n = i_page * PAGE + tl.arange(0, PAGE)
    m_n = o_n < n
    o_d = tl.arange(0, BD)
    m_d = o_d < features
    o_v = tl.arange(0, BV)
    m_v = o_v < width
    i_b = i_n // kv_heads
    i_h = i_n % kv_heads
    seed = tl.load(seed_ptr)
    p_k = k_ptr + i_b * k_stride_b + i_h * k_stride_h + o_n[:, None].to(tl.int64) * k_stride_n
    p_k = p_k + o_d[None, :].to(tl.int64) * k_stride_d
    b_k = tl.load(p_k, mask=m_n[:, None] & m_d[None, :], other=0.0).to(DOT)  # [PAGE, BD]
    p_v = v_ptr + i_b * v_stride_b + i_h * v_stride_h + o_n[:, None].to(tl.int64) * v_stride_n
    p_v = p_v + o_v[None, :].to(tl.int64) * v_stride_d
    b_v = tl.load(p_v, mask=m_n[:, None] & m_v[None, :], other=0.0).to(DOT)  # [PAGE, BV]
    b_dk = tl.zeros([PAGE, BD], tl.float32)
    b_dv = tl.zeros([PAGE, BV], tl.float32)
    for i in range(0, rows, BM):
        o_m = i + tl.arange(0, BM)
        m_m = o_m < rows
        # A causal block of rows, none of which sees the page, is passed over.
        last = i_page * PAGE
        if CAUSAL:
            last = tl.max(tl.where(m_m, o_m % length, 0), axis=0)
        if last >= i_page * PAGE:
            o_row = i_n * rows + o_m
            p_qt = q_ptr + o_row[None, :] * features + o_d[:, None]
            b_qt = tl.load(p_qt, mask=m_m[None, :] & m_d[:, None], other=0.0).to(DOT)  # [BD, BM]
            b_l = tl.dot(b_k, b_qt, input_precision="tf32x3") * to_base_2  # [PAGE, BM]
            m_l = m_n[:, None] & m_m[None, :]
            if CAUSAL:
                m_l = m_l & (o_n[:, None] <= (o_m % length)[None, :])
            if HAS_MASK > 0:
                i_head = i_h * (rows // length) + o_m // length
                p_m = (
                    mask_ptr
                    + i_b * m_stride_b
                    + i_head * m_stride_h
                    + (o_m % length).to(tl.int64) * m_stride_l
                )
                b_m = tl.load(p_m[None, :] + o_n[:, None].to(tl.int64) * m_stride_n, mask=m_l, other=0)
                if HAS_MASK == 1:
                    m_l = m_l & (b_m != 0)
                else:
                    b_l += b_m.to(tl.float32) * LOG2
            b_norm = tl.load(normaliser_ptr + o_row, mask=m_m, other=0.0)
            b_p = tl.exp2(tl.where(m_l, b_l, float("-inf")) - b_norm[None, :])
            b_c, b_w = drawn_transposed(b_p, seed, i_page, o_m, i_n, length, num_samples, replicate)
            p_gt = g_ptr + o_row[None, :] * width + o_v[:, None]
            b_gt = tl.load(p_gt, mask=m_m[None, :] & m_v[:, None], other=0.0).to(DOT)  # [BV, BM]
            b_a = tl.dot(b_v, b_gt, input_precision="tf32x3")  # [PAGE, BM]
            b_delta = tl.load(delta_ptr + o_row, mask=m_m, other=0.0)
            b_base = b_delta - tl.sum(b_w * b_a, axis=0) + tl.sum(b_p * b_a, axis=0)
            b_dl = b_c * (b_a - b_base[None, :]) * scale
            p_g = g_ptr + o_row[:, None] * width + o_v[None, :]
            b_g = tl.load(p_g, mask=m_m[:, None] & m_v[None, :], other=0.0).to(DOT)  # [BM, BV]
            b_dv = tl.dot(b_w.to(DOT), b_g, b_dv, input_precision="tf32x3")
            p_q = q_ptr + o_row[:, None] * features + o_d[None, :]
            b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0).to(DOT)  # [BM, BD]
            b_dk = tl.dot(b_dl.to(DOT), b_q, b_dk, input_precision="tf32x3")
    o_out = i_n * n + o_n[:, None]
    tl.store(dk_ptr + o_out * features + o_d[None, :], b_dk, mask=m_n[:, None] & m_d[None, :])
    tl.store(dv_ptr + o_out * width + o_v[None, :], b_dv, mask=m_n[:, None] & m_v[None, :])
