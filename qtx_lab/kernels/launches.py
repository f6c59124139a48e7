"""What the launchers share: arguments in groups, block sizes, and buffers between kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ShapeError
from ..streams import Stream
from .choice import check_readable
from .inputs import LOG2_E, Inputs
from .masses import PAGE, SUBPAGE, UNITS, fraction_bits
from .philox import INTERPRETED

GATHER_CONFIGS = [
    triton.Config({"BS": size, "FOLD": 2 * warps}, num_warps=warps)
    for size, warps in ((16, 1), (32, 1), (64, 2))
]
"""Block sizes of kernels that read the drawn keys or values."""


def tuned(configs: list[triton.Config], key: list[str]) -> Callable[[Any], Any]:
    """Decorate a kernel: the fastest of these block sizes is chosen once for each key, and stored on disk.

    In the interpreter the first one is taken.
    """
    candidates = configs[:1] if INTERPRETED else configs
    return triton.autotune(candidates, key=key, do_bench=measure_briefly, cache_results=True)


def measure_briefly(call: Callable[[], Any], quantiles: Any) -> Any:
    """Time a call with a quarter of Triton's repetitions, since many calls are compared."""
    return triton.testing.do_bench(call, warmup=5, rep=25, quantiles=quantiles)


def launch(kernel: Any, grid: Any, *groups: Any, **arguments: Any) -> None:
    """Launch a kernel with arguments that are found by the names of its parameters.

    Parameters
    ----------
    kernel : a function under `triton.jit`
        Its parameter `x`, or `x_ptr` for a tensor, takes the argument or the field `x`. Parameters that are
        not found are left to autotuning.
    grid : tuple of int, or function of the block sizes
        How many programs run.
    *groups : dataclasses
        Such as `InputArguments`, of whose fields the kernel takes what it needs.
    **arguments
        Further arguments, and Triton's own such as `num_warps`. They go before fields of the same name.
    """
    named: dict[str, Any] = {}
    for group in groups:
        named |= vars(group)
    named |= arguments
    names = {name: name.removesuffix("_ptr") for name in kernel.arg_names}
    parameters = {name: named[field] for name, field in names.items() if field in named}
    options = {name: arguments[name] for name in arguments.keys() - names.values()}
    kernel[grid](**parameters, **options)


