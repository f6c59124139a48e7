"""Models that compute attention on their own draw through their softmax, with the right mean and gradient."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers

import qtx_lab as qtx
from qtx_lab.models import huggingface
from qtx_lab.models.huggingface_settings import read_settings
from qtx_lab.models.huggingface_softmax import DrawnSoftmax

transformers.logging.set_verbosity_error()
huggingface.register()


def bloom(settings=None, attention="qtx_sampled"):
    config = transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=3, n_head=4)
    if settings is not None:
        config.qtx_sampled = settings
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():  # rows far from uniform
        for name, p in model.named_parameters():
            if "query_key_value.weight" in name:
                p *= 12
    return model


TOKENS = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))


def softmax_of(seed=0, **settings):
    arguments = read_settings(settings)[None]
    arguments.pop("seed")
    return DrawnSoftmax({**arguments, "generator": torch.Generator().manual_seed(seed)})


@pytest.mark.statistical
@pytest.mark.parametrize("sampler", ["systematic", "monte-carlo", "head-tail"])
def test_weights_and_their_gradient_have_the_mean_of_softmax(sampler):
    """400 passes of 3 draws: z-scores of 2 + 2 numbers below 4.9 (false-alarm rate 4e-6)."""
    g = torch.Generator().manual_seed(3)
    logits = (2 * torch.randn(2, 3, 5, 9, generator=g)).requires_grad_()
    c, direction = torch.randn(2, 3, 5, 9, generator=g), torch.randn(2, 3, 5, 9, generator=g)
    mode = softmax_of(sampler=sampler, num_samples=3)

    def numbers(weights):
        value = (weights * c).sum()
        (grad,) = torch.autograd.grad(value, logits)
        return torch.stack((value.detach(), (grad * direction).sum()))

    expected = numbers(logits.softmax(-1))
    actual = torch.stack([numbers(mode.weights(logits)) for _ in range(400)])
    with torch.no_grad():
        dense = torch.stack([(mode.weights(logits) * c).sum() for _ in range(400)])
    z = (actual.mean(0) - expected) / (actual.std(0) / 400**0.5)
    assert z.abs().max() < 4.9
    assert ((dense.mean() - expected[0]) / (dense.std() / 400**0.5)).abs() < 4.9
    assert (actual.std(0) > 0).all()


def test_only_a_softmax_over_the_last_dimension_draws():
    x = torch.randn(2, 4, 5)
    with softmax_of(num_samples=2) as mode:
        assert torch.equal(x.softmax(1), torch.softmax(x, 1))
        assert not mode.has_drawn
        drawn = torch.nn.functional.softmax(x, dim=-1, dtype=torch.float64)
        assert mode.has_drawn
        assert drawn.dtype == torch.float64
        assert torch.nn.Softmax(dim=2)(x).count_nonzero(-1).max() <= 2
    exact = x.softmax(-1)
    assert not torch.allclose(drawn.float(), exact, atol=1e-3)
    torch.testing.assert_close(drawn.sum(-1), torch.ones(2, 4, dtype=torch.float64))


def test_layers_draw_independently_and_repeat_by_seed():
    model = bloom({"num_samples": 4, "seed": 5})
    with torch.no_grad():
        first, second = model(TOKENS).logits, model(TOKENS).logits
        again = bloom({"num_samples": 4, "seed": 5})(TOKENS).logits
        other = bloom({"num_samples": 4, "seed": 6})(TOKENS).logits
        assert not torch.equal(first, second)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        huggingface.restart(model)
        assert torch.equal(model(TOKENS).logits, first)
        twin = copy.deepcopy(model)
        huggingface.restart(twin)
        assert torch.equal(twin(TOKENS).logits, first)
        attentions = bloom({"num_samples": 4, "seed": 5})(TOKENS, output_attentions=True).attentions
    assert len(attentions) == 3
    rows = [weights[0, 0, -1] for weights in attentions]
    assert not torch.equal(rows[0] > 0, rows[1] > 0)


def test_some_layers_may_be_exact():
    settings = {"sampler": "exact", "layers": {"1": {"sampler": "head-tail", "num_samples": 32}}}
    model = bloom(settings)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, bloom(attention="eager")(TOKENS).logits)
    samplers = list(huggingface.samplers_of(model).values())
    assert samplers == ["exact", "head-tail", "exact"]
    assert model.config._attn_implementation == "eager"


def test_training_goes_through_the_draws():
    model = bloom({"num_samples": 64, "sampler": "head-tail"}).train()
    exact = bloom(attention="eager").train()
    exact.load_state_dict(model.state_dict())
    for each in (model, exact):
        each(TOKENS, labels=TOKENS).loss.backward()
    for actual, expected in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-5, rtol=1e-3)


def test_compiled_it_draws_as_it_does_uncompiled():
    model = bloom({"num_samples": 4, "seed": 0})
    with torch.no_grad():
        expected = model(TOKENS).logits
        huggingface.restart(model)
        assert torch.equal(torch.compile(model, backend="eager")(TOKENS).logits, expected)


def test_checkpointing_does_not_draw_other_keys():
    model = bloom({"num_samples": 4, "seed": 0}).train()
    model.gradient_checkpointing_enable()
    loss = model(TOKENS, labels=TOKENS).loss
    with pytest.raises(qtx.ArgumentError, match="leave `seed` out"):
        loss.backward()


def test_half_precision():
    model = bloom({"sampler": "head-tail", "num_samples": 32}).to(torch.bfloat16)
    with torch.no_grad():
        actual, expected = model(TOKENS).logits, bloom(attention="eager").to(torch.bfloat16)(TOKENS).logits
    assert ((actual - expected).norm() / expected.norm()) < 0.02


def raising(error):
    """A hook that ends a call by an error, as Ctrl-C does."""

    def hook(*args):
        raise error

    return hook


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("of the model")])
def test_after_a_call_that_was_interrupted_a_softmax_is_torchs_own(error):
    """torch runs no hook after Ctrl-C; the same model then draws as if nothing had happened."""
    model, x = bloom({"num_samples": 2, "seed": 0}), torch.randn(2, 50)
    compiling = torch._dynamo.eval_frame._stance
    with torch.no_grad():
        expected, exact = model(TOKENS).logits, x.softmax(-1)
        handle = model.transformer.h[1].self_attention.dense.register_forward_pre_hook(raising(error))
        with pytest.raises(type(error)):
            model(TOKENS)
        assert torch.equal(x.softmax(-1), exact)
        handle.remove()
        huggingface.restart(model)
        assert torch.equal(model(TOKENS).logits, expected)
        assert torch.equal(x.softmax(-1), exact)
    assert torch._dynamo.eval_frame._stance == compiling


def test_threads_that_draw_at_once_leave_the_compiler_as_it_was():
    model = bloom({"sampler": "head-tail", "num_samples": 32})
    expected, compiling = bloom(attention="eager")(TOKENS).logits, torch._dynamo.eval_frame._stance
    errors = []

    def call():
        with torch.no_grad():
            errors.extend(float((model(TOKENS).logits - expected).abs().max()) for _ in range(10))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 40
    assert max(errors) < 1e-5
    assert torch._dynamo.eval_frame._stance == compiling


def test_drawing_is_switched_on_and_off_by_the_name_of_the_attention():
    """transformers itself switches nothing in these models; draws came on and went on regardless."""
    settings = {"num_samples": 4, "seed": 5}
    drawn, exact = bloom(settings)(TOKENS).logits, bloom(attention="eager")(TOKENS).logits
    model = bloom(settings, "eager")
    for name, expected in (("qtx_sampled", drawn), ("qtx_sampled", drawn), ("eager", exact), ("sdpa", exact)):
        model.set_attn_implementation(name)
        huggingface.restart(model)
        assert torch.equal(model(TOKENS).logits, expected), name
    model.config.qtx_sampled = {"num_samples": 0}
    with pytest.raises(qtx.ArgumentError, match="num_samples=0"):
        model.set_attn_implementation("qtx_sampled")
    with pytest.raises(qtx.ArgumentError, match="one name for the whole model"):
        model.set_attn_implementation({"": "qtx_sampled"})
    assert torch.equal(model(TOKENS).logits, exact)


def test_attention_without_softmax_is_refused():
    config = transformers.ReformerConfig(
        hidden_size=32, axial_pos_embds=False, attn_layers=["local", "lsh"], is_decoder=True, vocab_size=40,
        num_attention_heads=2, attention_head_size=8, feed_forward_size=32, max_position_embeddings=128,
    )  # fmt: skip
    config.qtx_sampled = {"num_samples": 8}
    model = transformers.ReformerModelWithLMHead._from_config(
        config, attn_implementation="qtx_sampled"
    ).eval()
    with pytest.raises(qtx.ArgumentError, match="computes no softmax over keys"), torch.no_grad():
        model(TOKENS)
    config = transformers.MambaConfig(num_hidden_layers=1, hidden_size=16, vocab_size=40)
    mamba = transformers.AutoModel.from_config(config, attn_implementation="qtx_sampled")
    with pytest.raises(qtx.ArgumentError, match="has no attention modules"):
        mamba(TOKENS)
    config = transformers.YosoConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
    with pytest.raises(qtx.ArgumentError, match="no attention by softmax"):
        transformers.AutoModel.from_config(config, attn_implementation="qtx_sampled")
