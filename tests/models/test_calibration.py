"""Calibrated settings keep the bound on other texts, read little, and say where they fail."""

import copy
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import qtx_lab as qtx
from qtx_lab.cache.policies import ExactPolicy, SampledPolicy, SinkWindowPolicy
from qtx_lab.cli import main
from qtx_lab.models.calibration import adapter_settings
from qtx_lab.models.generation import Decoding
from qtx_lab.models.huggingface_settings import read_settings
from qtx_lab.models.layer_options import LayerOption, Window, cheapest, output_gradients

TEXT = qtx.reference_text()
QUICK = {"length": 200, "windows": 6, "scored_tokens": 12, "progress": False}
BOUND = 0.1


@pytest.fixture(scope="module")
def model():
    return qtx.load_language_model("reference")


@pytest.fixture(scope="module")
def calibration(model):
    return qtx.calibrate(model, TEXT[:9000], BOUND, **QUICK)


@pytest.fixture(scope="module")
def window(model):
    return Window.read(model, model.encode(TEXT)[None, 3000:3233], 32)


def test_the_choice_holds_on_held_out_text_and_reads_little(calibration):
    assert calibration.verified
    assert calibration.held_out.loss.high <= BOUND
    assert calibration.held_out.reads.values < 0.5
    assert (calibration.found.windows, calibration.held_out.windows) == (2, 4)
    assert calibration.held_out.tokens == 4 * 12
    assert "within the bound of 10.00 %" in str(calibration)
    assert len(calibration.policies) == 6


def test_it_is_the_cheapest_candidate_that_is_expected_to_hold(calibration):
    sizes = [x.measured.reads.bytes for x in calibration.candidates]
    assert sizes == sorted(sizes)
    fit = [x for x in calibration.candidates if x.expected <= BOUND]
    assert fit[0].policies == calibration.policies
    kl = [x.measured.kl.mean for x in calibration.candidates]
    assert kl[0] > 3 * kl[-1]  # more bytes, less divergence


def test_the_same_seed_gives_the_same_calibration(model, calibration):
    assert qtx.calibrate(model, TEXT[:9000], BOUND, **QUICK) == calibration


def test_predicted_divergence_is_measured_divergence(model, window):
    """The Fisher information of an output tells the KL of small random errors of it, to a third."""
    generator = torch.Generator().manual_seed(0)
    gradients = [
        torch.cat(x) for x in zip(*(output_gradients(window, generator) for _ in range(8)), strict=True)
    ]  # 32 samples
    prefill, prompt = window.prefill(), window.prompt
    for layer in (0, 3, 5):
        errors = []
        kls = []
        for _ in range(12):
            q = window.layers[layer][0][:, :, prompt:]
            error = 0.03 * torch.randn(q.shape, generator=generator) * q.std()
            state = Decoding.after(prefill, ExactPolicy())
            attend = state._attend

            def changed(i, *qkv, error=error, attend=attend, layer=layer):
                return attend(i, *qkv) + (error if i == layer else 0)

            state._attend = changed
            log_q = state.steps(window.continuation)[0].log_softmax(-1)
            log_p = window.log_probabilities
            kls.append(float((log_p.exp() * (log_p - log_q)).sum()))
            along = torch.einsum("yhte,hte->yht", gradients[layer], error[0])
            errors.append(float(along.square().sum((1, 2)).mean()) / 2)
        assert np.mean(errors) == pytest.approx(np.mean(kls), rel=0.35)


def test_a_window_is_the_model_itself(model, window):
    tokens = window.tokens
    with torch.no_grad():
        expected = model(tokens)[0, 200:232].log_softmax(-1)
    torch.testing.assert_close(window.log_probabilities, expected, atol=1e-4, rtol=1e-4)
    state = Decoding.after(window.prefill(), ExactPolicy())
    actual = state.steps(window.continuation)[0].log_softmax(-1)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    assert torch.equal(window.targets, tokens[0, 201:])


def test_the_cheapest_choice_is_that_of_all_choices():
    """Against every combination, where each layer's options are convex."""
    policy = ExactPolicy()
    rng = np.random.default_rng(0)
    options = [
        [LayerOption(policy, scale / 4**i, 0.1 + 0.1 * i) for i in range(4)]
        for scale in rng.uniform(0.1, 3, 4)
    ]
    for bound in (5.0, 1.0, 0.3, 0.1):
        chosen = cheapest(options, bound)
        kl, size = sum(x.divergence for x in chosen), sum(x.bytes for x in chosen)
        every = np.stack(np.meshgrid(*[[x.divergence for x in layer] for layer in options])).reshape(4, -1)
        bytes_of = np.stack(np.meshgrid(*[[x.bytes for x in layer] for layer in options])).reshape(4, -1)
        assert kl <= bound
        assert size <= bytes_of.sum(0)[every.sum(0) <= bound].min() + 0.1 + 1e-9  # at most a step above
        assert size == pytest.approx(bytes_of.sum(0)[every.sum(0) <= kl + 1e-12].min())  # best for its own KL
    assert [x.bytes for x in cheapest([[LayerOption(policy, 0.0, 1.0)]], 1e-9)] == [1.0]


