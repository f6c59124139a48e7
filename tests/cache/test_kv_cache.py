"""`SampledKVCache`: near the exact output for every sketch, however it was filled, and again from disk."""

import contextlib
import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import qtx_lab as qtx
from qtx_lab.cache import exact_pass
from qtx_lab.cache.sketches import PROPOSALS
from qtx_lab.cache.store import FIRST_KEY


def tokens(generator, *, heads=2, n=700, features=16, width=12):
    """Keys (heads, n, features) and values (heads, n, width)."""
    return (
        torch.randn(heads, n, features, generator=generator),
        torch.randn(heads, n, width, generator=generator),
    )


def exact(q, k, v, scale=None):
    """Exact attention of q (H, L, E) to k and v, heads grouped."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True, scale=scale)[0]


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_exact_where_every_key_is_drawn(proposal, generator):
    k, v = tokens(generator, n=37)
    q = torch.randn(4, 3, 16, generator=generator)
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal)
    est = cache.attend(q, num_samples=20_000, scale=0.2, generator=generator)
    torch.testing.assert_close(est.output, exact(q, k, v, 0.2), atol=1e-5, rtol=1e-5)
    weights = est.attention_weights()
    k = k.repeat_interleave(2, 0)
    torch.testing.assert_close(weights, (0.2 * q @ k.mT).softmax(-1), atol=1e-5, rtol=1e-4)
    assert float(est.std_error.max()) < 1e-4


def beside_sinks(q, k, v, sinks, softcap=None):
    """Exact attention and log-sum-exps of q (H, L, E) with capped logits and a sink for each head."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = torch.cat((logits, sinks[:, None, None].expand(*logits.shape[:-1], 1)), -1)
    return logits.softmax(-1)[..., :-1] @ v, logits.logsumexp(-1)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_sinks_and_softcap_where_every_key_is_drawn(proposal, softcap, generator):
    k, v = tokens(generator, n=37)
    q = torch.randn(4, 3, 16, generator=generator)
    sinks = torch.tensor([0.0, 3.0, -torch.inf, 5.0])
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal)
    for replicates in (1, 2):
        est = cache.attend(
            q, 10_000, replicates=replicates, sinks=sinks, softcap=softcap, generator=generator
        )
        output, log_sum_exp = beside_sinks(q, k, v, sinks, softcap)
        torch.testing.assert_close(est.output, output, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(est.log_sum_exp, log_sum_exp, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            est.attention_weights() @ v.repeat_interleave(2, 0), output, atol=1e-5, rtol=1e-4
        )
        assert est.info.log_sum_exp == "estimated"


@pytest.mark.statistical
@pytest.mark.parametrize("softcap", [None, 1.0])
@pytest.mark.parametrize("proposal", ["exact", "low-rank", "int4"])
def test_intervals_cover_the_exact_output_beside_sinks(proposal, softcap, generator):
    """2,000 rows of 12 coordinates: 95 % intervals cover at least 94 %."""
    k, v = tokens(generator, n=1000)
    q, sinks = torch.randn(4, 500, 16, generator=generator), torch.tensor([3.0, 7.0, 8.0, 10.0])
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal, queries=q)
    est = cache.attend(q, num_samples=64, sinks=sinks, softcap=softcap, generator=generator)
    low, high = est.confidence_interval(0.95)
    o, log_sum_exp = beside_sinks(q, k, v, sinks, softcap)
    assert 0.94 < float(((low < o) & (o < high)).float().mean()) < 0.998
    assert float((est.log_sum_exp - log_sum_exp).abs().mean()) < 0.1


def test_a_cache_and_exact_attention_to_newer_keys_are_merged(generator):
    k, v = tokens(generator, n=300)
    q, sinks = torch.randn(4, 5, 16, generator=generator), torch.randn(4, generator=generator)
    cache = qtx.SampledKVCache.build(k[:, :280], v[:, :280])
    parts = [
        cache.attend(q, 256, replicates=8, sinks=sinks, generator=generator),
        qtx.sampled_attention(q, k[:, 280:], v[:, 280:], sampler="exact", enable_gqa=True),
    ]
    total = torch.logaddexp(*(part.log_sum_exp for part in parts))
    merged = sum((part.log_sum_exp - total).exp()[..., None] * part.output for part in parts)
    output, log_sum_exp = beside_sinks(q, k, v, sinks)
    assert float((merged - output).norm() / output.norm()) < 0.03
    assert float((total - log_sum_exp).abs().max()) < 0.02


