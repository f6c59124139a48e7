"""`gpu_quantum_attention`, how calls become launches of kernels, and which path is taken and why."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import qtx_lab as qtx
from qtx_lab.attention import kernel_paths
from qtx_lab.kernels import choice
from qtx_lab.kernels.choice import choose, device_obstacle
from qtx_lab.problem import AttentionProblem
from qtx_lab.samplers import Budget

BOTH = pytest.mark.parametrize("path", ["triton", "reference"])


def heads(generator, device, group=2, length=1, n=150, dtype=torch.float32):
    shapes = ((1, 2 * group, length, 16), (1, 2, n, 16), (1, 2, n, 16))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def test_the_call_of_the_founding_document_runs(generator, device):
    Q, K, V = (torch.randn(2, 4, 32, 16, generator=generator).to(device) for _ in range(3))
    gpu_output = qtx.gpu_quantum_attention(Q, K, V, num_samples=64)
    assert isinstance(gpu_output, torch.Tensor)
    assert gpu_output.shape == Q.shape
    est = qtx.gpu_quantum_attention(Q, K, V, num_samples=64, return_estimate=True)
    assert est.info.kernel.path == ("triton" if device.type == "cuda" else "reference")
    assert est.info.kernel.reason.startswith("the tensors are on")


@BOTH
@pytest.mark.parametrize(
    ("length", "causal", "name"), [(2, False, "decode"), (60, False, "prefill"), (60, True, "prefill")]
)
def test_estimates_hold_together(path, length, causal, name, generator, device, monkeypatch):
    monkeypatch.setenv("QTX_LAB_KERNELS", path)
    q, k, v = heads(generator, device, length=length, n=70)
    options = {
        "enable_gqa": True,
        "is_causal": causal,
        "replicates": 8,
        "num_samples": 16,
        "return_estimate": True,
    }
    est, repeated = (
        qtx.gpu_quantum_attention(q, k, v, generator=torch.Generator().manual_seed(4), **options)
        for _ in range(2)
    )
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert est.diagnostics["kernel"]["path"] == path
    assert est.diagnostics["kernel"]["name"] == name
    assert torch.equal(est.output, repeated.output)
    assert est.std_error.shape == est.output.shape == exact.shape
    low, high = est.confidence_interval(0.999)
    assert ((low - 1e-4 <= exact) & (exact <= high + 1e-4)).float().mean() > 0.98
    drawn = est.draws.average(v.repeat_interleave(2, 1))
    torch.testing.assert_close(drawn, est.output, rtol=1e-4, atol=1e-5)
    assert float((est.attention_weights().sum(-1) - 1).abs().max()) < 1e-4


@BOTH
@pytest.mark.parametrize("length", [2, 40])
def test_rows_draw_the_same_alone_and_in_a_batch(path, length, device, generator, monkeypatch):
    """The first queries of the first heads of the first sequence, by `decode` and by `prefill`."""
    monkeypatch.setenv("QTX_LAB_KERNELS", path)
    shapes = ((2, 4, length, 16), (2, 2, 70, 16), (2, 2, 70, 16))
    q, k, v = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    together, alone = (
        qtx.gpu_quantum_attention(
            q[:batch, :heads, :rows],
            k[:batch, : heads // 2],
            v[:batch, : heads // 2],
            num_samples=16,
            enable_gqa=True,
            generator=torch.Generator().manual_seed(4),
        )
        for batch, heads, rows in ((2, 4, length), (1, 2, length - 1 if length == 2 else 33))
    )
    torch.testing.assert_close(together[:1, :2, : alone.shape[2]], alone)


@BOTH
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_fully_masked_rows_are_zero_and_nothing_is_nan(path, name, generator, device, monkeypatch):
    monkeypatch.setenv("QTX_LAB_KERNELS", path)
    q, k, v = heads(generator, device, length=3 if name == "decode" else 40, n=10)
    mask = torch.ones(q.shape[-2], 10, dtype=torch.bool, device=device)
    mask[1] = False
    est = qtx.gpu_quantum_attention(
        q, k, v, attn_mask=mask, enable_gqa=True, replicates=2, return_estimate=True
    )
    assert bool((est.output[:, :, 1] == 0).all())
    assert bool((est.std_error[:, :, 1] == 0).all())
    assert bool(est.output.isfinite().all())
    assert bool((est.draws.weights[:, :, 1] == 0).all())


@BOTH
def test_gradients_flow_and_are_those_of_the_formulae(path, generator, device, monkeypatch):
    """With hardly any noise left (draws many times the keys) they are SDPA's."""
    monkeypatch.setenv("QTX_LAB_KERNELS", path)
    inputs = heads(generator, device, length=20, n=20)
    mine, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    upstream = torch.randn(1, 4, 20, 16, generator=generator).to(device)
    output = qtx.gpu_quantum_attention(*mine, num_samples=20_000, is_causal=True, enable_gqa=True)
    (output * upstream).sum().backward()
    (F.scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=True) * upstream).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad - b.grad).norm() / b.grad.norm() < 5e-3