def test_settings_are_those_of_the_adapter(calibration):
    settings = json.loads(json.dumps(calibration.settings))
    by_layer = read_settings(settings, 6)
    for layer, policy in enumerate(calibration.policies):
        mine = by_layer.get(layer, by_layer[None])
        if isinstance(policy, ExactPolicy):
            assert mine["sampler"].exact
        else:
            assert (mine["num_samples"], mine["proposal"], mine["rank"]) == (
                policy.budget,
                policy.proposal,
                policy.rank,
            )
            assert mine["share_keys"] == policy.shared
    mixed = [
        SampledPolicy(proposal="int4", budget=9),
        SampledPolicy(proposal="low-rank", rank=8, budget=9, shared=True),
        ExactPolicy(),
    ]
    assert adapter_settings(mixed, 3) == {
        "num_samples": 9,
        "share_keys": False,
        "seed": 3,
        "layers": {
            "0": {"proposal": "int4"},
            "1": {"proposal": "low-rank", "rank": 8, "share_keys": True},
            "2": {"sampler": "exact"},
        },
    }
    for other in (SinkWindowPolicy(), SampledPolicy(budget=9, recent=0.5), SampledPolicy(budget=0.5)):
        with pytest.raises(qtx.ArgumentError, match=r"policies holds S\w+Policy"):
            adapter_settings([other], 0)


def test_a_bound_on_kl_is_kept(model):
    calibration = qtx.calibrate(model, TEXT[:9000], BOUND, measure="kl", **QUICK)
    assert calibration.verified
    assert calibration.held_out.kl.high <= BOUND
    assert "KL to exact attention" in str(calibration)


def test_a_bound_that_cannot_be_verified_says_so(model):
    """With two windows of 8 tokens to verify on, no draws are sure to keep a bound of a millionth."""
    few = {**QUICK, "windows": 4, "scored_tokens": 8}
    calibration = qtx.calibrate(model, TEXT[:9000], 1e-7, **few)
    exact = all(isinstance(policy, ExactPolicy) for policy in calibration.policies)
    assert exact or not calibration.verified
    if not calibration.verified:
        assert "NOT VERIFIED" in str(calibration)
        assert not calibration.to_dict()["verified"]


BAD = [
    ({"max_loss": 0}, qtx.ArgumentError, "max_loss=0"),
    ({"max_loss": True}, qtx.ArgumentError, "max_loss=True"),
    ({"max_loss": float("nan")}, qtx.ArgumentError, "max_loss=nan"),
    ({"max_loss": float("inf")}, qtx.ArgumentError, "max_loss=inf"),
    ({"max_loss": "1"}, qtx.ArgumentError, "max_loss='1'"),
    ({"measure": "los"}, qtx.ArgumentError, "Did you mean 'loss'"),
    ({"windows": 3}, qtx.ArgumentError, "windows=3"),
    ({"scored_tokens": 0}, qtx.ArgumentError, "scored_tokens=0"),
    ({"length": 1020}, qtx.ArgumentError, "length=1020 is not allowed: reference takes 1024"),
    ({"length": 0}, qtx.ArgumentError, "length=0"),
    ({"confidence": 1}, qtx.ArgumentError, "confidence=1"),
    ({"seed": -1}, qtx.ArgumentError, "seed=-1"),
    ({"seed": (1 << 63) - 1}, qtx.ArgumentError, "seed=9223372036854775807"),
    ({"model": "reference"}, qtx.DtypeError, "model='reference' is a text; it must be a language model"),
    ({"model": torch.nn.Linear(2, 2)}, qtx.DtypeError, "model is a Linear"),
    ({"texts": 3}, qtx.ArgumentError, "texts is not allowed"),
    ({"texts": TEXT[:600]}, qtx.TextError, "texts have 2 windows of 213 tokens"),
    ({"held_out": "short"}, qtx.TextError, "held_out have 0 windows"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD)
def test_bad_input_is_refused_before_any_work(model, options, error, match):
    with pytest.raises(error, match=match):
        qtx.calibrate(**{"model": model, "texts": TEXT[:9000], **QUICK, **options})


def test_numbers_of_numpy_and_torch_are_numbers(model, tmp_path):
    numbers = {"length": np.int64(60), "windows": torch.tensor(4), "scored_tokens": np.int32(4)}
    numbers |= {"seed": np.int64(3), "confidence": np.float32(0.5), "max_loss": torch.tensor(0.5)}
    calibration = qtx.calibrate(model, TEXT[:600], progress=False, **numbers)
    calibration.write_json(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["seed"] == 3


def test_steps_of_known_tokens_are_single_steps(model):
    # In float64: a query's last bit, which hangs on how many are multiplied at once, may change a draw.
    model = copy.deepcopy(model).double()
    tokens = model.encode(TEXT)[None, :80]
    policies = [ExactPolicy(), *[SampledPolicy(proposal="int4", budget=9)] * 5]
    one, all_at_once = (Decoding(model, tokens[:, :60], policies) for _ in range(2))
    logits = torch.stack([one.step(tokens[:, i]) for i in range(60, 80)], 1)
    torch.testing.assert_close(all_at_once.steps(tokens[:, 60:]), logits, atol=1e-9, rtol=1e-9)
    assert (all_at_once.length, all_at_once.reads) == (one.length, one.reads)
    with pytest.raises(qtx.ArgumentError, match="tokens has 1000 tokens; the context has room for 944"):
        all_at_once.steps(torch.zeros(1, 1000, dtype=torch.int64))


def test_the_command_writes_what_it_finds(tmp_path):
    text, result = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text(TEXT[:9000], encoding="utf-8")
    options = ["--text", str(text), "--max-loss", ".1", "--length", "100", "--windows", "6"]
    done = CliRunner().invoke(main, ["calibrate", "reference", *options, "--json", str(result)])
    assert done.exit_code == 0, done.output
    written = json.loads(result.read_text())
    assert written["verified"]
    assert json.loads(done.stdout.splitlines()[-1]) == written["qtx_sampled"]
    assert written["held_out"]["loss"]["high"] <= 0.1
    missing = CliRunner().invoke(main, ["calibrate", "reference", "--text", str(tmp_path / "none")])
    assert missing.exit_code == 2
    assert "cannot be read" in missing.output
