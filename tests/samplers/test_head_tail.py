"""Head and tail: exact where it can be, unbiased everywhere, and far below independent draws."""

import pytest
import torch
import torch.nn.functional as F

import qtx_lab as qtx
from qtx_lab.samplers import HeadTailSampler
from qtx_lab.samplers.head_tail import adaptive_counts, expected_counts


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 31, 32, 33, 100])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, 30.0])
def test_counts_sum_to_the_draws_and_keep_what_is_heavy(num_samples, scale):
    p = (scale * torch.randn(200, 32, generator=generator(), dtype=torch.float64)).softmax(-1)
    m = expected_counts(p, num_samples)
    visible = (p > 0).sum(-1)
    if scale == 30:  # tails of 1e-17: a head too small by a key, of no weight, is all that can be asked
        assert torch.allclose(m.sum(-1), visible.clamp_max(num_samples).double(), rtol=1e-9)
        return
    assert torch.allclose(m.sum(-1), visible.clamp_max(num_samples).double(), rtol=1e-9)
    assert bool(((m >= 0) & (m <= 1 + 1e-9)).all())
    c = (m / p).masked_fill((m >= 1 - 1e-9) | (p == 0), torch.nan)  # the same for all keys of a row's tail
    spread = c.nan_to_num(-torch.inf).amax(-1) - c.nan_to_num(torch.inf).amin(-1)
    tail = (m < 1 - 1e-9).any(-1) & (visible > num_samples)
    assert bool((spread[tail] <= 1e-9 * c.nanmean(-1)[tail]).all())
    kept, least = p.masked_fill(m < 1 - 1e-9, torch.inf).amin(-1), p.masked_fill(m >= 1 - 1e-9, 0).amax(-1)
    assert bool((kept >= least).all())  # the head is the heaviest


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, 30.0])
def test_adaptive_counts_are_those_of_systematic_sampling_without_repetitions(scale):
    """min(1, S p), unless fewer than 16 draws would be left to the tail; S at most."""
    p = (scale * torch.randn(200, 300, generator=generator(), dtype=torch.float64)).softmax(-1)
    for num_samples in (20, 64, torch.full((200, 1), 64)):
        m = adaptive_counts(p, num_samples)
        s = int(torch.as_tensor(num_samples).max())
        assert bool((m.sum(-1) <= s * (1 + 1e-9)).all())
        enough = s * torch.where(p < 1 / s, p, 0).sum(-1) >= 16
        torch.testing.assert_close(m[enough], (s * p).clamp_max(1)[enough])
        if s == 64 and scale == 4:  # 16 draws of the tail, as nearly as a few steps find them
            light = torch.where(m < 1, m, 0).sum(-1)[~enough]
            assert len(light) > 50
            assert 10 < float(light.quantile(0.1)) < float(light.max()) < 16.5
    assert torch.equal(adaptive_counts(p, 300), (p > 0).double())


@pytest.mark.statistical
@pytest.mark.parametrize("head", ["optimal", "adaptive"])
def test_intervals_cover_and_adaptive_rows_draw_fewer_where_they_are_peaked(head):
    """95 % intervals of 400 rows cover 94 % at least, and the mean of many estimates is exact attention."""
    g = generator(3)
    q, k, v = (torch.randn(2, n, 16, generator=g) for n in (200, 600, 600))
    q = q * torch.linspace(0.3, 4, 200)[:, None]
    est = qtx.sampled_attention(
        q, k, v, sampler=HeadTailSampler(head), num_samples=64, replicates=4, generator=g
    )
    exact = F.scaled_dot_product_attention(q, k, v)
    low, high = est.confidence_interval(0.95)
    assert float(((low <= exact) & (exact <= high)).float().mean()) > 0.94
    drawn = (est.draws.weights > 0).sum(-1) / 4
    assert float(drawn[:, :20].mean()) > 62
    assert (float(drawn[:, -20:].mean()) < 40) == (head == "adaptive")
    many = qtx.sampled_attention(
        q, k, v, sampler=HeadTailSampler(head), num_samples=64, replicates=64, generator=g
    )
    z = (many.output - exact) / many.std_error.clamp_min(1e-6)
    assert float(z.square().mean()) < 1.5


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_no_more_keys_than_draws_is_exact(options):
    q, k, v = (torch.randn(2, 3, 20, 8, generator=generator(i)) for i in range(3))
    est = qtx.sampled_attention(q, k, v, sampler="head-tail", num_samples=20, replicates=2, **options)
    assert torch.allclose(est.output, F.scaled_dot_product_attention(q, k, v, **options), atol=1e-5)
    assert est.std_error.max() < 1e-5
    assert est.diagnostics["effective_sample_size"].isfinite().all()


