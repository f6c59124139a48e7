"""`SampledCache` in transformers' models: equal to eager in the limit of many draws, or refused by name."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import qtx_lab as qtx
from qtx_lab.bench.huggingface import make_model
from qtx_lab.bench.small_models import model_classes
from qtx_lab.cache import SampledKVCache
from qtx_lab.models import huggingface
from qtx_lab.models.huggingface_layer import SampledLayer

transformers.logging.set_verbosity_error()
huggingface.register()

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
LOW_RANK_KEYS = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=None),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, **WINDOWS, head_dim=8, query_pre_attn_scalar=8),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, **WINDOWS, use_sliding_window=True, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, **WINDOWS, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=3.0
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SMALL, **WINDOWS, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "phi3": lambda: transformers.Phi3Config(**SMALL, sliding_window=None, pad_token_id=0),
}
"""Decoders with full attention in some layers at least, whose attention a cache can draw for."""

EXACT_WINDOWS = {"layers": {"0": {"sampler": "exact"}}}
OF_WINDOWS = {
    "gemma3": {"sampler": "head-tail"},
    "qwen3": {"sampler": "head-tail"},
    "gemma2": EXACT_WINDOWS,
    "gpt-oss": EXACT_WINDOWS,
}
"""Settings that make the windows of these models exact where all keys are drawn."""

MANY = {"num_samples": 4096, "seed": 0}
"""More draws than there are tokens: every key is drawn, and the output is exact."""

PROMPTS = torch.randint(1, 40, (2, 14), generator=torch.Generator().manual_seed(1))
LEFT = torch.ones_like(PROMPTS)
LEFT[0, :6] = 0
GREEDY = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "pad_token_id": 0}


def model_of(name, attention=huggingface.IMPLEMENTATION, settings=MANY):
    """A small random model whose rows are far from uniform."""
    config = CONFIGS[name]() if isinstance(name, str) else name
    config.qtx_sampled = settings
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter, p in model.named_parameters():
            if (
                any(part in parameter for part in ("q_proj", "k_proj", "qkv_proj", "query", "key"))
                and p.ndim == 2
            ):
                p *= 8
            if parameter.endswith("sinks"):
                p += 2
    return model


def stepped(model, tokens, cache, mask=None, first=9):
    """Logits of the tokens from `first` on, which are given one by one after the others."""
    ones = torch.ones_like(tokens) if mask is None else mask
    positions = (ones.cumsum(-1) - 1).clamp_min(0)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    logits = []
    with torch.no_grad():
        for start, end in [(0, first), *((i, i + 1) for i in range(first, tokens.shape[1]))]:
            logits.append(
                model(
                    tokens[:, start:end],
                    attention_mask=ones[:, :end],
                    past_key_values=cache,
                    **({"position_ids": positions[:, start:end]} if takes_positions else {}),
                ).logits[:, -1:]
            )
    return torch.cat(logits, 1)


@pytest.mark.parametrize("padding", [None, LEFT])
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_agree_with_eager(name, padding):
    """Logits of every step, to 1e-4, with padding at the left and without, where every key is drawn."""
    has_windows = name in OF_WINDOWS
    model = model_of(name, settings={**MANY, **OF_WINDOWS.get(name, {})})
    eager = model_of(name, "eager")
    expected = stepped(eager, PROMPTS, transformers.DynamicCache(config=eager.config), padding)
    for proposal in ("exact", "low-rank"):
        cache = huggingface.SampledCache(model.config, proposal=proposal)
        actual = stepped(model, PROMPTS, cache, padding)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    own = {type(layer) for layer in cache.layers}
    assert own == {SampledLayer} | ({DynamicSlidingWindowLayer} if has_windows else set())


def test_a_prompt_attends_exactly_unless_asked_otherwise():
    """With 2 draws a row: the prompt's logits are eager's, sliding layers included; drawn on demand."""
    settings = {"num_samples": 2, "seed": 0}
    expected = model_of("gemma3", "eager")(PROMPTS).logits
    for prefill in ("exact", "sampled"):
        model = model_of("gemma3", settings=settings)
        cache = huggingface.SampledCache(model.config, prefill=prefill)
        with torch.no_grad():
            actual = model(PROMPTS, past_key_values=cache).logits
            after = model(PROMPTS[:, :1], past_key_values=cache).logits
        assert torch.allclose(actual, expected, atol=1e-4) == (prefill == "exact")
        assert after.isfinite().all()


def test_settings_name_the_proposal_of_a_layer():
    """A layer's proposal replaces the common one with its rank; the cache's own is for the others."""
    settings = {**MANY, "proposal": "low-rank", "rank": 3}
    settings["layers"] = {"0": {"sampler": "exact"}, "1": {"proposal": "int4"}}
    model, eager = model_of("llama", settings=settings), model_of("llama", "eager")
    cache = huggingface.SampledCache(model.config)
    expected = stepped(eager, PROMPTS, transformers.DynamicCache(config=eager.config))
    torch.testing.assert_close(stepped(model, PROMPTS, cache), expected, atol=1e-4, rtol=1e-4)
    exact, int4, low_rank = cache.layers
    assert not isinstance(exact, SampledLayer)
    assert (int4.sampled.proposal, low_rank.sampled.proposal) == ("int4", "low-rank")
    assert low_rank.options["rank"] == 3
    model = model_of("llama", settings={**MANY, "layers": {"1": {"proposal": "int4"}}})
    cache = huggingface.SampledCache(model.config, proposal="exact")
    stepped(model, PROMPTS, cache)
    assert [layer.sampled.proposal for layer in cache.layers] == ["exact", "int4", "exact"]


def test_layers_of_their_own_keep_what_is_common():
    common = {"num_samples": 5, "seed": 3, "proposal": "low-rank", "rank": 2, "share_keys": True}
    settings = huggingface.read_settings({**common, "layers": {"0": {"num_samples": 7}}})
    assert settings[0]["num_samples"] == 7
    assert {**settings[0], "num_samples": 5, "sampler": 0} == {**settings[None], "sampler": 0}
    assert (settings[0]["seed"], settings[0]["rank"], settings[0]["share_keys"]) == (3, 2, True)


def test_a_proposal_without_a_sampled_cache_is_refused():
    """Prompts and steps of models with a cache of transformers' own; windows of a SampledCache draw."""
    settings = {**MANY, "proposal": "low-rank", "rank": 2}
    model = model_of("llama", settings=settings)
    for cache in (None, transformers.DynamicCache(config=model.config)):
        with torch.no_grad(), pytest.raises(qtx.ArgumentError, match="only a SampledCache uses"):
            model(PROMPTS, past_key_values=cache)
    windows = model_of("gemma3", settings={**settings, "sampler": "head-tail"})
    eager = model_of("gemma3", "eager")
    actual = stepped(windows, PROMPTS, huggingface.SampledCache(windows.config))
    expected = stepped(eager, PROMPTS, transformers.DynamicCache(config=eager.config))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"proposal": "lowrank"}, r"\['proposal'\].*Did you mean 'low-rank'"),
        ({"rank": 4}, r"\['rank'\]=4 needs a proposal"),
        ({"share_keys": 1}, r"\['share_keys'\]=1"),
        ({"proposal": "low-rank", "rank": 0}, r"\['rank'\]=0"),
        ({"proposal": "low-rank", "layers": {"1": {"rank": True}}}, r"\['layers'\]\['1'\]\['rank'\]=True"),
        ({"layers": {"2": {"proposal": 3}}}, r"\['layers'\]\['2'\]\['proposal'\]"),
    ],
)
def test_proposals_that_no_cache_has_are_refused_with_the_model(settings, match):
    with pytest.raises(qtx.ArgumentError, match=match):
        model_of("llama", settings=settings)


