"""Sampled attention in transformers' models: as exact as eager without draws, and reproducible with them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers

import qtx_lab as qtx
from qtx_lab.models import huggingface

transformers.logging.set_verbosity_error()
huggingface.register()

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def llama(attention: str = huggingface.IMPLEMENTATION, settings=None, **options):
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **options)
    return model_of(transformers.LlamaForCausalLM, config, attention, settings)


def bert(attention: str = huggingface.IMPLEMENTATION, settings=None, **options):
    config = transformers.BertConfig(**SMALL, **options)
    return model_of(transformers.BertModel, config, attention, settings)


def model_of(kind, config, attention, settings):
    if settings is not None:
        config.qtx_sampled = settings
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():  # rows far from uniform
        for name, p in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "query", "key")) and p.ndim == 2:
                p *= 12
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))


EXACT = {"sampler": "exact"}
MANY = {"sampler": "systematic", "num_samples": 30_000, "seed": 0}
LEFT, RIGHT = torch.ones(2, 12, dtype=torch.int64), torch.ones(2, 12, dtype=torch.int64)
LEFT[0, :5], RIGHT[1, 7:] = 0, 0


@pytest.mark.parametrize("settings", [EXACT, MANY])
@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("padding", [None, LEFT, RIGHT])
def test_a_forward_pass_agrees_with_eager(make, settings, padding, tokens):
    """Exact to 1e-5, many draws to theirs, at every token that is not padding."""
    tolerance = 1e-5 if settings is EXACT else 3e-3
    with torch.no_grad():
        expected = make("eager")(tokens, attention_mask=padding)[0]
        actual = make(settings=settings)(tokens, attention_mask=padding)[0]
    kept = slice(None) if padding is None else padding.bool()
    torch.testing.assert_close(actual[kept], expected[kept], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("settings", [EXACT, MANY])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_four_dimensions(settings, kind, tokens):
    seen = torch.ones(12, 12, dtype=torch.bool).tril() & (torch.rand(2, 1, 12, 12) < 0.7)
    seen |= torch.eye(12, dtype=torch.bool)
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = llama("eager")(tokens, attention_mask=bias)[0]
        actual = llama(settings=settings)(tokens, attention_mask=seen if kind == "bool" else bias)[0]
    tolerance = 1e-5 if settings is EXACT else 3e-3
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, LEFT])
def test_generation_with_transformers_own_caches(cache, padding, tokens):
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    expected = llama("eager").generate(tokens, attention_mask=padding, **options)
    for settings in (EXACT, {"sampler": "head-tail", "num_samples": 32}):  # all keys are in the head
        assert torch.equal(
            llama(settings=settings).generate(tokens, attention_mask=padding, **options), expected
        )


def test_an_encoder_with_a_decoder(tokens):
    def bart(attention, settings=None):
        config = transformers.BartConfig(
            vocab_size=40, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32,
            decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return model_of(transformers.BartForConditionalGeneration, config, attention, settings)

    with torch.no_grad():
        expected = bart("eager")(tokens, attention_mask=RIGHT, decoder_input_ids=tokens[:, :5]).logits
        for settings, tolerance in ((EXACT, 1e-5), (MANY, 3e-3)):
            actual = bart(huggingface.IMPLEMENTATION, settings)(
                tokens, attention_mask=RIGHT, decoder_input_ids=tokens[:, :5]
            )
            torch.testing.assert_close(actual.logits, expected, atol=tolerance, rtol=tolerance)


def test_draws_differ_between_calls_and_repeat_by_seed(tokens):
    def outputs(seed, calls=2):
        model = llama(settings={"num_samples": 4, "seed": seed})
        torch.manual_seed(99 + calls)  # no matter
        with torch.no_grad():
            return [model(tokens).logits for _ in range(calls)], model

    (first, second), model = outputs(5)
    again, _ = outputs(5, calls=3)
    assert not torch.equal(first, second)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, outputs(6)[0][0])
    huggingface.restart(model)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, first)
    model.config.qtx_sampled = {"num_samples": 4}
    logits = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_layers_differ(tokens, monkeypatch):
    used = []
    attend = huggingface.attend
    monkeypatch.setattr(
        huggingface,
        "attend",
        lambda problem, settings, g: used.append(settings.budget.num_samples) or attend(problem, settings, g),
    )
    settings = {"num_samples": 8, "layers": {"0": EXACT, 2: {"num_samples": 16}}}
    with torch.no_grad():
        llama(settings=settings)(tokens)
    assert used == [8, 16]


def test_settings_are_saved_with_the_model(tokens, tmp_path):
    model = llama(settings={"num_samples": 8, "seed": 3, "layers": {0: EXACT}})
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=huggingface.IMPLEMENTATION
    )
    assert loaded.config.qtx_sampled == {"num_samples": 8, "seed": 3, "layers": {"0": EXACT}}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)


def test_a_copy_computes_exact_layers_as_the_model_does(tokens):
    """By SDPA where the model may: eager attention would take memory L * n."""
    model = llama(settings=EXACT)
    with torch.no_grad():
        expected = model(tokens).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(tokens).logits, expected)


BAD = [
    ({"sampler": "systematik"}, "Did you mean 'systematic'"),
    ({"samples": 8}, "'samples' is unknown"),
    ({"num_samples": 0}, "num_samples=0"),
    ({"num_samples": "8"}, "num_samples='8'"),
    ({"seed": -1}, "seed"),
    ({"control_variate": "performa"}, "performer"),
    ({"layers": {"3": EXACT}}, "from 0 to 2"),
    ({"layers": {"one": EXACT}}, "from 0 to 2"),
    ({"layers": {"1": {"seed": 3}}}, "'seed' is unknown"),
    ({"layers": {"1": "exact"}}, "must be a mapping"),
    ({"layers": {1: EXACT, "1": EXACT}}, "twice"),
    ({"sampler": qtx.SystematicSampler()}, "must be JSON"),
    ("systematic", "must be a mapping"),
]


@pytest.mark.parametrize(("settings", "match"), BAD)
def test_mistakes_fail_at_load(settings, match, tmp_path, tokens):
    with pytest.raises(qtx.ArgumentError, match=match):
        llama(settings=settings)
    model = llama("eager", settings={})
    model.config.qtx_sampled = settings
    with pytest.raises(qtx.ArgumentError, match=match):
        model.set_attn_implementation(huggingface.IMPLEMENTATION)
    assert model.config._attn_implementation == "eager"
    later = llama(settings={})
    later.config.qtx_sampled = settings
    with pytest.raises(qtx.ArgumentError, match=match):
        later(tokens)
    if isinstance(settings, dict) and not {"sampler", "layers"} & set(settings):
        llama("eager", settings=settings).save_pretrained(tmp_path)
        with pytest.raises(qtx.ArgumentError, match=match):
            transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=huggingface.IMPLEMENTATION)


def test_models_that_would_ignore_it_are_refused():
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**SMALL).to_dict())
    config.qtx_sampled = {"num_samples": 8}
    with pytest.raises(qtx.ArgumentError, match=r"config\.text_config"):
        transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="qtx_sampled")


def test_the_gradient_is_that_of_eager_on_average(tokens):
    """Two directions of the gradient, 60 passes: z-scores below 4.5 (false-alarm rate 1e-5)."""

    def gradient(model):
        model.zero_grad()
        # Linear in the first layer's output: unbiased there, however the draws fall.
        layer = model.layers[0].self_attn
        x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(3))
        rotation = model.rotary_emb(x, torch.arange(12)[None])
        layer(x, rotation, None)[0].pow(1).mul(x).sum().backward()
        g = layer.q_proj.weight.grad, layer.v_proj.weight.grad
        return torch.stack([(part * direction).sum() for part, direction in zip(g, directions, strict=True)])

    directions = None
    exact = llama("eager").model
    directions = [torch.ones_like(exact.layers[0].self_attn.q_proj.weight), torch.ones(16, 32)]
    mask = torch.full((12, 12), torch.finfo(torch.float32).min).triu(1)
    attend = type(exact.layers[0].self_attn).forward
    exact.layers[0].self_attn.forward = lambda x, r, m: attend(
        exact.layers[0].self_attn, x, r, mask[None, None]
    )
    expected = gradient(exact)
    model = llama(settings={"num_samples": 4, "seed": 0}).model
    actual = torch.stack([gradient(model) for _ in range(60)])
    z = (actual.mean(0) - expected) / (actual.std(0) / 60**0.5)
    assert z.abs().max() < 4.5
    assert (actual.std(0) > 0).all()


def test_training_drops_keys_and_checkpoints_only_torchs_own_draws(tokens):
    model = bert(settings={"sampler": "head-tail", "num_samples": 32}, attention_probs_dropout_prob=0.5,
                 hidden_dropout_prob=0.0)  # fmt: skip
    with torch.no_grad():
        still = model(tokens)[0]
        assert torch.allclose(still, model(tokens)[0])
        model.train()
        assert not torch.allclose(still, model(tokens)[0], atol=1e-3)
    for seed in (None, 0):
        model = llama(settings={"num_samples": 4, "seed": seed})
        grads = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.train()
            model.zero_grad()
            torch.manual_seed(7)
            huggingface.restart(model)
            loss = model(tokens, labels=tokens).loss
            if checkpointing and seed == 0:
                with pytest.raises(qtx.ArgumentError, match="leave `seed` out"):
                    loss.backward()
            else:
                loss.backward()
                grads.append(model.lm_head.weight.grad.clone())
        assert seed == 0 or torch.allclose(*grads)


@pytest.mark.parametrize("settings", [EXACT, MANY])
def test_sliding_windows_hide_what_they_hide_from_eager(settings, tokens):
    def logits(attention):
        config = transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4)
        return model_of(transformers.MistralForCausalLM, config, attention, settings)(tokens).logits

    with torch.no_grad():
        torch.testing.assert_close(logits("qtx_sampled"), logits("eager"), atol=5e-3, rtol=0)


@pytest.mark.parametrize("seed", [None, 0])
def test_compiled_it_draws_as_it_does_uncompiled(seed, tokens):
    model = llama(settings={"num_samples": 8, "seed": seed})
    compiled = torch.compile(model, backend="eager")
    logits = []
    for each in (compiled, model):
        torch.manual_seed(1)
        huggingface.restart(model)
        with torch.no_grad():
            logits.append(each(tokens).logits)
    assert torch.equal(*logits)


def test_weights_are_given_where_asked(tokens):
    with torch.no_grad():
        actual = bert(settings=MANY)(tokens, output_attentions=True).attentions
        expected = bert("eager")(tokens, output_attentions=True).attentions
    assert len(actual) == 3
    torch.testing.assert_close(actual[0], expected[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("proposal", ["exact", "low-rank", "int4"])
def test_a_sampled_cache_decodes(proposal, tokens):
    settings = {"num_samples": 50_000, "seed": 0, "layers": {"1": EXACT}}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    model = llama(settings=settings)
    cache = huggingface.SampledCache(
        model.config, proposal=proposal, rank=4 if proposal == "low-rank" else None
    )
    actual = model.generate(tokens, past_key_values=cache, **options)
    assert torch.equal(actual, llama("eager").generate(tokens, **options))
    assert [type(layer).__name__ for layer in cache.layers] == [
        "SampledLayer",
        "DynamicLayer",
        "SampledLayer",
    ]
    assert cache.get_seq_length() == len(cache.layers[0].sampled) == 19
    with torch.no_grad():  # another part of a prompt: all keys, and a mask
        more = model(actual[:, -1:].repeat(1, 3), past_key_values=cache).logits
        expected = llama("eager")(torch.cat((actual[:, :-1], actual[:, -1:].repeat(1, 3)), 1)).logits[:, -3:]
    torch.testing.assert_close(more, expected, atol=5e-3, rtol=0)


def test_what_a_sampled_cache_cannot_do(tokens):
    model = llama(settings={"num_samples": 8})
    with pytest.raises(qtx.ArgumentError, match="int4"):
        huggingface.SampledCache(model.config, proposal="int3")
    with pytest.raises(qtx.ArgumentError, match="'eager'"):
        huggingface.SampledCache(llama("eager").config)
    sliding = transformers.MistralConfig(**SMALL, sliding_window=4, attn_implementation="qtx_sampled")
    with pytest.raises(qtx.ArgumentError, match="layers of sliding_attention"):
        huggingface.SampledCache(sliding)


def test_importing_qtx_lab_leaves_transformers_alone():
    code = (
        "import sys, qtx_lab, qtx_lab.attention; qtx_lab.sampled_attention; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