@BOTH
def test_empty_batches(path, device, monkeypatch):
    monkeypatch.setenv("QTX_LAB_KERNELS", path)
    for length, lead in ((1, 0), (100, 0), (0, 2)):
        q, k = torch.zeros(lead, length, 8, device=device), torch.zeros(lead, 5, 8, device=device)
        assert qtx.gpu_quantum_attention(q, k, k).shape == q.shape


def test_bad_input_is_refused_before_any_work(generator, device):
    q, k, v = heads(generator, device)
    call = qtx.gpu_quantum_attention
    with pytest.raises(qtx.ArgumentError, match="num_samples=0"):
        call(q, k, v, num_samples=0, enable_gqa=True)
    with pytest.raises(qtx.ShapeError, match="leading dimensions of q and k do not fit"):
        call(q, k, v)
    with pytest.raises(qtx.ArgumentError, match="k holds NaN or infinity"):
        call(q, k * torch.nan, v, enable_gqa=True)
    with pytest.raises(qtx.DtypeError, match="generator is a int"):
        call(q, k, v, enable_gqa=True, generator=3)
    with pytest.raises(qtx.ArgumentError, match="attn_mask requires a gradient"):
        call(q, k, v, enable_gqa=True, attn_mask=torch.zeros(1, 150, device=device, requires_grad=True))


def test_what_the_variable_may_be(generator, device, monkeypatch):
    q, k, v = heads(generator, device)
    monkeypatch.setenv("QTX_LAB_KERNELS", "trition")
    with pytest.raises(qtx.ArgumentError, match="Did you mean 'triton'"):
        qtx.gpu_quantum_attention(q, k, v, enable_gqa=True)
    monkeypatch.setenv("QTX_LAB_KERNELS", "triton")
    for x, why in ((q.double(), "not torch.float64"), (torch.zeros(1, 300, device=device), "not 300")):
        with pytest.raises(
            qtx.BackendUnavailable, match=f"QTX_LAB_KERNELS=triton is not possible here.*{why}"
        ):
            choose([x])
    monkeypatch.setattr(choice.util, "find_spec", lambda name: None)
    with pytest.raises(qtx.BackendUnavailable, match="triton is not installed"):
        choose([q])


def test_old_devices_and_faulty_compilers_are_refused():
    assert "has 7.5" in device_obstacle((7, 5), (3, 7, 1), False)
    assert device_obstacle((8, 0), (3, 6, 0), True) is None
    for version, refused in (((3, 3, 1), False), ((3, 4, 0), True), ((3, 7, 0), True), ((3, 7, 1), False)):
        assert bool(device_obstacle((9, 0), version, True)) == refused
        assert device_obstacle((9, 0), version, False) is None  # no product goes into a product
    assert "flash-linear-attention issue 640" in device_obstacle((9, 0), (3, 6, 0), True)


def test_a_fallback_on_a_gpu_is_in_the_result(monkeypatch, generator):
    """An old GPU: the reference runs, with one warning and the reason in the result."""
    q, k, v = heads(generator, torch.device("cpu"))
    reason = "it needs a GPU of compute capability 8.0 or newer, this one has 7.5"
    fallback = choice.Choice("reference", reason, fell_back=True)
    monkeypatch.setattr(kernel_paths, "choose", lambda *tensors, **options: fallback)
    est = qtx.gpu_quantum_attention(q, k, v, enable_gqa=True, return_estimate=True)
    assert est.diagnostics["fallbacks"] == (f"The plain-torch reference ran, not the kernel: {reason}.",)
    kernel = est.diagnostics["kernel"]
    assert "plain torch computes all logits" in kernel.pop("slower_than_exact")
    assert kernel == {"path": "reference", "reason": reason, "name": "decode"}
    monkeypatch.undo()
    monkeypatch.setattr(choice, "_obstacle", lambda tensors, chained: "it is too old")
    with pytest.warns(qtx.FallbackWarning, match="it is too old"):
        assert choose([torch.empty(1, 1, device="meta")]).fell_back
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose([q])  # on the CPU the reference is what one expects


