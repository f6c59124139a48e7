"""Decoding from exact logits: the kernels draw the reference's keys, and the draws are unbiased."""

import math
import os
from dataclasses import replace

import pytest
import torch
from scipy import stats

from qtx_lab import ArgumentError, DtypeError, ShapeError
from qtx_lab.kernels.decode import oracle, reference
from qtx_lab.kernels.decode.launch import decode
from qtx_lab.kernels.inputs import Inputs
from qtx_lab.kernels.masses import PAGE, UNITS, Masses, comb_offsets, mass_dtype
from qtx_lab.kernels.prefill import launch as prefill_launch
from qtx_lab.kernels.prefill import reference as prefill_reference
from qtx_lab.problem import AttentionProblem
from qtx_lab.samplers import make_sampler
from qtx_lab.streams import Stream

SOAK = os.environ.get("QTX_LAB_SOAK", "0") not in ("", "0")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def attention_inputs(case, dtype, generator, device, mask=None, exact_logits=False):
    """Inputs of (B, Hkv, G, L, n, E, Ev).

    With `exact_logits` they are small whole numbers, so that logits do not round.
    """
    batch, heads, group, length, n, e, ev = case
    shapes = ((batch, heads * group, length, e), (batch, heads, n, e), (batch, heads, n, ev))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    if exact_logits:
        q, k = (x.round() / 8 for x in (q, k))
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    if mask == "bool":
        mask = torch.rand(batch, heads * group, length, n, generator=generator) < 0.5
        mask[0, 0, 0] = False
    elif mask == "float":
        mask = torch.randn(length, n, generator=generator)
        mask[:, ::3] = -torch.inf
    return Inputs.of(q, k, v, None if mask is None else mask.to(device), 1.0 if exact_logits else None)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


CASES = [
    ((2, 1, 4, 1, 300, 64, 64), torch.bfloat16, 64, 1, None),
    ((1, 2, 2, 2, 131, 100, 40), torch.float16, 33, 3, "bool"),
    ((1, 1, 3, 1, 65, 32, 256), torch.float32, 5, 1, "float"),
    ((1, 1, 1, 1, 1, 256, 32), torch.bfloat16, 7, 1, None),
    ((1, 1, 2, 1, 1100, 16, 16), torch.float32, 300, 1, None),
]
if SOAK:
    CASES += [
        ((1, 2, group, length, n, e, e), dtype, 64, 2, mask)
        for group, length in ((1, 1), (8, 1), (3, 7))
        for n in (2, 63, 64, 1000, 5000)
        for e in (32, 96, 128)
        for dtype in TOLERANCE
        for mask in (None, "bool")
    ]


@pytest.mark.parametrize(("case", "dtype", "draws", "replicates", "mask"), CASES)
def test_draws_and_outputs_are_the_references(
    case, dtype, draws, replicates, mask, generator, device, compare_draws, stream_of
):
    x = attention_inputs(case, dtype, generator, device, mask)
    stream = stream_of(x, 2**62 + 12345)
    result, expected = (run(x, draws, replicates, stream) for run in (decode, reference.decode))
    equal = compare_draws(result.indices, expected.indices)
    assert torch.equal(result.visible, expected.visible)
    assert relative(result.output[equal].to(dtype), expected.output[equal].to(dtype)) <= TOLERANCE[dtype]
    assert bool(result.output.isfinite().all())
    if mask == "bool":
        assert not result.visible[0, 0]
        assert bool((result.parts[0, 0] == 0).all())
        assert int(result.visible.sum()) == result.visible.numel() - 1
    if replicates > 1:
        assert relative(result.std_error[equal], expected.std_error[equal]) <= 1e-4
    else:
        assert result.std_error is None


LIMITS = [
    ((2, 1, 4, 1, 300, 64, 16), torch.bfloat16, {"first_position": 299, "softcap": 2.0}),
    ((1, 2, 3, 3, 200, 32, 40), torch.float32, {"first_position": 190, "window": (70, 0), "softcap": 9.0}),
    ((1, 1, 1, 5, 131, 33, 16), torch.float16, {"first_position": 60, "window": (None, 3)}),
    ((1, 1, 2, 2, 70, 16, 16), torch.float32, {"first_position": 30, "window": (1 << 62, 10)}),
]


