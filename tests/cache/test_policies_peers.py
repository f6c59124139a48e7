"""Peers' cache policies: each is what its paper says, by another computation of its formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from qtx_lab.cache.policies import LayerPrompt, make_policy
from qtx_lab.cache.policies.chosen_keys import DecodeStep
from qtx_lab.cache.policies.evictions import attention_received
from qtx_lab.cache.policies.magicpig import collision_probability
from qtx_lab.cache.policies.product_codes import ProductCodes
from qtx_lab.cache.policies.quest import PageBounds
from qtx_lab.cache.policies.santa import automatic_tile
from qtx_lab.samplers import SantaSampler, VAttentionSampler
from qtx_lab.streams import Stream


def tokens(generator, *, batch=2, heads=4, key_heads=2, n=300, width=16):
    """Queries, keys and values of a prompt, (batch, heads, n, width)."""
    return tuple(
        torch.randn(batch, count, n, width, generator=generator) for count in (heads, key_heads, key_heads)
    )


def attend(policy, prompt, new):
    """The output of a policy for one new token after a prompt, what was read, and all keys and values."""
    cache = policy.start(0, *prompt)
    cache.append(new[1], new[2])
    output = cache.attend(new[0])
    k, v = (torch.cat(pair, 2) for pair in list(zip(prompt, new, strict=True))[1:])
    return output, cache.reads, k, v


def attention_over(q, k, v, mask):
    """Attention of q (B, H, 1, E) to the keys of a mask (B, H, n)."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :, None])


def test_top_k_attends_to_the_heaviest_keys(generator):
    prompt, new = tokens(generator), tokens(generator, n=1)
    output, reads, k, v = attend(make_policy("oracle-top-k", budget=12), prompt, new)
    logits = (new[0] @ k.repeat_interleave(2, 1).mT)[:, :, 0]
    mask = logits >= logits.sort(-1, descending=True).values[..., 11:12]
    torch.testing.assert_close(output, attention_over(new[0], k, v, mask))
    assert reads.keys == 1
    union = mask.view(2, 2, 2, -1).any(2)
    assert reads.values == pytest.approx(float(union.double().mean()))
    assert reads.bytes == pytest.approx(0.5 + reads.values / 2)


