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
    errors, expected_errors = (y.std_error(x)[equal] for y in (result, expected))
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


def sketched_each(x, lengths, kind):
    """A sketch of a batch, each sequence's fitted to its own tokens, at the first places."""
    n = x.k.shape[2]
    own = [sketched(x.k[b : b + 1, :, :tokens], kind) for b, tokens in enumerate(lengths)]
    behind = [n - tokens for tokens in lengths]
    table = [F.pad(y.table, (0, 0, 0, more), value=77) for y, more in zip(own, behind, strict=True)]
    order = [F.pad(y.order, (0, more), value=n - 1) for y, more in zip(own, behind, strict=True)]
    weight, centre = torch.cat([y.weight for y in own]), torch.cat([y.centre for y in own])
    assert len({y.num_exact for y in own}) == 1
    return reference.SketchTable(torch.cat(table), weight, centre, own[0].num_exact, torch.cat(order))


RANGES = [
    ((3, 2, 2, 1, 300, 32, 16), "int8", torch.bfloat16, [300, 130, 20], {"softcap": 3.0}, "8 bits, sinks"),
    ((3, 1, 3, 1, 300, 33, 40), "int4", torch.float32, [64, 299, 65], {}, "paged"),
    ((3, 2, 2, 2, 300, 32, 16), "int4 in order", torch.float32, [300, 129, 1], {}, "paged, sinks"),
    ((2, 1, 2, 2, 500, 32, 16), "int8 in order", torch.float16, None, {"window": (130, 0)}, "8 bits"),
    (
        (2, 1, 2, 1, 300, 16, 16),
        "int8 in order",
        torch.float32,
        [300, 250],
        {"window": (70, 0)},
        "paged, 8 bits",
    ),
    ((1, 1, 2, 3, 200, 16, 16), "int8 in order", torch.float32, None, {"window": (None, 3)}, ""),
]
if SOAK:
    forms = ("", "paged", "paged, sinks", "paged, 8 bits, sinks")
    RANGES += [(*case, form) for *case, own in RANGES for form in forms if form != own]


@pytest.mark.parametrize(("case", "kind", "dtype", "lengths", "options", "form"), RANGES)
def test_lengths_windows_blocks_and_sinks_are_the_references(
    case, kind, dtype, lengths, options, form, generator, device, compare_draws, stream_of, paged
):
    """Keys that no row sees are not read: they are NaN. Where S is the number of keys that a row sees or
    more, the output is that of exact attention."""
    x = attention_inputs(case, dtype, generator, device)
    batch, heads, _, length, n, *_ = case
    if "8 bits" in form:
        k, v = (y.to(torch.float8_e4m3fn).to(dtype) for y in (x.k, x.v))
        x = replace(x, k=k, v=v, k_scale=0.5, v_scale=3.0)
    if "sinks" in form:
        x = replace(x, sinks=torch.randn(x.q.shape[:2], generator=generator).to(device))
    kind, _, in_order = kind.partition(" ")
    if lengths is None:
        sketch, x = sketched(x.k, kind), replace(x, first_position=n - length - 60, **options)
    elif in_order:
        sketch = sketched(x.k, kind)
        x = replace(x, lengths=torch.tensor(lengths, device=device), **options)
    else:
        sketch = sketched_each(x, lengths, kind)
        x = replace(x, lengths=torch.tensor(lengths, device=device), **options)
    if in_order:
        sketch = replace(sketch.in_order_of_keys(), num_exact=5)
    logits = x.logits().double() * math.log(2)
    stream = stream_of(x, 4)
    seen = (logits > -torch.inf).view(batch, -1, n).any(1)[:, None, :, None]  # [B, 1, n, 1]
    values = x.v.flatten(0, 1).double() * x.v_scale
    x = replace(x, k=torch.where(seen, x.k, torch.nan), v=torch.where(seen, x.v, torch.nan))
    given = x
    if "8 bits" in form:
        given = replace(x, k=x.k.to(torch.float8_e4m3fn), v=x.v.to(torch.float8_e4m3fn))
    if "paged" in form and lengths is not None:
        given = paged(given, 7)
        columns = given.shape[2] - n
        order = None if sketch.order is None else F.pad(sketch.order, (0, columns))
        sketch = replace(sketch, table=F.pad(sketch.table, (0, 0, 0, columns)), order=order)
    elif "paged" in form:
        size = 50
        given = replace(
            given,
            k=given.k.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1),
            v=given.v.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1),
            block_table=torch.arange(batch * n // size, device=device).view(batch, -1),
        )
    for draws in (40, n):
        result, expected = (
            run(given, sketch, draws, 2, stream) for run in (sketch_decode, reference.sketch_decode)
        )
        equal = compare_draws(result.indices, expected.indices)
        weights = result.weights()
        torch.testing.assert_close(weights[equal], expected.weights()[equal], rtol=2e-3, atol=1e-5)
        assert relative(result.output[equal], expected.output[equal]) <= TOLERANCE[dtype]
        torch.testing.assert_close(
            result.log_sum_exp[equal], expected.log_sum_exp[equal], rtol=1e-4, atol=1e-4
        )
        errors = result.std_error(given)
        torch.testing.assert_close(errors[equal], expected.std_error(given)[equal], rtol=1e-3, atol=1e-4)
        chance = logits.gather(-1, result.indices)
        assert bool((chance[result.log_weights > -torch.inf] > -torch.inf).all())
    total = logits.logsumexp(-1)
    if given.sinks is not None:
        total = torch.logaddexp(total, given.sinks.double())
    share = (logits - total.nan_to_num(neginf=0.0)[..., None]).exp()
    exact = share @ torch.where(seen.expand(-1, heads, -1, -1).flatten(0, 1), values, 0)
    assert relative(result.output, exact) <= 2 * TOLERANCE[dtype] + 1e-4
    torch.testing.assert_close(result.log_sum_exp.double(), total, rtol=1e-3, atol=1e-3)


