"""Intervals cover what they promise, on attention that a model has learned."""

import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qtx_lab as qtx
from qtx_lab.bench.coverage import row_classes
from qtx_lab.samplers import SAMPLERS

pytestmark = pytest.mark.statistical

RANDOM = sorted(set(SAMPLERS) - {"exact"})
JOINT = ["halton", "lattice", "sobol"]  # the rows of a head share their randomness
SINGLE = sorted(set(RANDOM) - set(JOINT) - {"learned"})
CAUSAL = {"is_causal": True, "enable_gqa": True}
ALL = (0, 1, 2, 3, 4, 5, 6, 7)
"""All heads of the reference model."""


@functools.cache
def learned_attention(heads=(0, 3, 4, 7)):
    """(q, k, v, exact output) of all layers of the reference model over 512 held-out bytes.

    Of the four heads that share keys, the first and the last, or heads that are named.
    """
    tokens = qtx.encode(qtx.reference_text())[None, 20_000:20_512]
    q, k, v = (torch.cat(x) for x in zip(*qtx.load_reference_model().attention_inputs(tokens), strict=True))
    q = q[:, heads]
    return q, k, v, F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **CAUSAL)


def coverage(name, num_samples, replicates, seed, level=0.95, first=0, heads=(0, 3, 4, 7)):
    """Share of coordinates inside their interval, (layers,), of the rows from `first` on."""
    q, k, v, exact = learned_attention(heads)
    g = torch.Generator().manual_seed(seed)
    est = qtx.sampled_attention(
        q, k, v, sampler=name, num_samples=num_samples, replicates=replicates, generator=g, **CAUSAL
    )
    low, high = est.confidence_interval(level)
    slack = 1e-5 * exact.abs().max()  # the float32 of the output itself
    inside = (low - slack <= exact) & (exact <= high + slack)
    return inside[:, :, first:].double().mean((1, 2, 3))


@pytest.mark.parametrize(
    ("name", "replicates", "num_samples"),
    [
        *(("monte-carlo", r, s) for r, s in ((1, 8), (1, 64), (2, 16))),
        *((name, 8, s) for name in SINGLE for s in (16, 64)),
    ],
)
def test_intervals_cover_every_layer(name, replicates, num_samples, seed):
    """4 heads × 512 rows × 32 coordinates = 65,536 of each layer."""
    share = coverage(name, num_samples, replicates, seed)
    assert bool(((share >= 0.93) & (share <= 0.97)).all()), share


@pytest.mark.parametrize(("num_samples", "replicates"), [(16, 1), (64, 1), (16, 8)])
def test_intervals_of_learned_proposals_err_on_the_safe_side(num_samples, replicates, seed):
    """Weights normalised by their sum, points systematic: the variance of independent ones is a bound.

    The first 64 rows see too few keys for a map and draw from exact logits: they are covered more often.
    """
    assert bool((coverage("learned", num_samples, replicates, seed, heads=ALL) >= 0.93).all())
    share = coverage("learned", num_samples, replicates, seed, first=64, heads=ALL)
    assert bool(((share >= 0.93) & (share <= 0.99)).all()), share


@pytest.mark.parametrize("name", ["stratified", "systematic"])
def test_intervals_of_two_replicates_err_on_the_safe_side(name, seed):
    share = coverage(name, 16, 2, seed)
    assert bool(((share >= 0.95) & (share <= 0.99)).all()), share


@pytest.mark.parametrize("name", JOINT)
def test_intervals_of_joint_points_cover_on_average(name, seed):
    """The rows of a head stand or fall together: it takes many randomisations to see the coverage."""
    share = torch.stack([coverage(name, 16, 8, seed + i) for i in range(4)]).mean()
    assert 0.94 <= share <= 0.99