@pytest.mark.parametrize("head", [0, 3, 10, "optimal", "adaptive"])
def test_the_head_is_exact(head):
    g = generator(1)
    logits = 2 * torch.randn(50, 64, generator=g)
    p = logits.softmax(-1)
    top = p.topk(3, -1)
    dense = HeadTailSampler(head).draw(logits, 16, generator=g).dense(64)
    kept = (dense.gather(-1, top.indices) - top.values).abs() < 1e-5
    if isinstance(head, str):
        kept = kept | (top.values < 1 / 16)
    assert head == 0 or bool(kept.all())
    assert torch.allclose(dense.sum(-1), torch.ones(50), atol=1e-5)


def test_draws_through_attention_are_those_of_the_caller_keys():
    """Keys are laid out anew inside; indices, masks and intervals are about the caller's order."""
    g = generator(2)
    q, k, v = (torch.randn(2, 4, 40, 8, generator=g) for _ in range(3))
    mask = torch.rand(2, 4, 40, 40, generator=g) < 0.5
    mask[..., 0] = True
    est = qtx.sampled_attention(q, k, v, sampler="head-tail", num_samples=12, attn_mask=mask, generator=g)
    weights = est.attention_weights()
    assert weights[~mask].eq(0).all()
    assert torch.allclose(weights @ v, est.output, atol=1e-5)
    p = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    drawn = est.draws
    assert torch.allclose(p.gather(-1, drawn.indices), drawn.probabilities, atol=1e-6)


@pytest.mark.statistical
def test_error_on_learned_attention(seed):
    """At S = n/4: at most 0.28 of independent draws' error and half of systematic draws'; more is reached."""
    tokens = qtx.encode(qtx.reference_text())[None, :512]
    q, k, v = (torch.cat(x) for x in zip(*qtx.load_reference_model().attention_inputs(tokens), strict=True))
    mask = torch.ones(512, 512, dtype=torch.bool).tril()[384:]
    q = q[:, :, 384:]  # rows that see at least 3/4 of the keys
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    g = torch.Generator().manual_seed(seed)

    def error(sampler):
        squared = [
            (
                qtx.sampled_attention(
                    q, k, v, sampler=sampler, num_samples=128, attn_mask=mask, enable_gqa=True, generator=g
                ).output
                - exact
            ).square()
            for _ in range(2)
        ]
        return torch.stack(squared).mean(0).sum((-2, -1)).sqrt()  # [layers, heads]

    ours = error("head-tail")
    for other, limit in (("monte-carlo", 0.16), ("systematic", 0.32)):
        assert (ours / error(other)).log().mean().exp() < limit


@pytest.mark.parametrize("head", [-1, 1.5, True, "best", None])
def test_a_bad_head_is_one_clear_error(head):
    with pytest.raises(qtx.ArgumentError, match="head="):
        HeadTailSampler(head)


def test_a_head_as_large_as_the_draws_is_refused():
    with pytest.raises(qtx.ArgumentError, match="head=8 is not allowed with num_samples=8"):
        HeadTailSampler(8).draw(torch.zeros(20), 8)


def test_a_head_as_large_as_the_row_leaves_nothing_to_draw():
    g = generator()
    q, k, v = (torch.randn(1, 1, 300, 8, generator=g) for _ in range(3))
    est = qtx.sampled_attention(
        q, k, v, sampler=HeadTailSampler(head=4), num_samples=16, is_causal=True, generator=g
    )
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(est.output[..., :4, :], exact[..., :4, :])
    assert est.output.isfinite().all()
