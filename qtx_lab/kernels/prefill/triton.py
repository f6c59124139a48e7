"""The kernels of sampled attention of many queries and of its gradients: see `launch`."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

from ...streams import Purpose
from ..blocks import TO_BASE_2
from ..launches import tuned
from ..philox import uniform24, words

PAGES = tl.constexpr(int(Purpose.PAGES))

FORWARD_CONFIGS = [
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
BACKWARD_CONFIGS = [
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


@triton.jit
def mask_logits(
    b_l,  # [BM, PAGE]
    p_m,  # [BM]
    o_m,  # [BM]
    o_n,  # [PAGE]
    m_m,  # [BM]
    n,
    length,
    first_position,
    mask_stride_n,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Base-2 logits [BM, PAGE] with -inf where a row does not attend to a key."""
    m_l = m_m[:, None] & (o_n < n)[None, :]  # [BM, PAGE]
    if CAUSAL:
        m_l = m_l & (o_n[None, :] <= (first_position + o_m % length)[:, None])
    if HAS_MASK > 0:
        b_m = tl.load(
            p_m[:, None] + o_n[None, :].to(tl.int64) * mask_stride_n, mask=m_l, other=0
        )  # [BM, PAGE]
        if HAS_MASK == 1:
            m_l = m_l & (b_m != 0)
        else:
            b_l += b_m.to(tl.float32) * TO_BASE_2
    return tl.where(m_l, b_l, float("-inf"))


