"""Kinds of `QuantumMultiheadAttention`: gradients are those of finite differences, and controls are fair."""

import copy
import io

import pytest
import torch

import qtx_lab as qtx
from qtx_lab.attention.quantum_layers import KINDS, OrthogonalKind, QuantumKernelKind, make_kind
from qtx_lab.circuits.orthogonal import _ring_signs, rbs_layers

SETTINGS = [
    OrthogonalKind(),
    OrthogonalKind("butterfly", shifts=True),
    OrthogonalKind(control=True),
    QuantumKernelKind(),
    QuantumKernelKind(3, shifts=True),
    QuantumKernelKind(control=True),
]


def module(kind, sampler="exact", **options):
    torch.manual_seed(0)
    options = {"batch_first": True, "dtype": torch.float64, "sampler": sampler, **options}
    return qtx.QuantumMultiheadAttention(4, 2, kind=kind, **options)


@pytest.mark.parametrize("kind", SETTINGS, ids=str)
def test_gradients_are_those_of_finite_differences(kind, generator):
    attn = module(kind)
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)

    def loss():
        return (attn(x, x, x, need_weights=False)[0] * weights).sum()

    loss().backward()
    for tensor in (x, *attn.heads.parameters()):
        flat = tensor.data.view(-1)
        for place in range(0, len(flat), max(1, len(flat) // 6)):
            value, ends = flat[place].item(), []
            for step in (1e-5, -1e-5):
                flat[place] = value + step
                ends.append(loss().item())
            flat[place] = value
            slope = (ends[0] - ends[1]) / 2e-5
            assert tensor.grad.view(-1)[place].item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("kind", SETTINGS, ids=str)
def test_a_layer_that_was_first_used_in_inference_mode_trains(kind, generator):
    """What is computed once for a process must not be a tensor of inference mode."""
    for known in (rbs_layers, _ring_signs):
        known.cache_clear()
    attn = module(kind, dtype=torch.float32)
    x = torch.randn(2, 3, 4, generator=generator)
    with torch.inference_mode():
        before = attn(x, x, x)[0]
    after = attn(x, x, x)[0]
    after.square().sum().backward()
    assert torch.equal(before, after)
    assert all(p.grad is not None for p in attn.parameters())


@pytest.mark.parametrize("name", ["orthogonal", "quantum-kernel"])
def test_shifts_and_backpropagation_train_alike(name, generator):
    x = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    gradients = []
    for shifts in (False, True):
        kind = OrthogonalKind(shifts=shifts) if name == "orthogonal" else QuantumKernelKind(shifts=shifts)
        attn = module(kind)
        attn(x, x, x)[0].square().sum().backward()
        gradients.append([p.grad for p in attn.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize(
    "kind", [OrthogonalKind(), OrthogonalKind("butterfly"), QuantumKernelKind(3)], ids=str
)
def test_controls_have_as_many_parameters_and_no_circuit(kind):
    sizes = [{name: p.shape for name, p in module(k).named_parameters()} for k in (kind, kind.classical)]
    assert sizes[0] == sizes[1]
    assert kind.classical.control


def test_logits_are_what_the_kinds_say(generator):
    x = torch.randn(1, 5, 4, generator=generator, dtype=torch.float64)
    attn = module("orthogonal")
    q, k, v = attn.heads(x, x, x)
    for y in (q, k, v):
        assert torch.allclose(y.transpose(1, 2).flatten(-2).norm(dim=-1), x.norm(dim=-1))
    attn = module("quantum-kernel")
    q, k, _ = attn.heads(x, x, x)
    logits = q @ k.mT / q.shape[-1] ** 0.5
    assert (logits >= -1e-9).all()
    assert (logits <= 4 + 1e-9).all()  # the temperature times a fidelity


@pytest.mark.parametrize("name", list(KINDS))
def test_masks_draws_copies_and_files_work_as_for_softmax(name, generator):
    attn = module(name, sampler="systematic", num_samples=64, generator=generator)
    x = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    output, weights = attn(x, x, x, attn_mask=causal)
    assert output.shape == x.shape
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))
    file = io.BytesIO()
    torch.save(attn, file)
    file.seek(0)
    for other in (copy.deepcopy(attn), torch.load(file, weights_only=False)):
        for a, b in zip(attn.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
        other(x, x, x)
    exact = module(name)
    exact.load_state_dict(attn.state_dict())
    assert (exact(x, x, x, attn_mask=causal)[0] - output).abs().max() < 0.5


def test_files_of_modules_without_kinds_still_load():
    attn = module("softmax")
    state = attn.__getstate__()
    del state["heads"]
    other = type(attn).__new__(type(attn))
    other.__setstate__(state)
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    assert torch.equal(other(x, x, x)[0], attn(x, x, x)[0])


def test_what_a_kind_cannot_have_is_refused():
    with pytest.raises(qtx.ArgumentError, match="kind"):
        module("ortogonal")
    with pytest.raises(qtx.DtypeError, match="kind=3"):
        module(3)
    with pytest.raises(qtx.ArgumentError, match="kdim=8"):
        module("orthogonal", kdim=8)
    with pytest.raises(qtx.ArgumentError, match="add_zero_attn"):
        module("orthogonal", add_zero_attn=True)
    with pytest.raises(qtx.ArgumentError, match="Take more heads"):
        qtx.QuantumMultiheadAttention(16, 2, kind="quantum-kernel")
    with pytest.raises(qtx.ArgumentError, match="layers"):
        QuantumKernelKind(0)
    with pytest.raises(qtx.ArgumentError, match="Did you mean 'pyramid'"):
        OrthogonalKind("pyramd")
    for embed_dim, kind in ((1, OrthogonalKind()), (6, OrthogonalKind("butterfly"))):
        with pytest.raises(qtx.ArgumentError, match=f"embed_dim={embed_dim} is not allowed with kind="):
            qtx.QuantumMultiheadAttention(embed_dim, 1, kind=kind)
    assert make_kind("orthogonal") is KINDS["orthogonal"]
