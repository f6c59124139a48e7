"""The reference model decodes with a cache as without one where all is drawn, streams and repeats by seed."""

import itertools

import pytest
import torch

import qtx_lab as qtx
from qtx_lab.cache.policies import ExactPolicy, SampledPolicy
from qtx_lab.models.generation import Decoding, Prefill

TEXT = qtx.reference_text()[:400]


@pytest.fixture(scope="module")
def model():
    return qtx.load_reference_model()


def text(model, count=30, **options):
    return b"".join(model.generate(TEXT, count, **options))


def test_decoding_step_by_step_is_the_model_itself(model):
    tokens = qtx.encode(TEXT)[:120].view(2, 60)
    with torch.no_grad():
        expected = model(tokens)[:, 39:]
    prefill = Prefill.of(model, tokens[:, :40])
    every_key = SampledPolicy(proposal="int4", budget=60)
    for policy in (ExactPolicy(), every_key, [ExactPolicy(), *[every_key] * 5]):
        after, state = Decoding.after(prefill, policy), Decoding(model, tokens[:, :40], policy)
        assert torch.equal(after.step(tokens[:, 40]), Decoding.after(prefill, policy).step(tokens[:, 40]))
        logits = [state.logits, *(state.step(tokens[:, i]) for i in range(40, 60))]
        assert torch.equal(after.logits, logits[1])
        assert state.reads.values == 1
        torch.testing.assert_close(torch.stack(logits, 1), expected, atol=2e-4, rtol=1e-4)


def test_tokens_that_the_model_does_not_know_are_named_on_the_call(model):
    with pytest.raises(qtx.ArgumentError, match="prompt holds tokens from 3 to 300; they must be 0 to 255"):
        model.generate(torch.tensor([3, 300]), 3)


def test_exact_and_sampled_agree_where_all_is_drawn(model):
    exact = text(model, proposal=None)
    assert exact == text(model, proposal="exact", num_samples=430)
    assert exact == text(model, proposal="low-rank", num_samples=430)
    for seed in (0, 1):  # bytes that are drawn are the same too
        drawn = [
            text(model, temperature=0.8, generator=torch.Generator().manual_seed(seed), **options)
            for options in ({"proposal": None}, {"num_samples": 430})
        ]
        assert drawn[0] == drawn[1] != exact


def test_it_streams_and_repeats(model):
    stream = model.generate(TEXT, 600, num_samples=8)
    first = list(itertools.islice(stream, 3))
    assert [len(x) for x in first] == [1, 1, 1]
    options = {"num_samples": 8, "temperature": 0.7}
    texts = [text(model, generator=torch.Generator().manual_seed(s), **options) for s in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    tokens = qtx.encode(TEXT)
    assert b"".join(model.generate(tokens, 5, proposal=None)) == text(model, 5, proposal=None)


BAD = [
    ({"max_new_tokens": 625}, qtx.ArgumentError, "400 tokens"),
    ({"max_new_tokens": 5000}, qtx.ArgumentError, "max_new_tokens=5000 .* it must be from 1 to 1023"),
    ({"temperature": 1e-40}, qtx.ArgumentError, "temperature=1e-40 is not allowed: it must be 0"),
    ({"prompt": "half a \ud83d"}, qtx.ArgumentError, "UTF-8 does not have"),
    ({"max_new_tokens": 0}, qtx.ArgumentError, "max_new_tokens=0"),
    ({"prompt": ""}, qtx.ArgumentError, "0 tokens"),
    ({"prompt": torch.zeros(3)}, qtx.DtypeError, "int64"),
    ({"temperature": -1}, qtx.ArgumentError, "temperature=-1"),
    ({"temperature": float("nan")}, qtx.ArgumentError, "temperature=nan"),
    ({"proposal": "lowrank"}, qtx.ArgumentError, "Did you mean 'low-rank'"),
    ({"proposal": None, "rank": 4}, qtx.ArgumentError, "rank=4"),
    ({"num_samples": 0}, qtx.ArgumentError, "num_samples=0"),
    ({"generator": 3}, qtx.DtypeError, "generator"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD)
def test_bad_input_is_refused_before_the_first_byte(model, options, error, match):
    with pytest.raises(error, match=match):
        model.generate(**{"prompt": TEXT, **options})


@pytest.mark.parametrize("model", ["reference", None, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_named(model):
    with pytest.raises(qtx.DtypeError, match=r"model.* it must be a language model, as load_language_model"):
        qtx.generate(model, "a", 1)
    if model != "reference":
        with pytest.raises(
            qtx.DtypeError, match=r"model is a \w+; it must be the name of a model, or a path"
        ):
            qtx.attention_inputs(model, "a")


def test_a_full_context_is_refused(model):
    state = Decoding(model, qtx.encode(qtx.reference_text())[None, :1024], ExactPolicy())
    with pytest.raises(qtx.ArgumentError, match="full"):
        state.step(torch.tensor([32]))


def test_policies_must_be_one_a_layer(model):
    with pytest.raises(qtx.ArgumentError, match="policy has 2 policies; reference has 6 layers"):
        Decoding(model, qtx.encode(TEXT)[None], [ExactPolicy()] * 2)
