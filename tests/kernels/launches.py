"""Calls of every launcher, to compile what they launch."""

from dataclasses import replace

import torch

from qtx_lab.cache.sketches import Int4Sketch, LowRankSketch
from qtx_lab.kernels.decode import launch as decode
from qtx_lab.kernels.exact_decode import launch as exact_decode
from qtx_lab.kernels.exact_decode.reference import CachedInputs
from qtx_lab.kernels.inputs import Inputs
from qtx_lab.kernels.prefill import launch as prefill
from qtx_lab.kernels.sketch_decode import launch as sketch_decode
from qtx_lab.kernels.sketch_decode.reference import SketchTable
from qtx_lab.streams import Stream


def launch_all(dtype, every):
    """All kernels, for heads of 128 features; with `every` for other sizes, masks and counts of draws too."""
    for width in (32, 64, 100, 128, 256) if every else (128,):
        q, k, v = (
            torch.zeros(1, heads, n, width, dtype=dtype) for heads, n in ((8, 1), (2, 1000), (2, 1000))
        )
        x = Inputs.of(q, k, v)
        decode.decode(x, 64, 1, stream_of(x))
        verify(x, every)
        k = torch.randn(k.shape).to(dtype)
        for sketch in (Int4Sketch.table_of(k), LowRankSketch.table_of(k, 16)):
            sketch_decode.sketch_decode(x, sketch, 64, 1, stream_of(x))
        train(q.expand(1, 8, 200, width), k, v, None, True)
        if every:
            some, plus = torch.ones(1000, dtype=torch.bool), torch.ones(1, 1000)
            for mask in (some, plus):
                x = Inputs.of(q, k, v, mask)
                decode.decode(x, 8192, 2, stream_of(x))
                decode.decode(replace(x, softcap=2.0, window=(3, 0)), 64, 1, stream_of(x))
                train(q.expand(1, 8, 200, width), k, v, mask, False)
            x = Inputs.of(q, k, v, softcap=2.0)
            sketch_decode.sketch_decode(x, sketch, 64, 1, stream_of(x))
            paged = paged_inputs(x)
            decode.decode(paged, 64, 1, stream_of(x))
            sketch_decode.sketch_decode(paged, sketch.in_order_of_keys(), 64, 1, stream_of(x))


def paged_inputs(x):
    """The same in blocks of 8 tokens and 8 bits, with lengths, a window and sinks."""
    batch, heads, n, width = x.k.shape
    pages = torch.zeros(batch * n // 8, heads, 8, width, dtype=torch.float8_e5m2)
    table, lengths = torch.zeros(batch, n // 8, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
    sinks = torch.zeros(x.q.shape[:2])
    return replace(x, k=pages, v=pages, lengths=lengths, block_table=table, sinks=sinks, window=(70, 0))


def verify(x, every):
    """Exact attention of a cache; with `every` from blocks, of other lengths, windows and dtypes too."""
    plain = CachedInputs(x.q, x.k, x.v, x.length, x.scale)
    exact_decode.exact_decode(plain)
    if every:
        table, lengths = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        several = x.q.repeat(1, 12, 1)
        half = x.k.to(torch.float8_e5m2)
        for k, options in ((x.k, {"window": 3, "softcap": 2.0}), (half, {"sinks": several[..., 0]})):
            exact_decode.exact_decode(CachedInputs(several, k, k, 12, 1.0, lengths, table, **options))


def decode_steps(dtype):
    """The decode steps of `qtx-lab bench kernels` with 8 sequences of 131,072 keys and 2,048 draws, by name.

    Memory that nothing reads or writes is only reserved.
    """
    heads, n, width, draws = 64, 1 << 17, 128, 2048
    k, v = (torch.empty(8, 8, n, width, dtype=dtype) for _ in range(2))
    x = Inputs.of(torch.zeros(8, 32, 1, width, dtype=dtype), k, v)
    stream = stream_of(x)
    order = torch.empty(heads, n, dtype=torch.int64)

    def table(columns, rank, dtype):
        weight, centre = torch.zeros(heads, width, rank), torch.zeros(heads, width)
        return SketchTable(torch.empty(heads, n, columns, dtype=dtype), weight, centre, n // 256, order)

    tables = {
        "int4": table(width // 2, width, torch.uint8),
        "rank 16": table(16, 16, torch.int8),
    }
    limited = replace(x, first_position=n - 1, softcap=50.0, window=(4095, 0))
    lengths = replace(x, lengths=torch.empty(8, dtype=torch.int32))
    steps = {
        "exact K": lambda: decode.decode(x, draws, 1, stream),
        "exact K, softcap and window": lambda: decode.decode(limited, draws, 1, stream),
        "exact K, lengths": lambda: decode.decode(lengths, draws, 1, stream),
    }
    tokens = CachedInputs(torch.zeros(heads, 4 * 8, width, dtype=dtype), k, v, 8, x.scale)
    steps["exact, 8 tokens"] = lambda: exact_decode.exact_decode(tokens)
    for name, sketch in tables.items():
        steps[name] = lambda sketch=sketch: sketch_decode.sketch_decode(x, sketch, 4 * draws, 1, stream)
    # Blocks of 16 tokens of 8 bits, and all that a model may ask for beside them.
    pages = torch.empty(8 * n // 16, 8, 16, width, dtype=torch.float8_e5m2)
    served = replace(
        lengths,
        k=pages,
        v=pages,
        block_table=torch.empty(8, n // 16, dtype=torch.int32),
        sinks=torch.empty(heads, 4),
        k_scale=0.5,
        v_scale=0.5,
        window=(4095, 0),
        softcap=50.0,
    )
    in_order = replace(tables["rank 16"], order=None)
    steps["exact K, served"] = lambda: decode.decode(served, draws, 1, stream)
    steps["rank 16, served"] = lambda: sketch_decode.sketch_decode(served, in_order, 4 * draws, 1, stream)
    steps["rank 16, lengths"] = lambda: sketch_decode.sketch_decode(
        lengths, tables["rank 16"], 4 * draws, 1, stream
    )
    capped = replace(x, softcap=50.0)
    steps["int4, softcap"] = lambda: sketch_decode.sketch_decode(capped, tables["int4"], 4 * draws, 1, stream)
    return steps


def train(q, k, v, mask, is_causal):
    x = Inputs.of(q, k, v, mask)
    stream = stream_of(x)
    forward = prefill.prefill(x, 64, stream, is_causal=is_causal)
    prefill.gradients(x, 64, stream, forward.output, forward, is_causal=is_causal)


def stream_of(x):
    batch, groups = x.k.shape[:2]
    return Stream.of(0, batch, groups, x.length)
