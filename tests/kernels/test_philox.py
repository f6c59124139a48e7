"""Random numbers: Philox's known answers, and the same words in kernels and in torch."""

import torch
import triton
import triton.language as tl

from qtx_lab.kernels.philox import words
from qtx_lab.kernels.philox_reference import philox, uniform

FULL = 0xFFFFFFFF


@triton.jit
def words_kernel(out_ptr, seed_ptr, first, b_1, b_2, B: tl.constexpr):
    o = tl.arange(0, B)
    b_w0, b_w1, b_w2, b_w3 = words(tl.load(seed_ptr), first + o, b_1, b_2, 3)
    tl.store(out_ptr + o, b_w0.to(tl.int64))
    tl.store(out_ptr + B + o, b_w1.to(tl.int64))
    tl.store(out_ptr + 2 * B + o, b_w2.to(tl.int64))
    tl.store(out_ptr + 3 * B + o, b_w3.to(tl.int64))


def test_known_answers():
    """Of Random123's kat_vectors."""
    found = [
        philox(-1, FULL, FULL, FULL, FULL),
        philox(0x299F31D0A4093822, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
    ]
    hexadecimal = [" ".join(f"{int(x):08x}" for x in words) for words in found]
    assert hexadecimal == ["408f276d 41c83b0e a20bc7c6 6d5451fd", "d16cfe09 94fdcceb 5001e420 24126ea1"]


def test_the_kernels_words_are_the_references(device):
    for seed in (0, 1, 2**63 - 1, -5):
        out = torch.zeros(4, 64, dtype=torch.int64, device=device)
        counter = (1 << 31) - 7, 12, 1 << 30
        words_kernel[(1,)](out, torch.tensor(seed, device=device), *counter, B=64)
        wanted = philox(seed, counter[0] + torch.arange(64, device=device), counter[1], counter[2], 3)
        assert torch.equal(out, torch.stack(wanted))


def test_uniform_stays_below_one():
    assert uniform(torch.tensor([0, FULL])).tolist() == [0, 1 - 2.0**-24]