@pytest.mark.parametrize(
    ("proposal", "match"),
    [("low-rank", "rank=9 is not allowed: it must be at most E=8"), ("int4", "rank=9 is for")],
)
def test_a_rank_that_the_keys_do_not_have_is_refused_with_the_cache(proposal, match):
    model = model_of("llama", settings={"layers": {"2": {"proposal": proposal, "rank": 9}}})
    with pytest.raises(qtx.ArgumentError, match=match):
        huggingface.SampledCache(model.config)


def test_query_heads_share_their_keys_where_the_settings_say_so(monkeypatch):
    shared, attend = [], SampledKVCache.attend
    monkeypatch.setattr(
        SampledKVCache,
        "attend",
        lambda *args, **options: shared.append(options["share_keys"]) or attend(*args, **options),
    )
    model = model_of("llama", settings={**MANY, "share_keys": True, "layers": {"1": {"share_keys": False}}})
    stepped(model, PROMPTS[:, :3], huggingface.SampledCache(model.config), first=2)
    assert shared == [True, False, True]


@pytest.mark.parametrize("padding", [None, LEFT])
@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {**GREEDY, "num_beams": 3},
        {**GREEDY, "num_return_sequences": 2, "num_beams": 2},
        {**GREEDY, "do_sample": True, "top_k": 5},
        {**GREEDY, "prompt_lookup_num_tokens": 3},
    ],
    ids=["greedy", "beams", "two of two beams", "sampling", "prompt lookup"],
)
def test_generation_agrees_with_eager(options, padding):
    prompts, padding = (x if x is None else x.clone() for x in (PROMPTS, padding))
    if "prompt_lookup_num_tokens" in options:  # transformers takes one sequence
        prompts, padding = prompts[:1], None if padding is None else padding[:1]
    generated = []
    for attention in ("eager", huggingface.IMPLEMENTATION):
        model = model_of("llama", attention)
        own = transformers.DynamicCache if attention == "eager" else huggingface.SampledCache
        torch.manual_seed(3)
        generated.append(
            model.generate(
                prompts, attention_mask=padding, past_key_values=own(config=model.config), **options
            )
        )
    assert torch.equal(*generated)


