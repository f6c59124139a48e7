"""What launchers share: block sizes, grids, and the buffers between kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inputs import Inputs
from .masses import GROUP, PAGE, UNITS, fine_bits, mass_dtype
from .philox import INTERPRETED


def tuned(configs: list[triton.Config], key: list[str]) -> Callable[[Any], Any]:
    """Choose among these once for each key, and keep the choice on disk; the first of them in the interpreter."""
    some = configs[:1] if INTERPRETED else configs
    return triton.autotune(some, key=key, do_bench=short_bench, cache_results=True)


def short_bench(call: Callable[[], Any], quantiles: Any) -> Any:
    """Times of a call, from a quarter of the repetitions that Triton takes: there are many calls to choose from."""
    return triton.testing.do_bench(call, warmup=5, rep=25, quantiles=quantiles)


GATHER = [
    triton.Config({"BS": size, "FOLD": 2 * warps}, num_warps=warps)
    for size, warps in ((16, 1), (32, 1), (64, 2))
]


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
