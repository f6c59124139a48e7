"""Peers' cache policies: each is what its paper says, by another computation of its formulas."""

import pytest
import torch
import torch.nn.functional as F

from qtx_lab.cache.policies import make_policy
from qtx_lab.cache.policies.quest import PageBounds
from qtx_lab.cache.policies.santa import automatic_tile
from qtx_lab.samplers import SantaSampler


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
