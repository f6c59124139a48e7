"""Decoding from a sketch: the kernels draw and weigh the reference's keys, and estimate their error."""

import math
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import qtx_lab as qtx
from qtx_lab.cache.sketches import Int4Sketch, LowRankSketch
from qtx_lab.kernels.inputs import Inputs
from qtx_lab.kernels.masses import Masses, group_dtype, group_offsets
from qtx_lab.kernels.sketch_decode import oracle, reference
from qtx_lab.kernels.sketch_decode.launch import sketch_decode
from qtx_lab.streams import Stream

SOAK = os.environ.get("QTX_LAB_SOAK", "0") not in ("", "0")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def attention_inputs(case, dtype, generator, device):
    """Inputs of (B, Hkv, G, L, n, E, Ev), keys near a few directions."""
    batch, heads, group, length, n, e, ev = case
    shapes = ((batch, heads * group, length, e), (batch, heads, n, e), (batch, heads, n, ev))
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return Inputs.of(q, k * torch.linspace(2, 0.1, e, device=device, dtype=dtype), v)


def sketched(k, kind):
    return Int4Sketch.table_of(k) if kind == "int4" else LowRankSketch.table_of(k, min(13, k.shape[-1]))


def of_heads(sketch, select):
    """The sketch of some of its heads."""
    parts = {name: select(y) for name, y in vars(sketch).items() if isinstance(y, torch.Tensor)}
    return replace(sketch, **parts)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


CASES = [
    ((2, 1, 4, 1, 300, 64, 64), torch.bfloat16, "int8", 64, 1),
    ((1, 2, 2, 2, 131, 33, 40), torch.float16, "int4", 33, 3),
    ((1, 1, 3, 1, 65, 100, 256), torch.float32, "int8", 150, 1),
    ((1, 1, 1, 1, 1, 32, 32), torch.bfloat16, "int4", 7, 1),
    ((1, 1, 2, 1, 1100, 16, 16), torch.float32, "int8", 200, 2),
]
if SOAK:
    CASES += [
        ((1, 2, group, length, n, e, e), dtype, kind, draws, 2)
        for group, length in ((1, 1), (8, 1), (3, 7))
        for n in (2, 64, 1000, 5000)
        for e in (32, 128, 256)
        for dtype in TOLERANCE
        for kind, draws in (("int4", 200), ("int8", 64))
    ]