def test_assistants_draft_from_a_sampled_cache_and_are_cropped():
    """A draft that is partly refused is taken back from the cache: the next steps are eager's again."""
    model, eager = model_of("llama"), model_of("llama", "eager")
    cache = huggingface.SampledCache(model.config, proposal="exact")
    expected = eager.generate(PROMPTS[:1], **GREEDY)
    assert torch.equal(
        model.generate(PROMPTS[:1], assistant_model=eager, past_key_values=cache, **GREEDY), expected
    )
    assert torch.equal(
        model_of("llama", "eager").generate(PROMPTS[:1], assistant_model=model, **GREEDY), expected
    )


@pytest.mark.parametrize("proposal", ["exact", "low-rank", "int4"])
@pytest.mark.parametrize("removed", [1, 4, 8])
def test_cropped_tokens_are_forgotten(proposal, removed):
    """Steps after a crop, of new tokens, and of tokens that are there for longer, agree with eager."""
    model, eager = model_of("llama"), model_of("llama", "eager")
    logits = []
    for m, cache in (
        (model, huggingface.SampledCache(model.config, proposal=proposal)),
        (eager, transformers.DynamicCache(config=eager.config)),
    ):
        stepped(m, PROMPTS, cache, LEFT)
        cache.crop(-removed)
        assert cache.get_seq_length() == 14 - removed
        mask = torch.cat((LEFT[:, : 14 - removed], LEFT[:, -2:]), 1)
        with torch.no_grad():
            logits.append(m(PROMPTS[:, :2], attention_mask=mask, past_key_values=cache).logits[:, -1:])
            mask = torch.cat((mask, mask[:, -1:]), 1)
            logits.append(m(PROMPTS[:, 2:3], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(logits[:2], logits[2:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padding", [None, LEFT])
def test_sequences_can_be_selected_repeated_and_copied(padding):
    model, eager = model_of("llama"), model_of("llama", "eager")
    ways = [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
    ]
    sampled, own = huggingface.SampledCache(model.config), transformers.DynamicCache(config=eager.config)
    stepped(model, PROMPTS, sampled, padding)
    stepped(eager, PROMPTS, own, padding)
    mask = torch.ones_like(PROMPTS) if padding is None else padding
    for select in ways:
        logits = []
        for m, cache in ((model, copy.deepcopy(sampled)), (eager, copy.deepcopy(own))):
            rows = transformers.DynamicCache()
            rows.update(mask[:, None, :, None], mask[:, None, :, None], 0)
            select(rows)
            shown = rows.layers[0].keys[:, 0, :, 0]
            select(cache)
            batch = len(shown)
            for i in range(2):
                shown = torch.cat((shown, shown[:, -1:]), 1)
                with torch.no_grad():
                    token = PROMPTS[:1, i : i + 1].expand(batch, -1)
                    logits.append(m(token, attention_mask=shown, past_key_values=cache).logits)
        torch.testing.assert_close(logits[:2], logits[2:], atol=1e-4, rtol=1e-4)


def test_a_mask_that_changes_is_followed():
    """Tokens that are hidden later, or shown again, are; weights have the columns of all tokens."""
    model, eager = model_of("llama"), model_of("llama", "eager")
    outputs = []
    for m, cache in (
        (model, huggingface.SampledCache(model.config, proposal="exact")),
        (eager, transformers.DynamicCache(config=eager.config)),
    ):
        with torch.no_grad():
            m(PROMPTS, past_key_values=cache)
            for hidden in ((), (3, 4), (3, 15), ()):
                shown = torch.ones(2, cache.get_seq_length() + 1, dtype=torch.int64)
                shown[1, list(hidden)] = 0
                step = m(
                    PROMPTS[:, :1],
                    attention_mask=shown,
                    position_ids=torch.full((2, 1), shown.shape[1] - 1),
                    past_key_values=cache,
                    output_attentions=True,
                )
                outputs += [step.logits, *step.attentions]
    half = len(outputs) // 2
    torch.testing.assert_close(outputs[:half], outputs[half:], atol=1e-4, rtol=1e-4)


def test_padding_changes_no_draw():
    """A padded sequence draws as it does alone, from the same seed."""
    settings = {"num_samples": 3, "seed": 5}
    padded, alone = (model_of("llama", settings=settings) for _ in range(2))
    actual = stepped(padded, PROMPTS[:1], huggingface.SampledCache(padded.config), LEFT[:1])
    expected = stepped(alone, PROMPTS[:1, 6:], huggingface.SampledCache(alone.config), first=3)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(
        actual, stepped(alone, PROMPTS[:1, 6:], huggingface.SampledCache(alone.config), first=3)
    )


REFUSED_MODELS = {
    "differential": transformers.DiffLlamaConfig(**SMALL),
    "latent keys": transformers.DeepseekV3Config(
        **{**SMALL, **LOW_RANK_KEYS, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, n_group=1, topk_group=1, first_k_dense_replace=3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_models_that_change_what_the_cache_gave_them_are_refused(name):
    """Before any attention; with exact layers, and transformers' own cache in their place, they run."""
    config = REFUSED_MODELS[name]
    model = model_of(config)
    cache = huggingface.SampledCache(model.config, proposal="exact")
    with torch.no_grad(), pytest.raises(qtx.ArgumentError, match="computes with keys or values"):
        model(PROMPTS, past_key_values=cache)
    model.config.qtx_sampled = {"sampler": "exact"}
    cache = huggingface.SampledCache(model.config, proposal="exact")
    actual = stepped(model, PROMPTS, cache)
    eager = model_of(config, "eager")
    expected = stepped(eager, PROMPTS, transformers.DynamicCache(config=eager.config))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


SOME = [
    "CohereForCausalLM",
    "DeepseekV2ForCausalLM",
    "DiffLlamaForCausalLM",
    "Gemma4ForCausalLM",
    "GPT2LMHeadModel",
    "JambaForCausalLM",
    "JetMoeForCausalLM",
    "MptForCausalLM",
    "OPTForCausalLM",
]


def test_model_classes_are_right_or_refused(soak):
    """Steps of causal classes, in `make soak` of all, agree with eager's, or our error says why not."""
    wrong, right = {}, 0
    for cls in model_classes("causal"):
        if not soak and cls.__name__ not in SOME:
            continue
        try:
            eager = make_model(cls, "eager").eval()
            own = transformers.DynamicCache(config=eager.config.get_text_config(decoder=True))
            expected = stepped(eager, PROMPTS, own, LEFT, first=11)
        except Exception:
            continue  # a class that has no such steps
        try:
            model = make_model(cls, huggingface.IMPLEMENTATION, MANY).eval()
            cache = huggingface.SampledCache(model.config, proposal="exact")
            actual = stepped(model, PROMPTS, cache, LEFT, first=11)
        except qtx.QtxError:
            continue
        error = float((actual - expected).norm() / expected.norm())
        right += error < 0.02
        if error >= 0.02:
            wrong[cls.__name__] = error
    assert not wrong
    assert right >= (90 if soak else 4)


def test_what_a_sampled_cache_is_not_made_for():
    model = model_of("llama")
    with pytest.raises(qtx.ArgumentError, match="Did you mean 'sampled'"):
        huggingface.SampledCache(model.config, prefill="sample")
    with pytest.raises(qtx.ArgumentError, match="rank=99"):
        huggingface.SampledCache(model.config, rank=99)
    bart = transformers.BartConfig(attn_implementation="qtx_sampled")
    with pytest.raises(qtx.ArgumentError, match="encoder-decoder"):
        huggingface.SampledCache(bart)
    with pytest.raises(qtx.ArgumentError, match="does not say which layers"):
        huggingface.SampledCache(transformers.BltConfig(attn_implementation="qtx_sampled"))
    cache = huggingface.SampledCache(model.config)
    with pytest.raises(qtx.ArgumentError, match=r"torch\.no_grad"):
        model(PROMPTS, past_key_values=cache)
    bias = torch.zeros(2, 1, 1, 15)
    bias[..., 3] = 1.5
    with torch.no_grad():
        model(PROMPTS, past_key_values=cache)
        with pytest.raises(qtx.ArgumentError, match="adds numbers to the logits"):
            model(PROMPTS[:, :1], attention_mask=bias, past_key_values=cache)
        model.config.qtx_sampled = {**MANY, "control_variate": "performer"}
        with pytest.raises(qtx.ArgumentError, match="control_variate"):
            model(PROMPTS[:, :1], past_key_values=cache)
    with pytest.raises(qtx.ArgumentError, match="tokens_to_remove=3"):
        cache.crop(3)


def test_what_does_not_fit_a_cache_that_is_there_is_refused():
    """Instead of tokens that are wrong, or of another proposal than the settings name."""
    model = model_of("llama")
    with pytest.raises(qtx.ArgumentError, match="use_cache=False is not allowed with a SampledCache"):
        model.generate(
            PROMPTS, past_key_values=huggingface.SampledCache(model.config), use_cache=False, **GREEDY
        )
    small = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 2}, attn_implementation="qtx_sampled")
    with torch.no_grad(), pytest.raises(qtx.ArgumentError, match="SampledCache of 2 layers"):
        model(PROMPTS, past_key_values=huggingface.SampledCache(small))
    for since, match in (
        ({"proposal": "int4"}, r"\['proposal'\]='int4' came after"),
        ({"proposal": "low-rank", "rank": 2}, r"\['rank'\]=2 came after"),
    ):
        model = model_of("llama")
        cache = huggingface.SampledCache(model.config, rank=3)
        model.config.qtx_sampled = {**MANY, **since}
        with torch.no_grad(), pytest.raises(qtx.ArgumentError, match=match):
            stepped(model, PROMPTS, cache)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"sampler": "head-tail"}, r"qtx_sampled\['sampler'\]='head-tail' would change nothing"),
        ({"control_variate": "performer"}, r"\['control_variate'\]='performer'"),
        ({"layers": {"1": {"sampler": "lattice"}}}, r"\['layers'\]\['1'\]\['sampler'\]='lattice'"),
    ],
)
def test_settings_are_used_or_refused(settings, match):
    model = model_of("llama", settings=settings)
    with pytest.raises(qtx.ArgumentError, match=match):
        huggingface.SampledCache(model.config)
    assert isinstance(huggingface.SampledCache(model.config, prefill="sampled").layers[1], SampledLayer)
    windows = model_of("gemma3", settings=settings)  # its first layer draws by itself
    if "layers" not in settings:
        assert not isinstance(huggingface.SampledCache(windows.config).layers[0], SampledLayer)
    exact = model_of("llama", settings={"layers": {"1": {"sampler": "exact"}}})
    assert type(huggingface.SampledCache(exact.config).layers[1]) is DynamicLayer


# --- Lossless generation ------------------------------------------------------------------------


def tiny_llama(settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL)
    config.qtx_sampled = settings
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="qtx_sampled").eval()


