"""Decoding from a sketch: the kernel draws the reference's keys, weighs them alike, and tells its error."""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from qtx_lab import ArgumentError, DtypeError
from qtx_lab.kernels.inputs import Inputs
from qtx_lab.kernels.masses import Masses, mass_dtype
from qtx_lab.kernels.sketch_decode import reference
from qtx_lab.kernels.sketch_decode.launch import sketch_decode
from qtx_lab.kernels.sketch_decode.reference import GrowingSketch, int4_sketch, low_rank_sketch

SOAK = os.environ.get("QTX_LAB_SOAK", "0") not in ("", "0")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def attention_inputs(case, dtype, generator, device):
    """Inputs of (B, Hkv, G, L, n, E, Ev), keys near a few directions."""
    batch, heads, group, length, n, e, ev = case
    shapes = ((batch, heads * group, length, e), (batch, heads, n, e), (batch, heads, n, ev))
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return Inputs.of(q, k * torch.linspace(2, 0.1, e, device=device, dtype=dtype), v)


def sketched(k, kind):
    if kind == "int4":
        return int4_sketch(k)
    return low_rank_sketch(k, min(13, k.shape[-1]), dtype=kind)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


CASES = [
    ((2, 1, 4, 1, 300, 64, 64), torch.bfloat16, torch.float16, 64, 1),
    ((1, 2, 2, 2, 131, 33, 40), torch.float16, "int4", 33, 3),
    ((1, 1, 3, 1, 65, 100, 256), torch.float32, torch.int8, 150, 1),
    ((1, 1, 1, 1, 1, 32, 32), torch.bfloat16, "int4", 7, 1),
    ((1, 1, 2, 1, 1100, 16, 16), torch.float32, torch.int8, 200, 2),
]
if SOAK:
    CASES += [
        ((1, 2, group, length, n, e, e), dtype, kind, draws, 2)
        for group, length in ((1, 1), (8, 1), (3, 7))
        for n in (2, 64, 1000, 5000)
        for e in (32, 128, 256)
        for dtype in TOLERANCE
        for kind, draws in ((torch.float16, 64), ("int4", 200), (torch.int8, 64))
    ]


@pytest.mark.parametrize(("case", "dtype", "kind", "draws", "replicates"), CASES)
def test_draws_outputs_and_errors_are_the_references(
    case, dtype, kind, draws, replicates, generator, device, rows_alike
):
    x = attention_inputs(case, dtype, generator, device)
    sketch, seed = sketched(x.k, kind), torch.tensor(2**61 + 3, device=device)
    found, wanted = (d(x, sketch, draws, replicates, seed) for d in (sketch_decode, reference.sketch_decode))
    same = rows_alike(found.indices, wanted.indices)
    assert relative(found.output[same], wanted.output[same]) <= TOLERANCE[dtype]
    assert relative(found.weights()[same], wanted.weights()[same]) <= (1e-5 if device.type == "cpu" else 1e-3)
    apart = (found.std_error - wanted.std_error).abs()[same]
    assert bool((apart <= 1e-3 * wanted.std_error[same] + 1e-5).all())
    torch.testing.assert_close(found.weights().sum(-1), torch.ones_like(found.weights()[..., 0]))
    values = x.v.flatten(0, 1).float()
    heads, rows, _, width = x.shape
    drawn = values.gather(1, found.indices.flatten(1)[..., None].expand(-1, -1, width)).view(
        heads, rows, -1, width
    )
    average = torch.einsum("nmt,nmtd->nmd", found.weights(), drawn)
    assert relative(found.output, average) <= TOLERANCE[dtype] + 1e-5


def test_exact_where_every_key_is_drawn(generator, device):
    """As many draws as keys: each has pi = 1, and no error is told."""
    x = attention_inputs((1, 1, 2, 1, 40, 16, 16), torch.float32, generator, device)
    found = sketch_decode(x, int4_sketch(x.k), 40, 1, torch.tensor(3, device=device))
    assert torch.equal(found.indices, torch.arange(40, device=device).expand(1, 2, -1))
    exact = F.scaled_dot_product_attention(x.q[None], x.k, x.v)[0]
    assert relative(found.output, exact) < 1e-5
    assert float(found.std_error.max()) < 1e-4


def test_no_key_is_drawn_twice_and_the_heaviest_surely(generator, device):
    """On rows that a few keys hold most of, nearly all draws find a key of their own."""
    x = attention_inputs((2, 2, 2, 1, 700, 32, 16), torch.float32, generator, device)
    x = replace(x, scale=4 * x.scale)
    sketch, seeds = int4_sketch(x.k), torch.arange(4, device=device)
    heaviest = sketch.scores(x).topk(4).indices
    for seed in seeds:
        found = sketch_decode(x, sketch, 64, 1, seed)
        drawn = found.indices.masked_fill(found.log_weights == -torch.inf, -1)
        times = torch.zeros(4, 2, 701, device=device).scatter_add_(
            -1, drawn + 1, torch.ones_like(drawn, dtype=torch.float32)
        )
        assert times[..., 1:].max() == 1
        assert times[..., 0].max() <= 4
        assert bool((times.gather(-1, heaviest + 1) == 1).all())