@triton.jit
def page_offsets(stream_key, head_group, b_position, i_page, replicate):
    """Where the comb of a page starts in rows at positions [BM]: float32, [BM].

    In units of the distance of its points. Two of the four words of a counter are one number, whose upper 24
    bits are taken.
    """
    b_pair = (b_position * 0 + i_page // 2).to(tl.int32)  # [BM]
    b_w0, _, b_w2, _ = words(stream_key, b_pair, b_position, head_group, (replicate << 8) | PAGES)
    return uniform24(tl.where(i_page % 2 == 0, b_w0, b_w2))


@triton.jit
def draw_page(b_p, b_u, num_samples):
    """Draws c / S and weights w of a page, [BM, PAGE] each, for probabilities [BM, PAGE] and offsets [BM]."""
    b_share = b_p * num_samples  # [BM, PAGE]
    b_run = tl.cumsum(b_share, axis=1)  # [BM, PAGE]
    b_c = (
        tl.floor(b_run + b_u[:, None]) - tl.floor(b_run - b_share + b_u[:, None])
    ) / num_samples  # [BM, PAGE]
    b_missed = tl.sum(b_p, axis=1) - tl.sum(b_c, axis=1)  # [BM]
    b_visible = (b_p > 0).to(tl.float32)  # [BM, PAGE]
    b_each = b_missed / tl.maximum(tl.sum(b_visible, axis=1), 1.0)  # [BM]
    return b_c, b_c + b_visible * b_each[:, None]


@triton.jit
def draw_page_transposed(b_p, b_u, num_samples):
    """The results of `draw_page` as [PAGE, BM] each, from probabilities [PAGE, BM] and offsets [BM].

    So no product has to be transposed, which some versions of Triton do wrongly on Hopper GPUs.
    """
    b_share = b_p * num_samples  # [PAGE, BM]
    b_run = tl.cumsum(b_share, axis=0)  # [PAGE, BM]
    b_c = (
        tl.floor(b_run + b_u[None, :]) - tl.floor(b_run - b_share + b_u[None, :])
    ) / num_samples  # [PAGE, BM]
    b_missed = tl.sum(b_p, axis=0) - tl.sum(b_c, axis=0)  # [BM]
    b_visible = (b_p > 0).to(tl.float32)  # [PAGE, BM]
    b_each = b_missed / tl.maximum(tl.sum(b_visible, axis=0), 1.0)  # [BM]
    return b_c, b_c + b_visible * b_each[None, :]


@tuned(FORWARD_CONFIGS, KEY)
@triton.jit
def forward_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E)
    v_ptr,  # (B, Hkv, n, Ev)
    mask_ptr,  # (B, H, L, n)
    output_ptr,  # (N, M, Ev), float32
    normaliser_ptr,  # (N, M), float32: the base-2 logarithm of the sum of 2^logit
    stream_key_ptr,  # (N,), int64
    head_group_ptr,  # (N,), int64
    position_ptr,  # (L,) or (N, L), int64
    position_stride,
    first_replicate,
    logit_scale,  # of base-2 logits
    num_samples,
    kv_heads,
    rows,
    length,
    first_position,
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
    mask_stride_b,
    mask_stride_h,
    mask_stride_l,
    mask_stride_n,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOT: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
):
    """Store the output of BM rows.

    Logits are computed for the sums of the rows, and again for the draws of each page.
    """
    tiles = tl.cdiv(rows, BM)
    i_n = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)  # [BM]
    m_m = o_m < rows  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    m_d = o_d < features  # [BD]
    o_v = tl.arange(0, BV)  # [BV]
    m_v = o_v < width  # [BV]
    o_p = tl.arange(0, PAGE)  # [PAGE]
    i_b = i_n // kv_heads
    i_h = i_n % kv_heads
    stream_key, head_group = tl.load(stream_key_ptr + i_n), tl.load(head_group_ptr + i_n)
    b_position = tl.load(position_ptr + i_n * position_stride + o_m % length)  # [BM]
    p_q = q_ptr + (i_n * rows + o_m[:, None]) * features + o_d[None, :]  # [BM, BD]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0).to(DOT)  # [BM, BD]
    p_k = k_ptr + i_b * k_stride_b + i_h * k_stride_h + o_d[:, None].to(tl.int64) * k_stride_d  # [BD, 1]
    p_v = v_ptr + i_b * v_stride_b + i_h * v_stride_h + o_v[None, :].to(tl.int64) * v_stride_d  # [1, BV]
    i_head = i_h * (rows // length) + o_m // length  # [BM]
    p_m = (
        mask_ptr + i_b * mask_stride_b + i_head * mask_stride_h + (o_m % length).to(tl.int64) * mask_stride_l
    )  # [BM]
    end = n
    if CAUSAL:
        end = tl.minimum(n, first_position + tl.max(tl.where(m_m, o_m % length, 0), axis=0) + 1)

    b_max = tl.full([BM], float("-inf"), tl.float32)  # [BM]
    b_sum = tl.zeros([BM], tl.float32)  # [BM]
    for i in range(0, end, PAGE):
        o_n = i + o_p  # [PAGE]
        p = p_k + o_n[None, :].to(tl.int64) * k_stride_n  # [BD, PAGE]
        b_k = tl.load(p, mask=m_d[:, None] & (o_n < n)[None, :], other=0.0).to(DOT)  # [BD, PAGE]
        b_l = tl.dot(b_q, b_k, input_precision="tf32x3") * logit_scale  # [BM, PAGE]
        b_l = mask_logits(b_l, p_m, o_m, o_n, m_m, n, length, first_position, mask_stride_n, HAS_MASK, CAUSAL)
        b_new = tl.maximum(b_max, tl.max(b_l, axis=1))  # [BM]
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # [BM]
        b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_l - b_shift[:, None]), axis=1)
        b_max = b_new
    b_norm = tl.where(b_sum > 0, b_max + tl.log2(tl.where(b_sum > 0, b_sum, 1.0)), 0.0)  # [BM]
    tl.store(normaliser_ptr + i_n * rows + o_m, b_norm, mask=m_m)

    b_o = tl.zeros([BM, BV], tl.float32)  # [BM, BV]
    for i in range(0, end, PAGE):
        o_n = i + o_p  # [PAGE]
        m_n = o_n < n  # [PAGE]
        p = p_k + o_n[None, :].to(tl.int64) * k_stride_n  # [BD, PAGE]
        b_k = tl.load(p, mask=m_d[:, None] & m_n[None, :], other=0.0).to(DOT)  # [BD, PAGE]
        b_l = tl.dot(b_q, b_k, input_precision="tf32x3") * logit_scale  # [BM, PAGE]
        b_l = mask_logits(b_l, p_m, o_m, o_n, m_m, n, length, first_position, mask_stride_n, HAS_MASK, CAUSAL)
        b_p = tl.exp2(b_l - b_norm[:, None])  # [BM, PAGE]
        b_u = page_offsets(stream_key, head_group, b_position, i // PAGE, first_replicate)  # [BM]
        _, b_w = draw_page(b_p, b_u, num_samples)  # [BM, PAGE]
        p = p_v + o_n[:, None].to(tl.int64) * v_stride_n  # [PAGE, BV]
        b_v = tl.load(p, mask=m_n[:, None] & m_v[None, :], other=0.0).to(DOT)  # [PAGE, BV]
        b_high = b_w.to(DOT)  # [BM, PAGE]
        b_o = tl.dot(b_high, b_v, b_o, input_precision="tf32x3")
        if tl.float32 != DOT:
            # With what 16 bits leave of a weight, outputs are off by no more than their own rounding.
            b_o = tl.dot((b_w - b_high.to(tl.float32)).to(DOT), b_v, b_o)
    p_o = output_ptr + (i_n * rows + o_m[:, None]) * width + o_v[None, :]  # [BM, BV]
    tl.store(p_o, b_o, mask=m_m[:, None] & m_v[None, :])


@tuned(BACKWARD_CONFIGS, KEY)
@triton.jit
def backward_q_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E)
    v_ptr,  # (B, Hkv, n, Ev)
    mask_ptr,  # (B, H, L, n)
    g_ptr,  # (N, M, Ev): the gradient of the output
    delta_ptr,  # (N, M), float32: g . o
    normaliser_ptr,  # (N, M), float32
    dq_ptr,  # (N, M, E), float32
    stream_key_ptr,
    head_group_ptr,
    position_ptr,
    position_stride,
    first_replicate,
    scale,
    logit_scale,
    num_samples,
    kv_heads,
    rows,
    length,
    first_position,
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
    mask_stride_b,
    mask_stride_h,
    mask_stride_l,
    mask_stride_n,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOT: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
):
    """Store the gradient of BM queries, page by page: see `reference.gradients`."""
    tiles = tl.cdiv(rows, BM)
    i_n = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)  # [BM]
    m_m = o_m < rows  # [BM]
    o_d = tl.arange(0, BD)  # [BD]
    m_d = o_d < features  # [BD]
    o_v = tl.arange(0, BV)  # [BV]
    m_v = o_v < width  # [BV]
    o_p = tl.arange(0, PAGE)  # [PAGE]
    i_b = i_n // kv_heads
    i_h = i_n % kv_heads
    stream_key, head_group = tl.load(stream_key_ptr + i_n), tl.load(head_group_ptr + i_n)
    b_position = tl.load(position_ptr + i_n * position_stride + o_m % length)  # [BM]
    o_row = i_n * rows + o_m  # [BM]
    p_q = q_ptr + o_row[:, None] * features + o_d[None, :]  # [BM, BD]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0).to(DOT)  # [BM, BD]
    p_g = g_ptr + o_row[:, None] * width + o_v[None, :]  # [BM, BV]
    b_g = tl.load(p_g, mask=m_m[:, None] & m_v[None, :], other=0.0).to(DOT)  # [BM, BV]
    b_delta = tl.load(delta_ptr + o_row, mask=m_m, other=0.0)  # [BM]
    b_norm = tl.load(normaliser_ptr + o_row, mask=m_m, other=0.0)  # [BM]
    p_k = k_ptr + i_b * k_stride_b + i_h * k_stride_h
    p_v = v_ptr + i_b * v_stride_b + i_h * v_stride_h
    i_head = i_h * (rows // length) + o_m // length  # [BM]
    p_m = (
        mask_ptr + i_b * mask_stride_b + i_head * mask_stride_h + (o_m % length).to(tl.int64) * mask_stride_l
    )  # [BM]
    end = n
    if CAUSAL:
        end = tl.minimum(n, first_position + tl.max(tl.where(m_m, o_m % length, 0), axis=0) + 1)
    b_dq = tl.zeros([BM, BD], tl.float32)  # [BM, BD]
    for i in range(0, end, PAGE):
        o_n = i + o_p  # [PAGE]
        m_n = o_n < n  # [PAGE]
        o_k = o_n.to(tl.int64) * k_stride_n  # [PAGE]
        o_kd = o_d.to(tl.int64) * k_stride_d  # [BD]
        p = p_k + o_k[None, :] + o_kd[:, None]  # [BD, PAGE]
        b_kt = tl.load(p, mask=m_n[None, :] & m_d[:, None], other=0.0).to(DOT)  # [BD, PAGE]
        b_l = tl.dot(b_q, b_kt, input_precision="tf32x3") * logit_scale  # [BM, PAGE]
        b_l = mask_logits(b_l, p_m, o_m, o_n, m_m, n, length, first_position, mask_stride_n, HAS_MASK, CAUSAL)
        b_p = tl.exp2(b_l - b_norm[:, None])  # [BM, PAGE]
        b_u = page_offsets(stream_key, head_group, b_position, i // PAGE, first_replicate)  # [BM]
        b_c, b_w = draw_page(b_p, b_u, num_samples)  # [BM, PAGE]
        p = (
            p_v + o_n[None, :].to(tl.int64) * v_stride_n + o_v[:, None].to(tl.int64) * v_stride_d
        )  # [BV, PAGE]
        b_vt = tl.load(p, mask=m_n[None, :] & m_v[:, None], other=0.0).to(DOT)  # [BV, PAGE]
        b_a = tl.dot(b_g, b_vt, input_precision="tf32x3")  # [BM, PAGE]
        b_base = b_delta - tl.sum(b_w * b_a, axis=1) + tl.sum(b_p * b_a, axis=1)  # [BM]
        b_dl = b_c * (b_a - b_base[:, None]) * scale  # [BM, PAGE]
        p = p_k + o_k[:, None] + o_kd[None, :]  # [PAGE, BD]
        b_k = tl.load(p, mask=m_n[:, None] & m_d[None, :], other=0.0).to(DOT)  # [PAGE, BD]
        b_dq = tl.dot(b_dl.to(DOT), b_k, b_dq, input_precision="tf32x3")
    p_dq = dq_ptr + o_row[:, None] * features + o_d[None, :]  # [BM, BD]
    tl.store(p_dq, b_dq, mask=m_m[:, None] & m_d[None, :])


@tuned(BACKWARD_CONFIGS, KEY)
@triton.jit
def backward_kv_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E)
    v_ptr,  # (B, Hkv, n, Ev)
    mask_ptr,  # (B, H, L, n)
    g_ptr,  # (N, M, Ev)
    delta_ptr,  # (N, M), float32
    normaliser_ptr,  # (N, M), float32
    dk_ptr,  # (N, n, E), float32
    dv_ptr,  # (N, n, Ev), float32
    stream_key_ptr,
    head_group_ptr,
    position_ptr,
    position_stride,
    first_replicate,
    scale,
    logit_scale,
    num_samples,
    kv_heads,
    rows,
    length,
    first_position,
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
    mask_stride_b,
    mask_stride_h,
    mask_stride_l,
    mask_stride_n,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOT: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
):
    """Store the gradients of a page of keys and values, summed over all rows: see `reference.gradients`."""
    i_n = (tl.program_id(0) // tl.cdiv(n, PAGE)).to(tl.int64)
    i_page = tl.program_id(0) % tl.cdiv(n, PAGE)
    o_n = i_page * PAGE + tl.arange(0, PAGE)  # [PAGE]
    m_n = o_n < n  # [PAGE]
    o_d = tl.arange(0, BD)  # [BD]
    m_d = o_d < features  # [BD]
    o_v = tl.arange(0, BV)  # [BV]
    m_v = o_v < width  # [BV]
    i_b = i_n // kv_heads
    i_h = i_n % kv_heads
    stream_key, head_group = tl.load(stream_key_ptr + i_n), tl.load(head_group_ptr + i_n)
    p_position = position_ptr + i_n * position_stride
    p_k = k_ptr + i_b * k_stride_b + i_h * k_stride_h + o_n[:, None].to(tl.int64) * k_stride_n  # [PAGE, 1]
    p_k = p_k + o_d[None, :].to(tl.int64) * k_stride_d  # [PAGE, BD]
    b_k = tl.load(p_k, mask=m_n[:, None] & m_d[None, :], other=0.0).to(DOT)  # [PAGE, BD]
    p_v = v_ptr + i_b * v_stride_b + i_h * v_stride_h + o_n[:, None].to(tl.int64) * v_stride_n  # [PAGE, 1]
    p_v = p_v + o_v[None, :].to(tl.int64) * v_stride_d  # [PAGE, BV]
    b_v = tl.load(p_v, mask=m_n[:, None] & m_v[None, :], other=0.0).to(DOT)  # [PAGE, BV]
    b_dk = tl.zeros([PAGE, BD], tl.float32)  # [PAGE, BD]
    b_dv = tl.zeros([PAGE, BV], tl.float32)  # [PAGE, BV]
    for i in range(0, rows, BM):
        o_m = i + tl.arange(0, BM)  # [BM]
        m_m = o_m < rows  # [BM]
        # A block of rows of which none attends to the page is skipped.
        last = i_page * PAGE
        if CAUSAL:
            last = first_position + tl.max(tl.where(m_m, o_m % length, 0), axis=0)
        if last >= i_page * PAGE:
            o_row = i_n * rows + o_m  # [BM]
            p_qt = q_ptr + o_row[None, :] * features + o_d[:, None]  # [BD, BM]
            b_qt = tl.load(p_qt, mask=m_m[None, :] & m_d[:, None], other=0.0).to(DOT)  # [BD, BM]
            b_l = tl.dot(b_k, b_qt, input_precision="tf32x3") * logit_scale  # [PAGE, BM]
            m_l = m_n[:, None] & m_m[None, :]  # [PAGE, BM]
            if CAUSAL:
                m_l = m_l & (o_n[:, None] <= (first_position + o_m % length)[None, :])
            if HAS_MASK > 0:
                i_head = i_h * (rows // length) + o_m // length  # [BM]
                p_m = (
                    mask_ptr
                    + i_b * mask_stride_b
                    + i_head * mask_stride_h
                    + (o_m % length).to(tl.int64) * mask_stride_l
                )  # [BM]
                p = p_m[None, :] + o_n[:, None].to(tl.int64) * mask_stride_n  # [PAGE, BM]
                b_m = tl.load(p, mask=m_l, other=0)  # [PAGE, BM]
                if HAS_MASK == 1:
                    m_l = m_l & (b_m != 0)
                else:
                    b_l += b_m.to(tl.float32) * TO_BASE_2
            b_norm = tl.load(normaliser_ptr + o_row, mask=m_m, other=0.0)  # [BM]
            b_p = tl.exp2(tl.where(m_l, b_l, float("-inf")) - b_norm[None, :])  # [PAGE, BM]
            b_position = tl.load(p_position + o_m % length)  # [BM]
            b_u = page_offsets(stream_key, head_group, b_position, i_page, first_replicate)  # [BM]
            b_c, b_w = draw_page_transposed(b_p, b_u, num_samples)  # [PAGE, BM]
            p_gt = g_ptr + o_row[None, :] * width + o_v[:, None]  # [BV, BM]
            b_gt = tl.load(p_gt, mask=m_m[None, :] & m_v[:, None], other=0.0).to(DOT)  # [BV, BM]
            b_a = tl.dot(b_v, b_gt, input_precision="tf32x3")  # [PAGE, BM]
            b_delta = tl.load(delta_ptr + o_row, mask=m_m, other=0.0)  # [BM]
            b_base = b_delta - tl.sum(b_w * b_a, axis=0) + tl.sum(b_p * b_a, axis=0)  # [BM]
            b_dl = b_c * (b_a - b_base[None, :]) * scale  # [PAGE, BM]
            p_g = g_ptr + o_row[:, None] * width + o_v[None, :]  # [BM, BV]
            b_g = tl.load(p_g, mask=m_m[:, None] & m_v[None, :], other=0.0).to(DOT)  # [BM, BV]
            b_dv = tl.dot(b_w.to(DOT), b_g, b_dv, input_precision="tf32x3")
            p_q = q_ptr + o_row[:, None] * features + o_d[None, :]  # [BM, BD]
            b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0).to(DOT)  # [BM, BD]
            b_dk = tl.dot(b_dl.to(DOT), b_q, b_dk, input_precision="tf32x3")
    o_out = i_n * n + o_n[:, None]  # [PAGE, 1]
    tl.store(dk_ptr + o_out * features + o_d[None, :], b_dk, mask=m_n[:, None] & m_d[None, :])
    tl.store(dv_ptr + o_out * width + o_v[None, :], b_dv, mask=m_n[:, None] & m_v[None, :])