def lossless(model, prompt, cache=None, generation=None, **options):
    generation = huggingface.LosslessGeneration() if generation is None else generation
    cache = huggingface.SampledCache(model.config, proposal="low-rank", rank=2) if cache is None else cache
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, **options}
    return model.generate(prompt, past_key_values=cache, custom_generate=generation, **options)


@pytest.mark.parametrize("settings", [{}, {"layers": {"0": {"sampler": "exact"}}}])
def test_lossless_generation_gives_the_tokens_of_exact_attention(settings):
    model = tiny_llama({"num_samples": 4, "seed": 0, **settings})
    for length in (1, 30):
        prompt = torch.arange(length)[None] % 40
        generation = huggingface.LosslessGeneration()
        cache = huggingface.SampledCache(model.config, proposal="low-rank", rank=2)
        drafted = lossless(model, prompt, cache, generation, repetition_penalty=1.3)
        model.set_attn_implementation("sdpa")
        exact = model.generate(
            prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False, repetition_penalty=1.3
        )
        model.set_attn_implementation("qtx_sampled")
        assert torch.equal(drafted, exact)
        assert generation.report.tokens == 19
        assert cache.get_seq_length() == length + 19
        assert not any(x.verifies for x in cache.layers if isinstance(x, huggingface.SampledLayer))


