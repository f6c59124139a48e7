"""Decoding by draws from a sketch of the keys: scan the sketch, draw, exact logits and values at the draws alone."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import (
    Space,
    comb,
    draw_options,
    find_page,
    power_of_two,
    prefix,
    scan_grid,
    scan_options,
    shifts,
    store_masses,
    tuned,
)
from .decode_reference import LOG2_E, Inputs
from .philox import INTERPRETED
from .sketch_decode_reference import Sketch, SketchDecoded, defensive_inverse


@triton.autotune(
    tuned(
        [
            triton.Config({"NP": pages, "LOOP": loop}, num_warps=warps, num_stages=stages)
            for pages, warps in ((2, 4), (4, 4), (4, 8))
            for loop in (4, 16)
            for stages in (2, 4)
        ]
    ),
    key=["BD", "BM", "BR", "SIZE"],
    cache_results=True,
)
@triton.jit
def scan_sketch_kernel(
    q_ptr,  # (N, M, E)
    weight_ptr,  # (N, E, r), or (N, E)
    table_ptr,  # (N, r, n), or (N, E / 2, n)
    mass_ptr,  # (N, M, pages * PAGE)
    sum_ptr,  # (N, M, pages)
    top_ptr,  # (N, M, pages)
    seed_ptr,
    scale,
    rows,
    n,
    pages,
    features,
    rank,
    room,  # columns that may be read
    t_stride_n,
    t_stride_r,
    t_stride_k,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    KIND: tl.constexpr,  # 0: low-rank of 16 or 8 bits, 1: low-rank of 32, 2: int4
    SIZE: tl.constexpr,
    NP: tl.constexpr,
    LOOP: tl.constexpr,
):
    """Guessed logits of NP pages at a time, kept as masses."""
    tiles = tl.cdiv(rows, BM)
    i_n = (tl.program_id(0) // tiles).to(tl.int64)
    o_m = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_r = tl.arange(0, BR)
    m_r = o_r < rank
    seed = tl.load(seed_ptr)
    p_q = q_ptr + (i_n * rows + o_m[:, None]) * features
    if KIND == 2:
        m_odd = 2 * o_r + 1 < features
        b_q = tl.load(p_q + 2 * o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0).to(tl.float32)
        b_o = tl.load(p_q + 2 * o_r[None, :] + 1, mask=m_m[:, None] & m_odd[None, :], other=0.0).to(
            tl.float32
        )
        p_w = weight_ptr + i_n * features + 2 * o_r
        b_q = b_q * tl.load(p_w, mask=m_r, other=0.0)[None, :] * scale  # [BM, BR], even features
        b_o = b_o * tl.load(p_w + 1, mask=m_odd, other=0.0)[None, :] * scale  # [BM, BR], odd ones
        b_unit = tl.maximum(tl.maximum(tl.max(tl.abs(b_q), axis=1), tl.max(tl.abs(b_o), axis=1)), 1e-30)
        b_high = (b_q / b_unit[:, None]).to(tl.float16)
        b_low = (b_o / b_unit[:, None]).to(tl.float16)
    else:
        o_d = tl.arange(0, BD)
        m_d = o_d < features
        b_q = tl.load(p_q + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        p_w = weight_ptr + (i_n * features + o_d[:, None]) * rank + o_r[None, :]
        b_w = tl.load(p_w, mask=m_d[:, None] & m_r[None, :], other=0.0)  # [BD, BR]
        b_q = tl.dot(b_q, b_w, input_precision="ieee") * scale  # [BM, BR]
        if KIND == 0:
            b_unit = tl.maximum(tl.max(tl.abs(b_q), axis=1), 1e-30)
            b_q = b_q / b_unit[:, None]
            b_high = b_q.to(tl.float16)
            b_low = ((b_q - b_high.to(tl.float32)) * 2048.0).to(tl.float16)
    p_t = table_ptr + i_n * t_stride_n + o_r[:, None].to(tl.int64) * t_stride_r

    for i in range(LOOP):
        i_page = (tl.program_id(1) * LOOP + i) * NP
        o_n = i_page * PAGE + tl.arange(0, NP * PAGE)
        m_n = o_n < n
        p = p_t + o_n[None, :].to(tl.int64) * t_stride_k
        # A bound that 16 divides keeps loads wide, whatever n is.
        m_t = m_r[:, None] & (o_n < room)[None, :]
        b_t = tl.load(p, mask=m_t, other=0 if KIND == 2 else 0.0)  # [BR, NP * PAGE]
        if KIND == 2:
            # 1024 + x is the half whose last bits are x: no conversion.
            b_bits = b_t.to(tl.uint16)
            b_even = ((b_bits & 15) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
            b_odd = ((b_bits >> 4) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
            b_l = tl.dot(b_high, b_even.to(tl.float16))
            b_l = tl.dot(b_low, b_odd.to(tl.float16), b_l) * b_unit[:, None]  # [BM, NP * PAGE]
        elif KIND == 1:
            b_l = tl.dot(b_q, b_t.to(tl.float32), input_precision="ieee")
        else:
            b_t = b_t.to(tl.float16)
            b_l = (tl.dot(b_high, b_t) + tl.dot(b_low, b_t) * (1 / 2048)) * b_unit[:, None]
        b_l = tl.where(m_m[:, None] & m_n[None, :], b_l, float("-inf"))
        store_masses(
            b_l, mass_ptr, sum_ptr, top_ptr, seed, i_n, o_m, m_m, i_page, rows, pages, BM, NP, PAGE, UNITS
        )


@triton.autotune(
    tuned(
        [
            triton.Config({"BS": size}, num_warps=warps)
            for size, warps in ((64, 4), (32, 4), (16, 4), (32, 8), (16, 2))
        ]
    ),
    key=["BD", "BV", "SIZE", "CHUNK"],
    cache_results=True,
)
@triton.jit
def draw_sketch_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E)
    v_ptr,  # (B, Hkv, n, Ev)
    mass_ptr,
    top_ptr,
    start_ptr,
    total_ptr,
    highest_ptr,
    each_ptr,
    seed_ptr,
    index_ptr,  # (N, M, R, S), int64
    log_weight_ptr,  # (N, M, R, S), float32
    scalar_ptr,  # (N, M, R, chunks, 3), float32: largest log weight, sum of weights, sum of a
    vector_ptr,  # (N, M, R, chunks, 3, Ev), float32: sums of w v, a v and a v^2
    scale,
    kv_heads,
    rows,
    length,
    n,
    pages,
    features,
    width,
    num_samples,
    replicates,
    fine,
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
    PAGE: tl.constexpr,
    LOG: tl.constexpr,
    WORD: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BS: tl.constexpr,
):
    """Exact logits, weights and values at up to CHUNK draws of a row; a key that comes again adds nothing."""
    i_r = tl.program_id(0).to(tl.int64)
    i_replicate = tl.program_id(1)
    i_chunk = tl.program_id(2)
    i_n = i_r // rows
    i_l = (i_r % rows) % length
    seed = tl.load(seed_ptr)
    total = tl.load(total_ptr + i_r)
    highest = tl.load(highest_ptr + i_r)
    each = tl.load(each_ptr + i_r)
    o_d = tl.arange(0, BD)
    m_d = o_d < features
    o_v = tl.arange(0, BV)
    m_v = o_v < width
    o_p = tl.arange(0, PAGE)
    i_b = i_n // kv_heads
    i_h = i_n % kv_heads
    p_k = k_ptr + i_b * k_stride_b + i_h * k_stride_h + o_d[None, :].to(tl.int64) * k_stride_d
    p_v = v_ptr + i_b * v_stride_b + i_h * v_stride_h + o_v[None, :].to(tl.int64) * v_stride_d
    i_out = i_r * replicates + i_replicate
    b_q = tl.load(q_ptr + i_r * features + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]

    largest = tl.full([], float("-inf"), tl.float32)
    b_den = tl.zeros([], tl.float32)
    b_a = tl.zeros([], tl.float32)
    b_wv = tl.zeros([BV], tl.float32)
    b_av = tl.zeros([BV], tl.float32)
    b_avv = tl.zeros([BV], tl.float32)
    for i in range(0, CHUNK, BS):
        b_s = i_chunk * CHUNK + i + tl.arange(0, BS)
        m_s = b_s < num_samples
        b_point = comb(b_s, total, num_samples, seed, i_replicate, i_l, i_n)  # [BS]
        b_before = comb(b_s - 1, total, num_samples, seed, i_replicate, i_l, i_n)
        b_page = find_page(start_ptr + i_r * pages, b_point, pages, LOG)
        b_page = tl.where(m_s, b_page, 0)
        o_page = i_r * pages + b_page
        b_up, b_down = shifts(tl.load(top_ptr + o_page), highest, fine)
        b_start = tl.load(start_ptr + o_page)
        b_rest = b_point - b_start
        o_key = b_page.to(tl.int64)[:, None] * PAGE + o_p[None, :]  # [BS, PAGE]
        b_mass = tl.load(mass_ptr + o_page[:, None] * PAGE + o_p[None, :]).to(tl.int64) & WORD
        b_mass = tl.where((b_down == 0)[:, None], b_mass << b_up[:, None], 0) + tl.where(o_key < n, each, 0)
        b_below = tl.cumsum(b_mass, axis=1) <= b_rest[:, None]  # [BS, PAGE]
        b_place = tl.sum(b_below.to(tl.int32), axis=1)
        b_begin = b_start + tl.sum(tl.where(b_below, b_mass, 0), axis=1)  # of the key
        b_own = tl.sum(tl.where(o_p[None, :] == b_place[:, None], b_mass, 0), axis=1)
        b_index = tl.where(m_s, b_page.to(tl.int64) * PAGE + b_place, 0)
        m_fresh = m_s & ((b_s == 0) | (b_before < b_begin))

        b_chance = b_own.to(tl.float64) / (b_own * 0 + total).to(tl.float64)
        b_pi = tl.minimum(b_chance * (b_own * 0 + num_samples).to(tl.float64), 1.0).to(tl.float32)
        p = p_k + b_index[:, None] * k_stride_n
        b_k = tl.load(p, mask=m_fresh[:, None] & m_d[None, :], other=0.0).to(tl.float32)  # [BS, BD]
        b_l = tl.sum(b_k * b_q[None, :], axis=1) * scale
        b_pi = tl.where(m_fresh, b_pi, 1.0)
        b_lw = tl.where(m_fresh, b_l - tl.log2(b_pi), float("-inf"))
        tl.store(index_ptr + i_out * num_samples + b_s, b_index, mask=m_s)
        tl.store(log_weight_ptr + i_out * num_samples + b_s, b_lw, mask=m_s)

        top = tl.maximum(largest, tl.max(b_lw, axis=0))
        safe = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp2(largest - safe)
        largest = top
        b_w = tl.exp2(b_lw - safe)  # [BS]
        b_var = (1.0 - b_pi) * b_w * b_w
        p = p_v + b_index[:, None] * v_stride_n
        b_v = tl.load(p, mask=m_fresh[:, None] & m_v[None, :], other=0.0).to(tl.float32)  # [BS, BV]
        b_den = b_den * shrink + tl.sum(b_w, axis=0)
        b_wv = b_wv * shrink + tl.sum(b_w[:, None] * b_v, axis=0)
        b_a = b_a * shrink * shrink + tl.sum(b_var, axis=0)
        b_av = b_av * shrink * shrink + tl.sum(b_var[:, None] * b_v, axis=0)
        b_avv = b_avv * shrink * shrink + tl.sum(b_var[:, None] * b_v * b_v, axis=0)
    i_part = i_out * tl.num_programs(2) + i_chunk
    tl.store(scalar_ptr + i_part * 3, largest)
    tl.store(scalar_ptr + i_part * 3 + 1, b_den)
    tl.store(scalar_ptr + i_part * 3 + 2, b_a)
    tl.store(vector_ptr + i_part * 3 * width + o_v, b_wv, mask=m_v)
    tl.store(vector_ptr + (i_part * 3 + 1) * width + o_v, b_av, mask=m_v)
    tl.store(vector_ptr + (i_part * 3 + 2) * width + o_v, b_avv, mask=m_v)


@triton.jit
def combine_kernel(
    scalar_ptr,  # (N M, R, chunks, 3)
    vector_ptr,  # (N M, R, chunks, 3, Ev)
    output_ptr,  # (N M, Ev)
    std_error_ptr,  # (N M, Ev), float32
    normaliser_ptr,  # (N M, R), float32
    replicates,
    chunks,
    width,
    BC: tl.constexpr,
    BV: tl.constexpr,
):
    """A row's output and standard error from the parts of its draws."""
    i_r = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)
    m_v = o_v < width
    o_c = tl.arange(0, BC)
    m_c = o_c < chunks
    m_cv = m_c[:, None] & m_v[None, :]
    b_mean = tl.zeros([BV], tl.float32)
    b_variance = tl.zeros([BV], tl.float32)
    for i in range(replicates):
        o_part = (i_r * replicates + i) * chunks + o_c
        b_top = tl.load(scalar_ptr + o_part * 3, mask=m_c, other=float("-inf"))
        top = tl.max(b_top, axis=0)
        b_f = tl.exp2(b_top - top)  # [BC]
        b_den = tl.sum(b_f * tl.load(scalar_ptr + o_part * 3 + 1, mask=m_c, other=0.0), axis=0)
        b_f2 = b_f * b_f
        b_a = tl.sum(b_f2 * tl.load(scalar_ptr + o_part * 3 + 2, mask=m_c, other=0.0), axis=0)
        p = vector_ptr + o_part[:, None] * 3 * width + o_v[None, :]
        b_wv = tl.sum(b_f[:, None] * tl.load(p, mask=m_cv, other=0.0), axis=0)  # [BV]
        b_av = tl.sum(b_f2[:, None] * tl.load(p + width, mask=m_cv, other=0.0), axis=0)
        b_avv = tl.sum(b_f2[:, None] * tl.load(p + 2 * width, mask=m_cv, other=0.0), axis=0)
        b_o = b_wv / b_den
        b_mean += b_o
        b_variance += tl.maximum(b_avv - 2 * b_o * b_av + b_o * b_o * b_a, 0.0) / (b_den * b_den)
        tl.store(normaliser_ptr + i_r * replicates + i, top + tl.log2(b_den))
    tl.store(output_ptr + i_r * width + o_v, b_mean / replicates, mask=m_v)
    tl.store(std_error_ptr + i_r * width + o_v, tl.sqrt(b_variance) / replicates, mask=m_v)