def test_intervals_allow_for_rounding():
    """Equal values, or values far from 0: what is left of the error is the float32 of the sum."""
    q, k = (torch.randn(4, 60, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    noise = torch.randn(4, 60, 8, generator=torch.Generator().manual_seed(2))
    for v in (torch.full((4, 60, 8), 0.3), noise + 1e6, (noise + 10).bfloat16()):
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        for name in RANDOM:
            est = qtx.sampled_attention(
                q.to(v.dtype), k.to(v.dtype), v, sampler=name, num_samples=32, replicates=8
            )
            reference = exact
            if v.dtype != torch.float32:
                reference = F.scaled_dot_product_attention(
                    q.to(v.dtype).double(), k.to(v.dtype).double(), v.double()
                )
            low, high = est.confidence_interval()
            assert ((low <= reference) & (reference <= high)).double().mean() > 0.9, (name, v.dtype)


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_masked_for_all_does_not_reach_the_error_bars(name):
    """Padding may hold anything finite: standard errors are those of the visible keys."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 64, 8, generator=g) for _ in range(3))
    mask = torch.arange(64) < 40
    junk = v.clone()
    junk[:, 40:] = 1e6
    errors = [
        qtx.sampled_attention(
            q, k, x, sampler=name, num_samples=16, replicates=4, attn_mask=mask,
            generator=torch.Generator().manual_seed(1),
        ).std_error.square().mean().sqrt()
        for x in (v, junk)
    ]  # fmt: skip
    assert 0.8 < errors[1] / errors[0] < 1.25


def test_intervals_of_peaked_rows_cover(seed):
    """Rows where most draws hit one key: the sample variance is often 0, and such an interval covers nothing.

    With 64 draws of which 0.2 are expected to miss the top key, the last case is as far as this goes. All
    rows are of one head here, so the samplers whose rows share their randomness are left to the test above.
    """
    g = torch.Generator().manual_seed(seed)
    top = torch.tensor([0.9, 0.99, 0.997]).repeat_interleave(4000)
    k, v = torch.eye(64), torch.randn(64, 16, generator=g)
    q = torch.zeros(len(top), 64)
    q[torch.arange(len(top)), torch.randint(64, (len(top),), generator=g)] = (63 * top / (1 - top)).log()
    exact = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    for name, replicates in (("monte-carlo", 1), *((name, 8) for name in SINGLE)):
        est = qtx.sampled_attention(
            q, k, v, sampler=name, num_samples=64, replicates=replicates, scale=1.0, generator=g
        )
        low, high = est.confidence_interval()
        share = ((low <= exact) & (exact <= high)).double().view(3, 4000, 16).mean((1, 2))
        assert bool((share >= torch.tensor([0.93, 0.93, 0.9])).all()), (name, share)


@pytest.mark.parametrize("replicates", [2, 4, 8])
@pytest.mark.parametrize("name", sorted(set(SINGLE) | {"lattice"}))
def test_intervals_of_values_that_few_keys_hold_cover(name, replicates, seed):
    """A feature is 10 at one key of 256 and 0 elsewhere: most features have never been drawn.

    200 rows × 16 coordinates; rows share their values, which leaves the coverage an error of about .01.
    """
    g = torch.Generator().manual_seed(seed)
    v = torch.zeros(1, 256, 16)
    v[0, torch.randperm(256, generator=g)[:16], torch.arange(16)] = 10.0
    q, k = torch.randn(1, 200, 256, generator=g), torch.eye(256)[None]
    est = qtx.sampled_attention(
        q, k, v, sampler=name, num_samples=32, replicates=replicates, scale=1.0, generator=g
    )
    low, high = est.confidence_interval()
    exact = q.softmax(-1) @ v
    assert ((low <= exact) & (exact <= high)).double().mean() >= 0.9
    assert (high - low).min() > 1e-4  # no row is exact


class Blind:
    """A sampler of the user's own that does not say how probable the keys are which it drew."""

    name, unbiased = "blind", True

    def __init__(self, sampler):
        self.sampler, self.independent = sampler, sampler.independent

    def draw(self, logits, num_samples, **options):
        return dataclasses.replace(self.sampler.draw(logits, num_samples, **options), probabilities=None)


@pytest.mark.parametrize(("name", "replicates"), [("monte-carlo", 1), ("monte-carlo", 4), ("stratified", 4)])
@pytest.mark.parametrize("kind", ["one-hot", "peaked", "diffuse"])
def test_intervals_of_draws_of_unknown_probability_cover(name, replicates, kind):
    """What was never drawn counts at the share of keys that were drawn once; no interval has width 0."""
    rows = next(rows for rows in row_classes(40) if rows.name == kind)
    q, k, v = (x.expand(8, 1, *x.shape) for x in (rows.q, rows.k, rows.v))
    est = qtx.sampled_attention(
        q, k, v, sampler=Blind(SAMPLERS[name]()), num_samples=32, replicates=replicates,
        generator=torch.Generator().manual_seed(0), **rows.options,
    )  # fmt: skip
    low, high = est.confidence_interval()
    exact = rows.exact()
    assert ((low <= exact) & (exact <= high)).double().mean() >= 0.92
    assert (high - low).min() > 1e-4


@pytest.mark.parametrize("name", RANDOM)
def test_error_falls_as_it_should(name, seed):
    """Log-log slope of the error of learned attention: -0.5 for independent draws, no worse for others."""
    q, k, v, exact = learned_attention()
    g = torch.Generator().manual_seed(seed)
    counts, errors = [8, 16, 32, 64, 128, 256], []
    for s in counts:
        o = qtx.sampled_attention(q, k, v, sampler=name, num_samples=s, generator=g, **CAUSAL).output
        errors.append(((o - exact).norm() / exact.norm()).item())
    x, y = (torch.tensor(a, dtype=torch.float64).log() for a in (counts, errors))
    slope = ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()
    assert slope <= -0.45
    assert name != "monte-carlo" or abs(slope + 0.5) <= 0.05


@pytest.mark.parametrize("name", sorted(set(RANDOM) - {"monte-carlo"}))
@pytest.mark.parametrize("num_samples", [8, 64])
def test_no_worse_than_independent_draws(name, num_samples, seed):
    q, k, v, exact = learned_attention()
    g = torch.Generator().manual_seed(seed)

    def error(sampler):
        o = qtx.sampled_attention(
            q, k, v, sampler=sampler, num_samples=num_samples, generator=g, **CAUSAL
        ).output
        return (o - exact).norm().item()

    assert error(name) < error("monte-carlo") * (
        1.1 if name == "learned" else 1
    )  # a proposal may cost a little


@pytest.mark.parametrize("name", RANDOM)
def test_standard_errors_have_the_right_size(name, seed):
    """Root mean square of error / std_error is near 1: neither boastful nor timid."""
    q, k, v, exact = learned_attention()
    g = torch.Generator().manual_seed(seed)
    est = qtx.sampled_attention(q, k, v, sampler=name, num_samples=64, replicates=16, generator=g, **CAUSAL)
    ratio = (est.output - exact).square().sum() / est.std_error.double().square().sum()
    assert 0.85 < math.sqrt(ratio) < 1.1


LAZY = [
    ("monte-carlo", 1),
    ("monte-carlo", 2),
    ("stratified", 2),
    ("systematic", 2),
    ("head-tail", 2),
    ("learned", 2),
]


class Clones(TorchDispatchMode):
    """Counts clones of tensors with as many numbers as `like`."""

    def __init__(self, like):
        super().__init__()
        self.numbers, self.count = like.numel(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.clone.default and args[0].numel() == self.numbers
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "replicates"), LAZY)
def test_bars_that_nobody_reads_copy_no_keys(name, replicates):
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(*shape, generator=g) for shape in ((2, 1, 8), (2, 97, 8), (2, 97, 6)))
    with torch.no_grad(), Clones(k) as clones:
        k.clone()
        est = qtx.sampled_attention(q, k, v, sampler=name, num_samples=8, replicates=replicates, generator=g)
    assert clones.count == 1  # the one above
    assert bool(est.std_error.isfinite().all())


