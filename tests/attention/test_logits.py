"""Sinks, softcap, bias, window and lower-right causality, against a naive softmax; `log_sum_exp`."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import qtx_lab as qtx
from qtx_lab import problem
from qtx_lab.attention.dispatch import attend
from qtx_lab.attention.settings import AttentionSettings
from qtx_lab.problem import AttentionProblem
from qtx_lab.samplers import SAMPLERS, SantaSampler, TopKSampler, VAttentionSampler

H, KV, L, N, E = 4, 2, 6, 9, 8


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(seed=0, dtype=torch.float64):
    g = generator(seed)
    shapes = [(2, H, L, E), (2, KV, N, E), (2, KV, N, 5)]
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]


def sinks_of(seed=1, dtype=torch.float64):
    return torch.randn(H, generator=generator(seed), dtype=dtype) + 1


def bias_of(seed=2, dtype=torch.float64):
    bias = torch.randn(H, L, N, generator=generator(seed), dtype=dtype)
    return bias.masked_fill(torch.rand(H, L, N, generator=generator(seed + 1)) < 0.2, -torch.inf)


def logits_of(q, k, *, softcap=None, window=None, attn_mask=None, is_causal=False, first_position=0):
    """All logits of grouped heads, (..., H, L, n), in float64, step by step."""
    k = k.double().repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    logits = q.double() @ k.mT / math.sqrt(q.shape[-1])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if attn_mask is not None:
        attn_mask = torch.where(attn_mask, 0, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask
        logits = logits + attn_mask
    distance = torch.arange(k.shape[-2]) - (torch.arange(q.shape[-2])[:, None] + first_position)
    left, right = (None, None) if window is None else window
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    hidden |= distance > (0 if is_causal else math.inf if right is None else right)
    hidden |= distance < -(math.inf if left is None else left)
    return logits.masked_fill(hidden, -torch.inf)


def naive(q, k, v, sinks=None, **options):
    """The output and the log-sum-exp in float64, with the sink as one more key without a value."""
    logits = logits_of(q, k, **options)
    sinks = torch.tensor(-torch.inf) if sinks is None else sinks.double()[..., None, None]
    logits = torch.cat((logits, sinks.expand(*logits.shape[:-1], 1)), -1)
    values = v.double().repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    return logits.softmax(-1).nan_to_num(0)[..., :-1] @ values, logits.logsumexp(-1)


CASES = {
    "sinks": {"sinks": sinks_of()},
    "softcap": {"softcap": 0.7},
    "window": {"window": (2, 1)},
    "window on one side": {"window": (None, 1)},
    "causal window": {"window": (2, None), "is_causal": True},
    "bias": {"attn_mask": bias_of()},
    "causal sinks": {"sinks": sinks_of(), "is_causal": True},
    "all": {"sinks": sinks_of(), "softcap": 0.7, "attn_mask": bias_of(), "window": (3, 4)},
}
NAMES = sorted(SAMPLERS)
UNBIASED = {name for name in NAMES if qtx.make_sampler(name).unbiased} - {"learned"}  # self-normalised


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_exact_is_the_naive_softmax(case, monkeypatch):
    monkeypatch.setattr(problem, "BLOCK_ELEMENTS", 40)  # several blocks, cut in the middle of a head
    q, k, v = tensors()
    est = qtx.sampled_attention(q, k, v, sampler="exact", enable_gqa=True, **CASES[case])
    output, log_sum_exp = naive(q, k, v, **CASES[case])
    assert torch.allclose(est.output, output, atol=1e-12)
    assert torch.allclose(est.log_sum_exp, log_sum_exp, atol=1e-12)
    values = v.repeat_interleave(H // KV, -3)
    assert torch.allclose(est.attention_weights() @ values, output, atol=1e-12)
    assert est.info.log_sum_exp == "exact"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_every_sampler_has_the_naive_softmax_as_its_limit(case, name, monkeypatch):
    monkeypatch.setattr(problem, "BLOCK_ELEMENTS", 1 << 18)
    q, k, v = tensors()
    est = qtx.sampled_attention(
        q, k, v, sampler=name, num_samples=512, replicates=4, enable_gqa=True, generator=generator(),
        **CASES[case],
    )  # fmt: skip
    output, log_sum_exp = naive(q, k, v, **CASES[case])
    assert relative(est.output, output) < 0.08
    assert bool(((est.output - output).abs() <= 8 * est.std_error + 1e-3).all())
    assert est.log_sum_exp.shape == q.shape[:-1]
    assert est.info.log_sum_exp == ("estimated" if name == "learned" else "exact")
    assert torch.allclose(est.log_sum_exp, log_sum_exp, atol=0.05 if name == "learned" else 1e-9)
    values = v.repeat_interleave(H // KV, -3)
    assert torch.allclose(est.attention_weights() @ values, est.output, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"learned"}))
def test_a_sink_scales_everything_that_is_made_of_the_keys(name):
    q, k, v = tensors()
    sinks, options = sinks_of(), {"sampler": name, "num_samples": 16, "replicates": 3, "enable_gqa": True}
    alone = qtx.sampled_attention(q, k, v, generator=generator(), **options)
    est = qtx.sampled_attention(q, k, v, sinks=sinks, generator=generator(), **options)
    mass = torch.sigmoid(alone.log_sum_exp - sinks[:, None])[..., None]
    assert torch.equal(est.draws.indices, alone.draws.indices)
    for part in ("output", "std_error"):
        assert torch.allclose(getattr(est, part), mass * getattr(alone, part), atol=1e-12)
    assert torch.allclose(est.attention_weights(), mass * alone.attention_weights(), atol=1e-12)
    assert torch.allclose(est.draws.probabilities, mass * alone.draws.probabilities, atol=1e-12)
    assert torch.allclose(
        est.log_sum_exp, torch.logaddexp(alone.log_sum_exp, sinks[:, None].expand(2, H, L)), atol=1e-12
    )


@pytest.mark.statistical
@pytest.mark.parametrize("name", sorted(UNBIASED - {"exact"}))
@pytest.mark.parametrize("case", ["causal sinks", "all"])
def test_unbiased_with_honest_error_bars(case, name):
    """|z| of the mean over 400 runs stays below 5 in each of 240 coordinates: false alarms 1e-4."""
    q, k, v = tensors()
    options = {"sampler": name, "num_samples": 5, "replicates": 400, "enable_gqa": True}
    est = qtx.sampled_attention(q, k, v, generator=generator(4), **options, **CASES[case])
    output, _ = naive(q, k, v, **CASES[case])
    assert bool(((est.output - output).abs() <= 5 * est.std_error + 1e-9).all())
    # ... and the error bars are not too wide for a bias to be seen.
    assert float((est.output - output).std() / est.std_error.square().mean().sqrt()) > 0.3


@pytest.mark.parametrize("name", ["exact", "systematic", "head-tail", "learned"])
def test_a_row_without_keys_leaves_all_to_its_sink(name):
    q, k, v = tensors(dtype=torch.float32)
    mask = torch.ones(L, N, dtype=torch.bool)
    mask[2] = False
    sinks = torch.tensor([0.5, -torch.inf, -2.0, 30.0])
    est = qtx.sampled_attention(
        q, k, v, sampler=name, num_samples=8, replicates=2, attn_mask=mask, sinks=sinks, enable_gqa=True
    )
    for part in (est.output, est.std_error, est.attention_weights()):
        assert part[:, :, 2].eq(0).all()
        assert part.isfinite().all()
    assert torch.equal(est.log_sum_exp[:, :, 2], sinks.expand(2, H))
    # A sink of -inf is none.
    alone = qtx.sampled_attention(
        q, k, v, sampler="exact", attn_mask=mask, enable_gqa=True, softcap=1e4, window=N
    )
    if name == "exact":
        assert torch.allclose(est.output[:, 1], alone.output[:, 1], atol=1e-5)


@pytest.mark.parametrize("name", ["systematic", "head-tail", "monte-carlo"])
def test_tolerance_is_kept_with_sinks_as_without(name):
    q, k, v = (torch.randn(shape, generator=generator()) for shape in [(4, 8, 16), (4, 500, 16), (4, 500, 8)])
    sinks = torch.tensor([-1.0, 3.0, 6.0, 9.0])
    alone, est = (
        qtx.sampled_attention(q, k, v + 1, sampler=name, tolerance=0.1, generator=generator(), sinks=x)
        for x in (None, sinks)
    )
    output, log_sum_exp = naive(q, k, v + 1, sinks)
    error = (est.output - output).norm(dim=-1) / output.norm(dim=-1)
    assert float((error > 0.1).float().mean()) <= 0.15
    assert torch.equal(est.info.draws_per_row, alone.info.draws_per_row)
    assert torch.allclose(est.log_sum_exp, log_sum_exp.float(), atol=1e-5)


@pytest.mark.parametrize("control", ["topk", "linformer", "performer"])
def test_controls_correct_the_keys_and_the_sink_takes_its_share(control):
    q, k, v = tensors()
    options = {"num_samples": 64, "replicates": 4, "enable_gqa": True, "control_variate": control}
    for name in ("systematic", "monte-carlo"):
        est = qtx.sampled_attention(q, k, v, sampler=name, sinks=sinks_of(), generator=generator(), **options)
        output, _ = naive(q, k, v, sinks_of())
        assert bool(((est.output - output).abs() <= 8 * est.std_error + 1e-3).all())
    for unknown in ({"softcap": 1.0}, {"window": 2}, {"attn_mask": bias_of()}):
        with pytest.raises(
            qtx.ArgumentError, match=f"control_variate is not allowed with {next(iter(unknown))}"
        ):
            qtx.sampled_attention(q, k, v, **options, **unknown)


def merged(*parts):
    """Attention over all keys from estimates over some of them each, and the error bars of that."""
    total = torch.stack([part.log_sum_exp for part in parts]).logsumexp(0)
    shares = [(part.log_sum_exp - total).exp()[..., None] for part in parts]
    output = sum(share * part.output for share, part in zip(shares, parts, strict=True))
    variance = sum((share * part.std_error).square() for share, part in zip(shares, parts, strict=True))
    return output, variance.sqrt(), total


@pytest.mark.parametrize("name", NAMES)
def test_halves_of_the_keys_are_merged_by_their_log_sum_exp(name):
    q, k, v = tensors(dtype=torch.float32)
    options = {"sampler": name, "num_samples": 256, "replicates": 8, "enable_gqa": True, "softcap": 2.0}
    half = N // 2
    parts = [
        qtx.sampled_attention(
            q, k[..., keys, :], v[..., keys, :], sinks=sinks, generator=generator(), **options
        )
        for keys, sinks in ((slice(0, half), sinks_of()), (slice(half, N), None))
    ]
    output, std_error, log_sum_exp = merged(*parts)
    expected, whole = naive(q, k, v, sinks_of(), softcap=2.0)
    assert bool(((output - expected).abs() <= 6 * std_error + (1e-5 if name == "exact" else 2e-3)).all())
    assert torch.allclose(log_sum_exp.double(), whole, atol=0.05 if name == "learned" else 1e-5)


def test_log_sum_exp_of_rows_without_keys_is_minus_infinity():
    q, k, v = tensors()
    mask = torch.ones(L, N, dtype=torch.bool)
    mask[2] = False
    for name in NAMES:
        est = qtx.sampled_attention(
            q, k, v, sampler=name, num_samples=8, attn_mask=mask, enable_gqa=True, generator=generator()
        )
        assert est.log_sum_exp[:, :, 2].eq(-torch.inf).all()
        assert est.log_sum_exp[:, :, 1].isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_exact_gradients(case):
    q, k, v = (x[:1, :, :4].requires_grad_() for x in tensors())
    options = dict(CASES[case])
    for name in ("sinks", "attn_mask"):
        if name in options:
            options[name] = options[name][..., :4, :4] if name == "attn_mask" else options[name]
            options[name] = options[name].clone().requires_grad_()
    trained = [x for x in (q, k, v, options.get("sinks"), options.get("attn_mask")) if x is not None]
    est = qtx.sampled_attention(q, k, v, sampler="exact", enable_gqa=True, **options)
    output, log_sum_exp = naive(q, k, v, **options)
    g = torch.randn(output.shape, generator=generator(5), dtype=torch.float64)
    seen = log_sum_exp.isfinite()
    for a, b in ((est.output * g, output * g), (est.log_sum_exp[seen], log_sum_exp[seen])):
        grads, expected = (
            torch.autograd.grad(x.sum(), trained, retain_graph=True, allow_unused=True) for x in (a, b)
        )
        for x, y in zip(grads, expected, strict=True):
            if x is not None or y is not None:
                assert torch.allclose(x, y.nan_to_num(0), atol=1e-12)


@pytest.mark.parametrize("name", ["exact", "systematic"])
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
@pytest.mark.parametrize(("length", "keys"), [(3, 10), (10, 3), (5, 5), (1, 7)])
def test_a_causal_bias_is_what_sdpa_makes_of_it(length, keys, name):
    q = torch.randn(2, 2, length, 8, generator=generator())
    k, v = (torch.randn(2, 2, keys, 8, generator=generator(seed)) for seed in (1, 2))
    for make in (causal_lower_right, causal_upper_left):
        bias = make(length, keys)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias._materialize("cpu")).nan_to_num(0)
        est = qtx.sampled_attention(
            q, k, v, sampler=name, num_samples=4096, attn_mask=bias, generator=generator()
        )
        assert relative(est.output, expected) < (1e-6 if name == "exact" else 1e-2)
        if length <= keys and name == "exact":
            assert torch.allclose(
                est.output, F.scaled_dot_product_attention(q, k, v, attn_mask=bias), atol=1e-6
            )
    with pytest.raises(qtx.ShapeError, match="attn_mask is a CausalBias for 4 queries"):
        qtx.sampled_attention(q, k, v, attn_mask=causal_lower_right(4, keys + 1))
    with pytest.raises(qtx.ArgumentError, match="excludes is_causal"):
        qtx.sampled_attention(q, k, v, attn_mask=bias, is_causal=True)


@pytest.mark.parametrize("window", [0, 2, (1, 0), (0, None), (None, 2), (50, 50)])
def test_a_window_is_the_mask_of_its_band(window):
    q, k, v = tensors()
    left, right = window if isinstance(window, tuple) else (window, window)
    distance = torch.arange(N) - torch.arange(L)[:, None]
    band = (distance >= -(N if left is None else left)) & (distance <= (N if right is None else right))
    for name in NAMES:
        options = {"sampler": name, "num_samples": 8, "replicates": 2, "enable_gqa": True}
        a, b = (
            qtx.sampled_attention(q, k, v, generator=generator(), **options, **hidden)
            for hidden in ({"window": window}, {"attn_mask": band})
        )
        assert a.attention_weights()[..., ~band].eq(0).all()
        if name not in ("head-tail", "sobol", "halton", "lattice", "learned"):  # by other orders, other maps
            assert torch.equal(a.draws.indices, b.draws.indices)
            assert torch.allclose(a.output, b.output, atol=1e-12)


def test_a_causal_window_draws_alike_in_prefill_and_decoding():
    q, k, v = (torch.randn(shape, generator=generator()) for shape in [(2, 300, 8), (2, 300, 8), (2, 300, 4)])
    for name in ("systematic", "head-tail", "monte-carlo"):
        settings = AttentionSettings.of(name, 16)
        whole = AttentionProblem.of(q, k, v, is_causal=True, window=(90, 0), sinks=torch.zeros(2))
        last = AttentionProblem.of(
            q[:, -1:], k, v, is_causal=True, window=(90, 0), sinks=torch.zeros(2), first_position=299
        )
        a, b = (attend(x, settings, generator()) for x in (whole, last))
        assert torch.equal(a.draws.indices[:, -1:], b.draws.indices)
        assert bool((b.draws.indices >= 299 - 90).all())


def test_a_window_beyond_all_numbers_hides_nothing():
    q, k, v = tensors()
    whole = qtx.sampled_attention(q, k, v, sampler="exact", enable_gqa=True).output
    for window in (1 << 63, 10**30, (None, (1 << 63) - 1)):
        est = qtx.sampled_attention(q, k, v, sampler="exact", enable_gqa=True, window=window)
        assert torch.allclose(est.output, whole, atol=1e-12)


@pytest.mark.parametrize("window", [0, 2, (1, 0), (None, 1)])
def test_a_window_is_about_the_positions_of_a_lower_right_bias_with_more_queries_than_keys(window):
    q, k, v = tensors()
    left = window if isinstance(window, int) else window[0]
    for keys in (2, 5, N):
        key, position = torch.arange(keys), torch.arange(L)[:, None] + keys - L
        band = (key <= position) & (key >= position - (N if left is None else left))
        outputs = [
            qtx.sampled_attention(
                q, k[:, :, :keys], v[:, :, :keys], sampler="exact", enable_gqa=True, **hidden
            ).output
            for hidden in ({"attn_mask": causal_lower_right(L, keys), "window": window}, {"attn_mask": band})
        ]
        assert torch.allclose(*outputs, atol=1e-12)


@pytest.mark.parametrize("name", ["systematic", "monte-carlo", "head-tail", "learned"])
@pytest.mark.parametrize("how", ["bool", "float", "window"])
def test_values_that_no_row_sees_change_no_error_bar(name, how):
    q, k, v = tensors(dtype=torch.float32)
    mask = torch.ones(N, dtype=torch.bool)
    mask[-1:] = False
    hidden = {
        "bool": {"attn_mask": mask},
        "float": {"attn_mask": torch.zeros(N).masked_fill(~mask, -torch.inf)},
        "window": {"window": (None, N - 1 - L)},
    }[how]
    estimates = []
    for size in (1.0, 1e30):
        values = v.clone()
        values[:, :, -1] *= size
        estimates.append(
            qtx.sampled_attention(
                q, k, values, sampler=name, num_samples=4, replicates=3, enable_gqa=True,
                generator=generator(), **hidden,
            )
        )  # fmt: skip
    a, b = estimates
    assert torch.allclose(a.output, b.output, rtol=1e-5, atol=1e-6)
    assert torch.allclose(a.std_error, b.std_error, rtol=1e-4)
    assert torch.allclose(a.reliability, b.reliability, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": [1.0, 2.0]}, "sinks is list"),
        ({"sinks": torch.zeros(3)}, r"sinks has shape \(3,\); it must broadcast to \(2, 4\)"),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, "sinks is torch.int64"),
        ({"sinks": torch.full((4,), torch.nan)}, "sinks holds NaN"),
        ({"sinks": torch.full((4,), torch.inf)}, "sinks holds NaN, .inf"),
        ({"softcap": 0}, "softcap=0 is not allowed: it must be above 0"),
        ({"softcap": -1.0}, "softcap=-1.0 is not allowed"),
        ({"softcap": math.nan}, "softcap=nan is not allowed: it must be a finite number"),
        ({"softcap": True}, "softcap=True is not allowed: it must be a number"),
        ({"softcap": 1e300}, "softcap=1e.300 is not allowed: it must be from 1e-30 to 1e30"),
        ({"softcap": 1e-310}, "softcap=1e-310 is not allowed: it must be from 1e-30 to 1e30"),
        ({"softcap": 10**400}, "is not allowed: it must be a finite number"),
        ({"softcap": torch.ones(2)}, "is not allowed: it must be a single number"),
        ({"softcap": torch.ones((), requires_grad=True)}, "softcap requires a gradient, which is not given"),
        ({"scale": torch.ones((), requires_grad=True)}, "scale requires a gradient, which is not given"),
        ({"scale": np.ones(2)}, "scale=.* is not allowed: it must be a single number"),
        ({"window": -1}, "window=-1 is not allowed"),
        ({"window": (2, -1)}, "is not allowed: it must be a whole number >= 0"),
        ({"window": 1.5}, "window=1.5 is not allowed"),
        ({"window": True}, "window=True is not allowed"),
        ({"window": (1, 2, 3)}, "is not allowed"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(options, message):
    q, k, v = tensors()
    with pytest.raises(qtx.QtxError, match=message):
        qtx.sampled_attention(q, k, v, enable_gqa=True, **options)


@pytest.mark.parametrize("case", CASES)
def test_baselines_have_the_naive_softmax_as_their_limit(case):
    q, k, v = tensors()
    output, log_sum_exp = naive(q, k, v, **CASES[case])
    baselines = [(TopKSampler(), N), (VAttentionSampler(), N), (SantaSampler(), 4096)]
    baselines += [(SantaSampler("fixed", "stratified"), 4096)]
    for sampler, draws in baselines:
        est = qtx.sampled_attention(
            q, k, v, sampler=sampler, num_samples=draws, enable_gqa=True, generator=generator(), **CASES[case]
        )
        assert relative(est.output, output) < (1e-12 if draws == N else 1e-2)
        assert torch.allclose(est.log_sum_exp, log_sum_exp, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_tolerance_is_kept_whatever_shapes_the_logits(case):
    g = generator()
    q, k, v = (torch.randn(shape, generator=g) for shape in [(4, 30, 16), (2, 200, 16), (2, 200, 8)])
    options = {name: x.float() if name == "sinks" else x for name, x in CASES[case].items()}
    if "attn_mask" in options:
        options["attn_mask"] = torch.randn(4, 30, 200, generator=g)
    if "window" in options:
        options["window"] = tuple(None if x is None else 20 * x for x in options["window"])
    output, log_sum_exp = naive(q, k, v + 1, **options)
    for name in ("systematic", "head-tail"):
        est = qtx.sampled_attention(
            q, k, v + 1, sampler=name, tolerance=0.1, enable_gqa=True, generator=g, **options
        )
        error = (est.output - output).norm(dim=-1) / output.norm(dim=-1)
        assert float((error > 0.1).float().mean()) <= 0.05
        assert torch.allclose(est.log_sum_exp, log_sum_exp.float(), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exact_causal_rows_are_numbers_at_any_scale(scale, dtype):
    q, k, v = (x[0, :1, :L].to(dtype).requires_grad_() for x in tensors())
    est = qtx.sampled_attention(q, k, v, sampler="exact", is_causal=True, scale=scale)
    hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
    p = (scale * q.double() @ k.double().mT).masked_fill(hidden, -torch.inf).softmax(-1)
    tolerances = {"atol": 2e-3, "rtol": 2e-3} if dtype == torch.float16 else {}
    torch.testing.assert_close(est.output, (p @ v.double()).to(dtype), **tolerances)
    ours = torch.autograd.grad(est.output.double().square().sum(), (q, k, v))
    naive = torch.autograd.grad((p @ v.double()).square().sum(), (q, k, v))
    torch.testing.assert_close(ours, naive, atol=1e-2 if tolerances else 1e-4, rtol=1e-2)
