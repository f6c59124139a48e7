"""Decoding by draws from exact logits: one pass over K, systematic draws by page and then within, V only at the draws."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of kernels have no types: Triton reads annotations as its own.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_reference import LOG2_E, PAGE, UNITS, Decoded, Inputs, fine_bits, mass_dtype
from .philox import INTERPRETED, uniform, words
from .philox_reference import OFFSETS, ROUNDING

STREAM_OFFSETS, STREAM_ROUNDING, LOG2 = tl.constexpr(OFFSETS), tl.constexpr(ROUNDING), tl.constexpr(LOG2_E)


def tuned(configs: list[triton.Config]) -> list[triton.Config]:
    """All of them to choose from on a GPU, the first in the interpreter."""
    return configs[:1] if INTERPRETED else configs


@triton.jit
def store_masses(
    b_l,  # [BM, NP * PAGE], base 2, -inf where masked
    mass_ptr,
    sum_ptr,
    top_ptr,
    seed,
    i_n,
    o_m,
    m_m,
    i_page,
    rows,
    pages,
    BM: tl.constexpr,
    NP: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Round the masses of NP pages to whole units and store them, with their sums and exponents."""
    b_l = tl.reshape(b_l, [BM, NP, PAGE])
    b_top = tl.ceil(tl.max(b_l, axis=2))  # [BM, NP]
    b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_x = tl.exp2(b_l - b_shift[:, :, None]) * UNITS  # [BM, NP, PAGE]
    b_down = tl.floor(b_x)

    # One counter for four keys; the rows of a group share their rounding.
    b_quarter = i_page * (PAGE // 4) + tl.arange(0, NP * PAGE // 4)
    b_w0, b_w1, b_w2, b_w3 = words(seed, b_quarter, i_n, 0, STREAM_ROUNDING)
    b_w = tl.join(tl.join(b_w0, b_w2), tl.join(b_w1, b_w3))  # [NP * PAGE / 4, 2, 2]
    b_u = uniform(tl.reshape(b_w, [1, NP, PAGE]))
    b_mass = b_down.to(tl.int32) + (b_u < b_x - b_down).to(tl.int32)  # [BM, NP, PAGE]

    o_page = i_page + tl.arange(0, NP)
    o_row = i_n.to(tl.int64) * rows + o_m
    o_at = o_row[:, None] * pages + o_page[None, :]  # [BM, NP]
    m_at = m_m[:, None] & (o_page[None, :] < pages)
    tl.store(sum_ptr + o_at, tl.sum(b_mass, axis=2), mask=m_at)
    tl.store(top_ptr + o_at, b_top, mask=m_at)
    o_key = o_at[:, :, None] * PAGE + tl.arange(0, PAGE)[None, None, :]
    tl.store(mass_ptr + o_key, b_mass.to(mass_ptr.dtype.element_ty), mask=m_at[:, :, None])


@triton.autotune(
    tuned(
        [
            triton.Config({"NP": pages, "LOOP": loop}, num_warps=warps, num_stages=stages)
            for pages, warps in ((1, 4), (2, 4), (4, 8))
            for loop in (8, 32)
            for stages in (2, 3, 4)
        ]
    ),
    key=["BD", "BM", "SIZE", "HAS_MASK"],
    cache_results=True,
)
@triton.jit
def scan_kernel(
    q_ptr,  # (N, M, E)
    k_ptr,  # (B, Hkv, n, E)
    mask_ptr,  # (B, H, L, n)
    mass_ptr,  # (N, M, pages * PAGE)
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
    """Logits of NP pages at a time, kept as masses."""
    tiles = tl.cdiv(rows, BM)
    i_n = tl.program_id(0) // tiles
    o_m = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_d = tl.arange(0, BD)
    m_d = o_d < features
    i_b = (i_n // kv_heads).to(tl.int64)
    i_h = (i_n % kv_heads).to(tl.int64)
    seed = tl.load(seed_ptr)

    p_q = q_ptr + (i_n.to(tl.int64) * rows + o_m[:, None]) * features + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0).to(DOT)  # [BM, BD]
    p_k = k_ptr + i_b * k_stride_b + i_h * k_stride_h + o_d[:, None].to(tl.int64) * k_stride_d
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
        p = p_k + o_n[None, :].to(tl.int64) * k_stride_n
        b_k = tl.load(p, mask=m_d[:, None] & m_n[None, :], other=0.0).to(DOT)  # [BD, NP * PAGE]
        b_l = tl.dot(b_q, b_k, input_precision="ieee") * scale  # [BM, NP * PAGE]
        m_l = m_m[:, None] & m_n[None, :]
        if HAS_MASK > 0:
            p = p_m[:, None] + o_n[None, :].to(tl.int64) * m_stride_n
            b_m = tl.load(p, mask=m_l, other=0)
            if HAS_MASK == 1:
                m_l = m_l & (b_m != 0)
            else:
                b_l += b_m.to(tl.float32) * LOG2
        b_l = tl.where(m_l, b_l, float("-inf"))
        store_masses(
            b_l, mass_ptr, sum_ptr, top_ptr, seed, i_n, o_m, m_m, i_page, rows, pages, BM, NP, PAGE, UNITS
        )


@triton.jit
def shifts(b_top, highest, fine):
    """Bits by which a page's units are shifted up and down to the row's common ones, int64."""
    b_known = b_top > float("-inf")
    b_apart = tl.where(b_known, highest - tl.where(b_known, b_top, 0.0), 100.0)
    b_apart = tl.minimum(b_apart, 100.0).to(tl.int64)
    return tl.maximum(fine - b_apart, 0), tl.maximum(b_apart - fine, 0)


@triton.jit
def prefix_kernel(
    sum_ptr,  # (N M, pages)
    top_ptr,  # (N M, pages)
    start_ptr,  # (N M, pages), int64: the mass of all pages before
    total_ptr,  # (N M,), int64
    highest_ptr,  # (N M,)
    floor_ptr,  # (N M,), int64: the mass that every key has besides, of sketches
    n,
    pages,
    fine,
    inverse,
    BP: tl.constexpr,
    PAGE: tl.constexpr,
    SKETCHED: tl.constexpr,
):
    """Where each page of a row starts, in the row's common units."""
    i_r = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BP)
    b_high = tl.full([BP], float("-inf"), tl.float32)
    for i in range(0, pages, BP):
        m_p = i + o_p < pages
        b_high = tl.maximum(b_high, tl.load(top_ptr + i_r * pages + i + o_p, mask=m_p, other=float("-inf")))
    highest = tl.max(b_high, axis=0)
    each = tl.zeros([], tl.int64)
    if SKETCHED:
        b_sum = tl.zeros([BP], tl.int64)
        for i in range(0, pages, BP):
            m_p = i + o_p < pages
            b_top = tl.load(top_ptr + i_r * pages + i + o_p, mask=m_p, other=float("-inf"))
            b_up, b_down = shifts(b_top, highest, fine)
            b_w = tl.load(sum_ptr + i_r * pages + i + o_p, mask=m_p, other=0).to(tl.int64)
            b_sum += tl.where(b_down == 0, b_w << b_up, 0)
        each = tl.maximum(tl.sum(b_sum, axis=0) // inverse, 1)
        tl.store(floor_ptr + i_r, each)
    carry = tl.zeros([], tl.int64)
    for i in range(0, pages, BP):
        m_p = i + o_p < pages
        b_top = tl.load(top_ptr + i_r * pages + i + o_p, mask=m_p, other=float("-inf"))
        b_up, b_down = shifts(b_top, highest, fine)
        b_w = tl.load(sum_ptr + i_r * pages + i + o_p, mask=m_p, other=0).to(tl.int64)
        if SKETCHED:
            b_keys = tl.minimum(tl.maximum(n - (i + o_p) * PAGE, 0), PAGE).to(tl.int64)
            b_w = tl.where(b_down == 0, b_w << b_up, 0) + b_keys * each
        else:
            b_w = (b_w << b_up) >> b_down
        tl.store(start_ptr + i_r * pages + i + o_p, carry + tl.cumsum(b_w, axis=0) - b_w, mask=m_p)
        carry += tl.sum(b_w, axis=0)
    tl.store(total_ptr + i_r, carry)
    tl.store(highest_ptr + i_r, highest)


@triton.jit
def comb(b_s, total, num_samples, seed, i_replicate, i_l, i_n):
    """Points s of the comb of a row, in its units: int64, below its total."""
    b_zero = tl.zeros([1], tl.int32)
    b_word, _, _, _ = words(seed, b_zero + i_replicate, i_l, i_n, STREAM_OFFSETS)
    b_u = b_word.to(tl.float64) * (2.0**-32)  # [1]
    b_step = (b_zero + total).to(tl.float64) / (b_zero + num_samples).to(tl.float64)
    b_point = ((b_s.to(tl.float64) + b_u) * b_step).to(tl.int64)
    return tl.minimum(b_point, total - 1)


@triton.jit
def find_page(start_ptr, b_point, pages, LOG: tl.constexpr):
    """The last of the pages that starts at the point or before it; a search by halves of 2^LOG >= pages."""
    b_page = b_point.to(tl.int32) * 0
    for i in tl.static_range(LOG):
        b_try = b_page + (1 << (LOG - 1 - i))
        m_try = b_try < pages
        b_start = tl.load(start_ptr + b_try, mask=m_try, other=0)
        b_page = tl.where(m_try & (b_start <= b_point), b_try, b_page)
    return b_page


@triton.autotune(
    tuned(
        [
            triton.Config({"BS": size}, num_warps=warps)
            for size, warps in ((64, 4), (32, 4), (16, 4), (64, 8), (32, 2))
        ]
    ),
    key=["BV", "SIZE", "CHUNK"],
    cache_results=True,
)
@triton.jit
def draw_kernel(
    v_ptr,  # (B, Hkv, n, Ev)
    mass_ptr,
    top_ptr,
    start_ptr,
    total_ptr,
    highest_ptr,
    seed_ptr,
    index_ptr,  # (N, M, R * S), int64
    part_ptr,  # (N, M, R, chunks, Ev), float32
    kv_heads,
    rows,
    length,
    pages,
    width,
    num_samples,
    replicates,
    fine,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    BV: tl.constexpr,
    PAGE: tl.constexpr,
    LOG: tl.constexpr,
    WORD: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    BS: tl.constexpr,
):
    """The mean of the values at a row's draws, the part of up to CHUNK of them."""
    i_r = tl.program_id(0).to(tl.int64)
    i_replicate = tl.program_id(1)
    i_chunk = tl.program_id(2)
    i_n = i_r // rows
    i_l = (i_r % rows) % length
    seed = tl.load(seed_ptr)
    total = tl.load(total_ptr + i_r)
    highest = tl.load(highest_ptr + i_r)
    o_v = tl.arange(0, BV)
    m_v = o_v < width
    o_p = tl.arange(0, PAGE)
    p_v = (
        v_ptr
        + (i_n // kv_heads) * v_stride_b
        + (i_n % kv_heads) * v_stride_h
        + o_v[None, :].to(tl.int64) * v_stride_d
    )
    p_index = index_ptr + (i_r * replicates + i_replicate) * num_samples
    b_acc = tl.zeros([BV], tl.float32)
    for i in range(0, CHUNK, BS):
        b_s = i_chunk * CHUNK + i + tl.arange(0, BS)
        m_in = b_s < num_samples
        m_s = m_in & (total > 0)
        b_point = comb(b_s, total, num_samples, seed, i_replicate, i_l, i_n)  # [BS]
        b_page = find_page(start_ptr + i_r * pages, b_point, pages, LOG)
        b_page = tl.where(m_s, b_page, 0)
        o_page = i_r * pages + b_page
        b_top = tl.load(top_ptr + o_page)
        b_up, b_down = shifts(b_top, highest, fine)
        b_rest = b_point - tl.load(start_ptr + o_page)
        b_unit = ((b_rest << b_down) >> b_up).to(tl.int32)
        b_mass = tl.load(mass_ptr + o_page[:, None] * PAGE + o_p[None, :]).to(tl.int32) & WORD  # [BS, PAGE]
        b_below = (tl.cumsum(b_mass, axis=1) <= b_unit[:, None]).to(tl.int32)
        b_index = b_page.to(tl.int64) * PAGE + tl.sum(b_below, axis=1)
        b_index = tl.where(m_s, b_index, 0)
        tl.store(p_index + b_s, b_index, mask=m_in)
        b_v = tl.load(
            p_v + b_index[:, None] * v_stride_n, mask=m_s[:, None] & m_v[None, :], other=0.0
        )  # [BS, BV]
        b_acc += tl.sum(b_v.to(tl.float32), axis=0)
    p_part = part_ptr + ((i_r * replicates + i_replicate) * tl.num_programs(2) + i_chunk) * width + o_v
    tl.store(p_part, b_acc / num_samples, mask=m_v)


@dataclass(frozen=True)
class Space:
    """The masses of N M rows of T pages on the way from the scan to the draws; see `decode_reference.Masses`."""

    mass: Tensor
    """(N, M, T * PAGE), int16 or int32."""
    sums: Tensor
    """(N, M, T), int32."""
    top: Tensor
    """(N, M, T), float32."""
    start: Tensor
    """(N, M, T), int64: the mass of all pages before."""
    total: Tensor
    """(N, M), int64."""
    highest: Tensor
    """(N, M), float32: the largest of `top`."""
    each: Tensor
    """(N, M), int64: what a sketch's defensive part adds to every key's mass."""

    @classmethod
    def of(cls, x: Inputs, draws: int) -> Space:
        """Room for rows of which so many draws are made in all."""
        heads, rows, n, _ = x.shape
        shape, pages = (heads, rows), -(-n // PAGE)
        new = x.q.new_empty
        return cls(
            new(*shape, pages * PAGE, dtype=mass_dtype(draws)),
            new(*shape, pages, dtype=torch.int32),
            new(*shape, pages, dtype=torch.float32),
            new(*shape, pages, dtype=torch.int64),
            new(shape, dtype=torch.int64),
            new(shape, dtype=torch.float32),
            new(shape, dtype=torch.int64),
        )

    @property
    def fine(self) -> int:
        """See `Masses`."""
        return fine_bits(self.sums.shape[-1], self.mass.dtype)


def scan_options(x: Inputs, space: Space) -> dict[str, Any]:
    """What the kernels that scan keys or sketches are specialised for."""
    return {
        "BM": max(16, min(64, power_of_two(x.q.shape[1]))),
        "BD": max(16, power_of_two(x.q.shape[2])),
        "PAGE": PAGE,
        "UNITS": UNITS[space.mass.dtype],
        "SIZE": size_class(x.shape[2]),
    }


def scan_grid(x: Inputs, pages: int) -> Callable[[dict[str, Any]], tuple[int, int]]:
    """A tile of rows and LOOP times NP pages each."""

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        tiles = -(-x.q.shape[1] // meta["BM"])
        return x.q.shape[0] * tiles, -(-pages // (meta["NP"] * meta["LOOP"]))

    return grid


def power_of_two(n: int) -> int:
    """The next one."""
    return 1 << max(0, n - 1).bit_length()


def size_class(n: int) -> int:
    """Lengths that share a choice of block sizes: up to 8k keys, up to 64k, more."""
    return 0 if n <= 1 << 13 else 1 if n <= 1 << 16 else 2


def dot_dtype(x: Tensor) -> tl.dtype:
    """What products are made of; the interpreter cannot multiply bfloat16, and float32 holds it."""
    if INTERPRETED or x.dtype == torch.float32:
        return tl.float32
    return tl.float16 if x.dtype == torch.float16 else tl.bfloat16


def mask_pointer(x: Inputs) -> Tensor:
    """The mask for kernels, which read bytes and not truth values; anything where there is none."""
    if x.mask is None:
        return x.q
    return x.mask.view(torch.uint8) if x.mask.dtype == torch.bool else x.mask


def chunk_size(rows: int, num_samples: int) -> int:
    """Draws a program, a power of two: enough programs for every multiprocessor to have a few."""
    chunks = max(1, min(-(-num_samples // 64), -(-1024 // rows)))
    return max(64, power_of_two(-(-num_samples // chunks)))


def prefix(x: Inputs, space: Space, *, inverse: int = 0) -> None:
    """Sum the pages up; with `inverse` > 0 every key gets 1 / inverse of the row's mass besides."""
    heads, rows, n, _ = x.shape
    pages = space.sums.shape[-1]
    prefix_kernel[(heads * rows,)](
        space.sums,
        space.top,
        space.start,
        space.total,
        space.highest,
        space.each,
        n,
        pages,
        space.fine,
        inverse,
        BP=min(1024, max(16, power_of_two(pages))),
        PAGE=PAGE,
        SKETCHED=inverse > 0,
    )


def draw_options(x: Inputs, space: Space, num_samples: int) -> dict[str, Any]:
    """What the kernels that draw are specialised for."""
    heads, rows, n, width = x.shape
    return {
        "BV": max(16, power_of_two(width)),
        "PAGE": PAGE,
        "LOG": max(1, (space.sums.shape[-1] - 1).bit_length()),
        "WORD": 0xFFFF if space.mass.dtype == torch.int16 else 0x7FFFFFFF,
        "SIZE": size_class(n),
        "CHUNK": chunk_size(heads * rows, num_samples),
    }


def decode(x: Inputs, num_samples: int, replicates: int, seed: Tensor) -> Decoded:
    """Averages of the values at systematic draws from exact logits: unbiased.

    K is read once and V only at the draws. Between the two passes stay the masses of the keys, two bytes a key and
    row. Points lie equally far apart along them, so that a page of keys gets its share of the draws rounded up or down
    at random, and a key within it likewise. Each replicate has an offset of its own, which the heads of a group share.

    Parameters
    ----------
    x : Inputs
        On CUDA, or on the CPU in Triton's interpreter; float32, float16 or bfloat16, up to 256 features.
    num_samples : int
        S, the draws of a row and replicate.
    replicates : int
        R.
    seed : Tensor, int64, (), on the same device
    """
    heads, rows, _, width = x.shape
    space = Space.of(x, num_samples * replicates)
    pages = space.sums.shape[-1]
    scan_kernel[scan_grid(x, pages)](
        x.q,
        x.k,
        mask_pointer(x),
        space.mass,
        space.sums,
        space.top,
        seed,
        x.scale * LOG2_E,
        x.k.shape[1],
        rows,
        x.length,
        x.shape[2],
        pages,
        x.q.shape[2],
        *x.k.stride(),
        *((0, 0, 0, 0) if x.mask is None else x.mask.stride()),
        HAS_MASK=0 if x.mask is None else 1 if x.mask.dtype == torch.bool else 2,
        DOT=dot_dtype(x.q),
        **scan_options(x, space),
    )
    prefix(x, space)
    options = draw_options(x, space, num_samples)
    chunks = -(-num_samples // options["CHUNK"])
    indices = x.q.new_empty(heads, rows, replicates * num_samples, dtype=torch.int64)
    parts = x.q.new_empty(heads, rows, replicates, chunks, width, dtype=torch.float32)
    draw_kernel[(heads * rows, replicates, chunks)](
        x.v,
        space.mass,
        space.top,
        space.start,
        space.total,
        space.highest,
        seed,
        indices,
        parts,
        x.k.shape[1],
        rows,
        x.length,
        pages,
        width,
        num_samples,
        replicates,
        space.fine,
        *x.v.stride(),
        **options,
    )
    return Decoded(parts.sum(3), indices, space.total > 0)