@pytest.mark.parametrize("changed", ["q", "k", "v", "attn_mask"])
@pytest.mark.parametrize(("name", "replicates"), LAZY)
def test_bars_after_a_change_in_place_are_right_or_one_clear_error(name, replicates, changed):
    def inputs():
        g = torch.Generator().manual_seed(4)
        q, k, v, bias = (
            torch.randn(*shape, generator=g) for shape in ((2, 3, 8), (2, 40, 8), (2, 40, 8), (3, 40))
        )
        return {"q": q, "k": k, "v": v, "attn_mask": bias}

    def call(x):
        return qtx.sampled_attention(
            **x,
            sampler=name,
            num_samples=8,
            replicates=replicates,
            generator=torch.Generator().manual_seed(5),
        )

    expected, x = call(inputs()).std_error, inputs()
    unread, read = call(x), call(x)
    assert torch.equal(read.std_error, expected)
    x[changed][..., :1] += 1  # through a view, as caches are written
    assert torch.equal(read.std_error, expected)
    with pytest.raises(qtx.ArgumentError, match=f"{changed} has been changed in place"):
        _ = unread.std_error


def test_bars_of_inference_tensors_are_those_of_the_call():
    """torch does not count the changes of inference tensors, so they are copied."""
    with torch.inference_mode():
        g = torch.Generator().manual_seed(6)
        q, k, v = (torch.randn(2, 20, 8, generator=g) for _ in range(3))
        first, second = (
            qtx.sampled_attention(q, k, v, num_samples=8, replicates=2, generator=g.manual_seed(7))
            for _ in range(2)
        )
        expected = first.std_error
        k.zero_()
        assert torch.equal(second.std_error, expected)
