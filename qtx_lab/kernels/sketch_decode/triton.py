"""The kernels of decoding by draws from a sketch of the keys."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

import triton
import triton.language as tl

from ..blocks import (
    GROUPS,
    KEYS,
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
from ..masses import PAGE
from ..philox import INTERPRETED
from .reference import LOWER, SMALLEST, UPPER

DIGITS_UPPER, DIGITS_LOWER, LEAST = tl.constexpr(UPPER), tl.constexpr(LOWER), tl.constexpr(SMALLEST)


PAGE_SIZE, PLAIN = tl.constexpr(PAGE), tl.constexpr(INTERPRETED)


WARPS = [triton.Config({}, num_warps=warps) for warps in (4, 8)]


@tuned(WARPS, ["BD", "BR", "HALVES"])
@triton.jit
def digits_kernel(
    q_ptr,  # (N, M, E)
    weight_ptr,  # (N, E, r)
    digit_ptr,  # (N, M, 2, HALVES * BR), float16 or int8: upper and lower digits
    unit_ptr,  # (N, M)
    scale,
    rows,
    features,
    rank,
    half,  # components of a half, or all
    BD: tl.constexpr,
    BR: tl.constexpr,
    HALVES: tl.constexpr,
):
    """A query by the table's components, in two digits: `Sketch.digits`."""
    i_r = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BR)
    b_x = components(q_ptr, weight_ptr, i_r, rows, features, rank, o_r, o_r < half, BD) * scale
    largest = tl.max(tl.abs(b_x), axis=0)
    if HALVES == 2:
        b_y = components(q_ptr, weight_ptr, i_r, rows, features, rank, half + o_r, o_r < half, BD) * scale
        largest = tl.maximum(largest, tl.max(tl.abs(b_y), axis=0))
    largest = tl.maximum(largest, LEAST)
    p = digit_ptr + i_r * 2 * HALVES * BR + o_r
    store_digits(p, b_x / largest, HALVES * BR)
    if HALVES == 2:
        store_digits(p + BR, b_y / largest, HALVES * BR)
    if digit_ptr.dtype.element_ty == tl.int8:
        largest = largest / (DIGITS_UPPER * DIGITS_LOWER)
    tl.store(unit_ptr + i_r, largest.to(tl.float32))


