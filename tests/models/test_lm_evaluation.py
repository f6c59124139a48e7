"""lm-evaluation-harness runs the lab's policies on a local task; results go to the hub's schema."""

import importlib.util
import json
import math

import pytest
import torch
from click.testing import CliRunner

import qtx_lab as qtx
from qtx_lab.cli import main
from qtx_lab.models.calibration import adapter_policies, adapter_settings
from qtx_lab.models.hub_results import HubResult, lm_eval_rows, write_hub_rows
from qtx_lab.models.lm_evaluation import PolicyScorer

HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(
    not HARNESS, reason="lm_eval is not installed: pip install 'qtx-lab[lm-eval]'"
)

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: {target}
{more}
"""
CHOICES = 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]'
GENERATED = "generation_kwargs: {until: ['.'], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]"


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Two tasks of six samples each, without a network."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = qtx.reference_text()
    starts = [text[200 * i : 200 * i + 150] for i in range(6)]
    rows = [
        {"text": start, "choices": [text[200 * i + 150 : 200 * i + 158], "qzxv"], "answer": 0}
        for i, start in enumerate(starts)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, kind, target, more in (
        ("words", "multiple_choice", "answer", CHOICES),
        ("text", "generate_until", "'x'", GENERATED),
    ):
        (folder / f"{name}.yaml").write_text(
            TASK.format(name=name, data=data, kind=kind, target=target, more=more)
        )
    return folder


@needs_harness
def test_the_harness_scores_a_local_task_by_a_policy(tasks, tmp_path):
    hub = tmp_path / "hub.jsonl"
    for policy in ("policy=exact", "policy=sampled,budget=16,proposal=int4"):
        arguments = ["--model", "qtx", "--model_args", f"model=reference,{policy}", "--tasks", "words,text"]
        more = ["--include_path", str(tasks), "--hub", str(hub)]
        done = CliRunner().invoke(main, ["lm-eval", *arguments, *more], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        rows = {(x["dataset"], x["metric"]): x for x in map(json.loads, hub.read_text().splitlines())}
        seen = rows["words", "acc"]
        assert seen["value"] >= 0.8  # the text itself against four rare letters
        assert (seen["sample_size"], seen["llm"], seen["baseline"]) == (
            6,
            "reference",
            policy[7:].split(",")[0],
        )
        assert ("text", "exact_match") in rows


def test_log_probabilities_are_those_of_the_model(tmp_path):
    file = tmp_path / "settings.json"
    every_key = {"num_samples": 4096, "proposal": "int4", "share_keys": True}
    file.write_text(json.dumps({"qtx_sampled": every_key}))
    text = qtx.reference_text()
    model = qtx.load_language_model("reference")
    tokens = model.encode(text)[:80].tolist()
    with torch.no_grad():
        log_p = model(torch.tensor([tokens])).log_softmax(-1)[0]
    expected = float(log_p[59:79].gather(-1, torch.tensor(tokens[60:])[:, None]).sum())
    likeliest = log_p[59:60].argmax(-1).tolist()
    for options in ({}, {"settings": str(file)}, {"policy": "sampled", "budget": 1.0}):
        scorer = PolicyScorer("reference", **options)
        assert scorer.score(tokens[:60], tokens[60:])[0] == pytest.approx(expected, rel=1e-3)
        assert scorer.score(tokens[:60], likeliest)[1]
        start = scorer.generate(tokens[:60], [], 5)
        assert start == qtx.generate(model, torch.tensor(tokens[:60]), 5, proposal=None)
        end = start[-2:]
        assert scorer.generate(tokens[:60], ["never", end], 5) == start[: start.index(end)]
    assert scorer.score(tokens[:1], tokens[1:3])[0] < 0
    with pytest.raises(qtx.TextError, match="A request has 1080 tokens; the context has 1024"):
        scorer.check_length(1080)
    with pytest.raises(qtx.ArgumentError, match="settings is not allowed together"):
        PolicyScorer("reference", policy="sampled", settings=str(file))
    file.write_text("{")
    with pytest.raises(qtx.ArgumentError, match="is not JSON"):
        PolicyScorer("reference", settings=str(file))


@pytest.mark.skipif(HARNESS, reason="lm_eval is installed")
def test_without_the_harness_the_command_says_what_to_install():
    done = CliRunner().invoke(main, ["lm-eval", "--tasks", "x"])
    assert done.exit_code == 2
    assert "needs lm_eval: pip install 'qtx-lab[lm-eval]'" in done.output
    done = CliRunner().invoke(main, ["lm-eval", "--help"])
    assert done.exit_code == 0
    for words in ("Usage: ", "--model qtx", "--hub PATH", "needs lm_eval: pip install 'qtx-lab[lm-eval]'"):
        assert words in done.output


def test_settings_come_back_as_policies():
    from qtx_lab.cache.policies import ExactPolicy, SampledPolicy

    policies = (
        SampledPolicy(proposal="int4", budget=9, shared=True, seed=5),
        SampledPolicy(proposal="low-rank", rank=8, budget=12, seed=5),
        ExactPolicy(),
    )
    assert adapter_policies(adapter_settings(policies, 5), 3) == policies


def test_rows_of_the_hub_have_their_spread(tmp_path):
    seen = {
        "results": {
            "a": {
                "alias": "a",
                "acc,none": 0.25,
                "acc_stderr,none": 0.125,
                "em,strict": 1.0,
                "em_stderr,strict": "N/A",
            },
            "group": {"acc,none": 0.25, "acc_stderr,none": 0.1},
        },
        "n-samples": {"a": {"original": 16, "effective": 12}},
    }
    rows = lm_eval_rows(seen, baseline="quest", llm="m", target_sparsity=5.0)
    assert [(x.metric, x.value, x.sample_size) for x in rows] == [("acc", 0.25, 12), ("em,strict", 1.0, 12)]
    assert rows[0].standard_deviation == pytest.approx(0.125 * math.sqrt(12))
    assert rows[1].standard_deviation is None
    path = tmp_path / "rows.jsonl"
    write_hub_rows(path, rows)
    assert [HubResult(**json.loads(line)) for line in path.read_text().splitlines()] == rows
    with pytest.raises(qtx.ArgumentError, match="results and n-samples are missing"):
        lm_eval_rows({}, baseline="x", llm="m")
    with pytest.raises(qtx.ShapeError, match="2 or more samples"):
        HubResult.of_scores([1.0], benchmark="b", dataset="d", baseline="x", llm="m", metric="acc")
