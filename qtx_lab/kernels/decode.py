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

from .decode_reference import GROUP, LOG2_E, PAGE, UNITS, Decoded, Inputs, fine_bits, mass_dtype
from .philox import INTERPRETED, uniform, words
from .philox_reference import OFFSETS, ROUNDING, ROUNDING_ROUNDS

STREAM_OFFSETS, STREAM_ROUNDING, FEW_ROUNDS = (
    tl.constexpr(OFFSETS),
    tl.constexpr(ROUNDING),
    tl.constexpr(ROUNDING_ROUNDS),
)
LOG2, KEYS, GROUPS = tl.constexpr(LOG2_E), tl.constexpr(GROUP), tl.constexpr(PAGE // GROUP)


def tuned(configs: list[triton.Config], key: list[str]) -> Callable[[Any], Any]:
    """Choose among these once for each key, and keep the choice on disk; the first of them in the interpreter."""
    some = configs[:1] if INTERPRETED else configs
    return triton.autotune(some, key=key, do_bench=short_bench, cache_results=True)


def short_bench(call: Callable[[], Any], quantiles: Any) -> Any:
    """Times of a call, from a quarter of the repetitions that Triton takes: there are many calls to choose from."""
    return triton.testing.do_bench(call, warmup=5, rep=25, quantiles=quantiles)


@triton.jit
def store_masses(
    b_l,  # [NP * PAGE, BM], base 2, -inf where masked
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
    BM: tl.constexpr,
    NP: tl.constexpr,
    PAGE: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Round the masses of NP pages to whole units and store them, with their sums and exponents."""
    b_l = tl.reshape(b_l, [NP, PAGE, BM])
    b_top = tl.ceil(tl.max(b_l, axis=1))  # [NP, BM]
    b_shift = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_x = tl.exp2(b_l - b_shift[:, None, :]) * UNITS  # [NP, PAGE, BM]

    # One counter for four keys; the rows of a group share their rounding.
    b_quarter = i_page * (PAGE // 4) + tl.arange(0, NP * PAGE // 4)
    b_w0, b_w1, b_w2, b_w3 = words(seed, b_quarter, i_n, 0, STREAM_ROUNDING, FEW_ROUNDS)
    b_w = tl.join(tl.join(b_w0, b_w2), tl.join(b_w1, b_w3))  # [NP * PAGE / 4, 2, 2]
    b_u = uniform(tl.reshape(b_w, [NP, PAGE, 1]))
    b_mass = (b_x + b_u).to(tl.int32)  # [NP, PAGE, BM]

    o_page = i_page + tl.arange(0, NP)
    o_row = i_n.to(tl.int64) * rows + o_m
    o_at = o_row[None, :] * pages + o_page[:, None]  # [NP, BM]
    m_at = m_m[None, :] & (o_page[:, None] < pages)
    b_part = tl.sum(tl.reshape(b_mass, [NP, GROUPS, KEYS, BM]), axis=2)  # [NP, GROUPS, BM]
    o_part = o_at[:, None, :] * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    tl.store(part_ptr + o_part, b_part, mask=m_at[:, None, :])
    tl.store(sum_ptr + o_at, tl.sum(b_part, axis=1), mask=m_at)
    tl.store(top_ptr + o_at, b_top, mask=m_at)
    o_key = o_at[:, None, :] * PAGE + tl.arange(0, PAGE)[None, :, None]
    tl.store(mass_ptr + o_key, b_mass.to(mass_ptr.dtype.element_ty), mask=m_at[:, None, :])


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
def shifts(b_top, highest, fine):
    """Bits by which a page's units are shifted up and down to the row's common ones, int64."""
    b_known = b_top > float("-inf")
    b_apart = tl.where(b_known, highest - tl.where(b_known, b_top, 0.0), 100.0)
    b_apart = tl.minimum(b_apart, 100.0).to(tl.int64)
    return tl.maximum(fine - b_apart, 0), tl.maximum(b_apart - fine, 0)


@triton.jit
def highest_of(top_ptr, pages, BP: tl.constexpr):
    """The largest exponent of a row's pages."""
    o_p = tl.arange(0, BP)
    b_high = tl.full([BP], float("-inf"), tl.float32)
    for i in range(0, pages, BP):
        b_top = tl.load(top_ptr + i + o_p, mask=i + o_p < pages, other=float("-inf"))
        b_high = tl.maximum(b_high, b_top)
    return tl.max(b_high, axis=0)


@triton.jit
def comb_offset(seed, i_replicate, i_l, i_n):
    """Where a comb starts, in parts of the distance of its points: float64, [1]."""
    b_word, _, _, _ = words(seed, tl.zeros([1], tl.int32) + i_replicate, i_l, i_n, STREAM_OFFSETS)
    return b_word.to(tl.float64) * (2.0**-32)


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
def sum_up(start_ptr, b_w, carry, o_p, m_p):
    """Store where pages of these masses start, behind what is carried, and return what is carried on."""
    tl.store(start_ptr + o_p, carry + tl.cumsum(b_w, axis=0) - b_w, mask=m_p)
    return carry + tl.sum(b_w, axis=0)


@triton.jit
def clear(page_ptr, size, BP: tl.constexpr):
    """Zeros, before pages are counted."""
    o_s = tl.arange(0, BP)
    for i in range(0, size, BP):
        tl.store(page_ptr + i + o_s, tl.zeros([BP], tl.int32), mask=i + o_s < size)


@triton.jit
def count_up(page_ptr, num_samples, BP: tl.constexpr):
    """From how many pages start between a point and the next, the page of each point."""
    o_s = tl.arange(0, BP)
    carry = tl.zeros([], tl.int32)
    for i in range(0, num_samples, BP):
        m_s = i + o_s < num_samples
        b_new = tl.load(page_ptr + i + o_s, mask=m_s, other=0)
        tl.store(page_ptr + i + o_s, carry + tl.cumsum(b_new, axis=0), mask=m_s)
        carry += tl.sum(b_new, axis=0)


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
def place_of(b_run, b_unit):
    """How many of the sums [BS, k] that run along are not above a unit [BS], at most k - 1: int32."""
    return tl.minimum(tl.sum((b_run <= b_unit[:, None]).to(tl.int32), axis=1), b_run.shape[1] - 1)


@triton.jit
def before(b_mass, b_place):
    """The sum of the masses [BS, k] before a place [BS]."""
    return tl.sum(tl.where(tl.arange(0, b_mass.shape[1])[None, :] < b_place[:, None], b_mass, 0), axis=1)


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


GATHER = [
    triton.Config({"BS": size, "FOLD": 2 * warps}, num_warps=warps)
    for size, warps in ((16, 1), (32, 1), (64, 2))
]


@triton.jit
def folded(b_x, FOLD: tl.constexpr):
    """The sum of every FOLD-th line of b_x [BS, k], [FOLD, k]: by each thread of its own lines, as they lie."""
    return tl.sum(tl.reshape(b_x, [b_x.shape[0] // FOLD, FOLD, b_x.shape[1]]), axis=0)


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


@dataclass(frozen=True)
class Space:
    """The masses of N M rows of T pages on the way from the scan to the draws; see `decode_reference.Masses`."""

    mass: Tensor
    """(N, M, T * PAGE), int16 or int32."""
    part: Tensor
    """(N, M, T * PAGE / GROUP), int32: sums of `GROUP` keys."""
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
    page: Tensor
    """(N, M, R, S), int32: the page in which each point lies."""

    @classmethod
    def of(cls, x: Inputs, num_samples: int, replicates: int) -> Space:
        """Room for rows of so many draws."""
        heads, rows, n, _ = x.shape
        shape, pages = (heads, rows), -(-n // PAGE)
        new = x.q.new_empty
        return cls(
            new(*shape, pages * PAGE, dtype=mass_dtype(num_samples * replicates)),
            new(*shape, pages * PAGE // GROUP, dtype=torch.int32),
            new(*shape, pages, dtype=torch.int32),
            new(*shape, pages, dtype=torch.float32),
            new(*shape, pages, dtype=torch.int64),
            new(shape, dtype=torch.int64),
            new(shape, dtype=torch.float32),
            new(*shape, replicates, num_samples, dtype=torch.int32),
        )

    @property
    def fine(self) -> int:
        """See `Masses`."""
        return fine_bits(self.sums.shape[-1], self.mass.dtype)


def scan_options(x: Inputs, space: Space) -> dict[str, Any]:
    """What the kernels that scan keys or sketches are specialised for."""
    return {
        "BM": max(4, min(64, power_of_two(x.q.shape[1]))),
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


def chunk_size(programs: int, num_samples: int) -> int:
    """Draws a program, a power of two: enough programs for every multiprocessor to have many at a time."""
    chunks = max(1, min(-(-num_samples // 64), -(-2048 // programs)))
    return max(64, power_of_two(-(-num_samples // chunks)))


def pages_at_once(space: Space) -> int:
    """Of a row, by a program that reads all of them."""
    return min(1024, max(16, power_of_two(space.sums.shape[-1])))


def word(space: Space) -> int:
    """The bits of a mass."""
    return 0xFFFF if space.mass.dtype == torch.int16 else 0x7FFFFFFF


LOCATED = 128
"""Points whose keys a program looks for, one a thread."""


def draw_options(x: Inputs, space: Space, num_samples: int) -> dict[str, Any]:
    """What the kernels that read the drawn rows are specialised for."""
    _, _, n, width = x.shape
    return {
        "BV": max(16, power_of_two(width)),
        "SIZE": size_class(n),
        "CHUNK": chunk_size(space.page[..., 0].numel(), num_samples),
    }


def decode(x: Inputs, num_samples: int, replicates: int, seed: Tensor) -> Decoded:
    """Averages of the values at systematic draws from exact logits: unbiased.

    K is read once and V only at the draws. Between the two passes stay the masses of the keys and sums of eight, about
    three bytes a key and row. Points lie equally far apart along them, so that a page of keys gets its share of the draws
    rounded up or down at random, and a key within it likewise. Each replicate has an offset of its own, which the heads
    of a group share.

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
    space = Space.of(x, num_samples, replicates)
    pages = space.sums.shape[-1]
    scan_kernel[scan_grid(x, pages)](
        x.q,
        x.k,
        mask_pointer(x),
        space.mass,
        space.part,
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
    prefix_kernel[(heads * rows,)](
        space.sums,
        space.top,
        space.start,
        space.total,
        space.highest,
        space.page,
        seed,
        rows,
        x.length,
        pages,
        space.fine,
        num_samples,
        replicates,
        BP=pages_at_once(space),
        num_warps=8,
    )
    indices = x.q.new_empty(heads, rows, replicates * num_samples, dtype=torch.int64)
    locate_kernel[(heads * rows, replicates, -(-num_samples // LOCATED))](
        space.mass,
        space.part,
        space.top,
        space.start,
        space.total,
        space.highest,
        space.page,
        seed,
        indices,
        rows,
        x.length,
        pages,
        num_samples,
        replicates,
        space.fine,
        PAGE=PAGE,
        WORD=word(space),
        BS=LOCATED,
    )
    options = draw_options(x, space, num_samples)
    chunks = -(-num_samples // options["CHUNK"])
    sums = x.q.new_empty(heads, rows, replicates, chunks, width, dtype=torch.float32)
    mean_kernel[(heads * rows, replicates, chunks)](
        x.v,
        indices,
        space.total,
        sums,
        x.k.shape[1],
        rows,
        width,
        num_samples,
        replicates,
        *x.v.stride(),
        **options,
    )
    parts = sums.sum(3) if chunks > 1 else sums[:, :, :, 0]
    return Decoded(parts, indices, space.total > 0)
