"""Random numbers: kernels and torch compute the same words."""

import torch
import triton
import triton.language as tl

from qtx_lab import streams
from qtx_lab.kernels import masses
from qtx_lab.kernels.philox import uniform24, uniform53, words

FULL = 0xFFFFFFFF


@triton.jit
def words_kernel(word_ptr, short_ptr, long_ptr, key_ptr, first, b_1, b_2, B: tl.constexpr):
    o = tl.arange(0, B)
    b_w0, b_w1, b_w2, b_w3 = words(tl.load(key_ptr), first + o, b_1, b_2, 3)
    tl.store(word_ptr + o, b_w0.to(tl.int64))
    tl.store(word_ptr + B + o, b_w1.to(tl.int64))
    tl.store(word_ptr + 2 * B + o, b_w2.to(tl.int64))
    tl.store(word_ptr + 3 * B + o, b_w3.to(tl.int64))
    tl.store(short_ptr + o, uniform24(b_w0))
    tl.store(long_ptr + o, uniform53(b_w0, b_w1))


def test_kernels_and_torch_compute_the_same_numbers(device):
    for key in (0, 1, 2**63 - 1, -5):
        out = torch.zeros(4, 64, dtype=torch.int64, device=device)
        short, long = (
            torch.zeros(64, dtype=dtype, device=device) for dtype in (torch.float32, torch.float64)
        )
        counter = (1 << 31) - 7, 12, 1 << 30
        words_kernel[(1,)](out, short, long, torch.tensor(key, device=device), *counter, B=64)
        expected = streams.philox(
            key, counter[0] + torch.arange(64, device=device), counter[1], counter[2], 3
        )
        assert torch.equal(out, torch.stack(expected))
        assert torch.equal(short, masses.uniform24(expected[0]))
        assert torch.equal(long, streams.uniform(*expected[:2]))


def test_numbers_of_24_bits_stay_below_one():
    assert masses.uniform24(torch.tensor([0, FULL])).tolist() == [0, 1 - 2.0**-24]
