"""Cache policies: one protocol, exact where all keys are read, and honest about what was read."""

import pytest
import torch
import torch.nn.functional as F

from qtx_lab.cache.policies import POLICIES, Reads, make_policy
from qtx_lab.errors import ArgumentError, DtypeError, ShapeError

EVERY = sorted(POLICIES)
"""Every policy by name."""

EXACT_WITH_ALL_KEYS = [name for name in EVERY if name != "santa"]
"""Those that read every key where the budget is all of them; systematic draws of S²ANTA hit some twice."""

CUTS = [name for name in EVERY if name != "exact"]
"""Those that read fewer keys than all."""


def tokens(generator, *, batch=2, heads=6, key_heads=3, n=150, width=16, value_width=12):
    """Queries, keys and values of a prompt, (batch, heads, n, width)."""
    shapes = ((heads, width), (key_heads, width), (key_heads, value_width))
    return tuple(torch.randn(batch, count, n, size, generator=generator) for count, size in shapes)


def exact(q, k, v, scale=None):
    """Exact attention of queries to all keys."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=scale)


def decode(policy, prompt, new, scale=None):
    """The outputs of a policy's cache for some new tokens after a prompt, and the cache."""
    cache = policy.start(0, *prompt, scale=scale)
    outputs = []
    for i in range(new[0].shape[-2]):
        q, k, v = (x[:, :, i : i + 1] for x in new)
        cache.append(k, v)
        outputs.append(cache.attend(q))
    return torch.cat(outputs, 2), cache


@pytest.mark.parametrize("name", EXACT_WITH_ALL_KEYS)
def test_a_budget_of_all_keys_is_exact_attention(name, generator):
    prompt, new = tokens(generator), tokens(generator, n=3)
    before = [x.clone() for x in prompt]
    output, cache = decode(make_policy(name, budget=1.0), prompt, new, scale=0.3)
    for i in range(3):
        k, v = (torch.cat((x, y[:, :, : i + 1]), 2) for x, y in zip(prompt[1:], new[1:], strict=True))
        torch.testing.assert_close(
            output[:, :, i : i + 1], exact(new[0][:, :, i : i + 1], k, v, 0.3), atol=2e-5, rtol=2e-5
        )
    assert cache.length == 153
    assert cache.reads.tokens == 3
    assert cache.reads.keys == pytest.approx(1)
    assert cache.reads.values == pytest.approx(1)
    assert cache.reads.bytes >= 1 - 1e-9
    for x, y in zip(prompt, before, strict=True):  # other policies share them
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", CUTS)
def test_reads_are_within_the_budget_and_sequences_do_not_meet(name, generator):
    prompt, new = tokens(generator, n=400), tokens(generator, n=2)
    policy = make_policy(name, budget=40)
    output, cache = decode(policy, prompt, new)
    # Two query heads a key head, which may read different keys.
    assert 0 < cache.reads.values <= 80 / 401
    assert cache.reads.bytes > 0
    alone, _ = decode(policy, [x[:1] for x in prompt], [x[:1] for x in new])
    torch.testing.assert_close(output[:1], alone)
    again, _ = decode(policy, prompt, new)
    assert torch.equal(output, again)


@pytest.mark.parametrize("name", EXACT_WITH_ALL_KEYS)
def test_half_precision(name, generator):
    prompt, new = tokens(generator, n=200), tokens(generator, n=1)
    halves = [[x.bfloat16() for x in part] for part in (prompt, new)]
    output, _ = decode(make_policy(name, budget=1.0), *halves)
    assert output.dtype == torch.bfloat16
    k, v = (torch.cat(pair, 2).float() for pair in list(zip(*halves, strict=True))[1:])
    torch.testing.assert_close(output.float(), exact(halves[1][0].float(), k, v), atol=2e-2, rtol=2e-2)


def test_exact_reads_everything(generator):
    output, cache = decode(make_policy("exact"), tokens(generator), tokens(generator, n=2))
    assert cache.reads == Reads(1.0, 1.0, 1.0, 2)
    assert output.isfinite().all()


def test_sinks_and_window_are_the_tokens_attended_to(generator):
    prompt, new = tokens(generator), tokens(generator, n=1)
    output, cache = decode(make_policy("sink-window", budget=20, sinks=4), prompt, new)
    k, v = (torch.cat((x[:, :, :4], x[:, :, -15:], y), 2) for x, y in zip(prompt[1:], new[1:], strict=True))
    torch.testing.assert_close(output, exact(new[0], k, v))
    assert cache.reads == Reads(20 / 151, 20 / 151, pytest.approx(20 / 151), 1)
    only_newest, _ = decode(make_policy("sink-window", budget=1), prompt, new)
    torch.testing.assert_close(only_newest, new[2].repeat_interleave(2, 1))


@pytest.mark.parametrize("proposal", ["low-rank", "int4", "exact"])
def test_sampled_reads_its_sketch_and_its_draws(proposal, generator):
    prompt, new = tokens(generator, n=600), tokens(generator, n=1)
    _, cache = decode(make_policy("sampled", budget=30, proposal=proposal), prompt, new)
    reads = cache.reads
    assert 30 / 601 <= reads.values <= 60 / 601
    assert reads.keys == (1.0 if proposal == "exact" else reads.values)
    both = (reads.keys * 16 + reads.values * 12) / 28
    # Per key of 28 numbers in half precision: 16 components of a byte, of 4 bits, or nothing; besides the
    # keys with exact scores.
    sketch = {"low-rank": 16, "int4": 8, "exact": 0}[proposal] / 56
    assert both + sketch <= reads.bytes <= both + sketch + (0.02 if sketch else 1e-9)


