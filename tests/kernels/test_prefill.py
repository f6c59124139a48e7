"""Attention of many queries: the kernels give the reference's outputs and gradients, which are unbiased."""

import math
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from qtx_lab.kernels.inputs import Inputs
from qtx_lab.kernels.prefill import launch, oracle, reference
from qtx_lab.streams import Stream

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
def test_outputs_and_gradients_are_the_references(
    case, dtype, draws, causal, mask, generator, device, stream_of
):
    x = attention_inputs(case, dtype, generator, device, mask)
    stream = replace(stream_of(x, 2**60 + 7), first_replicate=2)
    forward = launch.prefill(x, draws, stream, is_causal=causal)
    output = forward.output
    expected = reference.prefill(x, draws, stream, is_causal=causal)
    assert relative(output.to(dtype), expected) <= TOLERANCE[dtype]
    if mask == "bool":
        assert bool((output[0, 0] == 0).all())
    g = torch.randn(output.shape, generator=generator).to(device, dtype)
    grad = launch.gradients(x, draws, stream, g, forward, is_causal=causal)
    expected = reference.gradients(x, draws, stream, g, is_causal=causal)
    for name in ("q", "k", "v"):
        ours, theirs = getattr(grad, name), getattr(expected, name)
        assert bool(ours.isfinite().all())
        # On a GPU weights and gradients are rounded to 16 bits before they are multiplied.
        assert relative(ours, theirs) <= (1e-5 if device.type == "cpu" else 2 * TOLERANCE[dtype])


def test_draws_are_the_references(generator, device, stream_of):
    """With a unit vector as the value of each key, the output is the weights."""
    x = attention_inputs((1, 1, 2, 40, 100, 16, 100), torch.float32, generator, device)
    x = Inputs(x.q, x.k, torch.eye(100, device=device)[None, None], None, x.length, x.scale)
    stream = stream_of(x, 11)
    weights = launch.prefill(x, 16, stream).output
    drawn = reference.draw(x, 16, stream, is_causal=False)
    expected, draws, p = (
        part.flatten(-2)[..., :100] for part in (drawn.weights, drawn.draws, drawn.probabilities)
    )
    assert float((weights - expected).abs().max()) < 1e-4  # a draw more or less would be 1 / 16
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    counts = 16 * draws.double()
    assert bool(((counts - counts.round()).abs() < 1e-4).all())
    low, high = (16 * p.double()).floor() - 1e-3, (16 * p.double()).ceil() + 1e-3
    assert bool(((counts >= low) & (counts <= high)).all())


def test_outputs_are_the_oracles(generator, device, stream_of):
    x = attention_inputs((1, 2, 1, 6, 150, 16, 8), torch.float32, generator, device, "float")
    stream = stream_of(x, 3)
    output = reference.prefill(x, 20, stream)
    offsets = reference.page_offsets(stream, 3, x.shape[1])
    for i in range(2):
        for m in range(6):
            row = oracle.prefill(x.logits()[i, m] * math.log(2), x.v[0, i], offsets[i, m], 20)
            assert relative(output[i, m], row) < 1e-5


def test_later_queries_of_a_causal_problem_are_drawn_as_with_the_first(generator, device):
    """Chunks of queries of a long prompt: outputs and gradients of q are those of all queries at once."""
    x = attention_inputs((1, 2, 2, 90, 90, 16, 8), torch.float32, generator, device)
    stream = Stream.of(torch.tensor(5, device=device), 1, 2, 90)
    whole = launch.prefill(x, 20, stream, is_causal=True)
    g = torch.ones_like(whole.output)
    whole_grad = launch.gradients(x, 20, stream, g, whole, is_causal=True)
    q = x.q.view(2, 2, 90, 16)[:, :, 50:].reshape(2, 80, 16)
    part = Inputs(q, x.k, x.v, None, 40, x.scale, first_position=50)
    stream = Stream.of(torch.tensor(5, device=device), 1, 2, 40, first_position=50)
    last = launch.prefill(part, 20, stream, is_causal=True)
    expected = whole.output.view(2, 2, 90, 8)[:, :, 50:].reshape(2, 80, 8)
    torch.testing.assert_close(last.output, expected)
    torch.testing.assert_close(reference.prefill(part, 20, stream, is_causal=True), expected)
    grad = launch.gradients(part, 20, stream, g[:, :80], last, is_causal=True)
    expected = whole_grad.q.view(2, 2, 90, 16)[:, :, 50:].reshape(2, 80, 16)
    torch.testing.assert_close(grad.q, expected)
    by_reference = reference.gradients(part, 20, stream, g[:, :80], is_causal=True)
    for name in ("q", "k", "v"):
        assert relative(getattr(grad, name), getattr(by_reference, name)) < 1e-5