def test_sinks_and_softcaps_that_are_not_allowed_are_refused(generator):
    k, v = tokens(generator, n=37)
    q = torch.randn(4, 3, 16, generator=generator)
    cache = qtx.SampledKVCache.build(k, v)
    with pytest.raises(qtx.ShapeError, match="sinks has shape"):
        cache.attend(q, sinks=torch.zeros(3))
    with pytest.raises(qtx.ArgumentError, match="sinks holds NaN"):
        cache.attend(q, sinks=torch.full((4,), torch.nan))
    with pytest.raises(qtx.ArgumentError, match="softcap=0 is not allowed"):
        cache.attend(q, softcap=0)


@pytest.mark.statistical
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_intervals_cover_the_exact_output(proposal, generator):
    """2,000 rows of 12 coordinates: 95 % intervals cover at least 94 %, and more for the value order."""
    k, v = tokens(generator, n=1000)
    q = torch.randn(4, 500, 16, generator=generator)
    rank = 12 if proposal == "low-rank" else None
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal, rank=rank, queries=q)
    est = cache.attend(q, num_samples=64, generator=generator)
    low, high = est.confidence_interval(0.95)
    o = exact(q, k, v)
    assert 0.94 < float(((low < o) & (o < high)).float().mean()) < 0.998


def test_errors_in_half_precision_shrink_with_replicates(generator):
    """The standard error is within a factor of 2.5 of the error, and rounding is that of the cast alone."""
    k, v = (x.bfloat16() for x in tokens(generator, n=2000, features=32, width=32))
    q = (2 * torch.randn(2, 1, 32, generator=generator)).bfloat16()
    cache = qtx.SampledKVCache.build(k, v, proposal="exact")
    for replicates in (1, 32):
        est = cache.attend(q, 256, replicates=replicates, generator=generator)
        error = (est.output.float() - exact(q.float(), k.float(), v.float())).square().mean().sqrt()
        assert 0.4 < float(est.std_error.square().mean().sqrt() / error) < 2.5


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_sketches_are_near_the_logits(proposal, generator):
    k, v = tokens(generator, n=500)
    k = k * torch.linspace(4, 0.05, 16) + 3  # a spectrum, and a shift that no softmax sees
    k[:, 7, 3], k[:, 400, 15] = 60.0, -20.0  # outliers
    q = torch.randn(2, 50, 16, generator=generator)
    cache = qtx.SampledKVCache.build(
        k[:, :450], v[:, :450], proposal=proposal, rank=8 if proposal == "low-rank" else None
    )
    cache.append(k[:, 450:], v[:, 450:])
    scores, logits = cache.scores(q), q @ k.mT / 4
    error = (scores - logits) - (scores - logits).mean(-1, keepdim=True)
    relative = error.std() / (logits - logits.mean(-1, keepdim=True)).std()
    assert relative < {"exact": 1e-5, "low-rank": 0.4, "int8": 0.02, "int4": 0.12, "mixed": 0.4}[proposal]


def test_low_rank_sketches_follow_the_queries_seen(generator):
    """A sketch of few components is all but exact for queries of as few directions, once it knows them.

    It knows them by `queries`, or by having seen them before it was fitted again. What is left is the
    rounding of a byte a component, to 1 / 250 of the largest.
    """
    k, v = tokens(generator, n=1100)
    q = torch.randn(2, 40, 4, generator=generator) @ torch.randn(4, 16, generator=generator)

    def error(cache):
        wrong = cache.scores(q) - q @ k.mT / 4
        return float((wrong - wrong.mean(-1, keepdim=True)).std())

    assert error(qtx.SampledKVCache.build(k, v, rank=4)) > 0.1
    assert error(qtx.SampledKVCache.build(k, v, rank=4, queries=q)) < 0.02
    grown = qtx.SampledKVCache.build(k[:, :500], v[:, :500], rank=4)
    grown.attend(q, num_samples=4, generator=generator)
    grown.append(k[:, 500:], v[:, 500:])  # twice as many: the sketch is fitted anew
    assert error(grown) < 0.02


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_appended_tokens_are_attended_to(proposal, generator):
    """One by one, by parts, or all at once: every token counts, in the order in which it came."""
    k, v = tokens(generator, n=1500)
    q = torch.randn(4, 2, 16, generator=generator)
    cache = qtx.SampledKVCache.build(k[:, :1], v[:, :1], proposal=proposal)
    start, parts = 1, [1] * 400 + [300, 7, 92, 700]
    for size in parts:
        cache.append(k[:, start : start + size], v[:, start : start + size])
        start += size
    assert len(cache) == start == 1500
    for actual, expected in zip(cache.tokens(), (k, v), strict=True):
        assert torch.equal(actual, expected)
    est = cache.attend(q, num_samples=100_000, generator=generator)
    torch.testing.assert_close(est.output, exact(q, k, v), atol=2e-5, rtol=1e-4)
    assert est.attention_weights().shape == (4, 2, 1500)
    logits = q @ k.repeat_interleave(2, 0).mT / 4
    wrong = cache.scores(q) - logits
    relative = (wrong - wrong.mean(-1, keepdim=True)).std() / logits.std()
    assert relative < {"exact": 1e-5, "low-rank": 1e-2, "int8": 1e-2, "int4": 0.12, "mixed": 0.35}[proposal]