def test_a_sequence_draws_the_same_alone_and_among_longer_ones(generator, device, stream_of):
    x = attention_inputs((3, 2, 2, 1, 700, 32, 16), torch.float32, generator, device)
    lengths = [700, 650, 600]  # as the longest one: with so few keys for each draw, all masses have 32 bits
    sketch = sketched_each(x, lengths, "int4")
    x = replace(x, lengths=torch.tensor(lengths, dtype=torch.int32, device=device))
    together = sketch_decode(x, sketch, 100, 1, stream_of(x, 6))
    for b, tokens in enumerate(lengths):
        rows = slice(2 * b, 2 * b + 2)
        k, v = (y[b : b + 1, :, :tokens] for y in (x.k, x.v))
        part = of_heads(sketch, lambda y, rows=rows: y[rows])
        part = replace(part, table=part.table[:, :tokens], order=part.order[:, :tokens])
        stream = Stream.of(torch.tensor(6, device=device), torch.tensor([b]), 2, 1)
        alone = sketch_decode(Inputs(x.q[rows], k, v, None, 1, x.scale), part, 100, 1, stream)
        assert float((alone.indices == together.indices[rows]).float().mean()) > 0.99
        torch.testing.assert_close(alone.output, together.output[rows], rtol=1e-3, atol=1e-4)


def test_tokens_that_are_not_there_are_noticed(generator, device, stream_of, paged):
    """A row that draws a token without a block is NaN, and one whose sequence has too many tokens."""
    x = attention_inputs((2, 1, 2, 1, 160, 16, 16), torch.float32, generator, device)
    sketch, stream, x = sketched(x.k, "int8"), stream_of(x, 3), paged(x, 8)
    expected = sketch_decode(x, sketch, 160, 1, stream)
    table = x.block_table.clone()
    table[1, 2] = 99
    more = x.lengths + torch.tensor([0, 3], device=device)
    for wrong in (replace(x, block_table=table), replace(x, lengths=more)):
        result = sketch_decode(wrong, sketch, 160, 1, stream)
        assert bool(result.output[1].isnan().all())
        assert bool(result.log_sum_exp[1].isnan().all())
        assert torch.equal(result.output[0], expected.output[0])
        with pytest.raises(qtx.ArgumentError, match=r"block_table names blocks|lengths=.* there are 160"):
            reference.sketch_decode(wrong, sketch, 160, 1, stream)


