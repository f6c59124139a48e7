"""`QuantumMultiheadAttention` is torch's module, number for number, where it draws exactly; models get it
and lose it.
"""

import copy
import io
import itertools
import warnings

import pytest
import torch
from torch import nn

import qtx_lab as qtx

N, L, KEYS = 3, 5, 7
DIMS = {"embed_dim": 12, "num_heads": 4}


def pair(generator, eval_mode=True, settings=None, **options):
    """torch's module and ours, with the same random parameters."""
    theirs = nn.MultiheadAttention(**DIMS, **options)
    for p in theirs.parameters():
        p.data = torch.randn(p.shape, generator=generator) / 3
    ours = qtx.QuantumMultiheadAttention(**DIMS, **options, **(settings or {"sampler": "exact"}))
    ours.load_state_dict(theirs.state_dict())
    return theirs.train(not eval_mode), ours.train(not eval_mode)


def inputs(generator, *, batch_first=False, batched=True, kdim=12, vdim=12):
    shapes = [(L, 12), (KEYS, kdim), (KEYS, vdim)]
    if batched:
        shapes = [(N, *s) if batch_first else (s[0], N, s[1]) for s in shapes]
    return [torch.randn(s, generator=generator) for s in shapes]


def masks(generator):
    """Every kind of key_padding_mask and attn_mask, none of which masks a whole row."""
    padding = torch.rand(N, KEYS, generator=generator) < 0.3
    square = torch.rand(L, KEYS, generator=generator) < 0.3
    cube = torch.rand(N * 4, L, KEYS, generator=generator) < 0.3
    for x in (padding, square, cube):
        x[..., 0] = False
    floats = [
        torch.randn(x.shape, generator=generator).masked_fill(x, -torch.inf) for x in (padding, square, cube)
    ]
    paddings = {"none": None, "bool": padding, "float": floats[0]}
    attn = {"none": None, "square": square, "cube": cube, "float square": floats[1], "float cube": floats[2]}
    return paddings, attn


def close(ours, theirs):
    assert (ours is None) == (theirs is None)
    if ours is not None:
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        # Ten roundings of numbers near 1; on processors with AVX2 alone, one of 180 is off by 1.3e-6.
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 5, "vdim": 9},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "kdim": 5, "bias": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_exact_agrees_with_torch_under_every_mask(options, grad, batch_first, generator):
    theirs, ours = pair(generator, batch_first=batch_first, **options)
    dims = {name: options[name] for name in ("kdim", "vdim") if name in options}
    x = inputs(generator, batch_first=batch_first, **dims)
    paddings, attn = masks(generator)
    for padding, mask, weights, average in itertools.product(
        paddings.values(), attn.values(), (False, True), (False, True)
    ):
        given = {
            "key_padding_mask": padding,
            "attn_mask": mask,
            "need_weights": weights,
            "average_attn_weights": average,
        }
        with torch.set_grad_enabled(grad):
            for a, b in zip(ours(*x, **given), theirs(*x, **given), strict=True):
                close(a, b)


def test_exact_agrees_with_torch_without_a_batch(generator):
    theirs, ours = pair(generator)
    x = inputs(generator, batched=False)
    paddings, attn = masks(generator)
    for weights in (False, True):
        for padding in (None, paddings["bool"][0]):
            for mask in (None, attn["square"], attn["cube"][:4]):
                given = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": weights}
                for a, b in zip(ours(*x, **given), theirs(*x, **given), strict=True):
                    close(a, b)


@pytest.mark.parametrize("options", [{}, {"add_zero_attn": True}])
def test_exact_agrees_with_torch_on_the_causal_hint(options, generator):
    theirs, ours = pair(generator, batch_first=True, **options)
    x = torch.randn(N, L, 12, generator=generator)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    padding = torch.arange(L).expand(N, L) >= torch.tensor([[L], [3], [2]])
    with torch.enable_grad():  # torch's fused path has another rule
        for weights, key_padding in itertools.product((False, True), (None, padding)):
            given = {"attn_mask": mask, "is_causal": True, "need_weights": weights}
            if key_padding is not None:
                given["key_padding_mask"] = torch.zeros(N, L).masked_fill(key_padding, -torch.inf)
            for a, b in zip(ours(x, x, x, **given), theirs(x, x, x, **given), strict=True):
                close(a, b)
    with pytest.raises(qtx.ArgumentError, match="is_causal"):
        ours(x, x, x, is_causal=True)


def test_exact_has_torchs_gradients(generator):
    theirs, ours = pair(generator, eval_mode=False, kdim=5, add_bias_kv=True)
    x = inputs(generator, kdim=5)
    for m in (ours, theirs):
        m(*x)[0].square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "add_bias_kv": True}, {"bias": False}])
