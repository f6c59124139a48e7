"""The shipped model is what its card says."""

import re

import pytest
import torch
import torch.nn.functional as F

import qtx_lab as qtx
from qtx_lab.models import reference
from qtx_lab.training import reference_training


@pytest.fixture(scope="module")
def model():
    return qtx.load_reference_model()


def test_size(model):
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert (reference.ASSETS / "model.safetensors").stat().st_size <= 5_000_000
    assert model.config.context >= 512
    assert model.config.heads > model.config.kv_heads


def test_held_out_bits_per_byte_are_those_of_the_card(model):
    bits = qtx.bits_per_byte(model, qtx.encode(qtx.reference_text())).mean().item()
    assert bits <= 2.3
    card = (reference.ASSETS / "README.md").read_text()
    assert bits == pytest.approx(float(re.search(r"bits per byte \| ([\d.]+)", card)[1]), abs=2e-3)


def test_the_held_out_text_was_not_trained_on():
    """No passage of 64 characters of the held-out text is in the training text of this Python either."""
    training, _ = reference_training.split_topics()
    text, size = qtx.reference_text(), reference_training.SHARED_WINDOW
    training = reference_training.without_shared(training, text)
    seen = {training[i : i + size] for i in range(len(training) - size + 1)}
    assert not any(text[i : i + size] in seen for i in range(len(text) - size + 1))
    assert len(training) > 5 * len(text)


def test_causal(model):
    tokens = qtx.encode(qtx.reference_text()[:200])[None]
    other = tokens.clone()
    other[0, 150] = 33
    with torch.no_grad():
        before, after = model(tokens), model(other)
    assert torch.allclose(before[:, :150], after[:, :150], atol=1e-5)
    assert not torch.allclose(before[:, 150:], after[:, 150:], atol=1e-2)


def test_attention_can_be_replaced_and_recorded(model):
    tokens = qtx.encode(qtx.reference_text()[:100])[None]
    inputs = model.attention_inputs(tokens)
    c = model.config
    assert len(inputs) == c.layers
    for q, k, v in inputs:
        assert q.shape == (1, c.heads, 100, c.head_dim)
        assert k.shape == v.shape == (1, c.kv_heads, 100, c.head_dim)

    def exact(layer, q, k, v):
        return qtx.sampled_attention(q, k, v, sampler="exact", is_causal=True, enable_gqa=True).output

    with torch.no_grad():
        assert torch.allclose(model(tokens), model(tokens, attention=exact), atol=1e-5)


def test_bits_per_byte_is_the_cross_entropy(model):
    tokens = qtx.encode(qtx.reference_text()[:130])
    bits = qtx.bits_per_byte(model, tokens, window=64)
    assert bits.shape == (2,)
    with torch.no_grad():
        nats = F.cross_entropy(model(tokens[None, 64:128])[0], tokens[65:129])
    assert bits[1].item() == pytest.approx(nats.item() / 0.6931471805599453, rel=1e-5)


@pytest.mark.parametrize("window", [0, -1, 1025])
def test_bits_per_byte_refuses_a_window_it_cannot_use(model, window):
    with pytest.raises(qtx.ArgumentError, match="window"):
        qtx.bits_per_byte(model, torch.zeros(2000, dtype=torch.int64), window=window)


def test_bits_per_byte_refuses_too_short_a_text(model):
    with pytest.raises(qtx.ArgumentError, match="10 bytes"):
        qtx.bits_per_byte(model, torch.zeros(10, dtype=torch.int64), window=64)


def test_unreadable_texts_are_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"abc\xff\xfe")
    (tmp_path / "empty").write_text(" \n")
    for name, match in (
        ("missing", "cannot be read"),
        ("binary", "not UTF-8"),
        ("empty", "empty"),
        (".", "cannot be read"),
    ):
        with pytest.raises(qtx.TextError, match=match) as caught:
            qtx.read_text(tmp_path / name)
        assert isinstance(caught.value, OSError)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_a_broken_model_file_is_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(qtx.ArgumentError, match="does not hold a reference model"):
        qtx.load_reference_model(path)


def test_training_writes_a_model_that_loads(tmp_path):
    small = reference.ReferenceConfig(
        context=64, layers=1, width=32, heads=2, kv_heads=1, head_dim=16, mlp_width=32
    )
    result = reference_training.train_reference(tmp_path, steps=3, batch=2, config=small, progress=False)
    assert result["bits_per_byte"] < 9
    model = qtx.load_reference_model(tmp_path / "model.safetensors")
    assert model.config == small
    assert not model.training
    text = (tmp_path / "heldout.txt").read_text()
    assert qtx.bits_per_byte(model, qtx.encode(text)).mean().item() == pytest.approx(
        result["bits_per_byte"], abs=1e-6
    )
    assert "Python Software Foundation" in (tmp_path / "README.md").read_text()


def test_training_refuses_bad_arguments_before_work(tmp_path):
    with pytest.raises(qtx.ArgumentError, match="steps=0"):
        reference_training.train_reference(tmp_path, steps=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(qtx.StorageError, match="cannot be written"):
        reference_training.train_reference(tmp_path / "file", steps=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_computes_in_every_dtype_that_it_is_loaded_in(dtype):
    """Positions are rotated in float32, which made queries of another dtype than the values."""
    model = qtx.load_language_model("reference", dtype=dtype)
    tokens = model.encode("The import statement")[None]
    expected = qtx.load_reference_model()(tokens).softmax(-1)
    actual = model(tokens)
    assert actual.dtype == dtype
    assert (actual.double().softmax(-1) - expected).abs().max() < 0.05
    assert {x.dtype for x in model.attention_inputs(tokens)[3]} == {dtype}
    assert len(qtx.generate(model, "The import", 4)) >= 1