@pytest.mark.parametrize("loaded", ["by generate", "by from_pretrained"])
def test_lossless_generation_is_loaded_from_a_folder(loaded, tmp_path, monkeypatch):
    """By the file that the guide shows, in both ways in which transformers loads a custom generation."""
    guide = (Path(__file__).parents[2] / "notebooks" / "guides" / "model.md").read_text()
    (code,) = re.findall(r"^```py\n(.*?)^```", guide, flags=re.M | re.S)
    model = tiny_llama({"num_samples": 4, "seed": 0})
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    from_folder = {"custom_generate": str(folder), "trust_remote_code": True}
    trusted = {"trust_remote_code": True} if loaded == "by from_pretrained" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="qtx_sampled", **trusted
    )
    prompt, options = torch.arange(30)[None] % 40, {"max_new_tokens": 20, "do_sample": False}
    config = transformers.GenerationConfig(**options)
    passes, streamer = [], Streamed()
    monkeypatch.setattr(huggingface.LosslessGeneration, "__call__", counted(passes))
    calls = {} if trusted else from_folder
    drafted = [
        model.generate(prompt, rank=2, **options, **calls),
        model.generate(prompt, config, rank=2, streamer=streamer, **calls),
        model.generate(input_ids=prompt, proposal="int4", **options, **calls),
    ]
    assert len(passes) == 3
    with pytest.raises(qtx.ArgumentError, match="assistant_model=LlamaForCausalLM is not allowed"):
        model.generate(prompt, assistant_model=model, **options, **calls)
    model.set_attn_implementation("sdpa")
    expected = type(model).generate(model, prompt, **options)
    assert all(torch.equal(x, expected) for x in drafted)
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.parts), expected[0])


