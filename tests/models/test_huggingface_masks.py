"""Masks of transformers' models say which keys a query sees, whatever the model does with them."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.masking_utils import bidirectional_mask_function, eager_mask

import qtx_lab as qtx
from qtx_lab.models import huggingface
from qtx_lab.models.huggingface_masks import PlainMask, as_visible, make_mask, read_mask

transformers.logging.set_verbosity_error()
huggingface.register()

EXACT = {"sampler": "exact"}
ALL_KEYS = {"sampler": "head-tail", "num_samples": 64}  # more draws than keys: the head has them all


def model_of(make_config, attention, settings=None, kind=transformers.AutoModelForCausalLM):
    config = make_config()
    if settings is not None:
        config.qtx_sampled = settings
    torch.manual_seed(0)
    model = kind.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():  # rows far from uniform
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                p *= 8
    return model


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def nllb():
    return transformers.NllbMoeConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, num_experts=2,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [EXACT, ALL_KEYS])
def test_a_decoder_whose_modules_do_not_say_so_does_not_see_the_future(settings):
    model = model_of(nllb, "qtx_sampled", settings, transformers.AutoModel)
    tokens = torch.randint(2, 64, (1, 20))
    other = tokens[:, :9].clone()
    other[0, -1] = 5 if other[0, -1] != 5 else 6
    with torch.no_grad():
        first = model(input_ids=tokens, decoder_input_ids=tokens[:, :9])[0]
        second = model(input_ids=tokens, decoder_input_ids=other)[0]
    assert not torch.allclose(first[:, -1], second[:, -1])
    torch.testing.assert_close(first[:, :-1], second[:, :-1], atol=1e-6, rtol=0)


def gemma():
    return transformers.Gemma4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=8, num_kv_shared_layers=2, sliding_window=64,
        pad_token_id=0, layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=64,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [EXACT, ALL_KEYS])
def test_queries_that_a_model_cuts_off_keep_their_positions(settings):
    model = model_of(gemma, "qtx_sampled", settings)
    tokens = torch.randint(1, 64, (1, 24))
    with torch.no_grad():
        full, part = model(tokens).logits[:, -4:], model(tokens, logits_to_keep=4).logits
    assert relative(part, full) < 1e-5


def deepseek():
    return transformers.DeepseekV32Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        v_head_dim=12, qk_nope_head_dim=8, index_topk=4, index_n_heads=2, index_head_dim=16,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [EXACT, ALL_KEYS])
def test_keys_that_a_model_selects_are_the_only_ones(settings):
    tokens = torch.randint(1, 64, (2, 40))
    with torch.no_grad():
        expected = model_of(deepseek, "eager")(tokens).logits
        actual = model_of(deepseek, "qtx_sampled", settings)(tokens).logits
    assert relative(actual, expected) < 1e-5


def test_keywords_that_nobody_knows_are_refused_by_name():
    class Module(torch.nn.Module):
        config = transformers.LlamaConfig()

    q = torch.randn(1, 2, 5, 8)
    for settings in (EXACT, ALL_KEYS):
        Module.config.qtx_sampled = settings
        for name in ("block_indices", "cu_seq_lens_q", "rotation"):
            with pytest.raises(qtx.ArgumentError, match=name):
                huggingface.attention_forward(Module(), q, q, q, None, **{name: torch.zeros(2)})
            huggingface.attention_forward(Module(), q, q, q, None, eager=eager, **{name: None})


def eager(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    return query, None


def test_a_float_mask_that_only_hides_is_a_boolean_one():
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(2, 1, 3, 4).masked_fill_(torch.ones(3, 4).triu(1).bool(), lowest)
    assert torch.equal(as_visible(mask), mask == 0)
    bias = mask + torch.rand(3, 4)
    assert as_visible(bias) is bias
    mask[0, 0, 1] = (
        lowest  # a row that sees nothing attends to all keys alike, in transformers' eager attention
    )
    assert torch.equal(as_visible(mask).softmax(-1), mask.softmax(-1))
    assert (as_visible(mask)[0, 0, 0, 1:] == -torch.inf).all()


SIZES = {"batch_size": 2, "q_length": 5, "kv_length": 8}


def test_a_plain_mask_is_what_eager_attention_gets():
    causal = make_mask(**SIZES, q_offset=3)
    whole = make_mask(
        **SIZES, mask_function=bidirectional_mask_function, allow_is_causal_skip=False,
        allow_is_bidirectional_skip=True,
    )  # fmt: skip
    step = make_mask(batch_size=2, q_length=1, kv_length=8, q_offset=7, dtype=torch.float16)
    assert not isinstance(causal, PlainMask)  # transformers leaves no such mask out
    assert isinstance(whole, PlainMask)
    assert isinstance(step, PlainMask)
    assert read_mask(whole, None, True, 5, 8).as_mask(torch.zeros(2, 1, 5, 4)) is None
    assert read_mask(step, None, True, 1, 8).first_position == 7
    for mask, expected in ((whole, 0.0), (step, 0.0)):
        assert mask.dtype in (torch.float32, torch.float16)
        assert torch.equal(mask + 0, torch.full(mask.shape, expected, dtype=mask.dtype))
        assert type(mask[:, :, -2:]) is torch.Tensor


@pytest.mark.parametrize(("length", "n", "offset"), [(6, 6, 0), (6, 9, 0), (1, 9, 4)])
def test_a_plain_causal_mask_and_the_same_as_a_tensor_mean_the_same(length, n, offset):
    """(6, 9, 0) fills a static cache; (1, 9, 4) is a step of one without an attention mask."""
    mask = make_mask(2, length, n, offset)
    assert isinstance(mask, PlainMask)
    plain = read_mask(mask, False, False, length, n)
    expected = eager_mask(2, length, n, offset)[:1] == 0
    query = torch.zeros(2, 1, length, 4)
    assert torch.equal(mask.numbers, eager_mask(2, length, n, offset))
    assert not expected[..., plain.num_keys :].any()
    visible = plain.as_mask(query)
    visible = torch.ones(1, dtype=torch.bool) if visible is None else visible
    assert torch.equal(visible.expand(1, 1, length, plain.num_keys), expected[..., : plain.num_keys])


def test_a_plain_mask_that_was_changed_is_read_as_it_is():
    mask = make_mask(1, 4, 4)
    mask[..., 0] = torch.finfo(torch.float32).min
    assert not read_mask(mask, True, True, 4, 4).is_causal
    visible = as_visible(read_mask(mask, True, True, 4, 4).mask[0, 0, 1:])
    assert torch.equal(visible, torch.ones(3, 4, dtype=torch.bool).tril(1) & (torch.arange(4) > 0))


def test_without_a_mask_fewer_causal_queries_than_keys_are_refused():
    with pytest.raises(qtx.ShapeError, match="3 causal queries attend to 5 keys"):
        read_mask(None, None, True, 3, 5)
    assert read_mask(None, False, True, 3, 5).as_mask(torch.zeros(1, 1, 3, 4)) is None
    assert read_mask(None, None, True, 5, 5).is_causal


@pytest.mark.parametrize("settings", [EXACT, ALL_KEYS])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_windows_and_chunks_in_every_cache(cache, settings):
    def llama4():
        return transformers.Llama4TextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, head_dim=8,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
            attention_chunk_size=8, layer_types=["chunked_attention", "full_attention"], pad_token_id=0,
        )  # fmt: skip

    tokens = torch.randint(1, 64, (2, 13))
    for make in (gemma, llama4):
        options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
        expected = model_of(make, "eager").generate(tokens, **options)
        assert torch.equal(model_of(make, "qtx_sampled", settings).generate(tokens, **options), expected)


def llama(**options):
    return transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        **options,
    )


def packed():
    return llama(), {"position_ids": torch.cat((torch.arange(10), torch.arange(14)))[None]}


def bidirectional():
    config = llama()
    config.is_causal = False
    return config, {}


def prefix():
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8, use_bidirectional_attention=True,
    )  # fmt: skip
    return config, {}


@pytest.mark.parametrize("settings", [EXACT, ALL_KEYS])
@pytest.mark.parametrize("case", [packed, bidirectional, prefix])
def test_masks_of_other_kinds(case, settings):
    keywords = case()[1]
    tokens = torch.randint(1, 64, (1, 24))
    with torch.no_grad():
        expected = model_of(lambda: case()[0], "eager")(tokens, **keywords).logits
        actual = model_of(lambda: case()[0], "qtx_sampled", settings)(tokens, **keywords).logits
    assert relative(actual, expected) < 1e-5


def test_a_causal_model_that_hands_its_mask_on_has_none_made(monkeypatch):
    """So control variates, which know no masks, go with it, in prefill and in decoding."""
    monkeypatch.setattr(PlainMask, "numbers", property(lambda mask: pytest.fail("the mask was computed")))
    model = model_of(llama, "qtx_sampled", {"num_samples": 8, "control_variate": "topk"})
    tokens = torch.randint(1, 64, (2, 13))
    model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