def test_out_of_memory_is_explained(monkeypatch, generator):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(kernel_paths.decode_reference, "decode", full)
    q, k, v = heads(generator, torch.device("cpu"))
    with pytest.raises(qtx.BackendUnavailable, match=r"take fewer rows at a time.*2.00 GiB"):
        qtx.gpu_quantum_attention(q, k, v, enable_gqa=True)


def test_sampled_attention_takes_the_kernel_for_few_rows(kernels, generator, device):
    q, k, v = heads(generator, device, dtype=torch.bfloat16)
    est = qtx.sampled_attention(q, k, v, num_samples=32, enable_gqa=True, generator=generator)
    assert est.diagnostics["kernel"]["name"] == "decode"
    assert est.diagnostics["kernel"]["path"] == "triton"
    assert est.output.dtype == torch.bfloat16
    drawn = est.draws.average(v.repeat_interleave(2, 1))
    assert (drawn - est.output.float()).norm() / drawn.norm() < 4e-3
    assert est.diagnostics["sampler"] == "systematic"


@pytest.mark.parametrize(
    "limits",
    [{}, {"softcap": 0.5}, {"window": (None, 90)}, {"attn_mask": causal_lower_right(2, 150), "window": 40},
     {"is_causal": True, "softcap": 3.0}],
)  # fmt: skip
def test_the_kernel_draws_the_samplers_keys(limits, generator, device, monkeypatch):
    """From one seed; but for the few points that the rounding of masses moves across the border of a key."""
    q, k, v = heads(generator, device, length=2)
    estimates = []
    for setting in ("triton", "reference"):
        monkeypatch.setenv("QTX_LAB_KERNELS", setting)
        seeded = torch.Generator().manual_seed(3)
        options = {"num_samples": 32, "replicates": 2, "enable_gqa": True, "generator": seeded, **limits}
        estimates.append(qtx.sampled_attention(q, k, v, sampler="systematic", **options))
    kernel, torchs = (est.draws.indices.unflatten(-1, (2, 32)).sort(-1).values for est in estimates)
    assert (estimates[0].info.kernel.path, estimates[0].info.kernel.name) == ("triton", "decode")
    assert float((kernel == torchs).float().mean()) > 0.99
    torch.testing.assert_close(estimates[0].log_sum_exp, estimates[1].log_sum_exp, rtol=1e-4, atol=1e-3)


def test_causal_queries_need_not_start_at_the_first_key(kernels, generator, device):
    """The last 30 of 70 queries draw what they draw among all."""
    q, k, v = heads(generator, device, length=70, n=70)
    outputs = []
    for first in (0, 40):
        problem = AttentionProblem.of(
            q[:, :, first:], k, v, is_causal=True, enable_gqa=True, first_position=first
        )
        call = kernel_paths.KernelCall(
            problem,
            Budget(16, 1),
            problem.stream(torch.tensor(5, device=device)),
            kernel_paths.choose_systematic(problem),
        )
        outputs.append(kernel_paths.attend_systematic(call).output)
    torch.testing.assert_close(outputs[0][:, :, 40:], outputs[1])


def test_an_estimate_says_where_exact_attention_is_faster(kernels, generator, device):
    """Always for many queries, and for few where there is little to read."""
    q, k, v = heads(generator, device, length=99, n=99)
    options = {"num_samples": 8, "enable_gqa": True, "return_estimate": True}
    many = qtx.gpu_quantum_attention(q, k, v, is_causal=True, **options)
    assert "read all keys and values" in many.info.kernel.slower_than_exact
    few = qtx.gpu_quantum_attention(q[:, :, :1], k, v, **options)
    assert "in less time" in few.diagnostics["kernel"]["slower_than_exact"]
    assert choice.slower_decode("triton", choice.FEWEST_BYTES + 1) is None
    cache = qtx.SampledKVCache.build(k, v)
    assert "in less time" in cache.attend(q[:, :, :1], 16).info.kernel.slower_than_exact