@triton.jit
def components(q_ptr, weight_ptr, i_r, rows, features, rank, o_c, m_c, BD: tl.constexpr):
    """Those of a query: float64, [BR]; in float64 no digit hangs on the order of the sum."""
    o_d = tl.arange(0, BD)
    m_d = o_d < features
    m_c = m_c & (o_c < rank)
    b_q = tl.load(q_ptr + i_r * features + o_d, mask=m_d, other=0.0).to(tl.float64)
    p_w = weight_ptr + ((i_r // rows) * features + o_d[:, None]) * rank + o_c[None, :]
    b_w = tl.load(p_w, mask=m_d[:, None] & m_c[None, :], other=0.0).to(tl.float64)  # [BD, BR]
    return tl.sum(b_q[:, None] * b_w, axis=0)


@triton.jit
def store_digits(p, b_x, apart):
    """Of numbers from -1 to 1, float64: the upper digits at p, the lower ones so far behind."""
    as_kept = p.dtype.element_ty
    if as_kept == tl.int8:
        b_level = tl.floor(b_x * (DIGITS_UPPER * DIGITS_LOWER) + 0.5)
        b_upper = tl.floor((b_level + DIGITS_LOWER // 2) / DIGITS_LOWER)
        b_lower = b_level - b_upper * DIGITS_LOWER
    else:
        b_part = b_x.to(tl.float32)
        b_upper = b_part.to(tl.float16)
        b_lower = (b_part - b_upper.to(tl.float32)) * 2048.0
    tl.store(p, b_upper.to(as_kept))
    tl.store(p + apart, b_lower.to(as_kept))


@triton.jit
def low_and_high(b_t):
    """The numbers from 0 to 15 in the lower and the upper four bits of bytes, as int8."""
    if PLAIN:
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
    ["BM", "BR", "KIND", "SIZE"],
)
@triton.jit
def scan_sketch_kernel(
    digit_ptr,  # (N, M, 2, HALVES * BR)
    unit_ptr,  # (N, M)
    table_ptr,  # (N, n, r), of nibbles (N, n, r / 2)
    mass_ptr,  # (N, M, pages * PAGE)
    part_ptr,  # (N, M, pages * GROUPS)
    sum_ptr,  # (N, M, pages)
    top_ptr,  # (N, M, pages)
    seed_ptr,
    rows,
    n,
    pages,
    rank,
    t_stride_n,
    t_stride_k,
    BM: tl.constexpr,
    BR: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    KIND: tl.constexpr,  # 0: of halves, 1: of bytes, 2: of nibbles
    SIZE: tl.constexpr,
    NP: tl.constexpr,
    LOOP: tl.constexpr,
):
    """Guessed logits of NP pages at a time, kept as masses; a query's digits are two columns of the product."""
    tiles = tl.cdiv(rows, BM)
    i_n = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    o_m = i_tile * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_r = tl.arange(0, BR)
    m_r = o_r < rank
    seed = tl.load(seed_ptr)
    WIDE: tl.constexpr = 2 * BR if KIND == 2 else BR
    o_x = i_tile * BM * 2 + tl.arange(0, 2 * BM)  # a row's digits side by side
    p_x = digit_ptr + (i_n * rows * 2 + o_x[None, :]) * WIDE + o_r[:, None]
    b_x = tl.load(p_x, mask=(o_x < rows * 2)[None, :], other=0.0)  # [BR, 2 BM]
    if KIND == 2:
        b_y = tl.load(p_x + BR, mask=(o_x < rows * 2)[None, :], other=0.0)
        # Levels are kept + 8.
        b_shift = 8 * (tl.sum(b_x.to(tl.int32), axis=0) + tl.sum(b_y.to(tl.int32), axis=0))  # [2 BM]
    b_unit = tl.load(unit_ptr + i_n * rows + o_m, mask=m_m, other=0.0)
    p_t = table_ptr + i_n * t_stride_n + o_r[None, :]

    for i in range(LOOP):
        i_page = (tl.program_id(1) * LOOP + i) * NP
        o_n = i_page * PAGE + tl.arange(0, NP * PAGE)
        m_n = o_n < n
        p = p_t + o_n[:, None].to(tl.int64) * t_stride_k
        b_t = tl.load(p, mask=m_n[:, None] & m_r[None, :], other=0)  # [NP * PAGE, BR]
        if KIND == 2:
            b_low, b_high = low_and_high(b_t)
            b_l = tl.dot(b_low, b_x, out_dtype=tl.int32)  # [NP * PAGE, 2 BM]
            b_l = tl.dot(b_high, b_y, b_l, out_dtype=tl.int32) - b_shift[None, :]
        else:
            b_l = tl.dot(b_t, b_x)
        b_upper, b_lower = tl.split(tl.reshape(b_l, [NP * PAGE, BM, 2]))
        if KIND == 0:
            b_l = (b_upper + b_lower * (1 / 2048)) * b_unit[None, :]
        else:
            b_l = (b_upper * DIGITS_LOWER + b_lower).to(tl.float32) * b_unit[None, :]
        b_l = tl.where(m_n[:, None] & m_m[None, :], b_l, float("-inf"))
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
def exponent(b_whole):
    """That of whole numbers as float64, as by frexp."""
    return (b_whole.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022


@triton.jit
def raised(b_sum, b_top, highest, fine, least, ALL: tl.constexpr):
    """Bits by which a page's units are shifted up, and what each of its keys has besides: `Proposal`. int64, int32."""
    b_up, _ = shifts(b_top, highest, fine)
    b_whole = b_sum.to(tl.int64)
    b_missing = tl.maximum(exponent(b_whole * 0 + least) - exponent(b_whole), 0)
    b_missing += ((b_whole << b_missing) < least).to(tl.int64)
    b_up = tl.maximum(b_up, b_missing)
    b_besides = tl.maximum((least >> b_up) // PAGE_SIZE, 1).to(tl.int32)
    if ALL:  # every key is sure
        b_up = b_up * 0
    return b_up, b_besides


@triton.jit
def masses_of(
    mass_ptr,
    sum_ptr,
    top_ptr,
    b_page,
    m_page,
    highest,
    least,
    fine,
    n,
    PAGE: tl.constexpr,
    WORD: tl.constexpr,
):
    """What all keys of some pages have, in the row's common units: int64, [pages, PAGE]."""
    b_sum = tl.load(sum_ptr + b_page, mask=m_page, other=1)
    b_top = tl.load(top_ptr + b_page, mask=m_page, other=float("-inf"))
    b_up, b_besides = raised(b_sum, b_top, highest, fine, least, False)
    o_key = b_page[:, None] * PAGE + tl.arange(0, PAGE)[None, :]
    m_key = m_page[:, None] & (o_key < n)
    b_mass = tl.load(mass_ptr + o_key, mask=m_key, other=0).to(tl.int32) & WORD
    return tl.where(m_key, (b_mass + b_besides[:, None]).to(tl.int64) << b_up[:, None], 0)


@triton.jit
def total_of(b_x):
    """Of a block [pages, PAGE]."""
    return tl.sum(tl.sum(b_x, axis=1), axis=0)


@tuned(WARPS, ["BP", "BS"])
@triton.jit
def plan_kernel(
    mass_ptr,  # (N M, pages * PAGE)
    sum_ptr,  # (N M, pages)
    top_ptr,  # (N M, pages)
    highest_ptr,  # (N M,)
    least_ptr,  # (N M,), int64: the mass that a page is given at the least
    sure_ptr,  # (N M,), int64: the mass from which a key is sure
    list_ptr,  # (N M, BS), int32: pages that are searched
    n,
    pages,
    fine,
    inverse,
    num_samples,
    stride,
    BP: tl.constexpr,
    BS: tl.constexpr,
    PAGE: tl.constexpr,
    WORD: tl.constexpr,
    LEAST_BITS: tl.constexpr,
    STEPS: tl.constexpr,
    ALL: tl.constexpr,
):
    """The row's highest exponent, its pages' least mass, and from which mass a key is sure: `Proposal.sure_mass`."""
    i_r = tl.program_id(0).to(tl.int64)
    p_sum, p_top, p_mass = sum_ptr + i_r * pages, top_ptr + i_r * pages, mass_ptr + i_r * pages * PAGE
    p_list = list_ptr + i_r * BS
    o_p = tl.arange(0, BP)
    o_s = tl.arange(0, BS)
    highest = highest_of(p_top, pages, BP)
    b_total = tl.zeros([BP], tl.int64)
    for i in range(0, pages, BP):
        m_p = i + o_p < pages
        b_up, b_down = shifts(tl.load(p_top + i + o_p, mask=m_p, other=float("-inf")), highest, fine)
        b_w = tl.load(p_sum + i + o_p, mask=m_p, other=0).to(tl.int64)
        b_total += tl.where(b_down == 0, b_w << b_up, 0)
    least = tl.maximum((tl.sum(b_total, axis=0).to(tl.float64) / inverse).to(tl.int64), 1)
    tl.store(highest_ptr + i_r, highest)
    tl.store(least_ptr + i_r, least)

    # The least exponent of at most BS pages.
    below = -1
    bit = 64
    for _ in range(7):
        b_few = tl.zeros([BP], tl.int32)
        for i in range(0, pages, BP):
            b_top = tl.load(p_top + i + o_p, mask=i + o_p < pages, other=float("-inf"))
            b_few += (b_top >= highest - (below + bit)).to(tl.int32)
        below = tl.where(tl.sum(b_few, axis=0) <= BS, below + bit, below)
        bit = bit // 2
    first = highest - below

    # Those pages, the mass of all, that of all but those, and that of a sample of the latter.
    tl.store(p_list + o_s, tl.zeros([BS], tl.int32) - 1)
    tl.debug_barrier()
    found = tl.zeros([], tl.int32)
    b_whole, b_rest, b_seen = (tl.zeros([BP], tl.int64), tl.zeros([BP], tl.int64), tl.zeros([BP], tl.int64))
    for i in range(0, pages, BP):
        m_p = i + o_p < pages
        b_top = tl.load(p_top + i + o_p, mask=m_p, other=float("-inf"))
        b_sum = tl.load(p_sum + i + o_p, mask=m_p, other=1)
        b_up, b_besides = raised(b_sum, b_top, highest, fine, least, False)
        b_keys = tl.minimum(tl.maximum(n - (i + o_p) * PAGE, 0), PAGE)
        b_w = tl.where(m_p, (b_sum + b_keys * b_besides).to(tl.int64) << b_up, 0)
        m_searched = m_p & (b_top >= first)
        b_whole += b_w
        b_rest += tl.where(m_searched, 0, b_w)
        b_seen += tl.where(m_searched | ((i + o_p) % stride != 0), 0, b_w)
        b_one = m_searched.to(tl.int32)
        tl.store(p_list + found + tl.cumsum(b_one, axis=0) - b_one, i + o_p, mask=m_searched)
        found += tl.sum(b_one, axis=0)
    tl.debug_barrier()
    total, rest, seen = tl.sum(b_whole, axis=0), tl.sum(b_rest, axis=0), tl.sum(b_seen, axis=0)
    ratio = tl.where(seen > 0, rest.to(tl.float64) / tl.maximum(seen, 1).to(tl.float64), 0.0)
    b_page = tl.load(p_list + o_s)
    b_own = masses_of(p_mass, p_sum, p_top, b_page, b_page >= 0, highest, least, fine, n, PAGE, WORD)
    b_page = o_s * stride
    m_page = (b_page < pages) & (tl.load(p_top + b_page, mask=b_page < pages, other=float("inf")) < first)
    b_other = masses_of(p_mass, p_sum, p_top, b_page, m_page, highest, least, fine, n, PAGE, WORD)

    sure = tl.ceil(total.to(tl.float64) / num_samples).to(tl.int64)
    some = tl.zeros([], tl.int32)
    for _ in range(STEPS):
        m_sure, m_some = b_own >= sure, b_other >= sure
        some = total_of(m_some.to(tl.int32))
        left = num_samples - total_of(m_sure.to(tl.int32)).to(tl.float64) - some.to(tl.float64) * ratio
        light = total.to(tl.float64) - total_of(tl.where(m_sure, b_own, 0)).to(tl.float64)
        light -= total_of(tl.where(m_some, b_other, 0)).to(tl.float64) * ratio
        closer = tl.minimum(sure, tl.ceil(light / tl.maximum(left, 0.5)).to(tl.int64))
        sure = tl.maximum(tl.where(left > 0.5, closer, sure), 1)
    sure = tl.where(some > 0, sure + (sure >> 4), sure)
    coarsest = tl.maximum(exponent(least) - LEAST_BITS + 1, fine)
    sure = ((sure + (sure * 0 + 1 << coarsest) - 1) >> coarsest) << coarsest
    if ALL:
        sure = sure * 0 + 1
    tl.store(sure_ptr + i_r, sure)


@tuned(
    [triton.Config({"BP": pages}, num_warps=warps) for pages, warps in ((16, 1), (32, 1), (32, 2), (64, 4))],
    ["SIZE"],
)
@triton.jit
def cap_kernel(
    mass_ptr,
    part_ptr,  # of pages in which a key may be above its cap: of what keys have after it
    sum_ptr,
    top_ptr,
    start_ptr,  # (N M, pages), int64: the pages' masses
    highest_ptr,
    least_ptr,
    sure_ptr,
    n,
    pages,
    fine,
    SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    WORD: tl.constexpr,
    ALL: tl.constexpr,
    BP: tl.constexpr,
):
    """The masses of BP pages, no key's above the one from which it is sure."""
    i_r = tl.program_id(0).to(tl.int64)
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)
    m_p = o_p < pages
    b_sum = tl.load(sum_ptr + i_r * pages + o_p, mask=m_p, other=1)
    b_top = tl.load(top_ptr + i_r * pages + o_p, mask=m_p, other=float("-inf"))
    b_up, b_besides = raised(b_sum, b_top, tl.load(highest_ptr + i_r), fine, tl.load(least_ptr + i_r), ALL)
    b_cap = capped(tl.load(sure_ptr + i_r), b_up)
    b_keys = tl.minimum(tl.maximum(n - o_p * PAGE, 0), PAGE)
    b_all = b_sum + b_keys * b_besides  # [BP]

    # Only a page whose largest mass may be above the cap is read.
    m_heavy = m_p & (b_besides + UNITS > b_cap)
    o_key = o_p[:, None] * PAGE + tl.arange(0, PAGE)[None, :]
    m_key = m_heavy[:, None] & (o_key < n)
    b_mass = tl.load(mass_ptr + i_r * pages * PAGE + o_key, mask=m_key, other=0).to(tl.int32) & WORD
    b_mass = tl.where(m_key, tl.minimum(b_mass + b_besides[:, None], b_cap[:, None]), 0)
    b_part = tl.sum(tl.reshape(b_mass, [BP, GROUPS, KEYS]), axis=2)  # [BP, GROUPS]
    o_part = (i_r * pages + o_p)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    tl.store(part_ptr + o_part, b_part, mask=m_heavy[:, None])
    b_all = tl.where(m_heavy, tl.sum(b_part, axis=1), b_all)
    tl.store(start_ptr + i_r * pages + o_p, b_all.to(tl.int64) << b_up, mask=m_p)


@triton.jit
def capped(sure, b_up):
    """The largest mass of a key in the units of its page, int32; none is as large as 2^30 before."""
    return tl.minimum(sure >> b_up, 0x3FFFFFFF).to(tl.int32)


@triton.jit
def step_kernel(
    start_ptr,  # (N M, pages), int64: the pages' masses, then that of all before
    total_ptr,  # (N M,), int64
    sure_ptr,
    step_ptr,  # (N M,), int64: how far apart the points lie
    page_ptr,  # (N M, R, S), int32
    seed_ptr,
    rows,
    length,
    pages,
    num_samples,
    replicates,
    BP: tl.constexpr,
):
    """Where pages start, how far apart points lie, and in which page each lies."""
    i_r = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BP)
    seed = tl.load(seed_ptr)
    p_start, p_page = start_ptr + i_r * pages, page_ptr + i_r * replicates * num_samples
    carry = tl.zeros([], tl.int64)
    for i in range(0, pages, BP):
        m_p = i + o_p < pages
        carry = sum_up(p_start, tl.load(p_start + i + o_p, mask=m_p, other=0), carry, i + o_p, m_p)
    step = tl.maximum(tl.load(sure_ptr + i_r), (carry + num_samples - 1) // num_samples)
    tl.store(total_ptr + i_r, carry)
    tl.store(step_ptr + i_r, step)
    clear(p_page, replicates * num_samples, BP)
    tl.debug_barrier()
    for i_replicate in range(replicates):
        b_offset = offset_of(step, seed, i_replicate, (i_r % rows) % length, i_r // rows)
        for i in range(0, pages, BP):
            m_p = (i + o_p < pages) & (i + o_p > 0)
            b_start = tl.load(p_start + i + o_p, mask=m_p, other=0)
            b_first = multiples_before(b_start - b_offset, step, num_samples)
            p = p_page + i_replicate * num_samples + b_first
            tl.atomic_add(p, 1, mask=m_p & (b_first < num_samples), sem="relaxed")
    tl.debug_barrier()
    for i_replicate in range(replicates):
        count_up(p_page + i_replicate * num_samples, num_samples, BP)


@triton.jit
def multiples_before(b_x, step, num_samples):
    """How many of 0, step, 2 step, ... lie before b_x: int32; a division of whole numbers takes ten times as long."""
    b_near = tl.maximum(
        (b_x.to(tl.float64) / (b_x * 0 + step).to(tl.float64)).to(tl.int64) - 1, 0
    )  # within one of it
    b_count = b_near
    for i in tl.static_range(3):
        b_count += ((b_near + i) * step < b_x).to(tl.int64)
    return tl.minimum(b_count, num_samples).to(tl.int32)


@triton.jit
def offset_of(step, seed, i_replicate, i_l, i_n):
    """The first point of a comb: int64, [1]."""
    b_offset = (comb_offset(seed, i_replicate, i_l, i_n) * step.to(tl.float64)).to(tl.int64)
    return tl.minimum(b_offset, step - 1)


@triton.jit
def locate_sketch_kernel(
    mass_ptr,
    part_ptr,
    sum_ptr,
    top_ptr,
    start_ptr,
    total_ptr,
    highest_ptr,
    least_ptr,
    sure_ptr,
    step_ptr,
    page_ptr,
    seed_ptr,
    index_ptr,  # (N, M, R, S), int64
    chance_ptr,  # (N, M, R, S), float32: pi; 0 where a point lies past the last key
    rows,
    length,
    n,
    pages,
    num_samples,
    replicates,
    fine,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
    WORD: tl.constexpr,
    ALL: tl.constexpr,
    BS: tl.constexpr,
):
    """The keys at BS points of a row, and with what probability each is drawn."""
    i_r = tl.program_id(0).to(tl.int64)
    i_replicate = tl.program_id(1)
    step, sure = tl.load(step_ptr + i_r), tl.load(sure_ptr + i_r)
    b_offset = offset_of(step, tl.load(seed_ptr), i_replicate, (i_r % rows) % length, i_r // rows)
    b_s = tl.program_id(2) * BS + tl.arange(0, BS)
    o_s = (i_r * replicates + i_replicate) * num_samples + b_s
    m_s = b_s < num_samples
    b_point = b_s.to(tl.int64) * step + b_offset  # [BS]
    m_found = m_s & (b_point < tl.load(total_ptr + i_r))
    b_point = tl.where(m_found, b_point, 0)
    b_page = tl.load(page_ptr + o_s, mask=m_found, other=0)
    o_page = i_r * pages + b_page
    b_sum, b_top = tl.load(sum_ptr + o_page), tl.load(top_ptr + o_page)
    b_up, b_besides = raised(b_sum, b_top, tl.load(highest_ptr + i_r), fine, tl.load(least_ptr + i_r), ALL)
    b_cap = capped(sure, b_up)
    b_unit = ((b_point - tl.load(start_ptr + o_page)) >> b_up).to(tl.int32)

    b_part = tl.load(part_ptr + o_page[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :])  # [BS, GROUPS]
    o_first = b_page[:, None] * PAGE + tl.arange(0, GROUPS)[None, :] * KEYS
    b_more = tl.minimum(tl.maximum(n - o_first, 0), KEYS) * b_besides[:, None]
    b_part += tl.where((b_besides + UNITS > b_cap)[:, None], 0, b_more)  # `cap_kernel` did the others
    b_group = place_of(tl.cumsum(b_part, axis=1), b_unit)
    b_unit -= before(b_part, b_group)
    o_key = b_group[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    b_mass = tl.load(mass_ptr + o_page[:, None] * PAGE + o_key).to(tl.int32) & WORD  # [BS, KEYS]
    b_mass = tl.minimum(b_mass + b_besides[:, None], b_cap[:, None])
    b_mass = tl.where(b_page[:, None] * PAGE + o_key < n, b_mass, 0)
    b_place = place_of(tl.cumsum(b_mass, axis=1), b_unit)
    b_own = before(b_mass, b_place + 1) - before(b_mass, b_place)
    b_chance = (b_own.to(tl.int64) << b_up).to(tl.float64) / (b_point * 0 + step).to(tl.float64)
    tl.store(index_ptr + o_s, b_page.to(tl.int64) * PAGE + b_group * KEYS + b_place, mask=m_s)
    tl.store(chance_ptr + o_s, tl.where(m_found, b_chance.to(tl.float32), 0.0), mask=m_s)


@tuned(GATHER, ["BD", "BV", "SIZE", "CHUNK"])
@triton.jit
def weigh_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E)
    v_ptr,  # (B, Hkv, n, Ev)
    index_ptr,  # (N, M, R, S), int64
    chance_ptr,  # (N, M, R, S), float32
    log_weight_ptr,  # (N, M, R, S), float32
    scalar_ptr,  # (N, M, R, chunks, 3), float32: largest log weight, sum of weights, sum of a
    vector_ptr,  # (N, M, R, chunks, 3, Ev), float32: sums of w v, a v and a v^2
    scale,
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
    """Exact logits, weights and values at up to CHUNK draws of a row; a draw past the last key adds nothing."""
    i_r = tl.program_id(0).to(tl.int64)
    i_chunk = tl.program_id(2)
    i_n = i_r // rows
    o_d = tl.arange(0, BD)
    m_d = o_d < features
    o_v = tl.arange(0, BV)
    m_v = o_v < width
    i_b = i_n // kv_heads
    i_h = i_n % kv_heads
    p_k = k_ptr + i_b * k_stride_b + i_h * k_stride_h + o_d[None, :].to(tl.int64) * k_stride_d
    p_v = v_ptr + i_b * v_stride_b + i_h * v_stride_h + o_v[None, :].to(tl.int64) * v_stride_d
    i_out = i_r * replicates + tl.program_id(1)
    b_q = tl.load(q_ptr + i_r * features + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]

    largest = tl.full([], float("-inf"), tl.float32)
    b_den = tl.zeros([], tl.float32)
    b_a = tl.zeros([], tl.float32)
    b_wv = tl.zeros([FOLD, BV], tl.float32)
    b_av = tl.zeros([FOLD, BV], tl.float32)
    b_avv = tl.zeros([FOLD, BV], tl.float32)
    for i in range(0, CHUNK, BS):
        b_s = i_chunk * CHUNK + i + tl.arange(0, BS)
        m_s = b_s < num_samples
        b_index = tl.load(index_ptr + i_out * num_samples + b_s, mask=m_s, other=0)  # [BS]
        b_pi = tl.load(chance_ptr + i_out * num_samples + b_s, mask=m_s, other=0.0)
        m_found = b_pi > 0
        p = p_k + b_index[:, None] * k_stride_n
        b_k = tl.load(p, mask=m_found[:, None] & m_d[None, :], other=0.0)  # [BS, BD]
        p = p_v + b_index[:, None] * v_stride_n
        b_v = tl.load(p, mask=m_found[:, None] & m_v[None, :], other=0.0)  # [BS, BV]
        b_l = tl.sum(b_k.to(tl.float32) * b_q[None, :], axis=1) * scale
        b_lw = tl.where(m_found, b_l - tl.log2(tl.where(m_found, b_pi, 1.0)), float("-inf"))
        tl.store(log_weight_ptr + i_out * num_samples + b_s, b_lw, mask=m_s)

        top = tl.maximum(largest, tl.max(b_lw, axis=0))
        safe = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.exp2(largest - safe)
        largest = top
        b_w = tl.exp2(b_lw - safe)  # [BS]
        b_var = (1.0 - b_pi) * b_w * b_w
        b_v = b_v.to(tl.float32)
        b_x = b_var[:, None] * b_v
        b_den = b_den * shrink + tl.sum(b_w, axis=0)
        b_wv = b_wv * shrink + folded(b_w[:, None] * b_v, FOLD)
        b_a = b_a * shrink * shrink + tl.sum(b_var, axis=0)
        b_av = b_av * shrink * shrink + folded(b_x, FOLD)
        b_avv = b_avv * shrink * shrink + folded(b_x * b_v, FOLD)
    i_part = i_out * tl.num_programs(2) + i_chunk
    tl.store(scalar_ptr + i_part * 3, largest)
    tl.store(scalar_ptr + i_part * 3 + 1, b_den)
    tl.store(scalar_ptr + i_part * 3 + 2, b_a)
    p_vector = vector_ptr + i_part * 3 * width + o_v
    tl.store(p_vector, tl.sum(b_wv, axis=0), mask=m_v)
    tl.store(p_vector + width, tl.sum(b_av, axis=0), mask=m_v)
    tl.store(p_vector + 2 * width, tl.sum(b_avv, axis=0), mask=m_v)


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
