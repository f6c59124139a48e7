"""A call of every launcher, to compile what it launches."""

import torch

from qtx_lab.kernels.decode import launch as decode
from qtx_lab.kernels.inputs import Inputs
from qtx_lab.kernels.prefill import launch as prefill
from qtx_lab.kernels.sketch_decode import launch as sketch_decode
from qtx_lab.kernels.sketch_decode.reference import int4_sketch, low_rank_sketch


def launch_all(dtype, every):
    """All kernels, for heads of 128 features; with `every` for other sizes, masks and counts of draws too."""
    seed = torch.zeros((), dtype=torch.int64)
    for width in (32, 64, 100, 128, 256) if every else (128,):
        q, k, v = (
            torch.zeros(1, heads, n, width, dtype=dtype) for heads, n in ((8, 1), (2, 1000), (2, 1000))
        )
        decode.decode(Inputs.of(q, k, v), 64, 1, seed)
        k = torch.randn(k.shape).to(dtype)
        sketches = [int4_sketch(k), low_rank_sketch(k, 16)]
        if every:
            sketches.append(low_rank_sketch(k, 24, dtype=torch.float16))
        for sketch in sketches:
            sketch_decode.sketch_decode(Inputs.of(q, k, v), sketch, 64, 1, seed)
        train(q.expand(1, 8, 200, width), k, v, None, True, seed)
        if every:
            some, plus = torch.ones(1000, dtype=torch.bool), torch.ones(1, 1000)
            for mask in (some, plus):
                decode.decode(Inputs.of(q, k, v, mask), 8192, 2, seed)
                train(q.expand(1, 8, 200, width), k, v, mask, False, seed)


def train(q, k, v, mask, is_causal, seed):
    x = Inputs.of(q, k, v, mask)
    output, normaliser = prefill.prefill(x, 64, seed, is_causal=is_causal)
    prefill.gradients(x, 64, seed, output, output, normaliser, is_causal=is_causal)