def test_weights_load_both_ways(options, generator):
    theirs, ours = pair(generator, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(1)
    a = nn.MultiheadAttention(**DIMS, **options)
    torch.manual_seed(1)
    b = qtx.QuantumMultiheadAttention(**DIMS, **options)  # the same initial weights, too
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["systematic", "head-tail", "monte-carlo", "sobol"])
def test_draws_come_near_the_exact_output(name, generator):
    theirs, ours = pair(
        generator, settings={"sampler": name, "num_samples": 2048, "replicates": 2, "generator": generator}
    )
    x = inputs(generator)
    (output, weights), (exact, p) = ours(*x), theirs(*x)
    assert (output - exact).norm() < 0.05 * exact.norm()
    assert float((weights - p).detach().abs().max()) < 0.05
    est = ours.last_estimate
    assert est.output.shape == est.std_error.shape == (N, 4, L, 3)
    assert est.diagnostics["sampler"] == name
    assert not est.output.requires_grad


def test_the_same_seed_gives_the_same_numbers(seed):
    outputs = []
    for _ in range(2):
        g = torch.Generator().manual_seed(seed)
        _, ours = pair(g, settings={"num_samples": 4, "generator": g})
        outputs.append(ours(*inputs(g))[0])
    assert torch.equal(*outputs)


def test_a_control_variate_works_with_the_causal_hint(generator):
    _, ours = pair(
        generator,
        batch_first=True,
        settings={"control_variate": "linformer", "num_samples": 4, "replicates": 2, "generator": generator},
    )
    x = torch.randn(N, L, 12, generator=generator)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    assert "linformer" in ours.last_estimate.diagnostics["control_variate"]["coefficients"]


@pytest.mark.statistical
def test_dropout_keeps_the_mean_and_stops_in_eval(generator):
    """The mean over 4,000 batches; false alarms once in a million."""
    _, ours = pair(
        generator, dropout=0.3, batch_first=True, settings={"sampler": "exact", "generator": generator}
    )
    x = torch.randn(1, L, 12, generator=generator)
    exact = ours(x, x, x)[0]
    assert torch.equal(ours(x, x, x)[0], exact)
    x = x.expand(4000, -1, -1)
    with torch.no_grad():
        output = ours.train()(x, x, x)[0].double()
    z = (output.mean(0) - exact) / (output.std(0) / 4000**0.5)
    assert float(output.std(0).min()) > 0
    assert float(z.abs().max()) < 5.8  # Bonferroni over 60 numbers
    ours.dropout = 1.0
    assert torch.equal(ours(x, x, x)[0], ours.out_proj.bias.expand(4000, L, 12))


def test_rows_without_a_key_are_zero_and_never_nan(generator):
    _, ours = pair(generator, settings={"num_samples": 4, "generator": generator})
    x = inputs(generator)
    output, weights = ours(*x, key_padding_mask=torch.ones(N, KEYS, dtype=torch.bool))
    assert torch.equal(output, ours.out_proj.bias.expand(L, N, 12))
    assert bool((weights == 0).all())


def test_copies_and_files_after_a_forward(generator):
    _, ours = pair(generator, settings={"num_samples": 4, "generator": generator})
    x = inputs(generator)
    ours(*x)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert other.last_estimate is None
        state = generator.get_state()
        expected = ours(*x)[0]
        generator.set_state(state)
        assert torch.equal(other(*x)[0], expected)
        generator.set_state(state)  # the copy draws with it too; the file has one of its own
    assert ours.last_estimate is not None