@pytest.mark.parametrize(("case", "dtype", "options"), LIMITS)
def test_softcap_and_window_are_the_references_and_the_problems(
    case, dtype, options, generator, device, compare_draws, stream_of
):
    """Keys that no window has are not read: they may be NaN."""
    x = replace(attention_inputs(case, dtype, generator, device), **options)
    q = x.q.view(case[0], case[1] * case[2], case[3], case[5])
    problem = AttentionProblem.of(q, x.k, x.v, enable_gqa=True, **options)
    logits = problem.logits(slice(0, x.shape[0]), slice(0, x.shape[1]))
    torch.testing.assert_close(x.logits() * math.log(2), logits, rtol=1e-5, atol=1e-5)
    stream = stream_of(x, 3)
    expected = reference.decode(x, 40, 2, stream)
    hidden = (logits == -torch.inf).all((0, 1))
    assert bool(hidden.any()) == ("window" in options)
    x.k[:, :, hidden], x.v[:, :, hidden] = torch.nan, torch.nan
    result = decode(x, 40, 2, stream)
    equal = compare_draws(result.indices, expected.indices)
    assert relative(result.output[equal].to(dtype), expected.output[equal].to(dtype)) <= TOLERANCE[dtype]
    torch.testing.assert_close(result.log_sum_exp, logits.logsumexp(-1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"window": (20, 0), "softcap": 3.0}, {"window": (1 << 62, None)}, {"window": (0, 7)}]
)
def test_sequences_of_different_lengths(options, generator, device, compare_draws, stream_of):
    """Each draws what it draws alone, without the keys behind its own, which are not read; one of the rows of
    the sequence of a single token stands before it, and is 0."""
    x = replace(attention_inputs((4, 2, 2, 2, 150, 16, 8), torch.float32, generator, device), **options)
    lengths = [150, 77, 1, 64]
    stream = stream_of(x, 3)
    for b, tokens in enumerate(lengths):
        x.k[b, :, tokens:], x.v[b, :, tokens:] = torch.nan, torch.nan
    x = replace(x, lengths=torch.tensor(lengths, dtype=torch.int32, device=device))
    result = decode(x, 30, 2, stream)
    expected = reference.decode(replace(x, v=x.v.nan_to_num(0)), 30, 2, stream)
    equal = compare_draws(result.indices, expected.indices)
    assert relative(result.output[equal], expected.output[equal]) < 1e-5
    assert result.visible.view(4, 2, 2, 2)[2, 0, 0].tolist() == [False, True]
    assert int(result.visible.sum()) == 4 * 2 * 2 * 2 - 4
    assert bool((result.output[~result.visible] == 0).all())
    left = options.get("window", (None,))[0]
    for b, tokens in enumerate(lengths):
        part = slice(2 * b, 2 * b + 2)
        alone = Inputs(
            x.q[part], x.k[b : b + 1, :, :tokens], x.v[b : b + 1, :, :tokens], None, 2, x.scale,
            tokens - 2, x.softcap, (left, 0),
        )  # fmt: skip
        names = torch.tensor([b])
        drawn = reference.decode(alone, 30, 2, Stream.of(torch.tensor(3, device=device), names, 2, 2))
        assert float((drawn.indices == result.indices[part]).float().mean()) > 0.99
        torch.testing.assert_close(drawn.log_sum_exp, result.log_sum_exp[part], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("run", [decode, reference.decode], ids=["kernel", "reference"])
@pytest.mark.parametrize("window", [(None, 5), (5, 0)])
def test_a_row_whose_window_has_no_key_is_0(run, window, generator, device, stream_of):
    x = attention_inputs((1, 1, 1, 2, 70, 16, 16), torch.float32, generator, device)
    first = -6 if window[1] else 74  # before the first key, or behind the last one: row 0 or row 1 sees one
    result = run(replace(x, first_position=first, window=window), 8, 1, stream_of(x, 3))
    assert result.visible[0].tolist() == ([False, True] if window[1] else [True, False])
    assert bool((result.output[~result.visible] == 0).all())
    assert bool((result.indices[result.visible] == (0 if window[1] else 69)).all())


@pytest.mark.parametrize("run", [decode, reference.decode], ids=["kernel", "reference"])
def test_a_large_softcap_changes_no_logit(run, generator, device, stream_of):
    """The difference of tanh from 1 would have lost all digits of such small quotients."""
    x = attention_inputs((1, 1, 2, 1, 150, 16, 16), torch.float32, generator, device)
    stream = stream_of(x, 3)
    plain, large = (run(replace(x, softcap=cap), 32, 1, stream) for cap in (None, 1e9))
    torch.testing.assert_close(large.log_sum_exp, plain.log_sum_exp, rtol=0, atol=1e-4)
    assert float((large.indices == plain.indices).float().mean()) > 0.9


def test_limits_that_a_kernel_does_not_know_or_nobody_does_are_refused(generator, device, stream_of):
    x = attention_inputs((1, 1, 2, 1, 70, 16, 8), torch.float32, generator, device)
    stream = stream_of(x, 3)
    for prefill in (prefill_launch.prefill, prefill_reference.prefill):
        with pytest.raises(ArgumentError, match=r"softcap=2\.0 is not in this kernel: it must be None"):
            prefill(replace(x, softcap=2.0), 8, stream)
        with pytest.raises(ArgumentError, match=r"window=\(3, None\) is not in this kernel"):
            prefill(replace(x, window=(3, None)), 8, stream)
        with pytest.raises(ArgumentError, match=r"lengths=\(1,\) is not in this kernel"):
            prefill(replace(x, lengths=torch.tensor([3], device=device)), 8, stream)
        with pytest.raises(ArgumentError, match=r"sinks=\(1, 2\) is not in this kernel"):
            prefill(replace(x, sinks=torch.zeros(1, 2, device=device)), 8, stream)
        with pytest.raises(ArgumentError, match=r"block_table=\(1, 1\) is not in this kernel"):
            prefill(replace(x, block_table=torch.zeros(1, 1, dtype=torch.int32, device=device)), 8, stream)
        with pytest.raises(ArgumentError, match=r"v_scale=2\.0 is not in this kernel: it must be 1\.0"):
            prefill(replace(x, v_scale=2.0), 8, stream)
        with pytest.raises(DtypeError, match=r"k is torch\.float8_e5m2"):
            prefill(replace(x, k=x.k.to(torch.float8_e5m2)), 8, stream)
    with pytest.raises(DtypeError, match=r"v is torch\.float64; the kernels take .*float8_e5m2"):
        decode(replace(x, v=x.v.double()), 8, 1, stream)
    with pytest.raises(ShapeError, match=r"sinks has shape \(2,\); it must be \(1, 2\)"):
        replace(x, sinks=torch.zeros(2))
    with pytest.raises(ShapeError, match=r"block_table is torch\.int32 \(2, 3\)"):
        replace(x, block_table=torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ArgumentError, match="first_position=5 is not allowed beside lengths"):
        replace(x, lengths=torch.tensor([3]), first_position=5)
    for lengths in (torch.tensor([3, 4]), torch.tensor([3.0])):
        with pytest.raises(ShapeError, match="it must be int32 or int64"):
            replace(x, lengths=lengths)
    with pytest.raises(ArgumentError, match=r"softcap=-1\.0 is not allowed"):
        replace(x, softcap=-1.0)
    with pytest.raises(ArgumentError, match="window"):
        replace(x, window=(-1, 0))


CACHES = [
    (torch.float32, None, {"window": (40, 0)}, 16),
    (torch.bfloat16, torch.float8_e4m3fn, {"k_scale": 0.5, "v_scale": 3.0}, None),
    (torch.float16, torch.float8_e5m2, {"k_scale": 2.0, "softcap": 3.0}, 7),
]
if SOAK:
    CACHES += [(*case, other) for *case, own in CACHES for other in (None, 7, 16) if other != own]


@pytest.mark.parametrize(("dtype", "cache_dtype", "options", "block_size"), CACHES)
def test_caches_in_blocks_of_eight_bits_and_beside_sinks(
    dtype, cache_dtype, options, block_size, generator, device, compare_draws, stream_of, paged
):
    """They draw what the same tokens side by side do, in 16 bits or more and without sinks."""
    x = attention_inputs((3, 2, 2, 2, 150, 16, 24), dtype, generator, device)
    k, v = (y.to(cache_dtype or dtype) for y in (x.k, x.v))
    sinks = torch.randn(x.q.shape[:2], generator=generator).to(device)
    lengths = torch.tensor([150, 77, 1], device=device)
    stream = stream_of(x, 3)
    limits = {name: y for name, y in options.items() if name in ("window", "softcap")}
    scaled_k, scaled_v = k.float() * options.get("k_scale", 1.0), v.float() * options.get("v_scale", 1.0)
    plain = replace(x, q=x.q.float(), k=scaled_k, v=scaled_v, lengths=lengths, **limits)
    expected = reference.decode(plain, 30, 2, stream)
    x = replace(x, k=k, v=v, lengths=lengths, sinks=sinks, **options)
    x = x if block_size is None else paged(x, block_size)
    result = decode(x, 30, 2, stream)
    share = torch.sigmoid(expected.log_sum_exp - sinks)
    for other in (result, reference.decode(x, 30, 2, stream)):
        equal = compare_draws(other.indices, expected.indices)
        own = other.output[equal]
        assert relative(own, (expected.output * share[..., None])[equal]) <= TOLERANCE[dtype]
        torch.testing.assert_close(
            other.log_sum_exp, torch.logaddexp(expected.log_sum_exp, sinks), rtol=1e-4, atol=2e-3
        )
    assert result.visible.view(3, 2, 2, 2)[2, 0, 0].tolist() == [False, True]


def test_tokens_that_are_not_there_are_noticed(generator, device, stream_of, paged):
    """Rows that see a token without a block, or of a sequence of more tokens than there are, are NaN."""
    x = attention_inputs((2, 1, 2, 1, 150, 16, 16), torch.float32, generator, device)
    stream, x = stream_of(x, 3), paged(x, 8)
    expected = decode(x, 30, 2, stream)
    table = x.block_table.clone()
    table[1, 2] = 99
    for wrong in (
        replace(x, block_table=table),
        replace(x, lengths=x.lengths + torch.tensor([0, 3]).to(device)),
    ):
        result = decode(wrong, 30, 2, stream)
        assert bool(result.output[1].isnan().all())
        assert bool(result.log_sum_exp[1].isnan().all())
        assert torch.equal(result.output[0], expected.output[0])
        assert int(result.indices.min()) >= 0
        assert int(result.indices.max()) < 152
        with pytest.raises(ArgumentError, match=r"block_table names blocks|lengths=.* there are 152"):
            reference.decode(wrong, 30, 2, stream)


@pytest.mark.parametrize("draws", [256, 4200])
def test_logits_without_rounding_give_equal_draws(draws, generator, device, compare_draws, stream_of):
    """The logits are whole eighths, so no draw may differ; the masses of 4,200 draws have 32 bits."""
    x = attention_inputs((1, 1, 1, 1, 300, 32, 32), torch.bfloat16, generator, device, exact_logits=True)
    stream = stream_of(x, 5)
    compare_draws(decode(x, draws, 1, stream).indices, reference.decode(x, draws, 1, stream).indices)


@pytest.mark.parametrize("mask", [None, "float"])
def test_draws_are_the_oracles(mask, generator, device, stream_of):
    """But for the few points that the rounding of masses moves across the border of a key."""
    x = attention_inputs((2, 2, 2, 3, 200, 16, 8), torch.float32, generator, device, mask)
    stream, draws, replicates = stream_of(x, 9), 50, 2
    result = reference.decode(x, draws, replicates, stream)
    offsets = comb_offsets(stream, replicates, x.shape[1])
    values = x.v.flatten(0, 1)
    for r in range(replicates):
        indices, output = oracle.decode(x.logits() * math.log(2), values, offsets[..., r], draws)
        equal = result.indices[..., r * draws : (r + 1) * draws] == indices
        assert float(equal.float().mean()) > 0.99
        same_rows = equal.all(-1)
        assert relative(result.parts[:, :, r][same_rows], output[same_rows]) < 1e-5


def test_draws_do_not_depend_on_how_keys_lie_in_memory(generator, device, stream_of):
    """Keys and values side by side in a cache with room to grow, which holds NaN; and transposed."""
    x = attention_inputs((2, 2, 1, 1, 150, 32, 32), torch.float32, generator, device)
    room = torch.full((2, 2, 400, 64), torch.nan, device=device)
    room[:, :, :150, :32], room[:, :, :150, 32:] = x.k, x.v
    spread = Inputs(x.q, room[:, :, :150, :32], room[:, :, :150, 32:], None, 1, x.scale)
    transposed_k = x.k.transpose(1, 2).contiguous().transpose(1, 2)
    transposed = Inputs(x.q, transposed_k, x.v.mT.contiguous().mT, None, 1, x.scale)
    stream = stream_of(x, 1)
    expected = decode(x, 32, 1, stream)
    for other in (spread, transposed):
        result = decode(other, 32, 1, stream)
        assert torch.equal(result.indices, expected.indices)
        torch.testing.assert_close(result.parts, expected.parts)


def test_heads_positions_replicates_and_seeds_draw_independently_and_groups_share(stream_of):
    q, k = torch.zeros(1, 4, 2, 16), torch.zeros(1, 2, 50_000, 16)
    x = Inputs.of(q, k, k)  # all keys have the same weight, so that a draw shows the offset
    first, repeated, other = (
        reference.decode(x, 1, 2, stream_of(x, seed)).indices.view(2, 2, 2, 2) for seed in (1, 1, 2)
    )
    assert torch.equal(first, repeated)
    assert torch.equal(first[:, 0], first[:, 1])  # the heads of a group
    numbers = torch.cat((first[:, 0].flatten(), other[:, 0].flatten()))  # heads, positions, replicates, seeds
    assert numbers.unique().numel() == numbers.numel() == 16


@pytest.mark.parametrize("run", [decode, reference.decode], ids=["kernel", "reference"])
def test_a_row_draws_the_same_alone_and_in_a_batch_under_its_sequences_name(run, generator, device):
    """Sequences 3 and 8 side by side, and the last query of sequence 8 alone at its position."""
    x = attention_inputs((2, 2, 2, 3, 100, 16, 8), torch.float32, generator, device)
    stream = Stream.of(torch.tensor(5, device=device), torch.tensor([3, 8]), 2, 3, first_position=40)
    together = run(x, 20, 2, stream).indices.view(2, 2, 2, 3, 40)
    q = x.q.view(2, 2, 2, 3, 16)[1:, :, :, 2:].reshape(2, 2, 16)
    alone = Inputs(q, x.k[1:], x.v[1:], None, 1, x.scale)
    stream = Stream.of(torch.tensor(5, device=device), torch.tensor([8]), 2, 1, first_position=42)
    assert torch.equal(run(alone, 20, 2, stream).indices.view(2, 2, 40), together[1, :, :, 2])
    last = run(alone, 20, 1, replace(stream, first_replicate=1))
    assert torch.equal(last.indices.view(2, 2, 20), together[1, :, :, 2, 20:])


def test_rows_of_different_positions_may_stand_together(generator, device, compare_draws):
    """A batch of sequences that are decoded at positions of their own."""
    x = attention_inputs((2, 1, 2, 1, 70, 16, 8), torch.float32, generator, device)
    stream = Stream.of(torch.tensor(5, device=device), 2, 1, 1)
    stream = stream.of_block(slice(None), torch.tensor([[7], [69]], device=device))
    indices = decode(x, 10, 1, stream).indices
    compare_draws(indices, reference.decode(x, 10, 1, stream).indices)
    first = stream.of_block(slice(None), torch.tensor([7], device=device))
    assert torch.equal(decode(x, 10, 1, first).indices[0], indices[0])


def test_a_stream_that_does_not_fit_is_refused(generator, device):
    x = attention_inputs((2, 1, 1, 1, 70, 16, 8), torch.float32, generator, device)
    with pytest.raises(ShapeError, match="stream has 1 heads and 1 positions; q has 2 and 1"):
        decode(x, 10, 1, Stream.of(torch.tensor(5, device=device), 1, 1, 1))


@pytest.mark.statistical
@pytest.mark.parametrize("planted", [0.0, 0.02])
@pytest.mark.parametrize("peak", [1.0, 4.0])
def test_unbiased(peak, planted, seed):
    """Hotelling's T^2 over 100,000 rows: false alarms once in 10^6; probabilities off by 2 % are caught."""
    n, repetitions, draws = 24, 100_000, 12
    g = torch.Generator().manual_seed(seed)
    logits = peak * torch.randn(n, generator=g)
    logits = logits.clamp_min(logits.max() - 9)  # every key is drawn often enough to be Gaussian
    logits[7] = -torch.inf
    p = (logits * math.log(2)).softmax(-1).double()
    sign = torch.tensor([1.0, -1.0]).repeat(n // 2)
    rows = (logits + (1 + planted * sign).log2()).expand(
        repetitions, 1, n
    )  # a head for each repetition, which draws independently
    counts = counts_of(rows, draws, seed)
    assert bool((counts[:, 7] == 0).all())
    free = p.nonzero().squeeze(1)[:-1]
    difference = counts.double().mean(0)[free] / draws - p[free]
    covariance = (counts[:, free].double() / draws).T.cov() / repetitions + 1e-14 * torch.eye(len(free))
    value = difference @ torch.linalg.solve(covariance, difference)
    p_value = stats.chi2.sf(value.item(), len(free))
    assert (p_value < 1e-6) == (planted > 0), p_value


def counts_of(rows, draws, seed):
    """How often the reference draws each key of base-2 logits (N, 1, n); the kernels draw the same."""

    class GivenLogits(Inputs):
        def logits(self):
            return part

    counts = []
    for i, part in enumerate(rows.split(20_000)):
        heads, _, n = part.shape
        unused = torch.zeros(1, heads, n, 1)
        x = GivenLogits(torch.zeros(heads, 1, 1), unused, unused, None, 1, 1.0)
        indices = reference.decode(x, draws, 1, Stream.of(seed + i, 1, heads, 1)).indices[:, 0]
        counts.append(torch.zeros(heads, n).scatter_add_(1, indices, torch.ones(indices.shape)))
    return torch.cat(counts)


@pytest.mark.statistical
def test_masses_are_rounded_without_bias(seed):
    """The mean of each mass over 20,000 heads is within 6 standard errors of the exact mass."""
    logits = -torch.linspace(0, 30, 50).expand(20_000, 1, 50)
    mass = Masses.of(logits, Stream.of(seed, 1, 20_000, 1), torch.int16).mass[:, 0, 0, :50].double()
    exact = torch.exp2(logits[0, 0].double()) * UNITS[torch.int16]
    spread = (exact.frac() * (1 - exact.frac()) / 20_000).sqrt()
    assert bool(((mass.mean(0) - exact).abs() < 6 * spread + 1e-2).all())
    assert bool(((mass - exact).abs() < 1.01).all())


@pytest.mark.statistical
def test_no_noisier_than_systematic_sampling_by_float64(seed):
    """The mean squared error of 64 draws from 200 keys is at most 1.1 times the sampler's (2,000 rows)."""
    g = torch.Generator().manual_seed(seed)
    logits, values = 2 * torch.randn(2000, 200, generator=g), torch.randn(200, 8, generator=g)
    exact = logits.double().softmax(-1) @ values.double()
    by_kernel = counts_of((logits / math.log(2))[:, None], 64, seed).double() / 64 @ values.double()
    sampled = make_sampler("systematic").draw(logits, 64, generator=g).dense(200).double() @ values.double()
    kernel, sampler = ((o - exact).square().mean() for o in (by_kernel, sampled))
    assert kernel <= 1.1 * sampler


def test_masses_of_up_to_4096_draws_have_16_bits():
    assert mass_dtype(4096) == torch.int16
    assert mass_dtype(4097) == torch.int32
    assert PAGE * 65535 < 2**31