def test_adaptive_and_shared_draws_read_less(generator):
    # A quarter of the heads' queries look at one key.
    prompt, new = tokens(generator, n=600), tokens(generator, n=1)
    new[0][:, ::2] = 40 * prompt[1][:, :, 7:8]
    read = {}
    for settings in ({}, {"adaptive": True}, {"shared": True}):
        policy = make_policy("sampled", budget=80, proposal="int4", **settings)
        read[policy.label] = decode(policy, prompt, new)[1].reads.keys
    assert read["sampled, int4, shared"] <= 80 / 601 < read["sampled, int4, adaptive"] < read["sampled, int4"]


def test_sampled_errors_fall_with_the_budget_and_layers_draw_differently(generator):
    prompt, new = tokens(generator, n=600), tokens(generator, n=1)
    k, v = (torch.cat(pair, 2) for pair in list(zip(prompt, new, strict=True))[1:])
    expected = exact(new[0], k, v)
    errors = []
    for budget in (0.05, 0.2, 0.6):
        output, _ = decode(make_policy("sampled", budget=budget, rank=8), prompt, new)
        errors.append(float((output - expected).norm() / expected.norm()))
    assert errors[2] < errors[1] < errors[0]
    outputs = [make_policy("sampled").start(layer, *prompt).attend(prompt[0][:, :, -1:]) for layer in (0, 1)]
    assert not torch.equal(*outputs)


def test_reads_of_several_layers():
    assert Reads.mean([Reads(0.1, 0.2, 0.3, 1), Reads(0.5, 0.6, 0.7, 3)]) == Reads(
        pytest.approx(0.4), pytest.approx(0.5), pytest.approx(0.6), 4
    )
    with pytest.raises(ArgumentError, match="reads"):
        Reads.mean([])


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("exakt", {}, "exakt"),
        ("sink-window", {"budgets": 3}, "budgets"),
        ("sink-window", {"budget": 0}, "budget=0 "),
        ("sink-window", {"budget": 1.5}, "budget=1.5"),
        ("sink-window", {"budget": float("nan")}, "budget=nan"),
        ("sink-window", {"budget": True}, "budget=True"),
        ("sink-window", {"sinks": -1}, "sinks=-1"),
        ("sink-window", {"seed": 0.5}, "seed=0.5"),
        ("exact", {"budget": 0.5}, "budget=0.5"),
        ("sampled", {"proposal": "int3"}, "int3"),
        ("sampled", {"rank": 0}, "rank=0"),
        ("sampled", {"fitted_queries": 0}, "fitted_queries=0"),
        ("sampler", {"sampler": "oracle-top-k"}, "oracle-top-k"),
        ("sampler", {"sampler": "sistematic"}, "systematic"),
        ("sampled", {"recent": 2}, "recent=2"),
        ("sampled", {"adaptive": True, "recent": 0.1}, "adaptive=True"),
        ("quest", {"page": 0}, "page=0"),
        ("quest", {"shared": True}, "shared=True"),
        ("santa", {"rule": "flash"}, "flash"),
        ("pqcache", {"bits": 13}, "bits=13"),
        ("pqcache", {"recent": 1.5}, "recent=1.5"),
        ("pqcache", {"sinks": -1}, "sinks=-1"),
        ("magicpig", {"bits": 16}, "bits=16"),
        ("magicpig", {"tables": 0}, "tables=0"),
        ("vattention", {"epsilon": 0}, "epsilon=0"),
        ("vattention", {"delta": 0.5}, "delta=0.5"),
        ("vattention", {"heavy": 0.95}, "heavy=0.95"),
        ("vattention", {"heavy_by": "lsh"}, "lsh"),
        ("h2o", {"recent": -0.1}, "recent=-0.1"),
        ("snapkv", {"pool": 4}, "pool=4"),
        ("snapkv", {"window": 0}, "window=0"),
        ("santa", {"tile": 0}, "tile=0"),
    ],
)
def test_settings_that_are_not_allowed(name, settings, named):
    with pytest.raises(ArgumentError, match=named):
        make_policy(name, **settings)


def test_tensors_that_do_not_fit(generator):
    q, k, v = tokens(generator)
    with pytest.raises(ArgumentError, match="parts=5"):
        make_policy("pqcache", parts=5).start(0, q, k, v)
    policy = make_policy("sink-window")
    for prompt in (
        (q[:1], k, v),
        (q, k, v[:, :, 1:]),
        (q[:, :4], k, v),
        (q[..., 1:], k, v),
        (q[0], k[0], v[0]),
    ):
        with pytest.raises(ShapeError, match="queries"):
            policy.start(0, *prompt)
    with pytest.raises(DtypeError, match="values"):
        policy.start(0, q, k, v.double())
    with pytest.raises(ArgumentError, match="layer"):
        policy.start(-1, q, k, v)
    cache = policy.start(0, q, k, v)
    with pytest.raises(ArgumentError, match="reads"):
        _ = cache.reads
    with pytest.raises(ShapeError, match="k has shape"):
        cache.append(k, v)
    with pytest.raises(DtypeError, match="v is torch"):
        cache.append(k[:, :, :1], v[:, :, :1].double())
    with pytest.raises(ShapeError, match="q has shape"):
        cache.attend(k[:, :, :1])
    assert cache.length == 150