def copied_layers(**settings):
    """Two layers, which `nn.TransformerEncoder` makes by copying one."""
    layer = nn.TransformerEncoderLayer(12, 4, 24, dropout=0.0, batch_first=True)
    layer.self_attn = qtx.QuantumMultiheadAttention(**DIMS, batch_first=True, num_samples=4, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def drawn(model, x):
    """The keys that each layer draws for the same input."""
    attention = [layer.self_attn for layer in model.layers]
    for m in attention:
        m(x, x, x)
    return [m.last_estimate.draws.indices for m in attention]


@pytest.mark.parametrize("sampler", ["systematic", "monte-carlo", "stratified"])
@pytest.mark.parametrize("own", [False, True])
def test_copied_layers_draw_independently(sampler, own, generator, seed):
    """Of 5,120 draws each, those of two layers agree as often as those of two calls of one layer, within 5
    standard deviations of independent draws: false alarms once in a million.
    """
    settings = {"sampler": sampler, "generator": torch.Generator().manual_seed(seed) if own else None}
    model = copied_layers(**settings)
    model.load_state_dict(copied_layers(**settings).state_dict())  # the layers have the same weights still
    model = copy.deepcopy(model)
    x = torch.randn(32, 10, 12, generator=generator)
    torch.manual_seed(seed)
    first, second = drawn(model, x)
    again, _ = drawn(model, x)
    share, same_layer = ((first == other).double().mean() for other in (second, again))
    assert abs(share - same_layer) < 5 * (2 * 0.25 / first.numel()) ** 0.5
    assert share < 0.9

    torch.manual_seed(seed)
    if own:
        settings["generator"].manual_seed(seed)
    for a, b in zip((first, second), drawn(model, x), strict=True):
        assert torch.equal(a, b), "the seed does not decide the draws"


def test_a_file_holds_the_generator_in_the_state_that_it_had(generator, seed):
    model = copied_layers(generator=torch.Generator().manual_seed(seed))
    x = torch.randn(3, 10, 12, generator=generator)
    drawn(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    ours, theirs = drawn(model, x), drawn(loaded, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(*theirs)
    generators = {id(layer.self_attn.settings["generator"]) for layer in loaded.layers}
    assert len(generators) == 1


def test_under_autocast_the_output_is_in_its_dtype(generator):
    for options in ({}, {"add_bias_kv": True}):
        _, ours = pair(generator, settings={"num_samples": 4}, **options)
        x = inputs(generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = ours(*x)[0]
        assert output.dtype == torch.bfloat16
        output.float().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in ours.parameters())


def test_it_trains(generator):
    """Sampled gradients find the key that the target asks for."""
    torch.manual_seed(0)
    attn = qtx.QuantumMultiheadAttention(
        8, 2, batch_first=True, sampler="head-tail", num_samples=4, generator=generator
    )
    optimizer = torch.optim.Adam(attn.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        x = torch.randn(16, 12, 8, generator=generator)
        target = x[torch.arange(16), x[..., 0].argmax(-1)][:, None].expand_as(x)
        loss = (attn(x, x, x, need_weights=False)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


BAD = [
    ({"sampler": "stratifed"}, qtx.ArgumentError, "Did you mean"),
    ({"num_samples": 0}, qtx.ArgumentError, "num_samples=0"),
    ({"replicates": 0}, qtx.ArgumentError, "replicates=0"),
    ({"hybrid_mode": True}, qtx.ArgumentError, "needs a quantum_backend"),
    ({"generator": 3}, qtx.DtypeError, "generator"),
    ({"control_variate": "linforma"}, qtx.ArgumentError, "Did you mean"),
    ({"quantum_backend": "aer"}, qtx.DtypeError, "QiskitQuantumBackend"),
]


@pytest.mark.parametrize(
    ("settings", "error", "match"), BAD, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_bad_settings_fail_at_construction(settings, error, match):
    for make in (lambda: qtx.QuantumMultiheadAttention(8, 2, **settings),
                 lambda: qtx.replace_attention(nn.MultiheadAttention(8, 2), **settings)):  # fmt: skip
        with pytest.raises(error, match=match):
            make()


def test_bad_inputs_name_the_argument(generator):
    _, ours = pair(generator)
    q, k, v = inputs(generator)
    for given, options, match in [
        ((q, k[..., :5], v), {}, "key has shape"),
        ((q[0], k, v), {}, "key has shape"),
        ((q, k, v[:3]), {}, "as long as"),
        ((q, k, v), {"attn_mask": torch.zeros(L, KEYS + 1)}, "attn_mask has shape"),
        ((q, k, v), {"key_padding_mask": torch.zeros(N, KEYS + 1)}, "key_padding_mask has shape"),
    ]:
        with pytest.raises(qtx.ShapeError, match=match):
            ours(*given, **options)
    nested = torch.nested.nested_tensor([torch.zeros(2, 12), torch.zeros(3, 12)])
    with pytest.raises(qtx.DtypeError, match="nested"):
        ours(nested, nested, nested)


# --- Circuits ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::qtx_lab.errors.FallbackWarning")
def test_the_seed_documents_example_runs_offline():
    backend = qtx.QiskitQuantumBackend(
        provider="ibm-q", backend_name="ibmq_qasm_simulator", shots=1024, optimization_level=3
    )
    attn = qtx.QuantumMultiheadAttention(
        embed_dim=512, num_heads=8, quantum_backend=backend, hybrid_mode=True
    )
    x = torch.randn(4, 2, 512, generator=torch.Generator().manual_seed(0))
    output, weights = attn(x, x, x)
    assert output.shape == x.shape
    assert weights.shape == (2, 4, 4)
    assert attn.settings["num_samples"] == 1024
    assert attn.last_estimate.diagnostics["sampler"] == "circuit"
    exact = qtx.QuantumMultiheadAttention(512, 8, sampler="exact")
    exact.load_state_dict(attn.state_dict())
    assert float((exact(x, x, x)[1] - weights).abs().max()) < 0.05
    output.sum().backward()
    assert bool(attn.in_proj_weight.grad.isfinite().all())


def test_a_sampler_and_a_backend_exclude_each_other():
    backend = qtx.QiskitQuantumBackend("aer")
    with pytest.raises(qtx.ArgumentError, match="exclude each other"):
        qtx.QuantumMultiheadAttention(8, 2, sampler="exact", quantum_backend=backend)


# --- Models ---------------------------------------------------------------------------------------


def encoder(generator, **options):
    layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, dropout=0, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(layer, 2)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) / 3
    return model


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_no_fast_path_bypasses_a_replaced_layer_and_undoing_brings_torch_back(
    training, padded, grad, generator
):
    model = encoder(generator).train(training)
    x = torch.randn(N, L, 12, generator=generator)
    padding = torch.arange(L).expand(N, L) >= torch.tensor([[L], [3], [2]]) if padded else None
    kept = ~padding if padded else torch.ones(N, L, dtype=torch.bool)
    with torch.set_grad_enabled(grad):
        before = model(x, src_key_padding_mask=padding)
        with qtx.replace_attention(model, sampler="exact") as replaced:
            during = model(x, src_key_padding_mask=padding)
            assert sorted(replaced.layers) == ["layers.0.self_attn", "layers.1.self_attn"]
            assert all(layer.last_estimate is not None for layer in replaced.layers.values())
            assert isinstance(model.layers[0].self_attn, qtx.QuantumMultiheadAttention)
        after = model(x, src_key_padding_mask=padding)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert model.use_nested_tensor
    torch.testing.assert_close(during[kept], before[kept], atol=1e-5, rtol=1e-5)
    assert torch.equal(after, before)


def test_a_layer_built_with_the_module_and_cloned_draws_too(generator):
    layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True).eval()
    layer.self_attn = qtx.QuantumMultiheadAttention(12, 4, batch_first=True, num_samples=4)
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim"):  # torch says why it takes no short cut
        model = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        model(torch.randn(N, L, 12, generator=generator))
    assert all(m.self_attn.last_estimate.diagnostics["num_samples"] == 4 for m in model.layers)


def test_a_whole_transformer_keeps_its_optimiser(generator):
    torch.manual_seed(0)
    model = nn.Transformer(12, 4, 1, 1, 16, dropout=0, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    source, target = (torch.randn(N, n, 12, generator=generator) for n in (KEYS, L))
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    exact = model(source, target, tgt_mask=mask)
    replaced = qtx.replace_attention(model, sampler="head-tail", num_samples=16, generator=generator)
    assert len(replaced.layers) == 3
    torch.testing.assert_close(model(source, target, tgt_mask=mask), exact, atol=1e-5, rtol=1e-5)  # S >= n
    before = model.decoder.layers[0].multihead_attn.in_proj_weight.detach().clone()
    model(source, target, tgt_mask=mask).square().sum().backward()
    optimizer.step()
    replaced.undo()
    replaced.undo()
    attn = model.decoder.layers[0].multihead_attn
    assert type(attn) is nn.MultiheadAttention
    assert not torch.equal(attn.in_proj_weight, before)
    assert sorted(vars(attn)) == sorted(vars(nn.MultiheadAttention(12, 4)))


def test_the_model_itself_may_be_the_module_and_others_are_left_alone(generator):
    class Derived(nn.MultiheadAttention):
        pass

    model = nn.ModuleList([nn.MultiheadAttention(8, 2), Derived(8, 2)])
    with qtx.replace_attention(model, sampler="exact") as replaced:
        assert list(replaced.layers) == ["0"]
        with pytest.raises(qtx.ArgumentError, match=r"no torch.nn.MultiheadAttention"):
            qtx.replace_attention(model)
    with qtx.replace_attention(model[0], sampler="exact") as replaced:
        assert list(replaced.layers) == [""]
    with pytest.raises(RuntimeError, match="kept"), qtx.replace_attention(model[0]):
        raise RuntimeError("kept")
    assert type(model[0]) is nn.MultiheadAttention


def test_the_module_loads_no_circuit_library():
    import subprocess
    import sys

    code = (
        "import sys, torch, qtx_lab; m = qtx_lab.QuantumMultiheadAttention(8, 2); "
        "x = torch.zeros(3, 8); m(x, x, x); "
        "assert 'qiskit' not in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