def test_places_are_exact_keys_then_value_order_then_the_newest(generator):
    """All tokens have a place, and only a sixteenth of them, or 16, stand at unsorted ones."""
    k, v = tokens(generator, heads=2, n=1200, features=3, width=2)
    cache = qtx.SampledKVCache.build(k[:, :1], v[:, :1])
    store = cache._store
    for i in range(1, 1200):
        cache.append(k[:, i : i + 1], v[:, i : i + 1])
        if i % 7 and i > 200:
            continue
        n, end = store.length, store.sorted_length
        assert torch.equal(store.places().sort().values, torch.arange(n).expand(2, n))
        assert n - end < max(16, n / 16, 64 * (n < 64) + 1)
        assert torch.equal(store.places()[0, end:], torch.arange(end, n)) or end == 0
        keys = store.order_keys[:, :end]
        assert bool((keys[:, 1:] >= keys[:, :-1]).all())
        if end:
            expected = store.value_order.keys(store.values()).gather(1, store.places()[:, :end])
            assert torch.equal(torch.where(keys == FIRST_KEY, FIRST_KEY, expected), keys)
            first = cache._sketch.exact_keys.shape[1]
            assert bool((keys[:, :first] == FIRST_KEY).all())
            assert not bool((keys[:, first:] == FIRST_KEY).any())


def test_tokens_never_move(generator):
    """Appending leaves the memory of earlier tokens alone, except where it makes room."""
    k, v = tokens(generator, n=700)
    cache = qtx.SampledKVCache.build(k, v)
    cache.append(k[:, :1], v[:, :1])  # makes room
    address, before = cache._store.table.data_ptr(), cache._store.table[:, :701].clone()
    for i in range(100):
        cache.append(k[:, i : i + 1], v[:, i : i + 1])
    assert cache._store.table.data_ptr() == address
    assert torch.equal(cache._store.table[:, :701], before)


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("length", [1, 40, 690, 699])
def test_cropped_tokens_are_forgotten(proposal, length, generator):
    """What is left has a place each and exact outputs, and the sums of values are theirs; more can follow."""
    k, v = tokens(generator, n=700)
    q = torch.randn(4, 2, 16, generator=generator)
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal)
    cache.crop(length)
    cache.append(k[:, :30], v[:, :30])
    cache.crop(length + 20)
    left = [torch.cat((x[:, :length], x[:, :20]), 1) for x in (k, v)]
    assert len(cache) == length + 20
    for actual, expected in zip(cache.tokens(), left, strict=True):
        assert torch.equal(actual, expected)
    store = cache._store
    assert torch.equal(store.places().sort().values, torch.arange(length + 20).expand(2, -1))
    torch.testing.assert_close(store.value_sums[0, :, 0], left[1].double().sum(1), atol=1e-9, rtol=1e-9)
    est = cache.attend(q, num_samples=100_000, generator=generator)
    torch.testing.assert_close(est.output, exact(q, *left), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [40, 700])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_tokens_that_come_and_go_leave_no_trace(proposal, length, generator):
    """As drafted tokens do: draws, and those of tokens that follow, are as if they had never been there."""
    k, v = tokens(generator, n=length)
    q = torch.randn(4, 1, 16, generator=generator)
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal)
    other = copy.deepcopy(cache)
    for i in range(5):
        cache.append(k[:, i : i + 1], v[:, i : i + 1])
    cache.crop(length)
    for c in (cache, other):
        c.append(k[:, :2], v[:, :2])
    actual, expected = (c.attend(q, 16, generator=torch.Generator().manual_seed(0)) for c in (cache, other))
    assert torch.equal(actual.output, expected.output)
    torch.testing.assert_close(actual.std_error, expected.std_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_newest_tokens_attend_exactly(dtype, generator):
    k, v = (x.unflatten(0, (2, 2)).to(dtype) for x in tokens(generator, heads=4, n=100))
    q = torch.randn(2, 6, 100, 16, generator=generator, dtype=torch.float64).to(dtype)
    cache = qtx.SampledKVCache.build(k[:, :, :90], v[:, :, :90], proposal="mixed", rank=8)
    cache.append(k[:, :, 90:], v[:, :, 90:])
    wide = [x.double() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, is_causal=True, scale=0.3, enable_gqa=True)
    for positions in (1, 2, 10, 100):
        actual = cache.attend_exactly(q[:, :, -positions:], scale=0.3)
        assert actual.dtype == dtype
        limit = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(actual.double(), expected[:, :, -positions:], **limit)
    with pytest.raises(qtx.ShapeError, match="q has 0 positions; there must be 1 to 100"):
        cache.attend_exactly(q[:, :, :0])
    with pytest.raises(qtx.ArgumentError, match="return_log_sum_exp=1 must be True or False"):
        cache.attend_exactly(q, return_log_sum_exp=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1536, 1537, 1600, 2051])