def test_masks_and_what_an_order_does_not_allow_are_refused(generator, device, stream_of):
    x = attention_inputs((1, 1, 2, 2, 70, 16, 8), torch.float32, generator, device)
    sketch, stream = sketched(x.k, "int8"), stream_of(x, 4)
    mask = torch.ones(1, 2, 2, 70, dtype=torch.bool, device=device)
    lengths = torch.tensor([3], device=device)
    for run in (sketch_decode, reference.sketch_decode):
        with pytest.raises(
            qtx.ArgumentError, match=r"window=\(3, 0\) is not possible with L=2 .*in_order_of"
        ):
            run(replace(x, window=(3, 0)), sketch, 16, 1, stream)
        with pytest.raises(qtx.ArgumentError, match=r"mask=\(1, 2, 2, 70\) is not in this kernel"):
            run(replace(x, mask=mask), sketch, 16, 1, stream)
        with pytest.raises(
            qtx.ArgumentError, match=r"lengths=\(1,\) is not possible with L=2 queries a head"
        ):
            run(replace(x, lengths=lengths), sketch, 16, 1, stream)
        with pytest.raises(qtx.ShapeError, match="sketch has 70 places of 1 heads; k has 69 keys of 1"):
            run(replace(x, k=x.k[:, :, 1:], v=x.v[:, :, 1:]), sketch, 16, 1, stream)


def test_exact_where_every_key_is_drawn(generator, device, stream_of):
    """With as many draws as keys each has pi = 1, and the standard error is 0."""
    x = attention_inputs((1, 1, 2, 1, 40, 16, 16), torch.float32, generator, device)
    result = sketch_decode(x, Int4Sketch.table_of(x.k), 40, 1, stream_of(x, 3))
    assert torch.equal(result.indices.sort(-1).values, torch.arange(40, device=device).expand(1, 2, -1))
    exact = F.scaled_dot_product_attention(x.q[None], x.k, x.v)[0]
    assert relative(result.output, exact) < 1e-5
    assert float(result.std_error(x).max()) < 1e-4


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
            assert relative(result.std_error(x)[i, m], std_error) < 1e-4


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
    exists = (torch.arange(-(-n // 64) * 64) < n).view(-1, 64).expand(3, 1, -1, -1)
    for draws in (7, 64, n // 3):
        masses = Masses.of_groups(logits[:, None], group_dtype(draws, n))
        proposal = reference.Proposal.of(masses, exists, 0.02)
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
@pytest.mark.parametrize(("kind", "sink"), [("int8", None), ("int4", None), ("int8", 5.0)])
def test_the_error_is_the_estimated_one_and_the_bias_small(kind, sink, seed):
    """Over 400 repetitions of 8 rows the mean squared error is within 25 % of the estimated variance.

    The bias is below a fifth of it.
    """
    g = torch.Generator().manual_seed(seed)
    x = attention_inputs((1, 8, 1, 1, 400, 32, 8), torch.float32, g, torch.device("cpu"))
    q, k, v = (y.repeat_interleave(400, dim) for y, dim in ((x.q, 0), (x.k, 1), (x.v, 1)))
    sinks = None if sink is None else torch.full(q.shape[:2], sink)
    many = Inputs(q, k, v, None, 1, x.scale, sinks=sinks)
    one = sketched(x.k, kind)
    sketch = of_heads(one, lambda y: y.repeat_interleave(400, 0))
    result = reference.sketch_decode(many, sketch, 64, 1, Stream.of(seed, 1, 8 * 400, 1))
    exact = F.scaled_dot_product_attention(x.q.double()[None], x.k.double(), x.v.double())[0]
    if sink is not None:
        exact = exact * torch.sigmoid(x.logits().double().mul(math.log(2)).logsumexp(-1) - sink)[..., None]
    error = result.output.double().unflatten(0, (8, 400)) - exact[:, None]
    variance = result.std_error(many).double().square().mean()
    assert 0.75 < error.square().mean() / variance < 1.25
    assert error.mean(1).square().mean() < variance / 25
