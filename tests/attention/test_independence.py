"""A row's draws depend on what it asks and sees alone: not on rows, heads and sequences beside it, blocks,
threads or later tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import qtx_lab as qtx
from qtx_lab import problem
from qtx_lab.attention.dispatch import attend
from qtx_lab.attention.settings import AttentionSettings
from qtx_lab.problem import AttentionProblem
from qtx_lab.samplers import BASELINES, SAMPLERS

NAMES = [*SAMPLERS, *BASELINES]
L = 150


@pytest.fixture
def qkv(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences of four query heads on two key heads."""
    q = 2 * torch.randn(2, 4, L, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, L, 16, generator=generator)
    return q, k, v


def estimate(q: Tensor, k: Tensor, v: Tensor, sampler: str, **options: object) -> qtx.AttentionEstimate:
    g = torch.Generator().manual_seed(1)
    options = {"num_samples": 12, "replicates": 2, "enable_gqa": True, **options}
    return qtx.sampled_attention(q, k, v, sampler=sampler, generator=g, **options)


def drawn(est: qtx.AttentionEstimate, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, weights and outputs of some positions; a draw without weight has no key."""
    if est.info.sampler == "exact":  # draws every key that there is
        return est.output[..., rows, :0].long(), est.output[..., rows, :0], est.output[..., rows, :]
    indices = est.draws.indices.masked_fill(est.draws.weights == 0, -1)
    return indices[..., rows, :], est.draws.weights[..., rows, :], est.output[..., rows, :]


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    """Equal keys, and weights and outputs that are equal but for rounding; draws in any order."""
    order = [x[0].argsort(dim=-1, stable=True) for x in (one, other)]
    keys = [x[0].gather(-1, o) for x, o in zip((one, other), order, strict=True)]
    weights = [x[1].gather(-1, o) for x, o in zip((one, other), order, strict=True)]
    return (
        torch.equal(*keys)
        and torch.allclose(*weights, rtol=1e-4, atol=1e-6)
        and torch.allclose(one[2], other[2], rtol=1e-4, atol=1e-5)
    )


@pytest.mark.parametrize("sampler", NAMES)
def test_later_tokens_change_no_causal_row(sampler: str, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    k2, v2, q2 = k.clone(), v.clone(), q.clone()
    k2[..., 100:, :] += 1
    v2[..., 100:, :] -= 1
    q2[..., 100:, :] *= -1
    here = slice(0, 100)
    before = drawn(estimate(q, k, v, sampler, is_causal=True), here)
    assert same(drawn(estimate(q2, k2, v2, sampler, is_causal=True), here), before)
    fewer = [x[..., :120, :] for x in (q2, k2, v2)]
    assert same(drawn(estimate(*fewer, sampler, is_causal=True), here), before)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sampler", NAMES)
def test_a_sequence_draws_the_same_wherever_it_stands(
    sampler: str, causal: bool, qkv: tuple[Tensor, Tensor, Tensor]
) -> None:
    q, k, v = qkv
    both = estimate(q, k, v, sampler, is_causal=causal, sequences=torch.tensor([5, 9]))
    alone = estimate(*(x[1:] for x in qkv), sampler, is_causal=causal, sequences=torch.tensor([9]))
    assert same(drawn(alone), tuple(x[1:] for x in drawn(both)))
    if sampler not in ("exact", "oracle-top-k"):  # which draw nothing at random
        other = estimate(q[:1], k[:1], v[:1], sampler, is_causal=causal, sequences=torch.tensor([9]))
        assert not same(drawn(other), tuple(x[:1] for x in drawn(both)))


@pytest.mark.parametrize("sampler", NAMES)
def test_heads_and_rows_beside_it_do_not_matter(sampler: str, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    both = drawn(estimate(q, k, v, sampler))
    # The first two query heads share the first key head; the first 60 queries stand alone.
    some = drawn(estimate(q[:, :2, :60], k[:, :1], v[:, :1], sampler))
    if sampler == "learned":  # not fitted: its map is that of all queries of the head
        some = drawn(estimate(q[:, :2], k[:, :1], v[:, :1], sampler), slice(0, 60))
    assert same(some, tuple(x[:, :2, :60] for x in both))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sampler", NAMES)
def test_blocks_and_threads_do_not_matter(
    sampler: str, causal: bool, qkv: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drawn(estimate(*qkv, sampler, is_causal=causal))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert same(drawn(estimate(*qkv, sampler, is_causal=causal)), whole)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(problem, "BLOCK_ELEMENTS", 17 * 24 * 16)
    assert same(drawn(estimate(*qkv, sampler, is_causal=causal)), whole)


@pytest.mark.parametrize("sampler", sorted({*NAMES} - {"learned"}))
def test_prefill_and_decode_of_a_position_draw_alike(
    sampler: str, qkv: tuple[Tensor, Tensor, Tensor]
) -> None:
    """The last row of a causal call, and the same query by itself at its position, which sees all keys."""
    q, k, v = qkv
    prefill = drawn(estimate(q, k, v, sampler, is_causal=True), slice(L - 1, L))
    problem_of_token = AttentionProblem.of(q[..., -1:, :], k, v, enable_gqa=True, first_position=L - 1)
    settings = AttentionSettings.of(sampler, num_samples=12, replicates=2)
    decode = attend(problem_of_token, settings, torch.Generator().manual_seed(1))
    assert same(drawn(decode), prefill)


@pytest.mark.parametrize("sampler", ["systematic", "head-tail", "sobol"])
def test_a_tolerance_keeps_causality(sampler: str, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    def outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        options = {"is_causal": True, "enable_gqa": True, "tolerance": 0.3}
        g = torch.Generator().manual_seed(1)
        est = qtx.sampled_attention(q, k, v, sampler=sampler, generator=g, **options)
        return est.output[..., :100, :], est.info.draws_per_row[..., :100]

    q, k, v = qkv
    k2, v2 = k.clone(), v.clone()
    k2[..., 100:, :] += 1
    v2[..., 100:, :] -= 1
    before = outputs(q, k, v)
    for other in (outputs(q, k2, v2), outputs(*(x[..., :120, :] for x in (q, k2, v2)))):
        assert torch.equal(other[1], before[1])
        assert torch.allclose(other[0], before[0], rtol=1e-4, atol=1e-5)