@dataclass(frozen=True)
class InputArguments:
    """Tensors, sizes and strides of `Inputs`, as kernels name them."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    lengths: Tensor
    logit_scale: float
    """The factor of q · k for logits in base 2."""
    kv_heads: int
    rows: int
    """M, the rows of a key head."""
    length: int
    """L, the queries of a query head."""
    first_position: int
    n: int
    features: int
    width: int
    """The features of a value."""
    k_stride_b: int
    k_stride_h: int
    k_stride_n: int
    k_stride_d: int
    v_stride_b: int
    v_stride_h: int
    v_stride_n: int
    v_stride_d: int
    mask_stride_b: int
    mask_stride_h: int
    mask_stride_l: int
    mask_stride_n: int
    softcap: float
    """Of base-2 logits; 0 where there is none."""
    window_first: int
    """See `Inputs.band`."""
    window_last: int
    v_scale: float
    sinks: Tensor
    block_table: Tensor
    blocks: int
    block_size: int
    """T, the tokens of a block."""
    columns: int
    """C, the blocks of a sequence."""
    DOT: tl.dtype
    HAS_MASK: int
    """What kernels do with the mask: 0 nothing, 1 leave out keys where it is 0, 2 add it to the logits."""
    HAS_SOFTCAP: bool
    HAS_SINKS: bool
    HAS_LENGTHS: bool
    BANDED: bool
    """Whether the window or lengths hide keys."""
    PAGED: bool

    @classmethod
    def of(cls, x: Inputs) -> InputArguments:
        """The arguments of these inputs.

        Raises
        ------
        DtypeError
            If this GPU cannot read keys or values of this dtype.
        """
        check_readable(k=x.k, v=x.v)
        _, rows, n, width = x.shape
        mask, mask_strides = x.q, (0, 0, 0, 0)  # without a mask nothing reads it
        if x.mask is not None:
            # Kernels read bytes, not truth values.
            mask = x.mask.view(torch.uint8) if x.mask.dtype == torch.bool else x.mask
            mask_strides = strides(mask)
        lengths = x.q if x.lengths is None else x.lengths.contiguous()  # likewise
        sinks = x.q if x.sinks is None else x.sinks.float().contiguous()
        table = x.q if x.block_table is None else x.block_table.contiguous()
        tensors = (x.q.contiguous(), x.k, x.v, mask, lengths, x.logit_scale)
        sizes = (x.k.shape[1], rows, x.length, x.first_position, n, x.q.shape[2], width)
        softcap = 0.0 if x.softcap is None else x.softcap * LOG2_E
        return cls(
            *tensors,
            *sizes,
            *strides(x.k),
            *strides(x.v),
            *mask_strides,
            softcap,
            *x.band,
            v_scale=x.v_scale,
            sinks=sinks,
            block_table=table,
            blocks=x.k.shape[0],
            block_size=x.k.shape[2],
            columns=1 if x.block_table is None else x.block_table.shape[1],
            DOT=dot_dtype(x.q),
            HAS_MASK=0 if x.mask is None else 1 if x.mask.dtype == torch.bool else 2,
            HAS_SOFTCAP=x.softcap is not None,
            HAS_SINKS=x.sinks is not None,
            HAS_LENGTHS=x.lengths is not None,
            BANDED=x.is_banded,
            PAGED=x.block_table is not None,
        )


def strides(x: Tensor) -> tuple[int, int, int, int]:
    """The strides of a tensor of four dimensions."""
    b, h, n, d = x.stride()
    return b, h, n, d


@dataclass(frozen=True)
class StreamArguments:
    """A `Stream` as kernels name its parts."""

    stream_key: Tensor
    """(N,), int64."""
    head_group: Tensor
    """(N,), int64."""
    position: Tensor
    """(L,) or (N, L), int64."""
    position_stride: int
    """From one head's positions to the next one's."""
    purpose: int
    first_replicate: int

    @classmethod
    def of(cls, stream: Stream, x: Inputs) -> StreamArguments:
        """The arguments of a stream for these inputs.

        Raises
        ------
        ShapeError
            If the stream is not one of N heads and L positions.
        """
        heads, length = x.q.shape[0], x.length
        if len(stream.keys) != heads or stream.positions.shape[-1] != length:
            raise ShapeError(
                f"stream has {len(stream.keys)} heads and {stream.positions.shape[-1]} positions; "
                f"q has {heads} and {length}."
            )
        return cls(
            stream.keys.contiguous(),
            stream.groups.contiguous(),
            stream.positions.contiguous(),
            length if stream.positions.ndim == 2 else 0,
            int(stream.purpose),
            int(stream.first_replicate),
        )


@dataclass(frozen=True)
class MassBuffers:
    """What kernels leave for each other on the way from the scan to the draws of N P rows of T pages.

    P is M, or L where the rows of a group share their draws. See `masses.Masses`.
    """

    mass: Tensor
    """(N, P, T * PAGE), int16 or int32."""
    subpage_mass: Tensor
    """(N, P, T * PAGE / SUBPAGE), int32."""
    page_mass: Tensor
    """(N, P, T), int32."""
    page_exponent: Tensor
    """(N, P, T), float32."""
    page_start: Tensor
    """(N, P, T), int64: the mass of pages before, in the row's unit."""
    row_exponent: Tensor
    """(N, P), float32: the largest exponent of a page."""
    pages: int
    """T."""
    fraction_bits: int
    """See `Masses.fraction_bits`."""
    num_samples: int
    """S."""
    replicates: int
    """R."""

    @classmethod
    def of(
        cls, x: Inputs, rows: int, pages: int, dtype: torch.dtype, num_samples: int, replicates: int
    ) -> MassBuffers:
        """Empty buffers for the draws of P = `rows` rows of each head, which see T = `pages` pages."""
        shape, new = (x.shape[0], rows), x.q.new_empty
        return cls(
            new(*shape, pages * PAGE, dtype=dtype),
            new(*shape, pages * PAGE // SUBPAGE, dtype=torch.int32),
            new(*shape, pages, dtype=torch.int32),
            new(*shape, pages, dtype=torch.float32),
            new(*shape, pages, dtype=torch.int64),
            new(shape, dtype=torch.float32),
            pages,
            fraction_bits(pages, dtype),
            num_samples,
            replicates,
        )

    @property
    def mass_mask(self) -> int:
        """The bits of a mass when it is read as int32."""
        return 0xFFFF if self.mass.dtype == torch.int16 else 0x7FFFFFFF

    @property
    def pages_at_once(self) -> int:
        """Pages that a program which reads all of a row's takes at a time."""
        return min(1024, max(16, power_of_two(self.pages)))

    @property
    def row_programs(self) -> tuple[int]:
        """A grid of one program for each row."""
        return (self.row_exponent.numel(),)


def scan_options(x: Inputs, buffers: MassBuffers) -> dict[str, Any]:
    """Block sizes of the kernels that scan keys or sketches of keys."""
    return {
        "BM": max(4, min(64, power_of_two(x.q.shape[1]))),
        "BD": max(16, power_of_two(x.q.shape[2])),
        "PAGE": PAGE,
        "UNITS": UNITS[buffers.mass.dtype],
        "SIZE": size_class(x.shape[2]),
    }


def scan_grid(x: Inputs) -> Callable[[dict[str, Any]], tuple[int, int]]:
    """The programs of these kernels: one for each tile of rows and LOOP times NP pages."""
    pages = -(-x.shape[2] // PAGE)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        tiles = -(-x.q.shape[1] // meta["BM"])
        return x.q.shape[0] * tiles, -(-pages // (meta["NP"] * meta["LOOP"]))

    return grid


def gather_options(x: Inputs, buffers: MassBuffers) -> dict[str, Any]:
    """Block sizes of the kernels that read the drawn keys or values: CHUNK draws for each program."""
    _, _, n, width = x.shape
    programs = buffers.row_exponent.numel() * buffers.replicates
    # Every multiprocessor gets many programs at a time.
    chunks = max(1, min(-(-buffers.num_samples // 64), -(-2048 // programs)))
    return {
        "BV": max(16, power_of_two(width)),
        "SIZE": size_class(n),
        "CHUNK": max(64, power_of_two(-(-buffers.num_samples // chunks))),
    }


def power_of_two(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << max(0, n - 1).bit_length()


def search_levels(count: int) -> int:
    """The least k such that 8^k numbers are `count` or more: see `blocks.search_starts`."""
    return -(-(count - 1).bit_length() // 3)


def size_class(n: int) -> int:
    """Numbers of keys that share a choice of block sizes: 0 up to 8k keys, 1 up to 64k, 2 above."""
    return 0 if n <= 1 << 13 else 1 if n <= 1 << 16 else 2


def dot_dtype(x: Tensor) -> tl.dtype:
    """The dtype of the factors of products.

    The interpreter cannot multiply bfloat16, and float32 holds it.
    """
    if INTERPRETED or x.dtype == torch.float32:
        return tl.float32
    return tl.float16 if x.dtype == torch.float16 else tl.bfloat16