@pytest.mark.parametrize("n", [900, 20_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0, 40.0, "sinks", "needles"])
def test_the_draws_are_spent_and_every_key_may_be_drawn(spread, n, generator):
    """A sum of pi above S would leave the last keys without their share of draws, and the heaviest without certainty."""
    logits = torch.randn(3, 2, n, generator=generator)
    if spread == "sinks":  # in one page
        logits[..., :4] += 22
    elif spread == "needles":
        logits[..., torch.randperm(n, generator=generator)[:9]] += 20
    else:
        logits = logits * spread
    there = (torch.arange(-(-n // 64) * 64) < n).view(-1, 64)
    for draws in (7, 64, n // 3):
        masses = Masses.of(logits, torch.tensor(7), mass_dtype(draws))
        proposal = reference.Proposal.of(masses, 0.02)
        assert bool((proposal.up <= proposal.coarsest).all())
        raised = masses.mass + proposal.besides[..., None] << proposal.up[..., None]
        mass = torch.where(there, raised, 0).flatten(2)
        assert float((mass / mass.sum(-1, keepdim=True))[:, :, :n].min()) > 0.02 / 3 / n
        sure = proposal.sure_mass(masses, there, draws)
        spent = torch.minimum(mass, sure).sum(-1)
        assert bool((spent <= 1.02 * draws * sure[..., 0]).all())
        finest = (
            sure == 1 << proposal.coarsest
        )  # where one key holds nearly all, the others need no more draws
        assert bool((finest[..., 0] | (spent > 0.7 * draws * sure[..., 0])).all()), (
            spent / draws / sure[..., 0]
        )


def test_four_bits_a_component_guess_better_than_few_components(generator):
    """Keys of a falling spectrum in a basis of their own: the small directions are not drowned by the large ones' rounding."""
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    k = torch.randn(1, 1, 3000, 64, generator=generator) * (1 + torch.arange(64.0)) ** -1 @ basis + 5
    x = Inputs.of(torch.randn(1, 4, 1, 64, generator=generator), k, k)

    def missed(sketch):
        off = sketch.scores(x) - x.logits()
        return float((off - off.mean(-1, keepdim=True)).std() / x.logits().std(-1).mean())

    assert missed(int4_sketch(k)) < 0.25
    assert missed(low_rank_sketch(k, 64)) < 0.02
    assert missed(int4_sketch(k, 32)) < missed(low_rank_sketch(k, 8, dtype=torch.float16))


@pytest.mark.statistical
@pytest.mark.parametrize("kind", [torch.float16, "int4"])
def test_the_error_is_what_is_told_and_the_bias_small(kind, seed):
    """Over 3,000 seeds: the mean squared error within 25 % of the mean variance told; the bias below a fifth of it."""
    g = torch.Generator().manual_seed(seed)
    x = attention_inputs((1, 1, 1, 1, 400, 32, 8), torch.float32, g, torch.device("cpu"))
    repetitions = 3000
    many = Inputs(
        x.q.expand(repetitions, -1, -1).contiguous(),
        x.k.expand(-1, repetitions, -1, -1),
        x.v.expand(-1, repetitions, -1, -1),
        None,
        1,
        x.scale,
    )
    one = sketched(x.k, kind)
    table, weight = (y.expand(repetitions, -1, -1) for y in (one.table, one.weight))
    sketch = replace(one, table=table, weight=weight)
    found = reference.sketch_decode(many, sketch, 64, 1, torch.tensor(seed))
    exact = F.scaled_dot_product_attention(x.q.double()[None], x.k.double(), x.v.double())[0]
    error = found.output.double() - exact
    told = found.std_error.double().square().mean()
    assert 0.75 < error.square().mean() / told < 1.25
    assert error.mean(0).square().mean() < told / 25


def test_a_growing_sketch_is_that_of_all_keys(generator, device):
    k = torch.randn(2, 700, 16, generator=generator).to(device)
    made = []

    def make(keys):
        made.append(keys.shape[1])
        return low_rank_sketch(keys, 4)

    growing = GrowingSketch(make)
    for n in (100, 101, 130, 600):
        sketch = growing.of(k[:, :n], ())
        wanted = growing.held.lines(k[:, :n])
        assert torch.equal(sketch.table, wanted)
    assert made == [100]
    growing.of(k[:, :601], (500,))  # keys were moved
    growing.of(k[:, :50], (500,))  # a cache that was cut
    assert made == [100, 601, 50]


def test_what_cannot_be_a_sketch_is_refused():
    k = torch.zeros(2, 5, 8)
    with pytest.raises(ArgumentError, match="rank=9 is not allowed: it must be at most E=8"):
        low_rank_sketch(k, 9)
    with pytest.raises(DtypeError, match=r"dtype=torch.float32 is not allowed"):
        low_rank_sketch(k, 2, dtype=torch.float32)