class Streamed(transformers.generation.BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten())

    def end(self):
        self.ended = True


def counted(passes):
    call = huggingface.LosslessGeneration.__call__

    @functools.wraps(call)
    def count(self, *args, **kwargs):
        passes.append(self)
        return call(self, *args, **kwargs)

    return count


def test_lossless_generation_draws_tokens_and_refuses_what_it_does_not_do():
    model = tiny_llama({"num_samples": 4, "seed": 0})
    prompt = torch.arange(30)[None] % 40
    assert lossless(model, prompt, do_sample=True, top_k=5).shape == (1, 50)
    with pytest.raises(qtx.ArgumentError, match="drafts with a SampledCache"):
        lossless(model, prompt, transformers.DynamicCache(config=model.config))
    with pytest.raises(qtx.ArgumentError, match="prompt must attend exactly"):
        lossless(model, prompt, huggingface.SampledCache(model.config, rank=2, prefill="sampled"))
    with pytest.raises(qtx.ArgumentError, match="max_drafts=99"):
        lossless(model, prompt, generation=huggingface.LosslessGeneration(99))
    with pytest.raises(qtx.ArgumentError, match="streamer='text' is not allowed"):
        huggingface.LosslessGeneration(streamer="text")
    with pytest.raises(qtx.ArgumentError, match="rank=3 is not allowed beside past_key_values"):
        huggingface.generate_lossless(
            prompt, model=model, rank=3, past_key_values=huggingface.SampledCache(model.config, rank=2)
        )