@pytest.mark.parametrize(
    "run", [lambda *a: launch.prefill(*a).output, reference.prefill], ids=["kernel", "reference"]
)
def test_a_row_draws_the_same_alone_and_in_a_batch_under_its_sequences_name(run, generator, device):
    """Sequences 3 and 8 side by side, and the last query of sequence 8 alone at its position."""
    x = attention_inputs((2, 2, 2, 3, 100, 16, 8), torch.float32, generator, device)
    stream = Stream.of(torch.tensor(5, device=device), torch.tensor([3, 8]), 2, 3, first_position=40)
    together = run(x, 20, stream).view(2, 2, 2, 3, 8)
    q = x.q.view(2, 2, 2, 3, 16)[1:, :, :, 2:].reshape(2, 2, 16)
    alone = Inputs(q, x.k[1:], x.v[1:], None, 1, x.scale)
    stream = Stream.of(torch.tensor(5, device=device), torch.tensor([8]), 2, 1, first_position=42)
    torch.testing.assert_close(run(alone, 20, stream).view(2, 2, 8), together[1, :, :, 2])
    elsewhere = stream.of_block(slice(None), torch.tensor([43], device=device))
    assert not torch.allclose(run(alone, 20, elsewhere).view(2, 2, 8), together[1, :, :, 2])


@pytest.mark.statistical
@pytest.mark.parametrize("planted", [0.0, 0.03])
def test_output_and_gradients_are_unbiased(planted, seed):
    """Mean projections over 4,000 independent heads: false alarms once in 10^6; 3 % are caught."""
    g = torch.Generator().manual_seed(seed)
    repetitions, n = 4000, 150
    x = attention_inputs((1, 1, 1, 3, n, 8, 4), torch.float32, g, torch.device("cpu"))
    k, v = (y.expand(-1, repetitions, -1, -1) for y in (x.k, x.v))
    many = Inputs(x.q.expand(repetitions, -1, -1).contiguous(), k, v, None, 3, x.scale)
    q, k, v = (y.double().requires_grad_() for y in (x.q[0], x.k[0, 0], x.v[0, 0]))
    exact = F.scaled_dot_product_attention(q, k, v)
    upstream = torch.randn(exact.shape, generator=g)
    exact.backward(upstream.double())
    stream = Stream.of(seed, 1, repetitions, 3)
    out = reference.prefill(many, 12, stream).double()
    grad = reference.gradients(many, 12, stream, upstream.expand(repetitions, -1, -1))
    exact_parts = (exact.detach(), q.grad, k.grad, v.grad)
    caught = []
    for estimate, truth in zip((out, grad.q, grad.k, grad.v), exact_parts, strict=True):
        # In the direction of the truth a bias in scale shows best.
        projected = (estimate.double() * truth).sum((1, 2)) * (1 + planted)
        z = (projected.mean() - truth.square().sum()) / (projected.std() / repetitions**0.5)
        other = torch.randn(truth.shape, generator=g, dtype=torch.float64)
        across = ((estimate.double() - truth) * other).sum((1, 2))
        assert across.mean().abs() < stats.norm.isf(1e-7) * across.std() / repetitions**0.5
        caught.append(bool(abs(z) > stats.norm.isf(1e-7)))
    assert any(caught) if planted else not any(caught)


@pytest.mark.statistical
def test_no_noisier_than_a_comb_along_the_whole_row(seed):
    """Errors of 24 draws from 500 heads: drawing page by page is not worse than systematic sampling."""
    from qtx_lab import sampled_attention

    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 500, n, 8, generator=g) for n in (2, 200, 200))
    exact = F.scaled_dot_product_attention(q, k, v)
    x = Inputs.of(q, k, v)
    pages = reference.prefill(x, 24, Stream.of(seed, 1, 500, 2)).view_as(exact)
    comb = sampled_attention(q, k, v, sampler="systematic", num_samples=24, generator=g).output
    assert (pages - exact).square().mean() <= 1.1 * (comb - exact).square().mean()


def test_memory_does_not_grow_with_the_map(generator, device, monkeypatch, stream_of):
    """A launch allocates its output, a number for each row, and in the backward pass the gradients."""
    x = attention_inputs((1, 1, 1, 128, 128, 16, 16), torch.float32, generator, device)
    stream = stream_of(x, 0)
    sizes, fresh = [], torch.Tensor.new_empty

    def counted(self, *args, **options):
        out = fresh(self, *args, **options)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    forward = launch.prefill(x, 8, stream, is_causal=True)
    launch.gradients(x, 8, stream, forward.output, forward, is_causal=True)
    assert sum(sizes) == 128 * 16 + 128 + 3 * 128 * 16
