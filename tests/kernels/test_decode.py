"""Decoding from exact logits: the kernel draws the reference's keys, and the draws are unbiased."""

import math
import os

import pytest
import torch
from scipy import stats

from qtx_lab.kernels.decode import reference as decode_reference
from qtx_lab.kernels.decode.launch import decode
from qtx_lab.kernels.inputs import Inputs
from qtx_lab.kernels.masses import PAGE, UNITS, Masses, mass_dtype
from qtx_lab.samplers import make_sampler

SOAK = os.environ.get("QTX_LAB_SOAK", "0") not in ("", "0")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def attention_inputs(case, dtype, generator, device, mask=None, exact_logits=False):
    """Inputs of (B, Hkv, G, L, n, E, Ev); with `exact_logits` small whole numbers, whose products have no rounding."""
    batch, heads, group, length, n, e, ev = case
    shapes = ((batch, heads * group, length, e), (batch, heads, n, e), (batch, heads, n, ev))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    if exact_logits:
        q, k = (x.round() / 8 for x in (q, k))
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    if mask == "bool":
        mask = torch.rand(batch, heads * group, length, n, generator=generator) < 0.5
        mask[0, 0, 0] = False
    elif mask == "float":
        mask = torch.randn(length, n, generator=generator)
        mask[:, ::3] = -torch.inf
    return Inputs.of(q, k, v, None if mask is None else mask.to(device), 1.0 if exact_logits else None)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


CASES = [
    ((2, 1, 4, 1, 300, 64, 64), torch.bfloat16, 64, 1, None),
    ((1, 2, 2, 2, 131, 100, 40), torch.float16, 33, 3, "bool"),
    ((1, 1, 3, 1, 65, 32, 256), torch.float32, 5, 1, "float"),
    ((1, 1, 1, 1, 1, 256, 32), torch.bfloat16, 7, 1, None),
    ((1, 1, 2, 1, 1100, 16, 16), torch.float32, 300, 1, None),
]
if SOAK:
    CASES += [
        ((1, 2, group, length, n, e, e), dtype, 64, 2, mask)
        for group, length in ((1, 1), (8, 1), (3, 7))
        for n in (2, 63, 64, 1000, 5000)
        for e in (32, 96, 128)
        for dtype in TOLERANCE
        for mask in (None, "bool")
    ]


@pytest.mark.parametrize(("case", "dtype", "draws", "replicates", "mask"), CASES)
def test_draws_and_outputs_are_the_references(
    case, dtype, draws, replicates, mask, generator, device, rows_alike
):
    x = attention_inputs(case, dtype, generator, device, mask)
    seed = torch.tensor(2**62 + 12345, device=device)
    found, wanted = (d(x, draws, replicates, seed) for d in (decode, decode_reference.decode))
    same = rows_alike(found.indices, wanted.indices)
    assert torch.equal(found.seen, wanted.seen)
    assert relative(found.output()[same].to(dtype), wanted.output()[same].to(dtype)) <= TOLERANCE[dtype]
    assert bool(found.output().isfinite().all())
    if mask == "bool":
        assert not found.seen[0, 0]
        assert bool((found.parts[0, 0] == 0).all())
        assert int(found.seen.sum()) == found.seen.numel() - 1
    if replicates > 1:
        assert relative(found.std_error()[same], wanted.std_error()[same]) <= 1e-4
    else:
        assert found.std_error() is None


@pytest.mark.parametrize("draws", [256, 4200])
def test_logits_without_rounding_are_drawn_alike_however_many(draws, generator, device, rows_alike):
    """No draw may differ where logits do not round: they are whole eighths; masses of more draws have 32 bits."""
    x = attention_inputs((1, 1, 1, 1, 300, 32, 32), torch.bfloat16, generator, device, exact_logits=True)
    seed = torch.tensor(5, device=device)
    rows_alike(decode(x, draws, 1, seed).indices, decode_reference.decode(x, draws, 1, seed).indices)


def test_the_same_draws_however_the_keys_lie_in_memory(generator, device):
    """Strides, and keys of a cache with room to grow, whose room holds NaN."""
    x = attention_inputs((2, 2, 1, 1, 150, 32, 32), torch.float32, generator, device)
    room = torch.full((2, 2, 400, 64), torch.nan, device=device)
    room[:, :, :150, :32], room[:, :, :150, 32:] = x.k, x.v
    spread = Inputs(x.q, room[:, :, :150, :32], room[:, :, :150, 32:], None, 1, x.scale)
    turned = Inputs(
        x.q, x.k.transpose(1, 2).contiguous().transpose(1, 2), x.v.mT.contiguous().mT, None, 1, x.scale
    )
    seed = torch.tensor(1, device=device)
    wanted = decode(x, 32, 1, seed)
    for other in (spread, turned):
        found = decode(other, 32, 1, seed)
        assert torch.equal(found.indices, wanted.indices)
        torch.testing.assert_close(found.parts, wanted.parts)


