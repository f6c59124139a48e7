"""Transformers' models, made small, give eager attention's logits, exact or with many draws, or refuse."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers

from qtx_lab.bench.huggingface import (
    SETTINGS,
    TABLE,
    as_table,
    cases,
    count_verdicts,
    make_model,
    try_model,
)
from qtx_lab.bench.small_models import KINDS, model_classes
from qtx_lab.models import huggingface

transformers.logging.set_verbosity_error()
huggingface.register()

SAMPLE = {
    "LlamaForCausalLM": "causal",
    "GptOssForCausalLM": "causal",  # a sink for each head
    "GraniteSWAForCausalLM": "causal",  # sinks as a factor of the output, and windows
    "Inkling2ForCausalLM": "causal",  # a sink for each query, and a position bias
    "Gemma2ForCausalLM": "causal",  # softcap
    "Gemma4ForCausalLM": "causal",  # layers that read the keys of others, for the last queries only
    "DeepseekV32ForCausalLM": "causal",  # selects keys; keys and values of different widths
    "DeepseekV4ForCausalLM": "causal",  # keys that the mask knows nothing of
    "Llama4ForCausalLM": "causal",  # chunks
    "MoshiForCausalLM": "causal",  # a config with parts, whose layers read the whole
    "BltForCausalLM": "causal",  # rows that see no key
    "BloomForCausalLM": "causal",  # attention of its own
    "MambaForCausalLM": "causal",  # no attention
    "BertForMaskedLM": "masked",
    "ModernBertForMaskedLM": "masked",  # windows in both directions
    "T5ForConditionalGeneration": "encoder-decoder",  # a position bias
    "BigBirdPegasusForConditionalGeneration": "encoder-decoder",  # attention of its own in the encoder
    "NllbMoeForConditionalGeneration": "encoder-decoder",  # decoder modules that do not say that they are one
}
"""Classes with every mechanism that the models have, and their kinds."""

POWER = ["LlamaForCausalLM", "GptOssForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"]


@functools.cache
def table() -> str:
    text = TABLE.read_text(encoding="utf-8")
    assert f"transformers {transformers.__version__}:" in text, f"write {TABLE.name} again, as it says"
    return text


@pytest.mark.parametrize(("name", "kind"), SAMPLE.items())
def test_a_model_is_right_or_refused_as_the_table_says(name, kind):
    report = try_model(getattr(transformers, name), kind)
    assert {outcome.verdict for outcome in report.outcomes.values()} <= {"right", "refused"}, report
    row = next(line for line in as_table([report]).splitlines() if line.startswith(f"| {name} |"))
    assert row in table().splitlines()


def test_the_table_has_every_class():
    for kind in KINDS:
        assert f"## {kind}: {len(model_classes(kind))} classes" in table()
        assert all(
            f"| {cls.__name__} |" in table() or f"- {cls.__name__}:" in table() for cls in model_classes(kind)
        )


@pytest.mark.parametrize("name", POWER)
def test_a_planted_mistake_is_seen(name, monkeypatch):
    """Attention at another temperature, and of the mean value in place of the drawn ones."""
    forward = huggingface.attention_forward

    def hotter(module, query, *args, **kwargs):
        return forward(module, query * 0.9, *args, **kwargs)

    monkeypatch.setattr(huggingface, "attention_forward", hotter)
    report = try_model(getattr(transformers, name), SAMPLE[name])
    assert {outcome.verdict for outcome in report.outcomes.values()} == {"wrong"}


WITH_GRADIENTS = {
    "GptOssForCausalLM": "causal",
    "Gemma2ForCausalLM": "causal",
    "Inkling2ForCausalLM": "causal",
    "BloomForCausalLM": "causal",
    "T5ForConditionalGeneration": "encoder-decoder",
}


@pytest.mark.parametrize(("name", "kind"), WITH_GRADIENTS.items())
def test_gradients_are_those_of_eager_attention(name, kind):
    """Of sinks, caps and biases, too: all keys are in the head, so that nothing is left to chance."""
    gradients = []
    for attention, settings in (("eager", None), ("qtx_sampled", SETTINGS["drawn"])):
        model = make_model(getattr(transformers, name), attention, settings)
        cases(model, kind)["plain"]().pow(2).mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    expected, actual = gradients
    assert actual.keys() == expected.keys()
    for parameter, grad in expected.items():
        torch.testing.assert_close(actual[parameter], grad, atol=1e-5, rtol=1e-3, msg=parameter)


def test_every_model_is_right_or_refused(soak):
    """All classes, in `make soak`: three to six minutes on one core."""
    if not soak:
        pytest.skip("make soak: the sample above stands for it")
    reports = [try_model(cls, kind) for kind in KINDS for cls in model_classes(kind)]
    counts = count_verdicts(reports)
    assert all(
        not any(f"{name} {bad}" in outcomes for name in ("exact", "drawn") for bad in ("wrong", "error"))
        for outcomes in counts.values()
    ), counts
    assert as_table(reports) == table()