@pytest.mark.parametrize("sampler", ["head-tail", "systematic", "lattice", "monte-carlo", "vattention"])
def test_samplers_draw_the_values_and_are_consistent(sampler, generator):
    prompt, new = tokens(generator), tokens(generator, n=1)
    errors = []
    for budget in (0.05, 0.5):
        policy = make_policy("sampler", sampler=sampler, budget=budget)
        output, reads, k, v = attend(policy, prompt, new)
        assert reads.keys == 1
        assert reads.values <= 2 * budget + 0.01
        exact = F.scaled_dot_product_attention(new[0], k, v, enable_gqa=True)
        errors.append(float((output - exact).norm() / exact.norm()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("rule", ["proportional", "fixed"])
def test_santa_has_the_tile_of_its_kernels(rule, generator):
    # OPUSLab/SANTA at 2e5f861, `_auto_block_n_from_L`.
    assert [automatic_tile(n) for n in (1, 1536, 1537, 3072, 3073)] == [32, 32, 64, 64, 256]
    prompt, new = tokens(generator), tokens(generator, n=1)
    automatic, *_, k, v = attend(make_policy("santa", budget=64, rule=rule), prompt, new)
    same, *_ = attend(make_policy("santa", budget=64, rule=rule, tile=32), prompt, new)
    other, *_ = attend(make_policy("santa", budget=64, rule=rule, tile=256), prompt, new)
    assert torch.equal(automatic, same)
    assert not torch.equal(automatic, other)
    exact = F.scaled_dot_product_attention(new[0], k, v, enable_gqa=True)
    outputs = [attend(make_policy("santa", budget=64, rule=rule, seed=i), prompt, new)[0] for i in range(40)]
    assert float((torch.stack(outputs).mean(0) - exact).norm()) < 0.4 * float((outputs[0] - exact).norm())
    name = make_policy("santa", rule=rule).label
    assert name == ("S²ANTA-Prop" if rule == "proportional" else "S²ANTA-Flash")
    assert SantaSampler(rule).name == name.lower().replace("²", "")


def test_bounds_of_pages_hold_and_grow_with_the_tokens(generator):
    keys, queries = (torch.randn(3, n, 8, generator=generator) for n in (50, 4))
    pages = PageBounds(16)
    for n in (5, 16, 17, 40, 50):
        pages.extend(keys[:, :n])
        bounds = pages.of_keys(pages.bounds(queries), n)
        assert bounds.shape == (3, 4, n)
        logits = queries @ keys[:, :n].mT
        assert bool((bounds >= logits - 1e-5).all())
        # sum_i max(q_i m_i, q_i M_i) of the last page
        last = keys[:, (n - 1) // 16 * 16 : n]
        ends = torch.stack((last.amin(1), last.amax(1)))[:, :, None] * queries
        torch.testing.assert_close(bounds[..., -1], ends.amax(0).sum(-1))
    assert pages.nbytes == 2 * 2 * 3 * 4 * 8


def test_quest_reads_the_pages_of_the_largest_bounds(generator):
    prompt, new = tokens(generator), tokens(generator, n=1)
    output, reads, k, v = attend(make_policy("quest", budget=64, page=16), prompt, new)
    # 301 keys are 19 pages, the last of 13 keys; the budget is four pages, one of them the newest.
    mask = torch.zeros(2, 4, 301, dtype=torch.bool)
    mask[..., 288:] = True
    for b in range(2):
        for h in range(4):
            pages = [k[b, h // 2, 16 * i : 16 * (i + 1)] for i in range(18)]
            q = new[0][b, h, 0]
            bounds = [float(torch.maximum(q * x.amin(0), q * x.amax(0)).sum()) for x in pages]
            for i in sorted(range(18), key=bounds.__getitem__)[-3:]:
                mask[b, h, 16 * i : 16 * (i + 1)] = True
    torch.testing.assert_close(output, attention_over(new[0], k, v, mask))
    share = float(mask.view(2, 2, 2, -1).any(2).double().mean())
    assert reads.keys == reads.values == pytest.approx(share)
    assert reads.bytes == pytest.approx(share + 19 / 301)


def test_quest_drawn_is_consistent(generator):
    prompt, new = tokens(generator), tokens(generator, n=1)
    errors = []
    for budget in (0.1, 0.8):
        output, _, k, v = attend(make_policy("quest", budget=budget, draw=True), prompt, new)
        exact = F.scaled_dot_product_attention(new[0], k, v, enable_gqa=True)
        errors.append(float((output - exact).norm() / exact.norm()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("pqcache", {"parts": 4}), ("sampled", {"rank": 6}), ("sampled", {"proposal": "int4"})],
)
def test_draws_by_guesses_are_consistent_and_shared_ones_read_less(name, settings, shared, generator):
    prompt, new = tokens(generator), tokens(generator, n=1)
    errors, read = [], []
    for budget in (0.1, 0.8):
        policy = make_policy(name, budget=budget, draw=True, shared=shared, **settings)
        output, reads, k, v = attend(policy, prompt, new)
        exact = F.scaled_dot_product_attention(new[0], k, v, enable_gqa=True)
        errors.append(float((output - exact).norm() / exact.norm()))
        read.append(reads.keys)
    assert errors[1] < 0.5 * errors[0]
    if shared:
        assert all(0.9 * x < y <= round(x * 301) / 301 for x, y in zip((0.1, 0.8), read, strict=True))
    else:
        assert read[0] > 0.12


def test_ends_are_read_besides_the_draws(generator):
    prompt, new = tokens(generator), tokens(generator, n=1)
    settings = {"budget": 30, "rank": 4, "sinks": 3, "recent": 0.2}
    outputs = []
    for seed in range(2):
        cache = make_policy("sampled", seed=seed, **settings).start(0, *prompt)
        cache.append(new[1], new[2])
        k, v = (torch.cat(pair, 2).flatten(0, 1) for pair in list(zip(prompt, new, strict=True))[1:])
        stream = Stream.of(seed, 2, 2, 1, 300).of_block(slice(None), torch.tensor([300, 300]))
        factors = cache.chooser.choose(DecodeStep(new[0].reshape(4, 2, 16) / 4, k, v, stream)).factors
        assert bool((factors[..., :3] == 1).all())
        assert bool((factors[..., -6:] == 1).all())
        assert bool(((factors > 0).sum(-1) <= 30).all())
        outputs.append(cache.attend(new[0]))
    assert not torch.equal(*outputs)


def test_shared_draws_average_to_exact_attention(generator):
    prompt, new = tokens(generator), tokens(generator, n=1)
    outputs = []
    for seed in range(60):
        policy = make_policy("sampled", budget=60, proposal="exact", shared=True, seed=seed)
        output, _, k, v = attend(policy, prompt, new)
        outputs.append(output)
    exact = F.scaled_dot_product_attention(new[0], k, v, enable_gqa=True)
    one = float(torch.stack([(x - exact).norm() for x in outputs]).square().mean().sqrt())
    # The bias of ratios is of the order of the squared error.
    assert float((torch.stack(outputs).mean(0) - exact).norm()) < (60**-0.5 + 0.1) * one


def test_a_sketch_cut_reads_the_keys_of_its_largest_scores(generator):
    prompt, new = tokens(generator), tokens(generator, n=1)
    _, sketched, *_ = attend(make_policy("sampled", draw=False, budget=20, rank=16), prompt, new)
    output, exact, *_ = attend(make_policy("sampled", draw=False, budget=20, proposal="exact"), prompt, new)
    best, oracle, *_ = attend(make_policy("oracle-top-k", budget=20), prompt, new)
    torch.testing.assert_close(output, best)
    assert exact == oracle
    # 16 components of a byte, a quarter of the bytes of a key and a value of 16 numbers in half precision
    assert sketched.keys + 0.25 <= sketched.bytes <= sketched.keys + 0.28


def test_product_codes_are_products_with_the_nearest_centroids(generator):
    prompt, new = tokens(generator, n=200), tokens(generator, n=30)
    q, k, v = prompt
    layer = LayerPrompt(0, q, k, v, 0.25)
    codes = ProductCodes(layer, 4, 5, 8, torch.tensor(3))
    keys = torch.cat((k, new[1]), 2).flatten(0, 1)
    queries = torch.randn(4, 2, 16, generator=generator)
    values = torch.zeros(4, 230, 16)
    guesses = codes.guess(DecodeStep(queries, keys, values, Stream.of(0, 2, 2, 1)))
    distance = torch.cdist(keys.unflatten(-1, (4, 4)).transpose(1, 2), codes.centroids)
    nearest = distance.argmin(-1)[..., None].expand(-1, -1, -1, 4)
    quantised = codes.centroids.gather(2, nearest).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(guesses.logits, queries @ quantised.mT)
    # Four codes of five bits a key; 32 centroids of four parts of four numbers in half precision a head.
    assert guesses.nbytes == 4 * 230 * 4 * 5 / 8 + 4 * 4 * 32 * 4 * 2
    # k-means: less is lost than by the random keys that it starts from, and by twice as many parts.
    start = ProductCodes(layer, 4, 5, 1, torch.tensor(3))
    finer = ProductCodes(layer, 8, 5, 8, torch.tensor(3))
    losses = []
    for some in (finer, codes, start):
        logits = some.guess(DecodeStep(queries, keys, values, Stream.of(0, 2, 2, 1))).logits
        losses.append(float((logits - queries @ keys.mT).square().mean()))
    assert losses[0] < 0.7 * losses[1] < losses[2]


def test_pqcache_keeps_the_ends_and_shares_the_rest(generator):
    prompt, new = tokens(generator), tokens(generator, n=1)
    policy = make_policy("pqcache", budget=40, sinks=4, recent=0.25)
    cache = policy.start(0, *prompt)
    cache.append(new[1], new[2])
    output = cache.attend(new[0])
    k, v = (torch.cat(pair, 2) for pair in list(zip(prompt, new, strict=True))[1:])
    step = DecodeStep(new[0].reshape(4, 2, 16) / 4, k.flatten(0, 1), v.flatten(0, 1), Stream.of(0, 2, 2, 1))
    guessed = ProductCodes(LayerPrompt(0, *prompt, 0.25), 2, 6, 10, policy.layer_seed(0)).guess(step).logits
    kept = torch.zeros(301, dtype=torch.bool)
    kept[:4], kept[-10:] = True, True
    probability = guessed.masked_fill(kept, -torch.inf).softmax(-1).sum(1)
    mask = kept | (probability >= probability.sort(-1, descending=True).values[:, 25:26])
    torch.testing.assert_close(
        output, attention_over(new[0], k, v, mask.view(2, 2, 301).repeat_interleave(2, 1))
    )
    assert cache.reads.keys == pytest.approx(40 / 301)


def test_vattention_draws_what_its_sampler_draws(generator):
    # Eight sinks, eight newest, 100 heaviest of 200 keys: the shares of the sampler.
    prompt, new = tokens(generator), tokens(generator, n=1)
    policy = make_policy("vattention", budget=200, sinks=8, recent=0.04, heavy=0.5)
    output, reads, k, v = attend(policy, prompt, new)
    stream = Stream.of(policy.layer_seed(0), 2, 2, 1, 300).of_block(slice(None), torch.tensor([300, 300]))
    logits = new[0].reshape(4, 2, 16) @ k.flatten(0, 1).mT / 4
    draws = VAttentionSampler(0.04, 0.04, 0.5).draw_from(stream, logits, 200)
    torch.testing.assert_close(output.view(4, 2, 16), draws.dense(301) @ v.flatten(0, 1))
    assert reads.keys == 1


def test_vattention_grows_to_what_its_promise_takes(generator):
    prompt, new = tokens(generator, n=2000), tokens(generator, n=1)
    k = torch.cat((prompt[1], new[1]), 2)
    total = (new[0] @ k.repeat_interleave(2, 1).mT / 4).exp().sum(-1)
    shares = []
    for epsilon, delta in ((0.2, 0.1), (0.05, 0.1), (0.05, 0.01)):
        settings = {"budget": 120, "epsilon": epsilon, "delta": delta}
        _, reads, _, _ = attend(make_policy("vattention", **settings), prompt, new)
        shares.append(reads.values)
    assert shares[0] < shares[1] < shares[2]
    # The denominator is f_j exp(l_j) summed up: off by more than epsilon in at most some 2 delta of the rows.
    misses = []
    for seed in range(40):
        policy = make_policy("vattention", budget=120, epsilon=0.1, delta=0.1, seed=seed)
        cache = policy.start(0, *prompt)
        step = DecodeStep(
            new[0].reshape(4, 2, 16) / 4,
            k.flatten(0, 1),
            torch.zeros(4, 2001, 16),
            Stream.of(policy.layer_seed(0), 2, 2, 1, 2000).of_block(slice(None), torch.tensor([2000, 2000])),
        )
        factors = cache.chooser.choose(step).factors
        estimate = (factors * step.logits.exp()).sum(-1)
        misses.append(((estimate / total.view(4, 2) - 1).abs() > 0.1).double().mean())
    # Of 320 rows; .2 would be expected, and more than .28 is seen once in some 5,000 times.
    assert float(torch.stack(misses).mean()) < 0.28


def test_magicpig_reads_keys_as_often_as_it_weighs_them_by(generator):
    q, k, v = tokens(generator, batch=1, heads=2, key_heads=1, n=80)
    k = k + 0.5 * q[:, :1, -1:]
    step = DecodeStep(q[:, :, -1:].reshape(1, 2, 16), k[0], v[0], Stream.of(0, 1, 1, 1))
    read = torch.zeros(2, 80)
    trials = 300
    for seed in range(trials):
        policy = make_policy("magicpig", budget=8, bits=4, tables=6, sinks=2, recent=0.25, seed=seed)
        factors = policy.start(0, q, k, v).chooser.choose(step).factors[0]
        read += factors > 0
    assert bool((read[:, :2] == trials).all())
    assert bool((read[:, -2:] == trials).all())
    others = slice(2, 78)
    centred = k[0, 0] - k[0, 0, others].mean(0)
    cosine = F.cosine_similarity(q[0, :, -1:], centred, dim=-1)
    # Two of six tables or more, in which all four signs agree
    agree = (1 - torch.arccos(cosine) / torch.pi) ** 4
    expected = sum(math.comb(6, i) * agree**i * (1 - agree) ** (6 - i) for i in range(2, 7))[:, others]
    torch.testing.assert_close(collision_probability(cosine, 4, 6)[:, others], expected, atol=1e-6, rtol=1e-4)
    z = (read[:, others] / trials - expected) / (expected * (1 - expected) / trials).sqrt()
    assert float(z.square().mean().sqrt()) < 1.25
    assert float(z.abs().max()) < 5


def test_magicpig_makes_the_tables_that_its_budget_takes(generator):
    prompt, new = tokens(generator, n=600), tokens(generator, n=600)
    few, many = (make_policy("magicpig", budget=b, bits=6).start(0, *prompt) for b in (0.1, 0.3))
    assert bool((few.chooser.tables >= 2).all())
    assert bool((few.chooser.tables < many.chooser.tables).all())
    for i in range(8):
        for cache in (few, many):
            cache.append(new[1][:, :, i : i + 1], new[2][:, :, i : i + 1])
            cache.attend(new[0][:, :, i : i + 1])
    # Of each query head, of which two read other keys of a key head.
    assert 0.1 < few.reads.keys < 0.2 < many.reads.keys < 0.6
    assert few.reads.bytes > few.reads.keys


def attention_given(q, k, scale=0.25):
    """Causal attention probabilities of a prompt, (B, Hkv, queries, keys), summed over grouped heads."""
    n = k.shape[2]
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    p = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    return p.unflatten(1, (k.shape[1], -1)).sum(2)


def test_h2o_keeps_the_heavy_hitters_and_forgets_the_others(generator):
    # Equal to FMInference/H2O at ac75c2a, `H2OKVCache_LayerWise`, over 10 steps of four heads with keys each.
    prompt, new = tokens(generator, n=120), tokens(generator, n=6)
    budget, recent = 31, 10
    outputs, cache = [], make_policy("h2o", budget=budget, recent=recent / budget).start(0, *prompt)
    k, v = prompt[1:]
    scores = attention_given(*prompt[:2]).sum(2)  # (B, Hkv, n)
    alive = torch.ones(2, 2, 120, dtype=torch.bool)
    for i in range(6):
        q, k1, v1 = (x[:, :, i : i + 1] for x in new)
        cache.append(k1, v1)
        outputs.append(cache.attend(q))
        k, v = torch.cat((k, k1), 2), torch.cat((v, v1), 2)
        scores, alive = F.pad(scores, (0, 1)), F.pad(alive, (0, 1), value=True)
        older = k.shape[2] - recent
        for b in range(2):
            for h in range(2):
                candidates = [j for j in range(older) if alive[b, h, j]]
                best = sorted(candidates, key=lambda j: -float(scores[b, h, j]))[: budget - recent]
                alive[b, h, :older] = False
                alive[b, h, best] = True
        mask = alive.repeat_interleave(2, 1)
        torch.testing.assert_close(outputs[-1], attention_over(q, k, v, mask))
        logits = (q @ k.repeat_interleave(2, 1).mT * 0.25)[:, :, 0].masked_fill(~mask, -torch.inf)
        scores = scores + logits.softmax(-1).view(2, 2, 2, -1).sum(2)
    assert cache.reads.keys == pytest.approx(sum(31 / n for n in range(121, 127)) / 6)


@pytest.mark.parametrize(("budget", "window"), [(60, 16), (21, 10)])
def test_snapkv_keeps_what_the_last_queries_see(budget, window, generator):
    # Equal to FasterDecoding/SnapKV at e216ddc, `SnapKVCluster.update_kv`, with a key head a query head.
    prompt, new = tokens(generator), tokens(generator, n=1)
    policy = make_policy("snapkv", budget=budget, window=16, pool=3)
    output, reads, k, v = attend(policy, prompt, new)
    seen = attention_given(*prompt[:2])[:, :, -window:, : 300 - window].sum(2)
    padded = F.pad(seen, (1, 1))
    pooled = (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3
    keep = pooled.topk(budget - window, -1).indices
    mask = torch.zeros(2, 2, 301, dtype=torch.bool).scatter_(2, keep, True)
    mask[..., 300 - window :] = True
    torch.testing.assert_close(output, attention_over(new[0], k, v, mask.repeat_interleave(2, 1)))
    assert reads.keys == reads.bytes == pytest.approx((budget + 1) / 301)


def test_attention_received_sums_up_over_blocks_of_queries(generator):
    q, k, v = tokens(generator, n=530)
    layer = LayerPrompt(0, q, k, v, 0.25)
    expected = attention_given(q, k)
    torch.testing.assert_close(attention_received(layer).view(2, 2, -1), expected.sum(2))
    torch.testing.assert_close(attention_received(layer, 40).view(2, 2, -1), expected[:, :, -40:].sum(2))