def test_an_exact_pass_cuts_the_keys_where_threads_would_wait_for_each_other(
    n, dtype, generator, monkeypatch
):
    """Three heads on two threads, or on four: all rows see the same keys as in one piece."""
    k, v = (x.to(dtype) for x in tokens(generator, heads=3, n=n, width=16))
    q = torch.randn(9, 9, 16, generator=generator, dtype=torch.float64).to(dtype)
    cache = qtx.SampledKVCache.build(k, v, proposal="exact")
    hidden = torch.ones(9, n, dtype=torch.bool).tril(n - 9)
    wide = [x.double() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*(x[None] for x in wide), hidden, scale=0.3, enable_gqa=True)[0]
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    cut = []
    by_parts = exact_pass._by_parts
    monkeypatch.setattr(exact_pass, "_by_parts", lambda *args: cut.append(args[-1]) or by_parts(*args))
    for threads in (1, 2, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for positions in (1, 5, 9):
            actual = cache.attend_exactly(q[:, -positions:], scale=0.3)
            assert actual.dtype == dtype
            torch.testing.assert_close(actual.double(), expected[:, -positions:], atol=limit, rtol=limit)
    assert cut == [2] * 3 + [4] * 3 * (n >= 5 * exact_pass.FEWEST_KEYS_APART)
    assert exact_pass._parts(cache._store, 3) == 1


def test_an_exact_pass_knows_sinks_and_softcap_and_gives_its_log_sum_exp(generator):
    """As dispatch's own exact sampler has them."""
    k, v = (x.unflatten(0, (2, 2)) for x in tokens(generator, heads=4, n=60))
    q = torch.randn(2, 6, 60, 16, generator=generator)
    cache = qtx.SampledKVCache.build(k, v, proposal="exact")
    options = {"sinks": torch.randn(6, generator=generator), "softcap": 1.5, "scale": 0.7}
    exact = qtx.sampled_attention(q, k, v, sampler="exact", is_causal=True, enable_gqa=True, **options)
    output, log_sum_exp = cache.attend_exactly(q[:, :, -7:], return_log_sum_exp=True, **options)
    torch.testing.assert_close(output, exact.output[:, :, -7:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_sum_exp, exact.log_sum_exp[:, :, -7:], rtol=1e-5, atol=1e-5)
    plain, _ = cache.attend_exactly(q[:, :, -7:], return_log_sum_exp=True)
    torch.testing.assert_close(cache.attend_exactly(q[:, :, -7:]), plain, rtol=1e-5, atol=1e-5)


def test_an_estimate_of_cropped_tokens_has_no_error_bars_any_more(generator):
    """They are made from the values drawn, of which some may be other tokens' by then."""
    k, v = tokens(generator)
    cache = qtx.SampledKVCache.build(k, v)
    q = torch.randn(2, 1, 16, generator=generator)
    early, late = (cache.attend(q, 16, generator=generator) for _ in range(2))
    assert early.std_error.isfinite().all()
    cache.crop(699)
    assert early.std_error.isfinite().all()
    with pytest.raises(qtx.ArgumentError, match="before a crop of the cache"):
        _ = late.std_error


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_sequences_are_selected_as_if_built_anew(proposal, generator):
    """Draws, error bars and all, also after more tokens; the cache that was selected from is not touched."""
    k, v = (x.unflatten(0, (3, 2)) for x in tokens(generator, heads=6))
    q = torch.randn(4, 4, 2, 16, generator=generator)
    index = torch.tensor([2, 0, 0, 1])
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal)
    copied = copy.deepcopy(cache)
    cache.select_sequences(index)
    anew = qtx.SampledKVCache.build(k[index], v[index], proposal=proposal)
    for c in (cache, anew):
        c.append(k[index, :, :5], v[index, :, :5])
    actual, expected = (c.attend(q, 16, generator=torch.Generator().manual_seed(0)) for c in (cache, anew))
    assert torch.equal(actual.output, expected.output)
    assert torch.equal(actual.std_error, expected.std_error)
    assert len(copied) == 700
    assert copied.attend(q[:3], 16, generator=generator).output.shape == (3, 4, 2, 12)


def test_what_cannot_be_cropped_or_selected(generator):
    k, v = tokens(generator)
    cache = qtx.SampledKVCache.build(k, v)
    for length in (0, 701, 2.5):
        with pytest.raises(qtx.ArgumentError, match=f"length={length}"):
            cache.crop(length)
    with pytest.raises(qtx.ShapeError, match="no sequences"):
        cache.select_sequences(torch.tensor([0]))
    cache = qtx.SampledKVCache.build(k[None], v[None])
    for index in (torch.tensor([1]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([]).long(), [0]):
        with pytest.raises(qtx.ArgumentError, match="index="):
            cache.select_sequences(index)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_no_key_counts_twice_and_heavy_ones_are_sure(proposal, generator):
    """Draws with weight are of distinct keys, and nearly all have weight; heavy keys are always drawn."""
    k, v = tokens(generator, n=2000)
    q = 2 * torch.randn(2, 50, 16, generator=generator)
    cache = qtx.SampledKVCache.build(
        k, v, proposal=proposal, rank=16 if proposal in ("low-rank", "mixed") else None
    )
    draws = cache.attend(q, num_samples=64, generator=generator).draws
    assert (draws.weights > 0).float().mean() > 0.95
    apart = torch.where(draws.weights > 0, draws.indices, 2000 + torch.arange(64))
    assert (qtx.Draws(apart, draws.weights).multiplicity() == 1).all()
    p = (q @ k.mT / 4).softmax(-1)
    drawn = qtx.Draws(draws.indices, (draws.weights > 0).float()).dense(2000) > 0
    assert (
        drawn[p > 2 / 64].float().mean()
        > {"exact": 0.9999, "low-rank": 0.99, "int8": 0.999, "int4": 0.99, "mixed": 0.9}[proposal]
    )


@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_adaptive_rows_draw_as_many_keys_as_their_mass_takes(path, monkeypatch, generator):
    """Keys of a probability of 1 / S or more surely, at least 15 others, and S at most."""
    if path == "reference":
        monkeypatch.setenv("QTX_LAB_KERNELS", "reference")
    k, v = tokens(generator, n=2000)
    scale = torch.tensor([0.2, 3.0])[:, None, None]  # a diffuse head and one with peaked rows
    q = scale * torch.randn(2, 50, 16, generator=generator)
    cache = qtx.SampledKVCache.build(k, v, proposal="exact")
    est = cache.attend(q, num_samples=128, adaptive=True, generator=generator)
    drawn = qtx.Draws(est.draws.indices, (est.draws.weights > 0).float()).dense(2000)
    assert float(drawn.max()) == 1
    p = (q @ k.mT / 4).softmax(-1)
    assert bool(drawn[p > 1.03 / 128].all())
    light = (drawn * (p < 0.97 / 128)).sum(-1)
    tail = torch.where(p < 1 / 128, p, 0).sum(-1)
    expected = (128 * tail).clamp_min(16)
    assert bool((light >= 0.9 * expected - 1.5).all())
    assert bool((light <= 1.1 * expected + 1.5).all())
    counts = drawn.sum(-1)
    assert float(counts[0].min()) > 120
    assert float(counts[1].mean()) < 75
    assert est.info.cache["adaptive"]


def test_query_heads_may_draw_the_same_keys(generator):
    k, v = tokens(generator, n=900)
    q = 2 * torch.randn(6, 4, 16, generator=generator)
    cache = qtx.SampledKVCache.build(k, v, proposal="int4")
    est = cache.attend(q, num_samples=64, share_keys=True, generator=generator)
    indices = est.draws.indices.unflatten(0, (2, 3))
    assert torch.equal(indices, indices[:, :1].expand_as(indices))
    assert float(est.keys_touched().max()) <= 64
    alone = cache.attend(q, num_samples=64, generator=generator)
    assert float(alone.keys_touched().float().mean()) > 100
    last = cache.attend(
        q[:, -1:], num_samples=64, share_keys=True, generator=torch.Generator().manual_seed(5)
    )
    both = cache.attend(q, num_samples=64, share_keys=True, generator=torch.Generator().manual_seed(5))
    assert torch.equal(last.draws.indices, both.draws.indices[:, -1:])
    for name in ("adaptive", "share_keys"):
        with pytest.raises(qtx.DtypeError, match=f"{name}=1 is not allowed"):
            cache.attend(q, **{name: 1})


def test_what_tritons_kernel_does_not_take_says_so(monkeypatch, generator):
    monkeypatch.setenv("QTX_LAB_KERNELS", "triton")
    k, v = tokens(generator, n=300)
    q = torch.randn(4, 2, 16, generator=generator)
    for proposal, adaptive, reason in (
        ("int4", True, "adaptive draws are not in the kernel"),
        ("mixed", False, "sketches of components of 4 and 2 bits are not in the kernel"),
    ):
        cache = qtx.SampledKVCache.build(k, v, proposal=proposal)
        est = cache.attend(q, num_samples=32, adaptive=adaptive, generator=generator)
        assert (est.info.kernel.path, est.info.kernel.reason) == ("torch", reason)
        assert float(((est.output - exact(q, k, v)) / est.std_error).square().mean()) < 2


def test_logits_too_large_for_half_precision(generator):
    k, v = tokens(generator, n=700)
    q = 1e6 * torch.randn(2, 3, 16, generator=generator)
    est = qtx.SampledKVCache.build(1e3 * k, v).attend(q, num_samples=32, generator=generator)
    torch.testing.assert_close(est.output, exact(q, 1e3 * k, v), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_the_same_draws_again_from_disk(proposal, generator, tmp_path, seed):
    k, v = tokens(generator)
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal)
    cache.append(k[:, :5], v[:, :5])
    cache.save(tmp_path / "cache.safetensors")
    other = qtx.SampledKVCache.load(tmp_path / "cache.safetensors")
    q = torch.randn(4, 2, 16, generator=generator)
    for _ in range(2):
        estimates = [c.attend(q, 16, generator=torch.Generator().manual_seed(seed)) for c in (cache, other)]
        assert torch.equal(estimates[0].output, estimates[1].output)
        assert torch.equal(estimates[0].std_error, estimates[1].std_error)
        for c in (cache, other):
            c.append(k, v)


def test_heads_of_a_group_share_their_draws(generator):
    k, v = tokens(generator)
    q = torch.randn(2, 1, 1, 16, generator=generator).expand(2, 4, 1, 16).flatten(0, 1)
    est = qtx.SampledKVCache.build(k, v).attend(q, num_samples=16, generator=generator)
    assert torch.equal(*(est.draws.indices.unflatten(0, (2, 4))[:, i] for i in (0, 3)))
    assert est.keys_touched().shape == (2, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_no_heads(dtype, generator):
    k, v = (x[0].to(dtype) for x in tokens(generator, n=64))
    q = torch.randn(3, 16, generator=generator).to(dtype)
    est = qtx.SampledKVCache.build(k, v).attend(q, num_samples=20_000, generator=generator)
    assert est.output.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(
        est.output, exact(q[None], k[None], v[None])[0], atol=tolerance, rtol=tolerance
    )


def test_bytes_are_counted(generator):
    """All tensors that a cache holds, and those that a query reads in full, of 16 features of 4 bytes."""
    k, v = tokens(generator, n=1024)
    for proposal, columns in (("exact", 64), ("low-rank", 4), ("int4", 8)):
        cache = qtx.SampledKVCache.build(k, v, proposal=proposal, rank=4 if proposal == "low-rank" else None)
        with_exact_logits = 0 if proposal == "exact" else 2 * 4 * 64  # 4 keys of each head
        assert cache.sketch_nbytes() == 2 * 1024 * columns + with_exact_logits
        parts = [vars(cache._store), vars(cache._store.value_order), vars(cache._queries)]
        parts += [] if cache._sketch is None else [vars(cache._sketch)]
        tensors = {x.data_ptr(): x for part in parts for x in part.values() if isinstance(x, torch.Tensor)}
        assert cache.nbytes == sum(x.nbytes for x in tensors.values())
        assert cache.nbytes >= k.nbytes + v.nbytes


BAD = [
    ({"proposal": "int44"}, qtx.ArgumentError, "Did you mean 'int4'"),
    ({"rank": 17}, qtx.ArgumentError, "rank=17"),
    ({"rank": 4, "proposal": "int4"}, qtx.ArgumentError, "rank=4"),
    ({"defensive": 0}, qtx.ArgumentError, "defensive=0"),
    ({"queries": torch.zeros(3, 1, 16)}, qtx.ShapeError, "multiple"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD)
def test_bad_settings(options, error, match, generator):
    with pytest.raises(error, match=match):
        qtx.SampledKVCache.build(*tokens(generator), **options)


def test_bad_tokens_and_queries_leave_the_cache_as_it_was(generator, tmp_path):
    k, v = tokens(generator)
    cache = qtx.SampledKVCache.build(k, v)
    for bad, error in [
        ((k[:1], v[:1]), qtx.ShapeError),
        ((k[..., :4], v), qtx.ShapeError),
        ((k, v[:, :3]), qtx.ShapeError),
        ((k.double(), v.double()), qtx.DtypeError),
        ((k * torch.nan, v), qtx.ArgumentError),
        ((k.long(), v.long()), qtx.DtypeError),
    ]:
        with pytest.raises(error):
            cache.append(*bad)
    q = torch.randn(2, 1, 16, generator=generator)
    for bad, error in [
        (q[..., :3], qtx.ShapeError),
        (q[0], qtx.ShapeError),
        (q * torch.inf, qtx.ArgumentError),
    ]:
        with pytest.raises(error):
            cache.attend(bad)
    with pytest.raises(qtx.ArgumentError, match="num_samples=0"):
        cache.attend(q, num_samples=0)
    assert len(cache) == 700
    with pytest.raises(qtx.ArgumentError, match="does not hold a cache"):
        qtx.SampledKVCache.load(tmp_path / "none")
    with pytest.raises(qtx.StorageError):
        cache.save(tmp_path / "no" / "folder")


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_query_that_is_not_finite_is_named_and_forgotten(proposal, bad, generator):
    """The kernel finds it, in whatever number it is."""
    k, v = tokens(generator)
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal)
    for place in [(0, 0, 0), (1, 2, 15)]:
        q = torch.randn(2, 3, 16, generator=generator)
        q[place] = bad
        for use in (cache.attend, cache.scores):
            with pytest.raises(qtx.ArgumentError, match="q holds NaN or infinity"):
                use(q)
        with pytest.raises(qtx.ArgumentError, match="queries holds NaN or infinity"):
            qtx.SampledKVCache.build(k, v, proposal=proposal, queries=q)
    cache._queries.sum_up()
    assert cache._queries.count == 0
    assert cache.attend(q.nan_to_num(posinf=0, neginf=0)).output.isfinite().all()


@pytest.mark.statistical
def test_errors_on_the_models_own_keys(generator):
    """Root mean squared error over layers and heads at n / 8 draws, beside that of draws by exact logits."""
    model = qtx.load_reference_model()
    text = torch.as_tensor(qtx.encode(qtx.reference_text())).flatten()[:1024].long()
    squares = {name: [] for name in ("monte-carlo", *PROPOSALS)}
    for q, k, v in model.attention_inputs(text[None]):
        seen, asked = q[0, :, :-64], q[0, :, -64:]
        o = exact(asked, k[0], v[0])
        for name, of_tokens in squares.items():
            if name == "monte-carlo":
                options = {"sampler": name, "num_samples": 128, "enable_gqa": True}
                est = qtx.sampled_attention(asked, k[0], v[0], generator=generator, **options)
            else:
                cache = qtx.SampledKVCache.build(k[0], v[0], proposal=name, queries=seen)
                est = cache.attend(asked, num_samples=128, generator=generator)
            of_tokens.append((est.output - o).square().sum() / o.square().sum())
    error = {name: float(torch.stack(of_tokens).mean().sqrt()) for name, of_tokens in squares.items()}
    assert error["int4"] < 1.1 * error["exact"]
    assert error["low-rank"] < 1.15 * error["exact"]
    assert error["exact"] < 0.4 * error["monte-carlo"]


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_modes_of_the_caller_do_not_matter(proposal, generator):
    """Under autocast, or in inference mode, a cache is filled, asked and goes on as without."""
    k, v = tokens(generator, n=800)
    q = torch.randn(4, 2, 16, generator=generator)

    def used(mode):
        g = torch.Generator().manual_seed(3)
        with mode():
            cache = qtx.SampledKVCache.build(k[:, :600], v[:, :600], proposal=proposal)
            cache.append(k[:, 600:], v[:, 600:])
            first, scores = cache.attend(q, num_samples=32, generator=g), cache.scores(q)
            error = first.std_error
        cache.append(k[:, :1], v[:, :1])
        return first.output, error, scores, cache.attend(q, num_samples=32, generator=g).output

    expected = used(contextlib.nullcontext)
    for mode in (torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        for a, b in zip(used(mode), expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_a_scale_that_is_no_finite_number_is_named(generator):
    k, v = tokens(generator, n=40)
    cache = qtx.SampledKVCache.build(k, v)
    for ask in (cache.attend, cache.scores):
        with pytest.raises(qtx.ArgumentError, match="scale=nan"):
            ask(k[:, :1], scale=math.nan)
        with pytest.raises(qtx.DtypeError, match="scale='a'"):
            ask(k[:, :1], scale="a")


def test_torchs_defaults_do_not_matter(generator):
    k, v = tokens(generator)
    q = torch.randn(2, 1, 16, generator=generator)
    cache = qtx.SampledKVCache.build(k, v, proposal="int4")
    expected = attended(cache, q, 0)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = attended(cache, q, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def attended(cache, q, seed):
    return cache.attend(q, 64, generator=torch.Generator().manual_seed(seed)).output


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 4},
        {"num_samples": 4, "share_keys": True},
        {"num_samples": 4, "adaptive": True, "replicates": 2},
        {"num_samples": 4, "estimator": "debiased", "replicates": 2},
        {"tolerance": 0.1},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_queries_are_no_rows(options, dtype, generator):
    k, v = (x.to(dtype) for x in tokens(generator, n=40))
    cache = qtx.SampledKVCache.build(k, v, "int8")
    est = cache.attend(torch.zeros(4, 0, 16, dtype=dtype), generator=generator, **options)
    assert est.output.shape == (4, 0, 12)
    assert est.std_error is None or est.std_error.shape == (4, 0, 12)
    assert est.reliable is None or est.reliable.shape == (4, 0)


@pytest.mark.parametrize("options", [{}, {"share_keys": True}, {"estimator": "debiased"}])
@pytest.mark.parametrize("size", [1e20, 1e37])
def test_error_bars_of_large_values_are_those_of_usual_ones(options, size, generator):
    k, v = tokens(generator, n=200)
    v = v.clamp(-3, 3)
    q = torch.randn(2, 3, 16, generator=generator)
    bars = []
    for factor in (1.0, size):
        cache = qtx.SampledKVCache.build(k, v * factor, "exact")
        seeded = torch.Generator().manual_seed(1)
        est = cache.attend(q, 8, replicates=2, generator=seeded, **options)
        bars.append(est.std_error / factor)
        assert bool(est.reliability.isfinite().all())
    assert bool(bars[1].isfinite().all())
    torch.testing.assert_close(bars[1], bars[0], rtol=0.5, atol=0)


def test_logits_beyond_all_numbers_are_refused(generator):
    cache = qtx.SampledKVCache.build(*tokens(generator, n=80), "int8")
    q = torch.full((2, 1, 16), 3e38)
    calls = (
        lambda: cache.attend(q, 4),
        lambda: cache.attend(q, 4, estimator="debiased"),
        lambda: cache.attend(q, tolerance=0.1),
        lambda: cache.attend_exactly(q),
        lambda: cache.scores(q),
    )
    for call in calls:
        with pytest.raises(qtx.ArgumentError, match="logits"):
            call()
    with pytest.raises(qtx.NumberError, match="replicates"):
        cache.attend(q, tolerance=0.1, replicates=torch.ones(2))


def test_a_cache_is_pickled_whole(generator):
    cache = qtx.SampledKVCache.build(*tokens(generator, n=80))
    q = torch.randn(2, 1, 16, generator=generator)
    cache.attend(q, 8, generator=generator)
    again = pickle.loads(pickle.dumps(cache))
    outputs = [x.attend(q, 8, generator=torch.Generator().manual_seed(1)).output for x in (cache, again)]
    assert torch.equal(*outputs)
    assert again.nbytes == cache.nbytes
