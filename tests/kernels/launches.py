"""Calls of every launcher, to compile what they launch."""

import torch

from qtx_lab.cache.sketches import Int4Sketch, LowRankSketch
from qtx_lab.kernels.decode import launch as decode
from qtx_lab.kernels.inputs import Inputs
from qtx_lab.kernels.prefill import launch as prefill
from qtx_lab.kernels.sketch_decode import launch as sketch_decode
from qtx_lab.streams import Stream


def launch_all(dtype, every):
    """All kernels, for heads of 128 features; with `every` for other sizes, masks and counts of draws too."""
    for width in (32, 64, 100, 128, 256) if every else (128,):
        q, k, v = (
            torch.zeros(1, heads, n, width, dtype=dtype) for heads, n in ((8, 1), (2, 1000), (2, 1000))
        )
        x = Inputs.of(q, k, v)
        decode.decode(x, 64, 1, stream_of(x))
        k = torch.randn(k.shape).to(dtype)
        for sketch in (Int4Sketch.table_of(k), LowRankSketch.table_of(k, 16)):
            sketch_decode.sketch_decode(x, sketch, 64, 1, stream_of(x))
        train(q.expand(1, 8, 200, width), k, v, None, True)
        if every:
            some, plus = torch.ones(1000, dtype=torch.bool), torch.ones(1, 1000)
            for mask in (some, plus):
                x = Inputs.of(q, k, v, mask)
                decode.decode(x, 8192, 2, stream_of(x))
                train(q.expand(1, 8, 200, width), k, v, mask, False)


def train(q, k, v, mask, is_causal):
    x = Inputs.of(q, k, v, mask)
    stream = stream_of(x)
    forward = prefill.prefill(x, 64, stream, is_causal=is_causal)
    prefill.gradients(x, 64, stream, forward.output, forward, is_causal=is_causal)


def stream_of(x):
    batch, groups = x.k.shape[:2]
    return Stream.of(0, batch, groups, x.length)
