"""Exact attention of the newest tokens: the kernels give the reference's outputs, from any kind of cache."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import qtx_lab as qtx
from qtx_lab.errors import ArgumentError, ShapeError
from qtx_lab.kernels.block_tables import block_table_of
from qtx_lab.kernels.exact_decode import launch
from qtx_lab.kernels.exact_decode.launch import exact_decode
from qtx_lab.kernels.exact_decode.reference import CachedInputs
from qtx_lab.kernels.exact_decode.reference import exact_decode as reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def cached_inputs(case, dtype, generator, device, cache_dtype=None, **options):
    """Inputs of (B, Hkv, G, L, n, E, Ev)."""
    batch, heads, group, length, n, e, ev = case
    shapes = ((batch * heads, group * length, e), (batch, heads, n, e), (batch, heads, n, ev))
    q, k, v = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    k, v = (y.to(cache_dtype or dtype) for y in (k, v))
    return CachedInputs((3 * q).to(dtype), k, v, length, 1 / math.sqrt(e), **options)


def assert_equal_results(actual, expected, tolerance):
    """Outputs within a tolerance of their size, log-sum-exps within it; NaN and -inf in the same places."""
    size = expected.output.float().square().mean().sqrt().clamp_min(1e-30)
    assert actual.output.dtype == expected.output.dtype
    difference = (actual.output.float() - expected.output.float()).abs().max() / size
    assert float(difference) <= 8 * tolerance
    torch.testing.assert_close(actual.log_sum_exp, expected.log_sum_exp, rtol=1e-5, atol=1e-4)


CASES = [
    ((2, 1, 4, 5, 300, 64, 64), torch.bfloat16, {}),
    ((1, 2, 3, 2, 131, 33, 40), torch.float16, {"window": 20}),
    ((1, 1, 9, 8, 300, 100, 150), torch.float32, {"softcap": 2.0}),
    ((1, 1, 1, 1, 1, 32, 32), torch.bfloat16, {}),
    ((3, 2, 2, 4, 90, 128, 16), torch.float32, {"window": 0, "softcap": 5.0}),
]


@pytest.mark.parametrize(("case", "dtype", "options"), CASES)
@pytest.mark.parametrize("form", ["side by side", "paged", "lengths and sinks"])
def test_outputs_are_the_references(case, dtype, options, form, generator, device, paged):
    x = cached_inputs(case, dtype, generator, device, **options)
    expected = reference(x)
    if form == "paged":
        x = paged(x, 16)
    elif form == "lengths and sinks":
        lengths = torch.randint(0, case[4] + 1, (case[0],), generator=generator)
        sinks = torch.randn(x.q.shape[:2], generator=generator)
        x = replace(x, lengths=lengths.to(device), sinks=sinks.to(device))
        expected = reference(x)
        x = paged(x, 5)
    assert_equal_results(exact_decode(x), expected, TOLERANCE[dtype])


def test_the_reference_is_exact_attention_of_the_newest_tokens(generator, device):
    x = cached_inputs((2, 2, 3, 4, 50, 16, 8), torch.float32, generator, device)
    q = x.q.view(2, 6, 4, 16)
    visible = torch.ones(4, 50, dtype=torch.bool, device=device).tril(46)
    expected = F.scaled_dot_product_attention(
        *(y.double() for y in (q, x.k, x.v)), attn_mask=visible, enable_gqa=True
    )
    result = reference(x)
    torch.testing.assert_close(result.output.view(2, 6, 4, 8).double(), expected, rtol=1e-5, atol=1e-5)
    logits = (q.double() @ x.k.double().repeat_interleave(3, 1).mT / 4).masked_fill(~visible, -torch.inf)
    torch.testing.assert_close(result.log_sum_exp.view(2, 6, 4).double(), logits.logsumexp(-1))


def test_a_large_softcap_changes_no_logit(generator, device):
    x = cached_inputs((1, 1, 2, 3, 90, 32, 16), torch.float32, generator, device)
    assert_equal_results(exact_decode(replace(x, softcap=1e9)), exact_decode(x), 1e-5)


@pytest.mark.parametrize("cache_dtype", FP8)
def test_caches_of_eight_bits(cache_dtype, generator, device, paged):
    """Scales of keys and values belong to what a cache of 8 bits holds."""
    x = cached_inputs(
        (2, 1, 2, 3, 90, 32, 16), torch.bfloat16, generator, device, cache_dtype, k_scale=0.5, v_scale=3.0
    )
    expected = reference(x)
    wide = replace(x, k=x.k.bfloat16() * 0.5, v=x.v.bfloat16() * 3, k_scale=1.0, v_scale=1.0)
    assert_equal_results(reference(wide), expected, TOLERANCE[torch.bfloat16])
    assert_equal_results(exact_decode(x), expected, TOLERANCE[torch.bfloat16])
    assert_equal_results(exact_decode(paged(x, 16)), expected, TOLERANCE[torch.bfloat16])


def test_parts_of_a_cache_merge_by_their_log_sum_exps(generator, device):
    """Queries that see all keys of both halves: their exact results make that of the whole."""
    x = cached_inputs((1, 2, 3, 1, 400, 16, 16), torch.float32, generator, device)
    halves = [
        exact_decode(replace(x, k=x.k[:, :, part], v=x.v[:, :, part]))
        for part in (slice(150), slice(150, 400))
    ]
    weights = torch.stack([half.log_sum_exp for half in halves]).softmax(0)
    merged = sum(w[..., None] * half.output for w, half in zip(weights, halves, strict=True))
    torch.testing.assert_close(merged, reference(x).output, rtol=1e-4, atol=1e-5)


def test_tokens_without_a_block_are_noticed(generator, device, paged):
    """Rows that would see a block that is not there are NaN; others are as they were."""
    x = paged(cached_inputs((2, 1, 1, 1, 40, 16, 16), torch.float32, generator, device), 8)
    expected = exact_decode(x).output
    table = x.block_table.clone()
    table[1, 2] = 99
    wrong = replace(x, block_table=table)
    actual = exact_decode(wrong)
    assert bool(actual.output[1].isnan().all())
    assert bool(actual.log_sum_exp[1].isnan().all())
    assert torch.equal(actual.output[0], expected[0])
    with pytest.raises(
        ArgumentError, match="block_table names blocks that are not there: it must hold 0 to 12"
    ):
        reference(wrong)
    beyond = replace(x, lengths=torch.tensor([40, 41], device=device))
    assert bool(exact_decode(beyond).output[1].isnan().all())


def test_what_does_not_belong_together_is_refused(generator, device):
    x = cached_inputs((2, 2, 1, 3, 40, 16, 16), torch.float32, generator, device)
    with pytest.raises(ShapeError, match=r"k .* v .* do not belong together"):
        replace(x, k=x.k[:, :, 1:])
    with pytest.raises(ShapeError, match="q has 3 key heads"):
        replace(x, q=x.q[:3])
    with pytest.raises(ShapeError, match=r"q has 4 key heads of 3 rows; .* a multiple of length=2"):
        replace(x, length=2)
    with pytest.raises(ShapeError, match=r"lengths is torch.float32 \(2,\)"):
        replace(x, lengths=torch.ones(2))
    with pytest.raises(ShapeError, match=r"sinks has shape \(2,\)"):
        replace(x, sinks=torch.ones(2))
    with pytest.raises(ArgumentError, match="window=-1"):
        replace(x, window=-1)


@pytest.mark.usefixtures("kernels")
def test_drafts_are_verified_by_the_kernel(monkeypatch, generator, device):
    """`SampledKVCache.attend_exactly` runs it; its rows are those of plain torch."""
    k, v, q = (torch.randn(2, heads, 70, 16, generator=generator).to(device) for heads in (2, 2, 6))
    cache = qtx.SampledKVCache.build(k, v)
    sinks = torch.randn(6, generator=generator).to(device)
    by_kernel = (
        cache.attend_exactly(q[:, :, -4:]),
        cache.attend_exactly(q[:, :, -4:], sinks=sinks, return_log_sum_exp=True),
    )
    launched = []

    def recorded(kernel, *arguments, start=launch.launch, **options):
        launched.append(kernel)
        return start(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "launch", recorded)
    cache.attend_exactly(q[:, :, -4:])
    assert launched == [launch.split_kernel, launch.merge_kernel]
    monkeypatch.setenv("QTX_LAB_KERNELS", "reference")
    torch.testing.assert_close(by_kernel[0], cache.attend_exactly(q[:, :, -4:]), rtol=1e-5, atol=1e-5)
    expected = cache.attend_exactly(q[:, :, -4:], sinks=sinks, return_log_sum_exp=True)
    torch.testing.assert_close(by_kernel[1], expected, rtol=1e-5, atol=1e-5)


def test_pages_as_flashinfer_describes_them(generator, device):
    indptr, indices = torch.tensor([0, 3, 4]), torch.tensor([5, 0, 2, 3])
    table, lengths = block_table_of(indptr, indices, torch.tensor([2, 4]), 4)
    assert lengths.tolist() == [10, 4]
    assert table.tolist() == [[5, 0, 2], [3, 0, 0]]
    pages = torch.randn(6, 4, 2, 16, generator=generator).transpose(1, 2).to(device)  # of the layout "NHD"
    q = torch.randn(4, 1, 16, generator=generator).to(device)
    result = exact_decode(CachedInputs(q, pages, pages, 1, 1.0, lengths.to(device), table.to(device)))
    for i, tokens in enumerate(([5, 0, 2], [3])):
        k = pages[tokens].transpose(0, 1).flatten(1, 2)[:, : lengths[i]]
        expected = F.scaled_dot_product_attention(q[2 * i : 2 * i + 2], k, k, scale=1.0)
        torch.testing.assert_close(result.output[2 * i : 2 * i + 2], expected, rtol=1e-5, atol=1e-5)