HIDING = (torch.arange(30) > 2)[None].long()

NOT_LOSSLESS = [
    ({"inputs": torch.arange(60).view(2, 30) % 40}, "inputs has 2 sequences"),
    ({"attention_mask": HIDING}, "attention_mask hides tokens"),
    ({"inputs_embeds": torch.zeros(1, 30, SMALL["hidden_size"])}, "inputs_embeds is not allowed"),
    ({"position_ids": torch.arange(5, 35)[None]}, "position_ids is not allowed but as 0 to 29"),
    ({"token_type_ids": torch.zeros(1, 30).long()}, "token_type_ids"),
    ({"num_beams": 3}, "num_beams=3 is not allowed"),
    ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2 is not allowed"),
    ({"guidance_scale": 2.0}, r"guidance_scale=2\.0 is not allowed"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 is not allowed"),
    ({"return_dict_in_generate": True}, "return_dict_in_generate=True is not allowed"),
    (
        {"streamer": Streamed(), "assistant_model": torch.nn.Identity()},
        "assistant_model=Identity is not allowed",
    ),
]


@pytest.mark.parametrize(("given", "match"), NOT_LOSSLESS)
def test_what_is_not_lossless_is_refused_by_name_before_any_token(given, match):
    model = tiny_llama({"num_samples": 4, "seed": 0})
    cache = huggingface.SampledCache(model.config, rank=2)
    options = {"inputs": torch.arange(30)[None] % 40, "max_new_tokens": 5, "do_sample": False, **given}
    refused = ValueError if "token_type_ids" in given else qtx.ArgumentError  # the first is transformers' own
    with pytest.raises(refused, match=match):
        huggingface.generate_lossless(model=model, past_key_values=cache, **options)
    assert cache.get_seq_length() == 0


def test_processors_criteria_and_embeddings_alone():
    model, prompt = tiny_llama({"num_samples": 4, "seed": 0}), torch.arange(30)[None] % 40
    options = {
        "max_new_tokens": 20,
        "do_sample": False,
        "logits_processor": transformers.LogitsProcessorList([OnlyEven()]),
        "stopping_criteria": transformers.StoppingCriteriaList([LengthOf(41)]),
        "prefix_allowed_tokens_fn": lambda batch, ids: [x for x in range(40) if x != int(ids[-1])],
        "attention_mask": torch.ones_like(prompt),
        "position_ids": torch.arange(30)[None],
    }
    drafted = huggingface.generate_lossless(prompt, model=model, rank=2, **options)
    embedded = model.get_input_embeddings()(prompt)
    with pytest.raises(qtx.ArgumentError, match="inputs_embeds is not allowed"):
        huggingface.generate_lossless(model=model, inputs_embeds=embedded, max_new_tokens=3)
    model.set_attn_implementation("sdpa")
    assert torch.equal(drafted, model.generate(prompt, **options))
    assert drafted.shape == (1, 41)
    assert bool((drafted[0, 30:] % 2 == 0).all())


class OnlyEven(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 1, -torch.inf)


class LengthOf(transformers.StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_a_prompt_that_fails_leaves_a_cache_that_draws():
    model = tiny_llama({"num_samples": 4, "seed": 0})
    cache, prompt = huggingface.SampledCache(model.config, proposal="exact"), torch.arange(30)[None] % 40
    handle = model.model.layers[1].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lossless(model, prompt, cache)
    handle.remove()
    assert not any(layer.verifies or layer.get_seq_length() for layer in cache.layers)