def readable_columns(table: Tensor) -> int:
    """The table's columns, and as many after them, up to a multiple of 128, as its memory holds in every row."""
    *lead, n = table.shape
    wanted, stride = -(-n // 128) * 128, table.stride()
    end = (
        table.storage_offset()
        + wanted
        + sum((size - 1) * step for size, step in zip(lead, stride, strict=False))
    )
    held = table.untyped_storage().nbytes() // table.element_size()
    return wanted if stride[-1] == 1 and wanted <= stride[-2] and end <= held else n


def sketch_decode(
    x: Inputs, sketch: Sketch, num_samples: int, replicates: int, seed: Tensor, *, defensive: float = 0.02
) -> SketchDecoded:
    """Self-normalised averages of the values at draws from a sketch, with their standard errors: biased by O(1 / S).

    From guessed logits l~_j comes the proposal q_j, the share of (1 - epsilon) softmax(l~)_j + epsilon / n, from which
    points equally far apart draw keys. The exact logits of the distinct keys drawn weigh them, w_j proportional to
    exp(l_j) / min(1, S q_j), sum_j w_j = 1 (Hajek 1971). Their variance is estimated by
    sum_j (1 - min(1, S q_j)) w_j^2 (v_j - o)^2, that of independent inclusion, which a comb along keys in random order
    does not reach. Reads all of the sketch, of K and V the drawn rows alone.

    Parameters
    ----------
    x : Inputs
        As of `decode`; no mask.
    sketch : Sketch
    num_samples, replicates : int
        S draws in each of R independent repetitions, averaged.
    seed : Tensor, int64, (), on the same device
    defensive : float
        epsilon, 0 < epsilon < 1, up to rounding to one part in n / epsilon.
    """
    heads, rows, n, width = x.shape
    features, draws = x.q.shape[2], num_samples * replicates
    space = Space.of(x, draws)
    pages = space.sums.shape[-1]
    rank = sketch.table.shape[1]
    options = scan_options(x, space)
    scan_sketch_kernel[scan_grid(x, pages)](
        x.q,
        sketch.weight,
        sketch.table,
        space.mass,
        space.sums,
        space.top,
        seed,
        x.scale * LOG2_E,
        rows,
        n,
        pages,
        features,
        rank,
        readable_columns(sketch.table),
        *sketch.table.stride(),
        BR=max(16, power_of_two(rank)),
        KIND=2 if sketch.kind == "int4" else 1 if sketch.table.dtype == torch.float32 else 0,
        **options,
    )
    prefix(x, space, inverse=defensive_inverse(n, defensive))
    draw: dict[str, Any] = draw_options(x, space, num_samples)
    chunks = -(-num_samples // draw["CHUNK"])
    indices = x.q.new_empty(heads, rows, draws, dtype=torch.int64)
    log_weights = x.q.new_empty(heads, rows, draws, dtype=torch.float32)
    parts = (heads, rows, replicates, chunks, 3)
    scalars = x.q.new_empty(parts, dtype=torch.float32)
    vectors = x.q.new_empty(*parts, width, dtype=torch.float32)
    draw_sketch_kernel[(heads * rows, replicates, chunks)](
        x.q,
        x.k,
        x.v,
        space.mass,
        space.top,
        space.start,
        space.total,
        space.highest,
        space.each,
        seed,
        indices,
        log_weights,
        scalars,
        vectors,
        x.scale * LOG2_E,
        x.k.shape[1],
        rows,
        x.length,
        n,
        pages,
        features,
        width,
        num_samples,
        replicates,
        space.fine,
        *x.k.stride(),
        *x.v.stride(),
        BD=options["BD"],
        **draw,
    )
    # The interpreter cuts bfloat16 off where a GPU rounds.
    output = x.q.new_empty(heads, rows, width, dtype=torch.float32 if INTERPRETED else x.v.dtype)
    std_error = x.q.new_empty(heads, rows, width, dtype=torch.float32)
    normaliser = x.q.new_empty(heads, rows, replicates, dtype=torch.float32)
    combine_kernel[(heads * rows,)](
        scalars,
        vectors,
        output,
        std_error,
        normaliser,
        replicates,
        chunks,
        width,
        BC=power_of_two(chunks),
        BV=draw["BV"],
    )
    return SketchDecoded(output.to(x.v.dtype), std_error, indices, log_weights, normaliser)