def test_seeds_heads_and_replicates_have_numbers_of_their_own_and_a_group_shares_them():
    q, k = torch.zeros(1, 4, 2, 16), torch.zeros(1, 2, 50_000, 16)
    x = Inputs.of(q, k, k)  # all keys alike: a draw shows the offset
    first, again, other = (
        decode_reference.decode(x, 1, 2, torch.tensor(seed)).indices.view(2, 2, 2, 2) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert torch.equal(first[:, 0], first[:, 1])  # the heads of a group
    kept = torch.cat((first[:, 0].flatten(), other[:, 0].flatten()))  # heads, positions, replicates, seeds
    assert kept.unique().numel() == kept.numel() == 16


@pytest.mark.statistical
@pytest.mark.parametrize("planted", [0.0, 0.02])
@pytest.mark.parametrize("peak", [1.0, 4.0])
def test_unbiased(peak, planted, seed):
    """Hotelling's T^2 over 100,000 rows; false alarms once in 10^6; probabilities off by 2 % are caught."""
    n, repetitions, draws = 24, 100_000, 12
    g = torch.Generator().manual_seed(seed)
    logits = peak * torch.randn(n, generator=g)
    logits = logits.clamp_min(logits.max() - 9)  # every key is drawn often enough to be Gaussian
    logits[7] = -torch.inf
    p = (logits * math.log(2)).softmax(-1).double()
    sign = torch.tensor([1.0, -1.0]).repeat(n // 2)
    rows = (logits + (1 + planted * sign).log2()).expand(repetitions, 1, n)  # a head each: numbers of its own
    counts = counts_of(rows, draws, seed)
    assert bool((counts[:, 7] == 0).all())
    free = p.nonzero().squeeze(1)[:-1]
    difference = counts.double().mean(0)[free] / draws - p[free]
    covariance = (counts[:, free].double() / draws).T.cov() / repetitions + 1e-14 * torch.eye(len(free))
    value = difference @ torch.linalg.solve(covariance, difference)
    p_value = stats.chi2.sf(value.item(), len(free))
    assert (p_value < 1e-6) == (planted > 0), p_value


def counts_of(rows, draws, seed):
    """How often the reference draws each key of base-2 logits (N, 1, n); the kernels draw the same."""

    class Given(Inputs):
        def logits(self):
            return part

    found = []
    for i, part in enumerate(rows.split(20_000)):
        heads, _, n = part.shape
        unused = torch.zeros(1, heads, n, 1)
        x = Given(torch.zeros(heads, 1, 1), unused, unused, None, 1, 1.0)
        indices = decode_reference.decode(x, draws, 1, torch.tensor(seed + i)).indices[:, 0]
        found.append(torch.zeros(heads, n).scatter_add_(1, indices, torch.ones(indices.shape)))
    return torch.cat(found)


@pytest.mark.statistical
def test_masses_are_rounded_without_bias_and_add_little(seed):
    """Means over 20,000 heads of each mass are within 6 standard errors of what was rounded."""
    logits = -torch.linspace(0, 30, 50).expand(20_000, 1, 50)
    mass = Masses.of(logits, torch.tensor(seed), torch.int16).mass[:, 0, 0, :50].double()
    exact = torch.exp2(logits[0, 0].double()) * UNITS[torch.int16]
    spread = (exact.frac() * (1 - exact.frac()) / 20_000).sqrt()
    assert bool(((mass.mean(0) - exact).abs() < 6 * spread + 1e-2).all())
    assert bool(((mass - exact).abs() < 1.01).all())


@pytest.mark.statistical
def test_no_noisier_than_systematic_sampling_by_float64(seed):
    """At 64 draws of 200 keys the mean squared error is that of the sampler, within 10 % (2,000 rows)."""
    g = torch.Generator().manual_seed(seed)
    logits, values = 2 * torch.randn(2000, 200, generator=g), torch.randn(200, 8, generator=g)
    exact = logits.double().softmax(-1) @ values.double()
    by_kernel = counts_of((logits / math.log(2))[:, None], 64, seed).double() / 64 @ values.double()
    sampled = make_sampler("systematic").draw(logits, 64, generator=g).dense(200).double() @ values.double()
    kernel, sampler = ((o - exact).square().mean() for o in (by_kernel, sampled))
    assert kernel <= 1.1 * sampler


def test_few_draws_are_kept_in_16_bits():
    assert mass_dtype(4096) == torch.int16
    assert mass_dtype(4097) == torch.int32
    assert PAGE * 65535 < 2**31