def test_sampled_attention_takes_the_kernel_for_many_causal_or_trained_rows(kernels, generator, device):
    """Its draws are then those of `gpu_quantum_attention`, and so are its gradients."""
    q, k, v = heads(generator, device, length=99, n=99)
    options = {"num_samples": 8, "is_causal": True, "enable_gqa": True}
    results = []
    for call, more in ((qtx.sampled_attention, {}), (qtx.gpu_quantum_attention, {"return_estimate": True})):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        est = call(*inputs, generator=torch.Generator().manual_seed(1), **options, **more)
        est.output.square().sum().backward()
        assert est.diagnostics["kernel"]["name"] == "prefill"
        assert est.diagnostics["kernel"]["path"] == "triton"
        assert est.diagnostics["baseline"] == "other pages"
        results.append([est.output, *(x.grad for x in inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    few = qtx.sampled_attention(q[:, :, :2].requires_grad_(), k, v, num_samples=8, enable_gqa=True)
    assert few.diagnostics["kernel"]["name"] == "prefill"


@pytest.mark.parametrize(
    ("name", "options", "length"),
    [("prefill", {"is_causal": True}, 99), ("prefill", {"attn_mask": True}, 70), ("decode", {}, 2),
     ("decode", {"attn_mask": True}, 2)],
)  # fmt: skip
def test_sinks_take_their_share_of_what_a_kernel_estimates(name, options, length, kernels, generator, device):
    q, k, v = heads(generator, device, length=length, n=99)
    sinks = torch.randn(q.shape[-3], generator=generator).to(device)
    options = {"num_samples": 16, "replicates": 2, "enable_gqa": True, **options}
    mask = torch.rand(length, 99, generator=generator).to(device) < 0.5
    mask[1] = False
    if "attn_mask" in options:
        options["attn_mask"] = mask
    alone, est = (
        qtx.sampled_attention(q, k, v, sinks=x, generator=torch.Generator().manual_seed(1), **options)
        for x in (None, sinks)
    )
    exact = qtx.sampled_attention(q, k, v, sampler="exact", sinks=sinks, **{**options, "num_samples": 1})
    assert (est.info.kernel.path, est.info.kernel.name) == ("triton", name)
    tolerance = {"atol": 2e-2 if q.dtype != torch.float32 else 1e-4, "rtol": 1e-2}
    torch.testing.assert_close(est.log_sum_exp, exact.log_sum_exp, **tolerance)
    mass = torch.sigmoid(alone.log_sum_exp - sinks[:, None])[..., None]
    torch.testing.assert_close(est.output, (alone.output * mass).to(est.output.dtype), **tolerance)
    torch.testing.assert_close(est.std_error, alone.std_error * mass, **tolerance)
    torch.testing.assert_close(est.attention_weights(), alone.attention_weights() * mass, **tolerance)
    if "attn_mask" in options:
        assert bool((est.output[..., 1, :] == 0).all())
        assert bool((alone.log_sum_exp[..., 1] == -torch.inf).all())


def test_a_kernels_log_sum_exp_has_no_gradient_and_says_so(kernels, generator, device):
    q, k, v = (x.requires_grad_() for x in heads(generator, device, length=9, n=9))
    est = qtx.sampled_attention(q, k, v, is_causal=True, enable_gqa=True, generator=torch.Generator())
    assert est.info.kernel.name == "prefill"
    with pytest.raises(qtx.ArgumentError, match="log_sum_exp has no gradient by the prefill kernel"):
        est.log_sum_exp.sum().backward()


def test_what_no_kernel_knows_is_drawn_by_torch_and_says_why(generator, device, monkeypatch):
    q, k, v = heads(generator, device, length=65, n=99)
    trained = torch.zeros(65, 99, device=device, requires_grad=True)
    cases = [
        ({"softcap": 2.0}, "softcap is in the kernel of up to 64 rows a key head without gradients only"),
        ({"window": 40}, "window is in the kernel of up to 64 rows a key head without gradients only"),
        ({"attn_mask": trained}, "the kernel gives no gradient of attn_mask"),
    ]
    for options, reason in cases:
        monkeypatch.setenv("QTX_LAB_KERNELS", "triton")
        with pytest.raises(qtx.BackendUnavailable, match=reason):
            qtx.sampled_attention(q, k, v, enable_gqa=True, **options)
        monkeypatch.delenv("QTX_LAB_KERNELS")
        if device.type == "cuda" and "attn_mask" not in options:
            with pytest.warns(qtx.FallbackWarning, match=reason):
                est = qtx.sampled_attention(q, k, v, enable_gqa=True, **options)
            assert est.info.kernel.path == "torch"
            assert reason in est.info.fallbacks[0]


@pytest.mark.parametrize("proposal", ["low-rank", "int4", "exact"])
def test_a_cache_takes_the_kernel_and_goes_on_growing(proposal, kernels, generator, device):
    q, k, v = heads(generator, device, n=400)
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal)
    for _ in range(2):
        est = cache.attend(q, num_samples=64, generator=generator)
        assert est.diagnostics["kernel"]["path"] == ("torch" if proposal == "exact" else "triton")
        tokens, values = cache.tokens()
        exact = F.scaled_dot_product_attention(q, tokens, values, enable_gqa=True)
        off = (est.output - exact) / est.std_error.clamp_min(1e-6)
        assert off.square().mean() < 4
        drawn = est.draws.average(values.repeat_interleave(2, 1))
        torch.testing.assert_close(drawn, est.output, rtol=1e-3, atol=1e-4)
        cache.append(k[:, :, :3], v[:, :, :3])
    assert len(cache) == est.num_keys + 3


def test_a_cache_takes_the_kernel_beside_a_softcap_and_sinks(kernels, generator, device):
    """All keys are drawn, so that the output and the log-sum-exp are those of exact attention."""
    q, k, v = heads(generator, device, n=200)
    limits = {"softcap": 0.5, "sinks": torch.randn(4, generator=generator).to(device)}
    est = qtx.SampledKVCache.build(k, v).attend(q, 200, generator=generator, **limits)
    assert (est.info.kernel.path, est.info.kernel.name) == ("triton", "sketch_decode")
    exact = qtx.sampled_attention(q, k, v, sampler="exact", enable_gqa=True, **limits)
    torch.testing.assert_close(est.output, exact.output, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(est.log_sum_exp, exact.log_sum_exp, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(est.attention_weights(), exact.attention_weights(), rtol=1e-3, atol=1e-4)


def test_error_bars_of_a_cache_are_not_of_tokens_that_took_the_place_of_others(kernels, generator, device):
    """They are computed when they are read, from values that a crop and new tokens have written over."""
    q, k, v = heads(generator, device, n=200)
    cache = qtx.SampledKVCache.build(k, v)
    est = cache.attend(q, 32, generator=generator)
    cache.crop(100)
    cache.append(k[:, :, :100], v[:, :, :100] + 1)
    with pytest.raises(qtx.ArgumentError, match="std_error is not known any more"):
        est.std_error.sum()
    assert bool(est.log_sum_exp.isfinite().all())


def test_a_cache_by_the_kernel_reports_rounding_needs_16_draws_and_is_the_same_from_disk(
    kernels, generator, device, tmp_path
):
    q, k, v = heads(generator, device, n=400)
    cache = qtx.SampledKVCache.build(k, v, rank=8)
    assert cache.attend(q, num_samples=8).diagnostics["kernel"]["reason"] == "it takes 16 draws or more"
    # All keys are drawn with certainty, so that only rounding is left.
    whole = cache.attend(q, num_samples=400, generator=generator)
    assert whole.diagnostics["kernel"]["path"] == "triton"
    assert 0 < float(whole.std_error.max()) < 1e-4
    cache.save(tmp_path / "cache")
    loaded = qtx.SampledKVCache.load(tmp_path / "cache")
    if device.type == "cpu":
        a, b = (c.attend(q, 32, generator=torch.Generator().manual_seed(1)).output for c in (cache, loaded))
        assert torch.equal(a, b)
    with torch.inference_mode():
        cache.attend(q, num_samples=32)
    cache.append(k[:, :, :1], v[:, :, :1])
    assert cache.attend(q, num_samples=32).num_keys == 401


def test_set_to_the_reference_sampled_attention_stays_with_torch(generator, device, monkeypatch):
    monkeypatch.setenv("QTX_LAB_KERNELS", "reference")
    q, k, v = heads(generator, device)
    est = qtx.sampled_attention(q, k, v, enable_gqa=True, generator=generator)
    assert est.diagnostics.get("kernel", {"path": "torch"})["path"] == "torch"


@pytest.mark.statistical
@pytest.mark.parametrize("replicates", [2, 4])
@pytest.mark.parametrize(("rows", "kernel"), [(40, "decode"), (300, "prefill")])
def test_intervals_of_values_that_few_keys_hold_cover(rows, kernel, replicates, seed):
    """Each feature is 10 at one key of 256: most replicates agree that it is 0, and know nothing of it.

    16 coordinates of each row; rows share their values, which leaves the coverage an error of about .02.
    """
    g = torch.Generator().manual_seed(seed)
    v = torch.zeros(1, 256, 16)
    v[0, torch.randperm(256, generator=g)[:16], torch.arange(16)] = 10.0
    q, k = torch.randn(1, rows, 256, generator=g), torch.eye(256)[None]
    est = qtx.gpu_quantum_attention(
        q, k, v, num_samples=32, replicates=replicates, scale=1.0, generator=g, return_estimate=True
    )
    low, high = est.confidence_interval()
    exact = q.softmax(-1) @ v
    assert est.info.kernel.name == kernel
    assert ((low <= exact) & (exact <= high)).double().mean() >= 0.9
    assert (high - low).min() > 1e-4  # no row is exact
    assert (est.reliability is None) == (kernel == "prefill")