@pytest.mark.parametrize(("case", "dtype", "kind", "draws", "replicates"), CASES)
def test_draws_outputs_and_errors_are_the_references(
    case, dtype, kind, draws, replicates, generator, device, compare_draws, stream_of
):
    x = attention_inputs(case, dtype, generator, device)
    sketch, stream = sketched(x.k, kind), stream_of(x, 2**61 + 3)
    result, expected = (
        run(x, sketch, draws, replicates, stream) for run in (sketch_decode, reference.sketch_decode)
    )
    equal = compare_draws(result.indices, expected.indices)
    weights = result.weights()
    # A GPU multiplies values by weights that are rounded to the values' dtype, as FlashAttention does.
    rounding = 1 if device.type == "cpu" else 2
    assert relative(result.output[equal], expected.output[equal]) <= rounding * TOLERANCE[dtype]
    tolerance = 1e-5 if device.type == "cpu" else 1e-3
    assert relative(weights[equal], expected.weights()[equal]) <= tolerance
    errors, expected_errors = (y.std_error(x.v)[equal] for y in (result, expected))
    assert bool(((errors - expected_errors).abs() <= 1e-3 * expected_errors + 1e-5).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    values = x.v.flatten(0, 1).float()
    heads, rows, _, width = x.shape
    at = result.indices.flatten(1)[..., None].expand(-1, -1, width)
    drawn = values.gather(1, at).view(heads, rows, -1, width)
    average = torch.einsum("nmt,nmtd->nmd", weights, drawn)
    assert relative(result.output, average) <= rounding * TOLERANCE[dtype] + 1e-5


def test_weights_know_a_softcap(generator, device, compare_draws, stream_of):
    """Keys are drawn as without one; where all are drawn, the output is that of capped logits."""
    x = attention_inputs((1, 2, 2, 2, 131, 32, 16), torch.float32, generator, device)
    x, sketch, stream = replace(x, softcap=0.7), sketched(x.k, "int8"), stream_of(x, 4)
    for draws in (40, 131):
        result, expected = (
            run(x, sketch, draws, 2, stream) for run in (sketch_decode, reference.sketch_decode)
        )
        equal = compare_draws(result.indices, expected.indices)
        torch.testing.assert_close(result.weights()[equal], expected.weights()[equal], rtol=1e-3, atol=1e-6)
        assert relative(result.output[equal], expected.output[equal]) < 1e-5
    weights = (0.7 * torch.tanh(x.q.double() @ x.k[0].double().mT * x.scale / 0.7)).softmax(-1)
    assert relative(result.output, weights @ x.v[0].double()) < 1e-4


def test_masks_windows_and_lengths_are_refused(generator, device, stream_of):
    x = attention_inputs((1, 1, 2, 1, 70, 16, 8), torch.float32, generator, device)
    sketch, stream = sketched(x.k, "int8"), stream_of(x, 4)
    mask = torch.ones(1, 2, 1, 70, dtype=torch.bool, device=device)
    for run in (sketch_decode, reference.sketch_decode):
        with pytest.raises(
            qtx.ArgumentError, match=r"window=\(3, 0\) is not in this kernel: it must be None"
        ):
            run(replace(x, window=(3, 0)), sketch, 16, 1, stream)
        with pytest.raises(qtx.ArgumentError, match=r"mask=\(1, 2, 1, 70\) is not in this kernel"):
            run(replace(x, mask=mask), sketch, 16, 1, stream)
        with pytest.raises(qtx.ArgumentError, match=r"lengths=\(1,\) is not in this kernel"):
            run(replace(x, lengths=torch.tensor([3])), sketch, 16, 1, stream)


def test_exact_where_every_key_is_drawn(generator, device, stream_of):
    """With as many draws as keys each has pi = 1, and the standard error is 0."""
    x = attention_inputs((1, 1, 2, 1, 40, 16, 16), torch.float32, generator, device)
    result = sketch_decode(x, Int4Sketch.table_of(x.k), 40, 1, stream_of(x, 3))
    assert torch.equal(result.indices.sort(-1).values, torch.arange(40, device=device).expand(1, 2, -1))
    exact = F.scaled_dot_product_attention(x.q[None], x.k, x.v)[0]
    assert relative(result.output, exact) < 1e-5
    assert float(result.std_error(x.v).max()) < 1e-4


def test_no_key_is_drawn_twice_and_the_heaviest_with_certainty(generator, device, stream_of):
    """On rows of which a few keys hold most, nearly all draws find a key of their own.

    With 2 x 64 draws for two rows, a key of which either row alone would expect one draw of 64 is certain.
    """
    x = attention_inputs((2, 2, 2, 1, 700, 32, 16), torch.float32, generator, device)
    x = replace(x, scale=4 * x.scale)
    sketch = Int4Sketch.table_of(x.k)
    heaviest = (sketch.scores(x) * math.log(2)).softmax(-1).topk(12)
    expected, heaviest = 64 * heaviest.values, sketch.keys_at(heaviest.indices)
    assert bool(((expected > 1.25).sum(-1) >= 1).all())
    # Replicates are as independent as seeds are, and share what the interpreter spends on the keys.
    result = sketch_decode(x, sketch, 2 * 64, 4, stream_of(x, 0))
    drawn = result.indices.masked_fill(result.log_weights == -torch.inf, -1)
    for part in drawn.unflatten(-1, (4, 2 * 64)).unbind(2):
        counts = torch.zeros(4, 2, 701, device=device)
        counts.scatter_add_(-1, part + 1, torch.ones_like(part, dtype=torch.float32))
        assert counts[..., 1:].max() == 1
        assert counts[..., 0].max() <= 8
        assert bool((counts.gather(-1, heaviest + 1)[expected > 1.25] == 1).all())


@pytest.mark.parametrize("run", [sketch_decode, reference.sketch_decode], ids=["kernel", "reference"])
def test_a_row_draws_the_same_alone_and_in_a_batch_under_its_sequences_name(run, generator, device):
    """Sequences 3 and 8 side by side, and the last query of sequence 8 alone at its position."""
    x = attention_inputs((2, 1, 2, 2, 100, 16, 8), torch.float32, generator, device)
    sketch = Int4Sketch.table_of(x.k)
    stream = Stream.of(torch.tensor(5, device=device), torch.tensor([3, 8]), 1, 2, first_position=40)
    together = run(x, sketch, 20, 1, stream).indices.view(2, 2, 2, 20)
    q = x.q.view(2, 2, 2, 16)[1:, :, 1]
    alone = Inputs(q, x.k[1:], x.v[1:], None, 1, x.scale)
    part = of_heads(sketch, lambda y: y[1:])
    stream = Stream.of(torch.tensor(5, device=device), torch.tensor([8]), 1, 1, first_position=41)
    assert torch.equal(run(alone, part, 20, 1, stream).indices.view(2, 20), together[1, :, 1])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_probabilities_and_outputs_are_near_the_oracles(kind, generator, device, stream_of):
    """Both draw a key with nearly the same probability, and from the same draws compute the same output."""
    x = attention_inputs((1, 2, 2, 1, 1000, 16, 8), torch.float32, generator, device)
    sketch, stream = sketched(x.k, kind), stream_of(x, 1)
    result = reference.sketch_decode(x, sketch, 100, 1, stream)
    guessed = (sketch.scores(x) - sketch.log_normalisers(x)[..., None]) * math.log(2)
    pi = oracle.inclusion(guessed, 100, 0.02)[:, None].expand_as(guessed)  # by place
    of_key = torch.empty_like(pi).scatter_(-1, sketch.order[:, None].expand_as(pi), pi)
    drawn = result.log_weights > -torch.inf
    indices = result.indices
    logits = x.logits()
    ours = torch.exp2(logits.gather(-1, indices) - result.log_weights)[drawn]
    assert float((ours / of_key.gather(-1, indices)[drawn] - 1).abs().max()) < 0.05
    offsets = group_offsets(stream, 1).expand(-1, 2, -1)[..., 0]
    assert float((sketch.keys_at(oracle.draw(pi, offsets)) == indices).float().mean()) > 0.9
    for i in range(2):
        for m in range(2):
            keys = indices[i, m][drawn[i, m]]
            chance = torch.exp2(logits[i, m, keys] - result.log_weights[i, m][drawn[i, m]])
            output, std_error = oracle.weigh(logits[i, m, keys] * math.log(2), chance, x.v[0, i, keys])
            assert relative(result.output[i, m], output) < 1e-5
            assert relative(result.std_error(x.v)[i, m], std_error) < 1e-4


@pytest.mark.parametrize("n", [900, 20_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0, 40.0, "sinks", "needles"])
def test_nearly_all_draws_are_spent_and_every_key_may_be_drawn(spread, n, generator):
    """A sum of pi above S would take draws from the last keys, and certainty from the heaviest ones."""
    logits = torch.randn(3, 2, n, generator=generator)
    if spread == "sinks":  # in one page
        logits[..., :4] += 22
    elif spread == "needles":
        logits[..., torch.randperm(n, generator=generator)[:9]] += 20
    else:
        logits = logits * spread
    exists = (torch.arange(-(-n // 64) * 64) < n).view(-1, 64)
    for draws in (7, 64, n // 3):
        masses = Masses.of_groups(logits[:, None], group_dtype(draws, n))
        proposal = reference.Proposal.of(masses, 0.02)
        assert bool((proposal.up <= proposal.max_up).all())
        raised = masses.mass + proposal.extra[..., None] << proposal.up[..., None]
        mass = torch.where(exists, raised, 0).flatten(2)
        assert float((mass / mass.sum(-1, keepdim=True))[:, :, :n].min()) > 0.02 / 3 / n
        certain = proposal.certain_mass(masses, exists, draws)
        spent = torch.minimum(mass, certain).sum(-1) / certain[..., 0]
        assert bool((spent <= 1.02 * draws).all())
        # Where one key holds nearly all, c is as fine as it can be, and the others need no more draws.
        finest = (certain == 1 << proposal.max_up)[..., 0]
        assert bool((finest | (spent > 0.7 * draws)).all()), spent / draws


def test_four_bits_a_component_guess_better_than_few_components(generator):
    """Keys of a falling spectrum in a basis of their own, whose small directions rounding must not drown."""
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    k = torch.randn(1, 1, 3000, 64, generator=generator) * (1 + torch.arange(64.0)) ** -1 @ basis + 5
    x = Inputs.of(torch.randn(1, 4, 1, 64, generator=generator), k, k)
    places = torch.arange(3000).expand(1, 4, -1)

    def error(sketch):
        difference = sketch.scores(x) - x.logits().gather(-1, sketch.keys_at(places))
        return float((difference - difference.mean(-1, keepdim=True)).std() / x.logits().std(-1).mean())

    assert error(Int4Sketch.table_of(k)) < 0.25
    assert error(LowRankSketch.table_of(k, 64)) < 0.02
    assert error(Int4Sketch.table_of(k, 32)) < error(LowRankSketch.table_of(k, 8))


@pytest.mark.statistical
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_error_is_the_estimated_one_and_the_bias_small(kind, seed):
    """Over 400 repetitions of 8 rows the mean squared error is within 25 % of the estimated variance.

    The bias is below a fifth of it.
    """
    g = torch.Generator().manual_seed(seed)
    x = attention_inputs((1, 8, 1, 1, 400, 32, 8), torch.float32, g, torch.device("cpu"))
    q, k, v = (y.repeat_interleave(400, dim) for y, dim in ((x.q, 0), (x.k, 1), (x.v, 1)))
    many = Inputs(q, k, v, None, 1, x.scale)
    one = sketched(x.k, kind)
    sketch = of_heads(one, lambda y: y.repeat_interleave(400, 0))
    result = reference.sketch_decode(many, sketch, 64, 1, Stream.of(seed, 1, 8 * 400, 1))
    exact = F.scaled_dot_product_attention(x.q.double()[None], x.k.double(), x.v.double())[0]
    error = result.output.double().unflatten(0, (8, 400)) - exact[:, None]
    variance = result.std_error(many.v).double().square().mean()
    assert 0.75 < error.square().mean() / variance < 1.25
    assert error.mean(1).square().mean() < variance / 25
