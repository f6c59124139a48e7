"""Many queries: the kernels give the reference's outputs and gradients, and both are unbiased."""

import os

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from qtx_lab.kernels.inputs import Inputs
from qtx_lab.kernels.prefill import launch as prefill
from qtx_lab.kernels.prefill import reference as prefill_reference

SOAK = os.environ.get("QTX_LAB_SOAK", "0") not in ("", "0")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def attention_inputs(case, dtype, generator, device, mask=None):
    """Inputs of (B, Hkv, G, L, n, E, Ev)."""
    batch, heads, group, length, n, e, ev = case
    shapes = ((batch, heads * group, length, e), (batch, heads, n, e), (batch, heads, n, ev))
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    if mask == "bool":
        mask = torch.rand(batch, heads * group, length, n, generator=generator) < 0.5
        mask[0, 0, 0] = False
    elif mask == "float":
        mask = torch.randn(length, n, generator=generator)
        mask[:, ::3] = -torch.inf
    return Inputs.of(q, k, v, None if mask is None else mask.to(device))


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(0.1)).item()


CASES = [
    ((1, 2, 1, 63, 63, 32, 32), torch.float32, 16, True, None),
    ((1, 1, 2, 50, 130, 100, 40), torch.bfloat16, 33, False, "bool"),
    ((1, 1, 1, 1, 1, 32, 32), torch.float16, 5, False, None),
    ((2, 1, 1, 70, 65, 64, 16), torch.float16, 50, False, "float"),
    ((1, 1, 3, 33, 80, 16, 16), torch.bfloat16, 8, True, None),
]
if SOAK:
    CASES += [
        ((1, 2, group, length, n, e, e), dtype, 32, causal, None)
        for group, length, n in ((1, 128, 128), (4, 77, 77), (2, 20, 300), (1, 300, 20))
        for e in (32, 100, 128, 256)
        for dtype in TOLERANCE
        for causal in (False, True)
    ]


@pytest.mark.parametrize(("case", "dtype", "draws", "causal", "mask"), CASES)
def test_outputs_and_gradients_are_the_references(case, dtype, draws, causal, mask, generator, device):
    x = attention_inputs(case, dtype, generator, device, mask)
    seed = torch.tensor(2**60 + 7, device=device)
    options = {"is_causal": causal, "replicate": 2}
    output, normaliser = prefill.prefill(x, draws, seed, **options)
    wanted = prefill_reference.prefill(x, draws, seed, **options)
    assert relative(output.to(dtype), wanted) <= TOLERANCE[dtype]
    if mask == "bool":
        assert bool((output[0, 0] == 0).all())
    g = torch.randn(output.shape, generator=generator).to(device, dtype)
    found = prefill.gradients(x, draws, seed, g, output, normaliser, **options)
    for part, reference in zip(found, prefill_reference.gradients(x, draws, seed, g, **options), strict=True):
        assert bool(part.isfinite().all())
        # On a GPU weights and gradients are rounded to 16 bits before they are multiplied.
        assert relative(part, reference) <= (1e-5 if device.type == "cpu" else 2 * TOLERANCE[dtype])


def test_the_draws_themselves_are_the_references(generator, device):
    """Values that are a unit vector a key make the output the weights."""
    x = attention_inputs((1, 1, 2, 40, 100, 16, 100), torch.float32, generator, device)
    x = Inputs(x.q, x.k, torch.eye(100, device=device)[None, None], None, x.length, x.scale)
    seed = torch.tensor(11, device=device)
    found = prefill.prefill(x, 16, seed)[0]
    draws, weights, p = (
        part.flatten(-2)[..., :100] for part in prefill_reference.weights(x, 16, seed, is_causal=False)
    )
    assert float((found - weights).abs().max()) < 1e-4  # a draw more or less would be 1 / 16
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    counts = 16 * draws.double()
    assert bool(((counts - counts.round()).abs() < 1e-4).all())
    assert bool(
        ((counts >= (16 * p.double()).floor() - 1e-3) & (counts <= (16 * p.double()).ceil() + 1e-3)).all()
    )


@pytest.mark.statistical
@pytest.mark.parametrize("planted", [0.0, 0.03])
def test_output_and_gradients_are_unbiased(planted, seed):
    """z of random projections over 4,000 heads with their own numbers; false alarms 10^-6; three percent are caught."""
    g = torch.Generator().manual_seed(seed)
    repetitions, n = 4000, 150
    x = attention_inputs((1, 1, 1, 3, n, 8, 4), torch.float32, g, torch.device("cpu"))
    k, v = (y.expand(-1, repetitions, -1, -1) for y in (x.k, x.v))
    many = Inputs(x.q.expand(repetitions, -1, -1).contiguous(), k, v, None, 3, x.scale)
    q, k, v = (y.double().requires_grad_() for y in (x.q[0], x.k[0, 0], x.v[0, 0]))
    exact = F.scaled_dot_product_attention(q, k, v)
    upstream = torch.randn(exact.shape, generator=g)
    exact.backward(upstream.double())
    out = prefill_reference.prefill(many, 12, torch.tensor(seed)).double()
    parts = prefill_reference.gradients(many, 12, torch.tensor(seed), upstream.expand(repetitions, -1, -1))
    wanted = (exact.detach(), q.grad, k.grad, v.grad)
    caught = []
    for estimate, truth in zip((out, *parts), wanted, strict=True):
        direction = truth  # where a bias in scale shows best
        projected = (estimate.double() * direction).sum((1, 2)) * (1 + planted)
        z = (projected.mean() - truth.square().sum()) / (projected.std() / repetitions**0.5)
        other = torch.randn(truth.shape, generator=g, dtype=torch.float64)
        across = ((estimate.double() - truth) * other).sum((1, 2))
        assert across.mean().abs() < stats.norm.isf(1e-7) * across.std() / repetitions**0.5
        caught.append(bool(abs(z) > stats.norm.isf(1e-7)))
    assert any(caught) if planted else not any(caught)


@pytest.mark.statistical
def test_no_noisier_than_a_comb_along_the_whole_row(seed):
    """Errors of 24 draws, 500 heads: pages with their probabilities kept are not worse than systematic sampling."""
    from qtx_lab import sampled_attention

    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 500, n, 8, generator=g) for n in (2, 200, 200))
    exact = F.scaled_dot_product_attention(q, k, v)
    x = Inputs.of(q, k, v)
    pages = prefill_reference.prefill(x, 24, torch.tensor(seed)).view_as(exact)
    comb = sampled_attention(q, k, v, sampler="systematic", num_samples=24, generator=g).output
    assert (pages - exact).square().mean() <= 1.1 * (comb - exact).square().mean()


def test_memory_does_not_grow_with_the_map(generator, device):
    """What a launch makes is its output, a number a row, and in the backward pass the gradients."""
    x = attention_inputs((1, 1, 1, 128, 128, 16, 16), torch.float32, generator, device)
    made, fresh = [], torch.Tensor.new_empty

    def counted(self, *args, **options):
        out = fresh(self, *args, **options)
        made.append(out.numel())
        return out

    torch.Tensor.new_empty = counted
    try:
        output, normaliser = prefill.prefill(x, 8, torch.tensor(0, device=device), is_causal=True)
        prefill.gradients(x, 8, torch.tensor(0, device=device), output, output, normaliser, is_causal=True)
    finally:
        torch.Tensor.new_empty = fresh
    assert sum(made) == 128 * 16 + 128 + 3 * 128 * 16
